//! Whole models end to end: logits against the CPU's and against the reference's, greedy tokens, and the same bits from every reader, depth
//! and page size.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tensorpager::checkpoint::write_synthetic;

use super::bed::nmse;
use super::tools::{Ran, run};
use super::{Outcome, Suite};

const LIMIT: Duration = Duration::from_secs(120);
/// Where there is no reference run to compare with: what 16-bit arithmetic may cost.
const ALLOWED: f64 = 1e-3;
/// Below it two tokens are as good as equal.
const CLEAR: f64 = 0.02;

struct Model {
    name: String,
    folder: PathBuf,
    golden: Option<Value>,
    inputs: Vec<Vec<u32>>,
}

fn tensorpager(suite: &Suite, arguments: &[&str]) -> Outcome<Ran> {
    let mut command = Command::new(suite.binary());
    command
        .args(arguments)
        .arg("--offload-folder")
        .arg(suite.scratch.join("packs"));
    run(&mut command, LIMIT)
}

fn folders(suite: &Suite) -> Vec<PathBuf> {
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

/// How files are read here, as the engine says it.
pub fn reader(suite: &Suite) -> String {
    let Some(folder) = folders(suite).into_iter().next() else {
        return "no fixture to read".into();
    };
    let folder = folder.display().to_string();
    let arguments = [
        "run",
        &folder,
        "--device",
        "cpu",
        "--in-place",
        "--raw",
        "--prompt",
        "a",
        "-n",
        "1",
        "--greedy",
        "--json",
        "--device-map",
        "disk",
    ];
    let ran = match tensorpager(suite, &arguments) {
        Ok(ran) => ran,
        Err(e) => return e.to_string(),
    };
    let Ok(report) = ran.json() else {
        return ran.why();
    };
    let paging = &report["paging"];
    let why = ran
        .stderr
        .lines()
        .find(|l| l.contains("io_uring"))
        .unwrap_or("");
    let direct = match paging["direct"].as_bool() {
        Some(true) => "O_DIRECT",
        _ => "through the page cache",
    };
    format!("{}, {direct} {why}", paging["io"].as_str().unwrap_or("?"))
        .trim()
        .to_string()
}

fn models(suite: &Suite) -> Outcome<Vec<Model>> {
    let mut models = Vec::new();
    for folder in folders(suite) {
        let golden: Value = serde_json::from_slice(&std::fs::read(folder.join("golden.json"))?)?;
        let Some(prompts) = golden["prompts"].as_array() else {
            continue;
        };
        let ids = |p: &Value| {
            let ids = p["input_ids"].as_array().into_iter().flatten();
            ids.filter_map(|i| i.as_u64().map(|i| i as u32)).collect()
        };
        models.push(Model {
            name: folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            inputs: prompts.iter().map(ids).collect(),
            golden: Some(golden),
            folder,
        });
    }
    // Every head size that the fixtures may lack, with weights that mean nothing.
    for (heads, kv_heads, head) in [(4, 2, 64), (2, 1, 128)] {
        let folder = suite.scratch.join(format!("random-h{head}"));
        let config = small(heads, kv_heads, head);
        write_synthetic(&folder, &config, &mut |_, _| Ok(()))?;
        tokenizer(suite, &folder)?;
        models.push(Model {
            name: format!("random weights, heads of {head}"),
            inputs: [1usize, 9, 70]
                .map(|n| (0..n as u32).map(|i| (i * 37 + 11) % 250).collect())
                .into(),
            golden: None,
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

/// Shapes and values by name.
type Tensors = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// The float32 tensors of a safetensors file.
fn tensors(path: &Path) -> Outcome<Tensors> {
    let bytes = std::fs::read(path)?;
    let length = u64::from_le_bytes(bytes[..8].try_into()?) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length])?;
    let data = &bytes[8 + length..];
    let mut found = HashMap::new();
    for (name, t) in header.as_object().ok_or("no header")? {
        if t["dtype"] != "F32" {
            continue;
        }
        let at = |i: usize| t["data_offsets"][i].as_u64().unwrap_or(0) as usize;
        let values = data[at(0)..at(1)].chunks_exact(4);
        let shape = t["shape"].as_array().into_iter().flatten();
        found.insert(
            name.clone(),
            (
                shape
                    .filter_map(|d| d.as_u64().map(|d| d as usize))
                    .collect(),
                values
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
            ),
        );
    }
    Ok(found)
}

/// Scores the model's inputs; where the logits lie, or why there are none.
fn score(
    suite: &Suite,
    model: &Model,
    device: &str,
    more: &[&str],
) -> Outcome<Result<PathBuf, String>> {
    let inputs = suite.scratch.join("inputs.jsonl");
    let lines = model
        .inputs
        .iter()
        .map(|ids| json!({"input_ids": ids}).to_string() + "\n");
    std::fs::write(&inputs, lines.collect::<String>())?;
    let output = suite.scratch.join(format!("{device}.safetensors"));
    let _ = std::fs::remove_file(&output);
    let (folder, inputs) = (
        model.folder.display().to_string(),
        inputs.display().to_string(),
    );
    let out = output.display().to_string();
    let mut arguments = vec![
        "score", &folder, "--device", device, "--input", &inputs, "--output", &out, "--quiet",
    ];
    arguments.extend(more);
    if !more.contains(&"--device-map") {
        arguments.extend(["--device-map", "disk"]);
    }
    let ran = tensorpager(suite, &arguments)?;
    Ok(match ran.ok {
        true => Ok(output),
        false => Err(ran.why()),
    })
}

pub fn section(suite: &mut Suite) -> Outcome<()> {
    suite.report.table(
        "Models end to end",
        &["model", "nmse to CPU", "to float32", "theirs", "tokens", ""],
    );
    let models = models(suite)?;
    let mut runs = Vec::new();
    for model in &models {
        // Every bit of the model's way, on the same bytes.
        let gpu = match score(suite, model, "cuda", &["--in-place"])? {
            Ok(path) => tensors(&path)?,
            Err(why) if why.contains("head size") || why.contains("float32") => {
                let why = why
                    .split(';')
                    .next()
                    .unwrap_or("")
                    .trim_start_matches("error: ");
                suite.report.row(&[&model.name, "-", "-", "-", "-", why]);
                continue;
            }
            Err(why) => {
                suite.report.failed(&format!("{}: {why}", model.name));
                continue;
            }
        };
        let cpu = tensors(&score(suite, model, "cpu", &["--in-place"])??)?;
        compare(suite, model, &gpu, &cpu)?;
        runs.push(model);
    }
    if let Some(model) = runs.last() {
        identical(suite, model)?;
    }
    Ok(())
}

fn compare(suite: &mut Suite, model: &Model, gpu: &Tensors, cpu: &Tensors) -> Outcome<()> {
    let (mut to_cpu, mut to_reference, mut theirs) = (0.0f64, 0.0f64, 0.0f64);
    let reference = match &model.golden {
        Some(_) => tensors(&model.folder.join("golden.safetensors"))?,
        None => HashMap::new(),
    };
    let mut closer = true;
    for (i, _) in model.inputs.iter().enumerate() {
        let name = format!("logits.{i}");
        let (shape, got) = gpu.get(&name).ok_or("logits are missing")?;
        to_cpu = to_cpu.max(nmse(got, &cpu.get(&name).ok_or("logits are missing")?.1));
        let (Some(golden), Some((_, want))) = (&model.golden, reference.get(&name)) else {
            continue;
        };
        let prompt = &golden["prompts"][i];
        let vocab = shape[1];
        let picked: Vec<f32> = match prompt["positions"].as_array() {
            None => got.clone(),
            Some(list) => list
                .iter()
                .filter_map(Value::as_u64)
                .flat_map(|p| &got[p as usize * vocab..][..vocab])
                .copied()
                .collect(),
        };
        let own = nmse(&picked, want);
        let other = prompt["half_error"]["nmse"].as_f64().unwrap_or(ALLOWED);
        closer &= own <= other;
        (to_reference, theirs) = (to_reference.max(own), theirs.max(other));
    }
    let tokens = tokens(suite, model)?;
    let allowed = if theirs > 0.0 { 4.0 * theirs } else { ALLOWED };
    let holds = to_cpu <= allowed && closer && tokens.as_ref().is_none_or(|t| t.0 == t.1);
    let known = |x: f64| {
        if theirs > 0.0 {
            format!("{x:.1e}")
        } else {
            "-".into()
        }
    };
    suite.report.checked(
        holds,
        &[
            &model.name,
            &format!("{to_cpu:.1e}"),
            &known(to_reference),
            &known(theirs),
            &tokens.map_or("-".into(), |(same, of)| format!("{same}/{of}")),
            "",
        ],
    );
    Ok(())
}

/// Greedy tokens that both devices choose, of those that are clear in the reference; `None` without one.
fn tokens(suite: &Suite, model: &Model) -> Outcome<Option<(usize, usize)>> {
    let Some(golden) = &model.golden else {
        return Ok(None);
    };
    let (mut same, mut of) = (0, 0);
    for prompt in golden["prompts"].as_array().into_iter().flatten() {
        let Some(text) = prompt["text"].as_str() else {
            continue;
        };
        // As clear as what a 16-bit run may be wrong by.
        let wrong = prompt["half_error"]["max_abs"].as_f64().unwrap_or(0.0);
        let margins = prompt["margins"].as_array().into_iter().flatten();
        let clear = margins
            .filter_map(Value::as_f64)
            .take_while(|m| *m >= wrong.max(CLEAR))
            .count();
        if clear == 0 {
            continue;
        }
        let (gpu, cpu) = (
            generate(suite, model, "cuda", text, clear)?,
            generate(suite, model, "cpu", text, clear)?,
        );
        same += gpu.iter().zip(&cpu).filter(|(g, c)| g == c).count();
        of += clear;
    }
    Ok(Some((same, of)))
}

fn generate(
    suite: &Suite,
    model: &Model,
    device: &str,
    text: &str,
    count: usize,
) -> Outcome<Vec<u64>> {
    let (folder, count) = (model.folder.display().to_string(), count.to_string());
    let arguments = [
        "run",
        &folder,
        "--device",
        device,
        "--in-place",
        "--raw",
        "--prompt",
        text,
        "--greedy",
        "--ignore-eos",
        "-n",
        &count,
        "--json",
        "--device-map",
        "disk",
    ];
    let ran = tensorpager(suite, &arguments)?;
    if !ran.ok {
        return Err(format!("{}: {}", model.name, ran.why()).into());
    }
    let report = ran.json()?;
    let ids = report["token_ids"].as_array().into_iter().flatten();
    Ok(ids.filter_map(Value::as_u64).collect())
}

/// The same logits, bit for bit, however the bytes came.
fn identical(suite: &mut Suite, model: &Model) -> Outcome<()> {
    suite.report.table(
        "Readers, depths and page sizes: the same bits",
        &["how", ""],
    );
    let base = match score(suite, model, "cuda", &["--in-place"])? {
        Ok(path) => std::fs::read(path)?,
        Err(why) => return Err(why.into()),
    };
    let ways: [&[&str]; 9] = [
        &["--in-place", "--io", "io_uring"],
        &["--in-place", "--io", "threads"],
        &["--in-place", "--io", "mmap"],
        &["--in-place", "--prefetch-depth", "1"],
        &["--in-place", "--prefetch-depth", "3"],
        &["--in-place", "--page-size", "64KiB"],
        &["--in-place", "--queue-depth", "1"],
        &["--io", "threads"],
        &["--device-map", "auto"],
    ];
    for way in ways {
        let name = match way[0] {
            "--in-place" => way.join(" "),
            _ => format!("packed {}", way.join(" ")),
        };
        match score(suite, model, "cuda", way)? {
            Ok(path) => {
                let same = std::fs::read(path)? == base;
                suite.report.checked(same, &[&name, ""]);
            }
            Err(why) if way.contains(&"io_uring") => {
                suite.report.row(&[&name, &format!("not here: {why}")]);
            }
            Err(why) => suite.report.failed(&format!("{name}: {why}")),
        }
    }
    Ok(())
}
