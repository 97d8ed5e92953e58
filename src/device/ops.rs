//! The devices behind one small enum, and the ops of the forward pass on their buffers.
//!
//! A buffer belongs to the kind of device that made it; handing it to another kind is a bug of the caller.

use super::WeightView;
use super::cpu::{ActBuf, AttnSegment, CpuDevice, DenseAttention, KvLayout, KvView, Mode};
use crate::error::Result;
use crate::units::Dtype;

/// Where the forward pass runs.
pub enum Device {
    Cpu(CpuDevice),
}

/// float32 activations on a device: `[rows, cols]`, row-major.
pub struct Rows {
    data: Vec<f32>,
    cols: usize,
}

/// Inputs of matrix products, rounded once to the weights' type.
pub struct Acts {
    data: ActBuf,
    cols: usize,
}

/// What a product does with what its output holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    Store,
    Add,
}

/// Geometry of a paged KV cache: `[layer][block][k|v][kv head][16 tokens][head size]`.
#[derive(Clone, Copy, Debug)]
pub struct KvShape {
    pub layers: usize,
    pub blocks: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub dtype: Dtype,
}

/// The bytes of the KV cache, on the device.
pub struct Kv {
    layout: KvLayout,
    data: Vec<u8>,
}

/// Rows of one sequence in a pass: `rows` rows from `first_row`, the first being token `start` of its sequence.
pub type Span<'a> = AttnSegment<'a>;

/// What attention needs to know besides its operands.
#[derive(Clone, Copy, Debug)]
pub struct AttnShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub scale: f32,
    /// Keys a query sees at most, its own included.
    pub window: Option<usize>,
}

/// Attention of rows that lie side by side as `[q | k | v]`, each `heads · head_size` wide.
#[derive(Clone, Copy, Debug)]
pub struct DenseShape {
    pub heads: usize,
    pub head_size: usize,
    pub scale: f32,
}

impl Kv {
    pub fn blocks(&self) -> usize {
        self.layout.blocks
    }
}

impl Acts {
    /// The type its rows are rounded to from the next op on: that of the weight they will meet.
    pub fn round_to(&mut self, dtype: Dtype) {
        self.data.set_dtype(dtype);
    }

    pub fn dtype(&self) -> Dtype {
        self.data.dtype()
    }
}

impl Device {
    /// `threads`: one a core by default. `isa` forces an instruction set.
    pub fn cpu(threads: Option<usize>, isa: Option<&str>) -> Result<Device> {
        let threads = threads.unwrap_or(0);
        Ok(Device::Cpu(match isa {
            Some(isa) => CpuDevice::with_isa(threads, isa)?,
            None => CpuDevice::new(threads)?,
        }))
    }

