//! Packed or in place, every tensor comes back as the source has it, or as a plain cast of it.

mod store_common;

use std::fs;
use std::path::Path;

use store_common::*;
use tensorpager::error::Code;
use tensorpager::spec::UnitKind;
use tensorpager::store::{
    DtypeLabel, DtypePolicy, InPlace, PackOptions, Prepared, Store, describe, verify,
};
use tensorpager::units::{BLOCK_BYTES, Dtype, FileId};

fn pack(source: &Path, options: &PackOptions) -> Prepared {
    Store::pack(&open(source), options, &mut |_| {}).unwrap()
}

#[test]
fn packed_and_in_place_hold_the_same_bytes() {
    for tied in [false, true] {
        for shards in [1, 3] {
            let tmp = tempfile::tempdir().unwrap();
            let dir = tmp.path().join("tiny");
            let config = config(tied);
            let tensors = tensors(&config, |_| Dtype::BF16);
            write_folder(&dir, &config, &tensors, shards);
            let in_place = Store::open_in_place(&open(&dir)).unwrap();
            assert!(in_place.in_place && in_place.checksums.recorded());
            assert_holds(&in_place, &tensors);
            let made = pack(&dir, &PackOptions::new(tmp.path().join("offload")));
            assert!(made.packed.is_some());
            assert_eq!(made.notes, Vec::<String>::new());
            assert!(!made.store.in_place && !made.store.checksums.recorded());
            assert_holds(&made.store, &tensors);
            assert_eq!(contents(&made.store), contents(&in_place));
            assert_eq!(made.store.spec, in_place.spec);
            assert_eq!(made.store.dtype, DtypeLabel::Uniform(Dtype::BF16));
        }
    }
}

#[test]
fn accelerate_folders_pack_and_run_in_place() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("offloaded");
    let config = config(false);
    let tensors = tensors(&config, |_| Dtype::F32);
    write_accelerate(&dir, &config, &tensors);
    assert_holds(&Store::open_in_place(&open(&dir)).unwrap(), &tensors);
    let info = describe(&open(&dir)).unwrap();
    assert!(
        info.notes.iter().any(|n| n.contains("halves")),
        "{:?}",
        info.notes
    );
    let mut options = PackOptions::new(tmp.path().join("offload"));
    options.dtype = DtypePolicy::One(Dtype::BF16);
    let store = pack(&dir, &options).store;
    assert_holds(&store, &tensors);
    assert_eq!(store.dir.file_name().unwrap(), "offloaded--bf16");
}

#[test]
fn every_cast_is_the_plain_one() {
    let types = [Dtype::F16, Dtype::BF16, Dtype::F32];
    for from in types {
        for to in types {
            let tmp = tempfile::tempdir().unwrap();
            let (dir, tensors) = source(tmp.path(), false, from);
            let mut options = PackOptions::new(tmp.path().join("offload"));
            options.dtype = DtypePolicy::One(to);
            let store = pack(&dir, &options).store;
            assert_eq!(store.dtype, DtypeLabel::Uniform(to));
            assert!(store.dir.ends_with(format!("tiny--{}", to.short())));
            assert_holds(&store, &tensors);
        }
    }
}

#[test]
fn chunk_sizes_do_not_matter() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), false, Dtype::F32);
    let mut all = Vec::new();
    for (i, buffer_bytes) in [1, 12 * 65536 * 2, 48 << 20].into_iter().enumerate() {
        let mut options = PackOptions::new(tmp.path().join(format!("offload{i}")));
        options.dtype = DtypePolicy::One(Dtype::F16);
        options.buffer_bytes = buffer_bytes;
        let store = pack(&dir, &options).store;
        assert_holds(&store, &tensors);
        let files = store.files.iter().map(|f| fs::read(&f.path).unwrap());
        all.push((
            files.collect::<Vec<_>>(),
            fs::read(store.dir.join("checksums.bin")).unwrap(),
        ));
    }
    assert!(all.windows(2).all(|w| w[0] == w[1]));
}

#[test]
fn a_map_mixes_types_and_the_longest_prefix_wins() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), false, Dtype::BF16);
    let map = tmp.path().join("map.json");
    fs::write(
        &map,
        r#"{"model.layers": "float16", "model.layers.1.mlp": "float32"}"#,
    )
    .unwrap();
    let mut options = PackOptions::new(tmp.path().join("offload"));
    options.dtype = DtypePolicy::parse(map.to_str().unwrap()).unwrap();
    let store = pack(&dir, &options).store;
    assert!(store.dir.ends_with("tiny--mixed"));
    assert_eq!(store.dtype, DtypeLabel::Mixed);
    assert_holds(&store, &tensors);
    let of = |name: &str| {
        let mut places = store.units.iter().flat_map(|u| &u.places);
        places.find(|p| p.name == name).unwrap().dtype
    };
    assert_eq!(of("model.layers.1.mlp.up_proj.weight"), Dtype::F32);
    assert_eq!(of("model.layers.1.self_attn.q_proj.weight"), Dtype::F16);
    assert_eq!(of("lm_head.weight"), Dtype::BF16);
    drop(store);
    // Another mixture of the same source has a folder of its own; both stay.
    fs::write(&map, r#"{"model.layers": "float32"}"#).unwrap();
    options.dtype = DtypePolicy::parse(map.to_str().unwrap()).unwrap();
    let other = pack(&dir, &options).store;
    let name = other.dir.file_name().unwrap().to_str().unwrap().to_string();
    assert!(
        name.starts_with("tiny--mixed-") && name.len() == "tiny--mixed-".len() + 8,
        "{name}"
    );
    assert_holds(&other, &tensors);
}

