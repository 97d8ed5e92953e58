use proptest::prelude::*;

use super::*;
use crate::device::cpu::Mode;
use crate::device::cpu::linear::tile4;
use crate::device::cpu::prefetch::Asked;
use crate::device::cpu::scratch::K_BLOCK;
use crate::device::cpu::simd::{Format, Isa, Op, Product, Simd};

fn reference(
    dev: &CpuDevice,
    dtype: Dtype,
    x: &[f32],
    rows: usize,
    w: &Weights,
    bias: Option<&Weights>,
    old: Option<&[f32]>,
) -> Vec<f64> {
    let mut out = Vec::new();
    for r in 0..rows {
        for n in 0..w.rows {
            let mut sum = old.map_or(0.0, |o| f64::from(o[r * w.rows + n]));
            sum += bias.map_or(0.0, |b| f64::from(b.values[n]));
            for k in 0..w.cols {
                sum += f64::from(seen(dev, dtype, x[r * w.cols + k]))
                    * f64::from(w.values[n * w.cols + k]);
            }
            out.push(sum);
        }
    }
    out
}

/// Products of random numbers in -1..1: error of a float32 sum of k terms, generously.
fn tolerance(k: usize) -> f64 {
    2e-6 * (k as f64).sqrt() + 1e-6
}

#[test]
fn products_match_the_reference() {
    let mut rng = Random(1);
    for dev in devices(2) {
        for dtype in DTYPES {
            for (rows, n, k) in [
                (1, 1, 1),
                (1, 5, 172),
                (2, 9, 500),
                (3, 4, 512),
                (4, 66, 513),
                (5, 131, 64),
                (7, 17, 1030),
                (50, 300, 2200),
                (100, 3, 4097),
                (33, 12, 96),
                (16, 200, 31),
            ] {
                let w = Weights::new(&mut rng, dtype, n, k, 1, 6);
                let bias = Weights::new(&mut rng, Dtype::BF16, 1, n, 1, 0);
                let x = rng.floats(rows * k);
                let a = act(&dev, dtype, &x, rows, k);
                let mut out = vec![f32::NAN; rows * n];
                dev.linear(&a, rows, &w.view(), None, &mut out, n, Mode::Store);
                let want = reference(&dev, dtype, &x, rows, &w, None, None);
                close(&out, &want, tolerance(k), 1e-6);

                let old = rng.floats(rows * n);
                let mut out = old.clone();
                let b = bias.view();
                dev.linear(&a, rows, &w.view(), Some(&b), &mut out, n, Mode::Add);
                let want = reference(&dev, dtype, &x, rows, &w, Some(&bias), Some(&old));
                close(&out, &want, tolerance(k), 1e-6);
            }
        }
    }
}

#[test]
fn rows_further_apart_and_untouched_columns() {
    let mut rng = Random(2);
    for dev in devices(2) {
        let (rows, n, k, stride) = (6, 10, 40, 25);
        let w = Weights::new(&mut rng, Dtype::BF16, n, k, 3, 10);
        let x = rng.floats(rows * k);
        let a = act(&dev, Dtype::BF16, &x, rows, k);
        let mut out = vec![7.0; rows * stride];
        dev.linear(&a, rows, &w.view(), None, &mut out, stride, Mode::Store);
        let mut tight = vec![0.0; rows * n];
        dev.linear(&a, rows, &w.view(), None, &mut tight, n, Mode::Store);
        for r in 0..rows {
            assert_eq!(out[r * stride..][..n], tight[r * n..][..n]);
            assert!(
                out[r * stride + n..(r + 1) * stride]
                    .iter()
                    .all(|x| *x == 7.0)
            );
        }
    }
}

#[test]
fn no_rows_and_no_columns() {
    for dev in devices(1) {
        let w = Weights::new(&mut Random(3), Dtype::F32, 0, 8, 0, 0);
        let a = act(&dev, Dtype::F32, &[1.0; 16], 2, 8);
        dev.linear(&a, 2, &w.view(), None, &mut [], 0, Mode::Store);
        let w = Weights::new(&mut Random(3), Dtype::F32, 3, 8, 0, 0);
        dev.linear(&a, 0, &w.view(), None, &mut [], 3, Mode::Store);
    }
}

#[test]
#[should_panic(expected = "columns of activations and weights")]
fn a_wrong_shape_is_refused() {
    let dev = CpuDevice::with_isa(1, "portable").unwrap();
    let w = Weights::new(&mut Random(4), Dtype::F32, 3, 9, 0, 0);
    let a = act(&dev, Dtype::F32, &[1.0; 8], 1, 8);
    dev.linear(&a, 1, &w.view(), None, &mut [0.0; 3], 3, Mode::Store);
}

#[test]
#[should_panic(expected = "do not hold")]
fn weights_shorter_than_their_shape_are_refused() {
    let dev = CpuDevice::with_isa(1, "portable").unwrap();
    let bytes = [0u8; 3 * 8 * 2 - 1];
    let w = WeightView::packed(Dtype::BF16, 3, 8, &bytes);
    let a = act(&dev, Dtype::BF16, &[1.0; 8], 1, 8);
    dev.linear(&a, 1, &w, None, &mut [0.0; 3], 3, Mode::Store);
}

