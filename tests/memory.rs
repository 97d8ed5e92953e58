//! The promise: `--cpu-memory` bounds the process's peak resident set, and a refusal names the budget that would do.
//!
//! Whole processes over a synthetic checkpoint of about 150 MB, measured by the kernel (`ru_maxrss`), not by the program.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};
use tensorpager::checkpoint::write_synthetic;
use tensorpager::units::parse_size;

const MIB: u64 = 1 << 20;

fn config(layers: usize, tied: bool) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16"
    })
}

/// A checkpoint with a fixture's tokenizer (its ids are a part of the vocabulary).
fn model(dir: &Path, layers: usize, tied: bool) -> PathBuf {
    let model = dir.join("model");
    write_synthetic(&model, &config(layers, tied), &mut |_, _| Ok(())).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama3-bf16");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(name), model.join(name)).unwrap();
    }
    model
}

struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
    /// The kernel's figure for the process that ended.
    peak: u64,
}

/// Names the folder with what [`measured`] is to run.
const MEASURED: &str = "MEASURED_PROCESS";

/// Runs the program and says what the kernel counted for it.
///
/// `ru_maxrss` outlives `exec`, and a child that is spawned as `vfork` does it lives in its parent's memory until then: its figure is at
/// least the parent's own peak. A test process is small, until one panic makes it read its debug information for a backtrace. So the
/// child is that of a process in between, started for it, whose own peak is known.
fn tensorpager(offload: &Path, args: &[&str], input: &str) -> Ran {
    // One at a time: what is measured is a process, not what the others leave of the machine.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    std::fs::write(file("stdin"), input).unwrap();
    std::fs::write(file("args"), json!(args).to_string()).unwrap();
    let between = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "measured", "--test-threads=1"])
        .env(MEASURED, dir.path())
        .env("TENSORPAGER_OFFLOAD_FOLDER", offload)
        .env("XDG_CACHE_HOME", offload)
        .output()
        .unwrap();
    assert!(between.status.success(), "{between:?}");
    let read = |name: &str| std::fs::read_to_string(file(name)).unwrap();
    let told: [u64; 3] = serde_json::from_str(&read("usage")).unwrap();
    let [code, peak, floor] = told;
    assert!(
        floor < peak,
        "the process in between took {floor} bytes, so {peak} says nothing of the program"
    );
    Ran {
        code: code as i32,
        stdout: read("stdout"),
        stderr: read("stderr"),
        peak,
    }
}

/// The process in between: not a test of its own.
#[test]
fn measured() {
    let Some(dir) = std::env::var_os(MEASURED) else {
        return;
    };
    let file = |name: &str| Path::new(&dir).join(name);
    let args: Vec<String> =
        serde_json::from_str(&std::fs::read_to_string(file("args")).unwrap()).unwrap();
    // wait4 below reaps it, for the sake of its resource usage.
    #[allow(clippy::zombie_processes)]
    let child = Command::new(env!("CARGO_BIN_EXE_tensorpager"))
        .args(args)
        .env_remove(MEASURED)
        .stdin(File::open(file("stdin")).unwrap())
        .stdout(File::create(file("stdout")).unwrap())
        .stderr(File::create(file("stderr")).unwrap())
        .spawn()
        .unwrap();
    let mut status = 0;
    // SAFETY: both are plain data that the kernel fills, and the child is this process's own, reaped only here.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        let pid = child.id() as libc::pid_t;
        assert_eq!(libc::wait4(pid, &mut status, 0, &mut usage), pid);
        usage
    };
    assert!(libc::WIFEXITED(status), "status {status}");
    let told = [
        libc::WEXITSTATUS(status) as u64,
        usage.ru_maxrss as u64 * 1024,
        own_peak(),
    ];
    std::fs::write(file("usage"), json!(told).to_string()).unwrap();
}

/// Peak of this process since its own `exec`, bytes.
fn own_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

/// What makes the figures below the program's own: whoever measures may be larger.
#[test]
fn a_figure_owes_nothing_to_whoever_measures() {
    let large = std::hint::black_box(vec![1u8; 200 << 20]);
    assert!(own_peak() > 200 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let ran = tensorpager(dir.path(), &["--version"], "");
    drop(large);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.peak < 100 * MIB, "{} MiB", ran.peak / MIB);
}

fn flag(bytes: u64) -> String {
    format!("{}MiB", bytes / MIB)
}

/// What the refusal says to give.
fn named(ran: &Ran) -> u64 {
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let fix = ran
        .stderr
        .lines()
        .find(|l| l.starts_with("fix: "))
        .expect("three lines");
    let word = fix
        .split_whitespace()
        .skip_while(|w| *w != "--cpu-memory")
        .nth(1)
        .expect(fix);
    parse_size(word).unwrap()
}

