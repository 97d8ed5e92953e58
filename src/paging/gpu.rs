//! What the pager keeps where a GPU computes: pinned memory, and the GPU's own clock.

use std::sync::Arc;
use std::time::Duration;

use super::copies::Copies;
use super::pager::PagerOptions;
use super::plan::Plan;
use super::stats::PagingStats;
use super::trace::{Happening, Trace, TraceEvent};
use crate::device::cuda::{Clock, Compute, Pin, Slot, Ticks};
use crate::device::{Kv, KvMove};
use crate::error::{Error, Result};
use crate::io::{Arena, Frame, Region};
use crate::units::UnitId;

/// A trace that knows the GPU's clock.
pub(super) struct GpuTrace {
    trace: Arc<Trace>,
    pub clock: Arc<Clock>,
    /// The trace's time when the GPU's began.
    zero_ns: u64,
}

impl GpuTrace {
    fn new(trace: &Arc<Trace>, compute: &Compute) -> Result<GpuTrace> {
        Ok(GpuTrace {
            clock: Arc::new(compute.clock()?),
            zero_ns: trace.now_ns(),
            trace: trace.clone(),
        })
    }

    /// The same for another thread.
    fn shared(&self) -> GpuTrace {
        GpuTrace {
            trace: self.trace.clone(),
            clock: self.clock.clone(),
            zero_ns: self.zero_ns,
        }
    }

    /// Of `start` and `end` by the GPU's clock.
    fn event(
        &self,
        what: Happening,
        unit: UnitId,
        start: Duration,
        end: Duration,
        bytes: u64,
    ) -> TraceEvent {
        let ns = |at: Duration| self.zero_ns + at.as_nanos() as u64;
        TraceEvent {
            what,
            unit: Some(unit),
            start_ns: ns(start),
            end_ns: ns(end.max(start)),
            bytes,
        }
    }

    /// To be called by the reading thread only.
    pub fn copied(&self, unit: UnitId, start: Duration, end: Duration, bytes: u64) {
        self.trace
            .reading(self.event(Happening::Copy, unit, start, end, bytes));
    }

    /// To be called by the computing side only.
    fn computing(&self, what: Happening, unit: UnitId, start: Duration, end: Duration, bytes: u64) {
        self.trace
            .computing(self.event(what, unit, start, end, bytes));
    }
}

/// Two places in a stream are never passed at once: what is shorter was no wait.
const LEAST_WAIT: Duration = Duration::from_micros(10);

pub(super) struct GpuSide {
    compute: Compute,
    /// By unit: when the GPU reached and left it.
    ticks: Vec<Ticks>,
    /// Units of the pass under way that the GPU has left.
    walked: Vec<UnitId>,
    /// For the reading thread, until it takes them.
    pub copies: Option<Copies>,
    pins: Vec<Pin>,
    /// Of one piece of a pin.
    pin_bytes: usize,
    /// Why some copies go through memory that is not pinned.
    pub unpinned: Option<String>,
    trace: Option<GpuTrace>,
}

impl GpuSide {
    /// Takes the ring of frames from the arena and pins it.
    pub fn new(
        compute: Compute,
        plan: &Plan,
        arena: &Arena,
        units: usize,
        options: &PagerOptions,
    ) -> Result<GpuSide> {
        let trace = options.trace.as_ref();
        let ring = plan.ring();
        let exhausted = || Error::internal("the arena is smaller than its plan");
        let region = arena.take(ring.bytes()).ok_or_else(exhausted)?;
        let context = compute.context().clone();
        let ticks = (0..units).map(|_| Ticks::new(&context));
        let mut side = GpuSide {
            ticks: ticks.collect::<Result<_>>()?,
            walked: Vec::with_capacity(units),
            copies: None,
            pins: Vec::new(),
            pin_bytes: options.pin_bytes,
            unpinned: None,
            trace: trace.map(|t| GpuTrace::new(t, &compute)).transpose()?,
            compute,
        };
        let region = Arc::new(region);
        side.pin(&region, arena);
        let mut region = Arc::into_inner(region).ok_or_else(exhausted)?;
        let frames: Vec<Frame> = (0..ring.frames)
            .map(|_| region.lend(ring.frame_bytes as usize))
            .collect();
        let shared = side.trace.as_ref().map(GpuTrace::shared);
        let mut copies = Copies::new(&context, frames, units, shared)?;
        copies.cut_at(options.pin_bytes);
        side.copies = Some(copies);
        Ok(side)
    }

