//! Which units rest in host memory and which come from disk each pass, under a budget.
//!
//! [`Plan`] is what the pager follows; who decided is a [`Strategy`], the [`Planner`] unless somebody says otherwise.

use std::sync::Arc;

use super::planner::Planner;
use super::slot::SlotLayout;
use super::strategy::{Budget, Needs, Problem, Strategy, TierRates, UnitSize};
use crate::device::cuda::Slot;
use crate::error::{Code, Error, Result};
use crate::spec::UnitKind;
use crate::units::{ALIGN_BYTES, UnitId, flag_size, human_bytes};

/// Where a unit rests between passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// The GPU's memory, loaded once.
    Gpu,
    /// Host memory, loaded once.
    Cpu,
    /// Disk: streamed every pass (or gathered row by row, for the embedding).
    Disk,
}

impl Tier {
    /// As device maps and reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::Gpu => "gpu",
            Tier::Cpu => "cpu",
            Tier::Disk => "disk",
        }
    }
}

/// What the user asked of the placement.
#[derive(Clone, Default)]
pub enum Placement {
    /// The [`Planner`]'s: as few bytes a pass as the budget allows.
    #[default]
    Auto,
    /// Every unit in host memory.
    Cpu,
    /// Nothing resident but the final norm.
    Disk,
    /// A tier for each unit, from a device map file.
    Units(Vec<Tier>),
    /// The user's own.
    By(Arc<dyn Strategy>),
}

impl std::fmt::Debug for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Placement::Auto => f.write_str("auto"),
            Placement::Cpu => f.write_str("cpu"),
            Placement::Disk => f.write_str("disk"),
            Placement::Units(tiers) => f.debug_tuple("Units").field(tiers).finish(),
            Placement::By(strategy) => write!(f, "By({})", strategy.name()),
        }
    }
}

/// Embedding blocks fetched at once.
pub const GATHER_BLOCKS: usize = 64;

/// Where every unit rests on a machine whose CPU computes, and what that takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// By unit id.
    pub tiers: Vec<Tier>,
    /// Units that may run ahead of the one computing.
    pub depth: usize,
    pub slots: usize,
    pub slot_bytes: u64,
    /// Weights that stay in host memory.
    pub resident_bytes: u64,
    /// What a pass with logits computes with, wherever it rests (embedding rows apart).
    pub pass_bytes: u64,
    /// From disk each pass (embedding rows apart).
    pub streamed_bytes: u64,
    pub gather_bytes: u64,
    /// Which units its passes walk through.
    pub walk: Walk,
    /// Where a GPU computes: slots lie there.
    pub gpu: Option<GpuPart>,
    /// Units in host memory that are not pinned, so that they go to the GPU through the ring.
    pub unpinned: Vec<UnitId>,
}

/// What a plan for a GPU has besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuPart {
    /// Weights that stay on the GPU.
    pub resident_bytes: u64,
    /// What these take of its memory, which is given out in pages.
    pub paged_bytes: u64,
    /// From host memory to the GPU each pass.
    pub copied_bytes: u64,
    pub ring: Ring,
}

/// Frames of host memory through which all that comes from disk goes to the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    pub frames: usize,
    pub frame_bytes: u64,
}

/// What the ring takes at most where nobody says how many frames, however large the units are.
pub const RING_BYTES: u64 = 256 << 20;

/// What is asked of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    pub page_bytes: u64,
    /// `None`: as many as [`RING_BYTES`] hold.
    pub count: Option<usize>,
}

impl Ring {
    /// No more frames than two of the largest units have pages.
    pub fn new(units: &[UnitSize], asked: Frames) -> Ring {
        let largest = units.iter().map(|u| u.room_bytes).max().unwrap_or(0);
        Ring::of_largest(largest, asked)
    }

    /// As [`Ring::new`], for a largest unit of `largest` bytes.
    pub(super) fn of_largest(largest: u64, asked: Frames) -> Ring {
        let frame_bytes = asked.page_bytes.min(largest).max(ALIGN_BYTES);
        let of_use = 2 * largest.div_ceil(frame_bytes) + 2;
        let count = asked.count.map_or(RING_BYTES / frame_bytes, |n| n as u64);
        Ring {
            frames: count.clamp(2, of_use) as usize,
            frame_bytes,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.frames as u64 * self.frame_bytes
    }
}

/// What a pass is: through the decoder, or through the vision tower, which never meet in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    Decoder,
    Vision,
}

