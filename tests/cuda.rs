//! The whole program on an emulated CUDA driver: streams in a seeded legal order, copies as late as that allows, kernels compiled from
//! `kernels/`. A missing wait, a slot or a frame refilled too soon, or a wrong argument ends in wrong logits or in the driver's own abort.
//!
//! Skipped, with a printed reason, where the driver cannot be built. It says nothing of a GPU's speed or rounding.

mod common;
mod emulated;
#[path = "emulated/run.rs"]
mod run;

use std::path::Path;

use common::{Golden, fixtures, golden, nmse, read_safetensors};
use emulated::driver;
use run::Run;
use serde_json::{Value, json};

const MODELS: [&str; 3] = ["gpu-qwen2-bf16", "gpu-qwen3-f16-tied", "gpu-mistral-bf16"];

/// The fixtures' tokenizer has so many ids; the models' padding above is never sampled.
const TOKENIZER_IDS: usize = 283;

fn inputs(all: &[Golden]) -> Vec<Vec<u32>> {
    all.iter().map(|g| g.ids.clone()).collect()
}

#[test]
fn logits_are_nearer_to_float32_than_transformers_own_16_bit_run() {
    let Some(driver) = driver() else { return };
    for model in MODELS {
        let all = golden(&fixtures().join(model));
        let got = Run::new(driver, "score", model).score(&inputs(&all));
        for (g, got) in all.iter().zip(&got) {
            let vocab = got.len() / g.ids.len();
            let rows = g.positions.iter().flat_map(|p| &got[p * vocab..][..vocab]);
            let rows: Vec<f32> = rows.copied().collect();
            let (error, half) = (nmse(&rows, &g.logits), g.half_nmse.unwrap());
            println!(
                "{model}: {} tokens, nmse {error:.2e}, half {half:.2e}",
                g.ids.len()
            );
            assert!(error < half, "{model}: {error} against {half}");
        }
    }
}

// hazard: gpu-unpinned: copies go through the driver's own memory; no bit changes
#[test]
fn tiers_readers_depths_pages_and_orders_change_no_bit() {
    let Some(driver) = driver() else { return };
    let model = "gpu-qwen2-bf16";
    let inputs = inputs(&golden(&fixtures().join(model)));
    let reference = Run::new(driver, "score", model).score(&inputs);
    let same = |what: &str, run: Run| {
        assert!(run.score(&inputs) == reference, "{what}");
    };
    let new = || Run::new(driver, "score", model);
    for map in ["disk", "cpu", "gpu"] {
        same(map, new().args(["--device-map", map]));
    }
    same(
        "threads",
        new().args(["--device-map", "disk", "--io", "threads"]),
    );
    same(
        "in place",
        new().args(["--device-map", "disk", "--in-place"]),
    );
    for depth in ["0", "2"] {
        same(
            depth,
            new().args(["--device-map", "disk", "--prefetch-depth", depth]),
        );
    }
    same(
        "pages",
        new().args(["--device-map", "disk", "--page-size", "64KiB"]),
    );
    same(
        "two frames",
        new()
            .args(["--device-map", "disk", "--page-size", "64KiB"])
            .args(["--ring-size", "2"]),
    );
    for seed in ["2", "3", "4"] {
        for order in ["drawn", "lazy", "eager"] {
            same(
                &format!("seed {seed}, {order}"),
                new()
                    .args(["--device-map", "disk", "--page-size", "64KiB"])
                    .env("EMUCUDA_SEED", seed)
                    .env("EMUCUDA_ORDER", order),
            );
        }
    }
    same(
        "unpinned",
        new()
            .args(["--device-map", "cpu"])
            .env("EMUCUDA_FAIL", "cuMemHostRegister:*:801"),
    );
    same("small blocks", new().env("EMUCUDA_SHARED_OPTIN", "101376"));
}

