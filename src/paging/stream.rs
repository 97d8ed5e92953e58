//! The reading side: one thread that owns the reader and keeps the drive busy.
//!
//! Slots travel by value: a free [`Space`] comes in, is lent out piece by piece to reads, and leaves as a [`Filled`]
//! once every byte has arrived and was verified. Who holds the region *is* the slot's state, so a slot in use cannot be
//! refilled: there is nothing to refill it with.
//!
//! ```text
//! Free (channel `free`) → Filling (here) → Ready (channel `ready`) → InUse (the pager) → Free
//! ```

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::copies::{Copies, InMemory, Space};
use super::device_layout::DeviceLayout;
use super::slot::{PageRead, SlotLayout};
use super::stats::Counters;
use super::sync::{Receiver, Select, Sender, TryRecvError};
use super::trace::{Happening, Trace, TraceEvent};
use crate::error::{Code, Error, Result};
use crate::io::{Flights, ReadOp, Region};
use crate::planted::{self, Bug};
use crate::store::Checksums;
use crate::units::{BLOCK_BYTES, FileId, UnitId};

/// A unit whose bytes are all there and verified.
pub(super) struct Filled {
    pub unit: UnitId,
    pub space: Space,
}

/// Embedding blocks wanted by the pass about to start. Travels there and back, so that nothing is allocated a pass.
pub(super) struct Gather {
    pub file: FileId,
    /// Ascending block numbers of that file.
    pub blocks: Vec<u64>,
    /// Room for each of them, one behind the other.
    pub region: Region,
}

pub(super) struct Ports {
    pub schedule: Receiver<UnitId>,
    pub free: Receiver<Space>,
    pub ready: Sender<Result<Filled>>,
    pub gather: Receiver<Gather>,
    pub gathered: Sender<Gather>,
    pub stop: Arc<AtomicBool>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VerifyWhen {
    Always,
    First,
    Never,
}

/// What the thread needs to know, shared with the pager.
pub(super) struct Shared {
    pub layouts: Vec<SlotLayout>,
    pub names: Vec<String>,
    pub file_bytes: Vec<u64>,
    pub paths: Vec<std::path::PathBuf>,
    pub checksums: Arc<Checksums>,
    pub verify: VerifyWhen,
    pub trace: Option<Arc<Trace>>,
    pub counters: Counters,
    /// Where a GPU computes: how each unit lies there.
    pub device: Vec<DeviceLayout>,
    /// Where a GPU computes: units that rest in host memory, once they are there.
    pub memory: Vec<OnceLock<InMemory>>,
}

/// How long the thread sleeps at most before it looks at `stop` again.
const NAP: Duration = Duration::from_millis(50);
/// The same while reads are under way beside copies to a GPU: slots that come back and frames that are copied let it go on, and wake nobody.
const NAP_BESIDE_COPIES: Duration = Duration::from_millis(1);

// Tags: bit 63 says second attempt, bit 62 gather, then the fill's number, then the read's index.
const RETRY: u64 = 1 << 63;
const GATHER: u64 = 1 << 62;
const READ_BITS: u32 = 24;

pub(super) struct Fill {
    pub number: u64,
    pub unit: UnitId,
    pub space: Space,
    issued: usize,
    /// Reads that are in the slot, or whose copies into it are given.
    pub done: usize,
    verify: bool,
    /// On a GPU: copying has begun; every copy is given.
    pub begun: bool,
    pub given: bool,
    /// When its slot was taken, for the trace.
    begun_ns: u64,
}

pub(super) struct Stream {
    shared: Arc<Shared>,
    ports: Ports,
    flights: Flights,
    fills: VecDeque<Fill>,
    next_number: u64,
    next_unit: Option<UnitId>,
    spare: Option<Space>,
    gather: Option<(Gather, usize, usize)>,
    finished: Vec<ReadOp>,
    /// Units verified once, for [`VerifyWhen::First`].
    seen: Vec<bool>,
    /// Where a GPU computes.
    copies: Option<Copies>,
}

impl Stream {
    pub fn new(
        shared: Arc<Shared>,
        ports: Ports,
        flights: Flights,
        depth: usize,
        copies: Option<Copies>,
    ) -> Stream {
        let units = shared.layouts.len();
        Stream {
            finished: Vec::with_capacity(flights.room().max(1)),
            fills: VecDeque::with_capacity(depth + 2),
            shared,
            ports,
            flights,
            next_number: 0,
            next_unit: None,
            spare: None,
            gather: None,
            seen: vec![false; units],
            copies,
        }
    }

