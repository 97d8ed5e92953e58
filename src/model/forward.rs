//! embed → N × (norm, attention, norm, MLP) → norm → head, over a ragged pass. There is no second forward.
//!
//! Numerics: the residual stream, norms, RoPE, softmax and logits are float32; products accumulate in float32. The inputs of
//! products are rounded once to the weights' type where the device gains by it, except on a CPU those of queries, keys and values:
//! they are 7 % of the arithmetic of a layer, and the softmax over what comes of them makes as much of the rounding as all the rest
//! together. A row's result does not depend on the other rows.

use std::time::{Duration, Instant};

use super::normed::{Normed, product};
use super::pass::Pass;
use super::rope::Rope;
use super::scratch::{HEAD_TILE_ROWS, Scratch, mlp_tile_rows};
use super::{UnitSource, UnitView};
use crate::device::{AttnShape, Device, DeviceKind, Into, Kv, PassRows, Room, Span};
use crate::error::{Error, Result};
use crate::spec::{ModelSpec, Role, UnitKind};
use crate::units::{Dtype, UnitId};

/// Receives logits block by block: `(first vocabulary id, ids, values)` with values `[wanted rows, ids]`, row-major.
pub type LogitsSink<'a> = dyn FnMut(usize, usize, &[f32]) -> Result<()> + 'a;
/// Receives the best logits of each wanted row: `(row, candidates)`, the best first, of equals the lowest id.
pub type BestSink<'a> = dyn FnMut(usize, &[(u32, f32)]) -> Result<()> + 'a;

/// What is wanted of the logits.
enum Want<'w, 's> {
    All(&'w mut LogitsSink<'s>),
    /// The `k` best ids below `limit`, kept on the device until the pass is over.
    Best {
        k: usize,
        limit: usize,
    },
}

/// What passes may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassLimits {
    pub tokens: usize,
    /// Rows whose logits are wanted.
    pub wanted: usize,
    pub segments: usize,
    /// Entries of all segments' block tables together.
    pub table: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Whether [`Forward::run_best`] is to be used, where the device has it.
    pub select: bool,
}

/// The decoder, ready to run passes of up to a fixed number of rows.
pub struct Forward {
    spec: ModelSpec,
    rope: Rope,
    embed: UnitId,
    layers: Vec<UnitId>,
    norm: UnitId,
    /// Head units with their first vocabulary id and their rows.
    heads: Vec<(UnitId, usize, usize)>,
    head_dtype: Dtype,
    scratch: Scratch,
    limits: PassLimits,
    computed: Duration,
    /// Of a pass with given rows: the others, and their tokens.
    looked_up: Vec<usize>,
    ids: Vec<u32>,
    /// First id of each piece of the head that candidates were selected from.
    selected: Vec<usize>,
    candidates: Vec<(u32, f32)>,
}

impl Forward {
    /// `units`: id, kind and rows of the first tensor of each unit, in the order of the pass. `head_dtype`: the type of the
    /// head's weights. Layers may mix types: each product's inputs are rounded to its own weight's.
    pub fn new(
        device: &Device,
        spec: &ModelSpec,
        units: &[(UnitId, UnitKind, usize)],
        head_dtype: Dtype,
        limits: &PassLimits,
    ) -> Result<Forward> {
        let one = |kind: UnitKind| {
            units
                .iter()
                .find(|u| u.1 == kind)
                .map(|u| u.0)
                .ok_or_else(|| Error::internal(format!("the model has no {kind:?} unit")))
        };
        let layers = (0..spec.layers)
            .map(|i| one(UnitKind::Layer(i as u32)))
            .collect::<Result<Vec<_>>>()?;
        let mut heads = Vec::new();
        let mut first = 0;
        for &(id, kind, rows) in units {
            if let UnitKind::Head(_) = kind {
                heads.push((id, first, rows));
                first += rows;
            }
        }
        let tiles = heads.iter().map(|h| h.2.div_ceil(HEAD_TILE_ROWS)).sum();
        Ok(Forward {
            rope: Rope::new(&spec.rope, spec.head_size),
            embed: one(UnitKind::Embed)?,
            norm: one(UnitKind::Norm)?,
            layers,
            heads,
            head_dtype,
            scratch: Scratch::new(device, spec, limits, tiles)?,
            spec: spec.clone(),
            limits: *limits,
            computed: Duration::ZERO,
            looked_up: Vec::with_capacity(limits.tokens),
            ids: Vec::with_capacity(limits.tokens),
            selected: Vec::with_capacity(tiles),
            candidates: Vec::new(),
        })
    }

