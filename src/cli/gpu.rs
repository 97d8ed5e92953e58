//! What `--device`, `--gpu-memory` and `--gemm` ask for, and what of it cannot be.

use super::options::{GemmArg, MachineOptions};
use crate::device::cuda;
use crate::engine::{DeviceChoice, EngineOptions, GpuRoom, gpu_dtype, open_device};
use crate::error::{Code, Error, Result};
use crate::spec::ModelSpec;
use crate::store::{Store, UnitLayout};

/// Whose products are asked for.
pub(super) fn products(arg: GemmArg) -> cuda::Gemm {
    match arg {
        GemmArg::Own => cuda::Gemm::Own,
        GemmArg::CublasLt => cuda::Gemm::CublasLt,
    }
}

/// Whose products; says what the other one does not promise.
pub(super) fn gemm(arg: GemmArg, device: DeviceChoice) -> Result<cuda::Gemm> {
    match (arg, device) {
        (GemmArg::Own, _) => Ok(products(arg)),
        (GemmArg::CublasLt, DeviceChoice::Cuda(_)) => {
            eprintln!(
                "--gemm cublaslt: a token's result depends on what else is in the pass; only --gemm own promises the same bits"
            );
            Ok(products(arg))
        }
        (GemmArg::CublasLt, DeviceChoice::Cpu) => Err(Error::new(
            Code::Usage,
            "--gemm cublaslt makes no sense here",
            "the CPU computes",
            "leave it out, or run with --device cuda",
        )),
    }
}

/// `--device`, before anything is looked at.
pub(super) fn check_device(device: &str) -> Result<()> {
    let number = |d: &str| d.parse::<usize>().is_ok();
    match device {
        "auto" | "cpu" | "cuda" => Ok(()),
        d if d.strip_prefix("cuda:").is_some_and(number) => Ok(()),
        d => Err(Error::new(
            Code::Usage,
            format!("`{d}` is not a device"),
            "the devices are auto, cpu, cuda and cuda:N",
            "give --device cpu, or --device cuda for the first GPU",
        )),
    }
}

fn can_run(spec: &ModelSpec, units: &[UnitLayout]) -> Result<()> {
    let vision = spec.vision.as_ref().map(|v| v.hidden / v.heads);
    cuda::available()?;
    cuda::can_run(gpu_dtype(units)?, spec.head_size, vision)
}

/// `auto` is the GPU where there is one and it can run this model, and says why where it cannot. With a budget given for its memory a GPU is
/// meant: one that is there and cannot be used is then an error, for the CPU would compute for hours.
pub(super) fn device_choice(
    machine: &MachineOptions,
    spec: &ModelSpec,
    units: &[UnitLayout],
    quiet: bool,
) -> Result<DeviceChoice> {
    check_device(&machine.device)?;
    match machine.device.as_str() {
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        "auto" => {
            let Err(e) = can_run(spec, units) else {
                return Ok(DeviceChoice::Cuda(0));
            };
            let (budget, absent) = (machine.gpu_budget()?, cuda::is_absent());
            if budget.is_some() && !absent {
                return Err(e);
            }
            // Without a GPU there is nothing to say, unless one was spoken of.
            let spoken_of = budget.is_some()
                || machine.pinned_memory.is_some()
                || machine.ring_size.given().is_some();
            if !quiet && (spoken_of || !absent) {
                eprintln!("on the CPU: {}: {}", e.what(), e.cause());
            }
            Ok(DeviceChoice::Cpu)
        }
        d => {
            let number = d.strip_prefix("cuda:").and_then(|n| n.parse().ok());
            Ok(DeviceChoice::Cuda(number.unwrap_or(0)))
        }
    }
}

/// What there is of the GPU that will compute, beside context and kernels: it is opened for a moment. `None` where the CPU computes.
pub(super) fn gpu_bytes(machine: &MachineOptions, store: &Store) -> Result<Option<u64>> {
    let device = device_choice(machine, &store.spec, &store.units, true)?;
    let options = EngineOptions {
        device,
        gpu_memory: machine.gpu_budget()?,
        gemm: products(machine.gemm),
        ..EngineOptions::default()
    };
    if device == DeviceChoice::Cpu {
        return Ok(None);
    }
    let room = GpuRoom::of(&open_device(&store.spec, &store.units, &options)?);
    Ok(room.map(|room| room.limit.saturating_sub(room.base)))
}
