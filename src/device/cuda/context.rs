//! One GPU: found, bound, described, its memory bounded.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::ffi::{self, Attribute, Done, Failure};
use crate::error::{Code, Error, Result};
use crate::units::{flag_size, human_bytes};

/// The lowest compute capability that the kernels run on.
const LEAST_COMPUTE: u32 = 80;
/// The driver that first reads the embedded PTX (ISA 8.2): CUDA 12.2.
const LEAST_DRIVER: u32 = 12_020;
/// Nobody's context has been seen to take more: what is in use on the card beyond it belongs to other processes.
const MOST_CONTEXT_BYTES: u64 = 1 << 30;

/// Neither a driver nor a GPU: nothing that a user would expect to be used.
pub fn is_absent() -> bool {
    const NO_DEVICE: u32 = 100;
    !ffi::library_is_there()
        || match ffi::init().and_then(|()| ffi::gpu_count()) {
            Ok(count) => count == 0,
            Err(failure) => failure.number() == NO_DEVICE,
        }
}

/// Whether there is a GPU to use, in the words of a reason where there is none.
pub fn available() -> Result<usize> {
    if !ffi::library_is_there() {
        return Err(Error::new(
            Code::Device,
            "the GPU cannot be used: no NVIDIA driver was found",
            "libcuda.so.1 cannot be loaded: it comes with the driver, not with this program or a CUDA toolkit",
            "install the NVIDIA driver (535 or newer), or run with --device cpu",
        ));
    }
    ffi::init().doing("starting the CUDA driver")?;
    match ffi::gpu_count().doing("counting the GPUs")? {
        0 => Err(Error::new(
            Code::Device,
            "no GPU was found",
            "the NVIDIA driver is there and lists no device",
            "check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's --gpus, or run with --device cpu",
        )),
        n => Ok(n),
    }
}

/// A GPU with its primary context, bound on the threads that use it.
pub struct Context {
    gpu: ffi::Gpu,
    handle: ffi::Context,
    /// `cuda:0`
    pub label: String,
    pub name: String,
    /// 90 for compute capability 9.0.
    pub compute: u32,
    pub multiprocessors: u32,
    /// Shared memory that one block may have.
    pub shared_bytes: u32,
    /// 12020 for CUDA 12.2.
    pub driver: u32,
    pub total_bytes: u64,
    /// Free when the context had just been made.
    pub free_bytes: u64,
    /// Bound on what this process takes, the context included.
    limit: AtomicU64,
    used: AtomicU64,
}

/// What can be known of a GPU before it is opened.
struct Found {
    gpu: ffi::Gpu,
    name: String,
    compute: u32,
    driver: u32,
}

fn find(ordinal: usize) -> Result<Found> {
    let count = available()?;
    if ordinal >= count {
        return Err(Error::new(
            Code::Device,
            format!("there is no GPU number {ordinal}"),
            format!("the driver lists {count}, counted from 0"),
            "choose one of those, or run with --device cpu",
        ));
    }
    let doing = "looking at the GPU";
    let gpu = ffi::gpu(ordinal).doing(doing)?;
    let ask = |a| ffi::attribute(gpu, a).doing(doing);
    let found = Found {
        gpu,
        name: ffi::gpu_name(gpu).doing(doing)?,
        compute: ask(Attribute::ComputeMajor)? * 10 + ask(Attribute::ComputeMinor)?,
        driver: ffi::driver_version().doing(doing)?,
    };
    if found.compute < LEAST_COMPUTE {
        return Err(Error::new(
            Code::Device,
            format!("the {} is too old for these kernels", found.name),
            format!(
                "it has compute capability {}.{}; bfloat16 tensor cores begin with 8.0 (Ampere)",
                found.compute / 10,
                found.compute % 10
            ),
            "choose another GPU with --device cuda:N, or run with --device cpu",
        ));
    }
    if found.driver < LEAST_DRIVER {
        return Err(old_driver(format!(
            "the driver knows CUDA {}.{}, the kernels need 12.2",
            found.driver / 1000,
            found.driver % 1000 / 10
        )));
    }
    Ok(found)
}

/// Whether a GPU's age and its driver's are enough for the kernels, without opening it.
pub(super) fn check(ordinal: usize) -> Result<()> {
    find(ordinal).map(|_| ())
}

impl Context {
    pub fn new(ordinal: usize) -> Result<Arc<Context>> {
        let Found {
            gpu,
            name,
            compute,
            driver,
        } = find(ordinal)?;
        let ask = |a| ffi::attribute(gpu, a).doing("looking at the GPU");
        let handle = ffi::context_retain(gpu).doing("making a context on the GPU")?;
        let mut context = Context {
            multiprocessors: ask(Attribute::Multiprocessors)?.max(1),
            shared_bytes: ask(Attribute::SharedBytesPerBlock)?,
            gpu,
            handle,
            label: format!("cuda:{ordinal}"),
            name,
            compute,
            driver,
            total_bytes: 0,
            free_bytes: 0,
            limit: AtomicU64::new(u64::MAX),
            used: AtomicU64::new(0),
        };
        context.bind()?;
        (context.free_bytes, context.total_bytes) = context.memory()?;
        let own = (context.total_bytes - context.free_bytes).min(MOST_CONTEXT_BYTES);
        context.used.store(own, Relaxed);
        Ok(Arc::new(context))
    }

