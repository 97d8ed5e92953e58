//! The KV cache: on the GPU, or in pinned host memory with two layers of it on the GPU at a time.
//!
//! In host memory the cache lies as it would on the GPU, `[layer][block][k|v][kv head][16 tokens][head size]`. Two slots on the GPU each hold
//! one layer's part of it, addressed by the same block numbers, so kernels see no difference:
//!
//! ```text
//! load stream     blocks the pass sees, layer L+1 ─► its slot      while layer L computes
//! compute stream  waits for the load of L; appends, attends in slot L mod 2
//! store stream    waits for the attention of L; blocks the pass writes ─► host
//! ```
//!
//! A load waits for the latest store, which is that of the slot's last layer: what it overwrites is in host memory then, and what it reads
//! too. Moved are a pass's own blocks only: 2 · head size · kv heads · 2 bytes a token and layer up, a block a sequence and layer down.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use super::CudaDevice;
use super::context::Context;
use super::lists::CHUNK;
use super::memory::{Address, DeviceBuffer, HostBuffer};
use super::slots::Clock;
use super::stream::{Event, Fence, Stream};
use crate::device::{KV_BLOCK_TOKENS, KvMove, KvShape, Room, Span};
use crate::error::{Error, Result};

/// Blocks that nobody asked for are copied along up to so many bytes between two that are: one copy costs about as much to begin.
const GAP_BYTES: usize = 128 << 10;
/// Layers on the GPU at a time.
const SLOTS: usize = 2;

pub struct CudaKv {
    shape: KvShape,
    place: Place,
}

enum Place {
    Device(DeviceBuffer),
    Host(Box<RefCell<HostKv>>),
}

/// A cache in host memory. What the streams do with its memory is ordered by fences alone; its buffers wait for the GPU before they go.
struct HostKv {
    memory: HostBuffer,
    slots: [DeviceBuffer; SLOTS],
    load: Stream,
    store: Stream,
    /// The layer on its way, or there, that the compute stream has not waited for.
    loaded: Option<Fence>,
    /// The latest store, where no load has waited for it.
    stored: Option<Fence>,
    spare: Vec<Event>,
    /// Of the pass: blocks with keys from passes before it, and blocks that it writes.
    sees: Vec<Range<usize>>,
    writes: Vec<Range<usize>>,
    blocks: Vec<usize>,
    /// By layer.
    ticks: Vec<LayerTicks>,
    layers: usize,
    block_bytes: usize,
    layer_bytes: usize,
}

/// When a layer's load began and ended, and when the compute stream wanted it and had it.
struct LayerTicks {
    load: Event,
    loaded: Event,
    wanted: Event,
    had: Event,
}

impl LayerTicks {
    fn new(context: &Arc<Context>) -> Result<LayerTicks> {
        Ok(LayerTicks {
            load: Event::timing(context)?,
            loaded: Event::timing(context)?,
            wanted: Event::timing(context)?,
            had: Event::timing(context)?,
        })
    }
}

impl CudaKv {
    /// What [`CudaDevice::kv`] takes.
    pub fn device_room(shape: &KvShape) -> Room {
        Room {
            host: 0,
            device: DeviceBuffer::rounded(shape.bytes() as u64),
        }
    }

    /// What [`CudaDevice::kv_in_host`] takes.
    pub fn host_room(shape: &KvShape) -> Room {
        let layer = (shape.bytes() / shape.layers.max(1)) as u64;
        Room {
            host: shape.bytes() as u64,
            device: SLOTS as u64 * DeviceBuffer::rounded(layer),
        }
    }

    pub fn blocks(&self) -> usize {
        self.shape.blocks
    }

    pub fn in_host(&self) -> bool {
        matches!(self.place, Place::Host(_))
    }

    /// What the last pass moved, layer by layer. Only after a whole pass that the GPU is done with.
    pub fn moves(&self, clock: Option<&Clock>, each: &mut dyn FnMut(KvMove)) -> Result<()> {
        match &self.place {
            Place::Device(_) => Ok(()),
            Place::Host(kv) => kv.borrow().moves(clock, each),
        }
    }