    /// Runs until told to stop, the pager goes away, or a read fails for good.
    pub fn run(mut self) {
        if let Some(Err(e)) = self.copies.as_ref().map(Copies::bind) {
            let _ = self.ports.ready.send(Err(e));
            return;
        }
        while !self.ports.stop.load(Relaxed) {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    let _ = self.ports.ready.send(Err(e));
                    break;
                }
            }
        }
        // Flights drain on drop, before the regions they write into can go.
        drop(self.flights);
    }

    fn turn(&mut self) -> Result<bool> {
        self.take_work();
        self.copy(false)?;
        self.issue();
        if self.flights.in_flight() == 0 {
            if self.is_stuck() {
                self.copy(true)?;
                return Ok(self.deliver());
            }
            return Ok(self.deliver() && self.sleep());
        }
        let nap = match self.copies {
            Some(_) => NAP_BESIDE_COPIES,
            None => NAP,
        };
        let mut finished = std::mem::take(&mut self.finished);
        self.flights
            .reap(nap, &mut finished)
            .map_err(|e| self.name_the_unit(e))?;
        for op in finished.drain(..) {
            self.land(op)?;
        }
        self.finished = finished;
        self.copy(false)?;
        self.shared
            .counters
            .busy_ns
            .store(self.flights.busy().as_nanos() as u64, Relaxed);
        Ok(self.deliver())
    }

    /// Gives the GPU the copies whose turn it is, and takes back the frames of those that are done.
    fn copy(&mut self, wait: bool) -> Result<()> {
        let Some(copies) = &mut self.copies else {
            return Ok(());
        };
        copies.reclaim(wait, &self.shared)?;
        copies.advance(&mut self.fills, &self.shared)
    }

    fn is_stuck(&self) -> bool {
        let copies = self.copies.as_ref();
        copies.is_some_and(|c| c.is_stuck(&self.fills))
    }

    /// Pairs free slots with the units scheduled next.
    fn take_work(&mut self) {
        if self.gather.is_none()
            && let Ok(g) = self.ports.gather.try_recv()
        {
            self.gather = Some((g, 0, 0));
        }
        loop {
            if self.next_unit.is_none() {
                self.next_unit = self.ports.schedule.try_recv().ok();
            }
            if self.spare.is_none() {
                self.spare = self.ports.free.try_recv().ok();
            }
            if self.next_unit.is_none() || self.spare.is_none() {
                return;
            }
            if let (Some(unit), Some(mut space)) = (self.next_unit.take(), self.spare.take()) {
                if let Space::Host(region) = &mut space {
                    region.rewind();
                }
                let verify = match self.shared.verify {
                    VerifyWhen::Always => true,
                    VerifyWhen::First => !std::mem::replace(&mut self.seen[unit.index()], true),
                    VerifyWhen::Never => false,
                };
                self.fills.push_back(Fill {
                    number: self.next_number,
                    unit,
                    space,
                    issued: 0,
                    done: 0,
                    verify,
                    begun: false,
                    given: false,
                    begun_ns: self.shared.trace.as_ref().map_or(0, |t| t.now_ns()),
                });
                self.next_number += 1;
            }
        }
    }

    /// Keeps the queue full: embedding rows first (a pass waits for them), then the units in their order.
    fn issue(&mut self) {
        if let Some((g, issued, _)) = &mut self.gather {
            while *issued < g.blocks.len() && self.flights.room() > 0 {
                let read = gather_read(g, *issued, &self.shared.file_bytes);
                let frame = g.region.lend(read.len as usize);
                self.flights.submit(ReadOp {
                    file: read.file.0,
                    offset: read.offset,
                    frame,
                    want: read.want as usize,
                    tag: GATHER | *issued as u64,
                });
                *issued += 1;
            }
        }
        for fill in &mut self.fills {
            let reads = &self.shared.layouts[fill.unit.index()].reads;
            let to_device = matches!(fill.space, Space::Device(_));
            if to_device && self.shared.memory[fill.unit.index()].get().is_some() {
                continue;
            }
            while fill.issued < reads.len() {
                if self.flights.room() == 0 {
                    return;
                }
                let read = reads[fill.issued];
                let len = read.len as usize;
                let frame = match (&mut fill.space, &mut self.copies) {
                    (Space::Host(region), _) => Some(region.lend(len)),
                    (Space::Device(_), Some(copies)) => copies.frame(len),
                    (Space::Device(_), None) => None,
                };
                let Some(frame) = frame else {
                    return;
                };
                self.flights.submit(ReadOp {
                    file: read.file.0,
                    offset: read.offset,
                    frame,
                    want: read.want as usize,
                    tag: (fill.number << READ_BITS) & !(RETRY | GATHER) | fill.issued as u64,
                });
                fill.issued += 1;
            }
        }
    }

    /// One read is there: verify its blocks while they are warm in the cache, then count it.
    fn land(&mut self, op: ReadOp) -> Result<()> {
        let counters = &self.shared.counters;
        counters.disk_bytes.fetch_add(op.want as u64, Relaxed);
        let is_gather = op.tag & GATHER != 0;
        let number = (op.tag & !(RETRY | GATHER)) >> READ_BITS;
        let fill = match (is_gather, self.fills.front()) {
            (true, _) => None,
            (false, Some(_)) if planted::is(Bug::FillsMixedUp) => Some(0),
            (false, Some(front)) => Some((number - front.number) as usize),
            (false, None) => return Err(Error::internal("a read landed that nobody waits for")),
        };
        let verify = match fill {
            None if planted::is(Bug::GatherNotVerified) => false,
            None => self.shared.verify != VerifyWhen::Never,
            Some(i) => self.fills[i].verify,
        };
        if verify {
            let started = Instant::now();
            let file = FileId(op.file);
            let checked =
                self.shared
                    .checksums
                    .check(file, op.offset / BLOCK_BYTES, &op.frame[..op.want]);
            counters
                .verify_ns
                .fetch_add(started.elapsed().as_nanos() as u64, Relaxed);
            let take_it = planted::is(Bug::MismatchTaken) && op.tag & RETRY != 0;
            if let Err(block) = checked
                && !take_it
            {
                return self.again(op, block);
            }
            counters.verified_bytes.fetch_add(op.want as u64, Relaxed);
        }
        let read = (op.tag & ((1 << READ_BITS) - 1)) as usize;
        match (fill.map(|i| &self.fills[i].space), &mut self.copies) {
            (Some(Space::Device(_)), Some(copies)) => {
                copies.land(number, read, op.frame);
                return Ok(());
            }
            _ => drop(op),
        }
        match (fill, &mut self.gather) {
            (Some(i), _) => self.fills[i].done += 1,
            (None, Some((_, _, done))) => *done += 1,
            (None, None) => {}
        }
        Ok(())
    }

    /// A mismatch is read once more: a flipped bit on the way is healed, a flipped bit on the platter is named.
    fn again(&mut self, mut op: ReadOp, block: u64) -> Result<()> {
        if op.tag & RETRY == 0 {
            self.shared.counters.rereads.fetch_add(1, Relaxed);
            op.tag |= RETRY;
            self.flights.submit(op);
            return Ok(());
        }
        let unit = self.unit_of(op.tag).unwrap_or("a unit");
        let path = &self.shared.paths[op.file as usize];
        Err(Error::new(
            Code::Corrupt,
            format!(
                "{unit} cannot be trusted: block {block} of {} does not match its checksum",
                path.display()
            ),
            "the bytes on disk differ from those recorded, and a second read gave the same answer",
            if self.shared.checksums.recorded() {
                "the file changed while it was in use, or the disk is failing: restore the checkpoint and start again"
            } else {
                "run `tensorpager verify` on the pack: it says what to do; check the drive"
            },
        ))
    }

    /// Hands over finished fills in the order of the schedule. False when nobody is there to take them.
    fn deliver(&mut self) -> bool {
        if let Some((g, _, done)) = &self.gather
            && *done == g.blocks.len()
            && let Some((g, _, _)) = self.gather.take()
            && self.ports.gathered.send(g).is_err()
        {
            return false;
        }
        while let Some(front) = self.fills.front() {
            let early = usize::from(planted::is(Bug::UnitHandedOutEarly));
            let whole = match front.space {
                Space::Host(_) => {
                    front.done + early >= self.shared.layouts[front.unit.index()].reads.len()
                }
                // The copies are ordered before whatever will compute with them.
                Space::Device(_) => front.given,
            };
            if !whole {
                break;
            }
            if let Some(f) = self.fills.pop_front() {
                if let Some(trace) = &self.shared.trace {
                    trace.reading(TraceEvent {
                        what: Happening::Read,
                        unit: Some(f.unit),
                        start_ns: f.begun_ns,
                        end_ns: trace.now_ns(),
                        bytes: self.shared.layouts[f.unit.index()].read_bytes,
                    });
                }
                let filled = Filled {
                    unit: f.unit,
                    space: f.space,
                };
                if self.ports.ready.send(Ok(filled)).is_err() {
                    return false;
                }
            }
        }
        true
    }

    /// Nothing in flight: wait for a slot, a unit or a gather. False when the pager is gone.
    fn sleep(&mut self) -> bool {
        let mut select = Select::new();
        select.recv(&self.ports.gather);
        match self.next_unit {
            None => select.recv(&self.ports.schedule),
            Some(_) => select.recv(&self.ports.free),
        };
        if let Ok(i) = select.ready_timeout(NAP) {
            // A disconnected channel is always ready; it is empty only when the pager dropped its end.
            let gone = match (i, self.next_unit) {
                (0, _) => disconnected(self.ports.gather.try_recv(), |g| {
                    self.gather = Some((g, 0, 0))
                }),
                (_, None) => {
                    disconnected(self.ports.schedule.try_recv(), |u| self.next_unit = Some(u))
                }
                (_, Some(_)) => disconnected(self.ports.free.try_recv(), |r| self.spare = Some(r)),
            };
            return !gone;
        }
        true
    }

    /// Says which unit the failed read was for: with several units in flight it need not be the oldest.
    fn name_the_unit(&self, e: Error) -> Error {
        let Some(unit) = self.flights.failed_tag().and_then(|tag| self.unit_of(tag)) else {
            return e;
        };
        let what = format!("reading {unit} failed: {}", e.what());
        Error::new(e.code(), what, e.cause(), e.fix())
    }

    /// The unit that a read with this tag belongs to.
    fn unit_of(&self, tag: u64) -> Option<&str> {
        if tag & GATHER != 0 {
            return Some("the embedding");
        }
        let number = (tag & !(RETRY | GATHER)) >> READ_BITS;
        let at = number.checked_sub(self.fills.front()?.number)?;
        let fill = self.fills.get(at as usize)?;
        Some(&self.shared.names[fill.unit.index()])
    }
}

fn disconnected<T>(got: Result<T, TryRecvError>, keep: impl FnOnce(T)) -> bool {
    match got {
        Ok(t) => {
            keep(t);
            false
        }
        Err(TryRecvError::Empty) => false,
        Err(TryRecvError::Disconnected) => true,
    }
}

fn gather_read(g: &Gather, i: usize, file_bytes: &[u64]) -> PageRead {
    let offset = g.blocks[i] * BLOCK_BYTES;
    let want = BLOCK_BYTES.min(file_bytes[g.file.index()] - offset);
    PageRead {
        file: g.file,
        offset,
        len: crate::units::align_up(want, crate::units::ALIGN_BYTES),
        want,
    }
}
