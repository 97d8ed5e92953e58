//! Rotary position embedding, halves rotated: (a, b) → (a·cos − b·sin, b·cos + a·sin), a the first half of a head and b the second
//! (Su et al. 2021, in the layout of Hugging Face's `rotate_half`).

use std::ops::Range;

use super::simd::{Op, Simd};
use super::{CpuDevice, OutPtr};

impl CpuDevice {
    /// In place on `heads` heads of `head_size` (even) in each row; row r starts at `x[r·row_stride]`, its angles' cosines and
    /// sines at `cos[r·head_size/2]` and `sin[r·head_size/2]`.
    #[allow(clippy::too_many_arguments)]
    pub fn rope(
        &self,
        x: &mut [f32],
        rows: usize,
        row_stride: usize,
        heads: usize,
        head_size: usize,
        cos: &[f32],
        sin: &[f32],
    ) {
        assert!(head_size.is_multiple_of(2), "head size {head_size} is odd");
        let half = head_size / 2;
        assert!(cos.len() >= rows * half && sin.len() >= rows * half);
        super::check_rows(x.len(), rows, row_stride, heads * head_size);
        let x = OutPtr(x.as_mut_ptr());
        self.for_row_ranges(rows, heads * head_size, &|range| {
            self.isa.run(Rope {
                x,
                range,
                row_stride,
                heads,
                half,
                cos,
                sin,
            });
        });
    }
}

struct Rope<'a> {
    x: OutPtr<f32>,
    range: Range<usize>,
    row_stride: usize,
    heads: usize,
    half: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Op for Rope<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let half = self.half;
        for row in self.range.clone() {
            for head in 0..self.heads {
                let mut c = 0;
                while c < half {
                    let n = (half - c).min(S::LANES);
                    // SAFETY: `rope` checked that x, cos and sin hold the rows; each row is one task's.
                    unsafe {
                        let cos = s.load_upto(self.cos.as_ptr().add(row * half + c), n);
                        let sin = s.load_upto(self.sin.as_ptr().add(row * half + c), n);
                        let first = self.x.0.add(row * self.row_stride + head * 2 * half + c);
                        let second = first.add(half);
                        let (a, b) = (s.load_upto(first, n), s.load_upto(second, n));
                        let minus_b = s.sub(s.zero(), b);
                        s.store_upto(first, s.fma(a, cos, s.mul(minus_b, sin)), n);
                        s.store_upto(second, s.fma(b, cos, s.mul(a, sin)), n);
                    }
                    c += n;
                }
            }
        }
    }
}
