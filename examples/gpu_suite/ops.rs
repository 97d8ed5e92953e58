//! Each op of the forward pass on the GPU against the CPU device, odd shapes included: normalised mean squared error, and the same bits for a
//! row whatever else is in the pass.

use tensorpager::device::cuda::Gemm;
use tensorpager::device::{CudaOptions, DenseShape, Device, Into, PassRows, WeightView};
use tensorpager::error::Result;
use tensorpager::units::Dtype;

use super::bed::{Bed, Random, nmse};
use super::one_pass::{angles, attend, selects};
use super::products::{
    EachShape, ProductShape, WIDE, each_shapes, product, product_shapes, products_of_one,
};

/// How one op fared.
pub struct Row {
    pub op: String,
    pub half: Dtype,
    /// Of the shape that came nearest to what it was allowed.
    pub nmse: f64,
    pub limit: f64,
    pub shapes: usize,
    /// Where a row's bits depended on what else was there.
    pub differs: Option<String>,
    /// Why there is nothing to compare: no error of ours.
    pub not_run: Option<String>,
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

/// A product's sums over `k`. Tensor cores cut off towards zero where float32 would round (Fasi et al., "Numerical behavior of NVIDIA tensor
/// cores", 2021): what each step of a chain loses adds up, so the error grows with the number of steps and its square with k². One unit of 2⁻²⁴ for
/// each `mma.sync` of 16 allows six times the square that random numbers lose on an Ampere card, simulated (`EMUCUDA_MMA=truncate`: 7.7e-10 at k =
/// 18944, 5.0e-9 allowed). Later cards keep more bits. Sums that round stay below 1e-12 there.
fn order(k: usize) -> f64 {
    let error = k.div_ceil(16) as f64 / f64::from(1 << 24);
    ORDER.max(error * error)
}

/// The same by a library that may split K as it likes.
const THEIR_ORDER: f64 = 1e-8;

pub const HALVES: [Dtype; 2] = [Dtype::BF16, Dtype::F16];
pub const HEAD_SIZES: [usize; 5] = [64, 80, 96, 128, 256];

pub fn open(half: Dtype, head_size: usize, vision_head_size: Option<usize>) -> Result<Bed> {
    open_with(Gemm::Own, half, head_size, vision_head_size)
}

pub fn open_with(
    gemm: Gemm,
    half: Dtype,
    head_size: usize,
    vision_head_size: Option<usize>,
) -> Result<Bed> {
    let options = CudaOptions {
        ordinal: 0,
        half,
        head_size,
        vision_head_size,
        memory: None,
        gemm,
    };
    Ok(Bed {
        device: Device::cuda(&options)?,
        half,
    })
}

/// All ops in one type; `said` hears of each as it is done. `go_on` is asked before every few; false once it said no.
/// `theirs`: cublasLt's products too, where the library is.
pub fn compare(
    half: Dtype,
    shapes: Shapes,
    theirs: bool,
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
        // Last: what goes wrong in a library of others spoils no op of ours.
        if theirs && i + 1 == HEAD_SIZES.len() {
            steps.push(|p, _| {
                p.products_of_cublaslt();
                Ok(())
            });
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
        self.each_within(name, |_| limit, shapes, op)
    }

    /// The same where what is allowed depends on the shape.
    fn each_within<S: std::fmt::Debug>(
        &mut self,
        name: impl std::convert::Into<String>,
        limit: impl Fn(&S) -> f64,
        shapes: &[S],
        op: impl Fn(&Bed, &S) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let mut row = Row {
            op: name.into(),
            half: self.gpu.half,
            nmse: 0.0,
            limit: shapes.first().map_or(0.0, &limit),
            shapes: shapes.len(),
            differs: None,
            not_run: None,
        };
        // What is allowed may be nothing.
        let share = |nmse: f64, limit: f64| nmse / limit.max(f64::MIN_POSITIVE);
        for shape in shapes {
            let (got, want) = (op(&self.gpu, shape)?, op(&self.cpu, shape)?);
            let (nmse, limit) = (nmse(&got, &want), limit(shape));
            if share(nmse, limit) > share(row.nmse, row.limit) {
                (row.nmse, row.limit) = (nmse, limit);
            }
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
        let shapes = product_shapes(self.shapes);
        let limit = |&(_, _, k): &ProductShape| order(k);
        self.each_within("linear + bias", limit, &shapes, |b, s| {
            product(b, s, Into::Store)
        })?;
        self.each_within("linear, added", limit, &shapes, |b, s| {
            product(b, s, Into::Add)
        })?;
        self.one_definition()?;
        self.products_in_one_launch()
    }

    /// Several matrices of one input: as the CPU, and the very bits of a launch each.
    fn products_in_one_launch(&mut self) -> Result<()> {
        let shapes = each_shapes(self.shapes);
        let limit = |&(_, _, k): &EachShape| order(k);
        self.each_within("linear, several at once", limit, &shapes, |b, s| {
            products_of_one(b, s, true)
        })?;
        for s in &shapes {
            let together = products_of_one(&self.gpu, s, true)?;
            let apart = products_of_one(&self.gpu, s, false)?;
            self.same(
                &format!("in one launch and apart, {s:?}"),
                &apart,
                &together,
            );
        }
        Ok(())
    }

    /// Its products have their biases added by a kernel of ours. The library may be missing, of another version, or refuse a shape.
    fn products_of_cublaslt(&mut self) {
        let name = "cublasLt + bias_add";
        let half = self.gpu.half;
        // It need not take rows of k that are not aligned.
        let mut shapes = product_shapes(self.shapes);
        shapes.retain(|(_, _, k)| k.is_multiple_of(8));
        let limit = |&(_, _, k): &ProductShape| order(k).max(THEIR_ORDER);
        let several = "cublasLt, several";
        let opened = open_with(Gemm::CublasLt, half, HEAD_SIZES[0], None);
        let done = opened.map_err(|why| (name, why)).and_then(|theirs| {
            let own = std::mem::replace(&mut self.gpu, theirs);
            let run = |b: &Bed, s: &ProductShape| product(b, s, Into::Store);
            let one = self.each_within(name, limit, &shapes, run);
            let limit = |&(_, _, k): &EachShape| order(k).max(THEIR_ORDER);
            let mut shapes = each_shapes(self.shapes);
            shapes.retain(|(_, _, k)| k.is_multiple_of(8));
            let run = |b: &Bed, s: &EachShape| products_of_one(b, s, true);
            let done = one.map_err(|why| (name, why)).and_then(|()| {
                self.each_within(several, limit, &shapes, run)
                    .map_err(|why| (several, why))
            });
            self.gpu = own;
            done
        });
        if let Err((op, why)) = done {
            self.rows.push(Row {
                op: op.into(),
                half,
                nmse: 0.0,
                limit: THEIR_ORDER,
                shapes: 0,
                differs: None,
                not_run: Some(why.to_string().trim().replace('\n', "; ")),
            });
        }
    }

    /// The first row of a product, alone and with others: every tile gives the same bits.
    fn one_definition(&mut self) -> Result<()> {
        // The widest has blocks for every multiprocessor with the wide tile of 17 to 32 rows too.
        let shapes: &[(usize, usize, &[usize])] = match self.shapes {
            Shapes::Small => &[(70, 136, &[8, 16, 32, 64, 150]), (WIDE, 8, &[32])],
            Shapes::All => &[
                (3584, 3584, &[8, 16, 32, 64, 128, 300, 1024, 4096]),
                (18944, 3584, &[16, 32, 64]),
            ],
        };
        for &(n, k, counts) in shapes {
            self.first_row(n, k, counts)?;
        }
        Ok(())
    }

    fn first_row(&mut self, n: usize, k: usize, counts: &[usize]) -> Result<()> {
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
            let what = format!("a row of {n} alone and among {rows}");
            self.same(&what, &alone, &first);
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
            "embedding rows",
            0.0,
            &[(1, 7), (5, 100), (3, 1032)],
            |bed, &(rows, cols)| {
                let values = Random::new(cols as u64).values(rows * cols, 2.0);
                let table = super::bed::bytes_of(&values, bed.half);
                let mut narrow = bed.device.acts(rows, cols, bed.half)?;
                let mut out = bed.device.rows(rows, cols)?;
                for (i, row) in table.chunks_exact(cols * 2).enumerate() {
                    let row = WeightView::packed(bed.half, 1, cols, row);
                    bed.device.put_row(&row, &mut narrow, &mut out, i)?;
                }
                bed.device.widen_rows(&narrow, &mut out, rows)?;
                bed.read(&out, rows * cols)
            },
        )?;
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
            not_run: None,
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
                let d = &bed.device;
                d.rope_dense(&mut qkv, rows, &shape, &pass, &mut dense)?;
                d.attention_dense(&qkv, &shape, ends, &mut dense, &mut out)?;
                bed.read_acts(&out, rows, cols)
            },
        )
    }
}
