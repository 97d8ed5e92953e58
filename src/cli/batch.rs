//! `batch`: a JSONL job, at the highest throughput, resumed wherever it was cut off.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::advice::{self, Advisor, Looked, Queue, Ran, Work};
use super::batch_bench::{self, BenchOptions};
use super::batch_input::{InputOptions, Texts, row_limits};
use super::batch_report;
use super::batch_room::{KnownMachine, RoomOptions, fits_somehow, with_room};
use super::found::Found;
use super::generate::warn_of_unheeded;
use super::gpu::gpu_bytes;
use super::machine::Weights;
use super::model::{Model, OpenFor};
use super::options::{MachineOptions, SamplingOptions, SourceOptions};
use super::signals::{self, TwoStage};
use crate::engine::jobs::{
    BatchJob, JobSpec, MaxErrors, Order, Paths, RowSample, Shard, Sizing, SizingInput, check_paths,
    default_errors, fingerprint,
};
use crate::engine::{Engine, EngineStats};
use crate::error::{Code, Error, Result};
use crate::media::Look;
use crate::report::job::{Figures, JobView, ProgressKind};
use crate::report::summary::{PagingReport, Timings, paging_line};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OrderArg {
    Input,
    Completion,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProgressArg {
    Auto,
    Bar,
    Plain,
    Json,
    None,
}

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager batch ./Qwen2.5-7B-Instruct -i prompts.jsonl -o answers.jsonl
  tensorpager batch ./Qwen2.5-7B-Instruct --prompts questions.txt -o answers.jsonl --max-tokens 64
  tensorpager batch ./Qwen2.5-7B-Instruct --bench 256 --input-len 32 --output-len 64

The same command again goes on where the last one stopped. Exit codes: 0 all rows answered, 3 some failed
(see the errors file), 130 interrupted: Ctrl-C once finishes what runs, twice stops at once.")]
pub struct BatchArgs {
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    input: InputOptions,
    /// Answers, a row each, in the OpenAI batch format
    #[arg(
        long,
        short = 'o',
        value_name = "FILE.jsonl",
        required_unless_present = "bench",
        help_heading = "Job"
    )]
    output: Option<PathBuf>,
    /// Rows that failed, with their line numbers [default: OUTPUT.errors.jsonl]
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Job")]
    errors: Option<PathBuf>,
    /// Try rows again that failed before
    #[arg(long, help_heading = "Job")]
    retry_errors: bool,
    /// Give up when more rows than this have failed: a number or a share such as 2%
    #[arg(long, value_name = "N|N%", help_heading = "Job")]
    max_errors: Option<String>,
    /// Begin anew, whatever the output holds
    #[arg(long, help_heading = "Job")]
    overwrite: bool,
    /// Of the answers, once all are there
    #[arg(long, value_enum, default_value = "input", help_heading = "Job")]
    order: OrderArg,
    #[command(flatten)]
    room: RoomOptions,
    #[command(flatten)]
    bench: BenchOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    machine: MachineOptions,
    /// How progress is shown, on stderr
    #[arg(long, value_enum, default_value = "auto", env = "TENSORPAGER_PROGRESS")]
    progress: ProgressArg,
    /// End stdout with one JSON object
    #[arg(long)]
    json: bool,
    /// Nothing on stderr but errors
    #[arg(long, short)]
    quiet: bool,
}

