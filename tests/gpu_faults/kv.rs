//! Keys and values in host memory beside a GPU: no bit changes, whatever the order of the streams, and budgets hold.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};
use tensorpager::engine::{DeviceChoice, Engine, EngineOptions, Event, JobId, KvPlace};
use tensorpager::paging::{Placement, Tier};
use tensorpager::store::Store;
use tensorpager::text::SamplingParams;

use crate::common::golden;
use crate::emulated::driver;
use crate::engine_common::{fixture, job, open, packed, same_bits, score, scoring};
use crate::inside;
use crate::jobs::{batch, ended, read, write};
use crate::run::deep;

/// A window of 16 keys in one, tied heads and norms of q and k in another.
const MODELS: [&str; 3] = ["gpu-qwen2-bf16", "gpu-qwen3-f16-tied", "gpu-mistral-bf16"];

fn options(place: KvPlace) -> EngineOptions {
    EngineOptions {
        device: DeviceChoice::Cuda(0),
        placement: Placement::Disk,
        page_bytes: Some(65_536),
        threads: Some(1),
        kv_place: place,
        ..scoring(512)
    }
}

#[test]
fn in_host_memory_no_bit_changes() {
    for settings in [[("EMUCUDA_ORDER", "drawn")], [("EMUCUDA_ORDER", "lazy")]] {
        inside("kv::prompts_in_pieces", &settings);
        inside("kv::sequences_that_come_and_go", &settings);
    }
}

/// What makes the tests above able to fail.
#[test]
fn without_the_waits_of_its_streams_the_driver_notices() {
    let Some(driver) = driver() else { return };
    for ignored in ["", "cuStreamWaitEvent"] {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "kv::resident_weights", "--ignored"]);
        let settings = [("EMUCUDA_IGNORE", ignored), ("EMUCUDA_ORDER", "lazy")];
        crate::emulated::on(&mut command, driver, &settings);
        let done = command.output().unwrap();
        assert_eq!(done.status.success(), ignored.is_empty(), "{ignored}");
    }
}

/// Chunks of 16 rows: what the chunks before wrote comes back from host memory. Also with shared and half-filled blocks.
#[test]
#[ignore = "started by the tests above, on a driver"]
fn prompts_in_pieces() {
    for model in MODELS {
        let dir = tempfile::tempdir().unwrap();
        let store = packed(model, dir.path());
        let mut prompts: Vec<Vec<u32>> =
            golden(&fixture(model)).into_iter().map(|g| g.ids).collect();
        // Longer than a chunk of keys, so that decode and prefill merge several.
        let long: Vec<u32> = (0..400).map(|i| 1 + (i * 7) % 250).collect();
        prompts.push(long);
        let with = |place, rows| EngineOptions {
            pass_tokens: rows,
            logits_rows: rows,
            ..options(place)
        };
        let there = score(
            &mut open(&store, &with(KvPlace::Gpu, 64)).unwrap(),
            &prompts,
        )
        .unwrap();
        for rows in [16, 64] {
            let mut engine = open(&store, &with(KvPlace::Host, rows)).unwrap();
            assert!(engine.kv_in_host());
            let here = score(&mut engine, &prompts).unwrap();
            assert!(same_bits(&here, &there), "{model}, {rows} rows");
        }
    }
}

/// With no weights to wait for, only KV's own streams order it.
#[test]
#[ignore = "started by the tests above, on a driver"]
fn resident_weights() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODELS[0], dir.path());
    let prompts: Vec<Vec<u32>> = golden(&fixture(MODELS[0]))
        .into_iter()
        .map(|g| g.ids)
        .collect();
    let with = |place| EngineOptions {
        placement: Placement::Units(vec![Tier::Gpu; store.units.len()]),
        ..options(place)
    };
    let there = score(&mut open(&store, &with(KvPlace::Gpu)).unwrap(), &prompts).unwrap();
    let here = score(&mut open(&store, &with(KvPlace::Host)).unwrap(), &prompts).unwrap();
    assert!(same_bits(&here, &there));
}

