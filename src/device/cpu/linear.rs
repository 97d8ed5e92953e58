//! Matrix products: out[r][n] (+)= Σ_k a[r][k]·w[n][k] (+ bias[n]).
//!
//! **The one definition.** K is cut into blocks of [`K_BLOCK`]. Within a block each accumulator lane takes its elements in ascending
//! order, one fused multiply-add each: lane i those with k ≡ i (mod lanes), or for bfloat16 the pairs 2i, 2i + 1 (mod 2·lanes) that
//! share a 32-bit word (one `vdpbf16ps` a pair where there is one). The lanes are summed by the fixed tree of [`Simd::sum`], the block
//! sums added in ascending order to the start value: what `out` held (Add) or zero (Store), plus the bias. Nothing in this depends
//! on how many rows there are, on where a tile begins or on the thread, so the bits of a row's result do not either.
//!
//! **The walk.** Weights are converted on the way into each tile (two integer operations for sixteen bfloat16), straight from
//! where they lie. A tile is 3 rows × 4 weight rows (4 × 4 with 32 registers), K innermost; while the first rows of a panel of weights
//! are worked on, the next panel is asked for. Few rows are bound by memory: four weight rows at a time over the whole of K. Many rows
//! are bound by arithmetic: a block of them × a block of K stays in the second-level cache, eight weight rows in the first.

use super::act::{ActBuf, Operand};
use super::scratch::{K_BLOCK, SWEEP_COLS, SWEEP_ROWS, Scratch};
use super::simd::{Element, F16, F32, Op, Product, Simd};
use super::{CpuDevice, OutPtr};
use crate::device::WeightView;
use crate::units::Dtype;

/// What a product does with what `out` held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// out = a·w + bias
    Store,
    /// out = out + bias + a·w: a residual connection.
    Add,
}

/// Rows up to which a product is bound by memory.
const FEW_ROWS: usize = 3;
/// Weight rows of a panel when rows are many: with a block of K they take half of a first-level cache.
const PANEL_ROWS: usize = 8;
/// Bytes of weights a task takes when rows are few: enough to stream.
const STREAM_TASK_BYTES: usize = 96 * 1024;

impl CpuDevice {
    /// `out[r·out_stride + n]` (+)= `a[r]·w[n] + bias[n]` for the `rows` first rows of `a` and all rows of `w`: `a` is [rows][K],
    /// `w` [N][K], `bias` [N] (a view with one row, any dtype), `out` float32.
    ///
    /// # Panics
    /// When shapes or dtypes contradict one another: the caller's bug.
    #[allow(clippy::too_many_arguments)]
    pub fn linear(
        &self,
        a: &ActBuf,
        rows: usize,
        w: &WeightView<'_>,
        bias: Option<&WeightView<'_>>,
        out: &mut [f32],
        out_stride: usize,
        mode: Mode,
    ) {
        if rows == 0 || w.rows == 0 {
            return;
        }
        assert!(rows <= a.rows(), "{rows} rows of {}", a.rows());
        assert_eq!(a.cols(), w.cols, "columns of activations and weights");
        assert_eq!(a.dtype(), w.dtype, "dtype of activations and weights");
        assert!(
            a.format() == self.isa.format(w.dtype),
            "activations were written for another instruction set"
        );
        super::check_rows(out.len(), rows, out_stride, w.rows);
        w.check();
        if let Some(bias) = bias {
            assert!(bias.rows == 1 && bias.cols == w.rows, "shape of the bias");
            bias.check();
        }
        let job = Job {
            acts: a.operand(),
            rows,
            w: *w,
            bias: bias.copied(),
            out: OutPtr(out.as_mut_ptr()),
            out_stride,
            mode,
        };
        let task_cols = task_cols(rows, w, self.threads());
        self.pool.run(w.rows.div_ceil(task_cols), &|task, scratch| {
            let n0 = task * task_cols;
            let cols = task_cols.min(w.rows - n0);
            self.isa.run(Task {
                job: &job,
                n0,
                cols,
                scratch,
            });
        });
    }
}