#[test]
fn the_closing_line_says_what_lies_where_and_what_was_waited_for() {
    let Some(driver) = driver() else { return };
    let said = |args: &[&str], fail: &str| {
        let mut run = Run::new(driver, "run", "gpu-qwen2-bf16")
            .args(["--raw", "--greedy", "--ignore-eos", "--max-tokens", "4"])
            .args(["--prompt", "T"])
            .env("EMUCUDA_FAIL", fail);
        run.command.args(args);
        String::from_utf8_lossy(&run.output().stderr).into_owned()
    };
    let says = |text: String, words: &[&str]| {
        assert!(words.iter().all(|w| text.contains(w)), "{words:?}: {text}");
    };
    says(
        said(&["--device-map", "disk"], ""),
        &[
            " on the GPU, 0 B in RAM, ",
            " a token from disk at ",
            "; copied at ",
            "; the GPU waited ",
            " s for copies; ",
            "peak memory ",
        ],
    );
    // Two layers and the head.
    let beyond = ["--device-map", "cpu", "--pinned-memory", "1KiB"];
    says(
        said(&beyond, ""),
        &["3 units in RAM beyond --pinned-memory; "],
    );
    says(
        said(&["--device-map", "cpu"], "cuMemHostRegister:*:801"),
        &["host memory is not pinned ("],
    );
}

// hazard: gpu-pinned-bound: of `--pinned-memory`, or the system's: units beyond it go through the frames; no bit changes
#[test]
fn what_is_pinned_is_bounded_and_changes_no_bit() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = run::deep(dir.path());
    let inputs: Vec<Vec<u32>> = vec![(1..40).collect(), vec![7, 3, 5]];
    let map = |i: u32| {
        (
            format!("model.layers.{i}"),
            ["disk", "cpu", "cpu"][i as usize % 3],
        )
    };
    let mut tiers: serde_json::Map<String, Value> =
        (0..12).map(map).map(|(k, v)| (k, v.into())).collect();
    tiers.insert(String::new(), "cpu".into());
    let file = dir.path().join("map.json");
    std::fs::write(&file, Value::from(tiers).to_string()).unwrap();
    let trace = dir.path().join("trace");
    // Its logits, and how often memory was pinned.
    let score = |more: &[&str], fail: &str| {
        let _ = std::fs::remove_file(&trace);
        let mut run = Run::new(driver, "score", &model)
            .args(["--device-map", file.to_str().unwrap()])
            .args(["--page-size", "64KiB", "--ring-size", "2"])
            .env("EMUCUDA_TRACE", trace.to_str().unwrap())
            .env("EMUCUDA_FAIL", fail);
        run.command.args(more);
        let logits = run.score(&inputs);
        let calls = std::fs::read_to_string(&trace).unwrap();
        (logits, calls.matches("cuMemHostRegister").count())
    };
    let (reference, all) = score(&[], "");
    // The ring, eight layers, and the head, whose rows the embedding's are.
    assert!(all >= 9, "{all}");
    for depth in ["0", "1", "3"] {
        // Room for the ring of 128 KiB and a few layers of less than as much.
        let (some, pinned) = score(
            &["--pinned-memory", "448KiB", "--prefetch-depth", depth],
            "",
        );
        assert!(pinned > 1 && pinned < all, "{pinned} of {all}");
        assert!(some == reference, "depth {depth}");
        let (ring, pinned) = score(&["--pinned-memory", "1KiB", "--prefetch-depth", depth], "");
        assert!(pinned == 1 && ring == reference, "depth {depth}: {pinned}");
        // Refused by the system from the fourth time on: others are tried, but not for ever.
        let (partly, tried) = score(&["--prefetch-depth", depth], "cuMemHostRegister:4+:2");
        assert!(
            (5..all).contains(&tried) && partly == reference,
            "depth {depth}: {tried} of {all}"
        );
        // Refused once: whatever comes after is pinned.
        let (once, tried) = score(&["--prefetch-depth", depth], "cuMemHostRegister:4:2");
        assert!(
            tried == all && once == reference,
            "depth {depth}: {tried} of {all}"
        );
        // Refused for good: nothing more is tried.
        let (never, tried) = score(&["--prefetch-depth", depth], "cuMemHostRegister:4+:801");
        assert!(tried == 4 && never == reference, "depth {depth}: {tried}");
    }
}

