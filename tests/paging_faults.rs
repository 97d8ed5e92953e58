//! The promise: bad disks, busy kernels and damaged files either change nothing or are named; nothing hangs.
//!
//! A whole engine over the fault-injecting reader. Faults are plain functions, because that is what the hook takes.

mod common;
mod engine_common;
#[path = "engine_common/readers.rs"]
mod faulty_readers;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use engine_common::{fixture, in_place, job, open, packed, same_bits, score, scoring};
use faulty_readers::{
    BadFile, Wrap, all_at_once, file_of, flip_all, flip_byte, flip_one, with, within,
};
use tensorpager::engine::{Engine, EngineOptions};
use tensorpager::error::{Code, Error, Result};
use tensorpager::io::{Faults, Reader, ReaderKind};
use tensorpager::paging::{PagerOptions, Placement, VerifyWhen};
use tensorpager::report::summary::{PagingReport, ReadSettings};
use tensorpager::store::Store;
use tensorpager::text::SamplingParams;

const MODEL: &str = "qwen3-bf16";

fn prompts() -> Vec<Vec<u32>> {
    common::golden(&fixture(MODEL))
        .into_iter()
        .map(|g| g.ids)
        .collect()
}

/// Everything on disk, small pages, several units ahead: many reads, in every state.
fn faulty(wrap: Option<Wrap>) -> EngineOptions {
    EngineOptions {
        placement: Placement::Disk,
        prefetch_depth: Some(2),
        page_bytes: Some(65_536),
        pager: PagerOptions {
            wrap,
            stall_limit: Duration::from_secs(5),
            ..PagerOptions::default()
        },
        ..scoring(512)
    }
}

fn short(r: Box<dyn Reader>) -> Box<dyn Reader> {
    with(
        Faults {
            seed: 1,
            short: 0.6,
            ..Faults::default()
        },
        r,
    )
}
fn interrupted(r: Box<dyn Reader>) -> Box<dyn Reader> {
    with(
        Faults {
            seed: 2,
            eintr: 0.4,
            ..Faults::default()
        },
        r,
    )
}
fn again(r: Box<dyn Reader>) -> Box<dyn Reader> {
    with(
        Faults {
            seed: 3,
            eagain: 0.4,
            ..Faults::default()
        },
        r,
    )
}
fn delayed(r: Box<dyn Reader>) -> Box<dyn Reader> {
    let delay_by = Duration::from_millis(3);
    with(
        Faults {
            seed: 4,
            delay: 0.3,
            delay_by,
            ..Faults::default()
        },
        r,
    )
}
fn reordered(r: Box<dyn Reader>) -> Box<dyn Reader> {
    with(
        Faults {
            seed: 5,
            reorder: true,
            ..Faults::default()
        },
        r,
    )
}
// hazard: short-reads: no bit of the logits changes
// hazard: eintr-eagain: no bit of the logits changes
#[test]
fn passing_faults_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [packed(MODEL, dir.path()), in_place(MODEL)];
    let clean = score(&mut open(&stores[0], &faulty(None)).unwrap(), &prompts()).unwrap();
    let wraps: [Wrap; 6] = [short, interrupted, again, delayed, reordered, all_at_once];
    for (i, wrap) in wraps.into_iter().enumerate() {
        for store in &stores {
            let mut options = faulty(Some(wrap));
            options.pager.queue_depth = [1, 5, 32][i % 3];
            options.pager.reader = [ReaderKind::Auto, ReaderKind::Threads][i % 2];
            let mut engine = open(store, &options).unwrap();
            let got = score(&mut engine, &prompts()).unwrap();
            assert!(
                same_bits(&got, &clean),
                "faults {i}, in place: {}",
                store.in_place
            );
            assert_eq!(
                engine.stats().paging.rereads,
                0,
                "nothing was damaged, only late"
            );
        }
    }
}

// hazard: bit-rot: on the way: read once more, no bit changes
#[test]
fn one_flipped_bit_on_the_way_is_healed_by_one_more_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let clean = score(&mut open(&store, &faulty(None)).unwrap(), &prompts()).unwrap();
    for kind in [ReaderKind::Auto, ReaderKind::Threads] {
        let mut options = faulty(Some(flip_one));
        options.pager.reader = kind;
        options.pager.queue_depth = 1;
        let mut engine = open(&store, &options).unwrap();
        let got = score(&mut engine, &prompts()).unwrap();
        assert_eq!(engine.stats().paging.rereads, 1);
        assert!(same_bits(&got, &clean));
    }
}

