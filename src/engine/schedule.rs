//! Continuous batching by pass: which tokens go into the next pass, and what becomes of its logits.
//!
//! Pure bookkeeping over tokens and KV blocks: no model, no device. [`super::Engine`] runs the passes it makes.

use std::collections::VecDeque;

use super::pictures::{self, Pictures};
use super::sequence::{Event, FinishReason, Job, JobId, Logprobs, Sequence};
use crate::error::{Code, Error, Result};
use crate::model::kv::{BLOCK_TOKENS, BlockCopy, KvPool};
use crate::model::pass::Pass;

/// Prompt rows a pass takes even where decoding alone fills the budget, so that a waiting prompt moves.
pub(super) const PROMPT_TRICKLE: usize = 16;

/// What a pass and the engine can hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of a sequence, prompt and answer together.
    pub context: usize,
    /// Sequences that run at once.
    pub sequences: usize,
    /// Rows of a pass.
    pub rows: usize,
    /// Rows of a pass whose logits are wanted.
    pub wanted: usize,
    pub kv_blocks: usize,
}

/// A running sequence in the pass that is about to run.
struct Scheduled {
    /// Index in `running`.
    running: usize,
    /// Its last row's logits are in the pass: a token will be chosen.
    chooses: bool,
}

/// What was made of a row of logits.
pub struct Chosen {
    pub token: u32,
    pub logprobs: Option<Box<Logprobs>>,
}

/// A sequence at the point where its next token is chosen.
pub struct Choosing<'a> {
    pub job: &'a Job,
    pub generated: &'a [u32],
    /// Row of the pass's logits, counted over the wanted rows.
    pub row: usize,
}

/// What happened besides tokens, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScheduleStats {
    /// Sequences set back because KV ran out.
    pub preemptions: u64,
    /// Tokens that were not computed because their KV was there already.
    pub shared_tokens: u64,
    /// Tokens computed that were no prompt of their own: one a decode step.
    pub decoded_tokens: u64,
}

/// Sequences waiting and running, their KV blocks, and the pass being put together.
pub struct Scheduler {
    limits: Limits,
    pub(super) pool: KvPool,
    waiting: VecDeque<Sequence>,
    /// In order of admission: the last one is the youngest.
    running: Vec<Sequence>,
    next_id: u64,
    pub(super) pass: Pass,
    scheduled: Vec<Scheduled>,
    /// Of `scheduled`, those that choose.
    wanted: usize,
    copies: Vec<BlockCopy>,
    /// Jobs that no KV room there is could hold, not told yet.
    outgrown: Vec<Event>,
    stats: ScheduleStats,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Scheduler {
        Scheduler {
            pool: KvPool::new(limits.kv_blocks),
            waiting: VecDeque::new(),
            running: Vec::with_capacity(limits.sequences),
            next_id: 0,
            pass: Pass::default(),
            scheduled: Vec::with_capacity(limits.sequences),
            wanted: 0,
            copies: Vec::new(),
            outgrown: Vec::new(),
            stats: ScheduleStats::default(),
            limits,
        }
    }

    /// Queues a job. Refused when it could never run: an empty prompt, one that fills the context, no token to generate (all
    /// Code::Usage), or one that no KV room there is could hold (Code::Memory).
    pub fn submit(&mut self, job: Job) -> Result<JobId> {
        self.submit_with(job, None)
    }

    /// As [`Scheduler::submit`], with what is known of the prompt's pictures.
    pub(super) fn submit_with(&mut self, job: Job, pictures: Option<Pictures>) -> Result<JobId> {
        if job.prompt.is_empty() {
            return Err(Error::new(
                Code::Usage,
                "there is nothing to continue",
                "the prompt has no tokens",
                "give a prompt",
            ));
        }
        let context = self.limits.context;
        if job.prompt.len() >= context {
            return Err(Error::new(
                Code::Usage,
                format!("the prompt of {} tokens is too long", job.prompt.len()),
                format!("the context holds {context} tokens, and one must be left for the answer"),
                "shorten the prompt or raise --context (it takes KV memory)",
            ));
        }
        if job.max_tokens == 0 {
            return Err(Error::new(
                Code::Usage,
                "there is nothing to generate",
                "the job asks for at most 0 tokens",
                "ask for one token or more; `score` gives the likelihoods of a prompt",
            ));
        }
        job.sampling.validate()?;
        if KvPool::blocks_for(job.prompt.len()) > self.pool.blocks() {
            return Err(outgrown(job.prompt.len(), self.pool.blocks()));
        }
        let id = JobId(self.next_id);
        self.next_id += 1;
        self.waiting
            .push_back(Sequence::new(id, job).with_pictures(pictures));
        Ok(id)
    }

