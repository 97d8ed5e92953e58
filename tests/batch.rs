//! Jobs: what a row says never depends on how it was run, and nothing that was finished is ever lost or done twice.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::{Value, json};
use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::engine::{Engine, EngineOptions, Event, FinishReason, Job, JobId};
use tensorpager::paging::Placement;
use tensorpager::store::Store;
use tensorpager::text::SamplingParams;

const MODEL: &str = "qwen2-bf16";

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(MODEL)
}

fn engine(options: EngineOptions) -> Engine {
    let ckpt = Checkpoint::open(&model().display().to_string(), &OpenOptions::default()).unwrap();
    let store = Store::open_in_place(&ckpt).unwrap();
    let cancel = Arc::new(AtomicBool::new(false));
    Engine::open(&store, &options, cancel, &mut |_, _| {}).unwrap()
}

fn options(sequences: usize) -> EngineOptions {
    EngineOptions {
        cpu_memory: Some(1 << 30),
        placement: Placement::Disk,
        threads: Some(2),
        context: 256,
        max_sequences: sequences,
        logits_rows: sequences,
        kv_tokens: Some(sequences * 64),
        ..EngineOptions::default()
    }
}

/// Greedy, seeded, penalised and many-choice jobs, half of them behind a common beginning.
fn jobs(n: usize) -> Vec<Job> {
    let common: Vec<u32> = (0..37).map(|i| 20 + i * 5 % 200).collect();
    (0..n)
        .map(|i| {
            let own = (0..1 + i % 23).map(|k| ((i * 31 + k * 7) % 250) as u32);
            let mut prompt = if i % 2 == 0 {
                common.clone()
            } else {
                Vec::new()
            };
            prompt.extend(own);
            let mut sampling = SamplingParams::greedy();
            if i % 3 != 0 {
                sampling.temperature = 0.9;
                sampling.top_p = 0.9;
                sampling.seed = i as u64;
            }
            if i % 5 == 0 {
                sampling.repetition_penalty = 1.2;
                sampling.logit_bias = vec![(40, 1.5)];
            }
            Job {
                prompt,
                max_tokens: 3 + i % 14,
                sampling,
                choice: (i % 2) as u32,
                logprobs: (i % 4 == 0).then_some(2),
                ..Job::default()
            }
        })
        .collect()
}

type Said = BTreeMap<usize, (Vec<u32>, Vec<u32>, Option<FinishReason>)>;

/// Tokens, the bits of their log-probabilities, and the end of each job.
fn run(engine: &mut Engine, jobs: &[Job]) -> Said {
    let mut ids: BTreeMap<JobId, usize> = BTreeMap::new();
    for (i, job) in jobs.iter().enumerate() {
        ids.insert(engine.submit(job.clone()).unwrap(), i);
    }
    let mut said = Said::new();
    let mut events = Vec::new();
    let mut passes = 0;
    while engine.pending() > 0 {
        engine.step(&mut events).unwrap();
        passes += 1;
        assert!(passes < 20_000, "no progress");
    }
    for event in events {
        match event {
            Event::Token {
                job,
                token,
                logprobs,
            } => {
                let entry = said.entry(ids[&job]).or_default();
                entry.0.push(token);
                for l in logprobs.into_iter() {
                    entry.1.push(l.chosen.to_bits());
                    entry
                        .1
                        .extend(l.top.iter().flat_map(|t| [t.id, t.logprob.to_bits()]));
                }
            }
            Event::Finished { job, reason } => said.entry(ids[&job]).or_default().2 = Some(reason),
            Event::Failed { error, .. } => panic!("{error}"),
        }
    }
    said
}

/// One by one, with nothing shared.
fn alone(jobs: &[Job]) -> Said {
    let mut engine = engine(options(1));
    let mut said = Said::new();
    for (i, job) in jobs.iter().enumerate() {
        let job = Job {
            prefix_salt: None,
            ..job.clone()
        };
        said.extend(run(&mut engine, &[job]).into_values().map(|s| (i, s)));
    }
    said
}

#[test]
fn a_row_says_the_same_alone_and_among_256() {
    let jobs = jobs(256);
    let alone = alone(&jobs);
    let mut wide = engine(options(256));
    assert_eq!(run(&mut wide, &jobs), alone);
    let stats = wide.schedule_stats();
    assert!(
        stats.shared_tokens >= 32 * 120,
        "128 rows begin alike: {stats:?}"
    );
    assert_eq!(stats.preemptions, 0);
    // Again on the same engine: what the first time left in the cache is found, and changes nothing.
    assert_eq!(run(&mut wide, &jobs), alone);
}

