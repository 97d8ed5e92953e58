//! Attention without a cache: every row of a window sees every row of it (the vision tower).

use super::CpuDevice;
use super::act::ActBuf;
use super::attention_tile::{Keys, Queries, Ranges, Tile, padded, zero_pad};
use super::scratch::KV_BLOCK_TOKENS;
use super::simd::Simd;
use super::tiling::{Tiling, group_of};

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
        let tiling = Tiling::new(group, a.kv_heads, a.head_size, self.threads(), lengths());
        self.pool.run(tiling.tasks, &|task, scratch| {
            let Some(tile) = tiling.tile(task, lengths()) else {
                return;
            };
            let start = a.cu_seqlens[tile.segment];
            self.isa.run(Tile {
                queries: Queries {
                    q: a.q,
                    q_stride: a.q_stride,
                    first_row: start + tile.first_row,
                    rows: tile.rows,
                    first_head: tile.kv_head * group + tile.first_head,
                    heads: tile.heads,
                    head_size: a.head_size,
                    scale: a.scale,
                },
                ranges: Ranges::All {
                    len: a.cu_seqlens[tile.segment + 1] - start,
                },
                keys: DenseKeys {
                    a,
                    start,
                    kv_head: tile.kv_head,
                },
                out,
                scratch,
            });
        });
    }
}

struct DenseKeys<'a> {
    a: &'a DenseAttention<'a>,
    /// The window's first row.
    start: usize,
    kv_head: usize,
}

impl Keys for DenseKeys<'_> {
    #[inline(always)]
    unsafe fn fill<S: Simd>(&self, s: S, values: bool, block: usize, n: usize, to: *mut f32) {
        let a = self.a;
        let (x, stride) = if values {
            (a.v, a.v_stride)
        } else {
            (a.k, a.k_stride)
        };
        let step = padded(a.head_size);
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
    }
}