    /// Forgets a job at once and gives back its KV. Unknown ids are ignored: it may just have finished.
    pub fn cancel(&mut self, id: JobId) {
        if let Some(i) = self.running.iter().position(|s| s.id == id) {
            let mut gone = self.running.remove(i);
            self.pool.release(&mut gone.table);
        } else if let Some(i) = self.waiting.iter().position(|s| s.id == id) {
            self.waiting.remove(i);
        }
    }

    /// Jobs that are not finished.
    pub fn pending(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// Jobs in the passes now.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Jobs that wait and have generated nothing.
    pub fn unstarted(&self) -> impl Iterator<Item = JobId> + '_ {
        self.waiting
            .iter()
            .filter(|s| s.generated() == 0)
            .map(|s| s.id)
    }

    pub fn stats(&self) -> ScheduleStats {
        self.stats
    }

    /// The pass that [`Scheduler::schedule`] made.
    pub fn pass(&self) -> &Pass {
        &self.pass
    }

    /// Blocks to copy before the pass runs.
    pub fn copies(&self) -> &[BlockCopy] {
        &self.copies
    }

    /// Makes the next pass: one token for every sequence that decodes, then chunks of prompts, then new sequences, first
    /// come first served, until `budget` rows, the logits rows or the KV room are used up. Empty only when nothing is
    /// pending. A sequence that has outgrown all KV there is fails: `events` is told.
    pub fn schedule(&mut self, budget: usize, events: &mut Vec<Event>) -> Result<()> {
        loop {
            self.fill(budget)?;
            events.append(&mut self.outgrown);
            if self.pass.rows() > 0 || self.running.is_empty() {
                return Ok(());
            }
            // Several half-read prompts hold all blocks and none can go on.
            self.set_back_youngest();
        }
    }

    fn fill(&mut self, budget: usize) -> Result<()> {
        self.pass.clear();
        self.scheduled.clear();
        self.wanted = 0;
        self.copies.clear();
        self.make_room_for_decoding();
        for i in 0..self.running.len() {
            if self.running[i].pending() == 1 {
                self.put(i, 1)?;
            }
        }
        let most = budget
            .max(self.pass.rows() + PROMPT_TRICKLE)
            .min(self.limits.rows);
        for i in 0..self.running.len() {
            if self.running[i].pending() > 1 {
                self.put_prompt(i, most)?;
            }
        }
        self.admit(most)
    }

    /// New sequences, while there are places, rows and KV room.
    fn admit(&mut self, most: usize) -> Result<()> {
        while self.running.len() < self.limits.sequences && self.pass.rows() < most {
            let Some(next) = self.waiting.front_mut() else {
                break;
            };
            if next.waits_for_pictures() {
                break;
            }
            let full = (next.tokens.len() - 1) / BLOCK_TOKENS;
            let needed = KvPool::blocks_for(next.tokens.len()) + 1;
            let (found, idle) = self.pool.find(next.keys(full));
            // Admitted only with room for its whole prompt and one more block: half a prompt in the cache helps nobody. Whether
            // room will last until it ends is not asked: where bytes bound the pass, what is set back costs nothing, and
            // looking ahead was measured to leave more places empty than it saves.
            if needed - found + idle > self.pool.free_blocks() && !self.running.is_empty() {
                break;
            }
            let Some(mut next) = self.waiting.pop_front() else {
                break;
            };
            // Blocks that this very pass writes are shared too: in each layer all keys and values are written before any
            // are read.
            next.table = self.pool.share(next.keys(full));
            self.stats.shared_tokens += next.table.len() as u64;
            self.running.push(next);
            self.put_prompt(self.running.len() - 1, most)?;
        }
        Ok(())
    }

    /// Every decoding sequence needs room for one token. When blocks run out the youngest is set back: its KV is given
    /// up and recomputed later from its tokens, which changes nothing of what it says.
    fn make_room_for_decoding(&mut self) {
        loop {
            let needed = self
                .running
                .iter()
                .filter(|s| s.pending() == 1 && s.table.len().is_multiple_of(BLOCK_TOKENS))
                .count();
            if needed <= self.pool.free_blocks() {
                return;
            }
            self.set_back_youngest();
        }
    }

    /// Alone and still without room, it could never go on: it fails.
    fn set_back_youngest(&mut self) {
        let Some(mut youngest) = self.running.pop() else {
            return;
        };
        self.pool.release(&mut youngest.table);
        if self.running.is_empty() {
            self.outgrown.push(Event::Failed {
                job: youngest.id,
                error: outgrown(youngest.tokens.len(), self.pool.blocks()),
            });
            return;
        }
        self.waiting.push_front(youngest);
        self.stats.preemptions += 1;
    }

