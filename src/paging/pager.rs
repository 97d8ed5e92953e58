//! The computing side: asks for units in the order of the pass and gives them back.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::plan::{Plan, Tier};
use super::slot::{SlotLayout, SlotWeight, unit_name};
use super::stats::{Counters, PagingStats};
use super::stream::{Filled, Gather, Ports, Shared, Stream, VerifyWhen};
use super::sync::{self, JoinHandle, Receiver, RecvTimeoutError, Sender, bounded};
use super::trace::{Happening, Trace, TraceEvent};
use crate::error::{Code, Error, Result};
use crate::io::{self, Arena, Flights, OpenFile, ReaderKind, Region};
use crate::planted::{self, Bug};
use crate::spec::UnitKind;
use crate::store::{Checksums, Store};
use crate::units::{BLOCK_BYTES, Dtype, FileId, UnitId};

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
}

/// Where embedding rows lie.
#[derive(Clone, Copy)]
struct EmbedAt {
    file: FileId,
    offset: u64,
    rows: usize,
    cols: usize,
    dtype: Dtype,
    unit: UnitId,
}

/// What a pager needs to know of a store: enough to open another one later, without the store at hand. The store's lock must outlive it.
#[derive(Clone)]
pub struct Origin {
    paths: Vec<std::path::PathBuf>,
    file_bytes: Vec<u64>,
    checksums: Arc<Checksums>,
    embed: EmbedAt,
    /// First row and rows of each head unit where the head is tied.
    tied_head: Vec<(usize, usize, UnitId)>,
}

impl Origin {
    pub fn of(store: &Store) -> Result<Origin> {
        Ok(Origin {
            paths: store.files.iter().map(|f| f.path.clone()).collect(),
            file_bytes: store.files.iter().map(|f| f.bytes).collect(),
            checksums: store.checksums.clone(),
            embed: embed_at(store)?,
            tied_head: tied_head(store),
        })
    }
}

