//! How many passes a job will take, and what of: the rules of [`Scheduler`](crate::engine::schedule::Scheduler) over numbers of tokens alone,
//! paced as the engine is. Nothing is computed and no sequence that waits is held, so that a million rows are a matter of seconds.
//!
//! Passes in which nothing begins and nothing ends are all alike and taken in one step. What is set back is computed anew as a whole but for
//! what it shares; what several sequences share is counted once, with the first of them.

use std::iter::Peekable;

use super::shapes::{Shape, Shapes};
use crate::engine::pacer::Pacer;
use crate::engine::schedule::{Limits, PROMPT_TRICKLE};
use crate::model::kv::{BLOCK_TOKENS, KvPool};
use crate::paging::PassCost;

/// Passes after which the pacer has forgotten what was before.
const REMEMBERED: u64 = 64;

/// What one pass carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PassLoad {
    /// Tokens that go through the layers.
    pub rows: usize,
    /// Sequences whose next token is chosen.
    pub wanted: usize,
    /// In the KV cache of the sequences it carries.
    pub kv_tokens: u64,
}

/// A job as foreseen: the sums over all its passes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct JobPasses {
    pub passes: u64,
    /// Tokens through the layers.
    pub rows: u64,
    /// Sequences set back because KV ran out.
    pub preemptions: u64,
    /// Sequences at once, at most.
    pub at_once: usize,
    pub pass_s: f64,
    pub disk_s: f64,
    pub compute_s: f64,
    pub disk_bytes: u64,
}

/// A sequence in the passes.
#[derive(Clone, Copy)]
struct Running {
    /// Prompt and answer so far.
    tokens: usize,
    /// Of them in the KV cache.
    cached: usize,
    /// Of its blocks, those that another one is charged with.
    shared_blocks: usize,
    /// Tokens still to be chosen.
    left: usize,
    /// It has rows in the pass that is made.
    carried: bool,
}

impl Running {
    fn pending(&self) -> usize {
        self.tokens - self.cached
    }

    fn own_blocks(&self) -> usize {
        KvPool::blocks_for(self.cached) - self.shared_blocks
    }

    /// To be computed from the beginning, but for what is shared.
    fn anew(mut self) -> Running {
        self.cached = self.shared_blocks * BLOCK_TOKENS;
        self.carried = false;
        self
    }

    /// As [`Scheduler`](crate::engine::schedule::Scheduler) asks before it admits one.
    fn blocks_wanted(&self) -> usize {
        KvPool::blocks_for(self.tokens) + 1 - self.shared_blocks
    }
}

impl From<Shape> for Running {
    fn from(s: Shape) -> Running {
        let tokens = s.prompt.max(1);
        Running {
            tokens,
            cached: 0,
            shared_blocks: s.shared_blocks.min((tokens - 1) / BLOCK_TOKENS),
            left: s.answer.max(1),
            carried: false,
        }
        .anew()
    }
}

/// The passes of a job of `shapes` under `limits`. `price`: what a pass takes. `streams`: weights come from disk, and the engine paces its
/// passes by that.
pub fn foresee(
    shapes: &Shapes,
    limits: &Limits,
    streams: bool,
    price: &mut dyn FnMut(PassLoad) -> PassCost,
) -> JobPasses {
    let mut job = Foreseen {
        limits: *limits,
        coming: shapes.iter().peekable(),
        back: Vec::new(),
        running: Vec::new(),
        free: limits.kv_blocks,
        pacer: Pacer::default(),
        sums: JobPasses::default(),
    };
    loop {
        let budget = match streams {
            true => job.pacer.budget(limits.rows),
            false => limits.rows,
        };
        let (load, times) = match job.alike() {
            Some(alike) => alike,
            None => (job.pass(budget), 1),
        };
        if load.rows == 0 {
            return job.sums;
        }
        job.count(load, times, price(load));
    }
}

struct Foreseen<I: Iterator<Item = Shape>> {
    limits: Limits,
    coming: Peekable<I>,
    /// Set back: the next one last.
    back: Vec<Running>,
    /// In order of admission.
    running: Vec<Running>,
    /// KV blocks.
    free: usize,
    pacer: Pacer,
    sums: JobPasses,
}

impl<I: Iterator<Item = Shape>> Foreseen<I> {
    fn upcoming(&mut self) -> Option<Running> {
        let coming = self.coming.peek().copied();
        self.back.last().copied().or(coming.map(Running::from))
    }

    /// The next one is to run, and there is a place and KV room for it.
    fn admissible(&mut self) -> Option<Running> {
        if self.running.len() >= self.limits.sequences {
            return None;
        }
        let room = self.free;
        let alone = self.running.is_empty();
        self.upcoming()
            .filter(|s| alone || s.blocks_wanted() <= room)
    }

