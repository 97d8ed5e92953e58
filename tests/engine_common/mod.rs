//! Whole engines over the repository's small fixtures: opened, scored and run the way `cli` does it.
#![allow(dead_code)] // each test file uses a part

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::engine::{Engine, EngineOptions, Event, FinishReason, Job, JobId};
use tensorpager::error::{Code, Error, Result};
use tensorpager::store::{PackOptions, Store};
use tensorpager::text::SamplingParams;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

pub fn checkpoint(dir: &Path, config_from: Option<&Path>) -> Checkpoint {
    let options = OpenOptions {
        config_from: config_from.map(Path::to_path_buf),
        ..OpenOptions::default()
    };
    Checkpoint::open(&dir.display().to_string(), &options).unwrap()
}

/// The fixture packed under `offload`.
pub fn packed(name: &str, offload: &Path) -> Store {
    let ckpt = checkpoint(&fixture(name), None);
    Store::pack(&ckpt, &PackOptions::new(offload), &mut |_| {})
        .unwrap()
        .store
}

pub fn in_place(name: &str) -> Store {
    Store::open_in_place(&checkpoint(&fixture(name), None)).unwrap()
}

/// accelerate's folder of the weights of `qwen2-bf16`, as it is.
pub fn accelerate() -> Store {
    let ckpt = checkpoint(
        &fixture("accelerate-qwen2-bf16"),
        Some(&fixture("qwen2-bf16")),
    );
    Store::open_in_place(&ckpt).unwrap()
}

pub fn open(store: &Store, options: &EngineOptions) -> Result<Engine> {
    Engine::open(
        store,
        options,
        Arc::new(AtomicBool::new(false)),
        &mut |_, _| {},
    )
}

/// Logits of all inputs, each `[tokens, vocab]`. Also proves that every one of them was written exactly once.
pub fn score(engine: &mut Engine, inputs: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    let vocab = engine.spec().vocab;
    let mut out: Vec<Vec<f32>> = inputs
        .iter()
        .map(|i| vec![f32::NAN; i.len() * vocab])
        .collect();
    engine.score(inputs, &mut |b| {
        for (row, values) in b.values.chunks_exact(b.ids).enumerate() {
            let at = (b.first_row + row) * vocab + b.first_id;
            let place = &mut out[b.input][at..at + b.ids];
            assert!(place.iter().all(|v| v.is_nan()), "a logit came twice");
            place.copy_from_slice(values);
        }
        Ok(())
    })?;
    assert!(
        out.iter().flatten().all(|v| v.is_finite()),
        "every logit is written"
    );
    Ok(out)
}

/// Options of an engine that scores.
pub fn scoring(longest: usize) -> EngineOptions {
    EngineOptions {
        context: longest,
        pass_tokens: 64,
        logits_rows: 64,
        kv_tokens: Some(longest + 64 * 17),
        keep_logits: false,
        ..EngineOptions::default()
    }
}

pub fn same_bits(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|(a, b)| {
            a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits())
        })
}

pub fn job(prompt: &[u32], max_tokens: usize, sampling: SamplingParams) -> Job {
    Job {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling,
        ..Job::default()
    }
}

/// Runs until nothing is pending; the tokens of each job.
pub fn finish(engine: &mut Engine, jobs: &[JobId]) -> Result<Vec<Vec<u32>>> {
    let mut out = vec![Vec::new(); jobs.len()];
    let mut ended = vec![None; jobs.len()];
    let mut events = Vec::new();
    let mut idle = 0;
    while engine.pending() > 0 {
        events.clear();
        let before = engine.stats().rows;
        engine.step(&mut events)?;
        idle = if engine.stats().rows == before {
            idle + 1
        } else {
            0
        };
        assert!(idle < 3, "jobs are pending and no pass carries a row");
        for event in &events {
            match event {
                Event::Token { job, token, .. } => {
                    out[jobs.iter().position(|j| j == job).unwrap()].push(*token);
                }
                Event::Finished { job, reason, .. } => {
                    let at = jobs.iter().position(|j| j == job).unwrap();
                    assert!(ended[at].replace(*reason).is_none(), "a job finished twice");
                }
                Event::Failed { error, .. } => return Err(error.clone()),
            }
        }
    }
    assert!(
        ended.iter().all(|e| *e == Some(FinishReason::Length)),
        "{ended:?}"
    );
    Ok(out)
}

/// The budget that an error's fix says to give.
pub fn named_budget(e: &Error) -> u64 {
    assert_eq!(e.code(), Code::Memory, "{e}");
    let word = e
        .fix()
        .split_whitespace()
        .skip_while(|w| *w != "--cpu-memory")
        .nth(1)
        .unwrap_or_else(|| panic!("no budget in: {e}"));
    tensorpager::units::parse_size(word.trim_end_matches(',')).unwrap()
}