fn assert_kept(ran: &Ran, budget: u64, what: &str) {
    assert_eq!(ran.code, 0, "{what}: {}", ran.stderr);
    println!(
        "{what}: budget {} MiB, peak {} MiB",
        budget / MIB,
        ran.peak / MIB
    );
    assert!(
        ran.peak <= budget,
        "{what}: a budget of {} MiB, a peak of {:.1} MiB",
        budget / MIB,
        ran.peak as f64 / MIB as f64
    );
}

#[test]
fn run_keeps_its_budget_from_the_smallest_on() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 20, true);
    let model = model.to_str().unwrap();
    for in_place in [false, true] {
        let offload = dir.path().join(if in_place { "a" } else { "b" });
        let args = |budget: &str| -> Vec<String> {
            let mut args: Vec<String> = [
                "run",
                model,
                "--prompt",
                "budget",
                "--raw",
                "-n",
                "3",
                "--json",
                "--cpu-memory",
            ]
            .map(String::from)
            .to_vec();
            args.push(budget.to_string());
            args.extend(in_place.then(|| "--in-place".to_string()));
            args
        };
        let go = |budget: &str| {
            let args = args(budget);
            tensorpager(
                &offload,
                &args.iter().map(String::as_str).collect::<Vec<_>>(),
                "",
            )
        };
        let smallest = named(&go("8MiB"));
        let mut texts = Vec::new();
        for more in [0, 7, 40, 110, 400] {
            let budget = smallest + more * MIB;
            let ran = go(&flag(budget));
            assert_kept(
                &ran,
                budget,
                &format!("run, in place: {in_place}, smallest + {more} MiB"),
            );
            let report: Value = serde_json::from_str(&ran.stdout).unwrap();
            let told = report["paging"]["peak_memory_bytes"].as_u64().unwrap();
            // The kernel counts pages in batches: two looks may differ by a few.
            assert!(
                told.abs_diff(ran.peak) < 2 * MIB,
                "it says {told}, the kernel {}",
                ran.peak
            );
            texts.push(report["token_ids"].clone());
            let disk = report["paging"]["disk_bytes_per_pass"].as_u64().unwrap();
            match more {
                0 => assert!(
                    disk > 100 * MIB,
                    "the smallest plan streams nearly everything: {disk}"
                ),
                400 => assert_eq!(disk, 0, "with room for all of it nothing is streamed"),
                _ => {}
            }
        }
        assert!(
            texts.iter().all(|t| *t == texts[0]),
            "the budget changes no token"
        );
    }
}

#[test]
fn score_keeps_its_budget_too() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 12, false);
    let offload = dir.path().join("offload");
    let ids: Vec<usize> = (0..600).map(|i| i * 37 % 8192).collect();
    let input = format!("{}\n", json!({"input_ids": ids})).repeat(2);
    let output = dir.path().join("logits.safetensors");
    let go = |budget: &str| {
        tensorpager(
            &offload,
            &[
                "score",
                model.to_str().unwrap(),
                "--in-place",
                "--output",
                output.to_str().unwrap(),
                "--cpu-memory",
                budget,
            ],
            &input,
        )
    };
    let smallest = named(&go("8MiB"));
    let mut lines = Vec::new();
    for more in [0, 64] {
        let ran = go(&flag(smallest + more * MIB));
        assert_kept(
            &ran,
            smallest + more * MIB,
            &format!("score, smallest + {more} MiB"),
        );
        assert_eq!(
            std::fs::metadata(&output).unwrap().len() / (4 * 8192 * 1200),
            1,
            "all logits"
        );
        lines.push(ran.stdout);
    }
    assert_eq!(lines[0], lines[1], "the budget changes no digit");
}

// hazard: budget: refused before work starts, with the budget that would do
#[test]
fn a_refusal_reads_nothing_and_its_budget_works_when_pasted() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 3, true);
    let model = model.to_str().unwrap();
    for extra in [
        &["--prefetch-depth", "4"][..],
        &["--context", "8000"],
        &["--device-map", "cpu"],
        &["--page-size", "64KiB"],
    ] {
        let go = |budget: &str| {
            let mut args = vec![
                "run",
                model,
                "--in-place",
                "--prompt",
                "hi",
                "--raw",
                "-n",
                "2",
                "-q",
                "--cpu-memory",
                budget,
            ];
            args.extend(extra);
            tensorpager(dir.path(), &args, "")
        };
        for refused in ["1MiB", "30MiB"] {
            let ran = go(refused);
            let smallest = named(&ran);
            assert!(ran.stdout.is_empty());
            for _ in 0..3 {
                let ran = go(&flag(smallest));
                assert_kept(&ran, smallest, &format!("{extra:?}"));
            }
            // Less than named is refused, or the name was too much.
            let ran = go(&flag(smallest - 6 * MIB));
            assert_eq!(
                ran.code,
                1,
                "{extra:?}: {} MiB would have done",
                (smallest - 6 * MIB) / MIB
            );
        }
    }
}
