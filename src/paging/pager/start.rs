//! How a pager comes to be: memory, the reading thread, the units that stay.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use super::{Pager, PagerOptions, Resident};
use crate::device::cuda::Compute;
use crate::error::{Code, Error, Result};
use crate::io::{self, Arena, Flights, OpenFile, ReaderKind};
use crate::paging::copies::{Copies, InMemory, Space};
use crate::paging::device_layout::DeviceLayout;
use crate::paging::gpu::GpuSide;
use crate::paging::origin::{Origin, unit_name};
use crate::paging::plan::{Plan, Tier};
use crate::paging::slot::SlotLayout;
use crate::paging::stats::{Counters, PagingStats};
use crate::paging::stream::{Gather, Ports, Shared, Stream};
use crate::paging::sync::{self, JoinHandle, bounded};
use crate::planted::{self, Bug};
use crate::spec::UnitKind;
use crate::store::Store;
use crate::units::{BLOCK_BYTES, UnitId};

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
            Some(compute) => Some(GpuSide::new(compute, &plan, &arena, units, options)?),
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
                let kind = self.shared.layouts[unit.index()].kind;
                let memory = InMemory {
                    pinned: self.plan.may_pin(unit, kind) && gpu.pin(&region, arena),
                    region: region.clone(),
                };
                let _ = self.shared.memory[unit.index()].set(memory);
                Ok(Resident::Host(region))
            }
            (Space::Device(slot), Some(gpu)) => Ok(Resident::Device(gpu.keep(slot)?)),
            (Space::Device(_), None) => Err(Error::internal("a slot on a GPU nobody asked for")),
        }
    }
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
    // Maps go through the page cache however the files were opened.
    let direct = direct && name != ReaderKind::Mmap.name();
    Ok((thread, reader, name, direct))
}
