//! `bench MODEL`: rows as llama-bench prints them, with what the pager did beside them.
//!
//! Cold by construction: weights are read past the page cache, so no repetition profits from the one before. Each row is warmed by one
//! repetition that does not count.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::advice::{self, Ran, Work};
use super::found::Found;
use super::model::{Model, OpenFor};
use super::options::{MachineOptions, SourceOptions};
use super::signals;
use crate::engine::{Engine, EngineStats, Job};
use crate::error::{Code, Error, Result};
use crate::report::summary::{PagingReport, Timings};
use crate::units::flag_size;

#[derive(Args)]
pub struct ModelArgs {
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    machine: MachineOptions,
    /// Prompt lengths: a list (64,512) or a range (64-512+64, 64-512*2); 0 for none
    #[arg(short = 'p', long = "n-prompt", value_name = "N", default_value = "512", value_parser = counts)]
    prompt: Counts,
    /// Tokens to generate, likewise
    #[arg(short = 'n', long = "n-gen", value_name = "N", default_value = "16", value_parser = counts)]
    generate: Counts,
    /// Prompt and generation together, as P,G (may be given more than once; -pg as llama-bench has it)
    #[arg(long = "pg", value_name = "P,G", value_parser = pair)]
    pairs: Vec<(usize, usize)>,
    /// Sequences at once, a list or a range
    #[arg(short = 'b', long = "batch", value_name = "N", default_value = "1", value_parser = counts)]
    batch: Counts,
    /// Repetitions
    #[arg(short = 'r', long, value_name = "N", default_value_t = 3)]
    repetitions: usize,
    /// How the rows are printed
    #[arg(short = 'o', long, value_enum, default_value = "md")]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Md,
    Csv,
    Json,
    Jsonl,
}

#[derive(Clone, Debug, PartialEq)]
struct Counts(Vec<usize>);

const MOST: usize = 1 << 20;

/// `1,2,4`, `8-64+8`, `8-64*2` and any list of these.
fn counts(text: &str) -> std::result::Result<Counts, String> {
    let number = |t: &str| match t.trim().parse::<usize>() {
        Ok(n) if n <= MOST => Ok(n),
        _ => Err(format!("`{t}` is not a number up to {MOST}")),
    };
    let mut all = Vec::new();
    for part in text.split(',') {
        let Some((first, rest)) = part.split_once('-') else {
            all.push(number(part)?);
            continue;
        };
        let (last, times, step) = match (rest.split_once('+'), rest.split_once('*')) {
            (Some((last, step)), _) => (last, false, step),
            (_, Some((last, step))) => (last, true, step),
            _ => (rest, false, "1"),
        };
        let (mut at, last, step) = (number(first)?, number(last)?, number(step)?);
        if (times && (step < 2 || at == 0)) || step == 0 {
            return Err(format!("the range `{part}` does not end"));
        }
        while at <= last && all.len() < 1024 {
            all.push(at);
            at = if times { at * step } else { at + step };
        }
    }
    Ok(Counts(all))
}

fn pair(text: &str) -> std::result::Result<(usize, usize), String> {
    let (p, g) = text.split_once(',').ok_or("write it as P,G")?;
    match (p.trim().parse(), g.trim().parse()) {
        (Ok(p), Ok(g)) if p > 0 && g > 0 && p <= MOST && g <= MOST => Ok((p, g)),
        _ => Err("P and G are numbers above 0".into()),
    }
}

/// One kind of work.
#[derive(Clone, Copy, Debug)]
struct Test {
    prompt: usize,
    generate: usize,
    batch: usize,
}

impl Test {
    fn name(&self) -> String {
        match (self.prompt, self.generate) {
            (p, 0) => format!("pp{p}"),
            (0, g) => format!("tg{g}"),
            (p, g) => format!("pp{p}+tg{g}"),
        }
    }

    /// Generation starts behind one token of prompt, whose pass is not counted.
    fn open_for(&self, machine: &MachineOptions) -> OpenFor {
        let prompt = self.prompt.max(1);
        let context = prompt + self.generate + 1;
        OpenFor {
            context: machine.context.unwrap_or(context).max(context),
            prompt_tokens: prompt * self.batch,
            logits_rows: self.batch,
            max_sequences: self.batch,
            ..OpenFor::default()
        }
    }