pub fn run(args: BatchArgs) -> Result<u8> {
    let started = Instant::now();
    let signals = signals::two_stage()?;
    args.room.check()?;
    let max_errors = args.max_errors.as_deref().map(MaxErrors::parse);
    let max_errors = max_errors.transpose()?;
    let shard = args.input.shard()?;
    let quiet = args.quiet || args.progress == ProgressArg::None;
    let budget = args.machine.cpu_budget()?;
    args.machine.check()?;
    if let Some(output) = &args.output {
        // The template decides how rows are read, not where they are.
        check_paths(
            &args.input.source(true)?,
            &paths(&args, shard, shard.path(output)),
        )?;
    }
    let found = Found::open_with_text(&args.source, &signals.cancel, quiet)?;
    // The least that any row takes: how much all want is known when they were read.
    let least = OpenFor {
        context: args.machine.context.unwrap_or(1),
        kv_tokens: Some(1),
        ..OpenFor::default()
    };
    found.expect_room(&args.machine, &least, quiet)?;
    let model = found.prepare(budget, &args.source, &signals.cancel, quiet)?;
    let texts = Texts {
        tokenizer: model.tokenizer()?,
        template: model.chat_template()?,
        generation: model.generation_config()?,
        looker: args
            .input
            .looker(&model.store.text_dir, &model.store.spec, Look::Header),
        limits: row_limits(&model.store.spec, &args.machine)?,
    };
    if args.bench.bench.is_some() {
        let how = batch_bench::Setup {
            options: &args.bench,
            machine: &args.machine,
            room: args.room,
            json: args.json,
            quiet,
        };
        return batch_bench::run(&model, &texts, &how, &signals, started);
    }
    let Some(output) = &args.output else {
        return Err(Error::internal("an output was required"));
    };
    warn_of_unheeded(&texts.generation, quiet);
    let spec = job_spec(&args, &model, &texts, shard, shard.path(output), max_errors)?;
    let mut job = BatchJob::open(spec, texts.looker.as_ref(), &mut |_| {})?;
    announce(&job, shard, quiet);
    let load = Instant::now();
    let mut opened = open_engine(&args, &model, &texts, &job, &signals, quiet)?;
    let load_s = load.elapsed().as_secs_f64();
    signals.working();
    let mut view = JobView::new(kind(args.progress, args.quiet));
    let summary = match &mut opened {
        None => job.settled()?,
        Some(Opened { engine, sizing, .. }) => {
            let ran = job.run(engine, texts.tools(), sizing, &signals.stop, &mut |p| {
                view.update(p);
            });
            if let Ok(summary) = &ran {
                view.finish(&summary.progress);
            }
            ran?
        }
    };
    let timings = Timings {
        pack_s: model.pack_s,
        load_s,
        decode_s: summary.progress.elapsed.as_secs_f64(),
        output_tokens_per_s: Figures::new(&summary.progress).output_tokens_per_s,
        total_s: started.elapsed().as_secs_f64(),
        ..Timings::default()
    };
    let during = &summary.progress.stats;
    let paging = opened.as_ref().map(|Opened { engine, .. }| {
        let settings = model.read_settings(&args.machine, during, engine);
        PagingReport::new(engine, during, &settings)
    });
    let mut advice = Vec::new();
    if let (Some(opened), Some(paging)) = (&opened, &paging) {
        model.write_records(&args.machine, &opened.engine, &timings, paging)?;
        advice = opened.faster(
            paging,
            during,
            timings.output_tokens_per_s,
            args.room.kv_memory,
        );
    }
    if !quiet {
        eprintln!("{}", batch_report::last_words(&job, &summary));
        if let (Some(Opened { engine, .. }), Some(paging)) = (&opened, &paging) {
            eprintln!("{}", paging_line(paging, during, engine));
        }
        if let Some(advice) = advice::told(&advice) {
            eprintln!("{advice}");
        }
    }
    if args.json {
        batch_report::print_json(
            &model,
            &job,
            &summary,
            opened.as_ref(),
            paging.unwrap_or_default(),
            timings,
            &advice,
        )?;
    }
    Ok(match (summary.remaining, summary.failed) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 130,
    })
}

/// An engine sized for a job.
pub(super) struct Opened {
    pub engine: Engine,
    pub sizing: Sizing,
    advisor: Advisor,
    /// Sequences that the rows stand for.
    sequences: u64,
}

impl Opened {
    /// What would be faster; `tokens_per_s`: as the job went, `kv_bytes`: `--kv-memory`.
    pub fn faster(
        &self,
        paging: &PagingReport,
        during: &EngineStats,
        tokens_per_s: f64,
        kv_bytes: Option<u64>,
    ) -> Vec<String> {
        self.advisor.faster(&Ran {
            report: paging,
            during,
            device: self.engine.device(),
            work: Work::Queue(Queue {
                rows: self.sequences,
                kv_bytes,
                tokens_per_s,
            }),
        })
    }
}

fn paths(args: &BatchArgs, shard: Shard, output: PathBuf) -> Paths {
    Paths {
        errors: match &args.errors {
            Some(path) => shard.path(path),
            None => default_errors(&output),
        },
        output,
    }
}

fn job_spec(
    args: &BatchArgs,
    model: &Model,
    texts: &Texts,
    shard: Shard,
    output: PathBuf,
    max_errors: Option<MaxErrors>,
) -> Result<JobSpec> {
    let label = args
        .input
        .served_model_name
        .as_deref()
        .unwrap_or(&model.label);
    let print = fingerprint(&model.store)?;
    Ok(JobSpec {
        source: args.input.source(texts.template.is_some())?,
        paths: paths(args, shard, output),
        rules: texts.rules(label, print, &args.sampling, args.machine.context)?,
        shard,
        order: match args.order {
            OrderArg::Input => Order::Input,
            OrderArg::Completion => Order::Completion,
        },
        overwrite: args.overwrite,
        retry_errors: args.retry_errors,
        max_errors,
        created: source_date_epoch()?,
        limits: texts.limits,
    })
}

