//! The two kinds of work that write: a pack and a job.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};
use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::store::{PackOptions, Store, verify};

use super::program::{PROGRAM, apart, own_cache};

pub const MODEL: &str = "qwen2-bf16";
const ROWS: usize = 9;

pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(MODEL)
}

/// Which of the crash points a run takes.
pub struct Sample {
    every: usize,
    seen: usize,
}

impl Sample {
    /// `default`: every how many points where nothing else is asked for.
    pub fn new(default: usize) -> Sample {
        let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse().ok());
        Sample {
            every: number("CRASH_EVERY").unwrap_or(default).max(1),
            seen: number("CRASH_FROM").unwrap_or(0),
        }
    }

    pub fn takes(&mut self) -> bool {
        self.seen += 1;
        self.seen.is_multiple_of(self.every)
    }
}

/// Of these kinds of call those that `CRASH_CALLS` names (`write,fsync`), so that all crash points can be gone through in pieces;
/// all of them where it is not set.
pub fn chosen<'a>(calls: &[&'a str]) -> Vec<&'a str> {
    let Ok(asked) = std::env::var("CRASH_CALLS") else {
        return calls.to_vec();
    };
    let is_asked = |call: &&str| asked.split(',').any(|a| a == *call);
    calls.iter().copied().filter(is_asked).collect()
}

/// At least so many points must have been hit, where all kinds of call are taken.
pub fn assert_more_than(least: usize, hits: usize) {
    let all = std::env::var_os("CRASH_CALLS").is_none();
    assert!(hits > least || !all, "only {hits} crash points");
}

/// The program under strace with `inject` (several, as strace takes them); plainly where there are none.
fn program(inject: &[&str], log: &Path) -> Command {
    let mut c = match inject {
        [] => Command::new(PROGRAM),
        _ => {
            let calls: Vec<&str> = inject.iter().filter_map(|i| i.split(':').next()).collect();
            let mut c = Command::new("strace");
            c.args(["-f", "-qq", "-o"]).arg(log);
            c.arg("-e").arg(format!("trace={}", calls.join(",")));
            for one in inject {
                c.arg("-e").arg(format!("inject={one}"));
            }
            c.arg(PROGRAM);
            c
        }
    };
    apart(&mut c, own_cache());
    c.env("SOURCE_DATE_EPOCH", "1700000000")
        .env_remove("RUST_BACKTRACE");
    c.stdin(Stdio::null());
    c
}

pub fn has_strace() -> bool {
    let found = Command::new("strace")
        .args([
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=close",
            "-e",
            "inject=close:error=EIO:when=60000",
            "true",
        ])
        .output()
        .is_ok_and(|o| o.status.success());
    if !found {
        println!("skipped: strace is not installed, or may not trace here");
    }
    found
}

/// What happened to one process.
pub struct Ended {
    pub output: Output,
    /// A fault was injected: else the run was over before that point.
    pub hit: bool,
    /// The fault was in writing to the terminal, where an error message would have gone.
    pub mute: bool,
}

impl Ended {
    fn of(mut command: Command, log: &Path) -> Ended {
        let output = command.output().unwrap();
        let log = fs::read_to_string(log).unwrap_or_default();
        let injected = |l: &&str| l.contains("(INJECTED)") || l.contains("killed by SIGKILL");
        let lines: Vec<&str> = log.lines().filter(injected).collect();
        Ended {
            output,
            hit: !lines.is_empty(),
            mute: lines
                .iter()
                .any(|l| l.contains("write(1,") || l.contains("write(2,")),
        }
    }

    pub fn ok(&self) -> bool {
        self.output.status.success()
    }

    /// An end that a user can make something of: success, a coded error, or the kill itself.
    #[track_caller]
    pub fn assert_sane(&self, what: &str) {
        let stderr = String::from_utf8_lossy(&self.output.stderr);
        assert!(!stderr.contains("panicked"), "{what}: {stderr}");
        match self.output.status.code() {
            // Killed, or the loader of the system could not start the program.
            None | Some(0 | 3 | 127 | 137) => {}
            Some(_) if self.mute => {}
            Some(code) => {
                let said = ["error: ", "cause: ", "fix: "]
                    .iter()
                    .all(|l| stderr.contains(l));
                assert!(said && code == 1, "{what}: {code}: {stderr}");
            }
        }
    }
}

// ---- a pack ----

pub fn run_pack(offload: &Path, inject: &[&str], log: &Path) -> Ended {
    let mut c = program(inject, log);
    c.arg("pack")
        .arg(model())
        .arg("--offload-folder")
        .arg(offload);
    Ended::of(c, log)
}

