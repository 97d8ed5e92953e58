//! The computing side: asks for units in the order of the pass and gives them back.

mod start;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::copies::Space;
use super::gpu::GpuSide;
use super::origin::EmbedAt;
use super::plan::{Plan, Tier};
use super::slot::{SlotLayout, SlotWeight};
use super::stats::PagingStats;
use super::stream::{Filled, Gather, Shared, VerifyWhen};
use super::sync::{JoinHandle, Receiver, RecvTimeoutError, Sender};
use super::trace::{Happening, Trace, TraceEvent};
use crate::device::cuda::Slot;
use crate::device::{Bytes, Kv};
use crate::error::{Code, Error, Result};
use crate::io::{self, ReaderKind, Region};
use crate::planted::{self, Bug};
use crate::spec::UnitKind;
use crate::units::{Dtype, UnitId};

/// Puts something around a reader.
pub type WrapReader = fn(Box<dyn io::Reader>) -> Box<dyn io::Reader>;

/// How the bytes are read. The defaults are what `tune` starts from.
#[derive(Clone, Debug)]
pub struct PagerOptions {
    pub reader: ReaderKind,
    /// Reads in flight.
    pub queue_depth: usize,
    pub verify: VerifyWhen,
    /// A read that takes longer than this is an error naming the layer.
    pub stall_limit: Duration,
    pub direct: bool,
    /// Frames and weights that one call pins for a GPU, at most; whole pages. Pieces meet where an address is a multiple of it.
    pub pin_bytes: usize,
    /// Test hook: wraps the reader, so that faults and delays can be put under a whole engine.
    pub wrap: Option<WrapReader>,
    /// Where events are kept, if anywhere.
    pub trace: Option<Arc<Trace>>,
}

impl Default for PagerOptions {
    fn default() -> PagerOptions {
        PagerOptions {
            reader: ReaderKind::Auto,
            queue_depth: 32,
            verify: VerifyWhen::Always,
            stall_limit: Duration::from_secs(30),
            direct: true,
            pin_bytes: io::SEGMENT_BYTES,
            wrap: None,
            trace: None,
        }
    }
}

/// A unit on loan to the forward pass. Must come back through [`Pager::release`]; a slot that does not is lost.
#[must_use]
pub enum Lease {
    Resident(UnitId),
    Slot(UnitId, Region),
    /// On a GPU.
    DeviceSlot(UnitId, Slot),
}

/// A unit that stays where it is.
pub(super) enum Resident {
    Host(Arc<Region>),
    Device(Slot),
}

pub struct Pager {
    pub(super) shared: Arc<Shared>,
    plan: Plan,
    pub(super) residents: Vec<Option<Resident>>,
    /// Units each decoder pass streams, in order.
    cycle: Vec<UnitId>,
    /// Where the head begins in the cycle: whether a pass reads it is known only when the pass begins.
    tail: usize,
    /// Units of the cycle that this pass reads, and that it has had.
    due: usize,
    taken: usize,
    /// First row of each head unit that is resident, when the head is tied: `(first row, rows, unit)`.
    pub(super) head_rows: Vec<(usize, usize, UnitId)>,
    pub(super) embed: EmbedAt,
    pub(super) gather: Option<Gather>,
    pub(super) order: Vec<u32>,
    schedule: Option<Sender<UnitId>>,
    free: Option<Sender<Space>>,
    ready: Receiver<Result<Filled>>,
    pub(super) gather_tx: Option<Sender<Gather>>,
    pub(super) gathered: Receiver<Gather>,
    stop: Arc<AtomicBool>,
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle>,
    pub(super) stats: PagingStats,
    stall_limit: Duration,
    reader: String,
    reader_name: &'static str,
    direct: bool,
    /// What ended the reading thread, for whoever asks again.
    failed: OnceLock<Error>,
    trace: Option<Arc<Trace>>,
    /// When the unit on loan was handed over, for the trace.
    handed_ns: u64,
    /// Where a GPU computes.
    gpu: Option<GpuSide>,
}

impl Pager {
    /// To be called when a pass has been given to the device in full: waits for it, and reads off how long it waited and computed, and what
    /// of its keys and values was copied.
    pub fn end_pass(&mut self, kv: &Kv) -> Result<()> {
        let Some(gpu) = &mut self.gpu else {
            return Ok(());
        };
        let tails = &self.shared.counters.copy_tail_ns;
        gpu.end_pass(&mut self.stats, |unit| {
            Duration::from_nanos(tails[unit.index()].load(Relaxed))
        })?;
        let layouts = &self.shared.layouts;
        gpu.end_kv(kv, &mut self.stats, |layer| {
            let is_it =
                |l: &SlotLayout| matches!(l.kind, UnitKind::Layer(i) if i as usize == layer);
            Some(UnitId(layouts.iter().position(is_it)? as u32))
        })
    }

