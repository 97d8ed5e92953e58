//! The GPU suite: what is true and how fast on this machine's GPU, as a short table and a dated record for `benches/results/`.
//!
//!     gpu_suite [--smoke] [--no-cublaslt] [--out RECORD.md] [--scratch DIR] [--only SECTION,…] [--minutes N]
//!
//! It wants the driver alone; `gpu/README.md` says how the folder it runs in is made. Exit code 1: something is wrong.
//! `--smoke` runs every section at small shapes, on an emulated GPU too; its timings mean nothing and are not to be recorded.

mod attending;
mod bed;
mod copies;
mod decode;
mod fixtures;
mod goals;
mod kernels;
mod machine;
mod models;
mod one_pass;
mod ops;
mod products;
mod report;
mod tools;
mod vision;
mod watch;
mod weights;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use goals::Goals;
use report::Report;

pub type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// What all sections know.
pub struct Suite {
    pub smoke: bool,
    /// Whether cublasLt's products are run beside ours.
    pub cublaslt: bool,
    pub started: Instant,
    pub limit: Duration,
    /// The folder of this program: the binary, fixtures and scripts lie in it.
    pub home: PathBuf,
    pub scratch: PathBuf,
    pub report: Report,
    /// Of device memory, read and written: 10⁹ bytes a second. What memory-bound kernels are measured against.
    pub memory_gb_per_s: Option<f64>,
    /// Of copies from pinned memory, the best seen: what copies within a pass are measured against.
    pub pinned_gb_per_s: Option<f64>,
    /// Of the tensor cores, the best that any product reached here, ours or cublasLt's: 10¹² operations a second.
    pub tflops: Option<f64>,
    pub goals: Goals,
}

pub const TIME_IS_UP: &str = "the time was up";

impl Suite {
    fn new(smoke: bool, limit: Duration, home: PathBuf, scratch: PathBuf) -> Suite {
        Suite {
            smoke,
            cublaslt: true,
            started: Instant::now(),
            limit,
            home,
            scratch,
            report: Report::new(smoke),
            memory_gb_per_s: None,
            pinned_gb_per_s: None,
            tflops: None,
            goals: Goals::default(),
        }
    }

    pub fn left(&self) -> Duration {
        self.limit.saturating_sub(self.started.elapsed())
    }

    /// Asked before every step that takes seconds.
    pub fn up(&self) -> bool {
        self.left().is_zero()
    }

    pub fn binary(&self) -> PathBuf {
        self.home.join("tensorpager")
    }
}

type Section = (&'static str, fn(&mut Suite) -> Outcome<()>);

const SECTIONS: [Section; 9] = [
    ("machine", machine::section),
    ("ops", ops_section),
    ("fixtures", fixtures::section),
    ("copies", copies::section),
    ("kernels", kernels::section),
    ("decode", decode::section),
    ("throughput", decode::throughput),
    ("ptx", tools::ptx),
    // Last: slow, and nothing waits for it.
    ("sanitizer", tools::sanitizer),
];

fn ops_section(suite: &mut Suite) -> Outcome<()> {
    let shapes = match suite.smoke {
        true => ops::Shapes::Small,
        false => ops::Shapes::All,
    };
    // The first that is opened has the driver compile, where it must.
    let image = machine::image(&ops::open(ops::HALVES[0], ops::HEAD_SIZES[0], None)?.device);
    let peers = suite.cublaslt;
    let report = &mut suite.report;
    report.table(
        "Ops against the CPU device",
        &["op", "type", "nmse", "allowed", "shapes", ""],
    );
    let (started, limit) = (suite.started, suite.limit);
    let go_on = || started.elapsed() < limit;
    for half in ops::HALVES {
        let all = ops::compare(half, shapes, peers, &go_on, &mut |row| {
            if let Some(why) = &row.not_run {
                report.not_run(&format!("{}, {}", row.op, row.half.short()), why);
                return;
            }
            let said = row.differs.as_deref().unwrap_or("");
            report.checked(
                row.ok(),
                &[
                    &row.op,
                    row.half.short(),
                    &format!("{:.1e}", row.nmse),
                    &format!("{:.1e}", row.limit),
                    &row.shapes.to_string(),
                    said,
                ],
            );
        })?;
        if !all {
            report.not_run("the ops after these", TIME_IS_UP);
            break;
        }
    }
    report.note(&format!("Kernels: {image}."));
    Ok(())
}

struct Arguments {
    smoke: bool,
    cublaslt: bool,
    out: Option<PathBuf>,
    scratch: PathBuf,
    only: Vec<String>,
    minutes: f64,
}

fn arguments() -> Outcome<Arguments> {
    let mut found = Arguments {
        smoke: false,
        cublaslt: true,
        out: None,
        scratch: std::env::temp_dir().join("tensorpager-gpu-suite"),
        only: Vec::new(),
        minutes: 9.5,
    };
    let mut list = std::env::args().skip(1);
    while let Some(name) = list.next() {
        let mut value = || list.next().ok_or(format!("{name} wants a value"));
        match name.as_str() {
            "--smoke" => found.smoke = true,
            "--no-cublaslt" => found.cublaslt = false,
            "--out" => found.out = Some(value()?.into()),
            "--scratch" => found.scratch = value()?.into(),
            "--only" => found.only = value()?.split(',').map(str::to_string).collect(),
            "--minutes" => found.minutes = value()?.parse()?,
            _ => return Err(format!("what is {name}? See gpu/README.md").into()),
        }
    }
    let known = |s: &String| SECTIONS.iter().any(|(name, _)| name == s);
    match found.only.iter().find(|s| !known(s)) {
        Some(s) => Err(format!("there is no section {s}: {:?}", SECTIONS.map(|s| s.0)).into()),
        None => Ok(found),
    }
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(true) => std::process::ExitCode::SUCCESS,
        Ok(false) => std::process::ExitCode::from(1),
        Err(e) => {
            eprintln!("error: {e}");
            std::process::ExitCode::from(2)
        }
    }
}

