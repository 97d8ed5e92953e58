//! What stands between a reader, which says what the kernel says, and a caller who wants bytes: retries, resumed short reads, time
//! limits and errors with a name and an address.
//!
//! A read is over when its wanted bytes are there, whatever lies behind them. A short one goes on at its last 4096 boundary, because
//! O_DIRECT refuses to start anywhere else.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::{RawDone, ReadOp, Reader, errno, file};
use crate::error::{Code, Error, Result};
use crate::planted::{self, Bug};
use crate::units::{ALIGN_BYTES, align_down};

/// Attempts in a row that may bring nothing new before a short read counts as the end of the file. A resumed read near the end of
/// a truncated file brings the same tail again and again, never 0, so the end shows only in this.
const IDLE_LIMIT: u32 = 8;
/// EINTR and EAGAIN in a row, per read. With the pauses below, about three seconds.
const RETRY_LIMIT: u32 = 64;
/// EAGAIN means the kernel lacks something: asking again at once would not help. Doubles up to the longest pause.
const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// A read the caller waits for, on its way through one or several attempts.
#[derive(Clone, Copy)]
struct Flight {
    tag: u64,
    file: u32,
    offset: u64,
    want: usize,
    /// Most bytes at the front of the frame known to have arrived.
    have: usize,
    idle: u32,
    retries: u32,
    since: Instant,
}

struct Parked {
    op: ReadOp,
    skip: usize,
    due: Instant,
}

/// How one attempt ended.
enum Landing {
    Finished,
    Again { skip: usize, pause: Duration },
    Failed(Error),
}

/// Reads through any [`Reader`], finished or failed for good. Nothing is allocated per read.
///
/// Dropping it drops the reader, which waits for the reads in flight.
pub struct Flights {
    reader: Box<dyn Reader>,
    paths: Vec<PathBuf>,
    stall_limit: Duration,
    /// By slot; the slot's number travels as the tag of the read.
    flights: Vec<Option<Flight>>,
    free: Vec<u32>,
    /// Reads waiting for their next attempt: they keep their place in the queue.
    parked: Vec<Parked>,
    raw: Vec<RawDone>,
    /// When the reader last completed, or was first asked for, anything.
    progress: Instant,
    /// Something was given to the reader since the last look: the kernel has not seen it yet, so its clock must not run.
    started: bool,
    busy_since: Option<Instant>,
    busy: Duration,
    bytes: u64,
    retries: u64,
    failed_tag: Option<u64>,
}

impl Flights {
    /// How long a reader may do nothing before it counts as stalled.
    pub const DEFAULT_STALL_LIMIT: Duration = Duration::from_secs(30);

    /// `paths` name the reader's files in errors, by index.
    pub fn new(reader: Box<dyn Reader>, paths: Vec<PathBuf>, stall_limit: Duration) -> Flights {
        let depth = reader.capacity();
        let now = reader.now();
        Flights {
            reader,
            paths,
            stall_limit,
            flights: vec![None; depth],
            free: (0..depth as u32).rev().collect(),
            parked: Vec::with_capacity(depth),
            raw: Vec::with_capacity(depth),
            progress: now,
            started: false,
            busy_since: None,
            busy: Duration::ZERO,
            bytes: 0,
            retries: 0,
            failed_tag: None,
        }
    }

    /// Reads that may be submitted now.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Reads submitted and not yet handed back.
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Queue depth.
    pub fn capacity(&self) -> usize {
        self.flights.len()
    }

    /// Takes a read; it starts with the next [`Flights::reap`] (with no time to wait, if there is other work to do).
    ///
    /// # Panics
    /// Without room, or when the read is not laid out as [`ReadOp`] says: both are bugs of the caller.
    pub fn submit(&mut self, mut op: ReadOp) {
        let align = ALIGN_BYTES as usize;
        assert!(
            op.offset.is_multiple_of(ALIGN_BYTES)
                && op.frame.len().is_multiple_of(align)
                && op.want <= op.frame.len()
                && !op.frame.is_empty(),
            "a read of {} of {} bytes at {} is not aligned",
            op.want,
            op.frame.len(),
            op.offset
        );
        assert!((op.file as usize) < self.paths.len(), "a read of no file");
        let slot = self
            .free
            .pop()
            .expect("a read was submitted to a full queue");
        let now = self.reader.now();
        if self.busy_since.is_none() {
            self.busy_since = Some(now);
        }
        self.flights[slot as usize] = Some(Flight {
            tag: op.tag,
            file: op.file,
            offset: op.offset,
            want: op.want,
            have: 0,
            idle: 0,
            retries: 0,
            since: now,
        });
        op.tag = u64::from(slot);
        self.start(op, 0);
    }

