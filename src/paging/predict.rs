//! What a pass will cost, from sizes and rates alone.
//!
//! The bound is the formula of the design: max(D / B_d, (D + R) / B_p, compute). The prediction walks the same schedule as
//! the pager does, unit by unit, with one disk, one bus and a fixed number of slots and frames, until the period of a pass is steady: it
//! sees the gaps that the bound cannot, such as a burst of residents while the disk has no free slot.

mod walk;

use serde::{Deserialize, Serialize};

use super::plan::{Plan, Tier, is_streamed};
use super::rates::sane_rate;
use super::strategy::UnitSize;
use crate::spec::UnitKind;
use crate::units::{BLOCK_BYTES, UnitId};
use walk::{Fill, Path, Step, period};

/// How long a product takes, by rows: measured points or two rates given by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComputeRates {
    /// Weights read by a product of one row, 10⁹ bytes a second.
    pub memory_gb_per_s: f64,
    /// 10⁹ floating point operations a second of a product of many rows (a multiply and an add are two).
    pub gflops: f64,
    /// Bytes per parameter of the weights measured with.
    pub element_bytes: f64,
    /// `(rows, nanoseconds per byte of weights)`, rows ascending. Empty where rates were given by hand.
    #[serde(default)]
    pub points: Vec<(usize, f64)>,
}

impl ComputeRates {
    /// Seconds that products of `rows` rows with `bytes` of weights take.
    pub fn seconds(&self, bytes: u64, element_bytes: f64, rows: usize) -> f64 {
        if rows == 0 {
            return 0.0;
        }
        let bytes = bytes as f64;
        let flops = 2.0 * rows as f64 * bytes / element_bytes;
        let by_rate = (bytes / (self.memory_gb_per_s * 1e9)).max(flops / (self.gflops * 1e9));
        let (Some(first), Some(last)) = (self.points.first(), self.points.last()) else {
            return by_rate;
        };
        let ns_per_byte = match self.points.iter().position(|(r, _)| *r >= rows) {
            Some(0) => first.1,
            Some(i) => {
                let ((r0, t0), (r1, t1)) = (self.points[i - 1], self.points[i]);
                t0 + (t1 - t0) * (rows - r0) as f64 / (r1 - r0) as f64
            }
            // Beyond the last point all is arithmetic.
            None => last.1 * rows as f64 / last.0 as f64,
        };
        bytes * ns_per_byte * 1e-9
    }

    /// A machine may have these: rows ascend, and every rate is one.
    pub(super) fn makes_sense(&self) -> bool {
        let rows = self.points.iter().map(|p| p.0);
        let ascending = rows.clone().zip(rows.skip(1)).all(|(a, b)| a < b);
        let timed = |(rows, ns): &(usize, f64)| (1..=1 << 20).contains(rows) && sane_rate(1.0 / ns);
        let rates = [self.memory_gb_per_s, self.gflops];
        let elements = (0.0..=16.0).contains(&self.element_bytes) && self.element_bytes > 0.0;
        elements && ascending && self.points.iter().all(timed) && rates.into_iter().all(sane_rate)
    }

    /// The same with what the layers of one row were seen to take, nanoseconds per byte of weights; more rows never take less. What memory
    /// gives stays as measured: keys and values are read at that.
    pub fn with_one_row(mut self, ns_per_byte: f64) -> ComputeRates {
        for (rows, ns) in &mut self.points {
            *ns = match rows {
                1 => ns_per_byte,
                _ => ns.max(ns_per_byte),
            };
        }
        self
    }
}

/// What a machine gives, measured or given by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineRates {
    pub disk_gb_per_s: f64,
    /// Host memory to the GPU that computes; `None` where the CPU does.
    #[serde(default)]
    pub h2d_gb_per_s: Option<f64>,
    pub compute: ComputeRates,
}

/// What one pass has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassWork {
    /// Tokens that go through the layers.
    pub rows: usize,
    /// Tokens whose logits are wanted: rows of the head's product.
    pub wanted: usize,
    /// Keys and values read, all layers together, bytes.
    pub kv_bytes: u64,
    /// Where they lie in host memory beside a GPU: what it gets of them, and what of new ones goes back. All layers together.
    pub kv_to_gpu_bytes: u64,
    pub kv_from_gpu_bytes: u64,
    /// Bytes per parameter of the weights.
    pub element_bytes: f64,
}

/// A pass as predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PassCost {
    pub pass_s: f64,
    /// max(disk, copy, compute): what no schedule can beat.
    pub bound_s: f64,
    /// The disk's part alone.
    pub disk_s: f64,
    /// That of copying to the GPU.
    pub copy_s: f64,
    pub compute_s: f64,
    /// From disk, embedding rows included.
    pub disk_bytes: u64,
    /// From host memory to the GPU, weights, keys and values.
    pub copied_bytes: u64,
    /// From the GPU to host memory.
    pub copied_back_bytes: u64,
}

