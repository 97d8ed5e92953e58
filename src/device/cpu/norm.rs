//! RMSNorm: y = x / √(mean(x²) + ε) · w, all in float32, rounded once when it feeds a product.

use std::ops::Range;

use super::act::{ActBuf, ActRows};
use super::simd::{Op, Simd, load_dtype};
use super::{CpuDevice, OutPtr};
use crate::device::WeightView;

impl CpuDevice {
    /// `out` = rmsnorm of each row of `x` [rows][cols] with weights `w` [cols].
    pub fn rmsnorm(
        &self,
        x: &[f32],
        rows: usize,
        cols: usize,
        w: &WeightView<'_>,
        eps: f32,
        out: &mut ActBuf,
    ) {
        assert!(x.len() >= rows * cols);
        let to = To::Act(out.begin(rows, cols, self.isa));
        self.norm_rows(OutPtr(x.as_ptr().cast_mut()), rows, cols, w, eps, to);
    }

    /// As [`CpuDevice::rmsnorm`], into float32 rows `out` [rows][cols].
    pub fn rmsnorm_f32(
        &self,
        x: &[f32],
        rows: usize,
        cols: usize,
        w: &WeightView<'_>,
        eps: f32,
        out: &mut [f32],
    ) {
        assert!(x.len() >= rows * cols && out.len() >= rows * cols);
        let to = To::F32(OutPtr(out.as_mut_ptr()));
        self.norm_rows(OutPtr(x.as_ptr().cast_mut()), rows, cols, w, eps, to);
    }

    fn norm_rows(
        &self,
        x: OutPtr<f32>,
        rows: usize,
        cols: usize,
        w: &WeightView<'_>,
        eps: f32,
        to: To,
    ) {
        check_weight(w, cols);
        let job = Job {
            x,
            row_stride: cols,
            pieces: 1,
            cols,
            w: *w,
            eps,
            to,
        };
        self.for_row_ranges(rows, cols, &|range| self.isa.run(Rows { job: &job, range }));
    }

    /// In place, each of the `heads` pieces of `head_size` of each row on its own, with the same weights `w` [head_size]: the q and k
    /// norms of Qwen3. Row r starts at `x[r·row_stride]`.
    #[allow(clippy::too_many_arguments)]
    pub fn rmsnorm_heads(
        &self,
        x: &mut [f32],
        rows: usize,
        row_stride: usize,
        heads: usize,
        head_size: usize,
        w: &WeightView<'_>,
        eps: f32,
    ) {
        check_weight(w, head_size);
        super::check_rows(x.len(), rows, row_stride, heads * head_size);
        let x = OutPtr(x.as_mut_ptr());
        let job = Job {
            x,
            row_stride,
            pieces: heads,
            cols: head_size,
            w: *w,
            eps,
            to: To::F32(x),
        };
        self.for_row_ranges(rows, heads * head_size, &|range| {
            self.isa.run(Rows { job: &job, range })
        });
    }
}

fn check_weight(w: &WeightView<'_>, cols: usize) {
    assert!(w.rows == 1 && w.cols == cols, "shape of the norm's weight");
    w.check();
}

#[derive(Clone, Copy)]
enum To {
    Act(ActRows),
    /// Laid out as the input is.
    F32(OutPtr<f32>),
}

struct Job<'a> {
    /// Only read, unless `to` is the same.
    x: OutPtr<f32>,
    row_stride: usize,
    pieces: usize,
    cols: usize,
    w: WeightView<'a>,
    eps: f32,
    to: To,
}

struct Rows<'a> {
    job: &'a Job<'a>,
    range: Range<usize>,
}

impl Op for Rows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.range.clone() {
            for piece in 0..self.job.pieces {
                // SAFETY: the callers of `for_row_ranges` checked the shapes; each row is one task's.
                unsafe { norm_piece(s, self.job, row, piece) }
            }
        }
    }
}

#[inline(always)]
unsafe fn norm_piece<S: Simd>(s: S, job: &Job<'_>, row: usize, piece: usize) {
    let cols = job.cols;
    let at = row * job.row_stride + piece * cols;
    // SAFETY: `at..at + cols` is inside x (and out), and cols elements inside w.
    unsafe {
        let x = job.x.0.add(at);
        let mut squares = s.zero();
        let mut c = 0;
        while c < cols {
            let n = (cols - c).min(S::LANES);
            let v = s.load_upto(x.add(c), n);
            squares = s.fma(v, v, squares);
            c += n;
        }
        let scale = s.splat(1.0 / (s.sum(squares) / cols as f32 + job.eps).sqrt());
        let mut c = 0;
        while c < cols {
            let n = (cols - c).min(S::LANES);
            let w = job.w.host().as_ptr().add(c * job.w.dtype.bytes());
            let w = load_dtype(s, job.w.dtype, w, n);
            let y = s.mul(s.mul(s.load_upto(x.add(c), n), scale), w);
            match job.to {
                To::Act(out) => out.put(s, row, c, y, n),
                To::F32(out) => s.store_upto(out.0.add(at + c), y, n),
            }
            c += n;
        }
    }
}
