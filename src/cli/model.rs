//! A model that is packed, or streamed in place, and ready to be opened under its budget.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::advice::{Advisor, Looked, NoSpace, gpu_room, in_16_bits};
use super::machine::{Weights, verify_when};
use super::options::{GemmArg, MachineOptions, SourceOptions};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::engine::{
    DeviceChoice, Engine, EngineOptions, EngineStats, GpuRoom, HostMemory, KvPlace, SLACK_BYTES,
    VisionRoom, kv_dtype,
};
use crate::error::{Code, Error, Result};
use crate::paging::{
    DiskRates, KeptCompute, KeptSetting, PagingStats, Placement, Setting, unit_name,
};
use crate::report::html::Page;
use crate::report::progress::ByteProgress;
use crate::report::summary::{PagingReport, ReadSettings, Timings};
use crate::store::{
    DtypePolicy, InPlace, Outline, PackOptions, PackProgress, Prepared, Store, outline,
};
use crate::text::{ChatTemplate, GenerationConfig, Tokenizer};

/// Bytes from which on a run's own rates mean something.
const MEASURABLE_BYTES: u64 = 1 << 30;

/// A model found and ready to be opened.
pub struct Model {
    pub label: String,
    pub store: Store,
    pub pack_s: f64,
    /// What its pack would be in 16 bits, where it has 32.
    half: Option<Outline>,
}

/// What a command wants of the engine, besides what the machine options say.
#[derive(Clone, Debug)]
pub struct OpenFor {
    pub context: usize,
    /// Rows of the longest prompt: a pass need not be larger.
    pub prompt_tokens: usize,
    pub logits_rows: usize,
    pub max_sequences: usize,
    pub kv_tokens: Option<usize>,
    pub kv_place: KvPlace,
    pub keep_logits: bool,
    pub sample_limit: Option<usize>,
    pub vision: Option<VisionRoom>,
    /// The pictures of the one prompt, where they are to be advised about.
    pub looked: Option<Looked>,
    /// What the command itself takes at its peak.
    pub reserve_bytes: u64,
}

impl Default for OpenFor {
    fn default() -> OpenFor {
        OpenFor {
            context: 2048,
            prompt_tokens: usize::MAX,
            logits_rows: 1,
            max_sequences: 1,
            kv_tokens: None,
            kv_place: KvPlace::Gpu,
            keep_logits: true,
            sample_limit: None,
            vision: None,
            looked: None,
            reserve_bytes: 0,
        }
    }
}

impl Model {
    /// Finds the checkpoint, packs it on first use (with a bar and an ETA) or opens it in place.
    pub fn open(source: &SourceOptions, cancel: &Arc<AtomicBool>, quiet: bool) -> Result<Model> {
        let ckpt = open_checkpoint(source, cancel, quiet)?;
        Model::prepared(None, &ckpt, source, cancel, quiet)
    }

