//! One decode pass of a tiny model end to end: scheduler, pager, forward pass, sampler. With weights this small it shows
//! what the engine itself costs; bytes over bandwidth are negligible.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::engine::{Engine, EngineOptions, Job};
use tensorpager::paging::Placement;
use tensorpager::store::Store;

fn engine(store: &Store, placement: Placement, sequences: usize) -> Engine {
    let options = EngineOptions {
        placement,
        context: 100_000,
        kv_tokens: Some(4096 * sequences),
        max_sequences: sequences,
        pass_tokens: sequences.max(16),
        logits_rows: sequences,
        ..EngineOptions::default()
    };
    Engine::open(
        store,
        &options,
        Arc::new(AtomicBool::new(false)),
        &mut |_, _| {},
    )
    .unwrap()
}

fn submit(engine: &mut Engine, sequences: usize) {
    for i in 0..sequences {
        engine
            .submit(Job {
                prompt: vec![i as u32],
                media: Vec::new(),
                max_tokens: 1 << 20,
                ..Job::default()
            })
            .unwrap();
    }
}

fn decode(c: &mut Criterion) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama3-bf16");
    let ckpt = Checkpoint::open(&model.display().to_string(), &OpenOptions::default()).unwrap();
    let store = Store::open_in_place(&ckpt).unwrap();
    let mut group = c.benchmark_group("decode pass");
    for (name, placement) in [("ram", Placement::Cpu), ("disk", Placement::Disk)] {
        for sequences in [1, 64] {
            let mut e = engine(&store, placement.clone(), sequences);
            submit(&mut e, sequences);
            let mut events = Vec::new();
            group.throughput(Throughput::Elements(sequences as u64));
            group.bench_function(format!("{name}/{sequences} sequences"), |b| {
                b.iter(|| {
                    events.clear();
                    e.step(&mut events).unwrap();
                    // Contexts end: begin again rather than measure an empty pass.
                    if e.pending() < sequences {
                        let missing = sequences - e.pending();
                        submit(&mut e, missing);
                    }
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
