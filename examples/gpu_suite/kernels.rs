//! How long each kernel takes at a 7B model's shapes (Qwen2.5-7B: 3584 wide, MLP 18944, 28 heads of 128, 4 kv heads), against its floor:
//! bytes over the measured rate of device memory where that bounds it; where arithmetic does, cublasLt's time for the same product, and for
//! attention its operations over the best rate of a product.

use std::time::Instant;

use tensorpager::device::cuda::Gemm;
use tensorpager::device::{Acts, Into, Product, Rows, WeightView};
use tensorpager::units::Dtype;

use super::attending::{Attention, HEAD};
use super::bed::{Bed, Random, Weight};
use super::copies::one_line;
use super::goals::Goal;
use super::{Outcome, Suite, TIME_IS_UP, ops, vision};

/// More than any cache: weights are taken in turn from so many bytes, as when they stream.
const COLD_BYTES: usize = 512 << 20;

struct Sizes {
    hidden: usize,
    mlp: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    few: &'static [usize],
    many: &'static [usize],
    prompt: usize,
    cached: usize,
    sequences: usize,
}

const REAL: Sizes = Sizes {
    hidden: 3584,
    mlp: 18944,
    heads: 28,
    kv_heads: 4,
    vocab: 152_064,
    few: &[1, 8, 16, 32],
    many: &[64, 256, 512, 2048, 4096],
    prompt: 2048,
    cached: 2000,
    sequences: 64,
};
const SMOKE: Sizes = Sizes {
    hidden: 128,
    mlp: 192,
    heads: 2,
    kv_heads: 1,
    vocab: 300,
    few: &[1, 8],
    many: &[40],
    prompt: 20,
    cached: 30,
    sequences: 2,
};
/// Rows at which a product is bound by memory.
const FEW: usize = 32;
/// A product with a floor below this, µs, is not far from what launching it takes: the goal for few rows does not judge it.
const LAUNCH_US: f64 = 10.0;

/// The best of three rounds, seconds a call; each round is long enough for the clock.
pub fn time(bed: &Bed, mut call: impl FnMut(usize) -> Outcome<()>) -> Outcome<f64> {
    let cuda = bed.device.as_cuda().ok_or("no GPU")?;
    let mut round = |times: usize| -> Outcome<f64> {
        cuda.synchronize()?;
        let started = Instant::now();
        for i in 0..times {
            call(i)?;
        }
        cuda.synchronize()?;
        Ok(started.elapsed().as_secs_f64() / times as f64)
    };
    round(1)?;
    let guess = round(2)?;
    let times = (0.03 / guess).clamp(2.0, 500.0) as usize;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        best = best.min(round(times)?);
    }
    Ok(best)
}

pub fn section(suite: &mut Suite) -> Outcome<()> {
    let bed = ops::open(Dtype::BF16, HEAD, None)?;
    let sizes = if suite.smoke { SMOKE } else { REAL };
    products(suite, &bed, &sizes)?;
    if let Some(tflops) = suite.tflops {
        suite.report.note(&format!(
            "Floors of arithmetic: operations over {tflops:.1} TFLOP/s, the best that a product reached above."
        ));
    }
    suite.report.table(
        "Other kernels",
        &[
            "kernel",
            "µs",
            "GB/s",
            "TFLOP/s",
            "floor µs",
            "bound by",
            "of floor",
        ],
    );
    let all = rowwise(suite, &bed, &sizes)
        .and_then(|()| attention(suite, &bed, &sizes))
        .and_then(|()| vision::section(suite));
    match all {
        Err(_) if suite.up() => {
            suite.report.not_run("the kernels after these", TIME_IS_UP);
            Ok(())
        }
        other => other,
    }
}

