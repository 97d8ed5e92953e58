//! Each op of the forward pass on the GPU against the CPU device, odd shapes included: normalised mean squared error, and the same bits for a
//! row whatever else is in the pass.

use tensorpager::device::{
    AttnShape, CudaOptions, DenseShape, Device, Into, KvShape, ListShape, PassRows, Span,
};
use tensorpager::error::Result;
use tensorpager::units::Dtype;

use super::bed::{Bed, Random, nmse};

/// How one op fared.
pub struct Row {
    pub op: String,
    pub half: Dtype,
    /// The largest over the shapes.
    pub nmse: f64,
    pub limit: f64,
    pub shapes: usize,
    /// Where a row's bits depended on what else was there.
    pub differs: Option<String>,
}

impl Row {
    pub fn ok(&self) -> bool {
        self.nmse <= self.limit && self.differs.is_none()
    }
}

/// Which shapes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shapes {
    /// What an emulated GPU does in seconds.
    Small,
    /// With a 7B model's.
    All,
}

/// Both sides of a comparison.
struct Pair {
    cpu: Bed,
    gpu: Bed,
    shapes: Shapes,
    rows: Vec<Row>,
}

/// What rounding to 16 bits once costs, twice over.
fn rounding(half: Dtype) -> f64 {
    match half {
        Dtype::F16 => 2e-7,
        _ => 1e-5,
    }
}
/// Sums of float32 in another order.
const ORDER: f64 = 1e-10;

pub const HALVES: [Dtype; 2] = [Dtype::BF16, Dtype::F16];
pub const HEAD_SIZES: [usize; 5] = [64, 80, 96, 128, 256];

pub fn open(half: Dtype, head_size: usize, vision_head_size: Option<usize>) -> Result<Bed> {
    let options = CudaOptions {
        ordinal: 0,
        half,
        head_size,
        vision_head_size,
        memory: None,
        gemm: tensorpager::device::cuda::Gemm::Own,
    };
    Ok(Bed {
        device: Device::cuda(&options)?,
        half,
    })
}

/// All ops in one type; `said` hears of each as it is done. `go_on` is asked before every few; false once it said no.
pub fn compare(
    half: Dtype,
    shapes: Shapes,
    go_on: &dyn Fn() -> bool,
    said: &mut dyn FnMut(&Row),
) -> Result<bool> {
    for (i, head) in HEAD_SIZES.into_iter().enumerate() {
        let vision = [64, 80].contains(&head).then_some(head);
        let mut pair = Pair {
            cpu: Bed {
                device: Device::cpu(None, None)?,
                half,
            },
            gpu: open(half, head, vision)?,
            shapes,
            rows: Vec::new(),
        };
        type Step = fn(&mut Pair, usize) -> Result<()>;
        let mut steps: Vec<Step> = match i {
            0 => vec![
                |p, _| p.products(),
                |p, _| p.norms(),
                |p, _| p.elementwise(),
                |p, _| p.selection(),
            ],
            _ => Vec::new(),
        };
        steps.push(Pair::attention);
        if vision.is_some() {
            steps.push(Pair::vision);
        }
        for step in steps {
            if !go_on() {
                return Ok(false);
            }
            step(&mut pair, head)?;
            pair.rows.drain(..).for_each(|row| said(&row));
        }
    }
    Ok(true)
}

impl Pair {
    /// Runs `op` on both, for each shape.
    fn each<S: std::fmt::Debug>(
        &mut self,
        name: impl std::convert::Into<String>,
        limit: f64,
        shapes: &[S],
        op: impl Fn(&Bed, &S) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let mut row = Row {
            op: name.into(),
            half: self.gpu.half,
            nmse: 0.0,
            limit,
            shapes: shapes.len(),
            differs: None,
        };
        for shape in shapes {
            let (got, want) = (op(&self.gpu, shape)?, op(&self.cpu, shape)?);
            row.nmse = row.nmse.max(nmse(&got, &want));
        }
        self.rows.push(row);
        Ok(())
    }

