//! The model of passes against the scheduler itself, with the same pacer.

use super::*;
use crate::engine::Job;
use crate::engine::schedule::{Chosen, Scheduler};
use crate::text::SamplingParams;

fn limits(sequences: usize, rows: usize, kv_blocks: usize) -> Limits {
    Limits {
        context: 4096,
        sequences,
        rows,
        wanted: sequences,
        kv_blocks,
    }
}

/// A disk of a second a pass, 2 ms of computing a row, and keys and values at a rate of their own.
fn price(load: PassLoad) -> PassCost {
    let compute_s = 0.05 + 0.002 * load.rows as f64 + 1e-6 * load.kv_tokens as f64;
    PassCost {
        pass_s: compute_s.max(1.0),
        disk_s: 1.0,
        compute_s,
        disk_bytes: 1000,
        ..PassCost::default()
    }
}

/// Lengths without a pattern that the scheduler could fall into step with.
fn mixed(n: usize, prompt: (usize, usize), answer: (usize, usize)) -> Vec<Shape> {
    let within = |(least, most): (usize, usize), seed: usize| {
        least + (seed.wrapping_mul(2_654_435_761) >> 7) % (most - least + 1)
    };
    (0..n)
        .map(|i| Shape {
            prompt: within(prompt, 2 * i),
            shared_blocks: 0,
            answer: within(answer, 2 * i + 1),
        })
        .collect()
}

/// The same jobs through the scheduler; sequence after sequence begins with the same `common` tokens.
fn scheduled(shapes: &[Shape], limits: &Limits, common: usize, streams: bool) -> JobPasses {
    let mut s = Scheduler::new(*limits);
    let (mut pacer, mut sums) = (Pacer::default(), JobPasses::default());
    for (i, shape) in shapes.iter().enumerate() {
        let own = (common..shape.prompt).map(|at| (i * 4096 + at) as u32 + 4096);
        let job = Job {
            prompt: (0..common as u32).chain(own).collect(),
            max_tokens: shape.answer,
            sampling: SamplingParams::greedy(),
            prefix_salt: (common > 0).then_some(0),
            ..Job::default()
        };
        s.submit(job).unwrap();
    }
    let mut events = Vec::new();
    while s.pending() > 0 {
        events.clear();
        let budget = match streams {
            true => pacer.budget(limits.rows),
            false => limits.rows,
        };
        s.schedule(budget, &mut events).unwrap();
        let segments = s.pass().segments.iter();
        let kv = segments.map(|g| u64::from(g.start) + u64::from(g.len));
        let load = PassLoad {
            rows: s.pass().rows(),
            wanted: s.pass().wanted(),
            kv_tokens: kv.sum(),
        };
        if load.rows == 0 {
            continue;
        }
        sums.at_once = sums.at_once.max(s.running());
        let cost = price(load);
        pacer.record(load.rows, cost.compute_s, cost.disk_s);
        sums.passes += 1;
        sums.rows += load.rows as u64;
        sums.pass_s += cost.pass_s;
        sums.disk_s += cost.disk_s;
        sums.compute_s += cost.compute_s;
        sums.disk_bytes += cost.disk_bytes;
        let mut choose = |_: usize| {
            Ok(Chosen {
                token: 7,
                logprobs: None,
            })
        };
        s.advance(&mut choose, &mut events);
    }
    sums.preemptions = s.stats().preemptions;
    sums
}

fn of(all: &[Shape]) -> Shapes {
    let mut shapes = Shapes::default();
    all.iter().for_each(|s| shapes.push(*s));
    shapes
}

/// Within `share` of what the scheduler makes.
fn agree(what: &str, all: &[Shape], limits: &Limits, common: usize, share: f64) -> JobPasses {
    let ours = foresee(&of(all), limits, true, &mut price);
    let real = scheduled(all, limits, common, true);
    let near = |a: f64, b: f64| (a - b).abs() <= share * b;
    assert!(
        near(ours.passes as f64, real.passes as f64)
            && near(ours.rows as f64, real.rows as f64)
            && near(ours.pass_s, real.pass_s)
            && near(ours.compute_s, real.compute_s)
            && near(ours.disk_s, real.disk_s)
            && near(ours.disk_bytes as f64, real.disk_bytes as f64),
        "{what}: {ours:?}, the scheduler {real:?}"
    );
    assert_eq!(ours.at_once, real.at_once, "{what}");
    ours
}

