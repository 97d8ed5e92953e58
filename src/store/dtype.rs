//! Which type each tensor is stored in: what the checkpoint has, one type for all, or a map from module to type.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::error::{Code, Error, Result};
use crate::spec::canonical_name;
use crate::units::Dtype;

/// `--dtype`.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum DtypePolicy {
    /// Keep what the checkpoint has.
    #[default]
    Auto,
    One(Dtype),
    /// Module name → type; the longest prefix (whole words between dots) wins, what no entry covers is kept.
    Map(BTreeMap<String, Dtype>),
}

impl DtypePolicy {
    /// `auto`, a type's name, or the path of a JSON file `{"model.layers.0": "float32", "": "bfloat16"}`.
    pub fn parse(text: &str) -> Result<DtypePolicy> {
        if text == "auto" {
            return Ok(DtypePolicy::Auto);
        }
        if let Some(dtype) = Dtype::parse(text) {
            return Ok(DtypePolicy::One(dtype));
        }
        if !text.ends_with(".json") {
            return Err(Error::new(
                Code::Usage,
                format!("`{text}` is not a dtype"),
                "known are auto, float16, bfloat16 and float32",
                "give one of these, or a file ending in .json that maps module names to them",
            ));
        }
        let path = Path::new(text);
        let raw = std::fs::read(path)
            .map_err(|e| Error::io(format!("cannot read the dtype map {text}"), &e))?;
        DtypePolicy::from_map_text(text, &raw)
    }

    fn from_map_text(file: &str, raw: &[u8]) -> Result<DtypePolicy> {
        let bad = |cause: String| {
            Error::new(
                Code::Usage,
                format!("the dtype map {file} cannot be used"),
                cause,
                "write a JSON object such as {\"model.layers.0\": \"float32\", \"\": \"bfloat16\"}",
            )
        };
        let value: Value = serde_json::from_slice(raw).map_err(|e| bad(e.to_string()))?;
        let object = value
            .as_object()
            .ok_or_else(|| bad("it is no JSON object".to_string()))?;
        let mut map = BTreeMap::new();
        for (key, value) in object {
            let dtype = value.as_str().and_then(Dtype::parse).ok_or_else(|| {
                bad(format!(
                    "`{key}` is mapped to {value}, known are float16, bfloat16, float32"
                ))
            })?;
            map.insert(key.clone(), dtype);
        }
        Ok(DtypePolicy::Map(map))
    }

    /// The type a tensor is stored in. `source`: its type in the checkpoint.
    pub fn resolve(&self, name: &str, source_name: &str, source: Dtype) -> Dtype {
        match self {
            DtypePolicy::Auto => source,
            DtypePolicy::One(dtype) => *dtype,
            DtypePolicy::Map(map) => map
                .iter()
                .filter(|(key, _)| covers(key, name) || covers(key, source_name))
                .max_by_key(|(key, _)| key.len())
                .map_or(source, |(_, dtype)| *dtype),
        }
    }

    /// A map's entries that cover none of these names: most likely misspelt.
    pub fn check_used<'a>(
        &self,
        names: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    ) -> Result<()> {
        let DtypePolicy::Map(map) = self else {
            return Ok(());
        };
        for key in map.keys() {
            let mut names = names.clone();
            if !names.any(|(name, source)| covers(key, name) || covers(key, source)) {
                return Err(Error::new(
                    Code::Usage,
                    format!("the dtype map's entry `{key}` fits no tensor"),
                    "no tensor of the model has that name or lies in a module of that name",
                    "correct it; `tensorpager inspect MODEL --units` lists the names",
                ));
            }
        }
        Ok(())
    }
}

/// `model.layers.1` covers `model.layers.1.mlp.up_proj.weight`, not `model.layers.10…`; the empty key covers all.
fn covers(key: &str, name: &str) -> bool {
    let fits = |key: &str| {
        let rest = name.strip_prefix(key);
        key.is_empty() || rest.is_some_and(|r| r.is_empty() || r.starts_with('.'))
    };
    fits(key) || fits(canonical_name(&format!("{key}.")).trim_end_matches('.'))
}

