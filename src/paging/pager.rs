//! The computing side: asks for units in the order of the pass and gives them back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::copies::{Copies, InMemory, Space};
use super::device_layout::DeviceLayout;
use super::gpu::GpuSide;
use super::origin::{EmbedAt, Origin, unit_name};
use super::plan::{Plan, Tier};
use super::slot::{SlotLayout, SlotWeight};
use super::stats::{Counters, PagingStats};
use super::stream::{Filled, Gather, Ports, Shared, Stream, VerifyWhen};
use super::sync::{self, JoinHandle, Receiver, RecvTimeoutError, Sender, bounded};
use super::trace::{Happening, Trace, TraceEvent};
use crate::device::cuda::{Compute, Slot};
use crate::device::{Bytes, Kv};
use crate::error::{Code, Error, Result};
use crate::io::{self, Arena, Flights, OpenFile, ReaderKind, Region};
use crate::planted::{self, Bug};
use crate::spec::UnitKind;
use crate::store::Store;
use crate::units::{BLOCK_BYTES, Dtype, UnitId};

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
    /// Allocates everything, starts the reading thread, loads the resident units and starts streaming the first pass.
    /// `loaded(bytes, of)` is called as residents arrive.
    pub fn start(
        store: &Store,
        layouts: Vec<SlotLayout>,
        plan: Plan,
        options: &PagerOptions,
        cancel: Arc<AtomicBool>,
        loaded: &mut dyn FnMut(u64, u64),
    ) -> Result<Pager> {
        let origin = Origin::of(store)?;
        Pager::start_from(&origin, layouts, plan, options, None, cancel, loaded)
    }

    /// As [`Pager::start`]; `compute`: the GPU that computes, where the plan is for one.
    pub fn start_from(
        origin: &Origin,
        layouts: Vec<SlotLayout>,
        plan: Plan,
        options: &PagerOptions,
        compute: Option<Compute>,
        cancel: Arc<AtomicBool>,
        loaded: &mut dyn FnMut(u64, u64),
    ) -> Result<Pager> {
        let arena = Arena::new(plan.arena_bytes())?;
        let exhausted = || Error::internal("the arena is smaller than its plan");
        let embed = origin.embed;
        let resident = |(_, _, unit): &&(usize, usize, UnitId)| plan.is_resident(*unit);
        let head_rows = origin.tied_head.iter().filter(resident).copied().collect();
        let shared = Arc::new(Shared {
            names: layouts.iter().map(|l| unit_name(l.kind)).collect(),
            file_bytes: origin.file_bytes.clone(),
            paths: origin.paths.clone(),
            checksums: origin.checksums.clone(),
            verify: options.verify,
            trace: options.trace.clone(),
            counters: Counters {
                copy_tail_ns: layouts.iter().map(|_| AtomicU64::new(0)).collect(),
                ..Counters::default()
            },
            device: match compute {
                Some(_) => layouts.iter().map(DeviceLayout::new).collect(),
                None => Vec::new(),
            },
            memory: layouts.iter().map(|_| OnceLock::new()).collect(),
            layouts,
        });
        let units = shared.layouts.len();
        let cycle: Vec<UnitId> = (0..units)
            .filter(|i| {
                let streams = plan.walk.streams(shared.layouts[*i].kind);
                let passes = plan.passes_by(UnitId(*i as u32));
                (passes || planted::is(Bug::ResidentsIgnored)) && streams
            })
            .map(|i| UnitId(i as u32))
            .collect();
        let is_head = |u: &UnitId| matches!(shared.layouts[u.index()].kind, UnitKind::Head(_));
        let tail = cycle.iter().position(is_head).unwrap_or(cycle.len());

        let gather = match plan.gather_bytes {
            0 => None,
            bytes => Some(Gather {
                file: embed.file,
                blocks: Vec::with_capacity((bytes / BLOCK_BYTES) as usize),
                region: arena.take(bytes).ok_or_else(exhausted)?,
            }),
        };
        let mut gpu = match compute {
            None => None,
            Some(compute) => Some(GpuSide::new(
                compute,
                &plan,
                &arena,
                units,
                options.trace.as_ref(),
            )?),
        };
        let (schedule, schedule_rx) = bounded(3 * units + 4);
        let (free, free_rx) = bounded(units + plan.slots + 1);
        let (ready_tx, ready) = bounded(units + plan.slots + 2);
        let (gather_tx, gather_rx) = bounded(1);
        let (gathered_tx, gathered) = bounded(1);
        let stop = Arc::new(AtomicBool::new(false));
        let ports = Ports {
            schedule: schedule_rx,
            free: free_rx,
            ready: ready_tx,
            gather: gather_rx,
            gathered: gathered_tx,
            stop: stop.clone(),
        };
        let (thread, reader, reader_name, direct) = spawn(
            shared.clone(),
            ports,
            &arena,
            options,
            plan.slots.max(units),
            gpu.as_mut().and_then(|g| g.copies.take()),
        )?;
        let mut pager = Pager {
            residents: (0..units).map(|_| None).collect(),
            cycle,
            tail,
            due: 0,
            taken: 0,
            head_rows,
            embed,
            gather,
            order: Vec::new(),
            schedule: Some(schedule),
            free: Some(free),
            ready,
            gather_tx: Some(gather_tx),
            gathered,
            stop,
            cancel,
            thread: Some(thread),
            stats: PagingStats::default(),
            stall_limit: options.stall_limit,
            reader,
            reader_name,
            direct,
            failed: OnceLock::new(),
            trace: options.trace.clone(),
            handed_ns: 0,
            gpu,
            shared,
            plan,
        };
        pager.load_residents(&arena, loaded)?;
        for _ in 0..pager.plan.slots {
            let bytes = pager.plan.slot_bytes;
            let slot = match &pager.gpu {
                Some(gpu) => Space::Device(gpu.slot(bytes)?),
                None => Space::Host(arena.take(bytes).ok_or_else(exhausted)?),
            };
            pager.send_free(slot)?;
        }
        pager.send_cycle(0..pager.tail)?;
        Ok(pager)
    }

    /// Resident units go through the same reader and the same verification; their regions simply never become free.
    fn load_residents(&mut self, arena: &Arena, loaded: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let wanted: Vec<UnitId> = (0..self.shared.layouts.len())
            .map(|i| UnitId(i as u32))
            .filter(|u| self.plan.tiers[u.index()] != Tier::Disk)
            .collect();
        let total: u64 = wanted
            .iter()
            .map(|u| self.shared.layouts[u.index()].read_bytes)
            .sum();
        for &unit in &wanted {
            let tier = self.plan.tiers[unit.index()];
            let space = match &self.gpu {
                Some(gpu) if tier == Tier::Gpu => {
                    Space::Device(gpu.slot(self.shared.device[unit.index()].bytes)?)
                }
                _ => {
                    let bytes = self.shared.layouts[unit.index()].slot_bytes;
                    let exhausted = || Error::internal("the arena is smaller than its plan");
                    Space::Host(arena.take(bytes).ok_or_else(exhausted)?)
                }
            };
            self.send_free(space)?;
            self.send_schedule(unit)?;
        }
        let mut bytes = 0;
        for &unit in &wanted {
            let filled = self.wait_ready()?;
            if filled.unit != unit {
                return Err(Error::internal("residents arrived out of order"));
            }
            bytes += self.shared.layouts[unit.index()].read_bytes;
            let resident = self.settle(unit, filled.space, arena)?;
            self.residents[unit.index()] = Some(resident);
            loaded(bytes, total);
        }
        Ok(())
    }

    /// A unit that has arrived to stay.
    fn settle(&mut self, unit: UnitId, space: Space, arena: &Arena) -> Result<Resident> {
        match (space, &mut self.gpu) {
            (Space::Host(region), None) => Ok(Resident::Host(Arc::new(region))),
            (Space::Host(region), Some(gpu)) => {
                let region = Arc::new(region);
                let memory = InMemory {
                    pinned: gpu.pin(&region, arena),
                    region: region.clone(),
                };
                let _ = self.shared.memory[unit.index()].set(memory);
                Ok(Resident::Host(region))
            }
            (Space::Device(slot), Some(gpu)) => Ok(Resident::Device(gpu.keep(slot)?)),
            (Space::Device(_), None) => Err(Error::internal("a slot on a GPU nobody asked for")),
        }
    }

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
            return Err(interrupted());
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
        self.gpu.as_ref()?.unpinned.as_deref()
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

