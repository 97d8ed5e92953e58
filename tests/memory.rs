//! The promise: `--cpu-memory` bounds the process's peak resident set, and a refusal names the budget that would do.
//!
//! Whole processes over a synthetic checkpoint of about 150 MB, measured by the kernel (`ru_maxrss`), not by the program.

#[path = "common/program.rs"]
mod program;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use program::program_within;
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
    let fixture = PathBuf::from(fixture("llama3-bf16"));
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
    let kept = std::env::var_os("XDG_CACHE_HOME").unwrap();
    // wait4 below reaps it, for the sake of its resource usage.
    #[allow(clippy::zombie_processes)]
    let child = program_within(kept)
        .env(
            "TENSORPAGER_OFFLOAD_FOLDER",
            std::env::var_os("TENSORPAGER_OFFLOAD_FOLDER").unwrap(),
        )
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

/// A text of about `bytes` bytes that no tokenizer makes short.
fn prose(bytes: usize) -> String {
    let words = ["sea", "lantern", "harbour", "tide"];
    let mut text = String::with_capacity(bytes + 16);
    for i in 0.. {
        if text.len() >= bytes {
            break;
        }
        text += &format!("{}{} ", words[i % 4], i % 89);
    }
    text
}

fn fixture(name: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    dir.join(name).to_str().unwrap().to_string()
}

/// Runs a job of `rows` in `dir` over a fixture; the errors' codes.
fn job(dir: &Path, model: &str, rows: &[Value], budget: &str) -> (Ran, Vec<String>) {
    let file = |name: &str| dir.join(name).to_str().unwrap().to_string();
    let text: String = rows.iter().map(|r| format!("{r}\n")).collect();
    std::fs::write(file("in.jsonl"), text).unwrap();
    let (input, output, model) = (file("in.jsonl"), file("out.jsonl"), fixture(model));
    let ran = tensorpager(
        dir,
        &[
            "batch",
            &model,
            "--in-place",
            "--threads",
            "2",
            "-i",
            &input,
            "-o",
            &output,
            "--overwrite",
            "--progress",
            "none",
            "--cpu-memory",
            budget,
        ],
        "",
    );
    let errors = std::fs::read_to_string(file("out.errors.jsonl")).unwrap_or_default();
    let code = |l: &str| {
        let row: Value = serde_json::from_str(l).unwrap();
        row["error"]["code"].as_str().unwrap().to_string()
    };
    (ran, errors.lines().map(code).collect())
}

fn assert_within(ran: &Ran, exit: i32, budget: u64, what: &str) {
    assert_eq!(ran.code, exit, "{what}: {}", ran.stderr);
    let peak = ran.peak as f64 / MIB as f64;
    println!("{what}: budget {} MiB, peak {peak:.1} MiB", budget / MIB);
    assert!(
        ran.peak <= budget,
        "{what}: {} MiB, peak {peak:.1} MiB",
        budget / MIB
    );
}

#[test]
fn a_row_of_any_length_costs_a_job_neither_memory_nor_its_other_rows() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize, body: Value| json!({"custom_id": format!("r{i}"), "body": body});
    let short = |i| {
        row(
            i,
            json!({"prompt": format!("the sea {i}"), "max_tokens": 3}),
        )
    };
    let chat =
        |text: &str| json!({"messages": [{"role": "user", "content": text}], "max_tokens": 3});
    for (long, code, what) in [
        (
            json!({"prompt": prose(4_200_000), "max_tokens": 3}),
            "invalid_prompt",
            "4 MB of prompt",
        ),
        (
            chat(&prose(4_200_000)),
            "invalid_prompt",
            "4 MB in a message",
        ),
        (
            json!({"prompt": prose(60_000_000)}),
            "row_too_long",
            "60 MB of prompt",
        ),
        (
            json!({"prompt": vec![1; 2_000_000]}),
            "row_too_long",
            "4 MB of token ids",
        ),
    ] {
        let rows = [short(0), row(1, long), short(2)];
        let (ran, errors) = job(dir.path(), "qwen2-bf16", &rows, "64MiB");
        assert_within(&ran, 3, 64 * MIB, what);
        assert_eq!(errors, [code], "{what}");
        let answers = std::fs::read_to_string(dir.path().join("out.jsonl")).unwrap();
        assert_eq!(answers.lines().count(), 2, "{what}");
        // The check says the same, in as much memory.
        let input = dir.path().join("in.jsonl");
        let check = [
            "batch-check",
            &fixture("qwen2-bf16"),
            "--threads",
            "2",
            "-i",
            input.to_str().unwrap(),
        ];
        let ran = tensorpager(
            dir.path(),
            &[&check[..], &["--cpu-memory", "64MiB"]].concat(),
            "",
        );
        assert_within(&ran, 3, 64 * MIB, &format!("{what}, checked"));
        assert!(ran.stdout.starts_with("line 2"), "{}", ran.stdout);
    }
}