    /// `ckpt`, packed within `budget` bytes of memory where it is not yet.
    pub(super) fn prepared(
        budget: Option<u64>,
        ckpt: &Checkpoint,
        source: &SourceOptions,
        cancel: &Arc<AtomicBool>,
        quiet: bool,
    ) -> Result<Model> {
        let started = Instant::now();
        let mut options = pack_options(source, cancel)?;
        if let Some(budget) = budget {
            let room = budget.saturating_sub(HostMemory::read().resident + SLACK_BYTES);
            options.buffer_bytes = options.buffer_bytes.min(room);
        }
        let in_place = match source.in_place {
            true => InPlace::Always,
            false => InPlace::WhenShort,
        };
        let options = PackOptions {
            in_place,
            ..options
        };
        log::info!(
            "{} at {}: {:?}, {} files",
            ckpt.label,
            ckpt.dir.display(),
            ckpt.kind,
            ckpt.files.len()
        );
        let prepared = prepare(ckpt, &options, quiet, Store::prepare)?;
        log::info!(
            "weights at {}{}",
            prepared.store.dir.display(),
            if prepared.store.in_place {
                ", in place"
            } else {
                ""
            }
        );
        Ok(Model {
            label: prepared.store.label.clone(),
            pack_s: match prepared.packed {
                Some(_) => started.elapsed().as_secs_f64(),
                None => 0.0,
            },
            half: in_16_bits(ckpt, prepared.store.dtype, &source.offload_folder),
            store: prepared.store,
        })
    }

    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::load(&self.store.text_dir)
    }

    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        ChatTemplate::load(&self.store.text_dir)
    }

    pub fn generation_config(&self) -> Result<GenerationConfig> {
        GenerationConfig::load(&self.store.text_dir)
    }

    /// `float16`, `bfloat16`, `float32` or `mixed`.
    pub fn dtype(&self) -> String {
        self.store.dtype.to_string()
    }

    pub fn weight_files(&self) -> Vec<PathBuf> {
        self.store.files.iter().map(|f| f.path.clone()).collect()
    }

    /// Bytes of all units.
    pub fn weight_bytes(&self) -> u64 {
        self.store.units.iter().map(|u| u.bytes).sum()
    }

    /// Bytes of one element of the KV cache.
    pub fn element_bytes(&self) -> usize {
        kv_dtype(&self.store.units).bytes()
    }

    fn rates(&self) -> DiskRates {
        Weights::from(&self.store).rates()
    }

    pub fn record_disk_rate(&self, gb_per_s: f64) {
        self.rates().raise(gb_per_s);
    }

    /// Forgets what was measured on a model that goes away.
    pub fn forget_rates(&self) {
        self.rates().forget();
    }

    /// The best rate this disk is known to give on these files, measured now when none is.
    /// `room`: memory it may take meanwhile.
    pub fn probe_disk(&self, room: u64) -> Result<Option<f64>> {
        self.rates().best_or_probe(&self.weight_files(), room)
    }

    /// Measures the disk before the engine takes its memory, so that both stay within one budget; not where all weights
    /// will fit anyway.
    fn probe_before(&self, options: &EngineOptions) -> Result<()> {
        let host = HostMemory::read();
        let budget = options.cpu_memory.unwrap_or_else(|| host.default_budget());
        let room = budget.saturating_sub(host.resident + SLACK_BYTES);
        let weights = self.weight_bytes();
        let streams = match options.placement {
            // Beside a GPU not all of the room is for weights, and they are placed by the rate.
            Placement::Auto if options.device != DeviceChoice::Cpu => weights > room / 2,
            Placement::Auto => weights > room,
            Placement::Cpu => false,
            _ => true,
        };
        if streams {
            self.probe_disk(room)?;
        }
        Ok(())
    }

    /// Opens the engine under the user's budget; where that is too small, what would do is said.
    pub fn engine(
        &self,
        machine: &MachineOptions,
        want: &OpenFor,
        cancel: &Arc<AtomicBool>,
        quiet: bool,
    ) -> Result<Engine> {
        self.plain_engine(machine, want, cancel, quiet)
            .map_err(|e| self.explained(machine, want, e))
    }

    /// [`Model::engine`] without advice.
    pub fn plain_engine(
        &self,
        machine: &MachineOptions,
        want: &OpenFor,
        cancel: &Arc<AtomicBool>,
        quiet: bool,
    ) -> Result<Engine> {
        let mut options = self.engine_options(machine, want, quiet)?;
        self.probe_before(&options)?;
        options.rates = self.rates().known();
        log::debug!(
            "engine: {options:?}, best disk rate {:?} GB/s",
            self.rates().best()
        );
        let mut bar = ByteProgress::new("loading", quiet);
        let engine = Engine::open(&self.store, &options, cancel.clone(), &mut |done, of| {
            bar.update(done, of);
        });
        bar.finish();
        if let Ok(engine) = &engine
            && let Some(rate) = engine.h2d_gb_per_s()
        {
            self.rates().raise_h2d(&engine.device().describe(), rate);
        }
        engine
    }

    /// What `want` could not be opened for, with what would do.
    pub(super) fn explained(
        &self,
        machine: &MachineOptions,
        want: &OpenFor,
        error: Error,
    ) -> Error {
        let options = Weights::from(&self.store).planned_options(machine, want);
        let (Code::Memory, Ok(options)) = (error.code(), options) else {
            return error;
        };
        let room = gpu_room(&Weights::from(&self.store), &options);
        self.advisor_of(&options, want)
            .with_gpu(room)
            .too_little(error)
    }

    /// The GPU that the options ask for, as it is now.
    pub(super) fn gpu_room(&self, machine: &MachineOptions) -> Option<GpuRoom> {
        let weights = Weights::from(&self.store);
        let options = weights.planned_options(machine, &OpenFor::default()).ok()?;
        gpu_room(&weights, &options)
    }

    /// To be asked after a run; the host's memory is read now, before the engine takes anything.
    pub(super) fn advisor(&self, machine: &MachineOptions, want: &OpenFor) -> Result<Advisor> {
        let options = Weights::from(&self.store).planned_options(machine, want)?;
        Ok(self.advisor_of(&options, want))
    }

    fn advisor_of(&self, options: &EngineOptions, want: &OpenFor) -> Advisor {
        Advisor::new(&Weights::from(&self.store), options, HostMemory::read())
            .with_half(self.half.as_ref())
            .with_pictures(want.looked.as_ref())
    }

    pub fn reading(&self, machine: &MachineOptions, on_gpu: bool) -> Setting {
        Weights::from(&self.store).reading(machine, on_gpu)
    }

    pub(super) fn engine_options(
        &self,
        machine: &MachineOptions,
        want: &OpenFor,
        quiet: bool,
    ) -> Result<EngineOptions> {
        Weights::from(&self.store).engine_options(machine, want, quiet)
    }

    /// Writes what `--trace` and `--report` ask for. To be called while the engine rests.
    pub fn write_records(
        &self,
        machine: &MachineOptions,
        engine: &Engine,
        timings: &Timings,
        paging: &PagingReport,
    ) -> Result<()> {
        let Some(trace) = engine.pager().trace() else {
            return Ok(());
        };
        if let Some(path) = &machine.trace {
            crate::report::trace::write(path, trace, engine.pager())?;
        }
        let Some(path) = &machine.report else {
            return Ok(());
        };
        let units = self.store.units.iter();
        let page = Page {
            model: &self.label,
            device: &engine.device().describe(),
            dtype: &self.dtype(),
            timings,
            paging,
            plan: engine.plan(),
            units: units
                .map(|u| (u.kind, unit_name(u.kind), u.bytes))
                .collect(),
            events: trace.events(),
            curve: KeptSetting::of(
                &self.store.dir,
                !self.store.in_place,
                engine.plan().gpu.is_some(),
            )
            .curve(),
        };
        crate::report::html::write(path, &page)
    }

    /// How the engine read, as the report says it. What the run itself got out of the disk counts among the settings tried.
    /// Likewise what it multiplied at.
    pub fn read_settings(
        &self,
        machine: &MachineOptions,
        during: &EngineStats,
        engine: &Engine,
    ) -> ReadSettings {
        let p = &during.paging;
        if let Some(rate) = compute_rate(engine.plan().pass_bytes, during) {
            let kept = KeptCompute::of(engine.device(), engine.dtype());
            match engine.plan().gpu {
                None => kept.ran_at(rate),
                Some(_) if machine.gemm == GemmArg::Own => kept.ran_on_gpu_at(rate),
                Some(_) => {}
            }
        }
        match disk_rate(p, during.pass, engine.pager().direct()) {
            Some((rate, true)) => self.rates().ran_at(rate),
            Some((rate, false)) => self.record_disk_rate(rate),
            None => {}
        }
        let reading = self.reading(machine, engine.plan().gpu.is_some());
        ReadSettings {
            page_bytes: reading.page_bytes,
            queue_depth: reading.queue_depth,
            verify: verify_when(machine.verify),
            self_recorded: self.store.checksums.recorded(),
            probed_disk_gb_per_s: self.rates().best(),
            probed_h2d_gb_per_s: self.rates().h2d(),
        }
    }
}

