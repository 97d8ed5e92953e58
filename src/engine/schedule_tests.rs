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
        s.schedule(budget).unwrap();
        passes += 1;
        assert!(s.pass().rows() > 0 && passes < 10_000, "no progress");
        assert!(s.pass().rows() <= limits.rows && s.pass().wanted() <= limits.wanted);
        assert!(s.copies().is_empty(), "full blocks are shared, never written");
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
                assert_eq!(memory[block][at % BLOCK_TOKENS], *token, "token {at} of the past");
            }
        }
        events.clear();
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
    assert_eq!(s.pool.free_blocks(), limits.kv_blocks, "every block came back");
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
    s.schedule(512).unwrap();
    assert_eq!(s.pass().rows(), 41 + 3 * (41 - 32));
    assert_eq!(s.stats().shared_tokens, 3 * 32);
}

#[test]
fn what_could_never_run_is_refused() {
    let mut s = Scheduler::new(limits(8));
    assert_eq!(s.submit(job(vec![], 1)).unwrap_err().code(), Code::Usage);
    assert_eq!(s.submit(job(vec![1; 64], 1)).unwrap_err().code(), Code::Usage);
    assert!(s.submit(job(vec![1; 63], 1)).is_ok());
}

#[test]
fn a_failed_row_leaves_the_others_alone() {
    let mut s = Scheduler::new(limits(20));
    let ids: Vec<JobId> = (0..3).map(|i| s.submit(job(vec![i], 1)).unwrap()).collect();
    s.schedule(48).unwrap();
    let mut events = Vec::new();
    let mut choose = |row: usize| match row {
        1 => Err(Error::internal("not a number")),
        _ => Ok(Chosen {
            token: 5,
            logprobs: None,
        }),
    };
    s.advance(&mut choose, &mut events);
    assert_eq!(s.pending(), 0);
    let failed = events.iter().filter(|e| matches!(e, Event::Failed { job, .. } if *job == ids[1]));
    assert_eq!(failed.count(), 1);
    assert_eq!(events.len(), 5);
}