    /// Pins a region, so that the GPU copies from it by itself. Where the system refuses, copies still work, through the driver's own memory:
    /// the first reason is kept.
    pub fn pin(&mut self, region: &Arc<Region>, arena: &Arena) -> bool {
        if region.is_empty() || self.unpinned.is_some() {
            return false;
        }
        let context = self.compute.context();
        let owner = Box::new(arena.clone());
        match Pin::in_pieces(context, region.bytes(), self.pin_bytes, owner) {
            Ok(pin) => {
                self.pins.push(pin);
                true
            }
            Err(e) => {
                self.unpinned = Some(e.cause().to_string());
                false
            }
        }
    }

    /// A slot on the GPU.
    pub fn slot(&self, bytes: u64) -> Result<Slot> {
        Slot::new(self.compute.context(), bytes, "a slot for weights")
    }

    /// A filled slot that stays: what is computed from now on comes after its copies.
    pub fn keep(&self, mut slot: Slot) -> Result<Slot> {
        self.compute.await_slot(&mut slot)?;
        Ok(slot)
    }

    /// Before the host waits for a unit.
    pub fn reach(&mut self, unit: UnitId) -> Result<()> {
        self.compute.reach(&self.ticks[unit.index()])
    }

    pub fn acquire(&mut self, unit: UnitId, slot: &mut Slot) -> Result<()> {
        self.walked.push(unit);
        self.compute.acquire(slot, &self.ticks[unit.index()])
    }

    /// A unit that lies there already.
    pub fn enter(&mut self, unit: UnitId) -> Result<()> {
        self.walked.push(unit);
        let ticks = &self.ticks[unit.index()];
        self.compute.reach(ticks)?;
        self.compute.enter(ticks)
    }

    pub fn leave(&self, unit: UnitId) -> Result<()> {
        self.compute.leave(&self.ticks[unit.index()])
    }

    pub fn release(&self, unit: UnitId, slot: &mut Slot) -> Result<()> {
        self.compute.release(slot, &self.ticks[unit.index()])
    }

    /// Waits for the pass and adds up its times. `tail`: how long the unit's copies took once its last byte was in host memory; that part
    /// of a wait is the copy's, the rest the disk's.
    pub fn end_pass(
        &mut self,
        stats: &mut PagingStats,
        tail: impl Fn(UnitId) -> Duration,
    ) -> Result<()> {
        self.compute.synchronize()?;
        for unit in self.walked.drain(..) {
            let ticks = &self.ticks[unit.index()];
            let (waited, computed) = ticks.spent()?;
            let copy = waited.min(tail(unit));
            stats.gpu_compute += computed;
            stats.stall_copy += copy;
            stats.stall_disk += waited - copy;
            if let Some(trace) = &self.trace {
                let there = ticks.reached(&trace.clock)?;
                let on = there + waited;
                if waited >= LEAST_WAIT {
                    trace.computing(Happening::Wait, unit, there, on, 0);
                }
                trace.computing(Happening::Compute, unit, on, on + computed, 0);
            }
        }
        Ok(())
    }

    /// Adds what keys and values in host memory cost the pass that has just ended; `layer`: the unit of a layer. A wait for them lies within
    /// what counted as computing.
    pub fn end_kv(
        &self,
        kv: &Kv,
        stats: &mut PagingStats,
        layer: impl Fn(usize) -> Option<UnitId>,
    ) -> Result<()> {
        let clock = self.trace.as_ref().map(|t| &*t.clock);
        kv.moves(clock, &mut |moved: KvMove| {
            stats.copied_bytes += moved.to_gpu_bytes;
            stats.kv_bytes += moved.to_gpu_bytes;
            stats.h2d_bytes += moved.to_gpu_bytes;
            stats.d2h_bytes += moved.to_host_bytes;
            stats.kv_h2d += moved.load;
            stats.stall_copy += moved.waited;
            stats.gpu_compute = stats.gpu_compute.saturating_sub(moved.waited);
            if let (Some(trace), Some(began)) = (&self.trace, moved.began)
                && moved.to_gpu_bytes > 0
                && let Some(unit) = layer(moved.layer)
            {
                let end = began + moved.load;
                trace.computing(Happening::Kv, unit, began, end, moved.to_gpu_bytes);
            }
        })
    }

    /// Forgets the pass under way: it failed.
    pub fn forget_pass(&mut self) {
        self.walked.clear();
    }
}
