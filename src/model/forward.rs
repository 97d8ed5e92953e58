//! embed → N × (norm, attention, norm, MLP) → norm → head, over a ragged pass. There is no second forward.
//!
//! Numerics: the residual stream, norms, RoPE, softmax and logits are float32; the inputs of a matrix product are rounded
//! once to the weights' type; products accumulate in float32. A row's result does not depend on the other rows.

use std::time::{Duration, Instant};

use super::pass::Pass;
use super::rope::Rope;
use super::scratch::{HEAD_TILE_ROWS, MLP_TILE_ROWS, Scratch};
use super::{UnitSource, UnitView};
use crate::device::{AttnShape, Device, Into, Kv, Span};
use crate::error::{Error, Result};
use crate::spec::{ModelSpec, Role, UnitKind};
use crate::units::{Dtype, UnitId};

/// Receives logits block by block: `(first vocabulary id, ids, values)` with values `[wanted rows, ids]`, row-major.
pub type LogitsSink<'a> = dyn FnMut(usize, usize, &[f32]) -> Result<()> + 'a;

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
    max_tokens: usize,
    max_wanted: usize,
    computed: Duration,
    /// Of a pass with given rows: the others, and their tokens.
    looked_up: Vec<usize>,
    ids: Vec<u32>,
}

impl Forward {
    /// `units`: id, kind and rows of the first tensor of each unit, in the order of the pass. `head_dtype`: the type of the
    /// head's weights. Layers may mix types: each product's inputs are rounded to its own weight's.
    pub fn new(
        device: &Device,
        spec: &ModelSpec,
        units: &[(UnitId, UnitKind, usize)],
        head_dtype: Dtype,
        max_tokens: usize,
        max_wanted: usize,
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
        Ok(Forward {
            rope: Rope::new(&spec.rope, spec.head_size),
            embed: one(UnitKind::Embed)?,
            norm: one(UnitKind::Norm)?,
            layers,
            heads,
            head_dtype,
            scratch: Scratch::new(device, spec, max_tokens, max_wanted),
            spec: spec.clone(),
            max_tokens,
            max_wanted,
            computed: Duration::ZERO,
            looked_up: Vec::with_capacity(max_tokens),
            ids: Vec::with_capacity(max_tokens),
        })
    }

    /// Host memory [`Forward::new`] takes.
    pub fn scratch_bytes(spec: &ModelSpec, tokens: usize, wanted: usize) -> u64 {
        Scratch::bytes(spec, tokens, wanted)
    }

