//! The part of the reading side that a GPU needs: pages go from the ring of frames into slots on the device.
//!
//! The copy stream is one queue, and the copies of a slot wait in it until the GPU no longer computes with that slot. So units are copied
//! strictly one after the other: a page of the next unit that arrives early keeps its frame until all pages of the one before are given.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::gpu::GpuTrace;
use super::stream::{Fill, Shared};
use crate::device::cuda::{Context, Copier, Slot};
use crate::error::Result;
use crate::io::{Frame, Region};
use crate::units::UnitId;

/// A slot, where it lies.
pub(super) enum Space {
    Host(Region),
    Device(Slot),
}

/// A unit that rests in host memory.
pub(super) struct InMemory {
    pub region: Arc<Region>,
    /// The GPU can copy from it as it lies; otherwise it goes through frames.
    pub pinned: bool,
}

/// What a copy reads from.
enum Source {
    Frame(Frame),
    Memory(Arc<Region>),
}

impl Deref for Source {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Source::Frame(frame) => frame,
            Source::Memory(region) => region.bytes(),
        }
    }
}

/// A verified page whose turn has not come.
struct Landed {
    fill: u64,
    read: usize,
    frame: Frame,
}

/// The copies that were outstanding when a unit's last byte was there: numbers of the first and the last, and how long those done so far took.
struct Tail {
    unit: UnitId,
    first: u64,
    last: u64,
    took: Duration,
}

pub(super) struct Copies {
    copier: Copier<Source>,
    free: Vec<Frame>,
    landed: Vec<Landed>,
    tails: VecDeque<Tail>,
    trace: Option<GpuTrace>,
    /// When the unit that is being copied was begun with, and the bytes of all copies before it; for the trace.
    unit_begun: Option<(Duration, u64)>,
}

impl Copies {
    /// `frames`: the ring, each as large as a page. `units`: that may be on their way at once.
    pub fn new(
        context: &Arc<Context>,
        frames: Vec<Frame>,
        units: usize,
        trace: Option<GpuTrace>,
    ) -> Result<Copies> {
        let mut copier = Copier::new(context, frames.len() + units + 1)?;
        if let Some(trace) = &trace {
            copier.tell_time(trace.clock.clone());
        }
        Ok(Copies {
            copier,
            trace,
            unit_begun: None,
            landed: Vec::with_capacity(frames.len()),
            tails: VecDeque::with_capacity(units + 2),
            free: frames,
        })
    }

    /// Memory is pinned in such pieces.
    pub fn cut_at(&mut self, bytes: usize) {
        self.copier.cut_at(bytes);
    }

    /// To be called on the thread that copies.
    pub fn bind(&self) -> Result<()> {
        self.copier.bind()
    }

    /// A free frame of `len` bytes.
    pub fn frame(&mut self, len: usize) -> Option<Frame> {
        let mut frame = self.free.pop()?;
        frame.resize(len);
        Some(frame)
    }

    /// A page is there and verified.
    pub fn land(&mut self, fill: u64, read: usize, frame: Frame) {
        self.landed.push(Landed { fill, read, frame });
    }

    /// Gives the copies whose turn it is.
    pub fn advance(&mut self, fills: &mut VecDeque<Fill>, shared: &Shared) -> Result<()> {
        for fill in fills {
            if fill.given {
                continue;
            }
            let Fill {
                space: Space::Device(slot),
                begun,
                unit,
                number,
                done,
                ..
            } = fill
            else {
                continue;
            };
            let reads = shared.layouts[unit.index()].reads.len();
            let complete = match shared.memory[unit.index()].get() {
                Some(memory) => {
                    if !self.copier.has_room() {
                        return Ok(());
                    }
                    begin(&self.copier, slot, begun)?;
                    self.copy_from_memory(memory, *unit, done, slot, shared)?
                }
                None => {
                    while let Some(i) = self.landed.iter().position(|l| l.fill == *number) {
                        begin(&self.copier, slot, begun)?;
                        let page = self.landed.swap_remove(i);
                        self.send(page.frame, *unit, page.read, slot, shared)?;
                        *done += 1;
                    }
                    *done == reads
                }
            };
            if !complete {
                return Ok(());
            }
            self.copier.finish(slot)?;
            fill.given = true;
            let (last, first) = self.copier.counts();
            self.tails.push_back(Tail {
                unit: fill.unit,
                first: first + 1,
                last,
                took: Duration::ZERO,
            });
        }
        Ok(())
    }

