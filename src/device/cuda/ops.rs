//! The ops: shapes checked, tiles and grids chosen, kernels launched. What each computes is said once, at [`crate::device::Device`].

use super::buffers::{Best, CudaActs, CudaRows, F32, HALF, MOST_CANDIDATES, Mirror};
use super::cublaslt::{Operands, Shape};
use super::kernels::{
    Argmax, BiasAdd, Gelu, Kernel, Linear, Rmsnorm, RmsnormHeads, Round, Swiglu, Topk, Widen,
};
use super::memory::{Address, bytes_of};
use super::{CudaDevice, TILES, VisionKernels};
use crate::device::WeightView;
use crate::error::{Error, Result};

/// Elements that a block of the elementwise kernels works on.
const BLOCK_ELEMENTS: usize = 1024;

impl CudaDevice {
    /// Sends a weight's first row as it is stored: half of what it would be in float32.
    pub fn put_row(&self, weight: &WeightView<'_>, to: &mut CudaActs, first: usize) -> Result<()> {
        if weight.dtype != self.half {
            return Err(Error::internal(
                "an embedding of another type than the GPU's",
            ));
        }
        let bytes = weight.cols * HALF;
        self.context.bind()?;
        self.staging.borrow_mut().send(
            &self.compute,
            to.buffer.at(first * HALF, bytes),
            weight.row(0),
        )
    }

    pub fn widen(&self, x: &CudaActs, out: &mut CudaRows, count: usize) -> Result<()> {
        self.kernels.widen.launch(
            &self.compute,
            (count.div_ceil(BLOCK_ELEMENTS), 1),
            Widen {
                x: x.buffer.at(0, count * HALF),
                out: out.at(0, count),
                count: count as i64,
            },
        )
    }

    pub fn write(&self, to: &mut CudaRows, first: usize, values: &[f32]) -> Result<()> {
        self.context.bind()?;
        let at = to.at(first, values.len());
        self.staging
            .borrow_mut()
            .send(&self.compute, at, bytes_of(values))
    }

    pub fn copy(
        &self,
        from: &CudaRows,
        first: usize,
        to: &mut CudaRows,
        at: usize,
        len: usize,
    ) -> Result<()> {
        // SAFETY: two buffers, in bounds (`at` checks); both wait for the GPU before they go.
        unsafe {
            self.compute
                .copy_within(to.at(at, len), from.at(first, len), len * F32)
        }
    }

