//! Kernels at a 7B model's layer shapes, and the copy path, on the GPU found; without one it says why and measures nothing.
//!
//! `cargo bench --bench gpu`. The GPU suite (`gpu/README.md`) is what records are made of; this is for one change against another.

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use memmap2::MmapMut;
use tensorpager::device::cuda::{Context, Copier, Piece, Pin, Slot};
use tensorpager::device::{CudaOptions, Device, Into, Product, WeightView};
use tensorpager::error::Result;
use tensorpager::units::Dtype;

#[path = "../examples/gpu_suite/attending.rs"]
mod attending;
#[path = "../examples/gpu_suite/bed.rs"]
mod bed;

use attending::Attention;
use bed::{Bed, Random, Weight, bytes_of};

const HIDDEN: usize = 3584;
const MLP: usize = 18944;
const HEADS: usize = 28;
const KV_HEADS: usize = 4;
const VOCAB: usize = 152_064;
/// Weights are taken in turn from more bytes than any cache has.
const COPIES: usize = 4;

fn open() -> Option<Bed> {
    let options = CudaOptions {
        ordinal: 0,
        half: Dtype::BF16,
        head_size: 128,
        vision_head_size: None,
        memory: None,
        gemm: tensorpager::device::cuda::Gemm::Own,
    };
    match Context::new(0).and_then(|_| Device::cuda(&options)) {
        Ok(device) => Some(Bed {
            device,
            half: Dtype::BF16,
        }),
        Err(e) => {
            println!("GPU benches skipped: {e}");
            None
        }
    }
}

/// `times` calls back to back, all done.
fn spent(bed: &Bed, times: u64, mut call: impl FnMut(usize) -> Result<()>) -> Duration {
    let cuda = bed.device.as_cuda().expect("a GPU");
    let mut run = || -> Result<Duration> {
        cuda.synchronize()?;
        let started = Instant::now();
        for i in 0..times {
            call(i as usize)?;
        }
        cuda.synchronize()?;
        Ok(started.elapsed())
    };
    run().unwrap_or_else(|e| panic!("{e}"))
}

fn linear(c: &mut Criterion, bed: &Bed) -> Result<()> {
    let mut random = Random::new(1);
    let pattern = bytes_of(&random.values(1 << 16, 0.1), bed.half);
    for (n, k) in [(HIDDEN, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)] {
        let bytes: Vec<u8> = pattern.iter().copied().cycle().take(n * k * 2).collect();
        let weights = (0..COPIES)
            .map(|_| bed.weight_bytes(bytes.clone(), n, k))
            .collect::<Result<Vec<_>>>()?;
        let mut group = c.benchmark_group(format!("gpu/linear/{n}x{k}"));
        for rows in [1, 8, 16, 32, 64, 512, 2048] {
            let a = bed.acts(&random.values(rows * k, 1.0), k)?;
            let mut out = bed.device.rows(rows, n)?;
            group.throughput(match rows {
                1..=32 => Throughput::Bytes((n * k * 2) as u64),
                _ => Throughput::Elements(2 * (rows * n * k) as u64),
            });
            group.bench_function(BenchmarkId::from_parameter(rows), |b| {
                b.iter_custom(|times| {
                    spent(bed, times, |i| {
                        let w = weights[i % COPIES].view();
                        bed.device
                            .linear(&a, rows, &w, None, &mut out, 0, Into::Store)
                    })
                });
            });
        }
    }
    Ok(())
}

/// Queries, keys and values, or gate and up: in one launch as the forward pass asks for them, and in one each.
fn several(c: &mut Criterion, bed: &Bed) -> Result<()> {
    let mut random = Random::new(1);
    let pattern = bytes_of(&random.values(1 << 16, 0.1), bed.half);
    let kv = KV_HEADS * 128;
    let shapes: [(&str, &[usize]); 2] = [("qkv", &[HIDDEN, kv, kv]), ("gate up", &[MLP, MLP])];
    for (name, widths) in shapes {
        let weight = |n: usize| {
            let bytes = pattern.iter().copied().cycle().take(n * HIDDEN * 2);
            bed.weight_bytes(bytes.collect(), n, HIDDEN)
        };
        let set = |_| {
            widths
                .iter()
                .map(|n| weight(*n))
                .collect::<Result<Vec<_>>>()
        };
        let weights = (0..COPIES).map(set).collect::<Result<Vec<_>>>()?;
        let mut group = c.benchmark_group(format!("gpu/linear/{name}"));
        for rows in [1, 8, 32, 512] {
            let a = bed.acts(&random.values(rows * HIDDEN, 1.0), HIDDEN)?;
            let outs = widths.iter().map(|n| bed.device.rows(rows, *n));
            let mut outs = outs.collect::<Result<Vec<_>>>()?;
            let bytes = widths.iter().sum::<usize>() * HIDDEN * 2;
            group.throughput(Throughput::Bytes(bytes as u64));
            for (how, at_once) in [("one launch", widths.len()), ("a launch each", 1)] {
                group.bench_function(BenchmarkId::new(how, rows), |b| {
                    b.iter_custom(|times| {
                        spent(bed, times, |i| {
                            let set = weights[i % COPIES].iter().map(Weight::view);
                            let views: Vec<WeightView<'_>> = set.collect();
                            let mut products: Vec<Product<'_>> = views
                                .iter()
                                .zip(&mut outs)
                                .map(|(w, out)| Product { w, bias: None, out })
                                .collect();
                            products
                                .chunks_mut(at_once)
                                .try_for_each(|some| bed.device.linear_each(&a, rows, some))
                        })
                    });
                });
            }
        }
    }
    Ok(())
}