/// Weights that passes of one row multiplied with, 10⁹ bytes a second. `None` where there were more rows, which arithmetic holds up, or so
/// few weights that they come out of a cache.
fn compute_rate(weights: u64, during: &EngineStats) -> Option<f64> {
    let passes = during.paging.passes;
    let compute_s = during.compute.as_secs_f64();
    let tells = weights >= MEASURABLE_BYTES && during.rows == passes && compute_s > 0.0;
    tells.then(|| (weights * passes) as f64 / compute_s / 1e9)
}

/// What passes of `pass` got out of the disk, 10⁹ bytes a second, and whether they waited for it most of the time. `None` where they
/// read too little to tell, or from the page cache, which says nothing of the disk.
fn disk_rate(p: &PagingStats, pass: Duration, direct: bool) -> Option<(f64, bool)> {
    if p.disk_bytes < MEASURABLE_BYTES || !direct {
        return None;
    }
    let busy_s = p.disk_busy.as_secs_f64();
    Some((
        p.disk_bytes as f64 / busy_s / 1e9,
        busy_s > 0.8 * pass.as_secs_f64(),
    ))
}

/// Opens the source, downloaded first where it is a hub id that the local cache lacks.
pub(super) fn open_checkpoint(
    source: &SourceOptions,
    cancel: &Arc<AtomicBool>,
    quiet: bool,
) -> Result<Checkpoint> {
    super::pull::ensure(&source.model, cancel, quiet)?;
    Checkpoint::open(
        &source.model,
        &OpenOptions {
            config_from: source.config_from.clone(),
            allow_external: source.allow_external,
        },
    )
}

pub(super) fn pack_options(
    source: &SourceOptions,
    cancel: &Arc<AtomicBool>,
) -> Result<PackOptions> {
    Ok(PackOptions {
        dtype: DtypePolicy::parse(&source.dtype)?,
        allow_overflow: source.allow_overflow,
        offload_limit: source.offload_limit,
        cancel: cancel.clone(),
        ..PackOptions::new(&source.offload_folder)
    })
}