pub(crate) fn interrupted() -> Error {
    Error::interrupted()
}

/// Starts the reading thread; the reader is made on it, because an io_uring ring belongs to one thread.
fn spawn(
    shared: Arc<Shared>,
    ports: Ports,
    arena: &Arena,
    options: &PagerOptions,
    depth: usize,
    copies: Option<Copies>,
) -> Result<(JoinHandle, String, &'static str, bool)> {
    let files = shared
        .paths
        .iter()
        .map(|p| OpenFile::open(p, options.direct))
        .collect::<Result<Vec<OpenFile>>>()?;
    for (file, bytes) in files.iter().zip(&shared.file_bytes) {
        if file.bytes != *bytes {
            return Err(Error::new(
                Code::Corrupt,
                format!("{} has changed its length", file.path.display()),
                format!("{bytes} bytes were recorded, {} are there", file.bytes),
                "pack the model again",
            ));
        }
    }
    let direct = files.iter().all(OpenFile::direct);
    let paths = shared.paths.clone();
    let arena = arena.clone();
    let options = options.clone();
    let (told, hears) = bounded(1);
    let thread = sync::spawn("tp-reader", move || {
        let made = io::open_reader(options.reader, files, &arena, options.queue_depth);
        let reader = match made {
            Ok(reader) => match options.wrap {
                Some(wrap) => wrap(reader),
                None => reader,
            },
            Err(e) => {
                let _ = told.send(Err(e));
                return;
            }
        };
        let _ = told.send(Ok((reader.describe(), reader.name())));
        let flights = Flights::new(reader, paths, options.stall_limit);
        Stream::new(shared, ports, flights, depth, copies).run();
    })
    .map_err(|e| Error::io("the reading thread could not be started", &e))?;
    let (reader, name) = hears
        .recv()
        .map_err(|_| Error::internal("the reading thread ended before it began"))??;
    Ok((thread, reader, name, direct))
}

#[cfg(test)]
#[path = "sim_tests.rs"]
mod sim;
