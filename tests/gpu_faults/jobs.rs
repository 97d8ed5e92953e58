//! Jobs on a GPU that is lost or told to stop, with and without pictures.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{fixtures, nmse};
use crate::emulated::driver;
use crate::engine_common::packed;
use crate::faulty_readers::{file_of, flip_byte};
use crate::run::Run;
use crate::stops::{Calls, interrupt};

fn batch(driver: &Path, model: &str, dir: &Path, output: &str) -> Run {
    let mut run = Run::new(driver, "batch", model).env("SOURCE_DATE_EPOCH", "1700000000");
    run.command
        .arg("--in-place")
        .arg("-i")
        .arg(dir.join("job.jsonl"))
        .arg("-o")
        .arg(dir.join(output))
        .arg("--json");
    run
}

fn write(dir: &Path, rows: &[Value]) {
    let text: String = rows.iter().map(|r| format!("{r}\n")).collect();
    fs::write(dir.join("job.jsonl"), text).unwrap();
}

fn rows(n: usize) -> Vec<Value> {
    let row = |i: usize| {
        json!({"custom_id": format!("row-{i}"), "url": "/v1/completions", "body": {
            "prompt": format!("row {i}"), "max_tokens": 3 + i % 4, "ignore_eos": true, "temperature": 0.8, "seed": i}})
    };
    (0..n).map(row).collect()
}

#[track_caller]
fn ended(run: Run, expected: i32) -> String {
    let done = run.output();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(expected), "{said}");
    said
}

fn read(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines();
    lines.map(|l| serde_json::from_str(l).unwrap()).collect()
}

const TEXT: &str = "gpu-mistral-bf16";

// hazard: gpu-lost: a job: one error; finished rows stay, the same command goes on to the same bytes
#[test]
fn a_job_goes_on_after_its_gpu_was_lost() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &rows(12));
    let job = |output: &str| {
        let run = batch(driver, TEXT, dir.path(), output);
        run.args(["--device-map", "disk", "--max-sequences", "3"])
    };
    let calls = Calls::of(job("whole.jsonl"));
    let whole = fs::read(dir.path().join("whole.jsonl")).unwrap();
    for (i, fault) in [
        calls.half("kernel", "cuLaunchKernel", 719),
        calls.half("copy", "cuMemcpyHtoDAsync", 700),
        calls.half("cuStreamSynchronize", "cuStreamSynchronize", 999),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("lost-{i}.jsonl");
        let said = ended(job(&name).env("EMUCUDA_FAIL", &fault), 1);
        assert!(said.contains("CUDA_ERROR_"), "{fault}: {said}");
        let path = dir.path().join(&name);
        let kept = read(&path).len();
        assert!((1..12).contains(&kept), "{fault}: {kept} rows");
        ended(job(&name), 0);
        assert_eq!(fs::read(&path).unwrap(), whole, "{fault}");
    }
}

// hazard: sigint: a job on a GPU: what runs is finished, 130; the same command goes on to the same bytes
#[test]
fn a_job_interrupted_once_goes_on_later() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &rows(40));
    let job = |output: &str| batch(driver, TEXT, dir.path(), output);
    let mut run = job("cut.jsonl")
        .args(["--max-sequences", "2"])
        .env("EMUCUDA_KERNEL_US", "300");
    let path = dir.path().join("cut.jsonl");
    let child = started(&mut run, &path);
    interrupt(&child);
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(130), "{said}");
    let kept = read(&path).len();
    assert!((1..40).contains(&kept), "{kept} rows");
    ended(job("cut.jsonl"), 0);
    ended(job("whole.jsonl").args(["--max-sequences", "9"]), 0);
    let whole = fs::read(dir.path().join("whole.jsonl")).unwrap();
    assert_eq!(fs::read(&path).unwrap(), whole);
}

