//! Matrix products: out[r][n] (+)= Σ_k a[r][k]·w[n][k] (+ bias[n]).
//!
//! **The one definition.** K is cut into blocks of [`K_BLOCK`]. Within a block each accumulator lane takes its elements in ascending
//! order, one fused multiply-add each: lane i those with k ≡ i (mod lanes), or for bfloat16 the pairs 2i, 2i + 1 (mod 2·lanes) that
//! share a 32-bit word (one `vdpbf16ps` a pair where there is one). The lanes are summed by the fixed tree of [`Simd::sum`], the block
//! sums added in ascending order to the start value: what `out` held (Add) or zero (Store), plus the bias. Nothing in this depends
//! on how many rows there are, on where a tile begins or on the thread, so the bits of a row's result do not either.
//!
//! **The walk.** Weights are used straight from where they lie. A tile is 3 rows × 4 weight rows (4 × 4 with 32 registers), K innermost;
//! while the first rows of a panel of weights are worked on, the next panel is asked for in the order in which it lies in memory, a
//! few cache lines a step: memory that is read in one ascending run is a quarter faster than the same memory read from four places in
//! turn. Few rows are bound by memory: a panel is whole weight rows. Many rows are bound by arithmetic: a block of them × a block of
//! K, and the weights of a sweep × a block of K, stay in the second-level cache, a panel in the first.

use std::ops::Range;

use super::act::{ActBuf, Operand};
use super::prefetch::{Ahead, Asked, LINE};
use super::scratch::{K_BLOCK, SUMS_STRIDE, SWEEP_COLS, SWEEP_ROWS};
use super::simd::{Bf16Split, Element, F16, F32, Format, Op, Product, Simd};
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

/// Bytes of activations that stay in a second-level cache beside the weights: a block of rows × a block of K, or more of K where rows
/// are few.
const ACTS_BYTES: usize = 256 * 1024;
/// Weight rows of a panel, and of a tile: with a block of K they take half of a first-level cache.
const PANEL_ROWS: usize = 4;
/// Least bytes of weights a task takes: below this, starting a stream costs more than an even share saves.
const LEAST_TASK_BYTES: usize = 96 * 1024;

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
        let known = [self.isa.format(w.dtype), self.isa.exact_format(w.dtype)];
        assert!(
            known.contains(&a.format()),
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
            exact: matches!(a.format(), Format::Split { .. }),
            rows,
            w: *w,
            bias: bias.copied(),
            out: OutPtr(out.as_mut_ptr()),
            out_stride,
            mode,
        };
        let least = LEAST_TASK_BYTES / w.row_stride.max(1);
        let shares = Shares::new(w.rows, least, self.threads());
        self.pool.run(shares.tasks, &|task, scratch| {
            let cols = shares.of(task);
            self.isa.run(Task {
                job: &job,
                cols,
                sums: scratch.sums.as_mut_ptr(),
            });
        });
    }
}

/// How the weight rows of a product are cut into tasks: large ones first, then smaller and smaller, so that a thread streams long
/// runs and yet all end together.
#[derive(Clone, Copy)]
struct Shares {
    rows: usize,
    least: usize,
    threads: usize,
    tasks: usize,
}

impl Shares {
    fn new(rows: usize, least: usize, threads: usize) -> Shares {
        let least = least.next_multiple_of(PANEL_ROWS).max(PANEL_ROWS);
        let mut shares = Shares {
            rows,
            least,
            threads,
            tasks: 0,
        };
        let mut left = rows;
        while left > 0 {
            left -= shares.size(left).min(left);
            shares.tasks += 1;
        }
        shares
    }

    /// Half of an even share of what is left.
    fn size(&self, left: usize) -> usize {
        left.div_ceil(2 * self.threads)
            .next_multiple_of(PANEL_ROWS)
            .max(self.least)
    }

    fn of(&self, task: usize) -> Range<usize> {
        let mut left = self.rows;
        for _ in 0..task {
            left -= self.size(left).min(left);
        }
        let first = self.rows - left;
        first..first + self.size(left).min(left)
    }
}

