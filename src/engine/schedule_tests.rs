//! The scheduler without a model: tokens come out of thin air.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::text::SamplingParams;

fn limits(kv_blocks: usize) -> Limits {
    Limits {
        context: 64,
        sequences: 8,
        rows: 48,
        wanted: 8,
        kv_blocks,
    }
}

/// A token that depends on the sequence so far: recomputing must not change it.
fn token(c: &Choosing<'_>) -> u32 {
    let sum: u32 = c.job.prompt.iter().chain(c.generated).sum();
    sum.wrapping_mul(2_654_435_761) % 100
}

/// Runs everything; KV is simulated: each block remembers the tokens written into it, and a pass must find its past there.
fn simulate(limits: Limits, jobs: &[Job], budget: usize) -> Vec<Vec<u32>> {
    let mut s = Scheduler::new(limits);
    let ids: HashMap<JobId, usize> = jobs
        .iter()
        .enumerate()
        .map(|(i, j)| (s.submit(j.clone()).unwrap(), i))
        .collect();
    let mut memory = vec![[u32::MAX; BLOCK_TOKENS]; limits.kv_blocks];
    let mut said = vec![Vec::new(); jobs.len()];
    let mut events = Vec::new();
    let mut passes = 0;
    while s.pending() > 0 {
        events.clear();
        s.schedule(budget, &mut events).unwrap();
        assert!(events.is_empty(), "every job fits alone");
        passes += 1;
        assert!(s.pass().rows() > 0 && passes < 10_000, "no progress");
        assert!(s.pass().rows() <= limits.rows && s.pass().wanted() <= limits.wanted);
        assert!(
            s.copies().is_empty(),
            "full blocks are shared, never written"
        );
        let mut row = 0;
        for segment in &s.pass().segments {
            for i in 0..segment.len as usize {
                let at = segment.start as usize + i;
                let block = segment.table[at / BLOCK_TOKENS] as usize;
                memory[block][at % BLOCK_TOKENS] = s.pass().tokens[row];
                row += 1;
            }
        }
        // Everything is written before anything is read.
        let chosen: Vec<u32> = s.choosing().iter().map(token).collect();
        let choosing: Vec<Vec<u32>> = s
            .choosing()
            .iter()
            .map(|c| c.job.prompt.iter().chain(c.generated).copied().collect())
            .collect();
        let choosers = s.pass().segments.iter().filter(|g| g.logits == 1);
        for (segment, tokens) in choosers.zip(&choosing) {
            for (at, token) in tokens.iter().enumerate() {
                let block = segment.table[at / BLOCK_TOKENS] as usize;
                assert_eq!(
                    memory[block][at % BLOCK_TOKENS],
                    *token,
                    "token {at} of the past"
                );
            }
        }
        let mut next = chosen.into_iter();
        let mut choose = |_: usize| {
            Ok(Chosen {
                token: next.next().unwrap(),
                logprobs: None,
            })
        };
        s.advance(&mut choose, &mut events);
        for e in &events {
            if let Event::Token { job, token, .. } = e {
                said[ids[job]].push(*token);
            }
        }
    }
    assert_eq!(
        s.pool.free_blocks(),
        limits.kv_blocks,
        "every block came back"
    );
    said
}

fn job(prompt: Vec<u32>, max_tokens: usize) -> Job {
    Job {
        prompt,
        max_tokens,
        sampling: SamplingParams::greedy(),
        ..Job::default()
    }
}

proptest! {
    #[test]
    fn every_job_ends_and_says_what_it_says_alone(
        shape in prop::collection::vec((0usize..40, 1usize..20, 1usize..30, any::<bool>()), 1..25),
        kv_blocks in 5usize..40,
        budget in 1usize..60,
    ) {
        let jobs: Vec<Job> = shape.iter().map(|&(common, own, max, share)| {
            let mut prompt: Vec<u32> = (0..common as u32).collect();
            prompt.extend((0..own as u32).map(|i| i * own as u32 % 7));
            Job { prefix_salt: share.then_some(0), ..job(prompt, max) }
        }).collect();
        let together = simulate(limits(kv_blocks), &jobs, budget);
        for (j, said) in jobs.iter().zip(&together) {
            let alone = simulate(limits(5), std::slice::from_ref(j), 48);
            prop_assert_eq!(&alone[0], said);
        }
    }
}

#[test]
fn a_common_beginning_is_computed_once_even_in_one_pass() {
    let mut s = Scheduler::new(Limits {
        rows: 512,
        ..limits(64)
    });
    for i in 0..4 {
        let mut prompt: Vec<u32> = (0..40).collect();
        prompt.push(50 + i);
        s.submit(job(prompt, 2)).unwrap();
    }
    s.schedule(512, &mut Vec::new()).unwrap();
    assert_eq!(s.pass().rows(), 41 + 3 * (41 - 32));
    assert_eq!(s.stats().shared_tokens, 3 * 32);
}