    /// Memory [`Forward::new`] takes.
    pub fn room(device: DeviceKind, spec: &ModelSpec, limits: &PassLimits) -> Room {
        Scratch::room(device, spec, limits)
    }

    /// Units a pass acquires: layers, and where logits are wanted the final norm and the blocks of the head.
    pub fn units(&self, logits: bool) -> usize {
        match logits {
            true => self.layers.len() + 1 + self.heads.len(),
            false => self.layers.len(),
        }
    }

    pub fn max_tokens(&self) -> usize {
        self.limits.tokens
    }

    pub fn max_wanted(&self) -> usize {
        self.limits.wanted
    }

    /// Whether [`Forward::run_best`] saves anything on this device.
    pub fn selects(&self) -> bool {
        self.scratch.best.is_some()
    }

    /// Time spent computing so far, waits for units left out.
    pub fn computed(&self) -> Duration {
        self.computed
    }

    /// Runs one pass: reads and extends `kv`, hands the wanted rows' logits to `sink`.
    pub fn run(
        &mut self,
        device: &Device,
        kv: &mut Kv,
        source: &mut dyn UnitSource,
        pass: &Pass,
        sink: &mut LogitsSink<'_>,
    ) -> Result<()> {
        self.walk(device, kv, source, pass, &mut Want::All(sink))
    }

    /// As [`Forward::run`], but hands over only the `k` best ids below `limit` of each wanted row, selected where the logits are. Only where
    /// [`Forward::selects`].
    #[allow(clippy::too_many_arguments)] // a pass, and what is wanted of it
    pub fn run_best(
        &mut self,
        device: &Device,
        kv: &mut Kv,
        source: &mut dyn UnitSource,
        pass: &Pass,
        k: usize,
        limit: usize,
        sink: &mut BestSink<'_>,
    ) -> Result<()> {
        self.selected.clear();
        self.walk(device, kv, source, pass, &mut Want::Best { k, limit })?;
        self.hand_over(device, pass.wanted(), k, sink)
    }

    fn walk(
        &mut self,
        device: &Device,
        kv: &mut Kv,
        source: &mut dyn UnitSource,
        pass: &Pass,
        want: &mut Want<'_, '_>,
    ) -> Result<()> {
        pass.check(self.spec.vocab, kv.blocks())?;
        if pass.rows() > self.limits.tokens || pass.wanted() > self.limits.wanted {
            return Err(Error::internal("a pass larger than its scratch"));
        }
        if pass.rows() == 0 {
            return Ok(());
        }
        self.embed(device, source, pass)?;
        let half = pass.rows() * self.spec.head_size / 2;
        let s = &mut self.scratch;
        self.rope
            .cos_sin(&pass.positions, &mut s.cos[..half], &mut s.sin[..half]);
        let spans = spans(pass);
        let rows = PassRows {
            spans: &spans,
            cos: &s.cos[..half],
            sin: &s.sin[..half],
        };
        device.begin(&mut s.lists, &rows)?;
        let mut windows = self.spec.window.iter().copied();
        let widest = windows.try_fold(0, |most, window| Some(most.max(window?)));
        device.kv_begin(kv, &rows, widest)?;
        for layer in 0..self.layers.len() {
            let mut inside = Duration::ZERO;
            source.with_unit(self.layers[layer], &mut |unit| {
                let started = Instant::now();
                self.attention(device, kv, unit, layer, pass.rows(), &spans)?;
                self.mlp(device, unit, pass.rows())?;
                inside = started.elapsed();
                Ok(())
            })?;
            self.computed += inside;
        }
        self.head(device, source, pass, want)
    }

    fn embed(&mut self, device: &Device, source: &mut dyn UnitSource, pass: &Pass) -> Result<()> {
        let (x, narrow) = (&mut self.scratch.x, &mut self.scratch.normed);
        if pass.given.is_empty() {
            source.gather_rows(self.embed, &pass.tokens, &mut |i, row| {
                device.put_row(row, narrow, x, i)
            })?;
            return device.widen_rows(narrow, x, pass.rows());
        }
        self.looked_up.clear();
        self.looked_up.extend(pass.looked_up());
        self.ids.clear();
        self.ids
            .extend(self.looked_up.iter().map(|row| pass.tokens[*row]));
        let rows = &self.looked_up;
        source.gather_rows(self.embed, &self.ids, &mut |i, row| {
            device.put_row(row, narrow, x, rows[i])
        })?;
        device.widen_rows(narrow, x, pass.rows())?;
        // Behind the others: widening runs over these rows too.
        for g in &pass.given {
            let cols = g.from.cols;
            if cols != self.spec.hidden {
                return Err(Error::internal("given embeddings of another width"));
            }
            let values = &g.from.values[g.first * cols..(g.first + g.rows) * cols];
            device.write_rows(x, g.row, values)?;
        }
        Ok(())
    }

