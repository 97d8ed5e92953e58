//! Qwen2.5-VL's vision tower: patches → embedding rows of the decoder's width.
//!
//! patch embedding → depth × (norm, attention in windows or in the whole frame, norm, SwiGLU) → merger. All pictures of a wave go through
//! together, slice behind slice, nothing padded; the blocks are asked for once a wave. Numerics are those of the decoder: residual stream,
//! norms, rope and softmax in float32, inputs of products rounded once to the weights' type.
//!
//! Memory: the residual stream of the whole wave, and the work of one group of slices at a time.

mod layout;

use std::sync::Arc;
use std::time::{Duration, Instant};

use layout::Order;
pub use layout::Slice;

use super::normed::{Normed, product};
use super::{UnitSource, UnitView};
use crate::device::{
    Acts, Dense, DenseShape, Device, DeviceKind, Into, Mirror, PassRows, Room, Rows,
};
use crate::error::{Error, Result};
use crate::spec::{Role, UnitKind, VisionSpec};
use crate::units::UnitId;

/// Fixed in the tower's code, in no config.
const RMS_EPS: f32 = 1e-6;
const ROPE_THETA: f64 = 10_000.0;
/// Rows whose MLP, patch embedding or merger is computed at once.
const TILE_ROWS: usize = 512;

/// Where patches come from: `(slice, first patch of it, rows to fill)`, patches in picture order.
pub type PatchSource<'a> = dyn FnMut(usize, usize, &mut [f32]) + 'a;
/// Where embeddings go: `(slice, rows)`, `[cells, out hidden]` in picture order.
pub type EmbeddingSink<'a> = dyn FnMut(usize, &[f32]) -> Result<()> + 'a;

/// The tower, ready to run waves of up to a fixed number of patches. Dropping it gives its memory back.
pub struct Tower {
    spec: VisionSpec,
    embed: UnitId,
    blocks: Vec<UnitId>,
    merger: UnitId,
    inv_freq: Vec<f32>,
    scratch: Scratch,
    limits: Limits,
    computed: Duration,
}

/// What a wave may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Patches of all slices together.
    pub wave: usize,
    /// Patches of the largest slice.
    pub slice: usize,
}

/// Shapes are `[rows, columns]`; f32 unless said. `group` is the patches of the slices that attend at once.
struct Scratch {
    x: Rows,        // [wave, hidden] residual stream, in window order
    qkv: Rows,      // [group, 3 · hidden]
    patches: Rows,  // [tile, patch values]; later gate
    gate: Rows,     // [tile, intermediate]
    up: Rows,       // [tile, intermediate]
    cells: Rows,    // [tile / merge², merge² · hidden]
    out: Rows,      // [tile / merge², out hidden]
    normed: Acts,   // [group, hidden] in the weights' 16-bit type
    attended: Acts, // [group, hidden]
    wide: Acts,     // [tile, the widest of patch values, intermediate]
    merged: Acts,   // [tile / merge², merge² · hidden]
    dense: Dense,   // of the group's attention
    mirror: Mirror, // [tile / merge², out hidden] where the host reads embeddings
    cos: Vec<f32>,  // [group, head size / 2]
    sin: Vec<f32>,
    rows: Vec<f32>, // [one slice's cells, out hidden]
}

/// Slices that attend together: the first's index, the index behind the last, and their rows in the wave.
struct Group {
    slices: std::ops::Range<usize>,
    first_row: usize,
    rows: usize,
}

/// A wave as it lies in memory: where each slice begins, and its order.
struct Wave<'w> {
    slices: &'w [Slice],
    starts: Vec<usize>,
    orders: Vec<Arc<Order>>,
    groups: Vec<Group>,
}

