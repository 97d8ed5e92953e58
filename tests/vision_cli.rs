//! Pictures on the command line: every option and every kind of source, on the small fixture.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::program::{program, word};
use common::{Tensor, read_safetensors};
use serde_json::{Map, Value, json};

fn model() -> PathBuf {
    common::fixtures().join("vl-bf16")
}

fn command(name: &str, model: &Path) -> Command {
    let mut c = program();
    c.arg(name).arg(model).args(["--threads", "2"]);
    // Relative paths are taken from here.
    c.current_dir(crate::model());
    c
}

fn run(more: &[&str]) -> Output {
    let mut c = command("run", &model());
    c.args([
        "--in-place",
        "--device-map",
        "disk",
        "--greedy",
        "--ignore-eos",
        "--max-tokens",
        "4",
        "--json",
    ]);
    c.args(more).output().unwrap()
}

#[track_caller]
fn answer(more: &[&str]) -> Value {
    let out = run(more);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    serde_json::from_slice(&out.stdout).unwrap()
}

#[track_caller]
fn refused(more: &[&str], code: i32) -> String {
    let out = run(more);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    let at = lines.iter().position(|l| l.starts_with("error: ")).unwrap();
    assert!(
        lines[at + 1].starts_with("cause: ") && lines[at + 2].starts_with("fix: "),
        "{stderr}"
    );
    stderr
}

/// Placeholders of images and of videos in the prompt.
fn pads(report: &Value) -> (usize, usize) {
    let ids = report["prompt_token_ids"].as_array().unwrap();
    let count = |id: u64| ids.iter().filter(|v| v.as_u64() == Some(id)).count();
    (count(286), count(287))
}

#[test]
fn images_in_their_order_and_as_large_as_asked() {
    let two = answer(&[
        "--image",
        "image1.png",
        "--image",
        "image0.png",
        "-p",
        "Compare",
    ]);
    // 61 x 150 → 56 x 140 and 131 x 97 → 140 x 84: 10 and 15 cells.
    assert_eq!(pads(&two), (25, 0));
    assert_eq!(two["vision"]["pictures"], 2);
    assert_eq!(two["vision"]["waves"], 1);
    let small = answer(&[
        "--image",
        "image0.png",
        "--max-pixels",
        "3136",
        "-p",
        "Compare",
    ]);
    assert_eq!(pads(&small).0, 2, "84 x 28");
    let large = answer(&[
        "--image",
        "image0.png",
        "--min-pixels",
        "100k",
        "--max-pixels",
        "200k",
        "-p",
        "Compare",
    ]);
    assert!(pads(&large).0 * 784 >= 100_000, "{}", pads(&large).0);
    // The same picture, named in messages.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.json");
    let text = |t: &str| json!({"type": "text", "text": t});
    let image = |at: &str| json!({"type": "image_url", "image_url": {"url": at}});
    let messages = json!([{"role": "user", "content": [image("image1.png"), image("image0.png"), text("Compare")]}]);
    fs::write(&file, messages.to_string()).unwrap();
    let said = answer(&["--messages", file.to_str().unwrap()]);
    assert_eq!(said["token_ids"], two["token_ids"]);
    assert_eq!(said["prompt_token_ids"], two["prompt_token_ids"]);
}

#[test]
fn text_has_no_vision_figures_and_the_same_bytes_a_pass() {
    let text = answer(&["-p", "What is paging?"]);
    let seen = answer(&["--image", "image0.png", "-p", "What is paging?"]);
    assert!(text.get("vision").is_none());
    assert!(seen["vision"]["disk_bytes"].as_u64().unwrap() > 0);
    for key in ["bytes_per_pass", "disk_bytes_per_pass"] {
        assert_eq!(text["paging"][key], seen["paging"][key], "{key}");
    }
}

