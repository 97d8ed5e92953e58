//! `bench MODEL`, and `bench io`: what the readers alone get out of a model's own files.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::model::Model;
use super::options::{IoArg, SourceOptions, size, up_to};
use super::signals;
use crate::engine::HostMemory;
use crate::error::{Code, Error, Result};
use crate::io::{IoRow, MAX_QUEUE_DEPTH, ReaderKind, Sweep, sweep};
use crate::units::{ALIGN_BYTES, flag_size, human_bytes};

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager bench ./Qwen2.5-7B-Instruct -p 512 -n 16 -b 1,8,64
  tensorpager bench io ./Qwen2.5-7B-Instruct --block 256KiB,4MiB --depth 1,8,32
  tensorpager bench compare before.json after.json")]
pub struct BenchArgs {
    #[command(subcommand)]
    what: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Rows as llama-bench prints them; the word `model` may be left out
    Model(Box<super::bench_model::ModelArgs>),
    /// Each reader × block size × queue depth on the model's own files
    Io(IoArgs),
    /// Two records of `bench MODEL`, row by row
    Compare(super::bench_compare::CompareArgs),
}

/// `bench MODEL …` as `bench model MODEL …`, what the parser knows.
pub fn name_the_model(mut args: Vec<OsString>) -> Vec<OsString> {
    let known = ["model", "io", "compare", "help", "-h", "--help"];
    let bench = args.get(1).is_some_and(|a| a == "bench");
    if bench && args.get(2).is_some_and(|a| !known.iter().any(|k| a == k)) {
        args.insert(2, "model".into());
    }
    // llama-bench's spelling, which clap would read as -p with the value `g`.
    for arg in args.iter_mut().filter(|_| bench) {
        match arg.to_str() {
            Some("-pg") => *arg = "--pg".into(),
            Some(text) if text.starts_with("-pg=") => *arg = format!("-{text}").into(),
            _ => {}
        }
    }
    args
}

#[derive(Args)]
#[command(after_help = "Example:
  tensorpager bench io ./Qwen2.5-7B-Instruct --block 256KiB,4MiB --depth 1,8,32")]
struct IoArgs {
    #[command(flatten)]
    source: SourceOptions,
    /// Readers
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "io_uring,threads,mmap"
    )]
    readers: Vec<IoArg>,
    /// Bytes a read
    #[arg(long, value_parser = block, value_delimiter = ',', default_value = "256KiB,1MiB,4MiB")]
    block: Vec<u64>,
    /// Reads in flight
    #[arg(long, value_parser = depth, value_delimiter = ',', default_value = "1,8,32")]
    depth: Vec<usize>,
    /// Seconds a measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// Past the page cache only whole sectors are read.
fn block(text: &str) -> std::result::Result<u64, String> {
    match size(text)? {
        b if b > 0 && b.is_multiple_of(ALIGN_BYTES) => Ok(b),
        _ => Err(format!(
            "a block is a multiple of {ALIGN_BYTES} bytes, such as 256KiB"
        )),
    }
}

fn depth(text: &str) -> std::result::Result<usize, String> {
    up_to(MAX_QUEUE_DEPTH, text)
}

pub fn run(args: BenchArgs) -> Result<u8> {
    match args.what {
        Bench::Model(args) => super::bench_model::run(*args),
        Bench::Io(args) => io(args),
        Bench::Compare(args) => super::bench_compare::run(args),
    }
}

fn io(args: IoArgs) -> Result<u8> {
    let valid = |s: f64| s > 0.0 && s < 3600.0;
    if !valid(args.seconds) {
        return Err(Error::new(
            Code::Usage,
            format!("--seconds {} makes no sense", args.seconds),
            "a measurement takes between 0 and 3600 seconds",
            "give --seconds 1",
        ));
    }
    check_memory(&args.block, &args.depth)?;
    let cancel = signals::cancel_flag()?;
    let model = Model::open(&args.source, &cancel, args.json)?;
    let what = Sweep {
        files: model.weight_files(),
        kinds: args.readers.iter().map(|r| kind(*r)).collect(),
        block_bytes: args.block.iter().map(|b| *b as usize).collect(),
        depths: args.depth.clone(),
        each: Duration::from_secs_f64(args.seconds),
        cancel,
    };
    if !args.json {
        super::run::print("reader    block     depth   GB/s   CPU s/GB  direct\n")?;
    }
    let mut closed = Ok(());
    let rows = sweep(&what, &mut |row| {
        if !args.json && closed.is_ok() {
            closed = super::run::print(&format!("{}\n", line(row)));
        }
    })?;
    closed?;
    let best = rows
        .iter()
        .filter(|r| r.direct)
        .map(|r| r.gb_per_s)
        .fold(0.0, f64::max);
    if best > 0.0 {
        model.record_disk_rate(best);
    }
    if args.json {
        let object = serde_json::json!({"model": model.label, "rows": rows, "best_gb_per_s": best});
        super::run::print(&format!("{object}\n"))?;
    }
    Ok(0)
}

/// A measurement holds as many blocks as it has reads in flight: refused here rather than by the kernel's OOM killer.
fn check_memory(blocks: &[u64], depths: &[usize]) -> Result<()> {
    let most = |values: &mut dyn Iterator<Item = u64>| values.max().unwrap_or(0);
    let depth = most(&mut depths.iter().map(|d| (*d).min(MAX_QUEUE_DEPTH) as u64));
    let needed = most(&mut blocks.iter().copied()).saturating_mul(depth);
    let available = HostMemory::read().available;
    if needed <= available {
        return Ok(());
    }
    Err(Error::new(
        Code::Memory,
        format!(
            "blocks of that size at depth {depth} take {}",
            human_bytes(needed)
        ),
        format!("{} of memory are available", human_bytes(available)),
        "give a smaller --block or --depth",
    ))
}

fn line(row: &IoRow) -> String {
    format!(
        "{:<9} {:>8} {:>6} {:>7.2} {:>9.3}  {}",
        row.reader,
        if row.block_bytes.is_multiple_of(1 << 20) {
            flag_size(row.block_bytes as u64)
        } else {
            format!("{}KiB", row.block_bytes >> 10)
        },
        row.depth,
        row.gb_per_s,
        row.cpu_s_per_gb,
        if row.direct { "yes" } else { "no" }
    )
}

pub(super) fn kind(arg: IoArg) -> ReaderKind {
    match arg {
        IoArg::Auto => ReaderKind::Auto,
        IoArg::IoUring => ReaderKind::IoUring,
        IoArg::Threads => ReaderKind::Threads,
        IoArg::Mmap => ReaderKind::Mmap,
    }
}
