//! The machine options and a model's weights → how an engine is to run it.

use std::path::Path;
use std::sync::Arc;

use super::gpu;
use super::model::OpenFor;
use super::options::{GemmArg, IoArg, MachineOptions, OrAuto, VerifyArg};
use crate::device::cuda;
use crate::engine::{DEFAULT_PAGE_BYTES, DEFAULT_PREFETCH_DEPTH, DeviceChoice, EngineOptions};
use crate::error::{Code, Error, Result};
use crate::io::{MAX_QUEUE_DEPTH, ReaderKind};
use crate::paging::{
    DiskRates, KeptSetting, PagerOptions, Placement, Setting, SlotLayout, TRACE_EVENTS, Tier,
    Trace, UnitSize, VerifyWhen, parse_device_map,
};
use crate::spec::{ModelSpec, UnitKind};
use crate::store::{Outline, Store, UnitLayout};
use crate::units::parse_size;

/// What of a model decides how it is run, packed or not yet.
pub(super) struct Weights<'a> {
    pub spec: &'a ModelSpec,
    /// By `UnitId`.
    pub units: &'a [UnitLayout],
    /// By `FileId`.
    pub file_bytes: Vec<u64>,
    /// Where they lie.
    pub dir: &'a Path,
    /// `dir` is a pack.
    pub ours: bool,
    /// They are the checkpoint's own files.
    pub in_place: bool,
}

impl<'a> From<&'a Store> for Weights<'a> {
    fn from(store: &'a Store) -> Weights<'a> {
        Weights {
            spec: &store.spec,
            units: &store.units,
            file_bytes: store.files.iter().map(|f| f.bytes).collect(),
            dir: &store.dir,
            ours: !store.in_place,
            in_place: store.in_place,
        }
    }
}

impl<'a> From<&'a Outline> for Weights<'a> {
    fn from(outline: &'a Outline) -> Weights<'a> {
        Weights {
            spec: &outline.spec,
            units: &outline.units,
            file_bytes: outline.file_bytes.clone(),
            dir: &outline.dir,
            ours: outline.ready && !outline.in_place,
            in_place: outline.in_place,
        }
    }
}

impl Weights<'_> {
    /// How they are read: as the user says, else as `tune` found on this machine, else the defaults.
    pub fn reading(&self, machine: &MachineOptions, on_gpu: bool) -> Setting {
        reading(machine, self.dir, self.ours, on_gpu)
    }

    /// Where what is known of the disk and of copies is kept.
    pub fn rates(&self) -> DiskRates {
        DiskRates::of(self.dir, self.ours)
    }

    /// What each unit takes in pages of `page_bytes`, where it is computed with.
    pub fn sizes(&self, page_bytes: u64, on_gpu: bool) -> Vec<UnitSize> {
        let size = match on_gpu {
            true => UnitSize::on_gpu,
            false => UnitSize::of,
        };
        let layout = |u| SlotLayout::new(u, &self.file_bytes, page_bytes);
        self.units.iter().map(|u| size(&layout(u))).collect()
    }

    /// [`Weights::engine_options`] to plan with: nothing is told, and nothing allocated that only a run takes.
    pub fn planned_options(
        &self,
        machine: &MachineOptions,
        want: &OpenFor,
    ) -> Result<EngineOptions> {
        let gemm = gpu::products(machine.gemm);
        let machine = &MachineOptions {
            trace: None,
            report: None,
            gemm: GemmArg::Own,
            ..machine.clone()
        };
        let options = self.engine_options(machine, want, true)?;
        // Its library takes GPU memory too.
        Ok(EngineOptions { gemm, ..options })
    }

    pub fn engine_options(
        &self,
        machine: &MachineOptions,
        want: &OpenFor,
        quiet: bool,
    ) -> Result<EngineOptions> {
        let device = gpu::device_choice(machine, self.spec, self.units, quiet)?;
        let defaults = EngineOptions::default();
        let reading = self.reading(machine, device != DeviceChoice::Cpu);
        let kinds: Vec<UnitKind> = self.units.iter().map(|u| u.kind).collect();
        if machine.device_map == "gpu" && device == DeviceChoice::Cpu {
            return Err(Error::new(
                Code::Usage,
                "--device-map gpu cannot be followed",
                "the CPU computes here",
                "leave it out, or run with --device cuda where there is a GPU",
            ));
        }
        Ok(EngineOptions {
            cpu_memory: machine.cpu_budget()?,
            reserve_bytes: want.reserve_bytes,
            placement: placement(&machine.device_map, &kinds)?,
            rates: self.rates().known(),
            device,
            gpu_memory: machine.gpu_budget()?,
            pinned_memory: machine.pinned_memory,
            gemm: gpu::gemm(machine.gemm, device)?,
            prefetch_depth: Some(reading.prefetch_depth),
            page_bytes: Some(reading.page_bytes),
            ring_frames: reading.ring_frames,
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
            kv_place: want.kv_place,
            pass_tokens: defaults.pass_tokens.min(want.prompt_tokens.max(1)),
            logits_rows: want.logits_rows,
            keep_logits: want.keep_logits,
            sample_limit: want.sample_limit,
            vision: want.vision,
            isa: None,
        })
    }
}