/// Noise, which no format makes small.
fn noise(side: u32) -> image::RgbImage {
    let mut state = 1u32;
    image::RgbImage::from_fn(side, side, |_, _| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let [_, a, b, c] = state.to_le_bytes();
        image::Rgb([a, b, c])
    })
}

#[test]
fn pictures_inline_are_part_of_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let mut png = std::io::Cursor::new(Vec::new());
    noise(2000)
        .write_to(&mut png, image::ImageFormat::Png)
        .unwrap();
    let at = data_url(&png.into_inner());
    let row = |at: &str, i: usize| {
        let content = json!([{"type": "image_url", "image_url": {"url": at}}, {"type": "text", "text": format!("What {i}?")}]);
        let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 3});
        json!({"custom_id": format!("r{i}"), "body": body})
    };
    assert!(at.len() > 15_000_000, "{}", at.len());
    let rows = [row(&at, 0), row(&at, 1), row(&at, 2)];
    // There is no memory to read them: each is refused, the job is not.
    let (ran, errors) = job(dir.path(), "vl-bf16", &rows, "64MiB");
    assert_within(&ran, 3, 64 * MIB, "too little to read the rows");
    assert_eq!(errors, ["row_too_long"; 3]);
    for budget in [144 * MIB, 184 * MIB] {
        let (ran, errors) = job(dir.path(), "vl-bf16", &rows, &flag(budget));
        assert_within(&ran, 0, budget, "rows with pictures inline");
        assert!(errors.is_empty());
    }
    // A row that is soon read and long decoded: the budget named is enough.
    let mut flat = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(4000, 4000, image::Rgb([9, 8, 7]))
        .write_to(&mut flat, image::ImageFormat::Png)
        .unwrap();
    let at = data_url(&flat.into_inner());
    let (ran, _) = job(dir.path(), "vl-bf16", &[row(&at, 0)], "144MiB");
    let smallest = named(&ran);
    assert!(
        ran.stderr.contains("--max-pixels changes neither"),
        "{}",
        ran.stderr
    );
    let (ran, _) = job(dir.path(), "vl-bf16", &[row(&at, 0)], &flag(smallest));
    assert_within(&ran, 0, smallest, "a large picture in a small row");
}

fn data_url(png: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(png);
    format!("data:image/png;base64,{text}")
}

/// A small picture in a large file, and a large one in a small file.
#[test]
fn the_file_of_a_picture_counts_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let go = |name: &str, budget: &str| {
        let (model, path) = (fixture("vl-bf16"), dir.path().join(name));
        let args = [
            "run",
            &model,
            "--in-place",
            "--threads",
            "2",
            "-n",
            "2",
            "-p",
            "hi",
        ];
        let more = [
            "-q",
            "--image",
            path.to_str().unwrap(),
            "--cpu-memory",
            budget,
        ];
        tensorpager(dir.path(), &[&args[..], &more].concat(), "")
    };
    for name in ["a.png", "a.jpg", "a.webp"] {
        let path = dir.path().join(name);
        noise(100).save(&path).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(180_000_000).unwrap();
        let ran = go(name, "100MiB");
        let enough = named(&ran);
        assert!(
            ran.peak < 60 * MIB,
            "{name}: {} MiB to refuse it",
            ran.peak / MIB
        );
        assert!(
            ran.stderr.contains("--max-pixels changes what is kept"),
            "{}",
            ran.stderr
        );
        assert_kept(&go(name, &flag(enough)), enough, name);
    }
    // 16 bits and alpha, turned: the most that a pixel takes.
    let deep = image::ImageBuffer::from_fn(2000, 1500, |x, y| {
        image::Rgba([x as u16 * 31, y as u16 * 43, 7, 9])
    });
    image::DynamicImage::ImageRgba16(deep)
        .save(dir.path().join("deep.png"))
        .unwrap();
    let enough = named(&go("deep.png", "64MiB"));
    assert_kept(&go("deep.png", &flag(enough)), enough, "16-bit RGBA");
}
