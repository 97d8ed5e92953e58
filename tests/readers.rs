//! One conformance suite for every reader, bare and with every fault injected: what is handed out is what the file holds, or there is
//! an error that says what happened.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tensorpager::error::{Code, Error, Result};
use tensorpager::io::{
    Arena, FaultReader, Faults, Flights, OpenFile, ReadOp, Reader, ReaderKind, Region, open_reader,
};
use tensorpager::units::{ALIGN_BYTES, align_up};

const KINDS: [ReaderKind; 3] = [ReaderKind::IoUring, ReaderKind::Threads, ReaderKind::Mmap];
const PATIENCE: Duration = Duration::from_secs(20);

/// Files on a disk (the system's temporary directory may be memory).
fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn content(bytes: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

fn file(dir: &Path, name: &str, bytes: usize) -> (PathBuf, Vec<u8>) {
    let path = dir.join(name);
    let content = content(bytes, bytes as u64);
    std::fs::write(&path, &content).unwrap();
    (path, content)
}

/// `None`, with the reason printed, where the system has no io_uring.
fn reader(
    kind: ReaderKind,
    paths: &[PathBuf],
    arena: &Arena,
    depth: usize,
) -> Option<Box<dyn Reader>> {
    let files = paths
        .iter()
        .map(|p| OpenFile::open(p, true).unwrap())
        .collect();
    match open_reader(kind, files, arena, depth) {
        Ok(reader) => Some(reader),
        Err(error) if error.code() == Code::Unsupported => {
            println!("skipped {kind}: {}", error.cause());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// One reader over some files, a region that can hold what is read, and the reads.
struct Bed {
    flights: Flights,
    region: Region,
    out: Vec<ReadOp>,
    order: Vec<u64>,
}

impl Bed {
    fn new(
        kind: ReaderKind,
        faults: Option<Faults>,
        paths: &[PathBuf],
        room: u64,
        depth: usize,
    ) -> Option<Bed> {
        Bed::with_limit(kind, faults, paths, room, depth, PATIENCE)
    }

    fn with_limit(
        kind: ReaderKind,
        faults: Option<Faults>,
        paths: &[PathBuf],
        room: u64,
        depth: usize,
        limit: Duration,
    ) -> Option<Bed> {
        let arena = Arena::new(room).unwrap();
        let region = arena.take(room).unwrap();
        let bare = reader(kind, paths, &arena, depth)?;
        let reader: Box<dyn Reader> = match faults {
            Some(faults) => Box::new(FaultReader::new(bare, faults)),
            None => bare,
        };
        Some(Bed {
            flights: Flights::new(reader, paths.to_vec(), limit),
            region,
            out: Vec::with_capacity(depth),
            order: Vec::new(),
        })
    }

    fn send(&mut self, file: u32, offset: u64, len: usize, want: usize, tag: u64) {
        let frame = self.region.lend(len);
        self.flights.submit(ReadOp {
            file,
            offset,
            frame,
            want,
            tag,
        });
    }

    fn reap(&mut self) -> Result<()> {
        self.flights.reap(PATIENCE, &mut self.out)?;
        self.order.extend(self.out.drain(..).map(|op| op.tag));
        Ok(())
    }

    /// Reads `bytes` of file 0 into the front of the region, block by block, the queue kept full.
    fn read_file(&mut self, bytes: usize, block: usize) -> Result<()> {
        let mut offset = 0;
        let mut tag = 0;
        while offset < bytes || self.flights.in_flight() > 0 {
            while offset < bytes && self.flights.room() > 0 {
                let want = block.min(bytes - offset);
                let len = align_up(want as u64, ALIGN_BYTES) as usize;
                self.send(0, offset as u64, len, want, tag);
                offset += want;
                tag += 1;
            }
            self.reap()?;
        }
        Ok(())
    }
}

fn none() -> Faults {
    Faults::default()
}

/// Everything a reader must get over by itself.
fn passing_faults() -> Vec<(&'static str, Option<Faults>)> {
    let delay_by = Duration::from_millis(2);
    vec![
        ("bare", None),
        ("none", Some(none())),
        (
            "short",
            Some(Faults {
                seed: 1,
                short: 0.4,
                ..none()
            }),
        ),
        (
            "EINTR",
            Some(Faults {
                seed: 2,
                eintr: 0.4,
                ..none()
            }),
        ),
        (
            "EAGAIN",
            Some(Faults {
                seed: 3,
                eagain: 0.2,
                ..none()
            }),
        ),
        (
            "delay",
            Some(Faults {
                seed: 4,
                delay: 0.1,
                delay_by,
                ..none()
            }),
        ),
        (
            "reorder",
            Some(Faults {
                seed: 5,
                reorder: true,
                ..none()
            }),
        ),
        (
            "all",
            Some(Faults {
                seed: 6,
                short: 0.3,
                eintr: 0.1,
                eagain: 0.1,
                delay: 0.05,
                delay_by,
                reorder: true,
                ..none()
            }),
        ),
    ]
}

#[test]
fn every_reader_delivers_every_byte_whatever_happens_on_the_way() {
    let dir = disk();
    // No multiple of 4096, nor of any block.
    let (path, content) = file(dir.path(), "weights", (1 << 20) + 12_345);
    for kind in KINDS {
        for (name, faults) in passing_faults() {
            for (block, depth) in [(4096, 1), (4096, 32), (65_536, 3), (1 << 19, 16)] {
                let room = content.len() as u64 + ALIGN_BYTES;
                let Some(mut bed) =
                    Bed::new(kind, faults, std::slice::from_ref(&path), room, depth)
                else {
                    continue;
                };
                bed.read_file(content.len(), block)
                    .unwrap_or_else(|e| panic!("{kind} {name}: {e}"));
                assert!(
                    bed.region.bytes()[..content.len()] == content[..],
                    "{kind} {name} {block} x {depth}"
                );
                let retried = bed.flights.retries() > 0;
                if ["short", "EINTR", "EAGAIN", "all"].contains(&name) && block == 4096 {
                    assert!(retried, "{kind} {name}: no fault was injected");
                }
                assert_eq!(bed.flights.bytes(), content.len() as u64, "{kind} {name}");
                assert!(bed.flights.busy() > Duration::ZERO);
            }
        }
    }
}

#[test]
fn the_end_of_a_file_is_no_error_once_the_wanted_bytes_are_there() {
    let dir = disk();
    for bytes in [1, 4095, 4096, 4097, 70_000] {
        let (path, content) = file(dir.path(), "weights", bytes);
        for kind in KINDS {
            let faults = Some(Faults {
                seed: 7,
                short: 0.5,
                ..none()
            });
            for faults in [None, faults] {
                let Some(mut bed) = Bed::new(kind, faults, std::slice::from_ref(&path), 1 << 18, 2)
                else {
                    continue;
                };
                // The frame reaches far past the end.
                bed.send(0, 0, 1 << 18, bytes, 0);
                bed.reap().unwrap();
                assert!(
                    bed.region.bytes()[..bytes] == content[..],
                    "{kind}, {bytes} bytes"
                );
            }
        }
    }
}

#[test]
fn a_file_that_ends_too_early_is_corrupt() {
    let dir = disk();
    let (path, _) = file(dir.path(), "weights", 1 << 20);
    for kind in KINDS {
        for end in [0, 1, 4096, 40_000, 65_535] {
            let faults = Faults {
                seed: 8,
                end_at: Some(65_536 + end),
                ..none()
            };
            let Some(mut bed) =
                Bed::new(kind, Some(faults), std::slice::from_ref(&path), 1 << 20, 4)
            else {
                continue;
            };
            bed.send(0, 65_536, 65_536, 65_536, 0);
            let error = bed.reap().unwrap_err();
            assert_eq!(error.code(), Code::Corrupt, "{kind}");
            assert!(
                error.cause().contains(&format!("ends {end} bytes into")),
                "{kind}: {error}"
            );
        }
    }
}

#[test]
fn a_file_truncated_under_the_reader_is_corrupt() {
    let dir = disk();
    // A mapped file that shrinks kills the process: mmap is exempt, and the baseline only.
    for kind in [ReaderKind::IoUring, ReaderKind::Threads] {
        for left in [0, 4096, 10_000] {
            let (path, _) = file(dir.path(), "weights", 1 << 20);
            let Some(mut bed) = Bed::new(kind, None, std::slice::from_ref(&path), 1 << 20, 4)
            else {
                continue;
            };
            std::fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(left)
                .unwrap();
            bed.send(0, 0, 1 << 20, 1 << 20, 0);
            let error = bed.reap().unwrap_err();
            assert_eq!(error.code(), Code::Corrupt, "{kind}");
            assert!(error.what().contains("weights"), "{error}");
            assert!(
                error.cause().contains(&format!("{left} bytes now")),
                "{error}"
            );
            assert_eq!(bed.region.lent(), 0);
        }
    }
}

#[test]
fn a_bad_sector_is_named() {
    let dir = disk();
    let (path, _) = file(dir.path(), "weights", 1 << 20);
    for kind in KINDS {
        let faults = Faults { eio: 1.0, ..none() };
        let Some(mut bed) = Bed::new(kind, Some(faults), std::slice::from_ref(&path), 1 << 20, 4)
        else {
            continue;
        };
        bed.send(0, 8192, 65_536, 65_536, 42);
        let error = bed.reap().unwrap_err();
        assert_eq!(error.code(), Code::Io);
        for part in ["weights", "offset 8192", "65536 bytes"] {
            assert!(error.what().contains(part), "{kind}: {error}");
        }
        assert!(error.cause().starts_with("EIO"), "{error}");
        assert_eq!(bed.flights.failed_tag(), Some(42));
    }
}

#[test]
fn a_flipped_bit_passes_and_is_exactly_one() {
    let dir = disk();
    let (path, content) = file(dir.path(), "weights", 65_536);
    for kind in KINDS {
        let faults = Faults {
            seed: 9,
            flip: 1.0,
            ..none()
        };
        let Some(mut bed) = Bed::new(kind, Some(faults), std::slice::from_ref(&path), 65_536, 4)
        else {
            continue;
        };
        bed.read_file(65_536, 65_536).unwrap();
        let flipped: u32 = bed
            .region
            .bytes()
            .iter()
            .zip(&content)
            .map(|(a, b)| (a ^ b).count_ones())
            .sum();
        assert_eq!(flipped, 1, "{kind}: checksums are for this");
    }
}

#[test]
fn a_read_that_never_completes_is_a_stall() {
    let dir = disk();
    let (path, _) = file(dir.path(), "weights", 65_536);
    for kind in KINDS {
        let faults = Faults {
            lose: 1.0,
            ..none()
        };
        let limit = Duration::from_millis(100);
        let paths = std::slice::from_ref(&path);
        let Some(mut bed) = Bed::with_limit(kind, Some(faults), paths, 65_536, 4, limit) else {
            continue;
        };
        let start = Instant::now();
        let error = bed.read_file(65_536, 16_384).unwrap_err();
        assert_eq!(error.code(), Code::Stalled, "{kind}");
        assert!(error.what().contains("offset 0 of"), "{error}");
        assert!(error.cause().contains("4 in flight"), "{error}");
        assert!(
            start.elapsed() < PATIENCE / 2,
            "{kind}: {:?}",
            start.elapsed()
        );
    }
}

#[test]
fn completions_may_come_in_any_order() {
    let dir = disk();
    let (path, content) = file(dir.path(), "weights", 64 * 4096);
    for kind in KINDS {
        let faults = Faults {
            seed: 10,
            reorder: true,
            ..none()
        };
        let Some(mut bed) = Bed::new(
            kind,
            Some(faults),
            std::slice::from_ref(&path),
            64 * 4096,
            32,
        ) else {
            continue;
        };
        bed.read_file(content.len(), 4096).unwrap();
        assert!(!bed.order.is_sorted(), "{kind}: nothing was reordered");
        bed.order.sort_unstable();
        assert!(
            bed.order.iter().copied().eq(0..64),
            "{kind}: each read once"
        );
        assert!(bed.region.bytes() == content);
    }
}

#[test]
fn many_files_and_many_reads_in_flight() {
    let dir = disk();
    let files: Vec<_> = (0..20)
        .map(|i| file(dir.path(), &format!("f{i}"), 65_536 + i))
        .collect();
    let paths: Vec<PathBuf> = files.iter().map(|f| f.0.clone()).collect();
    for kind in KINDS {
        let Some(mut bed) = Bed::new(kind, None, &paths, 320 * 4096, 512) else {
            continue;
        };
        assert_eq!(bed.flights.room(), 512);
        let mut reads = Vec::new();
        for page in 0..16 {
            for f in 0..20u32 {
                bed.send(f, page * 4096, 4096, 4096, 0);
                reads.push((f as usize, page as usize * 4096));
            }
        }
        assert_eq!((bed.flights.in_flight(), bed.flights.room()), (320, 192));
        while bed.flights.in_flight() > 0 {
            bed.reap().unwrap();
        }
        for (got, (f, at)) in bed.region.bytes().chunks(4096).zip(reads) {
            assert!(
                got == &files[f].1[at..at + 4096],
                "{kind}: file {f} at {at}"
            );
        }
    }
}

#[test]
fn a_slow_disk_takes_its_time() {
    let dir = disk();
    let (path, content) = file(dir.path(), "weights", 10 * 4096);
    for kind in KINDS {
        let faults = Faults {
            sleep: Duration::from_millis(5),
            ..none()
        };
        let Some(mut bed) = Bed::new(
            kind,
            Some(faults),
            std::slice::from_ref(&path),
            10 * 4096,
            4,
        ) else {
            continue;
        };
        bed.read_file(content.len(), 4096).unwrap();
        assert!(bed.flights.busy() >= Duration::from_millis(50), "{kind}");
    }
}

/// After a drop in the middle of things every frame is back, and nobody writes to the memory any more.
#[test]
fn a_drop_takes_the_reads_in_flight_down_first() {
    let dir = disk();
    let (path, content) = file(dir.path(), "weights", 16 << 20);
    let delay_by = Duration::from_millis(1);
    let wild = Faults {
        seed: 11,
        lose: 0.3,
        delay: 0.5,
        delay_by,
        reorder: true,
        ..none()
    };
    for kind in KINDS {
        for faults in [None, Some(wild)] {
            let paths = std::slice::from_ref(&path);
            let Some(mut bed) = Bed::new(kind, faults, paths, content.len() as u64, 64) else {
                continue;
            };
            for at in (0..content.len()).step_by(1 << 18) {
                bed.send(0, at as u64, 1 << 18, 1 << 18, at as u64);
            }
            let mut out = Vec::with_capacity(64);
            bed.flights.reap(Duration::ZERO, &mut out).unwrap();
            let Bed {
                flights,
                mut region,
                ..
            } = bed;
            drop(out);
            drop(flights);
            assert_eq!(region.lent(), 0, "{kind}");
            region.bytes_mut().fill(0x77);
            std::thread::sleep(Duration::from_millis(20));
            assert!(
                region.bytes().iter().all(|&b| b == 0x77),
                "{kind}: written to after the drop"
            );
        }
    }
}

#[test]
fn memory_may_be_let_go_of_before_the_reads_are_over() {
    let dir = disk();
    let (path, content) = file(dir.path(), "weights", 4 << 20);
    for kind in KINDS {
        let paths = std::slice::from_ref(&path);
        let Some(mut bed) = Bed::new(kind, None, paths, content.len() as u64, 16) else {
            continue;
        };
        for at in (0..content.len()).step_by(1 << 18) {
            bed.send(0, at as u64, 1 << 18, 1 << 18, at as u64);
        }
        let Bed {
            mut flights,
            region,
            mut out,
            ..
        } = bed;
        drop(region);
        while flights.in_flight() > 0 {
            flights.reap(PATIENCE, &mut out).unwrap();
        }
        drop(flights);
        assert_eq!(out.len(), 16);
        for op in &out {
            assert!(
                op.frame[..] == content[op.tag as usize..][..1 << 18],
                "{kind}"
            );
        }
    }
}

#[test]
fn auto_takes_io_uring_or_says_why_not_and_never_mmap() {
    let dir = disk();
    let (path, _) = file(dir.path(), "weights", 4096);
    let arena = Arena::new(4096).unwrap();
    let reader = reader(ReaderKind::Auto, &[path], &arena, 4).unwrap();
    let says = reader.describe();
    match reader.name() {
        "io_uring" => assert!(says.contains("buffers") && says.contains("files"), "{says}"),
        "threads" => assert!(says.contains("not io_uring: "), "{says}"),
        other => panic!("auto took {other}"),
    }
    println!("{says}");
}

fn arbitrary_faults() -> impl Strategy<Value = Faults> {
    (any::<u64>(), 0.0..0.6, 0.0..0.3, 0.0..0.2, any::<bool>()).prop_map(
        |(seed, short, eintr, eagain, reorder)| Faults {
            seed,
            short,
            eintr,
            eagain,
            reorder,
            ..none()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any file length, block size and depth, under any mixture of faults that pass.
    #[test]
    fn bytes_read_are_bytes_written(
        bytes in 1usize..300_000,
        pages in 1usize..20,
        depth in 1usize..24,
        kind in 0usize..KINDS.len(),
        faults in arbitrary_faults(),
    ) {
        let dir = disk();
        let (path, content) = file(dir.path(), "weights", bytes);
        let room = align_up(bytes as u64, ALIGN_BYTES);
        if let Some(mut bed) = Bed::new(KINDS[kind], Some(faults), &[path], room, depth) {
            bed.read_file(bytes, pages * 4096).map_err(|e: Error| TestCaseError::fail(e.to_string()))?;
            prop_assert!(bed.region.bytes()[..bytes] == content[..]);
        }
    }
}
