//! Inputs of matrix products, kept as the instruction set multiplies them.
//!
//! Layout: [block of K][row][K_BLOCK]. A product walks all rows of one block of K at a time, so that is what lies together.

use super::scratch::{Floats, K_BLOCK};
use super::simd::{Format, Isa, MAX_LANES, Simd};
use crate::units::Dtype;

/// A vector load may run over the end of a row's last block up to a multiple of this.
const ROW_ALIGN: usize = 32;

/// How elements are placed for a number of rows and columns.
#[derive(Clone, Copy)]
struct Layout {
    /// Elements from one row to the next within a block of K.
    row: usize,
    /// Elements from one block of K to the next.
    block: usize,
    blocks: usize,
}

impl Layout {
    fn new(rows: usize, cols: usize) -> Layout {
        let row = K_BLOCK.min(cols.next_multiple_of(ROW_ALIGN));
        Layout {
            row,
            block: rows * row,
            blocks: cols.div_ceil(K_BLOCK),
        }
    }
    fn elements(self) -> usize {
        self.blocks * self.block
    }
    /// Where an element lies in a plain or packed format.
    #[inline(always)]
    fn at(self, row: usize, col: usize) -> usize {
        col / K_BLOCK * self.block + row * self.row + col % K_BLOCK
    }
    /// Where an element lies in any format.
    #[inline(always)]
    fn place(self, format: Format, row: usize, col: usize) -> usize {
        match format {
            Format::Split { lanes } => {
                let within = col % (2 * lanes);
                self.at(row, col - within) + within / 2 + within % 2 * lanes
            }
            Format::Plain | Format::Packed => self.at(row, col),
        }
    }
}

/// Rows of activations for products with weights of `dtype`, room for them allocated once.
///
/// Where the CPU multiplies bfloat16 pairs they are rounded to bfloat16 (to nearest even), once. Elsewhere products multiply
/// float32: weights are widened, and rounding activations would cost accuracy and save nothing, so they stay as they are.
/// A row is followed by zeros up to a whole vector.
pub struct ActBuf {
    data: Floats,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    format: Format,
    exact: bool,
}

impl ActBuf {
    /// Room for `rows` × `cols` in any dtype, or any shape with no more rows and no more columns. Empty until an op fills it.
    pub fn new(dtype: Dtype, rows: usize, cols: usize) -> ActBuf {
        ActBuf {
            data: Floats::new(Layout::new(rows, cols).elements()),
            dtype,
            rows: 0,
            cols: 0,
            format: Format::Plain,
            exact: false,
        }
    }

    /// Bytes that `new(_, rows, cols)` allocates.
    pub fn bytes_for(rows: usize, cols: usize) -> u64 {
        Layout::new(rows, cols).elements() as u64 * 4
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

    /// For weights of `dtype` from the next op on. Empties the buffer.
    pub fn set_dtype(&mut self, dtype: Dtype) {
        self.dtype = dtype;
        self.exact = false;
        self.rows = 0;
    }

    /// As [`ActBuf::set_dtype`], kept in float32 on every instruction set: twice the arithmetic where bfloat16 pairs would be multiplied.
    pub fn keep_exact(&mut self, dtype: Dtype) {
        self.set_dtype(dtype);
        self.exact = true;
    }

    /// Row `row` as float32, exactly. For tests and tools; panics outside what the last op wrote.
    pub fn row(&self, row: usize) -> Vec<f32> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let layout = Layout::new(self.rows, self.cols);
        // SAFETY: `begin` checked that the layout's elements, of up to 4 bytes, fit in `data`; row and col are inside it.
        (0..self.cols)
            .map(|col| unsafe {
                let at = layout.place(self.format, row, col);
                if self.format == Format::Packed {
                    let bits = *self.data.as_ptr().cast::<u16>().add(at);
                    f32::from_bits(u32::from(bits) << 16)
                } else {
                    *self.data.as_ptr().add(at)
                }
            })
            .collect()
    }

    /// Takes a shape for an op that is about to write every element, and zeroes what follows each row.
    pub(crate) fn begin(&mut self, rows: usize, cols: usize, isa: Isa) -> ActRows {
        let format = match self.exact {
            true => isa.exact_format(self.dtype),
            false => isa.format(self.dtype),
        };
        self.begin_as(rows, cols, format)
    }