pub struct Pager {
    shared: Arc<Shared>,
    plan: Plan,
    residents: Vec<Option<Region>>,
    /// Units each decoder pass streams, in order.
    cycle: Vec<UnitId>,
    /// Units of the cycle that this pass has had.
    taken: usize,
    /// First row of each head unit that is resident, when the head is tied: `(first row, rows, unit)`.
    head_rows: Vec<(usize, usize, UnitId)>,
    embed: EmbedAt,
    gather: Option<Gather>,
    order: Vec<u32>,
    schedule: Option<Sender<UnitId>>,
    free: Option<Sender<Region>>,
    ready: Receiver<Result<Filled>>,
    gather_tx: Option<Sender<Gather>>,
    gathered: Receiver<Gather>,
    stop: Arc<AtomicBool>,
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle>,
    stats: PagingStats,
    stall_limit: Duration,
    reader: String,
    reader_name: &'static str,
    direct: bool,
    /// What ended the reading thread, for whoever asks again.
    failed: OnceLock<Error>,
    trace: Option<Arc<Trace>>,
    /// When the unit on loan was handed over, for the trace.
    handed_ns: u64,
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
        Pager::start_from(&Origin::of(store)?, layouts, plan, options, cancel, loaded)
    }

    /// As [`Pager::start`].
    pub fn start_from(
        origin: &Origin,
        layouts: Vec<SlotLayout>,
        plan: Plan,
        options: &PagerOptions,
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
            layouts,
            file_bytes: origin.file_bytes.clone(),
            paths: origin.paths.clone(),
            checksums: origin.checksums.clone(),
            verify: options.verify,
            trace: options.trace.clone(),
            counters: Counters::default(),
        });
        let units = shared.layouts.len();
        let cycle: Vec<UnitId> = (0..units)
            .filter(|i| plan.tiers[*i] == Tier::Disk || planted::is(Bug::ResidentsIgnored))
            .filter(|i| plan.walk.streams(shared.layouts[*i].kind))
            .map(|i| UnitId(i as u32))
            .collect();

        let gather = match plan.gather_bytes {
            0 => None,
            bytes => Some(Gather {
                file: embed.file,
                blocks: Vec::with_capacity((bytes / BLOCK_BYTES) as usize),
                region: arena.take(bytes).ok_or_else(exhausted)?,
            }),
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
        )?;
        let mut pager = Pager {
            residents: (0..units).map(|_| None).collect(),
            cycle,
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
            shared,
            plan,
        };
        pager.load_residents(&arena, loaded)?;
        for _ in 0..pager.plan.slots {
            let slot = arena.take(pager.plan.slot_bytes).ok_or_else(exhausted)?;
            pager.send_free(slot)?;
        }
        pager.schedule_pass()?;
        Ok(pager)
    }

    /// Resident units go through the same reader and the same verification; their regions simply never become free.
    fn load_residents(&mut self, arena: &Arena, loaded: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let wanted: Vec<UnitId> = (0..self.shared.layouts.len())
            .map(|i| UnitId(i as u32))
            .filter(|u| self.plan.is_resident(*u))
            .collect();
        let total: u64 = wanted
            .iter()
            .map(|u| self.shared.layouts[u.index()].read_bytes)
            .sum();
        for &unit in &wanted {
            let bytes = self.shared.layouts[unit.index()].slot_bytes;
            let region = arena
                .take(bytes)
                .ok_or_else(|| Error::internal("the arena is smaller than its plan"))?;
            self.send_free(region)?;
            self.send_schedule(unit)?;
        }
        let mut bytes = 0;
        for &unit in &wanted {
            let filled = self.wait_ready()?;
            if filled.unit != unit {
                return Err(Error::internal("residents arrived out of order"));
            }
            bytes += self.shared.layouts[unit.index()].read_bytes;
            self.residents[unit.index()] = Some(filled.region);
            loaded(bytes, total);
        }
        Ok(())
    }

    /// To be called as a pass begins: schedules the one after it, so that the stream never stops between the two. What a
    /// pass that failed left unread is passed over, so that this one begins at its beginning.
    pub fn begin_pass(&mut self) -> Result<()> {
        while self.stats.passes > 0 && self.taken < self.cycle.len() {
            let lease = self.acquire(self.cycle[self.taken])?;
            self.release(lease)?;
        }
        self.taken = 0;
        self.stats.passes += 1;
        let now = self.now_ns();
        self.note(Happening::Pass, None, now, 0);
        if self.stats.passes == 1 && planted::is(Bug::NoPrefetchAcrossPasses) {
            return Ok(());
        }
        self.schedule_pass()
    }

    fn schedule_pass(&mut self) -> Result<()> {
        for i in 0..self.cycle.len() {
            self.send_schedule(self.cycle[i])?;
        }
        Ok(())
    }

    /// Waits until `unit` is there. Streamed units must be asked for in the order of the schedule.
    pub fn acquire(&mut self, unit: UnitId) -> Result<Lease> {
        self.stats.units += 1;
        let ignored = planted::is(Bug::ResidentsIgnored) && self.cycle.contains(&unit);
        if self.residents[unit.index()].is_some() && !ignored {
            self.handed_ns = self.now_ns();
            return Ok(Lease::Resident(unit));
        }
        let filled = match self.ready.try_recv() {
            Ok(filled) => self.heard(filled)?,
            Err(_) => {
                let (started, from) = (Instant::now(), self.now_ns());
                let filled = self.wait_ready();
                self.stats.stall_disk += started.elapsed();
                self.note(Happening::Wait, Some(unit), from, 0);
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
        if planted::is(Bug::SlotFreedEarly) {
            self.send_free(filled.region.alias())?;
        }
        self.taken += 1;
        self.stats.used_bytes += self.shared.layouts[unit.index()].read_bytes;
        self.handed_ns = self.now_ns();
        Ok(Lease::Slot(unit, filled.region))
    }

    /// The bytes of a leased unit, laid out as [`Pager::weights`] says.
    pub fn bytes<'a>(&'a self, lease: &'a Lease) -> &'a [u8] {
        match lease {
            Lease::Slot(_, region) => region.bytes(),
            Lease::Resident(unit) => self.residents[unit.index()]
                .as_ref()
                .map_or(&[], |region| region.bytes()),
        }
    }

    pub fn weights(&self, unit: UnitId) -> &[SlotWeight] {
        &self.shared.layouts[unit.index()].weights
    }

    pub fn release(&mut self, lease: Lease) -> Result<()> {
        let (Lease::Resident(unit) | Lease::Slot(unit, _)) = &lease;
        self.note(Happening::Compute, Some(*unit), self.handed_ns, 0);
        match lease {
            Lease::Resident(_) => Ok(()),
            Lease::Slot(..) if planted::is(Bug::SlotFreedEarly) => Ok(()),
            Lease::Slot(_, region) => self.send_free(region),
        }
    }

    /// The trace's clock; 0 without a trace.
    fn now_ns(&self) -> u64 {
        self.trace.as_ref().map_or(0, |t| t.now_ns())
    }

    /// Something that began at `start_ns` ends now.
    fn note(&self, what: Happening, unit: Option<UnitId>, start_ns: u64, bytes: u64) {
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

    /// Calls `row(i, bytes)` once for each of `tokens` with that row of the embedding, in any order. Rows of a resident
    /// tied head are taken from there; others are gathered in whole verified blocks.
    pub fn gather(
        &mut self,
        tokens: &[u32],
        row: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let e = self.embed;
        let row_bytes = e.cols * e.dtype.bytes();
        self.order.clear();
        for (i, &token) in tokens.iter().enumerate() {
            if token as usize >= e.rows {
                return Err(Error::internal("a token id outside the embedding"));
            }
            match self.resident_row(token as usize, row_bytes) {
                Some(bytes) => row(i, bytes)?,
                None => self.order.push(i as u32),
            }
        }
        if self.order.is_empty() {
            return Ok(());
        }
        let mut order = std::mem::take(&mut self.order);
        order.sort_unstable_by_key(|i| tokens[*i as usize]);
        let result = self.gather_from_disk(&order, tokens, row_bytes, row);
        self.order = order;
        result
    }

    fn resident_row(&self, token: usize, row_bytes: usize) -> Option<&[u8]> {
        let (unit, index) = match self.residents[self.embed.unit.index()] {
            Some(_) => (self.embed.unit, token),
            None => {
                let i = self
                    .head_rows
                    .partition_point(|(first, _, _)| *first <= token)
                    .checked_sub(1)?;
                let (first, rows, unit) = self.head_rows[i];
                (token < first + rows).then_some((unit, token - first))?
            }
        };
        let weight = self.shared.layouts[unit.index()].weights.first()?;
        let at = weight.offset as usize + index * row_bytes;
        self.residents[unit.index()]
            .as_ref()?
            .bytes()
            .get(at..at + row_bytes)
    }

    fn gather_from_disk(
        &mut self,
        order: &[u32],
        tokens: &[u32],
        row_bytes: usize,
        row: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let e = self.embed;
        let start_of = |token: u32| e.offset + token as u64 * row_bytes as u64;
        let mut next = 0;
        while next < order.len() {
            let mut g = self
                .gather
                .take()
                .ok_or_else(|| Error::internal("no room was planned for embedding rows"))?;
            g.blocks.clear();
            g.region.rewind();
            let room = g.blocks.capacity();
            let first = next;
            while next < order.len() {
                let at = start_of(tokens[order[next] as usize]);
                // Rows come in ascending order, so a block is either the last one taken or new.
                let first_new = g.blocks.last().map_or(0, |last| last + 1);
                let fresh =
                    first_new.max(at / BLOCK_BYTES)..(at + row_bytes as u64).div_ceil(BLOCK_BYTES);
                if g.blocks.len() + fresh.clone().count() > room {
                    break;
                }
                g.blocks.extend(fresh);
                next += 1;
            }
            let bytes = self.gathered_bytes(&g);
            self.stats.used_bytes += bytes;
            self.stats.gathered_bytes += bytes;
            let from = self.now_ns();
            let g = self.fetch(g)?;
            self.note(Happening::Gather, None, from, bytes);
            for &i in &order[first..next] {
                let at = start_of(tokens[i as usize]);
                let k = g.blocks.partition_point(|b| *b < at / BLOCK_BYTES);
                let from = k * BLOCK_BYTES as usize + (at % BLOCK_BYTES) as usize;
                row(i as usize, &g.region.bytes()[from..from + row_bytes])?;
            }
            self.gather = Some(g);
        }
        Ok(())
    }

    /// Bytes of the blocks asked for; a file's last one is shorter.
    fn gathered_bytes(&self, g: &Gather) -> u64 {
        let file = self.shared.file_bytes[g.file.index()];
        g.blocks
            .iter()
            .map(|b| BLOCK_BYTES.min(file - b * BLOCK_BYTES))
            .sum()
    }

    fn fetch(&mut self, g: Gather) -> Result<Gather> {
        let started = Instant::now();
        let gone = || Error::internal("the reading thread is gone");
        let tx = self.gather_tx.as_ref().ok_or_else(gone)?;
        if tx.send(g).is_err() {
            return Err(self.reader_error());
        }
        let answer = loop {
            match self.gathered.recv_timeout(Duration::from_millis(100)) {
                Ok(g) => break Ok(g),
                Err(RecvTimeoutError::Disconnected) => break Err(self.reader_error()),
                Err(RecvTimeoutError::Timeout) => self.check_wait(started)?,
            }
        };
        self.stats.stall_disk += started.elapsed();
        answer
    }

    /// The reading thread ended: its last word says why.
    fn reader_error(&self) -> Error {
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
    fn check_wait(&self, started: Instant) -> Result<()> {
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

    fn send_free(&self, region: Region) -> Result<()> {
        match &self.free {
            Some(tx) if tx.send(region).is_ok() => Ok(()),
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
    Error::new(
        Code::Interrupted,
        "interrupted",
        "Ctrl-C, or a request to stop",
        "run the same command again",
    )
}

/// Starts the reading thread; the reader is made on it, because an io_uring ring belongs to one thread.
fn spawn(
    shared: Arc<Shared>,
    ports: Ports,
    arena: &Arena,
    options: &PagerOptions,
    depth: usize,
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
        Stream::new(shared, ports, flights, depth).run();
    })
    .map_err(|e| Error::io("the reading thread could not be started", &e))?;
    let (reader, name) = hears
        .recv()
        .map_err(|_| Error::internal("the reading thread ended before it began"))??;
    Ok((thread, reader, name, direct))
}

fn embed_at(store: &Store) -> Result<EmbedAt> {
    let unit = store
        .units
        .iter()
        .find(|u| u.kind == UnitKind::Embed)
        .ok_or_else(|| Error::internal("a store without an embedding"))?;
    let place = unit
        .places
        .first()
        .ok_or_else(|| Error::internal("an embedding without its tensor"))?;
    let extent = &unit.extents[place.extent];
    Ok(EmbedAt {
        file: extent.file,
        offset: extent.offset + place.offset,
        rows: place.rows,
        cols: place.cols,
        dtype: place.dtype,
        unit: unit.id,
    })
}

fn tied_head(store: &Store) -> Vec<(usize, usize, UnitId)> {
    if !store.spec.tied_head {
        return Vec::new();
    }
    let mut first = 0;
    let mut rows = Vec::new();
    for unit in &store.units {
        if let (UnitKind::Head(_), Some(place)) = (unit.kind, unit.places.first()) {
            rows.push((first, place.rows, unit.id));
            first += place.rows;
        }
    }
    rows
}

#[cfg(test)]
#[path = "sim_tests.rs"]
mod sim;