#[test]
fn bits_that_flip_again_and_again_are_an_error_and_without_verification_they_pass() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let clean = score(&mut open(&store, &faulty(None)).unwrap(), &prompts()).unwrap();
    let e = outcome(&store, &faulty(Some(flip_all))).unwrap_err();
    assert_eq!(e.code(), Code::Corrupt, "{e}");
    // The same reader with verification off shows that the flips were there to be found.
    let mut options = faulty(Some(flip_all));
    options.pager.verify = VerifyWhen::Never;
    let mut engine = open(&store, &options).unwrap();
    let vocab = engine.spec().vocab;
    let mut got: Vec<Vec<f32>> = prompts()
        .iter()
        .map(|p| vec![0.0; p.len() * vocab])
        .collect();
    engine
        .score(&prompts(), &mut |b| {
            for (row, values) in b.values.chunks_exact(b.ids).enumerate() {
                let at = (b.first_row + row) * vocab + b.first_id;
                got[b.input][at..at + b.ids].copy_from_slice(values);
            }
            Ok(())
        })
        .unwrap();
    assert!(
        !same_bits(&got, &clean),
        "--verify never takes what it gets"
    );
    assert_eq!(engine.stats().paging.verified_bytes, 0);
}

/// Opens and scores everything twice.
fn outcome(store: &Store, options: &EngineOptions) -> Result<()> {
    let mut engine = open(store, options)?;
    score(&mut engine, &prompts())?;
    score(&mut engine, &prompts())?;
    Ok(())
}

// hazard: bit-rot: on disk: one error; names unit, file and block
#[test]
fn a_flipped_byte_on_disk_is_named_with_unit_file_and_block() {
    for (file, unit) in [
        ("layer.000.dat", "layer 0"),
        ("layer.001.dat", "layer 1"),
        ("embed.dat", "the embedding"),
        ("head.000.dat", "head block 0"),
    ] {
        for placement in [Placement::Disk, Placement::Cpu] {
            for verify in [VerifyWhen::Always, VerifyWhen::First] {
                let dir = tempfile::tempdir().unwrap();
                // An untied head, so that every file is there.
                let store = packed("qwen2-bf16", dir.path());
                flip_byte(&file_of(&store, file), 100);
                let mut options = faulty(None);
                options.placement = placement.clone();
                options.pager.verify = verify;
                // Row 0 of the embedding lies in the block that was hit.
                let e = open(&store, &options)
                    .and_then(|mut engine| score(&mut engine, &[vec![0, 1, 2]]))
                    .err()
                    .unwrap_or_else(|| panic!("{file} {placement:?} {verify:?} went through"));
                assert_eq!(e.code(), Code::Corrupt, "{e}");
                assert!(e.what().contains(unit), "{unit}: {e}");
                assert!(
                    e.what().contains(file) && e.what().contains("block 0"),
                    "{e}"
                );
            }
        }
    }
}

// hazard: changed: in place: the second read is refused; names unit, file and block
#[test]
fn in_place_a_byte_that_changes_between_two_reads_is_caught() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("model");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(fixture("qwen2-bf16")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let store = Store::open_in_place(&engine_common::checkpoint(&copy, None)).unwrap();
    let mut options = faulty(None);
    options.prefetch_depth = Some(0);
    let mut engine = open(&store, &options).unwrap();
    score(&mut engine, &[vec![1, 2, 3]]).unwrap();
    let path = copy.join("model.safetensors");
    let bytes = std::fs::metadata(&path).unwrap().len();
    for at in (40_000..bytes).step_by(30_000) {
        flip_byte(&path, at);
    }
    let e = (0..3)
        .find_map(|_| score(&mut engine, &[vec![1, 2, 3]]).err())
        .expect("a change is seen");
    assert_eq!(e.code(), Code::Corrupt, "{e}");
    assert!(
        e.what().contains("model.safetensors") && e.fix().contains("restore"),
        "{e}"
    );
}

