//! Every rung of the setup ladder, with and without registration, reads the same bytes.

use super::*;
use crate::io::Region;

const PAGES: usize = 16;

fn file_of_pages(dir: &std::path::Path) -> Vec<OpenFile> {
    let path = dir.join("pages");
    let bytes: Vec<u8> = (0..PAGES * 4096).map(|i| (i / 4096) as u8 ^ 0x5a).collect();
    std::fs::write(&path, bytes).unwrap();
    vec![OpenFile::open(&path, true).unwrap()]
}

fn read(region: &mut Region, page: usize) -> ReadOp {
    ReadOp {
        file: 0,
        offset: page as u64 * 4096,
        frame: region.lend(4096),
        want: 4096,
        tag: page as u64,
    }
}

/// `None`, with the reason printed, where the system has no io_uring.
fn open(files: Vec<OpenFile>, arena: &Arena, setup: Setup) -> Option<UringReader> {
    match UringReader::with(files, arena, 4, setup) {
        Ok(reader) => Some(reader),
        Err(refusal) => {
            println!("skipped: {}", refusal.reason);
            None
        }
    }
}

#[test]
fn every_rung_reads() {
    let dir = tempfile::tempdir().unwrap();
    for first_rung in 0..LADDER.len() {
        for register in [true, false] {
            let arena = Arena::new(PAGES as u64 * 4096).unwrap();
            let mut region = arena.take(PAGES as u64 * 4096).unwrap();
            let setup = Setup {
                first_rung,
                register,
            };
            let Some(mut reader) = open(file_of_pages(dir.path()), &arena, setup) else {
                return;
            };
            println!("{}", reader.describe());
            let mut out = Vec::with_capacity(4);
            let mut next = 0;
            let mut seen = 0;
            while seen < PAGES {
                while next < PAGES && reader.in_flight() < reader.capacity() {
                    assert!(reader.submit(read(&mut region, next), 0).is_ok());
                    next += 1;
                }
                reader.reap(1, Duration::from_secs(10), &mut out).unwrap();
                assert!(!out.is_empty(), "no completion within ten seconds");
                for done in out.drain(..) {
                    assert_eq!(done.result, 4096);
                    let byte = done.op.tag as u8 ^ 0x5a;
                    assert!(done.op.frame.iter().all(|&b| b == byte));
                    seen += 1;
                }
            }
            assert_eq!((reader.in_flight(), region.lent()), (0, 0));
        }
    }
}

#[test]
fn a_full_queue_gives_the_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let arena = Arena::new(5 * 4096).unwrap();
    let mut region = arena.take(5 * 4096).unwrap();
    let setup = Setup {
        first_rung: 0,
        register: true,
    };
    let Some(mut reader) = open(file_of_pages(dir.path()), &arena, setup) else {
        return;
    };
    for page in 0..4 {
        assert!(reader.submit(read(&mut region, page), 0).is_ok());
    }
    let refused = reader.submit(read(&mut region, 4), 0).err().unwrap();
    assert_eq!(refused.tag, 4);
}

#[test]
fn polling_alone_brings_completions() {
    let dir = tempfile::tempdir().unwrap();
    let arena = Arena::new(4096).unwrap();
    let mut region = arena.take(4096).unwrap();
    let setup = Setup {
        first_rung: 0,
        register: true,
    };
    let Some(mut reader) = open(file_of_pages(dir.path()), &arena, setup) else {
        return;
    };
    assert!(reader.submit(read(&mut region, 3), 0).is_ok());
    let start = Instant::now();
    let mut out = Vec::with_capacity(4);
    while out.is_empty() && start.elapsed() < Duration::from_secs(10) {
        reader.reap(0, Duration::ZERO, &mut out).unwrap();
    }
    assert_eq!(out[0].result, 4096);
}

#[test]
fn frames_of_another_arena_are_read_plainly() {
    let dir = tempfile::tempdir().unwrap();
    let registered = Arena::new(4096).unwrap();
    let other = Arena::new(4096).unwrap();
    let mut region = other.take(4096).unwrap();
    let setup = Setup {
        first_rung: 0,
        register: true,
    };
    let Some(mut reader) = open(file_of_pages(dir.path()), &registered, setup) else {
        return;
    };
    assert!(reader.submit(read(&mut region, 2), 0).is_ok());
    let mut out = Vec::with_capacity(4);
    reader.reap(1, Duration::from_secs(10), &mut out).unwrap();
    assert_eq!((out[0].result, out[0].op.frame[0]), (4096, 2 ^ 0x5a));
}

#[test]
fn a_file_that_is_not_there_is_ebadf() {
    let dir = tempfile::tempdir().unwrap();
    for register in [true, false] {
        let arena = Arena::new(4096).unwrap();
        let mut region = arena.take(4096).unwrap();
        let setup = Setup {
            first_rung: 0,
            register,
        };
        let Some(mut reader) = open(file_of_pages(dir.path()), &arena, setup) else {
            return;
        };
        let mut op = read(&mut region, 0);
        op.file = 7;
        assert!(reader.submit(op, 0).is_ok());
        let mut out = Vec::with_capacity(4);
        reader.reap(1, Duration::from_secs(10), &mut out).unwrap();
        assert_eq!(out[0].result, -libc::EBADF);
    }
}

#[test]
fn another_thread_gets_an_error_and_frees_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let arena = Arena::new(4096).unwrap();
    let mut region = arena.take(4096).unwrap();
    let setup = Setup {
        first_rung: 0,
        register: true,
    };
    let Some(mut reader) = open(file_of_pages(dir.path()), &arena, setup) else {
        return;
    };
    if !reader.describe().contains("SINGLE_ISSUER") {
        println!("skipped: this kernel does not bind rings to threads");
        return;
    }
    assert!(reader.submit(read(&mut region, 0), 0).is_ok());
    reader
        .reap(0, Duration::ZERO, &mut Vec::with_capacity(4))
        .unwrap();
    let was_in_flight = reader.in_flight();
    let elsewhere = std::thread::spawn(move || {
        let result = reader.reap(1, Duration::from_secs(1), &mut Vec::with_capacity(4));
        let left = reader.in_flight();
        drop(reader);
        (result, left)
    });
    let (result, left) = elsewhere.join().unwrap();
    if was_in_flight == 1 {
        assert_eq!(result.unwrap_err().code(), Code::Internal);
        assert_eq!(left, 1);
        // The read's frame is leaked rather than handed back under the kernel's hands.
        assert_eq!(region.lent(), 1);
    }
}
