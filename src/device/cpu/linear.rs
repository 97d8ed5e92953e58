//! Matrix products: out[r][n] (+)= Σ_k a[r][k]·w[n][k] (+ bias[n]).
//!
//! **The one definition.** K is cut into blocks of [`K_BLOCK`]. Within a block, lane `i` of an accumulator takes the elements
//! k ≡ i (mod lanes) in ascending order, one fused multiply-add each (one `vdpbf16ps` for pairs), and the lanes are summed by the
//! fixed tree of [`Simd::sum`]. The block sums are added in ascending order to the start value, which is what `out` held (Add)
//! or zero (Store), plus the bias. Nothing in this depends on how many rows there are, on where a tile begins or on the thread, so
//! the bits of a row's result do not either. Two ways of walking compute it:
//! few rows read weights straight from where they lie (bound by memory: one pass over the weights); more rows widen a panel of
//! weights once and sweep all rows over it (bound by arithmetic).

use super::act::ActBuf;
use super::scratch::{K_BLOCK, PANEL_ROWS, Scratch};
use super::simd::{Bf16, Element, F16, F32, Op, Product, Simd};
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

/// Bytes of weights a task takes at least when rows are few: enough to stream.
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
        assert_eq!(
            a.packed(),
            self.isa.bf16_pairs() && w.dtype == Dtype::BF16,
            "activations were written for another instruction set"
        );
        assert!(out_stride >= w.rows && out.len() >= (rows - 1) * out_stride + w.rows);
        w.check();
        if let Some(bias) = bias {
            assert!(bias.rows == 1 && bias.cols == w.rows, "shape of the bias");
            bias.check();
        }
        let (acts, act_stride) = a.operand();
        let few = rows <= few_rows(self.isa.lanes());
        let task_rows = task_rows(few, w, self.threads());
        let job = Job {
            acts,
            act_stride,
            rows,
            w: *w,
            bias: bias.copied(),
            out: OutPtr(out.as_mut_ptr()),
            out_stride,
            mode,
            few,
        };
        self.pool.run(w.rows.div_ceil(task_rows), &|task, scratch| {
            let first = task * task_rows;
            let last = (first + task_rows).min(w.rows);
            self.isa.run(Range {
                job: &job,
                first,
                last,
                scratch,
            });
        });
    }
}

/// Rows up to which weights are read straight from where they lie: those of one tile.
fn few_rows(lanes: usize) -> usize {
    if lanes == 16 { 4 } else { 3 }
}

/// Weight rows a task takes: a multiple of a tile's, enough tasks for the threads, few enough to cost nothing.
fn task_rows(few: bool, w: &WeightView<'_>, threads: usize) -> usize {
    let share = w.rows.div_ceil(threads * 4).next_multiple_of(8);
    if few {
        let stream = (STREAM_TASK_BYTES / w.row_stride.max(1)).next_multiple_of(8);
        stream.min(share)
    } else {
        PANEL_ROWS.min(share)
    }
}

struct Job<'a> {
    acts: *const u8,
    /// Bytes.
    act_stride: usize,
    rows: usize,
    w: WeightView<'a>,
    bias: Option<WeightView<'a>>,
    out: OutPtr<f32>,
    out_stride: usize,
    mode: Mode,
    few: bool,
}

// SAFETY: `acts` points into an ActBuf that `linear` keeps borrowed, only read; `out` is written in disjoint columns.
unsafe impl Sync for Job<'_> {}

/// The weight rows `first..last` of a product: one task.
struct Range<'a> {
    job: &'a Job<'a>,
    first: usize,
    last: usize,
    scratch: &'a mut Scratch,
}

impl Op for Range<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: `linear` checked that activations, weights and `out` hold the shape, and gave each task its own rows.
        unsafe {
            match self.job.w.dtype {
                Dtype::F32 => self.walk::<S, F32, F32>(s),
                Dtype::F16 => self.walk::<S, F16, F16>(s),
                Dtype::BF16 => self.walk::<S, Bf16, S::Bf16>(s),
            }
        }
    }
}

