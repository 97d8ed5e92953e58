//! Advice where it hurts: what to change and what that would bring, in this machine's numbers. The planner is asked again
//! with something changed; nothing here is a rule of thumb.

use std::path::Path;

use super::machine::Weights;
use crate::device::Device;
use crate::engine::{DeviceChoice, EngineOptions, EngineStats, Fitted, HostMemory, fit, kv_dtype};
use crate::error::{Code, Error, Result};
use crate::paging::{ComputeRates, KeptCompute, MachineRates, PassWork, UnitSize, predict};
use crate::report::summary::PagingReport;
use crate::spec::ModelSpec;
use crate::store::list_packs;
use crate::units::{Dtype, flag_size, human_bytes};

/// Advice for less than this is noise.
const LEAST_GAIN: f64 = 1.05;
/// Waiting for less than this share of the time is not slow.
const LEAST_WAIT: f64 = 0.2;
/// Sequences that `batch` is asked about.
const BATCH: usize = 8;

/// A model under the options it was opened with, ready to be asked what else would do.
pub(super) struct Advisor {
    spec: ModelSpec,
    dtype: Dtype,
    sizes: Vec<UnitSize>,
    options: EngineOptions,
    /// As it was before the engine took anything.
    host: HostMemory,
}

impl Advisor {
    pub(super) fn new(of: &Weights<'_>, options: &EngineOptions, host: HostMemory) -> Advisor {
        let page = options
            .page_bytes
            .unwrap_or(crate::engine::DEFAULT_PAGE_BYTES);
        Advisor {
            spec: of.spec.clone(),
            dtype: kv_dtype(of.units),
            sizes: of.sizes(page, false),
            options: options.clone(),
            host,
        }
    }

    fn on_cpu(&self) -> bool {
        matches!(self.options.device, DeviceChoice::Cpu)
    }

    /// That the options' own budget is enough for an engine on a CPU.
    pub(super) fn expect_room(&self) -> Result<()> {
        let budget = self.options.cpu_memory;
        let budget = budget.unwrap_or_else(|| self.host.default_budget());
        self.fitted(&self.options, budget)
            .map(|_| ())
            .map_err(|e| self.too_little(e))
    }

    fn fitted(&self, options: &EngineOptions, budget: u64) -> Result<Fitted> {
        let options = EngineOptions {
            cpu_memory: Some(budget),
            ..options.clone()
        };
        fit(&self.spec, self.dtype, &self.sizes, &options, &self.host)
    }

    /// The smallest budget that `options` can be run in, to a MiB.
    fn smallest(&self, options: &EngineOptions) -> Option<u64> {
        let (mut low, mut high) = (0u64, 1u64 << 44);
        self.fitted(options, high).ok()?;
        while high - low > 1 << 20 {
            let middle = low + (high - low) / 2;
            match self.fitted(options, middle) {
                Ok(_) => high = middle,
                Err(_) => low = middle,
            }
        }
        Some(high)
    }

    /// Where memory was too little: the budget that would do, whether this machine has it, and what takes less.
    pub(super) fn too_little(&self, error: Error) -> Error {
        // The GPU's memory is another budget, which its own errors speak of.
        if error.code() != Code::Memory || !self.on_cpu() {
            return error;
        }
        let Some(needed) = self.smallest(&self.options) else {
            return error;
        };
        let free = self.host.default_budget();
        // What the engine said stands: it knows to the page what it holds.
        let mut fix = match needed <= free {
            true => format!(
                "{}; this machine has {} for it",
                error.fix(),
                human_bytes(free)
            ),
            false => format!(
                "{}; this machine has {} for it: end other programs",
                error.fix(),
                human_bytes(free)
            ),
        };
        for (what, options) in self.smaller() {
            match self.smallest(&options) {
                Some(n) if (n as f64) * LEAST_GAIN < needed as f64 => {
                    fix += &format!("; with {what} {} are enough", flag_size(n));
                }
                _ => {}
            }
        }
        error.with_fix(fix)
    }

    /// What a user can ask less of.
    fn smaller(&self) -> Vec<(String, EngineOptions)> {
        let o = &self.options;
        let mut less = Vec::new();
        let context = o.context.min(self.spec.max_positions);
        for part in [2, 8] {
            if context / part >= 64 {
                let options = EngineOptions {
                    context: context / part,
                    kv_tokens: o.kv_tokens.map(|t| t / part),
                    ..o.clone()
                };
                less.push((format!("--context {}", context / part), options));
            }
        }
        if o.max_sequences > 1 {
            let half = o.max_sequences / 2;
            let options = EngineOptions {
                max_sequences: half,
                logits_rows: o.logits_rows.min(half),
                kv_tokens: o.kv_tokens.map(|t| t / 2),
                ..o.clone()
            };
            less.push((format!("{half} sequences at once"), options));
        }
        if o.vision.is_some() {
            let options = EngineOptions {
                vision: None,
                ..o.clone()
            };
            less.push(("no pictures".to_string(), options));
        }
        less
    }