    /// x += o(attention(rope(norm(q)), rope(norm(k)), v)), with q, k, v from RMSNorm(x).
    fn attention(
        &mut self,
        device: &Device,
        kv: &mut Kv,
        unit: &UnitView<'_>,
        layer: usize,
        rows: usize,
        spans: &[Span<'_>],
    ) -> Result<()> {
        let p = &self.spec;
        let s = &mut self.scratch;
        let half = rows * p.head_size / 2;
        let pass = PassRows {
            spans,
            cos: &s.cos[..half],
            sin: &s.sin[..half],
        };
        let input = Normed {
            x: &s.x,
            first: 0,
            rows,
            norm: unit.need(Role::InputNorm)?,
            eps: p.rms_eps,
            exact: true,
        };
        let mut qkv = [
            product(unit, Role::QProj, Role::QBias, &mut s.q)?,
            product(unit, Role::KProj, Role::KBias, &mut s.k)?,
            product(unit, Role::VProj, Role::VBias, &mut s.v)?,
        ];
        input.multiply(device, &mut qkv, &mut s.normed)?;
        for (norm, heads, x) in [
            (Role::QNorm, p.heads, &mut s.q),
            (Role::KNorm, p.kv_heads, &mut s.k),
        ] {
            if p.qk_norm {
                device.rmsnorm_heads(x, rows, heads, p.head_size, unit.need(norm)?, p.rms_eps)?;
            }
        }
        device.rope_append(&mut s.lists, &pass, &mut s.q, &mut s.k, &s.v, kv, layer)?;
        let shape = AttnShape {
            heads: p.heads,
            kv_heads: p.kv_heads,
            head_size: p.head_size,
            scale: 1.0 / (p.head_size as f32).sqrt(),
            window: p.window[layer],
        };
        let (w, b) = (unit.need(Role::OProj)?, unit.get(Role::OBias));
        s.attended.round_to(w.dtype);
        device.attention(&s.lists, &pass, &s.q, kv, layer, &shape, &mut s.attended)?;
        device.linear(&s.attended, rows, w, b, &mut s.x, 0, Into::Add)
    }

    /// x += down(silu(gate(n)) · up(n)), n = RMSNorm(x), a tile of rows at a time.
    fn mlp(&mut self, device: &Device, unit: &UnitView<'_>, rows: usize) -> Result<()> {
        let eps = self.spec.rms_eps;
        let s = &mut self.scratch;
        let norm = unit.need(Role::PostNorm)?;
        let down = unit.need(Role::DownProj)?;
        s.mlp.round_to(down.dtype);
        // As even as can be: each tile goes over all weights.
        let tiles = rows.div_ceil(mlp_tile_rows(device.kind()));
        let tile = rows.div_ceil(tiles);
        for first in (0..rows).step_by(tile) {
            let n = tile.min(rows - first);
            let input = Normed {
                x: &s.x,
                first,
                rows: n,
                norm,
                eps,
                exact: false,
            };
            let mut wide = [
                product(unit, Role::GateProj, Role::GateBias, &mut s.gate)?,
                product(unit, Role::UpProj, Role::UpBias, &mut s.up)?,
            ];
            input.multiply(device, &mut wide, &mut s.normed)?;
            device.swiglu(&s.gate, &s.up, n, self.spec.intermediate, &mut s.mlp)?;
            let bias = unit.get(Role::DownBias);
            device.linear(&s.mlp, n, down, bias, &mut s.x, first, Into::Add)?;
        }
        Ok(())
    }

    /// logits = head(RMSNorm(x[wanted])), block by block. A pass whose logits nobody wants asks for no unit of the head: its
    /// schedule has none.
    fn head(
        &mut self,
        device: &Device,
        source: &mut dyn UnitSource,
        pass: &Pass,
        want: &mut Want<'_, '_>,
    ) -> Result<()> {
        let wanted = pass.wanted();
        if wanted == 0 {
            return Ok(());
        }
        let eps = self.spec.rms_eps;
        self.pick(device, pass)?;
        let s = &mut self.scratch;
        s.last.round_to(self.head_dtype);
        source.with_unit(self.norm, &mut |unit| {
            let w = unit.need(Role::FinalNorm)?;
            device.rmsnorm(&s.picked, 0, wanted, w, eps, &mut s.last)
        })?;
        let mut computed = Duration::ZERO;
        for head in 0..self.heads.len() {
            let (unit, first, rows) = self.heads[head];
            source.with_unit(unit, &mut |unit| {
                let started = Instant::now();
                self.head_unit(device, unit, first, rows, wanted, want)?;
                computed += started.elapsed();
                Ok(())
            })?;
        }
        self.computed += computed;
        Ok(())
    }

    /// picked = x[wanted rows], neighbours at once.
    fn pick(&mut self, device: &Device, pass: &Pass) -> Result<()> {
        let s = &mut self.scratch;
        let mut rows = pass.wanted_rows().peekable();
        let mut at = 0;
        while let Some(first) = rows.next() {
            let mut n = 1;
            while rows.next_if_eq(&(first + n)).is_some() {
                n += 1;
            }
            device.copy_rows(&s.x, first, &mut s.picked, at, n)?;
            at += n;
        }
        Ok(())
    }

    /// The logits of one unit of the head, whose first row is vocabulary id `first`.
    fn head_unit(
        &mut self,
        device: &Device,
        unit: &UnitView<'_>,
        first: usize,
        rows: usize,
        wanted: usize,
        want: &mut Want<'_, '_>,
    ) -> Result<()> {
        let s = &mut self.scratch;
        let w = unit.need(Role::Head)?;
        for tile in (0..rows).step_by(HEAD_TILE_ROWS) {
            let n = HEAD_TILE_ROWS.min(rows - tile);
            let part = w.slice_rows(tile, n);
            let first = first + tile;
            device.reshape(&mut s.logits, n);
            device.linear(&s.last, wanted, &part, None, &mut s.logits, 0, Into::Store)?;
            match want {
                Want::All(sink) => {
                    sink(first, n, device.read(&s.logits, wanted * n, &mut s.mirror)?)?
                }
                Want::Best { k, limit } if first < *limit => {
                    let missing = || Error::internal("this device selects no logits");
                    let best = s.best.as_mut().ok_or_else(missing)?;
                    let cols = n.min(*limit - first);
                    device.select(&s.logits, wanted, cols, *k, self.selected.len(), best)?;
                    self.selected.push(first);
                }
                Want::Best { .. } => {}
            }
        }
        Ok(())
    }

    /// Merges what was selected from the pieces of the head.
    fn hand_over(
        &mut self,
        device: &Device,
        wanted: usize,
        k: usize,
        sink: &mut BestSink<'_>,
    ) -> Result<()> {
        let missing = || Error::internal("this device selects no logits");
        let best = self.scratch.best.as_mut().ok_or_else(missing)?;
        let (ids, values) = device.selected(best, self.selected.len() * wanted * k)?;
        for row in 0..wanted {
            self.candidates.clear();
            for (tile, first) in self.selected.iter().enumerate() {
                let at = (tile * wanted + row) * k;
                let found = ids[at..at + k].iter().zip(&values[at..at + k]);
                let known = found.filter(|(id, _)| **id != u32::MAX);
                self.candidates
                    .extend(known.map(|(id, value)| (id + *first as u32, *value)));
            }
            // NaN comes last, as on the device: any number is better.
            let rank = |v: f32| {
                if v.is_nan() {
                    f32::NEG_INFINITY
                } else {
                    v + 0.0
                }
            };
            self.candidates.sort_unstable_by(|a, b| {
                let nan = a.1.is_nan().cmp(&b.1.is_nan());
                nan.then(rank(b.1).total_cmp(&rank(a.1)))
                    .then(a.0.cmp(&b.0))
            });
            self.candidates.truncate(k);
            sink(row, &self.candidates)?;
        }
        Ok(())
    }
}

fn spans(pass: &Pass) -> Vec<Span<'_>> {
    let mut first = 0;
    pass.segments
        .iter()
        .map(|s| {
            let span = Span {
                first_row: first,
                rows: s.len as usize,
                start_pos: s.start as usize,
                table: &s.table,
            };
            first += s.len as usize;
            span
        })
        .collect()
}
