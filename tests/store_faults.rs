//! Packing survives what happens to it: crashes, full disks, other packers, sources that change. A folder without a valid
//! manifest is never trusted.

mod store_common;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use store_common::*;
use tensorpager::error::{Code, Result};
use tensorpager::store::{
    CleanOptions, InPlace, PackOptions, PackProgress, PackState, Prepared, ProblemKind, Step,
    Store, clean, list_packs, verify,
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

#[test]
fn two_packers_make_one_pack() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), false, Dtype::BF16);
    let mut options = PackOptions::new(tmp.path().join("offload"));
    // The first holds the folder until the second has met it.
    let met = Arc::new(Barrier::new(2));
    let first_met = met.clone();
    options.fail_point = Some(Arc::new(move |step| {
        if *step == Step::Checksums {
            first_met.wait();
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
                met.wait();
            }
        });
        let waited = waited.unwrap();
        assert!(released, "the second did not have to wait");
        assert!(waited.packed.is_none() && first.join().unwrap().packed.is_some());
        assert_holds(&waited.store, &tensors);
    });
}

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

#[test]
fn a_changed_source_is_packed_anew_and_another_source_gets_its_own_folder() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), false, Dtype::BF16);
    let offload = tmp.path().join("offload");
    let options = PackOptions::new(&offload);
    drop(pack(&dir, &options).unwrap());
    let config = config(false);
    let mut other = tensors(&config, |_| Dtype::BF16);
    other.get_mut("lm_head.weight").unwrap().bytes[100] ^= 1;
    write_folder(&dir, &config, &other, 1);
    assert_eq!(
        list_packs(&offload).unwrap()[0].state,
        PackState::SourceChanged
    );
    let made = pack(&dir, &options).unwrap();
    assert!(made.packed.is_some());
    assert!(made.store.dir.ends_with("tiny--bf16"));
    assert_holds(&made.store, &other);
    // The same name elsewhere.
    let elsewhere = tmp.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let (dir2, tensors2) = source(&elsewhere, false, Dtype::BF16);
    let made2 = pack(&dir2, &options).unwrap();
    let name = made2
        .store
        .dir
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_string();
    assert!(
        name.starts_with("tiny--bf16-") && name.len() == 19,
        "{name}"
    );
    assert_holds(&made2.store, &tensors2);
    assert_holds(&made.store, &other);
    drop(made2);
    assert!(
        pack(&dir2, &options).unwrap().packed.is_none(),
        "found again under its second name"
    );
}

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

#[test]
fn a_new_tokenizer_is_copied_without_packing_again() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), false, Dtype::BF16);
    let options = PackOptions::new(tmp.path().join("offload"));
    drop(pack(&dir, &options).unwrap());
    fs::write(dir.join("tokenizer.json"), "{\"newer\": true}").unwrap();
    fs::write(dir.join("chat_template.jinja"), "{{ x }}").unwrap();
    fs::remove_file(dir.join("generation_config.json")).unwrap();
    let made = pack(&dir, &options).unwrap();
    assert!(made.packed.is_none());
    let read = |name: &str| fs::read_to_string(made.store.dir.join(name)).ok();
    assert_eq!(read("tokenizer.json").unwrap(), "{\"newer\": true}");
    assert_eq!(read("chat_template.jinja").unwrap(), "{{ x }}");
    assert_eq!(read("generation_config.json"), None);
    assert_holds(&made.store, &tensors);
    // One that was edited in the pack is an error there, and put right from the source.
    let packed = made.store.dir.clone();
    drop(made);
    fs::write(packed.join("tokenizer.json"), "{}").unwrap();
    assert_eq!(Store::open_packed(&packed).unwrap_err().code(), Code::Store);
    assert!(pack(&dir, &options).unwrap().packed.is_none());
    Store::open_packed(&packed).unwrap();
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