#[test]
fn videos_from_folders_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let frames = dir.path().join("frames");
    fs::create_dir(&frames).unwrap();
    for i in 0..5 {
        fs::copy(
            model().join(format!("f{i}.png")),
            frames.join(format!("{i}.png")),
        )
        .unwrap();
    }
    let frames = frames.to_str().unwrap();
    let all = answer(&["--video", frames, "-p", "What moves?"]);
    let few = answer(&["--video", frames, "--max-frames", "2", "-p", "What moves?"]);
    assert_eq!(
        (pads(&all).0, pads(&all).1),
        (0, 3 * pads(&few).1),
        "five frames are three pairs"
    );
    let mixed = answer(&["--video", frames, "--image", "image0.png", "-p", "Both?"]);
    assert_eq!(pads(&mixed), (15, pads(&all).1));
    // At 2 frames a second the two clocks agree.
    let said = |more: &[&str]| {
        let args = [&["--video", frames, "-p", "What moves?"], more].concat();
        answer(&args)["token_ids"].clone()
    };
    assert_eq!(
        said(&["--fps", "2"]),
        said(&["--fps", "2", "--video-clock", "exact"])
    );
    let e = refused(&["--video", "/nowhere", "-p", "x"], 1);
    assert!(e.contains("/nowhere"), "{e}");

    let clip = dir.path().join("clip.mp4");
    let made = Command::new("ffmpeg")
        .args([
            "-v",
            "error",
            "-f",
            "lavfi",
            "-i",
            "testsrc=size=96x64:rate=8:duration=3",
            "-c:v",
            "mpeg4",
            "-y",
        ])
        .arg(&clip)
        .status();
    let clip = clip.to_str().unwrap();
    if made.is_ok_and(|s| s.success()) {
        // 3 s at 2 frames a second: 6 frames, 3 pairs. At most 4: 2 pairs.
        let whole = pads(&answer(&["--video", clip, "-p", "What?"])).1;
        let short = pads(&answer(&[
            "--video",
            clip,
            "--max-frames",
            "4",
            "-p",
            "What?",
        ]))
        .1;
        assert_eq!(whole * 2, short * 3);
        let slow = pads(&answer(&["--video", clip, "--fps", "4", "-p", "What?"])).1;
        assert_eq!(slow, whole * 2);
    } else {
        println!("skipped: no ffmpeg that can write a test clip");
        fs::write(clip, "x").unwrap();
    }
    let mut c = command("run", &model());
    let out = c
        .args(["--in-place", "--video", clip, "-p", "What?"])
        .env("PATH", dir.path())
        .output()
        .unwrap();
    let e = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1));
    assert!(
        e.contains("not installed") && e.contains("install ffmpeg"),
        "{e}"
    );
}