    /// To be called as a pass begins: schedules its head, where `logits` says that it needs one, and the layers of the pass after it,
    /// so that the stream never stops between the two. What a pass that failed left unread is passed over, so that this one
    /// begins at its beginning.
    pub fn begin_pass(&mut self, logits: bool) -> Result<()> {
        while self.taken < self.due {
            let lease = self.acquire(self.cycle[self.taken])?;
            self.release(lease)?;
        }
        self.taken = 0;
        self.due = match logits {
            true => self.cycle.len(),
            false => self.tail,
        };
        if let Some(gpu) = &mut self.gpu {
            gpu.forget_pass();
        }
        self.stats.passes += 1;
        let now = self.now_ns();
        self.note(Happening::Pass, None, now, 0);
        let late = planted::is(Bug::NoPrefetchAcrossPasses);
        if late && self.stats.passes > 1 {
            self.send_cycle(0..self.tail)?;
        }
        self.send_cycle(self.tail..self.due)?;
        match late {
            true => Ok(()),
            false => self.send_cycle(0..self.tail),
        }
    }

    fn send_cycle(&self, units: std::ops::Range<usize>) -> Result<()> {
        for &unit in &self.cycle[units] {
            self.send_schedule(unit)?;
        }
        Ok(())
    }

    /// Waits until `unit` is there. Streamed units must be asked for in the order of the schedule.
    pub fn acquire(&mut self, unit: UnitId) -> Result<Lease> {
        self.stats.units += 1;
        let ignored = planted::is(Bug::ResidentsIgnored) && self.cycle.contains(&unit);
        if self.is_here(unit) && !ignored {
            self.handed_ns = self.now_ns();
            if let Some(gpu) = &mut self.gpu {
                gpu.enter(unit)?;
            }
            return Ok(Lease::Resident(unit));
        }
        if let Some(gpu) = &mut self.gpu {
            gpu.reach(unit)?;
        }
        let filled = match self.ready.try_recv() {
            Ok(filled) => self.heard(filled)?,
            Err(_) => {
                let (started, from) = (Instant::now(), self.now_ns());
                let filled = self.wait_ready();
                // A GPU that still computes is not kept waiting by the host's waiting: its own clock says how long it was.
                if self.gpu.is_none() {
                    self.stats.stall_disk += started.elapsed();
                }
                self.note_on_host(Happening::Wait, unit, from);
                filled?
            }
        };
        if filled.unit != unit {
            return Err(Error::internal(format!(
                "{} was asked for, {} came",
                self.unit_name(unit),
                self.unit_name(filled.unit)
            )));
        }
        #[cfg(feature = "testing")]
        if let Space::Host(region) = &filled.space
            && planted::is(Bug::SlotFreedEarly)
        {
            self.send_free(Space::Host(region.alias()))?;
        }
        self.taken += 1;
        let bytes = self.shared.layouts[unit.index()].read_bytes;
        if self.plan.tiers[unit.index()] == Tier::Disk || ignored {
            self.stats.used_bytes += bytes;
        }
        if self.gpu.is_some() {
            self.stats.copied_bytes += bytes;
        }
        self.handed_ns = self.now_ns();
        match (filled.space, &mut self.gpu) {
            (Space::Device(mut slot), Some(gpu)) => {
                gpu.acquire(unit, &mut slot)?;
                Ok(Lease::DeviceSlot(unit, slot))
            }
            (Space::Host(region), None) => Ok(Lease::Slot(unit, region)),
            _ => Err(Error::internal("a slot in the wrong memory")),
        }
    }

    /// The unit lies where it is computed with.
    fn is_here(&self, unit: UnitId) -> bool {
        match &self.residents[unit.index()] {
            Some(Resident::Device(_)) => true,
            Some(Resident::Host(_)) => self.gpu.is_none(),
            None => false,
        }
    }

    /// The bytes of a leased unit, laid out as [`Pager::weights`] says.
    pub fn bytes<'a>(&'a self, lease: &'a Lease) -> Bytes<'a> {
        match lease {
            Lease::Slot(_, region) => Bytes::Host(region.bytes()),
            Lease::DeviceSlot(_, slot) => slot.bytes(),
            Lease::Resident(unit) => match &self.residents[unit.index()] {
                Some(Resident::Host(region)) => Bytes::Host(region.bytes()),
                Some(Resident::Device(slot)) => slot.bytes(),
                None => Bytes::Host(&[]),
            },
        }
    }

    pub fn weights(&self, unit: UnitId) -> &[SlotWeight] {
        match self.gpu {
            Some(_) => &self.shared.device[unit.index()].weights,
            None => &self.shared.layouts[unit.index()].weights,
        }
    }

