//! What is measured on a busy machine. A file of its own: the other tests have the machine to themselves, and this one has it without them.

#[path = "common/program.rs"]
mod program;

use std::path::Path;
use std::process::{Child, Command};

use program::program_within;
use serde_json::Value;

/// Programs that leave no core alone, until they are dropped.
struct Crowd(Vec<Child>);

impl Crowd {
    fn new() -> Crowd {
        let cores = std::thread::available_parallelism().unwrap().get();
        let endless = |_| {
            let mut shell = Command::new("sh");
            shell.args(["-c", "while :; do :; done"]).spawn().unwrap()
        };
        Crowd((0..3 * cores).map(endless).collect())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn what_a_busy_machine_multiplied_at_is_told_and_not_kept() {
    let counts = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let ran = counts.split_whitespace().next();
    if ran.is_none_or(|ran| ran == "0") {
        return println!("skipped: this kernel does not count who waits for a core");
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen2-bf16");
    let plan = |more: &[&str]| {
        let mut plan = program_within(&cache);
        plan.arg("plan").arg(&model).current_dir(dir.path());
        plan.args(["--in-place", "--disk-gb-per-s", "2", "--device", "cpu"]);
        let out = plan.args(more).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{said}");
        String::from_utf8(out.stdout).unwrap()
    };
    let json = || -> Value { serde_json::from_str(&plan(&["--json"])).unwrap() };
    let kept = || {
        let records = std::fs::read_dir(cache.join("tensorpager"));
        let names = records.into_iter().flatten().flatten();
        let names = names.map(|e| e.file_name().into_string().unwrap());
        names.filter(|n| n.starts_with("compute-")).count()
    };
    let crowd = Crowd::new();
    let busy = json();
    assert!(busy["busy"].as_f64().unwrap() > 0.1, "{busy}");
    assert_eq!(kept(), 0);
    let told = plan(&[]);
    let words = "this machine is busy: products waited for a core ";
    assert!(told.contains(words), "{told}");
    drop(crowd);
    // Others may be at work here: either it is quiet now and kept, or it is told again.
    for _ in 0..2 {
        let now = json();
        assert_eq!(now["busy"].is_null(), kept() == 1, "{now}");
    }
}
