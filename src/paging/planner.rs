//! The planner behind `--device-map auto`: exact over counts of units of each size.
//!
//! A dense model is a cyclic scan: evicting by recency hits nothing, a fixed resident set hits exactly its share. Which
//! units of one size are resident does not change the bytes, so the search goes over *how many* of each size, and the
//! chosen ones are then spread over the pass: the disk works while residents compute, and two slots suffice.

use std::cmp::Ordering;

use super::plan::{Tier, is_streamed};
use super::strategy::{Problem, Strategy};
use crate::device::cuda::Slot;
use crate::error::Result;
use crate::spec::UnitKind;
use crate::units::BLOCK_BYTES;

/// The pass as short as the budgets allow: on a GPU the bytes copied and read, elsewhere the bytes read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Planner;

/// Count vectors looked at before sizes are told apart more coarsely. Sizes of a model are few (layers, head blocks, the
/// last head block); only sources read in place have one of its own for every layer, and these differ by a block or two.
const MOST_VECTORS: u64 = 1 << 14;

impl Strategy for Planner {
    fn name(&self) -> &str {
        "auto"
    }

    fn place(&self, problem: &Problem<'_>) -> Result<Vec<Tier>> {
        Ok(place(problem))
    }
}

/// Units that count as equally large.
#[derive(Clone, Debug)]
struct Class {
    members: Vec<usize>,
    /// Of the largest member: a plan that fits with it fits with any.
    room: u64,
    read: u64,
}

fn place(problem: &Problem<'_>) -> Vec<Tier> {
    for tiers in everything(problem) {
        if problem.needs(&tiers).within(&problem.budget) {
            return tiers;
        }
    }
    let none = problem.all_on_disk();
    let shortest = [rows_in_memory(problem, &none), none.clone()]
        .into_iter()
        .filter_map(|base| fill(problem, base))
        .min_by(|a, b| {
            let cost = |tiers: &[Tier]| {
                let n = problem.needs(tiers);
                (
                    problem.transfer_seconds(&n),
                    n.streamed_bytes,
                    n.copied_bytes,
                )
            };
            cost(a).partial_cmp(&cost(b)).unwrap_or(Ordering::Equal)
        });
    let mut tiers = shortest.unwrap_or(none);
    keep_embedding(problem, &mut tiers);
    tiers
}

/// `base` with what takes the place of the room for gathered rows in memory: the embedding, or the head whose rows serve.
fn rows_in_memory(problem: &Problem<'_>, base: &[Tier]) -> Vec<Tier> {
    let by_head = problem.tied_head && problem.budget.gpu_bytes.is_none();
    let serves = |kind| match kind {
        UnitKind::Head(_) => by_head,
        UnitKind::Embed => !by_head,
        _ => false,
    };
    let units = problem.units.iter().zip(base);
    units
        .map(|(u, tier)| if serves(u.kind) { Tier::Cpu } else { *tier })
        .collect()
}

/// The best use of what `base` leaves of the budgets, moving only units it has on disk. `None`: not even `base` fits.
fn fill(problem: &Problem<'_>, base: Vec<Tier>) -> Option<Vec<Tier>> {
    let classes = classes(problem, &base);
    let (gpu, cpu) = match problem.budget.gpu_bytes {
        None => (vec![0; classes.len()], on_cpu(problem, &base, &classes)?),
        Some(room) => on_gpu(problem, &base, &classes, room)?,
    };
    let mut tiers = base;
    for (i, class) in classes.iter().enumerate() {
        spread(&class.members, gpu[i], Tier::Gpu, &mut tiers);
        let left: Vec<usize> = class
            .members
            .iter()
            .copied()
            .filter(|u| tiers[*u] == Tier::Disk)
            .collect();
        spread(&left, cpu[i], Tier::Cpu, &mut tiers);
    }
    Some(tiers)
}

/// The whole pass on the computing device: with the embedding in host memory, and without.
fn everything(problem: &Problem<'_>) -> [Vec<Tier>; 2] {
    let compute = match problem.budget.gpu_bytes {
        Some(_) => Tier::Gpu,
        None => Tier::Cpu,
    };
    let with = |embed: Tier| {
        problem
            .units
            .iter()
            .map(|u| match u.kind {
                // Rows of a head in host memory serve as the embedding's.
                UnitKind::Embed if problem.tied_head && compute == Tier::Cpu => Tier::Disk,
                UnitKind::Embed => embed,
                UnitKind::VisionEmbed | UnitKind::VisionBlock(_) | UnitKind::VisionMerger => {
                    Tier::Disk
                }
                _ => compute,
            })
            .collect()
    };
    [with(Tier::Cpu), with(Tier::Disk)]
}