#[test]
fn what_could_never_run_is_refused() {
    let mut s = Scheduler::new(limits(8));
    assert_eq!(s.submit(job(vec![], 1)).unwrap_err().code(), Code::Usage);
    assert_eq!(
        s.submit(job(vec![1; 64], 1)).unwrap_err().code(),
        Code::Usage
    );
    assert!(s.submit(job(vec![1; 63], 1)).is_ok());
    let mut s = Scheduler::new(limits(3));
    assert_eq!(
        s.submit(job(vec![1; 49], 1)).unwrap_err().code(),
        Code::Memory,
        "three blocks hold 48 tokens"
    );
    assert!(s.submit(job(vec![1; 48], 1)).is_ok());
}

/// Runs everything with answers of `answer(job)` tokens; (passes, rows computed, sequences set back).
fn cost(
    limits: Limits,
    jobs: &[Job],
    budget: usize,
    answer: impl Fn(usize) -> usize,
) -> (u64, u64, u64) {
    let mut s = Scheduler::new(limits);
    let (mut passes, mut rows, mut next) = (0, 0, 0);
    let mut events = Vec::new();
    let mut left: HashMap<JobId, usize> = HashMap::new();
    while next < jobs.len() || s.pending() > 0 {
        while next < jobs.len() && s.pending() < limits.sequences + 16 {
            let id = s.submit(jobs[next].clone()).unwrap();
            left.insert(id, answer(next));
            next += 1;
        }
        s.schedule(budget, &mut events).unwrap();
        passes += 1;
        rows += s.pass().rows() as u64;
        let mut choose = |_: usize| {
            Ok(Chosen {
                token: 1,
                logprobs: None,
            })
        };
        s.advance(&mut choose, &mut events);
        for e in events.drain(..) {
            if let Event::Token { job, .. } = e {
                let n = left.get_mut(&job).unwrap();
                *n -= 1;
                if *n == 0 {
                    s.cancel(job);
                }
            }
        }
    }
    (passes, rows, s.stats().preemptions)
}

/// 600 rows of 32 + 64 tokens on KV room for a third of the 256 that may run: little is computed twice, and no place that
/// KV allows stays empty for long.
#[test]
fn tight_kv_room_costs_little() {
    let jobs: Vec<Job> = (0..600u32)
        .map(|i| Job {
            prefix_salt: None,
            ..job((0..32).map(|k| i * 7 + k).collect(), 64)
        })
        .collect();
    let limits = Limits {
        context: 4096,
        sequences: 256,
        rows: 2048,
        wanted: 256,
        kv_blocks: 256 * 6 / 3,
    };
    // An answer's tokens but the last go through the layers, each once.
    for (what, answer) in [("full", 64u64), ("short", 20)] {
        let ideal = 600 * (32 + answer - 1);
        let (passes, rows, preemptions) = cost(limits, &jobs, 256, |_| answer as usize);
        println!("{what}: {passes} passes, {rows} rows of {ideal}, {preemptions} set back");
        assert!(
            rows as f64 <= 1.2 * ideal as f64,
            "{what}: {rows} rows, {ideal} needed"
        );
        // A row holds its blocks for as many passes as its answer has tokens; a pass has room for so many blocks and rows.
        let block_passes: u64 = (0..answer).map(|t| (32 + t) / 16 + 1).sum();
        let least = (600 * block_passes / limits.kv_blocks as u64).max(ideal / 256);
        assert!(
            passes as f64 <= 1.3 * least as f64,
            "{what}: {passes} passes, {least} needed"
        );
    }
}

#[test]
fn a_sequence_that_outgrows_all_room_fails_alone() {
    let mut s = Scheduler::new(limits(3));
    let greedy = s.submit(job(vec![1; 40], 20)).unwrap();
    let modest = s.submit(job(vec![2; 10], 3)).unwrap();
    let (mut events, mut told) = (Vec::new(), Vec::new());
    for _ in 0..40 {
        s.schedule(48, &mut events).unwrap();
        let mut choose = |_: usize| {
            Ok(Chosen {
                token: 9,
                logprobs: None,
            })
        };
        s.advance(&mut choose, &mut events);
        told.append(&mut events);
    }
    assert_eq!(s.pending(), 0);
    let ended = |id: JobId| {
        told.iter().find(|e| match e {
            Event::Finished { job, .. } | Event::Failed { job, .. } => *job == id,
            Event::Token { .. } => false,
        })
    };
    assert!(
        matches!(ended(greedy), Some(Event::Failed { error, .. }) if error.code() == Code::Memory)
    );
    assert!(matches!(ended(modest), Some(Event::Finished { .. })));
    assert_eq!(s.pool.free_blocks(), 3);
}

#[test]
fn a_failed_row_leaves_the_others_alone() {
    let mut s = Scheduler::new(limits(20));
    let ids: Vec<JobId> = (0..3).map(|i| s.submit(job(vec![i], 1)).unwrap()).collect();
    let mut events = Vec::new();
    s.schedule(48, &mut events).unwrap();
    let mut choose = |row: usize| match row {
        1 => Err(Error::internal("not a number")),
        _ => Ok(Chosen {
            token: 5,
            logprobs: None,
        }),
    };
    s.advance(&mut choose, &mut events);
    assert_eq!(s.pending(), 0);
    let failed = events
        .iter()
        .filter(|e| matches!(e, Event::Failed { job, .. } if *job == ids[1]));
    assert_eq!(failed.count(), 1);
    assert_eq!(events.len(), 5);
}