/// Ids that end an answer: the model's own, else the tokenizer's end-of-text.
pub(super) fn stop_tokens(generation: &GenerationConfig, tokenizer: &Tokenizer) -> Vec<u32> {
    match generation.eos_token_ids.is_empty() {
        true => tokenizer.eos_id().into_iter().collect(),
        false => generation.eos_token_ids.clone(),
    }
}

type Prepare = fn(&Checkpoint, &PackOptions, &mut dyn FnMut(PackProgress)) -> Result<Prepared>;

/// Runs `how` with a progress bar, and prints what it has to say.
pub(super) fn prepare(
    ckpt: &Checkpoint,
    options: &PackOptions,
    quiet: bool,
    how: Prepare,
) -> Result<Prepared> {
    let mut bar = ByteProgress::new("packing", quiet);
    let mut told = false;
    let prepared = how(ckpt, options, &mut |progress| match progress {
        PackProgress::Packing {
            bytes_done,
            bytes_total,
            ..
        } => bar.update(bytes_done, bytes_total),
        PackProgress::Waiting { holder, .. } => {
            if !told && !quiet {
                told = true;
                eprintln!("waiting: {holder} has this folder");
            }
        }
        PackProgress::Finishing => {}
    });
    bar.finish();
    let fell_back = |p: &Prepared| p.store.in_place && options.in_place == InPlace::WhenShort;
    let prepared =
        prepared.map_err(|e| no_space(ckpt, options).map_or(e.clone(), |n| n.explain(e)))?;
    if !quiet {
        for note in &prepared.notes {
            eprintln!("{note}");
        }
        if fell_back(&prepared)
            && let Some(short) = no_space(ckpt, options)
        {
            eprintln!("for a pack: {}", short.less().join("; "));
        }
        if let Some(report) = &prepared.packed {
            eprintln!("packed {}: {}", prepared.store.label, report.summary());
            for w in &report.warnings {
                eprintln!(
                    "warning: {}: {} NaN, {} infinite, {} too large for the type",
                    w.tensor, w.nan, w.infinite, w.overflow
                );
            }
        }
    }
    Ok(prepared)
}

/// What is known of the pack that `options` ask for.
fn no_space<'a>(ckpt: &Checkpoint, options: &'a PackOptions) -> Option<NoSpace<'a>> {
    let folder = options.offload_folder.as_path();
    let whole = outline(ckpt, &options.dtype, folder, false).ok()?;
    let plain = outline(ckpt, &DtypePolicy::Auto, folder, false).ok()?;
    Some(NoSpace {
        offload_folder: folder,
        needed: whole.pack_bytes,
        half: in_16_bits(ckpt, whole.dtype, folder).map(|half| half.pack_bytes),
        casts: plain.dtype != whole.dtype,
    })
}

impl SourceOptions {
    /// A folder with the defaults of everything else.
    pub fn folder(model: &Path, offload_folder: &Path, in_place: bool) -> SourceOptions {
        SourceOptions {
            model: model.display().to_string(),
            offload_folder: offload_folder.to_path_buf(),
            in_place,
            dtype: "auto".into(),
            allow_overflow: false,
            config_from: None,
            allow_external: false,
            offload_limit: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_passes_of_one_row_over_a_large_model_say_how_fast_it_multiplies() {
        let ran = |passes, rows| EngineStats {
            paging: PagingStats {
                passes,
                ..PagingStats::default()
            },
            compute: Duration::from_secs(2),
            rows,
            ..EngineStats::default()
        };
        let rate = compute_rate(4 << 30, &ran(5, 5)).unwrap();
        assert!((rate - 10.737).abs() < 1e-3, "{rate}");
        assert_eq!(compute_rate(4 << 30, &ran(5, 40)), None);
        assert_eq!(compute_rate(1 << 20, &ran(5, 5)), None);
        assert_eq!(compute_rate(4 << 30, &EngineStats::default()), None);
    }

    #[test]
    fn only_reads_from_the_disk_say_how_fast_it_is() {
        let read = PagingStats {
            disk_bytes: 4 << 30,
            disk_busy: Duration::from_secs(2),
            ..PagingStats::default()
        };
        let pass = Duration::from_secs(2);
        let (rate, waited) = disk_rate(&read, pass, true).unwrap();
        assert!((rate - 2.147).abs() < 1e-3 && waited);
        let (_, waited) = disk_rate(&read, 2 * pass, true).unwrap();
        assert!(!waited, "half of the time the disk had nothing to do");
        assert_eq!(disk_rate(&read, pass, false), None, "the page cache");
        let little = PagingStats {
            disk_bytes: 1 << 20,
            ..read
        };
        assert_eq!(disk_rate(&little, pass, true), None);
    }
}