/// Weight rows (columns of `out`) a task takes: whole panels, enough tasks for the threads, few enough tasks to cost nothing.
fn task_cols(rows: usize, w: &WeightView<'_>, threads: usize) -> usize {
    let share = w.rows.div_ceil(threads * 4);
    let most = if rows <= FEW_ROWS {
        STREAM_TASK_BYTES / w.row_stride.max(1)
    } else {
        SWEEP_COLS
    };
    most.min(share).next_multiple_of(PANEL_ROWS).min(SWEEP_COLS)
}

struct Job<'a> {
    acts: Operand,
    rows: usize,
    w: WeightView<'a>,
    bias: Option<WeightView<'a>>,
    out: OutPtr<f32>,
    out_stride: usize,
    mode: Mode,
}

// SAFETY: `acts` points into an ActBuf that `linear` keeps borrowed, only read; `out` is written in disjoint columns.
unsafe impl Sync for Job<'_> {}

/// The columns `n0..n0 + cols` of a product, `cols <= SWEEP_COLS`.
struct Task<'a> {
    job: &'a Job<'a>,
    n0: usize,
    cols: usize,
    scratch: &'a mut Scratch,
}

impl Op for Task<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        // SAFETY: `linear` checked that activations, weights and `out` hold the shape, and gave each task its own columns.
        unsafe {
            match self.job.w.dtype {
                Dtype::F32 => self.walk::<S, F32>(s),
                Dtype::F16 => self.walk::<S, F16>(s),
                Dtype::BF16 => self.walk::<S, S::Bf16>(s),
            }
        }
    }
}

impl Task<'_> {
    /// Blocks of rows × spans of K × panels of weights × blocks of K (one to a span when rows are many).
    #[inline(always)]
    unsafe fn walk<S: Simd, P: Product<S>>(&mut self, s: S) {
        let job = self.job;
        let k_all = job.w.cols;
        let few = job.rows <= FEW_ROWS;
        let (span, panel) = if few {
            (k_all.max(1), 4)
        } else {
            (K_BLOCK, PANEL_ROWS)
        };
        let sums = self.scratch.sums.as_mut_ptr();
        let mut bias = [0f32; SWEEP_COLS];
        if let Some(view) = &job.bias {
            for (n, x) in bias.iter_mut().enumerate().take(self.cols) {
                *x = view.element(self.n0 + n);
            }
        }
        let step = row_block(job.rows);
        for r0 in (0..job.rows).step_by(step) {
            let rows = (job.rows - r0).min(step);
            // SAFETY: the rows and columns are inside activations, weights and `out` (`linear` checked); sums holds SWEEP_ROWS ×
            // SWEEP_COLS.
            unsafe {
                self.start(r0, rows, &bias, sums);
                for k0 in (0..k_all).step_by(span) {
                    let k1 = (k0 + span).min(k_all);
                    for n in (0..self.cols).step_by(panel) {
                        for k in (k0..k1).step_by(K_BLOCK) {
                            let at = (self.n0 + n) * job.w.row_stride + k * P::WEIGHT_BYTES;
                            let tiles = Tiles {
                                acts: job.acts.at(k, r0),
                                act_stride: job.acts.row_bytes,
                                rows,
                                weights: job.w.host().as_ptr().add(at),
                                weight_stride: job.w.row_stride,
                                cols: (self.cols - n).min(panel),
                                len: (k1 - k).min(K_BLOCK),
                                ahead: panel * job.w.row_stride,
                                sums: sums.add(n),
                            };
                            tiles.run::<S, P>(s);
                        }
                    }
                }
                self.finish(r0, rows, sums);
            }
        }
    }

    /// What the sums of rows `r0..r0 + rows` start from.
    #[inline(always)]
    unsafe fn start(&self, r0: usize, rows: usize, bias: &[f32; SWEEP_COLS], sums: *mut f32) {
        let job = self.job;
        for r in 0..rows {
            // SAFETY: the caller's promise: the block is inside `out` and this task's own, and sums holds it.
            unsafe {
                let sums = sums.add(r * SWEEP_COLS);
                let out = job.out.0.add((r0 + r) * job.out_stride + self.n0);
                match job.mode {
                    Mode::Add => std::ptr::copy_nonoverlapping(out, sums, self.cols),
                    Mode::Store => sums.write_bytes(0, self.cols),
                }
                if job.bias.is_some() {
                    for (n, x) in bias.iter().enumerate().take(self.cols) {
                        *sums.add(n) += x;
                    }
                }
            }
        }
    }

    /// Writes the sums of rows `r0..r0 + rows`.
    #[inline(always)]
    unsafe fn finish(&self, r0: usize, rows: usize, sums: *const f32) {
        for r in 0..rows {
            // SAFETY: the caller's promise: the block is inside `out` and this task's own, and sums holds it.
            unsafe {
                let out = self.job.out.0.add((r0 + r) * self.job.out_stride + self.n0);
                std::ptr::copy_nonoverlapping(sums.add(r * SWEEP_COLS), out, self.cols);
            }
        }
    }
}

