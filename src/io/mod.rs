//! Bytes from disk into host memory.
//!
//! [`Arena`] owns the memory, [`OpenFile`] the source, a [`Reader`] moves bytes between them, and [`Flights`] makes a reader
//! dependable: retries, resumed short reads, time limits, worded errors. A read in flight owns its [`Frame`], so memory the kernel may
//! still write to cannot be looked at, lent again or freed.

mod arena;
/// Names of error numbers.
pub mod errno;
mod fault;
mod file;
mod flights;
mod heap;
mod mmap;
mod probe;
mod threads;
mod uring;

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

pub use arena::{Arena, Frame, Region, SEGMENT_BYTES, Segment};
pub use fault::{FaultReader, Faults};
pub use file::OpenFile;
pub use flights::Flights;
pub use heap::give_back;
pub use probe::{IoRow, Sweep, sweep};

use crate::error::{Code, Error, Result};

/// Most reads a queue may hold: more has never filled a drive better, and the kernel bounds its rings.
pub const MAX_QUEUE_DEPTH: usize = 4096;

/// One read: `frame.len()` bytes at `offset` of a file, all multiples of 4096.
pub struct ReadOp {
    /// Index into the files the reader was opened with.
    pub file: u32,
    /// From the start of the file, a multiple of 4096.
    pub offset: u64,
    /// Where the bytes go; its length is what is asked for.
    pub frame: Frame,
    /// Bytes that must arrive, at most `frame.len()`; less only at the end of a file.
    pub want: usize,
    /// The caller's own mark, given back untouched.
    pub tag: u64,
}

/// One attempt at a read, as the kernel answered it.
pub struct RawDone {
    pub op: ReadOp,
    /// Bytes at the front of the frame that this attempt left alone.
    pub skip: usize,
    /// Bytes read behind `skip`, or the negative errno.
    pub result: i32,
}

/// Something that reads into frames, many at once, in any order of completion. It answers what the kernel answers: short reads and
/// errors are passed on untouched ([`Flights`] deals with them).
///
/// Dropping a reader waits, within a limit, for the reads in flight; frames still being written to after that are never freed.
pub trait Reader: Send {
    /// `io_uring`, `threads` or `mmap`.
    fn name(&self) -> &'static str;
    /// Most reads in flight: the queue depth.
    fn capacity(&self) -> usize;
    /// Reads taken and not yet reaped.
    fn in_flight(&self) -> usize;
    /// Takes the read; gives it back when the queue is full. `skip` bytes at the front of the frame are there already (a short read
    /// being resumed; a multiple of 4096 below the frame's length). Nothing may start before the next [`Reader::reap`].
    fn submit(&mut self, op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp>;
    /// Starts what was submitted and waits until `min` reads have completed (or all, if fewer are in flight) or the time is over, then
    /// appends every completion at hand to `out`: never more than were in flight, so room for `capacity()` suffices.
    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()>;
    /// How it was set up, in one line: flags got, buffers registered or why not.
    fn describe(&self) -> String;
    /// The time by which whoever waits for this reader counts. A disk that is only simulated has a clock of its own.
    fn now(&self) -> Instant {
        Instant::now()
    }
    /// Lets that much of it pass with nothing in flight.
    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

impl<R: Reader + ?Sized> Reader for Box<R> {
    fn name(&self) -> &'static str {
        (**self).name()
    }
    fn capacity(&self) -> usize {
        (**self).capacity()
    }
    fn in_flight(&self) -> usize {
        (**self).in_flight()
    }
    fn submit(&mut self, op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp> {
        (**self).submit(op, skip)
    }
    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()> {
        (**self).reap(min, timeout, out)
    }
    fn describe(&self) -> String {
        (**self).describe()
    }
    fn now(&self) -> Instant {
        (**self).now()
    }
    fn pause(&mut self, time: Duration) {
        (**self).pause(time)
    }
}

/// What `--io` chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReaderKind {
    /// io_uring, and threads where the system refuses it.
    Auto,
    IoUring,
    Threads,
    /// The baseline people know; never chosen by `Auto`.
    Mmap,
}

impl ReaderKind {
    pub const ALL: [ReaderKind; 4] = [
        ReaderKind::Auto,
        ReaderKind::IoUring,
        ReaderKind::Threads,
        ReaderKind::Mmap,
    ];

    /// As `--io` and reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            ReaderKind::Auto => "auto",
            ReaderKind::IoUring => "io_uring",
            ReaderKind::Threads => "threads",
            ReaderKind::Mmap => "mmap",
        }
    }

    pub fn parse(text: &str) -> Result<ReaderKind> {
        ReaderKind::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| {
                Error::new(
                    Code::Usage,
                    format!("`{text}` is not a reader"),
                    "the readers are auto, io_uring, threads and mmap",
                    "give --io auto, or one of those",
                )
            })
    }
}

impl fmt::Display for ReaderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Opens a reader over `files` (read by their index) for frames of `arena`, with up to `depth` reads in flight (1 to
/// [`MAX_QUEUE_DEPTH`], clamped). To be called on the thread that will use it: the kernel binds a ring to its thread.
///
/// Errors: [`Code::Unsupported`] when io_uring was asked for by name and the system refuses it; [`Code::Io`] when threads cannot be
/// started or a file cannot be mapped.
pub fn open_reader(
    kind: ReaderKind,
    files: Vec<OpenFile>,
    arena: &Arena,
    depth: usize,
) -> Result<Box<dyn Reader>> {
    let depth = depth.clamp(1, MAX_QUEUE_DEPTH);
    Ok(match kind {
        ReaderKind::Mmap => Box::new(mmap::MmapReader::new(files, depth)?),
        ReaderKind::Threads => Box::new(threads::ThreadsReader::new(files, depth, None)?),
        ReaderKind::IoUring => match uring::UringReader::new(files, arena, depth) {
            Ok(reader) => Box::new(reader),
            Err(refusal) => return Err(refusal.into_error()),
        },
        ReaderKind::Auto => match uring::UringReader::new(files, arena, depth) {
            Ok(reader) => Box::new(reader),
            Err(refusal) => Box::new(threads::ThreadsReader::new(
                refusal.files,
                depth,
                Some(refusal.reason),
            )?),
        },
    })
}

/// Drops the file's pages from the page cache, so that a measurement through it meets the disk. Pages not yet written back stay.
pub fn drop_page_cache(path: &Path) -> Result<()> {
    mmap::drop_cache(OpenFile::open(path, false)?.file());
    Ok(())
}

/// `O_DIRECT on 3 of 4 files`: part of each reader's description.
fn describe_files(files: &[OpenFile]) -> String {
    let direct = files.iter().filter(|file| file.direct()).count();
    match direct {
        _ if direct == files.len() => "O_DIRECT".to_string(),
        0 => "buffered (O_DIRECT refused or not asked for)".to_string(),
        _ => format!("O_DIRECT on {direct} of {} files", files.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_parse_by_name() {
        for kind in ReaderKind::ALL {
            assert_eq!(ReaderKind::parse(kind.name()).unwrap(), kind);
        }
        assert_eq!(ReaderKind::parse("uring").unwrap_err().code(), Code::Usage);
    }
}
