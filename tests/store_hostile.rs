//! A manifest written by somebody else, with a correct hash on top, opens only if it is exactly what the model needs.

mod store_common;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use store_common::*;
use tensorpager::error::{Code, Error};
use tensorpager::store::{PackOptions, Store, verify};
use tensorpager::units::Dtype;
use twox_hash::XxHash3_64;

struct Forge {
    _tmp: tempfile::TempDir,
    packed: PathBuf,
    original: Value,
}

impl Forge {
    fn new(tied: bool) -> Forge {
        let tmp = tempfile::tempdir().unwrap();
        let (dir, _) = source(tmp.path(), tied, Dtype::BF16);
        let options = PackOptions::new(tmp.path().join("offload"));
        let packed = Store::pack(&open(&dir), &options, &mut |_| {})
            .unwrap()
            .store
            .dir
            .clone();
        let mut original: Value =
            serde_json::from_slice(&fs::read(packed.join("manifest.json")).unwrap()).unwrap();
        original.as_object_mut().unwrap().shift_remove("xxh3");
        Forge {
            _tmp: tmp,
            packed,
            original,
        }
    }

    /// Writes the manifest with a change and opens the folder.
    fn open(&self, change: impl Fn(&mut Value)) -> Result<Store, Error> {
        let mut value = self.original.clone();
        change(&mut value);
        write_manifest(&self.packed, &value);
        let opened = Store::open_packed(&self.packed);
        let verified = verify(&self.packed, &Default::default(), &mut |_, _| {});
        if opened.is_err() {
            assert!(verified.is_err(), "verify accepts what cannot be opened");
        }
        opened
    }

    /// The change is refused as a store error; the message names `word`.
    fn refuses(&self, word: &str, change: impl Fn(&mut Value)) {
        let error = match self.open(change) {
            Ok(_) => panic!("accepted: {word}"),
            Err(e) => e,
        };
        assert_eq!(error.code(), Code::Store, "{error}");
        assert!(
            error.to_string().contains(word),
            "`{word}` is not in: {error}"
        );
    }
}

fn write_manifest(dir: &Path, value: &Value) {
    let text = serde_json::to_string_pretty(value).unwrap();
    let body = text.strip_prefix("{\n").unwrap();
    let hash = XxHash3_64::oneshot(body.as_bytes());
    fs::write(
        dir.join("manifest.json"),
        format!("{{\n  \"xxh3\": \"{hash:016x}\",\n{body}"),
    )
    .unwrap();
}

#[test]
fn an_unchanged_manifest_opens() {
    for tied in [false, true] {
        Forge::new(tied).open(|_| {}).unwrap();
    }
}

#[test]
fn unknown_words_are_refused() {
    let forge = Forge::new(false);
    forge.refuses("version 2", |v| v["version"] = json!(2));
    forge.refuses("format", |v| v["format"] = json!("other"));
    forge.refuses("zstd", |v| {
        v["units"][1]["extents"][0]["encoding"] = json!("zstd")
    });
    forge.refuses("expert", |v| v["units"][1]["kind"] = json!("expert"));
    forge.refuses("parts", |v| v["units"][1]["tensors"][0]["parts"] = json!(2));
    forge.refuses("float8", |v| {
        v["units"][1]["tensors"][0]["dtype"] = json!("float8")
    });
    forge.refuses("alignment", |v| v["align_bytes"] = json!(512));
    forge.refuses("alignment", |v| v["block_bytes"] = json!(4096));
    forge.refuses("float16", |v| v["dtype"] = json!("float16"));
    forge.refuses("model type", |v| v["model_type"] = json!("llama"));
    forge.refuses("surprise", |v| v["surprise"] = json!(1));
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let forge = Forge::new(false);
    let bad = [
        "../embed.dat",
        "/etc/passwd",
        "a/embed.dat",
        "embed.dat\0",
        "",
        "..",
        "config.json",
        "lock",
    ];
    for name in bad {
        forge.refuses("no name of a weight file", |v| {
            v["files"][0]["name"] = json!(name)
        });
    }
    forge.refuses("twice", |v| v["files"][1]["name"] = json!("embed.dat"));
    for name in [
        "../config.json",
        "/etc/shadow",
        "layer.000.dat",
        "manifest.json",
    ] {
        forge.refuses("belongs", |v| v["copies"][1]["name"] = json!(name));
    }
    forge.refuses("checksums", |v| {
        v["checksums"]["name"] = json!("../checksums.bin")
    });
    forge.refuses("config.json", |v| {
        v["copies"].as_array_mut().unwrap().clear()
    });
}