/// Kernels that the driver compiles are compiled once, not by each process: a home that cannot be written has no cache of them.
fn keep_compiled(scratch: &std::path::Path) {
    const CACHE: &str = "CUDA_CACHE_PATH";
    if std::env::var_os(CACHE).is_none() {
        // SAFETY: called first of all, while this is the only thread.
        unsafe { std::env::set_var(CACHE, scratch.join("compiled")) };
    }
}

/// Runs a section; what went wrong, in one line. One that panics is lost, the others are not.
fn caught(suite: &mut Suite, section: fn(&mut Suite) -> Outcome<()>) -> Result<(), String> {
    let ran = catch_unwind(AssertUnwindSafe(|| section(suite)));
    let why = match ran {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(e)) => e.to_string(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied());
            format!("panicked: {}", text.unwrap_or("it said nothing"))
        }
    };
    Err(why.trim().replace('\n', "; "))
}

fn run() -> Outcome<bool> {
    let arguments = arguments()?;
    let exe = std::env::current_exe()?;
    let home = exe
        .parent()
        .ok_or("this program lies nowhere")?
        .to_path_buf();
    std::fs::create_dir_all(&arguments.scratch)?;
    keep_compiled(&arguments.scratch);
    tools::end_together()?;
    let limit = Duration::from_secs_f64(arguments.minutes * 60.0);
    let mut suite = Suite::new(arguments.smoke, limit, home, arguments.scratch.clone());
    suite.cublaslt = arguments.cublaslt;
    if let Some(out) = &arguments.out {
        suite.report.keep(out, &suite.home);
    }
    for (name, section) in SECTIONS {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|o| o == name) {
            continue;
        }
        if suite.up() {
            suite.report.note(&format!("{name}: not run, {TIME_IS_UP}"));
            continue;
        }
        suite.report.running(Some(name));
        let started = Instant::now();
        if let Err(why) = caught(&mut suite, section) {
            suite.report.failed(&format!("{name}: {why}"));
            // Without a GPU everything else would say the same.
            if name == "machine" {
                break;
            }
        }
        suite.report.took(name, started.elapsed());
    }
    suite.report.running(Some("the end"));
    let _ = std::fs::remove_dir_all(&arguments.scratch);
    suite.goals.table(&mut suite.report, suite.smoke);
    suite.report.running(None);
    if let Some(out) = &arguments.out {
        suite.report.save()?;
        println!("\nrecord: {}", out.display());
    }
    println!("\n{}", suite.report.verdict());
    Ok(suite.report.good())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_that_panics_says_its_words_and_what_it_told_before_is_kept() {
        let mut suite = Suite::new(
            true,
            Duration::from_secs(60),
            "home".into(),
            "scratch".into(),
        );
        let panics = |suite: &mut Suite| -> Outcome<()> {
            suite.report.table("Ops", &["op", ""]);
            suite.report.checked(true, &["softmax", ""]);
            panic!("two\nlines")
        };
        assert_eq!(
            caught(&mut suite, panics),
            Err("panicked: two; lines".into())
        );
        assert!(suite.report.verdict().contains("all 1 checks"));
        assert_eq!(caught(&mut suite, |_| Err("no".into())), Err("no".into()));
        assert_eq!(caught(&mut suite, |_| Ok(())), Ok(()));
    }
}