// hazard: no-kv: a row is set back and says the same later
#[test]
fn running_out_of_kv_sets_rows_back_and_changes_nothing() {
    let jobs = jobs(48);
    let alone = alone(&jobs);
    let mut set_back = 0;
    for kv_tokens in [16, 64, 640] {
        let mut tight = engine(EngineOptions {
            kv_tokens: Some(kv_tokens),
            context: 128,
            ..options(24)
        });
        assert_eq!(
            run(&mut tight, &jobs),
            alone,
            "with KV for {kv_tokens} tokens"
        );
        set_back += tight.schedule_stats().preemptions;
        println!("KV for {kv_tokens} tokens: {:?}", tight.schedule_stats());
    }
    assert!(
        set_back > 0,
        "the test must be tight enough to set rows back"
    );
}

#[test]
fn small_passes_say_the_same() {
    let jobs = jobs(20);
    let alone = alone(&jobs);
    for pass_tokens in [16, 33] {
        let mut small = engine(EngineOptions {
            pass_tokens,
            ..options(8)
        });
        assert_eq!(
            run(&mut small, &jobs),
            alone,
            "passes of {pass_tokens} rows"
        );
    }
}

#[test]
fn a_cancelled_job_is_gone_and_the_others_go_on() {
    let jobs = jobs(6);
    let alone = alone(&jobs);
    let mut e = engine(options(6));
    let ids: Vec<JobId> = jobs.iter().map(|j| e.submit(j.clone()).unwrap()).collect();
    let mut events = Vec::new();
    e.step(&mut events).unwrap();
    e.cancel(ids[2]);
    e.cancel(ids[2]);
    events.retain(|e| !matches!(e, Event::Finished { .. }));
    while e.pending() > 0 {
        e.step(&mut events).unwrap();
    }
    let of = |id: JobId| -> Vec<u32> {
        let token = |e: &Event| match e {
            Event::Token { job, token, .. } if *job == id => Some(*token),
            _ => None,
        };
        events.iter().filter_map(token).collect()
    };
    assert_eq!(of(ids[2]).len(), 1);
    for i in [0, 1, 3, 4, 5] {
        assert_eq!(of(ids[i]), alone[&i].0, "job {i}");
    }
}

// ---- the command ----

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
    let mut c = Command::new(env!("CARGO_BIN_EXE_tensorpager"));
    c.arg(name);
    for (key, _) in std::env::vars() {
        if key.starts_with("TENSORPAGER_") || key.starts_with("SLURM_") || key.starts_with("JOB_") {
            c.env_remove(key);
        }
    }
    c.env("SOURCE_DATE_EPOCH", "1700000000");
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

// hazard: job-killed: at any moment: resumed to the same bytes
#[test]
fn killed_at_any_moment_a_job_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let mut rows: Vec<Value> = (0..150).map(row).collect();
    rows[40]["body"]["frobnicate"] = json!(1);
    write_rows(&input, &rows);
    let whole = dir.path().join("whole.jsonl");
    done(batch(&input, &whole, &[]), 3);
    let expected = fs::read_to_string(&whole).unwrap();
    let expected_errors = fs::read_to_string(dir.path().join("whole.errors.jsonl")).unwrap();
    assert_eq!(expected.lines().count(), 149);

    let output = dir.path().join("killed.jsonl");
    let few = ["--max-sequences", "4"];
    let mut kept = Vec::new();
    let mut cut_short = 0;
    for round in 0..200u64 {
        let mut child = batch(&input, &output, &few)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(40 + 37 * round % 400));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let now = fs::read_to_string(&output).unwrap_or_default();
        if ended.is_some() {
            break;
        }
        cut_short += 1;
        // Whole rows only count; none that was there is ever gone or there twice.
        let whole: Vec<&str> = now
            .split_inclusive('\n')
            .filter(|l| l.ends_with('\n'))
            .collect();
        let mut ids: Vec<String> = whole
            .iter()
            .map(|l| serde_json::from_str::<Value>(l).unwrap()["custom_id"].to_string())
            .collect();
        ids.sort();
        let count = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), count, "a row twice");
        assert!(
            kept.iter().all(|id| ids.contains(id)),
            "a finished row was lost"
        );
        kept = ids;
        if round % 3 == 0 && !whole.is_empty() {
            // As if the crash had torn the last row.
            let torn = &now[..now.trim_end().len() - 7];
            fs::write(&output, torn).unwrap();
            let last = now.trim_end().rfind('\n').map_or(0, |at| at + 1);
            let id =
                serde_json::from_str::<Value>(&now[last..]).map(|r| r["custom_id"].to_string());
            kept.retain(|k| id.as_ref().is_ok_and(|id| id != k));
        }
    }
    done(batch(&input, &output, &few), 3);
    assert!(cut_short > 0, "no run was long enough to be killed");
    assert_eq!(fs::read_to_string(&output).unwrap(), expected);
    let errors = fs::read_to_string(dir.path().join("killed.errors.jsonl")).unwrap();
    assert_eq!(errors, expected_errors);
    // And once more changes nothing.
    let report = done(batch(&input, &output, &few), 3);
    assert_eq!(report["this_run"]["output_tokens"], 0);
    assert_eq!(fs::read_to_string(&output).unwrap(), expected);
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
    assert!(![0, 3].contains(&code(&gave_up)), "{}", code(&gave_up));
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