impl Tower {
    /// `units`: id and kind of every unit of the model.
    pub fn new(
        device: &Device,
        spec: &VisionSpec,
        units: &[(UnitId, UnitKind)],
        limits: Limits,
    ) -> Result<Tower> {
        let one = |kind: UnitKind| {
            units
                .iter()
                .find(|u| u.1 == kind)
                .map(|u| u.0)
                .ok_or_else(|| Error::internal(format!("the model has no {kind:?} unit")))
        };
        let quarter = spec.hidden / spec.heads / 4;
        let inv_freq = (0..quarter)
            .map(|i| {
                // transformers: 1 / theta^(2i / (head size / 2)), in float32.
                let exponent = (2 * i) as f32 / (2 * quarter) as f32;
                1.0 / (ROPE_THETA.powf(f64::from(exponent)) as f32)
            })
            .collect();
        Ok(Tower {
            embed: one(UnitKind::VisionEmbed)?,
            blocks: (0..spec.depth)
                .map(|i| one(UnitKind::VisionBlock(i as u32)))
                .collect::<Result<_>>()?,
            merger: one(UnitKind::VisionMerger)?,
            inv_freq,
            scratch: Scratch::new(device, spec, limits)?,
            spec: spec.clone(),
            limits,
            computed: Duration::ZERO,
        })
    }

    /// Memory [`Tower::new`] takes.
    pub fn room(device: DeviceKind, spec: &VisionSpec, limits: Limits) -> Room {
        Scratch::room(device, spec, limits)
    }

