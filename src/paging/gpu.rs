//! What the pager keeps where a GPU computes: pinned memory, and the GPU's own clock.

use std::sync::Arc;
use std::time::Duration;

use super::copies::Copies;
use super::pager::PagerOptions;
use super::plan::Plan;
use super::stats::PagingStats;
use super::trace::{Happening, Trace, TraceEvent};
use crate::device::cuda::{Clock, Compute, Pin, Refusal, Slot, Ticks};
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

/// What the system refused to pin. A refusal says little of what comes after: less memory may fit under the limit that was met, and whoever
/// else has some pinned may let go of it. But each costs the time of pinning all pieces before the one that was refused, so few are risked.
#[derive(Default)]
struct Refusals {
    /// Of the smallest region that was refused.
    least_bytes: Option<usize>,
    /// Regions no smaller than that which were tried all the same.
    repeated: usize,
    count: usize,
    for_good: bool,
    /// What the first was for: it is told once.
    why: Option<String>,
}

/// Of regions no smaller than one that was refused: as much as one passing shortage.
const MOST_REPEATED: usize = 1;
const MOST_REFUSALS: usize = 6;

impl Refusals {
    /// Whether it makes sense to ask for so many bytes.
    fn may_try(&mut self, bytes: usize) -> bool {
        if self.for_good || self.count >= MOST_REFUSALS {
            return false;
        }
        match self.least_bytes {
            Some(least) if bytes >= least => {
                self.repeated += 1;
                self.repeated <= MOST_REPEATED
            }
            _ => true,
        }
    }

    fn refused(&mut self, bytes: usize, refusal: &Refusal) {
        self.count += 1;
        self.for_good |= refusal.for_good;
        self.least_bytes = Some(self.least_bytes.map_or(bytes, |least| least.min(bytes)));
        self.why
            .get_or_insert_with(|| refusal.why.cause().to_string());
    }

    /// One that was no smaller went well: the shortage was a passing one.
    fn pinned(&mut self, bytes: usize) {
        if self.least_bytes.is_some_and(|least| bytes >= least) {
            self.least_bytes = None;
            self.repeated = 0;
        }
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
    refusals: Refusals,
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
            refusals: Refusals::default(),
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

    /// Pins a region, so that the GPU copies from it by itself. Where the system refuses, copies still work, through frames and the driver's
    /// own memory: the first reason is kept.
    pub fn pin(&mut self, region: &Arc<Region>, arena: &Arena) -> bool {
        let bytes = region.len();
        if bytes == 0 || !self.refusals.may_try(bytes) {
            return false;
        }
        let context = self.compute.context();
        let owner = Box::new(arena.clone());
        match Pin::in_pieces(context, region.bytes(), self.pin_bytes, owner) {
            Ok(pin) => {
                self.pins.push(pin);
                self.refusals.pinned(bytes);
                true
            }
            Err(refusal) => {
                self.refusals.refused(bytes, &refusal);
                false
            }
        }
    }

    /// Why some copies go through memory that is not pinned.
    pub fn unpinned(&self) -> Option<&str> {
        self.refusals.why.as_deref()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn told(for_good: bool) -> Refusal {
        Refusal {
            for_good,
            ..Refusal::from(Error::internal("no"))
        }
    }

    /// Which of these sizes are tried; `pins` says which of them the system pins.
    fn tried(sizes: &[usize], pins: impl Fn(usize) -> bool) -> (Vec<usize>, Refusals) {
        let mut refusals = Refusals::default();
        let mut tried = Vec::new();
        for (i, bytes) in sizes.iter().enumerate() {
            if refusals.may_try(*bytes) {
                tried.push(i);
                match pins(i) {
                    true => refusals.pinned(*bytes),
                    false => refusals.refused(*bytes, &told(false)),
                }
            }
        }
        (tried, refusals)
    }

    #[test]
    fn one_refusal_leaves_the_others_to_be_tried() {
        let all: Vec<usize> = (0..12).collect();
        assert_eq!(tried(&[100; 12], |i| i != 3).0, all);
        // Two passing shortages.
        assert_eq!(tried(&[100; 12], |i| i != 3 && i != 7).0, all);
    }

    #[test]
    fn what_is_refused_twice_is_asked_for_no_more_but_less_is() {
        let sizes = [100, 100, 100, 100, 30, 30, 100, 20];
        let fits = |i: usize| i == 0 || sizes[i] < 100;
        assert_eq!(tried(&sizes, fits).0, [0, 1, 2, 4, 5, 7]);
    }

    #[test]
    fn attempts_are_bounded_and_the_first_reason_is_told() {
        let ever_less: Vec<usize> = (1..100).rev().collect();
        let (tries, refusals) = tried(&ever_less, |_| false);
        assert_eq!(tries.len(), MOST_REFUSALS);
        assert!(refusals.why.is_some());
        let mut refusals = Refusals::default();
        refusals.refused(100, &told(true));
        assert!(!refusals.may_try(1));
    }
}
