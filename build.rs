//! Embeds the kernels: the committed PTX always, and where nvcc is found a fatbin with machine code for the architectures it knows.
//!
//! A build needs no CUDA toolkit. A fatbin only saves the driver the compilation at the first load, so an nvcc that fails is a warning and
//! not an error, unless `TENSORPAGER_REQUIRE_NVCC=1`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Machine code is made for those of these that nvcc knows; kernels/check.py reads the list here.
const ARCHITECTURES: [&str; 6] = ["80", "86", "89", "90", "100", "120"];
/// As kernels/README.md says: `-fmad=false` is part of the definition of the ops.
const OPTIONS: [&str; 4] = ["-std=c++17", "-O3", "-fmad=false", "-fatbin"];
const REQUIRE: &str = "TENSORPAGER_REQUIRE_NVCC";

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo::rerun-if-changed=kernels");
    for variable in [REQUIRE, "NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let modules = modules(&root.join("kernels/ptx"));
    let required = env::var(REQUIRE).is_ok_and(|v| v == "1");
    let fatbins = match fatbins(&root, &out, &modules) {
        Ok(made) => made,
        Err(why) if required => panic!("{REQUIRE}=1, and {why}"),
        Err(why) => {
            println!("cargo::warning=no machine code for GPUs is embedded, PTX only: {why}");
            false
        }
    };
    if required && !fatbins {
        panic!("{REQUIRE}=1, and no nvcc was found in $NVCC, PATH, $CUDA_HOME or /usr/local/cuda");
    }
    write_table(&root, &out, &modules, fatbins);
}

/// `linear_bf16` and so on: every module that launch.json can name.
fn modules(ptx: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(ptx)
        .expect("kernels/ptx is there")
        .filter_map(|entry| {
            Some(
                entry
                    .ok()?
                    .file_name()
                    .to_str()?
                    .strip_suffix(".ptx")?
                    .to_string(),
            )
        })
        .collect();
    names.sort();
    names
}

/// Makes a fatbin for each module. False where there is no nvcc.
fn fatbins(root: &Path, out: &Path, modules: &[String]) -> Result<bool, String> {
    let Some(nvcc) = find_nvcc() else {
        return Ok(false);
    };
    let codes = known_codes(&nvcc)?;
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || -> Result<(), String> {
        while let Some(module) = modules.get(next.fetch_add(1, Relaxed)) {
            compile(&nvcc, &codes, root, out, module)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|t| {
                t.join()
                    .map_err(|_| "a compiling thread panicked".to_string())?
            })
            .collect::<Result<Vec<()>, String>>()
    })?;
    Ok(true)
}

fn compile(
    nvcc: &Path,
    codes: &[String],
    root: &Path,
    out: &Path,
    module: &str,
) -> Result<(), String> {
    let (stem, half) = module
        .rsplit_once('_')
        .ok_or_else(|| format!("{module} names no 16-bit type"))?;
    let (source, head_size) = match stem.rsplit_once("_h") {
        Some((source, size)) if size.parse::<u32>().is_ok() => (source, Some(size)),
        _ => (stem, None),
    };
    let mut command = Command::new(nvcc);
    command.args(OPTIONS).args(codes);
    if half == "f16" {
        command.arg("-DTP_F16");
    }
    if let Some(size) = head_size {
        command.arg(format!("-DTP_HEAD_SIZE={size}"));
    }
    command.arg("-o").arg(out.join(format!("{module}.fatbin")));
    command.arg(root.join(format!("kernels/{source}.cu")));
    run(command).map(|_| ())
}

/// `-gencode` options for the architectures that this nvcc knows.
fn known_codes(nvcc: &Path) -> Result<Vec<String>, String> {
    let mut command = Command::new(nvcc);
    command.arg("--list-gpu-code");
    let known = run(command)?;
    let codes: Vec<String> = ARCHITECTURES
        .iter()
        .filter(|a| known.lines().any(|l| l.trim() == format!("sm_{a}")))
        .map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}"))
        .collect();
    match codes.is_empty() {
        true => Err(format!(
            "{} knows none of sm_{}",
            nvcc.display(),
            ARCHITECTURES.join(", sm_")
        )),
        false => Ok(codes),
    }
}

fn run(mut command: Command) -> Result<String, String> {
    let done = command
        .output()
        .map_err(|e| format!("{:?} cannot be started: {e}", command.get_program()))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let last: Vec<&str> = said
        .lines()
        .filter(|l| !l.trim().is_empty())
        .take(3)
        .collect();
    Err(format!(
        "{:?} failed: {}",
        command.get_program(),
        last.join(" / ")
    ))
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(named) = env::var_os("NVCC") {
        return Some(PathBuf::from(named));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CUDA_HOME").map(|h| PathBuf::from(h).join("bin"));
    env::split_paths(&path)
        .chain(home)
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .map(|dir| dir.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
}

/// A Rust table of the images, each on a border of 64 bytes; PTX ends with the NUL that the driver looks for.
fn write_table(root: &Path, out: &Path, modules: &[String], fatbins: bool) {
    let mut table = String::from("static IMAGES: &[Image] = &[\n");
    for module in modules {
        let mut text =
            fs::read(root.join(format!("kernels/ptx/{module}.ptx"))).expect("was listed");
        text.push(0);
        let ptx = out.join(format!("{module}.ptx"));
        fs::write(&ptx, text).expect("OUT_DIR can be written");
        let include = |path: &Path| {
            format!(
                "&Aligned {{ bytes: *include_bytes!({:?}) }}",
                path.display().to_string()
            )
        };
        let fatbin = match fatbins {
            true => format!("Some({})", include(&out.join(format!("{module}.fatbin")))),
            false => "None".into(),
        };
        table += &format!(
            "    Image {{ module: {module:?}, ptx: {}, fatbin: {fatbin} }},\n",
            include(&ptx)
        );
    }
    table += "];\n";
    fs::write(out.join("images.rs"), table).expect("OUT_DIR can be written");
}
