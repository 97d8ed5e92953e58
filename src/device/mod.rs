//! Where the forward pass computes. Each op is defined once; a device is a way to run it.

pub mod cpu;
mod ops;

use crate::units::Dtype;

pub use ops::{Acts, AttnShape, Device, Into, Kv, KvShape, Rows, Span};

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
