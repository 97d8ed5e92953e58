//! `batch-check`: a job looked over before it runs. No weight is read but to measure the disk.

use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::batch::{InputOptions, Texts, row_limits};
use super::model::open_checkpoint;
use super::options::{MachineOptions, SamplingOptions, SourceOptions};
use super::run::print;
use super::signals;
use crate::checkpoint::Checkpoint;
use crate::device::{Device, Into, WeightView};
use crate::engine::jobs::{CheckReport, check};
use crate::error::{Error, Result};
use crate::media::Look;
use crate::paging::DiskRates;
use crate::spec::{ModelSpec, UnitKind, canonical_name, parse_config};
use crate::text::{ChatTemplate, GenerationConfig, Tokenizer};
use crate::units::{Dtype, counted, human_bytes};

/// Bad rows shown; the rest are counted.
const SHOWN: u64 = 20;
/// Sequences at once that the prediction assumes.
const SEQUENCES: usize = 256;
/// Memory the disk may be measured with.
const PROBE_BYTES: u64 = 64 << 20;

#[derive(Args)]
#[command(after_help = "Example:
  tensorpager batch-check ./Qwen2.5-7B-Instruct -i prompts.jsonl")]
pub struct BatchCheckArgs {
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    input: InputOptions,
    /// Sequences that would run at once
    #[arg(long, alias = "max-num-seqs", value_name = "N", default_value_t = SEQUENCES)]
    max_sequences: usize,
    /// The disk's rate, instead of measuring it
    #[arg(long, value_name = "X")]
    disk_gb_per_s: Option<f64>,
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

/// What the job will take, at most: answers that end early take less.
#[derive(Serialize)]
struct Prediction {
    /// Traversals of the layers.
    passes: u64,
    /// Of the weights on disk; none where they fit into memory.
    bytes_per_pass: u64,
    disk_gb_per_s: Option<f64>,
    compute_gflops: f64,
    stream_s: f64,
    compute_s: f64,
    /// The longer of the two.
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
    prediction: Prediction,
}

pub fn run(args: BatchCheckArgs) -> Result<u8> {
    let ckpt = open_checkpoint(&args.source, &signals::cancel_flag()?, args.quiet)?;
    let spec = parse_config(&ckpt.config)?;
    args.machine.note_context(&spec, args.quiet);
    let texts = Texts {
        tokenizer: Tokenizer::load(&ckpt.config_dir)?,
        template: ChatTemplate::load(&ckpt.config_dir)?,
        generation: GenerationConfig::load(&ckpt.config_dir)?,
        looker: args.input.looker(&ckpt.config_dir, &spec, Look::Whole),
        limits: row_limits(&spec, &args.machine)?,
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
    let prediction = predict(&args, &ckpt, &spec, &report)?;
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
        };
        let text = serde_json::to_string(&output)
            .map_err(|e| Error::internal(format!("the report cannot be written: {e}")))?;
        print(&format!("{text}\n"))?;
    } else {
        print(&lines(&report, &prediction))?;
    }
    Ok(match report.bad {
        0 => 0,
        _ => 3,
    })
}

fn lines(r: &CheckReport, p: &Prediction) -> String {
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
    let disk = match p.disk_gb_per_s {
        _ if p.bytes_per_pass == 0 => "all weights in memory".to_string(),
        Some(rate) => format!(
            "{} from disk a pass at {rate:.2} GB/s",
            human_bytes(p.bytes_per_pass)
        ),
        None => "a disk of unknown rate".to_string(),
    };
    text + &format!(
        "at most {:.0} s: {} passes with {disk} take {:.0} s, computing at {:.0} GFLOP/s takes {:.0} s\n",
        p.at_most_s, p.passes, p.stream_s, p.compute_gflops, p.compute_s
    )
}

