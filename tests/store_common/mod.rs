//! Small checkpoints for the tests of the store, and a slow, plain reader of what came out.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::spec::parse_config;
use tensorpager::store::{Place, Store, UnitLayout};
use tensorpager::units::Dtype;

/// A qwen2-like model of a few hundred kilobytes.
pub fn config(tied: bool) -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1001,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "use_sliding_window": false,
        "torch_dtype": "bfloat16"
    })
}

/// A tensor of the source as the test made it.
pub struct Made {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Made>;

/// All tensors the config needs, `dtype_of` choosing their types; values from a counter, finite and different.
pub fn tensors(config: &Value, dtype_of: impl Fn(&str) -> Dtype) -> Tensors {
    let spec = parse_config(config).unwrap();
    let mut made = BTreeMap::new();
    let mut state = 0x9e37_79b9u32;
    for t in spec
        .units(&|n| dtype_of(n))
        .into_iter()
        .flat_map(|u| u.tensors)
    {
        let dtype = dtype_of(&t.name);
        let count: usize = t.shape.iter().product();
        let mut bytes = Vec::with_capacity(count * dtype.bytes());
        for _ in 0..count {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            let value = (state as i32 as f32) / 2f32.powi(31) * 3.0;
            match dtype {
                Dtype::F32 => bytes.extend(value.to_le_bytes()),
                Dtype::BF16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
                Dtype::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
            }
        }
        let shape = t.shape.clone();
        made.entry(t.name).or_insert(Made {
            dtype,
            shape,
            bytes,
        });
    }
    made
}

fn safetensors_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "F16",
        Dtype::BF16 => "BF16",
        Dtype::F32 => "F32",
    }
}

/// The bytes of a safetensors file: 8 bytes of header length, the header, the data.
pub fn safetensors<'a>(tensors: impl Iterator<Item = (&'a String, &'a Made)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, t) in tensors {
        let begin = data.len();
        data.extend_from_slice(&t.bytes);
        header.insert(
            name.clone(),
            json!({"dtype": safetensors_name(t.dtype), "shape": t.shape, "data_offsets": [begin, data.len()]}),
        );
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    while header.len() % 8 != 0 {
        header.push(b' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

/// Writes a Hugging Face folder; `shards` above 1 deals the tensors out in turn.
pub fn write_folder(dir: &Path, config: &Value, tensors: &Tensors, shards: usize) {
    fs::create_dir_all(dir).unwrap();
    fs::write(
        dir.join("config.json"),
        serde_json::to_vec_pretty(config).unwrap(),
    )
    .unwrap();
    fs::write(dir.join("tokenizer.json"), "{\"not\": \"read here\"}").unwrap();
    fs::write(dir.join("generation_config.json"), "{\"eos_token_id\": 7}").unwrap();
    if shards == 1 {
        fs::write(dir.join("model.safetensors"), safetensors(tensors.iter())).unwrap();
        return;
    }
    let mut map = serde_json::Map::new();
    for shard in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let own = || {
            tensors
                .iter()
                .enumerate()
                .filter(|(i, _)| i % shards == shard)
                .map(|(_, t)| t)
        };
        for (tensor, _) in own() {
            map.insert(tensor.clone(), json!(name));
        }
        fs::write(dir.join(&name), safetensors(own())).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Writes accelerate's offload folder: raw arrays and `index.json`.
pub fn write_accelerate(dir: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut index = serde_json::Map::new();
    for (name, t) in tensors {
        fs::write(dir.join(format!("{name}.dat")), &t.bytes).unwrap();
        index.insert(
            name.clone(),
            json!({"dtype": t.dtype.name(), "shape": t.shape}),
        );
    }
    fs::write(dir.join("index.json"), Value::Object(index).to_string()).unwrap();
}

pub fn open(dir: &Path) -> Checkpoint {
    let options = OpenOptions {
        config_from: None,
        allow_external: false,
    };
    Checkpoint::open(dir.to_str().unwrap(), &options).unwrap()
}

/// A source folder `<parent>/tiny` and its tensors.
pub fn source(parent: &Path, tied: bool, dtype: Dtype) -> (PathBuf, Tensors) {
    let dir = parent.join("tiny");
    let config = config(tied);
    let tensors = tensors(&config, |_| dtype);
    write_folder(&dir, &config, &tensors, 1);
    (dir, tensors)
}

/// The bytes of one tensor of one unit, as a reader of extents gets them.
pub fn read_place(store: &Store, unit: &UnitLayout, place: &Place) -> Vec<u8> {
    let extent = unit.extents[place.extent];
    assert!(
        place.offset + place.bytes() <= extent.bytes,
        "{} leaves its extent",
        place.name
    );
    let file = fs::File::open(&store.file(extent.file).path).unwrap();
    let mut bytes = vec![0; place.bytes() as usize];
    file.read_exact_at(&mut bytes, extent.offset + place.offset)
        .unwrap();
    bytes
}

/// `(unit, tensor, dtype, first bytes…)` of everything in a store, in order.
pub fn contents(store: &Store) -> Vec<(String, String, Dtype, usize, usize, Vec<u8>)> {
    let mut all = Vec::new();
    for unit in &store.units {
        for place in &unit.places {
            let bytes = read_place(store, unit, place);
            all.push((
                unit.kind.to_string(),
                place.name.clone(),
                place.dtype,
                place.rows,
                place.cols,
                bytes,
            ));
        }
    }
    all
}

/// Little-endian elements as float32.
pub fn floats(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let step = dtype.bytes();
    let value = |b: &[u8]| match dtype {
        Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Dtype::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        Dtype::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
    };
    bytes.chunks(step).map(value).collect()
}

/// What a cast must give: each element alone, with the `half` crate.
pub fn cast_plainly(bytes: &[u8], from: Dtype, to: Dtype) -> Vec<u8> {
    let values = floats(bytes, from).into_iter();
    match to {
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Dtype::BF16 => values
            .flat_map(|v| half::bf16::from_f32(v).to_le_bytes())
            .collect(),
        Dtype::F16 => values
            .flat_map(|v| half::f16::from_f32(v).to_le_bytes())
            .collect(),
    }
}

/// Every place of the store holds the source's rows, cast to the place's type.
pub fn assert_holds(store: &Store, tensors: &Tensors) {
    for unit in &store.units {
        let mut first_row = 0;
        for place in &unit.places {
            let made = &tensors[&place.name];
            if let tensorpager::spec::UnitKind::Head(block) = unit.kind {
                let before = store.units.iter().filter(
                    |u| matches!(u.kind, tensorpager::spec::UnitKind::Head(b) if b < block),
                );
                first_row = before.map(|u| u.places[0].rows).sum();
            }
            let row_bytes = place.cols * made.dtype.bytes();
            let rows = &made.bytes[first_row * row_bytes..(first_row + place.rows) * row_bytes];
            let expected = cast_plainly(rows, made.dtype, place.dtype);
            let got = read_place(store, unit, place);
            assert!(got == expected, "{} of {} differs", place.name, unit.kind);
        }
    }
}
