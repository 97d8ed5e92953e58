//! The promise on a GPU: bad disks, a lost device and Ctrl-C either change nothing or are named; nothing hangs.
//!
//! Everything runs on the emulated driver, which also ends the process when a slot or a frame is touched out of order. Tests of engines run
//! in a process of their own, because the driver is found when a process begins.

#[path = "../common/mod.rs"]
mod common;
#[path = "../emulated/mod.rs"]
mod emulated;
#[path = "../engine_common/mod.rs"]
mod engine_common;
#[path = "../engine_common/readers.rs"]
mod faulty_readers;
mod inside;
mod jobs;
mod kv;
#[path = "../emulated/run.rs"]
mod run;
mod stops;

use emulated::inside;

// hazard: short-reads: on the way to a GPU: no bit of the logits changes
// hazard: eintr-eagain: on the way to a GPU: no bit of the logits changes
#[test]
fn passing_faults_change_no_bit() {
    for order in ["drawn", "lazy", "eager"] {
        inside("inside::passing_faults", &[("EMUCUDA_ORDER", order)]);
    }
}

/// Memory is pinned in small pieces. How many of them were pinned, and how many unpinned; `fail` as EMUCUDA_FAIL has it.
fn pinned_and_unpinned(fail: &str) -> Option<(usize, usize)> {
    let trace = tempfile::NamedTempFile::new().unwrap();
    let path = trace.path().to_str().unwrap();
    inside(
        "inside::pinned_in_pieces",
        &[("EMUCUDA_TRACE", path), ("EMUCUDA_FAIL", fail)],
    );
    emulated::driver()?;
    let calls = std::fs::read_to_string(path).unwrap();
    // A call that fails has its error behind its name.
    let done = |name: &str| calls.lines().filter(|line| *line == name).count();
    Some((done("cuMemHostRegister"), done("cuMemHostUnregister")))
}

#[test]
fn memory_pinned_in_pieces_changes_no_bit() {
    let Some((pinned, unpinned)) = pinned_and_unpinned("") else {
        return;
    };
    assert!(pinned > 100, "{pinned}");
    assert_eq!(pinned, unpinned);
}

/// The engine goes on without pinned memory, and what of the region had been pinned when a piece was refused is unpinned.
#[test]
fn a_piece_that_is_refused_leaves_nothing_pinned() {
    // The first region, the second piece of the next, and one far into it.
    for at in [1, 3, 50] {
        let fail = format!("cuMemHostRegister:{at}+:2");
        let Some(counts) = pinned_and_unpinned(&fail) else {
            return;
        };
        assert_eq!(counts, (at - 1, at - 1), "{fail}");
    }
}

// hazard: bit-rot: on the way to a GPU: read once more, no bit changes; again and again: one error
#[test]
fn a_flipped_bit_is_read_once_more_and_then_named() {
    inside("inside::flipped_bits", &[]);
}

// hazard: bit-rot: on disk, for a GPU: one error; names unit, file and block
#[test]
fn a_flipped_byte_on_disk_is_named_whatever_the_tier() {
    inside("inside::flipped_bytes_on_disk", &[]);
}

// hazard: eio: on the way to a GPU: one error; names layer, file and errno
#[test]
fn a_read_error_names_its_own_layer() {
    inside("inside::read_errors", &[]);
}

// hazard: stall: on the way to a GPU: one error within the time limit; names the file
#[test]
fn a_read_that_never_completes_is_named_within_the_limit() {
    inside("inside::lost_reads", &[]);
}

#[test]
fn passes_that_are_cut_off_spoil_nothing() {
    for order in ["drawn", "lazy"] {
        inside("inside::stopped_in_passes", &[("EMUCUDA_ORDER", order)]);
    }
}
