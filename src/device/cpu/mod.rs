//! The ops of the forward pass on a CPU.
//!
//! # API
//! ```text
//! CpuDevice::new(threads)                      0 threads: one a core; the best instruction set, or TENSORPAGER_ISA's
//! CpuDevice::with_isa(threads, "avx2")         portable | avx2 | avx512 | avx512-bf16
//! ActBuf::new(dtype, rows, cols)               inputs of products: rounded once to the weights' dtype by the op that fills them
//!
//! linear(&a, rows, &w, bias, &mut out, out_stride, Mode::Store | Mode::Add)
//! rmsnorm(&x, rows, cols, &w, eps, &mut act)            rmsnorm_f32(&x, rows, cols, &w, eps, &mut out)
//! rmsnorm_heads(&mut x, rows, row_stride, heads, head_size, &w, eps)
//! rope(&mut x, rows, row_stride, heads, head_size, &cos, &sin)
//! swiglu(&gate, &up, rows, cols, &mut act)   gelu(&x, rows, cols, &mut act)   round(&x, rows, cols, &mut act)
//! add_bias(&mut x, rows, cols, &bias)        widen(dtype, &bytes, &mut out)
//! kv_append(&layout, &mut kv, layer, &segments, &k, k_stride, &v, v_stride)
//! attention(&q, q_stride, heads, &KvView{layout, data}, layer, &segments, scale, window, &mut act)
//! attention_dense(&DenseAttention{q, k, v, strides, heads, kv_heads, head_size, scale, cu_seqlens}, &mut act)
//! ```
//! Activations are float32, row-major; a `*_stride` counts elements from one row to the next. Shapes are asserted: a wrong one is a
//! bug of the caller, never of a file. No op allocates.
//!
//! # Invariants
//! - A row's result is bit-identical whatever the number of rows, the number of threads and the other rows, on one instruction set.
//! - Weights are read from unaligned bytes, never past their end.

mod act;
mod attention;
mod attention_tile;
mod dense;
mod elementwise;
mod kv;
mod linear;
mod math;
mod norm;
mod pool;
mod prefetch;
mod rope;
mod scratch;
mod simd;
#[cfg(test)]
mod tests;
mod tiling;

pub use act::ActBuf;
pub use attention::AttnSegment;
pub use dense::{DenseAttention, dense_scratch_bytes};
pub use kv::{KvLayout, KvView};
pub use linear::Mode;
pub use scratch::{ATTENTION_CHUNK, KV_BLOCK_TOKENS, MAX_HEAD_SIZE};

use crate::error::{Code, Error, Result};
use pool::Pool;
use simd::{ISA_NAMES, Isa};

/// Names an instruction set for [`CpuDevice::new`] in place of the best one.
pub const ISA_VARIABLE: &str = "TENSORPAGER_ISA";

/// Threads and an instruction set, chosen once.
pub struct CpuDevice {
    pool: Pool,
    isa: Isa,
}

impl CpuDevice {
    /// `threads` in all, the caller's counted; 0 means one a core. The best instruction set of this CPU, or the one that the environment
    /// variable `TENSORPAGER_ISA` names.
    ///
    /// # Errors
    /// [`Code::Device`] when the variable names an instruction set that this CPU does not have.
    pub fn new(threads: usize) -> Result<CpuDevice> {
        match std::env::var(ISA_VARIABLE) {
            Ok(name) => CpuDevice::with_isa(threads, &name),
            Err(_) => Ok(CpuDevice::start(threads, Isa::best())),
        }
    }

    /// As [`CpuDevice::new`], with the instruction set given: one of [`CpuDevice::isas`].
    ///
    /// # Errors
    /// [`Code::Device`] when this CPU does not have it.
    pub fn with_isa(threads: usize, name: &str) -> Result<CpuDevice> {
        let isa = Isa::named(name).ok_or_else(|| {
            Error::new(
                Code::Device,
                format!("the instruction set `{name}` cannot be used"),
                format!("this CPU has {}", CpuDevice::isas().join(", ")),
                format!("unset {ISA_VARIABLE} or choose one of those"),
            )
        })?;
        Ok(CpuDevice::start(threads, isa))
    }

    fn start(threads: usize, isa: Isa) -> CpuDevice {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        CpuDevice {
            pool: Pool::new(threads),
            isa,
        }
    }

    /// The instruction sets that this CPU has, best first.
    pub fn isas() -> Vec<&'static str> {
        ISA_NAMES
            .into_iter()
            .filter(|name| Isa::named(name).is_some())
            .collect()
    }

    /// The instruction set in use: `avx512-bf16`, `avx512`, `avx2` or `portable`.
    pub fn isa(&self) -> &'static str {
        self.isa.name()
    }

    /// Threads in all, the caller's counted.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs `work` on ranges of rows that cover `0..rows`: on this thread when there is little to do.
    fn for_row_ranges(
        &self,
        rows: usize,
        elements_per_row: usize,
        work: &(dyn Fn(std::ops::Range<usize>) + Sync),
    ) {
        /// Elements below which waking another thread costs more than it saves.
        const WORTH_A_THREAD: usize = 16 * 1024;
        let most = self.threads() * 4;
        let tasks = (rows * elements_per_row / WORTH_A_THREAD).clamp(1, most.min(rows.max(1)));
        let step = rows.div_ceil(tasks).max(1);
        if tasks == 1 {
            return work(0..rows);
        }
        self.pool.run(rows.div_ceil(step), &|task, _| {
            work(task * step..rows.min((task + 1) * step));
        });
    }
}

/// The start of an output that the tasks of an op write in disjoint parts.
struct OutPtr<T>(*mut T);

impl<T> Clone for OutPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for OutPtr<T> {}
// SAFETY: each op gives every element to one task only and keeps the output mutably borrowed while tasks run.
unsafe impl<T: Send> Send for OutPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for OutPtr<T> {}

/// Asserts that `len` elements hold `rows` rows of `cols`, `row_stride` apart.
fn check_rows(len: usize, rows: usize, row_stride: usize, cols: usize) {
    assert!(
        rows == 0 || (cols <= row_stride && (rows - 1) * row_stride + cols <= len),
        "{len} elements do not hold {rows} rows of {cols}, {row_stride} apart"
    );
}