    /// Makes this context the calling thread's.
    pub fn bind(&self) -> Result<()> {
        ffi::context_bind(self.handle).doing("binding the GPU's context")
    }

    /// The host waits until the GPU has done all it was given.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        ffi::context_synchronize().doing("waiting for the GPU")
    }

    /// Free and total bytes, other processes' share included.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        ffi::memory_info().doing("asking for the GPU's free memory")
    }

    /// Bytes of the GPU that this process has, the context's own included.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// From now on nothing is allocated past `bytes` in all.
    pub fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Relaxed);
    }

    /// Counts what the driver took by itself (code of modules).
    pub fn charge(&self, bytes: u64) {
        self.used.fetch_add(bytes, Relaxed);
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Relaxed);
    }

    /// Counts `bytes` about to be allocated for `what`, or refuses.
    pub(super) fn take(&self, bytes: u64, what: &str) -> Result<()> {
        let limit = self.limit.load(Relaxed);
        let taken = self.used.fetch_update(Relaxed, Relaxed, |used| {
            used.checked_add(bytes).filter(|sum| *sum <= limit)
        });
        taken.map(|_| ()).map_err(|used| {
            Error::new(
                Code::Memory,
                format!("{what} does not fit in the GPU memory given"),
                format!(
                    "it takes {}, and {} of {} are in use",
                    human_bytes(bytes),
                    human_bytes(used),
                    human_bytes(limit)
                ),
                format!(
                    "give --gpu-memory {} or more, or a smaller --context",
                    flag_size(used.saturating_add(bytes))
                ),
            )
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // A context that cannot be given back goes with the process.
        let _ = ffi::context_release(self.gpu);
    }
}

/// A driver call's failure: its name, what was being done, and what helps.
pub fn failure(failure: Failure, doing: &str) -> Error {
    let cause = |means: &str| format!("{} ({}): {means}", failure.name(), failure.number());
    let gpu = |means: &str, fix: &str| {
        Error::new(Code::Device, format!("{doing} failed"), cause(means), fix)
    };
    match failure.number() {
        2 => Error::new(
            Code::Memory,
            format!("{doing} failed"),
            cause("the GPU, or the host's pinned memory, is full; other processes may hold it"),
            "free GPU memory (nvidia-smi lists who holds it), or give a smaller --gpu-memory",
        ),
        100 | 101 => gpu(
            "the driver sees no such GPU",
            "check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's --gpus, or run with --device cpu",
        ),
        3 | 34 | 803 | 804 => gpu(
            "the driver's library and its kernel module do not belong together, or only a stub is installed",
            "reboot after a driver update, or install the driver anew; --device cpu works without it",
        ),
        802 => gpu(
            "the system is not ready for CUDA yet: a service that the driver relies on is missing or does not run; where NVSwitch joins the GPUs (HGX, DGX) that is nvidia-fabricmanager",
            "install it in the driver's version and start it on the host (systemctl start nvidia-fabricmanager), or run with --device cpu",
        ),
        209 => gpu(
            "the program has no code for this GPU",
            "update the driver, or choose another GPU; --device cpu works without one",
        ),
        218 => gpu(
            "the driver rejects the kernels' PTX",
            "update the NVIDIA driver; if it is new, please report this with the driver's version",
        ),
        36 => old_driver(format!(
            "{} while {doing}",
            cause("the driver lacks a function")
        )),
        221 => gpu(
            "the driver's compiler is missing, which makes the kernels' code for this GPU (libnvidia-ptxjitcompiler.so.1)",
            "install all of the driver's libraries (in a container, NVIDIA_DRIVER_CAPABILITIES must have `compute`), or run with --device cpu",
        ),
        223 => gpu(
            "the driver was told not to compile kernels for this GPU, and the program has no code for it ready",
            "unset CUDA_DISABLE_PTX_JIT and CUDA_DISABLE_JIT, build with nvcc on the machine, or run with --device cpu",
        ),
        222 => old_driver(format!(
            "{} while {doing}",
            cause("the driver is older than the kernels' PTX (CUDA 12.2)")
        )),
        214 | 220 | 226 | 700 | 702 | 709 | 714 | 715 | 716 | 717 | 718 | 719 => gpu(
            "a kernel or a copy went wrong on the GPU, and nothing it computed since can be trusted",
            "run the command again; if it happens twice, please report it (the kernel log, dmesg, may name an Xid error)",
        ),
        46 | 205 | 999 => gpu(
            "the GPU does not answer",
            "check nvidia-smi and the kernel log (dmesg): the GPU may be held by another process or may have fallen off the bus",
        ),
        _ => gpu(
            "the driver's answer",
            "check nvidia-smi and the kernel log (dmesg), or run with --device cpu",
        ),
    }
}

fn old_driver(cause: String) -> Error {
    Error::new(
        Code::Device,
        "the NVIDIA driver is too old",
        cause,
        "update the driver to 535 or newer, or run with --device cpu",
    )
}

/// Says what was being done where a driver call failed.
pub(super) trait Doing<T> {
    fn doing(self, what: &str) -> Result<T>;
}

impl<T> Doing<T> for Done<T> {
    fn doing(self, what: &str) -> Result<T> {
        self.map_err(|f| failure(f, what))
    }
}