// hazard: eio: one error; names layer, file, offset and errno
#[test]
fn a_read_error_names_its_own_layer_and_not_one_that_flies_beside_it() {
    fn file_0(r: Box<dyn Reader>) -> Box<dyn Reader> {
        Box::new(BadFile(r, 0))
    }
    fn file_1(r: Box<dyn Reader>) -> Box<dyn Reader> {
        Box::new(BadFile(r, 1))
    }
    fn file_2(r: Box<dyn Reader>) -> Box<dyn Reader> {
        Box::new(BadFile(r, 2))
    }
    fn file_3(r: Box<dyn Reader>) -> Box<dyn Reader> {
        Box::new(BadFile(r, 3))
    }
    let dir = tempfile::tempdir().unwrap();
    let store = packed("qwen2-bf16", dir.path());
    let wraps: [Wrap; 4] = [file_0, file_1, file_2, file_3];
    for (file, wrap) in wraps.into_iter().enumerate() {
        let name = store.files[file]
            .path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let unit = match name.as_str() {
            "embed.dat" => "the embedding".to_string(),
            "layer.000.dat" => "layer 0".to_string(),
            "layer.001.dat" => "layer 1".to_string(),
            "layer.002.dat" => "layer 2".to_string(),
            _ => continue,
        };
        for depth in [0, 1, 4] {
            let mut options = faulty(Some(wrap));
            options.prefetch_depth = Some(depth);
            let e = outcome(&store, &options).unwrap_err();
            assert_eq!(e.code(), Code::Io, "{e}");
            assert!(
                e.what().contains(&unit) && e.what().contains(&name),
                "{unit} at depth {depth}: {e}"
            );
            assert!(e.cause().contains("EIO"), "{e}");
        }
    }
}

// hazard: stall: one error within the time limit; names layer and file
#[test]
fn a_read_that_never_completes_is_named_within_the_limit() {
    fn lose_all(r: Box<dyn Reader>) -> Box<dyn Reader> {
        with(
            Faults {
                seed: 1,
                lose: 1.0,
                ..Faults::default()
            },
            r,
        )
    }
    fn lose_some(r: Box<dyn Reader>) -> Box<dyn Reader> {
        with(
            Faults {
                seed: 9,
                lose: 0.2,
                ..Faults::default()
            },
            r,
        )
    }
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    for (wrap, kind) in [
        (lose_all as Wrap, ReaderKind::Auto),
        (lose_some, ReaderKind::Auto),
        (lose_some, ReaderKind::Threads),
    ] {
        let mut options = faulty(Some(wrap));
        options.pager.stall_limit = Duration::from_millis(300);
        options.pager.reader = kind;
        let e = within(
            Duration::from_secs(20),
            "a stalled run with its end",
            || -> Error {
                let mut last = None;
                for _ in 0..4 {
                    if let Err(e) = outcome(&store, &options) {
                        last = Some(e);
                        break;
                    }
                }
                last.expect("one read in five is lost")
            },
        );
        assert_eq!(e.code(), Code::Stalled, "{e}");
        assert!(e.what().contains(".dat"), "{e}");
    }
}

#[test]
fn a_slow_reader_lowers_the_share_of_the_bound_and_shows_as_stall() {
    fn slow(r: Box<dyn Reader>) -> Box<dyn Reader> {
        with(
            Faults {
                seed: 1,
                sleep: Duration::from_millis(40),
                ..Faults::default()
            },
            r,
        )
    }
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let report = |wrap: Option<Wrap>| -> PagingReport {
        let mut engine = open(
            &store,
            &EngineOptions {
                context: 64,
                ..faulty(wrap)
            },
        )
        .unwrap();
        let before = engine.stats();
        score(&mut engine, &[vec![1, 2, 3]]).unwrap();
        for _ in 0..4 {
            score(&mut engine, &[vec![1, 2, 3]]).unwrap();
        }
        let settings = ReadSettings {
            page_bytes: 65_536,
            queue_depth: 32,
            verify: VerifyWhen::Always,
            self_recorded: false,
            // The best rate known of this disk: what another setting once reached, not this run.
            probed_disk_gb_per_s: Some(1.0),
            probed_h2d_gb_per_s: None,
        };
        PagingReport::new(&engine, &engine.stats().since(&before), &settings)
    };
    // The quicker of two: other work on the machine may slow one of them.
    let quick = [report(None), report(None)]
        .into_iter()
        .max_by(|a, b| a.percent_of_bound.partial_cmp(&b.percent_of_bound).unwrap())
        .unwrap();
    let slow = report(Some(slow));
    let share = |r: &PagingReport| r.percent_of_bound.expect("a bound is known");
    assert!(
        share(&slow) < 0.7 * share(&quick),
        "{} against {}",
        share(&slow),
        share(&quick)
    );
    assert!(slow.stall_disk_s > quick.stall_disk_s && slow.stall_s >= slow.stall_disk_s);
    assert_eq!(
        slow.disk_bytes_per_pass, quick.disk_bytes_per_pass,
        "the same bytes, only later"
    );
    assert_eq!(slow.passes, 5);
    assert!(share(&slow) > 0.0 && share(&quick) <= 130.0);
}

