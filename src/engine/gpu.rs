//! A GPU under an engine: opened for a model, and its memory divided, or refused with what would do.

use super::memory::HostMemory;
use super::open::{DEFAULT_PAGE_BYTES, DeviceChoice, EngineOptions, fit_on, kv_dtype};
use crate::device::{CudaOptions, Device};
use crate::error::{Code, Error, Result};
use crate::paging::{Plan, SlotLayout, UnitSize};
use crate::spec::ModelSpec;
use crate::store::{Outline, UnitLayout};
use crate::units::{Dtype, flag_size, human_bytes};

/// A GPU's memory, as an engine may use it.
#[derive(Clone, Copy, Debug)]
pub struct GpuRoom {
    /// Bound on all that this process takes.
    pub limit: u64,
    /// What context, kernels and slack take of it.
    pub base: u64,
}

impl GpuRoom {
    /// What there is of a GPU that computes.
    pub fn of(device: &Device) -> Option<GpuRoom> {
        device.as_cuda().map(|d| GpuRoom {
            limit: d.limit(),
            base: d.base(),
        })
    }
}

/// Refuses what no GPU run of this model could be, before a weight is written: a GPU that cannot be used, weights or heads that its kernels
/// cannot take, a budget that is too small even for `least`. The budget named is that of `usual`. Nothing is checked on a CPU.
///
/// # Errors
/// Those of [`super::Engine::open`].
pub fn refuse_for_gpu(
    outline: &Outline,
    least: &EngineOptions,
    usual: &EngineOptions,
) -> Result<()> {
    let device = open_device(&outline.spec, &outline.units, least)?;
    let Some(gpu) = GpuRoom::of(&device) else {
        return Ok(());
    };
    let page_bytes = least.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
    let layout = |u| UnitSize::on_gpu(&SlotLayout::new(u, &outline.file_bytes, page_bytes));
    let sizes: Vec<UnitSize> = outline.units.iter().map(layout).collect();
    let dtype = kv_dtype(&outline.units);
    let fits = |options: &EngineOptions| {
        let options = EngineOptions {
            // Host memory is another budget, which the tokenizer has a share of.
            cpu_memory: Some(1 << 46),
            ..options.clone()
        };
        fit_on(
            &outline.spec,
            dtype,
            &sizes,
            &options,
            &HostMemory::read(),
            Some(gpu),
        )
        .map(|_| ())
    };
    fits(least).map_err(|e| fits(usual).err().unwrap_or(e))
}

/// The largest pass under which the smallest plan fits on the GPU; it may take at most an eighth of the GPU from the weights.
pub(super) fn gpu_pass(
    options: &EngineOptions,
    limit: u64,
    wanted: usize,
    charges: &dyn Fn(usize) -> u64,
    plan: &dyn Fn(u64) -> Result<Plan>,
) -> Result<usize> {
    let least = wanted.max(16).min(options.pass_tokens.max(1)).max(wanted);
    let mut tokens = options.pass_tokens.max(least);
    loop {
        let taken = charges(tokens);
        let modest = taken.saturating_sub(charges(least)) <= limit / 8;
        let fitted = limit.checked_sub(taken).map(plan);
        match fitted {
            Some(Ok(_)) if modest => return Ok(tokens),
            Some(Err(e)) if e.code() != Code::Memory => return Err(e),
            _ if tokens == least => break,
            _ => tokens = (tokens / 2).max(least),
        }
    }
    let (mut low, mut high) = (0u64, 1u64 << 46);
    while high - low > 1 << 20 {
        let middle = low + (high - low) / 2;
        match plan(middle) {
            Ok(_) => high = middle,
            Err(_) => low = middle,
        }
    }
    let smallest = high + charges(least);
    Err(Error::new(
        Code::Memory,
        format!(
            "the model does not fit in {} of GPU memory",
            human_bytes(limit)
        ),
        format!(
            "the smallest plan takes {}: slots and residents {}, KV, activations, kernels and the driver's context {}",
            human_bytes(smallest),
            human_bytes(high),
            human_bytes(charges(least))
        ),
        format!(
            "give --gpu-memory {} or more, a smaller --context, or run with --device cpu",
            flag_size(smallest)
        ),
    ))
}

/// The device the options ask for, fit for this model.
///
/// # Errors
/// A GPU that is not there, cannot be used, or cannot run this model: in plain words.
pub fn open_device(
    spec: &ModelSpec,
    units: &[UnitLayout],
    options: &EngineOptions,
) -> Result<Device> {
    let DeviceChoice::Cuda(ordinal) = options.device else {
        return Device::cpu(options.threads, options.isa.as_deref());
    };
    let vision = spec.vision.as_ref().filter(|_| options.vision.is_some());
    Device::cuda(&CudaOptions {
        ordinal,
        half: gpu_dtype(units)?,
        head_size: spec.head_size,
        vision_head_size: vision.map(|v| v.hidden / v.heads),
        memory: options.gpu_memory,
        gemm: options.gemm,
    })
}

/// The 16-bit type that all tensors share, as a GPU's kernels take them.
pub fn gpu_dtype(units: &[UnitLayout]) -> Result<Dtype> {
    let mut types: Vec<Dtype> = Vec::new();
    for place in units.iter().flat_map(|u| &u.places) {
        if !types.contains(&place.dtype) {
            types.push(place.dtype);
        }
    }
    match types[..] {
        [half] if half != Dtype::F32 => Ok(half),
        _ => {
            let names: Vec<&str> = types.iter().map(|t| t.name()).collect();
            Err(Error::new(
                Code::Unsupported,
                format!("{} weights do not run on the GPU", names.join(" and ")),
                "its kernels take weights of one 16-bit type",
                "run with --dtype bfloat16, or with --device cpu",
            ))
        }
    }
}
