//! How many sequences a job runs at once and how much room their keys and values get: the most tokens a second where this machine's rates are on
//! record, a fixed rule where they are not. A row's tokens do not depend on it.

use super::batch::Texts;
use super::machine::Weights;
use super::model::{Model, OpenFor};
use super::options::{GemmArg, MachineOptions};
use super::signals::TwoStage;
use crate::engine::jobs::{KV_SHARES, RowSample, Sizing, SizingInput};
use crate::engine::{
    DEFAULT_PAGE_BYTES, Engine, EngineOptions, GpuRoom, HostMemory, KvPlace, fit_on, kv_dtype,
    open_device,
};
use crate::error::{Code, Result};
use crate::model::kv::{BLOCK_TOKENS, block_bytes};
use crate::paging::{KeptCompute, MachineRates, PassCost, PassWork, UnitSize, predict};
use crate::units::Dtype;

/// The engine for what `sample` says of the rows: as [`fastest`] where it can tell, else with as much KV room as the rows want, up to half of the
/// memory that KV lies in; less where the model would not fit beside it.
pub(super) fn open_sized(
    model: &Model,
    texts: &Texts,
    machine: &MachineOptions,
    sample: &RowSample,
    input: SizingInput,
    signals: &TwoStage,
    quiet: bool,
) -> Result<(Engine, Sizing)> {
    let open = |sizing: &Sizing, place| {
        let want = OpenFor {
            sample_limit: Some(texts.tokenizer.id_limit()),
            ..open_for(sizing, place)
        };
        model.engine(machine, &want, &signals.cancel, quiet)
    };
    let too_little = |e: &crate::error::Error| e.code() == Code::Memory && input.kv_bytes.is_none();
    if let Some((sizing, rate)) = fastest(&Weights::from(&model.store), machine, sample, &input)? {
        log::info!(
            "{} sequences at once: {rate:.2} tokens/s predicted",
            sizing.sequences
        );
        match open(&sizing, KvPlace::Gpu) {
            // Less is free than when it was asked.
            Err(e) if too_little(&e) => {}
            opened => return opened.map(|engine| (engine, sizing)),
        }
    }
    let mut shares = KV_SHARES.into_iter().peekable();
    loop {
        let kv_share = shares.next().unwrap_or(1);
        let input = SizingInput { kv_share, ..input };
        let sizing = Sizing::choose(&model.store.spec, sample, &input);
        let place = match input.kv_bytes {
            // Asked for: where the GPU has no room for so much, host memory may.
            Some(_) => KvPlace::GpuOrHost,
            None => KvPlace::Gpu,
        };
        match open(&sizing, place) {
            Err(e) if too_little(&e) && shares.peek().is_some() => {}
            opened => return opened.map(|engine| (engine, sizing)),
        }
    }
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

/// The sizing with the most tokens a second on this machine, and how many. `None`: the user says how many sequences or how much room, or the
/// disk's rate or that of computing is not on record (runs and `plan` keep them), or nothing fits.
pub(super) fn fastest(
    weights: &Weights<'_>,
    machine: &MachineOptions,
    sample: &RowSample,
    input: &SizingInput,
) -> Result<Option<(Sizing, f64)>> {
    if input.sequences.is_some() || input.kv_bytes.is_some() {
        return Ok(None);
    }
    let known = weights.rates().known();
    let Some(disk_gb_per_s) = known.disk_gb_per_s else {
        return Ok(None);
    };
    let machine = &MachineOptions {
        // What only a run takes or tells.
        trace: None,
        report: None,
        gemm: GemmArg::Own,
        ..machine.clone()
    };
    let options = weights.engine_options(machine, &OpenFor::default(), true)?;
    let device = open_device(weights.spec, weights.units, &options)?;
    let gpu = GpuRoom::of(&device);
    let dtype = kv_dtype(weights.units);
    let compute = KeptCompute::of(&device, dtype).known();
    let h2d = known.on(&device.describe(), None).h2d.map(|h| h.gb_per_s);
    let (Some(compute), true) = (compute, gpu.is_none() || h2d.is_some()) else {
        return Ok(None);
    };
    // A GPU is opened again by the engine.
    drop(device);
    let rates = MachineRates {
        disk_gb_per_s,
        h2d_gb_per_s: h2d.filter(|_| gpu.is_some()),
        compute,
    };
    let host = HostMemory::read();
    Predictor::new(weights, machine, &options, rates, host, gpu).fastest(sample, input)
}

/// What passes of a job take under a machine's rates.
struct Predictor<'a> {
    weights: &'a Weights<'a>,
    machine: &'a MachineOptions,
    rates: MachineRates,
    host: HostMemory,
    gpu: Option<GpuRoom>,
    dtype: Dtype,
    sizes: Vec<UnitSize>,
}

