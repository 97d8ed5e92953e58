//! Jobs with pictures: a row says the same alone and in company, a broken picture is that row's error, and answers belong to the files they
//! were made from.

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use program::{program, word};
use serde_json::{Value, json};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vl-bf16")
}

/// A folder with a job file and the fixture's pictures in `media/`.
fn folder(rows: &[Value]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let media = dir.path().join("media");
    fs::create_dir_all(media.join("frames")).unwrap();
    for name in ["image0.png", "image1.png"] {
        fs::copy(model().join(name), media.join(name)).unwrap();
    }
    for i in 0..5 {
        let name = format!("f{i}.png");
        fs::copy(model().join(&name), media.join("frames").join(&name)).unwrap();
    }
    write(dir.path(), rows);
    dir
}

fn write(dir: &Path, rows: &[Value]) {
    let text: String = rows.iter().map(|r| format!("{r}\n")).collect();
    fs::write(dir.join("job.jsonl"), text).unwrap();
}

fn row(id: &str, content: Value) -> Value {
    let body = json!({
        "messages": [{"role": "user", "content": content}], "max_tokens": 6, "logprobs": true, "top_logprobs": 2, "ignore_eos": true
    });
    json!({"custom_id": id, "body": body})
}

fn image(at: &str) -> Value {
    json!({"type": "image_url", "image_url": {"url": at}})
}

fn text(t: &str) -> Value {
    json!({"type": "text", "text": t})
}

/// Every kind of row: pictures in all places and forms, none, one twice, several, video beside an image.
fn rows(dir: &Path) -> Vec<Value> {
    let bytes = fs::read(model().join("image1.png")).unwrap();
    let data = format!(
        "data:image/png;base64,{}",
        base64::engine::general_purpose::STANDARD.encode(bytes)
    );
    let url = format!("file://{}/media/image0.png", dir.display());
    let frames = json!({"type": "video", "video": ["media/frames/f0.png", "media/frames/f3.png", "media/frames/f4.png"], "fps": 4});
    let all = json!({"type": "video", "video": "media/frames", "fps": 2, "max_frames": 4});
    let small = json!({"type": "image", "image": "media/image1.png", "max_pixels": 3136});
    vec![
        row("plain", json!("What is this?")),
        row(
            "relative",
            json!([image("media/image0.png"), text("What is this?")]),
        ),
        row(
            "again",
            json!([image("media/image0.png"), text("And this?")]),
        ),
        row("url", json!([image(&url), text("Where?")])),
        row("data", json!([image(&data), text("Who?")])),
        row(
            "two",
            json!([
                image("media/image1.png"),
                text("and"),
                image("media/image0.png"),
                text("differ?")
            ]),
        ),
        row("frames", json!([frames.clone(), text("What happens?")])),
        row("folder", json!([all, text("What happens?")])),
        row(
            "mixed",
            json!([image("media/image1.png"), frames, text("Same?")]),
        ),
        row("small", json!([small, text("Tiny?")])),
        row("last", json!("Nothing to see.")),
    ]
}

fn command(name: &str) -> Command {
    let mut c = program();
    c.arg(name).arg(model());
    c.env("SOURCE_DATE_EPOCH", "1700000000");
    // Relative paths are the job file's, not this process's.
    c.current_dir("/");
    c
}

fn batch(dir: &Path, output: &str, more: &[&str]) -> Command {
    batch_within("512MiB", dir, output, more)
}

fn batch_within(memory: &str, dir: &Path, output: &str, more: &[&str]) -> Command {
    let mut c = command("batch");
    c.args([
        "--in-place",
        "--threads",
        "2",
        "--cpu-memory",
        memory,
        "--device-map",
        "disk",
        "--json",
    ])
    .arg("-i")
    .arg(dir.join("job.jsonl"))
    .arg("-o")
    .arg(dir.join(output))
    .args(more);
    c
}

#[track_caller]
fn done(mut c: Command, expected: i32) -> Value {
    let out = c.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(expected), "{stderr}");
    let stdout = String::from_utf8(out.stdout).unwrap();
    let last = stdout.lines().last();
    last.map_or(Value::Null, |l| serde_json::from_str(l).unwrap())
}

