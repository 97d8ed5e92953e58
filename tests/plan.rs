//! The plan's promises against a running engine: bytes as predicted, a bound that a slow reader cannot hide behind, strategies followed
//! and checked, and a trace that others can read.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::engine::{Engine, EngineOptions, EngineStats, Job};
use tensorpager::error::{Code, Result};
use tensorpager::io::{FaultReader, Faults, Reader};
use tensorpager::paging::{
    ComputeRates, MachineRates, PagerOptions, PassWork, Placement, Problem, SlotLayout, Strategy,
    Tier, Trace, UnitSize, VerifyWhen, WrapReader, predict,
};
use tensorpager::report::summary::{PagingReport, ReadSettings};
use tensorpager::spec::UnitKind;
use tensorpager::store::Store;

const PAGE_BYTES: u64 = 64 << 10;
const TOKENS: usize = 5;

fn store() -> Store {
    let dir: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen2-bf16");
    let ckpt = Checkpoint::open(&dir.to_string_lossy(), &OpenOptions::default()).unwrap();
    Store::open_in_place(&ckpt).unwrap()
}

fn options(placement: Placement) -> EngineOptions {
    EngineOptions {
        placement,
        page_bytes: Some(PAGE_BYTES),
        threads: Some(1),
        context: 64,
        pass_tokens: 16,
        ..EngineOptions::default()
    }
}

fn open(store: &Store, options: &EngineOptions) -> Result<Engine> {
    Engine::open(
        store,
        options,
        Arc::new(AtomicBool::new(false)),
        &mut |_, _| {},
    )
}

/// The decode passes: those after the first token.
fn decode(engine: &mut Engine) -> EngineStats {
    engine
        .submit(Job {
            prompt: vec![3, 1, 4],
            max_tokens: TOKENS,
            ..Job::default()
        })
        .unwrap();
    let mut events = Vec::new();
    engine.step(&mut events).unwrap();
    let first = engine.stats();
    while engine.pending() > 0 {
        engine.step(&mut events).unwrap();
    }
    engine.stats().since(&first)
}

/// Every other layer in memory.
struct EveryOther;

impl Strategy for EveryOther {
    fn name(&self) -> &str {
        "every other"
    }
    fn place(&self, problem: &Problem<'_>) -> Result<Vec<Tier>> {
        let mut tiers = problem.all_on_disk();
        for (tier, unit) in tiers.iter_mut().zip(problem.units) {
            if matches!(unit.kind, UnitKind::Layer(i) if i % 2 == 1) {
                *tier = Tier::Cpu;
            }
        }
        Ok(tiers)
    }
}

#[test]
fn bytes_a_pass_are_those_predicted() {
    let store = store();
    let file_bytes: Vec<u64> = store.files.iter().map(|f| f.bytes).collect();
    let sizes: Vec<UnitSize> = store
        .units
        .iter()
        .map(|u| UnitSize::of(&SlotLayout::new(u, &file_bytes, PAGE_BYTES)))
        .collect();
    let rates = MachineRates {
        disk_gb_per_s: 1.0,
        h2d_gb_per_s: None,
        compute: ComputeRates {
            memory_gb_per_s: 10.0,
            gflops: 100.0,
            element_bytes: 2.0,
            points: vec![],
        },
    };
    for placement in [
        Placement::Auto,
        Placement::Cpu,
        Placement::Disk,
        Placement::By(Arc::new(EveryOther)),
    ] {
        let mut engine = open(&store, &options(placement.clone())).unwrap();
        let during = decode(&mut engine);
        let plan = engine.plan();
        let passes = during.paging.passes;
        assert_eq!(passes, TOKENS as u64 - 1);
        let work = PassWork {
            rows: 1,
            wanted: 1,
            element_bytes: 2.0,
            ..PassWork::default()
        };
        let cost = predict(&sizes, plan, &rates, &work);
        assert_eq!(
            during.paging.used_bytes - during.paging.gathered_bytes,
            plan.streamed_bytes * passes,
            "{placement:?}"
        );
        // A row lies in one block of 64 KiB, or in two.
        let gathered = cost.disk_bytes - plan.streamed_bytes;
        assert!(
            during.paging.gathered_bytes >= gathered * passes
                && during.paging.gathered_bytes <= 2 * gathered * passes,
            "{placement:?}: {} gathered, {gathered} a pass predicted",
            during.paging.gathered_bytes
        );
    }
}

