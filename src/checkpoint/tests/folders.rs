//! Sound folders of every kind, and each way in which one can be incomplete or hostile.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode};
use serde_json::json;

use super::{assert_bytes, check, open, open_external, refused, tensors};
use crate::checkpoint::testing::{self, Tensor};
use crate::checkpoint::{Checkpoint, OpenOptions, SourceKind};
use crate::error::Code;
use crate::units::FileId;

#[test]
fn one_file_and_shards_hold_the_same_tensors() {
    let (one, many) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    testing::write_single(one.path(), &testing::config(), &tensors());
    testing::write_shards(many.path(), &testing::config(), &tensors(), 5);
    for dir in [one.path(), many.path()] {
        let checkpoint = open(dir).unwrap();
        assert_eq!(checkpoint.kind, SourceKind::HfFolder);
        assert_eq!(checkpoint.label, dir.file_name().unwrap().to_str().unwrap());
        assert_bytes(&checkpoint, &tensors());
        assert_eq!(check(&checkpoint).unwrap(), Vec::<String>::new());
        assert_eq!(checkpoint.identity.files.len(), checkpoint.files.len());
        checkpoint.check_unchanged().unwrap();
    }
    assert_eq!(
        open(many.path()).unwrap().files.len(),
        tensors().len().div_ceil(5)
    );
}

// hazard: disagrees: refused; names the tensor, its shape or type, and what the config asks for
// hazard: tensors: missing: refused; names the tensor
#[test]
fn missing_and_foreign_tensors_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let full = tensors();
    let reopen = |list: &[Tensor]| {
        testing::write_single(dir.path(), &testing::config(), list);
        check(&open(dir.path()).unwrap())
    };
    for gone in 0..full.len() {
        let mut list = full.clone();
        let name = list.remove(gone).name;
        let error = reopen(&list).unwrap_err();
        assert_eq!(error.code(), Code::Checkpoint);
        assert!(error.what().contains(&name), "{error}");
    }
    let change = |at: usize, f: &dyn Fn(&mut Tensor)| {
        let mut list = full.clone();
        f(&mut list[at]);
        reopen(&list).unwrap_err()
    };
    let at = |end: &str| full.iter().position(|t| t.name.ends_with(end)).unwrap();
    let up = at("1.mlp.up_proj.weight");
    let error = change(up, &|t| t.shape.reverse());
    assert_eq!(error.code(), Code::Checkpoint, "{error}");
    assert!(
        error.what().contains(&full[up].name) && error.what().contains("shape"),
        "{error}"
    );
    let error = change(2, &|t| t.dtype = "I16");
    assert_eq!(error.code(), Code::Unsupported, "{error}");
    assert!(
        error.what().contains(&full[2].name) && error.what().contains("I16"),
        "{error}"
    );
}

// hazard: tensors: extra: told; refused where ignoring it would compute another model
#[test]
fn extra_tensors_are_told_and_those_that_change_the_model_refused() {
    let dir = tempfile::tempdir().unwrap();
    let with = |name: &str, dtype: &'static str| {
        let mut list = tensors();
        list.push(Tensor {
            name: name.to_string(),
            dtype,
            shape: vec![2],
            data: vec![0; 4],
        });
        testing::write_single(dir.path(), &testing::config(), &list);
        check(&open(dir.path()).unwrap())
    };
    for (name, dtype) in [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "BF16"),
        ("model.layers.2.input_layernorm.weight", "BF16"),
        ("something.position_ids", "U16"),
    ] {
        assert_eq!(with(name, dtype).unwrap(), [name]);
    }
    for name in [
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "lm_head.bias",
    ] {
        let error = with(name, "BF16").unwrap_err();
        assert_eq!(error.code(), Code::Config);
        assert!(error.what().contains(name), "{error}");
    }
}

#[test]
fn a_tensor_under_two_names_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut list = tensors();
    let mut twin = list[0].clone();
    twin.name = "model.language_model.embed_tokens.weight".to_string();
    list.push(twin);
    testing::write_single(dir.path(), &testing::config(), &list);
    refused(
        open(dir.path()),
        Code::Checkpoint,
        &["twice", "embed_tokens"],
    );
}

fn write_index(dir: &Path, text: &str) {
    fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}

