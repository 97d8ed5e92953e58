//! What `--device`, `--gpu-memory` and `--gemm` ask for, and what of it cannot be.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::model::{OpenFor, engine_options, pack_options, reading};
use super::options::{GemmArg, MachineOptions, SourceOptions};
use crate::checkpoint::Checkpoint;
use crate::device::cuda;
use crate::engine::{DeviceChoice, gpu_dtype, refuse_for_gpu};
use crate::error::{Code, Error, Result};
use crate::spec::{ModelSpec, UnitKind};
use crate::store::{UnitLayout, outline};

/// Where weights would have to be packed first: refuses what the GPU could not run then.
pub(super) fn refuse_before_packing(
    machine: &MachineOptions,
    ckpt: &Checkpoint,
    source: &SourceOptions,
    cancel: &Arc<AtomicBool>,
) -> Result<()> {
    if machine.device == "cpu" || (machine.device == "auto" && cuda::available().is_err()) {
        return Ok(());
    }
    let dtype = pack_options(source, cancel)?.dtype;
    let outline = outline(ckpt, &dtype, &source.offload_folder, source.in_place)?;
    if outline.ready {
        return Ok(());
    }
    let device = device_choice(&machine.device, &outline.spec, &outline.units, true)?;
    if device == DeviceChoice::Cpu {
        return Ok(());
    }
    let machine = &MachineOptions {
        // What only a run takes or tells.
        trace: None,
        report: None,
        gemm: GemmArg::Own,
        ..machine.clone()
    };
    let reading = reading(machine, &outline.dir, false);
    let kinds: Vec<UnitKind> = outline.units.iter().map(|u| u.kind).collect();
    let options = |want| engine_options(machine, &want, &reading, &kinds, device);
    // What is asked for is known once the text is tokenized: no less than this, and not much more as a rule.
    let least = OpenFor {
        context: machine.context.unwrap_or(2),
        prompt_tokens: 1,
        ..OpenFor::default()
    };
    let usual = OpenFor {
        context: machine.context.unwrap_or(OpenFor::default().context),
        ..OpenFor::default()
    };
    refuse_for_gpu(&outline, &options(least)?, &options(usual)?)
}

/// Whose products; says what the other one does not promise.
pub(super) fn gemm(arg: GemmArg, device: DeviceChoice) -> Result<cuda::Gemm> {
    match (arg, device) {
        (GemmArg::Own, _) => Ok(cuda::Gemm::Own),
        (GemmArg::CublasLt, DeviceChoice::Cuda(_)) => {
            eprintln!(
                "--gemm cublaslt: a token's result depends on what else is in the pass; only --gemm own promises the same bits"
            );
            Ok(cuda::Gemm::CublasLt)
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

/// `auto` is the GPU where there is one and it can run this model, and says why where it cannot.
pub(super) fn device_choice(
    device: &str,
    spec: &ModelSpec,
    units: &[UnitLayout],
    quiet: bool,
) -> Result<DeviceChoice> {
    check_device(device)?;
    match device {
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        "auto" => Ok(match can_run(spec, units) {
            Ok(()) => DeviceChoice::Cuda(0),
            Err(e) => {
                if !quiet && e.code() != Code::Device {
                    eprintln!("on the CPU: {}: {}", e.what(), e.cause());
                }
                DeviceChoice::Cpu
            }
        }),
        d => {
            let number = d.strip_prefix("cuda:").and_then(|n| n.parse().ok());
            Ok(DeviceChoice::Cuda(number.unwrap_or(0)))
        }
    }
}
