//! What the machine that is planned for gives a second: said by hand, else on record, else measured now.

use clap::Args;

use super::gpu::device_choice;
use super::options::{GemmArg, MachineOptions};
use crate::device::Device;
use crate::device::cuda;
use crate::engine::{DeviceChoice, EngineOptions, Fitted, GpuRoom, open_device};
use crate::error::{Code, Error, Result};
use crate::model::kv::{BLOCK_TOKENS, block_bytes};
use crate::paging::{
    AskedCompute, ComputeRates, CopyRate, DiskRates, KeptCompute, KnownRates, MachineRates,
    PassWork,
};
use crate::spec::ModelSpec;
use crate::store::Outline;
use crate::units::Dtype;

/// What a driver's context, kernels and slack take of a GPU that is not here.
const GPU_BASE_BYTES: u64 = 700 << 20;
/// What it takes to plan for one.
const BY_HAND: &str = "--gpu-memory, --h2d-gb-per-s, --gpu-gb-per-s and --gpu-gflops";

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Rates")]
pub(super) struct RateArgs {
    /// The disk's direct reading rate, 10^9 bytes a second [default: measured, and kept]
    #[arg(long, value_name = "RATE")]
    disk_gb_per_s: Option<f64>,
    /// Weights a product of one row reads, 10^9 bytes a second [default: measured, and kept]
    #[arg(long, value_name = "RATE")]
    memory_gb_per_s: Option<f64>,
    /// 10^9 floating point operations a second of a product of many rows [default: measured, and kept]
    #[arg(long, value_name = "RATE")]
    cpu_gflops: Option<f64>,
    /// Host memory to the GPU, 10^9 bytes a second [default: measured, and kept]
    #[arg(long, value_name = "RATE")]
    h2d_gb_per_s: Option<f64>,
    /// Weights the GPU reads from its own memory, 10^9 bytes a second [default: measured, and kept]
    #[arg(long, value_name = "RATE")]
    gpu_gb_per_s: Option<f64>,
    /// The GPU's 10^9 floating point operations a second [default: measured, and kept]
    #[arg(long, value_name = "RATE")]
    gpu_gflops: Option<f64>,
}

/// What is to compute.
pub(super) enum Computer {
    Host,
    /// Of this machine, open.
    Gpu(Box<Device>),
    /// Of another machine: its memory and its rates were given.
    GpuElsewhere,
}

/// What a machine gives.
pub(super) struct AskedRates {
    pub rates: MachineRates,
    /// Its products were measured now, waited for a core this part of the time, and were not kept.
    pub lost: Option<f64>,
}

/// For people, of [`AskedRates::lost`].
pub(super) fn busy_told(lost: f64) -> String {
    format!(
        "this machine is busy: products waited for a core {:.0} % of the time in which they were measured; \
         the rates are not kept, and are measured again the next time\n",
        100.0 * lost
    )
}

impl RateArgs {
    pub fn check(&self) -> Result<()> {
        for (flag, value) in [
            ("--disk-gb-per-s", self.disk_gb_per_s),
            ("--memory-gb-per-s", self.memory_gb_per_s),
            ("--cpu-gflops", self.cpu_gflops),
            ("--h2d-gb-per-s", self.h2d_gb_per_s),
            ("--gpu-gb-per-s", self.gpu_gb_per_s),
            ("--gpu-gflops", self.gpu_gflops),
        ] {
            if let Some(v) = value.filter(|v| !(*v > 0.0 && *v < 1e9)) {
                return Err(usage(flag, v, "a rate is above 0"));
            }
        }
        Ok(())
    }

    /// Any of them says what another machine, or this one at another time, gives.
    pub fn by_hand(&self) -> bool {
        let all = [self.disk_gb_per_s]
            .into_iter()
            .chain(self.of_cpu())
            .chain(self.of_gpu());
        all.flatten().next().is_some()
    }

    fn of_gpu(&self) -> [Option<f64>; 3] {
        [self.h2d_gb_per_s, self.gpu_gb_per_s, self.gpu_gflops]
    }

    fn of_cpu(&self) -> [Option<f64>; 2] {
        [self.memory_gb_per_s, self.cpu_gflops]
    }

    /// Rates given by hand, else those on record, else measured now.
    pub fn rates(
        &self,
        computer: &Computer,
        machine: &MachineOptions,
        outline: &Outline,
        dtype: Dtype,
    ) -> Result<AskedRates> {
        let disk_gb_per_s = self.disk(outline, u64::MAX)?.ok_or_else(|| {
            Error::new(
                Code::Unsupported,
                "the disk's rate cannot be measured",
                "its file system does not read past the page cache",
                "give --disk-gb-per-s",
            )
        })?;
        self.with_disk(disk_gb_per_s, computer, machine, outline, dtype, u64::MAX)
    }

