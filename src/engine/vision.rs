//! The tower at work: pictures → embeddings, once a wave, between decoder passes.
//!
//! The tower has a pager of its own, over vision units only, opened for a wave and dropped with the tower's scratch before the decoder goes
//! on: decoder passes never touch a vision byte, and the decoder's read-ahead is not disturbed. What it takes while it runs is charged to the
//! budget from the start.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::open::{DEFAULT_PREFETCH_DEPTH, EngineOptions};
use super::pictures::{Pictures, text_only};
use super::source::{Paged, Watch};
use crate::device::{CudaDevice, Device, DeviceKind, Room};
use crate::error::{Code, Error, Result};
use crate::media::Visual;
use crate::model::pass::Embeddings;
use crate::model::vision::{Limits, Slice, Tower};
use crate::paging::{Origin, Pager, PagerOptions, Plan, SlotLayout, UnitSize, is_vision};
use crate::spec::{ModelSpec, UnitKind, VisionSpec};
use crate::store::Store;
use crate::units::{UnitId, human_bytes};

/// Pictures an engine has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VisionRoom {
    /// Patches that would like to go through the tower together. Fewer do where the budget is small.
    pub patches: usize,
    /// Patches of the largest image, or frame pair of a video.
    pub slice: usize,
    /// Tokens of embeddings kept at once: at least those of the largest prompt's pictures.
    pub tokens: usize,
    /// Host memory of pictures that are read while the engine runs; nothing where they were read before it was opened.
    pub pixel_bytes: u64,
}

impl VisionRoom {
    /// Room for all of these at once.
    pub fn for_all<'v>(visuals: impl Iterator<Item = &'v Visual>) -> VisionRoom {
        visuals.fold(VisionRoom::default(), |room, v| VisionRoom {
            patches: room.patches + v.grid.patches(),
            slice: room.slice.max(v.grid.slice()),
            tokens: room.tokens + v.tokens(),
            ..room
        })
    }
}

/// What looking at pictures cost so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct VisionStats {
    /// Times the tower was streamed.
    pub waves: u64,
    /// Images and videos that went through it (not those found again).
    pub pictures: u64,
    pub patches: u64,
    pub disk_bytes: u64,
    pub time: Duration,
    pub compute: Duration,
}

impl VisionStats {
    pub fn since(&self, earlier: &VisionStats) -> VisionStats {
        VisionStats {
            waves: self.waves - earlier.waves,
            pictures: self.pictures - earlier.pictures,
            patches: self.patches - earlier.patches,
            disk_bytes: self.disk_bytes - earlier.disk_bytes,
            time: self.time - earlier.time,
            compute: self.compute - earlier.compute,
        }
    }
}

/// What looking at pictures takes under a budget, before anything is allocated.
#[derive(Clone, Debug)]
pub struct VisionNeed {
    spec: VisionSpec,
    pub plan: Plan,
    /// Patches that go through the tower together, and those of the largest frame.
    pub limits: Limits,
    /// Tokens of embeddings kept at once.
    pub tokens: usize,
    /// Pictures that wait for the tower, bytes of pixels.
    pub pixel_bytes: u64,
    /// What the tower takes besides its pager.
    tower: Room,
}

impl VisionNeed {
    /// `None` where no pictures are asked for. `budget` decides how many patches go together.
    pub fn of(
        spec: &ModelSpec,
        units: &[UnitSize],
        options: &EngineOptions,
        kind: DeviceKind,
        budget: u64,
    ) -> Result<Option<VisionNeed>> {
        let depth = options.prefetch_depth.unwrap_or(DEFAULT_PREFETCH_DEPTH);
        let Some(room) = options.vision.filter(|r| r.patches > 0) else {
            return Ok(None);
        };
        let spec = spec.vision.clone().ok_or_else(text_only)?;
        let plan = match kind {
            DeviceKind::Cpu => Plan::vision(units, depth),
            DeviceKind::Cuda => Plan::vision_on_gpu(units, depth, options.frames()),
        };
        let mut limits = Limits {
            wave: room.patches.max(room.slice),
            slice: room.slice,
        };
        // A wave may take a quarter of the budget from the weights; below that, pictures go through in more pieces.
        let bytes = |l| match kind {
            DeviceKind::Cpu => plan.arena_bytes() + Tower::room(kind, &spec, l).host,
            DeviceKind::Cuda => plan.device_bytes() + Tower::room(kind, &spec, l).device,
        };
        while bytes(limits) > budget / 4 && limits.wave > limits.slice {
            limits.wave = (limits.wave / 2).max(limits.slice);
        }
        Ok(Some(VisionNeed {
            tokens: room.tokens,
            pixel_bytes: room.pixel_bytes,
            tower: Tower::room(kind, &spec, limits),
            spec,
            plan,
            limits,
        }))
    }

