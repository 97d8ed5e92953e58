//! What the ops work on, in the GPU's memory.

use std::ops::Range;
use std::sync::Arc;

use super::CudaDevice;
use super::context::Context;
use super::lists::{ListShape, Lists};
use super::memory::{Address, DeviceBuffer, HostBuffer};
use crate::device::DenseShape;
use crate::error::{Error, Result};
use crate::units::Dtype;

pub(super) const F32: usize = 4;
pub(super) const HALF: usize = 2;
/// Most candidates that `topk` gives.
pub const MOST_CANDIDATES: usize = 64;

/// float32 `[rows, cols]` on the device.
pub struct CudaRows(pub(super) DeviceBuffer);

/// 16-bit `[rows, cols]` on the device.
pub struct CudaActs {
    pub(super) buffer: DeviceBuffer,
    pub(super) half: Dtype,
    /// Of what the last op wrote.
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// Where the host reads results.
pub struct Mirror(pub(super) HostBuffer);

/// What the ops of a pass share.
pub struct CudaLists {
    pub(super) shape: ListShape,
    pub(super) lists: Lists,
    pub(super) numbers: DeviceBuffer,
    /// `[rows, head size / 2]` each.
    pub(super) cos: DeviceBuffer,
    pub(super) sin: DeviceBuffer,
    /// `[rows, heads, head size]`, turned and rounded.
    pub(super) q: DeviceBuffer,
    pub(super) sums: DeviceBuffer,
    pub(super) maxima: DeviceBuffer,
}

/// What vision's attention works in.
pub struct CudaDense {
    pub(super) cos: DeviceBuffer,
    pub(super) sin: DeviceBuffer,
    pub(super) q: DeviceBuffer,
    pub(super) k: DeviceBuffer,
    pub(super) v: DeviceBuffer,
    pub(super) numbers: DeviceBuffer,
    pub(super) list: Vec<i32>,
}

/// The best of each row of each block of logits.
pub struct Best {
    pub(super) ids: DeviceBuffer,
    pub(super) values: DeviceBuffer,
    pub(super) host_ids: HostBuffer,
    pub(super) host_values: HostBuffer,
}

impl CudaRows {
    /// Element `first` and `len` behind it.
    pub(super) fn at(&self, first: usize, len: usize) -> Address {
        self.0.at(first * F32, len * F32)
    }
}

impl CudaActs {
    /// Takes the shape that an op is about to write.
    pub(super) fn begin(&mut self, rows: usize, cols: usize) -> Address {
        (self.rows, self.cols) = (rows, cols);
        self.buffer.at(0, rows * cols * HALF)
    }

    pub fn round_to(&mut self, dtype: Dtype) {
        self.half = dtype;
    }

    pub fn dtype(&self) -> Dtype {
        self.half
    }
}

impl CudaLists {
    /// Bytes of device memory.
    pub fn bytes(s: &ListShape) -> u64 {
        Self::parts(s)
            .iter()
            .map(|b| DeviceBuffer::rounded(*b as u64))
            .sum()
    }

    /// Numbers, cos, sin, q, sums, maxima.
    fn parts(s: &ListShape) -> [usize; 6] {
        let angles = s.rows * s.head_size / 2 * F32;
        let partial = s.items() * s.kv_heads * 16;
        [
            s.numbers() * 4,
            angles,
            angles,
            s.rows * s.heads * s.head_size * HALF,
            partial * s.head_size * F32,
            partial * 2 * F32,
        ]
    }

    fn new(context: &Arc<Context>, shape: &ListShape) -> Result<CudaLists> {
        let [numbers, cos, sin, q, sums, maxima] = Self::parts(shape);
        let make = |bytes: usize| DeviceBuffer::new(context, bytes as u64, "room for attention");
        Ok(CudaLists {
            lists: Lists::new(shape),
            shape: shape.clone(),
            numbers: make(numbers)?,
            cos: make(cos)?,
            sin: make(sin)?,
            q: make(q)?,
            sums: make(sums)?,
            maxima: make(maxima)?,
        })
    }

    pub(super) fn list(&self, range: &Range<usize>) -> Address {
        self.numbers.at(range.start * 4, range.len() * 4)
    }
}

impl CudaDense {
    pub fn bytes(rows: usize, shape: &DenseShape) -> u64 {
        Self::parts(rows, shape)
            .iter()
            .map(|b| DeviceBuffer::rounded(*b as u64))
            .sum()
    }

    /// cos, sin, q, k, v, numbers.
    fn parts(rows: usize, s: &DenseShape) -> [usize; 6] {
        let angles = rows * s.head_size / 2 * F32;
        let values = rows * s.heads * s.head_size * HALF;
        // A window has a row at least; its tiles hold one row at least.
        [
            angles,
            angles,
            values,
            values,
            values,
            (rows + 8 + 2 * rows) * 4,
        ]
    }
}

impl Best {
    pub fn bytes(tiles: usize, rows: usize) -> u64 {
        2 * DeviceBuffer::rounded((tiles * rows * MOST_CANDIDATES * 4) as u64)
    }
}

impl CudaDevice {
    fn buffer(&self, bytes: usize, what: &str) -> Result<DeviceBuffer> {
        DeviceBuffer::new(&self.context, bytes as u64, what)
    }

    pub fn rows(&self, elements: usize) -> Result<CudaRows> {
        Ok(CudaRows(
            self.buffer(elements * F32, "room for activations")?,
        ))
    }

    pub fn rows_bytes(elements: usize) -> u64 {
        DeviceBuffer::rounded((elements * F32) as u64)
    }

    pub fn acts(&self, elements: usize) -> Result<CudaActs> {
        Ok(CudaActs {
            buffer: self.buffer(elements * HALF, "room for activations")?,
            half: self.half,
            rows: 0,
            cols: 0,
        })
    }

    pub fn acts_bytes(elements: usize) -> u64 {
        DeviceBuffer::rounded((elements * HALF) as u64)
    }

    pub fn mirror(&self, elements: usize) -> Result<Mirror> {
        Ok(Mirror(HostBuffer::new(
            &self.context,
            elements * F32,
            "results",
        )?))
    }

    pub fn lists(&self, shape: &ListShape) -> Result<CudaLists> {
        if shape.head_size != self.head_size {
            return Err(Error::internal("the GPU was opened for another head size"));
        }
        CudaLists::new(&self.context, shape)
    }

    pub fn dense(&self, rows: usize, shape: &DenseShape) -> Result<CudaDense> {
        let [cos, sin, q, k, v, numbers] = CudaDense::parts(rows, shape);
        let make = |bytes| self.buffer(bytes, "room for the vision tower");
        Ok(CudaDense {
            cos: make(cos)?,
            sin: make(sin)?,
            q: make(q)?,
            k: make(k)?,
            v: make(v)?,
            numbers: make(numbers)?,
            list: Vec::with_capacity(numbers / 4),
        })
    }

    pub fn best(&self, tiles: usize, rows: usize) -> Result<Best> {
        let bytes = tiles * rows * MOST_CANDIDATES * 4;
        let what = "the best logits";
        Ok(Best {
            ids: self.buffer(bytes, what)?,
            values: self.buffer(bytes, what)?,
            host_ids: HostBuffer::new(&self.context, bytes, what)?,
            host_values: HostBuffer::new(&self.context, bytes, what)?,
        })
    }

    /// Host memory of the pinned buffers of a device and of [`CudaDevice::best`].
    pub fn best_host_bytes(tiles: usize, rows: usize) -> u64 {
        (2 * tiles * rows * MOST_CANDIDATES * 4) as u64
    }
}
