//! Where the forward pass computes. Each op is defined once; a device is a way to run it.

mod buffers;
pub mod cpu;
pub mod cuda;
mod ops;

use std::marker::PhantomData;

use crate::units::Dtype;

pub use buffers::{
    Acts, AttnShape, Best, Dense, DenseShape, Into, Kv, KvMove, KvShape, Lists, Mirror, PassRows,
    Product, Room, Rows, Span,
};
pub use cpu::KV_BLOCK_TOKENS;
pub use cuda::{CudaDevice, CudaOptions, ListShape};
pub use ops::{Device, DeviceKind};

/// A weight matrix (or vector: one row) where it lies, in its stored type. `data` may start at any address.
#[derive(Clone, Copy)]
pub struct WeightView<'a> {
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    /// Bytes from one row to the next.
    pub row_stride: usize,
    pub data: Bytes<'a>,
}

/// A weight's bytes, in the memory of the device that computes with them.
#[derive(Clone, Copy)]
pub enum Bytes<'a> {
    Host(&'a [u8]),
    Device(DeviceBytes<'a>),
}

/// Bytes in a GPU's memory: an address and how many. `'a` is the slot's loan.
#[derive(Clone, Copy)]
pub struct DeviceBytes<'a> {
    address: u64,
    len: usize,
    slot: PhantomData<&'a ()>,
}

impl<'a> Bytes<'a> {
    pub fn len(&self) -> usize {
        match self {
            Bytes::Host(bytes) => bytes.len(),
            Bytes::Device(bytes) => bytes.len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From byte `first` on, `len` of them.
    ///
    /// # Panics
    /// Past the end.
    pub fn part(&self, first: usize, len: usize) -> Bytes<'a> {
        assert!(first + len <= self.len(), "a part of a weight's bytes");
        match self {
            Bytes::Host(bytes) => Bytes::Host(&bytes[first..first + len]),
            Bytes::Device(bytes) => Bytes::Device(DeviceBytes {
                address: bytes.address + first as u64,
                len,
                slot: PhantomData,
            }),
        }
    }
}

impl<'a> WeightView<'a> {
    /// Rows without gaps between them.
    pub fn packed(dtype: Dtype, rows: usize, cols: usize, data: &'a [u8]) -> WeightView<'a> {
        WeightView {
            dtype,
            rows,
            cols,
            row_stride: cols * dtype.bytes(),
            data: Bytes::Host(data),
        }
    }

    /// Rows `first..first + rows` of the same matrix.
    ///
    /// # Panics
    /// When the matrix has fewer rows.
    pub fn slice_rows(&self, first: usize, rows: usize) -> WeightView<'a> {
        assert!(first + rows <= self.rows, "rows of a weight view");
        let from = (first * self.row_stride).min(self.data.len());
        WeightView {
            rows,
            data: self.data.part(from, self.data.len() - from),
            ..*self
        }
    }

    /// The bytes, which must be the host's.
    ///
    /// # Panics
    /// When they lie on a GPU: a weight handed to the wrong device.
    pub(crate) fn host(&self) -> &'a [u8] {
        match self.data {
            Bytes::Host(bytes) => bytes,
            Bytes::Device(_) => panic!("a weight on the GPU was handed to the CPU"),
        }
    }

    /// Where the bytes lie on the GPU, if they do.
    pub(crate) fn device_address(&self) -> Option<u64> {
        match self.data {
            Bytes::Host(_) => None,
            Bytes::Device(bytes) => Some(bytes.address),
        }
    }

    /// Row `row`'s bytes, which must be the host's.
    ///
    /// # Panics
    /// When the matrix has fewer rows.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of a weight view");
        &self.host()[row * self.row_stride..][..self.cols * self.dtype.bytes()]
    }

    /// Asserts that `data` holds the shape: what the unsafe code of the devices relies on.
    pub(crate) fn check(&self) {
        let row_bytes = self.cols * self.dtype.bytes();
        let needed = match self.rows {
            0 => 0,
            rows => (rows - 1) * self.row_stride + row_bytes,
        };
        assert!(
            self.data.len() >= needed && (self.rows <= 1 || self.row_stride >= row_bytes),
            "{} bytes do not hold {} x {} {}",
            self.data.len(),
            self.rows,
            self.cols,
            self.dtype
        );
    }

    /// Element `col` of the first row as float32.
    pub(crate) fn element(&self, col: usize) -> f32 {
        let size = self.dtype.bytes();
        widen(self.dtype, &self.host()[col * size..][..size])
    }
}

/// One element as float32.
fn widen(dtype: Dtype, bytes: &[u8]) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        Dtype::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        Dtype::BF16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    }
}