    /// Host memory the tower takes while it runs, the embeddings it leaves, and the pictures that wait for it.
    pub fn bytes(&self) -> u64 {
        self.plan.arena_bytes()
            + self.tower.host
            + (self.tokens * self.spec.out_hidden * 4) as u64
            + self.pixel_bytes
    }
}

impl VisionNeed {
    /// GPU memory the tower takes while it runs.
    pub fn device_bytes(&self) -> u64 {
        self.plan.device_bytes() + self.tower.device
    }
}

pub(super) struct Vision {
    spec: VisionSpec,
    out_hidden: usize,
    origin: Origin,
    layouts: Vec<SlotLayout>,
    plan: Plan,
    options: PagerOptions,
    units: Vec<(UnitId, UnitKind)>,
    limits: Limits,
    tokens: usize,
    /// Oldest first.
    cache: Vec<(u128, Arc<Embeddings>)>,
    pub stats: VisionStats,
}

impl Vision {
    pub fn new(
        store: &Store,
        layouts: &[SlotLayout],
        options: &PagerOptions,
        need: VisionNeed,
    ) -> Result<Vision> {
        Ok(Vision {
            out_hidden: need.spec.out_hidden,
            origin: Origin::of(store)?,
            layouts: layouts.to_vec(),
            options: PagerOptions {
                // A trace has one writer a side: those of the decoder's pager.
                trace: None,
                ..options.clone()
            },
            units: store.units.iter().map(|u| (u.id, u.kind)).collect(),
            tokens: need.tokens,
            cache: Vec::new(),
            stats: VisionStats::default(),
            spec: need.spec,
            plan: need.plan,
            limits: need.limits,
        })
    }

    /// Refuses pictures that could never be looked at here.
    pub fn check(&self, pictures: &Pictures) -> Result<()> {
        let tokens: usize = pictures.runs.iter().map(|r| r.visual.tokens()).sum();
        let slice = pictures.runs.iter().map(|r| r.visual.grid.slice()).max();
        if tokens > self.tokens || slice > Some(self.limits.slice) {
            return Err(Error::new(
                Code::Memory,
                format!("the pictures of a prompt take {tokens} tokens"),
                format!(
                    "this engine was opened with room for {} ({} of embeddings), and {} patches a frame",
                    self.tokens,
                    human_bytes((self.tokens * self.out_hidden * 4) as u64),
                    self.limits.slice
                ),
                "give fewer pictures or frames, or a smaller --max-pixels",
            ));
        }
        Ok(())
    }

    fn find(&self, hash: u128) -> Option<Arc<Embeddings>> {
        let found = self.cache.iter().find(|(h, _)| *h == hash);
        found.map(|(_, e)| e.clone())
    }

    /// Gives the runs the embeddings that are there already.
    pub fn fill(&self, pictures: &mut Pictures) {
        for run in &mut pictures.runs {
            if run.embeddings.is_none() {
                run.embeddings = self.find(run.visual.content_hash());
            }
        }
    }

