//! Packs over time: damage is found and named, changed sources are packed anew, room is made, only what is ours is removed.

mod store_common;

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use store_common::*;
use tensorpager::error::{Code, Result};
use tensorpager::store::{
    CleanOptions, PackOptions, PackState, Prepared, ProblemKind, Store, clean, list_packs, verify,
};
use tensorpager::units::Dtype;

fn pack(source: &Path, options: &PackOptions) -> Result<Prepared> {
    Store::pack(&open(source), options, &mut |_| {})
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

// hazard: other-source: packed anew; another source gets its own folder
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

#[test]
fn what_a_killed_packer_left_before_its_mark_is_taken_over() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), true, Dtype::BF16);
    let offload = tmp.path().join("offload");
    let packed = offload.join("tiny--bf16");
    for half_a_mark in [false, true] {
        fs::create_dir_all(&packed).unwrap();
        if half_a_mark {
            fs::write(packed.join("lock.tmp"), "tensorp").unwrap();
        }
        assert_eq!(
            list_packs(&offload).unwrap()[0].state,
            PackState::Unfinished
        );
        let made = pack(&dir, &PackOptions::new(&offload)).unwrap();
        assert_eq!(made.store.dir, packed);
        assert!(!packed.join("lock.tmp").exists());
        drop(made);
        clean(&offload, &CleanOptions::default()).unwrap();
        fs::create_dir_all(&packed).unwrap();
        let cleaned = clean(&offload, &CleanOptions::default()).unwrap();
        assert!(cleaned.removed.len() == 1 && !packed.exists());
    }
}
