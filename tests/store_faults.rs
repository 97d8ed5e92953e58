//! Packing survives what happens to it: crashes, full disks, other packers, sources that change. A folder without a valid
//! manifest is never trusted.

mod store_common;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use store_common::*;
use tensorpager::error::{Code, Result};
use tensorpager::store::{
    CleanOptions, InPlace, PackOptions, PackProgress, PackState, Prepared, Step, Store, clean,
    list_packs, verify,
};
use tensorpager::units::Dtype;

fn pack(source: &Path, options: &PackOptions) -> Result<Prepared> {
    Store::pack(&open(source), options, &mut |_| {})
}

/// Fails the `n`-th step with `errno`.
fn failing_at(options: &PackOptions, n: usize, errno: i32) -> PackOptions {
    let count = AtomicUsize::new(0);
    PackOptions {
        fail_point: Some(Arc::new(move |_| {
            match count.fetch_add(1, Ordering::Relaxed) == n {
                true => Err(io::Error::from_raw_os_error(errno)),
                false => Ok(()),
            }
        })),
        ..options.clone()
    }
}

// hazard: pack-call-fails: at each step: one error, the folder is as it was
#[test]
fn an_error_at_any_step_leaves_nothing_behind() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), false, Dtype::BF16);
    let offload = tmp.path().join("offload");
    let options = PackOptions::new(&offload);
    let mut steps = 0;
    for n in 0.. {
        match pack(&dir, &failing_at(&options, n, libc::ENOSPC)) {
            Ok(prepared) => {
                assert_holds(&prepared.store, &tensors);
                break;
            }
            Err(error) => {
                assert_eq!(error.code(), Code::Space, "{error}");
                assert!(error.what().contains("tiny--bf16"), "{error}");
                assert_eq!(fs::read_dir(&offload).unwrap().count(), 0, "after step {n}");
                steps += 1;
            }
        }
    }
    assert!(steps > 20, "only {steps} steps");
}

/// Not a test of its own: the process that the next one kills.
#[test]
fn child_that_dies_while_packing() {
    let Ok(source) = std::env::var("STORE_TEST_SOURCE") else {
        return;
    };
    let offload = std::env::var("STORE_TEST_OFFLOAD").unwrap();
    let n: usize = std::env::var("STORE_TEST_STEP").unwrap().parse().unwrap();
    let count = AtomicUsize::new(0);
    let mut options = PackOptions::new(offload);
    options.fail_point = Some(Arc::new(move |_| {
        if count.fetch_add(1, Ordering::Relaxed) == n {
            std::process::abort();
        }
        Ok(())
    }));
    pack(Path::new(&source), &options).unwrap();
}

fn run_child(source: &Path, offload: &Path, step: usize) -> bool {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_dies_while_packing"])
        .env("STORE_TEST_SOURCE", source)
        .env("STORE_TEST_OFFLOAD", offload)
        .env("STORE_TEST_STEP", step.to_string())
        .output()
        .unwrap();
    status.status.success()
}

// hazard: pack-killed: at each step: seen as unfinished, made again
#[test]
fn a_crash_at_any_step_is_seen_and_repaired() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), true, Dtype::BF16);
    let mut crashes = 0;
    let mut finished_early = 0;
    for step in 0.. {
        let offload = tmp.path().join(format!("offload{step}"));
        if run_child(&dir, &offload, step) {
            break;
        }
        crashes += 1;
        let state = list_packs(&offload).unwrap().pop().map(|p| p.state);
        let usable = Store::open_packed(&offload.join("tiny--bf16")).is_ok();
        assert_eq!(
            usable,
            state == Some(PackState::Ready),
            "step {step}: {state:?}"
        );
        finished_early += usize::from(usable);
        // Whatever is there, the next run ends with a good pack; a finished one is not made again.
        let again = pack(&dir, &PackOptions::new(&offload)).unwrap();
        assert_eq!(again.packed.is_none(), usable, "step {step}");
        assert_holds(&again.store, &tensors);
        let report = verify(&again.store.dir, &AtomicBool::new(false), &mut |_, _| {}).unwrap();
        assert!(
            report.problems.is_empty(),
            "step {step}: {:?}",
            report.problems
        );
    }
    assert!(crashes > 20, "only {crashes} crash points");
    // Only a crash behind the manifest's rename leaves a finished pack.
    assert_eq!(finished_early, 1);
}