/// The job under way: a first row is written.
fn started(run: &mut Run, output: &Path) -> Child {
    let pipes = run.command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = pipes.spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while fs::read(output).unwrap_or_default().is_empty() {
        assert!(Instant::now() < until, "no row in a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

const VL: &str = "gpu-vl-bf16";

fn frames() -> Vec<PathBuf> {
    let of = |i| fixtures().join("vl-bf16").join(format!("f{i}.png"));
    (0..5).map(of).collect()
}

/// Images, frames of a video listed and as a folder, both together, none.
fn contents(dir: &Path) -> Vec<Value> {
    let folder = dir.join("frames");
    fs::create_dir_all(&folder).unwrap();
    for frame in frames() {
        fs::copy(&frame, folder.join(frame.file_name().unwrap())).unwrap();
    }
    let image = |i: usize| {
        let at = fixtures().join(VL).join(format!("image{i}.png"));
        json!({"type": "image_url", "image_url": {"url": at}})
    };
    let listed = [&frames()[0], &frames()[3], &frames()[4]];
    let listed = json!({"type": "video", "video": listed, "fps": 4});
    let folder = json!({"type": "video", "video": folder, "fps": 2, "max_frames": 4});
    let text = json!({"type": "text", "text": "What?"});
    vec![
        json!([image(0), text]),
        json!([listed, text]),
        json!([folder, text]),
        json!([image(1), listed, text]),
        json!("Nothing to see."),
    ]
}

/// The GPU's logits of prompts with videos are as near to the CPU's as 16-bit products are to float32 ones.
#[test]
fn videos_are_looked_at_as_on_the_cpu() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let lines = || {
        let message = |content| json!({"messages": [{"role": "user", "content": content}]});
        contents(dir.path()).into_iter().map(message).collect()
    };
    let on = |device| Run::on(device, driver, "score", VL).score_lines(lines());
    let (gpu, cpu) = (on("cuda"), on("cpu"));
    // What transformers' own 16-bit run of one picture is away from float32.
    let text = fs::read_to_string(fixtures().join(VL).join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let half = golden["cases"][0]["half_error"]["nmse"].as_f64().unwrap();
    for (i, (gpu, cpu)) in gpu.iter().zip(&cpu).enumerate() {
        let error = nmse(gpu, cpu);
        println!("prompt {i}: nmse {error:.2e}, half {half:.2e}");
        assert!(error < half, "prompt {i}: {error} against {half}");
    }
}

#[test]
fn rows_with_pictures_say_the_same_alone_and_in_company() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let body = |content| json!({"messages": [{"role": "user", "content": content}], "max_tokens": 3, "logprobs": true, "top_logprobs": 2, "ignore_eos": true});
    let rows: Vec<Value> = contents(dir.path())
        .into_iter()
        .enumerate()
        .map(|(i, content)| json!({"custom_id": format!("row-{i}"), "body": body(content)}))
        .collect();
    write(dir.path(), &rows);
    ended(
        batch(driver, VL, dir.path(), "all.jsonl").args(["--device-map", "disk"]),
        0,
    );
    let together = read(&dir.path().join("all.jsonl"));
    assert_eq!(together.len(), rows.len());
    let one = batch(driver, VL, dir.path(), "one.jsonl")
        .args(["--max-sequences", "1", "--device-map", "gpu"])
        .env("EMUCUDA_ORDER", "lazy");
    ended(one, 0);
    assert_eq!(read(&dir.path().join("one.jsonl")), together);
    for (i, row) in rows.iter().enumerate().take(3) {
        write(dir.path(), std::slice::from_ref(row));
        let name = format!("alone-{i}.jsonl");
        ended(
            batch(driver, VL, dir.path(), &name).args(["--device-map", "cpu"]),
            0,
        );
        assert_eq!(read(&dir.path().join(&name)), together[i..i + 1]);
    }
}

/// `run` with pictures says what the row of a job says.
#[test]
fn run_takes_images_and_videos() {
    let Some(driver) = driver() else { return };
    let image = fixtures().join(VL).join("image0.png");
    let dir = tempfile::tempdir().unwrap();
    contents(dir.path());
    let frames = dir.path().join("frames");
    let said = |more: &[&str]| {
        let mut run = Run::new(driver, "run", VL)
            .args([
                "--greedy",
                "--ignore-eos",
                "--max-tokens",
                "3",
                "--prompt",
                "What?",
            ])
            .args(["--device-map", "disk"]);
        run.command.args(more);
        run.json()
    };
    let picture = said(&["--image", image.to_str().unwrap()]);
    let video = said(&["--video", frames.to_str().unwrap(), "--max-frames", "4"]);
    let none = said(&[]);
    assert_eq!(picture["vision"]["pictures"], 1, "{picture}");
    assert_eq!(video["vision"]["pictures"], 1, "{video}");
    assert_ne!(picture["prompt_token_ids"], none["prompt_token_ids"]);
    for (report, waves) in [(&picture, 1), (&video, 1)] {
        assert_eq!(report["vision"]["waves"], waves);
        assert_eq!(report["token_ids"].as_array().unwrap().len(), 3);
    }
}

// hazard: bit-rot: of the vision tower on disk, for a GPU: one error; names block and file
#[test]
fn a_flipped_byte_of_the_tower_is_named() {
    let Some(driver) = driver() else { return };
    let image = fixtures().join(VL).join("image0.png");
    let dir = tempfile::tempdir().unwrap();
    let store = packed(VL, dir.path());
    flip_byte(&file_of(&store, "vision.000.dat"), 5000);
    let run = Run::new(driver, "run", store.dir.to_str().unwrap())
        .args(["--greedy", "--max-tokens", "2", "--prompt", "What?"])
        .args(["--image", image.to_str().unwrap()]);
    let said = run.fails();
    let named = ["vision block 0", "vision.000.dat", "block 0"];
    assert!(named.iter().all(|n| said.contains(n)), "{said}");
}
