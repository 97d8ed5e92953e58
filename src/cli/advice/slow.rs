//! After a run that waited for the disk: what would be faster here, and by how much.

use super::folders::{self, Folder};
use super::{Advisor, Asked, LEAST_GAIN};
use crate::device::Device;
use crate::engine::{EngineOptions, EngineStats, Fitted};
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

/// What was seen of a run, and what the planner makes of it.
struct Measured<'a> {
    rates: MachineRates,
    /// Rows of a pass.
    rows: usize,
    /// As it ran, predicted.
    here: PassCost,
    asked: Asked<'a>,
    budget: u64,
    /// Tokens a second as it ran.
    today: f64,
}

impl Advisor {
    /// What would be faster; nothing where the run hardly waited for the disk, or on a GPU, whose bus is another matter.
    pub(in crate::cli) fn faster(&self, ran: &Ran<'_>) -> Vec<String> {
        let Some(m) = self.measured(ran) else {
            return Vec::new();
        };
        let mut said = Vec::new();
        said.extend(self.more_memory(&m));
        said.extend(self.half_the_bytes(ran, &m));
        match ran.work {
            Work::Answer => said.extend(self.in_a_batch(ran, &m)),
            Work::Queue(queue) => said.extend(self.more_places(&queue, &m)),
            Work::Full => {}
        }
        said.extend(self.another_disk(&m));
        said
    }

    fn measured(&self, ran: &Ran<'_>) -> Option<Measured<'_>> {
        let (report, during) = (ran.report, ran.during);
        let passes = report.passes.max(1) as f64;
        let pass_s = during.pass.as_secs_f64() / passes;
        let compute_s = report.compute_s / passes;
        let waited = report.stall_s / during.pass.as_secs_f64().max(1e-9);
        let disk = report
            .disk_gb_per_s
            .max(report.probed_disk_gb_per_s.unwrap_or(0.0));
        let nothing = matches!(ran.work, Work::Queue(queue) if queue.tokens_per_s <= 0.0);
        let told = disk > 0.0 && compute_s > 0.0 && during.rows > 0 && !nothing;
        if !self.on_cpu() || waited < LEAST_WAIT || !told {
            return None;
        }
        let weights: u64 = self.weights.sizes.iter().map(|u| u.read_bytes).sum();
        let rows = (during.rows as f64 / passes).round().max(1.0) as usize;
        // This run's own rates.
        let rates = MachineRates {
            disk_gb_per_s: disk,
            h2d_gb_per_s: None,
            compute: ComputeRates {
                memory_gb_per_s: weights as f64 / compute_s / 1e9,
                gflops: f64::MAX,
                element_bytes: self.weights.dtype.bytes() as f64,
                points: Vec::new(),
            },
        };
        let (asked, budget) = (self.asked(), self.budget());
        let now = self.fitted(&asked, budget).ok()?;
        Some(Measured {
            here: cost(&asked, &now, &rates, rows),
            rates,
            rows,
            asked,
            budget,
            today: match ran.work {
                Work::Queue(queue) => queue.tokens_per_s,
                _ => rows as f64 / pass_s,
            },
        })
    }

    fn more_memory(&self, m: &Measured<'_>) -> Option<String> {
        let free = self.host.default_budget();
        if free <= m.budget {
            return None;
        }
        let more = self.fitted(&m.asked, free).ok()?;
        let there = cost(&m.asked, &more, &m.rates, m.rows);
        let gained = m.gained(there.pass_s, 1.0)?;
        Some(format!(
            "--cpu-memory {} (free now) would read {} a pass instead of {}: {gained}",
            flag_size(free),
            human_bytes(there.disk_bytes),
            human_bytes(m.here.disk_bytes),
        ))
    }

    /// float32 weights in 16 bits. What products of those take is used where it was measured; else they are taken to be no faster.
    fn half_the_bytes(&self, ran: &Ran<'_>, m: &Measured<'_>) -> Option<String> {
        let half = self.half.as_ref()?;
        let asked = Asked {
            weights: half,
            ..self.asked()
        };
        let fitted = self.fitted(&asked, m.budget).ok()?;
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
        let there = cost(&asked, &fitted, &rates, m.rows);
        let gained = m.gained(there.pass_s, 1.0)?;
        Some(format!(
            "{} would read {} a pass instead of {}: {gained}",
            self.in_half(half),
            human_bytes(there.disk_bytes),
            human_bytes(m.here.disk_bytes),
        ))
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
        let many = self.fitted(&asked, m.budget).ok()?;
        let tokens = BATCH as f64 / cost(&asked, &many, &rates, BATCH).pass_s;
        (tokens >= m.today * LEAST_GAIN).then(|| {
            format!(
                "{BATCH} prompts at once (`batch`) would give about {tokens:.2} tokens/s in all"
            )
        })
    }

    /// More rows a pass, where more wait. They are taken to compute in proportion, which they never exceed.
    fn more_places(&self, queue: &Queue, m: &Measured<'_>) -> Option<String> {
        let now = self.options.max_sequences;
        let ways = [2, 4, 8, 16].into_iter().filter_map(|times: usize| {
            let sequences = now * times;
            if sequences as u64 > queue.rows {
                return None;
            }
            let kv_tokens = self.options.kv_tokens.map(|t| t * times);
            // Without --kv-memory a job gives them at most half.
            if queue.kv_bytes.is_none() && self.kv_bytes(kv_tokens.unwrap_or(0)) > m.budget / 2 {
                return None;
            }
            let asked = self.with(EngineOptions {
                max_sequences: sequences,
                logits_rows: sequences,
                kv_tokens,
                ..self.options.clone()
            });
            let mut rates = m.rates.clone();
            rates.compute.memory_gb_per_s /= times as f64;
            let fitted = self.fitted(&asked, m.budget).ok()?;
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
        let now = self.fitted(&m.asked, m.budget).ok()?;
        m.gained(cost(&m.asked, &now, &rates, m.rows).pass_s, 1.0)
    }
}

impl Measured<'_> {
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
