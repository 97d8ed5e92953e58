//! What the scheduler costs a pass, everything but the model: target below 1 ms for 256 sequences. And what a row costs the
//! sampler at a large vocabulary; rows are shared out over threads.

use criterion::{Criterion, criterion_group, criterion_main};
use tensorpager::engine::Job;
use tensorpager::engine::schedule::{Chosen, Limits, Scheduler};
use tensorpager::text::{Draw, History, Sampler, SamplingParams};

fn scheduler(sequences: usize) -> Scheduler {
    let mut s = Scheduler::new(Limits {
        context: 4096,
        sequences,
        rows: 2048,
        wanted: sequences,
        kv_blocks: sequences * 64,
    });
    submit(&mut s, sequences);
    s
}

/// Rows with a common beginning of 64 tokens and 64 of their own.
fn submit(s: &mut Scheduler, n: usize) {
    for i in 0..n as u32 {
        let own = (0..64).map(|k| i.wrapping_mul(31).wrapping_add(k) % 5000);
        let job = Job {
            prompt: (0..64).chain(own).collect(),
            max_tokens: 512,
            ..Job::default()
        };
        s.submit(job).expect("the job fits");
    }
}

fn pass(s: &mut Scheduler, events: &mut Vec<tensorpager::engine::Event>) {
    events.clear();
    s.schedule(2048, events).expect("there is room");
    let choosing = s.choosing().len();
    assert!(choosing > 0 || s.pass().rows() > 0);
    let mut choose = |row: usize| {
        Ok(Chosen {
            token: row as u32,
            logprobs: None,
        })
    };
    s.advance(&mut choose, events);
}

fn passes(c: &mut Criterion) {
    for sequences in [64, 256] {
        let mut s = scheduler(sequences);
        let mut events = Vec::new();
        c.bench_function(&format!("pass/{sequences} sequences"), |b| {
            b.iter(|| {
                if s.pending() < sequences {
                    let missing = sequences - s.pending();
                    submit(&mut s, missing);
                }
                pass(&mut s, &mut events);
            });
        });
    }
}

/// Qwen2's vocabulary, logits spread as a model's are: a few stand out.
fn sampling(c: &mut Criterion) {
    const VOCAB: usize = 151_936;
    let draw = |position: u64| Draw {
        seed: 1,
        choice: 0,
        position,
    };
    let logits: Vec<f32> = (0..VOCAB as u64)
        .map(|i| {
            let sum: f64 = (0..4).map(|k| draw(4 * i + k).uniform()).sum();
            (4.0 * (sum - 2.0)) as f32 + if i % 9973 == 0 { 12.0 } else { 0.0 }
        })
        .collect();
    let params = |temperature, top_k, top_p, repetition_penalty| SamplingParams {
        temperature,
        top_k,
        top_p,
        repetition_penalty,
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(VOCAB);
    for (name, params) in [
        ("greedy", params(0.0, 0, 1.0, 1.0)),
        ("as Qwen2.5 asks for", params(0.7, 20, 0.8, 1.05)),
        ("top_k 1000", params(0.7, 1000, 1.0, 1.0)),
        ("top_p 0.95", params(0.7, 0, 0.95, 1.0)),
        ("temperature alone", params(1.0, 0, 1.0, 1.0)),
    ] {
        let prompt: Vec<u32> = (0..256).collect();
        let history = History {
            prompt: &prompt,
            generated: &prompt[..64],
        };
        let mut position = 0;
        c.bench_function(&format!("sample/{name}"), |b| {
            b.iter(|| {
                position += 1;
                sampler.sample(&logits, &params, history, draw(position))
            });
        });
    }
}

criterion_group!(benches, passes, sampling);
criterion_main!(benches);
