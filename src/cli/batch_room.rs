//! What a job may run at once under the user's options, one answer for `batch`, `batch --bench` and `batch-check`: KV room for as many sequences as give the
//! most tokens a second where the machine's rates are known, by a fixed rule where they are not. A row's tokens do not depend on it.

use clap::Args;

use super::machine::Weights;
use super::model::OpenFor;
use super::options::{MachineOptions, size};
use super::rates::pass_work;
use crate::engine::jobs::{KV_SHARES, RowSample, Sizing, SizingInput};
use crate::engine::{
    DEFAULT_PAGE_BYTES, DeviceChoice, EngineOptions, GpuRoom, HostMemory, KvPlace, fit_on,
    kv_dtype, open_device,
};
use crate::error::{Code, Error, Result};
use crate::paging::{KeptCompute, KnownRates, MachineRates, PassCost, UnitSize, predict};
use crate::spec::ModelSpec;
use crate::units::Dtype;

#[derive(Args, Clone, Copy, Debug)]
pub struct RoomOptions {
    /// Sequences that run at once [default: up to 256]
    #[arg(
        long,
        alias = "max-num-seqs",
        value_name = "N",
        env = "TENSORPAGER_MAX_SEQUENCES",
        help_heading = "Job"
    )]
    pub max_sequences: Option<usize>,
    /// Memory for keys and values: of a GPU, or of the host where that has no room for so much [default: by known rates, else what rows want up to half]
    #[arg(long, value_name = "SIZE", value_parser = size, env = "TENSORPAGER_KV_MEMORY", help_heading = "Job")]
    pub kv_memory: Option<u64>,
}

impl RoomOptions {
    pub fn check(&self) -> Result<()> {
        match self.max_sequences {
            Some(0) => Err(Error::new(
                Code::Usage,
                "--max-sequences 0 makes no sense",
                "nothing would ever run",
                "give 1 or more",
            )),
            _ => Ok(()),
        }
    }

    /// What a job of `rows` rows is sized by. `gpu`: bytes beside context and kernels, where one computes.
    pub fn input(
        &self,
        machine: &MachineOptions,
        gpu: Option<u64>,
        element_bytes: usize,
        rows: u64,
    ) -> Result<SizingInput> {
        Ok(SizingInput {
            sequences: self.max_sequences,
            kv_bytes: self.kv_memory,
            kv_share: 1,
            context: machine.context,
            budget: budget(machine)?,
            gpu,
            element_bytes,
            rows,
        })
    }
}

/// Host memory that a job may take.
pub(super) fn budget(machine: &MachineOptions) -> Result<u64> {
    let given = machine.cpu_budget()?;
    Ok(given.unwrap_or_else(|| HostMemory::read().default_budget()))
}

/// A machine whose rates are known, and the memory it has.
pub(super) struct KnownMachine {
    pub rates: MachineRates,
    /// What units are placed by.
    pub placed_by: KnownRates,
    pub host: HostMemory,
    pub gpu: Option<GpuRoom>,
}

impl KnownMachine {
    /// This one, by what is on record (runs and `plan` keep it). `None`: the disk's rate or that of computing is not.
    pub fn on_record(
        weights: &Weights<'_>,
        machine: &MachineOptions,
    ) -> Result<Option<KnownMachine>> {
        let known = weights.rates().known();
        let Some(disk_gb_per_s) = known.disk_gb_per_s else {
            return Ok(None);
        };
        let options = weights.planned_options(machine, &OpenFor::default())?;
        if options.device != DeviceChoice::Cpu && known.h2d.is_none() {
            return Ok(None);
        }
        let device = open_device(weights.spec, weights.units, &options)?;
        let gpu = GpuRoom::of(&device);
        let compute = KeptCompute::of(&device, kv_dtype(weights.units)).known();
        let h2d = known.on(&device.describe(), None).h2d.map(|h| h.gb_per_s);
        let (Some(compute), true) = (compute, gpu.is_none() || h2d.is_some()) else {
            return Ok(None);
        };
        Ok(Some(KnownMachine {
            rates: MachineRates {
                disk_gb_per_s,
                h2d_gb_per_s: h2d.filter(|_| gpu.is_some()),
                compute,
            },
            placed_by: options.rates,
            host: HostMemory::read(),
            gpu,
        }))
    }
}