    fn count(&mut self, load: PassLoad, times: u64, cost: PassCost) {
        let many = times as f64;
        let s = &mut self.sums;
        s.passes += times;
        s.rows += load.rows as u64 * times;
        s.pass_s += cost.pass_s * many;
        s.disk_s += cost.disk_s * many;
        s.compute_s += cost.compute_s * many;
        s.disk_bytes += cost.disk_bytes * times;
        for _ in 0..times.min(REMEMBERED) {
            self.pacer.record(load.rows, cost.compute_s, cost.disk_s);
        }
    }

    /// The passes up to the next that is unlike the one before, where all that run decode and nothing can be admitted: what each carries
    /// (half way), and how many they are.
    fn alike(&mut self) -> Option<(PassLoad, u64)> {
        let n = self.running.len();
        if n == 0 || n > self.limits.rows || self.running.iter().any(|s| s.pending() != 1) {
            return None;
        }
        if self.admissible().is_some() {
            return None;
        }
        let mut times = self.running.iter().map(|s| s.left).min()?;
        let blocks = |s: &Running, times| {
            KvPool::blocks_for(s.cached + times) - KvPool::blocks_for(s.cached)
        };
        let needed = |times| self.running.iter().map(|s| blocks(s, times)).sum::<usize>();
        while times > 0 && needed(times) > self.free {
            times /= 2;
        }
        if times == 0 {
            return None;
        }
        self.free -= needed(times);
        let cached: usize = self.running.iter().map(|s| s.cached).sum();
        for s in &mut self.running {
            s.cached += times;
            s.tokens += times;
            s.left -= times;
        }
        self.retire();
        let load = PassLoad {
            rows: n,
            wanted: n,
            kv_tokens: (cached + n * (times + 1) / 2) as u64,
        };
        Some((load, times as u64))
    }

    /// One pass of at most `budget` rows; none are left when it is empty.
    fn pass(&mut self, budget: usize) -> PassLoad {
        loop {
            let rows = self.fill(budget);
            if rows > 0 {
                return self.advance(rows);
            }
            if self.running.is_empty() && self.upcoming().is_none() {
                return PassLoad::default();
            }
            // Half-read prompts hold all blocks, or the only one that runs has outgrown them: it fails.
            self.set_back_youngest();
        }
    }

    fn fill(&mut self, budget: usize) -> usize {
        let mut rows = 0;
        self.make_room_for_decoding();
        for i in 0..self.running.len() {
            if self.running[i].pending() == 1 {
                rows += self.put(i, self.limits.rows - rows);
            }
        }
        let most = budget.max(rows + PROMPT_TRICKLE).min(self.limits.rows);
        for i in 0..self.running.len() {
            if self.running[i].pending() > 1 {
                rows += self.put(i, most - rows);
            }
        }
        while rows < most {
            let Some(next) = self.admissible() else {
                break;
            };
            if self.back.pop().is_none() {
                self.coming.next();
            }
            self.running.push(next);
            rows += self.put(self.running.len() - 1, most - rows);
        }
        self.sums.at_once = self.sums.at_once.max(self.running.len());
        rows
    }

    /// As much of sequence `i`'s pending tokens as `room` and the KV blocks take.
    fn put(&mut self, i: usize, room: usize) -> usize {
        let s = &mut self.running[i];
        let held = KvPool::blocks_for(s.cached);
        let kv_room = (held + self.free) * BLOCK_TOKENS - s.cached;
        let rows = s.pending().min(room).min(kv_room);
        s.cached += rows;
        s.carried |= rows > 0;
        self.free -= KvPool::blocks_for(s.cached) - held;
        rows
    }

    fn make_room_for_decoding(&mut self) {
        let at_an_end = |s: &&Running| s.pending() == 1 && s.cached.is_multiple_of(BLOCK_TOKENS);
        while self.running.iter().filter(at_an_end).count() > self.free {
            self.set_back_youngest();
        }
    }

    fn set_back_youngest(&mut self) {
        let Some(youngest) = self.running.pop() else {
            // Not even the first of its blocks has room.
            if self.back.pop().is_none() {
                self.coming.next();
            }
            return;
        };
        self.free += youngest.own_blocks();
        if !self.running.is_empty() {
            self.back.push(youngest.anew());
            self.sums.preemptions += 1;
        }
    }

    /// Every sequence whose tokens are all in the cache has its next one chosen.
    fn advance(&mut self, rows: usize) -> PassLoad {
        let mut load = PassLoad {
            rows,
            ..PassLoad::default()
        };
        for s in self.running.iter_mut().filter(|s| s.carried) {
            s.carried = false;
            load.kv_tokens += s.cached as u64;
            if s.pending() == 0 {
                load.wanted += 1;
                s.tokens += 1;
                s.left -= 1;
            }
        }
        self.retire();
        load
    }

    fn retire(&mut self) {
        let free = &mut self.free;
        self.running.retain(|s| {
            if s.left == 0 {
                *free += s.own_blocks();
            }
            s.left > 0
        });
    }
}

#[cfg(test)]
#[path = "passes_tests.rs"]
mod tests;
