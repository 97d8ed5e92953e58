//! `tune`: the best way to read this model on this machine, measured and kept.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};

use super::found::Found;
use super::model::{Model, OpenFor};
use super::options::{IoArg, MachineOptions, OrAuto, SourceOptions, ring, size};
use super::signals;
use crate::engine::{DeviceChoice, Engine, EngineOptions, Job, open_device};
use crate::error::{Code, Error, Result};
use crate::paging::{KeptSetting, PagerOptions, Placement, Setting, Space, Tuned, is_streamed};
use crate::report::progress::CountProgress;
use crate::spec::UnitKind;
use crate::store::Store;
use crate::units::human_bytes;

/// A run's pass streams about this much: a longer one tells nothing more.
const PASS_BYTES: u64 = 1 << 30;
/// Bars of the curve are this wide for the slowest setting shown.
const BAR: f64 = 40.0;
const SHOWN: usize = 16;

#[derive(Args)]
#[command(after_help = "Example:
  tensorpager tune ./Qwen2.5-7B-Instruct")]
pub struct TuneArgs {
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    machine: MachineOptions,
    /// Bytes a read
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = size, default_value = "256KiB,1MiB,4MiB,16MiB")]
    page_sizes: Vec<u64>,
    /// Reads in flight
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "8,32,128"
    )]
    queue_depths: Vec<usize>,
    /// Units ahead of the one computing
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2,4")]
    prefetch_depths: Vec<usize>,
    /// Pinned frames between disk and GPU, where a GPU computes; auto is as many as 256 MiB hold
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = ring, default_value = "auto,32")]
    ring_sizes: Vec<OrAuto<usize>>,
    /// auto is io_uring where the system has it
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "auto,threads"
    )]
    readers: Vec<IoArg>,
    /// Seconds a run
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// One JSON object instead of the curve
    #[arg(long)]
    json: bool,
    /// No progress bar
    #[arg(long, short)]
    quiet: bool,
}

pub fn run(args: TuneArgs) -> Result<u8> {
    let cancel = signals::cancel_flag()?;
    args.machine.check()?;
    args.machine.refuse_records("tune")?;
    let mut machine = args.machine.clone();
    machine.no_tune = true;
    let found = Found::open(&args.source, &cancel, args.quiet)?;
    found.expect_room(&machine, &OpenFor::default(), args.quiet)?;
    let budget = machine.cpu_budget()?;
    let model = found.prepare(budget, &args.source, &cancel, args.quiet)?;
    let options = model.engine_options(&machine, &OpenFor::default(), args.quiet)?;
    let on_gpu = options.device != DeviceChoice::Cpu;
    let kept = KeptSetting::of(&model.store.dir, !model.store.in_place, on_gpu);
    let space = space(&args, &machine, &model, on_gpu)?;
    let bench = Bench {
        store: shortened(model.store),
        options,
        seconds: args.seconds.clamp(0.001, 60.0),
        cancel,
    };
    let mut bar = CountProgress::new("tuning", crate::paging::most_runs(&space), args.quiet);
    let tuned = crate::paging::tune(&space, &mut |setting| {
        let time = bench.seconds_a_pass(setting, *setting == space.default);
        bar.step(&setting.to_string());
        time
    });
    bar.finish();
    let tuned = tuned?;
    let path = kept.keep(&tuned, &bench.device()?);
    let text = match args.json {
        true => format!("{}\n", as_json(&tuned, &space)),
        false => curve(&tuned, &space),
    };
    super::run::print(&text)?;
    if !args.quiet {
        match path {
            Some(path) => eprintln!(
                "kept in {}: `run` and `batch` use it, --no-tune does not",
                path.display()
            ),
            None => eprintln!(
                "it could be kept nowhere: give the options to `run` and `batch` yourself"
            ),
        }
    }
    Ok(0)
}

fn space(args: &TuneArgs, machine: &MachineOptions, model: &Model, on_gpu: bool) -> Result<Space> {
    let bad = |flag: &str, why: &str| {
        Err(Error::new(
            Code::Usage,
            format!("{flag} makes no sense"),
            why,
            format!("give {flag} other values"),
        ))
    };
    let page_ok = |b: &u64| b.is_power_of_two() && (64 << 10..=1 << 30).contains(b);
    if !args.page_sizes.iter().all(page_ok) {
        return bad(
            "--page-sizes",
            "a page is a power of two from 64KiB to 1GiB",
        );
    }
    let deep = |n: &usize| (1..=1 << 16).contains(n);
    if !args.queue_depths.iter().all(deep) || !args.prefetch_depths.iter().all(deep) {
        return bad(
            "--queue-depths or --prefetch-depths",
            "a depth is 1 to 65536",
        );
    }
    let reading = model.reading(machine, on_gpu);
    let fixed =
        |given: bool, all: &[usize], one: usize| if given { vec![one] } else { all.to_vec() };
    let streamed = || model.store.units.iter().filter(|u| is_streamed(u.kind));
    Ok(Space {
        default: Setting {
            ring_frames: reading.ring_frames.filter(|_| on_gpu),
            ..reading
        },
        readers: match machine.io {
            IoArg::Auto => args
                .readers
                .iter()
                .map(|r| super::bench::kind(*r))
                .collect(),
            _ => vec![reading.reader],
        },
        page_bytes: match machine.page_size {
            OrAuto::Auto => args.page_sizes.clone(),
            OrAuto::Is(b) => vec![b],
        },
        queue_depths: fixed(
            machine.queue_depth != OrAuto::Auto,
            &args.queue_depths,
            reading.queue_depth,
        ),
        prefetch_depths: fixed(
            machine.prefetch_depth != OrAuto::Auto,
            &args.prefetch_depths,
            reading.prefetch_depth,
        ),
        ring_frames: match (on_gpu, machine.ring_size) {
            (false, _) => vec![None],
            (true, OrAuto::Auto) => args.ring_sizes.iter().map(|n| n.given()).collect(),
            (true, given) => vec![given.given()],
        },
        streamed_units: streamed().count(),
        unit_bytes: streamed().map(|u| u.bytes).max().unwrap_or(0),
    })
}