    /// Copies one page's tensors; a page with nothing of them gives its frame back at once.
    fn send(
        &mut self,
        frame: Frame,
        unit: UnitId,
        read: usize,
        slot: &Slot,
        shared: &Shared,
    ) -> Result<()> {
        let pieces = shared.device[unit.index()].page(read);
        match pieces.is_empty() {
            true => {
                self.free.push(frame);
                Ok(())
            }
            false => self.copier.send(Source::Frame(frame), pieces, slot),
        }
    }

    /// A unit that rests in host memory: as it lies, or page by page through frames as these become free. True when all is given.
    fn copy_from_memory(
        &mut self,
        memory: &InMemory,
        unit: UnitId,
        done: &mut usize,
        slot: &Slot,
        shared: &Shared,
    ) -> Result<bool> {
        if memory.pinned {
            let pieces = &shared.device[unit.index()].whole;
            self.copier
                .send(Source::Memory(memory.region.clone()), pieces, slot)?;
            return Ok(true);
        }
        let reads = &shared.layouts[unit.index()].reads;
        let mut at: u64 = reads[..*done].iter().map(|r| r.len).sum();
        while *done < reads.len() {
            let len = reads[*done].len as usize;
            let Some(mut frame) = self.frame(len) else {
                return Ok(false);
            };
            frame.copy_from_slice(&memory.region.bytes()[at as usize..][..len]);
            self.send(frame, unit, *done, slot, shared)?;
            at += len as u64;
            *done += 1;
        }
        Ok(true)
    }

    /// Takes back the frames of copies that are done; with `wait`, waits for the oldest.
    pub fn reclaim(&mut self, mut wait: bool, shared: &Shared) -> Result<()> {
        let mut before = self.copier.totals().0;
        while let Some((source, took)) = self.copier.reclaim(wait)? {
            wait = false;
            let number = self.copier.counts().1;
            if self.trace.is_some() && self.unit_begun.is_none() {
                self.unit_begun = Some((self.copier.began(), before));
            }
            for tail in &mut self.tails {
                if tail.first <= number && number <= tail.last {
                    tail.took += took;
                }
            }
            while self.tails.front().is_some_and(|t| t.last <= number) {
                if let Some(tail) = self.tails.pop_front() {
                    let ns = tail.took.as_nanos() as u64;
                    shared.counters.copy_tail_ns[tail.unit.index()].store(ns, Relaxed);
                    self.note_unit(tail.unit, took);
                }
            }
            if let Source::Frame(frame) = source {
                self.free.push(frame);
            }
            before = self.copier.totals().0;
        }
        let (bytes, busy) = self.copier.totals();
        shared.counters.h2d_bytes.store(bytes, Relaxed);
        shared
            .counters
            .h2d_ns
            .store(busy.as_nanos() as u64, Relaxed);
        Ok(())
    }

    /// The unit's last copy, which took `last`, is done.
    fn note_unit(&mut self, unit: UnitId, last: Duration) {
        if let (Some(trace), Some((begun, before))) = (&self.trace, self.unit_begun.take()) {
            let bytes = self.copier.totals().0 - before;
            trace.copied(unit, begun, self.copier.began() + last, bytes);
        }
    }

    /// Nothing can go on before a copy is done.
    pub fn is_stuck(&self, fills: &VecDeque<Fill>) -> bool {
        let waits = |f: &Fill| matches!(f.space, Space::Device(_)) && !f.given;
        self.copier.under_way() > 0 && fills.iter().any(waits)
    }
}

/// Before the first copy of a unit: its slot must no longer be in use.
fn begin(copier: &Copier<Source>, slot: &mut Slot, begun: &mut bool) -> Result<()> {
    if !std::mem::replace(begun, true) {
        copier.begin(slot)?;
    }
    Ok(())
}