/// `vdpbf16ps` in plain Rust: pairs of neighbours, denormals as zero. The hardware's two additions may be fused or not, hence a
/// tolerance.
fn pairs_model(a: &[f32], w: &[f32]) -> f64 {
    let flush = |x: f32| if x.is_subnormal() { 0.0 } else { x };
    let mut lanes = [0f32; 16];
    for (i, (a, w)) in a.iter().zip(w).enumerate() {
        let lane = &mut lanes[i % 32 / 2];
        *lane = flush(flush(*a) * flush(*w) + *lane);
    }
    lanes.iter().map(|x| f64::from(*x)).sum()
}

/// Stands in for `vdpbf16ps` where the CPU has none, so that packed activations and their products run everywhere.
#[derive(Clone, Copy)]
struct PairsModel;

impl<S: Simd> Product<S> for PairsModel {
    /// The even elements of 2·LANES, and the odd ones.
    type Operand = (S::V, S::V);
    const STEP: usize = 2 * S::LANES;
    const PHASES: usize = 1;
    const ACT_BYTES: usize = 2;
    const WEIGHT_BYTES: usize = 2;
    #[inline(always)]
    unsafe fn act(s: S, p: *const u8, _phase: usize) -> Self::Operand {
        // SAFETY: the caller's promise is the same.
        unsafe { (s.load_bf16_even(p), s.load_bf16_odd(p)) }
    }
    #[inline(always)]
    unsafe fn weight(s: S, p: *const u8, phase: usize) -> Self::Operand {
        // SAFETY: the caller's promise is the same.
        unsafe { <Self as Product<S>>::act(s, p, phase) }
    }
    #[inline(always)]
    fn accumulate(s: S, a: Self::Operand, w: Self::Operand, acc: S::V) -> S::V {
        s.fma(a.1, w.1, s.fma(a.0, w.0, acc))
    }
}

/// Rows `x` [R][k] packed as bfloat16 against four weight rows, block by block.
struct PackedTile<'a> {
    x: &'a [f32],
    w: &'a Weights,
    sums: &'a mut [[f32; 4]; 3],
}

impl Op for PackedTile<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let k = self.w.cols;
        let mut a = ActBuf::new(Dtype::BF16, 3, k);
        let to = a.begin_as(3, k, Format::Packed);
        for row in 0..3 {
            for col in (0..k).step_by(S::LANES) {
                let n = (k - col).min(S::LANES);
                // SAFETY: row and columns are inside the shape, x holds 3 × k.
                unsafe {
                    to.put(
                        s,
                        row,
                        col,
                        s.load_upto(self.x.as_ptr().add(row * k + col), n),
                        n,
                    )
                }
            }
        }
        for row in 0..3 {
            let want: Vec<f32> = self.x[row * k..][..k]
                .iter()
                .map(|x| rounded(Dtype::BF16, *x))
                .collect();
            assert_eq!(a.row(row), want);
        }
        let w = self.w.view();
        for first in (0..k).step_by(K_BLOCK) {
            let at = |i: usize| w.host()[i * w.row_stride + 2 * first..].as_ptr();
            let acts = [0, 1, 2].map(|r| a.operand().at(first, r));
            // SAFETY: four rows of k weights, three of activations with zeros up to a whole step.
            unsafe {
                let len = K_BLOCK.min(k - first);
                tile4::<S, PairsModel, 3>(
                    s,
                    acts,
                    [0, 1, 2, 3].map(at),
                    len,
                    Asked::NOTHING,
                    self.sums,
                );
            }
        }
    }
}

#[test]
fn packed_activations_multiply_in_pairs() {
    let mut rng = Random(6);
    for name in CpuDevice::isas() {
        for k in [1, 31, 32, 33, 500, 2048, 2100] {
            let w = Weights::new(&mut rng, Dtype::BF16, 4, k, 1, 2);
            let x = rng.floats(3 * k);
            let mut sums = [[0.0; 4]; 3];
            Isa::named(name).unwrap().run(PackedTile {
                x: &x,
                w: &w,
                sums: &mut sums,
            });
            let mut want = vec![];
            for row in x.chunks(k) {
                for w in w.values.chunks(k) {
                    let products = row
                        .iter()
                        .zip(w)
                        .map(|(x, w)| f64::from(rounded(Dtype::BF16, *x)) * f64::from(*w));
                    want.push(products.sum());
                }
            }
            close(sums.as_flattened(), &want, tolerance(k), 1e-6);
        }
    }
}

