//! `doctor`: what it says of this machine and of worse ones, and that it leaves nothing behind.

#[path = "../common/sandbox.rs"]
mod sandbox;

use std::os::unix::process::CommandExt;

use serde_json::Value;

use super::process::{Place, Ran, str};

const NAMES: [&str; 12] = [
    "kernel",
    "io_uring",
    "locked memory",
    "open files",
    "offload folder",
    "file system",
    "free space",
    "processor",
    "memory",
    "pinned memory",
    "gpu",
    "ffmpeg",
];

fn checks(ran: &Ran) -> Vec<Value> {
    let object: Value = serde_json::from_str(&ran.stdout).unwrap();
    object["checks"].as_array().unwrap().clone()
}

fn named<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    let found = checks.iter().find(|c| c["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {checks:?}"))
}

#[test]
fn every_check_says_what_it_found_and_every_no_has_a_fix() {
    let p = Place::new();
    let ran = p.run(&["doctor", "--json"]);
    let checks = checks(&ran);
    for name in NAMES.iter().chain(&["disk rate"]) {
        let check = named(&checks, name);
        assert!(!check["found"].as_str().unwrap().is_empty(), "{check}");
        match check["status"].as_str().unwrap() {
            "pass" => assert_eq!(check.get("fix"), None),
            "warn" | "fail" => assert!(check["fix"].as_str().unwrap().len() > 5, "{check}"),
            other => panic!("{other}"),
        }
    }
    let object: Value = serde_json::from_str(&ran.stdout).unwrap();
    let failed = checks.iter().any(|c| c["status"] == "fail");
    assert_eq!(object["ok"], !failed);
    assert_eq!(ran.code, i32::from(failed));
    let rate = named(&checks, "disk rate");
    let measured = rate["gb_per_s"].as_f64().is_some_and(|r| r > 0.0);
    assert!(
        measured || rate["found"].as_str().unwrap().starts_with("not measured"),
        "{rate}"
    );
    // The table says the same.
    let table = p.run(&["doctor", "--no-measure"]);
    for name in NAMES {
        assert!(table.stdout.contains(name), "{name}: {}", table.stdout);
    }
    let left = std::fs::read_dir(p.path(".")).unwrap().count();
    assert_eq!(left, 0, "it changes nothing");
}

#[test]
fn a_place_that_cannot_be_written_fails_with_what_to_do() {
    let p = Place::new();
    let file = p.file("file", "x");
    let ran = p.run(&[
        "doctor",
        "--json",
        "--no-measure",
        "--offload-folder",
        &file,
    ]);
    assert_eq!(ran.code, 1);
    let checks = checks(&ran);
    let folder = named(&checks, "offload folder");
    assert!(
        folder["fix"].as_str().unwrap().contains("--offload-folder"),
        "{folder}"
    );
    // What does not depend on it is looked at all the same.
    named(&checks, "gpu");
}

#[test]
fn a_place_where_nothing_can_be_kept_fails_for_root_too() {
    let p = Place::new();
    for place in ["/proc/x", "/sys/x"] {
        let ran = p.run(&[
            "doctor",
            "--json",
            "--no-measure",
            "--offload-folder",
            place,
        ]);
        let checks = checks(&ran);
        assert_eq!(
            named(&checks, "offload folder")["status"],
            "fail",
            "{place}"
        );
        assert_eq!(ran.code, 1);
    }
}

#[test]
fn without_io_uring_it_warns_and_names_the_cause() {
    let p = Place::new();
    let mut command = p.command(&["doctor", "--json", "--no-measure"]);
    // SAFETY: system calls only between fork and exec.
    unsafe { command.pre_exec(|| sandbox::refuse_io_uring(libc::EPERM)) };
    let output = match command.output() {
        Ok(output) => output,
        Err(e) => return println!("skipped: cannot make the sandbox: {e}"),
    };
    let checks = checks(&Ran::from(output));
    let ring = named(&checks, "io_uring");
    assert_eq!(
        (&ring["status"], &ring["io"]),
        (&"warn".into(), &"threads".into())
    );
    assert!(ring["fix"].as_str().unwrap().contains("seccomp"), "{ring}");
}

#[test]
fn a_plain_user_without_locked_memory_is_warned() {
    let p = Place::new();
    // Readable and writable by the user that the child becomes.
    let dir = p.path("open");
    std::fs::create_dir(&dir).unwrap();
    let mut command = p.command(&[
        "doctor",
        "--json",
        "--no-measure",
        "--offload-folder",
        str(&dir),
    ]);
    // SAFETY: system calls only between fork and exec.
    unsafe { command.pre_exec(sandbox::lock_no_memory) };
    let output = match command.output() {
        Ok(output) => output,
        Err(e) => return println!("skipped: cannot become a plain user: {e}"),
    };
    let checks = checks(&Ran::from(output));
    if named(&checks, "io_uring")["io"] != "io_uring" {
        return println!("skipped: no io_uring here");
    }
    let locked = named(&checks, "locked memory");
    assert_eq!(locked["memlock_bytes"], 65536);
    assert!(
        locked["fix"].as_str().unwrap().contains("ulimit -l"),
        "{locked}"
    );
    assert_eq!(
        named(&checks, "offload folder")["status"],
        "fail",
        "not this user's"
    );
}
