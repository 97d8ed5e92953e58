//! The promise: whatever a packer or a job is doing when it is killed, when a call of it fails or the power goes, what was
//! finished stays, nothing half written is trusted, and the next run ends as if nothing had happened.
//!
//! Real processes: `strace` injects the faults, a loop-mounted ext4 that is shut down without writing its log is the power cut.
//! A test run takes every `CRASH_EVERY`-th point (1: all of them, as `tests/soak.sh` does) and begins at `CRASH_FROM`.

mod cuts;
mod points;
#[path = "../common/program.rs"]
mod program;
mod work;
