//! How long each kernel takes at a 7B model's shapes (Qwen2.5-7B: 3584 wide, MLP 18944, 28 heads of 128, 4 kv heads), against its floor:
//! bytes over the measured rate of device memory where that bounds it, cublasLt's time for the same product where arithmetic does.

use std::time::Instant;

use tensorpager::device::{Acts, AttnShape, Into, KvShape, ListShape, PassRows, Rows, Span};
use tensorpager::units::Dtype;

use super::bed::{Bed, Random, Weight};
use super::cublas::Cublas;
use super::{Outcome, Suite, ops};

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
const HEAD: usize = 128;

/// The best of three rounds, seconds a call; each round is long enough for the clock.
fn time(bed: &Bed, mut call: impl FnMut(usize) -> Outcome<()>) -> Outcome<f64> {
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
    suite
        .report
        .table("Other kernels", &["kernel", "µs", "GB/s", "of memory"]);
    rowwise(suite, &bed, &sizes)?;
    attention(suite, &bed, &sizes)
}

/// A memory-bound kernel's line.
fn bytes_row(suite: &mut Suite, what: &str, seconds: f64, bytes: usize) {
    let rate = bytes as f64 / seconds / 1e9;
    let share = suite
        .memory_gb_per_s
        .map_or("-".into(), |m| format!("{:.0} %", 100.0 * rate / m));
    suite.report.row(&[
        what,
        &format!("{:.1}", seconds * 1e6),
        &format!("{rate:.0}"),
        &share,
    ]);
}

fn products(suite: &mut Suite, bed: &Bed, s: &Sizes) -> Outcome<()> {
    let shapes = [
        ("q or o", s.hidden, s.hidden),
        ("k or v", s.kv_heads * HEAD, s.hidden),
        ("gate or up", s.mlp, s.hidden),
        ("down", s.hidden, s.mlp),
    ];
    let most = s.few.iter().chain(s.many).copied().max().unwrap_or(1);
    let mut cublas = match Cublas::new() {
        Ok(cublas) => Some(cublas),
        Err(why) => {
            suite
                .report
                .note(&format!("cublasLt is not beside the products: {why}"));
            None
        }
    };
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
        ],
    );
    for (name, n, k) in shapes {
        let copies = match suite.smoke {
            true => 2,
            false => COLD_BYTES.div_ceil(n * k * 2),
        };
        // Small numbers, not all alike: what is multiplied changes a GPU's clock.
        let mut random = Random::new(7);
        let pattern: Vec<u8> = super::bed::bytes_of(&random.values(1 << 16, 0.1), Dtype::BF16);
        let bytes: Vec<u8> = pattern.iter().copied().cycle().take(n * k * 2).collect();
        let weights: Vec<Weight> = (0..copies)
            .map(|_| Ok(bed.weight_bytes(bytes.clone(), n, k)?))
            .collect::<Outcome<_>>()?;
        let a = bed.acts(&random.values(most * k, 1.0), k)?;
        let mut out = bed.device.rows(most, n)?;
        for rows in s.few.iter().chain(s.many).copied() {
            let seconds = time(bed, |i| {
                let w = weights[i % copies].view();
                Ok(bed
                    .device
                    .linear(&a, rows, &w, None, &mut out, 0, Into::Store)?)
            })?;
            let other = match &mut cublas {
                Some(c) => Some(c.seconds(rows, n, k, copies)?),
                None => None,
            };
            product_row(
                suite,
                &format!("{name} ({n} x {k})"),
                rows,
                n,
                k,
                seconds,
                other,
            );
        }
    }
    Ok(())
}

fn product_row(
    suite: &mut Suite,
    name: &str,
    rows: usize,
    n: usize,
    k: usize,
    seconds: f64,
    other: Option<f64>,
) {
    let bytes = (n * k * 2 + rows * k * 2 + rows * n * 4) as f64;
    let rate = bytes / seconds / 1e9;
    let share = suite.memory_gb_per_s.map(|m| 100.0 * rate / m);
    let text = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.0} %"));
    suite.report.row(&[
        name,
        &rows.to_string(),
        &format!("{:.1}", seconds * 1e6),
        &format!("{rate:.0}"),
        &text(share),
        &format!("{:.1}", 2.0 * (rows * n * k) as f64 / seconds / 1e12),
        &text(other.map(|o| 100.0 * o / seconds)),
    ]);
}

