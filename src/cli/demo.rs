//! `demo`: no model, no GPU, no network needed. First a small trained model answers sums and sorts; then a synthetic
//! checkpoint with a 7B model's layer shapes shows what paging costs, and that a pass costs the same for many sequences.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Args;

use super::found::Found;
use super::generate::generate;
use super::model::{Model, OpenFor, stop_tokens};
use super::options::{KeptIn, MachineOptions, SourceOptions, at_least_one, size, threads};
use super::{signals, synthetic};
use crate::engine::{Engine, EngineStats, Event, Job};
use crate::error::{Code, Error, Result};
use crate::paging::DiskRates;
use crate::report::progress::live_line;
use crate::report::summary::PagingReport;
use crate::store::{Scratch, sweep};
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

/// The synthetic checkpoint's folder.
const SYNTHETIC: &str = "synthetic-7b-layers";
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
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// Held-out problems to solve
    #[arg(long, value_name = "N", value_parser = at_least_one, default_value_t = 40)]
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

pub fn run(args: DemoArgs) -> Result<u8> {
    let cancel = signals::cancel_flag()?;
    let real = args.kept.offload_folder.canonicalize().unwrap_or_default();
    for (dir, bytes) in sweep(&args.kept.offload_folder) {
        let name = dir.file_name().unwrap_or_default();
        DiskRates::of(&Scratch::work_of(&real.join(name)).join(SYNTHETIC), false).forget();
        eprintln!(
            "removed {}, left behind by a demo that was killed ({})",
            dir.display(),
            human_bytes(bytes)
        );
    }
    let scratch = Scratch::new(&args.kept.offload_folder)?;
    let right = small_model(&args, &scratch.work(), &cancel)?;
    if !args.small {
        synthetic_model(&args, &scratch.work(), &cancel)?;
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
            &mut |_| {},
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
    Ok(right * 100 >= problems.len() * 99)
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

/// A model that takes what was measured on it along when it goes.
struct Passing(Model);

impl Drop for Passing {
    fn drop(&mut self) {
        self.0.forget_rates();
    }
}

/// What the synthetic model is asked for at once.
fn at_once(sequences: usize) -> OpenFor {
    OpenFor {
        context: 16,
        prompt_tokens: sequences,
        logits_rows: sequences,
        max_sequences: sequences,
        ..OpenFor::default()
    }
}

/// An error in terms of the options that the demo has.
fn in_own_options(e: Error) -> Error {
    match e.fix().split_once(", or a smaller --context") {
        Some((fix, _)) => {
            let fix = fix.to_string();
            e.with_fix(fix)
        }
        None => e,
    }
}

/// Streams a 7B model's layers under a small budget for 1, 8 and 64 sequences.
fn synthetic_model(args: &DemoArgs, dir: &Path, cancel: &Arc<AtomicBool>) -> Result<()> {
    let source = dir.join(SYNTHETIC);
    let machine = MachineOptions::all_on_disk(args.cpu_memory, args.threads);
    let options = SourceOptions::folder(&source, &dir.join("packed"), true);
    // What cannot be is refused before gigabytes are written.
    let made = synthetic::outline(&source, args.size)?;
    let most = SEQUENCES.into_iter().max().unwrap_or(1);
    Found::open(&options, cancel, true)?
        .expect_room(&machine, &at_once(most), true)
        .map_err(in_own_options)?;
    if made.bytes > args.size {
        say!(
            "One of its layers is the least there can be of a 7B model: {} instead of {}.",
            human_bytes(made.bytes),
            human_bytes(args.size)
        );
    }
    synthetic::fill(&source, &made, cancel, &mut |done, of| {
        live(&format!(
            "writing a synthetic checkpoint: {} of {}",
            human_bytes(done),
            human_bytes(of)
        ));
    })?;
    live("");
    let model = Passing(Model::open(&options, cancel, true)?);
    let model = &model.0;
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
        let opened = model.engine(&machine, &at_once(sequences), cancel, true);
        let mut engine = opened.map_err(in_own_options)?;
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
        live_line(text);
    }
}
