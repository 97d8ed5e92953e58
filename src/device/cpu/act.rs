//! Inputs of matrix products: rounded once to the weights' type, kept as the instruction set wants them.

use super::scratch::Floats;
use super::simd::Simd;
use crate::units::Dtype;

/// Rows start this many elements apart at least, and a vector load may run over a row's end by this many.
const ROW_ALIGN: usize = 32;

/// Rows of activations rounded to `dtype` (round to nearest even), room for them allocated once.
///
/// Where the CPU multiplies bfloat16 pairs they are kept as bfloat16, else as float32 values that `dtype` can hold, so that a
/// product widens nothing but weights. A row is followed by zeros up to its stride.
pub struct ActBuf {
    data: Floats,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    packed: bool,
}

impl ActBuf {
    /// Room for `rows` × `cols` in any dtype, or any shape with no more rows and no more columns. Empty until an op fills it.
    pub fn new(dtype: Dtype, rows: usize, cols: usize) -> ActBuf {
        ActBuf {
            data: Floats::new(rows * row_stride(cols)),
            dtype,
            rows: 0,
            cols: 0,
            packed: false,
        }
    }

    /// Bytes that `new(_, rows, cols)` allocates.
    pub fn bytes_for(rows: usize, cols: usize) -> u64 {
        (rows * row_stride(cols)) as u64 * 4
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Rows the last op wrote.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Columns the last op wrote.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rounds to `dtype` from the next op on: to that of the weights its rows will meet. Empties the buffer.
    pub fn set_dtype(&mut self, dtype: Dtype) {
        self.dtype = dtype;
        self.rows = 0;
    }

    /// Row `row` as float32, exactly. For tests and tools; panics outside what the last op wrote.
    pub fn row(&self, row: usize) -> Vec<f32> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let stride = row_stride(self.cols);
        // SAFETY: `begin` checked that rows × stride elements of up to 4 bytes fit in `data`, and row < rows, col < stride.
        (0..self.cols)
            .map(|col| unsafe {
                if self.packed {
                    let bits = *self.data.as_ptr().cast::<u16>().add(row * stride + col);
                    f32::from_bits(u32::from(bits) << 16)
                } else {
                    *self.data.as_ptr().add(row * stride + col)
                }
            })
            .collect()
    }

    /// Takes a shape for an op that is about to write every element, and zeroes what follows each row.
    pub(crate) fn begin(&mut self, rows: usize, cols: usize, bf16_pairs: bool) -> ActRows {
        let stride = row_stride(cols);
        assert!(
            rows * stride <= self.data.len(),
            "{rows} x {cols} activations need more than the {} elements of this buffer",
            self.data.len()
        );
        self.rows = rows;
        self.cols = cols;
        self.packed = bf16_pairs && self.dtype == Dtype::BF16;
        let base = self.data.as_mut_ptr();
        let kind = match (self.dtype, self.packed) {
            (_, true) => Kind::PackedBf16,
            (Dtype::F32, _) => Kind::F32,
            (Dtype::BF16, _) => Kind::RoundedBf16,
            (Dtype::F16, _) => Kind::RoundedF16,
        };
        for row in 0..rows {
            // SAFETY: rows × stride elements fit (asserted above), an element is 2 or 4 bytes of all-zero-bits zero.
            unsafe {
                let start = row * stride + cols;
                match kind {
                    Kind::PackedBf16 => base.cast::<u16>().add(start).write_bytes(0, stride - cols),
                    _ => base.add(start).write_bytes(0, stride - cols),
                }
            }
        }
        ActRows { base, stride, kind }
    }

    /// First activation, and bytes from one row to the next.
    pub(crate) fn operand(&self) -> (*const u8, usize) {
        let element = if self.packed { 2 } else { 4 };
        (self.data.as_ptr().cast(), row_stride(self.cols) * element)
    }

    pub(crate) fn packed(&self) -> bool {
        self.packed
    }
}

/// Elements from one row to the next: aligned, and never a multiple of a page of float32, so that several rows do not fight for
/// the same cache sets.
fn row_stride(cols: usize) -> usize {
    let stride = cols.div_ceil(ROW_ALIGN) * ROW_ALIGN;
    if stride.is_multiple_of(1024) {
        stride + ROW_ALIGN
    } else {
        stride
    }
}

#[derive(Clone, Copy)]
enum Kind {
    F32,
    RoundedBf16,
    RoundedF16,
    PackedBf16,
}

/// Where an op's threads write an [`ActBuf`] that `begin` has shaped; each row or column range is one thread's.
#[derive(Clone, Copy)]
pub(crate) struct ActRows {
    base: *mut f32,
    stride: usize,
    kind: Kind,
}

// SAFETY: the ops give each element to one task only, and the buffer is mutably borrowed while they run.
unsafe impl Send for ActRows {}
// SAFETY: as above.
unsafe impl Sync for ActRows {}

impl ActRows {
    /// Rounds and writes `n <= LANES` values at `row`, `col`.
    ///
    /// # Safety
    /// `row` and `col..col + n` lie inside the shape given to `begin`, the buffer is still borrowed, and no other thread
    /// touches these elements.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(self, s: S, row: usize, col: usize, v: S::V, n: usize) {
        let at = row * self.stride + col;
        let v = match self.kind {
            Kind::F32 => v,
            Kind::RoundedBf16 | Kind::PackedBf16 => s.round_bf16(v),
            Kind::RoundedF16 => s.round_f16(v),
        };
        // SAFETY: the caller's promise; a partial vector is staged in a buffer of the largest vector's size.
        unsafe {
            match self.kind {
                Kind::PackedBf16 if n < S::LANES => {
                    let mut staged = [0u16; super::simd::MAX_LANES];
                    s.store_bf16(staged.as_mut_ptr(), v);
                    let to = self.base.cast::<u16>().add(at);
                    std::ptr::copy_nonoverlapping(staged.as_ptr(), to, n);
                }
                Kind::PackedBf16 => s.store_bf16(self.base.cast::<u16>().add(at), v),
                _ if n < S::LANES => s.store_some(self.base.add(at), v, n),
                _ => s.store(self.base.add(at), v),
            }
        }
    }
}