#[test]
fn impossible_numbers_are_refused() {
    let forge = Forge::new(false);
    let huge = u64::MAX;
    forge.refuses("impossible length", |v| {
        v["files"][0]["bytes"] = json!(huge)
    });
    forge.refuses("impossible length", |v| {
        v["files"][0]["bytes"] = json!(1u64 << 60)
    });
    forge.refuses("impossible length", |v| v["files"][0]["bytes"] = json!(0));
    forge.refuses("impossible length", |v| {
        v["files"][0]["bytes"] = json!(4097)
    });
    // Consistent but for the disk.
    forge.refuses("embed.dat", |v| {
        let bytes = v["files"][0]["bytes"].as_u64().unwrap();
        v["files"][0]["bytes"] = json!(bytes - 4096);
    });
    forge.refuses("checksums", |v| v["files"][0]["bytes"] = json!(1u64 << 50));
    forge.refuses("checksums", |v| v["checksums"]["bytes"] = json!(huge));
    forge.refuses("extent", |v| {
        v["units"][1]["extents"][0]["offset"] = json!(huge)
    });
    forge.refuses("encoding", |v| {
        v["units"][1]["extents"][0]["bytes"] = json!(huge)
    });
    forge.refuses("extent", |v| {
        v["units"][1]["extents"][0]["bytes"] = json!(huge);
        v["units"][1]["extents"][0]["stored_bytes"] = json!(huge);
    });
    forge.refuses("extent", |v| {
        v["units"][1]["extents"][0]["file"] = json!(4_000_000_000u32)
    });
    forge.refuses("length", |v| v["units"][1]["bytes"] = json!(huge));
    forge.refuses("outside the unit", |v| {
        v["units"][1]["tensors"][11]["offset"] = json!(1u64 << 40)
    });
    forge.refuses("impossible", |v| {
        v["units"][1]["tensors"][11]["offset"] = json!(huge)
    });
    forge.refuses("shape", |v| {
        v["units"][1]["tensors"][0]["shape"] = json!([usize::MAX, usize::MAX])
    });
    forge.refuses("shape", |v| {
        v["units"][1]["tensors"][0]["first_row"] = json!(1)
    });
    forge.refuses("outside the unit", |v| {
        v["units"][1]["extents"] = json!([]);
        v["units"][1]["bytes"] = json!(0);
    });
}

#[test]
fn overlaps_and_mixed_up_units_are_refused() {
    let forge = Forge::new(false);
    // Layer 1 read from layer 0's file.
    forge.refuses("overlap", |v| {
        v["units"][2]["extents"][0]["file"] = json!(1)
    });
    forge.refuses("overlaps the tensor", |v| {
        v["units"][1]["tensors"][1]["offset"] = json!(0)
    });
    forge.refuses("layer 0", |v| {
        let units = v["units"].as_array_mut().unwrap();
        units.swap(1, 2);
    });
    forge.refuses("units", |v| drop(v["units"].as_array_mut().unwrap().pop()));
    forge.refuses("instead of", |v| {
        v["units"][1]["tensors"].as_array_mut().unwrap().swap(1, 3)
    });
    forge.refuses("tensors", |v| {
        drop(v["units"][1]["tensors"].as_array_mut().unwrap().pop())
    });
    forge.refuses("two types", |v| {
        let first_head = v["units"]
            .as_array()
            .unwrap()
            .iter()
            .position(|u| u["kind"] == "head")
            .unwrap();
        v["units"][first_head]["tensors"][0]["dtype"] = json!("float16");
    });
}

#[test]
fn a_tied_head_is_the_embedding_and_nothing_else() {
    let forge = Forge::new(true);
    let head = |v: &Value| {
        v["units"]
            .as_array()
            .unwrap()
            .iter()
            .position(|u| u["kind"] == "head")
            .unwrap()
    };
    forge.refuses("embedding's rows", |v| {
        let h = head(v);
        let offset = v["units"][h + 1]["extents"][0]["offset"].as_u64().unwrap();
        v["units"][h + 1]["extents"][0]["offset"] = json!(offset - 256);
    });
    forge.refuses("embedding's rows", |v| {
        let h = head(v);
        v["units"][h]["extents"][0]["file"] = json!(1);
        // Kept within the layer's file, so that only the rows are wrong.
        let bytes = v["files"][1]["bytes"].as_u64().unwrap();
        let unit = v["units"][h]["bytes"].as_u64().unwrap();
        assert!(unit <= bytes);
    });
}

#[test]
fn another_config_is_not_this_pack_s() {
    let forge = Forge::new(false);
    let mut other = config(false);
    other["rope_theta"] = json!(5000.0);
    fs::write(forge.packed.join("config.json"), other.to_string()).unwrap();
    forge.refuses("config.json", |_| {});
    // Even with its hash put right the units must be the config's.
    other["num_hidden_layers"] = json!(2);
    let raw = other.to_string();
    fs::write(forge.packed.join("config.json"), &raw).unwrap();
    forge.refuses("units", |v| {
        let record = &mut v["copies"][0];
        assert_eq!(record["name"], "config.json");
        record["bytes"] = json!(raw.len());
        record["xxh3"] = json!(format!("{:016x}", XxHash3_64::oneshot(raw.as_bytes())));
    });
}

#[test]
fn another_source_s_identity_fits_no_block() {
    let forge = Forge::new(false);
    let store = forge
        .open(|v| v["source"]["identity"] = json!("0123456789abcdef"))
        .unwrap();
    let raw = fs::read(&store.files[0].path).unwrap();
    assert_eq!(
        store
            .checksums
            .check(tensorpager::units::FileId(0), 0, &raw),
        Err(0)
    );
}
