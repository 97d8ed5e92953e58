//! Causal attention over paged KV, with grouped heads and an optional sliding window.
//!
//! **The one definition**, for prefill and decode alike. Keys are taken in chunks of [`ATTENTION_CHUNK`] at absolute positions. Within a
//! chunk: scores q·k by the product of `linear.rs` over the head (q scaled first, float32); m_c their maximum, p = exp(score − m_c), l_c the
//! sum of p with lane = position mod lanes; o_c the sum of p·v in ascending positions. Chunks merge in ascending order by the usual
//! rescaling (Milakov & Gimelshein 2018; Dao 2023). A key outside a row's range enters nothing, not even as a zero. So a row's bits depend on
//! its own query and range alone, and chunks could be computed on different threads without changing them.

use super::act::ActBuf;
use super::attention_tile::{Keys, Queries, Ranges, Tile, padded, zero_pad};
use super::linear::widen;
use super::scratch::KV_BLOCK_TOKENS;
use super::simd::{Bf16, F16, F32, Simd};
use super::tiling::{Tiling, group_of};
use super::{CpuDevice, KvLayout, KvView};
use crate::units::Dtype;

/// One sequence's rows in a pass.
#[derive(Clone, Copy, Debug)]
pub struct AttnSegment<'a> {
    /// Its first row in q, k, v and the output.
    pub first_row: usize,
    pub rows: usize,
    /// Position of its first row in the sequence; the rows before it are in the KV memory already.
    pub start_pos: usize,
    /// Its blocks, in the order of positions; positions up to `start_pos + rows` have one.
    pub table: &'a [u32],
}

impl AttnSegment<'_> {
    /// Block and slot of a position.
    pub(super) fn place(&self, position: usize) -> (u32, usize) {
        (
            self.table[position / KV_BLOCK_TOKENS],
            position % KV_BLOCK_TOKENS,
        )
    }

    pub(super) fn check(&self, blocks: usize) {
        let needed = (self.start_pos + self.rows).div_ceil(KV_BLOCK_TOKENS);
        assert!(self.table.len() >= needed, "block table too short");
        // Every block that a row of this pass can see; one that has left its window may be gone.
        let newest = &self.table[self.start_pos / KV_BLOCK_TOKENS..needed];
        assert!(
            newest.iter().all(|b| (*b as usize) < blocks),
            "block out of range"
        );
    }
}

impl CpuDevice {
    /// `out` [rows][heads·head_size] = attention of `heads` query heads over `kv`'s heads: query head h reads kv head
    /// h / (heads / kv_heads). Row r's query starts at `q[r·q_stride]`. Row i of a segment sees the positions `0..=start_pos + i`, with a
    /// window w only the last w of them. The keys and values of the rows themselves must have been appended. `out` gets as many rows as the
    /// segments reach; rows in no segment keep arbitrary values.
    #[allow(clippy::too_many_arguments)]
    pub fn attention(
        &self,
        q: &[f32],
        q_stride: usize,
        heads: usize,
        kv: &KvView<'_>,
        layer: usize,
        segments: &[AttnSegment<'_>],
        scale: f32,
        window: Option<usize>,
        out: &mut ActBuf,
    ) {
        let layout = kv.layout;
        assert!(layer < layout.layers && kv.data.len() >= layout.bytes());
        assert!(window != Some(0), "a window of no positions");
        let rows = segments
            .iter()
            .map(|s| s.first_row + s.rows)
            .max()
            .unwrap_or(0);
        super::check_rows(q.len(), rows, q_stride, heads * layout.head_size);
        let group = group_of(heads, layout.kv_heads, layout.head_size);
        let out = out.begin(rows, heads * layout.head_size, self.isa);
        for segment in segments {
            segment.check(layout.blocks);
        }
        let tiling = Tiling::new(
            group,
            layout.kv_heads,
            layout.head_size,
            self.threads(),
            segments.iter().map(|s| s.rows),
        );
        self.pool.run(tiling.tasks, &|task, scratch| {
            let Some(tile) = tiling.tile(task, segments.iter().map(|s| s.rows)) else {
                return;
            };
            let segment = &segments[tile.segment];
            self.isa.run(Tile {
                queries: Queries {
                    q,
                    q_stride,
                    first_row: segment.first_row + tile.first_row,
                    rows: tile.rows,
                    first_head: tile.kv_head * group + tile.first_head,
                    heads: tile.heads,
                    head_size: layout.head_size,
                    scale,
                },
                ranges: Ranges::Causal {
                    first: segment.start_pos + tile.first_row,
                    window,
                },
                keys: PagedKeys {
                    layout,
                    data: kv.data,
                    layer,
                    kv_head: tile.kv_head,
                    table: segment.table,
                },
                out,
                scratch,
            });
        });
    }
}

struct PagedKeys<'a> {
    layout: KvLayout,
    data: &'a [u8],
    layer: usize,
    kv_head: usize,
    table: &'a [u32],
}

impl Keys for PagedKeys<'_> {
    #[inline(always)]
    unsafe fn block<S: Simd>(
        &self,
        s: S,
        values: bool,
        block: usize,
        n: usize,
        to: *mut f32,
    ) -> *const f32 {
        let id = self.table[block];
        assert!((id as usize) < self.layout.blocks, "block out of range");
        let (size, dtype) = (self.layout.head_size, self.layout.dtype);
        let at = self.layout.offset(self.layer, id, values, self.kv_head);
        let step = padded(size);
        // One run when heads need no padding.
        let (runs, len) = if step == size {
            (1, n * size)
        } else {
            (n, size)
        };
        for run in 0..runs {
            // SAFETY: the block is inside the layout (asserted) and `attention` checked that data holds the layout.
            unsafe {
                let from = self.data.as_ptr().add(at + run * size * dtype.bytes());
                let to = to.add(run * step);
                match dtype {
                    Dtype::F32 => widen::<S, F32>(s, from, len, to),
                    Dtype::F16 => widen::<S, F16>(s, from, len, to),
                    Dtype::BF16 => widen::<S, Bf16>(s, from, len, to),
                }
                zero_pad(to, len, if runs == 1 { len } else { step });
            }
        }
        to
    }
}