#[test]
fn bfloat16_pairs_match_their_model() {
    let Ok(dev) = CpuDevice::with_isa(1, "avx512-bf16") else {
        eprintln!("skipped: this CPU has no avx512-bf16");
        return;
    };
    let mut rng = Random(5);
    for k in [1, 2, 31, 32, 33, 172, 500, 512] {
        let w = Weights::new(&mut rng, Dtype::BF16, 5, k, 1, 2);
        let x: Vec<f32> = rng
            .floats(k)
            .iter()
            .map(|x| rounded(Dtype::BF16, *x))
            .collect();
        let a = act(&dev, Dtype::BF16, &x, 1, k);
        let mut out = [0.0; 5];
        dev.linear(&a, 1, &w.view(), None, &mut out, 5, Mode::Store);
        for n in 0..5 {
            let want = pairs_model(&x, &w.values[n * k..][..k]);
            close(&out[n..=n], &[want], tolerance(k), 1e-6);
        }
    }
    // Denormal weights count as nothing.
    let tiny = half::bf16::from_bits(1);
    let bytes: Vec<u8> = (0..32).flat_map(|_| tiny.to_le_bytes()).collect();
    let a = act(&dev, Dtype::BF16, &[1.0; 32], 1, 32);
    let mut out = [1.0];
    let w = WeightView::packed(Dtype::BF16, 1, 32, &bytes);
    dev.linear(&a, 1, &w, None, &mut out, 1, Mode::Store);
    assert_eq!(out, [0.0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// The promise everything else rests on: a row's bits do not depend on the rows beside it, on threads, on where the weights
    /// lie in memory, nor on which rows of the matrix are asked for.
    #[test]
    fn a_rows_bits_depend_on_nothing_else(
        rows in prop_oneof![1usize..12, 12usize..110],
        n in 1usize..290,
        k in prop_oneof![1usize..70, Just(172), Just(500), Just(512), 2000usize..2100, Just(4200)],
        dtype in prop_oneof![Just(Dtype::F16), Just(Dtype::BF16), Just(Dtype::F32)],
        shift in 0usize..5,
        gap in 0usize..9,
        threads in 1usize..5,
        add in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut rng = Random(seed);
        let w = Weights::new(&mut rng, dtype, n, k, shift, gap);
        let aligned = {
            let mut again = Random(seed);
            Weights::new(&mut again, dtype, n, k, 0, 0)
        };
        let bias = Weights::new(&mut rng, dtype, 1, n, 1, 0);
        let x = rng.floats(rows * k);
        let old = rng.floats(rows * n);
        let mode = if add { Mode::Add } else { Mode::Store };
        for name in CpuDevice::isas() {
            let many = CpuDevice::with_isa(threads, name).unwrap();
            let one = CpuDevice::with_isa(1, name).unwrap();
            let mut together = old.clone();
            let a = act(&many, dtype, &x, rows, k);
            many.linear(&a, rows, &w.view(), Some(&bias.view()), &mut together, n, mode);
            for r in 0..rows {
                let mut alone = old[r * n..][..n].to_vec();
                let a = act(&one, dtype, &x[r * k..][..k], 1, k);
                one.linear(&a, 1, &aligned.view(), Some(&bias.view()), &mut alone, n, mode);
                prop_assert_eq!(bits(&together[r * n..][..n]), bits(&alone), "{} row {}", name, r);
            }
            // A slice of the matrix, as the paged head has it.
            let first = n / 3;
            let part = w.view().slice_rows(first, n - first);
            let mut sliced = vec![0.0; rows * (n - first)];
            let mut whole = vec![0.0; rows * n];
            many.linear(&a, rows, &part, None, &mut sliced, n - first, Mode::Store);
            many.linear(&a, rows, &w.view(), None, &mut whole, n, Mode::Store);
            for r in 0..rows {
                prop_assert_eq!(
                    bits(&sliced[r * (n - first)..][..n - first]),
                    bits(&whole[r * n + first..][..n - first])
                );
            }
        }
    }
}

#[test]
fn activations_kept_exact_are_not_rounded() {
    let mut rng = Random(11);
    for dev in devices(2) {
        for (rows, n, k) in [(1, 5, 172), (5, 131, 64), (50, 300, 2200), (9, 17, 4097)] {
            let w = Weights::new(&mut rng, Dtype::BF16, n, k, 1, 6);
            let x = rng.floats(rows * k);
            let exact = |x: &[f32], rows: usize| {
                let mut a = ActBuf::new(Dtype::BF16, rows, k);
                a.keep_exact(Dtype::BF16);
                dev.round(x, rows, k, &mut a);
                a
            };
            let a = exact(&x, rows);
            assert_eq!(rows_of(&a), x);
            let mut out = vec![f32::NAN; rows * n];
            dev.linear(&a, rows, &w.view(), None, &mut out, n, Mode::Store);
            let mut want = Vec::new();
            for r in 0..rows {
                for i in 0..n {
                    let term = |c| f64::from(x[r * k + c]) * f64::from(w.values[i * k + c]);
                    want.push((0..k).map(term).sum());
                }
            }
            close(&out, &want, tolerance(k), 1e-6);
            for r in 0..rows {
                let a = exact(&x[r * k..][..k], 1);
                let mut alone = vec![f32::NAN; n];
                dev.linear(&a, 1, &w.view(), None, &mut alone, n, Mode::Store);
                assert_eq!(bits(&alone), bits(&out[r * n..][..n]));
            }
        }
    }
}
