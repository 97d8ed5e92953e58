//! From a MODEL argument to something that runs: found, packed if need be, opened under its budget.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::advice::{self, Advisor};
use super::gpu;
use super::options::{GemmArg, IoArg, MachineOptions, OrAuto, SourceOptions, VerifyArg};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::engine::{
    DEFAULT_PAGE_BYTES, DEFAULT_PREFETCH_DEPTH, Engine, EngineOptions, EngineStats, HostMemory,
    SLACK_BYTES, kv_dtype,
};
use crate::engine::{DeviceChoice, VisionRoom};
use crate::error::{Code, Error, Result};
use crate::io::ReaderKind;
use crate::paging::{
    DiskRates, KeptSetting, PagerOptions, Placement, Setting, TRACE_EVENTS, Tier, Trace,
    VerifyWhen, parse_device_map, unit_name,
};
use crate::report::html::Page;
use crate::report::progress::ByteProgress;
use crate::report::summary::{PagingReport, ReadSettings, Timings};
use crate::spec::UnitKind;
use crate::store::{DtypePolicy, InPlace, PackOptions, PackProgress, Prepared, Store};
use crate::text::{ChatTemplate, GenerationConfig, Tokenizer};
use crate::units::parse_size;

/// Bytes from which on a run's own disk rate means something.
const MEASURABLE_BYTES: u64 = 1 << 30;

/// A model found and ready to be opened.
pub struct Model {
    pub label: String,
    pub store: Store,
    pub pack_s: f64,
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
    pub keep_logits: bool,
    pub sample_limit: Option<usize>,
    pub vision: Option<VisionRoom>,
}

impl Default for OpenFor {
    fn default() -> OpenFor {
        OpenFor {
            context: 2048,
            prompt_tokens: usize::MAX,
            logits_rows: 1,
            max_sequences: 1,
            kv_tokens: None,
            keep_logits: true,
            sample_limit: None,
            vision: None,
        }
    }
}

impl Model {
    /// Finds the checkpoint, packs it on first use (with a bar and an ETA) or opens it in place.
    pub fn open(source: &SourceOptions, cancel: &Arc<AtomicBool>, quiet: bool) -> Result<Model> {
        let ckpt = open_checkpoint(source, cancel, quiet)?;
        Model::prepared(None, &ckpt, source, cancel, quiet)
    }

    /// [`Model::open`] for a machine: packed within its memory, and refused before hours of packing where it cannot run there.
    pub fn open_for(
        machine: &MachineOptions,
        source: &SourceOptions,
        cancel: &Arc<AtomicBool>,
        quiet: bool,
    ) -> Result<Model> {
        machine.check()?;
        let ckpt = open_checkpoint(source, cancel, quiet)?;
        gpu::refuse_before_packing(machine, &ckpt, source, cancel)?;
        Model::prepared(machine.cpu_budget()?, &ckpt, source, cancel, quiet)
    }

    /// [`Model::open_for`] what cannot do without a tokenizer: one that is missing is told before hours of packing too.
    pub fn open_with_text(
        machine: &MachineOptions,
        source: &SourceOptions,
        cancel: &Arc<AtomicBool>,
        quiet: bool,
    ) -> Result<Model> {
        machine.check()?;
        let ckpt = open_checkpoint(source, cancel, quiet)?;
        Tokenizer::expect_in(&ckpt.config_dir)?;
        gpu::refuse_before_packing(machine, &ckpt, source, cancel)?;
        Model::prepared(machine.cpu_budget()?, &ckpt, source, cancel, quiet)
    }

    fn prepared(
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

    /// Ids that end an answer: the model's own, else the tokenizer's end-of-text.
    pub fn stop_tokens(&self, generation: &GenerationConfig, tokenizer: &Tokenizer) -> Vec<u32> {
        if generation.eos_token_ids.is_empty() {
            tokenizer.eos_id().into_iter().collect()
        } else {
            generation.eos_token_ids.clone()
        }
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
        DiskRates::of(&self.store.dir, !self.store.in_place)
    }

    pub fn record_disk_rate(&self, gb_per_s: f64) {
        self.rates().raise(gb_per_s);
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
            Placement::Auto => weights > room,
            Placement::Cpu => false,
            _ => true,
        };
        if streams {
            self.probe_disk(room)?;
        }
        Ok(())
    }

