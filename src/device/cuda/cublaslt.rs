//! Products through cublasLt, where its library is present (`--gemm cublaslt`): to compare with. It picks another algorithm for another number
//! of rows, so a token's result then depends on what else is in the pass.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use super::context::Context;
use super::memory::{Address, DeviceBuffer};
use super::stream::Stream;
use crate::error::{Code, Error, Result};
use crate::units::Dtype;

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: u64 = 32 << 20;
/// Shapes whose algorithm is kept; passes have few.
const MOST_SHAPES: usize = 1024;

/// out[rows][n] (+)= a[rows][k] · w[n][k]; strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub rows: usize,
    pub n: usize,
    pub k: usize,
    pub ldw: usize,
    pub ldo: usize,
}

/// The operands' addresses.
pub(super) struct Operands {
    pub a: Address,
    pub w: Address,
    pub out: Address,
    pub add: bool,
}

/// cublasLt's objects for one shape.
struct Product {
    desc: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    a: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
}

pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer,
    half: sys::cudaDataType,
    products: RefCell<HashMap<Shape, Product>>,
}

// SAFETY: the handle and the objects are the library's, used by one thread at a time (`RefCell` keeps it from being shared).
unsafe impl Send for CublasLt {}

fn failed(doing: &str) -> impl Fn(result::CublasError) -> Error + '_ {
    move |e| {
        Error::new(
            Code::Device,
            format!("{doing} failed"),
            format!("cublasLt answers {:?}", e.0),
            "run with --gemm own",
        )
    }
}

impl CublasLt {
    pub fn new(context: &Arc<Context>, half: Dtype) -> Result<CublasLt> {
        // SAFETY: loads and unloads the library; its initialisers are the vendor's.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::new(
                Code::Device,
                "cublasLt cannot be used",
                "libcublasLt.so.12 cannot be loaded: it comes with the CUDA toolkit, not with the driver",
                "run with --gemm own, or put the library's folder into LD_LIBRARY_PATH",
            ));
        }
        let workspace = DeviceBuffer::new(context, WORKSPACE_BYTES, "cublasLt's workspace")?;
        Ok(CublasLt {
            handle: result::create_handle().map_err(failed("starting cublasLt"))?,
            workspace,
            half: match half {
                Dtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
                _ => sys::cudaDataType_t::CUDA_R_16BF,
            },
            products: RefCell::new(HashMap::new()),
        })
    }

    /// Gives one product to the stream. The caller has checked that the buffers hold the shape.
    pub fn run(&self, stream: &Stream, shape: &Shape, on: &Operands) -> Result<()> {
        let mut products = self.products.borrow_mut();
        if products.len() >= MOST_SHAPES {
            products.clear();
        }
        let product = match products.entry(*shape) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(self.make(shape)?),
        };
        let pointer = |a: Address| a.0 as *mut c_void;
        let (alpha, beta) = (1.0f32, if on.add { 1.0f32 } else { 0.0 });
        // SAFETY: the objects are alive in `products`; alpha and beta are read before the call returns (host pointer mode); the addresses come
        // from `DeviceBuffer::at` with this shape, and their buffers wait for the GPU before they go.
        unsafe {
            result::matmul(
                self.handle,
                product.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(on.w),
                product.w,
                pointer(on.a),
                product.a,
                pointer(on.out),
                product.out,
                pointer(on.out),
                product.out,
                &product.algo,
                pointer(self.workspace.address()),
                WORKSPACE_BYTES as usize,
                stream.raw().cast(),
            )
        }
        .map_err(failed("a product of cublasLt"))
    }

    /// cublasLt counts columns first: row-major out[rows][n] is its n × rows, the product of wᵀ (n × k) and a (k × rows).
    fn make(&self, s: &Shape) -> Result<Product> {
        let lost = failed("describing a product to cublasLt");
        let layout = |kind, rows: usize, cols: usize, ld: usize| {
            result::create_matrix_layout(kind, rows as u64, cols as u64, ld as i64)
        };
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let mut product = Product {
            desc: result::create_matmul_desc(compute, f32).map_err(&lost)?,
            w: layout(self.half, s.k, s.n, s.ldw).map_err(&lost)?,
            a: layout(self.half, s.k, s.rows, s.k).map_err(&lost)?,
            out: layout(f32, s.n, s.rows, s.ldo).map_err(&lost)?,
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let (transpose, room) = (1i32, WORKSPACE_BYTES);
        let preference = result::create_matmul_pref().map_err(&lost)?;
        // SAFETY: the objects were just made and are alive; the attributes' values are locals of the sizes given.
        let found = unsafe {
            result::set_matmul_desc_attribute(
                product.desc,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transpose).cast(),
                size_of::<i32>(),
            )
            .and_then(|()| {
                result::set_matmul_pref_attribute(
                    preference,
                    sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    (&raw const room).cast(),
                    size_of::<u64>(),
                )
            })
            .and_then(|()| {
                result::get_matmul_algo_heuristic(
                    self.handle,
                    product.desc,
                    product.w,
                    product.a,
                    product.out,
                    product.out,
                    preference,
                )
            })
        };
        // SAFETY: made above, used by nobody else.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        product.algo = found
            .map_err(failed("choosing an algorithm of cublasLt"))?
            .algo;
        Ok(product)
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: made by `make` for this product alone; launches hold no reference to them.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for layout in [self.w, self.a, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.products.borrow_mut().clear();
        // SAFETY: made in `new`, used by nobody else.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