impl Range<'_> {
    #[inline(always)]
    unsafe fn walk<S: Simd, E: Element, P: Product<S>>(self, s: S) {
        // SAFETY: the caller's promise. The tile shapes: as many accumulators as registers allow.
        unsafe {
            if self.job.few {
                match self.job.rows {
                    1 => self.stream::<S, P, 1>(s),
                    2 => self.stream::<S, P, 2>(s),
                    3 => self.stream::<S, P, 3>(s),
                    _ => self.stream::<S, P, 4>(s),
                }
            } else if P::ACT_BYTES == 2 {
                self.sweep_in_place::<S, P>(s);
            } else {
                self.sweep_panel::<S, E>(s);
            }
        }
    }

    /// R rows: weights straight from where they lie.
    #[inline(always)]
    unsafe fn stream<S: Simd, P: Product<S>, const R: usize>(&self, s: S) {
        let job = self.job;
        let (k, stride) = (job.w.cols, job.w.row_stride);
        let mut n = self.first;
        while n < self.last {
            let valid = (self.last - n).min(4);
            // SAFETY: rows below `last` are inside the weights (checked by `linear`); a tile that is cut short repeats its last
            // row, whose results are dropped.
            unsafe {
                let mut weights = [job.w.data.as_ptr(); 4];
                for (i, w) in weights.iter_mut().enumerate() {
                    *w = w.add((n + i.min(valid - 1)) * stride);
                }
                let mut sums = [[0f32; 4]; R];
                for (r, row) in sums.iter_mut().enumerate() {
                    self.start(r, n, valid, row);
                }
                let mut k0 = 0;
                while k0 < k {
                    let kn = (k - k0).min(K_BLOCK);
                    let mut acts = [job.acts; R];
                    for (r, a) in acts.iter_mut().enumerate() {
                        *a = a.add(r * job.act_stride + k0 * P::ACT_BYTES);
                    }
                    let mut at = weights;
                    for w in at.iter_mut() {
                        *w = w.add(k0 * P::WEIGHT_BYTES);
                    }
                    tile4::<S, P, R>(s, acts, at, kn, 4 * stride, &mut sums);
                    k0 += kn;
                }
                for (r, row) in sums.iter().enumerate() {
                    let out = job.out.0.add(r * job.out_stride + n);
                    std::ptr::copy_nonoverlapping(row.as_ptr(), out, valid);
                }
            }
            n += 4;
        }
    }

    /// What the sums of row `r`, columns `n..n + valid` start from.
    #[inline(always)]
    unsafe fn start(&self, r: usize, n: usize, valid: usize, sums: &mut [f32; 4]) {
        let job = self.job;
        for (i, sum) in sums.iter_mut().enumerate().take(valid) {
            if job.mode == Mode::Add {
                // SAFETY: row r and column n + i are inside `out` (checked by `linear`) and this task's own.
                *sum = unsafe { *job.out.0.add(r * job.out_stride + n + i) };
            }
            if let Some(bias) = &job.bias {
                *sum += bias.element(n + i);
            }
        }
    }

    /// Many rows: a panel of weights, widened once per block of K, under all rows.
    #[inline(always)]
    unsafe fn sweep_panel<S: Simd, E: Element>(self, s: S) {
        let panel = self.scratch.panel.as_mut_ptr();
        let job = self.job;
        let mut n0 = self.first;
        while n0 < self.last {
            let n1 = (n0 + PANEL_ROWS).min(self.last);
            let mut k0 = 0;
            while k0 < job.w.cols {
                let kn = (job.w.cols - k0).min(K_BLOCK);
                // SAFETY: n0..n1 and k0..k0 + kn lie inside the weights, and the panel holds PANEL_ROWS × K_BLOCK.
                unsafe {
                    for n in n0..n1 {
                        let from = job
                            .w
                            .data
                            .as_ptr()
                            .add(n * job.w.row_stride + k0 * E::BYTES);
                        widen::<S, E>(s, from, kn, panel.add((n - n0) * K_BLOCK));
                    }
                    let from = Weights {
                        base: panel.cast::<u8>(),
                        stride: K_BLOCK * 4,
                    };
                    self.sweep::<S, F32>(s, from, n0, n1, k0, kn);
                }
                k0 += kn;
            }
            n0 = n1;
        }
    }

    /// Many rows, products that take weights as they are stored.
    #[inline(always)]
    unsafe fn sweep_in_place<S: Simd, P: Product<S>>(self, s: S) {
        let job = self.job;
        let mut n0 = self.first;
        while n0 < self.last {
            let n1 = (n0 + PANEL_ROWS).min(self.last);
            let mut k0 = 0;
            while k0 < job.w.cols {
                let kn = (job.w.cols - k0).min(K_BLOCK);
                // SAFETY: n0..n1 and k0..k0 + kn lie inside the weights.
                unsafe {
                    let offset = n0 * job.w.row_stride + k0 * P::WEIGHT_BYTES;
                    let from = Weights {
                        base: job.w.data.as_ptr().add(offset),
                        stride: job.w.row_stride,
                    };
                    self.sweep::<S, P>(s, from, n0, n1, k0, kn);
                }
                k0 += kn;
            }
            n0 = n1;
        }
    }

    /// Adds block `k0..k0 + kn` of every row's products with weight rows `n0..n1` to `out`.
    #[inline(always)]
    unsafe fn sweep<S: Simd, P: Product<S>>(
        &self,
        s: S,
        from: Weights,
        n0: usize,
        n1: usize,
        k0: usize,
        kn: usize,
    ) {
        let block = Block {
            from,
            n0,
            n1,
            k0,
            kn,
        };
        let rows = self.job.rows;
        let mut r = 0;
        // SAFETY: the caller's promise; r + R <= rows in every call.
        unsafe {
            if S::WIDE_TILES {
                while rows - r >= 4 {
                    self.strip::<S, P, 4>(s, r, &block);
                    r += 4;
                }
            }
            // 4 left over as 2 + 2 is better than 3 + 1.
            while rows - r >= 3 && rows - r != 4 {
                self.strip::<S, P, 3>(s, r, &block);
                r += 3;
            }
            while rows - r >= 2 {
                self.strip::<S, P, 2>(s, r, &block);
                r += 2;
            }
            if rows - r == 1 {
                self.strip::<S, P, 1>(s, r, &block);
            }
        }
    }

    /// R rows from `r0` on against a block of weights, four weight rows at a time.
    #[inline(always)]
    unsafe fn strip<S: Simd, P: Product<S>, const R: usize>(&self, s: S, r0: usize, b: &Block) {
        let job = self.job;
        let mut acts = [job.acts; R];
        // SAFETY: the caller's promise: rows r0..r0 + R, weights n0..n1 and k0..k0 + kn exist.
        unsafe {
            for (r, a) in acts.iter_mut().enumerate() {
                *a = a.add((r0 + r) * job.act_stride + b.k0 * P::ACT_BYTES);
            }
            let mut n = b.n0;
            while n < b.n1 {
                let valid = (b.n1 - n).min(4);
                let mut weights = [b.from.base; 4];
                for (i, w) in weights.iter_mut().enumerate() {
                    *w = w.add((n - b.n0 + i.min(valid - 1)) * b.from.stride);
                }
                let mut sums = [[0f32; 4]; R];
                for (r, row) in sums.iter_mut().enumerate() {
                    let out = job.out.0.add((r0 + r) * job.out_stride + n);
                    if b.k0 == 0 {
                        self.start(r0 + r, n, valid, row);
                    } else {
                        std::ptr::copy_nonoverlapping(out, row.as_mut_ptr(), valid);
                    }
                }
                tile4::<S, P, R>(s, acts, weights, b.kn, 0, &mut sums);
                for (r, row) in sums.iter().enumerate() {
                    let out = job.out.0.add((r0 + r) * job.out_stride + n);
                    std::ptr::copy_nonoverlapping(row.as_ptr(), out, valid);
                }
                n += 4;
            }
        }
    }
}

