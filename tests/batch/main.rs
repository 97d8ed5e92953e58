//! Jobs: what a row says never depends on how it was run, and nothing that was finished is ever lost or done twice.

mod check;
mod engine;
mod fields;
#[path = "../common/program.rs"]
mod program;
mod shared;
mod stops;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use program::program;
use serde_json::{Value, json};

const MODEL: &str = "qwen2-bf16";

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(MODEL)
}

fn row(i: usize) -> Value {
    if i % 5 == 4 {
        let mut body = json!({"prompt": format!("the sea, number {i}"), "max_tokens": 3 + i % 5});
        if i.is_multiple_of(2) {
            body["logprobs"] = json!(2);
        }
        return json!({"custom_id": format!("row-{i}"), "url": "/v1/completions", "body": body});
    }
    let mut body = json!({
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You answer questions about the sea."},
            {"role": "user", "content": [{"type": "text", "text": format!("Question {i}?")}]},
        ],
        "max_tokens": 4 + i % 13,
    });
    if i % 3 == 1 {
        body["temperature"] = json!(0.9);
        body["top_p"] = json!(0.95);
    }
    if i % 7 == 2 {
        body["n"] = json!(3);
        body["temperature"] = json!(1.0);
        body["seed"] = json!(i);
    }
    if i % 11 == 3 {
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(2);
    }
    json!({"custom_id": format!("row-{i}"), "method": "POST", "url": "/v1/chat/completions", "body": body})
}

fn write_rows(path: &Path, rows: &[Value]) {
    let text: String = rows.iter().map(|r| format!("{r}\n")).collect();
    fs::write(path, text).unwrap();
}

fn command(name: &str) -> Command {
    let mut c = program();
    c.arg(name).env("SOURCE_DATE_EPOCH", "1700000000");
    c
}

fn batch(input: &Path, output: &Path, more: &[&str]) -> Command {
    let mut c = command("batch");
    c.arg(model())
        .args([
            "--in-place",
            "--threads",
            "2",
            "--cpu-memory",
            "512MiB",
            "--json",
        ])
        .arg("-i")
        .arg(input)
        .arg("-o")
        .arg(output)
        .args(more);
    c
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

#[track_caller]
fn done(mut c: Command, expected: i32) -> Value {
    let out = c.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(code(&out), expected, "{stderr}");
    let stdout = String::from_utf8(out.stdout).unwrap();
    stdout
        .lines()
        .last()
        .map_or(Value::Null, |l| serde_json::from_str(l).unwrap())
}

fn read_rows(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

#[test]
fn rows_come_out_as_the_openai_format_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    write_rows(&input, &(0..12).map(row).collect::<Vec<_>>());
    let report = done(batch(&input, &output, &[]), 0);
    assert_eq!(report["rows_done"], 12);
    assert!(
        report["paging"]["passes"].as_u64().unwrap() > 10,
        "{report}"
    );
    assert!(report["paging"].get("percent_of_bound").is_some());
    let rows = read_rows(&output);
    for (i, r) in rows.iter().enumerate() {
        assert_eq!(r["custom_id"], format!("row-{i}"), "input order");
        assert_eq!(r["response"]["status_code"], 200);
        assert_eq!(r["error"], Value::Null);
        let body = &r["response"]["body"];
        assert_eq!(body["created"], 1_700_000_000u64);
        let n = if i % 7 == 2 && i % 5 != 4 { 3 } else { 1 };
        let choices = body["choices"].as_array().unwrap();
        assert_eq!(choices.len(), n);
        let usage = |k: &str| body["usage"][k].as_u64().unwrap();
        assert_eq!(
            usage("total_tokens"),
            usage("prompt_tokens") + usage("completion_tokens")
        );
        for c in choices {
            assert!(["stop", "length"].contains(&c["finish_reason"].as_str().unwrap()));
            match i % 5 == 4 {
                true => assert!(c["text"].is_string() && c.get("message").is_none()),
                false => assert_eq!(c["message"]["role"], "assistant"),
            }
        }
        if i % 11 == 3 {
            let content = choices[0]["logprobs"]["content"].as_array().unwrap();
            assert_eq!(content.len() as u64, usage("completion_tokens"));
            assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
        }
    }
    assert!(!dir.path().join("out.errors.jsonl").exists());
}

#[test]
fn shards_merge_to_the_bytes_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let mut rows: Vec<Value> = (0..31).map(row).collect();
    rows[7]["custom_id"] = json!("row-3");
    write_rows(&input, &rows);
    let whole = dir.path().join("whole.jsonl");
    done(batch(&input, &whole, &[]), 3);
    let output = dir.path().join("part.jsonl");
    let merge = || {
        let mut c = command("batch-merge");
        c.arg("-i").arg(&input).arg("-o").arg(&output).arg("--json");
        c
    };
    done(batch(&input, &output, &["--shard", "0/3"]), 0);
    // Slurm says which: its arrays may begin at 1.
    let mut second = batch(&input, &output, &[]);
    second
        .env("SLURM_ARRAY_TASK_ID", "2")
        .env("SLURM_ARRAY_TASK_COUNT", "3")
        .env("SLURM_ARRAY_TASK_MIN", "1");
    done(second, 3);
    let refused = merge().output().unwrap();
    assert_eq!(code(&refused), 2);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("2 of 3"));
    let mut third = batch(&input, &output, &[]);
    third
        .env("JOB_COMPLETION_INDEX", "2")
        .env("JOB_COMPLETIONS", "3");
    done(third, 0);
    done(merge(), 3);
    for name in ["", ".errors"] {
        let read = |stem: &str| {
            fs::read_to_string(dir.path().join(format!("{stem}{name}.jsonl"))).unwrap()
        };
        assert_eq!(read("part"), read("whole"));
    }
    let errors = read_rows(&dir.path().join("part.errors.jsonl"));
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0]["error"]["code"], "duplicate_custom_id");
    assert_eq!(errors[0]["line"], 8);
    // Shards of one job made with other settings do not belong together.
    let second = ["--shard", "1/3", "--overwrite", "--seed", "9"];
    done(batch(&input, &output, &second), 3);
    let refused = merge().output().unwrap();
    assert_eq!(code(&refused), 2);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("settings"));
    done(
        batch(&input, &output, &["--shard", "1/3", "--overwrite"]),
        3,
    );
    // A shard with a row missing is noticed.
    let shard = dir.path().join("part.1-of-3.jsonl");
    let text = fs::read_to_string(&shard).unwrap();
    fs::write(&shard, &text[text.find('\n').unwrap() + 1..]).unwrap();
    let refused = merge().output().unwrap();
    assert_eq!(code(&refused), 2);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("1 of 31 rows are missing"));
}

