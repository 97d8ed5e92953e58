//! `batch-check`: a job looked over before it runs, and how long it will take by the same plan that a run makes. No weight is read but to
//! measure the disk.

use std::collections::HashMap;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::advice::Advisor;
use super::batch_input::{InputOptions, Texts, row_limits};
use super::batch_room::{KnownMachine, RoomOptions, with_room};
use super::machine::Weights;
use super::model::{open_checkpoint, pack_options};
use super::options::{MachineOptions, SamplingOptions, SourceOptions};
use super::rates::{AskedRates, Computer, RateArgs, busy_told, pass_work};
use super::run::print;
use super::signals;
use crate::engine::jobs::{CheckReport, JobPasses, PassLoad, Sizing, check, foresee};
use crate::engine::schedule::Limits;
use crate::engine::{
    DEFAULT_PAGE_BYTES, Fitted, GpuRoom, HostMemory, SLACK_BYTES, fit_on, kv_dtype, tower_flops,
};
use crate::error::{Error, Result};
use crate::media::Look;
use crate::paging::{MachineRates, PassCost, UnitSize, is_vision, predict};
use crate::store::{Outline, outline};
use crate::text::{ChatTemplate, GenerationConfig, Tokenizer};
use crate::units::{Dtype, counted, human_bytes};

/// Bad rows shown; the rest are counted.
const SHOWN: u64 = 20;
/// Prices of passes kept, so that passes alike are predicted once.
const PRICES: usize = 1 << 16;

#[derive(Args)]
#[command(after_help = "Example:
  tensorpager batch-check ./Qwen2.5-7B-Instruct -i prompts.jsonl
  tensorpager batch-check ./Qwen2.5-7B-Instruct -i prompts.jsonl --cpu-memory 8GiB --disk-gb-per-s 3

The options that say how a job runs mean what they mean to `batch`: with the same ones it is predicted as it would run.

Exit codes: 0 all rows are good, 3 some are bad. Where the job could not be planned, whatever its rows, that error's own: 1 (the model
does not fit, say), 2 usage, 130 interrupted. The rows are counted all the same; with --json `prediction_error` says why, as stderr does.")]
pub struct BatchCheckArgs {
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    input: InputOptions,
    #[command(flatten)]
    room: RoomOptions,
    #[command(flatten)]
    rates: RateArgs,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    machine: MachineOptions,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Nothing on stderr but errors
    #[arg(long, short)]
    quiet: bool,
}

/// What the job will take with every answer as long as it may be: those that end early take less.
#[derive(Serialize)]
struct Prediction {
    device: String,
    cpu_memory: u64,
    /// Sequences in a pass, at most.
    at_once: usize,
    /// Of keys and values there is room for.
    kv_tokens: usize,
    /// Sequences set back because that is too little.
    preemptions: u64,
    /// Traversals of the layers.
    passes: u64,
    /// Tokens through them, on average.
    tokens_per_pass: f64,
    /// Of the weights on disk; none where they fit into memory.
    bytes_per_pass: u64,
    /// Of all passes, embedding rows included.
    disk_bytes: u64,
    disk_gb_per_s: Option<f64>,
    compute_gflops: f64,
    /// The part of the time that products waited for a core while they were measured for this, where they were not kept for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    busy: Option<f64>,
    /// The disk's part of the passes.
    stream_s: f64,
    /// That of computing, which goes on beside it.
    compute_s: f64,
    /// Looking at pictures, before the passes they are part of.
    pictures_s: f64,
    /// As far as answers go: what is predicted is no bound on what the machine does.
    at_most_s: f64,
}

#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    rows: u64,
    rows_bad: u64,
    sequences: u64,
    prompt_tokens: u64,
    output_tokens_at_most: u64,
    longest_prompt: u64,
    longest_row: u64,
    /// Images and videos.
    pictures: u64,
    picture_tokens: u64,
    context: usize,
    /// None where no row can run.
    prediction: Option<Prediction>,
    /// Why there is none, where rows could: the exit code is this error's.
    #[serde(skip_serializing_if = "Option::is_none")]
    prediction_error: Option<Unplanned<'a>>,
}

/// An error, as programs read it.
#[derive(Serialize)]
struct Unplanned<'a> {
    code: &'a str,
    what: &'a str,
    cause: &'a str,
    fix: &'a str,
}