#[test]
fn every_damage_to_a_pack_is_found() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), true, Dtype::BF16);
    let options = PackOptions::new(tmp.path().join("offload"));
    let packed = pack(&dir, &options).unwrap().store.dir.clone();
    let check = || verify(&packed, &AtomicBool::new(false), &mut |_, _| {});
    let names: Vec<String> = fs::read_dir(&packed)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    let free = ["lock", "last_used"];
    for name in names.iter().filter(|n| !free.contains(&n.as_str())) {
        let path = packed.join(name);
        let good = fs::read(&path).unwrap();
        let weights = name.ends_with(".dat");
        let caught = |what: &str| {
            let found = check().is_ok_and(|r| r.is_good());
            assert!(!found, "{name}: {what} passes verify");
            let opened = Store::open_packed(&packed).is_ok();
            // A flip in the weights is found when they are read; everything else at once.
            assert_eq!(
                opened,
                weights && what == "a flipped bit",
                "{name}: {what} opens"
            );
        };
        for at in (0..good.len()).step_by(good.len() / 5 + 1) {
            let mut bad = good.clone();
            bad[at] ^= 0x04;
            fs::write(&path, &bad).unwrap();
            caught("a flipped bit");
        }
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        caught("truncation by a byte");
        fs::write(&path, [good.as_slice(), &[0; 4096]].concat()).unwrap();
        caught("a longer file");
        fs::write(&path, "").unwrap();
        caught("an empty file");
        fs::remove_file(&path).unwrap();
        caught("a missing file");
        fs::create_dir(&path).unwrap();
        caught("a folder in its place");
        fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        caught("a link to a device");
        fs::remove_file(&path).unwrap();
        fs::write(&path, &good).unwrap();
        assert!(check().unwrap().problems.is_empty());
    }
    fs::write(packed.join("stray"), "x").unwrap();
    let report = check().unwrap();
    assert!(report.is_good() && report.problems[0].kind == ProblemKind::Extra);
}

#[test]
fn mismatches_name_unit_file_and_block() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), true, Dtype::BF16);
    let packed = pack(&dir, &PackOptions::new(tmp.path().join("offload")))
        .unwrap()
        .store
        .dir
        .clone();
    let flip = |name: &str, at: usize| {
        let mut raw = fs::read(packed.join(name)).unwrap();
        raw[at] ^= 1;
        fs::write(packed.join(name), raw).unwrap();
    };
    flip("layer.001.dat", 70_000);
    flip("layer.001.dat", 10);
    flip("embed.dat", 1000);
    let report = verify(&packed, &AtomicBool::new(false), &mut |_, _| {}).unwrap();
    assert_eq!(report.bad_blocks, 3);
    let found: Vec<(&str, Option<u64>)> = report
        .problems
        .iter()
        .map(|p| (p.file.as_str(), p.block))
        .collect();
    assert_eq!(
        found,
        [
            ("embed.dat", Some(0)),
            ("layer.001.dat", Some(0)),
            ("layer.001.dat", Some(1))
        ]
    );
    assert_eq!(report.problems[0].units, ["embedding", "head block 0"]);
    assert_eq!(report.problems[1].units, ["layer 1"]);
    let error = verify(&packed, &AtomicBool::new(true), &mut |_, _| {}).unwrap_err();
    assert_eq!(error.code(), Code::Interrupted);
}

