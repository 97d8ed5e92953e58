//! What the scheduler costs a pass, everything but the model: target below 1 ms for 256 sequences.

use criterion::{Criterion, criterion_group, criterion_main};
use tensorpager::engine::Job;
use tensorpager::engine::schedule::{Chosen, Limits, Scheduler};

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
    s.schedule(2048).expect("there is room");
    events.clear();
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

criterion_group!(benches, passes);
criterion_main!(benches);
