//! Fixtures, read without the code under test: a small safetensors reader, golden outputs, and a model held in memory.
#![allow(dead_code)] // each test file uses a part

pub mod program;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tensorpager::device::WeightView;
use tensorpager::error::Result;
use tensorpager::model::{UnitSource, UnitView};
use tensorpager::spec::{ModelSpec, UnitKind, UnitSpec, canonical_name, parse_config};
use tensorpager::units::{Dtype, UnitId};

/// The small models made by tests/fixtures/make.py.
pub const MODELS: [&str; 7] = [
    "llama-f32",
    "llama3-bf16",
    "llama-yarn-bf16",
    "mistral-bf16",
    "qwen2-bf16",
    "qwen2-f16-tied",
    "qwen3-bf16",
];

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A tensor as a safetensors file has it.
pub struct Tensor {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32s(&self) -> Vec<f32> {
        assert_eq!(self.dtype, "F32");
        self.bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    }
}

pub fn read_safetensors(path: &Path) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let data = &bytes[8 + n..];
    let mut out = HashMap::new();
    for (name, t) in header.as_object().unwrap() {
        if name == "__metadata__" {
            continue;
        }
        let at = |i: usize| t["data_offsets"][i].as_u64().unwrap() as usize;
        out.insert(
            name.clone(),
            Tensor {
                dtype: t["dtype"].as_str().unwrap().into(),
                shape: t["shape"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|d| d.as_u64().unwrap() as usize)
                    .collect(),
                bytes: data[at(0)..at(1)].to_vec(),
            },
        );
    }
    out
}

/// One prompt with what transformers made of it in float32.
pub struct Golden {
    pub ids: Vec<u32>,
    pub text: String,
    pub greedy: Vec<u32>,
    pub margins: Vec<f64>,
    /// Positions whose logits are kept: all, or those listed.
    pub positions: Vec<usize>,
    /// `[positions, vocab]`
    pub logits: Vec<f32>,
    /// Normalised mean squared error of transformers' own 16-bit run; none for float32 weights.
    pub half_nmse: Option<f64>,
    pub half_max: Option<f64>,
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_u64().unwrap() as u32)
        .collect()
}

pub fn golden(dir: &Path) -> Vec<Golden> {
    let json: Value =
        serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let tensors = read_safetensors(&dir.join("golden.safetensors"));
    json["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let prompt = ids(&p["input_ids"]);
            let error = |key: &str| p["half_error"].get(key).and_then(Value::as_f64);
            Golden {
                text: p["text"].as_str().unwrap_or_default().into(),
                greedy: ids(&p["greedy_ids"]),
                margins: p["margins"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|m| m.as_f64().unwrap())
                    .collect(),
                positions: match p.get("positions") {
                    Some(v) if v.is_array() => ids(v).into_iter().map(|p| p as usize).collect(),
                    _ => (0..prompt.len()).collect(),
                },
                logits: tensors[&format!("logits.{i}")].f32s(),
                half_nmse: error("nmse"),
                half_max: error("max_abs"),
                ids: prompt,
            }
        })
        .collect()
}

/// Σ(a − b)² / Σb²
pub fn nmse(a: &[f32], b: &[f32]) -> f64 {
    let (mut num, mut den) = (0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        num += f64::from(x - y).powi(2);
        den += f64::from(*y).powi(2);
    }
    num / den
}

/// A whole model in memory: what the forward pass needs, with no pager behind it.
pub struct MemoryModel {
    pub spec: ModelSpec,
    pub units: Vec<UnitSpec>,
    tensors: HashMap<String, Tensor>,
}

impl MemoryModel {
    pub fn load(dir: &Path) -> MemoryModel {
        let config: Value =
            serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let spec = parse_config(&config).unwrap();
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with("model") && name.ends_with(".safetensors") {
                for (name, t) in read_safetensors(&path) {
                    tensors.insert(canonical_name(&name), t);
                }
            }
        }
        let units = spec.units(&|name| Dtype::parse(&tensors[name].dtype).unwrap());
        MemoryModel {
            spec,
            units,
            tensors,
        }
    }

    pub fn unit_list(&self) -> Vec<(UnitId, UnitKind, usize)> {
        self.units
            .iter()
            .map(|u| (u.id, u.kind, u.tensors[0].rows.len()))
            .collect()
    }

    pub fn head_dtype(&self) -> Dtype {
        let head = self
            .units
            .iter()
            .find(|u| matches!(u.kind, UnitKind::Head(_)))
            .unwrap();
        Dtype::parse(&self.tensors[&head.tensors[0].name].dtype).unwrap()
    }
}

impl UnitSource for &MemoryModel {
    fn with_unit(
        &mut self,
        unit: UnitId,
        compute: &mut dyn FnMut(&UnitView<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut view = UnitView::empty();
        for t in &self.units[unit.index()].tensors {
            let tensor = &self.tensors[&t.name];
            let dtype = Dtype::parse(&tensor.dtype).unwrap();
            // A 1-D tensor is one row; a convolution's kernel is a matrix of its first dimension.
            let rows = if tensor.shape.len() == 1 {
                1
            } else {
                tensor.shape[0]
            };
            let cols = tensor.shape.iter().product::<usize>() / rows;
            let whole = WeightView::packed(dtype, rows, cols, &tensor.bytes);
            let part = if rows > 1 {
                whole.slice_rows(t.rows.start, t.rows.len())
            } else {
                whole
            };
            view.set(t.role, part);
        }
        compute(&view)
    }

    fn gather_rows(
        &mut self,
        unit: UnitId,
        tokens: &[u32],
        row: &mut dyn FnMut(usize, &WeightView<'_>) -> Result<()>,
    ) -> Result<()> {
        let tensor = &self.tensors[&self.units[unit.index()].tensors[0].name];
        let dtype = Dtype::parse(&tensor.dtype).unwrap();
        let whole = WeightView::packed(dtype, tensor.shape[0], tensor.shape[1], &tensor.bytes);
        for (i, &token) in tokens.iter().enumerate() {
            row(i, &whole.slice_rows(token as usize, 1))?;
        }
        Ok(())
    }
}
