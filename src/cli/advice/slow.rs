//! After a run that waited for the disk, or for copies to the GPU: what would be faster here, and by how much.

use super::folders::{self, Folder};
use super::{Advisor, Asked, LEAST_GAIN};
use crate::device::Device;
use crate::engine::{EngineOptions, EngineStats, Fitted, GpuRoom};
use crate::model::kv::{BLOCK_TOKENS, block_bytes};
use crate::paging::{ComputeRates, KeptCompute, MachineRates, PassCost, PassWork, predict};
use crate::report::summary::PagingReport;
use crate::units::{flag_size, human_bytes};

/// Waiting for less than this share of the time is not slow.
const LEAST_WAIT: f64 = 0.2;
/// Sequences that `batch` is asked about where a single one ran.
const BATCH: usize = 8;

/// What ran.
pub(in crate::cli) struct Ran<'a> {
    pub report: &'a PagingReport,
    pub during: &'a EngineStats,
    pub device: &'a Device,
    pub work: Work,
}

/// What of its queue could be otherwise.
#[derive(Clone, Copy, Debug)]
pub(in crate::cli) enum Work {
    /// One answer: more of them at once are another command.
    Answer,
    /// Passes are as full as they get.
    Full,
    /// Rows waited for a place.
    Queue(Queue),
}

/// A job's places.
#[derive(Clone, Copy, Debug)]
pub(in crate::cli) struct Queue {
    /// Sequences that the rows stand for.
    pub rows: u64,
    /// `--kv-memory` as it was given.
    pub kv_bytes: Option<u64>,
    /// Tokens given out a second.
    pub tokens_per_s: f64,
}

/// A line for stderr; none without advice.
pub(in crate::cli) fn told(advice: &[String]) -> Option<String> {
    (!advice.is_empty()).then(|| format!("faster: {}", advice.join("; ")))
}

/// The GPU that computed.
#[derive(Clone, Copy, Debug)]
struct Card {
    room: GpuRoom,
    /// How far its memory could be given to this process now.
    free: u64,
}

impl Card {
    fn of(device: &Device) -> Option<Card> {
        Some(Card {
            room: GpuRoom::of(device)?,
            free: device.as_cuda()?.free_limit().ok()?,
        })
    }
}

/// What was seen of a run, and what the planner makes of it.
struct Measured<'a> {
    rates: MachineRates,
    /// Rows of a pass.
    rows: usize,
    /// As it ran, predicted.
    here: PassCost,
    asked: Asked<'a>,
    budget: u64,
    card: Option<Card>,
    /// The part of the time that was spent waiting for the disk.
    waited_for_disk: f64,
    /// Tokens a second as it ran.
    today: f64,
}

impl Advisor {
    /// What would be faster; nothing where the run hardly waited for the disk or for copies.
    pub(in crate::cli) fn faster(&self, ran: &Ran<'_>) -> Vec<String> {
        self.faster_on(Card::of(ran.device), ran)
    }

    fn faster_on(&self, card: Option<Card>, ran: &Ran<'_>) -> Vec<String> {
        let Some(m) = self.measured(card, ran) else {
            return Vec::new();
        };
        let mut said = Vec::new();
        said.extend(self.more_gpu_memory(&m));
        said.extend(self.more_memory(&m));
        said.extend(self.half_the_bytes(ran, &m));
        match ran.work {
            Work::Answer => said.extend(self.in_a_batch(ran, &m)),
            Work::Queue(queue) => said.extend(self.more_places(ran, &queue, &m)),
            Work::Full => {}
        }
        if m.waited_for_disk >= LEAST_WAIT {
            said.extend(self.another_disk(&m));
        }
        said
    }