/// `open` with the room that gives the most tokens a second on a known machine; else with as much for KV as the rows want, up to half of the memory
/// that KV lies in, less where the model would not fit beside it.
pub(super) fn with_room<T>(
    weights: &Weights<'_>,
    machine: &MachineOptions,
    sample: &RowSample,
    input: SizingInput,
    known: Option<KnownMachine>,
    open: &mut dyn FnMut(&Sizing, &OpenFor) -> Result<T>,
) -> Result<(T, Sizing)> {
    // What the user says is taken as it is.
    let free = input.sequences.is_none() && input.kv_bytes.is_none();
    let too_little = |e: &Error| e.code() == Code::Memory && input.kv_bytes.is_none();
    if let Some(known) = known.filter(|_| free)
        && let Some((sizing, rate)) =
            Predictor::new(weights, machine, known)?.fastest(sample, &input)?
    {
        log::info!(
            "{} sequences at once: {rate:.2} tokens/s predicted",
            sizing.sequences
        );
        match open(&sizing, &open_for(&sizing, KvPlace::Gpu)) {
            // Less is free than when it was asked.
            Err(e) if too_little(&e) => {}
            opened => return opened.map(|t| (t, sizing)),
        }
    }
    let mut short = None;
    for (sizing, want) in by_the_rule(weights.spec, sample, &input) {
        match open(&sizing, &want) {
            Err(e) if too_little(&e) => short = Some(e),
            opened => return opened.map(|t| (t, sizing)),
        }
    }
    Err(short.unwrap_or_else(|| Error::internal("no room was tried")))
}

/// What is tried in turn where no rate decides: less and less for keys and values.
fn by_the_rule(
    spec: &ModelSpec,
    sample: &RowSample,
    input: &SizingInput,
) -> impl Iterator<Item = (Sizing, OpenFor)> {
    let place = match input.kv_bytes {
        // Asked for: where the GPU has no room for so much, host memory may.
        Some(_) => KvPlace::GpuOrHost,
        None => KvPlace::Gpu,
    };
    KV_SHARES.into_iter().map(move |kv_share| {
        let sizing = Sizing::choose(spec, sample, &SizingInput { kv_share, ..*input });
        let want = open_for(&sizing, place);
        (sizing, want)
    })
}

/// Whether one of the sizings that [`with_room`] tries in the end is one that `fits`.
pub(super) fn fits_somehow(
    spec: &ModelSpec,
    sample: &RowSample,
    input: &SizingInput,
    fits: &dyn Fn(&OpenFor) -> bool,
) -> bool {
    by_the_rule(spec, sample, input).any(|(_, want)| fits(&want))
}

/// What a job of that sizing wants of the engine.
fn open_for(sizing: &Sizing, kv_place: KvPlace) -> OpenFor {
    OpenFor {
        context: sizing.context,
        logits_rows: sizing.sequences,
        max_sequences: sizing.sequences,
        kv_tokens: Some(sizing.kv_tokens),
        kv_place,
        vision: sizing.vision,
        reserve_bytes: sizing.reading_bytes,
        ..OpenFor::default()
    }
}

/// What passes of a job take on a known machine.
struct Predictor<'a> {
    weights: &'a Weights<'a>,
    machine: MachineOptions,
    known: KnownMachine,
    dtype: Dtype,
    sizes: Vec<UnitSize>,
}