    /// The visuals of as many of the prompts as there is room for, each once; empty where the first must wait until others are done.
    pub fn wave<'p>(&self, prompts: impl Iterator<Item = &'p [Arc<Visual>]>) -> Vec<Arc<Visual>> {
        let held: usize = self
            .cache
            .iter()
            .filter(|(_, e)| Arc::strong_count(e) > 1)
            .map(|(_, e)| e.rows())
            .sum();
        // Kept embeddings that nobody uses now are given up where room is short, unless this wave wants them.
        let mut wanted: HashMap<u128, usize> = HashMap::new();
        let mut wave = Vec::new();
        let mut tokens = held;
        for media in prompts {
            let mut new = Vec::new();
            let mut more = 0;
            for v in media {
                let hash = v.content_hash();
                let in_use = self.find(hash).is_some_and(|e| Arc::strong_count(&e) > 2);
                if in_use || wanted.contains_key(&hash) || new.iter().any(|(h, _)| *h == hash) {
                    continue;
                }
                more += v.tokens();
                new.push((hash, v.clone()));
            }
            if tokens + more > self.tokens {
                break;
            }
            tokens += more;
            for (hash, v) in new {
                wanted.insert(hash, v.tokens());
                wave.push(v);
            }
        }
        wave
    }

    /// Streams the tower over those of `wave` that are not kept yet, and keeps what comes out. `watch(units done, units)` after each unit,
    /// over all times that the tower is streamed.
    pub fn encode(
        &mut self,
        device: &Device,
        cancel: &Arc<AtomicBool>,
        wave: &[Arc<Visual>],
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let started = Instant::now();
        self.make_room(wave);
        let mut fresh: Vec<&Arc<Visual>> = Vec::new();
        for v in wave {
            let hash = v.content_hash();
            if self.find(hash).is_none() && fresh.iter().all(|f| f.content_hash() != hash) {
                fresh.push(v);
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let made = self.stream(device, cancel, &fresh, watch)?;
        for (visual, values) in fresh.iter().zip(made) {
            let embeddings = Embeddings {
                cols: self.out_hidden,
                values,
            };
            if embeddings.rows() != visual.tokens() {
                return Err(Error::internal("the tower gave another number of rows"));
            }
            self.cache
                .push((visual.content_hash(), Arc::new(embeddings)));
            self.stats.pictures += 1;
            self.stats.patches += visual.grid.patches() as u64;
        }
        self.stats.time += started.elapsed();
        Ok(())
    }

    /// Gives up kept embeddings, the oldest first, until the wave fits; never those in use or wanted.
    fn make_room(&mut self, wave: &[Arc<Visual>]) {
        let wants = |hash: u128| wave.iter().any(|v| v.content_hash() == hash);
        let new: usize = wave
            .iter()
            .filter(|v| self.find(v.content_hash()).is_none())
            .map(|v| v.tokens())
            .sum();
        let mut kept: usize = self.cache.iter().map(|(_, e)| e.rows()).sum();
        let room = self.tokens;
        self.cache.retain(|(hash, e)| {
            let keep = kept + new <= room || Arc::strong_count(e) > 1 || wants(*hash);
            if !keep {
                kept -= e.rows();
            }
            keep
        });
    }

    /// The embeddings of each visual, `[tokens, out hidden]`.
    fn stream(
        &mut self,
        device: &Device,
        cancel: &Arc<AtomicBool>,
        visuals: &[&Arc<Visual>],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        // (visual, slice of it) in order; slices are independent, so a piece may end anywhere between two.
        let all: Vec<(usize, usize)> = visuals
            .iter()
            .enumerate()
            .flat_map(|(i, v)| (0..v.grid.t).map(move |t| (i, t)))
            .collect();
        let slice_of = |(i, _): &(usize, usize)| Slice {
            h: visuals[*i].grid.h,
            w: visuals[*i].grid.w,
        };
        let mut pieces: Vec<(usize, usize)> = Vec::new();
        let mut rows = 0;
        for (k, part) in all.iter().enumerate() {
            let n = slice_of(part).patches();
            match pieces.last_mut() {
                Some(piece) if rows + n <= self.limits.wave => {
                    piece.1 = k + 1;
                    rows += n;
                }
                _ => {
                    pieces.push((k, k + 1));
                    rows = n;
                }
            }
        }
        let mut out: Vec<Vec<f32>> = visuals
            .iter()
            .map(|v| vec![0.0; v.tokens() * self.out_hidden])
            .collect();
        let largest = pieces
            .iter()
            .map(|(a, b)| all[*a..*b].iter().map(|p| slice_of(p).patches()).sum());
        let limits = Limits {
            wave: largest.max().unwrap_or(0),
            slice: all.iter().map(|p| slice_of(p).patches()).max().unwrap_or(0),
        };
        let mut tower = Tower::new(device, &self.spec, &self.units, limits)?;
        let mut pager = Pager::start_from(
            &self.origin,
            self.layouts.clone(),
            self.plan.clone(),
            &self.options,
            device.as_cuda().map(CudaDevice::compute),
            cancel.clone(),
            &mut |_, _| {},
        )?;
        let units = self
            .units
            .iter()
            .filter(|(_, kind)| is_vision(*kind))
            .count();
        for (n, (from, to)) in pieces.iter().enumerate() {
            if n + 1 < pieces.len() {
                pager.begin_pass(false)?;
            }
            let parts = &all[*from..*to];
            let slices: Vec<Slice> = parts.iter().map(slice_of).collect();
            let width = self.out_hidden;
            let mut watch = |done, _| watch(n * units + done, pieces.len() * units);
            tower.run(
                device,
                &mut Paged::watched(&mut pager, units, &mut watch, None),
                &slices,
                &mut |slice, first, rows| {
                    let (visual, t) = parts[slice];
                    let visual = visuals[visual];
                    visual.write_patches(t * visual.grid.slice() + first, rows);
                },
                &mut |slice, rows| {
                    let (visual, t) = parts[slice];
                    out[visual][t * rows.len()..][..rows.len()].copy_from_slice(rows);
                    debug_assert_eq!(rows.len() % width, 0);
                    Ok(())
                },
            )?;
            self.stats.waves += 1;
        }
        self.stats.compute += tower.computed();
        self.stats.disk_bytes += pager.stats().disk_bytes;
        Ok(out)
    }
}
