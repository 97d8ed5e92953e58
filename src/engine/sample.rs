//! Logits → tokens for all sequences of a pass, the rows shared out over threads: a row's draw depends on nothing but itself.

use super::schedule::{Choosing, Chosen, Scheduler};
use super::sequence::{Event, Job, Logprobs};
use crate::error::{Error, Result};
use crate::text::{Draw, History, Sampler};

/// Below so many rows starting threads costs more than they save.
const ROWS_A_THREAD: usize = 4;

/// One sampler a thread; their buffers are kept between passes.
pub(super) struct Samplers(Vec<Sampler>);

/// What the pass gave for its wanted rows.
pub(super) enum RowsOf<'a> {
    /// `[wanted rows, vocab]`, and vocab.
    Logits(&'a [f32], usize),
    /// The best of each row.
    Candidates(&'a [Vec<(u32, f32)>]),
}

impl Samplers {
    pub fn new(limit: usize, threads: usize) -> Samplers {
        Samplers((0..threads.max(1)).map(|_| Sampler::new(limit)).collect())
    }

    /// Ids from here on are never chosen.
    pub fn limit(&self) -> usize {
        self.0.first().map_or(0, Sampler::limit)
    }

    /// Draws the next token of every sequence whose logits are in `logits`, and tells `events`.
    pub fn choose(
        &mut self,
        scheduler: &mut Scheduler,
        logits: &RowsOf<'_>,
        events: &mut Vec<Event>,
    ) {
        let choosing = scheduler.choosing();
        let drawn = match logits {
            RowsOf::Logits(logits, vocab) => self.draw(&choosing, logits, *vocab),
            RowsOf::Candidates(rows) => {
                let sampler = &mut self.0[0];
                choosing
                    .iter()
                    .map(|c| one_of(sampler, c, &rows[c.row]))
                    .collect()
            }
        };
        let mut drawn = drawn.into_iter();
        scheduler.advance(
            &mut |_| {
                let missing = || Err(Error::internal("a row was not sampled"));
                drawn.next().unwrap_or_else(missing)
            },
            events,
        );
    }

    fn draw(&mut self, rows: &[Choosing<'_>], logits: &[f32], vocab: usize) -> Vec<Result<Chosen>> {
        let row = |c: &Choosing<'_>| &logits[c.row * vocab..][..vocab];
        let threads = self.0.len().min(rows.len() / ROWS_A_THREAD).max(1);
        if threads == 1 {
            let sampler = &mut self.0[0];
            return rows.iter().map(|c| one(sampler, c, row(c))).collect();
        }
        let share = rows.len().div_ceil(threads);
        std::thread::scope(|scope| {
            let work: Vec<_> = rows
                .chunks(share)
                .zip(&mut self.0)
                .map(|(part, sampler)| {
                    scope.spawn(move || -> Vec<Result<Chosen>> {
                        part.iter().map(|c| one(sampler, c, row(c))).collect()
                    })
                })
                .collect();
            let join = |w: std::thread::ScopedJoinHandle<'_, Vec<Result<Chosen>>>| match w.join() {
                Ok(part) => part,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            work.into_iter().flat_map(join).collect()
        })
    }
}

fn draw_of(c: &Choosing<'_>) -> Draw {
    Draw {
        seed: c.job.sampling.seed,
        choice: c.job.choice,
        position: (c.job.prompt.len() + c.generated.len()) as u64,
    }
}

/// From the best logits alone.
fn one_of(sampler: &mut Sampler, c: &Choosing<'_>, best: &[(u32, f32)]) -> Result<Chosen> {
    Ok(Chosen {
        token: sampler.sample_best(best, &c.job.sampling, draw_of(c))?,
        logprobs: None,
    })
}

fn one(sampler: &mut Sampler, c: &Choosing<'_>, logits: &[f32]) -> Result<Chosen> {
    let job: &Job = c.job;
    let draw = draw_of(c);
    let history = History {
        prompt: &job.prompt,
        generated: c.generated,
    };
    let token = sampler.sample(logits, &job.sampling, history, draw)?;
    let logprobs = match job.logprobs {
        None => None,
        Some(n) => {
            let mut top = Vec::with_capacity(n);
            let chosen = sampler.logprobs(logits, token, n, &mut top)?;
            Some(Box::new(Logprobs { chosen, top }))
        }
    };
    Ok(Chosen { token, logprobs })
}
