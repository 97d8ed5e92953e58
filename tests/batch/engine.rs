//! The engine as a library: what a job says is the same bits whatever runs beside it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::engine::{Engine, EngineOptions, Event, FinishReason, Job, JobId};
use tensorpager::paging::Placement;
use tensorpager::store::Store;
use tensorpager::text::SamplingParams;

use super::model;

fn engine(options: EngineOptions) -> Engine {
    let ckpt = Checkpoint::open(&model().display().to_string(), &OpenOptions::default()).unwrap();
    let store = Store::open_in_place(&ckpt).unwrap();
    let cancel = Arc::new(AtomicBool::new(false));
    Engine::open(&store, &options, cancel, &mut |_, _| {}).unwrap()
}

fn options(sequences: usize) -> EngineOptions {
    EngineOptions {
        cpu_memory: Some(1 << 30),
        placement: Placement::Disk,
        threads: Some(2),
        context: 256,
        max_sequences: sequences,
        logits_rows: sequences,
        kv_tokens: Some(sequences * 64),
        ..EngineOptions::default()
    }
}

/// Greedy, seeded, penalised and many-choice jobs, half of them behind a common beginning.
fn jobs(n: usize) -> Vec<Job> {
    let common: Vec<u32> = (0..37).map(|i| 20 + i * 5 % 200).collect();
    (0..n)
        .map(|i| {
            let own = (0..1 + i % 23).map(|k| ((i * 31 + k * 7) % 250) as u32);
            let mut prompt = if i % 2 == 0 {
                common.clone()
            } else {
                Vec::new()
            };
            prompt.extend(own);
            let mut sampling = SamplingParams::greedy();
            if i % 3 != 0 {
                sampling.temperature = 0.9;
                sampling.top_p = 0.9;
                sampling.seed = i as u64;
            }
            if i % 5 == 0 {
                sampling.repetition_penalty = 1.2;
                sampling.logit_bias = vec![(40, 1.5)];
            }
            Job {
                prompt,
                max_tokens: 3 + i % 14,
                sampling,
                choice: (i % 2) as u32,
                logprobs: (i % 4 == 0).then_some(2),
                ..Job::default()
            }
        })
        .collect()
}

type Said = BTreeMap<usize, (Vec<u32>, Vec<u32>, Option<FinishReason>)>;

/// Tokens, the bits of their log-probabilities, and the end of each job.
fn run(engine: &mut Engine, jobs: &[Job]) -> Said {
    let mut ids: BTreeMap<JobId, usize> = BTreeMap::new();
    for (i, job) in jobs.iter().enumerate() {
        ids.insert(engine.submit(job.clone()).unwrap(), i);
    }
    let mut said = Said::new();
    let mut events = Vec::new();
    let mut passes = 0;
    while engine.pending() > 0 {
        engine.step(&mut events).unwrap();
        passes += 1;
        assert!(passes < 20_000, "no progress");
    }
    for event in events {
        match event {
            Event::Token {
                job,
                token,
                logprobs,
            } => {
                let entry = said.entry(ids[&job]).or_default();
                entry.0.push(token);
                for l in logprobs.into_iter() {
                    entry.1.push(l.chosen.to_bits());
                    entry
                        .1
                        .extend(l.top.iter().flat_map(|t| [t.id, t.logprob.to_bits()]));
                }
            }
            Event::Finished { job, reason } => said.entry(ids[&job]).or_default().2 = Some(reason),
            Event::Failed { error, .. } => panic!("{error}"),
        }
    }
    said
}

/// One by one, with nothing shared.
fn alone(jobs: &[Job]) -> Said {
    let mut engine = engine(options(1));
    let mut said = Said::new();
    for (i, job) in jobs.iter().enumerate() {
        let job = Job {
            prefix_salt: None,
            ..job.clone()
        };
        said.extend(run(&mut engine, &[job]).into_values().map(|s| (i, s)));
    }
    said
}

#[test]
fn a_row_says_the_same_alone_and_among_256() {
    let jobs = jobs(256);
    let alone = alone(&jobs);
    let mut wide = engine(options(256));
    assert_eq!(run(&mut wide, &jobs), alone);
    let stats = wide.schedule_stats();
    assert!(
        stats.shared_tokens >= 32 * 120,
        "128 rows begin alike: {stats:?}"
    );
    assert_eq!(stats.preemptions, 0);
    // Again on the same engine: what the first time left in the cache is found, and changes nothing.
    assert_eq!(run(&mut wide, &jobs), alone);
}

// hazard: no-kv: a row is set back and says the same later
#[test]
fn running_out_of_kv_sets_rows_back_and_changes_nothing() {
    let jobs = jobs(48);
    let alone = alone(&jobs);
    let mut set_back = 0;
    for kv_tokens in [16, 64, 640] {
        let mut tight = engine(EngineOptions {
            kv_tokens: Some(kv_tokens),
            context: 128,
            ..options(24)
        });
        assert_eq!(
            run(&mut tight, &jobs),
            alone,
            "with KV for {kv_tokens} tokens"
        );
        set_back += tight.schedule_stats().preemptions;
        println!("KV for {kv_tokens} tokens: {:?}", tight.schedule_stats());
    }
    assert!(
        set_back > 0,
        "the test must be tight enough to set rows back"
    );
}

#[test]
fn small_passes_say_the_same() {
    let jobs = jobs(20);
    let alone = alone(&jobs);
    for pass_tokens in [16, 33] {
        let mut small = engine(EngineOptions {
            pass_tokens,
            ..options(8)
        });
        assert_eq!(
            run(&mut small, &jobs),
            alone,
            "passes of {pass_tokens} rows"
        );
    }
}

#[test]
fn a_cancelled_job_is_gone_and_the_others_go_on() {
    let jobs = jobs(6);
    let alone = alone(&jobs);
    let mut e = engine(options(6));
    let ids: Vec<JobId> = jobs.iter().map(|j| e.submit(j.clone()).unwrap()).collect();
    let mut events = Vec::new();
    e.step(&mut events).unwrap();
    e.cancel(ids[2]);
    e.cancel(ids[2]);
    events.retain(|e| !matches!(e, Event::Finished { .. }));
    while e.pending() > 0 {
        e.step(&mut events).unwrap();
    }
    let of = |id: JobId| -> Vec<u32> {
        let token = |e: &Event| match e {
            Event::Token { job, token, .. } if *job == id => Some(*token),
            _ => None,
        };
        events.iter().filter_map(token).collect()
    };
    assert_eq!(of(ids[2]).len(), 1);
    for i in [0, 1, 3, 4, 5] {
        assert_eq!(of(ids[i]), alone[&i].0, "job {i}");
    }
}
