//! What ends the program in the middle of its work: Ctrl-C, a lost GPU.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::emulated::driver;
use crate::faulty_readers::within;
use crate::run::Run;

/// A run of many tokens, on a GPU that takes its time.
fn long(driver: &Path, map: &str, tokens: &str) -> Run {
    Run::new(driver, "run", "gpu-qwen2-bf16")
        .args(["--raw", "--prompt", "Layer 7", "--ignore-eos"])
        .args(["--max-tokens", tokens, "--device-map", map])
        .env("EMUCUDA_KERNEL_US", "300")
}

/// Waits for the first words.
fn begun(run: &mut Run) -> Child {
    let pipes = run.command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    let mut first = [0u8; 1];
    let out = child.stdout.as_mut().unwrap();
    out.read_exact(&mut first).unwrap();
    child
}

pub fn interrupt(child: &Child) {
    // SAFETY: a signal to a child of this process that has not been waited for, so its id is its own.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) };
}

// hazard: sigint: `run` on a GPU: stops within the pass, 130
#[test]
fn ctrl_c_ends_a_run_with_130() {
    let Some(driver) = driver() else { return };
    for map in ["disk", "cpu", "gpu"] {
        let mut run = long(driver, map, "480");
        let child = begun(&mut run);
        interrupt(&child);
        let done = within(Duration::from_secs(10), "the end", || {
            child.wait_with_output().unwrap()
        });
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(130), "{map}: {said}");
        assert!(
            said.contains("error: interrupted") && !said.contains("panicked"),
            "{map}: {said}"
        );
    }
}

/// An error of the driver that stays for good, after tokens have come: from a kernel, from a copy, from a call.
// hazard: gpu-lost: `run`: one error within the pass; names the driver's code; no panic, no hang
#[test]
fn a_lost_gpu_ends_a_run_cleanly() {
    let Some(driver) = driver() else { return };
    let few = |order: &str| {
        long(driver, "disk", "16")
            .args(["--page-size", "64KiB"])
            .env("EMUCUDA_KERNEL_US", "0")
            .env("EMUCUDA_ORDER", order)
    };
    for order in ["drawn", "lazy"] {
        let calls = Calls::of(few(order));
        for fault in [
            calls.half("kernel", "cuLaunchKernel", 719),
            calls.half("kernel", "cuLaunchKernel", 214),
            // Younger than the bindings' list of codes.
            calls.half("kernel", "cuLaunchKernel", 226),
            calls.half("copy", "cuMemcpyHtoDAsync", 700),
            calls.half("cuStreamWaitEvent", "cuStreamWaitEvent", 999),
            calls.half("cuLaunchKernel", "cuLaunchKernel", 999),
            calls.half("cuEventSynchronize", "cuEventSynchronize", 999),
            calls.half("cuStreamSynchronize", "cuStreamSynchronize", 999),
            calls.half("cuMemcpyHtoDAsync", "cuMemcpyHtoDAsync", 999),
        ] {
            let started = Instant::now();
            let done = few(order).env("EMUCUDA_FAIL", &fault).output();
            let said = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(1), "{fault}, {order}: {said}");
            assert!(!done.stdout.is_empty(), "{fault}: nothing was said before");
            let lines: Vec<&str> = said.lines().collect();
            let at = lines.iter().position(|l| l.starts_with("error: "));
            let at = at.unwrap_or_else(|| panic!("{fault}: {said}"));
            assert!(
                lines[at + 1].starts_with("cause: ") && lines[at + 2].starts_with("fix: "),
                "{fault}: {said}"
            );
            let code = fault.rsplit(':').next().unwrap();
            assert!(
                said.contains("CUDA_ERROR_") && said.contains(&format!("({code})")),
                "{fault}, {order}: {said}"
            );
            assert!(!said.contains("panicked"), "{fault}, {order}: {said}");
            assert!(started.elapsed() < Duration::from_secs(30), "{fault}");
        }
    }
}

/// How often a run calls what of the driver.
pub struct Calls(String);

impl Calls {
    pub fn of(run: Run) -> Calls {
        let trace = run.folder.path().join("calls");
        let done = run.env("EMUCUDA_TRACE", trace.to_str().unwrap());
        let (folder, done) = done.output_and_folder();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{said}");
        let calls = Calls(std::fs::read_to_string(trace).unwrap());
        drop(folder);
        calls
    }

