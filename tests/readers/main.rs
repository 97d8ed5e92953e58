//! One conformance suite for every reader, bare and with every fault injected: what is handed out is what the file holds, or there is
//! an error that says what happened.

mod bed;
mod failures;
mod lifetimes;
mod sandboxed;

use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;
use tensorpager::error::Error;
use tensorpager::io::{Arena, Faults, OpenFile, ReaderKind, open_reader};
use tensorpager::units::{ALIGN_BYTES, align_up};

use crate::bed::{Bed, KINDS, PATIENCE, disk, file, none, reader};

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

// hazard: short-reads: resumed at the last 4096 boundary, on every reader
// hazard: eintr-eagain: tried again, on every reader
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

/// What a file system without O_DIRECT gets.
// hazard: no-o-direct: read through the page cache; the same bytes
#[test]
fn buffered_files_read_the_same() {
    let dir = disk();
    let (path, content) = file(dir.path(), "weights", 1_000_001);
    for kind in KINDS {
        let room = align_up(content.len() as u64, ALIGN_BYTES);
        let arena = Arena::new(room).unwrap();
        let region = arena.take(room).unwrap();
        let open = OpenFile::open(&path, false).unwrap();
        assert!(!open.direct());
        let reader = match open_reader(kind, vec![open], &arena, 8) {
            Ok(reader) => reader,
            Err(error) => {
                println!("skipped {kind}: {}", error.cause());
                continue;
            }
        };
        assert!(kind == ReaderKind::Mmap || reader.describe().contains("buffered"));
        let mut bed = Bed::over(reader, vec![path.clone()], region, PATIENCE);
        bed.read_file(content.len(), 65_536).unwrap();
        assert!(bed.region.bytes()[..content.len()] == content, "{kind}");
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

/// Eight attempts in a row that bring nothing new count as the end of the file: more short reads than these would meet that by chance.
fn arbitrary_faults() -> impl Strategy<Value = Faults> {
    (any::<u64>(), 0.0..0.3, 0.0..0.3, 0.0..0.2, any::<bool>()).prop_map(
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
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

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