    /// `alone` and `together` must be the same bits.
    fn same(&mut self, what: &str, alone: &[f32], together: &[f32]) {
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        if bits(alone) != bits(together)
            && let Some(row) = self.rows.last_mut()
        {
            row.differs = Some(what.to_string());
        }
    }

    fn products(&mut self) -> Result<()> {
        // rows, n, k: every tile, ragged in each direction, and k that no tile of 16-byte loads takes.
        let mut shapes = vec![
            (1, 33, 72),
            (3, 32, 64),
            (9, 100, 200),
            (17, 65, 136),
            (40, 130, 88),
            (5, 37, 51),
        ];
        if self.shapes == Shapes::All {
            let large = [1, 8, 16, 32, 64, 256, 1024].map(|r| (r, 3584, 3584));
            shapes.extend(large);
            shapes.extend([
                (1, 18944, 3584),
                (7, 3584, 18944),
                (64, 4608, 3584),
                (130, 512, 3584),
                (65, 1000, 4095),
            ]);
        }
        let run = |bed: &Bed, &(rows, n, k): &(usize, usize, usize), into: Into| {
            let mut random = Random::new((rows * n + k) as u64);
            let a = bed.acts(&random.values(rows * k, 1.0), k)?;
            let w = bed.weight(&random.values(n * k, 0.5), n, k)?;
            let bias = bed.weight(&random.values(n, 1.0), 1, n)?;
            let mut out = bed.rows(&random.values(rows * n, 1.0), n)?;
            bed.device
                .linear(&a, rows, &w.view(), Some(&bias.view()), &mut out, 0, into)?;
            bed.read(&out, rows * n)
        };
        self.each("linear + bias", ORDER, &shapes, |b, s| {
            run(b, s, Into::Store)
        })?;
        self.each("linear, added", ORDER, &shapes, |b, s| run(b, s, Into::Add))?;
        self.one_definition()
    }

    /// The first row of a product, alone and with others: every tile gives the same bits.
    fn one_definition(&mut self) -> Result<()> {
        let (n, k, counts): (_, _, &[usize]) = match self.shapes {
            Shapes::Small => (70, 136, &[8, 16, 32, 64, 150]),
            Shapes::All => (3584, 3584, &[8, 16, 32, 64, 128, 300, 1024, 4096]),
        };
        let most = counts.iter().copied().max().unwrap_or(1);
        let mut random = Random::new(5);
        let values = random.values(most * k, 1.0);
        let w = self.gpu.weight(&random.values(n * k, 0.5), n, k)?;
        let product = |rows: usize| {
            let bed = &self.gpu;
            let a = bed.acts(&values[..rows * k], k)?;
            let mut out = bed.device.rows(rows, n)?;
            bed.device
                .linear(&a, rows, &w.view(), None, &mut out, 0, Into::Store)?;
            bed.read(&out, n)
        };
        let alone = product(1)?;
        let together = counts.iter().map(|r| Ok((*r, product(*r)?)));
        for (rows, first) in together.collect::<Result<Vec<_>>>()? {
            self.same(&format!("a row alone and among {rows}"), &alone, &first);
        }
        Ok(())
    }