impl<'a> Predictor<'a> {
    fn new(
        weights: &'a Weights<'a>,
        machine: &'a MachineOptions,
        options: &EngineOptions,
        rates: MachineRates,
        host: HostMemory,
        gpu: Option<GpuRoom>,
    ) -> Predictor<'a> {
        let page_bytes = options.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
        Predictor {
            sizes: weights.sizes(page_bytes, gpu.is_some()),
            dtype: kv_dtype(weights.units),
            weights,
            machine,
            rates,
            host,
            gpu,
        }
    }

    fn fastest(&self, sample: &RowSample, input: &SizingInput) -> Result<Option<(Sizing, f64)>> {
        // Asked once, so that errors of the options themselves are told.
        self.options(&Sizing::choose(self.weights.spec, sample, input))?;
        let mut pass = |sizing: &Sizing, rows: usize| self.pass(sizing, rows, sample);
        Ok(Sizing::fastest(self.weights.spec, sample, input, &mut pass))
    }

    fn options(&self, sizing: &Sizing) -> Result<EngineOptions> {
        let want = open_for(sizing, KvPlace::Gpu);
        self.weights.engine_options(self.machine, &want, true)
    }

    /// Of `rows` sequences that each add a token, half of their rows long on average.
    fn pass(&self, sizing: &Sizing, rows: usize, sample: &RowSample) -> Option<PassCost> {
        let options = self.options(sizing).ok()?;
        let spec = self.weights.spec;
        let fitted = fit_on(
            spec,
            self.dtype,
            &self.sizes,
            &options,
            &self.host,
            self.gpu,
        )
        .ok()?;
        let block = block_bytes(
            spec.layers,
            spec.kv_heads,
            spec.head_size,
            self.dtype.bytes(),
        );
        let tokens = rows as f64 * sample.mean_tokens / 2.0;
        let work = PassWork {
            rows,
            wanted: rows,
            kv_bytes: (tokens * block as f64 / BLOCK_TOKENS as f64) as u64,
            element_bytes: self.dtype.bytes() as f64,
            ..PassWork::default()
        };
        Some(predict(&self.sizes, &fitted.plan, &self.rates, &work))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::{Checkpoint, OpenOptions, outline_synthetic};
    use crate::paging::ComputeRates;
    use crate::store::{DtypePolicy, Outline, outline};

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

    /// Sequences at once and weights on disk, under 2 GiB, for 64 rows of 2,000 tokens: a row takes 57 MB of keys and values.
    fn chosen(outline: &Outline, disk_gb_per_s: f64) -> (usize, u64, f64, f64) {
        let budget = 2 << 30;
        let machine = MachineOptions {
            device_map: "auto".into(),
            ..MachineOptions::all_on_disk(Some(budget), Some(1))
        };
        let weights = Weights::from(outline);
        let sample = RowSample {
            mean_tokens: 2000.0,
            longest_tokens: 2000,
            choices: 1.0,
            ..RowSample::default()
        };
        let input = SizingInput {
            sequences: None,
            kv_bytes: None,
            kv_share: 1,
            context: None,
            budget,
            gpu: None,
            element_bytes: 2,
            rows: 64,
        };
        let rates = MachineRates {
            disk_gb_per_s,
            h2d_gb_per_s: None,
            compute: ComputeRates {
                memory_gb_per_s: 20.0,
                gflops: 60.0,
                element_bytes: 2.0,
                points: Vec::new(),
            },
        };
        let host = HostMemory {
            available: 8 << 30,
            peak: 50 << 20,
            resident: 50 << 20,
        };
        let options = EngineOptions::default();
        let p = Predictor::new(&weights, &machine, &options, rates, host, None);
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
    fn a_slow_disk_is_shared_by_more_sequences_than_a_fast_one() {
        let dir = tempfile::tempdir().unwrap();
        let outline = model(dir.path());
        let ran = [0.5, 5.0, 50.0].map(|disk| chosen(&outline, disk));
        let [slow, fast, fastest] = ran;
        assert!(slow.0 > fast.0 && slow.1 > fast.1, "{ran:?}");
        assert!(fast.0 >= fastest.0 && fast.1 >= fastest.1, "{ran:?}");
        for (_, _, rate, fixed) in ran {
            assert!(rate >= fixed, "{ran:?}");
        }
        assert!(
            slow.2 > 1.02 * slow.3,
            "more than half of the memory: {slow:?}"
        );
    }

    #[test]
    fn what_the_user_says_is_not_weighed() {
        let dir = tempfile::tempdir().unwrap();
        let outline = model(dir.path());
        let machine = MachineOptions::all_on_disk(Some(2 << 30), Some(1));
        let input = SizingInput {
            sequences: Some(3),
            kv_bytes: None,
            kv_share: 1,
            context: None,
            budget: 2 << 30,
            gpu: None,
            element_bytes: 2,
            rows: 64,
        };
        let sample = RowSample::default();
        let weights = Weights::from(&outline);
        for input in [
            input,
            SizingInput {
                sequences: None,
                kv_bytes: Some(1 << 28),
                ..input
            },
        ] {
            assert_eq!(fastest(&weights, &machine, &sample, &input).unwrap(), None);
        }
    }
}