/// The reproducible builds' convention: the time that outputs are to carry.
fn source_date_epoch() -> Result<Option<u64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Err(_) => Ok(None),
        Ok(text) => text.trim().parse().map(Some).map_err(|_| {
            Error::new(
                Code::Usage,
                "SOURCE_DATE_EPOCH is not a time",
                format!("it is `{text}`"),
                "unset it, or give seconds since 1970",
            )
        }),
    }
}

fn announce(job: &BatchJob, shard: Shard, quiet: bool) {
    if quiet {
        return;
    }
    if shard.count > 1 {
        eprintln!(
            "shard {}/{}: {} rows, into {}",
            shard.index,
            shard.count,
            job.rows(),
            job.paths().output.display()
        );
    }
    if job.done() + job.failed() > 0 {
        eprintln!(
            "resuming: {} of {} rows are answered, {} failed",
            job.done(),
            job.rows(),
            job.failed()
        );
    }
}

/// The engine under the user's budget, sized for the rows that remain; none where none do.
fn open_engine(
    args: &BatchArgs,
    model: &Model,
    texts: &Texts,
    job: &BatchJob,
    signals: &TwoStage,
    quiet: bool,
) -> Result<Option<Opened>> {
    if job.remaining() == 0 {
        return Ok(None);
    }
    let sample = job.sample(&texts.tools())?;
    crate::io::give_back();
    let gpu = gpu_bytes(&args.machine, &model.store)?;
    let input = args
        .room
        .input(&args.machine, gpu, model.element_bytes(), job.remaining())?;
    let opened = open_sized(model, texts, &args.machine, &sample, input, signals, quiet);
    opened
        .map(Some)
        .map_err(|e| explained(e, args, model, texts, job, &sample, &input))
}

/// A job that does not fit, with limits on its pictures under which it would, where that can be known. Not of one that was begun: other limits
/// would make another job of it.
fn explained(
    error: Error,
    args: &BatchArgs,
    model: &Model,
    texts: &Texts,
    job: &BatchJob,
    sample: &RowSample,
    input: &SizingInput,
) -> Error {
    let begun = job.done() + job.failed() > 0;
    let looker = match (error.code(), &texts.looker) {
        (Code::Memory, Some(looker)) if sample.pictures.rows > 0 && !begun => looker,
        _ => return error,
    };
    let (Ok(Some(rows)), Ok(processor)) = (job.pictures(&texts.tools()), looker.processor()) else {
        return error;
    };
    crate::io::give_back();
    let gpu = model.gpu_room(&args.machine);
    let looked = Looked::of_job(processor, *looker.options(), rows);
    advice::with_smaller_pictures(error, &looked, &|pictures| {
        // Rows stay as long as they are with all their pictures' tokens: what fits then fits in any case.
        let sample = RowSample {
            pictures: *pictures,
            ..*sample
        };
        fits_somehow(&model.store.spec, &sample, input, &|want| {
            let advisor = model.advisor(&args.machine, want);
            advisor.is_ok_and(|a| a.with_gpu(gpu).fits_as_asked())
        })
    })
}

/// An engine with the room that [`with_room`] finds.
pub(super) fn open_sized(
    model: &Model,
    texts: &Texts,
    machine: &MachineOptions,
    sample: &RowSample,
    input: SizingInput,
    signals: &TwoStage,
    quiet: bool,
) -> Result<Opened> {
    let sequences = (input.rows as f64 * sample.choices) as u64;
    let weights = Weights::from(&model.store);
    let known = match (input.sequences, input.kv_bytes) {
        (None, None) => KnownMachine::on_record(&weights, machine)?,
        // As the user says.
        _ => None,
    };
    let mut tried = OpenFor::default();
    let open = &mut |_: &Sizing, want: &OpenFor| {
        tried = OpenFor {
            sample_limit: Some(texts.tokenizer.id_limit()),
            ..want.clone()
        };
        let advisor = model.advisor(machine, &tried)?;
        let engine = model.plain_engine(machine, &tried, &signals.cancel, quiet)?;
        Ok((engine, advisor))
    };
    let opened = with_room(&weights, machine, sample, input, known, open);
    // Of what did not fit only the last is explained: that takes a while.
    let ((engine, advisor), sizing) = opened.map_err(|e| model.explained(machine, &tried, e))?;
    Ok(Opened {
        engine,
        sizing,
        advisor,
        sequences,
    })
}

fn kind(arg: ProgressArg, quiet: bool) -> ProgressKind {
    match (arg, quiet) {
        (ProgressArg::Json, _) => ProgressKind::Json,
        (_, true) | (ProgressArg::None, _) => ProgressKind::None,
        (ProgressArg::Auto, _) => ProgressKind::Auto,
        (ProgressArg::Bar, _) => ProgressKind::Bar,
        (ProgressArg::Plain, _) => ProgressKind::Plain,
    }
}
