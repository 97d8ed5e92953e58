//! The command line: one file a command. One client of `engine` among others.

mod batch;
mod batch_bench;
mod batch_check;
mod batch_merge;
mod batch_report;
mod bench;
mod bench_model;
mod clean;
mod demo;
mod generate;
mod inspect;
mod media;
mod model;
mod options;
mod pack;
mod plan;
mod prompt;
mod repl;
mod run;
mod score;
mod signals;
mod synthetic;
mod verify;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::error::{Code, Error, Result};

/// Runs transformer models larger than the memory they are given.
#[derive(Parser)]
#[command(name = "tensorpager", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text: one prompt, or a chat when there is none
    Run(run::RunArgs),
    /// Answer a file of requests at the highest throughput; resumes wherever it was cut off
    #[command(alias = "run-batch")]
    Batch(batch::BatchArgs),
    /// Look a file of requests over before it runs: bad rows, token counts, predicted time
    BatchCheck(batch_check::BatchCheckArgs),
    /// Put the outputs of all shards back into one file
    BatchMerge(batch_merge::BatchMergeArgs),
    /// Log-likelihoods of given tokens or messages, as JSONL; logits with --output
    Score(score::ScoreArgs),
    /// Write a model's weights into the offload folder, ready to stream
    Pack(pack::PackArgs),
    /// Read a packed model and compare every byte with its checksums
    Verify(verify::VerifyArgs),
    /// Remove packed models
    Clean(clean::CleanArgs),
    /// What the offload folder holds, or what a model is made of
    Inspect(inspect::InspectArgs),
    /// What goes where under a budget, and how fast that will be, without loading anything
    Plan(plan::PlanArgs),
    /// Measure
    Bench(bench::BenchArgs),
    /// See it work: no model, no GPU, no network needed
    Demo(demo::DemoArgs),
}

/// clap's words in this program's three lines.
fn usage(e: &clap::Error) -> Error {
    let text = e.render().to_string();
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
    let first = lines.next().unwrap_or_default();
    let what = first.strip_prefix("error: ").unwrap_or(first).to_string();
    let (mut cause, mut fix) = (Vec::new(), "see `tensorpager --help`".to_string());
    for line in lines {
        match line.split_once(':') {
            Some(("Usage", usage)) => fix = format!("write it as{usage}, or see --help"),
            _ if line.starts_with("For more information") => {}
            _ => cause.push(line.trim_start_matches(['[']).trim_end_matches([']'])),
        }
    }
    let cause = match cause.is_empty() {
        true => "the command line does not say what to do".to_string(),
        false => cause.join("; "),
    };
    Error::new(Code::Usage, what, cause, fix)
}

/// Runs one command line. The number is the process's exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<u8> {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // --help and --version are errors to clap, and so is a bare `tensorpager`, which gets the help.
            if !e.use_stderr() || e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                let _ = e.print();
                return Ok(if e.use_stderr() { 2 } else { 0 });
            }
            return Err(usage(&e));
        }
    };
    match cli.command {
        Command::Run(args) => run::run(args),
        Command::Batch(args) => batch::run(args),
        Command::BatchCheck(args) => batch_check::run(args),
        Command::BatchMerge(args) => batch_merge::run(args),
        Command::Score(args) => score::run(args),
        Command::Pack(args) => pack::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Clean(args) => clean::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo(args) => demo::run(args),
    }
}
