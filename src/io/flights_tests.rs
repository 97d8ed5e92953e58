//! Flights over a reader that answers from a script: every answer a kernel may give, exactly when it is wanted.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use super::*;
use crate::io::{Arena, Region};

#[derive(Clone, Copy)]
enum Answer {
    /// That many bytes, or fewer if the frame or the file ends.
    Bytes(usize),
    Errno(i32),
    /// Later: after that many more looks.
    Wait(u32),
    Never,
}

type Log = Arc<Mutex<Vec<(u64, usize)>>>;

/// Reads a file of `length` bytes that exists only as a pattern, one answer an attempt; everything at once when the script is over.
struct Scripted {
    length: u64,
    script: VecDeque<Answer>,
    queue: VecDeque<(ReadOp, usize)>,
    never: Vec<ReadOp>,
    log: Log,
}

fn byte_at(position: u64) -> u8 {
    (position ^ (position >> 8) ^ (position >> 16)) as u8
}

impl Reader for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }
    fn capacity(&self) -> usize {
        4
    }
    fn in_flight(&self) -> usize {
        self.queue.len() + self.never.len()
    }
    fn submit(&mut self, op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp> {
        if self.in_flight() == self.capacity() {
            return Err(op);
        }
        self.log.lock().unwrap().push((op.offset, skip));
        self.queue.push_back((op, skip));
        Ok(())
    }
    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()> {
        if self.queue.is_empty() && min > 0 {
            std::thread::sleep(timeout);
        }
        while let Some((mut op, skip)) = self.queue.pop_front() {
            let result = match self.script.pop_front().unwrap_or(Answer::Bytes(usize::MAX)) {
                Answer::Bytes(most) => {
                    let from = op.offset + skip as u64;
                    let there = self.length.saturating_sub(from) as usize;
                    let count = most.min(there).min(op.frame.len() - skip);
                    for (i, byte) in op.frame[skip..skip + count].iter_mut().enumerate() {
                        *byte = byte_at(from + i as u64);
                    }
                    op.frame[skip + count..].fill(0xee);
                    count as i32
                }
                Answer::Errno(errno) => -errno,
                Answer::Wait(looks) => {
                    if looks > 0 {
                        self.script.push_front(Answer::Wait(looks - 1));
                    }
                    self.queue.push_front((op, skip));
                    return Ok(());
                }
                Answer::Never => {
                    self.never.push(op);
                    continue;
                }
            };
            out.push(RawDone { op, skip, result });
        }
        Ok(())
    }
    fn describe(&self) -> String {
        "scripted".to_string()
    }
}

const LIMIT: Duration = Duration::from_secs(20);

struct Bed {
    flights: Flights,
    region: Region,
    log: Log,
    out: Vec<ReadOp>,
}

fn bed(length: u64, script: &[Answer], stall_limit: Duration) -> Bed {
    let log = Log::default();
    let reader = Scripted {
        length,
        script: script.iter().copied().collect(),
        queue: VecDeque::new(),
        never: Vec::new(),
        log: log.clone(),
    };
    let paths = vec![PathBuf::from("/models/layer.007.dat")];
    Bed {
        flights: Flights::new(Box::new(reader), paths, stall_limit),
        region: Arena::new(1 << 20).unwrap().take(1 << 20).unwrap(),
        log,
        out: Vec::new(),
    }
}

impl Bed {
    fn send(&mut self, offset: u64, len: usize, want: usize) {
        let frame = self.region.lend(len);
        let tag = offset + 1;
        self.flights.submit(ReadOp {
            file: 0,
            offset,
            frame,
            want,
            tag,
        });
    }

    fn finish(&mut self) -> Result<()> {
        while self.flights.in_flight() > 0 {
            self.flights.reap(LIMIT, &mut self.out)?;
        }
        Ok(())
    }

    fn check(&self) {
        for op in &self.out {
            assert_eq!(op.tag, op.offset + 1);
            for (i, &byte) in op.frame[..op.want].iter().enumerate() {
                assert_eq!(byte, byte_at(op.offset + i as u64), "at {i}");
            }
        }
    }

    fn skips(&self) -> Vec<usize> {
        self.log
            .lock()
            .unwrap()
            .iter()
            .map(|entry| entry.1)
            .collect()
    }
}