/// The tower and the decoder behind it, the pictures of a prompt together and alone.
#[test]
fn pictures_are_nearer_to_float32_than_transformers_own_16_bit_run() {
    let Some(driver) = driver() else { return };
    let folder = fixtures().join("gpu-vl-bf16");
    let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    // The fixture names its pictures relative to itself.
    let text = text.replace(
        "\"url\": \"image",
        &format!("\"url\": \"{}/image", folder.display()),
    );
    let golden: Value = serde_json::from_str(&text).unwrap();
    let tensors = read_safetensors(&folder.join("golden.safetensors"));
    let cases = golden["cases"].as_array().unwrap();
    let lines = || cases.iter().map(|c| json!({ "messages": c["messages"] }));
    let score = |lines: Vec<Value>| Run::new(driver, "score", "gpu-vl-bf16").score_lines(lines);
    let together = score(lines().collect());
    for ((case, got), line) in cases.iter().zip(&together).zip(lines()) {
        let name = case["case"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
        let at: Vec<usize> = serde_json::from_value(case["positions"].clone()).unwrap();
        let vocab = got.len() / ids.len();
        let rows: Vec<f32> = at
            .iter()
            .flat_map(|p| &got[p * vocab..][..vocab])
            .copied()
            .collect();
        let error = nmse(&rows, &tensors[&format!("{name}.logits")].f32s());
        let half = case["half_error"]["nmse"].as_f64().unwrap();
        println!("{name}: nmse {error:.2e}, half {half:.2e}");
        assert!(error < half, "{name}: {error} against {half}");
        assert!(score(vec![line])[0] == *got, "{name} alone");
    }
}

#[test]
fn a_batch_changes_no_bit() {
    let Some(driver) = driver() else { return };
    for model in ["gpu-mistral-bf16", "gpu-qwen3-f16-tied"] {
        let inputs = inputs(&golden(&fixtures().join(model)));
        let together = Run::new(driver, "score", model).score(&inputs);
        for (i, input) in inputs.iter().enumerate() {
            let alone = Run::new(driver, "score", model).score(std::slice::from_ref(input));
            assert!(alone[0] == together[i], "{model}, input {i}");
        }
    }
}

/// Decode steps, through slots filled from disk: the reference's tokens while its own 16-bit run could tell them apart, and at every step
/// exactly those that the logits of the whole text at once say.
#[test]
fn greedy_tokens_are_the_references() {
    let Some(driver) = driver() else { return };
    for model in MODELS {
        for g in golden(&fixtures().join(model)).iter().take(3) {
            let run = Run::new(driver, "run", model)
                .args(["--raw", "--greedy", "--ignore-eos", "--max-tokens", "12"])
                .args(["--device-map", "disk", "--prompt", &g.text]);
            let out = run.json();
            let ids: Vec<u32> = serde_json::from_value(out["token_ids"].clone()).unwrap();
            let mut steps = g.margins.iter().zip(&g.greedy);
            let clear = steps.position(|(margin, id)| {
                *margin < g.half_max.unwrap() || *id as usize >= TOKENIZER_IDS
            });
            let clear = clear.unwrap_or(12).min(12);
            assert_eq!(ids[..clear], g.greedy[..clear], "{model}: {}", g.text);
            let whole = [&g.ids[..], &ids].concat();
            let logits = Run::new(driver, "score", model).score(&[whole]).remove(0);
            let vocab = logits.len() / (g.ids.len() + 12);
            for (i, id) in ids.iter().enumerate() {
                let row = &logits[(g.ids.len() - 1 + i) * vocab..][..vocab.min(TOKENIZER_IDS)];
                let best = (0..row.len())
                    .rev()
                    .max_by(|a, b| row[*a].total_cmp(&row[*b]));
                assert_eq!(best, Some(*id as usize), "{model}: {}, step {i}", g.text);
            }
            assert_eq!(out["device"], "cuda:0");
            let paging = &out["paging"];
            assert!(paging["h2d_bytes"].as_u64().unwrap() > 0, "{paging}");
            assert!(paging["h2d_gb_per_s"].as_f64().unwrap() > 0.0, "{paging}");
        }
    }
}

/// Top-k is drawn from candidates selected on the device; a repetition penalty that changes next to nothing makes the sampler want all logits.
#[test]
fn candidates_and_whole_rows_give_the_same_draws() {
    let Some(driver) = driver() else { return };
    let run = |extra: Vec<&str>| {
        let mut run = Run::new(driver, "run", "gpu-mistral-bf16")
            .args([
                "--raw",
                "--ignore-eos",
                "--max-tokens",
                "16",
                "--prompt",
                "Layer 7",
                "--seed",
                "5",
            ])
            .args(["--temperature", "1.3", "--top-p", "0.9"]);
        run.command.args(extra);
        run.json()["token_ids"].clone()
    };
    for k in ["2", "20", "64"] {
        let all = run([&["--top-k", k][..], &["--repetition-penalty", "1.0000001"]].concat());
        assert_eq!(run(["--top-k", k].to_vec()), all, "top-k {k}");
    }
    assert_ne!(
        run(["--top-k", "64"].to_vec()),
        run(["--top-k", "2"].to_vec())
    );
}

// hazard: budget: `--gpu-memory`: refused with the smallest that would do
#[test]
fn a_budget_is_kept_or_refused_with_the_smallest_that_would_do() {
    let Some(driver) = driver() else { return };
    let run = |memory: &str| {
        Run::new(driver, "run", "gpu-qwen2-bf16")
            .args([
                "--raw",
                "--greedy",
                "--max-tokens",
                "2",
                "--prompt",
                "T",
                "--gpu-memory",
                memory,
            ])
            .env("EMUCUDA_CONTEXT", "100000000")
    };
    let refused = run("32MiB").fails();
    assert!(refused.contains("GPU memory"), "{refused}");
    let smallest = refused
        .split_whitespace()
        .skip_while(|w| *w != "--gpu-memory")
        .nth(1)
        .unwrap();
    run(smallest).json();
    let mib: u64 = smallest.trim_end_matches("MiB").parse().unwrap();
    run(&format!("{}MiB", mib - 3)).fails();
}

/// On a card that others use too: what they hold is no memory of ours, whatever the card has in all.
#[test]
fn a_budget_beyond_what_others_leave_is_refused_before_packing() {
    let Some(driver) = driver() else { return };
    let (total, others) = (4u64 << 30, 3u64 << 30);
    let run = |memory: &str| {
        let run = Run::new(driver, "run", "gpu-qwen2-bf16").args(["--raw", "--prompt", "T"]);
        run.args(["--max-tokens", "2", "--gpu-memory", memory])
            .env("EMUCUDA_MEMORY", &total.to_string())
            .env("EMUCUDA_OTHERS", &others.to_string())
            .env("EMUCUDA_CONTEXT", "100000000")
    };
    let (folder, done) = run("3GiB").output_and_folder();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    // A gigabyte less the context's hundred million is free; of what is taken, a gigabyte at most is believed to be the context's.
    assert!(said.contains("973.7 MB are free"), "{said}");
    assert!(!folder.path().join("offload").exists(), "packed: {said}");
    let words: Vec<&str> = said.split_whitespace().collect();
    let at = words.iter().position(|w| *w == "--gpu-memory").unwrap();
    run(words[at + 1]).json();
    let mib: u64 = words[at + 1].trim_end_matches("MiB").parse().unwrap();
    assert!(mib << 20 <= total - others + (1 << 30), "{said}");
    run(&format!("{}MiB", mib + 1)).fails();
}

/// Before a weight is written: a large model packs for an hour.
#[test]
fn what_a_gpu_cannot_run_is_refused_before_packing() {
    let Some(driver) = driver() else { return };
    let refused = |command: &str, args: &[&str], words: &[&str]| {
        let mut run = Run::new(driver, command, "gpu-qwen2-bf16");
        run.command.args(args);
        let run = run.env("EMUCUDA_CONTEXT", "100000000");
        let (folder, done) = run.output_and_folder();
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{args:?}: {said}");
        assert!(words.iter().all(|w| said.contains(w)), "{words:?}: {said}");
        assert!(!folder.path().join("offload").exists(), "{args:?}: packed");
    };
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let mixed = file(
        "types.json",
        json!({"model.embed_tokens": "float32"}).to_string(),
    );
    let ids = file("in.jsonl", json!({"input_ids": [1, 2, 3]}).to_string());
    let job = file(
        "job.jsonl",
        json!({"custom_id": "a", "body": {"prompt": "T"}}).to_string(),
    );
    let answers = dir.path().join("out.jsonl");
    let answers = answers.to_str().unwrap();
    let commands: [(&str, &[&str]); 4] = [
        ("run", &["--raw", "--prompt", "T"]),
        ("score", &["--input", &ids]),
        ("batch", &["-i", &job, "-o", answers]),
        ("bench", &["-n", "1"]),
    ];
    for (command, args) in commands {
        for (more, words) in [
            (["--dtype", "float32"], ["float32", "--dtype bfloat16"]),
            (["--dtype", &mixed], ["float32", "--dtype bfloat16"]),
            (["--gpu-memory", "99MiB"], ["GPU memory", "--gpu-memory "]),
        ] {
            refused(command, &[args, &more].concat(), &words);
        }
    }
    // What `auto` cannot run there runs on the CPU.
    let auto = Run::on("auto", driver, "run", "gpu-qwen2-bf16").args(["--raw", "--prompt", "T"]);
    let auto = auto.args(["--max-tokens", "1", "--dtype", &mixed]);
    assert_eq!(auto.json()["device"], "cpu");
}

// hazard: gpu-absent: no driver, no device, or a GPU too old: one error; names what is missing
// hazard: gpu-driver-old: one error; names the driver's CUDA and the one needed
// hazard: gpu-full: one error; names the driver's code and what was being allocated
#[test]
fn what_is_missing_is_said_in_plain_words() {
    let Some(driver) = driver() else { return };
    let run = || Run::new(driver, "run", "gpu-mistral-bf16").args(["--raw", "--prompt", "T"]);
    let none = tempfile::tempdir().unwrap();
    let said = |run: Run, words: &str| {
        let text = run.fails();
        assert!(text.contains(words), "{text}");
        assert!(
            text.contains("error:") && text.contains("cause:") && text.contains("fix:"),
            "{text}"
        );
    };
    // Where the machine has a driver of its own it would be found.
    if ![
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/lib/wsl/lib",
    ]
    .iter()
    .any(|d| Path::new(d).join("libcuda.so.1").exists())
    {
        said(
            run().env("LD_LIBRARY_PATH", none.path().to_str().unwrap()),
            "no NVIDIA driver was found",
        );
    }
    said(run().env("EMUCUDA_DEVICES", "0"), "GPU");
    said(run().env("EMUCUDA_VERSION", "12010"), "driver is too old");
    said(
        run().env("EMUCUDA_CAPABILITY", "75"),
        "too old for these kernels",
    );
    for (code, name) in [
        (209, "NO_BINARY_FOR_GPU"),
        (218, "INVALID_PTX"),
        (221, "libnvidia-ptxjitcompiler.so.1"),
        (222, "UNSUPPORTED_PTX_VERSION"),
        (223, "unset CUDA_DISABLE_PTX_JIT"),
    ] {
        said(
            run().env("EMUCUDA_FAIL", &format!("cuModuleLoadData:*:{code}")),
            name,
        );
    }
    for words in [
        "CUDA_ERROR_SYSTEM_NOT_READY (802)",
        "systemctl start nvidia-fabricmanager",
    ] {
        said(run().env("EMUCUDA_FAIL", "cuInit:*:802"), words);
    }
    said(
        run().env("EMUCUDA_FAIL", "cuMemAlloc:2:2"),
        "CUDA_ERROR_OUT_OF_MEMORY (2)",
    );
    said(
        run().env("EMUCUDA_FAIL", "cuLaunchKernel:7:719"),
        "CUDA_ERROR_LAUNCH_FAILED (719)",
    );
    said(
        run().env("EMUCUDA_FAIL", "kernel:20:700"),
        "CUDA_ERROR_ILLEGAL_ADDRESS (700)",
    );
    said(
        run().env("EMUCUDA_FAIL", "copy:9:700"),
        "CUDA_ERROR_ILLEGAL_ADDRESS (700)",
    );
    let f32 = Run::new(driver, "run", "llama-f32").args(["--raw", "--prompt", "T"]);
    said(f32, "--dtype bfloat16");
    let small = Run::new(driver, "run", "qwen2-bf16").args(["--raw", "--prompt", "T"]);
    said(small, "head size 16");
    let auto = |devices: &str| {
        let run = Run::on("auto", driver, "run", "gpu-mistral-bf16");
        let run = run.args(["--raw", "--prompt", "T", "--max-tokens", "1"]);
        run.env("EMUCUDA_DEVICES", devices).json()["device"].clone()
    };
    assert_eq!((auto("1"), auto("0")), ("cuda:0".into(), "cpu".into()));
}

/// A GPU that is there and cannot be used: how, and the words that say so.
const UNUSABLE: [(&str, &str, &str); 3] = [
    ("EMUCUDA_CAPABILITY", "75", "compute capability 7.5"),
    ("EMUCUDA_VERSION", "12010", "the driver knows CUDA 12.1"),
    (
        "EMUCUDA_FAIL",
        "cuInit:*:803",
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)",
    ),
];