#[test]
fn passes_are_the_schedulers() {
    let uniform = vec![
        Shape {
            prompt: 32,
            shared_blocks: 0,
            answer: 64,
        };
        2000
    ];
    let plenty = 100_000;
    agree("alike", &uniform, &limits(256, 2048, plenty), 0, 0.005);
    let few = agree("few at once", &uniform, &limits(4, 2048, plenty), 0, 0.005);
    assert_eq!((few.at_once, few.passes), (4, 2000 / 4 * 64));
    let lengths = mixed(1500, (1, 100), (1, 120));
    agree("lengths", &lengths, &limits(64, 2048, plenty), 0, 0.01);
    let prompts = mixed(150, (200, 1500), (1, 4));
    let long = agree("prompts", &prompts, &limits(64, 2048, plenty), 0, 0.02);
    // The pacer holds passes far below what they could carry.
    assert!(long.rows / long.passes < 1200, "{long:?}");
    let tail = [mixed(300, (5, 20), (2, 9)), mixed(2, (5, 20), (900, 1000))].concat();
    agree("a tail", &tail, &limits(64, 2048, plenty), 0, 0.01);
    agree(
        "one",
        &mixed(1, (50, 50), (9, 9)),
        &limits(8, 16, 50),
        0,
        1e-4,
    );
    let none = foresee(&Shapes::default(), &limits(8, 16, 50), true, &mut price);
    assert_eq!(none, JobPasses::default());
}

#[test]
fn where_kv_runs_out_sequences_are_set_back_as_the_scheduler_does() {
    let all = mixed(600, (10, 60), (20, 200));
    let ours = agree("little KV", &all, &limits(64, 512, 200), 0, 0.03);
    assert!(ours.preemptions > 50, "{ours:?}");
    let roomy = foresee(&of(&all), &limits(64, 512, 4000), true, &mut price);
    assert!(roomy.passes < ours.passes && roomy.preemptions == 0);
    // One that outgrows all there is fails, and the others go on.
    let mut one = mixed(40, (10, 60), (20, 100));
    one[7].answer = 2000;
    agree("too long", &one, &limits(16, 512, 40), 0, 0.05);
}

#[test]
fn what_is_shared_is_computed_once() {
    const COMMON: usize = 80;
    let mut all = mixed(800, (COMMON + 5, COMMON + 40), (10, 50));
    for s in &mut all[1..] {
        s.shared_blocks = COMMON / BLOCK_TOKENS;
    }
    let ours = agree("shared", &all, &limits(64, 1024, 2000), COMMON, 0.02);
    let alone: usize = all.iter().map(|s| s.prompt + s.answer - 1).sum();
    assert!(ours.rows + 799 * COMMON as u64 == alone as u64);
}

#[test]
fn of_many_unlike_rows_the_means_are_enough() {
    let all = mixed(20_000, (5, 60), (1, 60));
    agree("many", &all, &limits(128, 2048, 20_000), 0, 0.03);
    // Order is kept: what is long at the end ends late.
    let rising: Vec<Shape> = mixed(12_000, (5, 60), (1, 3))
        .into_iter()
        .enumerate()
        .map(|(i, s)| Shape {
            answer: s.answer + i / 200,
            ..s
        })
        .collect();
    agree("rising", &rising, &limits(128, 2048, 20_000), 0, 0.03);
}

#[test]
fn without_a_stream_passes_are_as_full_as_they_may_be() {
    let all = mixed(400, (100, 300), (1, 30));
    let limits = limits(64, 1024, 5000);
    let ours = foresee(&of(&all), &limits, false, &mut price);
    let real = scheduled(&all, &limits, 0, false);
    assert!((ours.passes as f64 / real.passes as f64 - 1.0).abs() < 0.01);
    let paced = foresee(&of(&all), &limits, true, &mut price);
    assert!(paced.passes > ours.passes);
}