/// The steady state of passes under `plan`.
pub fn predict(units: &[UnitSize], plan: &Plan, rates: &MachineRates, work: &PassWork) -> PassCost {
    let disk = |bytes: u64| bytes as f64 / (rates.disk_gb_per_s * 1e9);
    let copy = |bytes: u64| {
        rates
            .h2d_gb_per_s
            .map_or(0.0, |rate| bytes as f64 / (rate * 1e9))
    };
    let layers = units
        .iter()
        .filter(|u| matches!(u.kind, UnitKind::Layer(_)))
        .count();
    let of_layers = layers.max(1) as f64;
    let kv_s = work.kv_bytes as f64 / (rates.compute.memory_gb_per_s * 1e9 * of_layers);
    let kv_copy_s = copy(work.kv_to_gpu_bytes) / of_layers;
    let compute = |u: &UnitSize| match u.kind {
        UnitKind::Layer(_) => {
            rates
                .compute
                .seconds(u.read_bytes, work.element_bytes, work.rows)
                + kv_s
        }
        _ => rates
            .compute
            .seconds(u.read_bytes, work.element_bytes, work.wanted),
    };
    let mut copied_bytes = work.kv_to_gpu_bytes;
    let mut steps = Vec::new();
    for ((u, tier), id) in units.iter().zip(&plan.tiers).zip(0u32..) {
        if !is_streamed(u.kind) {
            continue;
        }
        let on_gpu = rates.h2d_gb_per_s.is_some();
        let fill = match tier {
            Tier::Disk => Some(disk(u.read_bytes)),
            Tier::Cpu if on_gpu => Some(0.0),
            Tier::Cpu | Tier::Gpu => None,
        };
        if fill.is_some() && on_gpu {
            copied_bytes += u.read_bytes;
        }
        steps.push(Step {
            fill: fill.map(|read| Fill {
                read,
                copy: copy(u.read_bytes),
                framed: match tier {
                    Tier::Disk if on_gpu => u.read_bytes,
                    // What the host takes to copy them into frames is not counted.
                    Tier::Cpu if plan.unpinned.contains(&UnitId(id)) => u.read_bytes,
                    _ => 0,
                },
            }),
            kv: match u.kind {
                UnitKind::Layer(_) => kv_copy_s,
                _ => 0.0,
            },
            compute: compute(u),
        });
    }
    // A row lies in one block or two; sequences rarely share one.
    let gathered = match plan.gather_bytes {
        0 => 0,
        _ => work.rows as u64 * BLOCK_BYTES,
    };
    let disk_bytes = plan.streamed_bytes + gathered;
    let compute_s: f64 = steps.iter().map(|s| s.compute).sum();
    // The two directions of the bus do not wait for one another.
    let copy_s = copy(copied_bytes).max(copy(work.kv_from_gpu_bytes));
    let disk_s = disk(disk_bytes);
    let path = Path {
        slots: plan.slots,
        ring: plan.gpu.map(|gpu| (gpu.ring.bytes(), gpu.ring.frame_bytes)),
    };
    PassCost {
        pass_s: period(&steps, &path, disk(gathered)),
        bound_s: disk_s.max(copy_s).max(compute_s),
        disk_s,
        copy_s,
        compute_s,
        disk_bytes,
        copied_bytes,
        copied_back_bytes: work.kv_from_gpu_bytes,
    }
}

/// Rows at which computing takes as long as the disk: from there on more tokens a pass are no longer free. `None` when
/// nothing is streamed, or more than `most` rows would be needed.
pub fn rows_that_hide_the_disk(
    units: &[UnitSize],
    plan: &Plan,
    rates: &MachineRates,
    element_bytes: f64,
    most: usize,
) -> Option<usize> {
    if plan.streamed_bytes == 0 {
        return None;
    }
    let hidden = |rows: usize| {
        let work = PassWork {
            rows,
            wanted: rows,
            element_bytes,
            ..PassWork::default()
        };
        let cost = predict(units, plan, rates, &work);
        cost.compute_s >= plan.streamed_bytes as f64 / (rates.disk_gb_per_s * 1e9)
    };
    if !hidden(most) {
        return None;
    }
    let (mut low, mut high) = (0, most);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match hidden(middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    Some(high)
}

/// How many of `queue` sequences to run at once: memory that holds their keys and values holds no weights. `at(n)` plans and
/// predicts `n` sequences; `None` where they do not fit. Gives the number with the most tokens a second and its pass.
pub fn best_concurrency<T>(
    queue: usize,
    at: &mut dyn FnMut(usize) -> Option<(PassCost, T)>,
) -> Option<(usize, PassCost, T)> {
    let mut tried: Vec<usize> = std::iter::successors(Some(1usize), |n| n.checked_mul(2))
        .take_while(|n| *n < queue)
        .chain([queue])
        .collect();
    tried.sort_unstable();
    let mut best: Option<(usize, PassCost, T)> = None;
    let consider = |n: usize,
                    best: &mut Option<(usize, PassCost, T)>,
                    at: &mut dyn FnMut(usize) -> Option<(PassCost, T)>| {
        let Some((cost, plan)) = at(n) else {
            return;
        };
        let rate = n as f64 / cost.pass_s.max(1e-12);
        // Equal but for rounding: the fewer, which leave weights the room.
        let beats = |m: usize, b: &PassCost| rate > m as f64 / b.pass_s.max(1e-12) * (1.0 + 1e-9);
        if best.as_ref().is_none_or(|(m, b, _)| beats(*m, b)) {
            *best = Some((n, cost, plan));
        }
    };
    for n in tried {
        consider(n, &mut best, at);
    }
    // Between the powers of two around the best: the throughput has one hump.
    let centre = best.as_ref()?.0;
    for eighth in [5, 6, 7, 9, 10, 11, 12, 13, 14, 15] {
        let n = centre * eighth / 8;
        if n > 0 && n < queue && n != centre {
            consider(n, &mut best, at);
        }
    }
    best
}

#[cfg(test)]
mod tests;