/// `--device auto` on a driver that is told `name=value`.
fn auto(driver: &Path, args: &[&str], (name, value): (&str, &str)) -> Run {
    let mut run = Run::on("auto", driver, "run", "gpu-mistral-bf16");
    run.command
        .args(["--raw", "--prompt", "T", "--max-tokens", "1", "--json"])
        .args(args);
    run.env(name, value)
}

/// A GPU that is there and cannot be used is no reason to fail where nobody asked for it: the CPU computes, and one line says why.
#[test]
fn auto_runs_on_the_cpu_where_the_gpu_is_too_old() {
    let Some(driver) = driver() else { return };
    let lines = |args: &[&str], told: (&str, &str)| {
        let done = auto(driver, args, told).output();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{said}");
        let out = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(
            out.replace(": ", ":").contains("\"device\":\"cpu\""),
            "{out}"
        );
        said.lines()
            .filter(|l| l.starts_with("on the CPU: "))
            .map(String::from)
            .collect::<Vec<_>>()
    };
    for (name, value, why) in UNUSABLE {
        let said = lines(&[], (name, value));
        assert!(said.len() == 1 && said[0].contains(why), "{name}: {said:?}");
    }
    // Nothing is there: said to those who spoke of a GPU.
    let none = ("EMUCUDA_DEVICES", "0");
    assert!(lines(&[], none).is_empty());
    for flag in [
        ["--gpu-memory", "512MiB"],
        ["--max-memory", "0=512MiB"],
        ["--pinned-memory", "1MiB"],
        ["--ring-size", "4"],
    ] {
        let said = lines(&flag, none);
        assert!(said.len() == 1, "{flag:?}: {said:?}");
    }
}

