//! Where the forward pass computes. Each op is defined once; a device is a way to run it.

pub mod cpu;
mod ops;

use crate::units::Dtype;

pub use ops::{Acts, AttnShape, DenseShape, Device, Into, Kv, KvShape, Rows, Span};

/// A weight matrix (or vector: one row) where it lies, in its stored type. `data` may start at any address.
#[derive(Clone, Copy)]
pub struct WeightView<'a> {
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    /// Bytes from one row to the next.
    pub row_stride: usize,
    pub data: &'a [u8],
}

impl<'a> WeightView<'a> {
    /// Rows without gaps between them.
    pub fn packed(dtype: Dtype, rows: usize, cols: usize, data: &'a [u8]) -> WeightView<'a> {
        WeightView {
            dtype,
            rows,
            cols,
            row_stride: cols * dtype.bytes(),
            data,
        }
    }

    /// Rows `first..first + rows` of the same matrix.
    ///
    /// # Panics
    /// When the matrix has fewer rows.
    pub fn slice_rows(&self, first: usize, rows: usize) -> WeightView<'a> {
        assert!(first + rows <= self.rows, "rows of a weight view");
        WeightView {
            rows,
            data: &self.data[(first * self.row_stride).min(self.data.len())..],
            ..*self
        }
    }

    /// Row `row`'s bytes.
    ///
    /// # Panics
    /// When the matrix has fewer rows.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of a weight view");
        &self.data[row * self.row_stride..][..self.cols * self.dtype.bytes()]
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
        let at = col * self.dtype.bytes();
        let byte = |i: usize| self.data[at + i];
        match self.dtype {
            Dtype::F32 => f32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]),
            Dtype::F16 => half::f16::from_le_bytes([byte(0), byte(1)]).to_f32(),
            Dtype::BF16 => half::bf16::from_le_bytes([byte(0), byte(1)]).to_f32(),
        }
    }
}