/// The formula of a pass, max(bytes / disk rate, 2 · parameters · tokens / compute rate), over the whole job.
fn predict(
    args: &BatchCheckArgs,
    ckpt: &Checkpoint,
    spec: &ModelSpec,
    r: &CheckReport,
) -> Result<Prediction> {
    let dtype_of = |name: &str| ckpt.tensors.get(name).map_or(Dtype::BF16, |t| t.dtype);
    let units = spec.units(&|name: &str| dtype_of(&canonical_name(name)));
    let size = |wanted: fn(UnitKind) -> bool| {
        let tensors = units.iter().filter(|u| wanted(u.kind));
        tensors
            .flat_map(|u| &u.tensors)
            .fold((0, 0), |(bytes, parameters), t| {
                let cols: usize = t.shape.iter().skip(1).product();
                let elements = (t.rows.len() * cols.max(1)) as u64;
                let own = elements * dtype_of(&t.name).bytes() as u64;
                (bytes + own, parameters + elements)
            })
    };
    let (bytes, parameters) = size(|k| matches!(k, UnitKind::Layer(_) | UnitKind::Head(_)));
    // Every patch goes through the blocks of the tower; what attention and the merger add is a few percent.
    let (_, tower) = size(|k| matches!(k, UnitKind::VisionBlock(_)));
    let budget = super::batch::budget(&args.machine)?;
    // As `--device-map auto` would: what is beyond four fifths of the budget comes from disk.
    let bytes_per_pass = match args.machine.device_map.as_str() {
        "cpu" => 0,
        "disk" => bytes,
        _ => bytes.saturating_sub(budget / 5 * 4),
    };
    let disk_gb_per_s = match args.disk_gb_per_s {
        Some(rate) if rate > 0.0 => Some(rate),
        _ if bytes_per_pass == 0 => None,
        _ => {
            let files: Vec<_> = ckpt.files.iter().map(|f| f.path.clone()).collect();
            DiskRates::of(&ckpt.dir, false).best_or_probe(&files, PROBE_BYTES)?
        }
    };
    let at_once = (args.max_sequences.max(1) as u64).min(r.sequences.max(1));
    let longest_answer = r.output_tokens.div_ceil(r.sequences.max(1));
    let passes = match r.sequences {
        0 => 0,
        _ => r.output_tokens.div_ceil(at_once).max(longest_answer) + 1,
    };
    let stream_s = disk_gb_per_s.map_or(0.0, |rate| {
        passes as f64 * bytes_per_pass as f64 / (rate * 1e9)
    });
    let flops = compute_rate(
        args.machine.threads,
        spec,
        dtype_of("model.layers.0.mlp.down_proj.weight"),
    )?;
    let tokens = (r.prompt_tokens + r.output_tokens) as f64;
    let work = parameters as f64 * tokens + tower as f64 * r.patches as f64;
    let compute_s = 2.0 * work / flops;
    Ok(Prediction {
        passes,
        bytes_per_pass,
        disk_gb_per_s,
        compute_gflops: flops / 1e9,
        stream_s,
        compute_s,
        at_most_s: stream_s.max(compute_s),
    })
}

/// Operations a second of a product with the model's width, measured for a few tenths of a second.
fn compute_rate(threads: Option<usize>, spec: &ModelSpec, dtype: Dtype) -> Result<f64> {
    const ROWS: usize = 128;
    let device = Device::cpu(threads, None)?;
    let (cols, outs) = (spec.hidden, spec.intermediate.clamp(64, 4096));
    // 0x3C3C is a small number in either 16-bit type.
    let bytes = vec![0x3Cu8; cols * outs * dtype.bytes()];
    let w = WeightView::packed(dtype, outs, cols, &bytes);
    let mut a = device.acts(ROWS, cols, dtype)?;
    a.round_to(dtype);
    let zeros = device.rows(ROWS, cols)?;
    device.swiglu(&zeros, &zeros, ROWS, cols, &mut a)?;
    let mut out = device.rows(ROWS, outs)?;
    device.linear(&a, ROWS, &w, None, &mut out, 0, Into::Store)?;
    let started = Instant::now();
    let mut products = 0u32;
    while started.elapsed().as_secs_f64() < 0.3 {
        device.linear(&a, ROWS, &w, None, &mut out, 0, Into::Store)?;
        products += 1;
    }
    let each = 2.0 * (ROWS * cols * outs) as f64;
    Ok(each * f64::from(products) / started.elapsed().as_secs_f64())
}