    /// As `begin`, in a format that need not be an instruction set's.
    pub(super) fn begin_as(&mut self, rows: usize, cols: usize, format: Format) -> ActRows {
        let layout = Layout::new(rows, cols);
        assert!(
            layout.elements() <= self.data.len(),
            "{rows} x {cols} activations need more than the {} elements of this buffer",
            self.data.len()
        );
        self.rows = rows;
        self.cols = cols;
        self.format = format;
        let to = ActRows {
            base: self.data.as_mut_ptr(),
            layout,
            format: self.format,
        };
        let end = cols.next_multiple_of(ROW_ALIGN.min(layout.row.max(1)));
        for row in 0..rows {
            for col in cols..end {
                // SAFETY: `end` is inside the row's last block, and the layout fits (asserted above).
                unsafe { to.put_one(row, col, 0.0) }
            }
        }
        to
    }

    /// Where a product finds them.
    pub(crate) fn operand(&self) -> Operand {
        let element = match self.format {
            Format::Packed => 2,
            Format::Plain | Format::Split { .. } => 4,
        };
        let layout = Layout::new(self.rows, self.cols);
        Operand {
            base: self.data.as_ptr().cast(),
            row_bytes: layout.row * element,
            block_bytes: layout.block * element,
        }
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }
}

/// An [`ActBuf`] as a product reads it.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    base: *const u8,
    /// From one row to the next.
    pub(crate) row_bytes: usize,
    block_bytes: usize,
}

impl Operand {
    /// Element `k`, the first of a block of K, of row `row`.
    #[inline(always)]
    pub(crate) fn at(self, k: usize, row: usize) -> *const u8 {
        self.base
            .wrapping_add(k / K_BLOCK * self.block_bytes + row * self.row_bytes)
    }
}

/// Where an op's threads write an [`ActBuf`] that `begin` has shaped; each row or column range is one thread's.
#[derive(Clone, Copy)]
pub(crate) struct ActRows {
    base: *mut f32,
    layout: Layout,
    format: Format,
}

// SAFETY: the ops give each element to one task only, and the buffer is mutably borrowed while they run.
unsafe impl Send for ActRows {}
// SAFETY: as above.
unsafe impl Sync for ActRows {}

impl ActRows {
    /// Writes `n <= LANES` values, rounded where they are packed, at `row`, `col`.
    ///
    /// # Safety
    /// `row` and `col..col + n` lie inside the shape given to `begin`, the buffer is still borrowed, and no other thread
    /// touches these elements.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(self, s: S, row: usize, col: usize, v: S::V, n: usize) {
        let v = match self.format {
            Format::Packed => s.round_bf16(v),
            Format::Plain | Format::Split { .. } => v,
        };
        // SAFETY: the caller's promise. A vector at a multiple of its length crosses no block and no group.
        unsafe {
            if n < S::LANES || !col.is_multiple_of(S::LANES) {
                let mut lanes = [0f32; MAX_LANES];
                s.store(lanes.as_mut_ptr(), v);
                for (i, x) in lanes.iter().enumerate().take(n) {
                    self.put_one(row, col + i, *x);
                }
                return;
            }
            // The constant number of lanes, equal to the format's, spares a division.
            let format = match self.format {
                Format::Split { .. } => Format::Split { lanes: S::LANES },
                other => other,
            };
            let at = self.layout.place(format, row, col);
            match format {
                Format::Plain => s.store(self.base.add(at), v),
                Format::Split { .. } => {
                    s.store_split(self.base.add(at), self.base.add(at + S::LANES), v)
                }
                Format::Packed => s.store_bf16(self.base.cast::<u16>().add(at), v),
            }
        }
    }

    /// Writes one value that is rounded already.
    ///
    /// # Safety
    /// As `put`; or `col` is in the rest of the row's last block.
    #[inline(always)]
    unsafe fn put_one(self, row: usize, col: usize, x: f32) {
        let at = self.layout.place(self.format, row, col);
        // SAFETY: the caller's promise.
        unsafe {
            match self.format {
                Format::Packed => *self.base.cast::<u16>().add(at) = (x.to_bits() >> 16) as u16,
                Format::Plain | Format::Split { .. } => *self.base.add(at) = x,
            }
        }
    }
}