/// What `--device-map` asks for; `kinds`: the model's units.
pub(super) fn placement(map: &str, kinds: &[UnitKind]) -> Result<Placement> {
    match map {
        "auto" => Ok(Placement::Auto),
        "cpu" => Ok(Placement::Cpu),
        "disk" => Ok(Placement::Disk),
        "gpu" => Ok(Placement::Units(vec![Tier::Gpu; kinds.len()])),
        file => {
            let map = read_device_map(file)?;
            Ok(Placement::Units(parse_device_map(&map, kinds)?))
        }
    }
}

/// [`Weights::reading`] of the pack in `dir`, or the source streamed in place (`ours` false).
fn reading(machine: &MachineOptions, dir: &Path, ours: bool, on_gpu: bool) -> Setting {
    let tuned = match machine.no_tune {
        true => None,
        false => KeptSetting::of(dir, ours, on_gpu).best(),
    };
    let usual = tuned.unwrap_or(Setting {
        reader: ReaderKind::Auto,
        page_bytes: DEFAULT_PAGE_BYTES,
        queue_depth: PagerOptions::default().queue_depth,
        prefetch_depth: DEFAULT_PREFETCH_DEPTH,
        ring_frames: None,
    });
    Setting {
        reader: match machine.io {
            IoArg::Auto => usual.reader,
            io => super::bench::kind(io),
        },
        page_bytes: machine.page_size.or(usual.page_bytes),
        queue_depth: machine
            .queue_depth
            .or(usual.queue_depth)
            .clamp(1, MAX_QUEUE_DEPTH),
        prefetch_depth: machine.prefetch_depth.or(usual.prefetch_depth),
        ring_frames: machine.ring_size.given().or(usual.ring_frames),
    }
}

pub(super) fn verify_when(arg: VerifyArg) -> VerifyWhen {
    match arg {
        VerifyArg::Always => VerifyWhen::Always,
        VerifyArg::First => VerifyWhen::First,
        VerifyArg::Never => VerifyWhen::Never,
    }
}

/// Where a file lies, or will.
pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// What is written when the work is done had better be possible before it begins.
fn expect_writable(path: &Path) -> Result<()> {
    let folder = folder_of(path);
    let cause = match () {
        () if path.is_dir() => "it is a folder".to_string(),
        () if !folder.is_dir() => format!("there is no folder {}", folder.display()),
        () => return Ok(()),
    };
    Err(Error::new(
        Code::Usage,
        format!("{} cannot be written", path.display()),
        cause,
        "give the path of a file in a folder that is there",
    ))
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
            cuda::available()?;
        }
        if !["auto", "cpu", "disk", "gpu"].contains(&self.device_map.as_str()) {
            read_device_map(&self.device_map)?;
        }
        self.gpu_budget()?;
        for path in self.trace.iter().chain(&self.report) {
            expect_writable(path)?;
        }
        self.cpu_budget().map(|_| ())
    }

    /// For a command that runs nothing whose course could be written down.
    pub fn refuse_records(&self, command: &str) -> Result<()> {
        let given = [("--trace", &self.trace), ("--report", &self.report)];
        match given.iter().find(|(_, path)| path.is_some()) {
            None => Ok(()),
            Some((flag, _)) => Err(Error::new(
                Code::Usage,
                format!("`{command}` writes no {flag}"),
                "it has no run of its own to show",
                format!("leave {flag} out here; `run`, `batch` and `bench MODEL` take it"),
            )),
        }
    }

    /// Says, once, where a longer context was asked for than the model has.
    pub(super) fn note_context(&self, spec: &ModelSpec, quiet: bool) {
        let most = spec.max_positions;
        if let Some(asked) = self.context.filter(|asked| *asked > most && !quiet) {
            eprintln!(
                "--context {asked}: this model goes up to {most} tokens, which is what it gets"
            );
        }
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
            pinned_memory: None,
            gemm: GemmArg::Own,
            max_memory: None,
            prefetch_depth: OrAuto::Auto,
            page_size: OrAuto::Auto,
            queue_depth: OrAuto::Auto,
            ring_size: OrAuto::Auto,
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