#[test]
fn a_crash_over_an_old_pack_never_mixes_the_two() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), true, Dtype::BF16);
    let offload = tmp.path().join("offload");
    for step in [0, 1, 2, 3, 6, 9, 12, 15, 18] {
        // An old pack, then a source of the same name and place with other weights.
        drop(pack(&dir, &PackOptions::new(&offload)).unwrap());
        let config = config(true);
        let mut tensors = tensors(&config, |_| Dtype::BF16);
        let norm = tensors.get_mut("model.norm.weight").unwrap();
        norm.bytes[0] ^= step as u8 + 1;
        write_folder(&dir, &config, &tensors, 1);
        assert!(!run_child(&dir, &offload, step));
        let made = pack(&dir, &PackOptions::new(&offload)).unwrap();
        assert_holds(&made.store, &tensors);
        assert_eq!(list_packs(&offload).unwrap().len(), 1);
    }
}

#[test]
fn an_interruption_cleans_up() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), false, Dtype::BF16);
    let mut options = PackOptions::new(tmp.path().join("offload"));
    options.buffer_bytes = 1;
    let cancel = options.cancel.clone();
    options.fail_point = Some(Arc::new(move |step| {
        if matches!(step, Step::Write(name, _) if name == "layer.001.dat") {
            cancel.store(true, Ordering::Relaxed);
        }
        Ok(())
    }));
    let error = pack(&dir, &options).unwrap_err();
    assert_eq!(error.code(), Code::Interrupted);
    assert_eq!(fs::read_dir(tmp.path().join("offload")).unwrap().count(), 0);
}

// hazard: two-packers: the second waits and uses the first one's pack
#[test]
fn two_packers_make_one_pack() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), false, Dtype::BF16);
    let mut options = PackOptions::new(tmp.path().join("offload"));
    // The first holds the folder until the second has met it. Not for ever: where they do not meet, this is to fail.
    let (met, meets) = mpsc::channel();
    let meets = Mutex::new(meets);
    options.fail_point = Some(Arc::new(move |step| {
        if *step == Step::Checksums {
            let _ = meets.lock().unwrap().recv_timeout(Duration::from_secs(60));
        }
        Ok(())
    }));
    let second = PackOptions {
        fail_point: None,
        ..options.clone()
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| pack(&dir, &options).unwrap());
        while !tmp.path().join("offload/tiny--bf16/embed.dat").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let impatient = PackOptions {
            wait: Duration::ZERO,
            ..second.clone()
        };
        let error = pack(&dir, &impatient).unwrap_err();
        assert_eq!(error.code(), Code::Locked);
        assert!(
            error.cause().contains(&std::process::id().to_string()),
            "{error}"
        );
        let state = list_packs(&tmp.path().join("offload"))
            .unwrap()
            .pop()
            .unwrap();
        assert_eq!(state.state, PackState::Packing);
        assert_eq!(state.holder.unwrap().pid, Some(std::process::id()));
        let mut released = false;
        let waited = Store::pack(&open(&dir), &second, &mut |p| {
            if matches!(p, PackProgress::Waiting { .. }) && !released {
                released = true;
                met.send(()).unwrap();
            }
        });
        let waited = waited.unwrap();
        assert!(released, "the second did not have to wait");
        assert!(waited.packed.is_none() && first.join().unwrap().packed.is_some());
        assert_holds(&waited.store, &tensors);
    });
}

// hazard: packer-beside-runner: refused while it is in use; names the process
#[test]
fn a_reader_keeps_its_pack_from_packers_and_cleaners() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), false, Dtype::BF16);
    let offload = tmp.path().join("offload");
    let mut options = PackOptions::new(&offload);
    options.wait = Duration::ZERO;
    let reader = pack(&dir, &options).unwrap().store;
    let beside = pack(&dir, &options).unwrap().store;
    options.repack = true;
    assert_eq!(pack(&dir, &options).unwrap_err().code(), Code::Locked);
    let cleaned = clean(&offload, &CleanOptions::default()).unwrap();
    assert!(cleaned.removed.is_empty());
    assert!(cleaned.kept[0].1.contains("in use"), "{:?}", cleaned.kept);
    assert_holds(&reader, &tensors);
    drop((reader, beside));
    assert!(pack(&dir, &options).unwrap().packed.is_some());
    let cleaned = clean(&offload, &CleanOptions::default()).unwrap();
    assert_eq!(cleaned.removed.len(), 1);
    assert!(!offload.join("tiny--bf16").exists());
}