    /// The machine options with `--trace` and `--report` into files of this test's own, where there are `several`.
    fn machine(&self, machine: &MachineOptions, several: bool) -> MachineOptions {
        let mut own = machine.clone();
        if several {
            let end = format!("{}.b{}", self.name(), self.batch);
            for path in own.trace.iter_mut().chain(&mut own.report) {
                *path = with_part(path, &end);
            }
        }
        own
    }

    fn tokens(&self) -> usize {
        (self.prompt + self.generate) * self.batch
    }
}

/// `run.json` → `run.PART.json`.
fn with_part(path: &Path, part: &str) -> PathBuf {
    match path.extension() {
        Some(end) => path.with_extension(format!("{part}.{}", end.to_string_lossy())),
        None => path.with_extension(part),
    }
}

#[derive(Serialize)]
struct Row {
    model: String,
    size_bytes: u64,
    dtype: String,
    device: String,
    test: String,
    batch: usize,
    n_prompt: usize,
    n_gen: usize,
    repetitions: usize,
    cpu_memory: Option<u64>,
    gpu_memory: Option<u64>,
    tokens_per_s: f64,
    tokens_per_s_deviation: f64,
    /// Of each repetition.
    samples_s: Vec<f64>,
    stall_share: f64,
    paging: PagingReport,
}

pub fn run(args: ModelArgs) -> Result<u8> {
    let cancel = signals::cancel_flag()?;
    args.machine.check()?;
    let tests = tests(&args)?;
    let quiet = args.output != Format::Md;
    let found = Found::open(&args.source, &cancel, quiet)?;
    for (i, test) in tests.iter().enumerate() {
        let want = test.open_for(&args.machine);
        found.expect_room(&args.machine, &want, quiet || i > 0)?;
    }
    let budget = args.machine.cpu_budget()?;
    let model = found.prepare(budget, &args.source, &cancel, quiet)?;
    if args.output == Format::Md {
        super::run::print(&md_header())?;
    } else if args.output == Format::Csv {
        super::run::print(&format!("{}\n", CSV_COLUMNS.join(",")))?;
    }
    let mut rows = Vec::new();
    let several = tests.len() > 1;
    for test in tests {
        let machine = test.machine(&args.machine, several);
        let row = measure(&args, &machine, &model, &test, &cancel)?;
        let line = match args.output {
            Format::Md => md_row(&row),
            Format::Csv => csv_row(&row),
            Format::Jsonl => format!("{}\n", to_json(&row)?),
            Format::Json => String::new(),
        };
        super::run::print(&line)?;
        rows.push(row);
    }
    if args.output == Format::Json {
        super::run::print(&format!(
            "{}\n",
            to_json(&serde_json::json!({"rows": rows}))?
        ))?;
    }
    Ok(0)
}

fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::internal(e.to_string()))
}

fn tests(args: &ModelArgs) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for &batch in args.batch.0.iter().filter(|b| **b > 0) {
        let mut add = |prompt, generate| {
            tests.push(Test {
                prompt,
                generate,
                batch,
            });
        };
        args.prompt
            .0
            .iter()
            .filter(|p| **p > 0)
            .for_each(|p| add(*p, 0));
        args.generate
            .0
            .iter()
            .filter(|g| **g > 0)
            .for_each(|g| add(0, *g));
        args.pairs.iter().for_each(|(p, g)| add(*p, *g));
    }
    if tests.is_empty() || args.repetitions == 0 {
        return Err(Error::new(
            Code::Usage,
            "there is nothing to measure",
            "every length, batch or number of repetitions is 0",
            "give -p, -n or --pg above 0, and -r and -b above 0",
        ));
    }
    Ok(tests)
}