    /// Starts what was submitted and appends finished reads to `out` (reserve [`Flights::capacity`]). Waits up to `wait` for the
    /// first of them while anything is in flight; `Duration::ZERO` only looks.
    ///
    /// Errors: a read that failed for good is gone, its frame given back and its tag kept in [`Flights::failed_tag`]; the others go on,
    /// and finished ones are in `out` even then. [`Code::Io`] with path, offset, length and errno; [`Code::Corrupt`] when the
    /// file ends before the wanted bytes; [`Code::Stalled`] when nothing at all completed within the stall limit.
    pub fn reap(&mut self, wait: Duration, out: &mut Vec<ReadOp>) -> Result<()> {
        let begin = self.reader.now();
        let before = out.len();
        loop {
            let wake = self.unpark();
            let left = wait.saturating_sub(self.since(begin));
            let limit = match self.started {
                true => self.stall_limit,
                false => self.stall_left(),
            };
            let pause = left.min(wake).min(limit);
            let min = usize::from(!left.is_zero());
            self.look(min, pause)?;
            let failure = self.land_all(out);
            self.count_time();
            if let Some(error) = failure {
                return Err(error);
            }
            if out.len() > before || self.in_flight() == 0 {
                return Ok(());
            }
            if self.stall_left().is_zero() {
                return Err(self.stalled());
            }
            if self.since(begin) >= wait {
                return Ok(());
            }
        }
    }

    /// Time with at least one read outstanding, as this thread saw it.
    pub fn busy(&self) -> Duration {
        self.busy
            + self
                .busy_since
                .map_or(Duration::ZERO, |since| self.since(since))
    }

    /// Bytes of finished reads, as they arrived (a frame's tail past the wanted bytes included).
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Attempts beyond the first: resumed short reads, EINTR, EAGAIN.
    pub fn retries(&self) -> u64 {
        self.retries
    }

    /// The tag of the read the last error was about, for a caller who knows what it was for.
    pub fn failed_tag(&self) -> Option<u64> {
        self.failed_tag
    }

