//! A disk that is only slow: what a reader gets from the page cache takes as long as it would from there.
#![allow(dead_code)] // each user needs a part

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tensorpager::io::{RawDone, ReadOp, Reader};

/// Serves reads one after the other.
pub struct Disk {
    inner: Box<dyn Reader>,
    per_read: Duration,
    ns_per_kib: u64,
    every: u64,
    count: u64,
    free_at: Instant,
    raw: Vec<RawDone>,
    held: VecDeque<(RawDone, Instant)>,
}

impl Disk {
    /// One read after another, each of which takes `per_read` and its bytes at `gb_per_s`; every so manieth ten times as long (0: none).
    pub fn wrap(
        inner: Box<dyn Reader>,
        per_read: Duration,
        gb_per_s: f64,
        every: u64,
    ) -> Box<dyn Reader> {
        let depth = inner.capacity();
        Box::new(Disk {
            inner,
            per_read,
            ns_per_kib: (1024.0 / gb_per_s) as u64,
            every,
            count: 0,
            free_at: Instant::now(),
            raw: Vec::with_capacity(depth),
            held: VecDeque::with_capacity(depth),
        })
    }
}

impl Reader for Disk {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn capacity(&self) -> usize {
        self.inner.capacity()
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len()
    }
    fn submit(&mut self, op: ReadOp, skip: usize) -> Result<(), ReadOp> {
        match self.in_flight() < self.capacity() {
            true => self.inner.submit(op, skip),
            false => Err(op),
        }
    }
    fn reap(
        &mut self,
        min: usize,
        timeout: Duration,
        out: &mut Vec<RawDone>,
    ) -> tensorpager::error::Result<()> {
        let end = Instant::now() + timeout;
        let min = min.min(self.in_flight());
        let mut got = 0;
        loop {
            let need = usize::from(self.held.is_empty() && self.inner.in_flight() > 0);
            self.inner.reap(
                need,
                end.saturating_duration_since(Instant::now()),
                &mut self.raw,
            )?;
            for done in self.raw.drain(..) {
                self.count += 1;
                let mut takes = self.per_read
                    + Duration::from_nanos(self.ns_per_kib * (done.op.frame.len() as u64 >> 10));
                if self.every > 0 && self.count.is_multiple_of(self.every) {
                    takes *= 10;
                }
                self.free_at = self.free_at.max(Instant::now()) + takes;
                self.held.push_back((done, self.free_at));
            }
            while let Some((_, due)) = self.held.front()
                && *due <= Instant::now()
                && let Some((done, _)) = self.held.pop_front()
            {
                out.push(done);
                got += 1;
            }
            if got >= min || Instant::now() >= end {
                return Ok(());
            }
            if let Some((_, due)) = self.held.front() {
                std::thread::sleep(due.min(&end).saturating_duration_since(Instant::now()));
            }
        }
    }
    fn describe(&self) -> String {
        format!("{}, simulated disk", self.inner.describe())
    }
}
