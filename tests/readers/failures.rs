//! What cannot be got over ends in an error that says what happened and where, within its time.

use std::time::{Duration, Instant};

use tensorpager::error::Code;
use tensorpager::io::{Faults, ReaderKind};

use crate::bed::{Bed, KINDS, PATIENCE, disk, file, none};

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

// hazard: eio: on every reader: named with file, offset and errno
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