/// The embedding is gathered, so it comes last: it is kept only in what no other unit can use.
fn keep_embedding(problem: &Problem<'_>, tiers: &mut [Tier]) {
    let embed = problem.units.iter().position(|u| u.kind == UnitKind::Embed);
    let of_use = !problem.tied_head || problem.budget.gpu_bytes.is_some();
    if let Some(embed) = embed.filter(|_| of_use) {
        tiers[embed] = Tier::Cpu;
        if !problem.needs(tiers).within(&problem.budget) {
            tiers[embed] = Tier::Disk;
        }
    }
}

/// Marks `count` of `units`, evenly spaced.
fn spread(units: &[usize], count: usize, tier: Tier, tiers: &mut [Tier]) {
    let n = units.len();
    for (i, unit) in units.iter().enumerate() {
        if (i + 1) * count / n > i * count / n {
            tiers[*unit] = tier;
        }
    }
}

/// Groups the units of the pass that `base` has on disk by size, the most numerous class last. Sizes within a quantum are one class; the quantum
/// grows until the search is small, and does not depend on the budget: more memory never makes a plan worse.
fn classes(problem: &Problem<'_>, base: &[Tier]) -> Vec<Class> {
    let largest = problem
        .units
        .iter()
        .map(|u| u.room_bytes)
        .max()
        .unwrap_or(1);
    let mut quantum = (largest / 512).max(BLOCK_BYTES);
    loop {
        let mut classes: Vec<(u64, Class)> = Vec::new();
        for (i, unit) in problem.units.iter().enumerate() {
            if !is_streamed(unit.kind) || base[i] != Tier::Disk {
                continue;
            }
            let key = unit.room_bytes.div_ceil(quantum);
            match classes.iter_mut().find(|(k, _)| *k == key) {
                Some((_, class)) => {
                    class.members.push(i);
                    class.room = class.room.max(unit.room_bytes);
                    class.read = class.read.max(unit.read_bytes);
                }
                None => classes.push((
                    key,
                    Class {
                        members: vec![i],
                        room: unit.room_bytes,
                        read: unit.read_bytes,
                    },
                )),
            }
        }
        let mut classes: Vec<Class> = classes.into_iter().map(|(_, c)| c).collect();
        classes.sort_by_key(|c| c.members.len());
        if vectors(&classes, problem.budget.gpu_bytes.is_some()) <= MOST_VECTORS
            || classes.len() <= 1
        {
            return classes;
        }
        quantum *= 2;
    }
}

/// Count vectors the search visits: the last class is solved directly.
fn vectors(classes: &[Class], gpu: bool) -> u64 {
    let mut product = 1u64;
    for (i, class) in classes.iter().enumerate() {
        let n = class.members.len() as u64 + 1;
        let last = i + 1 == classes.len();
        let ways = match (gpu, last) {
            (false, true) => 1,
            (false, false) | (true, true) => n,
            (true, false) => n * (n + 1) / 2,
        };
        product = product.saturating_mul(ways);
    }
    product
}

/// One bounded knapsack: how many of each class go into `room`, so that most bytes need not be read.
struct Knapsack<'a> {
    classes: &'a [Class],
    available: &'a [usize],
    room: u64,
    /// Slots for what stays outside; 0 where the slots lie elsewhere.
    slots: u64,
    counts: Vec<usize>,
    best: Option<(u64, Vec<usize>)>,
}

impl Knapsack<'_> {
    fn solve(mut self) -> Option<(u64, Vec<usize>)> {
        self.visit(0, 0, 0, 0);
        self.best
    }

    /// `used` bytes resident so far, `saved` bytes not read, `slot` the largest size left outside.
    fn visit(&mut self, at: usize, used: u64, saved: u64, slot: u64) {
        let Some(class) = self.classes.get(at) else {
            if used + self.slots * slot <= self.room
                && self.best.as_ref().is_none_or(|(b, _)| saved > *b)
            {
                self.best = Some((saved, self.counts.clone()));
            }
            return;
        };
        let (room, read, n) = (class.room, class.read, self.available[at]);
        let last = at + 1 == self.classes.len();
        let mut fits = n as u64;
        if used + room * n as u64 + self.slots * slot > self.room || last {
            // Some stay outside (or all go in, tried first below), so the slot holds this size too.
            let left = self.room.checked_sub(used + self.slots * slot.max(room));
            let partly = left.map(|l| (l / room.max(1)).min(n.saturating_sub(1) as u64));
            let all = used + room * n as u64 + self.slots * slot <= self.room;
            fits = match (all, partly) {
                (true, _) => n as u64,
                (false, Some(k)) => k,
                (false, None) => return,
            };
        }
        let from = if last { fits } else { 0 };
        for k in (from..=fits).rev() {
            self.counts[at] = k as usize;
            let outside = if k < n as u64 { slot.max(room) } else { slot };
            self.visit(at + 1, used + k * room, saved + k * read, outside);
        }
        self.counts[at] = 0;
    }
}

