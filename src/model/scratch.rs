//! Everything a pass writes to besides weights and KV, allocated once.

use super::forward::PassLimits;
use crate::device::{Acts, Best, Device, DeviceKind, ListShape, Lists, Mirror, Room, Rows};
use crate::error::Result;
use crate::spec::ModelSpec;
use crate::units::Dtype;

/// Rows of the MLP computed at once: bounds its two wide activations whatever the pass holds. The weights lie in memory
/// for all tiles; only the tile's activations move. On a CPU few enough that those of a 1.5B model lie in a last-level cache of 32 MiB (6 % of a
/// prompt's time), on a GPU enough for whole waves of thread blocks.
pub(super) const fn mlp_tile_rows(device: DeviceKind) -> usize {
    match device {
        DeviceKind::Cpu => 256,
        DeviceKind::Cuda => 512,
    }
}
/// Head rows (vocabulary entries) computed at once: bounds the logits of a block.
pub const HEAD_TILE_ROWS: usize = 4096;

/// Shapes are `[rows, columns]`; f32 unless said.
pub(super) struct Scratch {
    pub x: Rows,            // [tokens, hidden] residual stream
    pub q: Rows,            // [tokens, heads · head size]
    pub k: Rows,            // [tokens, kv heads · head size]
    pub v: Rows,            // [tokens, kv heads · head size]
    pub gate: Rows,         // [mlp tile, intermediate]
    pub up: Rows,           // [mlp tile, intermediate]
    pub picked: Rows,       // [wanted rows, hidden]
    pub logits: Rows,       // [wanted rows, head tile]
    pub normed: Acts,       // [tokens, hidden] in the weights' 16-bit type
    pub attended: Acts,     // [tokens, heads · head size]
    pub mlp: Acts,          // [mlp tile, intermediate]
    pub last: Acts,         // [wanted rows, hidden]
    pub lists: Lists,       // of the pass's segments
    pub mirror: Mirror,     // [wanted rows, head tile] where the host reads logits
    pub best: Option<Best>, // [head tiles, wanted rows, candidates]
    pub cos: Vec<f32>,      // [tokens, head size / 2], on the host
    pub sin: Vec<f32>,
}

impl Scratch {
    /// Memory for passes within the limits.
    pub fn room(device: DeviceKind, spec: &ModelSpec, limits: &PassLimits) -> Room {
        let (tokens, wanted) = (limits.tokens, limits.wanted);
        let tile = tokens.min(mlp_tile_rows(device));
        let q = spec.heads * spec.head_size;
        let kv = spec.kv_heads * spec.head_size;
        let head = HEAD_TILE_ROWS.min(spec.vocab);
        let mut parts = vec![
            device.rows_room(tokens, spec.hidden),
            device.rows_room(tokens, q),
            device.rows_room(tokens, kv),
            device.rows_room(tokens, kv),
            device.rows_room(tile, spec.intermediate),
            device.rows_room(tile, spec.intermediate),
            device.rows_room(wanted, spec.hidden),
            device.rows_room(wanted, head),
            device.acts_room(tokens, spec.hidden),
            device.acts_room(tokens, q),
            device.acts_room(tile, spec.intermediate),
            device.acts_room(wanted, spec.hidden),
            device.lists_room(&list_shape(spec, limits)),
            device.mirror_room(wanted * head),
            Room {
                host: (tokens * spec.head_size) as u64 * 4,
                device: 0,
            },
        ];
        if limits.select {
            parts.push(device.best_room(most_tiles(spec), wanted));
        }
        parts.into_iter().sum()
    }

    /// `tiles`: into how many pieces the head is cut.
    pub fn new(
        device: &Device,
        spec: &ModelSpec,
        limits: &PassLimits,
        tiles: usize,
    ) -> Result<Scratch> {
        let (tokens, wanted) = (limits.tokens, limits.wanted);
        let tile = tokens.min(mlp_tile_rows(device.kind()));
        let q = spec.heads * spec.head_size;
        let kv = spec.kv_heads * spec.head_size;
        let head = HEAD_TILE_ROWS.min(spec.vocab);
        let acts = |rows, cols| device.acts(rows, cols, Dtype::F32);
        Ok(Scratch {
            x: device.rows(tokens, spec.hidden)?,
            q: device.rows(tokens, q)?,
            k: device.rows(tokens, kv)?,
            v: device.rows(tokens, kv)?,
            gate: device.rows(tile, spec.intermediate)?,
            up: device.rows(tile, spec.intermediate)?,
            picked: device.rows(wanted, spec.hidden)?,
            logits: device.rows(wanted, head)?,
            normed: acts(tokens, spec.hidden)?,
            attended: acts(tokens, q)?,
            mlp: acts(tile, spec.intermediate)?,
            last: acts(wanted, spec.hidden)?,
            lists: device.lists(&list_shape(spec, limits))?,
            mirror: device.mirror(wanted * head)?,
            best: match limits.select {
                true => device.best(tiles, wanted)?,
                false => None,
            },
            cos: vec![0.0; tokens * spec.head_size / 2],
            sin: vec![0.0; tokens * spec.head_size / 2],
        })
    }
}

/// Pieces of the head, however it is cut into units: a unit adds at most one that is not full.
fn most_tiles(spec: &ModelSpec) -> usize {
    2 * spec.vocab.div_ceil(HEAD_TILE_ROWS) + 1
}

fn list_shape(spec: &ModelSpec, limits: &PassLimits) -> ListShape {
    let mut windows: Vec<Option<usize>> = Vec::new();
    for window in &spec.window {
        if !windows.contains(window) {
            windows.push(*window);
        }
    }
    ListShape {
        rows: limits.tokens,
        spans: limits.segments.min(limits.tokens),
        table: limits.table,
        context: limits.context,
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_size: spec.head_size,
        windows,
    }
}