    /// One layer's part, from the layer's first op of a pass on: what is given to `compute` from now on finds the pass's blocks there.
    pub(super) fn enter(&self, compute: &Stream, layer: usize) -> Result<Address> {
        match &self.place {
            Place::Device(_) => Ok(self.layer(layer)),
            Place::Host(kv) => kv.borrow_mut().enter(compute, layer),
        }
    }

    /// One layer's part, between [`CudaKv::enter`] and [`CudaKv::leave`].
    pub(super) fn layer(&self, layer: usize) -> Address {
        let bytes = self.shape.bytes() / self.shape.layers;
        match &self.place {
            Place::Device(buffer) => buffer.at(layer * bytes, bytes),
            Place::Host(kv) => kv.borrow().slots[layer % SLOTS].at(0, bytes),
        }
    }

    /// The layer's last op of the pass has been given to `compute`.
    pub(super) fn leave(&self, compute: &Stream, layer: usize) -> Result<()> {
        match &self.place {
            Place::Device(_) => Ok(()),
            Place::Host(kv) => kv.borrow_mut().leave(compute, layer),
        }
    }
}

impl HostKv {
    fn new(context: &Arc<Context>, shape: &KvShape) -> Result<HostKv> {
        let layer_bytes = shape.bytes() / shape.layers.max(1);
        let slot = || DeviceBuffer::new(context, layer_bytes as u64, "a layer of the KV cache");
        Ok(HostKv {
            memory: HostBuffer::new(context, shape.bytes(), "the KV cache")?,
            slots: [slot()?, slot()?],
            load: Stream::new(context, 0)?,
            store: Stream::new(context, 0)?,
            loaded: None,
            stored: None,
            spare: Vec::with_capacity(8),
            sees: Vec::with_capacity(shape.blocks),
            writes: Vec::with_capacity(shape.blocks),
            blocks: Vec::with_capacity(shape.blocks),
            ticks: (0..shape.layers)
                .map(|_| LayerTicks::new(context))
                .collect::<Result<_>>()?,
            layers: shape.layers,
            block_bytes: layer_bytes / shape.blocks.max(1),
            layer_bytes,
        })
    }

    fn event(&mut self) -> Result<Event> {
        match self.spare.pop() {
            Some(event) => Ok(event),
            None => Event::new(self.load.context()),
        }
    }

    /// A pass over these rows begins: its first layer is on its way. `window`: keys that a row sees at most, in any layer.
    fn begin(&mut self, compute: &Stream, spans: &[Span<'_>], window: Option<usize>) -> Result<()> {
        // A pass that failed may have left a layer that nobody waited for, and a slot that is computed with.
        let left = self.loaded.take().map(Fence::into_event);
        self.spare.extend(left);
        let event = self.event()?;
        let event = self.load.wait(compute.record(event)?)?;
        self.spare.push(event);
        // Kernels walk whole chunks of keys.
        let first = |s: &Span<'_>| {
            let key = window.map_or(0, |w| (s.start_pos + 1).saturating_sub(w));
            key / CHUNK * CHUNK
        };
        self.blocks.clear();
        self.blocks
            .extend(spans.iter().flat_map(|s| blocks(s, first(s)..s.start_pos)));
        runs(
            &mut self.blocks,
            GAP_BYTES / self.block_bytes.max(1),
            &mut self.sees,
        );
        self.blocks.clear();
        self.blocks.extend(
            spans
                .iter()
                .flat_map(|s| blocks(s, s.start_pos..s.start_pos + s.rows)),
        );
        runs(&mut self.blocks, 0, &mut self.writes);
        self.load(0)
    }

