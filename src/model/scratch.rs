//! Everything a pass writes to besides weights and KV, allocated once.

use crate::device::{Acts, Device, Rows};
use crate::spec::ModelSpec;
use crate::units::Dtype;

/// Rows of the MLP computed at once: bounds its two wide activations whatever the pass holds. The weights lie in memory
/// for all tiles; only the tile's activations move.
pub const MLP_TILE_ROWS: usize = 512;
/// Head rows (vocabulary entries) computed at once: bounds the logits of a block.
pub const HEAD_TILE_ROWS: usize = 4096;

/// Shapes are `[rows, columns]`; f32 unless said.
pub(super) struct Scratch {
    pub x: Rows,        // [tokens, hidden] residual stream
    pub q: Rows,        // [tokens, heads · head size]
    pub k: Rows,        // [tokens, kv heads · head size]
    pub v: Rows,        // [tokens, kv heads · head size]
    pub gate: Rows,     // [mlp tile, intermediate]
    pub up: Rows,       // [mlp tile, intermediate]
    pub picked: Rows,   // [wanted rows, hidden]
    pub logits: Rows,   // [wanted rows, head tile]
    pub normed: Acts,   // [tokens, hidden] in the weights' 16-bit type
    pub attended: Acts, // [tokens, heads · head size]
    pub mlp: Acts,      // [mlp tile, intermediate]
    pub last: Acts,     // [wanted rows, hidden]
    pub cos: Vec<f32>,  // [tokens, head size / 2]
    pub sin: Vec<f32>,
}

/// Columns of each part, for the sizes in bytes and for the allocation: one list, so that they cannot differ.
struct Sizes {
    f32_per_token: usize,
    act_per_token: usize,
    f32_per_tile: usize,
    act_per_tile: usize,
    f32_per_wanted: usize,
    act_per_wanted: usize,
}

fn sizes(spec: &ModelSpec) -> Sizes {
    let q = spec.heads * spec.head_size;
    let kv = spec.kv_heads * spec.head_size;
    Sizes {
        f32_per_token: spec.hidden + q + 2 * kv + spec.head_size,
        act_per_token: spec.hidden + q,
        f32_per_tile: 2 * spec.intermediate,
        act_per_tile: spec.intermediate,
        f32_per_wanted: spec.hidden + HEAD_TILE_ROWS.min(spec.vocab),
        act_per_wanted: spec.hidden,
    }
}

impl Scratch {
    /// Bytes of host memory for passes of up to `tokens` rows with `wanted` rows of logits.
    pub fn bytes(spec: &ModelSpec, dtype: Dtype, tokens: usize, wanted: usize) -> u64 {
        let s = sizes(spec);
        let tile = tokens.min(MLP_TILE_ROWS);
        let f32s = s.f32_per_token * tokens + s.f32_per_tile * tile + s.f32_per_wanted * wanted;
        let acts = s.act_per_token * tokens + s.act_per_tile * tile + s.act_per_wanted * wanted;
        (f32s * 4 + acts * dtype.bytes()) as u64
    }

    pub fn new(
        device: &Device,
        spec: &ModelSpec,
        dtype: Dtype,
        tokens: usize,
        wanted: usize,
    ) -> Scratch {
        let q = spec.heads * spec.head_size;
        let kv = spec.kv_heads * spec.head_size;
        let tile = tokens.min(MLP_TILE_ROWS);
        Scratch {
            x: device.rows(tokens, spec.hidden),
            q: device.rows(tokens, q),
            k: device.rows(tokens, kv),
            v: device.rows(tokens, kv),
            gate: device.rows(tile, spec.intermediate),
            up: device.rows(tile, spec.intermediate),
            picked: device.rows(wanted, spec.hidden),
            logits: device.rows(wanted, HEAD_TILE_ROWS.min(spec.vocab)),
            normed: device.acts(tokens, spec.hidden, dtype),
            attended: device.acts(tokens, q, dtype),
            mlp: device.acts(tile, spec.intermediate, dtype),
            last: device.acts(wanted, spec.hidden, dtype),
            cos: vec![0.0; tokens * spec.head_size / 2],
            sin: vec![0.0; tokens * spec.head_size / 2],
        }
    }
}
