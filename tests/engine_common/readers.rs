//! Readers that go wrong, and damage on disk.
#![allow(dead_code)] // each test file uses a part

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tensorpager::error::Result;
use tensorpager::io::{FaultReader, Faults, RawDone, ReadOp, Reader};
use tensorpager::store::Store;

/// What [`tensorpager::paging::PagerOptions::wrap`] takes.
pub type Wrap = fn(Box<dyn Reader>) -> Box<dyn Reader>;

pub fn with(faults: Faults, reader: Box<dyn Reader>) -> Box<dyn Reader> {
    Box::new(FaultReader::new(reader, faults))
}

pub fn all_at_once(r: Box<dyn Reader>) -> Box<dyn Reader> {
    let faults = Faults {
        seed: 6,
        short: 0.3,
        eintr: 0.2,
        eagain: 0.2,
        delay: 0.2,
        delay_by: Duration::from_millis(1),
        reorder: true,
        ..Faults::default()
    };
    with(faults, r)
}

/// Flips one bit of the first completions, each of its own read, and never again.
pub struct FlipFirst {
    inner: Box<dyn Reader>,
    left: usize,
    skip: usize,
}

impl Reader for FlipFirst {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn capacity(&self) -> usize {
        self.inner.capacity()
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
    fn submit(&mut self, op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp> {
        self.inner.submit(op, skip)
    }
    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()> {
        let before = out.len();
        let answer = self.inner.reap(min, timeout, out);
        for done in &mut out[before..] {
            if self.skip > 0 {
                self.skip -= 1;
            } else if self.left > 0 && done.result > 0 {
                self.left -= 1;
                // Inside what is wanted: the frame's tail is nobody's.
                let at = done.op.want / 2;
                done.op.frame[at] ^= 0x10;
            }
        }
        answer
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
}

pub fn flip_one(inner: Box<dyn Reader>) -> Box<dyn Reader> {
    Box::new(FlipFirst {
        inner,
        left: 1,
        skip: 6,
    })
}
pub fn flip_all(inner: Box<dyn Reader>) -> Box<dyn Reader> {
    Box::new(FlipFirst {
        inner,
        left: usize::MAX,
        skip: 3,
    })
}

/// EIO for every read of one file, whatever else is in flight.
pub struct BadFile(pub Box<dyn Reader>, pub u32);

impl Reader for BadFile {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn capacity(&self) -> usize {
        self.0.capacity()
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn submit(&mut self, op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp> {
        self.0.submit(op, skip)
    }
    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()> {
        let before = out.len();
        let answer = self.0.reap(min, timeout, out);
        for done in &mut out[before..] {
            if done.op.file == self.1 {
                done.result = -libc::EIO;
            }
        }
        answer
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
}

pub fn file_of(store: &Store, name: &str) -> PathBuf {
    store
        .files
        .iter()
        .map(|f| f.path.clone())
        .find(|p| p.file_name().is_some_and(|n| n == name))
        .unwrap_or_else(|| panic!("no {name}"))
}

pub fn flip_byte(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.sync_all().unwrap();
}

pub fn within<T>(limit: Duration, what: &str, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let out = work();
    let took = started.elapsed();
    assert!(took < limit, "{what} took {took:?}");
    out
}