/// Sampled answers of several sequences, some from one prompt, with so little KV that some are set back.
fn answers(store: &Store, place: KvPlace, kv_tokens: usize) -> Vec<Vec<u32>> {
    let cancel = Arc::new(AtomicBool::new(false));
    let options = EngineOptions {
        context: 96,
        max_sequences: 4,
        kv_tokens: Some(kv_tokens),
        pass_tokens: 32,
        logits_rows: 4,
        keep_logits: true,
        ..options(place)
    };
    let mut engine = Engine::open(store, &options, cancel, &mut |_, _| {}).unwrap();
    let prompt: Vec<u32> = (0..37).map(|i| 1 + (i * 11) % 250).collect();
    let jobs: Vec<JobId> = (0..6)
        .map(|i| {
            let sampling = SamplingParams {
                seed: i / 2,
                temperature: 0.9,
                ..SamplingParams::default()
            };
            // Prompts in common up to a place within a block.
            let prompt = &prompt[..37 - (i as usize / 3) * 5];
            engine
                .submit(job(prompt, 20 + i as usize, sampling))
                .unwrap()
        })
        .collect();
    let mut out = vec![Vec::new(); jobs.len()];
    while engine.pending() > 0 {
        let mut events = Vec::new();
        engine.step(&mut events).unwrap();
        for event in &events {
            match event {
                Event::Token { job, token, .. } => {
                    out[jobs.iter().position(|j| j == job).unwrap()].push(*token);
                }
                Event::Failed { error, .. } => panic!("{error}"),
                Event::Finished { .. } => {}
            }
        }
    }
    out
}

#[test]
#[ignore = "started by the tests above, on a driver"]
fn sequences_that_come_and_go() {
    for model in MODELS {
        let dir = tempfile::tempdir().unwrap();
        let store = packed(model, dir.path());
        let there = answers(&store, KvPlace::Gpu, 400);
        assert!(there.iter().all(|a| a.len() >= 20));
        for kv_tokens in [400, 96] {
            let here = answers(&store, KvPlace::Host, kv_tokens);
            assert_eq!(here, there, "{model}, room for {kv_tokens}");
        }
    }
}

/// `--kv-memory` of more than the GPU has: in host memory, the same answers, and `--gpu-memory` holds.
#[test]
fn a_job_with_more_kv_than_the_gpu_has_room_for() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = deep(dir.path());
    let rows: Vec<Value> = (0..8)
        .map(|i| {
            json!({"custom_id": format!("row-{i}"), "url": "/v1/completions", "body": {
                "prompt": format!("the sea, number {}", i / 2), "max_tokens": 6 + i % 4, "ignore_eos": true,
                "temperature": 0.8, "seed": i, "n": 1 + i % 3}})
        })
        .collect();
    write(dir.path(), &rows);
    let job = |output: &str, kv: &str| {
        batch(driver, &model, dir.path(), output)
            .args([
                "--device-map",
                "disk",
                "--gpu-memory",
                "200MiB",
                "--kv-memory",
                kv,
            ])
            .env("EMUCUDA_CONTEXT", "50000000")
            // The card has no more than it may use.
            .env("EMUCUDA_MEMORY", "209715200")
    };
    let tier = |run: crate::run::Run| {
        let done = run.output();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{said}");
        let text = String::from_utf8(done.stdout).unwrap();
        let report: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        report["paging"]["kv_tier"].clone()
    };
    assert_eq!(tier(job("there.jsonl", "4MiB")), "gpu");
    assert_eq!(tier(job("here.jsonl", "256MiB")), "cpu");
    let answers = |name: &str| fs::read(dir.path().join(name)).unwrap();
    assert_eq!(answers("here.jsonl"), answers("there.jsonl"));
    assert_eq!(read(&dir.path().join("here.jsonl")).len(), 8);
    // Host memory has its bound too, and the refusal names it.
    let said = ended(
        job("none.jsonl", "256MiB").args(["--cpu-memory", "200MiB"]),
        1,
    );
    assert!(said.contains("--cpu-memory "), "{said}");
}

/// Keys and values that a pass moves: every block of its sequence to the GPU, the blocks it wrote to the host.
#[test]
#[ignore = "started by the tests above, on a driver"]
fn every_byte_is_counted() {
    const PROMPT: usize = 37;
    const TOKENS: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODELS[0], dir.path());
    for place in [KvPlace::Gpu, KvPlace::Host] {
        let options = EngineOptions {
            context: 96,
            pass_tokens: 64,
            logits_rows: 1,
            keep_logits: true,
            ..options(place)
        };
        let mut engine = open(&store, &options).unwrap();
        let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| 1 + i).collect();
        let sampling = SamplingParams::default();
        engine.submit(job(&prompt, TOKENS, sampling)).unwrap();
        while engine.pending() > 0 {
            engine.step(&mut Vec::new()).unwrap();
        }
        let spec = engine.spec();
        let block = (2 * spec.layers * spec.kv_heads * 16 * spec.head_size * 2) as u64;
        let seen: usize = (0..TOKENS - 1).map(|i| (PROMPT + i).div_ceil(16)).sum();
        let written = PROMPT.div_ceil(16) + TOKENS - 1;
        let expected = match place {
            KvPlace::Host => (seen as u64 * block, written as u64 * block),
            _ => (0, 0),
        };
        let paging = engine.stats().paging;
        assert_eq!((paging.kv_bytes, paging.d2h_bytes), expected, "{place:?}");
        let weights = engine.plan().streamed_bytes * paging.passes;
        assert_eq!(paging.copied_bytes, weights + paging.kv_bytes);
        // Weights are counted when their copies are known to be done, and without what pads them.
        assert!(
            paging.h2d_bytes >= paging.kv_bytes + weights / 2,
            "{paging:?}"
        );
    }
}

