//! The devices behind one small enum, and the ops of the forward pass on their buffers.
//!
//! A buffer belongs to the device that made it; handing it to another kind is a bug of the caller. On a GPU an op returns before it has
//! run: its failure may be told by a later op, at the latest by the one that reads a result.

use super::WeightView;
use super::buffers::{
    Acts, AttnShape, Best, Dense, DenseShape, Into, Kv, Lists, Mirror, PassRows, Product, Rows,
    foreign,
};
use super::cpu::{CpuDevice, DenseAttention, KvView, Mode};
use super::cuda::{CudaDevice, CudaOptions};
use crate::error::Result;

/// Where the forward pass runs.
pub enum Device {
    Cpu(CpuDevice),
    Cuda(Box<CudaDevice>),
}

/// Which kind of device: enough to say what things take, before one is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceKind {
    #[default]
    Cpu,
    Cuda,
}

impl Device {
    pub fn kind(&self) -> DeviceKind {
        match self {
            Device::Cpu(_) => DeviceKind::Cpu,
            Device::Cuda(_) => DeviceKind::Cuda,
        }
    }

    /// `threads`: one a core by default. `isa` forces an instruction set.
    pub fn cpu(threads: Option<usize>, isa: Option<&str>) -> Result<Device> {
        let threads = threads.unwrap_or(0);
        Ok(Device::Cpu(match isa {
            Some(isa) => CpuDevice::with_isa(threads, isa)?,
            None => CpuDevice::new(threads)?,
        }))
    }

    /// A GPU. Errors say in plain words what is missing.
    pub fn cuda(options: &CudaOptions) -> Result<Device> {
        Ok(Device::Cuda(Box::new(CudaDevice::new(options)?)))
    }