    /// The error `code` for good, from the call half way through the run on. `what` fails where `call` is counted.
    pub fn half(&self, what: &str, call: &str, code: u32) -> String {
        let name = |l: &&str| l.split(|c: char| !c.is_alphanumeric()).next() == Some(call);
        let count = self.0.lines().filter(name).count();
        assert!(count > 3, "{count} of {call}");
        format!("{what}:{}+:{code}", count / 2)
    }
}

/// The bound is of the best copies this machine is known to give: a sleep in every copy is not hidden by a bound that follows it down.
#[test]
fn a_sleep_in_the_copy_lowers_the_share_of_the_bound_and_shows_as_a_stall() {
    let Some(driver) = driver() else { return };
    for map in ["cpu", "disk"] {
        let kept = tempfile::tempdir().unwrap();
        let run = |sleep_us: &str| {
            let mut run = Run::new(driver, "run", "gpu-qwen2-bf16")
                .args(["--raw", "--prompt", "Layer 7", "--ignore-eos", "--in-place"])
                .args(["--max-tokens", "12", "--device-map", map])
                .env("EMUCUDA_COPY_US", sleep_us);
            // Where the rates are kept.
            run.command.env("XDG_CACHE_HOME", kept.path());
            run.json()["paging"].clone()
        };
        let figure = |p: &serde_json::Value, name: &str| p[name].as_f64().unwrap();
        let share = |p: &serde_json::Value| figure(p, "percent_of_bound");
        // The quicker of two: other work on the machine may slow one of them.
        let quick = [run("0"), run("0")]
            .into_iter()
            .max_by(|a, b| share(a).total_cmp(&share(b)))
            .unwrap();
        let slow = run("20000");
        assert!(
            share(&slow) < 0.7 * share(&quick),
            "{map}: {} against {}",
            share(&slow),
            share(&quick)
        );
        assert!(
            figure(&slow, "overlap") < 0.7 * figure(&quick, "overlap"),
            "{map}"
        );
        let peak = "probed_h2d_gb_per_s";
        assert!(
            figure(&slow, peak) >= figure(&quick, peak),
            "the best stays"
        );
        assert!(figure(&slow, "h2d_gb_per_s") < 0.5 * figure(&slow, peak));
        let stalls = |p| figure(p, "stall_copy_s") + figure(p, "stall_disk_s");
        assert!(stalls(&slow) > stalls(&quick), "{map}: {slow} {quick}");
        if map == "cpu" {
            assert!(figure(&slow, "stall_copy_s") > 0.5 * figure(&slow, "stall_s"));
            assert!(figure(&slow, "disk_bytes_per_pass") < 0.5 * figure(&slow, "bytes_per_pass"));
        }
        assert!(share(&quick) > 0.0 && share(&quick) <= 130.0, "{quick}");
    }
}

/// Reads, copies, waits and kernels of every unit that is streamed, in the order they must have.
#[test]
fn a_trace_shows_copies_and_kernels_by_the_gpus_clock() {
    let Some(driver) = driver() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let run = Run::new(driver, "run", "gpu-qwen2-bf16")
        .args(["--raw", "--prompt", "Layer 7", "--ignore-eos"])
        .args(["--max-tokens", "4", "--device-map", "disk"])
        .args(["--trace", path.to_str().unwrap()])
        .env("EMUCUDA_COPY_US", "2000");
    run.json();
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |what: &str| {
        let events = events
            .iter()
            .filter(|e| e["cat"] == what && e["name"] == "layer 1");
        let time = |e: &serde_json::Value, name: &str| e[name].as_f64().unwrap();
        events
            .map(|e| (time(e, "ts"), time(e, "ts") + time(e, "dur")))
            .collect::<Vec<(f64, f64)>>()
    };
    let (reads, copies, computes) = (of("read"), of("copy"), of("compute"));
    assert_eq!(computes.len(), 4, "{events:?}");
    // The last copy may not be known to be done when the trace is written.
    assert!(
        reads.len() >= 4 && copies.len() >= 3,
        "{reads:?} {copies:?}"
    );
    for (i, (copy, (start, end))) in copies.iter().zip(&computes).enumerate() {
        assert!(copy.1 - copy.0 >= 1900.0, "{copy:?}");
        assert!(reads[i].0 < copy.1, "read before it is copied");
        // The host's clock and the GPU's are compared once: a little may be between.
        assert!(copy.1 <= start + 500.0 && start <= end, "{copy:?} {start}");
    }
}
