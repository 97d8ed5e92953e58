//! Engines on the emulated driver; started by the tests of `main.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tensorpager::engine::{DeviceChoice, Engine, EngineOptions, Event, KvPlace};
use tensorpager::error::{Code, Error, Result};
use tensorpager::io::{Faults, Reader, ReaderKind};
use tensorpager::paging::{PagerOptions, Placement, Tier};
use tensorpager::store::Store;
use tensorpager::text::SamplingParams;

use crate::common;
use crate::engine_common::{fixture, job, open, packed, same_bits, score, scoring};
use crate::faulty_readers::{
    BadFile, Wrap, all_at_once, file_of, flip_all, flip_byte, flip_one, with, within,
};

/// An untied head, so that every file is there.
const MODEL: &str = "gpu-qwen2-bf16";

fn prompts() -> Vec<Vec<u32>> {
    let all = common::golden(&fixture(MODEL)).into_iter();
    all.map(|g| g.ids).take(2).collect()
}

/// Everything on disk, small pages, several units ahead: many reads and copies, in every state.
fn faulty(wrap: Option<Wrap>) -> EngineOptions {
    EngineOptions {
        device: DeviceChoice::Cuda(0),
        placement: Placement::Disk,
        prefetch_depth: Some(2),
        page_bytes: Some(65_536),
        threads: Some(1),
        pager: PagerOptions {
            wrap,
            stall_limit: Duration::from_secs(5),
            ..PagerOptions::default()
        },
        ..scoring(256)
    }
}

fn clean(store: &Store) -> Vec<Vec<f32>> {
    score(&mut open(store, &faulty(None)).unwrap(), &prompts()).unwrap()
}

/// Opens and scores everything twice.
fn outcome(store: &Store, options: &EngineOptions) -> Result<()> {
    let mut engine = open(store, options)?;
    score(&mut engine, &prompts())?;
    score(&mut engine, &prompts())?;
    Ok(())
}

#[test]
#[ignore = "started by main.rs, on a driver"]
fn passing_faults() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let clean = clean(&store);
    for (i, depth) in [0, 1, 2].into_iter().enumerate() {
        let mut options = faulty(Some(all_at_once));
        options.prefetch_depth = Some(depth);
        options.pager.queue_depth = [1, 5, 32][i];
        options.pager.reader = [ReaderKind::Auto, ReaderKind::Threads][i % 2];
        let mut engine = open(&store, &options).unwrap();
        let got = score(&mut engine, &prompts()).unwrap();
        assert!(same_bits(&got, &clean), "depth {depth}");
        assert_eq!(engine.stats().paging.rereads, 0);
    }
}

/// In small pieces, whose borders frames and units lie across.
#[test]
#[ignore = "started by main.rs, on a driver"]
fn pinned_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let clean = clean(&store);
    for placement in [Placement::Disk, Placement::Cpu] {
        for pin_bytes in [4096, 5 * 4096, 65_536 + 4096] {
            let mut options = faulty(None);
            options.placement = placement.clone();
            options.pager.pin_bytes = pin_bytes;
            let mut engine = open(&store, &options).unwrap();
            let got = score(&mut engine, &prompts()).unwrap();
            assert!(same_bits(&got, &clean), "{placement:?}, {pin_bytes}");
        }
    }
}

#[test]
#[ignore = "started by main.rs, on a driver"]
fn flipped_bits() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let clean = clean(&store);
    let mut options = faulty(Some(flip_one));
    // The seventh read is one of the first layer's.
    options.pager.queue_depth = 1;
    let mut engine = open(&store, &options).unwrap();
    let got = score(&mut engine, &prompts()).unwrap();
    assert_eq!(engine.stats().paging.rereads, 1);
    assert!(same_bits(&got, &clean));
    let e = outcome(&store, &faulty(Some(flip_all))).unwrap_err();
    assert_eq!(e.code(), Code::Corrupt, "{e}");
    assert!(
        e.what().contains("block") && e.what().contains(".dat"),
        "{e}"
    );
}

#[test]
#[ignore = "started by main.rs, on a driver"]
fn flipped_bytes_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let on_gpu = Placement::Units(vec![Tier::Gpu; store.units.len()]);
    for (file, unit) in [
        ("layer.001.dat", "layer 1"),
        ("embed.dat", "the embedding"),
        ("head.000.dat", "head block 0"),
    ] {
        let path = file_of(&store, file);
        flip_byte(&path, 100);
        for placement in [Placement::Disk, Placement::Cpu, on_gpu.clone()] {
            let options = EngineOptions {
                placement: placement.clone(),
                ..faulty(None)
            };
            // Row 0 of the embedding lies in the block that was hit.
            let e = open(&store, &options)
                .and_then(|mut engine| score(&mut engine, &[vec![0, 1, 2]]))
                .err()
                .unwrap_or_else(|| panic!("{file} {placement:?} went through"));
            assert_eq!(e.code(), Code::Corrupt, "{e}");
            let named = [unit, file, "block 0"];
            assert!(named.iter().all(|n| e.what().contains(n)), "{named:?}: {e}");
        }
        flip_byte(&path, 100);
    }
    outcome(&store, &faulty(None)).unwrap();
}