// hazard: bad-line: an error row with its line; the others go on
// hazard: duplicate-id: an error row; the first one is answered
// hazard: long-prompt: an error row; the others go on
#[test]
fn bad_rows_are_told_by_line_and_stop_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let chat = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
        for (k, v) in more.as_object().unwrap() {
            body[k] = v.clone();
        }
        body
    };
    let with = |id: &str, body: Value| json!({"custom_id": id, "body": body}).to_string();
    let image =
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
    let lines: Vec<(String, &str)> = vec![
        (with("good", chat(json!({}))), ""),
        ("{\"custom_id\": \"torn\", ".into(), "invalid_json"),
        ("[1]".into(), "invalid_json"),
        (json!({"body": {}}).to_string(), "missing_field"),
        (json!({"custom_id": "b"}).to_string(), "missing_field"),
        (
            json!({"custom_id": "u", "url": "/v1/embeddings", "body": {}}).to_string(),
            "unsupported_url",
        ),
        (
            json!({"custom_id": "x", "extra": 1, "body": chat(json!({}))}).to_string(),
            "unknown_field",
        ),
        (with("f", chat(json!({"frobnicate": 1}))), "unknown_field"),
        (
            with("s", chat(json!({"stream": true}))),
            "unsupported_field",
        ),
        (with("t", chat(json!({"temperature": -1}))), "invalid_value"),
        (with("n", chat(json!({"n": 0}))), "invalid_value"),
        (with("l", chat(json!({"top_logprobs": 3}))), "invalid_value"),
        (with("m", chat(json!({"messages": "Hi"}))), "invalid_value"),
        (
            with("i", chat(json!({"messages": image}))),
            "images_unavailable",
        ),
        (with("good", chat(json!({}))), "duplicate_custom_id"),
        (
            with("long", json!({"prompt": "sea ".repeat(4000)})),
            "invalid_prompt",
        ),
        (with("empty", json!({"prompt": []})), "invalid_value"),
        (
            with("ids", json!({"prompt": [1, 999_999]})),
            "invalid_value",
        ),
        (
            with("many", json!({"prompt": ["a", "b"]})),
            "unsupported_field",
        ),
        (
            with("bias", chat(json!({"logit_bias": {"x": 1}}))),
            "invalid_value",
        ),
        (
            with("tools", chat(json!({"tools": [{}]}))),
            "unsupported_field",
        ),
        (
            with(
                "last",
                chat(json!({"stop": ["a"], "user": "me", "top_k": -1, "stream": null})),
            ),
            "",
        ),
    ];
    let mut text = String::from("\u{feff}");
    for (line, _) in &lines {
        text += line;
        text += "\r\n\n";
    }
    fs::write(&input, &text).unwrap();
    let report = done(batch(&input, &output, &[]), 3);
    assert_eq!(report["rows_done"], 2);
    assert_eq!(read_rows(&output).len(), 2);
    let errors = read_rows(&dir.path().join("out.errors.jsonl"));
    let told: Vec<(u64, &str)> = errors
        .iter()
        .map(|e| {
            (
                e["line"].as_u64().unwrap(),
                e["error"]["code"].as_str().unwrap(),
            )
        })
        .collect();
    let expected: Vec<(u64, &str)> = lines
        .iter()
        .enumerate()
        .filter(|(_, (_, code))| !code.is_empty())
        .map(|(i, (_, code))| (2 * i as u64 + 1, *code))
        .collect();
    assert_eq!(told, expected);
    assert!(
        errors[6]["error"]["message"]
            .as_str()
            .unwrap()
            .contains("frobnicate")
    );

    // The check says the same without running anything.
    let mut check = command("batch-check");
    check
        .arg(model())
        .arg("-i")
        .arg(&input)
        .args(["--json", "--threads", "2"]);
    let report = done(check, 3);
    assert_eq!(report["rows"], lines.len());
    assert_eq!(report["rows_bad"], expected.len());

    // A corrected row is answered; the others keep their errors.
    fs::write(
        &input,
        text.replace("\"frobnicate\":1,", "")
            .replace(",\"frobnicate\":1", ""),
    )
    .unwrap();
    let report = done(batch(&input, &output, &[]), 3);
    assert_eq!(
        (&report["rows_done"], &report["rows_failed"]),
        (&json!(3), &json!(expected.len() - 1))
    );
    let before = fs::read(dir.path().join("out.errors.jsonl")).unwrap();
    done(batch(&input, &output, &["--retry-errors"]), 3);
    assert_eq!(
        fs::read(dir.path().join("out.errors.jsonl")).unwrap(),
        before
    );
    let gave_up = batch(
        &input,
        &dir.path().join("o2.jsonl"),
        &["--max-errors", "5%"],
    )
    .output()
    .unwrap();
    assert_eq!(code(&gave_up), 1);
    assert!(String::from_utf8_lossy(&gave_up.stderr).contains("--max-errors"));
}