    /// After a run that waited for the disk: what would be faster here, and by how much. `None` where nothing would, or
    /// where it hardly waited.
    pub(super) fn faster(
        &self,
        report: &PagingReport,
        during: &EngineStats,
        device: &Device,
    ) -> Option<String> {
        let pass_s = during.pass.as_secs_f64() / report.passes.max(1) as f64;
        let compute_s = report.compute_s / report.passes.max(1) as f64;
        let waited = report.stall_s / (during.pass.as_secs_f64()).max(1e-9);
        let disk = report
            .disk_gb_per_s
            .max(report.probed_disk_gb_per_s.unwrap_or(0.0));
        if !self.on_cpu()
            || waited < LEAST_WAIT
            || disk <= 0.0
            || compute_s <= 0.0
            || during.rows == 0
        {
            return None;
        }
        let budget = self
            .options
            .cpu_memory
            .unwrap_or_else(|| self.host.default_budget());
        let now = self.fitted(&self.options, budget).ok()?;
        let weights: u64 = self.sizes.iter().map(|u| u.read_bytes).sum();
        let rows = (during.rows as f64 / report.passes.max(1) as f64)
            .round()
            .max(1.0) as usize;
        // This run's own rates.
        let rates = MachineRates {
            disk_gb_per_s: disk,
            h2d_gb_per_s: None,
            compute: ComputeRates {
                memory_gb_per_s: weights as f64 / compute_s / 1e9,
                gflops: f64::MAX,
                element_bytes: self.dtype.bytes() as f64,
                points: Vec::new(),
            },
        };
        let cost = |fitted: &Fitted, rates: &MachineRates, rows: usize| {
            let work = PassWork {
                rows,
                wanted: rows,
                element_bytes: self.dtype.bytes() as f64,
                ..PassWork::default()
            };
            predict(&self.sizes, &fitted.plan, rates, &work)
        };
        let here = cost(&now, &rates, rows);
        let today = rows as f64 / pass_s;
        let mut said = Vec::new();
        let free = self.host.default_budget();
        if free > budget
            && let Ok(more) = self.fitted(&self.options, free)
        {
            let there = cost(&more, &rates, rows);
            let gain = here.pass_s / there.pass_s;
            if gain >= LEAST_GAIN {
                said.push(format!(
                    "--cpu-memory {} (free now) would read {} a pass instead of {}: about {:.2} tokens/s ({:+.0} %)",
                    flag_size(free),
                    human_bytes(there.disk_bytes),
                    human_bytes(here.disk_bytes),
                    today * gain,
                    100.0 * (gain - 1.0)
                ));
            }
        }
        // Many rows need arithmetic that this run did not show: only where it was measured before.
        if rows < BATCH
            && let Some(compute) = KeptCompute::of(device, self.dtype).known()
        {
            let options = EngineOptions {
                max_sequences: BATCH,
                logits_rows: BATCH,
                ..self.options.clone()
            };
            let rates = MachineRates {
                disk_gb_per_s: disk,
                h2d_gb_per_s: None,
                compute,
            };
            if let Ok(many) = self.fitted(&options, budget) {
                let there = cost(&many, &rates, BATCH);
                let tokens = BATCH as f64 / there.pass_s;
                if tokens >= today * LEAST_GAIN {
                    said.push(format!(
                        "{BATCH} prompts at once (`batch`) would give about {tokens:.2} tokens/s in all"
                    ));
                }
            }
        }
        (!said.is_empty()).then(|| format!("faster: {}", said.join("; ")))
    }
}

/// Where the disk is too small for a pack: what cleaning would give back, and what needs no pack.
pub(super) fn no_space(error: Error, offload_folder: &Path) -> Error {
    // A limit of the user's own is not the disk's: its error says what to raise.
    if error.code() != Code::Space || error.fix().contains("--offload-limit") {
        return error;
    }
    let stale: u64 = list_packs(offload_folder)
        .unwrap_or_default()
        .iter()
        .filter(|p| p.state.is_stale())
        .map(|p| p.bytes)
        .sum();
    let clean = match stale {
        0 => "nothing there is stale".to_string(),
        n => format!("`tensorpager clean --stale` would free {}", human_bytes(n)),
    };
    error.with_fix(format!(
        "{clean}; --in-place streams from the checkpoint and needs no space; or give an --offload-folder on another disk"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_space_says_what_cleaning_would_give_back() {
        let dir = tempfile::tempdir().unwrap();
        let error = || Error::new(Code::Space, "not enough", "x", "y");
        let none = no_space(error(), dir.path());
        assert!(none.fix().contains("nothing there is stale"), "{none}");
        // A pack whose manifest is cut off.
        let cut = dir.path().join("model--bf16");
        std::fs::create_dir(&cut).unwrap();
        std::fs::write(cut.join("layer.000.dat"), vec![0; 20_000]).unwrap();
        let manifest = r#"{"format": "tensorpager", "version": 1}"#;
        std::fs::write(cut.join("manifest.json"), manifest).unwrap();
        let some = no_space(error(), dir.path());
        // How much is the file system's to say: it counts whole blocks.
        assert!(some.fix().contains("clean --stale` would free 2"), "{some}");
        let limit = Error::new(Code::Space, "a", "b", "raise --offload-limit to 2 GB");
        assert_eq!(no_space(limit.clone(), dir.path()), limit);
        let other = Error::new(Code::Io, "a", "b", "c");
        assert_eq!(no_space(other.clone(), dir.path()), other);
    }
}