/// Rows of a block: as even as can be, in whole tiles of three.
fn row_block(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(SWEEP_ROWS))
        .next_multiple_of(3)
        .min(SWEEP_ROWS)
}

/// Rows of activations against up to eight weight rows, over one block of K.
struct Tiles {
    acts: *const u8,
    /// Bytes.
    act_stride: usize,
    rows: usize,
    weights: *const u8,
    /// Bytes.
    weight_stride: usize,
    cols: usize,
    /// Elements of K.
    len: usize,
    /// See [`tile4`].
    ahead: usize,
    /// SWEEP_COLS from one row to the next.
    sums: *mut f32,
}

impl Tiles {
    /// As many rows a tile as the registers hold.
    #[inline(always)]
    unsafe fn run<S: Simd, P: Product<S>>(mut self, s: S) {
        let mut r = 0;
        // SAFETY: the caller's promise; r + R <= rows in every call.
        unsafe {
            while S::WIDE_TILES && self.rows - r >= 4 {
                self.strip::<S, P, 4>(s, r);
                r += 4;
            }
            // Four left over are better as 2 + 2 than as 3 + 1.
            while self.rows - r >= 3 && self.rows - r != 4 {
                self.strip::<S, P, 3>(s, r);
                r += 3;
            }
            while self.rows - r >= 2 {
                self.strip::<S, P, 2>(s, r);
                r += 2;
            }
            if self.rows - r == 1 {
                self.strip::<S, P, 1>(s, r);
            }
        }
    }

    /// R rows from `r0` on, four weight rows at a time; where fewer are left the last is repeated and its results dropped.
    #[inline(always)]
    unsafe fn strip<S: Simd, P: Product<S>, const R: usize>(&mut self, s: S, r0: usize) {
        let mut acts = [self.acts; R];
        // SAFETY: the caller's promise: rows r0..r0 + R and `cols` weight rows exist; sums holds whole groups of four.
        unsafe {
            for (r, a) in acts.iter_mut().enumerate() {
                *a = a.add((r0 + r) * self.act_stride);
            }
            for n in (0..self.cols).step_by(4) {
                let mut weights = [self.weights; 4];
                for (i, w) in weights.iter_mut().enumerate() {
                    *w = w.add((n + i).min(self.cols - 1) * self.weight_stride);
                }
                let at = self.sums.add(r0 * SWEEP_COLS + n);
                let mut sums = [[0f32; 4]; R];
                for (r, row) in sums.iter_mut().enumerate() {
                    *row = at.add(r * SWEEP_COLS).cast::<[f32; 4]>().read_unaligned();
                }
                tile4::<S, P, R>(s, acts, weights, self.len, self.ahead, &mut sums);
                for (r, row) in sums.iter().enumerate() {
                    at.add(r * SWEEP_COLS)
                        .cast::<[f32; 4]>()
                        .write_unaligned(*row);
                }
            }
        }
        self.ahead = 0;
    }
}

