//! The program beside the emulated driver.
#![allow(dead_code)] // each test file uses a part

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tensorpager::checkpoint::write_synthetic;

use crate::common::program::program_within;
use crate::common::{fixtures, read_safetensors};

/// One run of the program beside the emulated driver.
pub struct Run {
    pub command: Command,
    pub folder: tempfile::TempDir,
}

impl Run {
    pub fn new(driver: &Path, command: &str, model: &str) -> Run {
        Run::on("cuda", driver, command, model)
    }

    pub fn on(device: &str, driver: &Path, command: &str, model: &str) -> Run {
        Run::within("512", device, driver, command, model)
    }

    pub fn within(context: &str, device: &str, driver: &Path, command: &str, model: &str) -> Run {
        let folder = tempfile::tempdir().unwrap();
        let mut run = program_within(folder.path());
        run.arg(command)
            .arg(fixtures().join(model))
            .args(["--device", device, "--threads", "2", "--context", context])
            .arg("--offload-folder")
            .arg(folder.path().join("offload"))
            .env("LD_LIBRARY_PATH", driver);
        Run {
            command: run,
            folder,
        }
    }

    pub fn args<const N: usize>(mut self, args: [&str; N]) -> Run {
        self.command.args(args);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Run {
        self.command.env(name, value);
        self
    }

    pub fn output(mut self) -> Output {
        self.command.output().unwrap()
    }

    /// As [`Run::output`], with the folder that the run wrote to.
    pub fn output_and_folder(mut self) -> (tempfile::TempDir, Output) {
        let done = self.command.output().unwrap();
        (self.folder, done)
    }

    pub fn fails(self) -> String {
        let done = self.output();
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(1), "{text}");
        text
    }

    /// The logits of every input, `[tokens, vocab]`.
    pub fn score(self, inputs: &[Vec<u32>]) -> Vec<Vec<f32>> {
        let lines = inputs.iter().map(|ids| json!({ "input_ids": ids }));
        self.score_lines(lines.collect())
    }

    pub fn score_lines(mut self, inputs: Vec<Value>) -> Vec<Vec<f32>> {
        let (from, to) = (
            self.folder.path().join("in.jsonl"),
            self.folder.path().join("out.safetensors"),
        );
        let lines: Vec<String> = inputs.iter().map(Value::to_string).collect();
        std::fs::write(&from, lines.join("\n")).unwrap();
        self.command
            .arg("--input")
            .arg(&from)
            .arg("--output")
            .arg(&to);
        let done = self.command.output().unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        let tensors = read_safetensors(&to);
        (0..inputs.len())
            .map(|i| tensors[&format!("logits.{i}")].f32s())
            .collect()
    }

    /// The closing object of a run.
    pub fn json(self) -> Value {
        let done = self.args(["--json"]).output();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        let text = String::from_utf8(done.stdout).unwrap();
        let line = text.lines().rfind(|l| l.starts_with('{')).unwrap_or(&text);
        serde_json::from_str(line)
            .or_else(|_| serde_json::from_str(&text))
            .unwrap()
    }
}

/// So many layers that two of them are little beside all.
pub fn deep(dir: &Path) -> String {
    layered(dir, 12)
}

/// Many small layers, one like the other.
pub fn layered(dir: &Path, layers: usize) -> String {
    synthetic(
        dir,
        &json!({
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 2, "vocab_size": 288, "tie_word_embeddings": true,
        }),
    )
}

/// A llama of one KV head, shaped as `shape` says.
pub fn synthetic(dir: &Path, shape: &Value) -> String {
    let model = dir.join("deep");
    let mut config = json!({
        "model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 1, "head_dim": 64,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "torch_dtype": "bfloat16"
    });
    let shape = shape.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(shape);
    write_synthetic(&model, &config, &mut |_, _| Ok(())).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(
            fixtures().join("gpu-qwen2-bf16").join(name),
            model.join(name),
        )
        .unwrap();
    }
    model.display().to_string()
}
