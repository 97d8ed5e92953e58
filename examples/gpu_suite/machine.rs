//! What this machine is: the GPU, its driver, the CPU, and how files are read here.

use std::time::Instant;

use tensorpager::device::Device;
use tensorpager::device::cuda::Context;
use tensorpager::units::Dtype;

use super::{Outcome, Suite, copies, ops};

fn first_line(path: &str, key: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(key)).unwrap_or("");
    let value = line.split_once(':').map_or(line, |(_, v)| v);
    value.trim().to_string()
}

/// The release of the driver as its kernel module tells it: `550.54.15`.
fn release(version: &str) -> Option<&str> {
    let numbers =
        |w: &&str| w.split('.').count() >= 2 && w.split('.').all(|n| n.parse::<u32>().is_ok());
    let line = version.lines().find(|l| l.contains("NVRM"))?;
    line.split_whitespace().find(numbers)
}

/// Whether CUDA's runtime library is here. Nothing of ours loads it; peers do.
fn runtime() -> String {
    let path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let usual = [
        "/usr/local/cuda/lib64",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
    ];
    let mut folders = std::env::split_paths(&path).chain(usual.map(Into::into));
    let found = folders.find_map(|folder| {
        let names = std::fs::read_dir(&folder).ok()?.flatten();
        let mut names = names.map(|e| e.file_name().to_string_lossy().into_owned());
        let name = names.find(|n| n.starts_with("libcudart.so"))?;
        Some(folder.join(name).display().to_string())
    });
    let found = found.unwrap_or("no libcudart in the usual folders".into());
    format!("none needed; {found}")
}

/// A container or sandbox, as far as it can be told: what io_uring and pinning may be missing for.
fn sandbox() -> &'static str {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let container = ["/.dockerenv", "/run/.containerenv"];
    if read("/proc/version").contains("gVisor")
        || read("/proc/sys/kernel/ostype").contains("gVisor")
    {
        return "gVisor";
    }
    match container.iter().any(|p| std::path::Path::new(p).exists()) {
        true => "a container",
        false => "no container that says so",
    }
}

pub const FROM_PTX: &str = "compiled by the driver from PTX";

/// Which image of the kernels the driver took.
pub fn image(device: &Device) -> &'static str {
    match device.describe().contains("compiled by the driver") {
        true => FROM_PTX,
        false => "machine code of the bundle",
    }
}

/// Which image of the kernels the driver took, how long that takes at first and again, and whether memory can be pinned.
fn opened() -> Outcome<[(&'static str, String); 3]> {
    let open = || -> Outcome<_> {
        let started = Instant::now();
        let bed = ops::open(Dtype::BF16, 128, None)?;
        Ok((bed, started.elapsed().as_secs_f64()))
    };
    let (bed, first) = open()?;
    drop(bed);
    let (bed, again) = open()?;
    Ok([
        ("kernels", image(&bed.device).into()),
        (
            "opened in",
            format!("{first:.2} s at first, {again:.2} s again"),
        ),
        ("host memory", copies::pinning(&bed.device)),
    ])
}

pub fn section(suite: &mut Suite) -> Outcome<()> {
    let context = Context::new(0)?;
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = first_line("/proc/cpuinfo", "model name");
    let memory = first_line("/proc/meminfo", "MemTotal");
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let module = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let gib = |b: u64| format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64);
    suite.report.title(&context.name);
    suite.report.table("Machine", &["what", "found"]);
    let rows = [
        ("GPU", context.name.clone()),
        (
            "compute capability",
            format!("{}.{}", context.compute / 10, context.compute % 10),
        ),
        ("multiprocessors", context.multiprocessors.to_string()),
        (
            "shared memory of a block",
            format!("{} bytes", context.shared_bytes),
        ),
        (
            "driver",
            format!(
                "{}, CUDA {}.{}",
                release(&module).unwrap_or("its release is not told here"),
                context.driver / 1000,
                context.driver % 1000 / 10
            ),
        ),
        ("CUDA runtime", runtime()),
        ("runs in", sandbox().to_string()),
        (
            "GPU memory",
            format!(
                "{}, {} free",
                gib(context.total_bytes),
                gib(context.free_bytes)
            ),
        ),
        ("CPU", format!("{cpu}, {cores} cores, {memory}")),
        (
            "load when begun",
            load.split(' ').next().unwrap_or("").to_string(),
        ),
        ("Linux", kernel.trim().to_string()),
        ("reader", super::fixtures::reader(suite)),
    ];
    for (what, found) in rows.into_iter().chain(opened()?) {
        suite.report.row(&[what, &found]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::release;

    #[test]
    fn the_drivers_release_is_read_from_its_module() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc version 12.2.0";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@host)\nGCC version: 12.2";
        assert_eq!(release(closed), Some("550.54.15"));
        assert_eq!(release(open), Some("580.65.06"));
        assert_eq!(release("GCC version: 12.2.0"), None);
        assert_eq!(release(""), None);
    }
}
