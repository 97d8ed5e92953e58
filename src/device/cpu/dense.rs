//! Attention without a cache: every row of a window sees every row of it (the vision tower).

use std::ops::Range;

use super::act::{ActBuf, ActRows};
use super::attention_tile::{Keys, Queries, Ranges, Tile, padded, zero_pad};
use super::scratch::{Floats, KV_BLOCK_TOKENS};
use super::simd::Simd;
use super::tiling::{TileAt, Tiling, group_of};
use super::{CpuDevice, OutPtr};

/// Rows from which on a window's keys are gathered, a head at a time: rows of all heads are kilobytes apart, so that every key lies on a page of
/// its own, and each tile would walk all those pages again.
const GATHER_ROWS: usize = 256;

/// Queries, keys and values as float32 rows, cut into windows that do not see one another.
#[derive(Clone, Copy)]
pub struct DenseAttention<'a> {
    /// [rows][heads][head_size], a row every `q_stride` elements.
    pub q: &'a [f32],
    /// [rows][kv_heads][head_size], a row every `k_stride` elements.
    pub k: &'a [f32],
    /// As k.
    pub v: &'a [f32],
    pub q_stride: usize,
    pub k_stride: usize,
    pub v_stride: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    /// Multiplies the scores: 1/√head_size as a rule.
    pub scale: f32,
    /// Window i is the rows `cu_seqlens[i]..cu_seqlens[i + 1]`; ascending, the first 0, the last the number of rows.
    pub cu_seqlens: &'a [usize],
}

/// Host memory that attention over windows of `longest` rows takes for a moment.
pub fn dense_scratch_bytes(longest: usize, head_size: usize) -> u64 {
    match longest {
        0..=GATHER_ROWS => 0,
        _ => (2 * longest * padded(head_size) * 4) as u64,
    }
}

impl CpuDevice {
    /// `out` [rows][heads·head_size] = softmax(scale·q·kᵀ)·v within each window: the arithmetic of [`CpuDevice::attention`], positions
    /// counted from the window's start.
    pub fn attention_dense(&self, a: &DenseAttention<'_>, out: &mut ActBuf) {
        let rows = a.cu_seqlens.last().copied().unwrap_or(0);
        assert!(
            a.cu_seqlens.first().is_none_or(|first| *first == 0) && a.cu_seqlens.is_sorted(),
            "cu_seqlens do not ascend from 0"
        );
        super::check_rows(a.q.len(), rows, a.q_stride, a.heads * a.head_size);
        super::check_rows(a.k.len(), rows, a.k_stride, a.kv_heads * a.head_size);
        super::check_rows(a.v.len(), rows, a.v_stride, a.kv_heads * a.head_size);
        let group = group_of(a.heads, a.kv_heads, a.head_size);
        let out = out.begin(rows, a.heads * a.head_size, self.isa);
        let lengths = || a.cu_seqlens.windows(2).map(|w| w[1] - w[0]);
        let longest = lengths().max().unwrap_or(0);
        if longest <= GATHER_ROWS {
            let tiling = Tiling::new(group, a.kv_heads, a.head_size, self.threads(), lengths());
            self.dense_tiles(
                a,
                &tiling,
                lengths,
                |tile| (tile.segment, tile.kv_head),
                None,
                out,
            );
            return;
        }
        let mut gathered = Floats::new(2 * longest * padded(a.head_size));
        for segment in 0..a.cu_seqlens.len() - 1 {
            let (start, end) = (a.cu_seqlens[segment], a.cu_seqlens[segment + 1]);
            let lengths = || std::iter::once(end - start);
            let tiling = Tiling::new(group, 1, a.head_size, self.threads(), lengths());
            for kv_head in 0..a.kv_heads {
                self.gather(a, start..end, kv_head, &mut gathered);
                self.dense_tiles(
                    a,
                    &tiling,
                    lengths,
                    |_| (segment, kv_head),
                    Some(&gathered),
                    out,
                );
            }
        }
    }