#[test]
fn what_is_copied_is_counted() {
    inside("kv::every_byte_is_counted", &[]);
}

/// A wait for keys and values is a wait, not computing: a sleep in their copies lowers the share of the bound.
#[test]
fn a_sleep_in_their_copies_lowers_the_share_of_the_bound() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = deep(dir.path());
    let row = json!({"custom_id": "a", "url": "/v1/completions",
        "body": {"prompt": "the sea", "max_tokens": 8, "ignore_eos": true}});
    write(dir.path(), &[row]);
    let paging = |output: &str, sleep_us: &str| {
        let trace = dir.path().join(format!("{output}.trace.json"));
        let done = batch(driver, &model, dir.path(), output)
            .args(["--device-map", "gpu", "--gpu-memory", "200MiB"])
            .args(["--kv-memory", "256MiB", "--trace", trace.to_str().unwrap()])
            .env("EMUCUDA_CONTEXT", "50000000")
            .env("EMUCUDA_MEMORY", "209715200")
            .env("EMUCUDA_COPY_US", sleep_us)
            .output();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{said}");
        let text = String::from_utf8(done.stdout).unwrap();
        let report: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let trace: Value = serde_json::from_slice(&fs::read(trace).unwrap()).unwrap();
        (report["paging"].clone(), trace)
    };
    let figure = |p: &Value, name: &str| p[name].as_f64().unwrap();
    let (quick, _) = paging("quick.jsonl", "0");
    let (slow, trace) = paging("slow.jsonl", "20000");
    assert_eq!(slow["kv_tier"], "cpu");
    assert!(figure(&slow, "kv_h2d_bytes") > 0.0 && figure(&slow, "d2h_bytes") > 0.0);
    assert!(figure(&slow, "h2d_bytes") >= figure(&slow, "kv_h2d_bytes"));
    let share = |p: &Value| figure(p, "percent_of_bound");
    assert!(share(&slow) < 0.7 * share(&quick), "{slow} {quick}");
    // Seven passes behind the prompt's, twelve layers each. Longer by far than a layer computes, which hides so much of each.
    let slept = 0.020 * 7.0 * 12.0;
    assert!(figure(&slow, "stall_copy_s") > 0.8 * slept, "{slow}");
    let events = trace["traceEvents"].as_array().unwrap();
    let copies: Vec<f64> = events
        .iter()
        .filter(|e| e["cat"] == "kv")
        .map(|e| e["dur"].as_f64().unwrap())
        .collect();
    assert_eq!(copies.len(), 7 * 12);
    assert!(copies.iter().all(|us| *us >= 19_900.0), "{copies:?}");
}

/// Rows that want more keys and values than the card has, and nobody says how much of it may be used.
#[test]
fn a_job_is_sized_for_the_memory_that_it_will_compute_in() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = deep(dir.path());
    // Answers may be long, and end at once: the bias is for the end of the text.
    let row = |i: usize| {
        json!({"custom_id": format!("row-{i}"), "url": "/v1/completions", "body": {
            "prompt": format!("row {i}"), "max_tokens": 480, "temperature": 0, "logit_bias": {"282": 100}}})
    };
    write(dir.path(), &(0..64).map(row).collect::<Vec<_>>());
    let report = |run: crate::run::Run| {
        let done = run.output();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{said}");
        let text = String::from_utf8(done.stdout).unwrap();
        serde_json::from_str::<Value>(text.lines().last().unwrap()).unwrap()
    };
    let wanted = 64 * 480;
    let small = batch(driver, &model, dir.path(), "small.jsonl")
        .env("EMUCUDA_CONTEXT", "50000000")
        .env("EMUCUDA_MEMORY", "209715200");
    let small = report(small);
    let tokens = small["kv_tokens"].as_u64().unwrap();
    assert!(tokens > 0 && tokens < wanted, "{tokens}");
    assert_eq!(read(&dir.path().join("small.jsonl")).len(), 64);
    // What is said of a GPU that is not there is nothing to the CPU.
    let mut cpu = crate::run::Run::on("auto", driver, "batch", &model)
        .args(["--gpu-memory", "32MiB", "--json", "--in-place"])
        .env("EMUCUDA_DEVICES", "0");
    cpu.command.arg("-i").arg(dir.path().join("job.jsonl"));
    cpu.command.arg("-o").arg(dir.path().join("cpu.jsonl"));
    let cpu = report(cpu);
    assert_eq!(cpu["device"], "cpu");
    assert!(cpu["kv_tokens"].as_u64().unwrap() >= wanted, "{cpu}");
}
