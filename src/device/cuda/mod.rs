//! The ops of the forward pass on an NVIDIA GPU, through the driver alone: kernels of `kernels/`, two streams, memory within a bound.
//!
//! - `ffi` names the driver; `context`, `stream`, `memory`, `kernels` own what it hands out.
//! - The *compute stream* runs the kernels in order, with what the host sends each pass (`staging`). The *copy stream* fills slots with
//!   weights (`slots`). Fences order the two; the host waits only where it needs a result.
//! - Ops return before the GPU has run them: what goes wrong there is told by a later call, at the latest by the pass's last.

mod attention;
mod buffers;
mod context;
mod cublaslt;
mod ffi;
mod kernels;
mod kv;
mod lists;
mod memory;
mod ops;
mod slots;
mod staging;
mod stream;
mod tiles;

use std::cell::RefCell;
use std::sync::Arc;

pub use buffers::{Best, CudaActs, CudaDense, CudaLists, CudaRows, Mirror};
pub use context::{Context, available, is_absent};
pub use kv::CudaKv;
pub use lists::ListShape;
pub use memory::{DeviceBuffer, Pin, Refusal};
pub use slots::{Clock, Compute, Copier, Piece, Slot, Ticks};

use crate::error::{Code, Error, Result};
use crate::units::{Dtype, flag_size, human_bytes};
use cublaslt::CublasLt;
use kernels::{
    Argmax, AttentionDecode, AttentionDense, AttentionMerge, AttentionPrefill, BiasAdd, Gelu,
    Kernel, Linear, Modules, Rmsnorm, RmsnormHeads, RopeAppend, RopeDense, Round, Swiglu, Topk,
    Widen, head_sizes, no_head_size,
};
use memory::HostBuffer;
use staging::Staging;
use stream::{Event, Stream};
use tiles::{T256, TILES};

/// Of one copy that the rate of copies is measured with, at most.
const PROBE_BYTES: u64 = 16 << 20;
/// How many of them; the first is not counted.
const PROBES: usize = 5;

/// Kept aside in every GPU budget for what the driver takes by itself while running: local memory, its own buffers, pages not filled.
const SLACK_BYTES: u64 = 64 << 20;

/// What a GPU is opened for.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    pub ordinal: usize,
    /// The 16-bit type of all weights.
    pub half: Dtype,
    pub head_size: usize,
    /// Of the vision tower, where pictures are to be looked at.
    pub vision_head_size: Option<usize>,
    /// Bound on all device memory of this process; by default 90 % of what is free.
    pub memory: Option<u64>,
    pub gemm: Gemm,
}

/// Whose matrix products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gemm {
    #[default]
    Own,
    /// Not batch-invariant: to compare with.
    CublasLt,
}

/// Whether there is a first GPU new enough, and kernels for such a model: what `--device auto` asks.
pub fn can_run(half: Dtype, head_size: usize, vision_head_size: Option<usize>) -> Result<()> {
    context::check(0)?;
    check_model(half, head_size, vision_head_size)
}

fn check_model(half: Dtype, head_size: usize, vision_head_size: Option<usize>) -> Result<()> {
    if half == Dtype::F32 {
        return Err(Error::new(
            Code::Unsupported,
            "float32 weights do not run on the GPU",
            "its matrix units multiply 16-bit numbers",
            "run with --dtype bfloat16, or with --device cpu",
        ));
    }
    let known = head_sizes("attention_prefill")?;
    if !known.contains(&head_size) {
        return Err(no_head_size("attention", head_size, &known));
    }
    let known = head_sizes("attention_dense")?;
    match vision_head_size.filter(|s| !known.contains(s)) {
        Some(size) => Err(no_head_size("the vision tower's attention", size, &known)),
        None => Ok(()),
    }
}

/// Shared memory of a block of the largest tile.
const LARGEST_TILE_SHARED: u32 = 147_456;

struct Kernels {
    /// As [`TILES`]; the largest only where blocks may have its shared memory.
    linear: Vec<Option<Kernel<Linear>>>,
    rmsnorm: Kernel<Rmsnorm>,
    rmsnorm_heads: Kernel<RmsnormHeads>,
    rope_append: Kernel<RopeAppend>,
    prefill: Kernel<AttentionPrefill>,
    decode: Kernel<AttentionDecode>,
    merge: Kernel<AttentionMerge>,
    swiglu: Kernel<Swiglu>,
    round: Kernel<Round>,
    argmax: Kernel<Argmax>,
    topk: Kernel<Topk>,
    widen: Kernel<Widen>,
    /// Behind products that are not ours.
    bias_add: Kernel<BiasAdd>,
    vision: Option<VisionKernels>,
}

struct VisionKernels {
    rope: Kernel<RopeDense>,
    attention: Kernel<AttentionDense>,
    gelu: Kernel<Gelu>,
}

/// A GPU with its kernels loaded.
pub struct CudaDevice {
    // Fields go in this order: kernels before their modules, everything before the context.
    kernels: Kernels,
    cublaslt: Option<CublasLt>,
    staging: RefCell<Staging>,
    compute: Arc<Stream>,
    modules: Modules,
    context: Arc<Context>,
    half: Dtype,
    head_size: usize,
    limit: u64,
    /// What this process had of the card before anything of the model.
    base: u64,
}