impl Walk {
    pub fn streams(self, kind: UnitKind) -> bool {
        match self {
            Walk::Decoder => is_streamed(kind),
            Walk::Vision => is_vision(kind),
        }
    }
}

impl Plan {
    /// The vision tower, all of it from disk: slots for one unit and `depth` ahead of it.
    pub fn vision(units: &[UnitSize], depth: usize) -> Plan {
        let tower = || units.iter().filter(|u| is_vision(u.kind));
        let slots = (depth + 1).min(tower().count());
        let bytes = tower().map(|u| u.read_bytes).sum();
        Plan {
            tiers: vec![Tier::Disk; units.len()],
            depth: slots.saturating_sub(1),
            slots,
            slot_bytes: tower().map(|u| u.room_bytes).max().unwrap_or(0),
            resident_bytes: 0,
            pass_bytes: bytes,
            streamed_bytes: bytes,
            gather_bytes: 0,
            walk: Walk::Vision,
            gpu: None,
            unpinned: Vec::new(),
        }
    }

    /// Host memory the pager takes: slots (or the ring, where they lie on a GPU), residents, room for embedding rows.
    pub fn arena_bytes(&self) -> u64 {
        let slots = match self.gpu {
            None => self.slots as u64 * self.slot_bytes,
            Some(gpu) => gpu.ring.bytes(),
        };
        slots + self.resident_bytes + self.gather_bytes
    }

    /// GPU memory the pager takes.
    pub fn device_bytes(&self) -> u64 {
        self.gpu.map_or(0, |gpu| {
            self.slots as u64 * Slot::device_bytes(self.slot_bytes) + gpu.paged_bytes
        })
    }

    pub fn ring(&self) -> Ring {
        self.gpu.map(|g| g.ring).unwrap_or_default()
    }