fn rowwise(c: &mut Criterion, bed: &Bed) -> Result<()> {
    let d = &bed.device;
    for rows in [1, 64, 2048] {
        let x = d.rows(rows, HIDDEN)?;
        let w = bed.weight_bytes(vec![0; HIDDEN * 2], 1, HIDDEN)?;
        let mut out = d.acts(rows, HIDDEN, bed.half)?;
        c.bench_function(&format!("gpu/rmsnorm/{rows}"), |b| {
            b.iter_custom(|times| {
                spent(bed, times, |_| {
                    d.rmsnorm(&x, 0, rows, &w.view(), 1e-6, &mut out)
                })
            });
        });
        let (gate, up) = (d.rows(rows, MLP)?, d.rows(rows, MLP)?);
        let mut out = d.acts(rows, MLP, bed.half)?;
        c.bench_function(&format!("gpu/swiglu/{rows}"), |b| {
            b.iter_custom(|times| spent(bed, times, |_| d.swiglu(&gate, &up, rows, MLP, &mut out)));
        });
    }
    Ok(())
}

/// Decode of many and of one long sequence, and a prompt; with what appends its keys and values.
fn attention(c: &mut Criterion, bed: &Bed) -> Result<()> {
    for (what, sequences, cached, new) in [
        ("decode/64x2000", 64, 2000, 1),
        ("decode/1x16000", 1, 16_000, 1),
        ("prefill/2048", 1, 0, 2048),
    ] {
        let mut pass = Attention::new(bed, (HEADS, KV_HEADS), sequences, cached, new)?;
        pass.begin()?;
        c.bench_function(&format!("gpu/rope_append/{what}"), |b| {
            b.iter_custom(|times| spent(bed, times, |_| pass.append()));
        });
        c.bench_function(&format!("gpu/attention/{what}"), |b| {
            b.iter_custom(|times| spent(bed, times, |_| pass.attend()));
        });
    }
    Ok(())
}

/// argmax and the 50 best, of all logits at once.
fn selection(c: &mut Criterion, bed: &Bed) -> Result<()> {
    let d = &bed.device;
    for rows in [1, 64] {
        let logits = bed.rows(&Random::new(2).values(rows * VOCAB, 4.0), VOCAB)?;
        let mut best = d.best(1, rows)?.expect("a GPU selects");
        let mut group = c.benchmark_group("gpu/select");
        group.throughput(Throughput::Bytes((rows * VOCAB * 4) as u64));
        for k in [1, 50] {
            group.bench_function(BenchmarkId::new(format!("best {k}"), rows), |b| {
                b.iter_custom(|times| {
                    spent(bed, times, |_| {
                        d.select(&logits, rows, VOCAB, k, 0, &mut best)
                    })
                });
            });
        }
    }
    Ok(())
}

struct Frame(Arc<MmapMut>);

impl Deref for Frame {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Pinned frames into a slot and back into the ring, as the pager sends them.
fn copies(c: &mut Criterion, bed: &Bed) -> Result<()> {
    let context = bed.device.as_cuda().expect("a GPU").context();
    let mut group = c.benchmark_group("gpu/copy");
    for kib in [256, 1024, 4096] {
        let bytes = kib << 10;
        let (mut idle, mut pins) = (Vec::new(), Vec::new());
        for _ in 0..16 {
            let mut memory = MmapMut::map_anon(bytes).expect("memory");
            memory.fill(1);
            let memory = Arc::new(memory);
            match Pin::new(context, &memory[..], Box::new(memory.clone())) {
                Ok(pin) => pins.push(pin),
                Err(e) => {
                    println!("gpu/copy skipped: {e}");
                    return Ok(());
                }
            }
            idle.push(Frame(memory));
        }
        let mut slot = Slot::new(context, bytes as u64, "what is copied")?;
        let mut copier = Copier::new(context, idle.len())?;
        copier.begin(&mut slot)?;
        let all = [Piece {
            from: 0,
            to: 0,
            bytes,
        }];
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{kib}KiB")), |b| {
            b.iter_custom(|times| {
                let mut run = || -> Result<Duration> {
                    let started = Instant::now();
                    for _ in 0..times {
                        if idle.is_empty() {
                            idle.extend(copier.reclaim(true)?.map(|f| f.0));
                        }
                        copier.send(idle.pop().expect("a frame"), &all, &slot)?;
                    }
                    while let Some((frame, _)) = copier.reclaim(true)? {
                        idle.push(frame);
                    }
                    Ok(started.elapsed())
                };
                run().unwrap_or_else(|e| panic!("{e}"))
            });
        });
        // The frames' copies are done: only then may their memory be unpinned.
        drop(pins);
    }
    Ok(())
}

fn all(c: &mut Criterion) {
    if let Some(bed) = open() {
        let done = linear(c, &bed)
            .and_then(|()| several(c, &bed))
            .and_then(|()| rowwise(c, &bed))
            .and_then(|()| attention(c, &bed))
            .and_then(|()| selection(c, &bed))
            .and_then(|()| copies(c, &bed));
        done.unwrap_or_else(|e| panic!("{e}"));
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
