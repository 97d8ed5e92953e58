//! What `plan` predicts, against passes on the emulated driver, whose copies take a known time and whose disk does too.
//!
//! A target of its own: what runs beside it computes on the same cores. The driver begins work at once, as a GPU does: in its drawn order it may
//! do it on the thread that enqueues, and a slot then comes back only behind the unit's kernels.

mod common;
mod emulated;
mod engine_common;
#[path = "engine_common/disk.rs"]
mod disk;
#[path = "emulated/run.rs"]
mod run;

use std::time::{Duration, Instant};

use tensorpager::engine::{DeviceChoice, EngineOptions};
use tensorpager::io::Reader;
use tensorpager::paging::{
    ComputeRates, GpuPart, MachineRates, PagerOptions, PassWork, Placement, Plan, Ring, Tier,
    UnitSize, is_streamed, predict,
};
use tensorpager::spec::UnitKind;
use tensorpager::store::{PackOptions, Store};
use tensorpager::text::SamplingParams;

use disk::Disk;
use emulated::inside;
use engine_common::{checkpoint, job, open};
use run::layered;

/// How far apart pass and prediction may be, beside what lists and results take.
const SLACK: f64 = 1.2;
const READ: Duration = Duration::from_millis(6);
const COPY: Duration = Duration::from_millis(5);
/// Every unit is one page, which is one read and one copy: as large as one another, here.
const UNIT_BYTES: u64 = 1 << 20;

fn slow(reader: Box<dyn Reader>) -> Box<dyn Reader> {
    Disk::wrap(reader, READ, f64::INFINITY, 0)
}

/// Seconds of a pass, and how much of that is computing. The fastest of some, since whatever else the machine does only adds; once one
/// is `enough`, there is no need for more.
fn measured(
    store: &Store,
    tiers: Vec<Tier>,
    depth: usize,
    frames: Option<usize>,
    enough: impl Fn(f64, f64, &Plan) -> bool,
) -> (f64, f64, Plan) {
    let options = EngineOptions {
        device: DeviceChoice::Cuda(0),
        placement: Placement::Units(tiers),
        prefetch_depth: Some(depth),
        page_bytes: Some(1 << 20),
        ring_frames: frames,
        threads: Some(1),
        context: 64,
        pass_tokens: 16,
        pager: PagerOptions {
            wrap: Some(slow),
            // What the machine's own disk takes would come on top.
            direct: false,
            ..PagerOptions::default()
        },
        ..EngineOptions::default()
    };
    let mut engine = open(store, &options).unwrap();
    engine
        .submit(job(&[1, 2], 50, SamplingParams::default()))
        .unwrap();
    let mut events = Vec::new();
    for _ in 0..3 {
        engine.step(&mut events).unwrap();
    }
    const PASSES: u32 = 3;
    let mut best = (f64::INFINITY, 0.0);
    for window in 0..15 {
        if window >= 3 && enough(best.0, best.1, engine.plan()) {
            break;
        }
        let before = engine.stats().paging.gpu_compute;
        let started = Instant::now();
        for _ in 0..PASSES {
            engine.step(&mut events).unwrap();
        }
        let pass = (started.elapsed() / PASSES).as_secs_f64();
        if pass < best.0 {
            let computed = (engine.stats().paging.gpu_compute - before) / PASSES;
            best = (pass, computed.as_secs_f64());
        }
    }
    (best.0, best.1, engine.plan().clone())
}

/// The same pass as predicted.
fn predicted(store: &Store, plan: Plan, computed: f64) -> f64 {
    let unit = |kind: UnitKind| UnitSize {
        kind,
        room_bytes: UNIT_BYTES,
        read_bytes: UNIT_BYTES,
    };
    let units: Vec<UnitSize> = store.units.iter().map(|u| unit(u.kind)).collect();
    let of_pass = units.iter().filter(|u| is_streamed(u.kind)).count();
    let rate = |time: f64| UNIT_BYTES as f64 / time / 1e9;
    let rates = MachineRates {
        disk_gb_per_s: rate(READ.as_secs_f64()),
        h2d_gb_per_s: Some(rate(COPY.as_secs_f64())),
        compute: ComputeRates {
            memory_gb_per_s: rate(computed / of_pass as f64),
            gflops: 1e6,
            element_bytes: 2.0,
            points: vec![],
        },
    };
    let work = PassWork {
        rows: 1,
        wanted: 1,
        element_bytes: 2.0,
        ..PassWork::default()
    };
    let gpu = plan.gpu.map(|gpu| GpuPart {
        ring: Ring {
            frame_bytes: UNIT_BYTES,
            ..gpu.ring
        },
        ..gpu
    });
    predict(&units, &Plan { gpu, ..plan }, &rates, &work).pass_s
}

#[test]
#[ignore = "started by the test below, on a driver"]
fn passes_of_many_plans() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(layered(dir.path(), 36).as_ref(), None);
    let options = PackOptions::new(dir.path().join("offload"));
    let store = Store::pack(&model, &options, &mut |_| {}).unwrap().store;
    let tiers = |of_pass: &[Tier]| {
        let mut next = of_pass.iter().cycle();
        let tier = |kind| match kind {
            UnitKind::Embed => Tier::Cpu,
            kind if is_streamed(kind) => *next.next().unwrap(),
            _ => Tier::Gpu,
        };
        store
            .units
            .iter()
            .map(|u| u.kind)
            .map(tier)
            .collect::<Vec<_>>()
    };
    use Tier::{Cpu, Disk, Gpu};
    // Lists and results are copies too, and take as long; all of them before or after the layers.
    let (pass, computed, _) = measured(&store, tiers(&[Gpu]), 1, None, |_, _, _| true);
    let besides = pass - computed;
    println!("a pass {pass:.4} s, computing {computed:.4}");
    for (of_pass, depth, frames) in [
        (&[Disk][..], 1, None),
        (&[Disk], 0, None),
        (&[Cpu], 1, None),
        (&[Disk, Cpu, Gpu], 1, None),
        (&[Disk, Gpu, Gpu, Cpu, Cpu], 1, None),
        (&[Disk, Cpu, Cpu, Cpu], 1, None),
        (&[Disk, Disk, Cpu], 2, None),
        (&[Disk, Disk, Cpu], 1, Some(2)),
    ] {
        let bound =
            |computed, plan: &Plan| SLACK * predicted(&store, plan.clone(), computed) + besides;
        let enough = |pass, computed, plan: &Plan| pass < bound(computed, plan);
        let (pass, computed, plan) = measured(&store, tiers(of_pass), depth, frames, enough);
        let most = bound(computed, &plan);
        let foretold = predicted(&store, plan, computed);
        let what = format!(
            "{of_pass:?}, depth {depth}, frames {frames:?}: {pass:.4} s, predicted {foretold:.4}, computing {computed:.4}"
        );
        println!("{what}");
        assert!(
            foretold < SLACK * (pass - besides),
            "{what}, besides {besides:.4}"
        );
        assert!(pass < most, "{what}, besides {besides:.4}");
    }
}

#[test]
fn passes_take_what_was_predicted() {
    let copy_us = COPY.as_micros().to_string();
    inside(
        "passes_of_many_plans",
        &[("EMUCUDA_COPY_US", &copy_us), ("EMUCUDA_ORDER", "eager")],
    );
}