/// Where a block's weights lie: the first of row n0, and bytes from row to row.
#[derive(Clone, Copy)]
struct Weights {
    base: *const u8,
    stride: usize,
}

struct Block {
    from: Weights,
    n0: usize,
    n1: usize,
    k0: usize,
    kn: usize,
}

/// `sums[r][i] += Σ_k acts[r][k]·weights[i][k]` over one block of `kn <= K_BLOCK` elements. Asks for the cache lines
/// `ahead` bytes after the weights when that is not zero.
///
/// # Safety
/// `kn` weights are readable at each pointer, and `kn` activations followed by zeros up to a multiple of `P::STEP`.
#[inline(always)]
pub(crate) unsafe fn tile4<S: Simd, P: Product<S>, const R: usize>(
    s: S,
    acts: [*const u8; R],
    weights: [*const u8; 4],
    kn: usize,
    ahead: usize,
    sums: &mut [[f32; 4]; R],
) {
    let mut acc = [[s.zero(); 4]; R];
    let mut k = 0;
    // SAFETY: the caller's promise; the last step takes its weights from a zero-filled copy.
    unsafe {
        while k + P::STEP <= kn {
            let mut a = [P::act(s, acts[0].add(k * P::ACT_BYTES)); R];
            for r in 1..R {
                a[r] = P::act(s, acts[r].add(k * P::ACT_BYTES));
            }
            for i in 0..4 {
                let at = weights[i].add(k * P::WEIGHT_BYTES);
                if ahead != 0 {
                    s.prefetch(at.wrapping_add(ahead));
                }
                let w = P::weight(s, at);
                for r in 0..R {
                    acc[r][i] = P::accumulate(s, a[r], w, acc[r][i]);
                }
            }
            k += P::STEP;
        }
        if k < kn {
            for i in 0..4 {
                let mut rest = [0u8; 64];
                let at = weights[i].add(k * P::WEIGHT_BYTES);
                std::ptr::copy_nonoverlapping(at, rest.as_mut_ptr(), (kn - k) * P::WEIGHT_BYTES);
                let w = P::weight(s, rest.as_ptr());
                for r in 0..R {
                    let a = P::act(s, acts[r].add(k * P::ACT_BYTES));
                    acc[r][i] = P::accumulate(s, a, w, acc[r][i]);
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