    /// `cpu`: as `--device` and reports name it.
    pub fn name(&self) -> &'static str {
        "cpu"
    }

    /// The instruction set in use, and how many threads.
    pub fn describe(&self) -> String {
        let Device::Cpu(d) = self;
        format!("{}, {} threads", d.isa(), d.threads())
    }

    /// Host threads that compute.
    pub fn threads(&self) -> usize {
        let Device::Cpu(d) = self;
        d.threads()
    }

    pub fn rows(&self, rows: usize, cols: usize) -> Rows {
        Rows {
            data: vec![0.0; rows * cols],
            cols,
        }
    }

    pub fn acts(&self, rows: usize, cols: usize, dtype: Dtype) -> Acts {
        Acts {
            data: ActBuf::new(dtype, rows, cols),
            cols,
        }
    }

    /// Bytes that [`Device::acts`] takes.
    pub fn acts_bytes(rows: usize, cols: usize) -> u64 {
        ActBuf::bytes_for(rows, cols)
    }

    /// Host memory that [`Device::attention_dense`] takes while it runs, for windows of up to `longest` rows.
    pub fn dense_bytes(longest: usize, head_size: usize) -> u64 {
        super::cpu::dense_scratch_bytes(longest, head_size)
    }

    pub fn kv(&self, shape: &KvShape) -> Kv {
        let layout = KvLayout {
            layers: shape.layers,
            blocks: shape.blocks,
            kv_heads: shape.kv_heads,
            head_size: shape.head_size,
            dtype: shape.dtype,
        };
        Kv {
            data: vec![0; layout.bytes()],
            layout,
        }
    }

    /// Copies a whole KV block of every layer: before a forked sequence writes into a shared one.
    pub fn kv_copy(&self, kv: &mut Kv, from: u32, to: u32) {
        let bytes = kv.layout.bytes() / kv.layout.layers / kv.layout.blocks;
        for layer in 0..kv.layout.layers {
            let base = layer * kv.layout.blocks;
            let (from, to) = ((base + from as usize) * bytes, (base + to as usize) * bytes);
            kv.data.copy_within(from..from + bytes, to);
        }
    }

    /// out[row] = weight row 0, widened.
    pub fn put_row(&self, weight: &WeightView<'_>, out: &mut Rows, row: usize) {
        let Device::Cpu(d) = self;
        let cols = out.cols;
        let bytes = &weight.data[..cols * weight.dtype.bytes()];
        d.widen(weight.dtype, bytes, &mut out.data[row * cols..][..cols]);
    }

    /// Copies whole rows of `x` from the host, from row `first` on.
    pub fn write_rows(&self, x: &mut Rows, first: usize, values: &[f32]) {
        x.data[first * x.cols..][..values.len()].copy_from_slice(values);
    }

    pub fn copy_row(&self, from: &Rows, row: usize, to: &mut Rows, at: usize) {
        let cols = from.cols;
        to.data[at * cols..][..cols].copy_from_slice(&from.data[row * cols..][..cols]);
    }

    /// out = x[first .. first + rows] / rms(x) · w, rounded to `out`'s type.
    pub fn rmsnorm(
        &self,
        x: &Rows,
        first: usize,
        rows: usize,
        w: &WeightView<'_>,
        eps: f32,
        out: &mut Acts,
    ) {
        let Device::Cpu(d) = self;
        let x = &x.data[first * x.cols..];
        d.rmsnorm(x, rows, out.cols, w, eps, &mut out.data);
    }

    /// As [`Device::rmsnorm`], kept in float32: `out`'s rows from the first on.
    pub fn rmsnorm_rows(
        &self,
        x: &Rows,
        first: usize,
        rows: usize,
        w: &WeightView<'_>,
        eps: f32,
        out: &mut Rows,
    ) {
        let Device::Cpu(d) = self;
        let x = &x.data[first * x.cols..];
        d.rmsnorm_f32(x, rows, out.cols, w, eps, &mut out.data);
    }

    /// RMSNorm of each head of each row, in place.
    pub fn rmsnorm_heads(
        &self,
        x: &mut Rows,
        rows: usize,
        heads: usize,
        head_size: usize,
        w: &WeightView<'_>,
        eps: f32,
    ) {
        let Device::Cpu(d) = self;
        d.rmsnorm_heads(&mut x.data, rows, x.cols, heads, head_size, w, eps);
    }

    /// out[first + r][n] (+)= a[r]·w[n] + bias[n] for `rows` rows; `out`'s columns are its row stride.
    #[allow(clippy::too_many_arguments)] // the operands of one product
    pub fn linear(
        &self,
        a: &Acts,
        rows: usize,
        w: &WeightView<'_>,
        bias: Option<&WeightView<'_>>,
        out: &mut Rows,
        first: usize,
        into: Into,
    ) {
        let Device::Cpu(d) = self;
        let mode = match into {
            Into::Store => Mode::Store,
            Into::Add => Mode::Add,
        };
        let stride = out.cols;
        let out = &mut out.data[first * stride..];
        d.linear(&a.data, rows, w, bias, out, stride, mode);
    }

    /// Rotates halves of each head by its row's angles; `cos`, `sin`: `[rows, head size / 2]`.
    pub fn rope(
        &self,
        x: &mut Rows,
        rows: usize,
        heads: usize,
        head_size: usize,
        cos: &[f32],
        sin: &[f32],
    ) {
        let Device::Cpu(d) = self;
        d.rope(&mut x.data, rows, x.cols, heads, head_size, cos, sin);
    }

    /// Writes the rows' keys and values into their sequences' blocks.
    pub fn kv_append(&self, kv: &mut Kv, layer: usize, spans: &[Span<'_>], k: &Rows, v: &Rows) {
        let Device::Cpu(d) = self;
        d.kv_append(
            &kv.layout,
            &mut kv.data,
            layer,
            spans,
            &k.data,
            k.cols,
            &v.data,
            v.cols,
        );
    }

    /// Causal attention of every span's rows over their sequences' cached keys.
    pub fn attention(
        &self,
        q: &Rows,
        spans: &[Span<'_>],
        kv: &Kv,
        layer: usize,
        shape: &AttnShape,
        out: &mut Acts,
    ) {
        let Device::Cpu(d) = self;
        let view = KvView {
            layout: kv.layout,
            data: &kv.data,
        };
        d.attention(
            &q.data,
            q.cols,
            shape.heads,
            &view,
            layer,
            spans,
            shape.scale,
            shape.window,
            &mut out.data,
        );
    }

    /// out = silu(gate) · up, rounded to `out`'s type.
    pub fn swiglu(&self, gate: &Rows, up: &Rows, rows: usize, out: &mut Acts) {
        let Device::Cpu(d) = self;
        d.swiglu(&gate.data, &up.data, rows, out.cols, &mut out.data);
    }

    /// As [`Device::swiglu`] for rows of `cols` values, narrower than `out` may hold.
    pub fn swiglu_cols(&self, gate: &Rows, up: &Rows, rows: usize, cols: usize, out: &mut Acts) {
        let Device::Cpu(d) = self;
        d.swiglu(&gate.data, &up.data, rows, cols, &mut out.data);
    }

    /// out = x · Φ(x), the exact GELU, rounded to `out`'s type.
    pub fn gelu(&self, x: &Rows, rows: usize, cols: usize, out: &mut Acts) {
        let Device::Cpu(d) = self;
        d.gelu(&x.data, rows, cols, &mut out.data);
    }

    /// out = x, rounded to `out`'s type.
    pub fn round(&self, x: &Rows, rows: usize, cols: usize, out: &mut Acts) {
        let Device::Cpu(d) = self;
        d.round(&x.data, rows, cols, &mut out.data);
    }

    /// Attention without a cache, every row of a window seeing every row of it. `ends`: 0, then where each window ends.
    pub fn attention_dense(&self, qkv: &Rows, shape: &DenseShape, ends: &[usize], out: &mut Acts) {
        let Device::Cpu(d) = self;
        let width = shape.heads * shape.head_size;
        let attention = DenseAttention {
            q: &qkv.data,
            k: &qkv.data[width..],
            v: &qkv.data[2 * width..],
            q_stride: qkv.cols,
            k_stride: qkv.cols,
            v_stride: qkv.cols,
            heads: shape.heads,
            kv_heads: shape.heads,
            head_size: shape.head_size,
            scale: shape.scale,
            cu_seqlens: ends,
        };
        d.attention_dense(&attention, &mut out.data);
    }

    /// The first `cols` columns of a compact `[rows, cols]` result, on the host.
    pub fn read<'a>(&self, x: &'a Rows, elements: usize) -> &'a [f32] {
        &x.data[..elements]
    }

    /// Lets `x` hold rows of `cols` columns from now on; its room stays what it was.
    pub fn reshape(&self, x: &mut Rows, cols: usize) {
        x.cols = cols;
    }
}
