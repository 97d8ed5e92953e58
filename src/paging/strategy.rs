//! What a placement is decided from, what it needs, and who decides: [`Strategy`], with the planner as one of them.

use std::sync::Arc;

use super::device_layout::DeviceLayout;
use super::plan::{GATHER_BLOCKS, Tier, is_streamed};
use super::slot::SlotLayout;
use crate::device::cuda::Slot;
use crate::error::Result;
use crate::spec::UnitKind;
use crate::units::{ALIGN_BYTES, BLOCK_BYTES, align_up};

/// A unit as the planner sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitSize {
    pub kind: UnitKind,
    /// Memory it takes where it rests, and in a slot: a multiple of [`ALIGN_BYTES`].
    pub room_bytes: u64,
    /// Bytes that come from disk when it is streamed.
    pub read_bytes: u64,
}

impl UnitSize {
    pub fn of(layout: &SlotLayout) -> UnitSize {
        UnitSize {
            kind: layout.kind,
            room_bytes: align_up(layout.slot_bytes, ALIGN_BYTES),
            read_bytes: layout.read_bytes,
        }
    }

    /// As it lies on a GPU, or in host memory to be copied from: the larger of the two.
    pub fn on_gpu(layout: &SlotLayout) -> UnitSize {
        let there = align_up(DeviceLayout::new(layout).bytes, ALIGN_BYTES);
        let here = UnitSize::of(layout);
        UnitSize {
            room_bytes: here.room_bytes.max(there),
            ..here
        }
    }

    /// What it takes of the GPU to stay there.
    pub fn device_bytes(&self) -> u64 {
        Slot::device_bytes(self.room_bytes)
    }
}

/// Memory left for weights and slots once KV, activations, frames and the process itself are paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub cpu_bytes: u64,
    /// Memory of the GPU; `None` where the CPU computes.
    pub gpu_bytes: Option<u64>,
}

/// Rates that decide between tiers where a GPU computes, 10⁹ bytes a second: a unit that fits on the GPU instead of two smaller ones may leave
/// host memory room for one of these, and then fewer bytes are read but more are copied. Computing takes the same wherever weights lie, and a CPU
/// copies nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TierRates {
    pub disk_gb_per_s: f64,
    /// Host memory to the GPU.
    pub h2d_gb_per_s: f64,
}

impl Default for TierRates {
    /// A Gen4 drive and a Gen4 ×16 slot: only their ratio matters to the planner.
    fn default() -> TierRates {
        TierRates {
            disk_gb_per_s: 5.0,
            h2d_gb_per_s: 22.0,
        }
    }
}

/// Everything a placement depends on.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// By unit id, in the order of the pass.
    pub units: &'a [UnitSize],
    pub budget: Budget,
    /// Units that may run ahead of the one computing.
    pub depth: usize,
    /// The head's rows are the embedding's.
    pub tied_head: bool,
    pub rates: TierRates,
}

/// What a placement takes and costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pub cpu_bytes: u64,
    pub gpu_bytes: u64,
    /// Weights that stay in host memory.
    pub cpu_resident_bytes: u64,
    /// Weights that stay on the GPU.
    pub gpu_resident_bytes: u64,
    /// What these take of its memory, which is given out in pages.
    pub gpu_paged_bytes: u64,
    /// What a pass with logits computes with, wherever it rests (embedding rows apart).
    pub pass_bytes: u64,
    /// From disk each pass (embedding rows apart).
    pub streamed_bytes: u64,
    /// From host memory to the GPU each pass.
    pub copied_bytes: u64,
    pub slots: usize,
    pub slot_bytes: u64,
    pub gather_bytes: u64,
}

impl Needs {
    pub fn within(&self, budget: &Budget) -> bool {
        self.cpu_bytes <= budget.cpu_bytes && self.gpu_bytes <= budget.gpu_bytes.unwrap_or(0)
    }
}

/// Decides where each unit rests. [`super::Planner`] is the one behind `--device-map auto`.
///
/// The answer is checked against the budget by whoever asked; a strategy that cannot place says why in its error.
pub trait Strategy: Send + Sync {
    /// As reports name it.
    fn name(&self) -> &str;

    /// A tier for each of `problem.units`.
    fn place(&self, problem: &Problem<'_>) -> Result<Vec<Tier>>;
}

impl<S: Strategy + ?Sized> Strategy for Arc<S> {
    fn name(&self) -> &str {
        (**self).name()
    }
    fn place(&self, problem: &Problem<'_>) -> Result<Vec<Tier>> {
        (**self).place(problem)
    }
}

impl Problem<'_> {
    /// What `tiers` takes. Slots lie where the computing is: in host memory, or on the GPU when there is one.
    pub fn needs(&self, tiers: &[Tier]) -> Needs {
        let on_gpu = self.budget.gpu_bytes.is_some();
        let mut n = Needs::default();
        let mut in_slots = 0usize;
        let mut gathers = false;
        for (unit, tier) in self.units.iter().zip(tiers) {
            let streamed = is_streamed(unit.kind);
            // Rows of a unit in host memory are copied from there; others are gathered from disk. A head whose rows serve
            // as the embedding's does so only where it need not share its place with a GPU's.
            let rows = match unit.kind {
                UnitKind::Embed => on_gpu || !self.tied_head,
                UnitKind::Head(_) => !on_gpu && self.tied_head,
                _ => false,
            };
            gathers |= rows && *tier != Tier::Cpu;
            if streamed || unit.kind == UnitKind::Norm {
                n.pass_bytes += unit.read_bytes;
            }
            match tier {
                Tier::Gpu => {
                    n.gpu_resident_bytes += unit.room_bytes;
                    n.gpu_paged_bytes += unit.device_bytes();
                }
                Tier::Cpu => n.cpu_resident_bytes += unit.room_bytes,
                Tier::Disk if streamed => n.streamed_bytes += unit.read_bytes,
                Tier::Disk => {}
            }
            if streamed && on_gpu && *tier != Tier::Gpu {
                n.copied_bytes += unit.read_bytes;
            }
            if streamed && (*tier == Tier::Disk || on_gpu && *tier == Tier::Cpu) {
                n.slot_bytes = n.slot_bytes.max(unit.room_bytes);
                in_slots += 1;
            }
        }
        n.slots = (self.depth + 1).min(in_slots);
        n.gather_bytes = match gathers {
            true => GATHER_BLOCKS as u64 * BLOCK_BYTES,
            false => 0,
        };
        n.cpu_bytes = n.cpu_resident_bytes + n.gather_bytes;
        n.gpu_bytes = n.gpu_paged_bytes;
        match on_gpu {
            true => n.gpu_bytes += n.slots as u64 * Slot::device_bytes(n.slot_bytes),
            false => n.cpu_bytes += n.slots as u64 * n.slot_bytes,
        }
        n
    }

    /// max(D / B_d, (D + R) / B_p): the part of a pass that placement decides, seconds.
    pub fn transfer_seconds(&self, needs: &Needs) -> f64 {
        let disk = needs.streamed_bytes as f64 / (self.rates.disk_gb_per_s * 1e9);
        let copy = needs.copied_bytes as f64 / (self.rates.h2d_gb_per_s * 1e9);
        disk.max(copy)
    }

    /// Nothing resident but the final norm, which lies where the computing is.
    pub fn all_on_disk(&self) -> Vec<Tier> {
        let compute = match self.budget.gpu_bytes {
            Some(_) => Tier::Gpu,
            None => Tier::Cpu,
        };
        self.units
            .iter()
            .map(|u| match u.kind {
                UnitKind::Norm => compute,
                _ => Tier::Disk,
            })
            .collect()
    }
}
