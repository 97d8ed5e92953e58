//! `batch --bench N`: synthetic prompts of fixed lengths, nothing read, nothing written: the engine's throughput.

use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::advice;
use super::batch::open_sized;
use super::batch_input::Texts;
use super::batch_room::RoomOptions;
use super::gpu::gpu_bytes;
use super::model::Model;
use super::options::MachineOptions;
use super::run::print;
use super::signals::TwoStage;
use crate::engine::jobs::{RowSample, SizingInput};
use crate::engine::{Engine, EngineStats, Event, Job};
use crate::error::{Code, Error, Result};
use crate::report::summary::{PagingReport, Timings};
use crate::text::{Draw, SamplingParams};

#[derive(Args, Clone, Debug)]
pub struct BenchOptions {
    /// Measure instead: N synthetic prompts, end-of-text ignored
    #[arg(long, value_name = "N", conflicts_with_all = ["input", "prompts", "output"], help_heading = "Bench")]
    pub bench: Option<usize>,
    /// Tokens of each synthetic prompt
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Bench")]
    pub input_len: usize,
    /// Tokens generated for each
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Bench")]
    pub output_len: usize,
}

pub struct Setup<'a> {
    pub options: &'a BenchOptions,
    pub machine: &'a MachineOptions,
    pub room: RoomOptions,
    pub json: bool,
    pub quiet: bool,
}

#[derive(Serialize)]
struct BenchReport<'a> {
    model: &'a str,
    device: &'a str,
    dtype: &'a str,
    rows: usize,
    input_len: usize,
    output_len: usize,
    sequences: usize,
    prompt_tokens: usize,
    output_tokens: usize,
    /// Prompts and answers.
    total_tokens_per_s: f64,
    preemptions: u64,
    /// A hash of all tokens: runs that agree say the same.
    tokens_hash: String,
    timings: Timings,
    paging: PagingReport,
}

pub fn run(
    model: &Model,
    texts: &Texts,
    how: &Setup<'_>,
    signals: &TwoStage,
    started: Instant,
) -> Result<u8> {
    let o = how.options;
    let rows = o.bench.unwrap_or(0);
    if rows == 0 || o.input_len == 0 || o.output_len == 0 {
        return Err(Error::new(
            Code::Usage,
            "there is nothing to measure",
            "--bench, --input-len and --output-len must be 1 or more",
            "give --bench 256 --input-len 32 --output-len 64",
        ));
    }
    let row = o.input_len + o.output_len;
    let sample = RowSample {
        mean_tokens: row as f64,
        longest_tokens: row,
        choices: 1.0,
        ..RowSample::default()
    };
    let gpu = gpu_bytes(how.machine, &model.store)?;
    let input = how
        .room
        .input(how.machine, gpu, model.element_bytes(), rows as u64)?;
    let input = SizingInput {
        context: Some(how.machine.context.unwrap_or(row)),
        ..input
    };
    let load = Instant::now();
    let mut opened = open_sized(
        model,
        texts,
        how.machine,
        &sample,
        input,
        signals,
        how.quiet,
    )?;
    let load_s = load.elapsed().as_secs_f64();
    let m = measure(&mut opened.engine, texts, o, rows)?;
    let (engine, sizing) = (&opened.engine, &opened.sizing);
    let settings = model.read_settings(how.machine, &m.during, engine);
    let report = BenchReport {
        model: &model.label,
        device: engine.device().name(),
        dtype: &model.dtype(),
        rows,
        input_len: o.input_len,
        output_len: o.output_len,
        sequences: sizing.sequences,
        prompt_tokens: rows * o.input_len,
        output_tokens: m.tokens,
        total_tokens_per_s: (rows * o.input_len + m.tokens) as f64 / m.seconds,
        preemptions: engine.schedule_stats().preemptions,
        tokens_hash: format!("{:016x}", m.hash),
        timings: Timings {
            pack_s: model.pack_s,
            load_s,
            time_to_first_token_s: m.first_s,
            decode_s: m.seconds,
            output_tokens_per_s: m.tokens as f64 / m.seconds,
            total_s: started.elapsed().as_secs_f64(),
        },
        paging: PagingReport::new(engine, &m.during, &settings),
    };
    model.write_records(how.machine, engine, &report.timings, &report.paging)?;
    let rate = report.timings.output_tokens_per_s;
    let advice = opened.faster(&report.paging, &m.during, rate, how.room.kv_memory);
    if !how.quiet
        && let Some(advice) = advice::told(&advice)
    {
        eprintln!("{advice}");
    }
    if how.json {
        let text = serde_json::to_string(&report)
            .map_err(|e| Error::internal(format!("the report cannot be written: {e}")))?;
        return print(&format!("{text}\n")).map(|()| 0);
    }
    let p = &report.paging;
    let text = format!(
        "{rows} rows of {} in / {} out, {} at once: {:.1} tokens/s out, {:.1} through, {} passes, {:.2} GB/s, \
         {:.0} % waiting for the disk\n",
        o.input_len,
        o.output_len,
        sizing.sequences,
        report.timings.output_tokens_per_s,
        report.total_tokens_per_s,
        p.passes,
        p.disk_gb_per_s,
        100.0 * p.stall_disk_s / m.during.pass.as_secs_f64().max(1e-9),
    );
    print(&text).map(|()| 0)
}

struct Measured {
    tokens: usize,
    seconds: f64,
    first_s: f64,
    hash: u64,
    during: EngineStats,
}

fn measure(engine: &mut Engine, texts: &Texts, o: &BenchOptions, rows: usize) -> Result<Measured> {
    let vocab = texts.tokenizer.id_limit().min(engine.spec().vocab) as f64;
    let before = engine.stats();
    let started = Instant::now();
    let mut m = Measured {
        tokens: 0,
        seconds: 0.0,
        first_s: 0.0,
        hash: 0,
        during: before,
    };
    let mut submitted = 0;
    let mut events = Vec::new();
    // Submitted as there is room: the queue is not what is measured.
    while submitted < rows || engine.pending() > 0 {
        while submitted < rows && engine.pending() < 1024 {
            engine.submit(synthetic(submitted, vocab, o))?;
            submitted += 1;
        }
        events.clear();
        engine.step(&mut events)?;
        for event in &events {
            match event {
                Event::Token { job, token, .. } => {
                    if m.tokens == 0 {
                        m.first_s = started.elapsed().as_secs_f64();
                    }
                    m.tokens += 1;
                    // A sum: the order in which rows finish says nothing.
                    let one = twox_hash::XxHash3_64::oneshot_with_seed(job.0, &token.to_le_bytes());
                    m.hash = m.hash.wrapping_add(one);
                }
                Event::Failed { error, .. } => return Err(error.clone()),
                Event::Finished { .. } => {}
            }
        }
    }
    m.seconds = started.elapsed().as_secs_f64();
    m.during = engine.stats().since(&before);
    Ok(m)
}

/// Row `row`: random tokens, so that no prefix is shared, and a greedy answer.
fn synthetic(row: usize, vocab: f64, o: &BenchOptions) -> Job {
    let token = |i: usize| {
        let draw = Draw {
            seed: row as u64,
            choice: 0,
            position: i as u64,
        };
        (draw.uniform() * vocab) as u32
    };
    Job {
        prompt: (0..o.input_len).map(token).collect(),
        max_tokens: o.output_len,
        sampling: SamplingParams::greedy(),
        ..Job::default()
    }
}