    /// Units a pass acquires: layers, final norm, head blocks.
    pub fn units(&self) -> usize {
        self.layers.len() + 1 + self.heads.len()
    }

    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    pub fn max_wanted(&self) -> usize {
        self.max_wanted
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
        pass.check(self.spec.vocab, kv.blocks())?;
        if pass.rows() > self.max_tokens || pass.wanted() > self.max_wanted {
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
        self.head(device, source, pass, sink)
    }

    fn embed(&mut self, device: &Device, source: &mut dyn UnitSource, pass: &Pass) -> Result<()> {
        let x = &mut self.scratch.x;
        for g in &pass.given {
            let cols = g.from.cols;
            if cols != self.spec.hidden {
                return Err(Error::internal("given embeddings of another width"));
            }
            let values = &g.from.values[g.first * cols..(g.first + g.rows) * cols];
            device.write_rows(x, g.row, values);
        }
        if pass.given.is_empty() {
            return source.gather_rows(self.embed, &pass.tokens, &mut |i, row| {
                device.put_row(row, x, i);
                Ok(())
            });
        }
        self.looked_up.clear();
        self.looked_up.extend(pass.looked_up());
        self.ids.clear();
        self.ids
            .extend(self.looked_up.iter().map(|row| pass.tokens[*row]));
        let rows = &self.looked_up;
        source.gather_rows(self.embed, &self.ids, &mut |i, row| {
            device.put_row(row, x, rows[i]);
            Ok(())
        })
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
        let norm = unit.need(Role::InputNorm)?;
        let mut rounded_to = None;
        for (role, bias, out) in [
            (Role::QProj, Role::QBias, &mut s.q),
            (Role::KProj, Role::KBias, &mut s.k),
            (Role::VProj, Role::VBias, &mut s.v),
        ] {
            let w = unit.need(role)?;
            if rounded_to != Some(w.dtype) {
                rounded_to = Some(w.dtype);
                s.normed.round_to(w.dtype);
                device.rmsnorm(&s.x, 0, rows, norm, p.rms_eps, &mut s.normed);
            }
            device.linear(&s.normed, rows, w, unit.get(bias), out, 0, Into::Store);
        }
        let half = rows * p.head_size / 2;
        let (cos, sin) = (&s.cos[..half], &s.sin[..half]);
        for (norm, heads, x) in [
            (Role::QNorm, p.heads, &mut s.q),
            (Role::KNorm, p.kv_heads, &mut s.k),
        ] {
            if p.qk_norm {
                device.rmsnorm_heads(x, rows, heads, p.head_size, unit.need(norm)?, p.rms_eps);
            }
            device.rope(x, rows, heads, p.head_size, cos, sin);
        }
        device.kv_append(kv, layer, spans, &s.k, &s.v);
        let shape = AttnShape {
            heads: p.heads,
            kv_heads: p.kv_heads,
            head_size: p.head_size,
            scale: 1.0 / (p.head_size as f32).sqrt(),
            window: p.window[layer],
        };
        let (w, b) = (unit.need(Role::OProj)?, unit.get(Role::OBias));
        s.attended.round_to(w.dtype);
        device.attention(&s.q, spans, kv, layer, &shape, &mut s.attended);
        device.linear(&s.attended, rows, w, b, &mut s.x, 0, Into::Add);
        Ok(())
    }

    /// x += down(silu(gate(n)) · up(n)), n = RMSNorm(x), a tile of rows at a time.
    fn mlp(&mut self, device: &Device, unit: &UnitView<'_>, rows: usize) -> Result<()> {
        let eps = self.spec.rms_eps;
        let s = &mut self.scratch;
        let norm = unit.need(Role::PostNorm)?;
        let down = unit.need(Role::DownProj)?;
        s.mlp.round_to(down.dtype);
        for first in (0..rows).step_by(MLP_TILE_ROWS) {
            let n = MLP_TILE_ROWS.min(rows - first);
            let mut rounded_to = None;
            for (role, bias, out) in [
                (Role::GateProj, Role::GateBias, &mut s.gate),
                (Role::UpProj, Role::UpBias, &mut s.up),
            ] {
                let w = unit.need(role)?;
                if rounded_to != Some(w.dtype) {
                    rounded_to = Some(w.dtype);
                    s.normed.round_to(w.dtype);
                    device.rmsnorm(&s.x, first, n, norm, eps, &mut s.normed);
                }
                device.linear(&s.normed, n, w, unit.get(bias), out, 0, Into::Store);
            }
            device.swiglu(&s.gate, &s.up, n, &mut s.mlp);
            let bias = unit.get(Role::DownBias);
            device.linear(&s.mlp, n, down, bias, &mut s.x, first, Into::Add);
        }
        Ok(())
    }

    /// logits = head(RMSNorm(x[wanted])), block by block.
    fn head(
        &mut self,
        device: &Device,
        source: &mut dyn UnitSource,
        pass: &Pass,
        sink: &mut LogitsSink<'_>,
    ) -> Result<()> {
        let wanted = pass.wanted();
        let eps = self.spec.rms_eps;
        let s = &mut self.scratch;
        for (i, row) in pass.wanted_rows().enumerate() {
            device.copy_row(&s.x, row, &mut s.picked, i);
        }
        s.last.round_to(self.head_dtype);
        source.with_unit(self.norm, &mut |unit| {
            let w = unit.need(Role::FinalNorm)?;
            device.rmsnorm(&s.picked, 0, wanted, w, eps, &mut s.last);
            Ok(())
        })?;
        let mut computed = Duration::ZERO;
        for &(unit, first, rows) in &self.heads {
            source.with_unit(unit, &mut |unit| {
                let started = Instant::now();
                // A pass whose logits nobody wants still walks the head: the stream's order never depends on the batch.
                if wanted > 0 {
                    let w = unit.need(Role::Head)?;
                    for tile in (0..rows).step_by(HEAD_TILE_ROWS) {
                        let n = HEAD_TILE_ROWS.min(rows - tile);
                        let part = w.slice_rows(tile, n);
                        device.reshape(&mut s.logits, n);
                        device.linear(&s.last, wanted, &part, None, &mut s.logits, 0, Into::Store);
                        sink(first + tile, n, device.read(&s.logits, wanted * n))?;
                    }
                }
                computed += started.elapsed();
                Ok(())
            })?;
        }
        self.computed += computed;
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