// hazard: sigint: what runs is finished, nothing new begins, 130
#[test]
fn interrupted_once_it_finishes_what_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let rows: Vec<Value> = (0..400)
        .map(|i| json!({"custom_id": format!("r{i}"), "body": {"prompt": format!("row {i}"), "max_tokens": 60, "ignore_eos": true}}))
        .collect();
    write_rows(&input, &rows);
    let mut c = batch(&input, &output, &["--max-sequences", "2"]);
    let child = c
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while fs::read(&output).unwrap_or_default().is_empty() {
        assert!(std::time::Instant::now() < until, "no row in a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    let kill = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    let out = child.wait_with_output().unwrap();
    assert_eq!(code(&out), 130, "{}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let finished = read_rows(&output).len() as u64;
    assert!((2..400).contains(&finished));
    assert_eq!(report["rows_done"], finished);
    assert_eq!(report["rows_remaining"], 400 - finished);
}

// hazard: sigint-twice: stops at once with 130; finished rows stay, the same command goes on
#[test]
fn interrupted_twice_it_stops_at_once_and_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let long = |i: usize| json!({"custom_id": format!("r{i}"), "body": {"prompt": "row", "max_tokens": 480, "ignore_eos": true}});
    let mut rows: Vec<Value> = (0..200).map(long).collect();
    rows[0]["body"]["max_tokens"] = json!(1);
    write_rows(&input, &rows);
    let child = batch(&input, &output, &["--max-sequences", "2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while fs::read(&output).unwrap_or_default().is_empty() {
        assert!(std::time::Instant::now() < until, "no row in a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    let asked = std::time::Instant::now();
    for _ in 0..2 {
        let kill = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
        std::thread::sleep(Duration::from_millis(20));
    }
    let out = child.wait_with_output().unwrap();
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(code(&out), 130, "{}", String::from_utf8_lossy(&out.stderr));
    let before = read_rows(&output);
    assert!(!before.is_empty() && before.len() < 200);
    // Of the rows that are left one is enough.
    let finished = |r: &Value| before.iter().any(|b| b["custom_id"] == r["custom_id"]);
    let open = rows.iter().find(|r| !finished(r)).unwrap()["custom_id"].clone();
    rows.retain(|r| finished(r) || r["custom_id"] == open);
    write_rows(&input, &rows);
    let report = done(batch(&input, &output, &[]), 0);
    assert_eq!(report["rows_done"], before.len() + 1);
}

// hazard: job-disk-full: one error; finished rows stay, the same command goes on
#[test]
fn a_full_disk_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=32k", "tmpfs"])
        .arg(&small)
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !mounted {
        println!("skipped: a small tmpfs cannot be mounted here");
        return;
    }
    let input = dir.path().join("in.jsonl");
    write_rows(&input, &(0..150).map(row).collect::<Vec<_>>());
    let output = small.join("out.jsonl");
    let out = batch(&input, &output, &["--max-sequences", "8"])
        .output()
        .unwrap();
    let text = fs::read_to_string(&output).unwrap_or_default();
    let whole = text.is_empty() || text.ends_with('\n');
    let rows = text.lines().count();
    let grown = Command::new("mount")
        .args(["-o", "remount,size=8m"])
        .arg(&small)
        .status();
    let again = batch(&input, &output, &["--max-sequences", "8"])
        .output()
        .unwrap();
    let finished = fs::read_to_string(&output)
        .unwrap_or_default()
        .lines()
        .count();
    let unmounted = Command::new("umount").arg(&small).status();
    assert_eq!(code(&out), 1, "{}", String::from_utf8_lossy(&out.stderr));
    assert!(String::from_utf8_lossy(&out.stderr).contains("disk is full"));
    assert!(
        whole && rows > 0 && rows < 150,
        "{rows} rows, whole: {whole}"
    );
    assert!(grown.is_ok_and(|s| s.success()) && unmounted.is_ok_and(|s| s.success()));
    assert_eq!(
        code(&again),
        0,
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
    assert_eq!(finished, 150);
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