struct Job<'a> {
    acts: Operand,
    /// Bfloat16 weights meet float32 activations.
    exact: bool,
    rows: usize,
    w: WeightView<'a>,
    bias: Option<WeightView<'a>>,
    out: OutPtr<f32>,
    out_stride: usize,
    mode: Mode,
}

// SAFETY: `acts` points into an ActBuf that `linear` keeps borrowed, only read; `out` is written in disjoint columns.
unsafe impl Sync for Job<'_> {}

/// Some columns of a product.
struct Task<'a> {
    job: &'a Job<'a>,
    cols: Range<usize>,
    /// [SWEEP_ROWS][SUMS_STRIDE], this thread's.
    sums: *mut f32,
}

impl Op for Task<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: `linear` checked that activations, weights and `out` hold the shape, and gave each task its own columns.
        unsafe {
            match self.job.w.dtype {
                Dtype::F32 => self.walk::<S, F32>(s),
                Dtype::F16 => self.walk::<S, F16>(s),
                Dtype::BF16 if self.job.exact => self.walk::<S, Bf16Split>(s),
                Dtype::BF16 => self.walk::<S, S::Bf16>(s),
            }
        }
    }
}

/// Rows of a block: as even as can be, in whole tiles.
fn row_block(rows: usize, tile: usize, act_bytes: usize) -> usize {
    let most = (ACTS_BYTES / (K_BLOCK * act_bytes)).min(SWEEP_ROWS) / tile * tile;
    rows.div_ceil(rows.div_ceil(most)).next_multiple_of(tile)
}

/// Where a walk is: rows `r0..r1`, weight rows `n0..n1` of the sweep, elements `k0..k1`.
#[derive(Clone, Copy)]
struct At {
    r0: usize,
    r1: usize,
    n0: usize,
    n1: usize,
    k0: usize,
    k1: usize,
}