fn rowwise(suite: &mut Suite, bed: &Bed, s: &Sizes) -> Outcome<()> {
    let d = &bed.device;
    for rows in [1, s.sequences, s.prompt] {
        let x = d.rows(rows, s.hidden)?;
        let w = bed.weight_bytes(vec![0; s.hidden * 2], 1, s.hidden)?;
        let mut out: Acts = d.acts(rows, s.hidden, bed.half)?;
        let t = time(bed, |_| {
            Ok(d.rmsnorm(&x, 0, rows, &w.view(), 1e-6, &mut out)?)
        })?;
        bytes_row(
            suite,
            &format!("rmsnorm, {rows} rows"),
            t,
            rows * s.hidden * 6,
        );
        let (gate, up) = (d.rows(rows, s.mlp)?, d.rows(rows, s.mlp)?);
        let mut out = d.acts(rows, s.mlp, bed.half)?;
        let t = time(bed, |_| Ok(d.swiglu(&gate, &up, rows, s.mlp, &mut out)?))?;
        bytes_row(suite, &format!("swiglu, {rows} rows"), t, rows * s.mlp * 10);
        let mut out = d.acts(rows, s.hidden, bed.half)?;
        let t = time(bed, |_| Ok(d.round(&x, rows, s.hidden, &mut out)?))?;
        bytes_row(
            suite,
            &format!("round, {rows} rows"),
            t,
            rows * s.hidden * 6,
        );
    }
    let rows = s.sequences;
    let logits = bed.rows(&Random::new(2).values(rows * s.vocab, 4.0), s.vocab)?;
    let mut best = d.best(1, rows)?.ok_or("no selection on this device")?;
    for k in [1, 50] {
        let t = time(bed, |_| {
            Ok(d.select(&logits, rows, s.vocab, k, 0, &mut best)?)
        })?;
        let what = format!("the {k} best of {}, {rows} rows", s.vocab);
        bytes_row(suite, &what, t, rows * s.vocab * 4);
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
        let mut bench = Attention::new(bed, s, sequences, cached, new)?;
        bench.begin()?;
        let append = time(bed, |_| bench.append())?;
        let attend = time(bed, |_| bench.attend())?;
        let rows = sequences * new;
        let (q, kv) = (s.heads * HEAD, 2 * s.kv_heads * HEAD);
        let name = format!("rope and append, {rows} rows");
        bytes_row(suite, &name, append, rows * (q * 6 + kv * 6));
        let name = format!("attention, {what}: {sequences} x {new} on {cached}");
        let keys = cached + new;
        bytes_row(
            suite,
            &name,
            attend,
            sequences * keys * kv * 2 + rows * q * 4,
        );
        if what == "prefill" {
            // Half of the square is seen; products with keys and with values.
            let flops = 2.0 * (new * new) as f64 * (s.heads * HEAD) as f64;
            let rate = flops / attend / 1e12;
            suite.report.note(&format!(
                "attention, prefill: {rate:.1} TFLOP/s of the causal half"
            ));
        }
    }
    Ok(())
}

struct Attention<'b> {
    bed: &'b Bed,
    lists: tensorpager::device::Lists,
    kv: tensorpager::device::Kv,
    shape: AttnShape,
    tables: Vec<Vec<u32>>,
    cached: usize,
    new: usize,
    angles: Vec<f32>,
    q: Rows,
    k: Rows,
    v: Rows,
    out: Acts,
}

impl<'b> Attention<'b> {
    fn new(
        bed: &'b Bed,
        s: &Sizes,
        sequences: usize,
        cached: usize,
        new: usize,
    ) -> Outcome<Attention<'b>> {
        let blocks = (cached + new).div_ceil(16);
        let tables: Vec<Vec<u32>> = (0..sequences)
            .map(|i| (0..blocks).map(|b| (b * sequences + i) as u32).collect())
            .collect();
        let rows = sequences * new;
        let d = &bed.device;
        Ok(Attention {
            lists: d.lists(&ListShape {
                rows,
                spans: sequences,
                table: sequences * blocks,
                context: cached + new,
                heads: s.heads,
                kv_heads: s.kv_heads,
                head_size: HEAD,
                windows: vec![None],
            })?,
            kv: d.kv(&KvShape {
                layers: 1,
                blocks: sequences * blocks,
                kv_heads: s.kv_heads,
                head_size: HEAD,
                dtype: bed.half,
            })?,
            shape: AttnShape {
                heads: s.heads,
                kv_heads: s.kv_heads,
                head_size: HEAD,
                scale: 0.088,
                window: None,
            },
            tables,
            cached,
            new,
            angles: vec![0.5; rows * HEAD / 2],
            q: d.rows(rows, s.heads * HEAD)?,
            k: d.rows(rows, s.kv_heads * HEAD)?,
            v: d.rows(rows, s.kv_heads * HEAD)?,
            out: d.acts(rows, s.heads * HEAD, bed.half)?,
            bed,
        })
    }

    fn begin(&mut self) -> Outcome<()> {
        let new = self.new;
        let spans: Vec<Span<'_>> = self
            .tables
            .iter()
            .enumerate()
            .map(|(i, table)| Span {
                first_row: i * new,
                rows: new,
                start_pos: self.cached,
                table,
            })
            .collect();
        let rows = PassRows {
            spans: &spans,
            cos: &self.angles,
            sin: &self.angles,
        };
        Ok(self.bed.device.begin(&mut self.lists, &rows)?)
    }

    fn append(&mut self) -> Outcome<()> {
        let d = &self.bed.device;
        let (q, k) = (&mut self.q, &mut self.k);
        Ok(d.rope_append(&mut self.lists, &SENT, q, k, &self.v, &mut self.kv, 0)?)
    }

    fn attend(&mut self) -> Outcome<()> {
        let d = &self.bed.device;
        Ok(d.attention(
            &self.lists,
            &SENT,
            &self.q,
            &self.kv,
            0,
            &self.shape,
            &mut self.out,
        )?)
    }
}

/// A GPU was told of the rows by `begin`.
const SENT: PassRows<'static> = PassRows {
    spans: &[],
    cos: &[],
    sin: &[],
};
