//! The promise: no byte is used that was not verified, whatever the way in, and whatever is wrong with it.

mod common;
mod engine_common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine_common::{
    accelerate, checkpoint, fixture, in_place, open, packed, same_bits, score, scoring,
};
use serde_json::{Value, json};
use tensorpager::checkpoint::write_synthetic;
use tensorpager::engine::{Engine, EngineOptions};
use tensorpager::error::Code;
use tensorpager::paging::{PagingStats, Placement, Tier};
use tensorpager::spec::UnitKind;
use tensorpager::store::{PackOptions, Store};

const BLOCK: usize = 65_536;

fn options(placement: Placement, depth: usize) -> EngineOptions {
    EngineOptions {
        placement,
        prefetch_depth: Some(depth),
        page_bytes: Some(2 * BLOCK as u64),
        ..scoring(128)
    }
}

/// The counters once the reading thread has nothing left to read ahead.
fn settled(engine: &Engine) -> PagingStats {
    let mut last = engine.stats().paging;
    let until = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(60));
        let now = engine.stats().paging;
        if (now.disk_bytes, now.verified_bytes) == (last.disk_bytes, last.verified_bytes) {
            return now;
        }
        last = now;
    }
    panic!("the reading thread does not come to rest");
}

// hazard: unverified: counted on every way in: bytes read = bytes verified, and every byte used is among them
#[test]
fn bytes_used_are_bytes_verified_on_every_way_in() {
    let dir = tempfile::tempdir().unwrap();
    let ways = [
        ("packed", packed("qwen2-bf16", dir.path())),
        ("packed, tied", packed("qwen2-f16-tied", dir.path())),
        ("in place", in_place("qwen2-bf16")),
        ("in place, shards", in_place("llama3-bf16")),
        ("accelerate", accelerate()),
    ];
    for (way, store) in &ways {
        for placement in [Placement::Disk, Placement::Auto, Placement::Cpu] {
            for depth in [0, 2] {
                let what = format!("{way}, {placement:?}, depth {depth}");
                let mut engine = open(store, &options(placement.clone(), depth)).unwrap();
                let loaded = settled(&engine);
                assert_eq!(loaded.disk_bytes, loaded.verified_bytes, "{what}, loading");
                for round in 0..3 {
                    score(&mut engine, &[vec![1, 2, 3], vec![200, 7]]).unwrap();
                    let s = settled(&engine);
                    assert_eq!(s.disk_bytes, s.verified_bytes, "{what}, round {round}");
                    assert!(s.used_bytes <= s.verified_bytes, "{what}: {s:?}");
                    assert_eq!(s.rereads, 0);
                }
            }
        }
    }
}

/// Every other layer in RAM, the rest on disk.
fn half_in_ram(store: &Store) -> Placement {
    let tiers = store.units.iter().map(|u| match u.kind {
        UnitKind::Layer(i) if i % 2 == 0 => Tier::Cpu,
        UnitKind::Norm => Tier::Cpu,
        _ => Tier::Disk,
    });
    Placement::Units(tiers.collect())
}

#[test]
fn a_pass_reads_what_is_not_resident_and_the_next_one_is_read_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let store = packed("qwen2-bf16", dir.path());
    let ids = [vec![1, 2, 3]];
    // A part in RAM: passes use what is not, once each, and rows of the embedding from whole blocks.
    let mut engine = open(&store, &options(half_in_ram(&store), 1)).unwrap();
    let streamed = engine.plan().streamed_bytes;
    assert!(streamed > 0 && engine.plan().resident_bytes > streamed / 4);
    let before = settled(&engine);
    const PASSES: u64 = 3;
    for _ in 0..PASSES {
        score(&mut engine, &ids).unwrap();
    }
    let now = settled(&engine);
    let of_units =
        (now.used_bytes - now.gathered_bytes) - (before.used_bytes - before.gathered_bytes);
    assert_eq!(
        of_units,
        PASSES * streamed,
        "what rests in RAM is read again, or something is left out"
    );
    drop(engine);
    // All in RAM: after loading, a pass takes nothing but embedding rows, and those come from RAM too or from one block.
    let mut engine = open(&store, &options(Placement::Cpu, 1)).unwrap();
    let before = settled(&engine);
    score(&mut engine, &ids).unwrap();
    score(&mut engine, &ids).unwrap();
    let read = settled(&engine).disk_bytes - before.disk_bytes;
    assert!(
        read <= 4 * BLOCK as u64,
        "{read} bytes read with all units in RAM"
    );
    // All on disk: while a pass runs, as much is read of the next one as was there of this one when it began.
    let mut engine = open(&store, &options(Placement::Disk, 1)).unwrap();
    let mut last = settled(&engine);
    for pass in 1..=3 {
        score(&mut engine, &ids).unwrap();
        let now = settled(&engine);
        let (read, used) = (
            now.disk_bytes - last.disk_bytes,
            now.used_bytes - last.used_bytes,
        );
        assert!(
            used > 0 && read >= used,
            "pass {pass}: {read} bytes read, {used} used: the next one is not read ahead"
        );
        last = now;
    }
}

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16"
    })
}

/// A pack whose files have several blocks each. `seed` changes one weight, and with it the source.
fn blocks_of(dir: &Path, seed: u8) -> Store {
    let source = dir.join(format!("source-{seed}"));
    write_synthetic(&source, &config(), &mut |_, _| Ok(())).unwrap();
    let weights = source.join("model.safetensors");
    let len = fs::metadata(&weights).unwrap().len();
    let file = fs::File::options().write(true).open(&weights).unwrap();
    file.write_all_at(&[seed], len - 1000).unwrap();
    let options = PackOptions::new(dir.join(format!("offload-{seed}")));
    Store::pack(&checkpoint(&source, None), &options, &mut |_| {})
        .unwrap()
        .store
}

