//! `--gemm cublaslt`: refused where it makes no sense, said in plain words where the library is missing, and where it is there the same logits
//! as our own products give, up to the order of sums. On the emulated driver and a library made of it.

mod common;
mod emulated;
#[path = "emulated/run.rs"]
mod run;

use std::path::Path;
use std::process::Output;

use common::{fixtures, golden, nmse};
use emulated::driver;
use run::Run;

/// Said whenever its products are used.
const WARNING: &str = "--gemm cublaslt: a token's result depends on what else is in the pass";

fn three_lines(text: &str, words: &[&str]) {
    assert!(words.iter().all(|w| text.contains(w)), "{words:?}: {text}");
    let parts = ["error:", "cause:", "fix:"];
    assert!(parts.iter().all(|p| text.contains(p)), "{text}");
}

fn said(done: &Output) -> String {
    String::from_utf8_lossy(&done.stderr).into_owned()
}

/// A run with the library beside the driver.
fn with_library(driver: &Path, command: &str, model: &str) -> Run {
    let library = driver.join("cublaslt");
    assert!(library.join("libcublasLt.so.12").exists());
    let path = format!("{}:{}", driver.display(), library.display());
    let run = Run::new(driver, command, model).args(["--gemm", "cublaslt"]);
    run.env("LD_LIBRARY_PATH", &path)
}

const PROMPT: [&str; 5] = ["--raw", "--greedy", "--prompt", "T", "--ignore-eos"];

#[test]
fn the_cpu_refuses_it() {
    let none = tempfile::tempdir().unwrap();
    // `auto` without a GPU is the CPU too.
    for device in ["cpu", "auto"] {
        let run = Run::on(device, none.path(), "run", "gpu-qwen2-bf16");
        let run = run.args(PROMPT).args(["--gemm", "cublaslt"]);
        let done = run.env("EMUCUDA_DEVICES", "0").output();
        if device == "auto" && done.status.success() {
            continue; // a machine with a GPU and the library
        }
        assert_eq!(done.status.code(), Some(2), "{device}: {}", said(&done));
        three_lines(
            &said(&done),
            &["--gemm cublaslt makes no sense here", "--device cuda"],
        );
    }
}

#[test]
fn a_missing_library_is_named_with_the_way_without_it() {
    let Some(driver) = driver() else { return };
    let usual = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/local/cuda/lib64",
    ];
    let there = |dir: &str, name: &str| Path::new(dir).join(name).exists();
    let names = ["libcublasLt.so", "libcublasLt.so.12", "libcublasLt.so.11"];
    if usual.iter().any(|d| names.iter().any(|n| there(d, n))) {
        eprintln!("skipped: this machine has the library");
        return;
    }
    let run = Run::new(driver, "run", "gpu-qwen2-bf16").args(PROMPT);
    let text = run.args(["--gemm", "cublaslt"]).fails();
    three_lines(
        &text,
        &[
            "cublasLt cannot be used",
            "libcublasLt.so.12 cannot be loaded",
            "CUDA toolkit",
            "--gemm own",
            "LD_LIBRARY_PATH",
        ],
    );
}

/// With biases (Qwen2) and without, in both types, products that add included.
#[test]
fn its_products_agree_with_ours_and_it_says_what_it_does_not_promise() {
    let Some(driver) = driver() else { return };
    for (model, biased) in [("gpu-qwen2-bf16", true), ("gpu-qwen3-f16-tied", false)] {
        let inputs: Vec<Vec<u32>> = golden(&fixtures().join(model))
            .into_iter()
            .map(|g| g.ids)
            .collect();
        let traces = [(); 2].map(|()| tempfile::NamedTempFile::new().unwrap());
        let [path, their_path] = traces.each_ref().map(|t| t.path().to_str().unwrap());
        let own = Run::new(driver, "score", model).env("EMUCUDA_TRACE", path);
        let own = own.score(&inputs);
        let theirs = with_library(driver, "score", model).env("EMUCUDA_TRACE", their_path);
        let theirs = theirs.score(&inputs);
        for (own, theirs) in own.iter().zip(&theirs) {
            // 16-bit roundings of sums in another order, some of them to the other side.
            assert!(nmse(theirs, own) < 1e-4, "{model}: {}", nmse(theirs, own));
        }
        let [own, theirs] = traces.map(|t| std::fs::read_to_string(t.path()).unwrap());
        let launches = |calls: &str, name: &str| {
            let lines = calls.lines();
            lines.filter(|l| l.trim().starts_with(name)).count()
        };
        assert!(
            launches(&theirs, "linear_any_") > 0,
            "{model}: its products"
        );
        assert_eq!(launches(&theirs, "linear_t"), 0, "{model}: ours");
        assert_eq!(
            launches(&theirs, "bias_add_") > 0,
            biased,
            "{model}: biases"
        );
        // One of ours where it is asked for queries, keys and values, and for gate and up: three fewer a layer.
        let layers = launches(&own, "rope_append_");
        assert!(layers > 0 && layers == launches(&theirs, "rope_append_"));
        let saved = launches(&theirs, "linear_") - launches(&own, "linear_");
        assert_eq!(saved, 3 * layers, "{model}: launches");
    }
    let run = with_library(driver, "run", "gpu-qwen2-bf16").args(PROMPT);
    let done = run.args(["--max-tokens", "3"]).output();
    assert!(done.status.success(), "{}", said(&done));
    assert!(said(&done).contains(WARNING), "{}", said(&done));
    let run = Run::new(driver, "run", "gpu-qwen2-bf16").args(PROMPT);
    let done = run.args(["--max-tokens", "1"]).output();
    assert!(!said(&done).contains("--gemm"), "{}", said(&done));
}

/// What its handle takes of the GPU is part of the budget, as its workspace is.
#[test]
fn its_memory_is_counted() {
    let Some(driver) = driver() else { return };
    let smallest = |handle: &str| -> u64 {
        let run = with_library(driver, "run", "gpu-qwen2-bf16").args(PROMPT);
        let run = run.args(["--gpu-memory", "32MiB", "--max-tokens", "1"]);
        let text = run.env("EMUCUBLASLT_HANDLE", handle).fails();
        let mut words = text.split_whitespace().skip_while(|w| *w != "--gpu-memory");
        let mib = words.nth(1).unwrap_or_else(|| panic!("{text}"));
        mib.trim_end_matches("MiB").parse().unwrap()
    };
    assert_eq!(smallest("50331648"), smallest("2097152") + 46);
}

#[test]
fn what_the_library_answers_is_said() {
    let Some(driver) = driver() else { return };
    for (fail, words) in [
        ("cublasLtCreate:1", ["starting cublasLt", "NOT_INITIALIZED"]),
        (
            "cublasLtMatmulAlgoGetHeuristic:15",
            ["choosing an algorithm of cublasLt", "NOT_SUPPORTED"],
        ),
        (
            "cublasLtMatmul:13",
            ["a product of cublasLt", "EXECUTION_FAILED"],
        ),
    ] {
        let run = with_library(driver, "run", "gpu-qwen2-bf16").args(PROMPT);
        let text = run.env("EMUCUBLASLT_FAIL", fail).fails();
        three_lines(&text, &words);
        three_lines(&text, &["run with --gemm own"]);
    }
}
