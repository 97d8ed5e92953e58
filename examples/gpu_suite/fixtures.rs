//! Whole models end to end: logits against the CPU's and against the reference's, greedy tokens, and the same bits from every reader, depth
//! and page size.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::bed::nmse;
use super::goals::Goal;
use super::models::{self, Model, Prompt, folders};
use super::tools::{Ran, run};
use super::{Outcome, Suite, TIME_IS_UP};

const LIMIT: Duration = Duration::from_secs(120);
/// Where there is no reference run to compare with: what 16-bit arithmetic may cost.
const ALLOWED: f64 = 1e-3;
/// Below it two tokens are as good as equal.
const CLEAR: f64 = 0.02;

fn tensorpager(suite: &Suite, arguments: &[&str]) -> Outcome<Ran> {
    let mut command = Command::new(suite.binary());
    command
        .args(arguments)
        .arg("--offload-folder")
        .arg(suite.scratch.join("packs"));
    run(&mut command, suite.left().min(LIMIT))
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

/// All models, and of the fixtures that cannot be read why not.
fn models(suite: &Suite) -> Outcome<(Vec<Model>, Vec<String>)> {
    let (mut found, mut unread) = (Vec::new(), Vec::new());
    for folder in folders(suite) {
        match models::fixture(&folder) {
            Ok(model) => found.push(model),
            Err(why) => unread.push(format!("{}: {why}", folder.display())),
        }
    }
    found.extend(models::random(suite)?);
    Ok((found, unread))
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
    let lines = model.inputs.iter().map(|i| i.line.to_string() + "\n");
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
    let (models, unread) = models(suite)?;
    for why in unread {
        suite.report.failed(&why);
    }
    let mut runs = Vec::new();
    for model in &models {
        if suite.up() {
            suite.report.not_run(&model.name, TIME_IS_UP);
            continue;
        }
        match end_to_end(suite, model) {
            Ok(true) => runs.push(model),
            Ok(false) => {}
            // What was stopped by the end of the time says nothing.
            Err(_) if suite.up() => suite.report.not_run(&model.name, TIME_IS_UP),
            Err(e) => return Err(e),
        }
    }
    match runs.iter().rfind(|m| m.golden) {
        Some(model) => identical(suite, model),
        None => Ok(()),
    }
}

/// Every bit of the model's way, on the same bytes. False where a GPU does not run it.
fn end_to_end(suite: &mut Suite, model: &Model) -> Outcome<bool> {
    let gpu = match score(suite, model, "cuda", &["--in-place"])? {
        Ok(path) => tensors(&path)?,
        Err(why) if why.contains("head size") || why.contains("float32") => {
            let why = why.split(';').next().unwrap_or("");
            let why = why.trim_start_matches("error: ");
            suite.report.not_run(&model.name, why);
            return Ok(false);
        }
        Err(why) if suite.up() => return Err(why.into()),
        Err(why) => {
            suite.report.failed(&format!("{}: {why}", model.name));
            return Ok(false);
        }
    };
    let cpu = tensors(&score(suite, model, "cpu", &["--in-place"])??)?;
    compare(suite, model, &gpu, &cpu)?;
    Ok(true)
}

fn compare(suite: &mut Suite, model: &Model, gpu: &Tensors, cpu: &Tensors) -> Outcome<()> {
    let (mut to_cpu, mut to_reference, mut theirs) = (0.0f64, 0.0f64, 0.0f64);
    let reference = match model.golden {
        true => tensors(&model.folder.join("golden.safetensors"))?,
        false => HashMap::new(),
    };
    let mut closer = true;
    for (i, input) in model.inputs.iter().enumerate() {
        let name = format!("logits.{i}");
        let (shape, got) = gpu.get(&name).ok_or("logits are missing")?;
        to_cpu = to_cpu.max(nmse(got, &cpu.get(&name).ok_or("logits are missing")?.1));
        if !model.golden {
            continue;
        }
        let want = reference.get(&input.logits);
        let want = &want
            .ok_or_else(|| format!("the reference has no {}", input.logits))?
            .1;
        let vocab = shape[1];
        let picked: Vec<f32> = match &input.positions {
            None => got.clone(),
            Some(list) => list
                .iter()
                .flat_map(|p| &got[p * vocab..][..vocab])
                .copied()
                .collect(),
        };
        let own = nmse(&picked, want);
        let other = input.half_nmse.unwrap_or(ALLOWED);
        closer &= own <= other;
        (to_reference, theirs) = (to_reference.max(own), theirs.max(other));
        suite.goals.seen(Goal::Logits, own / other);
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
    if !model.golden {
        return Ok(None);
    }
    let (mut same, mut of) = (0, 0);
    for input in &model.inputs {
        let Some(prompt) = &input.prompt else {
            continue;
        };
        // As clear as what a 16-bit run may be wrong by.
        let least = input.half_max.max(CLEAR);
        let clear = input.margins.iter().take_while(|m| **m >= least).count();
        if clear == 0 {
            continue;
        }
        let (gpu, cpu) = (
            generate(suite, model, "cuda", prompt, clear)?,
            generate(suite, model, "cpu", prompt, clear)?,
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
    prompt: &Prompt,
    count: usize,
) -> Outcome<Vec<u64>> {
    let (folder, count) = (model.folder.display().to_string(), count.to_string());
    let file = suite.scratch.join("messages.json");
    let messages = file.display().to_string();
    let given: &[&str] = match prompt {
        Prompt::Text(text) => &["--raw", "--prompt", text],
        Prompt::Messages(list) => {
            std::fs::write(&file, list.to_string())?;
            &["--messages", &messages]
        }
    };
    let arguments = [
        "run",
        &folder,
        "--device",
        device,
        "--in-place",
        "--greedy",
        "--ignore-eos",
        "-n",
        &count,
        "--json",
        "--device-map",
        "disk",
    ];
    let ran = tensorpager(suite, &[&arguments, given].concat())?;
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
        Err(_) if suite.up() => {
            suite.report.not_run("all of them", TIME_IS_UP);
            return Ok(());
        }
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
        if suite.up() {
            suite.report.not_run(&name, TIME_IS_UP);
            continue;
        }
        match score(suite, model, "cuda", way)? {
            Err(_) if suite.up() => suite.report.not_run(&name, TIME_IS_UP),
            Ok(path) => {
                let same = std::fs::read(path)? == base;
                suite.report.checked(same, &[&name, ""]);
            }
            Err(why) if way.contains(&"io_uring") => {
                suite.report.not_run(&name, &format!("not here: {why}"));
            }
            Err(why) => suite.report.failed(&format!("{name}: {why}")),
        }
    }
    Ok(())
}
