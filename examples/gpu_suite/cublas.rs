//! The same products by cublasLt, where its library is present: what ours are compared with, nothing the engine needs.

use std::sync::Arc;

use cudarc::cublaslt::{CudaBlasLT, Matmul, MatmulConfig, sys};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use half::bf16;

use super::Outcome;
use super::bed::Random;

pub struct Cublas {
    stream: Arc<CudaStream>,
    handle: CudaBlasLT,
}

impl Cublas {
    /// The error says why not.
    pub fn new() -> Outcome<Cublas> {
        // SAFETY: loads the library, whose initialisers are its vendor's.
        if !unsafe { sys::is_culib_present() } {
            return Err("libcublasLt is not on the library path".into());
        }
        let context = CudaContext::new(0)?;
        let stream = context.new_stream()?;
        Ok(Cublas {
            handle: CudaBlasLT::new(stream.clone())?,
            stream,
        })
    }

    /// Seconds for `[rows, k] · [n, k]ᵀ`, bf16 in and out, over `copies` weights in turn.
    pub fn seconds(&mut self, rows: usize, n: usize, k: usize, copies: usize) -> Outcome<f64> {
        // The same kind of numbers as ours multiplies: what they are changes a GPU's clock.
        let mut random = Random::new(7);
        let pattern: Vec<bf16> = random
            .values(1 << 16, 0.1)
            .into_iter()
            .map(bf16::from_f32)
            .collect();
        let host: Vec<bf16> = pattern
            .iter()
            .copied()
            .cycle()
            .take((n * k).max(rows * k))
            .collect();
        let a = self.stream.clone_htod(&host[..rows * k])?;
        let mut out: CudaSlice<bf16> = self.stream.alloc_zeros(rows * n)?;
        let weights: Vec<CudaSlice<bf16>> = (0..copies)
            .map(|_| self.stream.clone_htod(&host[..n * k]))
            .collect::<Result<_, _>>()?;
        // Column-major: the weight is [k, n], taken transposed, the input [k, rows], the output [n, rows].
        let config = || MatmulConfig {
            transa: true,
            transb: false,
            transc: false,
            m: n as u64,
            n: rows as u64,
            k: k as u64,
            alpha: 1.0,
            lda: k as i64,
            ldb: k as i64,
            beta: 0.0,
            ldc: n as i64,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        let mut round = |times: usize| -> Outcome<f64> {
            self.stream.synchronize()?;
            let started = std::time::Instant::now();
            for i in 0..times {
                // SAFETY: the three buffers have the sizes that the configuration names.
                unsafe {
                    self.handle
                        .matmul(config(), &weights[i % copies], &a, &mut out, None, None)?;
                }
            }
            self.stream.synchronize()?;
            Ok(started.elapsed().as_secs_f64() / times as f64)
        };
        round(1)?;
        let guess = round(2)?;
        let times = (0.03 / guess).clamp(2.0, 500.0) as usize;
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            best = best.min(round(times)?);
        }
        Ok(best)
    }
}
