//! What this machine is: the GPU, its driver, the CPU, and how files are read here.

use tensorpager::device::cuda::Context;

use super::{Outcome, Suite};

fn first_line(path: &str, key: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(key)).unwrap_or("");
    let value = line.split_once(':').map_or(line, |(_, v)| v);
    value.trim().to_string()
}

pub fn section(suite: &mut Suite) -> Outcome<()> {
    let context = Context::new(0)?;
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = first_line("/proc/cpuinfo", "model name");
    let memory = first_line("/proc/meminfo", "MemTotal");
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
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
                "CUDA {}.{}",
                context.driver / 1000,
                context.driver % 1000 / 10
            ),
        ),
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
    for (what, found) in rows {
        suite.report.row(&[what, &found]);
    }
    Ok(())
}