/// The type of a whole store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtypeLabel {
    Uniform(Dtype),
    Mixed,
}

impl DtypeLabel {
    /// None for no tensors.
    pub fn of(dtypes: impl Iterator<Item = Dtype>) -> Option<DtypeLabel> {
        let mut label = None;
        for dtype in dtypes {
            label = match label {
                None => Some(DtypeLabel::Uniform(dtype)),
                Some(DtypeLabel::Uniform(d)) if d == dtype => label,
                _ => return Some(DtypeLabel::Mixed),
            };
        }
        label
    }

    /// `float16`, `bfloat16`, `float32`, `mixed`: as reports write it.
    pub fn name(self) -> &'static str {
        match self {
            DtypeLabel::Uniform(d) => d.name(),
            DtypeLabel::Mixed => "mixed",
        }
    }

    /// `f16`, `bf16`, `f32`, `mixed`: as folder names end.
    pub fn short(self) -> &'static str {
        match self {
            DtypeLabel::Uniform(d) => d.short(),
            DtypeLabel::Mixed => "mixed",
        }
    }
}

impl std::fmt::Display for DtypeLabel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> DtypePolicy {
        DtypePolicy::from_map_text("map.json", text.as_bytes()).unwrap()
    }

    #[test]
    fn the_longest_prefix_of_whole_words_wins() {
        let policy = map(
            r#"{"": "bfloat16", "model.layers.1": "float32", "model.layers.1.mlp": "float16"}"#,
        );
        let of = |name: &str| policy.resolve(name, name, Dtype::F32);
        assert_eq!(of("model.embed_tokens.weight"), Dtype::BF16);
        assert_eq!(of("model.layers.1.self_attn.q_proj.weight"), Dtype::F32);
        assert_eq!(of("model.layers.1.mlp.up_proj.weight"), Dtype::F16);
        assert_eq!(of("model.layers.10.mlp.up_proj.weight"), Dtype::BF16);
    }

    #[test]
    fn names_of_the_source_and_canonical_names_both_count() {
        let policy =
            map(r#"{"model.language_model.layers.0": "float32", "model.visual": "float16"}"#);
        let at = |name: &str, source: &str| policy.resolve(name, source, Dtype::BF16);
        let layer = "model.layers.0.mlp.up_proj.weight";
        assert_eq!(
            at(layer, "model.language_model.layers.0.mlp.up_proj.weight"),
            Dtype::F32
        );
        assert_eq!(
            at(layer, layer),
            Dtype::F32,
            "the key is read as a canonical name as well"
        );
        assert_eq!(
            at("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
            Dtype::F16
        );
        assert_eq!(at("lm_head.weight", "lm_head.weight"), Dtype::BF16);
    }

    #[test]
    fn mistakes_are_named() {
        let names = ["model.norm.weight", "lm_head.weight"];
        let all = names.iter().map(|n| (*n, *n));
        map(r#"{"lm_head": "float32"}"#)
            .check_used(all.clone())
            .unwrap();
        let error = map(r#"{"lm_haed": "float32"}"#)
            .check_used(all)
            .unwrap_err();
        assert!(error.what().contains("lm_haed"));
        for bad in ["[]", "{\"a\": 1}", "{\"a\": \"int4\"}", "{", ""] {
            let error = DtypePolicy::from_map_text("m.json", bad.as_bytes()).unwrap_err();
            assert_eq!(error.code(), Code::Usage, "{bad}");
        }
        assert_eq!(DtypePolicy::parse("int4").unwrap_err().code(), Code::Usage);
        assert_eq!(
            DtypePolicy::parse("absent.json").unwrap_err().code(),
            Code::Io
        );
        assert_eq!(
            DtypePolicy::parse("bf16").unwrap(),
            DtypePolicy::One(Dtype::BF16)
        );
    }

    #[test]
    fn labels() {
        let of = |d: &[Dtype]| DtypeLabel::of(d.iter().copied()).map(DtypeLabel::short);
        assert_eq!(of(&[Dtype::F16, Dtype::F16]), Some("f16"));
        assert_eq!(of(&[Dtype::F16, Dtype::F32]), Some("mixed"));
        assert_eq!(of(&[]), None);
    }
}