    /// Forgets all KV: everything is computed again. For after a pass that failed half way.
    pub fn set_back_all(&mut self) {
        while let Some(mut s) = self.running.pop() {
            self.pool.release(&mut s.table);
            self.waiting.push_front(s);
        }
        self.pool.withdraw_all();
        self.scheduled.clear();
        self.pass.clear();
    }

    /// As much of sequence `i`'s pending tokens as the pass (up to `most` rows) and the KV pool take.
    fn put_prompt(&mut self, i: usize, most: usize) -> Result<()> {
        let room = most.saturating_sub(self.pass.rows());
        let s = &self.running[i];
        let rows = s.pending().min(room).min(self.pool.room_for(&s.table));
        if rows > 0 {
            self.put(i, rows)?;
        }
        Ok(())
    }

    /// The sequences that wait, first come first served.
    pub(super) fn waiting(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.waiting.iter_mut()
    }

    /// The next sequence waits for its pictures, and there is a place for it.
    pub(super) fn next_waits_for_pictures(&self) -> bool {
        self.running.len() < self.limits.sequences
            && self
                .waiting
                .front()
                .is_some_and(Sequence::waits_for_pictures)
    }

    fn put(&mut self, i: usize, rows: usize) -> Result<()> {
        let chooses = rows == self.running[i].pending();
        if self.pass.rows() + rows > self.limits.rows
            || (chooses && self.wanted == self.limits.wanted)
        {
            return Ok(());
        }
        let s = &mut self.running[i];
        let start = s.table.len();
        // The callers counted the blocks; without room the sequence sits this pass out.
        match self.pool.extend(&mut s.table, rows) {
            Ok(copy) => self.copies.extend(copy),
            Err(_) => return Ok(()),
        }
        pictures::push(
            s.pictures.as_ref(),
            &mut self.pass,
            &s.tokens[start..start + rows],
            start,
            s.table.blocks(),
            usize::from(chooses),
        )?;
        let full = (start + rows) / BLOCK_TOKENS;
        for block in start / BLOCK_TOKENS..full {
            if let Some(&key) = s.keys(full).get(block) {
                self.pool.publish(s.table.blocks()[block], key);
            }
        }
        if let Some(pictures) = &mut s.pictures {
            pictures.release(start + rows);
        }
        self.stats.decoded_tokens += u64::from(start >= s.job.prompt.len());
        self.wanted += usize::from(chooses);
        self.scheduled.push(Scheduled {
            running: i,
            chooses,
        });
        Ok(())
    }

    /// The sequences whose next token the pass's logits decide, in the order of the wanted rows.
    pub fn choosing(&self) -> Vec<Choosing<'_>> {
        let chooses = self.scheduled.iter().filter(|s| s.chooses);
        let row = |(row, scheduled): (usize, &Scheduled)| {
            let s = &self.running[scheduled.running];
            Choosing {
                job: &s.job,
                generated: &s.tokens[s.job.prompt.len()..],
                row,
            }
        };
        chooses.enumerate().map(row).collect()
    }

    /// After the pass: `choose(row)` gives the token of every sequence of [`Scheduler::choosing`], in that order. The finished
    /// and the failed are retired.
    pub fn advance(
        &mut self,
        choose: &mut dyn FnMut(usize) -> Result<Chosen>,
        events: &mut Vec<Event>,
    ) {
        let mut gone = 0;
        let chooses = self.scheduled.iter().filter(|s| s.chooses);
        for (row, scheduled) in chooses.enumerate() {
            let s = &mut self.running[scheduled.running];
            let job = s.id;
            let end = match choose(row) {
                Err(error) => Some(Event::Failed { job, error }),
                Ok(chosen) if s.job.stop_tokens.contains(&chosen.token) => Some(Event::Finished {
                    job,
                    reason: FinishReason::Stop,
                }),
                Ok(Chosen { token, logprobs }) => {
                    s.tokens.push(token);
                    events.push(Event::Token {
                        job,
                        token,
                        logprobs,
                    });
                    let over =
                        s.generated() >= s.job.max_tokens || s.tokens.len() >= self.limits.context;
                    over.then_some(Event::Finished {
                        job,
                        reason: FinishReason::Length,
                    })
                }
            };
            if let Some(end) = end {
                self.pool.release(&mut s.table);
                s.tokens.clear();
                gone += 1;
                events.push(end);
            }
        }
        self.scheduled.clear();
        if gone > 0 {
            // Only the retired have no tokens: a prompt is never empty.
            self.running.retain(|s| !s.tokens.is_empty());
        }
    }
}

fn outgrown(tokens: usize, blocks: usize) -> Error {
    Error::new(
        Code::Memory,
        format!("a sequence of {tokens} tokens has outgrown the KV cache"),
        format!("all of it holds {} tokens", blocks * BLOCK_TOKENS),
        "raise --cpu-memory or --kv-memory, or ask for fewer tokens",
    )
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
