//! Every call on the way of a write: the process is killed in it, or it fails.

use std::path::Path;

use super::work::*;

const FAULTS: [&str; 4] = ["signal=KILL", "error=EIO", "error=ENOSPC", "error=EINTR"];
const PACK_CALLS: [&str; 12] = [
    "openat",
    "mkdir",
    "flock",
    "unlink",
    "fallocate",
    "pwrite64",
    "write",
    "fsync",
    "rename",
    "close",
    "utimensat",
    "ftruncate",
];
const JOB_CALLS: [&str; 9] = [
    "openat",
    "flock",
    "pwrite64",
    "write",
    "fdatasync",
    "fsync",
    "ftruncate",
    "rename",
    "unlink",
];
/// More calls of one kind than any run makes: a loop that does not end is a bug of the test.
const MOST: usize = 500;

/// Calls `at(call, fault, n)` for n = 1, 2, … until a run completes before its `n`-th such call; how many were hit.
fn enumerate(calls: &[&str], sample: usize, at: &mut dyn FnMut(&str) -> bool) -> usize {
    let (mut hits, mut total) = (0, 0);
    let mut sample = Sample::new(sample);
    for call in chosen(calls) {
        let before = hits;
        // A close that strace lets fail does not close: locks and pipes stay open for ever, which no failing close on Linux does.
        let faults = if call == "close" {
            &FAULTS[..1]
        } else {
            &FAULTS[..]
        };
        for fault in faults {
            for n in 1.. {
                assert!(n < MOST, "{call} does not come to an end");
                // The end of a kind of call is met by the next point taken.
                if !sample.takes() {
                    continue;
                }
                total += 1;
                let inject = format!("{call}:{fault}:when={n}");
                if !at(&inject) {
                    break;
                }
                hits += 1;
            }
        }
        println!("{call}: {} crash points hit", hits - before);
    }
    println!("{hits} crash points hit in {total} runs");
    hits
}

// hazard: pack-killed: the pack is whole or not there; the next run makes it
// hazard: pack-call-fails: a coded error, or success; never a pack that opens and is damaged
#[test]
fn a_pack_survives_a_kill_and_an_error_in_every_call() {
    if !has_strace() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let hits = enumerate(&PACK_CALLS, 7, &mut |inject| {
        let offload = dir.path().join("offload");
        let _ = std::fs::remove_dir_all(&offload);
        let ended = run_pack(&offload, &[inject], &log);
        ended.assert_sane(inject);
        let usable = usable(&offload, inject).unwrap_or_else(|e| panic!("{e}"));
        assert!(usable || !ended.ok(), "{inject}: success without a pack");
        repair(&offload, inject);
        ended.hit
    });
    assert_more_than(20, hits);
}

/// Not every file system is as kind as ext4, where syncing one file brings the records of all others along: so the order of the
/// calls themselves is looked at.
// hazard: pack-power-cut: every file is synced after its last write and before the manifest's rename, its folder too
#[test]
fn every_file_is_synced_before_the_manifest_names_it() {
    if !has_strace() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (offload, log) = (dir.path().join("offload"), dir.path().join("log"));
    let calls = trace_pack(&offload, &log);
    let manifest = calls
        .iter()
        .position(|c| c.contains("rename") && c.contains("manifest.json.tmp"));
    let manifest = manifest.unwrap_or_else(|| panic!("no manifest: {calls:?}"));
    let synced = |file: &str, calls: &[String]| {
        let last_write = calls
            .iter()
            .rposition(|c| c.contains("write") && c.contains(file));
        let last_sync = calls
            .iter()
            .rposition(|c| c.contains("sync(") && c.contains(file));
        last_sync.is_some() && last_sync > last_write
    };
    let mut files = 0;
    for entry in std::fs::read_dir(offload.join(format!("{MODEL}--bf16"))).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !["lock", "last_used", "manifest.json"].contains(&name.as_str()) {
            files += 1;
            assert!(
                synced(&format!("/{name}>"), &calls[..manifest]),
                "{name} is not synced before the manifest"
            );
        }
    }
    assert!(files > 8, "{files} files");
    assert!(synced("/manifest.json.tmp>", &calls[..manifest]));
    let folder = format!("/{MODEL}--bf16>");
    let folder_synced = |calls: &[String]| {
        calls
            .iter()
            .any(|c| c.contains("fsync(") && c.contains(&folder))
    };
    let last_new_name = calls[..manifest]
        .iter()
        .rposition(|c| c.contains("checksums.bin>"))
        .unwrap();
    assert!(
        folder_synced(&calls[last_new_name..manifest]),
        "the names are not synced before the manifest"
    );
    assert!(
        folder_synced(&calls[manifest..]),
        "the manifest's name is not synced"
    );
}

/// One crash point of a job, then the same command again. `expected`: what a run without faults writes.
fn crash_and_resume(dir: &Path, inject: &str, expected: &(Vec<u8>, Vec<u8>)) -> bool {
    let (input, log) = (dir.join("in.jsonl"), dir.join("log"));
    let output = dir.join("crash/out.jsonl");
    let _ = std::fs::remove_dir_all(output.parent().unwrap());
    std::fs::create_dir(output.parent().unwrap()).unwrap();
    let ended = run_job(&input, &output, &[inject], &log);
    ended.assert_sane(inject);
    let kept = rows(&output, inject);
    assert!(
        kept.len() as u64 >= told(&ended),
        "{inject}: a row that was told of is not there"
    );
    if ended.output.status.code() == Some(3) {
        assert!(
            bytes(&output) == *expected,
            "{inject}: a finished job differs"
        );
    }
    let again = run_job(&input, &output, &[], &log);
    assert_eq!(
        again.output.status.code(),
        Some(3),
        "{inject}: {}",
        String::from_utf8_lossy(&again.output.stderr)
    );
    assert!(rows(&output, inject).is_superset(&kept));
    assert!(
        bytes(&output) == *expected,
        "{inject}: the resumed job differs"
    );
    ended.hit
}

// hazard: job-killed: resumed to the bytes of a run without the kill; nothing lost, nothing twice
// hazard: job-call-fails: a coded error; what was told as finished is there, and the same command goes on
#[test]
fn a_job_survives_a_kill_and_an_error_in_every_call() {
    if !has_strace() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("whole.jsonl"));
    write_job(&input);
    let whole = run_job(&input, &output, &[], &dir.path().join("log"));
    assert_eq!(whole.output.status.code(), Some(3), "one row is bad");
    let expected = bytes(&output);
    let hits = enumerate(&JOB_CALLS, 13, &mut |inject| {
        crash_and_resume(dir.path(), inject, &expected)
    });
    assert_more_than(10, hits);
}