#[test]
fn short_reads_go_on_at_the_last_boundary() {
    use Answer::Bytes;
    let script = [Bytes(5000), Bytes(4095), Bytes(4097), Bytes(1), Bytes(8192)];
    let mut bed = bed(1 << 20, &script, LIMIT);
    bed.send(8192, 65536, 65536);
    bed.finish().unwrap();
    bed.check();
    // 5000 → 4096; 4096+4095 = 8191 → 4096 again; 4096+4097 = 8193 → 8192; 1 byte is 8193, nothing new; then 16384.
    assert_eq!(bed.skips(), [0, 4096, 4096, 8192, 8192, 16384]);
    assert_eq!((bed.flights.retries(), bed.flights.bytes()), (5, 65536));
}

#[test]
fn a_read_is_over_when_its_wanted_bytes_are_there() {
    // The file ends inside the last page: the kernel says so by a short answer.
    let mut bed = bed(70_000, &[], LIMIT);
    bed.send(65_536, 8192, 4464);
    bed.finish().unwrap();
    bed.check();
    assert_eq!(bed.skips(), [0]);
    // And with the tail in odd pieces.
    let mut bed = super::tests::bed(70_000, &[Answer::Bytes(4100), Answer::Bytes(3)], LIMIT);
    bed.send(65_536, 8192, 4464);
    bed.finish().unwrap();
    bed.check();
    assert_eq!(bed.skips(), [0, 4096, 4096]);
}

#[test]
fn the_end_of_the_file_before_the_wanted_bytes_is_corruption() {
    for (length, ends_at) in [(70_000, 4464), (65_536, 0), (69_632, 4096), (10, 0)] {
        let mut bed = bed(length, &[], LIMIT);
        bed.send(65_536, 8192, 8192);
        let error = bed.finish().unwrap_err();
        assert_eq!(error.code(), Code::Corrupt);
        assert!(
            error
                .what()
                .contains("8192 bytes at offset 65536 of /models/layer.007.dat")
        );
        assert!(error.cause().contains("shorter than recorded"), "{error}");
        assert!(
            error
                .cause()
                .contains(&format!("ends {ends_at} bytes into")),
            "{error}"
        );
        assert_eq!((bed.flights.in_flight(), bed.region.lent()), (0, 0));
    }
}

#[test]
fn interruptions_and_shortages_are_tried_again() {
    use Answer::{Bytes, Errno};
    let script = [
        Errno(libc::EINTR),
        Errno(libc::EAGAIN),
        Bytes(4096),
        Errno(libc::EAGAIN),
        Errno(libc::EINTR),
    ];
    let mut bed = bed(1 << 20, &script, LIMIT);
    bed.send(0, 12288, 12288);
    bed.finish().unwrap();
    bed.check();
    assert_eq!(bed.skips(), [0, 0, 0, 4096, 4096, 4096]);
}

// hazard: eintr-eagain: without end: an error after 64 in a row
#[test]
fn but_not_for_ever() {
    for errno in [libc::EINTR, libc::EAGAIN] {
        let mut bed = bed(1 << 20, &[Answer::Errno(errno); 1000], LIMIT);
        bed.send(0, 4096, 4096);
        let start = Instant::now();
        let error = bed.finish().unwrap_err();
        assert_eq!(error.code(), Code::Io);
        assert!(
            error.cause().contains(errno::name(errno).unwrap()),
            "{error}"
        );
        assert!(error.cause().contains("64 times"), "{error}");
        assert_eq!(bed.skips().len(), 65);
        assert!(start.elapsed() < LIMIT);
    }
}

#[test]
fn real_errors_name_file_offset_length_and_errno() {
    let script = [Answer::Bytes(4096), Answer::Errno(libc::EIO)];
    let mut bed = bed(1 << 20, &script, LIMIT);
    bed.send(0, 4096, 4096);
    bed.send(409_600, 8192, 8192);
    bed.send(4096, 4096, 4096);
    let error = bed.finish().unwrap_err();
    assert_eq!(error.code(), Code::Io);
    assert_eq!(
        error.what(),
        "cannot read 8192 bytes at offset 409600 of /models/layer.007.dat"
    );
    assert_eq!(error.cause(), "EIO: Input/output error (os error 5)");
    assert!(error.fix().contains("dmesg"));
    assert_eq!(bed.flights.failed_tag(), Some(409_601));
    // Its neighbours are handed out, and its memory is back.
    assert_eq!(bed.out.len(), 2);
    bed.check();
    assert_eq!(bed.region.lent(), 2);
    assert_eq!((bed.flights.room(), bed.flights.in_flight()), (4, 0));
}

