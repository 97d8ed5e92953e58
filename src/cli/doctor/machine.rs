//! Processor, memory, GPU and the programs beside.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Check;
use crate::device::cpu::CpuDevice;
use crate::device::cuda;
use crate::engine::{HostMemory, cgroup_limit};
use crate::media::VideoTools;
use crate::units::human_bytes;

/// Below this not even a small model has room.
const LEAST_MEMORY_BYTES: u64 = 1 << 30;

pub(super) fn check(say: &mut dyn FnMut(Check)) {
    say(processor());
    say(memory());
    let gpu = Gpu::look(Path::new("/"));
    say(pinned(&gpu));
    say(card(&gpu));
    say(ffmpeg());
}

fn processor() -> Check {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let isa = CpuDevice::isas().first().copied().unwrap_or("portable");
    let found = format!("{isa}, {threads} threads");
    let check = match isa {
        "portable" => Check::warn(
            "processor",
            format!("{found}: neither AVX2 nor AVX-512, so products are many times slower"),
            "use an x86-64 processor from 2013 on (in a virtual machine: pass the host's through, -cpu host)",
        ),
        _ => Check::pass("processor", found),
    };
    check.with("isa", isa).with("threads", threads)
}

fn memory() -> Check {
    let host = HostMemory::read();
    let limit = cgroup_limit();
    let group = match limit {
        Some(limit) => format!(", cgroup limit {}", human_bytes(limit)),
        None => String::new(),
    };
    let found = format!(
        "{} available{group}; a run takes up to {} unless --cpu-memory says otherwise",
        human_bytes(host.available),
        human_bytes(host.default_budget())
    );
    let check = if host.available >= LEAST_MEMORY_BYTES {
        Check::pass("memory", found)
    } else if limit.is_some_and(|l| l < 2 * LEAST_MEMORY_BYTES) {
        Check::fail(
            "memory",
            found,
            "raise the container's limit (docker run --memory 4g)",
        )
    } else {
        Check::fail("memory", found, "end other programs, or add memory")
    };
    check
        .with("available_bytes", host.available)
        .with("cgroup_limit_bytes", limit)
        .with("default_budget_bytes", host.default_budget())
}

/// The GPU as its driver describes it; where there is no driver to ask, what the machine shows of one.
fn card(gpu: &Gpu) -> Check {
    let asked = cuda::available().and_then(|_| cuda::Context::new(0));
    match asked {
        Ok(c) => Check::pass(
            "gpu",
            format!(
                "{}, compute capability {}.{}, CUDA {}.{}, {} of {} free",
                c.name,
                c.compute / 10,
                c.compute % 10,
                c.driver / 1000,
                c.driver % 1000 / 10,
                human_bytes(c.free_bytes),
                human_bytes(c.total_bytes)
            ),
        )
        .with("name", c.name.clone())
        .with("cuda_driver", c.driver)
        .with("free_bytes", c.free_bytes)
        .with("total_bytes", c.total_bytes),
        Err(e) if gpu.library.is_some() => {
            Check::warn("gpu", format!("{}: {}", e.what(), e.cause()), e.fix())
        }
        Err(_) => gpu.check(),
    }
}

/// What of an NVIDIA GPU can be seen without its driver's library being loaded.
struct Gpu {
    /// On the PCI bus.
    cards: usize,
    /// Device nodes: present where the kernel module is loaded and passed through.
    nodes: bool,
    /// Version of the kernel module.
    driver: Option<String>,
    library: Option<PathBuf>,
    wsl: bool,
}

impl Gpu {
    fn look(root: &Path) -> Gpu {
        let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let version = text("proc/driver/nvidia/version");
        Gpu {
            cards: cards(&root.join("sys/bus/pci/devices")),
            nodes: root.join("dev/nvidia0").exists() || root.join("dev/dxg").exists(),
            driver: version
                .lines()
                .next()
                .and_then(|l| {
                    l.split_whitespace()
                        .find(|w| w.starts_with(|c: char| c.is_ascii_digit()))
                })
                .map(str::to_string),
            library: library(root),
            wsl: text("proc/version").to_lowercase().contains("microsoft"),
        }
    }