fn read(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

#[test]
fn a_row_says_the_same_alone_and_in_company() {
    let dir = folder(&[]);
    let rows = rows(dir.path());
    write(dir.path(), &rows);
    let report = done(batch(dir.path(), "all.jsonl", &[]), 0);
    let together = read(&dir.path().join("all.jsonl"));
    assert_eq!(together.len(), rows.len());
    let vision = &report["vision"];
    // image0, image1, image1 made small, three listed frames, four of the folder's.
    assert_eq!(vision["pictures"], 5, "{vision}");
    assert_eq!(vision["waves"], 1, "one wave for all rows: {vision}");
    // One at a time, in other pieces of KV and of the pass.
    done(
        batch(
            dir.path(),
            "one.jsonl",
            &["--max-sequences", "1", "--prefetch-depth", "3"],
        ),
        0,
    );
    assert_eq!(read(&dir.path().join("one.jsonl")), together);
    for (row, answer) in rows.iter().zip(&together) {
        write(dir.path(), std::slice::from_ref(row));
        done(batch(dir.path(), "alone.jsonl", &["--overwrite"]), 0);
        assert_eq!(
            read(&dir.path().join("alone.jsonl")),
            std::slice::from_ref(answer)
        );
    }
    let said = |id: &str| {
        let found = together.iter().find(|r| r["custom_id"] == id).unwrap();
        found["response"]["body"]["choices"][0]["logprobs"].clone()
    };
    assert_ne!(
        said("relative"),
        said("plain"),
        "the picture makes a difference"
    );
}

#[test]
fn the_check_counts_what_the_run_takes() {
    let dir = folder(&[]);
    write(dir.path(), &rows(dir.path()));
    done(batch(dir.path(), "out.jsonl", &[]), 0);
    let taken: u64 = read(&dir.path().join("out.jsonl"))
        .iter()
        .map(|r| {
            r["response"]["body"]["usage"]["prompt_tokens"]
                .as_u64()
                .unwrap()
        })
        .sum();
    let check = |more: &[&str]| {
        let mut c = command("batch-check");
        c.args(["--threads", "2", "--json", "-i"])
            .arg(dir.path().join("job.jsonl"))
            .args(more);
        done(c, 0)
    };
    let report = check(&[]);
    assert_eq!(report["prompt_tokens"], taken);
    assert_eq!(report["pictures"], 11);
    let smaller = check(&["--max-pixels", "3136"]);
    assert!(smaller["picture_tokens"].as_u64() < report["picture_tokens"].as_u64());
    assert!(smaller["longest_prompt"].as_u64() < report["longest_prompt"].as_u64());
}

#[test]
fn a_broken_picture_is_its_rows_error() {
    let good = row("good", json!([image("media/image0.png"), text("What?")]));
    let dir = folder(&[]);
    let bytes = fs::read(model().join("image0.png")).unwrap();
    fs::write(dir.path().join("media/torn.png"), &bytes[..bytes.len() / 2]).unwrap();
    fs::write(dir.path().join("media/note.txt"), "no picture").unwrap();
    let bad = [
        row("torn", json!([image("media/torn.png"), text("What?")])),
        row("gone", json!([image("media/gone.png"), text("What?")])),
        row("note", json!([image("media/note.txt"), text("What?")])),
        row(
            "web",
            json!([image("https://example.org/x.png"), text("What?")]),
        ),
        row(
            "base64",
            json!([image("data:image/png;base64,!!"), text("What?")]),
        ),
        row(
            "frames",
            json!([{"type": "video", "video": ["media/frames/f0.png", "media/torn.png"]}, text("What?")]),
        ),
        row(
            "pad",
            json!([image("media/image0.png"), text("<|image_pad|>")]),
        ),
        row("only pad", json!("<|image_pad|>")),
        row("part", json!([{"type": "image_url"}, text("What?")])),
        row("sound", json!([{"type": "input_audio", "input_audio": {}}])),
    ];
    let mut rows = vec![good.clone()];
    rows.extend(bad.iter().cloned());
    rows.push(row(
        "end",
        json!([image("media/image1.png"), text("What?")]),
    ));
    write(dir.path(), &rows);
    let report = done(batch(dir.path(), "out.jsonl", &[]), 3);
    assert_eq!(
        (&report["rows_done"], &report["rows_failed"]),
        (&json!(2), &json!(bad.len()))
    );
    let errors = read(&dir.path().join("out.errors.jsonl"));
    let codes: Vec<&str> = errors
        .iter()
        .map(|e| e["error"]["code"].as_str().unwrap())
        .collect();
    let picture = "invalid_picture";
    assert_eq!(
        codes,
        [
            picture,
            picture,
            picture,
            picture,
            picture,
            picture,
            "invalid_prompt",
            "invalid_prompt",
            "invalid_value",
            "unsupported_field"
        ]
    );
    let message = errors[0]["error"]["message"].as_str().unwrap();
    assert!(message.contains("torn.png"), "{message}");
    let mut c = command("batch-check");
    c.args(["--threads", "2", "--json", "-i"])
        .arg(dir.path().join("job.jsonl"));
    assert_eq!(done(c, 3)["rows_bad"], bad.len());

    // A file that is whole now is looked at anew; the others keep their errors.
    fs::write(dir.path().join("media/torn.png"), &bytes).unwrap();
    let report = done(batch(dir.path(), "out.jsonl", &[]), 3);
    assert_eq!(
        (&report["rows_done"], &report["rows_failed"]),
        (&json!(4), &json!(bad.len() - 2))
    );
}

#[test]
fn answers_belong_to_the_pictures_they_were_made_from() {
    let rows = [
        row("a", json!([image("media/image0.png"), text("What?")])),
        row("b", json!([image("media/image1.png"), text("What?")])),
    ];
    let dir = folder(&rows);
    let at = |name: &str| dir.path().join("media").join(name);
    done(batch(dir.path(), "out.jsonl", &[]), 0);
    let before = fs::read(dir.path().join("out.jsonl")).unwrap();
    // The same contents under another date are the same picture.
    fs::write(
        at("image0.png"),
        fs::read(model().join("image0.png")).unwrap(),
    )
    .unwrap();
    assert_eq!(
        done(batch(dir.path(), "out.jsonl", &[]), 0)["this_run"]["passes"],
        0
    );
    // Another picture under the same name is not, nor is the same one looked at in another way.
    let refused = |more: &[&str]| {
        let out = batch(dir.path(), "out.jsonl", more).output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{stderr}");
        assert!(
            stderr.contains("picture") && stderr.contains("--overwrite"),
            "{stderr}"
        );
        assert_eq!(fs::read(dir.path().join("out.jsonl")).unwrap(), before);
    };
    refused(&["--max-pixels", "3136"]);
    fs::copy(model().join("image1.png"), at("image0.png")).unwrap();
    refused(&[]);
    done(batch(dir.path(), "out.jsonl", &["--overwrite"]), 0);
    let after = read(&dir.path().join("out.jsonl"));
    assert_eq!(
        after[0]["response"]["body"]["choices"], after[1]["response"]["body"]["choices"],
        "the same picture and the same question"
    );
}

#[test]
fn rows_without_pictures_never_touch_the_tower() {
    let rows: Vec<Value> = (0..4)
        .map(|i| row(&format!("r{i}"), json!(format!("An image of {i}?"))))
        .collect();
    let dir = folder(&rows);
    let report = done(batch(dir.path(), "out.jsonl", &[]), 0);
    assert!(report.get("vision").is_none(), "{report}");
    let text_only = report["paging"]["bytes_per_pass"].as_u64().unwrap();
    let mut rows = rows;
    rows.push(row(
        "seen",
        json!([image("media/image0.png"), text("What?")]),
    ));
    write(dir.path(), &rows);
    let report = done(batch(dir.path(), "both.jsonl", &[]), 0);
    let vision = &report["vision"];
    assert_eq!(vision["pictures"], 1);
    assert!(vision["disk_bytes"].as_u64().unwrap() > 0);
    assert_eq!(report["paging"]["bytes_per_pass"], text_only);
}

#[test]
fn pictures_no_memory_holds_are_refused_with_the_numbers() {
    let dir = folder(&[row("a", json!([image("media/image0.png"), text("What?")]))]);
    let out = batch_within(
        "60MiB",
        dir.path(),
        "out.jsonl",
        &["--min-pixels", "8M", "--max-pixels", "9M"],
    )
    .output()
    .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("pictures ") && stderr.contains("--max-pixels"),
        "{stderr}"
    );
    assert!(
        !dir.path()
            .join("out.jsonl")
            .metadata()
            .is_ok_and(|m| m.len() > 0)
    );
}