impl CudaDevice {
    pub fn new(options: &CudaOptions) -> Result<CudaDevice> {
        check_model(options.half, options.head_size, options.vision_head_size)?;
        let context = Context::new(options.ordinal)?;
        let mut modules = Modules::new(&context, options.half)?;
        let kernels = Kernels::load(&mut modules, &context, options)?;
        let before = context.used();
        let cublaslt = match options.gemm {
            Gemm::Own => None,
            Gemm::CublasLt => Some(CublasLt::new(&context, options.half)?),
        };
        // What modules and cublasLt's handle took; its workspace is counted already.
        let counted = context.used() - before;
        let (free, _) = context.memory()?;
        let taken = context.free_bytes.saturating_sub(free);
        context.charge(taken.saturating_sub(counted));
        let base = context.used() + SLACK_BYTES;
        // The slack is still free.
        let usual = (context.used() + free) / 10 * 9;
        let limit = options.memory.unwrap_or(usual);
        let reach = context.used() + free;
        if limit > reach {
            return Err(too_much(&context, limit, reach, free));
        }
        context.charge(SLACK_BYTES);
        context.set_limit(limit);
        Ok(CudaDevice {
            staging: RefCell::new(Staging::new(&context)?),
            compute: Arc::new(Stream::new(&context, 0)?),
            kernels,
            cublaslt,
            modules,
            half: options.half,
            head_size: options.head_size,
            context,
            limit,
            base,
        })
    }

    /// `NVIDIA H100 80GB HBM3 (compute capability 9.0, driver 12.4)`
    pub fn describe(&self) -> String {
        let c = &self.context;
        format!(
            "{} (compute capability {}.{}, driver CUDA {}.{}{})",
            c.name,
            c.compute / 10,
            c.compute % 10,
            c.driver / 1000,
            c.driver % 1000 / 10,
            match self.modules.machine_code {
                true => "",
                false => ", kernels compiled by the driver",
            }
        )
    }

    /// `cuda:0`
    pub fn label(&self) -> &str {
        &self.context.label
    }

    pub fn half(&self) -> Dtype {
        self.half
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Bound on the device memory of this process.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// What of it is not taken.
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.context.used())
    }

    /// The bound that this process would be given now where nobody says one.
    pub fn free_limit(&self) -> Result<u64> {
        let (free, _) = self.context.memory()?;
        // The slack is counted and still free.
        Ok((self.context.used().saturating_sub(SLACK_BYTES) + free) / 10 * 9)
    }

    /// What context, kernels and slack take of it.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The best rate of copies from pinned memory, 10⁹ bytes a second: what nothing that streams through this GPU can beat. Takes a few
    /// milliseconds and, for so long, 16 MiB on either side, or what is left. `None` where nothing is left to measure with.
    pub fn measure_copies(&self) -> Result<Option<f64>> {
        let bytes = (self.left() / 2).min(PROBE_BYTES) >> 20 << 20;
        if bytes == 0 {
            return Ok(None);
        }
        let what = "a copy to be measured";
        let from = HostBuffer::new(&self.context, bytes as usize, what)?;
        let to = DeviceBuffer::new(&self.context, bytes, what)?;
        let (start, end) = (Event::timing(&self.context)?, Event::timing(&self.context)?);
        let mut best = f64::INFINITY;
        for probe in 0..PROBES {
            self.compute.mark(&start)?;
            // SAFETY: both buffers are this function's; nothing writes them, and both wait for the GPU before they go.
            unsafe {
                self.compute
                    .copy_in(to.address(), from.piece(0, bytes as usize))
            }?;
            self.compute.mark(&end)?;
            self.compute.synchronize()?;
            if probe > 0 {
                best = best.min(end.since(&start)?.as_secs_f64());
            }
        }
        Ok((best > 0.0).then(|| bytes as f64 / best / 1e9))
    }

    /// The host waits until the GPU has run everything it was given. What went wrong there is said here.
    pub fn synchronize(&self) -> Result<()> {
        self.compute.synchronize()
    }
}

impl Kernels {
    fn load(modules: &mut Modules, context: &Context, options: &CudaOptions) -> Result<Kernels> {
        let head = options.head_size;
        let mut linear = Vec::with_capacity(TILES.len());
        for (i, (name, ..)) in TILES.into_iter().enumerate() {
            let fits = i != T256 || context.shared_bytes >= LARGEST_TILE_SHARED;
            linear.push(fits.then(|| modules.load(name)).transpose()?);
        }
        let vision = match options.vision_head_size {
            None => None,
            Some(size) => Some(VisionKernels {
                rope: modules.load("rope_dense")?,
                attention: modules.load(&format!("attention_dense_h{size}"))?,
                gelu: modules.load("gelu")?,
            }),
        };
        Ok(Kernels {
            linear,
            rmsnorm: modules.load("rmsnorm")?,
            rmsnorm_heads: modules.load("rmsnorm_heads")?,
            rope_append: modules.load("rope_append")?,
            prefill: modules.load(&format!("attention_prefill_h{head}"))?,
            decode: modules.load(&format!("attention_decode_h{head}"))?,
            merge: modules.load("attention_merge")?,
            swiglu: modules.load("swiglu")?,
            round: modules.load("round")?,
            argmax: modules.load("argmax")?,
            topk: modules.load("topk")?,
            widen: modules.load("widen")?,
            bias_add: modules.load("bias_add")?,
            vision,
        })
    }
}

/// `reach`: what this process has and what is free.
fn too_much(context: &Context, limit: u64, reach: u64, free: u64) -> Error {
    let total = context.total_bytes;
    Error::new(
        Code::Memory,
        format!("the GPU does not have {} for this run", human_bytes(limit)),
        format!(
            "of the {}'s {}, {} are free beside {} for context and kernels; the rest is other programs'",
            context.name,
            human_bytes(total),
            human_bytes(free),
            human_bytes(reach - free),
        ),
        format!(
            "give --gpu-memory {} or less, leave it out, or end who holds the rest (nvidia-smi lists them)",
            flag_size((reach >> 20) << 20)
        ),
    )
}