#[test]
fn the_longest_unused_packs_make_room() {
    let tmp = tempfile::tempdir().unwrap();
    let offload = tmp.path().join("offload");
    let mut sources = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let parent = tmp.path().join(name);
        fs::create_dir(&parent).unwrap();
        let (dir, _) = source(&parent, true, Dtype::BF16);
        let own = parent.join(format!("model-{name}"));
        fs::rename(dir, &own).unwrap();
        sources.push(own);
    }
    let mut options = PackOptions::new(&offload);
    for source in &sources[..3] {
        drop(pack(source, &options).unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    // a is used again, so b is the stalest; c is in use.
    drop(pack(&sources[0], &options).unwrap());
    let in_use = pack(&sources[2], &options).unwrap().store;
    let one = list_packs(&offload).unwrap()[0].bytes;
    options.offload_limit = Some(one * 3 + one / 2);
    let made = pack(&sources[3], &options).unwrap();
    assert_eq!(made.packed.as_ref().unwrap().removed, ["model-b--bf16"]);
    assert!(made.notes[0].contains("model-b"));
    // No room whatever goes: nothing is removed, and the error says what would do.
    options.offload_limit = Some(one / 2);
    options.repack = true;
    let error = pack(&sources[1], &options).unwrap_err();
    assert_eq!(error.code(), Code::Space);
    assert_eq!(list_packs(&offload).unwrap().len(), 3);
    // A pack whose source is gone is perhaps the only copy: it does not make room by itself.
    drop((made, in_use));
    fs::remove_dir_all(&sources[0]).unwrap();
    options.offload_limit = Some(one * 2 + one / 2);
    drop(pack(&sources[1], &options).unwrap());
    let left: Vec<String> = list_packs(&offload)
        .unwrap()
        .into_iter()
        .map(|p| p.name)
        .collect();
    assert_eq!(left, ["model-a--bf16", "model-b--bf16"]);
}

#[test]
fn clean_removes_what_is_ours_and_nothing_else() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), true, Dtype::BF16);
    let offload = tmp.path().join("offload");
    let options = PackOptions::new(&offload);
    let packed = pack(&dir, &options).unwrap().store.dir.clone();
    fs::write(offload.join("README.md"), "stays").unwrap();
    // A folder of somebody's with the very names a pack has, but no mark of ours.
    let foreign = offload.join("mine");
    write_folder(
        &foreign,
        &config(true),
        &tensors(&config(true), |_| Dtype::BF16),
        1,
    );
    fs::write(
        foreign.join("manifest.json"),
        "{\"format\": \"other\", \"version\": 1}",
    )
    .unwrap();
    // An unfinished pack.
    let unfinished = offload.join("half--bf16");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("lock"), "tensorpager pack\npid 1\nhost x\n").unwrap();
    fs::write(unfinished.join("layer.000.dat"), [0; 4096]).unwrap();

    let dry = CleanOptions {
        stale: true,
        dry_run: true,
        ..CleanOptions::default()
    };
    let cleaned = clean(&offload, &dry).unwrap();
    assert_eq!(cleaned.removed[0].name, "half--bf16");
    assert!(unfinished.exists() && cleaned.bytes >= 4096);
    let stale = CleanOptions {
        dry_run: false,
        ..dry
    };
    clean(&offload, &stale).unwrap();
    assert!(!unfinished.exists() && packed.exists());

    fs::write(packed.join("notes.txt"), "the user's").unwrap();
    let cleaned = clean(&offload, &CleanOptions::default()).unwrap();
    let kept: Vec<&str> = cleaned.kept.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(kept, ["mine", "tiny--bf16"]);
    let left: Vec<_> = fs::read_dir(&packed)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["notes.txt"]);
    assert!(foreign.join("config.json").exists() && foreign.join("model.safetensors").exists());
    assert_eq!(
        fs::read_to_string(offload.join("README.md")).unwrap(),
        "stays"
    );
    // Neither is packed over: the next pack takes another folder.
    let made = pack(&dir, &options).unwrap();
    assert_ne!(made.store.dir, packed);
    assert!(packed.join("notes.txt").exists());

    let none = CleanOptions {
        name: Some("absent".to_string()),
        ..CleanOptions::default()
    };
    assert_eq!(clean(&offload, &none).unwrap_err().code(), Code::Usage);
    assert!(list_packs(&tmp.path().join("nowhere")).unwrap().is_empty());
}

#[test]
fn a_pack_whose_source_is_gone_is_stale_but_still_runs() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), true, Dtype::BF16);
    let offload = tmp.path().join("offload");
    let packed = pack(&dir, &PackOptions::new(&offload))
        .unwrap()
        .store
        .dir
        .clone();
    fs::remove_dir_all(&dir).unwrap();
    assert_eq!(
        list_packs(&offload).unwrap()[0].state,
        PackState::SourceGone
    );
    assert_holds(&Store::open_packed(&packed).unwrap(), &tensors);
}
