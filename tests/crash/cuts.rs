//! Power cuts: a loop-mounted ext4 that is shut down without writing its log, then mounted again.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::work::*;

const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
/// Nothing of the log is written: what was not synced is gone, as when the power goes.
const NO_LOG_FLUSH: u32 = 2;

/// An ext4 in a file. Unmounted on drop, which also gives the loop device back.
struct Disk {
    image: PathBuf,
    at: PathBuf,
}

fn run(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .output()
        .is_ok_and(|o| o.status.success())
}

impl Disk {
    /// `None`, and a line that says so, where that cannot be done.
    fn new(dir: &Path) -> Option<Disk> {
        let disk = Disk {
            image: dir.join("disk.img"),
            at: dir.join("disk"),
        };
        fs::create_dir(&disk.at).unwrap();
        File::create(&disk.image)
            .unwrap()
            .set_len(48 << 20)
            .unwrap();
        let ready = run("mkfs.ext4", &["-q", "-F", disk.image.to_str().unwrap()]) && disk.mount();
        if !ready {
            println!(
                "skipped: an ext4 cannot be made and mounted here (root and loop devices are needed)"
            );
        }
        ready.then_some(disk)
    }

    fn mount(&self) -> bool {
        // A long time between commits, so that nothing lasts by chance.
        let (image, at) = (self.image.to_str().unwrap(), self.at.to_str().unwrap());
        run("mount", &["-o", "loop,commit=600", image, at])
    }

    fn cut(&self) {
        let root = File::open(&self.at).unwrap();
        // SAFETY: the call reads four bytes from the pointer, which are there.
        let answer = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_SHUTDOWN, &NO_LOG_FLUSH) };
        assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
        drop(root);
        assert!(run("umount", &[self.at.to_str().unwrap()]));
        assert!(self.mount(), "the file system does not come back");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run("umount", &[self.at.to_str().unwrap()]);
    }
}

const NO_SYNC: &str = "fsync,fdatasync:retval=0";

/// What is left of a finished pack after a cut. `Err`: it opens and is damaged.
fn pack_then_cut(disk: &Disk, offload: &Path, inject: &[&str], log: &Path) -> Result<bool, String> {
    let _ = fs::remove_dir_all(offload);
    // The removal must last, or the old pack comes back with the power.
    File::open(&disk.at).unwrap().sync_all().unwrap();
    let ended = run_pack(offload, inject, log);
    assert!(
        ended.ok(),
        "{}",
        String::from_utf8_lossy(&ended.output.stderr)
    );
    disk.cut();
    usable(offload, "a cut after a pack")
}

// hazard: pack-power-cut: a pack that was reported as finished is whole after a power cut; control: without fsync it is lost
#[test]
fn a_finished_pack_survives_a_power_cut_and_without_fsync_it_would_not() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = has_strace().then(|| Disk::new(dir.path())).flatten() else {
        return;
    };
    let (offload, log) = (disk.at.join("offload"), dir.path().join("log"));
    let rounds = rounds(2);
    for _ in 0..rounds {
        assert_eq!(pack_then_cut(&disk, &offload, &[], &log), Ok(true));
    }
    // The control: the same cut with every fsync left out.
    assert_ne!(
        pack_then_cut(&disk, &offload, &[NO_SYNC], &log),
        Ok(true),
        "the cut loses nothing: it proves nothing"
    );
    println!("{rounds} power cuts after a pack survived, control lost");
}

/// How often what is tried several times is tried.
fn rounds(default: usize) -> usize {
    let asked = std::env::var("CUT_ROUNDS")
        .ok()
        .and_then(|v| v.parse().ok());
    asked.unwrap_or(default)
}

// hazard: pack-power-cut: at every call of a pack: whole or not there, never opened and damaged
#[test]
fn a_power_cut_at_any_call_of_a_pack_leaves_no_pack_that_opens_and_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = has_strace().then(|| Disk::new(dir.path())).flatten() else {
        return;
    };
    let (offload, log) = (disk.at.join("offload"), dir.path().join("log"));
    let mut sample = Sample::new(6);
    let mut cuts = 0;
    for call in chosen(&["mkdir", "fallocate", "pwrite64", "write", "fsync", "rename"]) {
        for n in 1..200 {
            if !sample.takes() {
                continue;
            }
            let inject = format!("{call}:signal=KILL:when={n}");
            let _ = fs::remove_dir_all(&offload);
            File::open(&disk.at).unwrap().sync_all().unwrap();
            let ended = run_pack(&offload, &[&inject], &log);
            disk.cut();
            usable(&offload, &inject).unwrap_or_else(|e| panic!("{e}"));
            repair(&offload, &inject);
            if !ended.hit {
                break;
            }
            cuts += 1;
        }
    }
    println!("{cuts} power cuts within a pack survived");
    assert_more_than(4, cuts);
}

/// Rows of a job on `disk` that were told as finished and are not there after a cut.
fn lost(disk: &Disk, dir: &Path, inject: &[&str]) -> u64 {
    let output = disk.at.join("out.jsonl");
    for name in ["out.jsonl", "out.errors.jsonl", "out.jsonl.job"] {
        let _ = fs::remove_file(disk.at.join(name));
    }
    File::open(&disk.at).unwrap().sync_all().unwrap();
    let ended = run_job(&dir.join("in.jsonl"), &output, inject, &dir.join("log"));
    disk.cut();
    let there = rows(&output, "after a cut").len() as u64;
    told(&ended).saturating_sub(there)
}

// hazard: job-power-cut: rows that were told as finished are there, the job goes on to the same bytes; control: without fsync they are lost
#[test]
fn rows_told_as_finished_survive_a_power_cut_and_without_fsync_they_would_not() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = has_strace().then(|| Disk::new(dir.path())).flatten() else {
        return;
    };
    let (input, whole) = (dir.path().join("in.jsonl"), dir.path().join("whole.jsonl"));
    let output = disk.at.join("out.jsonl");
    write_job(&input);
    run_job(&input, &whole, &[], &dir.path().join("log"));
    let expected = bytes(&whole);
    assert_eq!(lost(&disk, dir.path(), &[]), 0, "after the end");
    assert!(bytes(&output) == expected);
    let mut sample = Sample::new(4);
    let mut cuts = 1;
    for call in chosen(&["pwrite64", "fdatasync", "fsync", "ftruncate"]) {
        for n in 1..200 {
            if !sample.takes() {
                continue;
            }
            let inject = format!("{call}:signal=KILL:when={n}");
            assert_eq!(lost(&disk, dir.path(), &[&inject]), 0, "{inject}");
            let hit = fs::read_to_string(dir.path().join("log"))
                .unwrap()
                .contains("killed by SIGKILL");
            let again = run_job(&input, &output, &[], &dir.path().join("log"));
            assert_eq!(
                again.output.status.code(),
                Some(3),
                "{inject}: {}",
                String::from_utf8_lossy(&again.output.stderr)
            );
            assert!(
                bytes(&output) == expected,
                "{inject}: the resumed job differs"
            );
            if !hit {
                break;
            }
            cuts += 1;
        }
    }
    let control = lost(&disk, dir.path(), &[NO_SYNC]);
    println!("{cuts} power cuts of a job survived, control lost {control} rows");
    assert!(control > 0, "the cut loses nothing: it proves nothing");
}
