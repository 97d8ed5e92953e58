//! The command line: one file a command. One client of `engine` among others.

mod bench;
mod bench_model;
mod clean;
mod demo;
mod generate;
mod inspect;
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

use clap::{Parser, Subcommand};

use crate::error::Result;

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

/// Runs one command line. The number is the process's exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<u8> {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // clap words usage errors itself, and exits 0 for --help and --version.
            let _ = e.print();
            return Ok(if e.use_stderr() { 2 } else { 0 });
        }
    };
    match cli.command {
        Command::Run(args) => run::run(args),
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