/// Beside what bounds it: bytes over the measured rate of device memory, or operations over the best rate that a product reached here,
/// whichever takes longer. Stops where the time is up.
pub fn floor_row(
    suite: &mut Suite,
    what: &str,
    seconds: f64,
    bytes: usize,
    flops: f64,
) -> Outcome<()> {
    let memory = suite.memory_gb_per_s.map(|m| bytes as f64 / m / 1e9);
    let tensor = suite.tflops.map(|t| flops / t / 1e12);
    let (floor, bound) = match (memory, tensor.filter(|_| flops > 0.0)) {
        (Some(m), Some(t)) if t > m => (Some(t), "tensor cores"),
        (Some(m), _) => (Some(m), "memory"),
        (None, t) => (t, "tensor cores"),
    };
    let text = |x: Option<String>| x.unwrap_or("-".into());
    suite.report.row(&[
        what,
        &format!("{:.1}", seconds * 1e6),
        &format!("{:.0}", bytes as f64 / seconds / 1e9),
        &match flops > 0.0 {
            true => format!("{:.1}", flops / seconds / 1e12),
            false => "-".into(),
        },
        &text(floor.map(|f| format!("{:.1}", f * 1e6))),
        if floor.is_some() { bound } else { "-" },
        &text(floor.map(|f| format!("{:.0} %", 100.0 * f / seconds))),
    ]);
    match suite.up() {
        true => Err(TIME_IS_UP.into()),
        false => Ok(()),
    }
}

/// Products of the same rows with several matrices, on one device: ours, or cublasLt in our place. Both are asked the same way and leave
/// float32.
struct Products<'b> {
    bed: &'b Bed,
    /// A matrix of each width; such sets are taken in turn.
    weights: Vec<Vec<Weight>>,
    a: Acts,
    outs: Vec<Rows>,
}

impl<'b> Products<'b> {
    fn new(bed: &'b Bed, most: usize, shape: &Matrices, copies: usize) -> Outcome<Products<'b>> {
        // Small numbers, not all alike: what is multiplied changes a GPU's clock.
        let mut random = Random::new(7);
        let pattern = super::bed::bytes_of(&random.values(1 << 16, 0.1), bed.half);
        let k = shape.k;
        let set = |_| -> Outcome<Vec<Weight>> {
            let bytes = |n: usize| pattern.iter().copied().cycle().take(n * k * 2).collect();
            let each = shape.widths.iter();
            each.map(|n| Ok(bed.weight_bytes(bytes(*n), *n, k)?))
                .collect()
        };
        Ok(Products {
            bed,
            weights: (0..copies).map(set).collect::<Outcome<_>>()?,
            a: bed.acts(&random.values(most * k, 1.0), k)?,
            outs: shape
                .widths
                .iter()
                .map(|n| Ok(bed.device.rows(most, *n)?))
                .collect::<Outcome<_>>()?,
        })
    }

    /// As the forward pass asks for them.
    fn seconds(&mut self, rows: usize) -> Outcome<f64> {
        let (d, copies) = (&self.bed.device, self.weights.len());
        time(self.bed, |i| {
            let views: Vec<WeightView<'_>> =
                self.weights[i % copies].iter().map(Weight::view).collect();
            let mut products: Vec<Product<'_>> = views
                .iter()
                .zip(&mut self.outs)
                .map(|(w, out)| Product { w, bias: None, out })
                .collect();
            Ok(d.linear_each(&self.a, rows, &mut products)?)
        })
    }

    /// In a launch each.
    fn seconds_one_by_one(&mut self, rows: usize) -> Outcome<f64> {
        let (d, copies) = (&self.bed.device, self.weights.len());
        time(self.bed, |i| {
            for (w, out) in self.weights[i % copies].iter().zip(&mut self.outs) {
                d.linear(&self.a, rows, &w.view(), None, out, 0, Into::Store)?;
            }
            Ok(())
        })
    }
}

/// Matrices that multiply the same rows of `k`; how many rows each has.
struct Matrices {
    name: &'static str,
    widths: Vec<usize>,
    k: usize,
}

impl Matrices {
    fn n(&self) -> usize {
        self.widths.iter().sum()
    }
}

fn products(suite: &mut Suite, bed: &Bed, s: &Sizes) -> Outcome<()> {
    let kv = s.kv_heads * HEAD;
    let shapes = [
        ("q, k, v", vec![s.hidden, kv, kv], s.hidden),
        ("o", vec![s.hidden], s.hidden),
        ("gate, up", vec![s.mlp, s.mlp], s.hidden),
        ("down", vec![s.hidden], s.mlp),
    ]
    .map(|(name, widths, k)| Matrices { name, widths, k });
    let most = s.few.iter().chain(s.many).copied().max().unwrap_or(1);
    let theirs = match suite.cublaslt {
        true => ops::open_with(Gemm::CublasLt, bed.half, HEAD, None).map_err(|e| one_line(&e)),
        false => Err("it was left out".into()),
    };
    if let Err(why) = &theirs {
        suite
            .report
            .note(&format!("cublasLt is not beside the products: {why}"));
    }
    let mut refused = Vec::new();
    suite.report.table(
        "Products, bf16 weights",
        &[
            "product (n x k)",
            "rows",
            "µs",
            "GB/s",
            "of memory",
            "TFLOP/s",
            "of cublasLt",
            "µs in a launch each",
        ],
    );
    let mut launches = Vec::new();
    'shapes: for shape in &shapes {
        let name = shape.name;
        let copies = match suite.smoke {
            true => 2,
            false => COLD_BYTES.div_ceil(shape.n() * shape.k * 2),
        };
        let mut own = Products::new(bed, most, shape, copies)?;
        // What cublasLt refuses is its own affair: ours are timed without it.
        let mut other = theirs.as_ref().ok().and_then(|theirs| {
            let products = Products::new(theirs, most, shape, copies);
            products
                .map_err(|e| refused.push(format!("{name}: {}", one_line(&*e))))
                .ok()
        });
        for rows in s.few.iter().chain(s.many).copied() {
            if suite.up() {
                suite.report.not_run("the products after these", TIME_IS_UP);
                break 'shapes;
            }
            let seconds = own.seconds(rows)?;
            let apart = match shape.widths.len() {
                1 => None,
                _ => Some(own.seconds_one_by_one(rows)?),
            };
            let theirs = other.as_mut().and_then(|o| {
                let why = |e: Box<dyn std::error::Error>| {
                    refused.push(format!("{name}, {rows} rows: {}", one_line(&*e)))
                };
                o.seconds(rows).map_err(why).ok()
            });
            let measured = Measured {
                rows,
                seconds,
                apart,
                theirs,
            };
            launches.extend(product_row(suite, shape, &measured));
        }
    }
    for why in refused {
        suite.report.not_run("cublasLt", &why);
    }
    if !launches.is_empty() {
        suite.report.note(&format!(
            "Not judged by the goal for few rows, whose floor is below {LAUNCH_US} µs and near what a launch costs: {}.",
            launches.join(", ")
        ));
    }
    Ok(())
}

