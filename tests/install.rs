//! What the installed program needs: nothing but the C library, no privileges, no io_uring.

#[path = "common/program.rs"]
mod program;

use std::path::Path;
use std::process::Command;

use program::{PROGRAM, apart};

fn fixture() -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen2-bf16");
    dir.to_str().unwrap().to_string()
}

#[test]
fn the_program_links_the_c_library_and_nothing_else() {
    let Ok(output) = Command::new("ldd").arg(PROGRAM).output() else {
        return println!("skipped: no ldd");
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let allowed = [
        "linux-vdso.so",
        "libc.so",
        "libm.so",
        "libgcc_s.so",
        "ld-linux",
    ];
    let mut libraries = 0;
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        let name = first.rsplit('/').next().unwrap_or_default();
        libraries += 1;
        assert!(
            allowed.iter().any(|a| name.starts_with(a)),
            "the program needs {name}:\n{text}"
        );
    }
    assert!(libraries >= 2, "{text}");
}

/// As nobody: its own folder to write to, a program and a model that it may only read.
#[test]
fn a_plain_user_runs_it() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    let program = dir.path().join("tensorpager");
    std::fs::copy(PROGRAM, &program).unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(fixture()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let prepared = Command::new("sh")
        .args([
            "-c",
            "chmod -R a+rX \"$1\" && chown 65534:65534 \"$1/home\"",
            "sh",
        ])
        .arg(dir.path())
        .status()
        .is_ok_and(|s| s.success());
    if !prepared {
        return println!("skipped: not root, so no other user to be (this run is one already)");
    }
    let mut as_nobody = Command::new("setpriv");
    let output = apart(&mut as_nobody, home.join("cache"))
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .arg("run")
        .arg(&model)
        .args([
            "-p",
            "x",
            "--greedy",
            "-n",
            "4",
            "--json",
            "--device-map",
            "disk",
        ])
        .current_dir(&home)
        .env("HOME", &home)
        .output();
    let output = match output {
        Ok(output) => output,
        Err(e) => return println!("skipped: no setpriv: {e}"),
    };
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["token_ids"].as_array().unwrap().len(), 4);
    assert!(
        home.join("offload_folder").is_dir(),
        "packed beside the user"
    );
}