    /// Units in the order a wave asks for them.
    pub fn order(&self) -> Vec<UnitId> {
        std::iter::once(self.embed)
            .chain(self.blocks.iter().copied())
            .chain(std::iter::once(self.merger))
            .collect()
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Time spent computing so far, waits for units left out.
    pub fn computed(&self) -> Duration {
        self.computed
    }

    /// One wave. A slice's embeddings do not depend on the other slices.
    pub fn run(
        &mut self,
        device: &Device,
        source: &mut dyn UnitSource,
        slices: &[Slice],
        patches: &mut PatchSource<'_>,
        sink: &mut EmbeddingSink<'_>,
    ) -> Result<()> {
        let wave = self.lay_out(slices)?;
        let mut spent = Duration::ZERO;
        source.with_unit(self.embed, &mut |unit| {
            let started = Instant::now();
            self.embed(device, unit, &wave, patches)?;
            spent += started.elapsed();
            Ok(())
        })?;
        for block in 0..self.blocks.len() {
            source.with_unit(self.blocks[block], &mut |unit| {
                let started = Instant::now();
                let full = self.spec.full_attention_blocks.contains(&block);
                for group in &wave.groups {
                    self.attention(device, unit, &wave, group, full)?;
                }
                let rows = slices.iter().map(Slice::patches).sum();
                self.mlp(device, unit, rows)?;
                spent += started.elapsed();
                Ok(())
            })?;
        }
        source.with_unit(self.merger, &mut |unit| {
            let started = Instant::now();
            for slice in 0..slices.len() {
                self.merge(device, unit, &wave, slice)?;
                let cells = wave.orders[slice].cells.len();
                sink(slice, &self.scratch.rows[..cells * self.spec.out_hidden])?;
            }
            spent += started.elapsed();
            Ok(())
        })?;
        self.computed += spent;
        Ok(())
    }

    fn lay_out<'w>(&self, slices: &'w [Slice]) -> Result<Wave<'w>> {
        let mut starts = Vec::with_capacity(slices.len());
        let mut orders: Vec<Arc<Order>> = Vec::with_capacity(slices.len());
        let mut groups: Vec<Group> = Vec::new();
        let mut rows = 0;
        for (i, slice) in slices.iter().enumerate() {
            let n = slice.patches();
            let merge = self.spec.merge;
            if n > self.limits.slice
                || rows + n > self.limits.wave
                || !slice.h.is_multiple_of(merge)
                || !slice.w.is_multiple_of(merge)
                || n == 0
            {
                return Err(Error::internal("a wave that its tower was not made for"));
            }
            // Frames of one video share their order.
            let order = match i.checked_sub(1) {
                Some(before) if slices[before] == *slice => orders[before].clone(),
                _ => Arc::new(Order::new(*slice, &self.spec)),
            };
            match groups.last_mut() {
                Some(g) if g.rows + n <= group_rows(self.limits) => {
                    g.slices.end += 1;
                    g.rows += n;
                }
                _ => groups.push(Group {
                    slices: i..i + 1,
                    first_row: rows,
                    rows: n,
                }),
            }
            starts.push(rows);
            orders.push(order);
            rows += n;
        }
        Ok(Wave {
            slices,
            starts,
            orders,
            groups,
        })
    }

    /// x = patch embedding of every patch, put in window order.
    fn embed(
        &mut self,
        device: &Device,
        unit: &UnitView<'_>,
        wave: &Wave<'_>,
        patches: &mut PatchSource<'_>,
    ) -> Result<()> {
        let w = unit.need(Role::PatchEmbed)?;
        let unit_rows = self.spec.merge * self.spec.merge;
        let s = &mut self.scratch;
        s.wide.round_to(w.dtype);
        let mut values = vec![0.0; w.cols * TILE_ROWS.next_multiple_of(unit_rows)];
        for (i, slice) in wave.slices.iter().enumerate() {
            let order = &wave.orders[i];
            let tile_rows = (TILE_ROWS / unit_rows).max(1) * unit_rows;
            for first in (0..slice.patches()).step_by(tile_rows) {
                let n = tile_rows.min(slice.patches() - first);
                let values = &mut values[..n * w.cols];
                let cells = &order.cells[first / unit_rows..(first + n) / unit_rows];
                for (cell, rows) in cells
                    .iter()
                    .zip(values.chunks_exact_mut(unit_rows * w.cols))
                {
                    patches(i, *cell as usize * unit_rows, rows);
                }
                device.reshape(&mut s.patches, w.cols);
                device.write_rows(&mut s.patches, 0, values)?;
                device.round(&s.patches, n, w.cols, &mut s.wide)?;
                device.linear(
                    &s.wide,
                    n,
                    w,
                    None,
                    &mut s.x,
                    wave.starts[i] + first,
                    Into::Store,
                )?;
            }
        }
        Ok(())
    }

    /// x += proj(attention(rope(q), rope(k), v)), q, k, v from RMSNorm(x): within windows, or within whole slices.
    fn attention(
        &mut self,
        device: &Device,
        unit: &UnitView<'_>,
        wave: &Wave<'_>,
        group: &Group,
        full: bool,
    ) -> Result<()> {
        let (hidden, heads) = (self.spec.hidden, self.spec.heads);
        let head_size = hidden / heads;
        let mut ends = vec![0];
        for i in group.slices.clone() {
            let base = wave.starts[i] - group.first_row;
            match full {
                true => ends.push(base + wave.slices[i].patches()),
                false => ends.extend(wave.orders[i].window_ends.iter().map(|e| base + e)),
            }
        }
        self.angles(wave, group);
        let s = &mut self.scratch;
        let (first, rows) = (group.first_row, group.rows);
        let norm = unit.need(Role::InputNorm)?;
        let (qkv, bias) = (unit.need(Role::QkvProj)?, unit.get(Role::QkvBias));
        s.normed.round_to(qkv.dtype);
        device.rmsnorm(&s.x, first, rows, norm, RMS_EPS, &mut s.normed)?;
        device.linear(&s.normed, rows, qkv, bias, &mut s.qkv, 0, Into::Store)?;
        let half = rows * head_size / 2;
        let pass = PassRows {
            spans: &[],
            cos: &s.cos[..half],
            sin: &s.sin[..half],
        };
        let (proj, bias) = (unit.need(Role::OProj)?, unit.get(Role::OBias));
        s.attended.round_to(proj.dtype);
        let shape = dense_shape(&self.spec);
        device.rope_dense(&mut s.qkv, rows, &shape, &pass, &mut s.dense)?;
        device.attention_dense(&s.qkv, &shape, &ends, &mut s.dense, &mut s.attended)?;
        device.linear(&s.attended, rows, proj, bias, &mut s.x, first, Into::Add)
    }

    /// cos and sin of the group's rows: the first half of the frequencies turns by the patch's row, the second by its column.
    fn angles(&mut self, wave: &Wave<'_>, group: &Group) {
        let quarter = self.inv_freq.len();
        let side = group
            .slices
            .clone()
            .map(|i| wave.slices[i].h.max(wave.slices[i].w))
            .max()
            .unwrap_or(0);
        let table: Vec<(f32, f32)> = (0..side)
            .flat_map(|p| {
                self.inv_freq
                    .iter()
                    .map(move |f| f64::from(p as f32 * f).sin_cos())
            })
            .map(|(s, c)| (s as f32, c as f32))
            .collect();
        let mut at = 0;
        for i in group.slices.clone() {
            let slice = wave.slices[i];
            for patch in 0..slice.patches() {
                let (row, col) = wave.orders[i].patch_at(patch, slice, self.spec.merge);
                for axis in [row, col] {
                    for (s, c) in &table[axis * quarter..][..quarter] {
                        self.scratch.sin[at] = *s;
                        self.scratch.cos[at] = *c;
                        at += 1;
                    }
                }
            }
        }
    }

    /// x += down(silu(gate(n)) · up(n)), n = RMSNorm(x), all with biases, a tile of rows at a time.
    fn mlp(&mut self, device: &Device, unit: &UnitView<'_>, rows: usize) -> Result<()> {
        let s = &mut self.scratch;
        let norm = unit.need(Role::PostNorm)?;
        let down = unit.need(Role::DownProj)?;
        for first in (0..rows).step_by(TILE_ROWS) {
            let n = TILE_ROWS.min(rows - first);
            let input = Normed {
                x: &s.x,
                first,
                rows: n,
                norm,
                eps: RMS_EPS,
                exact: false,
            };
            let mut wide = [
                product(unit, Role::GateProj, Role::GateBias, &mut s.gate)?,
                product(unit, Role::UpProj, Role::UpBias, &mut s.up)?,
            ];
            input.multiply(device, &mut wide, &mut s.normed)?;
            s.wide.round_to(down.dtype);
            device.swiglu(&s.gate, &s.up, n, self.spec.intermediate, &mut s.wide)?;
            let bias = unit.get(Role::DownBias);
            device.linear(&s.wide, n, down, bias, &mut s.x, first, Into::Add)?;
        }
        Ok(())
    }

    /// rows = fc2(gelu(fc1(RMSNorm(x) of each cell's patches side by side))), back in picture order.
    fn merge(
        &mut self,
        device: &Device,
        unit: &UnitView<'_>,
        wave: &Wave<'_>,
        slice: usize,
    ) -> Result<()> {
        let unit_rows = self.spec.merge * self.spec.merge;
        let (hidden, out_hidden) = (self.spec.hidden, self.spec.out_hidden);
        let wide = hidden * unit_rows;
        let norm = unit.need(Role::MergerNorm)?;
        let (fc1, bias1) = (unit.need(Role::MergerFc1)?, unit.get(Role::MergerFc1Bias));
        let (fc2, bias2) = (unit.need(Role::MergerFc2)?, unit.get(Role::MergerFc2Bias));
        let s = &mut self.scratch;
        let order = &wave.orders[slice];
        let tile_cells = (TILE_ROWS / unit_rows).max(1);
        for first in (0..order.cells.len()).step_by(tile_cells) {
            let n = tile_cells.min(order.cells.len() - first);
            let from = wave.starts[slice] + first * unit_rows;
            s.merged.round_to(fc1.dtype);
            let (rows, cells) = (n * unit_rows, &mut s.cells);
            device.rmsnorm_groups(
                &s.x,
                from,
                rows,
                unit_rows,
                norm,
                RMS_EPS,
                cells,
                &mut s.merged,
            )?;
            device.reshape(&mut s.cells, wide);
            device.linear(&s.merged, n, fc1, bias1, &mut s.cells, 0, Into::Store)?;
            s.merged.round_to(fc2.dtype);
            device.gelu(&s.cells, n, wide, &mut s.merged)?;
            device.linear(&s.merged, n, fc2, bias2, &mut s.out, 0, Into::Store)?;
            let made = device.read(&s.out, n * out_hidden, &mut s.mirror)?;
            for (cell, row) in order.cells[first..]
                .iter()
                .zip(made.chunks_exact(out_hidden))
            {
                s.rows[*cell as usize * out_hidden..][..out_hidden].copy_from_slice(row);
            }
        }
        Ok(())
    }
}