fn measure(
    args: &ModelArgs,
    machine: &MachineOptions,
    model: &Model,
    test: &Test,
    cancel: &Arc<AtomicBool>,
) -> Result<Row> {
    let started = Instant::now();
    let want = test.open_for(machine);
    let advisor = model.advisor(machine, &want)?;
    let mut engine = model.engine(machine, &want, cancel, true)?;
    let load_s = started.elapsed().as_secs_f64();
    repetition(&mut engine, test, 0)?;
    let mut samples_s = Vec::new();
    let before = engine.stats();
    let mut during = EngineStats::default();
    for i in 0..args.repetitions {
        let (seconds, stats) = repetition(&mut engine, test, i + 1)?;
        samples_s.push(seconds);
        during = match test.prompt {
            // The uncounted first passes lie between the counted ones.
            0 => add(during, stats),
            _ => engine.stats().since(&before),
        };
    }
    let rates: Vec<f64> = samples_s.iter().map(|s| test.tokens() as f64 / s).collect();
    let (mean, deviation) = mean_deviation(&rates);
    let paging = PagingReport::new(
        &engine,
        &during,
        &model.read_settings(machine, &during, &engine),
    );
    let timings = Timings {
        load_s,
        decode_s: samples_s.iter().sum(),
        output_tokens_per_s: mean,
        total_s: started.elapsed().as_secs_f64(),
        ..Timings::default()
    };
    model.write_records(machine, &engine, &timings, &paging)?;
    let advice = advisor.faster(&Ran {
        report: &paging,
        during: &during,
        device: engine.device(),
        work: Work::Full,
    });
    if args.output == Format::Md
        && let Some(advice) = advice::told(&advice)
    {
        eprintln!("{}: {advice}", test.name());
    }
    Ok(Row {
        model: model.label.clone(),
        size_bytes: model.store.units.iter().map(|u| u.bytes).sum(),
        dtype: model.dtype(),
        device: engine.device().describe(),
        test: test.name(),
        batch: test.batch,
        n_prompt: test.prompt,
        n_gen: test.generate,
        repetitions: args.repetitions,
        cpu_memory: args.machine.cpu_budget()?,
        gpu_memory: args
            .machine
            .gpu_budget()?
            .filter(|_| engine.plan().gpu.is_some()),
        tokens_per_s: mean,
        tokens_per_s_deviation: deviation,
        samples_s,
        stall_share: paging.stall_s / during.pass.as_secs_f64().max(1e-12),
        paging,
    })
}

fn add(a: EngineStats, b: EngineStats) -> EngineStats {
    EngineStats {
        paging: a.paging.plus(&b.paging),
        compute: a.compute + b.compute,
        pass: a.pass + b.pass,
        rows: a.rows + b.rows,
    }
}

/// Seconds and passes of one repetition; its tokens differ from those of the others.
fn repetition(engine: &mut Engine, test: &Test, seed: usize) -> Result<(f64, EngineStats)> {
    let vocab = engine.spec().vocab;
    let prompt = test.prompt.max(1);
    for s in 0..test.batch {
        let token = |i: usize| ((seed * 7919 + s * 104_729 + i * 31 + 1) % vocab) as u32;
        engine.submit(Job {
            prompt: (0..prompt).map(token).collect(),
            // A prompt's last pass gives a token of its own; with one of prompt that pass is not part of the generation.
            max_tokens: match (test.prompt, test.generate) {
                (_, 0) => 1,
                (0, g) => g + 1,
                (_, g) => g,
            },
            // Nothing of a prompt is found again: every repetition computes all of it.
            prefix_salt: None,
            ..Job::default()
        })?;
    }
    let mut events = Vec::new();
    if test.prompt == 0 {
        engine.step(&mut events)?;
    }
    let before = engine.stats();
    let started = Instant::now();
    while engine.pending() > 0 {
        events.clear();
        engine.step(&mut events)?;
    }
    Ok((
        started.elapsed().as_secs_f64(),
        engine.stats().since(&before),
    ))
}

/// Mean and standard deviation of a sample.
fn mean_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (
        mean,
        if values.len() > 1 {
            (squares / (n - 1.0)).sqrt()
        } else {
            0.0
        },
    )
}