#[test]
fn a_strategy_is_followed_and_one_that_overruns_is_refused() {
    let store = store();
    let engine = open(&store, &options(Placement::By(Arc::new(EveryOther)))).unwrap();
    for (unit, tier) in store.units.iter().zip(&engine.plan().tiers) {
        if let UnitKind::Layer(i) = unit.kind {
            assert_eq!(*tier == Tier::Cpu, i % 2 == 1);
        }
    }
    struct TooShort;
    impl Strategy for TooShort {
        fn name(&self) -> &str {
            "too short"
        }
        fn place(&self, _: &Problem<'_>) -> Result<Vec<Tier>> {
            Ok(vec![Tier::Disk])
        }
    }
    let refused = open(&store, &options(Placement::By(Arc::new(TooShort))))
        .err()
        .unwrap();
    assert_eq!(refused.code(), Code::Usage);
    assert!(refused.what().contains("too short"), "{refused}");
}

/// What the report says of a run whose reads each take `sleep` longer.
fn share(wrap: Option<WrapReader>) -> f64 {
    let store = store();
    let mut options = options(Placement::Disk);
    options.pager = PagerOptions {
        wrap,
        queue_depth: 1,
        ..PagerOptions::default()
    };
    let mut engine = open(&store, &options).unwrap();
    let during = decode(&mut engine);
    let settings = ReadSettings {
        page_bytes: PAGE_BYTES,
        queue_depth: 1,
        verify: VerifyWhen::Always,
        self_recorded: true,
        // Another setting once reached this: a slow run does not lower it.
        probed_disk_gb_per_s: Some(1.0),
        probed_h2d_gb_per_s: None,
    };
    PagingReport::new(&engine, &during, &settings)
        .percent_of_bound
        .unwrap()
}

#[test]
fn a_sleep_in_the_reader_lowers_the_share_of_the_bound() {
    fn sleepy(inner: Box<dyn Reader>) -> Box<dyn Reader> {
        let faults = Faults {
            sleep: Duration::from_millis(10),
            ..Faults::default()
        };
        Box::new(FaultReader::new(inner, faults))
    }
    let free = share(None);
    let slowed = share(Some(sleepy));
    assert!(
        slowed < free * 0.8,
        "{slowed} % with a sleep, {free} % without"
    );
}

#[test]
fn a_trace_is_valid_json_and_knows_every_unit() {
    let store = store();
    let trace = Arc::new(Trace::new(1 << 12));
    let mut options = options(Placement::By(Arc::new(EveryOther)));
    options.pager.trace = Some(trace.clone());
    let mut engine = open(&store, &options).unwrap();
    decode(&mut engine);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    tensorpager::report::trace::write(&path, &trace, engine.pager()).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = json["traceEvents"].as_array().unwrap();
    let of = |what: &str| events.iter().filter(|e| e["cat"] == what).count();
    let layers = store
        .units
        .iter()
        .filter(|u| matches!(u.kind, UnitKind::Layer(_)))
        .count();
    assert_eq!(of("pass"), TOKENS);
    assert!(of("compute") >= TOKENS * layers);
    let streamed = engine
        .plan()
        .tiers
        .iter()
        .zip(&store.units)
        .filter(|(t, u)| **t == Tier::Disk && tensorpager::paging::is_streamed(u.kind));
    assert!(of("read") >= TOKENS * streamed.count());
    for e in events.iter().filter(|e| e["ph"] == "X") {
        assert!(
            e["dur"].as_f64().unwrap() >= 0.0 && e["ts"].as_f64().unwrap() >= 0.0,
            "{e}"
        );
    }
    for unit in &store.units {
        if let UnitKind::Layer(i) = unit.kind {
            assert!(events.iter().any(|e| e["name"] == format!("layer {i}")));
        }
    }
}
