//! Every op against a plain float64 reference, on every instruction set this CPU has, and the promises of the module: bits that
//! do not depend on rows, threads or alignment.

mod attention;
mod ops;
mod product;

use super::{ActBuf, CpuDevice};
use crate::device::{Bytes, WeightView};
use crate::units::Dtype;

pub(super) const DTYPES: [Dtype; 3] = [Dtype::F16, Dtype::BF16, Dtype::F32];

/// One device for each instruction set of this CPU; says which are left out.
pub(super) fn devices(threads: usize) -> Vec<CpuDevice> {
    let have = CpuDevice::isas();
    for name in super::ISA_NAMES {
        if !have.contains(&name) {
            eprintln!("skipped: this CPU has no {name}");
        }
    }
    have.into_iter()
        .map(|name| CpuDevice::with_isa(threads, name).expect("listed as available"))
        .collect()
}

/// A small generator (splitmix64): tests say their seed and nothing else.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// -1..1
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// What a product on `dev` with weights of `dtype` sees of `x`: rounded once where it multiplies bfloat16 pairs.
pub(super) fn seen(dev: &CpuDevice, dtype: Dtype, x: f32) -> f32 {
    match (dev.isa(), dtype) {
        ("avx512-bf16", Dtype::BF16) => rounded(dtype, x),
        _ => x,
    }
}

/// `x` rounded once to `dtype`.
pub(super) fn rounded(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::BF16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// Weights in bytes at an odd address, rows `gap` bytes apart beyond their length, and their values.
pub(super) struct Weights {
    bytes: Vec<u8>,
    shift: usize,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    row_stride: usize,
    pub values: Vec<f32>,
}

impl Weights {
    pub fn new(
        rng: &mut Random,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        shift: usize,
        gap: usize,
    ) -> Weights {
        let row_stride = cols * dtype.bytes() + gap;
        // The last row ends exactly at the end: a read past it would be one past the allocation.
        let len = shift
            + if rows == 0 {
                0
            } else {
                (rows - 1) * row_stride + cols * dtype.bytes()
            };
        // Gaps hold NaN bits, so that a read into one shows.
        let mut bytes = vec![0xff; len];
        let mut values = Vec::with_capacity(rows * cols);
        for r in 0..rows {
            for c in 0..cols {
                let x = rounded(dtype, rng.float());
                values.push(x);
                let at = shift + r * row_stride + c * dtype.bytes();
                match dtype {
                    Dtype::F32 => bytes[at..at + 4].copy_from_slice(&x.to_le_bytes()),
                    Dtype::F16 => {
                        bytes[at..at + 2].copy_from_slice(&half::f16::from_f32(x).to_le_bytes())
                    }
                    Dtype::BF16 => {
                        bytes[at..at + 2].copy_from_slice(&half::bf16::from_f32(x).to_le_bytes())
                    }
                }
            }
        }
        Weights {
            bytes,
            shift,
            dtype,
            rows,
            cols,
            row_stride,
            values,
        }
    }

    pub fn view(&self) -> WeightView<'_> {
        WeightView {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            data: Bytes::Host(&self.bytes[self.shift..]),
        }
    }
}

pub(super) fn act(dev: &CpuDevice, dtype: Dtype, x: &[f32], rows: usize, cols: usize) -> ActBuf {
    let mut buf = ActBuf::new(dtype, rows, cols);
    dev.round(x, rows, cols, &mut buf);
    buf
}

pub(super) fn rows_of(buf: &ActBuf) -> Vec<f32> {
    (0..buf.rows()).flat_map(|r| buf.row(r)).collect()
}

pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Asserts |got − want| <= absolute + relative·|want| everywhere.
#[track_caller]
pub(super) fn close(got: &[f32], want: &[f64], absolute: f64, relative: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs();
        assert!(
            error <= absolute + relative * w.abs(),
            "element {i}: {g} instead of {w}, off by {error:e}"
        );
    }
}

/// Relative rounding error of a dtype: half a unit in the last place.
pub(super) fn half_ulp(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2f64.powi(-24),
        Dtype::F16 => 2f64.powi(-11),
        Dtype::BF16 => 2f64.powi(-8),
    }
}