    fn norms(&mut self) -> Result<()> {
        let mut shapes = vec![(1, 64), (3, 100), (7, 200)];
        if self.shapes == Shapes::All {
            shapes.extend([(1, 3584), (300, 3584), (5, 1000)]);
        }
        let half = rounding(self.gpu.half);
        self.each("rmsnorm", half, &shapes, |bed, &(rows, cols)| {
            let mut random = Random::new((rows + cols) as u64);
            let x = bed.rows(&random.values((rows + 1) * cols, 3.0), cols)?;
            let w = bed.weight(&random.values(cols, 1.0), 1, cols)?;
            let mut out = bed.device.acts(rows, cols, bed.half)?;
            bed.device.rmsnorm(&x, 1, rows, &w.view(), 1e-6, &mut out)?;
            bed.read_acts(&out, rows, cols)
        })?;
        self.each(
            "rmsnorm of heads",
            ORDER,
            &[(1, 1), (3, 5), (9, 28)],
            |bed, &(rows, heads)| {
                let mut random = Random::new((rows + heads) as u64);
                let cols = heads * 64 + 64;
                let mut x = bed.rows(&random.values(rows * cols, 3.0), cols)?;
                let w = bed.weight(&random.values(64, 1.0), 1, 64)?;
                bed.device
                    .rmsnorm_heads(&mut x, rows, heads, 64, &w.view(), 1e-6)?;
                bed.read(&x, rows * cols)
            },
        )
    }

    fn elementwise(&mut self) -> Result<()> {
        let mut shapes = vec![(1, 8), (3, 100), (2, 1032)];
        if self.shapes == Shapes::All {
            shapes.extend([(1, 9472), (64, 2000)]);
        }
        let half = rounding(self.gpu.half);
        self.each("swiglu", half, &shapes[..], |bed, &(rows, cols)| {
            let mut random = Random::new((rows * cols) as u64);
            let gate = bed.rows(&random.values(rows * cols, 6.0), cols)?;
            let up = bed.rows(&random.values(rows * cols, 2.0), cols)?;
            let mut out = bed.device.acts(rows, cols, bed.half)?;
            bed.device.swiglu(&gate, &up, rows, cols, &mut out)?;
            bed.read_acts(&out, rows, cols)
        })?;
        self.each("gelu", half, &shapes[..3], |bed, &(rows, cols)| {
            let x = bed.rows(&Random::new(cols as u64).values(rows * cols, 4.0), cols)?;
            let mut out = bed.device.acts(rows, cols, bed.half)?;
            bed.device.gelu(&x, rows, cols, &mut out)?;
            bed.read_acts(&out, rows, cols)
        })?;
        self.each("round", half, &shapes[..3], |bed, &(rows, cols)| {
            let mut random = Random::new(cols as u64);
            let values: Vec<f32> = (0..rows * cols).map(|_| random.next() * 3.0).collect();
            let acts = bed.acts(&values, cols)?;
            bed.read_acts(&acts, rows, cols)
        })?;
        self.each(
            "rows written and copied",
            0.0,
            &[(5, 33), (3, 1000)],
            |bed, &(rows, cols)| {
                let x = bed.rows(&Random::new(3).values(rows * cols, 2.0), cols)?;
                let mut out = bed.device.rows(rows, cols)?;
                bed.device.copy_rows(&x, 1, &mut out, 0, rows - 1)?;
                bed.read(&out, (rows - 1) * cols)
            },
        )
    }

    /// argmax and topk: against the host's own order, of equals the lowest id.
    fn selection(&mut self) -> Result<()> {
        let cols_of: &[usize] = match self.shapes {
            Shapes::Small => &[1, 70, 1025],
            Shapes::All => &[1, 70, 1025, 16_384, 152_064],
        };
        let mut row = Row {
            op: "argmax, top 1 to 64".into(),
            half: self.gpu.half,
            nmse: 0.0,
            limit: 0.0,
            shapes: 3 * cols_of.len(),
            differs: None,
        };
        for &cols in cols_of {
            for k in [1, 5, 64] {
                if !selects(&self.gpu, 3, cols, k)? {
                    row.differs = Some(format!("the {k} best of {cols}"));
                }
            }
        }
        self.rows.push(row);
        Ok(())
    }