// hazard: changed: packing: refused, nothing stays
#[test]
fn a_source_that_changes_while_it_is_packed_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), false, Dtype::BF16);
    let mut options = PackOptions::new(tmp.path().join("offload"));
    let file = dir.join("model.safetensors");
    options.fail_point = Some(Arc::new(move |step| {
        if *step == Step::Checksums {
            let touched = fs::File::options().append(true).open(&file)?;
            touched.set_modified(std::time::SystemTime::UNIX_EPOCH)?;
        }
        Ok(())
    }));
    let error = pack(&dir, &options).unwrap_err();
    assert_eq!(error.code(), Code::Checkpoint);
    assert!(error.what().contains("changed while"), "{error}");
    // A source cut short under the packer.
    let (dir, _) = source(tmp.path(), false, Dtype::BF16);
    let ckpt = open(&dir);
    let file = dir.join("model.safetensors");
    let mut options = PackOptions::new(tmp.path().join("offload"));
    options.fail_point = Some(Arc::new(move |step| {
        if matches!(step, Step::Write(..)) {
            fs::File::options().write(true).open(&file)?.set_len(4096)?;
        }
        Ok(())
    }));
    options.buffer_bytes = 1;
    let error = Store::pack(&ckpt, &options, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), Code::Checkpoint, "{error}");
    assert_eq!(fs::read_dir(tmp.path().join("offload")).unwrap().count(), 0);
}

/// A small file system, unmounted on drop.
struct TinyDisk(PathBuf);

impl TinyDisk {
    fn mount(at: &Path, size: &str) -> Option<TinyDisk> {
        fs::create_dir_all(at).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(at)
            .output();
        match status {
            Ok(output) if output.status.success() => Some(TinyDisk(at.to_path_buf())),
            _ => None,
        }
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

// hazard: pack-disk-full: refused before the first byte, or streamed in place
#[test]
fn a_full_disk_is_met_before_the_first_byte_and_streams_in_place() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), false, Dtype::F32);
    let Some(disk) = TinyDisk::mount(&tmp.path().join("disk"), "1m") else {
        println!("skipped: mounting a tmpfs needs root");
        return;
    };
    let mut options = PackOptions::new(&disk.0);
    let writes = Arc::new(AtomicUsize::new(0));
    let seen = writes.clone();
    options.fail_point = Some(Arc::new(move |_| {
        seen.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }));
    let error = pack(&dir, &options).unwrap_err();
    assert_eq!(error.code(), Code::Space);
    assert!(error.cause().contains("are free"), "{error}");
    assert_eq!(writes.load(Ordering::Relaxed), 0);
    assert_eq!(fs::read_dir(&disk.0).unwrap().count(), 0);
    options.in_place = InPlace::WhenShort;
    let prepared = Store::prepare(&open(&dir), &options, &mut |_| {}).unwrap();
    assert!(
        prepared.store.in_place && prepared.notes[0].contains("free"),
        "{:?}",
        prepared.notes
    );
    assert_holds(&prepared.store, &tensors);
}

// hazard: pack-disk-full: one error; what was written is removed
#[test]
fn a_disk_that_fills_up_on_the_way_is_left_as_it_was() {
    let tmp = tempfile::tempdir().unwrap();
    // About 620 KB and some slack: fits, until somebody else fills the disk.
    let (dir, _) = source(tmp.path(), false, Dtype::BF16);
    let Some(disk) = TinyDisk::mount(&tmp.path().join("disk"), "3m") else {
        println!("skipped: mounting a tmpfs needs root");
        return;
    };
    let other = disk.0.join("somebody_elses");
    let mut options = PackOptions::new(disk.0.join("offload"));
    options.fail_point = Some(Arc::new(move |step| {
        if *step == Step::Mark {
            let _ = fs::write(&other, vec![1; 2800 << 10]);
        }
        Ok(())
    }));
    let error = match pack(&dir, &options) {
        Err(e) => e,
        Ok(_) => panic!("the disk was not full"),
    };
    assert_eq!(error.code(), Code::Space, "{error}");
    assert!(error.what().contains("make room"), "{error}");
    assert!(!disk.0.join("offload/tiny--bf16").exists());
}