/// Seconds: of ours, of ours in a launch each, of cublasLt's.
struct Measured {
    rows: usize,
    seconds: f64,
    apart: Option<f64>,
    theirs: Option<f64>,
}

/// Its name where the goal for few rows does not judge it.
fn product_row(suite: &mut Suite, shape: &Matrices, m: &Measured) -> Option<String> {
    let &Measured { rows, seconds, .. } = m;
    let (name, n, k) = (shape.name, shape.n(), shape.k);
    let bytes = (n * k * 2 + rows * k * 2 + rows * n * 4) as f64;
    let rate = bytes / seconds / 1e9;
    let share = suite.memory_gb_per_s.map(|m| 100.0 * rate / m);
    let tflops = 2.0 * (rows * n * k) as f64 / seconds / 1e12;
    let of_other = m.theirs.map(|o| o / seconds);
    let best = tflops * of_other.map_or(1.0, |o| 1.0f64.max(1.0 / o));
    suite.tflops = Some(suite.tflops.map_or(best, |t| t.max(best)));
    let floor_us = suite.memory_gb_per_s.map(|m| bytes / m / 1e3);
    let judged = floor_us.is_some_and(|f| f >= LAUNCH_US);
    if let Some(share) = share.filter(|_| rows <= FEW && judged) {
        suite.goals.seen(Goal::FewRows, share / 100.0);
    }
    if let Some(share) = of_other.filter(|_| (512..=4096).contains(&rows)) {
        suite.goals.seen(Goal::ManyRows, share);
    }
    let text = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.0} %"));
    let widths: Vec<String> = shape.widths.iter().map(usize::to_string).collect();
    suite.report.row(&[
        &format!("{name} ({} x {k})", widths.join("+")),
        &rows.to_string(),
        &format!("{:.1}", seconds * 1e6),
        &format!("{rate:.0}"),
        &text(share),
        &format!("{tflops:.1}"),
        &text(of_other.map(|o| 100.0 * o)),
        &m.apart.map_or("-".into(), |a| format!("{:.1}", a * 1e6)),
    ]);
    let left_out = rows <= FEW && floor_us.is_some() && !judged;
    left_out.then(|| format!("{name} at {rows} rows ({:.1} µs)", floor_us.unwrap_or(0.0)))
}