/// Patches that attend at once: small pictures share a group, a large one has its own.
fn group_rows(limits: Limits) -> usize {
    limits.slice.max(TILE_ROWS).min(limits.wave)
}

impl Scratch {
    fn shape(spec: &VisionSpec, limits: Limits) -> Sizes {
        let unit = spec.merge * spec.merge;
        let group = group_rows(limits).max(TILE_ROWS.min(limits.wave));
        let tile = TILE_ROWS.next_multiple_of(unit);
        Sizes {
            group,
            tile,
            cells: tile / unit,
            patch: spec.channels * spec.temporal_patch * spec.patch * spec.patch,
            wide: spec.hidden * unit,
            slice_cells: limits.slice / unit,
        }
    }

    fn room(device: DeviceKind, spec: &VisionSpec, limits: Limits) -> Room {
        let z = Scratch::shape(spec, limits);
        // Angles, the patches of a tile as they are gathered, and a slice's embeddings.
        let host = z.group * (spec.hidden / spec.heads)
            + z.tile * z.patch
            + z.slice_cells * spec.out_hidden;
        let parts = [
            device.rows_room(limits.wave, spec.hidden),
            device.rows_room(z.group, 3 * spec.hidden),
            device.rows_room(z.tile, z.patch),
            device.rows_room(z.tile, spec.intermediate),
            device.rows_room(z.tile, spec.intermediate),
            device.rows_room(z.cells, z.wide),
            device.rows_room(z.cells, spec.out_hidden),
            device.acts_room(z.group, spec.hidden),
            device.acts_room(z.group, spec.hidden),
            device.acts_room(z.tile, z.patch.max(spec.intermediate)),
            device.acts_room(z.cells, z.wide),
            device.dense_room(z.group, &dense_shape(spec)),
            device.mirror_room(z.cells * spec.out_hidden),
            Room {
                host: host as u64 * 4,
                device: 0,
            },
        ];
        parts.into_iter().sum()
    }