#[test]
fn the_folder_is_laid_out_as_documented() {
    for tied in [false, true] {
        let tmp = tempfile::tempdir().unwrap();
        let (dir, _) = source(tmp.path(), tied, Dtype::BF16);
        let store = pack(&dir, &PackOptions::new(tmp.path().join("offload"))).store;
        let names: Vec<String> = store
            .files
            .iter()
            .map(|f| f.path.file_name().unwrap().to_str().unwrap().to_string())
            .collect();
        assert_eq!(
            names[..5],
            [
                "embed.dat",
                "layer.000.dat",
                "layer.001.dat",
                "layer.002.dat",
                "norm.dat"
            ]
        );
        assert_eq!(
            names.iter().any(|n| n.starts_with("head.")),
            !tied,
            "{names:?}"
        );
        let layer_bytes = store
            .units
            .iter()
            .find(|u| u.kind == UnitKind::Layer(0))
            .unwrap()
            .bytes;
        for unit in &store.units {
            assert_eq!(unit.extents.len(), 1);
            assert!(unit.places.iter().all(|p| p.offset % 256 == 0));
            if let UnitKind::Head(_) = unit.kind {
                assert!(unit.bytes <= layer_bytes);
                let file = &names[unit.extents[0].file.index()];
                assert_eq!(file == "embed.dat", tied);
            }
        }
        for file in &store.files {
            assert_eq!(file.bytes % 4096, 0);
            assert_eq!(fs::metadata(&file.path).unwrap().len(), file.bytes);
        }
        for copy in ["config.json", "tokenizer.json", "generation_config.json"] {
            assert_eq!(
                fs::read(store.dir.join(copy)).unwrap(),
                fs::read(dir.join(copy)).unwrap()
            );
        }
        // Padding is zeros.
        let unit = &store.units[1];
        let raw = fs::read(&store.files[unit.extents[0].file.index()].path).unwrap();
        let mut end = 0;
        for p in &unit.places {
            assert!(raw[end..p.offset as usize].iter().all(|&b| b == 0));
            end = (p.offset + p.bytes()) as usize;
        }
        assert!(raw[end..].iter().all(|&b| b == 0));
    }
}

#[test]
fn a_pack_is_found_again_and_is_itself_a_model() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, tensors) = source(tmp.path(), true, Dtype::BF16);
    let options = PackOptions::new(tmp.path().join("offload"));
    let first = pack(&dir, &options);
    let second = pack(&dir, &options);
    assert!(first.packed.is_some() && second.packed.is_none());
    assert_eq!(first.store.dir, second.store.dir);
    let itself = open(&first.store.dir);
    let third = Store::prepare(&itself, &options, &mut |_| {}).unwrap();
    assert!(third.packed.is_none());
    assert_eq!(third.store.dir, first.store.dir);
    assert_holds(&third.store, &tensors);
    assert_eq!(describe(&itself).unwrap().kind, "packed");
    // Casting a pack is refused.
    let mut cast = options.clone();
    cast.dtype = DtypePolicy::One(Dtype::F16);
    let error = Store::prepare(&itself, &cast, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), Code::Usage);
}

#[test]
fn checksums_of_a_pack_fit_every_block_and_catch_every_flip() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), false, Dtype::BF16);
    let store = pack(&dir, &PackOptions::new(tmp.path().join("offload"))).store;
    for (i, file) in store.files.iter().enumerate() {
        let id = FileId(i as u32);
        let mut raw = fs::read(&file.path).unwrap();
        assert_eq!(store.checksums.check(id, 0, &raw), Ok(()));
        for at in (0..raw.len()).step_by(raw.len() / 7 + 1) {
            raw[at] ^= 1 << (at % 8);
            assert_eq!(
                store.checksums.check(id, 0, &raw),
                Err(at as u64 / BLOCK_BYTES)
            );
            raw[at] ^= 1 << (at % 8);
        }
    }
    let report = verify(&store.dir, &Default::default(), &mut |_, _| {}).unwrap();
    assert!(report.is_good() && report.problems.is_empty(), "{report:?}");
    assert_eq!(
        report.bytes,
        store.files.iter().map(|f| f.bytes).sum::<u64>()
    );
}

