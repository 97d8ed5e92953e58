//! The emulated CUDA driver of kernels/emu/driver: built when a test first asks for it, then found by what the test starts.
#![allow(dead_code)] // each test file uses a part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// build.sh's exit code where it cannot build.
const NO_COMPILER: i32 = 77;

fn build(out: &Path, more: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/emu/driver/build.sh");
    Command::new(&script)
        .arg(out)
        .args(more)
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", script.display()))
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .unwrap()
        .join("emulated-driver")
}

/// Runs build.sh; `None`, with the reason on stderr, where there is no compiler. `TENSORPAGER_REQUIRE_EMULATION=1` makes that a failure.
fn built(out: &Path, more: &[&str]) -> Option<Output> {
    let output = build(out, more);
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(NO_COMPILER)
        && std::env::var_os("TENSORPAGER_REQUIRE_EMULATION").is_none()
    {
        eprintln!("skipped: {}", said.trim());
        return None;
    }
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "build.sh {more:?}:\n{out}{said}");
    Some(output)
}

/// The folder with `libcuda.so.1`, for `LD_LIBRARY_PATH`; `None`: skip the test.
pub fn driver() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER
        .get_or_init(|| built(&target(), &[]).map(|_| target()))
        .as_deref()
}

/// A driver that lacks one function, as an old one would.
pub fn driver_without(symbol: &str) -> Option<PathBuf> {
    built(&target(), &["--without", symbol]).map(|_| target().join(format!("without-{symbol}")))
}

/// What the self-test prints.
pub fn selftest() -> Option<String> {
    built(&target(), &["--selftest"]).map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
}

/// The same of [`driver_under_asan`], which notices more.
pub fn selftest_under_asan() -> Option<String> {
    built(&under_asan(), &["--asan", "--selftest"])
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
}

fn under_asan() -> PathBuf {
    target().join("asan")
}

/// A driver built under AddressSanitizer: its folder, and what must be in the environment of whoever loads it.
pub fn driver_under_asan() -> Option<(PathBuf, [(&'static str, String); 2])> {
    let folder = under_asan();
    built(&folder, &["--asan"])?;
    let runtime = std::fs::read_to_string(folder.join("preload")).unwrap();
    let environment = [
        ("LD_PRELOAD", runtime.trim().to_owned()),
        // Rust's and the loader's own are nobody's concern here.
        ("ASAN_OPTIONS", "detect_leaks=0".to_owned()),
    ];
    Some((folder, environment))
}

/// `command` with this driver in place of any other, and `settings` (`EMUCUDA_…`, see kernels/emu/driver/README.md).
pub fn on(command: &mut Command, driver: &Path, settings: &[(&str, &str)]) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("EMUCUDA_") {
            command.env_remove(name);
        }
    }
    command
        .env("LD_LIBRARY_PATH", driver)
        .envs(settings.iter().copied());
}

/// Runs the ignored test `name` on the emulated driver.
#[track_caller]
pub fn inside(name: &str, settings: &[(&str, &str)]) {
    let Some(driver) = driver() else {
        return;
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored"]);
    on(&mut command, driver, settings);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("1 passed"),
        "there is no such test: {name}\n{text}"
    );
}