#[test]
fn answers_to_other_questions_are_never_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let mut rows: Vec<Value> = (0..3).map(row).collect();
    write_rows(&input, &rows);
    done(batch(&input, &output, &[]), 0);
    let before = fs::read(&output).unwrap();
    let refused = |more: &[&str]| {
        let out = batch(&input, &output, more).output().unwrap();
        assert_eq!(code(&out), 2);
        assert!(String::from_utf8_lossy(&out.stderr).contains("--overwrite"));
        assert_eq!(fs::read(&output).unwrap(), before, "nothing was touched");
    };
    refused(&["--seed", "7"]);
    rows[1]["body"]["max_tokens"] = json!(9);
    write_rows(&input, &rows);
    refused(&[]);
    done(batch(&input, &output, &["--overwrite"]), 0);
    // White space and the order of keys mean nothing.
    let text: String = rows
        .iter()
        .map(|r| {
            format!(
                "{{ \"body\" : {}, \"url\": {}, \"custom_id\": {} }}\n",
                r["body"], r["url"], r["custom_id"]
            )
        })
        .collect();
    fs::write(&input, text).unwrap();
    let report = done(batch(&input, &output, &[]), 0);
    assert_eq!(report["this_run"]["passes"], 0);

    // A file of somebody else's is not cut, however it ends.
    let foreign = dir.path().join("notes.txt");
    fs::write(&foreign, "my notes").unwrap();
    assert_eq!(code(&batch(&input, &foreign, &[]).output().unwrap()), 2);
    assert_eq!(fs::read_to_string(&foreign).unwrap(), "my notes");
    assert_eq!(code(&batch(&input, &input, &[]).output().unwrap()), 2);
}

#[test]
fn plain_prompts_and_progress_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let (prompts, output) = (dir.path().join("p.txt"), dir.path().join("out.jsonl"));
    fs::write(&prompts, "One\n\nTwo \"quoted\"\n").unwrap();
    let mut c = command("run-batch");
    c.arg(model())
        .args([
            "--in-place",
            "--cpu-memory",
            "512MiB",
            "--max-tokens",
            "3",
            "--progress",
            "json",
        ])
        .arg("--prompts")
        .arg(&prompts)
        .arg("-o")
        .arg(&output);
    let out = c.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(code(&out), 0, "{stderr}");
    let ids: Vec<Value> = read_rows(&output)
        .iter()
        .map(|r| r["custom_id"].clone())
        .collect();
    assert_eq!(ids, [json!("prompt-1"), json!("prompt-3")]);
    let last = stderr.lines().rfind(|l| l.starts_with('{')).unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["rows_done"], 2);
}

#[test]
fn a_bench_of_synthetic_rows() {
    let run = |more: &[&str]| {
        let mut c = command("batch");
        c.arg(model())
            .args([
                "--in-place",
                "--cpu-memory",
                "512MiB",
                "--bench",
                "20",
                "--input-len",
                "9",
                "--output-len",
                "5",
                "--json",
            ])
            .args(more);
        done(c, 0)
    };
    let (wide, narrow) = (run(&[]), run(&["--max-sequences", "3"]));
    assert_eq!(wide["output_tokens"], 100);
    assert_eq!(wide["tokens_hash"], narrow["tokens_hash"]);
    assert!(narrow["paging"]["passes"].as_u64() > wide["paging"]["passes"].as_u64());
}