    /// The tiles of a tiling over segments of `lengths` rows; `at` says which window and which head of the keys a tile is of.
    fn dense_tiles<L: Iterator<Item = usize>>(
        &self,
        a: &DenseAttention<'_>,
        tiling: &Tiling,
        lengths: impl Fn() -> L + Sync,
        at: impl Fn(&TileAt) -> (usize, usize) + Sync,
        gathered: Option<&Floats>,
        out: ActRows,
    ) {
        let group = a.heads / a.kv_heads;
        self.pool.run(tiling.tasks, &|task, scratch| {
            let Some(tile) = tiling.tile(task, lengths()) else {
                return;
            };
            let (segment, kv_head) = at(&tile);
            let start = a.cu_seqlens[segment];
            self.isa.run(Tile {
                queries: Queries {
                    q: a.q,
                    q_stride: a.q_stride,
                    first_row: start + tile.first_row,
                    rows: tile.rows,
                    first_head: kv_head * group + tile.first_head,
                    heads: tile.heads,
                    head_size: a.head_size,
                    scale: a.scale,
                },
                ranges: Ranges::All {
                    len: a.cu_seqlens[segment + 1] - start,
                },
                keys: DenseKeys {
                    a,
                    start,
                    rows: a.cu_seqlens[segment + 1] - start,
                    kv_head,
                    gathered,
                },
                out,
                scratch,
            });
        });
    }

    /// One head's keys, then its values, of the rows `rows`, side by side as [rows][padded].
    fn gather(&self, a: &DenseAttention<'_>, rows: Range<usize>, kv_head: usize, to: &mut Floats) {
        let (count, step) = (rows.len(), padded(a.head_size));
        assert!(2 * count * step <= to.len(), "room for the gathered head");
        let to = OutPtr(to.as_mut_ptr());
        self.pool.run(count.div_ceil(GATHER_ROWS), &|task, _| {
            for i in task * GATHER_ROWS..count.min((task + 1) * GATHER_ROWS) {
                let at = (rows.start + i, kv_head * a.head_size);
                for (half, x, stride) in [(0, a.k, a.k_stride), (count, a.v, a.v_stride)] {
                    let from = &x[at.0 * stride + at.1..][..a.head_size];
                    let to = element(to, (half + i) * step);
                    // SAFETY: the buffer holds two times `count` rows (asserted), and this task alone has this one.
                    unsafe {
                        std::ptr::copy_nonoverlapping(from.as_ptr(), to, a.head_size);
                        zero_pad(to, a.head_size, step);
                    }
                }
            }
        });
    }
}

/// A function, so that closures take the whole pointer, which may go to other threads, and not its field.
fn element(to: OutPtr<f32>, i: usize) -> *mut f32 {
    to.0.wrapping_add(i)
}

struct DenseKeys<'a> {
    a: &'a DenseAttention<'a>,
    /// The window's first row, and how many there are.
    start: usize,
    rows: usize,
    kv_head: usize,
    /// This head's keys and values where they were gathered.
    gathered: Option<&'a Floats>,
}

impl Keys for DenseKeys<'_> {
    #[inline(always)]
    unsafe fn block<S: Simd>(
        &self,
        s: S,
        values: bool,
        block: usize,
        n: usize,
        to: *mut f32,
    ) -> *const f32 {
        let a = self.a;
        let (x, stride) = if values {
            (a.v, a.v_stride)
        } else {
            (a.k, a.k_stride)
        };
        let step = padded(a.head_size);
        if let Some(gathered) = self.gathered {
            let first = block * KV_BLOCK_TOKENS + if values { self.rows } else { 0 };
            // SAFETY: the block is inside the window, and `gather` wrote two times its rows. Up to three rows behind a window's last key are
            // its values or unused rows of the buffer, which has 2 × longest > 2 × GATHER_ROWS rows.
            return unsafe { gathered.as_ptr().add(first * step) };
        }
        for i in 0..n {
            let row = self.start + block * KV_BLOCK_TOKENS + i;
            // SAFETY: the row is inside the window, whose rows `attention_dense` checked.
            unsafe {
                let from = x.as_ptr().add(row * stride + self.kv_head * a.head_size);
                let to = to.add(i * step);
                let mut c = 0;
                while c < a.head_size {
                    let n = (a.head_size - c).min(S::LANES);
                    s.store(to.add(c), s.load_upto(from.add(c), n));
                    c += S::LANES;
                }
                zero_pad(to, c, step);
            }
        }
        to
    }
}