// hazard: cut-under-run: one error; names layer and file
#[test]
fn a_file_truncated_under_a_run_is_named() {
    for kind in [ReaderKind::Auto, ReaderKind::Threads] {
        let dir = tempfile::tempdir().unwrap();
        let store = packed("qwen2-bf16", dir.path());
        let mut options = faulty(None);
        options.pager.reader = kind;
        let mut engine = open(&store, &options).unwrap();
        score(&mut engine, &[vec![1, 2, 3]]).unwrap();
        let path = file_of(&store, "layer.001.dat");
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(4096).unwrap();
        let e = (0..4)
            .find_map(|_| score(&mut engine, &[vec![1, 2, 3]]).err())
            .expect("the stream meets the end of the file");
        assert_eq!(e.code(), Code::Corrupt, "{e}");
        assert!(
            e.what().contains("layer 1") && e.what().contains("layer.001.dat"),
            "{e}"
        );
        assert!(e.cause().contains("shorter"), "{e}");
        // Whoever asks again hears the same, not that something is gone.
        assert_eq!(score(&mut engine, &[vec![1]]).unwrap_err(), e);
    }
}

fn crawling(r: Box<dyn Reader>) -> Box<dyn Reader> {
    let delay_by = Duration::from_millis(700);
    with(
        Faults {
            seed: 2,
            delay: 1.0,
            delay_by,
            ..Faults::default()
        },
        r,
    )
}

#[test]
fn dropping_an_engine_with_reads_in_flight_does_not_hang() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    for kind in [ReaderKind::Auto, ReaderKind::Threads, ReaderKind::Mmap] {
        let mut options = faulty(Some(crawling));
        options.pager.reader = kind;
        let engine = open(&store, &options).unwrap();
        within(Duration::from_secs(4), "the drop", || drop(engine));
    }
}

#[test]
fn a_request_to_stop_ends_a_waiting_pass_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let cancel = Arc::new(AtomicBool::new(false));
    let options = faulty(Some(crawling));
    let mut engine = Engine::open(
        &store,
        &EngineOptions {
            keep_logits: true,
            logits_rows: 1,
            kv_tokens: None,
            ..options
        },
        cancel.clone(),
        &mut |_, _| {},
    )
    .unwrap();
    engine
        .submit(job(&prompts()[0], 50, SamplingParams::greedy()))
        .unwrap();
    let flag = cancel.clone();
    let caller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150));
        flag.store(true, Relaxed);
    });
    let mut events = Vec::new();
    let e = within(Duration::from_secs(3), "the end of the pass", || {
        loop {
            if let Err(e) = engine.step(&mut events) {
                break e;
            }
        }
    });
    caller.join().unwrap();
    assert_eq!(e.code(), Code::Interrupted, "{e}");
    within(Duration::from_secs(4), "the drop", || drop(engine));
}

#[test]
fn a_request_to_stop_ends_the_loading_of_residents() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    let cancel = Arc::new(AtomicBool::new(true));
    let options = EngineOptions {
        placement: Placement::Cpu,
        ..faulty(Some(crawling))
    };
    let e = within(Duration::from_secs(4), "opening", || {
        Engine::open(&store, &options, cancel, &mut |_, _| {}).err()
    });
    assert_eq!(e.expect("it was told to stop").code(), Code::Interrupted);
}

// hazard: token-range: in the engine: that call fails, the next one is exact
#[test]
fn a_pass_that_fails_in_the_middle_does_not_spoil_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed(MODEL, dir.path());
    for depth in [0, 1, 4] {
        let options = EngineOptions {
            prefetch_depth: Some(depth),
            ..faulty(None)
        };
        let clean = score(&mut open(&store, &options).unwrap(), &prompts()).unwrap();
        let mut engine = open(&store, &options).unwrap();
        // More failures than KV or schedule have room for, should any of them keep what it held.
        for round in 0..40 {
            let full = Error::new(Code::Space, "full", "a test", "none");
            let e = engine
                .score(&prompts(), &mut |_| Err(full.clone()))
                .unwrap_err();
            assert_eq!(e, full, "round {round}");
            // A token that the model does not have fails before the first unit.
            let e = score(&mut engine, &[vec![1, u32::MAX]]).unwrap_err();
            assert!(e.what().contains("4294967295"), "round {round}: {e}");
        }
        assert!(
            same_bits(&score(&mut engine, &prompts()).unwrap(), &clean),
            "depth {depth}"
        );
    }
}
