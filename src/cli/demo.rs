//! `demo`: no model, no GPU, no network needed. First a small trained model answers sums and sorts; then a synthetic
//! checkpoint with a 7B model's layer shapes shows what paging costs, and that a pass costs the same for many sequences.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Args;

use super::generate::generate;
use super::model::{Model, OpenFor, stop_tokens};
use super::options::{KeptIn, MachineOptions, SourceOptions, size};
use super::{signals, synthetic};
use crate::engine::{Engine, EngineStats, Event, Job};
use crate::error::{Code, Error, Result};
use crate::report::summary::PagingReport;
use crate::text::{SamplingParams, StopStrings};
use crate::units::human_bytes;

/// The bundled model: every file of its folder, made by demo/train.py.
const BUNDLED: [(&str, &[u8]); 5] = [
    (
        "config.json",
        include_bytes!("../../demo/model/config.json"),
    ),
    (
        "generation_config.json",
        include_bytes!("../../demo/model/generation_config.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../demo/model/model.safetensors"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../demo/model/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../demo/model/tokenizer_config.json"),
    ),
];
/// Problems the model never saw in training, with their answers.
const HELD_OUT: &str = include_str!("../../demo/model/heldout.json");

const SEQUENCES: [usize; 3] = [1, 8, 64];
/// Tokens a sequence generates in the measured part: one to begin with, the rest are measured passes.
const STEPS: usize = 4;

/// A line on stdout. A closed pipe is an error to report, which `println!` makes a panic of.
macro_rules! say {
    ($($text:tt)*) => {
        super::run::print(&format!("{}\n", format_args!($($text)*)))?
    };
}

#[derive(Args)]
pub struct DemoArgs {
    /// Size of the synthetic checkpoint
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "2GiB")]
    size: u64,
    /// Memory the synthetic checkpoint may be run in [default: its smallest plan]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    cpu_memory: Option<u64>,
    #[command(flatten)]
    kept: KeptIn,
    /// Computing threads [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Held-out problems to solve
    #[arg(long, value_name = "N", default_value_t = 40)]
    problems: usize,
    /// The small model only
    #[arg(long)]
    small: bool,
}

#[derive(serde::Deserialize)]
struct HeldOut {
    problems: Vec<Problem>,
}

#[derive(serde::Deserialize)]
struct Problem {
    task: String,
    prompt: String,
    answer: String,
}

/// A folder that goes away with its owner, whatever ends the demo.
struct Scratch(PathBuf);