impl Unplanned<'_> {
    fn of(e: &Error) -> Unplanned<'_> {
        Unplanned {
            code: e.code().as_str(),
            what: e.what(),
            cause: e.cause(),
            fix: e.fix(),
        }
    }
}

pub fn run(args: BatchCheckArgs) -> Result<u8> {
    args.room.check()?;
    args.rates.check()?;
    args.machine.refuse_records("batch-check")?;
    args.machine.check()?;
    let cancel = signals::cancel_flag()?;
    let ckpt = open_checkpoint(&args.source, &cancel, args.quiet)?;
    let model = outline(
        &ckpt,
        &pack_options(&args.source, &cancel)?.dtype,
        &args.source.offload_folder,
        args.source.in_place,
    )?;
    let spec = &model.spec;
    args.machine.note_context(spec, args.quiet);
    let texts = Texts {
        tokenizer: Tokenizer::load(&ckpt.config_dir)?,
        template: ChatTemplate::load(&ckpt.config_dir)?,
        generation: GenerationConfig::load(&ckpt.config_dir)?,
        looker: args.input.looker(&ckpt.config_dir, spec, Look::Whole),
        limits: row_limits(spec, &args.machine)?,
    };
    let source = args.input.source(texts.template.is_some())?;
    let shard = args.input.shard()?;
    let context = args
        .machine
        .context
        .unwrap_or(spec.max_positions)
        .min(spec.max_positions);
    let label = args
        .input
        .served_model_name
        .as_deref()
        .unwrap_or(&ckpt.label);
    let rules = texts.rules(label, 0, &args.sampling, args.machine.context)?;
    let (mut shown, mut told) = (0, Instant::now());
    let mut failed = None;
    let report = check(
        &source,
        shard,
        &rules,
        &texts.tools(),
        context,
        &mut |line, custom_id, e| {
            shown += 1;
            if shown <= SHOWN && !args.json && failed.is_none() {
                let id = custom_id.map(|id| format!(" ({id})")).unwrap_or_default();
                failed = print(&format!("line {line}{id}: {}\n", e.message)).err();
            }
        },
        &mut |rows| {
            if !args.quiet && told.elapsed().as_secs() >= 5 {
                told = Instant::now();
                eprintln!("{rows} rows checked …");
            }
        },
    )?;
    if let Some(e) = failed {
        return Err(e);
    }
    if !args.json {
        print(&lines(&report))?;
    }
    // What the rows are is told whether or not their time can be.
    let (prediction, none) = match report.sequences {
        0 => (None, None),
        _ => match prediction(&args, &model, &report) {
            Ok(prediction) => (Some(prediction), None),
            Err(e) => (None, Some(e)),
        },
    };
    if args.json {
        let output = Output {
            model: label,
            rows: report.rows,
            rows_bad: report.bad,
            sequences: report.sequences,
            prompt_tokens: report.prompt_tokens,
            output_tokens_at_most: report.output_tokens,
            longest_prompt: report.longest_prompt,
            longest_row: report.longest_row,
            pictures: report.pictures,
            picture_tokens: report.picture_tokens,
            context,
            prediction,
            prediction_error: none.as_ref().map(Unplanned::of),
        };
        let text = serde_json::to_string(&output)
            .map_err(|e| Error::internal(format!("the report cannot be written: {e}")))?;
        print(&format!("{text}\n"))?;
    } else if let Some(p) = &prediction {
        print(&foretold(p))?;
    }
    // What cannot run has not finished with bad rows: its error is the command's.
    if let Some(e) = none {
        return Err(e);
    }
    Ok(match report.bad {
        0 => 0,
        _ => 3,
    })
}

fn lines(r: &CheckReport) -> String {
    let mut text = String::new();
    if r.bad > SHOWN {
        text += &format!("… and {} more bad rows\n", r.bad - SHOWN);
    }
    text += &format!(
        "{}, {} of them bad; {} prompt tokens (longest {}), at most {} answer tokens (longest row {})\n",
        counted(r.rows, "row"),
        r.bad,
        r.prompt_tokens,
        r.longest_prompt,
        r.output_tokens,
        r.longest_row
    );
    if r.pictures > 0 {
        text += &format!(
            "{} in {} of the prompt tokens\n",
            counted(r.pictures, "picture"),
            r.picture_tokens
        );
    }
    text
}