// hazard: shard-names: refused; plain names of the folder itself only
#[test]
fn hostile_shard_indexes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_shards(dir.path(), &testing::config(), &tensors(), 100);
    let shard = "model-00001-of-00001.safetensors";
    let index = |name: &str, shard: &str| json!({"weight_map": {name: shard}}).to_string();
    write_index(dir.path(), &index("model.norm.weight", shard));
    assert_eq!(
        open(dir.path()).unwrap().tensors.len(),
        1,
        "the index decides"
    );

    for file in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "weights.bin",
        "a\\b.safetensors",
    ] {
        write_index(dir.path(), &index("model.norm.weight", file));
        refused(open(dir.path()), Code::Checkpoint, &["index", "plain name"]);
    }
    write_index(dir.path(), &index("model.norm.weight", "gone.safetensors"));
    refused(open(dir.path()), Code::Checkpoint, &["gone.safetensors"]);
    write_index(dir.path(), &index("model.gone", shard));
    refused(open(dir.path()), Code::Checkpoint, &["model.gone", shard]);
    for text in [
        "{}".to_string(),
        "not json".to_string(),
        json!({"weight_map": []}).to_string(),
        json!({"weight_map": {"../x": shard}}).to_string(),
        format!(
            r#"{{"weight_map": {{"model.norm.weight": "{shard}", "model.norm.weight": "{shard}"}}}}"#
        ),
        format!(r#"{{"weight_map": {{"a": "{shard}"}}, "weight_map": {{"b": "{shard}"}}}}"#),
    ] {
        write_index(dir.path(), &text);
        refused(open(dir.path()), Code::Checkpoint, &["index.json"]);
    }
}

// hazard: links: refused unless `--allow-external`; names both ends
#[test]
fn links_stay_inside_unless_allowed() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    testing::write_single(other.path(), &testing::config(), &tensors());
    fs::copy(
        other.path().join("config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();
    let link = dir.path().join("model.safetensors");
    symlink(other.path().join("model.safetensors"), &link).unwrap();
    refused(
        open(dir.path()),
        Code::Checkpoint,
        &["model.safetensors", "outside", "--allow-external"],
    );
    assert_bytes(&open_external(dir.path()).unwrap(), &tensors());

    fs::remove_file(&link).unwrap();
    fs::copy(
        other.path().join("model.safetensors"),
        dir.path().join("inner"),
    )
    .unwrap();
    symlink("inner", &link).unwrap();
    let checkpoint = open(dir.path()).unwrap();
    assert_bytes(&checkpoint, &tensors());
    assert!(
        checkpoint.files[0].path.ends_with("inner"),
        "no link is left to follow"
    );

    fs::remove_file(dir.path().join("config.json")).unwrap();
    symlink("/etc/hostname", dir.path().join("config.json")).unwrap();
    refused(
        open(dir.path()),
        Code::Checkpoint,
        &["config.json", "outside"],
    );
    fs::remove_file(dir.path().join("config.json")).unwrap();
    symlink("nowhere", dir.path().join("config.json")).unwrap();
    refused(open(dir.path()), Code::Io, &["config.json", "nowhere"]);
}

#[test]
fn a_linked_model_folder_is_the_folder() {
    let (dir, real) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    testing::write_single(real.path(), &testing::config(), &tensors());
    symlink(real.path(), dir.path().join("mine")).unwrap();
    assert_bytes(&open(&dir.path().join("mine")).unwrap(), &tensors());
}

// hazard: fifos: refused at once; opened without blocking
#[test]
fn fifos_devices_and_folders_are_refused_at_once() {
    for name in [
        "model.safetensors",
        "config.json",
        "model.safetensors.index.json",
        "index.json",
    ] {
        let dir = tempfile::tempdir().unwrap();
        if name != "config.json" {
            fs::write(
                dir.path().join("config.json"),
                testing::config().to_string(),
            )
            .unwrap();
        } else {
            testing::write_single(dir.path(), &testing::config(), &tensors());
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        let path = dir.path().join(name);
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        refused(open(dir.path()), Code::Checkpoint, &[name, "FIFO"]);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused(open(dir.path()), Code::Checkpoint, &[name, "a folder"]);
        fs::remove_dir(&path).unwrap();
        symlink("/dev/zero", &path).unwrap();
        refused(open_external(dir.path()), Code::Checkpoint, &["a device"]);
    }
}

// hazard: pickles: refused by content; says how to convert
#[test]
fn foreign_formats_are_known_by_their_content() {
    let zip = b"PK\x03\x04 archive/data.pkl".as_slice();
    let pickle = b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.".as_slice();
    let short_pickle = b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00.".as_slice();
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa".as_slice();
    let cases = [
        ("pytorch_model.bin", zip, Code::Unsupported, "pickle"),
        ("consolidated.00.pth", pickle, Code::Unsupported, "pickle"),
        ("model.safetensors", zip, Code::Unsupported, "pickle"),
        ("model.safetensors", pickle, Code::Unsupported, "pickle"),
        (
            "model.safetensors",
            short_pickle,
            Code::Unsupported,
            "pickle",
        ),
        (
            "model.safetensors",
            b"GGUF\x03\0\0\0\x01\0\0\0",
            Code::Unsupported,
            "GGUF",
        ),
        (
            "ggml-model-q4.gguf",
            b"GGUF\x03\0\0\0\x01\0\0\0",
            Code::Unsupported,
            "GGUF",
        ),
        ("model.safetensors", lfs, Code::Checkpoint, "git lfs pull"),
        (
            "model.safetensors",
            b"<!DOCTYPE html>",
            Code::Checkpoint,
            "header",
        ),
        ("notes.txt", b"hello", Code::Checkpoint, "notes.txt"),
    ];
    for (name, content, code, word) in cases {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("config.json"),
            testing::config().to_string(),
        )
        .unwrap();
        fs::write(dir.path().join(name), content).unwrap();
        refused(open(dir.path()), code, &[name, word]);
    }
    let empty = tempfile::tempdir().unwrap();
    refused(open(empty.path()), Code::Checkpoint, &["empty"]);
}

#[test]
fn a_config_that_is_no_config_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_single(dir.path(), &testing::config(), &tensors());
    let path = dir.path().join("config.json");
    for (text, code) in [
        ("{".to_string(), Code::Config),
        ("[".repeat(100_000), Code::Config),
        (" ".repeat(2 << 20), Code::Checkpoint),
    ] {
        fs::write(&path, text).unwrap();
        refused(open(dir.path()), code, &["config.json"]);
    }
    fs::remove_file(&path).unwrap();
    refused(open(dir.path()), Code::Config, &["config.json"]);
}

