//! The pager with simulated compute: what a pass over a 200 MB model costs when each unit is "computed" by waiting.
//!
//! Bound: max(bytes / disk rate, units × compute). The gap to it is what paging costs.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;
use tensorpager::checkpoint::{Checkpoint, OpenOptions, write_synthetic};
use tensorpager::paging::{Pager, PagerOptions, Placement, Plan, SlotLayout, is_streamed};
use tensorpager::store::Store;
use tensorpager::units::UnitId;

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn pass(pager: &mut Pager, units: &[UnitId], compute: Duration) {
    pager.begin_pass(true).unwrap();
    for &unit in units {
        let lease = pager.acquire(unit).unwrap();
        spin(compute);
        pager.release(lease).unwrap();
    }
}

fn paging(c: &mut Criterion) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let config = json!({
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": true, "use_sliding_window": false, "torch_dtype": "bfloat16"
    });
    write_synthetic(dir.path(), &config, &mut |_, _| Ok(())).unwrap();
    let ckpt =
        Checkpoint::open(&dir.path().display().to_string(), &OpenOptions::default()).unwrap();
    let store = Store::open_in_place(&ckpt).unwrap();
    let file_bytes: Vec<u64> = store.files.iter().map(|f| f.bytes).collect();
    let units: Vec<UnitId> = store
        .units
        .iter()
        .filter(|u| is_streamed(u.kind))
        .map(|u| u.id)
        .collect();
    let mut group = c.benchmark_group("paging pass");
    group.sample_size(10);
    for (page_kib, depth, compute_ms) in [(256, 1, 0), (4096, 1, 0), (4096, 3, 0), (4096, 1, 20)] {
        let layouts: Vec<SlotLayout> = store
            .units
            .iter()
            .map(|u| SlotLayout::new(u, &file_bytes, page_kib << 10))
            .collect();
        let plan = Plan::new(&layouts, 1 << 30, depth, &Placement::Disk, true).unwrap();
        group.throughput(Throughput::Bytes(plan.streamed_bytes));
        let cancel = Arc::new(AtomicBool::new(false));
        let options = PagerOptions::default();
        let mut pager =
            Pager::start(&store, layouts, plan, &options, cancel, &mut |_, _| {}).unwrap();
        let name = format!("page {page_kib} KiB, depth {depth}, compute {compute_ms} ms a unit");
        group.bench_function(name, |b| {
            b.iter(|| pass(&mut pager, &units, Duration::from_millis(compute_ms)));
        });
    }
    group.finish();
}

criterion_group!(benches, paging);
criterion_main!(benches);
