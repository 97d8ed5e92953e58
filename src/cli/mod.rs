//! The command line: one file a command. One client of `engine` among others.

mod advice;
mod batch;
mod batch_bench;
mod batch_check;
mod batch_input;
mod batch_merge;
mod batch_report;
mod batch_room;
mod bench;
mod bench_compare;
mod bench_model;
mod clean;
mod completions;
mod demo;
mod doctor;
mod found;
mod generate;
mod gpu;
mod inspect;
mod machine;
mod media;
mod model;
mod options;
mod pack;
mod plan;
mod prompt;
mod pull;
mod rates;
mod repl;
mod run;
mod score;
mod signals;
mod surface;
mod synthetic;
mod tune;
mod verify;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

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
    /// Find the best way to read a model on this machine, and keep it for `run` and `batch`
    Tune(tune::TuneArgs),
    /// Measure
    Bench(bench::BenchArgs),
    /// See it work: no model, no GPU, no network needed
    Demo(demo::DemoArgs),
    /// Can this machine do it? What holds it back, and the fix for each
    Doctor(doctor::DoctorArgs),
    /// Download a model from the Hugging Face hub into its local cache
    Pull(pull::PullArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
}

/// The command line as clap sees it, options from the environment included.
fn command() -> clap::Command {
    surface::with_first_page(surface::with_environment(Cli::command()))
}

/// clap's words in this program's three lines.
fn usage(e: &clap::Error) -> Error {
    let text = e.render().to_string();
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
    let first = lines.next().unwrap_or_default();
    let mut what = first.strip_prefix("error: ").unwrap_or(first).to_string();
    let (mut cause, mut fix) = (Vec::new(), String::new());
    for line in lines {
        match line.split_once(':') {
            Some(("Usage", usage)) => fix = format!("write it as{usage}, or see --help"),
            _ if line.starts_with("For more information") => {}
            // An option that is not known is hardly meant as a value.
            Some(("tip", tip)) if tip.contains("as a value") => {}
            Some(("tip", tip)) => cause.push(tip.trim()),
            _ => cause.push(line.trim_start_matches(['[']).trim_end_matches([']'])),
        }
    }
    let mut cause = cause.join("; ");
    match e.kind() {
        // `invalid value 'x' for '--flag <N>': why`
        ErrorKind::ValueValidation | ErrorKind::InvalidValue if cause.is_empty() => {
            (what, cause) = match what.split_once("': ") {
                Some((before, why)) => (format!("{before}'"), why.to_string()),
                None => (what, "the option stands without its value".to_string()),
            };
        }
        ErrorKind::MissingRequiredArgument => {
            what = format!("{cause} is missing");
            cause = "the command cannot do without it".to_string();
        }
        ErrorKind::ArgumentConflict => {
            if cause.is_empty() {
                cause = "one excludes the other".to_string();
            }
            // The usage names both.
            fix = "leave one of them out".to_string();
        }
        _ => {}
    }
    if cause.is_empty() {
        cause = "the command line cannot be understood as it is".to_string();
    }
    if fix.is_empty() {
        fix = "see --help of the command, which shows what each option takes".to_string();
    }
    // An option that was not typed: say where it comes from.
    let set = surface::variables_set(&what);
    if !set.is_empty() {
        cause = format!("{cause} ({} set in the environment)", set.join(", "));
    }
    Error::new(Code::Usage, what, cause, fix)
}

/// Runs one command line. The number is the process's exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<u8> {
    // RUST_LOG, to stderr; the second run in one process keeps the first one's logger.
    let _ = env_logger::Builder::from_default_env()
        .format_timestamp(None)
        .try_init();
    let args = bench::name_the_model(args.into_iter().collect());
    let mut command = surface::heeding_what_is_typed(command(), &args);
    let parsed = command.try_get_matches_from_mut(args).and_then(|found| {
        let cli = Cli::from_arg_matches(&found).map_err(|e| e.format(&mut command))?;
        Ok((cli, found))
    });
    let cli = match parsed {
        Ok((cli, found)) => {
            surface::two_budgets(&found)?;
            cli
        }
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
        Command::Tune(args) => tune::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Pull(args) => pull::run(args),
        Command::Completions(args) => completions::run(args),
    }
}
