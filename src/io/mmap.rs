//! The baseline people know: files mapped into memory, windows of them copied into the frame and dropped again.
//!
//! Nothing is read ahead and nothing overlaps: a page fault blocks the thread that reaps. It is there to be compared with, is never
//! chosen by itself, counts its mapped pages in the process's resident set, and dies of SIGBUS when a mapped file is truncated.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use memmap2::{Mmap, MmapOptions, UncheckedAdvice};

use super::{OpenFile, RawDone, ReadOp, Reader};
use crate::error::{Error, Result};
use crate::units::{ALIGN_BYTES, align_down};

pub(super) struct MmapReader {
    /// `None` for an empty file, which cannot be mapped.
    maps: Vec<Option<Mmap>>,
    queue: VecDeque<(ReadOp, usize)>,
    depth: usize,
}

impl MmapReader {
    pub(super) fn new(files: Vec<OpenFile>, depth: usize) -> Result<MmapReader> {
        let mut maps = Vec::with_capacity(files.len());
        for file in &files {
            maps.push(match file.bytes {
                0 => None,
                _ => Some(map(file)?),
            });
        }
        Ok(MmapReader {
            maps,
            queue: VecDeque::with_capacity(depth),
            depth,
        })
    }

    /// Copies one window and lets its pages go. Bytes copied, or the negative errno.
    fn copy(&self, op: &mut ReadOp, skip: usize) -> i32 {
        let Some(map) = self.maps.get(op.file as usize) else {
            return -libc::EBADF;
        };
        let len = map.as_ref().map_or(0, |map| map.len() as u64);
        let start = op.offset.saturating_add(skip as u64).min(len);
        let Some(map) = map.as_ref().filter(|_| start < len) else {
            return 0;
        };
        let into = &mut op.frame[skip..];
        let start = start as usize;
        let count = into.len().min(map.len() - start).min(i32::MAX as usize);
        into[..count].copy_from_slice(&map[start..start + count]);
        let from = align_down(start as u64, ALIGN_BYTES) as usize;
        // SAFETY: the mapping is read-only and shared with a file: dropped pages are read from it again, nothing is lost. No slice
        // of it outlives this function.
        let _ = unsafe {
            map.unchecked_advise_range(UncheckedAdvice::DontNeed, from, start + count - from)
        };
        count as i32
    }
}

fn map(file: &OpenFile) -> Result<Mmap> {
    // SAFETY: a mapped file must not shrink or change under its reader. Nobody can promise that of a file; this reader is the
    // measured baseline, exempt by design, and its documentation says what happens then (SIGBUS, or other bytes, which the checksums see).
    unsafe { MmapOptions::new().map(file.file()) }
        .map_err(|error| Error::io(format!("cannot map {}", file.path.display()), &error))
}

impl Reader for MmapReader {
    fn name(&self) -> &'static str {
        "mmap"
    }

    fn capacity(&self) -> usize {
        self.depth
    }

    fn in_flight(&self) -> usize {
        self.queue.len()
    }

    fn submit(&mut self, op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp> {
        if self.queue.len() == self.depth {
            return Err(op);
        }
        self.queue.push_back((op, skip));
        Ok(())
    }

    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()> {
        let start = Instant::now();
        let mut copied = 0;
        // At least one even when nobody waits: there is no one else who would do the copying.
        while let Some((mut op, skip)) = self.queue.pop_front() {
            let result = self.copy(&mut op, skip);
            out.push(RawDone { op, skip, result });
            copied += 1;
            if copied >= min || start.elapsed() >= timeout {
                break;
            }
        }
        Ok(())
    }

    fn describe(&self) -> String {
        "mmap: page faults on the reaping thread, windows copied and dropped".to_string()
    }
}

/// Switches read-ahead off for a file read without O_DIRECT: reads are large already, and what is read ahead twice evicts what is needed.
pub(super) fn advise_random(file: &File) {
    advise(file, libc::POSIX_FADV_RANDOM);
}

/// Drops the file's clean pages from the page cache, so that a measurement meets the disk.
pub(super) fn drop_cache(file: &File) {
    advise(file, libc::POSIX_FADV_DONTNEED);
}

fn advise(file: &File, advice: i32) {
    // SAFETY: plain integers and a descriptor that `file` keeps open. Advice may be refused; nothing depends on it.
    let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
}
