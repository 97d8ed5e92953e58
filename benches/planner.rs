//! The planner's own time, that of a prediction, and what a pass costs over prefetch depth × page size on simulated disks.
//!
//! `cargo bench --bench planner`. The disks are a reader that answers from the page cache after a time of its own: a fast one, a slow one, and
//! one between them that now and then takes ten times as long. Units are 7 MB; each is computed with for as long as the fast disk takes to
//! read it, so a pass takes at best its bytes over the slower of the disk's rate and 4 GB/s.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;
use tensorpager::checkpoint::{Checkpoint, OpenOptions, write_synthetic};
use tensorpager::io::Reader;
use tensorpager::paging::{
    Budget, ComputeRates, MachineRates, Pager, PagerOptions, PassWork, Placement, Plan, Planner,
    Problem, SlotLayout, Strategy, TierRates, UnitSize, VerifyWhen, is_streamed, predict,
};
use tensorpager::spec::UnitKind;
use tensorpager::store::Store;
use tensorpager::units::UnitId;

#[path = "../tests/engine_common/disk.rs"]
mod disk;

use disk::Disk;

const MIB: u64 = 1 << 20;

fn model(layers: u32, heads: u32, jitter: u64) -> Vec<UnitSize> {
    let unit = |kind, bytes| UnitSize {
        kind,
        room_bytes: bytes,
        read_bytes: bytes,
    };
    let mut v = vec![unit(UnitKind::Embed, 1000 * MIB)];
    v.extend((0..layers).map(|i| unit(UnitKind::Layer(i), 444 * MIB + u64::from(i) % 5 * jitter)));
    v.push(unit(UnitKind::Norm, 4096));
    v.extend((0..heads).map(|i| {
        unit(
            UnitKind::Head(i),
            if i + 1 == heads { 100 * MIB } else { 440 * MIB },
        )
    }));
    v
}

fn planner(c: &mut Criterion) {
    let mut group = c.benchmark_group("planner");
    for (name, layers, heads, jitter) in [
        ("7B", 28, 3, 0),
        ("7B in place", 28, 3, 65_536),
        ("70B", 80, 5, 0),
    ] {
        let units = model(layers, heads, jitter);
        for (machine, gpu_bytes) in [("cpu", None), ("gpu", Some(6 << 30))] {
            let problem = Problem {
                units: &units,
                budget: Budget {
                    cpu_bytes: 8 << 30,
                    gpu_bytes,
                },
                depth: 1,
                tied_head: false,
                rates: TierRates::default(),
            };
            group.bench_function(BenchmarkId::new(name, machine), |b| {
                b.iter(|| Planner.place(black_box(&problem)));
            });
        }
    }
    group.finish();
}

/// What `plan` asks some hundred times for one table.
fn prediction(c: &mut Criterion) {
    let rates = MachineRates {
        disk_gb_per_s: 5.0,
        h2d_gb_per_s: None,
        compute: ComputeRates {
            memory_gb_per_s: 30.0,
            gflops: 800.0,
            element_bytes: 2.0,
            points: Vec::new(),
        },
    };
    let work = PassWork {
        rows: 8,
        wanted: 8,
        element_bytes: 2.0,
        ..PassWork::default()
    };
    let mut group = c.benchmark_group("prediction");
    for (name, layers, heads) in [("7B", 28, 3), ("70B", 80, 5)] {
        let units = model(layers, heads, 0);
        let plan = Plan::of_sizes(&units, 8 << 30, 1, &Placement::Auto, false).expect("8 GiB");
        group.bench_function(name, |b| {
            b.iter(|| predict(black_box(&units), &plan, &rates, &work));
        });
    }
    group.finish();
}

const PER_READ: Duration = Duration::from_micros(10);

fn fast(r: Box<dyn Reader>) -> Box<dyn Reader> {
    Disk::wrap(r, PER_READ, 4.0, 0)
}
fn slow(r: Box<dyn Reader>) -> Box<dyn Reader> {
    Disk::wrap(r, PER_READ, 0.5, 0)
}
fn jittery(r: Box<dyn Reader>) -> Box<dyn Reader> {
    Disk::wrap(r, PER_READ, 1.0, 16)
}

/// One pass through the pager, each unit "computed" for as long as the fast disk takes to read it.
fn paging(c: &mut Criterion) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let config = json!({
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": true, "use_sliding_window": false, "torch_dtype": "bfloat16"
    });
    write_synthetic(dir.path(), &config, &mut |_, _| Ok(())).expect("a model");
    let ckpt = Checkpoint::open(&dir.path().to_string_lossy(), &OpenOptions::default());
    let store = Store::open_in_place(&ckpt.expect("the model")).expect("it opens");
    let file_bytes: Vec<u64> = store.files.iter().map(|f| f.bytes).collect();
    type Wrap = fn(Box<dyn Reader>) -> Box<dyn Reader>;
    let disks: [(&str, Wrap); 3] = [("fast", fast), ("slow", slow), ("jittery", jittery)];
    let mut group = c.benchmark_group("paging");
    group.sample_size(10);
    group.warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(2));
    for (name, wrap) in disks {
        for depth in [1, 2, 4] {
            for page in [64u64 << 10, 256 << 10, 1 << 20] {
                let layouts: Vec<SlotLayout> = store
                    .units
                    .iter()
                    .map(|u| SlotLayout::new(u, &file_bytes, page))
                    .collect();
                let plan =
                    Plan::new(&layouts, 1 << 30, depth, &Placement::Disk, true).expect("1 GiB");
                let pass: Vec<UnitId> = store
                    .units
                    .iter()
                    .filter(|u| is_streamed(u.kind))
                    .map(|u| u.id)
                    .collect();
                group.throughput(Throughput::Bytes(plan.streamed_bytes));
                let compute = Duration::from_nanos(plan.streamed_bytes / 4 / pass.len() as u64);
                let options = PagerOptions {
                    wrap: Some(wrap),
                    verify: VerifyWhen::Never,
                    // The disk underneath is not what is measured.
                    direct: false,
                    ..PagerOptions::default()
                };
                let cancel = Arc::new(AtomicBool::new(false));
                let mut pager =
                    Pager::start(&store, layouts, plan, &options, cancel, &mut |_, _| {})
                        .expect("starts");
                let id = BenchmarkId::new(name, format!("depth {depth}, {} KiB", page >> 10));
                group.bench_function(id, |b| {
                    b.iter(|| {
                        pager.begin_pass(true).expect("a pass");
                        for unit in &pass {
                            let lease = pager.acquire(*unit).expect("it arrives");
                            black_box(pager.bytes(&lease));
                            let until = Instant::now() + compute;
                            while Instant::now() < until {
                                std::hint::spin_loop();
                            }
                            pager.release(lease).expect("released");
                        }
                    });
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, planner, prediction, paging);
criterion_main!(benches);