fn foretold(p: &Prediction) -> String {
    let share = |seconds: f64| 100.0 * seconds / p.at_most_s.max(1e-9);
    let weights = match p.disk_gb_per_s {
        _ if p.bytes_per_pass == 0 => "all weights in memory".to_string(),
        Some(rate) => format!(
            "{} from disk a pass at {rate:.2} GB/s",
            human_bytes(p.bytes_per_pass)
        ),
        None => format!(
            "{} a pass from a disk of unknown rate, which is left out (--disk-gb-per-s gives it)",
            human_bytes(p.bytes_per_pass)
        ),
    };
    let mut text = format!(
        "about {:.0} s, less where answers end early: {} passes of up to {} ({:.0} tokens on average), {weights}\n",
        p.at_most_s,
        p.passes,
        counted(p.at_once as u64, "sequence"),
        p.tokens_per_pass
    );
    text += &format!(
        "of it the disk is busy for {:.0} s ({:.0} %), computing for {:.0} s ({:.0} %)",
        p.stream_s,
        share(p.stream_s),
        p.compute_s,
        share(p.compute_s)
    );
    if p.pictures_s > 0.0 {
        text += &format!(
            ", looking at pictures takes {:.0} s ({:.0} %)",
            p.pictures_s,
            share(p.pictures_s)
        );
    }
    text + "\n" + &p.busy.map(busy_told).unwrap_or_default()
}

/// The job planned as `batch` would run it, and its passes priced one by one.
fn prediction(args: &BatchCheckArgs, model: &Outline, r: &CheckReport) -> Result<Prediction> {
    // What reading the rows left in the allocator is not the process's for good.
    crate::io::give_back();
    let computer = Computer::of(&args.rates, &args.machine, model, args.quiet || args.json)?;
    let machine = computer.machine(&args.machine);
    let gpu = computer.gpu_room(&machine)?;
    let dtype = kv_dtype(&model.units);
    // Whether there is anything to read decides what is measured.
    let plan = |known| Planned::new(args, model, r, &machine, gpu, dtype, known);
    let first = plan(None)?;
    let fitted = &first.fitted;
    // Measuring is to stay within the budget that the job was planned with.
    let taken = HostMemory::read().resident + SLACK_BYTES;
    let room = fitted.budget.saturating_sub(taken);
    let reads = fitted.plan.streamed_bytes + fitted.plan.gather_bytes > 0 || r.pictures > 0;
    let disk = match reads {
        true => args.rates.disk(model, room)?,
        false => args.rates.disk_known(model),
    };
    let AskedRates { rates, lost } = args.rates.with_disk(
        disk.unwrap_or(f64::INFINITY),
        &computer,
        &machine,
        model,
        dtype,
        room,
    )?;
    // How many sequences are best is decided as `batch` would: by what it will find on record, which by now is there, or by rates given by hand.
    let weights = Weights::from(model);
    let known = match (args.rates.by_hand(), disk) {
        (true, Some(_)) => Some(KnownMachine {
            placed_by: computer.known(&rates),
            rates: rates.clone(),
            host: opening(model),
            gpu,
        }),
        (true, None) => None,
        // A pack that is still to be made has no record yet.
        (false, _) if !model.ready && !model.in_place => None,
        (false, _) => KnownMachine::on_record(&weights, &machine)?,
    };
    let planned = match known {
        None => first,
        known => plan(known)?,
    };
    let fitted = &planned.fitted;
    let job = planned.passes(model, r, &rates, dtype);
    let pictures_s = planned.pictures_s(model, r, &rates);
    Ok(Prediction {
        device: computer.name(),
        cpu_memory: fitted.budget,
        at_once: job.at_once,
        kv_tokens: planned.sizing.kv_tokens,
        preemptions: job.preemptions,
        passes: job.passes,
        tokens_per_pass: job.rows as f64 / job.passes.max(1) as f64,
        bytes_per_pass: fitted.plan.streamed_bytes,
        disk_bytes: job.disk_bytes,
        disk_gb_per_s: disk.filter(|_| reads || fitted.plan.streamed_bytes > 0),
        compute_gflops: rates.compute.gflops,
        busy: lost,
        stream_s: job.disk_s,
        compute_s: job.compute_s,
        pictures_s,
        at_most_s: job.pass_s + pictures_s,
    })
}