/// `sums[r][i] += Σ_k acts[r][k]·weights[i][k]` over `len` elements, one block of K. Asks for the cache lines `ahead` bytes after
/// the weights when that is not zero.
///
/// # Safety
/// `len` weights are readable at each pointer, and `len` activations followed by zeros up to a multiple of `P::STEP`.
#[inline(always)]
pub(crate) unsafe fn tile4<S: Simd, P: Product<S>, const R: usize>(
    s: S,
    acts: [*const u8; R],
    weights: [*const u8; 4],
    len: usize,
    ahead: usize,
    sums: &mut [[f32; 4]; R],
) {
    let mut acc = [[s.zero(); 4]; R];
    let mut k = 0;
    // SAFETY: the caller's promise; the last step takes its weights from a zero-filled copy.
    unsafe {
        while k + P::STEP <= len {
            let mut at = k;
            for phase in 0..P::PHASES {
                if phase > 0 && !S::WIDE_TILES {
                    // Loading the weights again takes no register from one phase to the next; sixteen are too few for that.
                    at = opaque(at);
                }
                let mut a = [P::act(s, acts[0].add(at * P::ACT_BYTES), phase); R];
                for r in 1..R {
                    a[r] = P::act(s, acts[r].add(at * P::ACT_BYTES), phase);
                }
                for i in 0..4 {
                    let from = weights[i].add(at * P::WEIGHT_BYTES);
                    if ahead != 0 && phase == 0 {
                        s.prefetch(from.wrapping_add(ahead));
                    }
                    let w = P::weight(s, from, phase);
                    for r in 0..R {
                        acc[r][i] = P::accumulate(s, a[r], w, acc[r][i]);
                    }
                }
            }
            k += P::STEP;
        }
        if k < len {
            for i in 0..4 {
                let mut rest = [0u8; 64];
                let from = weights[i].add(k * P::WEIGHT_BYTES);
                std::ptr::copy_nonoverlapping(from, rest.as_mut_ptr(), (len - k) * P::WEIGHT_BYTES);
                for phase in 0..P::PHASES {
                    let w = P::weight(s, rest.as_ptr(), phase);
                    for r in 0..R {
                        let a = P::act(s, acts[r].add(k * P::ACT_BYTES), phase);
                        acc[r][i] = P::accumulate(s, a, w, acc[r][i]);
                    }
                }
            }
        }
    }
    for r in 0..R {
        let block = s.sum4(acc[r]);
        for i in 0..4 {
            sums[r][i] += block[i];
        }
    }
}

/// The same number, in a way the compiler cannot see through: it will not merge loads from both.
#[inline(always)]
fn opaque(x: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let mut x = x;
        // SAFETY: no instruction at all.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) x, options(pure, nomem, nostack, preserves_flags));
        }
        x
    }
    #[cfg(not(target_arch = "x86_64"))]
    x
}

/// `n` elements as float32, zeros after them up to a whole vector.
///
/// # Safety
/// `n` elements are readable at `from`, `n` rounded up to whole vectors writable at `to`.
#[inline(always)]
pub(crate) unsafe fn widen<S: Simd, E: Element>(s: S, from: *const u8, n: usize, to: *mut f32) {
    let mut k = 0;
    // SAFETY: the caller's promise; the last vector is read from a zero-filled copy.
    unsafe {
        while k + S::LANES <= n {
            s.store(to.add(k), E::load(s, from.add(k * E::BYTES)));
            k += S::LANES;
        }
        if k < n {
            let mut rest = [0u8; 64];
            let at = from.add(k * E::BYTES);
            std::ptr::copy_nonoverlapping(at, rest.as_mut_ptr(), (n - k) * E::BYTES);
            s.store(to.add(k), E::load(s, rest.as_ptr()));
        }
    }
}