impl Task<'_> {
    /// Sweeps of weights × blocks of rows × spans of K × panels of weights × blocks of K.
    #[inline(always)]
    unsafe fn walk<S: Simd, P: Product<S>>(&self, s: S) {
        let (rows, k_all) = (self.job.rows, self.job.w.cols);
        let step = row_block(rows, S::TILE_ROWS, P::ACT_BYTES);
        let span = (ACTS_BYTES / (step * P::ACT_BYTES) / K_BLOCK).max(1) * K_BLOCK;
        for n0 in self.cols.clone().step_by(SWEEP_COLS) {
            let n1 = (n0 + SWEEP_COLS).min(self.cols.end);
            for r0 in (0..rows).step_by(step) {
                let mut at = At {
                    r0,
                    r1: (r0 + step).min(rows),
                    n0,
                    n1,
                    k0: 0,
                    k1: 0,
                };
                // SAFETY: rows, columns and elements are inside activations, weights and `out` (`linear` checked), and sums holds a
                // block of rows × a sweep.
                unsafe {
                    self.start(at);
                    while at.k1 < k_all {
                        at.k0 = at.k1;
                        at.k1 = (at.k0 + span).min(k_all);
                        self.panels::<S, P>(s, at);
                    }
                    self.finish(at);
                }
            }
        }
    }

    /// What the sums of a block start from.
    #[inline(always)]
    unsafe fn start(&self, at: At) {
        let (job, cols) = (self.job, at.n1 - at.n0);
        let mut bias = [0f32; SWEEP_COLS];
        if let Some(view) = &job.bias {
            for (n, x) in bias.iter_mut().enumerate().take(cols) {
                *x = view.element(at.n0 + n);
            }
        }
        for r in at.r0..at.r1 {
            // SAFETY: the caller's promise: the block is inside `out` and this task's own, and sums holds it.
            unsafe {
                let sums = self.sums.add((r - at.r0) * SUMS_STRIDE);
                let out = job.out.0.add(r * job.out_stride + at.n0);
                match job.mode {
                    Mode::Add => std::ptr::copy_nonoverlapping(out, sums, cols),
                    Mode::Store => sums.write_bytes(0, cols),
                }
                if job.bias.is_some() {
                    for (n, x) in bias.iter().enumerate().take(cols) {
                        *sums.add(n) += x;
                    }
                }
            }
        }
    }

    /// Writes the sums of a block.
    #[inline(always)]
    unsafe fn finish(&self, at: At) {
        for r in at.r0..at.r1 {
            // SAFETY: the caller's promise: the block is inside `out` and this task's own, and sums holds it.
            unsafe {
                let sums = self.sums.add((r - at.r0) * SUMS_STRIDE).cast_const();
                let out = self.job.out.0.add(r * self.job.out_stride + at.n0);
                std::ptr::copy_nonoverlapping(sums, out, at.n1 - at.n0);
            }
        }
    }

    /// A block of rows against the panels of a sweep, over a span of K.
    #[inline(always)]
    unsafe fn panels<S: Simd, P: Product<S>>(&self, s: S, at: At) {
        let job = self.job;
        for n in (at.n0..at.n1).step_by(PANEL_ROWS) {
            let mut ahead = self.ahead::<S, P>(at, n);
            for k in (at.k0..at.k1).step_by(K_BLOCK) {
                // SAFETY: the caller's promise.
                unsafe {
                    let from = n * job.w.row_stride + k * P::WEIGHT_BYTES;
                    let tiles = Tiles {
                        acts: job.acts.at(k, at.r0),
                        act_stride: job.acts.row_bytes,
                        rows: at.r1 - at.r0,
                        weights: job.w.host().as_ptr().add(from),
                        weight_stride: job.w.row_stride,
                        cols: (at.n1 - n).min(PANEL_ROWS),
                        len: (at.k1 - k).min(K_BLOCK),
                        sums: self.sums.add(n - at.n0),
                    };
                    tiles.run::<S, P>(s, &mut ahead);
                }
            }
        }
    }

    /// What comes after the panel at weight row `n`, to be asked for in the steps over this one: the next panel, and a share of the
    /// activations that the next block begins with.
    #[inline(always)]
    fn ahead<S: Simd, P: Product<S>>(&self, at: At, n: usize) -> Ahead {
        let (job, w) = (self.job, &self.job.w);
        let rows = at.r1 - at.r0;
        // Where the walk goes when it is through with this sweep's panels.
        let block = if at.k1 < w.cols {
            Some((at.r0, at.n0, at.k1))
        } else if at.r1 < job.rows {
            Some((at.r1, at.n0, 0))
        } else {
            (at.n1 < self.cols.end).then_some((0, at.n1, 0))
        };
        let (next, k) = match (n + PANEL_ROWS < at.n1, block) {
            (true, _) => (n + PANEL_ROWS, at.k0),
            (false, Some((_, n, k))) => (n, k),
            (false, None) => return Ahead::default(),
        };
        let span = at.k1 - at.k0;
        let panel = PANEL_ROWS.min(self.cols.end - next);
        let (chunks, chunk_bytes) = match span == w.cols {
            true => (1, panel * w.row_stride),
            false => (panel, span.min(w.cols - k) * P::WEIGHT_BYTES),
        };
        let lines = chunks * chunk_bytes.div_ceil(LINE);
        let steps = rows.div_ceil(S::TILE_ROWS) * span.div_ceil(P::STEP);
        let first = w.host().as_ptr() as usize + next * w.row_stride + k * P::WEIGHT_BYTES;
        let acts = match block {
            Some((r, _, k)) if job.rows > rows || span < w.cols => {
                let bytes = (job.rows - r).min(rows) * job.acts.row_bytes;
                let (i, of) = (
                    (n - at.n0) / PANEL_ROWS,
                    (at.n1 - at.n0).div_ceil(PANEL_ROWS),
                );
                let base = job.acts.at(k, r) as usize;
                (base + bytes * i / of, base + bytes * (i + 1) / of)
            }
            _ => (0, 0),
        };
        Ahead {
            at: first,
            end: first + chunk_bytes,
            chunks,
            skip: w.row_stride.saturating_sub(chunk_bytes),
            chunk_bytes,
            lines_per_step: lines.div_ceil(steps.max(1)),
            acts,
        }
    }
}

