//! The CPU ops at the shapes of a 1.5B Qwen2: GB/s of weights at one row, GFLOP/s at many.
//!
//! `cargo bench --bench ops`, `TENSORPAGER_THREADS=1` for one thread, `TENSORPAGER_ISA=portable` for another instruction set.
//! Each product runs over several copies of its weights in turn where a copy would fit a cache, so that one row is bound by memory.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use memmap2::{Advice, MmapMut};
use tensorpager::device::WeightView;
use tensorpager::device::cpu::{ActBuf, AttnSegment, CpuDevice, KvLayout, KvView, Mode};
use tensorpager::units::Dtype;

/// (weight rows, columns): MLP up, MLP down, head.
const SHAPES: [(usize, usize); 3] = [(8960, 1536), (1536, 8960), (151_936, 1536)];
const ROWS: [usize; 5] = [1, 4, 16, 64, 512];
/// More than the last-level cache of the machines this is run on.
const COLD_BYTES: usize = 128 << 20;

fn device() -> CpuDevice {
    let threads = std::env::var("TENSORPAGER_THREADS")
        .ok()
        .and_then(|t| t.parse().ok())
        .unwrap_or(0);
    CpuDevice::new(threads).expect("the instruction set exists")
}

/// Small numbers in bfloat16, not all alike, on huge pages as the engine's arena has them.
fn weight_bytes(elements: usize) -> MmapMut {
    let mut bytes = MmapMut::map_anon(elements * 2).expect("memory for weights");
    // Refused where the system has none: then the pages are small.
    let _ = bytes.advise(Advice::HugePage);
    let mut state = 1u32;
    for element in bytes.chunks_exact_mut(2) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let x = (state >> 16) as f32 / 65_536.0 - 0.5;
        element.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes());
    }
    bytes
}

fn floats(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0)
        .collect()
}

fn linear(c: &mut Criterion) {
    let dev = device();
    for (n, k) in SHAPES {
        let bytes = n * k * 2;
        let copies = COLD_BYTES.div_ceil(bytes);
        let data = weight_bytes(copies * n * k);
        let mut group = c.benchmark_group(format!("linear/{}/{n}x{k}", dev.isa()));
        for rows in ROWS {
            if rows * n * k > 512 * 8960 * 1536 {
                continue;
            }
            let x = floats(rows * k);
            let mut a = ActBuf::new(Dtype::BF16, rows, k);
            dev.round(&x, rows, k, &mut a);
            let mut out = vec![0.0; rows * n];
            let throughput = if rows == 1 {
                Throughput::Bytes(bytes as u64)
            } else {
                // Two operations, a multiplication and an addition, an element.
                Throughput::Elements(2 * (rows * n * k) as u64)
            };
            group.throughput(throughput);
            let mut copy = 0;
            group.bench_function(BenchmarkId::from_parameter(rows), |b| {
                b.iter(|| {
                    copy = (copy + 1) % copies;
                    let w = WeightView::packed(Dtype::BF16, n, k, &data[copy * bytes..]);
                    dev.linear(&a, rows, &w, None, &mut out, n, Mode::Store);
                    black_box(&out);
                });
            });
        }
        group.finish();
    }
}

/// 12 heads over 2 of 128: a pass of `rows` rows at the end of `context` positions, one layer.
fn attention(c: &mut Criterion) {
    let dev = device();
    let (heads, kv_heads, size) = (12, 2, 128);
    let mut group = c.benchmark_group(format!("attention/{}", dev.isa()));
    for (name, rows, context) in [
        ("decode", 1, 512),
        ("decode", 1, 4096),
        ("prefill", 512, 512),
        ("prefill", 512, 4096),
    ] {
        let blocks = context / 16;
        let layout = KvLayout {
            dtype: Dtype::BF16,
            layers: 1,
            blocks,
            kv_heads,
            head_size: size,
        };
        let data = weight_bytes(layout.bytes() / 2);
        let table: Vec<u32> = (0..blocks as u32).rev().collect();
        let q = floats(rows * heads * size);
        let mut out = ActBuf::new(Dtype::BF16, rows, heads * size);
        let segments = [AttnSegment {
            first_row: 0,
            rows,
            start_pos: context - rows,
            table: &table,
        }];
        // Scores and sums of values: two operations an element each.
        let keys: usize = (context - rows + 1..=context).sum();
        group.throughput(Throughput::Elements(4 * (keys * heads * size) as u64));
        group.bench_function(BenchmarkId::new(name, context), |b| {
            let kv = KvView {
                layout,
                data: &data,
            };
            b.iter(|| {
                let scale = 1.0 / (size as f32).sqrt();
                dev.attention(
                    &q,
                    heads * size,
                    heads,
                    &kv,
                    0,
                    &segments,
                    scale,
                    None,
                    &mut out,
                );
                black_box(&out);
            });
        });
    }
    group.finish();
}

fn elementwise(c: &mut Criterion) {
    let dev = device();
    let mut group = c.benchmark_group(format!("elementwise/{}", dev.isa()));
    for rows in [1, 512] {
        let (hidden, inner) = (1536, 8960);
        let x = floats(rows * inner);
        let weight = weight_bytes(hidden);
        let w = WeightView::packed(Dtype::BF16, 1, hidden, &weight);
        let mut out = ActBuf::new(Dtype::BF16, rows, inner);
        group.throughput(Throughput::Elements((rows * hidden) as u64));
        group.bench_function(BenchmarkId::new("rmsnorm", rows), |b| {
            b.iter(|| dev.rmsnorm(black_box(&x), rows, hidden, &w, 1e-6, &mut out));
        });
        group.throughput(Throughput::Elements((rows * inner) as u64));
        group.bench_function(BenchmarkId::new("swiglu", rows), |b| {
            b.iter(|| dev.swiglu(black_box(&x), &x, rows, inner, &mut out));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = linear, attention, elementwise
}
criterion_main!(benches);