    fn measured(&self, card: Option<Card>, ran: &Ran<'_>) -> Option<Measured<'_>> {
        let (report, during) = (ran.report, ran.during);
        let passes = report.passes.max(1) as f64;
        let pass_s = during.pass.as_secs_f64() / passes;
        let compute_s = report.compute_s / passes;
        let share = |seconds: f64| seconds / during.pass.as_secs_f64().max(1e-9);
        let mut disk = report
            .disk_gb_per_s
            .max(report.probed_disk_gb_per_s.unwrap_or(0.0));
        let h2d = match report.h2d_gb_per_s > 0.0 {
            true => report.h2d_gb_per_s,
            false => report.probed_h2d_gb_per_s.unwrap_or(0.0),
        };
        if card.is_some() && disk == 0.0 {
            // Nothing came from there; where something would, this is what it was placed by.
            disk = self.options.rates.tiers().disk_gb_per_s;
        }
        let nothing = matches!(ran.work, Work::Queue(queue) if queue.tokens_per_s <= 0.0);
        let known = disk > 0.0 && (card.is_none() || h2d > 0.0);
        let told = known && compute_s > 0.0 && during.rows > 0 && !nothing;
        if self.on_cpu() != card.is_none() || share(report.stall_s) < LEAST_WAIT || !told {
            return None;
        }
        let weights: u64 = self.weights.sizes.iter().map(|u| u.read_bytes).sum();
        let rows = (during.rows as f64 / passes).round().max(1.0) as usize;
        // This run's own rates.
        let rates = MachineRates {
            disk_gb_per_s: disk,
            h2d_gb_per_s: card.map(|_| h2d),
            compute: ComputeRates {
                memory_gb_per_s: weights as f64 / compute_s / 1e9,
                gflops: f64::MAX,
                element_bytes: self.weights.dtype.bytes() as f64,
                points: Vec::new(),
            },
        };
        let (asked, budget) = (self.asked(), self.budget());
        let now = self.fitted_on(&asked, budget, card.map(|c| c.room)).ok()?;
        Some(Measured {
            here: cost(&asked, &now, &rates, rows),
            rates,
            rows,
            asked,
            budget,
            card,
            waited_for_disk: share(report.stall_disk_s),
            today: match ran.work {
                Work::Queue(queue) => queue.tokens_per_s,
                _ => rows as f64 / pass_s,
            },
        })
    }

    /// [`Advisor::fitted`] as it ran.
    fn fitted_as(&self, m: &Measured<'_>, asked: &Asked<'_>, budget: u64) -> Option<Fitted> {
        let room = m.card.map(|c| c.room);
        self.fitted_on(asked, budget, room).ok()
    }

    fn more_memory(&self, m: &Measured<'_>) -> Option<String> {
        let free = self.host.default_budget();
        if free <= m.budget {
            return None;
        }
        let more = self.fitted_as(m, &m.asked, free)?;
        let told = m.moved(&cost(&m.asked, &more, &m.rates, m.rows))?;
        Some(format!(
            "--cpu-memory {} (free now) {told}",
            flag_size(free)
        ))
    }

    fn more_gpu_memory(&self, m: &Measured<'_>) -> Option<String> {
        let Card { room, free } = m.card?;
        if free <= room.limit {
            return None;
        }
        let room = GpuRoom {
            limit: free,
            ..room
        };
        let more = self.fitted_on(&m.asked, m.budget, Some(room)).ok()?;
        let told = m.moved(&cost(&m.asked, &more, &m.rates, m.rows))?;
        Some(format!(
            "--gpu-memory {} (free now) {told}",
            flag_size(free)
        ))
    }

    /// float32 weights in 16 bits. What products of those take is used where it was measured; else they are taken to be no faster.
    fn half_the_bytes(&self, ran: &Ran<'_>, m: &Measured<'_>) -> Option<String> {
        let half = self.half.as_ref()?;
        let asked = Asked {
            weights: half,
            ..self.asked()
        };
        let fitted = self.fitted_as(m, &asked, m.budget)?;
        let known = KeptCompute::of(ran.device, half.dtype).known();
        let compute = known.unwrap_or_else(|| {
            let mut as_now = m.rates.compute.clone();
            as_now.memory_gb_per_s /= 2.0;
            as_now
        });
        let rates = MachineRates {
            compute,
            ..m.rates.clone()
        };
        let told = m.moved(&cost(&asked, &fitted, &rates, m.rows))?;
        Some(format!("{} {told}", self.in_half(half)))
    }

    /// Many rows need arithmetic that a run of one did not show: only where it was measured before.
    fn in_a_batch(&self, ran: &Ran<'_>, m: &Measured<'_>) -> Option<String> {
        if m.rows >= BATCH {
            return None;
        }
        let asked = self.with(EngineOptions {
            max_sequences: BATCH,
            logits_rows: BATCH,
            ..self.options.clone()
        });
        let rates = MachineRates {
            compute: KeptCompute::of(ran.device, self.weights.dtype).known()?,
            ..m.rates.clone()
        };
        let many = self.fitted_as(m, &asked, m.budget)?;
        let tokens = BATCH as f64 / cost(&asked, &many, &rates, BATCH).pass_s;
        (tokens >= m.today * LEAST_GAIN).then(|| {
            format!(
                "{BATCH} prompts at once (`batch`) would give about {tokens:.2} tokens/s in all"
            )
        })
    }

    /// More rows a pass, where more wait. How much longer these compute is known where products were measured before; else it is taken to be
    /// in proportion, which it never exceeds.
    fn more_places(&self, ran: &Ran<'_>, queue: &Queue, m: &Measured<'_>) -> Option<String> {
        let now = self.options.max_sequences;
        let kept = KeptCompute::of(ran.device, self.weights.dtype).known();
        // Keys and values lie on the GPU where there is one.
        let kv_room = m
            .card
            .map_or(m.budget, |c| c.room.limit - c.room.base.min(c.room.limit))
            / 2;
        let ways = [2, 4, 8, 16].into_iter().filter_map(|times: usize| {
            let sequences = now * times;
            if sequences as u64 > queue.rows {
                return None;
            }
            let kv_tokens = self.options.kv_tokens.map(|t| t * times);
            // Without --kv-memory a job gives them at most half.
            if queue.kv_bytes.is_none() && self.kv_bytes(kv_tokens.unwrap_or(0)) > kv_room {
                return None;
            }
            let asked = self.with(EngineOptions {
                max_sequences: sequences,
                logits_rows: sequences,
                kv_tokens,
                ..self.options.clone()
            });
            let mut rates = m.rates.clone();
            rates.compute.memory_gb_per_s /= longer(kept.as_ref(), m.rows, times);
            let fitted = self.fitted_as(m, &asked, m.budget)?;
            let there = cost(&asked, &fitted, &rates, m.rows * times);
            Some((sequences, times, there.pass_s / times as f64))
        });
        let (sequences, times, pass_s) = ways.min_by(|a, b| a.2.total_cmp(&b.2))?;
        let gained = m.gained(pass_s * times as f64, times as f64)?;
        let room = queue.kv_bytes.map_or(String::new(), |bytes| {
            format!(" --kv-memory {}", flag_size(bytes * times as u64))
        });
        Some(format!(
            "--max-sequences {sequences}{room} instead of {now} at once: {gained}"
        ))
    }

    fn kv_bytes(&self, tokens: usize) -> u64 {
        let s = &self.spec;
        let element_bytes = self.weights.dtype.bytes();
        let block = block_bytes(s.layers, s.kv_heads, s.head_size, element_bytes);
        tokens.div_ceil(BLOCK_TOKENS) as u64 * block
    }

    fn another_disk(&self, m: &Measured<'_>) -> Vec<String> {
        let needed = self.weights.sizes.iter().map(|u| u.read_bytes).sum();
        let others = folders::others(&self.dir, needed).into_iter();
        let others = others.filter(|f| !f.on_the_disk_of(&self.dir));
        others
            .filter_map(|f| self.disk_told(&f, f.known_rate(), m))
            .collect()
    }

    /// Only what is known of another disk is promised.
    fn disk_told(&self, folder: &Folder, rate: Option<f64>, m: &Measured<'_>) -> Option<String> {
        let Some(rate) = rate else {
            return Some(format!(
                "{} on another disk, whose rate is not known (`tensorpager doctor --offload-folder {}` measures it)",
                folder.told(),
                folder.path.display()
            ));
        };
        let gained = self.at_rate(rate, m)?;
        Some(format!(
            "{}, which was read at {rate:.2} GB/s: {gained}",
            folder.told()
        ))
    }

    /// What a disk of so many 10⁹ bytes a second would bring.
    fn at_rate(&self, disk_gb_per_s: f64, m: &Measured<'_>) -> Option<String> {
        let rates = MachineRates {
            disk_gb_per_s,
            ..m.rates.clone()
        };
        let now = self.fitted_as(m, &m.asked, m.budget)?;
        m.gained(cost(&m.asked, &now, &rates, m.rows).pass_s, 1.0)
    }
}

impl Measured<'_> {
    /// What passes would move instead of what they do, and what that is worth. `None` where it is not worth a word.
    fn moved(&self, there: &PassCost) -> Option<String> {
        let gained = self.gained(there.pass_s, 1.0)?;
        let mut told = Vec::new();
        if there.disk_bytes != self.here.disk_bytes {
            let [there, here] = [there, &self.here].map(|cost| human_bytes(cost.disk_bytes));
            told.push(format!("read {there} a pass instead of {here}"));
        }
        if there.copied_bytes != self.here.copied_bytes {
            let [there, here] = [there, &self.here].map(|cost| human_bytes(cost.copied_bytes));
            told.push(format!("copy {there} a pass to the GPU instead of {here}"));
        }
        (!told.is_empty()).then(|| format!("would {}: {gained}", told.join(" and ")))
    }