/// Host memory as it will be when `batch` has opened the model.
fn opening(model: &Outline) -> HostMemory {
    let mut host = HostMemory::read();
    host.resident += model.opening_bytes();
    host
}

/// The engine that `batch` would open for the rows.
struct Planned {
    sizes: Vec<UnitSize>,
    fitted: Fitted,
    sizing: Sizing,
}

impl Planned {
    fn new(
        args: &BatchCheckArgs,
        model: &Outline,
        r: &CheckReport,
        machine: &MachineOptions,
        gpu: Option<GpuRoom>,
        dtype: Dtype,
        known: Option<KnownMachine>,
    ) -> Result<Planned> {
        let host = opening(model);
        let placed_by = known.as_ref().map(|known| known.placed_by.clone());
        let weights = Weights::from(model);
        let on_gpu = gpu.map(|g| g.limit.saturating_sub(g.base));
        let input = args.room.input(machine, on_gpu, dtype.bytes(), r.rows)?;
        let ((sizes, fitted), sizing) = with_room(
            &weights,
            machine,
            &r.sample,
            input,
            known,
            &mut |_, want| {
                let mut options = weights.engine_options(machine, want, true)?;
                options.cpu_memory = Some(input.budget);
                if let Some(rates) = &placed_by {
                    options.rates = rates.clone();
                }
                let page_bytes = options.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
                let sizes = weights.sizes(page_bytes, gpu.is_some());
                match fit_on(&model.spec, dtype, &sizes, &options, &host, gpu) {
                    Ok(fitted) => Ok((sizes, fitted)),
                    Err(e) => Err(Advisor::new(&weights, &options, host).too_little(e)),
                }
            },
        )?;
        Ok(Planned {
            sizes,
            fitted,
            sizing,
        })
    }

    fn passes(
        &self,
        model: &Outline,
        r: &CheckReport,
        rates: &MachineRates,
        dtype: Dtype,
    ) -> JobPasses {
        let fitted = &self.fitted;
        let limits = Limits {
            context: fitted.context,
            sequences: self.sizing.sequences,
            rows: fitted.pass_tokens,
            wanted: self.sizing.sequences,
            kv_blocks: fitted.kv_blocks,
        };
        let mut prices: HashMap<PassLoad, PassCost> = HashMap::new();
        let mut price = |load: PassLoad| {
            let load = PassLoad {
                kv_tokens: coarse(load.kv_tokens),
                ..load
            };
            if prices.len() >= PRICES {
                prices.clear();
            }
            *prices.entry(load).or_insert_with(|| {
                let PassLoad {
                    rows,
                    wanted,
                    kv_tokens,
                } = load;
                let work = pass_work(&model.spec, dtype, fitted, rows, wanted, kv_tokens);
                predict(&self.sizes, &fitted.plan, rates, &work)
            })
        };
        foresee(
            &r.shapes,
            &limits,
            fitted.plan.streamed_bytes > 0,
            &mut price,
        )
    }

    /// The tower is streamed once for each wave of pictures, and computes beside that.
    fn pictures_s(&self, model: &Outline, r: &CheckReport, rates: &MachineRates) -> f64 {
        let (Some(vision), Some(room)) = (&model.spec.vision, &self.sizing.vision) else {
            return 0.0;
        };
        let waves = r.picture_tokens.div_ceil(room.tokens.max(1) as u64);
        let tower = self.sizes.iter().filter(|u| is_vision(u.kind));
        let bytes: u64 = tower.map(|u| u.read_bytes).sum();
        let slice = r.patch_pairs / r.patches.max(1);
        let flops = tower_flops(&model.spec, vision, r.patches as usize, slice as usize);
        let stream_s = (waves * bytes) as f64 / (rates.disk_gb_per_s * 1e9);
        stream_s.max(flops / (rates.compute.gflops * 1e9))
    }
}

/// To three per cent: keys and values are a small part of what a pass takes, and passes alike are to have one price.
fn coarse(tokens: u64) -> u64 {
    let step = (tokens >> 5).next_power_of_two();
    match tokens {
        0..64 => tokens,
        _ => (tokens + step / 2) / step * step,
    }
}