/// The model with so many of its layers that a pass streams about [`PASS_BYTES`].
fn shortened(store: Store) -> Store {
    let layer = store
        .units
        .iter()
        .find(|u| matches!(u.kind, UnitKind::Layer(_)))
        .map_or(1, |u| u.bytes.max(1));
    let others: u64 = store
        .units
        .iter()
        .filter(|u| matches!(u.kind, UnitKind::Head(_)))
        .map(|u| u.bytes)
        .sum();
    let layers = PASS_BYTES.saturating_sub(others).div_ceil(layer).max(4);
    store.first_layers(layers as usize)
}

struct Bench {
    store: Store,
    options: EngineOptions,
    seconds: f64,
    cancel: Arc<AtomicBool>,
}

impl Bench {
    fn device(&self) -> Result<String> {
        Ok(open_device(&self.store.spec, &self.store.units, &self.options)?.describe())
    }

    /// Decodes one sequence with every unit on disk, for `seconds` and two passes at least. A setting that does not fit the memory given
    /// takes for ever, unless it is `needed`.
    fn seconds_a_pass(&self, setting: &Setting, needed: bool) -> Result<f64> {
        let options = EngineOptions {
            placement: Placement::Disk,
            prefetch_depth: Some(setting.prefetch_depth),
            page_bytes: Some(setting.page_bytes),
            ring_frames: setting.ring_frames,
            pager: PagerOptions {
                reader: setting.reader,
                queue_depth: setting.queue_depth,
                ..self.options.pager.clone()
            },
            context: 1 << 12,
            pass_tokens: 16,
            ..self.options.clone()
        };
        let opened = Engine::open(&self.store, &options, self.cancel.clone(), &mut |_, _| {});
        let mut engine = match opened {
            // Too large for the memory given, or a reader this system refuses.
            Err(e) if matches!(e.code(), Code::Memory | Code::Unsupported) && !needed => {
                return Ok(f64::INFINITY);
            }
            opened => opened?,
        };
        engine.submit(Job {
            prompt: vec![1],
            max_tokens: engine.context().saturating_sub(2).max(1),
            ..Job::default()
        })?;
        let mut events = Vec::new();
        engine.step(&mut events)?;
        let started = Instant::now();
        let mut passes = 0;
        while passes < 2 || started.elapsed().as_secs_f64() < self.seconds {
            if engine.pending() == 0 {
                break;
            }
            events.clear();
            engine.step(&mut events)?;
            passes += 1;
        }
        Ok(started.elapsed().as_secs_f64() / f64::from(passes.max(1)))
    }
}

fn verdict(tuned: &Tuned, space: &Space) -> String {
    let (gain, noise) = (100.0 * (1.0 - tuned.ratio), 100.0 * tuned.noise);
    if tuned.pairs == 0 {
        "the defaults stay: no other setting fits in the memory given".to_string()
    } else if tuned.best == space.default {
        format!(
            "the defaults are as good: the best other setting was {gain:+.1} % ± {noise:.1} % faster in {} pairs",
            tuned.pairs
        )
    } else {
        format!(
            "best: {}, {gain:.1} % ± {noise:.1} % faster than the defaults",
            tuned.best
        )
    }
}

fn curve(tuned: &Tuned, space: &Space) -> String {
    let shown: Vec<_> = tuned.curve.iter().filter(|s| s.ratio.is_finite()).collect();
    let width = shown.iter().map(|s| s.setting.to_string().chars().count());
    let width = width.max().unwrap_or(0);
    let slowest = shown.iter().map(|s| s.ratio).fold(1.0, f64::max);
    let mut text = String::from("time against the defaults, fastest first\n");
    for (i, s) in shown.iter().enumerate() {
        let is_default = s.setting == space.default;
        if i >= SHOWN && !is_default && i + 1 < shown.len() {
            continue;
        }
        text += &format!(
            "{:<width$} {:>6.3}  {}{}\n",
            s.setting.to_string(),
            s.ratio,
            "█".repeat((s.ratio / slowest * BAR).round().max(1.0) as usize),
            if is_default { "  defaults" } else { "" }
        );
    }
    let near = shown.iter().filter(|s| s.ratio < 1.03).count();
    text += &format!(
        "{near} of {} settings are within 3 % of the defaults or better; {} a pass streamed\n{}\n",
        shown.len(),
        human_bytes(PASS_BYTES),
        verdict(tuned, space)
    );
    text
}

fn as_json(tuned: &Tuned, space: &Space) -> Value {
    let setting = |s: &Setting| {
        let mut row = json!({"io": s.reader.name(), "page_size": s.page_bytes, "queue_depth": s.queue_depth, "prefetch_depth": s.prefetch_depth});
        if space.ring_frames != [None] {
            row["ring_frames"] = json!(s.ring_frames);
        }
        row
    };
    json!({
        "best": setting(&tuned.best),
        "default": setting(&space.default),
        "ratio": tuned.ratio,
        "noise": tuned.noise,
        "defaults_as_good": tuned.best == space.default,
        "curve": tuned.curve.iter().filter(|s| s.ratio.is_finite()).map(|s| {
            let mut row = setting(&s.setting);
            row["ratio"] = json!(s.ratio);
            row["runs"] = json!(s.runs);
            row
        }).collect::<Vec<_>>(),
    })
}