const CSV_COLUMNS: [&str; 18] = [
    "model",
    "dtype",
    "device",
    "test",
    "batch",
    "cpu_memory",
    "gpu_memory",
    "prefetch_depth",
    "page_size",
    "queue_depth",
    "io",
    "disk_bytes_per_pass",
    "disk_gb_per_s",
    "stall_share",
    "overlap",
    "percent_of_bound",
    "tokens_per_s",
    "deviation",
];

fn csv_row(r: &Row) -> String {
    let p = &r.paging;
    let given = |memory: Option<u64>| memory.map_or(String::new(), |m| m.to_string());
    let cells = [
        format!("\"{}\"", r.model.replace('"', "\"\"")),
        r.dtype.clone(),
        format!("\"{}\"", r.device),
        r.test.clone(),
        r.batch.to_string(),
        given(r.cpu_memory),
        given(r.gpu_memory),
        p.prefetch_depth.to_string(),
        p.page_size.to_string(),
        p.queue_depth.to_string(),
        p.io.to_string(),
        p.disk_bytes_per_pass.to_string(),
        format!("{:.4}", p.disk_gb_per_s),
        format!("{:.4}", r.stall_share),
        format!("{:.4}", p.overlap),
        p.percent_of_bound
            .map_or(String::new(), |b| format!("{b:.2}")),
        format!("{:.4}", r.tokens_per_s),
        format!("{:.4}", r.tokens_per_s_deviation),
    ];
    format!("{}\n", cells.join(","))
}

fn md_header() -> String {
    "| model | size | type | device | budget | depth | page | queue | io | test | b | GB/pass | GB/s | stall | overlap | of bound | t/s |\n\
     | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .into()
}

/// Of the host, and of the GPU where one was given.
pub(super) fn budgets(cpu: Option<u64>, gpu: Option<u64>) -> String {
    let host = cpu.map_or("auto".into(), flag_size);
    match gpu {
        None => host,
        Some(gpu) => format!("{host} + {} GPU", flag_size(gpu)),
    }
}

fn md_row(r: &Row) -> String {
    let p = &r.paging;
    format!(
        "| {} | {} | {} | {} | {} | {} | {}KiB | {} | {} | {} | {} | {:.3} | {:.2} | {:.0} % | {:.0} % | {} | {:.2} ± {:.2} |\n",
        r.model,
        crate::units::human_bytes(r.size_bytes),
        r.dtype,
        r.device,
        budgets(r.cpu_memory, r.gpu_memory),
        p.prefetch_depth,
        p.page_size >> 10,
        p.queue_depth,
        p.io,
        r.test,
        r.batch,
        p.disk_bytes_per_pass as f64 / 1e9,
        p.disk_gb_per_s,
        100.0 * r.stall_share,
        100.0 * p.overlap,
        p.percent_of_bound
            .map_or("?".into(), |b| format!("{b:.0} %")),
        r.tokens_per_s,
        r.tokens_per_s_deviation
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges() {
        assert_eq!(counts("1,2,8").unwrap().0, [1, 2, 8]);
        assert_eq!(counts("8-64*2").unwrap().0, [8, 16, 32, 64]);
        assert_eq!(counts("64-200+64,7").unwrap().0, [64, 128, 192, 7]);
        assert_eq!(counts("2-4").unwrap().0, [2, 3, 4]);
        for bad in ["", "x", "0-8*2", "1-8+0", "1-8*1", "-3"] {
            assert!(counts(bad).is_err(), "{bad}");
        }
        assert_eq!(pair("128,16").unwrap(), (128, 16));
        assert!(pair("128").is_err() && pair("0,1").is_err());
    }

    #[test]
    fn each_of_several_tests_has_its_own_records() {
        let part = |path: &str| with_part(Path::new(path), "pp512.b1");
        assert_eq!(part("a/run.json"), Path::new("a/run.pp512.b1.json"));
        assert_eq!(part("run"), Path::new("run.pp512.b1"));
    }

    #[test]
    fn deviation_is_that_of_a_sample() {
        let (mean, deviation) = mean_deviation(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!(mean, 5.0);
        assert!((deviation - (32.0f64 / 7.0).sqrt()).abs() < 1e-12);
        assert_eq!(mean_deviation(&[3.0]), (3.0, 0.0));
    }
}