#[test]
fn in_place_merges_neighbours_and_refuses_casts() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), false, Dtype::BF16);
    let mut options = PackOptions::new(tmp.path().join("offload"));
    options.in_place = InPlace::Always;
    let store = Store::prepare(&open(&dir), &options, &mut |_| {})
        .unwrap()
        .store;
    // One file, tensors by name: a layer's tensors are neighbours.
    let layers = store
        .units
        .iter()
        .filter(|u| matches!(u.kind, UnitKind::Layer(_)));
    assert!(
        layers
            .clone()
            .all(|u| u.extents.len() == 1 && u.places.len() == 12)
    );
    assert!(!tmp.path().join("offload").exists(), "nothing is written");
    options.dtype = DtypePolicy::One(Dtype::F16);
    let error = Store::prepare(&open(&dir), &options, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), Code::Usage);
    assert!(error.fix().contains("--in-place"));
}

// hazard: nonfinite: counted and told; refused on request
// hazard: overflow: counted; refused unless allowed
#[test]
fn what_float16_cannot_hold_is_counted_and_refused_unless_allowed() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("tiny");
    let config = config(false);
    let mut tensors = tensors(&config, |_| Dtype::BF16);
    let set = |t: &mut Tensors, name: &str, at: usize, value: f32| {
        let bytes = half::bf16::from_f32(value).to_le_bytes();
        t.get_mut(name).unwrap().bytes[2 * at..2 * at + 2].copy_from_slice(&bytes);
    };
    set(&mut tensors, "model.norm.weight", 3, 1e6);
    set(&mut tensors, "model.norm.weight", 63, -1e6);
    set(&mut tensors, "lm_head.weight", 64 * 1000 + 63, 7e4);
    set(&mut tensors, "lm_head.weight", 5, f32::NAN);
    set(&mut tensors, "lm_head.weight", 6, f32::NEG_INFINITY);
    write_folder(&dir, &config, &tensors, 1);
    let mut options = PackOptions::new(tmp.path().join("offload"));
    options.dtype = DtypePolicy::One(Dtype::F16);
    let error = Store::pack(&open(&dir), &options, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), Code::Unsupported);
    assert!(error.cause().contains("model.norm.weight (2)"), "{error}");
    assert!(error.cause().contains("lm_head.weight (1)"), "{error}");
    assert_eq!(
        fs::read_dir(tmp.path().join("offload")).unwrap().count(),
        0,
        "nothing stays"
    );
    options.allow_overflow = true;
    let made = pack(&dir, &options);
    assert_holds(&made.store, &tensors);
    let report = made.packed.unwrap();
    let head = report
        .warnings
        .iter()
        .find(|w| w.tensor == "lm_head.weight")
        .unwrap();
    assert_eq!((head.nan, head.infinite, head.overflow), (1, 1, 1));
    assert_eq!(made.notes.len(), 2);
    // The same weights kept as they are: only the broken ones are worth a word, and they can be refused.
    options.dtype = DtypePolicy::Auto;
    assert_eq!(pack(&dir, &options).notes.len(), 1);
    options.repack = true;
    options.refuse_nonfinite = true;
    let error = Store::pack(&open(&dir), &options, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), Code::Checkpoint);
    assert!(error.cause().contains("lm_head.weight (2)"), "{error}");
}

#[test]
fn an_entry_of_the_map_that_fits_nothing_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, _) = source(tmp.path(), false, Dtype::BF16);
    let mut options = PackOptions::new(tmp.path().join("offload"));
    let map = [("model.layer".to_string(), Dtype::F32)];
    options.dtype = DtypePolicy::Map(map.into_iter().collect());
    let error = Store::pack(&open(&dir), &options, &mut |_| {}).unwrap_err();
    assert!(error.what().contains("`model.layer`"), "{error}");
}

#[test]
fn every_fixture_packs_to_what_it_holds_in_place() {
    let Some(fixtures) = std::env::var_os("TENSORPAGER_FIXTURES") else {
        println!("skipped: TENSORPAGER_FIXTURES names no folder of checkpoints");
        return;
    };
    let tmp = tempfile::tempdir().unwrap();
    let mut packed = 0;
    for entry in fs::read_dir(fixtures).unwrap() {
        let dir = entry.unwrap().path();
        let weights = ["model.safetensors", "model.safetensors.index.json"];
        if !dir.join("config.json").exists() || weights.iter().all(|w| !dir.join(w).exists()) {
            continue;
        }
        let in_place = Store::open_in_place(&open(&dir)).unwrap();
        let made = pack(&dir, &PackOptions::new(tmp.path()));
        assert!(
            contents(&made.store) == contents(&in_place),
            "{}",
            dir.display()
        );
        assert_eq!(made.store.spec, in_place.spec);
        packed += 1;
    }
    assert!(packed > 0, "no checkpoint there");
}