#[test]
fn silence_is_a_stall_that_names_the_oldest_read() {
    let limit = Duration::from_millis(60);
    let mut bed = bed(1 << 20, &[Answer::Never, Answer::Bytes(4096)], limit);
    bed.send(4096, 4096, 4096);
    bed.send(0, 4096, 4096);
    bed.flights.reap(LIMIT, &mut bed.out).unwrap();
    assert_eq!(bed.out.len(), 1);
    let start = Instant::now();
    let error = bed.flights.reap(LIMIT, &mut bed.out).unwrap_err();
    assert_eq!(error.code(), Code::Stalled);
    assert!(error.what().contains("offset 4096 of"), "{error}");
    assert_eq!(bed.flights.failed_tag(), Some(4097));
    let waited = start.elapsed();
    assert!(waited >= limit / 2 && waited < LIMIT / 2, "{waited:?}");
}

#[test]
fn polling_sees_a_stall_too() {
    let mut bed = bed(1 << 20, &[Answer::Never], Duration::from_millis(30));
    bed.send(0, 4096, 4096);
    let start = Instant::now();
    let error = loop {
        assert!(start.elapsed() < LIMIT, "polled for ever");
        if let Err(error) = bed.flights.reap(Duration::ZERO, &mut bed.out) {
            break error;
        }
    };
    assert_eq!(error.code(), Code::Stalled);
}

#[test]
fn a_caller_who_was_busy_elsewhere_is_not_taken_for_a_stall() {
    let limit = Duration::from_millis(40);
    // Nothing has been shown to the kernel before the first look.
    let mut bed = bed(1 << 20, &[Answer::Wait(0)], limit);
    bed.send(0, 4096, 4096);
    std::thread::sleep(2 * limit);
    bed.flights.reap(Duration::ZERO, &mut bed.out).unwrap();
    // And what completed while nobody looked is found by the look, before the clock is asked.
    std::thread::sleep(2 * limit);
    bed.flights.reap(Duration::ZERO, &mut bed.out).unwrap();
    assert_eq!(bed.out.len(), 1);
    // Likewise for the rest of a short read, sent off by a look that also finished another.
    let mut bed = super::tests::bed(1 << 20, &[Answer::Bytes(4096), Answer::Bytes(4096)], limit);
    bed.send(0, 4096, 4096);
    bed.send(4096, 8192, 8192);
    bed.flights.reap(LIMIT, &mut bed.out).unwrap();
    assert_eq!((bed.out.len(), bed.flights.in_flight()), (1, 1));
    std::thread::sleep(2 * limit);
    bed.finish().unwrap();
    bed.check();
}

#[test]
fn waiting_ends_with_the_time_given() {
    let mut bed = bed(1 << 20, &[Answer::Never], LIMIT);
    bed.send(0, 4096, 4096);
    let start = Instant::now();
    bed.flights
        .reap(Duration::from_millis(20), &mut bed.out)
        .unwrap();
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(19) && waited < LIMIT / 2);
    assert!(bed.flights.busy() >= Duration::from_millis(19));
    assert_eq!(bed.flights.in_flight(), 1);
}

#[test]
fn an_idle_queue_is_not_busy_and_does_not_wait() {
    let mut bed = bed(1 << 20, &[], LIMIT);
    let start = Instant::now();
    bed.flights.reap(LIMIT, &mut bed.out).unwrap();
    bed.send(0, 4096, 4096);
    bed.finish().unwrap();
    let busy = bed.flights.busy();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(bed.flights.busy(), busy);
    assert!(start.elapsed() < LIMIT / 2);
}

#[test]
fn reads_that_are_not_laid_out_right_are_bugs() {
    let submit = |offset: u64, len: usize, want: usize, file: u32| {
        let mut bed = bed(1 << 20, &[], LIMIT);
        catch_unwind(AssertUnwindSafe(|| {
            let frame = bed.region.lend(len);
            let tag = 0;
            bed.flights.submit(ReadOp {
                file,
                offset,
                frame,
                want,
                tag,
            });
        }))
        .is_ok()
    };
    assert!(submit(4096, 4096, 1, 0));
    assert!(!submit(512, 4096, 1, 0), "offset");
    assert!(!submit(0, 4096, 4097, 0), "want");
    assert!(!submit(0, 0, 0, 0), "empty");
    assert!(!submit(0, 4096, 1, 1), "no such file");
    let mut full = bed(1 << 20, &[], LIMIT);
    for page in 0..4 {
        full.send(page * 4096, 4096, 4096);
    }
    assert_eq!(full.flights.room(), 0);
    assert!(catch_unwind(AssertUnwindSafe(|| full.send(0, 4096, 4096))).is_err());
}