impl Scratch {
    fn new(inside: &Path) -> Result<Scratch> {
        let dir = inside.join(format!("demo-{}", std::process::id()));
        std::fs::create_dir_all(&dir)
            .map_err(|e| Error::io(format!("{} cannot be made", dir.display()), &e))?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn run(args: DemoArgs) -> Result<u8> {
    let cancel = signals::cancel_flag()?;
    let scratch = Scratch::new(&args.kept.offload_folder)?;
    let right = small_model(&args, &scratch.0, &cancel)?;
    if !args.small {
        synthetic_model(&args, &scratch.0, &cancel)?;
    }
    drop(scratch);
    Ok(if right { 0 } else { 1 })
}

/// Packs the bundled model, pages it from disk layer by layer and checks its answers.
fn small_model(args: &DemoArgs, dir: &Path, cancel: &Arc<AtomicBool>) -> Result<bool> {
    let source = dir.join("bundled");
    let wrap = |e: std::io::Error| Error::io(format!("{} cannot be written", source.display()), &e);
    std::fs::create_dir_all(&source).map_err(wrap)?;
    for (name, bytes) in BUNDLED {
        std::fs::write(source.join(name), bytes).map_err(wrap)?;
    }
    let options = SourceOptions::folder(&source, &dir.join("packed"), false);
    let model = Model::open(&options, cancel, true)?;
    let tokenizer = model.tokenizer()?;
    let stop_tokens = stop_tokens(&model.generation_config()?, &tokenizer);
    let machine = MachineOptions::all_on_disk(None, args.threads);
    let open_for = OpenFor {
        context: 64,
        prompt_tokens: 64,
        sample_limit: Some(tokenizer.id_limit()),
        ..OpenFor::default()
    };
    let mut engine = model.engine(&machine, &open_for, cancel, true)?;
    say!(
        "A small trained model ({}, {} layers) read from disk again for every token:",
        human_bytes(engine.plan().streamed_bytes),
        engine.spec().layers
    );
    let held_out: HeldOut = serde_json::from_str(HELD_OUT)
        .map_err(|e| Error::internal(format!("the bundled problems cannot be read: {e}")))?;
    let problems = by_turns(&held_out.problems, args.problems);
    let mut right = 0;
    for (i, problem) in problems.iter().enumerate() {
        let job = Job {
            prompt: tokenizer.encode(&problem.prompt, true)?,
            media: Vec::new(),
            max_tokens: 48,
            sampling: SamplingParams::greedy(),
            choice: 0,
            stop_tokens: stop_tokens.clone(),
            ..Job::default()
        };
        let stops = StopStrings::new(["\n"])?;
        let answer = generate(
            &mut engine,
            &tokenizer,
            job,
            stops,
            &mut |_, _| {},
            &mut |_| {},
        )?;
        let ok = answer.text.trim() == problem.answer.trim();
        right += usize::from(ok);
        if i < 6 || !ok {
            let mark = if ok { "right" } else { "WRONG" };
            say!("  {}{}   {mark}", problem.prompt, answer.text.trim_end());
        }
    }
    say!(
        "  {right} of {} right, on problems it never saw\n",
        problems.len()
    );
    Ok(right * 100 >= problems.len() * 95)
}

/// The first `n` problems, the tasks taking turns.
fn by_turns(all: &[Problem], n: usize) -> Vec<&Problem> {
    let mut seen = std::collections::BTreeMap::new();
    let mut turns: Vec<(usize, &Problem)> = all
        .iter()
        .map(|p| {
            let turn = seen.entry(p.task.as_str()).or_insert(0usize);
            *turn += 1;
            (*turn, p)
        })
        .collect();
    turns.sort_by_key(|(turn, _)| *turn);
    turns.into_iter().map(|(_, p)| p).take(n).collect()
}

/// Streams a 7B model's layers under a small budget for 1, 8 and 64 sequences.
fn synthetic_model(args: &DemoArgs, dir: &Path, cancel: &Arc<AtomicBool>) -> Result<()> {
    let source = dir.join("synthetic-7b-layers");
    let made = synthetic::make(&source, args.size, cancel, &mut |done, of| {
        live(&format!(
            "writing a synthetic checkpoint: {} of {}",
            human_bytes(done),
            human_bytes(of)
        ));
    })?;
    live("");
    let options = SourceOptions::folder(&source, &dir.join("packed"), true);
    let model = Model::open(&options, cancel, true)?;
    say!(
        "A synthetic checkpoint with a 7B model's layers: {}, {}, streamed from its safetensors file.",
        match made.layers {
            1 => "1 layer".to_string(),
            n => format!("{n} layers"),
        },
        human_bytes(made.bytes)
    );
    live("measuring the disk …");
    let disk = model.probe_disk(args.cpu_memory.unwrap_or(u64::MAX))?;
    live("");
    let mut header = false;
    for sequences in SEQUENCES {
        let machine = MachineOptions::all_on_disk(args.cpu_memory, args.threads);
        let open_for = OpenFor {
            context: 16,
            prompt_tokens: sequences,
            logits_rows: sequences,
            max_sequences: sequences,
            ..OpenFor::default()
        };
        let mut engine = model.engine(&machine, &open_for, cancel, true)?;
        let during = decode(&mut engine, sequences, made.vocab)?;
        let settings = model.read_settings(&machine, &during, &engine);
        let report = PagingReport::new(&engine, &during, &settings);
        if !header {
            header = true;
            say!(
                "The disk alone reads {}; peak memory so far {}.",
                disk.map_or("at an unknown rate".into(), |r| format!("{r:.2} GB/s")),
                human_bytes(report.peak_memory_bytes)
            );
            say!("sequences  bytes a pass  s a pass  tokens/s   GB/s  waiting  overlap");
        }
        let pass_s = during.pass.as_secs_f64();
        let passes = during.paging.passes.max(1) as f64;
        say!(
            "{sequences:>9}  {:>12}  {:>8.2}  {:>8.2}  {:>5.2}  {:>6.0}%  {:>6.0}%",
            human_bytes(report.disk_bytes_per_pass),
            pass_s / passes,
            sequences as f64 * passes / pass_s,
            report.disk_gb_per_s,
            100.0 * report.stall_s / pass_s,
            100.0 * report.overlap,
        );
    }
    say!(
        "The same bytes whatever the number of sequences: what fills a pass is free until compute catches up."
    );
    Ok(())
}

/// All sequences decode together; what their decode passes cost.
fn decode(engine: &mut Engine, sequences: usize, vocab: usize) -> Result<EngineStats> {
    for i in 0..sequences {
        engine.submit(Job {
            prompt: vec![(i % vocab) as u32],
            media: Vec::new(),
            max_tokens: STEPS,
            sampling: SamplingParams::greedy(),
            choice: 0,
            stop_tokens: Vec::new(),
            ..Job::default()
        })?;
    }
    let mut events = Vec::new();
    let mut after_first = None;
    let started = Instant::now();
    while engine.pending() > 0 {
        engine.step(&mut events)?;
        after_first.get_or_insert_with(|| engine.stats());
        live(&format!(
            "{sequences} sequences: pass {} after {:.1} s",
            engine.stats().paging.passes,
            started.elapsed().as_secs_f64()
        ));
    }
    live("");
    let tokens = events
        .iter()
        .filter(|e| matches!(e, Event::Token { .. }))
        .count();
    if tokens != sequences * STEPS {
        return Err(Error::new(
            Code::Internal,
            "the demo lost tokens",
            format!("{tokens} came, {} were due", sequences * STEPS),
            "please report this",
        ));
    }
    let first = after_first.unwrap_or_default();
    Ok(engine.stats().since(&first))
}

/// A line that overwrites itself on a terminal; nothing elsewhere.
fn live(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
        let _ = std::io::stderr().flush();
    }
}
