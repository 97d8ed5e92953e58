//! The ops: shapes checked, tiles and grids chosen, kernels launched. What each computes is said once, at [`crate::device::Device`].

use super::buffers::{Best, CudaActs, CudaRows, F32, HALF, MOST_CANDIDATES, Mirror};
use super::cublaslt::{CublasLt, Operands, Shape};
use super::kernels::{
    Argmax, BiasAdd, Gelu, Linear, Rmsnorm, RmsnormHeads, Round, Swiglu, Topk, Widen,
};
use super::memory::{Address, bytes_of};
use super::tiles::{T256, Work};
use super::{CudaDevice, VisionKernels};
use crate::device::{Product, WeightView};
use crate::error::{Error, Result};

/// Elements that a block of the elementwise kernels works on.
const BLOCK_ELEMENTS: usize = 1024;
/// That a launch of `linear` takes.
const MATRICES: usize = 3;

/// A matrix that rows are multiplied with: where it, its bias and its products lie; strides in elements. Checked by who made it.
#[derive(Clone, Copy)]
struct Matrix {
    w: Address,
    bias: Address,
    out: Address,
    ldw: usize,
    ldo: usize,
    n: usize,
}

impl Matrix {
    const NONE: Matrix = Matrix {
        w: Address::NONE,
        bias: Address::NONE,
        out: Address::NONE,
        ldw: 0,
        ldo: 0,
        n: 0,
    };
}

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
        let matrix = self.matrix(a, rows, w, bias, out, first, stride)?;
        match &self.cublaslt {
            Some(lt) => self.one_of_theirs(lt, a, rows, &matrix, add),
            None => self.one_launch(a, rows, [matrix, Matrix::NONE, Matrix::NONE], add),
        }
    }

    /// As few launches as there may be; one a product where they are not ours.
    pub fn linear_each(
        &self,
        a: &CudaActs,
        rows: usize,
        products: &mut [Product<'_>],
    ) -> Result<()> {
        for some in products.chunks_mut(MATRICES) {
            let mut matrices = [Matrix::NONE; MATRICES];
            for (matrix, p) in matrices.iter_mut().zip(some) {
                let stride = p.out.cols;
                let out = p.out.data.cuda_mut();
                *matrix = self.matrix(a, rows, p.w, p.bias, out, 0, stride)?;
            }
            match &self.cublaslt {
                Some(lt) => matrices
                    .iter()
                    .try_for_each(|m| self.one_of_theirs(lt, a, rows, m, false))?,
                None => self.one_launch(a, rows, matrices, false)?,
            }
        }
        Ok(())
    }

    /// Checks the shapes of a product of the first `rows` of `a`.
    #[allow(clippy::too_many_arguments)] // the operands of one product
    fn matrix(
        &self,
        a: &CudaActs,
        rows: usize,
        w: &WeightView<'_>,
        bias: Option<&WeightView<'_>>,
        out: &mut CudaRows,
        first: usize,
        stride: usize,
    ) -> Result<Matrix> {
        assert!(
            rows <= a.rows && w.cols == a.cols && w.rows <= stride,
            "shapes of a product"
        );
        if let Some(bias) = bias {
            assert!(bias.rows == 1 && bias.cols == w.rows, "shape of the bias");
        }
        if rows == 0 || w.rows == 0 {
            return Ok(Matrix::NONE);
        }
        Ok(Matrix {
            w: self.weight(w)?,
            bias: bias.map_or(Ok(Address::NONE), |b| self.weight(b))?,
            out: out.at(first, (rows - 1) * stride + w.rows),
            ldw: w.row_stride / HALF,
            ldo: stride,
            n: w.rows,
        })
    }

    /// All bits are those of a launch each: the blocks of one matrix follow those of another (`kernels/linear.cu`).
    fn one_launch(
        &self,
        a: &CudaActs,
        rows: usize,
        matrices: [Matrix; MATRICES],
        add: bool,
    ) -> Result<()> {
        let k = a.cols;
        let even = |elements: usize| elements.is_multiple_of(8);
        let work = Work {
            rows,
            columns: &matrices.map(|m| m.n),
            aligned: even(k) && matrices.iter().all(|m| even(m.ldw)),
        };
        let largest = self.kernels.linear[T256].is_some();
        let tile = work.tile(self.context.multiprocessors as usize, largest);
        let kernel = self.kernels.linear[tile].as_ref();
        let kernel = kernel.ok_or_else(|| Error::internal("a tile that was not loaded"))?;
        let [m0, m1, m2] = matrices;
        kernel.launch(
            &self.compute,
            (work.blocks(tile), 1),
            Linear {
                a: a.buffer.at(0, rows * k * HALF),
                w0: m0.w,
                bias0: m0.bias,
                out0: m0.out,
                w1: m1.w,
                bias1: m1.bias,
                out1: m1.out,
                w2: m2.w,
                bias2: m2.bias,
                out2: m2.out,
                lda: k as i64,
                ldw0: m0.ldw as i64,
                ldw1: m1.ldw as i64,
                ldw2: m2.ldw as i64,
                ldo0: m0.ldo as i64,
                ldo1: m1.ldo as i64,
                ldo2: m2.ldo as i64,
                rows: int(rows)?,
                n0: int(m0.n)?,
                n1: int(m1.n)?,
                n2: int(m2.n)?,
                k: int(k)?,
                flags: i32::from(add),
            },
        )
    }

    /// A product of cublasLt, and the bias by a kernel of ours.
    fn one_of_theirs(
        &self,
        lt: &CublasLt,
        a: &CudaActs,
        rows: usize,
        m: &Matrix,
        add: bool,
    ) -> Result<()> {
        if m.n == 0 {
            return Ok(());
        }
        let k = a.cols;
        let shape = Shape {
            rows,
            n: m.n,
            k,
            ldw: m.ldw,
            ldo: m.ldo,
        };
        let operands = Operands {
            a: a.buffer.at(0, rows * k * HALF),
            w: m.w,
            out: m.out,
            add,
        };
        lt.run(&self.compute, &shape, &operands)?;
        if m.bias == Address::NONE {
            return Ok(());
        }
        self.kernels.bias_add.launch(
            &self.compute,
            (rows, m.n.div_ceil(BLOCK_ELEMENTS)),
            BiasAdd {
                x: m.out,
                bias: m.bias,
                stride: m.ldo as i64,
                cols: int(m.n)?,
            },
        )
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