    /// Opens the engine under the user's budget.
    pub fn engine(
        &self,
        machine: &MachineOptions,
        want: &OpenFor,
        cancel: &Arc<AtomicBool>,
        quiet: bool,
    ) -> Result<Engine> {
        let options = self.engine_options(machine, want, quiet)?;
        self.probe_before(&options)?;
        log::debug!(
            "engine: {options:?}, best disk rate {:?} GB/s",
            self.rates().best()
        );
        let host = HostMemory::read();
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
        engine.map_err(|e| match Advisor::new(self, &options, host) {
            Ok(advisor) => advisor.too_little(e),
            Err(_) => e,
        })
    }

    /// How its units are read: as the user says, else as `tune` found on this machine, else the defaults.
    pub fn reading(&self, machine: &MachineOptions) -> Setting {
        reading(machine, &self.store.dir, !self.store.in_place)
    }

    pub(super) fn engine_options(
        &self,
        machine: &MachineOptions,
        want: &OpenFor,
        quiet: bool,
    ) -> Result<EngineOptions> {
        let device =
            gpu::device_choice(&machine.device, &self.store.spec, &self.store.units, quiet)?;
        let kinds: Vec<UnitKind> = self.store.units.iter().map(|u| u.kind).collect();
        engine_options(machine, want, &self.reading(machine), &kinds, device)
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
            curve: KeptSetting::of(&self.store.dir, !self.store.in_place).curve(),
        };
        crate::report::html::write(path, &page)
    }

    /// How the engine read, as the report says it. What the run itself got out of the disk counts among the settings tried.
    pub fn read_settings(&self, machine: &MachineOptions, during: &EngineStats) -> ReadSettings {
        let p = &during.paging;
        if p.disk_bytes >= MEASURABLE_BYTES {
            let rate = p.disk_bytes as f64 / p.disk_busy.as_secs_f64() / 1e9;
            match p.disk_busy.as_secs_f64() > 0.8 * during.pass.as_secs_f64() {
                true => self.rates().ran_at(rate),
                false => self.record_disk_rate(rate),
            }
        }
        let reading = self.reading(machine);
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

/// What an engine on `device` is opened with; `kinds`: the model's units.
pub(super) fn engine_options(
    machine: &MachineOptions,
    want: &OpenFor,
    reading: &Setting,
    kinds: &[UnitKind],
    device: DeviceChoice,
) -> Result<EngineOptions> {
    let defaults = EngineOptions::default();
    Ok(EngineOptions {
        cpu_memory: machine.cpu_budget()?,
        placement: placement(&machine.device_map, kinds)?,
        device,
        gpu_memory: machine.gpu_budget()?,
        gemm: gpu::gemm(machine.gemm, device)?,
        prefetch_depth: Some(reading.prefetch_depth),
        page_bytes: Some(reading.page_bytes),
        pager: PagerOptions {
            reader: reading.reader,
            queue_depth: reading.queue_depth,
            verify: verify_when(machine.verify),
            // Allocated before the budget is divided, so that it is charged like everything else the process holds.
            trace: (machine.trace.is_some() || machine.report.is_some())
                .then(|| Arc::new(Trace::new(TRACE_EVENTS))),
            ..PagerOptions::default()
        },
        threads: machine.threads,
        context: want.context,
        max_sequences: want.max_sequences,
        kv_tokens: want.kv_tokens,
        pass_tokens: defaults.pass_tokens.min(want.prompt_tokens.max(1)),
        logits_rows: want.logits_rows,
        keep_logits: want.keep_logits,
        sample_limit: want.sample_limit,
        vision: want.vision,
        isa: None,
    })
}

/// What `--device-map` asks for; `kinds`: the model's units.
pub(super) fn placement(map: &str, kinds: &[UnitKind]) -> Result<Placement> {
    match map {
        "auto" => Ok(Placement::Auto),
        "cpu" => Ok(Placement::Cpu),
        "disk" => Ok(Placement::Disk),
        "gpu" => Ok(Placement::Units(vec![Tier::Gpu; kinds.len()])),
        file => {
            let bad = |cause: String| {
                Error::new(
                    Code::Usage,
                    format!("the device map {file} cannot be used"),
                    cause,
                    "give auto, cpu, disk, or a JSON file of module → tier",
                )
            };
            let text = std::fs::read_to_string(file).map_err(|e| bad(e.to_string()))?;
            let json = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
            Ok(Placement::Units(parse_device_map(&json, kinds)?))
        }
    }
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
    let prepared = prepared.map_err(|e| advice::no_space(e, &options.offload_folder))?;
    if !quiet {
        for note in &prepared.notes {
            eprintln!("{note}");
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

/// [`Model::reading`] of the pack in `dir`, or the source streamed in place (`ours` false).
pub(super) fn reading(machine: &MachineOptions, dir: &Path, ours: bool) -> Setting {
    let tuned = match machine.no_tune {
        true => None,
        false => KeptSetting::of(dir, ours).best(),
    };
    let usual = tuned.unwrap_or(Setting {
        reader: ReaderKind::Auto,
        page_bytes: DEFAULT_PAGE_BYTES,
        queue_depth: PagerOptions::default().queue_depth,
        prefetch_depth: DEFAULT_PREFETCH_DEPTH,
    });
    Setting {
        reader: match machine.io {
            IoArg::Auto => usual.reader,
            io => super::bench::kind(io),
        },
        page_bytes: machine.page_size.or(usual.page_bytes),
        queue_depth: machine.queue_depth.or(usual.queue_depth).max(1),
        prefetch_depth: machine.prefetch_depth.or(usual.prefetch_depth),
    }
}

fn verify_when(arg: VerifyArg) -> VerifyWhen {
    match arg {
        VerifyArg::Always => VerifyWhen::Always,
        VerifyArg::First => VerifyWhen::First,
        VerifyArg::Never => VerifyWhen::Never,
    }
}

fn read_device_map(file: &str) -> Result<serde_json::Value> {
    let bad = |cause: String| {
        Error::new(
            Code::Usage,
            format!("the device map {file} cannot be used"),
            cause,
            "give auto, cpu, disk, or a JSON file of module → tier",
        )
    };
    let text = std::fs::read_to_string(file).map_err(|e| bad(e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| bad(e.to_string()))
}

impl MachineOptions {
    /// What can be known to be wrong before a model is opened.
    pub fn check(&self) -> Result<()> {
        gpu::check_device(&self.device)?;
        if !["auto", "cpu"].contains(&self.device.as_str()) {
            crate::device::cuda::available()?;
        }
        if !["auto", "cpu", "disk", "gpu"].contains(&self.device_map.as_str()) {
            read_device_map(&self.device_map)?;
        }
        self.gpu_budget()?;
        self.cpu_budget().map(|_| ())
    }

    /// `--cpu-memory`, or what `--max-memory` says of the CPU.
    pub fn cpu_budget(&self) -> Result<Option<u64>> {
        match self.cpu_memory {
            None => self.max_memory_of(|device| device == "cpu"),
            given => Ok(given),
        }
    }

    /// `--gpu-memory`, or what `--max-memory` says of a GPU.
    pub fn gpu_budget(&self) -> Result<Option<u64>> {
        match self.gpu_memory {
            None => self.max_memory_of(|device| device != "cpu" && device != "disk"),
            given => Ok(given),
        }
    }

    fn max_memory_of(&self, wanted: impl Fn(&str) -> bool) -> Result<Option<u64>> {
        let Some(map) = &self.max_memory else {
            return Ok(None);
        };
        let mut budget = None;
        for entry in map.split(',') {
            let (device, amount) = entry.split_once('=').ok_or_else(|| {
                Error::new(
                    Code::Usage,
                    format!("`{entry}` in --max-memory makes no sense"),
                    "an entry is a device and a size",
                    "write 0=8GiB,cpu=16GiB",
                )
            })?;
            let bytes = parse_size(amount)?;
            if wanted(device.trim()) {
                budget = Some(bytes);
            }
        }
        Ok(budget)
    }

    /// Everything on disk, as the demonstrations want it. Without a budget the smallest plan is what it takes.
    pub fn all_on_disk(cpu_memory: Option<u64>, threads: Option<usize>) -> MachineOptions {
        MachineOptions {
            device: "cpu".into(),
            device_map: "disk".into(),
            cpu_memory,
            gpu_memory: None,
            gemm: GemmArg::Own,
            max_memory: None,
            prefetch_depth: OrAuto::Auto,
            page_size: OrAuto::Auto,
            queue_depth: OrAuto::Auto,
            io: IoArg::Auto,
            // The same figures on every machine the demonstration runs on.
            no_tune: true,
            verify: VerifyArg::Always,
            threads,
            context: None,
            trace: None,
            report: None,
        }
    }
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