#[test]
fn what_memory_does_not_hold_is_refused_with_the_numbers() {
    let small = ["--cpu-memory", "100MiB", "-p", "What?"];
    let with = |more: &[&'static str]| [&small[..], more].concat();
    // Pixels that would not fit are never made: 60 million take 180 MB.
    let e = refused(
        &with(&[
            "--image",
            "image0.png",
            "--min-pixels",
            "60M",
            "--max-pixels",
            "64M",
        ]),
        1,
    );
    assert!(e.contains("104.9 MB") && e.contains("--max-pixels"), "{e}");
    assert_eq!(pads(&answer(&with(&["--image", "image0.png"]))), (15, 0));
}

/// What a message says of pixels and frames is what does.
#[test]
fn pictures_that_do_not_fit_do_under_the_limits_named() {
    // 1,800 tokens: within the model's context, with a tower that takes more than anything else.
    let large = [
        "--min-pixels",
        "1.4M",
        "--max-pixels",
        "1.42M",
        "-p",
        "What?",
    ];
    fn at<'a>(more: &[&'a str], memory: &'a str) -> Vec<&'a str> {
        [&["--image", "image0.png", "--cpu-memory", memory], more].concat()
    }
    let e = refused(&at(&large, "1MiB"), 1);
    assert!(e.contains("the picture image0.png does not fit"), "{e}");
    let pixels = word(&e, "give --cpu-memory ");
    // The pixels fit, the tower does not.
    let e = refused(&at(&large, &pixels), 1);
    assert!(
        e.contains("pictures ") && !e.contains("pictures 0 B"),
        "{e}"
    );
    let whole = word(&e, "give --cpu-memory ");
    answer(&at(&large, &whole));
    let mib = |text: &str| -> u64 { text.trim_end_matches("MiB").parse().unwrap() };
    let less = format!("{}MiB", mib(&whole) - 10);
    let e = refused(&at(&large, &less), 1);
    let limit = word(&e, "with --min-pixels ");
    assert!(
        e.contains(&format!(
            "--min-pixels {limit} --max-pixels {limit} it fits"
        )),
        "{e}"
    );
    let bounds = [
        "--min-pixels",
        &limit,
        "--max-pixels",
        &limit,
        "-p",
        "What?",
    ];
    let fits = answer(&at(&bounds, &less));
    let (tokens, _) = pads(&fits);
    assert!(
        tokens * 784 * 10 > limit.parse::<usize>().unwrap() * 9,
        "{tokens}"
    );
    // Twice as many pixels do not.
    let twice = (2 * limit.parse::<u64>().unwrap()).to_string();
    let bounds = [
        "--min-pixels",
        &twice,
        "--max-pixels",
        &twice,
        "-p",
        "What?",
    ];
    let e = refused(&at(&bounds, &less), 1);
    assert!(e.contains("does not fit"), "{e}");
}

#[test]
fn a_prompt_that_pictures_make_too_long_is_told_the_limit() {
    let asked = [
        "--image",
        "image0.png",
        "--context",
        "60",
        "-p",
        "What is that?",
    ];
    let large = ["--min-pixels", "100k", "--max-pixels", "110k"];
    let e = refused(&[&asked[..], &large].concat(), 2);
    assert!(
        e.contains("is too long") && e.contains("its pictures take "),
        "{e}"
    );
    let limit = word(&e, "--max-pixels ");
    let limits = ["--min-pixels", &limit, "--max-pixels", &limit];
    let fits = answer(&[&asked[..], &limits].concat());
    let taken = word(&e, "they take ");
    assert_eq!(pads(&fits).0.to_string(), taken, "{e}");
    let room = 60 - fits["prompt_token_ids"].as_array().unwrap().len();
    assert!(room >= 4, "the whole answer has room: {room}");
    assert_eq!(fits["token_ids"].as_array().unwrap().len(), 4);

    // Of a video there may be fewer frames as well.
    let dir = tempfile::tempdir().unwrap();
    for i in 0..8 {
        let to = dir.path().join(format!("{i}.png"));
        fs::copy(model().join(format!("f{}.png", i % 5)), to).unwrap();
    }
    let frames = dir.path().to_str().unwrap();
    let whole = answer(&["--video", frames, "-p", "What?"]);
    let all = whole["prompt_token_ids"].as_array().unwrap().len();
    let context = (all - 1).to_string();
    let asked = ["--video", frames, "--context", &context, "-p", "What?"];
    let e = refused(&asked, 2);
    let fewer = word(&e, "--max-frames ");
    let fits = answer(&[&asked[..], &["--max-frames", &fewer]].concat());
    assert!(pads(&fits).1 < pads(&whole).1 && pads(&fits).1 > 0, "{e}");
}