    /// What runs of this model read at, else the best the disk is known to give, else that measured now with at most `room` bytes of memory.
    /// `None` where it cannot be measured.
    pub fn disk(&self, outline: &Outline, room: u64) -> Result<Option<f64>> {
        if let Some(rate) = self.disk_gb_per_s {
            return Ok(Some(rate));
        }
        let kept = kept_rates(outline);
        match kept.streamed() {
            Some(rate) => Ok(Some(rate)),
            None => kept.best_or_probe(&outline.files, room),
        }
    }

    /// The disk's rate as far as it is known without measuring.
    pub fn disk_known(&self, outline: &Outline) -> Option<f64> {
        self.disk_gb_per_s.or_else(|| {
            let kept = kept_rates(outline);
            kept.streamed().or(kept.best())
        })
    }

    /// [`RateArgs::rates`] beside a known disk; what is measured takes at most about `room` bytes of memory.
    pub fn with_disk(
        &self,
        disk_gb_per_s: f64,
        computer: &Computer,
        machine: &MachineOptions,
        outline: &Outline,
        dtype: Dtype,
        room: u64,
    ) -> Result<AskedRates> {
        let (h2d_gb_per_s, compute) = match computer {
            Computer::Host => {
                let device = Device::cpu(machine.threads, None)?;
                let given = (self.memory_gb_per_s, self.cpu_gflops);
                (None, compute_rates(given, Some(&device), dtype, room)?)
            }
            Computer::Gpu(device) => {
                let h2d = match self.h2d_gb_per_s {
                    Some(rate) => rate,
                    None => known_copy_rate(&kept_rates(outline), device)?,
                };
                let given = (self.gpu_gb_per_s, self.gpu_gflops);
                (Some(h2d), compute_rates(given, Some(device), dtype, room)?)
            }
            Computer::GpuElsewhere => {
                let given = (self.gpu_gb_per_s, self.gpu_gflops);
                (self.h2d_gb_per_s, compute_rates(given, None, dtype, room)?)
            }
        };
        Ok(AskedRates {
            rates: MachineRates {
                disk_gb_per_s,
                h2d_gb_per_s,
                compute: compute.rates,
            },
            lost: compute.lost,
        })
    }
}

impl Computer {
    /// What `--device` asks for. A GPU whose memory and rates are all given need not be here; who gives a CPU's rates and nothing of a GPU plans
    /// for a CPU.
    ///
    /// # Errors
    /// A GPU is asked for that is not here, and not all of it is given: what to give. A GPU's rates beside `--device cpu`.
    pub fn of(
        rates: &RateArgs,
        machine: &MachineOptions,
        outline: &Outline,
        quiet: bool,
    ) -> Result<Computer> {
        let memory = machine.gpu_budget()?;
        let gpu_rates = rates.of_gpu().iter().flatten().count();
        if machine.device == "cpu" {
            return match gpu_rates {
                0 => Ok(Computer::Host),
                _ => Err(not_of_a_cpu()),
            };
        }
        if memory.is_some() && gpu_rates == rates.of_gpu().len() {
            return Ok(Computer::GpuElsewhere);
        }
        let of_gpu = memory.is_some() || gpu_rates > 0;
        let of_cpu = rates.of_cpu().iter().any(Option::is_some);
        if machine.device == "auto" && of_cpu && !of_gpu {
            return Ok(Computer::Host);
        }
        let device = device_choice(machine, &outline.spec, &outline.units, quiet)?;
        if device == DeviceChoice::Cpu {
            return match cuda::available() {
                Err(e) if of_gpu => Err(not_here(&e)),
                _ => Ok(Computer::Host),
            };
        }
        let options = EngineOptions {
            device,
            gpu_memory: memory,
            ..EngineOptions::default()
        };
        let gpu =
            open_device(&outline.spec, &outline.units, &options).map_err(|e| match e.code() {
                Code::Device => {
                    let fix = format!("{}; or give {BY_HAND} of the one to plan for", e.fix());
                    e.with_fix(fix)
                }
                _ => e,
            })?;
        Ok(Computer::Gpu(Box::new(gpu)))
    }

    /// The memory of the GPU, where one computes.
    pub fn gpu_room(&self, machine: &MachineOptions) -> Result<Option<GpuRoom>> {
        Ok(match self {
            Computer::Host => None,
            Computer::Gpu(device) => GpuRoom::of(device),
            Computer::GpuElsewhere => machine.gpu_budget()?.map(|limit| GpuRoom {
                limit,
                base: GPU_BASE_BYTES,
            }),
        })
    }

    /// What units are placed by under these rates, as a run's engine is told.
    pub fn known(&self, rates: &MachineRates) -> KnownRates {
        let copies = |gb_per_s| CopyRate {
            gpu: match self {
                Computer::Gpu(device) => device.describe(),
                Computer::Host | Computer::GpuElsewhere => self.name(),
            },
            gb_per_s,
        };
        KnownRates {
            disk_gb_per_s: Some(rates.disk_gb_per_s),
            h2d: rates.h2d_gb_per_s.map(copies),
        }
    }