fn on_cpu(problem: &Problem<'_>, base: &[Tier], classes: &[Class]) -> Option<Vec<usize>> {
    let open: usize = classes.iter().map(|c| c.members.len()).sum();
    let available: Vec<usize> = classes.iter().map(|c| c.members.len()).collect();
    // What any partial plan takes besides: all but the slots.
    let none = problem.needs(base);
    let fixed = none.cpu_bytes - none.slots as u64 * none.slot_bytes;
    Knapsack {
        classes,
        available: &available,
        room: problem.budget.cpu_bytes.checked_sub(fixed)?,
        slots: (problem.depth + 1).min(open) as u64,
        counts: vec![0; classes.len()],
        best: None,
    }
    .solve()
    .map(|(_, counts)| counts)
}

/// Every count of GPU residents, and for each the best use of host memory. Shortest transfer first; then the fewest bytes
/// read, then the fewest copied.
fn on_gpu(
    problem: &Problem<'_>,
    base: &[Tier],
    classes: &[Class],
    room: u64,
) -> Option<(Vec<usize>, Vec<usize>)> {
    let open: usize = classes.iter().map(|c| c.members.len()).sum();
    let none = problem.needs(base);
    let search = GpuSearch {
        problem,
        classes,
        room: room.checked_sub(none.gpu_paged_bytes)?,
        slots: (problem.depth + 1).min(open) as u64,
        cpu_room: problem.budget.cpu_bytes.checked_sub(none.cpu_bytes)?,
        pass_bytes: none.streamed_bytes,
    };
    let mut counts = vec![0; classes.len()];
    let mut best = None;
    search.visit(0, 0, &mut counts, &mut best);
    best.map(|b: Best| (b.gpu, b.cpu))
}

struct GpuSearch<'a> {
    problem: &'a Problem<'a>,
    classes: &'a [Class],
    room: u64,
    slots: u64,
    cpu_room: u64,
    pass_bytes: u64,
}

struct Best {
    seconds: f64,
    disk: u64,
    copied: u64,
    gpu: Vec<usize>,
    cpu: Vec<usize>,
}

impl GpuSearch<'_> {
    fn visit(&self, at: usize, used: u64, counts: &mut [usize], best: &mut Option<Best>) {
        if let Some(class) = self.classes.get(at) {
            for k in 0..=class.members.len() {
                let used = used + k as u64 * Slot::device_bytes(class.room);
                if used > self.room {
                    break;
                }
                counts[at] = k;
                self.visit(at + 1, used, counts, best);
            }
            counts[at] = 0;
            return;
        }
        let outside = |i: usize| self.classes[i].members.len() - counts[i];
        let slot = (0..counts.len())
            .filter(|i| outside(*i) > 0)
            .map(|i| self.classes[i].room)
            .max()
            .unwrap_or(0);
        if used + self.slots * Slot::device_bytes(slot) > self.room {
            return;
        }
        let available: Vec<usize> = (0..counts.len()).map(outside).collect();
        let on_gpu: u64 = counts
            .iter()
            .zip(self.classes)
            .map(|(k, c)| *k as u64 * c.read)
            .sum();
        let copied = self.pass_bytes.saturating_sub(on_gpu);
        let in_ram = Knapsack {
            classes: self.classes,
            available: &available,
            room: self.cpu_room,
            slots: 0,
            counts: vec![0; counts.len()],
            best: None,
        }
        .solve();
        let (saved, cpu) = in_ram.unwrap_or_else(|| (0, vec![0; counts.len()]));
        let disk = copied.saturating_sub(saved);
        let rates = &self.problem.rates;
        let seconds = (disk as f64 / rates.disk_gb_per_s).max(copied as f64 / rates.h2d_gb_per_s);
        let better = best
            .as_ref()
            .is_none_or(|b| (seconds, disk, copied) < (b.seconds, b.disk, b.copied));
        if better {
            *best = Some(Best {
                seconds,
                disk,
                copied,
                gpu: counts.to_vec(),
                cpu,
            });
        }
    }
}

#[cfg(test)]
mod tests;