    /// The GPU, where this is one.
    pub fn as_cuda(&self) -> Option<&CudaDevice> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(d) => Some(d),
        }
    }

    /// `cpu` or `cuda:0`: as `--device` and reports name it.
    pub fn name(&self) -> &str {
        match self {
            Device::Cpu(_) => "cpu",
            Device::Cuda(d) => d.label(),
        }
    }

    /// The instruction set in use and how many threads; or the GPU.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu(d) => format!("{}, {} threads", d.isa(), d.threads()),
            Device::Cuda(d) => d.describe(),
        }
    }

    /// Host threads that compute.
    pub fn threads(&self) -> usize {
        match self {
            Device::Cpu(d) => d.threads(),
            Device::Cuda(_) => std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Waits until the device has run everything it was given. What went wrong there is said here.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(d) => d.synchronize(),
        }
    }

    /// Copies a whole KV block of every layer: before a forked sequence writes into a shared one.
    pub fn kv_copy(&self, kv: &mut Kv, from: u32, to: u32) -> Result<()> {
        if let Device::Cuda(d) = self {
            return d.kv_copy(kv.data.cuda_mut(), from, to);
        }
        let s = kv.shape;
        let bytes = s.bytes() / s.layers / s.blocks;
        for layer in 0..s.layers {
            let base = layer * s.blocks;
            let (from, to) = ((base + from as usize) * bytes, (base + to as usize) * bytes);
            kv.data.host_mut().copy_within(from..from + bytes, to);
        }
        Ok(())
    }

    /// To be called before a pass's first layer: a cache in host memory begins to go where it is needed. `window`: keys that a row sees at
    /// most, in any layer.
    pub fn kv_begin(&self, kv: &mut Kv, pass: &PassRows<'_>, window: Option<usize>) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(d) => d.kv_begin(kv.data.cuda_mut(), pass.spans, window),
        }
    }

    /// out[row] = weight row 0, widened, once [`Device::widen_rows`] was called behind the last row: a device with memory of its own takes
    /// the row as it is stored, into `narrow`. The weight lies in host memory.
    pub fn put_row(
        &self,
        weight: &WeightView<'_>,
        narrow: &mut Acts,
        out: &mut Rows,
        row: usize,
    ) -> Result<()> {
        let cols = out.cols;
        match self {
            Device::Cpu(d) => {
                let out = &mut out.data.host_mut()[row * cols..][..cols];
                d.widen(
                    weight.dtype,
                    &weight.row(0)[..cols * weight.dtype.bytes()],
                    out,
                );
                Ok(())
            }
            Device::Cuda(d) => d.put_row(weight, narrow.data.cuda_mut(), row * cols),
        }
    }

    /// Ends what [`Device::put_row`] began, for the first `rows` rows of `out`; those that no row was put into hold anything afterwards.
    pub fn widen_rows(&self, narrow: &Acts, out: &mut Rows, rows: usize) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(d) => d.widen(narrow.data.cuda(), out.data.cuda_mut(), rows * out.cols),
        }
    }

    /// Copies whole rows of `x` from the host, from row `first` on.
    pub fn write_rows(&self, x: &mut Rows, first: usize, values: &[f32]) -> Result<()> {
        let at = first * x.cols;
        match self {
            Device::Cpu(_) => {
                x.data.host_mut()[at..][..values.len()].copy_from_slice(values);
                Ok(())
            }
            Device::Cuda(d) => d.write(x.data.cuda_mut(), at, values),
        }
    }

    /// to[at .. at + rows] = from[first .. first + rows]
    pub fn copy_rows(
        &self,
        from: &Rows,
        first: usize,
        to: &mut Rows,
        at: usize,
        rows: usize,
    ) -> Result<()> {
        let (first, at, len) = (first * from.cols, at * from.cols, rows * from.cols);
        match self {
            Device::Cpu(_) => {
                let from = &from.data.host()[first..][..len];
                to.data.host_mut()[at..][..len].copy_from_slice(from);
                Ok(())
            }
            Device::Cuda(d) => d.copy(from.data.cuda(), first, to.data.cuda_mut(), at, len),
        }
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
    ) -> Result<()> {
        let at = first * x.cols;
        match self {
            Device::Cpu(d) => {
                let out_cols = out.cols;
                d.rmsnorm(
                    &x.data.host()[at..],
                    rows,
                    out_cols,
                    w,
                    eps,
                    out.data.host_mut(),
                );
                Ok(())
            }
            Device::Cuda(d) => d.rmsnorm(x.data.cuda(), at, rows, w, eps, out.data.cuda_mut()),
        }
    }

    /// As [`Device::rmsnorm`], `group` rows side by side in each of `out`'s. `between` holds as many values as `out`.
    #[allow(clippy::too_many_arguments)] // the operands of one op
    pub fn rmsnorm_groups(
        &self,
        x: &Rows,
        first: usize,
        rows: usize,
        group: usize,
        w: &WeightView<'_>,
        eps: f32,
        between: &mut Rows,
        out: &mut Acts,
    ) -> Result<()> {
        let at = first * x.cols;
        match self {
            Device::Cpu(d) => {
                let between = between.data.host_mut();
                d.rmsnorm_f32(&x.data.host()[at..], rows, w.cols, w, eps, between);
                d.round(between, rows / group, w.cols * group, out.data.host_mut());
                Ok(())
            }
            Device::Cuda(d) => {
                d.rmsnorm_groups(x.data.cuda(), at, rows, group, w, eps, out.data.cuda_mut())
            }
        }
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
    ) -> Result<()> {
        let cols = x.cols;
        match self {
            Device::Cpu(d) => {
                d.rmsnorm_heads(x.data.host_mut(), rows, cols, heads, head_size, w, eps);
                Ok(())
            }
            Device::Cuda(d) => {
                d.rmsnorm_heads(x.data.cuda_mut(), rows, cols, heads, head_size, w, eps)
            }
        }
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
    ) -> Result<()> {
        let stride = out.cols;
        match self {
            Device::Cpu(d) => {
                let mode = match into {
                    Into::Store => Mode::Store,
                    Into::Add => Mode::Add,
                };
                let out = &mut out.data.host_mut()[first * stride..];
                d.linear(a.data.host(), rows, w, bias, out, stride, mode);
                Ok(())
            }
            Device::Cuda(d) => {
                let add = into == Into::Add;
                d.linear(
                    a.data.cuda(),
                    rows,
                    w,
                    bias,
                    out.data.cuda_mut(),
                    first * stride,
                    stride,
                    add,
                )
            }
        }
    }

    /// out[r][n] = a[r]·w[n] + bias[n] for `rows` rows and each of `products`, the bits being those of one [`Device::linear`] after another. A
    /// GPU does three of them in one launch (not with cublasLt): small matrices have too few columns to keep it busy by themselves.
    pub fn linear_each(&self, a: &Acts, rows: usize, products: &mut [Product<'_>]) -> Result<()> {
        match self {
            Device::Cpu(_) => products
                .iter_mut()
                .try_for_each(|p| self.linear(a, rows, p.w, p.bias, p.out, 0, Into::Store)),
            Device::Cuda(d) => d.linear_each(a.data.cuda(), rows, products),
        }
    }

    /// Before the layers of a pass: tells the device of its rows.
    pub fn begin(&self, lists: &mut Lists, rows: &PassRows<'_>) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(d) => d.begin(lists.0.cuda_mut(), rows.spans, rows.cos, rows.sin),
        }
    }

    /// Turns the halves of each head of q and k by their row's angles, and writes keys and values into their sequences' blocks. Attention of
    /// the same rows must follow: what q holds afterwards is the device's own affair.
    #[allow(clippy::too_many_arguments)] // the operands of one op
    pub fn rope_append(
        &self,
        lists: &mut Lists,
        pass: &PassRows<'_>,
        q: &mut Rows,
        k: &mut Rows,
        v: &Rows,
        kv: &mut Kv,
        layer: usize,
    ) -> Result<()> {
        let d = match self {
            Device::Cpu(d) => d,
            Device::Cuda(d) => {
                let (q, k, v) = (q.data.cuda(), k.data.cuda(), v.data.cuda());
                return d.rope_append(lists.0.cuda_mut(), q, k, v, kv.data.cuda_mut(), layer);
            }
        };
        let head = kv.shape.head_size;
        let rows: usize = pass.spans.iter().map(|s| s.rows).sum();
        for x in [&mut *q, &mut *k] {
            let cols = x.cols;
            d.rope(
                x.data.host_mut(),
                rows,
                cols,
                cols / head,
                head,
                pass.cos,
                pass.sin,
            );
        }
        d.kv_append(
            &kv.shape.layout(),
            kv.data.host_mut(),
            layer,
            pass.spans,
            k.data.host(),
            k.cols,
            v.data.host(),
            v.cols,
        );
        Ok(())
    }

    /// Causal attention of every span's rows over their sequences' cached keys; `q` as [`Device::rope_append`] left it.
    #[allow(clippy::too_many_arguments)] // the operands of one op
    pub fn attention(
        &self,
        lists: &Lists,
        pass: &PassRows<'_>,
        q: &Rows,
        kv: &Kv,
        layer: usize,
        shape: &AttnShape,
        out: &mut Acts,
    ) -> Result<()> {
        match self {
            Device::Cpu(d) => {
                let view = KvView {
                    layout: kv.shape.layout(),
                    data: kv.data.host(),
                };
                d.attention(
                    q.data.host(),
                    q.cols,
                    shape.heads,
                    &view,
                    layer,
                    pass.spans,
                    shape.scale,
                    shape.window,
                    out.data.host_mut(),
                );
                Ok(())
            }
            Device::Cuda(d) => d.attention(
                lists.0.cuda(),
                kv.data.cuda(),
                layer,
                shape,
                out.data.cuda_mut(),
            ),
        }
    }

    /// out = silu(gate) · up, rounded to `out`'s type, for rows of `cols` values: all that gate and up hold.
    pub fn swiglu(
        &self,
        gate: &Rows,
        up: &Rows,
        rows: usize,
        cols: usize,
        out: &mut Acts,
    ) -> Result<()> {
        match self {
            Device::Cpu(d) => {
                d.swiglu(
                    gate.data.host(),
                    up.data.host(),
                    rows,
                    cols,
                    out.data.host_mut(),
                );
                Ok(())
            }
            Device::Cuda(d) => {
                let (gate, up) = (gate.data.cuda(), up.data.cuda());
                d.swiglu(gate, up, rows, cols, out.data.cuda_mut())
            }
        }
    }

    /// out = x · Φ(x), the exact GELU, rounded to `out`'s type.
    pub fn gelu(&self, x: &Rows, rows: usize, cols: usize, out: &mut Acts) -> Result<()> {
        match self {
            Device::Cpu(d) => {
                d.gelu(x.data.host(), rows, cols, out.data.host_mut());
                Ok(())
            }
            Device::Cuda(d) => d.gelu(x.data.cuda(), rows, cols, out.data.cuda_mut()),
        }
    }

    /// out = x, rounded to `out`'s type.
    pub fn round(&self, x: &Rows, rows: usize, cols: usize, out: &mut Acts) -> Result<()> {
        match self {
            Device::Cpu(d) => {
                d.round(x.data.host(), rows, cols, out.data.host_mut());
                Ok(())
            }
            Device::Cuda(d) => d.round(x.data.cuda(), rows, cols, out.data.cuda_mut()),
        }
    }

    /// Turns the heads of q and k of the first `rows` rows `[q | k | v]` by their row's angles. `pass.spans` are not looked at.
    pub fn rope_dense(
        &self,
        qkv: &mut Rows,
        rows: usize,
        shape: &DenseShape,
        pass: &PassRows<'_>,
        dense: &mut Dense,
    ) -> Result<()> {
        let (cols, both) = (qkv.cols, 2 * shape.heads);
        match self {
            Device::Cpu(d) => {
                // Queries and keys lie side by side: one call turns both.
                let data = qkv.data.host_mut();
                d.rope(data, rows, cols, both, shape.head_size, pass.cos, pass.sin);
                Ok(())
            }
            Device::Cuda(d) => {
                let dense = dense.0.cuda_mut();
                d.rope_dense(qkv.data.cuda(), rows, shape, pass.cos, pass.sin, dense)
            }
        }
    }

    /// Attention without a cache of the rows that [`Device::rope_dense`] turned, every row of a window seeing every row of it. `ends`: 0, then
    /// where each window ends.
    pub fn attention_dense(
        &self,
        qkv: &Rows,
        shape: &DenseShape,
        ends: &[usize],
        dense: &mut Dense,
        out: &mut Acts,
    ) -> Result<()> {
        let d = match self {
            Device::Cpu(d) => d,
            Device::Cuda(d) => {
                return d.attention_dense(shape, ends, dense.0.cuda_mut(), out.data.cuda_mut());
            }
        };
        let (cols, width) = (qkv.cols, shape.heads * shape.head_size);
        let data = qkv.data.host();
        let attention = DenseAttention {
            q: data,
            k: &data[width..],
            v: &data[2 * width..],
            q_stride: cols,
            k_stride: cols,
            v_stride: cols,
            heads: shape.heads,
            kv_heads: shape.heads,
            head_size: shape.head_size,
            scale: shape.scale,
            cu_seqlens: ends,
        };
        d.attention_dense(&attention, out.data.host_mut());
        Ok(())
    }

    /// The first `elements` of compact rows, on the host. Waits for the device.
    pub fn read<'a>(
        &self,
        x: &'a Rows,
        elements: usize,
        mirror: &'a mut Mirror,
    ) -> Result<&'a [f32]> {
        match self {
            Device::Cpu(_) => Ok(&x.data.host()[..elements]),
            Device::Cuda(d) => d.read(x.data.cuda(), elements, mirror.0.cuda_mut()),
        }
    }

    /// Keeps the `k` best of the first `cols` of each of `rows` rows of `x`, as block `tile` of the pass.
    ///
    /// # Panics
    /// On a device for which [`Device::best`] has none.
    #[allow(clippy::too_many_arguments)] // the operands of one op
    pub fn select(
        &self,
        x: &Rows,
        rows: usize,
        cols: usize,
        k: usize,
        tile: usize,
        best: &mut Best,
    ) -> Result<()> {
        match self {
            Device::Cpu(_) => foreign(),
            Device::Cuda(d) => d.select(x.data.cuda(), rows, x.cols, cols, k, tile, &mut best.0),
        }
    }

    /// What the first `count` selections of the pass are: ids counted within their block, and values, `[tile, row, k]`, the best first and
    /// of equals the lowest id; past the end id `u32::MAX`. Waits for the device.
    pub fn selected<'b>(&self, best: &'b mut Best, count: usize) -> Result<(&'b [u32], &'b [f32])> {
        match self {
            Device::Cpu(_) => foreign(),
            Device::Cuda(d) => d.selected(&mut best.0, count),
        }
    }

    /// Lets `x` hold rows of `cols` columns from now on; its room stays what it was.
    pub fn reshape(&self, x: &mut Rows, cols: usize) {
        x.cols = cols;
    }
}