    fn new(device: &Device, spec: &VisionSpec, limits: Limits) -> Result<Scratch> {
        use crate::units::Dtype::F32;
        let z = Scratch::shape(spec, limits);
        let half = spec.hidden / spec.heads / 2;
        Ok(Scratch {
            x: device.rows(limits.wave, spec.hidden)?,
            qkv: device.rows(z.group, 3 * spec.hidden)?,
            patches: device.rows(z.tile, z.patch)?,
            gate: device.rows(z.tile, spec.intermediate)?,
            up: device.rows(z.tile, spec.intermediate)?,
            cells: device.rows(z.cells, z.wide)?,
            out: device.rows(z.cells, spec.out_hidden)?,
            normed: device.acts(z.group, spec.hidden, F32)?,
            attended: device.acts(z.group, spec.hidden, F32)?,
            wide: device.acts(z.tile, z.patch.max(spec.intermediate), F32)?,
            merged: device.acts(z.cells, z.wide, F32)?,
            dense: device.dense(z.group, &dense_shape(spec))?,
            mirror: device.mirror(z.cells * spec.out_hidden)?,
            cos: vec![0.0; z.group * half],
            sin: vec![0.0; z.group * half],
            rows: vec![0.0; z.slice_cells * spec.out_hidden],
        })
    }
}

fn dense_shape(spec: &VisionSpec) -> DenseShape {
    let head_size = spec.hidden / spec.heads;
    DenseShape {
        heads: spec.heads,
        head_size,
        scale: 1.0 / (head_size as f32).sqrt(),
    }
}

/// Derived sizes of the scratch, in rows and columns.
struct Sizes {
    group: usize,
    tile: usize,
    cells: usize,
    patch: usize,
    wide: usize,
    slice_cells: usize,
}