fn rowwise(suite: &mut Suite, bed: &Bed, s: &Sizes) -> Outcome<()> {
    let d = &bed.device;
    for rows in [1, s.sequences, s.prompt] {
        let count = rows * s.hidden;
        let mut x = d.rows(rows, s.hidden)?;
        let w = bed.weight_bytes(vec![0; s.hidden * 2], 1, s.hidden)?;
        let mut out: Acts = d.acts(rows, s.hidden, bed.half)?;
        let t = time(bed, |_| {
            Ok(d.rmsnorm(&x, 0, rows, &w.view(), 1e-6, &mut out)?)
        })?;
        floor_row(suite, &format!("rmsnorm, {rows} rows"), t, count * 6, 0.0)?;
        // As Qwen3 has them: every head of q by itself, in place.
        let heads = s.hidden / HEAD;
        let t = time(bed, |_| {
            let w = w.view();
            let w = WeightView { cols: HEAD, ..w };
            Ok(d.rmsnorm_heads(&mut x, rows, heads, HEAD, &w, 1e-6)?)
        })?;
        let what = format!("rmsnorm_heads, {rows} rows of {heads}");
        floor_row(suite, &what, t, count * 8, 0.0)?;
        let (gate, up) = (d.rows(rows, s.mlp)?, d.rows(rows, s.mlp)?);
        let mut out = d.acts(rows, s.mlp, bed.half)?;
        let t = time(bed, |_| Ok(d.swiglu(&gate, &up, rows, s.mlp, &mut out)?))?;
        floor_row(
            suite,
            &format!("swiglu, {rows} rows"),
            t,
            rows * s.mlp * 10,
            0.0,
        )?;
        let mut out = d.acts(rows, s.hidden, bed.half)?;
        let t = time(bed, |_| Ok(d.round(&x, rows, s.hidden, &mut out)?))?;
        floor_row(suite, &format!("round, {rows} rows"), t, count * 6, 0.0)?;
        let t = time(bed, |_| Ok(d.widen_rows(&out, &mut x, rows)?))?;
        floor_row(suite, &format!("widen, {rows} rows"), t, count * 6, 0.0)?;
    }
    let rows = s.sequences;
    let logits = bed.rows(&Random::new(2).values(rows * s.vocab, 4.0), s.vocab)?;
    let mut best = d.best(1, rows)?.ok_or("no selection on this device")?;
    for k in [1, 50] {
        let t = time(bed, |_| {
            Ok(d.select(&logits, rows, s.vocab, k, 0, &mut best)?)
        })?;
        let what = format!("the {k} best of {}, {rows} rows", s.vocab);
        floor_row(suite, &what, t, rows * s.vocab * 4, 0.0)?;
    }
    Ok(())
}

fn attention(suite: &mut Suite, bed: &Bed, s: &Sizes) -> Outcome<()> {
    let cases = [
        ("decode", s.sequences, s.cached, 1),
        ("decode", 1, 8 * s.cached, 1),
        ("prefill", 1, 0, s.prompt),
    ];
    for (what, sequences, cached, new) in cases {
        let mut bench = Attention::new(bed, (s.heads, s.kv_heads), sequences, cached, new)?;
        bench.begin()?;
        let append = time(bed, |_| Ok(bench.append()?))?;
        let attend = time(bed, |_| Ok(bench.attend()?))?;
        let rows = sequences * new;
        let (q, kv) = (s.heads * HEAD, 2 * s.kv_heads * HEAD);
        let name = format!("rope_append, {rows} rows");
        floor_row(suite, &name, append, rows * (q * 6 + kv * 6), 0.0)?;
        let name = format!("attention, {what}: {sequences} x {new} on {cached}");
        let keys = cached + new;
        // A prompt sees half of the square; products with keys and with values.
        let seen = new as f64 * (cached as f64 + new as f64 / 2.0);
        let flops = 4.0 * sequences as f64 * seen * q as f64;
        let bytes = sequences * keys * kv * 2 + rows * q * 4;
        floor_row(suite, &name, attend, bytes, flops)?;
        if what == "decode" {
            // Of each chunk of keys every head's sums and maximum in; a rounded row out.
            let chunks = bench.merge()?;
            let merge = time(bed, |_| Ok(bench.merge().map(|_| ())?))?;
            let partial = chunks * s.heads * (HEAD + 2) * 4;
            let name = format!("  of it the merge, {chunks} chunks");
            floor_row(suite, &name, merge, partial + rows * q * 2, 0.0)?;
        }
    }
    Ok(())
}