    fn attention(&mut self, head: usize) -> Result<()> {
        // heads, kv heads, window, (cached, new) of each sequence
        type Case = (usize, usize, Option<usize>, Vec<(usize, usize)>);
        let mut cases: Vec<Case> = vec![
            (4, 2, None, vec![(0, 1), (5, 3), (30, 1)]),
            (7, 1, None, vec![(0, 40), (17, 1)]),
            (2, 2, Some(20), vec![(33, 2), (0, 30)]),
        ];
        match self.shapes {
            Shapes::Small => cases.push((4, 1, None, vec![(270, 1)])),
            Shapes::All => cases.extend([
                (
                    28,
                    4,
                    None,
                    vec![(0, 600), (1000, 1), (255, 2), (256, 1), (5000, 3)],
                ),
                (28, 4, Some(512), vec![(2000, 1), (0, 700)]),
                (32, 8, None, vec![(3, 17); 20]),
            ]),
        }
        let limit = 4.0 * rounding(self.gpu.half);
        self.each(
            format!("attention, heads of {head}"),
            limit,
            &cases,
            |bed, case| attend(bed, head, case.0, case.1, case.2, &case.3),
        )?;
        let long = match self.shapes {
            Shapes::Small => 40,
            Shapes::All => 700,
        };
        // A prompt whole, and all but its last token before that: the last row is prefill's in one and decode's in the other.
        let whole = attend(&self.gpu, head, 4, 2, None, &[(0, long)])?;
        let step = attend(&self.gpu, head, 4, 2, None, &[(long - 1, 1)])?;
        let last = &whole[whole.len() - 4 * head..];
        self.same("prefill and decode", last, &step);
        Ok(())
    }

    fn vision(&mut self, head: usize) -> Result<()> {
        let cases = vec![(2, vec![0, 16, 20, 85]), (1, vec![0, 1]), (3, vec![0, 130])];
        let limit = 4.0 * rounding(self.gpu.half);
        self.each(
            format!("vision attention, heads of {head}"),
            limit,
            &cases,
            |bed, (heads, ends)| {
                let rows = ends.last().copied().unwrap_or(0);
                let cols = heads * head;
                let mut random = Random::new(rows as u64);
                let mut qkv = bed.rows(&random.values(rows * 3 * cols, 1.0), 3 * cols)?;
                let (cos, sin) = angles(0..rows, head);
                let shape = DenseShape {
                    heads: *heads,
                    head_size: head,
                    scale: (head as f32).powf(-0.5),
                };
                let pass = PassRows {
                    spans: &[],
                    cos: &cos,
                    sin: &sin,
                };
                let mut dense = bed.device.dense(rows, &shape)?;
                let mut out = bed.device.acts(rows, cols, bed.half)?;
                bed.device
                    .attention_dense(&mut qkv, &shape, &pass, ends, &mut dense, &mut out)?;
                bed.read_acts(&out, rows, cols)
            },
        )
    }
}

fn selects(bed: &Bed, rows: usize, cols: usize, k: usize) -> Result<bool> {
    let mut values = Random::new(cols as u64).values(rows * cols, 8.0);
    // Ties, at both ends of a row too.
    values[cols - 1] = 9.0;
    values[0] = 9.0;
    let x = bed.rows(&values, cols)?;
    let mut best = bed
        .device
        .best(1, rows)?
        .expect("a GPU selects where it computes");
    bed.device.select(&x, rows, cols, k, 0, &mut best)?;
    let (ids, got) = bed.device.selected(&mut best, rows * k)?;
    Ok((0..rows).all(|r| {
        let row = &values[r * cols..][..cols];
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
        (0..k).all(|i| match order.get(i) {
            Some(id) => ids[r * k + i] == *id as u32 && got[r * k + i] == row[*id],
            None => ids[r * k + i] == u32::MAX,
        })
    }))
}

fn angles(positions: std::ops::Range<usize>, head: usize) -> (Vec<f32>, Vec<f32>) {
    let angle = |p: usize, i: usize| p as f32 * 10_000f32.powf(-2.0 * i as f32 / head as f32);
    let all: Vec<f32> = positions
        .flat_map(|p| (0..head / 2).map(move |i| angle(p, i)))
        .collect();
    (
        all.iter().map(|a| a.cos()).collect(),
        all.iter().map(|a| a.sin()).collect(),
    )
}