    pub fn release(&mut self, lease: Lease) -> Result<()> {
        let (Lease::Resident(unit) | Lease::Slot(unit, _) | Lease::DeviceSlot(unit, _)) = &lease;
        self.note_on_host(Happening::Compute, *unit, self.handed_ns);
        match (lease, &self.gpu) {
            (Lease::Resident(unit), Some(gpu)) => gpu.leave(unit),
            (Lease::Resident(_), None) => Ok(()),
            (Lease::Slot(..), _) if planted::is(Bug::SlotFreedEarly) => Ok(()),
            (Lease::Slot(_, region), _) => self.send_free(Space::Host(region)),
            (Lease::DeviceSlot(unit, mut slot), Some(gpu)) => {
                gpu.release(unit, &mut slot)?;
                self.send_free(Space::Device(slot))
            }
            (Lease::DeviceSlot(..), None) => Err(Error::internal("a slot in the wrong memory")),
        }
    }

    /// Where events are kept, if anywhere.
    pub fn trace(&self) -> Option<&Trace> {
        self.trace.as_deref()
    }

    /// The trace's clock; 0 without a trace.
    pub(super) fn now_ns(&self) -> u64 {
        self.trace.as_ref().map_or(0, |t| t.now_ns())
    }

    /// As [`Pager::note`]. What a GPU does is told by its own clock when the pass has ended.
    fn note_on_host(&self, what: Happening, unit: UnitId, start_ns: u64) {
        if self.gpu.is_none() {
            self.note(what, Some(unit), start_ns, 0);
        }
    }

    /// Something that began at `start_ns` ends now.
    pub(super) fn note(&self, what: Happening, unit: Option<UnitId>, start_ns: u64, bytes: u64) {
        if let Some(trace) = &self.trace {
            trace.computing(TraceEvent {
                what,
                unit,
                start_ns,
                end_ns: trace.now_ns(),
                bytes,
            });
        }
    }

    /// The reading thread ended: its last word says why.
    pub(super) fn reader_error(&self) -> Error {
        let last = || {
            std::iter::from_fn(|| self.ready.try_recv().ok())
                .find_map(Result::err)
                .unwrap_or_else(|| Error::internal("the reading thread ended without a reason"))
        };
        self.failed.get_or_init(last).clone()
    }

    /// Keeps the thread's last word.
    fn heard(&self, message: Result<Filled>) -> Result<Filled> {
        message.map_err(|e| self.failed.get_or_init(|| e).clone())
    }

    fn wait_ready(&self) -> Result<Filled> {
        let started = Instant::now();
        loop {
            match self.ready.recv_timeout(Duration::from_millis(100)) {
                Ok(filled) => return self.heard(filled),
                Err(RecvTimeoutError::Disconnected) => return Err(self.reader_error()),
                Err(RecvTimeoutError::Timeout) => self.check_wait(started)?,
            }
        }
    }

    /// The reading thread notices a stalled drive itself; twice its limit without a word means that it is stuck.
    pub(super) fn check_wait(&self, started: Instant) -> Result<()> {
        if self.cancel.load(Relaxed) {
            return Err(Error::interrupted());
        }
        if started.elapsed() > self.stall_limit * 2 {
            return Err(Error::new(
                Code::Stalled,
                format!(
                    "no layer arrived for {:.0} s",
                    started.elapsed().as_secs_f64()
                ),
                format!("the {} reader gives no answer", self.reader_name),
                "check the drive (dmesg), or try --io threads",
            ));
        }
        Ok(())
    }

    fn send_free(&self, space: Space) -> Result<()> {
        match &self.free {
            Some(tx) if tx.send(space).is_ok() => Ok(()),
            _ => Err(self.reader_error()),
        }
    }

    fn send_schedule(&self, unit: UnitId) -> Result<()> {
        match &self.schedule {
            Some(tx) if tx.try_send(unit).is_ok() => Ok(()),
            Some(tx) if tx.is_full() => Err(Error::internal("the schedule runs too far ahead")),
            _ => Err(self.reader_error()),
        }
    }

    pub fn stats(&self) -> PagingStats {
        self.stats.add_counters(&self.shared.counters)
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// `io_uring`, `threads` or `mmap`: the reader in use.
    pub fn reader_name(&self) -> &'static str {
        self.reader_name
    }

    /// What the reader got from the kernel, in one line.
    pub fn reader_description(&self) -> &str {
        &self.reader
    }

    /// Whether every file is read with O_DIRECT.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Why copies to the GPU do not go straight from where they lie, where that is so.
    pub fn pin_note(&self) -> Option<&str> {
        self.gpu.as_ref()?.unpinned()
    }

    pub fn unit_name(&self, unit: UnitId) -> &str {
        &self.shared.names[unit.index()]
    }

    /// Element type and width of the embedding's rows.
    pub fn embed_shape(&self) -> (Dtype, usize) {
        (self.embed.dtype, self.embed.cols)
    }
}

impl Drop for Pager {
    /// Stops the thread (which drains its reads) before any memory a read may write to is given back.
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.schedule = None;
        self.free = None;
        self.gather_tx = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
#[path = "sim_tests.rs"]
mod sim;
