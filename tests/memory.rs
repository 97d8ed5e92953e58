//! The promise: `--cpu-memory` bounds the process's peak resident set, and a refusal names the budget that would do.
//!
//! Whole processes over a synthetic checkpoint of about 150 MB, measured by the kernel (`ru_maxrss`), not by the program.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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

fn tensorpager(offload: &Path, args: &[&str], input: &str) -> Ran {
    // One at a time: what is measured is a process, not what the others leave of the machine.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // wait4 below reaps it, for the sake of its resource usage.
    #[allow(clippy::zombie_processes)]
    let mut child = Command::new(env!("CARGO_BIN_EXE_tensorpager"))
        .args(args)
        .env("TENSORPAGER_OFFLOAD_FOLDER", offload)
        .env("XDG_CACHE_HOME", offload)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let errors = std::thread::spawn(move || std::io::read_to_string(&mut err).unwrap());
    let stdout = std::io::read_to_string(&mut out).unwrap();
    let stderr = errors.join().unwrap();
    let mut status = 0;
    // SAFETY: both are plain data that the kernel fills, and the child is this process's own, reaped only here.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        let pid = child.id() as libc::pid_t;
        assert_eq!(libc::wait4(pid, &mut status, 0, &mut usage), pid);
        usage
    };
    Ran {
        code: if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            -1
        },
        stdout,
        stderr,
        peak: usage.ru_maxrss as u64 * 1024,
    }
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
