//! accelerate's offload folders: sound ones of every style, and each way in which one can be damaged or hostile.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{assert_bytes, check, open, open_external, refused, tensors};
use crate::checkpoint::testing::{self, Tensor};
use crate::checkpoint::{Checkpoint, OpenOptions, SourceKind};
use crate::error::Code;

#[test]
fn accelerate_folders_open_under_every_name_style() {
    let renames: [&dyn Fn(&str) -> String; 2] = [&|n| n.to_string(), &|n| {
        n.replace("model.", "model.language_model.")
    }];
    for rename in renames {
        let (dir, original) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        testing::write_accelerate(dir.path(), &tensors(), rename);
        refused(
            open(dir.path()),
            Code::Config,
            &["config.json", "--config-from"],
        );
        fs::write(
            original.path().join("config.json"),
            testing::config().to_string(),
        )
        .unwrap();
        let options = OpenOptions {
            config_from: Some(original.path().to_path_buf()),
            ..OpenOptions::default()
        };
        let checkpoint = Checkpoint::open(dir.path().to_str().unwrap(), &options).unwrap();
        assert_eq!(checkpoint.kind, SourceKind::Accelerate);
        assert_eq!(
            checkpoint.config_dir,
            original.path().canonicalize().unwrap()
        );
        assert_bytes(&checkpoint, &tensors());
        check(&checkpoint).unwrap();
    }
}

#[test]
fn a_zero_dimensional_accelerate_tensor_is_one_element() {
    let dir = tempfile::tempdir().unwrap();
    let mut list = tensors();
    list.push(Tensor {
        name: "scalar".to_string(),
        dtype: "F32",
        shape: vec![],
        data: vec![0; 4],
    });
    testing::write_accelerate(dir.path(), &list, &|n| n.to_string());
    fs::write(
        dir.path().join("config.json"),
        testing::config().to_string(),
    )
    .unwrap();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensors["scalar"].bytes, 4);
    assert_eq!(check(&checkpoint).unwrap(), ["scalar"]);
}

/// `index.json` entries that name a tensor of a safetensors file.
fn named_by_index(file: &str, extra: Value) -> Value {
    let mut index = serde_json::Map::new();
    for t in tensors() {
        let mut entry =
            json!({"safetensors_file": file, "weight_name": t.name, "dtype": "bfloat16"});
        for (key, value) in extra.as_object().unwrap() {
            entry[key] = value.clone();
        }
        index.insert(t.name.replace("model.", "model.language_model."), entry);
    }
    Value::Object(index)
}

#[test]
fn accelerate_entries_may_name_a_safetensors_file() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let write =
        |index: &Value| fs::write(dir.path().join("index.json"), index.to_string()).unwrap();
    fs::write(
        dir.path().join("config.json"),
        testing::config().to_string(),
    )
    .unwrap();
    for at in [dir.path(), other.path()] {
        fs::write(
            at.join("weights.safetensors"),
            testing::safetensors(&tensors()),
        )
        .unwrap();
    }
    write(&named_by_index("weights.safetensors", json!({})));
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.files.len(), 1, "one file, opened once");
    assert_bytes(&checkpoint, &tensors());
    check(&checkpoint).unwrap();

    let outside = other.path().join("weights.safetensors");
    let outside = outside.to_str().unwrap();
    write(&named_by_index(outside, json!({})));
    refused(
        open(dir.path()),
        Code::Checkpoint,
        &["outside", "--allow-external"],
    );
    assert_bytes(&open_external(dir.path()).unwrap(), &tensors());
    let relative = format!(
        "../{}/weights.safetensors",
        other.path().file_name().unwrap().to_str().unwrap()
    );
    write(&named_by_index(&relative, json!({})));
    refused(open(dir.path()), Code::Checkpoint, &["outside"]);

    write(&named_by_index(
        "weights.safetensors",
        json!({"dtype": "float16"}),
    ));
    refused(
        open(dir.path()),
        Code::Unsupported,
        &["cast", "model.language_model.embed_tokens"],
    );
    write(&named_by_index(
        "weights.safetensors",
        json!({"weight_name": "nope"}),
    ));
    refused(open(dir.path()), Code::Checkpoint, &["`nope`"]);
    write(&named_by_index("absent.safetensors", json!({})));
    refused(open(dir.path()), Code::Io, &["absent.safetensors"]);
}

type Damage = Box<dyn Fn(&Path)>;

#[test]
fn damaged_accelerate_folders_name_the_tensor() {
    let victim = "model.layers.1.mlp.up_proj.weight";
    let file = format!("{victim}.dat");
    let entry = |value: Value| {
        move |dir: &Path| {
            let text = fs::read_to_string(dir.join("index.json")).unwrap();
            let mut index: Value = serde_json::from_str(&text).unwrap();
            index[victim] = value.clone();
            fs::write(dir.join("index.json"), index.to_string()).unwrap();
        }
    };
    let resize = |by: i64| {
        let file = file.clone();
        move |dir: &Path| {
            let f = fs::File::options()
                .write(true)
                .open(dir.join(&file))
                .unwrap();
            f.set_len((f.metadata().unwrap().len() as i64 + by) as u64)
                .unwrap();
        }
    };
    let remove = file.clone();
    let cases: Vec<Damage> = vec![
        Box::new(resize(-1)),
        Box::new(resize(1)),
        Box::new(move |dir| fs::remove_file(dir.join(&remove)).unwrap()),
        Box::new(entry(json!({"dtype": "bfloat16"}))),
        Box::new(entry(json!({"shape": [24, 16]}))),
        Box::new(entry(json!({"dtype": "float32", "shape": [24, 16]}))),
        Box::new(entry(json!({"dtype": "bfloat16", "shape": [u64::MAX, 16]}))),
        Box::new(entry(
            json!({"dtype": "bfloat16", "shape": [24, 16, 1, 1, 1, 1, 1, 1, 1]}),
        )),
    ];
    for (i, damage) in cases.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_accelerate(dir.path(), &tensors(), &|n| n.to_string());
        fs::write(
            dir.path().join("config.json"),
            testing::config().to_string(),
        )
        .unwrap();
        open(dir.path()).unwrap();
        damage(dir.path());
        let word = if i == 7 { "index.json" } else { victim };
        refused(open(dir.path()), Code::Checkpoint, &[word]);
    }
}

#[test]
fn hostile_accelerate_indexes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("config.json"),
        testing::config().to_string(),
    )
    .unwrap();
    let good = r#"{"dtype": "float32", "shape": [1]}"#;
    for index in [
        format!(r#"{{"../x": {good}}}"#),
        format!(r#"{{"a/b": {good}}}"#),
        format!(r#"{{"": {good}}}"#),
        format!(r#"{{"\u0000": {good}}}"#),
        format!(r#"{{"a": {good}, "a": {good}}}"#),
        r#"{"a": {"dtype": "float32", "dtype": "float32", "shape": [1]}}"#.to_string(),
        r#"{"a": {"dtype": "float32", "shape": [-1]}}"#.to_string(),
        r#"{"a": 3}"#.to_string(),
        "[]".to_string(),
        "{".to_string(),
        String::new(),
    ] {
        fs::write(dir.path().join("a.dat"), [0; 4]).unwrap();
        fs::write(dir.path().join("index.json"), &index).unwrap();
        refused(open(dir.path()), Code::Checkpoint, &["index.json"]);
    }
}
