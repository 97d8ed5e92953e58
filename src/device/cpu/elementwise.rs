//! Ops that treat each element alone: SwiGLU, GELU, rounding, bias, widening.

use std::ops::Range;

use super::act::{ActBuf, ActRows};
use super::math::{gelu, silu};
use super::simd::{Op, Simd, load_dtype};
use super::{CpuDevice, OutPtr};
use crate::device::WeightView;
use crate::units::Dtype;

impl CpuDevice {
    /// `out` = silu(gate)·up, each [rows][cols].
    pub fn swiglu(&self, gate: &[f32], up: &[f32], rows: usize, cols: usize, out: &mut ActBuf) {
        assert!(gate.len() >= rows * cols && up.len() >= rows * cols);
        self.map(Map::SwiGlu(gate, up), rows, cols, cols, out);
    }

    /// As [`CpuDevice::swiglu`], gate and up side by side: row r is `x[r·2·cols..]`, `cols` of gate, then `cols` of up.
    pub fn swiglu_fused(&self, x: &[f32], rows: usize, cols: usize, out: &mut ActBuf) {
        assert!(x.len() >= rows * cols * 2);
        let up = &x[cols.min(x.len())..];
        self.map(Map::SwiGlu(x, up), rows, cols, 2 * cols, out);
    }

    /// `out` = x·Φ(x) of `x` [rows][cols]: the exact GELU (erf), not the tanh one.
    pub fn gelu(&self, x: &[f32], rows: usize, cols: usize, out: &mut ActBuf) {
        assert!(x.len() >= rows * cols);
        self.map(Map::Gelu(x), rows, cols, cols, out);
    }

    /// `out` = x [rows][cols], rounded.
    pub fn round(&self, x: &[f32], rows: usize, cols: usize, out: &mut ActBuf) {
        assert!(x.len() >= rows * cols);
        self.map(Map::Round(x), rows, cols, cols, out);
    }

    fn map(&self, map: Map<'_>, rows: usize, cols: usize, stride: usize, out: &mut ActBuf) {
        let out = out.begin(rows, cols, self.isa);
        self.for_row_ranges(rows, cols, &|range| {
            self.isa.run(MapRows {
                map,
                range,
                cols,
                stride,
                out,
            });
        });
    }

    /// `x` [rows][bias.cols] += bias.
    pub fn add_bias(&self, x: &mut [f32], rows: usize, bias: &WeightView<'_>) {
        assert!(bias.rows == 1 && x.len() >= rows * bias.cols);
        bias.check();
        let x = OutPtr(x.as_mut_ptr());
        self.for_row_ranges(rows, bias.cols, &|range| {
            self.isa.run(AddBias {
                x,
                range,
                bias: *bias,
            });
        });
    }

    /// `out` = the elements of `bytes` (any alignment) as float32, exactly: a row of the embedding.
    pub fn widen(&self, dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * dtype.bytes());
        self.isa.run(Widen { dtype, bytes, out });
    }
}

#[derive(Clone, Copy)]
enum Map<'a> {
    SwiGlu(&'a [f32], &'a [f32]),
    Gelu(&'a [f32]),
    Round(&'a [f32]),
}

struct MapRows<'a> {
    map: Map<'a>,
    range: Range<usize>,
    cols: usize,
    stride: usize,
    out: ActRows,
}

impl Op for MapRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.range.clone() {
            let mut c = 0;
            while c < self.cols {
                let n = (self.cols - c).min(S::LANES);
                let at = row * self.stride + c;
                // SAFETY: the ops checked that inputs and `out` hold rows × cols; each row is one task's.
                unsafe {
                    let y = match self.map {
                        Map::SwiGlu(gate, up) => {
                            let gate = s.load_upto(gate.as_ptr().add(at), n);
                            s.mul(silu(s, gate), s.load_upto(up.as_ptr().add(at), n))
                        }
                        Map::Gelu(x) => gelu(s, s.load_upto(x.as_ptr().add(at), n)),
                        Map::Round(x) => s.load_upto(x.as_ptr().add(at), n),
                    };
                    self.out.put(s, row, c, y, n);
                }
                c += n;
            }
        }
    }
}

struct AddBias<'a> {
    x: OutPtr<f32>,
    range: Range<usize>,
    bias: WeightView<'a>,
}

impl Op for AddBias<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (dtype, cols) = (self.bias.dtype, self.bias.cols);
        for row in self.range.clone() {
            let mut c = 0;
            while c < cols {
                let n = (cols - c).min(S::LANES);
                // SAFETY: `add_bias` checked that x holds rows × cols and the bias cols; each row is one task's.
                unsafe {
                    let at = self.x.0.add(row * cols + c);
                    let bias = self.bias.host().as_ptr().add(c * dtype.bytes());
                    let y = s.add(s.load_upto(at, n), load_dtype(s, dtype, bias, n));
                    s.store_upto(at, y, n);
                }
                c += n;
            }
        }
    }
}

struct Widen<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Op for Widen<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut c = 0;
        while c < self.out.len() {
            let n = (self.out.len() - c).min(S::LANES);
            // SAFETY: `widen` checked that there are as many elements in `bytes` as in `out`.
            unsafe {
                let from = self.bytes.as_ptr().add(c * self.dtype.bytes());
                let v = load_dtype(s, self.dtype, from, n);
                s.store_upto(self.out.as_mut_ptr().add(c), v, n);
            }
            c += n;
        }
    }
}