    /// As a run with this computer would be started.
    pub fn machine(&self, asked: &MachineOptions) -> MachineOptions {
        MachineOptions {
            device: match self {
                Computer::Host => "cpu".into(),
                Computer::Gpu(device) => device.name().into(),
                Computer::GpuElsewhere => "cuda".into(),
            },
            gemm: GemmArg::Own,
            ..asked.clone()
        }
    }

    /// As the report names it.
    pub fn name(&self) -> String {
        match self {
            Computer::Host => "cpu".into(),
            Computer::Gpu(device) => device.name().into(),
            Computer::GpuElsewhere => "a GPU as given".into(),
        }
    }
}

pub(super) fn usage(flag: &str, value: f64, why: &str) -> Error {
    Error::new(
        Code::Usage,
        format!("{flag} {value} makes no sense"),
        why,
        format!("give {flag} a value in that range"),
    )
}

/// What a pass of so many rows has to do, `wanted` of which give logits, with `kv_tokens` in the cache of the sequences it carries.
pub(super) fn pass_work(
    spec: &ModelSpec,
    dtype: Dtype,
    fitted: &Fitted,
    rows: usize,
    wanted: usize,
    kv_tokens: u64,
) -> PassWork {
    let kv_block = block_bytes(spec.layers, spec.kv_heads, spec.head_size, dtype.bytes());
    let kv_bytes = kv_block / BLOCK_TOKENS as u64 * kv_tokens;
    // A token that is decoded takes its whole block back with it, and so does each block of a prompt.
    let written = wanted + rows.saturating_sub(wanted).div_ceil(BLOCK_TOKENS);
    let (kv_to_gpu_bytes, kv_from_gpu_bytes) = match fitted.kv_in_host {
        true => (kv_bytes, written as u64 * kv_block),
        false => (0, 0),
    };
    PassWork {
        rows,
        wanted,
        kv_bytes,
        kv_to_gpu_bytes,
        kv_from_gpu_bytes,
        element_bytes: dtype.bytes() as f64,
    }
}

fn not_here(none: &Error) -> Error {
    Error::new(
        Code::Usage,
        "a GPU cannot be planned for without its rates",
        format!(
            "none can be asked here ({}), and not all of it is given",
            none.cause()
        ),
        format!("give {BY_HAND}, or leave them out to plan for the CPU"),
    )
}

fn not_of_a_cpu() -> Error {
    Error::new(
        Code::Usage,
        "a GPU's rates mean nothing to a CPU",
        "--device cpu was given beside them",
        "leave out --device cpu to plan for a GPU, or the rates to plan for a CPU",
    )
}

fn kept_rates(outline: &Outline) -> DiskRates {
    DiskRates::of(&outline.dir, outline.ready && !outline.in_place)
}

/// The best that copies to this GPU are known to reach, else that measured now.
fn known_copy_rate(kept: &DiskRates, device: &Device) -> Result<f64> {
    let name = device.describe();
    if let Some(rate) = kept.h2d_to(&name) {
        return Ok(rate);
    }
    let measured = match device.as_cuda() {
        Some(gpu) => gpu.measure_copies()?,
        None => None,
    };
    let rate = measured.ok_or_else(|| {
        Error::new(
            Code::Memory,
            "copies to the GPU cannot be measured",
            "the driver's context and the kernels leave no memory to copy to",
            "give a larger --gpu-memory, or --h2d-gb-per-s",
        )
    })?;
    kept.raise_h2d(&name, rate);
    Ok(rate)
}

/// `given`: 10⁹ bytes and operations a second. `device`: to be asked for what is not, with `room` bytes of host memory.
fn compute_rates(
    given: (Option<f64>, Option<f64>),
    device: Option<&Device>,
    dtype: Dtype,
    room: u64,
) -> Result<AskedCompute> {
    let by_hand = |memory_gb_per_s, gflops, lost| AskedCompute {
        rates: ComputeRates {
            memory_gb_per_s,
            gflops,
            element_bytes: dtype.bytes() as f64,
            points: Vec::new(),
        },
        lost,
    };
    let measured = |device: &Device| KeptCompute::of(device, dtype).known_or_measured(device, room);
    Ok(match (given, device) {
        ((Some(memory), Some(gflops)), _) => by_hand(memory, gflops, None),
        ((None, None), Some(device)) => measured(device)?,
        ((memory, gflops), Some(device)) => {
            let AskedCompute { rates, lost } = measured(device)?;
            by_hand(
                memory.unwrap_or(rates.memory_gb_per_s),
                gflops.unwrap_or(rates.gflops),
                lost,
            )
        }
        (_, None) => return Err(Error::internal("rates of nothing")),
    })
}