#[test]
fn packed_folders_are_left_to_the_store() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("config.json"),
        testing::config().to_string(),
    )
    .unwrap();
    fs::write(dir.path().join("manifest.json"), "{}").unwrap();
    fs::write(dir.path().join("checksums.bin"), "").unwrap();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.kind, SourceKind::Packed);
    assert!(checkpoint.files.is_empty() && checkpoint.tensors.is_empty());
}

#[test]
fn identity_follows_config_content_and_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = {
        testing::write_single(dir.path(), &testing::config(), &tensors());
        open(dir.path()).unwrap()
    };
    assert_eq!(
        open(dir.path()).unwrap().identity.hash(),
        first.identity.hash()
    );
    let mut config = testing::config();
    config["rope_theta"] = json!(20000.0);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    assert_ne!(
        open(dir.path()).unwrap().identity.hash(),
        first.identity.hash()
    );
    fs::write(
        dir.path().join("config.json"),
        testing::config().to_string(),
    )
    .unwrap();
    assert_eq!(
        open(dir.path()).unwrap().identity.hash(),
        first.identity.hash()
    );

    let file = fs::File::options()
        .write(true)
        .open(dir.path().join("model.safetensors"))
        .unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    assert_ne!(
        open(dir.path()).unwrap().identity.hash(),
        first.identity.hash()
    );
    let error = first.check_unchanged().unwrap_err();
    assert!(error.what().contains("model.safetensors"), "{error}");
    assert_eq!(first.tensors["model.norm.weight"].file, FileId(0));
}

/// `TENSORPAGER_FIXTURES=DIR`: every model folder below it opens and has what its config asks for.
#[test]
fn reference_checkpoints_open() {
    let Some(root) = std::env::var_os("TENSORPAGER_FIXTURES") else {
        println!("skipped: TENSORPAGER_FIXTURES is not set");
        return;
    };
    let mut seen = 0;
    for entry in fs::read_dir(&root).unwrap() {
        let dir = entry.unwrap().path();
        let has = |name: &str| dir.join(name).exists();
        if !has("index.json") && !has("model.safetensors") && !has("model.safetensors.index.json") {
            continue;
        }
        // An accelerate folder without a config is named after the model it was made from.
        let name = dir.file_name().unwrap().to_str().unwrap();
        let origin = name
            .trim_start_matches("accelerate-")
            .trim_start_matches("offload-");
        let config_from = (!has("config.json")).then(|| {
            let near = [origin.to_string(), origin.replace("-f32", "-f16")];
            let near = near.iter().map(|n| Path::new(&root).join(n));
            near.into_iter().find(|p| p.exists()).unwrap()
        });
        let options = OpenOptions {
            config_from,
            ..OpenOptions::default()
        };
        let checkpoint = Checkpoint::open(dir.to_str().unwrap(), &options).unwrap();
        let left = check(&checkpoint).unwrap();
        println!(
            "{name}: {} tensors, left over {left:?}",
            checkpoint.tensors.len()
        );
        assert!(left.is_empty());
        seen += 1;
    }
    assert!(seen > 0, "no model folders below TENSORPAGER_FIXTURES");
}
