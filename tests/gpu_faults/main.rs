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

#[test]
fn memory_pinned_in_pieces_changes_no_bit() {
    let trace = tempfile::NamedTempFile::new().unwrap();
    let path = trace.path().to_str().unwrap();
    inside("inside::pinned_in_pieces", &[("EMUCUDA_TRACE", path)]);
    if emulated::driver().is_some() {
        let calls = std::fs::read_to_string(path).unwrap();
        let pieces = calls.matches("cuMemHostRegister").count();
        assert!(pieces > 100, "{pieces}");
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