/// Rows of activations against a panel of weights, over one block of K.
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
    /// SUMS_STRIDE from one row to the next.
    sums: *mut f32,
}

impl Tiles {
    /// As many rows a tile as the registers hold.
    #[inline(always)]
    unsafe fn run<S: Simd, P: Product<S>>(&self, s: S, ahead: &mut Ahead) {
        let mut r = 0;
        // SAFETY: the caller's promise; r + R <= rows in every call.
        unsafe {
            while S::TILE_ROWS == 4 && self.rows - r >= 4 {
                self.strip::<S, P, 4>(s, r, ahead);
                r += 4;
            }
            // Four left over are better as 2 + 2 than as 3 + 1.
            while self.rows - r >= 3 && self.rows - r != 4 {
                self.strip::<S, P, 3>(s, r, ahead);
                r += 3;
            }
            while self.rows - r >= 2 {
                self.strip::<S, P, 2>(s, r, ahead);
                r += 2;
            }
            if self.rows - r == 1 {
                self.strip::<S, P, 1>(s, r, ahead);
            }
        }
    }

    /// R rows from `r0` on; where the panel has fewer weight rows than a tile, the last is repeated and its results dropped.
    #[inline(always)]
    unsafe fn strip<S: Simd, P: Product<S>, const R: usize>(
        &self,
        s: S,
        r0: usize,
        ahead: &mut Ahead,
    ) {
        let mut acts = [self.acts; R];
        let mut weights = [self.weights; PANEL_ROWS];
        // SAFETY: the caller's promise: rows r0..r0 + R and `cols` weight rows exist; sums holds a whole tile.
        unsafe {
            for (r, a) in acts.iter_mut().enumerate() {
                *a = a.add((r0 + r) * self.act_stride);
            }
            for (i, w) in weights.iter_mut().enumerate() {
                *w = w.add(i.min(self.cols - 1) * self.weight_stride);
            }
            let at = self.sums.add(r0 * SUMS_STRIDE);
            let mut sums = [[0f32; PANEL_ROWS]; R];
            for (r, row) in sums.iter_mut().enumerate() {
                *row = at
                    .add(r * SUMS_STRIDE)
                    .cast::<[f32; PANEL_ROWS]>()
                    .read_unaligned();
            }
            let asked = ahead.take(self.len / P::STEP);
            tile4::<S, P, R>(s, acts, weights, self.len, asked, &mut sums);
            for (r, row) in sums.iter().enumerate() {
                at.add(r * SUMS_STRIDE)
                    .cast::<[f32; PANEL_ROWS]>()
                    .write_unaligned(*row);
            }
        }
    }
}

/// `sums[r][i] += Σ_k acts[r][k]·weights[i][k]` over `len` elements, one block of K. Asks for some cache lines on the way.
///
/// # Safety
/// `len` weights are readable at each pointer, and `len` activations followed by zeros up to a multiple of `P::STEP`.
#[inline(always)]
pub(super) unsafe fn tile4<S: Simd, P: Product<S>, const R: usize>(
    s: S,
    acts: [*const u8; R],
    weights: [*const u8; 4],
    len: usize,
    asked: Asked,
    sums: &mut [[f32; 4]; R],
) {
    let mut acc = [[s.zero(); 4]; R];
    let mut k = 0;
    let mut line = asked.at;
    // SAFETY: the caller's promise; the last step takes its weights from a zero-filled copy.
    unsafe {
        while k + P::STEP <= len {
            let mut at = k;
            for _ in 0..asked.lines_per_step {
                s.prefetch(line);
                line = line.wrapping_add(LINE);
            }
            for phase in 0..P::PHASES {
                if phase > 0 && S::TILE_ROWS < 4 {
                    // Loading the weights again takes no register from one phase to the next; sixteen are too few for that.
                    at = opaque(at);
                }
                let mut a = [P::act(s, acts[0].add(at * P::ACT_BYTES), phase); R];
                for r in 1..R {
                    a[r] = P::act(s, acts[r].add(at * P::ACT_BYTES), phase);
                }
                for i in 0..4 {
                    let from = weights[i].add(at * P::WEIGHT_BYTES);
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