    fn check(&self) -> Check {
        let check = match (&self.library, self.nodes || self.driver.is_some()) {
            (Some(library), true) => Check::pass(
                "gpu",
                format!(
                    "driver {}, {}",
                    self.driver.as_deref().unwrap_or("present"),
                    library.display()
                ),
            ),
            (None, true) => Check::warn(
                "gpu",
                "the kernel has an NVIDIA driver, but libcuda.so.1 is not here",
                "in a container: start it with --gpus all (nvidia-container-toolkit); else install the driver's libraries",
            ),
            (_, false) if self.cards > 0 => Check::warn(
                "gpu",
                format!("{} NVIDIA on the PCI bus, without a driver", self.cards),
                "install the NVIDIA driver, 535 or later",
            ),
            _ => Check::pass("gpu", "no NVIDIA GPU: everything runs on the CPU"),
        };
        check.with("driver", self.driver.clone()).with(
            "libcuda",
            self.library.as_ref().map(|p| p.display().to_string()),
        )
    }
}

/// Display and compute devices of NVIDIA.
fn cards(bus: &Path) -> usize {
    let Ok(devices) = fs::read_dir(bus) else {
        return 0;
    };
    let is = |dir: &Path, file: &str, start: &str| {
        fs::read_to_string(dir.join(file)).is_ok_and(|t| t.starts_with(start))
    };
    devices
        .flatten()
        .map(|d| d.path())
        .filter(|d| is(d, "vendor", "0x10de") && is(d, "class", "0x03"))
        .count()
}

/// Where the loader would find the driver's library.
fn library(root: &Path) -> Option<PathBuf> {
    let named = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let usual = [
        "usr/lib/x86_64-linux-gnu",
        "usr/lib64",
        "usr/lib",
        "usr/lib/wsl/lib",
        "run/opengl-driver/lib",
        "usr/local/cuda/compat",
    ];
    std::env::split_paths(&named)
        .chain(usual.iter().map(|dir| root.join(dir)))
        .map(|dir| dir.join("libcuda.so.1"))
        .find(|path| path.exists())
}

/// Memory that the GPU copies from must be pinned, which has limits of its own.
fn pinned(gpu: &Gpu) -> Check {
    const NAME: &str = "pinned memory";
    if gpu.library.is_none() {
        return Check::pass(NAME, "not needed without a GPU");
    }
    if gpu.wsl {
        return Check::warn(
            NAME,
            "WSL pins about 1 GB at most",
            "keep --page-size and --queue-depth at auto (256 MiB are pinned), or run Linux itself",
        );
    }
    match cgroup_limit() {
        Some(limit) => Check::pass(
            NAME,
            format!(
                "within the cgroup's {}; past it is a kill, not an error",
                human_bytes(limit)
            ),
        )
        .with("limit_bytes", limit),
        None => Check::pass(NAME, "no limit but the machine's memory"),
    }
}

fn ffmpeg() -> Check {
    let tools = VideoTools::default();
    let version = |program: &Path| -> Option<String> {
        let out = Command::new(program)
            .arg("-version")
            .stdin(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let first = text.lines().next()?.to_string();
        out.status.success().then_some(first)
    };
    match (version(&tools.ffmpeg), version(&tools.ffprobe)) {
        (Some(line), Some(_)) => {
            let short: Vec<&str> = line.split_whitespace().take(3).collect();
            Check::pass("ffmpeg", short.join(" "))
        }
        (ffmpeg, _) => Check::warn(
            "ffmpeg",
            format!(
                "{} is not here: videos cannot be read (images can)",
                if ffmpeg.is_none() {
                    "ffmpeg"
                } else {
                    "ffprobe"
                }
            ),
            "install ffmpeg (sudo apt install ffmpeg, dnf install ffmpeg-free)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Status;

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn each_state_of_a_gpu_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        // What LD_LIBRARY_PATH of the machine names is not this root's.
        let look = || Gpu {
            library: Gpu::look(root).library.filter(|p| p.starts_with(root)),
            ..Gpu::look(root)
        };
        let none = look().check();
        assert!(none.status == Status::Pass && none.found.contains("no NVIDIA"));
        write(root, "sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n");
        write(root, "sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n");
        write(root, "sys/bus/pci/devices/0000:01:00.1/vendor", "0x10de\n");
        write(root, "sys/bus/pci/devices/0000:01:00.1/class", "0x040300\n");
        let bare = look().check();
        assert!(
            bare.status == Status::Warn && bare.found.starts_with("1 NVIDIA"),
            "{bare:?}"
        );
        write(
            root,
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May\nGCC\n",
        );
        let unlinked = look().check();
        assert!(unlinked.status == Status::Warn && unlinked.fix.contains("--gpus all"));
        write(root, "usr/lib64/libcuda.so.1", "");
        let whole = look();
        assert_eq!(whole.driver.as_deref(), Some("535.183.01"));
        assert!(whole.check().status == Status::Pass);
        assert!(pinned(&whole).status == Status::Pass);
        write(root, "proc/version", "Linux 5.15-microsoft-standard-WSL2");
        assert!(pinned(&look()).status == Status::Warn);
    }
}
