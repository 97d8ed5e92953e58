//! Paged keys and values: [layer][block][k|v][kv head][16 tokens][head size], in the weights' type.

use super::{AttnSegment, CpuDevice, KV_BLOCK_TOKENS};
use crate::units::Dtype;

/// The shape of a KV memory. Its bytes are the caller's, who also says which blocks a sequence has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub dtype: Dtype,
    pub layers: usize,
    /// Blocks of [`KV_BLOCK_TOKENS`] tokens, each across all layers.
    pub blocks: usize,
    pub kv_heads: usize,
    pub head_size: usize,
}

impl KvLayout {
    /// Bytes of one head's keys (or values) in one block of one layer.
    pub fn head_bytes(&self) -> usize {
        KV_BLOCK_TOKENS * self.head_size * self.dtype.bytes()
    }
    /// Bytes of one block in one layer: keys and values of all heads.
    pub fn layer_block_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_bytes()
    }
    /// Bytes of the whole memory.
    pub fn bytes(&self) -> usize {
        self.layers * self.blocks * self.layer_block_bytes()
    }
    /// Offset of one head's 16 keys (or values, `values`) in a block of a layer.
    pub fn offset(&self, layer: usize, block: u32, values: bool, kv_head: usize) -> usize {
        let block = layer * self.blocks + block as usize;
        block * self.layer_block_bytes()
            + (usize::from(values) * self.kv_heads + kv_head) * self.head_bytes()
    }
}

/// KV memory to read.
#[derive(Clone, Copy)]
pub struct KvView<'a> {
    pub layout: KvLayout,
    /// `layout.bytes()` bytes, any alignment.
    pub data: &'a [u8],
}

impl CpuDevice {
    /// Writes the keys and values of a pass into one layer's blocks, rounded once to the layout's type: row `first_row + i` of a
    /// segment goes to position `start_pos + i` of its table. Row r starts at `k[r·k_stride]` and `v[r·v_stride]`: kv_heads·head_size
    /// values.
    #[allow(clippy::too_many_arguments)]
    pub fn kv_append(
        &self,
        layout: &KvLayout,
        data: &mut [u8],
        layer: usize,
        segments: &[AttnSegment<'_>],
        k: &[f32],
        k_stride: usize,
        v: &[f32],
        v_stride: usize,
    ) {
        assert!(layer < layout.layers && data.len() >= layout.bytes());
        let (size, token_bytes) = (layout.head_size, layout.head_size * layout.dtype.bytes());
        for segment in segments {
            segment.check(layout.blocks);
            for i in 0..segment.rows {
                let row = segment.first_row + i;
                let (block, slot) = segment.place(segment.start_pos + i);
                for head in 0..layout.kv_heads {
                    for (values, x, stride) in [(false, k, k_stride), (true, v, v_stride)] {
                        let from = &x[row * stride + head * size..][..size];
                        let at = layout.offset(layer, block, values, head) + slot * token_bytes;
                        narrow(layout.dtype, from, &mut data[at..at + token_bytes]);
                    }
                }
            }
        }
    }
}

/// Rounds to nearest even, bit for bit what [`super::ActBuf`] holds.
fn narrow(dtype: Dtype, from: &[f32], to: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            for (x, to) in from.iter().zip(to.chunks_exact_mut(4)) {
                to.copy_from_slice(&x.to_le_bytes());
            }
        }
        Dtype::F16 => {
            for (x, to) in from.iter().zip(to.chunks_exact_mut(2)) {
                to.copy_from_slice(&half::f16::from_f32(*x).to_le_bytes());
            }
        }
        Dtype::BF16 => {
            for (x, to) in from.iter().zip(to.chunks_exact_mut(2)) {
                to.copy_from_slice(&half::bf16::from_f32(*x).to_le_bytes());
            }
        }
    }
}