#[test]
fn pictures_where_they_cannot_be() {
    let e = refused(&["--image", "none.png", "-p", "x"], 1);
    assert!(e.contains("none.png"), "{e}");
    let e = refused(&["--image", "config.json", "-p", "x"], 1);
    assert!(e.contains("none of PNG, JPEG, WebP"), "{e}");
    refused(&["--image", "https://example.org/a.png", "-p", "x"], 2);
    refused(&["--image", "image0.png", "--fps", "0", "-p", "x"], 2);
    let text = common::fixtures().join("qwen2-bf16");
    let mut c = command("run", &text);
    let out = c
        .args(["--in-place", "--image", "image0.png", "-p", "x"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("no vision tower"));
}

#[test]
fn the_plan_says_what_pictures_cost() {
    let plan = |model: &Path| -> Value {
        let mut c = command("plan", model);
        c.args([
            "--disk-gb-per-s",
            "1",
            "--memory-gb-per-s",
            "10",
            "--cpu-gflops",
            "100",
            "--in-place",
            "--json",
        ]);
        let out = c.output().unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        serde_json::from_slice(&out.stdout).unwrap()
    };
    let pictures = &plan(&model())["pictures"];
    assert!(pictures["tower_bytes"].as_u64().unwrap() > 0);
    let image = &pictures["each"][0];
    assert_eq!(image["tokens"], 1275);
    for key in ["kv_bytes", "memory_bytes"] {
        assert!(image[key].as_u64().unwrap() > 0, "{key}");
    }
    assert!(pictures["each_s"][0].as_f64().unwrap() > 0.0);
    assert!(
        plan(&common::fixtures().join("qwen2-bf16"))
            .get("pictures")
            .is_none()
    );
}

/// All tensors of the fixture, by the names on disk.
fn tensors() -> Vec<(String, Tensor)> {
    let mut all: Vec<(String, Tensor)> = (1..=5)
        .flat_map(|i| {
            read_safetensors(&model().join(format!("model-0000{i}-of-00005.safetensors")))
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn write_safetensors(path: &Path, tensors: &[(String, Tensor)]) {
    let mut header = Map::new();
    let mut at = 0;
    for (name, t) in tensors {
        let end = at + t.bytes.len();
        header.insert(
            name.clone(),
            json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    tensors.iter().for_each(|(_, t)| bytes.extend(&t.bytes));
    fs::write(path, bytes).unwrap();
}

/// Names as transformers has them in memory, and accelerate on disk.
fn in_memory(name: &str) -> String {
    match name.split_once('.') {
        Some(("visual", rest)) => format!("model.visual.{rest}"),
        Some(("model", rest)) => format!("model.language_model.{rest}"),
        _ => name.to_string(),
    }
}

fn config() -> Value {
    serde_json::from_slice(&fs::read(model().join("config.json")).unwrap()).unwrap()
}

/// The config as the hub's folders have it.
fn flat_config() -> Value {
    let nested = config();
    let mut flat = nested["text_config"].clone();
    let root = flat.as_object_mut().unwrap();
    let rope = root.remove("rope_parameters").unwrap();
    root.insert("rope_theta".into(), rope["rope_theta"].clone());
    root.insert(
        "rope_scaling".into(),
        json!({"type": "mrope", "mrope_section": rope["mrope_section"]}),
    );
    root.insert("model_type".into(), json!("qwen2_5_vl"));
    for key in [
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ] {
        root.insert(key.into(), nested[key].clone());
    }
    let mut vision = nested["vision_config"].clone();
    let v = vision.as_object_mut().unwrap();
    let channels = v.remove("in_channels").unwrap();
    v.insert("in_chans".into(), channels);
    v.remove("rope_parameters");
    root.insert("vision_config".into(), vision);
    flat
}

fn folder(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    ] {
        fs::copy(model().join(name), dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// The file of logits that `score` writes for an image and a video.
fn score(model: &Path, more: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let frames: Vec<String> = (0..3).map(|i| format!("f{i}.png")).collect();
    let content = json!([{"type": "image", "image": "image1.png"}, {"type": "video", "video": frames}, {"type": "text", "text": "Both?"}]);
    fs::write(
        &input,
        json!({"messages": [{"role": "user", "content": content}]}).to_string(),
    )
    .unwrap();
    let output = dir.path().join("out.safetensors");
    let mut c = command("score", model);
    c.arg("--input").arg(&input).arg("--output").arg(&output);
    c.arg("--offload-folder")
        .arg(dir.path().join("offload"))
        .args(more);
    let out = c.output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    fs::read(&output).unwrap()
}

#[test]
fn one_model_from_every_kind_of_source() {
    let want = score(&model(), &["--in-place"]);
    assert_eq!(score(&model(), &[]), want, "packed");
    // As on the hub: flat config, names on disk, one file.
    let hub = folder(&flat_config());
    write_safetensors(&hub.path().join("model.safetensors"), &tensors());
    assert_eq!(score(hub.path(), &["--in-place"]), want, "flat");
    assert_eq!(score(hub.path(), &[]), want, "flat, packed");
    // Names as in memory, nested config.
    let renamed = folder(&config());
    let of_memory: Vec<(String, Tensor)> = tensors()
        .into_iter()
        .map(|(n, t)| (in_memory(&n), t))
        .collect();
    assert!(
        of_memory
            .iter()
            .any(|(n, _)| n.starts_with("model.visual."))
    );
    write_safetensors(&renamed.path().join("model.safetensors"), &of_memory);
    assert_eq!(
        score(renamed.path(), &["--in-place"]),
        want,
        "names as in memory"
    );
    // accelerate's offload folder.
    let offloaded = folder(&flat_config());
    let mut index = Map::new();
    for (name, t) in &of_memory {
        fs::write(offloaded.path().join(format!("{name}.dat")), &t.bytes).unwrap();
        index.insert(name.clone(), json!({"dtype": "bfloat16", "shape": t.shape}));
    }
    fs::write(
        offloaded.path().join("index.json"),
        Value::Object(index).to_string(),
    )
    .unwrap();
    assert_eq!(
        score(offloaded.path(), &["--in-place"]),
        want,
        "accelerate's folder"
    );
    assert_eq!(
        score(offloaded.path(), &[]),
        want,
        "accelerate's folder, packed"
    );
}

/// As the 3B: the head is the embedding.
#[test]
fn a_tied_head_is_the_embedding() {
    let copy = |t: &Tensor| Tensor {
        dtype: t.dtype.clone(),
        shape: t.shape.clone(),
        bytes: t.bytes.clone(),
    };
    let mut untied = tensors();
    let embedding = untied
        .iter()
        .find(|(n, _)| n == "model.embed_tokens.weight")
        .map(|(_, t)| copy(t))
        .unwrap();
    untied.retain(|(n, _)| n != "lm_head.weight");
    let mut config = flat_config();
    config["tie_word_embeddings"] = json!(true);
    let tied = folder(&config);
    write_safetensors(&tied.path().join("model.safetensors"), &untied);
    untied.push(("lm_head.weight".into(), embedding));
    let other = folder(&flat_config());
    write_safetensors(&other.path().join("model.safetensors"), &untied);
    let want = score(other.path(), &["--in-place"]);
    assert_eq!(score(tied.path(), &["--in-place"]), want);
    assert_eq!(score(tied.path(), &[]), want);
    assert_ne!(want, score(&model(), &["--in-place"]));
}

#[test]
fn a_missing_key_is_an_error_never_a_default() {
    for key in [
        "/rope_scaling/mrope_section",
        "/rope_theta",
        "/vision_config/window_size",
        "/image_token_id",
    ] {
        let mut config = flat_config();
        let (parent, name) = key.rsplit_once('/').unwrap();
        config
            .pointer_mut(parent)
            .unwrap()
            .as_object_mut()
            .unwrap()
            .remove(name);
        let dir = folder(&config);
        write_safetensors(&dir.path().join("model.safetensors"), &tensors());
        let mut c = command("run", dir.path());
        let out = c
            .args(["--in-place", "--image", "image0.png", "-p", "x"])
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            !out.status.success() && stderr.contains(name),
            "{key}: {stderr}"
        );
    }
}