#[test]
#[ignore = "started by main.rs, on a driver"]
fn read_errors() {
    fn file_0(r: Box<dyn Reader>) -> Box<dyn Reader> {
        Box::new(BadFile(r, 0))
    }
    fn file_1(r: Box<dyn Reader>) -> Box<dyn Reader> {
        Box::new(BadFile(r, 1))
    }
    fn file_2(r: Box<dyn Reader>) -> Box<dyn Reader> {
        Box::new(BadFile(r, 2))
    }
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let mut layers = 0;
    for (file, wrap) in [file_0 as Wrap, file_1, file_2].into_iter().enumerate() {
        let name = store.files[file].path.file_name().unwrap();
        let name = name.to_string_lossy().into_owned();
        let unit = match name.as_str() {
            "layer.000.dat" => "layer 0",
            "layer.001.dat" => "layer 1",
            _ => continue,
        };
        layers += 1;
        for depth in [0, 1, 4] {
            let mut options = faulty(Some(wrap));
            options.prefetch_depth = Some(depth);
            let mut engine = open(&store, &options).unwrap();
            let e = score(&mut engine, &prompts()).unwrap_err();
            assert_eq!(e.code(), Code::Io, "{e}");
            assert!(
                e.what().contains(unit) && e.what().contains(&name),
                "{unit} at depth {depth}: {e}"
            );
            assert!(e.cause().contains("EIO"), "{e}");
            // Whoever asks again hears the same.
            assert_eq!(score(&mut engine, &[vec![1]]).unwrap_err(), e);
            within(Duration::from_secs(10), "the drop", || drop(engine));
        }
    }
    assert!(layers > 0, "no layer was hit");
}

#[test]
#[ignore = "started by main.rs, on a driver"]
fn lost_reads() {
    fn lose_some(r: Box<dyn Reader>) -> Box<dyn Reader> {
        let faults = Faults {
            seed: 9,
            lose: 0.2,
            ..Faults::default()
        };
        with(faults, r)
    }
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let mut options = faulty(Some(lose_some));
    options.pager.stall_limit = Duration::from_millis(300);
    let e: Error = within(Duration::from_secs(30), "a stalled run", || {
        (0..4)
            .find_map(|_| outcome(&store, &options).err())
            .expect("one read in five is lost")
    });
    assert_eq!(e.code(), Code::Stalled, "{e}");
    assert!(e.what().contains(".dat"), "{e}");
}

fn crawling(r: Box<dyn Reader>) -> Box<dyn Reader> {
    let faults = Faults {
        seed: 2,
        delay: 0.5,
        delay_by: Duration::from_millis(40),
        ..Faults::default()
    };
    with(faults, r)
}

/// So many that the crawling job lasts for several cancellations, while a pass of it still fits between two of them.
const TOKENS: usize = 48;

/// Runs a job to its end; each time it is told to stop it begins again where it was. Its tokens, and how often that was.
fn tokens(engine: &mut Engine, cancel: &AtomicBool) -> (Vec<u32>, usize) {
    engine
        .submit(job(&prompts()[0], TOKENS, SamplingParams::greedy()))
        .unwrap();
    let (mut out, mut stops) = (Vec::new(), 0);
    while engine.pending() > 0 {
        let mut events = Vec::new();
        if let Err(e) = engine.step(&mut events) {
            assert_eq!(e.code(), Code::Interrupted, "{e}");
            cancel.store(false, Relaxed);
            stops += 1;
        }
        for event in events {
            match event {
                Event::Token { token, .. } => out.push(token),
                Event::Failed { error, .. } => panic!("{error}"),
                Event::Finished { .. } => {}
            }
        }
    }
    (out, stops)
}

/// The flag is raised again and again while units are read, copied and computed with.
#[test]
#[ignore = "started by main.rs, on a driver"]
fn stopped_in_passes() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    for (depth, kv_place) in [(0, KvPlace::Gpu), (2, KvPlace::Gpu), (1, KvPlace::Host)] {
        let options = |wrap| EngineOptions {
            kv_place,
            prefetch_depth: Some(depth),
            keep_logits: true,
            logits_rows: 1,
            kv_tokens: None,
            max_sequences: 2,
            ..faulty(wrap)
        };
        let flag = AtomicBool::new(false);
        let expected = tokens(&mut open(&store, &options(None)).unwrap(), &flag);
        assert_eq!((expected.0.len(), expected.1), (TOKENS, 0));
        let flag = Arc::new(AtomicBool::new(false));
        let slow = options(Some(crawling as Wrap));
        let mut engine = Engine::open(&store, &slow, flag.clone(), &mut |_, _| {}).unwrap();
        let (done, raise) = (Arc::new(AtomicBool::new(false)), flag.clone());
        let until = done.clone();
        let caller = std::thread::spawn(move || {
            while !until.load(Relaxed) {
                std::thread::sleep(Duration::from_millis(230));
                raise.store(true, Relaxed);
            }
        });
        let (got, stops) = within(Duration::from_secs(60), "the job", || {
            tokens(&mut engine, &flag)
        });
        done.store(true, Relaxed);
        within(Duration::from_secs(5), "the drop", || drop(engine));
        caller.join().unwrap();
        assert_eq!(got, expected.0, "depth {depth}");
        assert!(stops > 2, "it was told to stop {stops} times");
    }
}