    /// What is pinned of host memory: the ring, and units that are copied as they lie.
    pub fn pinned_bytes(&self, units: &[UnitSize]) -> u64 {
        let pinned = |(id, _): &(UnitId, u64)| !self.unpinned.contains(id);
        let units = self.copied_as_they_lie(units).filter(pinned);
        self.ring().bytes() + units.map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// Pins no more than `bytes`, the ring first, then units in their order. The ring is pinned whatever it takes.
    pub fn pin_within(&mut self, units: &[UnitSize], bytes: u64) {
        let mut left = bytes.saturating_sub(self.ring().bytes());
        let candidates = self.copied_as_they_lie(units);
        self.unpinned = candidates
            .filter_map(|(id, bytes)| match left.checked_sub(bytes) {
                Some(rest) => {
                    left = rest;
                    None
                }
                None => Some(id),
            })
            .collect();
    }

    /// A unit that rests in host memory beside a GPU is pinned there, if the system lets it.
    pub fn may_pin(&self, unit: UnitId, kind: UnitKind) -> bool {
        is_streamed(kind) && !self.unpinned.contains(&unit)
    }

    /// Units of the pass that rest in host memory beside a GPU, and what they take there. The embedding's rows are gathered by the host.
    fn copied_as_they_lie(&self, units: &[UnitSize]) -> impl Iterator<Item = (UnitId, u64)> {
        let on_gpu = self.gpu.is_some();
        let tiers = units.iter().zip(&self.tiers).zip(0u32..);
        tiers
            .filter(move |((u, tier), _)| on_gpu && **tier == Tier::Cpu && is_streamed(u.kind))
            .map(|((u, _), id)| (UnitId(id), u.room_bytes))
    }

    /// The unit goes through a slot in every pass.
    pub fn passes_by(&self, unit: UnitId) -> bool {
        match (self.tiers[unit.index()], self.gpu) {
            (Tier::Disk, _) | (Tier::Cpu, Some(_)) => true,
            (Tier::Cpu, None) | (Tier::Gpu, _) => false,
        }
    }

    /// The same tower on a GPU.
    pub fn vision_on_gpu(units: &[UnitSize], depth: usize, frames: Frames) -> Plan {
        let plan = Plan::vision(units, depth);
        let tower: Vec<UnitSize> = units
            .iter()
            .copied()
            .filter(|u| is_vision(u.kind))
            .collect();
        Plan {
            gpu: Some(GpuPart {
                resident_bytes: 0,
                paged_bytes: 0,
                copied_bytes: plan.streamed_bytes,
                ring: Ring::new(&tower, frames),
            }),
            ..plan
        }
    }

    /// As [`Plan::of_sizes`], where a GPU computes. The ring is paid from the host's part of the budget.
    pub fn on_gpu(
        units: &[UnitSize],
        budget: Budget,
        depth: usize,
        placement: &Placement,
        tied_head: bool,
        frames: Frames,
        rates: TierRates,
    ) -> Result<Plan> {
        let streamed: Vec<UnitSize> = units
            .iter()
            .copied()
            .filter(|u| !is_vision(u.kind))
            .collect();
        let ring = Ring::new(&streamed, frames);
        let gpu_bytes = budget.gpu_bytes.unwrap_or(0);
        let problem = Problem {
            units,
            budget: Budget {
                cpu_bytes: budget.cpu_bytes.saturating_sub(ring.bytes()),
                gpu_bytes: Some(gpu_bytes),
            },
            depth,
            tied_head,
            rates,
        };
        let mut tiers = match placement {
            Placement::Auto => Planner.place(&problem)?,
            Placement::Cpu => in_host_memory(units),
            Placement::Disk => problem.all_on_disk(),
            Placement::Units(tiers) => tiers.clone(),
            Placement::By(strategy) => strategy.place(&problem)?,
        };
        if tiers.len() != units.len() {
            return Err(Error::internal("a placement for another number of units"));
        }
        for (tier, unit) in tiers.iter_mut().zip(units) {
            *tier = match unit.kind {
                kind if is_vision(kind) => Tier::Disk,
                // A few kilobytes, in every pass.
                UnitKind::Norm => Tier::Gpu,
                // Its rows are gathered by the host.
                UnitKind::Embed if *tier == Tier::Gpu => Tier::Cpu,
                _ => *tier,
            };
        }
        let n = problem.needs(&tiers);
        let plan = Plan {
            gpu: Some(GpuPart {
                resident_bytes: n.gpu_resident_bytes,
                paged_bytes: n.gpu_paged_bytes,
                copied_bytes: n.copied_bytes,
                ring,
            }),
            ..Plan::decoder(tiers, &n)
        };
        if plan.device_bytes() > gpu_bytes {
            return Err(gpu_refusal(&plan, gpu_bytes));
        }
        if plan.arena_bytes() > budget.cpu_bytes {
            return Err(refusal(&plan, budget.cpu_bytes, placement));
        }
        Ok(plan)
    }

    /// `budget`: bytes the pager may take. `tied_head`: rows of a resident head serve as embedding rows.
    ///
    /// # Errors
    /// `Memory`: the placement does not fit; the cause gives the numbers, the fix what is missing. `Usage`: a strategy's
    /// answer that makes no sense on this machine.
    pub fn new(
        layouts: &[SlotLayout],
        budget: u64,
        depth: usize,
        placement: &Placement,
        tied_head: bool,
    ) -> Result<Plan> {
        let units: Vec<UnitSize> = layouts.iter().map(UnitSize::of).collect();
        Plan::of_sizes(&units, budget, depth, placement, tied_head)
    }

    /// [`Plan::new`] from sizes alone.
    pub fn of_sizes(
        units: &[UnitSize],
        budget: u64,
        depth: usize,
        placement: &Placement,
        tied_head: bool,
    ) -> Result<Plan> {
        let problem = Problem {
            units,
            budget: Budget {
                cpu_bytes: budget,
                gpu_bytes: None,
            },
            depth,
            tied_head,
            // Nothing is copied: the fewest bytes read are the shortest pass at any rate.
            rates: TierRates::default(),
        };
        let mut tiers = match placement {
            Placement::Auto => Planner.place(&problem)?,
            Placement::Cpu => all_resident(units, tied_head),
            Placement::Disk => problem.all_on_disk(),
            Placement::Units(tiers) => tiers.clone(),
            Placement::By(strategy) => strategy.place(&problem)?,
        };
        check_tiers(&tiers, units.len(), placement)?;
        // A decoder's passes never touch the tower, wherever a device map puts it.
        for (tier, _) in tiers
            .iter_mut()
            .zip(units)
            .filter(|(_, u)| is_vision(u.kind))
        {
            *tier = Tier::Disk;
        }
        let n = problem.needs(&tiers);
        let plan = Plan::decoder(tiers, &n);
        if n.cpu_bytes > budget {
            return Err(refusal(&plan, budget, placement));
        }
        Ok(plan)
    }

    /// A decoder's, on a CPU.
    fn decoder(tiers: Vec<Tier>, n: &Needs) -> Plan {
        Plan {
            tiers,
            depth: n.slots.saturating_sub(1),
            slots: n.slots,
            slot_bytes: n.slot_bytes,
            resident_bytes: n.cpu_resident_bytes,
            pass_bytes: n.pass_bytes,
            streamed_bytes: n.streamed_bytes,
            gather_bytes: n.gather_bytes,
            walk: Walk::Decoder,
            gpu: None,
            unpinned: Vec::new(),
        }
    }

    pub fn is_resident(&self, unit: UnitId) -> bool {
        self.tiers[unit.index()] == Tier::Cpu
    }
}

/// Units a decoder pass walks through. The embedding is gathered; the vision tower has passes of its own.
pub fn is_streamed(kind: UnitKind) -> bool {
    matches!(kind, UnitKind::Layer(_) | UnitKind::Head(_))
}

pub fn is_vision(kind: UnitKind) -> bool {
    matches!(
        kind,
        UnitKind::VisionEmbed | UnitKind::VisionBlock(_) | UnitKind::VisionMerger
    )
}

fn all_resident(units: &[UnitSize], tied_head: bool) -> Vec<Tier> {
    units
        .iter()
        .map(|u| match u.kind {
            // A resident tied head already holds every row.
            UnitKind::Embed if tied_head => Tier::Disk,
            kind if is_vision(kind) => Tier::Disk,
            _ => Tier::Cpu,
        })
        .collect()
}

fn check_tiers(tiers: &[Tier], units: usize, placement: &Placement) -> Result<()> {
    // A map is as long as the model; whoever wrote it knows which one it is.
    let name = match placement {
        Placement::Units(_) => "of units".to_string(),
        other => format!("{other:?}"),
    };
    let bad = |cause: String| {
        Error::new(
            Code::Usage,
            format!("the placement {name} cannot be followed"),
            cause,
            "give a tier of cpu or disk for every unit, or run with --device cuda",
        )
    };
    if tiers.len() != units {
        return Err(bad(format!(
            "it names {} units, the model has {units}",
            tiers.len()
        )));
    }
    match tiers.iter().position(|t| *t == Tier::Gpu) {
        Some(i) => Err(bad(format!(
            "it puts unit {i} on a GPU, and the CPU computes here"
        ))),
        None => Ok(()),
    }
}

/// All that passes walk through rests in host memory and is copied from there.
fn in_host_memory(units: &[UnitSize]) -> Vec<Tier> {
    units.iter().map(|_| Tier::Cpu).collect()
}

fn gpu_refusal(plan: &Plan, budget: u64) -> Error {
    Error::new(
        Code::Memory,
        "the weights asked for do not fit in the GPU memory given",
        format!(
            "slots and residents take {}; the budget leaves {}",
            human_bytes(plan.device_bytes()),
            human_bytes(budget)
        ),
        format!(
            "give --gpu-memory at least {} more",
            flag_size(plan.device_bytes().saturating_sub(budget))
        ),
    )
}

fn refusal(plan: &Plan, budget: u64, placement: &Placement) -> Error {
    let what = match placement {
        Placement::Auto | Placement::Disk => {
            format!("even the smallest plan ({} slots)", plan.slots)
        }
        Placement::By(strategy) => format!("what the strategy `{}` chose", strategy.name()),
        _ => "the placement asked for".to_string(),
    };
    Error::new(
        Code::Memory,
        format!("{what} does not fit in the memory given"),
        format!(
            "it takes {} for weights and slots; the budget leaves {}",
            human_bytes(plan.arena_bytes()),
            human_bytes(budget)
        ),
        format!(
            "give --cpu-memory at least {} more",
            flag_size(plan.arena_bytes().saturating_sub(budget))
        ),
    )
}

#[cfg(test)]
mod tests;