/// Whoever gives a budget for its memory means the GPU: told or not, hours on the CPU are not the answer, nor is packing first.
#[test]
fn auto_with_a_budget_for_the_gpu_is_an_error_where_it_cannot_be_used() {
    let Some(driver) = driver() else { return };
    for (name, value, why) in UNUSABLE {
        for budget in [["--gpu-memory", "512MiB"], ["--max-memory", "0=512MiB"]] {
            let run = auto(driver, &budget, (name, value)).args(["--quiet"]);
            let (folder, done) = run.output_and_folder();
            let said = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(1), "{budget:?}: {said}");
            for words in ["error:", "cause:", "fix:", "--device cpu", why] {
                assert!(said.contains(words), "{budget:?}, {words}: {said}");
            }
            assert!(!folder.path().join("offload").exists(), "packed: {said}");
        }
    }
}

/// What makes the tests above able to fail: without the waits between the streams the driver notices.
#[test]
fn without_its_waits_the_run_does_not_pass() {
    let Some(driver) = driver() else { return };
    for ignored in ["cuStreamWaitEvent", "cuEventSynchronize,cuEventQuery"] {
        let run = Run::new(driver, "run", "gpu-qwen2-bf16")
            .args([
                "--raw",
                "--greedy",
                "--max-tokens",
                "8",
                "--prompt",
                "Layer 7",
            ])
            .args(["--device-map", "disk", "--page-size", "64KiB"])
            .env("EMUCUDA_ORDER", "lazy")
            .env("EMUCUDA_IGNORE", ignored);
        let done = run.output();
        assert!(!done.status.success(), "{ignored} was not missed");
    }
}