fn file_of(store: &Store, name: &str) -> PathBuf {
    let found = store.files.iter().find(|f| f.path.ends_with(name));
    found.unwrap_or_else(|| panic!("no {name}")).path.clone()
}

/// What a run over the store ends with.
fn verdict(store: &Store, depth: usize) -> Result<Vec<Vec<f32>>, tensorpager::error::Error> {
    score(
        &mut open(store, &options(Placement::Disk, depth))?,
        &[vec![1, 2, 3]],
    )
}

// hazard: wrong-block: one error; names unit, file and block
#[test]
fn a_block_in_the_wrong_place_or_of_an_older_pack_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, other) = (blocks_of(dir.path(), 1), blocks_of(dir.path(), 2));
    let clean = verdict(&store, 1).unwrap();
    let (layer_0, layer_1) = (
        file_of(&store, "layer.000.dat"),
        file_of(&store, "layer.001.dat"),
    );
    let whole = fs::read(&layer_0).unwrap();
    let beside = fs::read(&layer_1).unwrap();
    let stale = fs::read(file_of(&other, "layer.000.dat")).unwrap();
    assert!(whole.len() > 4 * BLOCK && whole != beside);
    let block = |bytes: &[u8], i: usize| bytes[i * BLOCK..(i + 1) * BLOCK].to_vec();
    for (what, at, bytes) in [
        ("the neighbour within one read", 0, block(&whole, 1)),
        (
            "the neighbour within one read, the other way",
            1,
            block(&whole, 0),
        ),
        ("a block of another read", 3, block(&whole, 0)),
        ("the same block of another file", 2, block(&beside, 2)),
        (
            "the same block of another pack of the model",
            2,
            block(&stale, 2),
        ),
        ("zeros", 1, vec![0; BLOCK]),
    ] {
        let mut damaged = whole.clone();
        damaged[at * BLOCK..(at + 1) * BLOCK].copy_from_slice(&bytes);
        if damaged == whole {
            // Equal weights make equal blocks: then only the place is wrong, which the seed of the checksum must tell.
            continue;
        }
        fs::write(&layer_0, &damaged).unwrap();
        let e = verdict(&store, 1)
            .err()
            .unwrap_or_else(|| panic!("{what} was taken"));
        assert_eq!(e.code(), Code::Corrupt, "{what}: {e}");
        for word in ["layer 0", "layer.000.dat", &format!("block {at}")] {
            assert!(e.what().contains(word), "{what}: {word}: {e}");
        }
    }
    fs::write(&layer_0, &whole).unwrap();
    assert!(same_bits(&verdict(&store, 1).unwrap(), &clean));
}

/// Flips of one bit each, at seeded places all over the weights; `FLIPS` of them.
// hazard: bit-rot: every single-bit flip of a seeded sample is caught before use
#[test]
fn every_single_flipped_bit_is_caught() {
    let flips: u64 = std::env::var("FLIPS").map_or(120, |n| n.parse().expect("a number"));
    let dir = tempfile::tempdir().unwrap();
    let store = packed("qwen2-bf16", dir.path());
    let clean = verdict(&store, 1).unwrap();
    let total: u64 = store.files.iter().map(|f| f.bytes).sum();
    let seed = std::env::var("FLIP_SEED").map_or(1, |n| n.parse().expect("a number"));
    let mut random = 0x1234_5678_9abc_def1u64 ^ seed;
    let mut caught = 0;
    for n in 0..flips {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let (mut at, bit) = ((random >> 3) % total, (random & 7) as u8);
        let file = store.files.iter().find(|f| match at < f.bytes {
            true => true,
            false => {
                at -= f.bytes;
                false
            }
        });
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(&file.unwrap().path)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
        // Every row of the embedding is asked for, so that every block of it is used.
        let vocab: Vec<u32> = (0..store.spec.vocab as u32).collect();
        let inputs: Vec<Vec<u32>> = vocab.chunks(96).map(<[u32]>::to_vec).collect();
        let ended =
            open(&store, &options(Placement::Disk, 1)).and_then(|mut e| score(&mut e, &inputs));
        match ended {
            Err(e) if e.code() == Code::Corrupt => caught += 1,
            Err(e) => panic!("flip {n}: {e}"),
            Ok(_) => println!("flip {n} of byte {at}, bit {bit}, was not caught"),
        }
        file.write_all_at(&byte, at).unwrap();
    }
    println!("{caught} of {flips} single-bit flips caught before use");
    assert_eq!(caught, flips);
    assert!(same_bits(&verdict(&store, 1).unwrap(), &clean));
}

// hazard: deleted: success: open files stay until the run ends
#[test]
fn a_folder_deleted_under_a_run_changes_nothing_until_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let offload = dir.path().join("offload");
    let store = packed("qwen2-bf16", &offload);
    let mut engine = open(&store, &options(Placement::Disk, 1)).unwrap();
    let ids = [vec![1, 2, 3, 4]];
    let clean = score(&mut engine, &ids).unwrap();
    fs::remove_dir_all(&offload).unwrap();
    for _ in 0..3 {
        assert!(same_bits(&score(&mut engine, &ids).unwrap(), &clean));
    }
    drop(engine);
    let e = open(&store, &options(Placement::Disk, 1))
        .err()
        .expect("nothing is there");
    assert!(matches!(e.code(), Code::Io), "{e}");
    assert!(fixture("qwen2-bf16").exists());
}