    /// Waits for the first `elements` of `x` and gives them.
    pub fn read<'m>(
        &self,
        x: &CudaRows,
        elements: usize,
        mirror: &'m mut Mirror,
    ) -> Result<&'m [f32]> {
        // SAFETY: the mirror is borrowed exclusively until the stream has been waited for.
        unsafe {
            self.compute
                .copy_out(&mut mirror.0, 0, x.at(0, elements), elements * F32)?;
        }
        self.compute.synchronize()?;
        Ok(mirror.0.elements(elements))
    }

    pub fn rmsnorm(
        &self,
        x: &CudaRows,
        first: usize,
        rows: usize,
        w: &WeightView<'_>,
        eps: f32,
        out: &mut CudaActs,
    ) -> Result<()> {
        let cols = w.cols;
        self.kernels.rmsnorm.launch(
            &self.compute,
            (rows, 1),
            Rmsnorm {
                x: x.at(first, rows * cols),
                delta: Address::NONE,
                w: self.weight(w)?,
                out: out.begin(rows, cols),
                cols: int(cols)?,
                eps,
            },
        )
    }

    /// As [`CudaDevice::rmsnorm`], `group` rows side by side in `out`.
    #[allow(clippy::too_many_arguments)] // the operands of one op
    pub fn rmsnorm_groups(
        &self,
        x: &CudaRows,
        first: usize,
        rows: usize,
        group: usize,
        w: &WeightView<'_>,
        eps: f32,
        out: &mut CudaActs,
    ) -> Result<()> {
        self.rmsnorm(x, first, rows, w, eps, out)?;
        (out.rows, out.cols) = (rows / group, w.cols * group);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // the operands of one op
    pub fn rmsnorm_heads(
        &self,
        x: &mut CudaRows,
        rows: usize,
        stride: usize,
        heads: usize,
        head_size: usize,
        w: &WeightView<'_>,
        eps: f32,
    ) -> Result<()> {
        self.kernels.rmsnorm_heads.launch(
            &self.compute,
            (rows, heads.div_ceil(4)),
            RmsnormHeads {
                x: x.at(0, rows * stride),
                w: self.weight(w)?,
                row_stride: stride as i64,
                heads: int(heads)?,
                head_size: int(head_size)?,
                eps,
            },
        )
    }

    /// `out`: from element `first` on, rows `stride` apart.
    #[allow(clippy::too_many_arguments)] // the operands of one product
    pub fn linear(
        &self,
        a: &CudaActs,
        rows: usize,
        w: &WeightView<'_>,
        bias: Option<&WeightView<'_>>,
        out: &mut CudaRows,
        first: usize,
        stride: usize,
        add: bool,
    ) -> Result<()> {
        assert!(
            rows <= a.rows && w.cols == a.cols && w.rows <= stride,
            "shapes of a product"
        );
        if rows == 0 || w.rows == 0 {
            return Ok(());
        }
        let (n, k) = (w.rows, w.cols);
        let ldw = w.row_stride / HALF;
        if let Some(lt) = &self.cublaslt {
            let shape = Shape {
                rows,
                n,
                k,
                ldw,
                ldo: stride,
            };
            let out = out.at(first, (rows - 1) * stride + n);
            let operands = Operands {
                a: a.buffer.at(0, rows * k * HALF),
                w: self.weight(w)?,
                out,
                add,
            };
            lt.run(&self.compute, &shape, &operands)?;
            return bias.map_or(Ok(()), |b| self.add_bias(out, rows, stride, b));
        }
        let (kernel, grid) = self.tile(rows, n, k, ldw)?;
        kernel.launch(
            &self.compute,
            (grid, 1),
            Linear {
                a: a.buffer.at(0, rows * k * HALF),
                w: self.weight(w)?,
                bias: bias.map_or(Ok(Address::NONE), |b| self.weight(b))?,
                out: out.at(first, (rows - 1) * stride + n),
                lda: k as i64,
                ldw: ldw as i64,
                ldo: stride as i64,
                rows: int(rows)?,
                n: int(n)?,
                k: int(k)?,
                flags: i32::from(add),
            },
        )
    }

    fn add_bias(
        &self,
        x: Address,
        rows: usize,
        stride: usize,
        bias: &WeightView<'_>,
    ) -> Result<()> {
        self.kernels.bias_add.launch(
            &self.compute,
            (rows, bias.cols.div_ceil(BLOCK_ELEMENTS)),
            BiasAdd {
                x,
                bias: self.weight(bias)?,
                stride: stride as i64,
                cols: int(bias.cols)?,
            },
        )
    }

    /// The fastest tile, as far as is known; all give the same bits.
    fn tile(
        &self,
        rows: usize,
        n: usize,
        k: usize,
        ldw: usize,
    ) -> Result<(&Kernel<Linear>, usize)> {
        let blocks = |i: usize| n.div_ceil(TILES[i].1) * rows.div_ceil(TILES[i].2);
        let cost = |i: usize| {
            let (_, columns, block_rows, share) = TILES[i];
            let waves = blocks(i).div_ceil(self.context.multiprocessors as usize);
            (waves * columns * block_rows) as f64 / share
        };
        let aligned = k.is_multiple_of(8) && ldw.is_multiple_of(8);
        let chosen = match rows {
            _ if !aligned => 6,
            0..=8 => 0,
            9..=16 => 1,
            17..=32 => 2,
            _ => (3..6)
                .filter(|i| self.kernels.linear[*i].is_some())
                .min_by(|a, b| cost(*a).total_cmp(&cost(*b)))
                .unwrap_or(3),
        };
        let kernel = self.kernels.linear[chosen].as_ref();
        let kernel = kernel.ok_or_else(|| Error::internal("a tile that was not loaded"))?;
        Ok((kernel, blocks(chosen)))
    }

    pub fn swiglu(
        &self,
        gate: &CudaRows,
        up: &CudaRows,
        rows: usize,
        cols: usize,
        out: &mut CudaActs,
    ) -> Result<()> {
        self.kernels.swiglu.launch(
            &self.compute,
            (rows, cols.div_ceil(BLOCK_ELEMENTS)),
            Swiglu {
                gate: gate.at(0, rows * cols),
                up: up.at(0, rows * cols),
                out: out.begin(rows, cols),
                gate_stride: cols as i64,
                up_stride: cols as i64,
                cols: int(cols)?,
            },
        )
    }

    pub fn gelu(&self, x: &CudaRows, rows: usize, cols: usize, out: &mut CudaActs) -> Result<()> {
        let count = rows * cols;
        self.vision()?.gelu.launch(
            &self.compute,
            (count.div_ceil(BLOCK_ELEMENTS), 1),
            Gelu {
                x: x.at(0, count),
                out: out.begin(rows, cols),
                count: count as i64,
            },
        )
    }

    pub fn round(&self, x: &CudaRows, rows: usize, cols: usize, out: &mut CudaActs) -> Result<()> {
        let count = rows * cols;
        self.kernels.round.launch(
            &self.compute,
            (count.div_ceil(BLOCK_ELEMENTS), 1),
            Round {
                x: x.at(0, count),
                out: out.begin(rows, cols),
                count: count as i64,
            },
        )
    }

    pub(super) fn vision(&self) -> Result<&VisionKernels> {
        let missing = || Error::internal("the GPU was opened without the vision kernels");
        self.kernels.vision.as_ref().ok_or_else(missing)
    }

    /// Where a weight lies, which must be on this device and of its type.
    fn weight(&self, w: &WeightView<'_>) -> Result<Address> {
        w.check();
        match w.device_address() {
            Some(address) if w.dtype == self.half => Ok(Address(address)),
            _ => Err(Error::internal(
                "a weight that is not on the GPU, or of another type",
            )),
        }
    }

    /// The `k` best of the first `cols` of each of `rows` rows, kept as number `tile` of the pass.
    #[allow(clippy::too_many_arguments)] // the operands of one op
    pub fn select(
        &self,
        x: &CudaRows,
        rows: usize,
        stride: usize,
        cols: usize,
        k: usize,
        tile: usize,
        best: &mut Best,
    ) -> Result<()> {
        assert!(
            cols >= 1 && (1..=MOST_CANDIDATES).contains(&k),
            "what topk takes"
        );
        let (at, len) = (tile * rows * k * 4, rows * k * 4);
        let (ids, values) = (best.ids.at(at, len), best.values.at(at, len));
        let (stride, cols) = (stride as i64, int(cols)?);
        let x = x.at(0, rows * stride as usize);
        match k {
            1 => self.kernels.argmax.launch(
                &self.compute,
                (rows, 1),
                Argmax {
                    x,
                    ids,
                    values,
                    stride,
                    cols,
                },
            ),
            _ => self.kernels.topk.launch(
                &self.compute,
                (rows, 1),
                Topk {
                    x,
                    ids,
                    values,
                    stride,
                    cols,
                    k: int(k)?,
                },
            ),
        }
    }

    /// Waits for what `count` candidates were selected in all: ids within their block, and values.
    pub fn selected<'b>(&self, best: &'b mut Best, count: usize) -> Result<(&'b [u32], &'b [f32])> {
        let bytes = count * 4;
        // SAFETY: the mirrors are borrowed exclusively until the stream has been waited for.
        unsafe {
            self.compute
                .copy_out(&mut best.host_ids, 0, best.ids.at(0, bytes), bytes)?;
            self.compute
                .copy_out(&mut best.host_values, 0, best.values.at(0, bytes), bytes)?;
        }
        self.compute.synchronize()?;
        Ok((
            best.host_ids.elements(count),
            best.host_values.elements(count),
        ))
    }
}

/// A size as kernels take it.
pub(super) fn int(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::internal("a size that does not fit in 32 bits"))
}