impl<'a> Predictor<'a> {
    fn new(
        weights: &'a Weights<'a>,
        machine: &MachineOptions,
        known: KnownMachine,
    ) -> Result<Predictor<'a>> {
        let options = weights.planned_options(machine, &OpenFor::default())?;
        let page_bytes = options.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
        Ok(Predictor {
            sizes: weights.sizes(page_bytes, known.gpu.is_some()),
            dtype: kv_dtype(weights.units),
            weights,
            machine: machine.clone(),
            known,
        })
    }

    fn fastest(&self, sample: &RowSample, input: &SizingInput) -> Result<Option<(Sizing, f64)>> {
        // Asked once, so that errors of the options themselves are told.
        self.options(&Sizing::choose(self.weights.spec, sample, input))?;
        let mut pass = |sizing: &Sizing, rows: usize| self.pass(sizing, rows, sample);
        Ok(Sizing::fastest(self.weights.spec, sample, input, &mut pass))
    }

    fn options(&self, sizing: &Sizing) -> Result<EngineOptions> {
        let want = open_for(sizing, KvPlace::Gpu);
        let options = self.weights.planned_options(&self.machine, &want)?;
        Ok(EngineOptions {
            rates: self.known.placed_by.clone(),
            ..options
        })
    }

    /// Of `rows` sequences that each add a token, half of their rows long on average.
    fn pass(&self, sizing: &Sizing, rows: usize, sample: &RowSample) -> Option<PassCost> {
        let options = self.options(sizing).ok()?;
        let (spec, known) = (self.weights.spec, &self.known);
        let fitted = fit_on(
            spec,
            self.dtype,
            &self.sizes,
            &options,
            &known.host,
            known.gpu,
        );
        let fitted = fitted.ok()?;
        let tokens = (rows as f64 * sample.mean_tokens / 2.0) as u64;
        let work = pass_work(spec, self.dtype, &fitted, rows, rows, tokens);
        Some(predict(&self.sizes, &fitted.plan, &known.rates, &work))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::{Checkpoint, OpenOptions, outline_synthetic};
    use crate::paging::ComputeRates;
    use crate::store::{DtypePolicy, Outline, outline};

    const BUDGET: u64 = 2 << 30;

    /// 1.5B parameters, of which nothing is written.
    fn model(dir: &std::path::Path) -> Outline {
        let config = json!({
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960,
            "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 4096,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": true, "torch_dtype": "bfloat16"
        });
        outline_synthetic(dir, &config).unwrap();
        let ckpt = Checkpoint::open(&dir.display().to_string(), &OpenOptions::default()).unwrap();
        let auto = DtypePolicy::parse("auto").unwrap();
        outline(&ckpt, &auto, &dir.join("offload"), true).unwrap()
    }

    /// A row takes 57 MB of keys and values.
    fn rows() -> RowSample {
        RowSample {
            mean_tokens: 2000.0,
            longest_tokens: 2000,
            choices: 1.0,
            ..RowSample::default()
        }
    }

    fn input() -> SizingInput {
        SizingInput {
            sequences: None,
            kv_bytes: None,
            kv_share: 1,
            context: None,
            budget: BUDGET,
            gpu: None,
            element_bytes: 2,
            rows: 64,
        }
    }

    fn known(disk_gb_per_s: f64) -> KnownMachine {
        KnownMachine {
            rates: MachineRates {
                disk_gb_per_s,
                h2d_gb_per_s: None,
                compute: ComputeRates {
                    memory_gb_per_s: 20.0,
                    gflops: 60.0,
                    element_bytes: 2.0,
                    points: Vec::new(),
                },
            },
            placed_by: KnownRates::default(),
            host: HostMemory {
                available: 8 << 30,
                peak: 50 << 20,
                resident: 50 << 20,
            },
            gpu: None,
        }
    }

    /// Of 64 rows under 2 GiB: sequences at once, weights on disk, tokens a second, and those of the fixed rule.
    fn chosen(outline: &Outline, disk_gb_per_s: f64) -> (usize, u64, f64, f64) {
        let machine = MachineOptions {
            device_map: "auto".into(),
            ..MachineOptions::all_on_disk(Some(BUDGET), Some(1))
        };
        let weights = Weights::from(outline);
        let (sample, input) = (rows(), input());
        let known = known(disk_gb_per_s);
        let host = known.host;
        let p = Predictor::new(&weights, &machine, known).unwrap();
        let (sizing, rate) = p.fastest(&sample, &input).unwrap().unwrap();
        let fixed = SizingInput {
            kv_share: 2,
            ..input
        };
        let fixed = Sizing::choose(weights.spec, &sample, &fixed);
        let rows = fixed.running(&sample);
        let fixed = p
            .pass(&fixed, rows, &sample)
            .map(|c| rows as f64 / c.pass_s);
        // Whatever the room for keys and values: nothing is a twentieth better.
        for n in 1..=64 {
            let other = Sizing {
                kv_tokens: n * 2200,
                ..sizing
            };
            let rows = other.running(&sample);
            if let Some(cost) = p.pass(&other, rows, &sample) {
                let other = rows as f64 / cost.pass_s;
                assert!(
                    other < 1.06 * rate,
                    "room for {n} gives {other}, not {rate}"
                );
            }
        }
        let options = p.options(&sizing).unwrap();
        let fitted = fit_on(weights.spec, p.dtype, &p.sizes, &options, &host, None).unwrap();
        (
            sizing.sequences,
            fitted.plan.streamed_bytes,
            rate,
            fixed.unwrap(),
        )
    }

    #[test]
    fn a_slow_disk_gives_more_of_the_memory_to_keys_and_values_than_a_fast_one() {
        let dir = tempfile::tempdir().unwrap();
        let outline = model(dir.path());
        let ran = [0.5, 5.0, 50.0].map(|disk| chosen(&outline, disk));
        let [slow, fast, fastest] = ran;
        assert!(slow.1 > fast.1 && fast.1 >= fastest.1, "{ran:?}");
        assert!(
            slow.2 > 1.02 * slow.3,
            "more than half of the memory: {slow:?}"
        );
    }

    #[test]
    fn what_the_user_says_is_not_weighed() {
        let dir = tempfile::tempdir().unwrap();
        let outline = model(dir.path());
        let machine = MachineOptions::all_on_disk(Some(BUDGET), Some(1));
        let weights = Weights::from(&outline);
        let taken = |sequences, kv_bytes| {
            let input = SizingInput {
                sequences,
                kv_bytes,
                ..input()
            };
            let open = &mut |_: &Sizing, _: &OpenFor| Ok(());
            let ((), sizing) =
                with_room(&weights, &machine, &rows(), input, Some(known(0.5)), open).unwrap();
            (sizing.sequences, sizing.kv_tokens)
        };
        assert_eq!(taken(Some(3), None).0, 3);
        let small = taken(None, Some(1 << 27));
        assert!(small.1 < taken(None, None).1, "{small:?}");
    }
}
