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

impl Scratch {
    /// Bytes of host memory for passes of up to `tokens` rows with `wanted` rows of logits.
    pub fn bytes(spec: &ModelSpec, tokens: usize, wanted: usize) -> u64 {
        let tile = tokens.min(MLP_TILE_ROWS);
        let q = spec.heads * spec.head_size;
        let kv = spec.kv_heads * spec.head_size;
        let per_token = spec.hidden + q + 2 * kv + spec.head_size;
        let per_wanted = spec.hidden + HEAD_TILE_ROWS.min(spec.vocab);
        let rows = per_token * tokens + 2 * spec.intermediate * tile + per_wanted * wanted;
        rows as u64 * 4
            + Device::acts_bytes(tokens, spec.hidden)
            + Device::acts_bytes(tokens, q)
            + Device::acts_bytes(tile, spec.intermediate)
            + Device::acts_bytes(wanted, spec.hidden)
    }

    pub fn new(device: &Device, spec: &ModelSpec, tokens: usize, wanted: usize) -> Scratch {
        let tile = tokens.min(MLP_TILE_ROWS);
        let q = spec.heads * spec.head_size;
        let kv = spec.kv_heads * spec.head_size;
        let acts = |rows, cols| device.acts(rows, cols, Dtype::F32);
        Scratch {
            x: device.rows(tokens, spec.hidden),
            q: device.rows(tokens, q),
            k: device.rows(tokens, kv),
            v: device.rows(tokens, kv),
            gate: device.rows(tile, spec.intermediate),
            up: device.rows(tile, spec.intermediate),
            picked: device.rows(wanted, spec.hidden),
            logits: device.rows(wanted, HEAD_TILE_ROWS.min(spec.vocab)),
            normed: acts(tokens, spec.hidden),
            attended: acts(tokens, q),
            mlp: acts(tile, spec.intermediate),
            last: acts(wanted, spec.hidden),
            cos: vec![0.0; tokens * spec.head_size / 2],
            sin: vec![0.0; tokens * spec.head_size / 2],
        }
    }
}
