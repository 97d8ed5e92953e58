//! A test tool: a reader that makes of any other reader's answers what bad disks, busy kernels and truncated files make of them.
//!
//! On regular files the kernel hides most short reads and EAGAIN, so that broken code passes on a real disk; they are injected here.

use std::time::{Duration, Instant};

use super::{RawDone, ReadOp, Reader};
use crate::error::Result;

/// What to inject, and how often: shares from 0 to 1 of all completions, drawn from a seeded stream, so that a run can be repeated.
/// The default injects nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    pub seed: u64,
    /// Share of reads cut short at any byte, the rest of the frame overwritten with rubbish.
    pub short: f64,
    /// Share answered with EINTR, the frame overwritten with rubbish.
    pub eintr: f64,
    /// Share answered with EAGAIN, likewise.
    pub eagain: f64,
    /// Share answered with EIO, likewise.
    pub eio: f64,
    /// Share in which one bit is flipped and nothing is said.
    pub flip: f64,
    /// Share that never completes.
    pub lose: f64,
    /// Share held back for `delay_by`.
    pub delay: f64,
    pub delay_by: Duration,
    /// Completions come in random order.
    pub reorder: bool,
    /// Every file seems to end at this offset.
    pub end_at: Option<u64>,
    /// The reaping thread sleeps this long for every read: a slow disk.
    pub sleep: Duration,
}

/// How many completions are gathered before one is drawn, when they are reordered.
const SHUFFLE: usize = 8;
const RUBBISH: u8 = 0xA5;

/// Any reader with faults added.
pub struct FaultReader<R: Reader> {
    inner: R,
    faults: Faults,
    random: u64,
    raw: Vec<RawDone>,
    held: Vec<(RawDone, Instant)>,
    lost: Vec<RawDone>,
}

impl<R: Reader> FaultReader<R> {
    pub fn new(inner: R, faults: Faults) -> FaultReader<R> {
        let depth = inner.capacity();
        FaultReader {
            inner,
            faults,
            random: faults.seed,
            raw: Vec::with_capacity(depth),
            held: Vec::with_capacity(depth),
            lost: Vec::with_capacity(depth),
        }
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn happens(&mut self, share: f64) -> bool {
        share > 0.0 && ((self.draw() >> 11) as f64) < share * (1u64 << 53) as f64
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.draw() % bound.max(1) as u64) as usize
    }

    /// Applies the faults to one completion and puts it where it belongs.
    fn spoil(&mut self, mut done: RawDone) {
        let faults = self.faults;
        if !faults.sleep.is_zero() {
            self.inner.pause(faults.sleep);
        }
        if self.happens(faults.lose) {
            self.lost.push(done);
            return;
        }
        if let Some(end) = faults.end_at {
            let from = done.op.offset + done.skip as u64;
            let there = end.saturating_sub(from).min(i32::MAX as u64) as i32;
            self.cut(&mut done, there);
        }
        for (share, errno) in [
            (faults.eintr, libc::EINTR),
            (faults.eagain, libc::EAGAIN),
            (faults.eio, libc::EIO),
        ] {
            if self.happens(share) {
                self.cut(&mut done, 0);
                done.result = -errno;
            }
        }
        if done.result > 1 && self.happens(faults.short) {
            let there = 1 + self.below(done.result as usize - 1) as i32;
            self.cut(&mut done, there);
        }
        if done.result > 0 && self.happens(faults.flip) {
            let bit = self.below(done.result as usize * 8);
            done.op.frame[done.skip + bit / 8] ^= 1 << (bit % 8);
        }
        let wait = match self.happens(faults.delay) {
            true => faults.delay_by,
            false => Duration::ZERO,
        };
        self.held.push((done, self.inner.now() + wait));
    }

    /// Lets at most `there` bytes have arrived: what was read behind them is destroyed, or a caller who trusts it would never be caught.
    fn cut(&mut self, done: &mut RawDone, there: i32) {
        if done.result > there {
            let from = done.skip + there as usize;
            let to = done.skip + done.result as usize;
            done.op.frame[from..to].fill(RUBBISH);
            done.result = there;
        }
    }

    /// Takes completions from the inner reader, waiting for them or for the next held one to come due. Lost reads count as in flight
    /// but never come: a wait for them ends with the time.
    fn gather(&mut self, wait: bool, left: Duration) -> Result<()> {
        let due = self.held.iter().map(|(_, due)| *due).min();
        let pause = due.map_or(left, |due| {
            left.min(due.saturating_duration_since(self.inner.now()))
        });
        let flying = self.inner.in_flight();
        if flying == 0 {
            if wait {
                self.inner.pause(pause);
            }
            return Ok(());
        }
        let need = match (wait, self.faults.reorder) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => SHUFFLE.min(flying),
        };
        let mut raw = std::mem::take(&mut self.raw);
        let answer = self.inner.reap(need, pause, &mut raw);
        for done in raw.drain(..) {
            self.spoil(done);
        }
        self.raw = raw;
        answer
    }

    /// Hands out what is due; how many.
    fn release(&mut self, out: &mut Vec<RawDone>) -> usize {
        let mut released = 0;
        let now = self.inner.now();
        if self.faults.reorder {
            for at in (1..self.held.len()).rev() {
                let other = self.below(at + 1);
                self.held.swap(at, other);
            }
        }
        let mut at = 0;
        while at < self.held.len() {
            if self.held[at].1 <= now {
                out.push(self.held.remove(at).0);
                released += 1;
            } else {
                at += 1;
            }
        }
        released
    }
}

impl<R: Reader> Reader for FaultReader<R> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capacity(&self) -> usize {
        self.inner.capacity()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len() + self.lost.len()
    }

    fn submit(&mut self, op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp> {
        if self.in_flight() == self.capacity() {
            return Err(op);
        }
        self.inner.submit(op, skip)
    }

    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()> {
        let start = self.inner.now();
        let min = min.min(self.in_flight());
        let mut got = 0;
        loop {
            let left = timeout.saturating_sub(self.inner.now() - start);
            let answer = self.gather(got < min, left);
            got += self.release(out);
            answer?;
            if got >= min || self.inner.now() - start >= timeout {
                return Ok(());
            }
        }
    }

    fn describe(&self) -> String {
        format!("{} with faults {:?}", self.inner.describe(), self.faults)
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }

    fn pause(&mut self, time: Duration) {
        self.inner.pause(time);
    }
}