    fn load(&mut self, layer: usize) -> Result<()> {
        if let Some(stored) = self.stored.take() {
            let event = self.load.wait(stored)?;
            self.spare.push(event);
        }
        self.load.mark(&self.ticks[layer].load)?;
        for run in &self.sees {
            let (at, len) = (run.start * self.block_bytes, run.len() * self.block_bytes);
            let from = self.memory.piece(layer * self.layer_bytes + at, len);
            // SAFETY: host memory is written by stores, which this stream has waited for, and by `copy`, which waits for this stream; the
            // slot's last layer was stored, so nothing computes with it, and whoever will waits for the fence below.
            unsafe {
                self.load
                    .copy_in(self.slots[layer % SLOTS].at(at, len), from)
            }?;
        }
        self.load.mark(&self.ticks[layer].loaded)?;
        let event = self.event()?;
        self.loaded = Some(self.load.record(event)?);
        Ok(())
    }

    fn enter(&mut self, compute: &Stream, layer: usize) -> Result<Address> {
        let loaded = self.loaded.take();
        let loaded = loaded.ok_or_else(|| Error::internal("KV of a pass that has not begun"))?;
        compute.mark(&self.ticks[layer].wanted)?;
        let event = compute.wait(loaded)?;
        compute.mark(&self.ticks[layer].had)?;
        self.spare.push(event);
        if layer + 1 < self.layers {
            self.load(layer + 1)?;
        }
        Ok(self.slots[layer % SLOTS].at(0, self.layer_bytes))
    }

    fn leave(&mut self, compute: &Stream, layer: usize) -> Result<()> {
        let event = self.event()?;
        let event = self.store.wait(compute.record(event)?)?;
        self.spare.push(event);
        for run in &self.writes {
            let (at, len) = (run.start * self.block_bytes, run.len() * self.block_bytes);
            let from = self.slots[layer % SLOTS].at(at, len);
            let to = layer * self.layer_bytes + at;
            // SAFETY: the layer's last kernel is waited for; the host looks at this memory only in `copy`, which waits for this stream, and
            // loads of it wait for the fence below.
            unsafe { self.store.copy_out(&mut self.memory, to, from, len) }?;
        }
        let event = self.event()?;
        let fence = self.store.record(event)?;
        let before = self.stored.replace(fence).map(Fence::into_event);
        self.spare.extend(before);
        Ok(())
    }

    fn moves(&self, clock: Option<&Clock>, each: &mut dyn FnMut(KvMove)) -> Result<()> {
        let bytes = |runs: &[Range<usize>]| {
            let blocks: usize = runs.iter().map(Range::len).sum();
            (blocks * self.block_bytes) as u64
        };
        let (to_gpu_bytes, to_host_bytes) = (bytes(&self.sees), bytes(&self.writes));
        for (layer, t) in self.ticks.iter().enumerate() {
            each(KvMove {
                layer,
                to_gpu_bytes,
                to_host_bytes,
                began: clock.map(|c| c.at(&t.load)).transpose()?,
                load: t.loaded.since(&t.load)?,
                waited: t.had.since(&t.wanted)?,
            });
        }
        Ok(())
    }

    /// One block of every layer, by the host: rare, and between passes.
    fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        self.load.synchronize()?;
        self.store.synchronize()?;
        for layer in 0..self.layers {
            let at = |block: usize| layer * self.layer_bytes + block * self.block_bytes;
            let whole = self.memory.piece_mut(0, self.layers * self.layer_bytes);
            whole.copy_within(at(from)..at(from) + self.block_bytes, at(to));
        }
        Ok(())
    }
}

/// The blocks that hold these positions.
fn blocks<'s>(
    span: &'s Span<'_>,
    positions: Range<usize>,
) -> impl Iterator<Item = usize> + use<'s> {
    let first = (positions.start / KV_BLOCK_TOKENS).min(span.table.len());
    let end = match positions.is_empty() {
        true => first,
        false => positions.end.div_ceil(KV_BLOCK_TOKENS),
    };
    span.table[first..end].iter().map(|b| *b as usize)
}

/// Sorted runs of `blocks`, each once, joined across up to `gap` blocks that are not among them.
fn runs(blocks: &mut [usize], gap: usize, out: &mut Vec<Range<usize>>) {
    blocks.sort_unstable();
    out.clear();
    for &block in blocks.iter() {
        match out.last_mut() {
            Some(run) if block < run.end => {}
            Some(run) if block - run.end <= gap => run.end = block + 1,
            _ => out.push(block..block + 1),
        }
    }
}