    /// Passes of `pass_s` with `times` as many rows, beside what was predicted for the run itself. `None` where it is not worth a word.
    fn gained(&self, pass_s: f64, times: f64) -> Option<String> {
        let gain = times * self.here.pass_s / pass_s;
        (gain >= LEAST_GAIN).then(|| {
            format!(
                "about {:.2} tokens/s ({:+.0} %)",
                self.today * gain,
                100.0 * (gain - 1.0)
            )
        })
    }
}

/// How much longer `times` as many rows compute: no less than `rows` do, and no more than in proportion.
fn longer(kept: Option<&ComputeRates>, rows: usize, times: usize) -> f64 {
    let most = times as f64;
    kept.map_or(most, |c| {
        let seconds = |rows| c.seconds(1 << 30, c.element_bytes, rows);
        (seconds(rows * times) / seconds(rows)).clamp(1.0, most)
    })
}

fn cost(asked: &Asked<'_>, fitted: &Fitted, rates: &MachineRates, rows: usize) -> PassCost {
    let element_bytes = asked.weights.dtype.bytes() as f64;
    let work = PassWork {
        rows,
        wanted: rows,
        element_bytes,
        ..PassWork::default()
    };
    predict(&asked.weights.sizes, &fitted.plan, rates, &work)
}

#[cfg(test)]
mod tests;