/// The calls of a pack that write and sync, in order, with the paths of their files.
pub fn trace_pack(offload: &Path, log: &Path) -> Vec<String> {
    let calls = "trace=write,pwrite64,pwritev2,fsync,fdatasync,rename,renameat,renameat2";
    let mut strace = Command::new("strace");
    let status = apart(&mut strace, own_cache())
        .args(["-f", "-y", "-qq", "-e", calls, "-o"])
        .arg(log)
        .args([PROGRAM, "pack"])
        .arg(model())
        .arg("--offload-folder")
        .arg(offload)
        .output()
        .unwrap();
    assert!(status.status.success());
    let text = fs::read_to_string(log).unwrap();
    // A call that another thread interrupts is two lines; where it began is what counts.
    let begins = |l: &&str| !l.contains("resumed>");
    text.lines().filter(begins).map(str::to_string).collect()
}

fn pack_dir(offload: &Path) -> PathBuf {
    offload.join(format!("{MODEL}--bf16"))
}

/// Whether there is a pack that opens. One that opens must be whole.
pub fn usable(offload: &Path, what: &str) -> Result<bool, String> {
    let Ok(store) = Store::open_packed(&pack_dir(offload)) else {
        return Ok(false);
    };
    drop(store);
    let report = verify(&pack_dir(offload), &AtomicBool::new(false), &mut |_, _| {});
    match report {
        Ok(r) if r.problems.is_empty() => Ok(true),
        Ok(r) => Err(format!(
            "{what}: a pack that opens is damaged: {:?}",
            r.problems
        )),
        Err(e) => Err(format!("{what}: {e}")),
    }
}

/// The next run makes a good pack of whatever is there.
pub fn repair(offload: &Path, what: &str) {
    let source = Checkpoint::open(&model().display().to_string(), &OpenOptions::default()).unwrap();
    let made = Store::pack(&source, &PackOptions::new(offload), &mut |_| {});
    drop(made.unwrap_or_else(|e| panic!("{what}: {e}")));
    assert_eq!(usable(offload, what), Ok(true), "{what}: packing again");
}

// ---- a job ----

fn row(i: usize) -> Value {
    if i == 4 {
        return json!({"custom_id": "bad", "body": {"prompt": "x", "frobnicate": 1}});
    }
    let body = json!({"prompt": format!("the sea, number {i}"), "max_tokens": 2 + i % 3, "temperature": 0.8});
    json!({"custom_id": format!("row-{i}"), "url": "/v1/completions", "body": body})
}

pub fn write_job(input: &Path) {
    let text: String = (0..ROWS).map(|i| format!("{}\n", row(i))).collect();
    fs::write(input, text).unwrap();
}

pub fn run_job(input: &Path, output: &Path, inject: &[&str], log: &Path) -> Ended {
    let mut c = program(inject, log);
    c.arg("batch").arg(model());
    c.args([
        "--in-place",
        // Looking for a GPU driver opens files by the hundred, none of them the job's.
        "--device",
        "cpu",
        "--threads",
        "1",
        "--cpu-memory",
        "512MiB",
        "--max-sequences",
        "2",
    ]);
    c.args(["--progress", "json"]);
    c.arg("-i").arg(input).arg("-o").arg(output);
    Ended::of(c, log)
}

/// Rows that the process said were finished, answered or refused.
pub fn told(ended: &Ended) -> u64 {
    let stderr = String::from_utf8_lossy(&ended.output.stderr);
    let rows = stderr
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok());
    rows.filter_map(|v| v["rows_done"].as_u64())
        .max()
        .unwrap_or(0)
}

pub fn errors_of(output: &Path) -> PathBuf {
    output.with_extension("errors.jsonl")
}

/// Whole rows in both files by their custom_id. A row twice is a lost promise.
pub fn rows(output: &Path, what: &str) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for file in [output.to_path_buf(), errors_of(output)] {
        let text = fs::read_to_string(file).unwrap_or_default();
        for line in text.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
            let Ok(row) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let id = row["custom_id"].to_string();
            assert!(ids.insert(id), "{what}: a row twice: {line}");
        }
    }
    ids
}

/// The bytes of both files.
pub fn bytes(output: &Path) -> (Vec<u8>, Vec<u8>) {
    let read = |p: &Path| fs::read(p).unwrap_or_default();
    (read(output), read(&errors_of(output)))
}