/// Attention of the new tokens of sequences whose earlier ones were put into the cache by a pass of their own.
fn attend(
    bed: &Bed,
    head: usize,
    heads: usize,
    kv_heads: usize,
    window: Option<usize>,
    sequences: &[(usize, usize)],
) -> Result<Vec<f32>> {
    let d = &bed.device;
    let blocks: Vec<usize> = sequences
        .iter()
        .map(|(c, n)| (c + n).div_ceil(16))
        .collect();
    let total: usize = blocks.iter().sum();
    // Scattered, and no sequence's blocks in order.
    let mut free: Vec<u32> = (0..total as u32)
        .map(|b| (b * 7 + 3) % total as u32)
        .collect();
    free.sort_by_key(|b| (b.wrapping_mul(2_654_435_761)) >> 7);
    let tables: Vec<Vec<u32>> = blocks.iter().map(|n| free.drain(..*n).collect()).collect();
    let cached: usize = sequences.iter().map(|s| s.0).sum();
    let new: usize = sequences.iter().map(|s| s.1).sum();
    let most = cached.max(new).max(1);
    let shape = ListShape {
        rows: most,
        spans: sequences.len(),
        table: total,
        context: sequences.iter().map(|(c, n)| c + n).max().unwrap_or(1),
        heads,
        kv_heads,
        head_size: head,
        windows: vec![window],
    };
    let mut lists = d.lists(&shape)?;
    let mut kv = d.kv(&KvShape {
        layers: 1,
        blocks: total,
        kv_heads,
        head_size: head,
        dtype: bed.half,
    })?;
    let attn = AttnShape {
        heads,
        kv_heads,
        head_size: head,
        scale: (head as f32).powf(-0.5),
        window,
    };
    let (q_cols, kv_cols) = (heads * head, kv_heads * head);
    let mut out = d.acts(most, q_cols, bed.half)?;
    let mut pass =
        |from: &dyn Fn(usize) -> usize, count: &dyn Fn(usize) -> usize| -> Result<usize> {
            let (mut spans, mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            let (mut cos, mut sin, mut first) = (Vec::new(), Vec::new(), 0);
            for (i, table) in tables.iter().enumerate() {
                let (start, rows) = (from(i), count(i));
                for p in start..start + rows {
                    // A token's values depend on sequence and position alone.
                    let mut random = Random::new((i * 100_003 + p) as u64 + 1);
                    q.extend(random.values(q_cols, 2.0));
                    k.extend(random.values(kv_cols, 2.0));
                    v.extend(random.values(kv_cols, 1.0));
                }
                let (c, s) = angles(start..start + rows, head);
                cos.extend(c);
                sin.extend(s);
                if rows > 0 {
                    spans.push(Span {
                        first_row: first,
                        rows,
                        start_pos: start,
                        table,
                    });
                }
                first += rows;
            }
            let rows = PassRows {
                spans: &spans,
                cos: &cos,
                sin: &sin,
            };
            if first > 0 {
                let (mut q, mut k) = (bed.rows(&q, q_cols)?, bed.rows(&k, kv_cols)?);
                let v = bed.rows(&v, kv_cols)?;
                d.begin(&mut lists, &rows)?;
                d.rope_append(&mut lists, &rows, &mut q, &mut k, &v, &mut kv, 0)?;
                d.attention(&lists, &rows, &q, &kv, 0, &attn, &mut out)?;
            }
            Ok(first)
        };
    pass(&|_| 0, &|i| sequences[i].0)?;
    let rows = pass(&|i| sequences[i].0, &|i| sequences[i].1)?;
    bed.read_acts(&out, rows, q_cols)
}