/// What the message says of pixels is what does.
#[test]
fn a_job_whose_pictures_do_not_fit_is_told_with_which_limit_they_do() {
    let small = json!({"type": "image", "image": "media/image1.png", "min_pixels": 3136, "max_pixels": 3136});
    let dir = folder(&[
        row("large", json!([image("media/image0.png"), text("What?")])),
        row("small", json!([small, text("What?")])),
        row("none", json!("Nothing to see.")),
    ]);
    let run = |memory: &str, least: &str, most: &str| {
        let limits = ["--min-pixels", least, "--max-pixels", most, "--overwrite"];
        let out = batch_within(memory, dir.path(), "out.jsonl", &limits);
        let out = { out }.output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        (out.status.code(), stderr)
    };
    let large = |memory: &str| run(memory, "1.4M", "1.42M");
    let (code, e) = large("60MiB");
    assert_eq!(code, Some(1), "{e}");
    let whole = word(&e, "give --cpu-memory ");
    let (code, e) = large(&whole);
    assert_eq!(code, Some(0), "{e}");
    let mib = |text: &str| -> u64 { text.trim_end_matches("MiB").parse().unwrap() };
    let less = format!("{}MiB", mib(&whole) - 10);
    let (code, e) = large(&less);
    assert_eq!(code, Some(1), "{e}");
    let limit = word(&e, "with --min-pixels ");
    let told = format!("with --min-pixels {limit} --max-pixels {limit} it fits");
    assert!(e.contains(&told), "{e}");
    let (code, e) = run(&less, &limit, &limit);
    assert_eq!(code, Some(0), "{e}");
    // Twice as many pixels do not.
    let pixels: u64 = limit.parse().unwrap();
    let twice = (2 * pixels).to_string();
    let (code, e) = run(&less, &twice, &twice);
    assert_eq!(code, Some(1), "{pixels} {e}");
}
