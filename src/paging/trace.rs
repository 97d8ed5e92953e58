//! What happened when: events of reads, waits and computing, kept in rings that are allocated before a run begins.
//!
//! One thread writes each ring and nobody waits: an event is four relaxed stores and one release. A ring that is full begins
//! anew, so a long run keeps its end.

use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::time::Instant;

use crate::units::UnitId;

/// What an event tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Happening {
    /// A unit's bytes, from the first read submitted to the last one verified.
    Read,
    /// A unit's bytes on their way to the GPU, by its clock.
    Copy,
    /// A layer's keys and values on their way to the GPU, by its clock.
    Kv,
    /// The computing side waited for a unit; on a GPU by its clock.
    Wait,
    /// The computing side had the unit; on a GPU its kernels ran, by its clock.
    Compute,
    /// Embedding rows were fetched.
    Gather,
    /// A pass began (no length).
    Pass,
}

const KINDS: [Happening; 7] = [
    Happening::Read,
    Happening::Copy,
    Happening::Kv,
    Happening::Wait,
    Happening::Compute,
    Happening::Gather,
    Happening::Pass,
];

impl Happening {
    pub const fn name(self) -> &'static str {
        match self {
            Happening::Read => "read",
            Happening::Copy => "copy",
            Happening::Kv => "kv",
            Happening::Wait => "wait",
            Happening::Compute => "compute",
            Happening::Gather => "gather",
            Happening::Pass => "pass",
        }
    }
}

/// One event. Times in nanoseconds from the trace's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceEvent {
    pub what: Happening,
    /// None for passes and gathers.
    pub unit: Option<UnitId>,
    pub start_ns: u64,
    pub end_ns: u64,
    /// Bytes read or copied.
    pub bytes: u64,
}

/// Events kept a ring: four 8-byte words each.
pub const TRACE_EVENTS: usize = 1 << 17;

struct Ring {
    words: Box<[AtomicU64]>,
    written: AtomicU64,
}

impl Ring {
    fn new(events: usize) -> Ring {
        Ring {
            words: (0..events.max(1) * 4).map(|_| AtomicU64::new(0)).collect(),
            written: AtomicU64::new(0),
        }
    }

    fn push(&self, e: TraceEvent) {
        let n = self.written.load(Relaxed);
        let at = (n as usize % (self.words.len() / 4)) * 4;
        let unit = e.unit.map_or(u64::from(u32::MAX), |u| u64::from(u.0));
        for (word, value) in self.words[at..at + 4].iter().zip([
            (e.what as u64) << 32 | unit,
            e.start_ns,
            e.end_ns,
            e.bytes,
        ]) {
            word.store(value, Relaxed);
        }
        self.written.store(n + 1, Release);
    }

    fn events(&self) -> Vec<TraceEvent> {
        let written = self.written.load(Acquire);
        let room = (self.words.len() / 4) as u64;
        (written.saturating_sub(room)..written)
            .filter_map(|n| {
                let at = (n % room) as usize * 4;
                let word = |i: usize| self.words[at + i].load(Relaxed);
                let unit = word(0) as u32;
                Some(TraceEvent {
                    what: *KINDS.get((word(0) >> 32) as usize)?,
                    unit: (unit != u32::MAX).then_some(UnitId(unit)),
                    start_ns: word(1),
                    end_ns: word(2),
                    bytes: word(3),
                })
            })
            .collect()
    }
}

/// The rings of one engine: one of the reading thread, one of the computing side.
pub struct Trace {
    epoch: Instant,
    reading: Ring,
    computing: Ring,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Trace({} reads, {} events of computing)",
            self.reading.written.load(Relaxed),
            self.computing.written.load(Relaxed)
        )
    }
}

impl Trace {
    /// Room for `events` events a side; what is older is forgotten.
    pub fn new(events: usize) -> Trace {
        Trace {
            epoch: Instant::now(),
            reading: Ring::new(events),
            computing: Ring::new(events),
        }
    }

    pub(super) fn now_ns(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    /// To be called by the reading thread only.
    pub(super) fn reading(&self, event: TraceEvent) {
        self.reading.push(event);
    }

    /// To be called by the computing side only.
    pub(super) fn computing(&self, event: TraceEvent) {
        self.computing.push(event);
    }

    /// Everything kept, reads first, each side in the order it ended. To be called while the engine rests: events being
    /// overwritten at this moment would come out mixed.
    pub fn events(&self) -> Vec<TraceEvent> {
        let mut all = self.reading.events();
        all.extend(self.computing.events());
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_keeps_the_end() {
        let trace = Trace::new(4);
        for i in 0..10u64 {
            trace.computing(TraceEvent {
                what: Happening::Wait,
                unit: Some(UnitId(i as u32)),
                start_ns: i,
                end_ns: i + 1,
                bytes: 0,
            });
        }
        let units: Vec<u32> = trace
            .events()
            .iter()
            .filter_map(|e| e.unit)
            .map(|u| u.0)
            .collect();
        assert_eq!(units, [6, 7, 8, 9]);
    }

    #[test]
    fn events_come_back_as_they_went_in() {
        let trace = Trace::new(8);
        for what in KINDS {
            let event = TraceEvent {
                what,
                unit: None,
                start_ns: 1,
                end_ns: 5,
                bytes: 7,
            };
            trace.reading(event);
            assert_eq!(trace.events().last(), Some(&event));
        }
    }
}
