//! Checkpoints made in temporary folders, for the tests of this module and of those that read through it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::spec::{ModelSpec, parse_config};
use crate::units::Dtype;

/// A tensor to be written.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub name: String,
    /// As safetensors writes it: `BF16`.
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// A small Qwen2 with every kind of tensor, untied.
pub(crate) fn config() -> Value {
    json!({
        "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 96, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_sliding_window": false, "sliding_window": null
    })
}

pub(crate) fn spec(config: &Value) -> ModelSpec {
    parse_config(config).unwrap()
}

/// Every tensor the spec's units need, each with its own bytes.
pub(crate) fn tensors(spec: &ModelSpec, dtype: Dtype) -> Vec<Tensor> {
    let mut list: Vec<Tensor> = Vec::new();
    for t in spec.units(&|_| dtype).into_iter().flat_map(|u| u.tensors) {
        if list.iter().any(|have| have.name == t.name) {
            continue;
        }
        let bytes = t.shape.iter().product::<usize>() * dtype.bytes();
        let seed = list.len();
        list.push(Tensor {
            name: t.name,
            dtype: match dtype {
                Dtype::F16 => "F16",
                Dtype::BF16 => "BF16",
                Dtype::F32 => "F32",
            },
            shape: t.shape,
            data: (0..bytes).map(|i| ((i * 31 + seed) % 63) as u8).collect(),
        });
    }
    list
}

/// The JSON of a header, padded to 8 bytes as the reference writer does.
pub(crate) fn header_json(tensors: &[Tensor]) -> String {
    let mut map = serde_json::Map::new();
    map.insert("__metadata__".to_string(), json!({"format": "pt"}));
    let mut at = 0;
    for t in tensors {
        let end = at + t.data.len();
        let entry = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, end]});
        map.insert(t.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(map).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    text
}

/// A safetensors file of this header and these bytes.
pub(crate) fn assemble(json: &[u8], data: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes()[..], json, data].concat()
}

pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let data: Vec<u8> = tensors.iter().flat_map(|t| t.data.clone()).collect();
    assemble(header_json(tensors).as_bytes(), &data)
}

/// A folder with `config.json` and one file.
pub(crate) fn write_single(dir: &Path, config: &Value, tensors: &[Tensor]) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("model.safetensors"), safetensors(tensors)).unwrap();
}

/// A folder with `config.json`, shards of at most `per_shard` tensors and their index.
pub(crate) fn write_shards(dir: &Path, config: &Value, tensors: &[Tensor], per_shard: usize) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let count = tensors.len().div_ceil(per_shard);
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(per_shard).enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        fs::write(dir.join(&name), safetensors(part)).unwrap();
        for t in part {
            map.insert(t.name.clone(), json!(name));
        }
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// accelerate's folder, without config. Names get `rename`d.
pub(crate) fn write_accelerate(dir: &Path, tensors: &[Tensor], rename: &dyn Fn(&str) -> String) {
    let mut index = serde_json::Map::new();
    for t in tensors {
        let dtype = match t.dtype {
            "BF16" => "bfloat16",
            "F16" => "float16",
            "F32" => "float32",
            other => other,
        };
        let name = rename(&t.name);
        fs::write(dir.join(format!("{name}.dat")), &t.data).unwrap();
        index.insert(name, json!({"dtype": dtype, "shape": t.shape}));
    }
    let text = serde_json::to_string_pretty(&index).unwrap();
    fs::write(dir.join("index.json"), text).unwrap();
}

/// A hub cache with one model: blobs, and a snapshot of links to them. Returns the snapshot.
pub(crate) fn write_cache(cache: &Path, store: &str, commit: &str, tensors: &[Tensor]) -> PathBuf {
    let store = cache.join(store);
    let snapshot = store.join("snapshots").join(commit);
    for dir in [store.join("blobs"), store.join("refs"), snapshot.clone()] {
        fs::create_dir_all(dir).unwrap();
    }
    fs::write(store.join("refs/main"), commit).unwrap();
    let staging = tempfile::tempdir().unwrap();
    write_single(staging.path(), &config(), tensors);
    for name in ["config.json", "model.safetensors"] {
        let blob = format!("{name}-blob");
        fs::copy(staging.path().join(name), store.join("blobs").join(&blob)).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    snapshot
}
