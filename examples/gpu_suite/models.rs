//! The models that run end to end: the fixtures, with what their references say, and random weights for what the fixtures lack.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tensorpager::checkpoint::write_synthetic;

use super::{Outcome, Suite};

pub struct Model {
    pub name: String,
    pub folder: PathBuf,
    pub inputs: Vec<Input>,
    /// Whether `golden.safetensors` says what the logits are.
    pub golden: bool,
}

/// One line that is scored, and what the reference says of it.
pub struct Input {
    /// `{"input_ids": …}` or `{"messages": …}`, as `score --input` reads it.
    pub line: Value,
    /// Name of the reference's logits.
    pub logits: String,
    /// Positions they are of; all of them where the reference does not say.
    pub positions: Option<Vec<usize>>,
    /// Normalised mean squared error of transformers' own 16-bit run.
    pub half_nmse: Option<f64>,
    /// What the same run is wrong by at most.
    pub half_max: f64,
    /// By how much the reference's greedy tokens lead, one after the other.
    pub margins: Vec<f64>,
    pub prompt: Option<Prompt>,
}

/// How `run` is given the input.
pub enum Prompt {
    Text(String),
    Messages(Value),
}

pub fn folders(suite: &Suite) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(suite.home.join("fixtures")) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.join("config.json").is_file() && p.join("golden.json").is_file())
        .collect();
    found.sort();
    found
}

/// A fixture with its reference: prompts, or cases with pictures. Anything else is an error, so that nothing is left out unseen.
pub fn fixture(folder: &Path) -> Outcome<Model> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let golden: Value = serde_json::from_slice(&std::fs::read(folder.join("golden.json"))?)?;
    let lists = (golden["prompts"].as_array(), golden["cases"].as_array());
    let inputs: Vec<Input> = match lists {
        (Some(prompts), None) => prompts.iter().enumerate().map(prompt).collect(),
        (None, Some(cases)) => {
            let of = |c| case(c, folder).ok_or("a case without messages or a name");
            cases.iter().map(of).collect::<Result<_, _>>()?
        }
        _ => return Err("golden.json has neither prompts nor cases".into()),
    };
    if inputs.is_empty() {
        return Err("golden.json lists nothing".into());
    }
    Ok(Model {
        name: name.into_owned(),
        folder: folder.into(),
        inputs,
        golden: true,
    })
}

fn prompt((i, p): (usize, &Value)) -> Input {
    let line = json!({ "input_ids": p["input_ids"] });
    let text = p["text"].as_str();
    let prompt = text.map(|t| Prompt::Text(t.into()));
    input(p, line, format!("logits.{i}"), prompt)
}

fn case(c: &Value, folder: &Path) -> Option<Input> {
    let mut messages = c["messages"].clone();
    messages.as_array().filter(|m| !m.is_empty())?;
    locate(&mut messages, folder);
    let line = json!({ "messages": messages });
    let name = format!("{}.logits", c["case"].as_str()?);
    Some(input(c, line, name, Some(Prompt::Messages(messages))))
}

fn input(of: &Value, line: Value, logits: String, prompt: Option<Prompt>) -> Input {
    let error = |key: &str| of["half_error"][key].as_f64();
    let positions = of["positions"].as_array();
    let position = |v: &Value| v.as_u64().map(|p| p as usize);
    let margins = of["margins"].as_array().into_iter().flatten();
    Input {
        line,
        logits,
        positions: positions.map(|l| l.iter().filter_map(position).collect()),
        half_nmse: error("nmse"),
        half_max: error("max_abs").unwrap_or(0.0),
        margins: margins.filter_map(Value::as_f64).collect(),
        prompt,
    }
}

/// The fixtures name pictures and frames relative to themselves.
fn locate(value: &mut Value, folder: &Path) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(|v| locate(v, folder)),
        Value::Object(fields) => fields.values_mut().for_each(|v| locate(v, folder)),
        Value::String(name) if folder.join(&*name).is_file() => {
            *name = folder.join(&*name).display().to_string();
        }
        _ => {}
    }
}

/// Every head size that the fixtures may lack, with weights that mean nothing.
pub fn random(suite: &Suite) -> Outcome<Vec<Model>> {
    let mut models = Vec::new();
    for (heads, kv_heads, head) in [(4, 2, 64), (2, 1, 128)] {
        let folder = suite.scratch.join(format!("random-h{head}"));
        let config = small(heads, kv_heads, head);
        write_synthetic(&folder, &config, &mut |_, _| Ok(()))?;
        tokenizer(suite, &folder)?;
        let ids = |n: u32| (0..n).map(|i| (i * 37 + 11) % 250).collect::<Vec<u32>>();
        let line = |n| json!({ "input_ids": ids(n) });
        models.push(Model {
            name: format!("random weights, heads of {head}"),
            inputs: [1, 9, 70]
                .map(|n| input(&Value::Null, line(n), String::new(), None))
                .into(),
            golden: false,
            folder,
        });
    }
    Ok(models)
}

fn small(heads: usize, kv_heads: usize, head: usize) -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": heads * head, "intermediate_size": 200, "num_hidden_layers": 4, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": 288, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "tie_word_embeddings": false, "use_sliding_window": false, "torch_dtype": "bfloat16"
    })
}

/// A tokenizer for a checkpoint that has none.
pub fn tokenizer(suite: &Suite, folder: &Path) -> Outcome<()> {
    let from = suite.home.join("fixtures/qwen2-bf16");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), folder.join(file))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    /// Every fixture that has a reference is scored, pictures included.
    #[test]
    fn no_fixture_is_left_out() {
        let mut kinds = [0, 0];
        for entry in std::fs::read_dir(repository()).unwrap() {
            let folder = entry.unwrap().path();
            if !folder.join("golden.json").is_file() {
                continue;
            }
            let model = fixture(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            for input in &model.inputs {
                let pictures = input.line.get("messages").is_some();
                assert!(
                    pictures || input.line["input_ids"].is_array(),
                    "{}",
                    model.name
                );
                kinds[usize::from(pictures)] += 1;
            }
        }
        assert!(kinds.iter().all(|n| *n > 3), "{kinds:?}");
    }

    #[test]
    fn a_case_names_files_that_are_there_and_what_the_reference_says() {
        for name in ["gpu-vl-bf16", "vl-bf16"] {
            for input in fixture(&repository().join(name)).unwrap().inputs {
                let text = input.line.to_string();
                let files = text.split('"').filter(|t| t.ends_with(".png"));
                let there = |f: &str| Path::new(f).is_absolute() && Path::new(f).is_file();
                assert!(files.clone().all(there), "{text}");
                assert_eq!(files.count() > 0, text.contains(".png"));
                assert!(input.half_nmse.is_some() && input.positions.is_some());
                assert!(input.logits.ends_with(".logits") && !input.margins.is_empty());
            }
        }
    }

    #[test]
    fn a_reference_of_neither_kind_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        for text in [
            "{}",
            r#"{"cases": []}"#,
            r#"{"cases": [{"case": "a"}]}"#,
            r#"{"prompts": []}"#,
        ] {
            std::fs::write(dir.path().join("golden.json"), text).unwrap();
            assert!(fixture(dir.path()).is_err(), "{text}");
        }
    }
}