impl CudaDevice {
    pub fn kv(&self, shape: &KvShape) -> Result<CudaKv> {
        self.check_kv(shape)?;
        let bytes = shape.bytes() as u64;
        Ok(CudaKv {
            place: Place::Device(DeviceBuffer::new(&self.context, bytes, "the KV cache")?),
            shape: *shape,
        })
    }

    /// A cache in pinned host memory, of which two layers lie on the GPU at a time.
    pub fn kv_in_host(&self, shape: &KvShape) -> Result<CudaKv> {
        self.check_kv(shape)?;
        let kv = HostKv::new(&self.context, shape)?;
        Ok(CudaKv {
            place: Place::Host(Box::new(RefCell::new(kv))),
            shape: *shape,
        })
    }

    fn check_kv(&self, shape: &KvShape) -> Result<()> {
        match shape.dtype == self.half {
            true => Ok(()),
            false => Err(Error::internal("KV of another type than the weights'")),
        }
    }

    /// A pass over these rows begins. `window`: keys that a row sees at most, in any layer.
    pub fn kv_begin(
        &self,
        kv: &mut CudaKv,
        spans: &[Span<'_>],
        window: Option<usize>,
    ) -> Result<()> {
        match &kv.place {
            Place::Device(_) => Ok(()),
            Place::Host(kv) => {
                self.context.bind()?;
                kv.borrow_mut().begin(&self.compute, spans, window)
            }
        }
    }

    pub fn kv_copy(&self, kv: &mut CudaKv, from: u32, to: u32) -> Result<()> {
        let s = kv.shape;
        let bytes = s.bytes() / s.layers / s.blocks;
        let buffer = match &kv.place {
            Place::Device(buffer) => buffer,
            Place::Host(kv) => return kv.borrow_mut().copy(from as usize, to as usize),
        };
        for layer in 0..s.layers {
            let at = |block: u32| buffer.at((layer * s.blocks + block as usize) * bytes, bytes);
            // SAFETY: two different blocks of the cache, in bounds (`at` checks); the cache waits for the GPU before it goes.
            unsafe { self.compute.copy_within(at(to), at(from), bytes)? };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_moves_its_own_blocks_and_joins_near_ones() {
        let found = |blocks: &[usize], gap| {
            let mut out = vec![7..9, 11..12];
            runs(&mut blocks.to_vec(), gap, &mut out);
            out
        };
        assert!(found(&[], 3).is_empty());
        assert_eq!(found(&[5, 3, 4, 4, 9], 0), [3..6, 9..10]);
        assert_eq!(found(&[5, 3, 4, 9], 2), [3..6, 9..10]);
        assert!(
            found(&[5, 3, 4, 9], 3)
                .iter()
                .cloned()
                .eq([(3, 10)].map(|(a, b)| a..b))
        );
    }

    #[test]
    fn blocks_are_those_of_the_positions() {
        let span = |start_pos, rows| Span {
            first_row: 0,
            rows,
            start_pos,
            table: &[4, 9, 2, 7],
        };
        let seen = |start: usize| {
            let s = span(start, 1);
            blocks(&s, 0..start).collect::<Vec<usize>>()
        };
        assert!(seen(0).is_empty());
        assert_eq!(seen(1), [4]);
        assert_eq!(seen(16), [4]);
        assert_eq!(seen(17), [4, 9]);
        let written = |start: usize, rows| {
            let s = span(start, rows);
            blocks(&s, start..start + rows).collect::<Vec<usize>>()
        };
        assert_eq!(written(15, 1), [4]);
        assert_eq!(written(15, 2), [4, 9]);
        assert_eq!(written(32, 32), [2, 7]);
        // A window leaves old blocks out.
        let s = span(40, 1);
        assert_eq!(blocks(&s, 33..40).collect::<Vec<usize>>(), [2]);
    }
}
