//! Which tokens go into the next pass, and what becomes of its logits.

use super::pictures;
use super::sequence::{Event, FinishReason};
use super::{Engine, no_kv_room};
use crate::error::Result;
use crate::text::{Draw, History};

/// A running sequence in the pass that is about to run.
pub(super) struct Scheduled {
    /// Index in `running`.
    pub running: usize,
    /// Its last row's logits are in the pass: a token will be chosen.
    pub chooses: bool,
}

impl Engine {
    /// Fills `self.pass`: first one token for every sequence that decodes, then prompt chunks, then new sequences,
    /// until rows, logits rows or KV run out.
    pub(super) fn schedule(&mut self) -> Result<()> {
        self.pass.clear();
        self.scheduled.clear();
        self.make_room_for_decoding()?;
        let mut i = 0;
        while i < self.running.len() {
            if self.running[i].pending() == 1 {
                self.put(i, 1)?;
            }
            i += 1;
        }
        for i in 0..self.running.len() {
            if self.running[i].pending() > 1 {
                self.put_prompt(i)?;
            }
        }
        while self.running.len() < self.max_sequences
            && self.pass.rows() < self.forward.max_tokens()
        {
            let Some(next) = self.waiting.front() else {
                break;
            };
            if next.waits_for_pictures() {
                break;
            }
            // Admitted only with room for its whole prompt and one more block: half a prompt in the cache helps nobody.
            let needed = crate::model::kv::KvPool::blocks_for(next.tokens.len()) + 1;
            if needed > self.pool.free_blocks() && !self.running.is_empty() {
                break;
            }
            if let Some(next) = self.waiting.pop_front() {
                self.running.push(next);
                self.put_prompt(self.running.len() - 1)?;
            }
        }
        Ok(())
    }

    /// Every decoding sequence needs room for one token. When blocks run out the youngest is set back: its KV is given
    /// up and recomputed later from its tokens, which changes nothing of what it says.
    fn make_room_for_decoding(&mut self) -> Result<()> {
        loop {
            let needed = self
                .running
                .iter()
                .filter(|s| s.pending() == 1)
                .filter(|s| s.table.len().is_multiple_of(crate::model::kv::BLOCK_TOKENS))
                .count();
            if needed <= self.pool.free_blocks() {
                return Ok(());
            }
            match self.running.len() {
                0 | 1 => return Err(no_kv_room(needed)),
                _ => {
                    if let Some(mut youngest) = self.running.pop() {
                        self.pool.release(&mut youngest.table);
                        self.waiting.push_front(youngest);
                    }
                }
            }
        }
    }

    /// As much of sequence `i`'s pending tokens as the pass and the KV pool take.
    fn put_prompt(&mut self, i: usize) -> Result<()> {
        let room = self.forward.max_tokens() - self.pass.rows();
        let pending = self.running[i].pending();
        let in_blocks = self.pool.free_blocks() * crate::model::kv::BLOCK_TOKENS;
        let rows = pending.min(room).min(in_blocks);
        if rows > 0 {
            self.put(i, rows)?;
        }
        Ok(())
    }

    fn put(&mut self, i: usize, rows: usize) -> Result<()> {
        let chooses = rows == self.running[i].pending();
        if self.pass.rows() + rows > self.forward.max_tokens()
            || (chooses && self.pass.wanted() == self.forward.max_wanted())
        {
            return Ok(());
        }
        let s = &mut self.running[i];
        let start = s.table.len();
        // `make_room_for_decoding` and `put_prompt` counted the blocks; without room the sequence sits this pass out.
        if self.pool.extend(&mut s.table, rows).is_err() {
            return Ok(());
        }
        pictures::push(
            s.pictures.as_ref(),
            &mut self.pass,
            &s.tokens[start..start + rows],
            start,
            s.table.blocks(),
            usize::from(chooses),
        )?;
        self.scheduled.push(Scheduled {
            running: i,
            chooses,
        });
        Ok(())
    }

    /// Draws the next token of every sequence whose logits came, and retires the finished.
    pub(super) fn choose(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let vocab = self.spec.vocab;
        let mut row = 0;
        let mut finished = Vec::new();
        for scheduled in &self.scheduled {
            if !scheduled.chooses {
                continue;
            }
            let s = &mut self.running[scheduled.running];
            let logits = &self.logits[row * vocab..][..vocab];
            row += 1;
            let (prompt, generated) = s.tokens.split_at(s.job.prompt.len());
            let draw = Draw {
                seed: s.job.sampling.seed,
                choice: s.job.choice,
                position: s.tokens.len() as u64,
            };
            let history = History { prompt, generated };
            let token = self
                .sampler
                .sample(logits, &s.job.sampling, history, draw)?;
            if s.job.stop_tokens.contains(&token) {
                finished.push((s.id, FinishReason::Stop));
                continue;
            }
            s.tokens.push(token);
            events.push(Event::Token { job: s.id, token });
            if s.generated() >= s.job.max_tokens || s.tokens.len() >= self.context {
                finished.push((s.id, FinishReason::Length));
            }
        }
        for (job, reason) in finished {
            self.cancel(job);
            events.push(Event::Finished { job, reason });
        }
        Ok(())
    }
}