    /// The reader's name.
    pub fn name(&self) -> &'static str {
        self.reader.name()
    }

    /// The reader's description.
    pub fn describe(&self) -> String {
        self.reader.describe()
    }

    /// Sends back to the reader what is due. The time until the next parked read is due.
    fn unpark(&mut self) -> Duration {
        let mut wake = Duration::MAX;
        if self.parked.is_empty() {
            return wake;
        }
        let now = self.reader.now();
        let mut at = 0;
        while at < self.parked.len() {
            let due = self.parked[at].due;
            if due <= now {
                let parked = self.parked.swap_remove(at);
                self.start(parked.op, parked.skip);
            } else {
                wake = wake.min(due - now);
                at += 1;
            }
        }
        wake
    }

    fn start(&mut self, op: ReadOp, skip: usize) {
        self.started = true;
        // Every flight has its place: at most `capacity` of them, each in the reader at most once. A reader that refuses all the
        // same is asked again later.
        if let Err(op) = self.reader.submit(op, skip) {
            let due = self.reader.now() + FIRST_PAUSE;
            self.parked.push(Parked { op, skip, due });
        }
    }

    /// One look at the reader, which fills `raw`.
    fn look(&mut self, min: usize, timeout: Duration) -> Result<()> {
        if self.reader.in_flight() == 0 {
            if min > 0 && !self.parked.is_empty() {
                self.reader.pause(timeout.min(LONGEST_PAUSE));
            }
        } else {
            self.reader.reap(min, timeout, &mut self.raw)?;
        }
        if self.started || !self.raw.is_empty() {
            self.progress = self.reader.now();
            self.started = false;
        }
        Ok(())
    }

    /// Deals with all of `raw`; the first error.
    fn land_all(&mut self, out: &mut Vec<ReadOp>) -> Option<Error> {
        let mut failure = None;
        let mut raw = std::mem::take(&mut self.raw);
        for done in raw.drain(..) {
            let RawDone {
                mut op,
                skip,
                result,
            } = done;
            let slot = op.tag as usize;
            let Some(mut flight) = self.flights.get(slot).copied().flatten() else {
                failure = failure.or(Some(Error::internal("a read completed twice")));
                continue;
            };
            op.tag = flight.tag;
            match self.land(&mut flight, &op, skip, result) {
                Landing::Again { skip, pause } => {
                    self.retries += 1;
                    self.flights[slot] = Some(flight);
                    op.tag = slot as u64;
                    match pause.is_zero() {
                        true => self.start(op, skip),
                        false => self.parked.push(Parked {
                            op,
                            skip,
                            due: self.reader.now() + pause,
                        }),
                    }
                    continue;
                }
                Landing::Finished => {
                    self.bytes += flight.have as u64;
                    out.push(op);
                }
                Landing::Failed(error) => {
                    if failure.is_none() {
                        self.failed_tag = Some(flight.tag);
                        failure = Some(error);
                    }
                }
            }
            self.flights[slot] = None;
            self.free.push(slot as u32);
        }
        self.raw = raw;
        failure
    }

    fn land(&self, flight: &mut Flight, op: &ReadOp, skip: usize, result: i32) -> Landing {
        let Ok(count) = usize::try_from(result) else {
            return self.land_error(flight, op, skip, -result);
        };
        flight.retries = 0;
        let have = match planted::is(Bug::ShortReadIgnored) {
            true => op.frame.len(),
            false => (skip + count).min(op.frame.len()),
        };
        if have > flight.have {
            flight.have = have;
            flight.idle = 0;
        } else {
            flight.idle += 1;
        }
        if flight.have >= flight.want {
            return Landing::Finished;
        }
        if flight.idle >= IDLE_LIMIT {
            if planted::is(Bug::EndOfFileIgnored) {
                return Landing::Finished;
            }
            return Landing::Failed(self.too_short(flight));
        }
        Landing::Again {
            skip: align_down(flight.have as u64, ALIGN_BYTES) as usize,
            pause: Duration::ZERO,
        }
    }

    fn land_error(&self, flight: &mut Flight, op: &ReadOp, skip: usize, errno: i32) -> Landing {
        let passing = matches!(errno, libc::EINTR | libc::EAGAIN);
        if passing && flight.retries < RETRY_LIMIT {
            let pause = match errno {
                libc::EINTR => Duration::ZERO,
                _ => (FIRST_PAUSE * (1 << flight.retries.min(16))).min(LONGEST_PAUSE),
            };
            flight.retries += 1;
            return Landing::Again { skip, pause };
        }
        if errno == libc::EIO && planted::is(Bug::EioSwallowed) {
            return Landing::Finished;
        }
        let system = std::io::Error::from_raw_os_error(errno);
        let mut cause = errno::describe(errno);
        if passing {
            cause += &format!(", {RETRY_LIMIT} times in a row");
        }
        let what = format!("cannot read {}", self.place(flight, op.frame.len() as u64));
        let fix = Error::io("", &system).fix().to_string();
        Landing::Failed(Error::new(Code::Io, what, cause, fix))
    }

    fn too_short(&self, flight: &Flight) -> Error {
        let path = &self.paths[flight.file as usize];
        Error::new(
            Code::Corrupt,
            format!("cannot read {}", self.place(flight, flight.want as u64)),
            format!(
                "file shorter than recorded: it ends {} bytes into this read{}",
                flight.have,
                file::length_now(path)
            ),
            "the file was truncated or replaced: download it again, or pack again",
        )
    }

    fn stalled(&mut self) -> Error {
        let oldest = self.flights.iter().flatten().min_by_key(|f| f.since);
        let Some(flight) = oldest.copied() else {
            return Error::internal("stalled with nothing in flight");
        };
        self.failed_tag = Some(flight.tag);
        Error::new(
            Code::Stalled,
            format!("cannot read {}", self.place(&flight, flight.want as u64)),
            format!(
                "no read completed for {:.1} s ({} in flight, this one for {:.1} s)",
                self.stall_limit.as_secs_f64(),
                self.in_flight(),
                self.since(flight.since).as_secs_f64()
            ),
            "check the drive or network share behind it (dmesg), or try --io threads",
        )
    }

    fn place(&self, flight: &Flight, bytes: u64) -> String {
        let path = self.paths[flight.file as usize].display();
        format!("{bytes} bytes at offset {} of {path}", flight.offset)
    }

    /// Time gone by since then, as the reader counts it.
    fn since(&self, then: Instant) -> Duration {
        self.reader.now().saturating_duration_since(then)
    }

    /// What is left of the stall limit.
    fn stall_left(&self) -> Duration {
        self.stall_limit.saturating_sub(self.since(self.progress))
    }

    fn count_time(&mut self) {
        if self.in_flight() == 0
            && let Some(since) = self.busy_since.take()
        {
            self.busy += self.since(since);
        }
    }
}

#[cfg(test)]
#[path = "flights_tests.rs"]
mod tests;
