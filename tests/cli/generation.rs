//! `generation_config.json` beyond sampling, limits, and flags beside variables.

use std::path::Path;

use serde_json::{Value, json};

use super::process::{Place, Ran, fixture, str};

fn config(model: &Path, value: Value) {
    std::fs::write(model.join("generation_config.json"), value.to_string()).unwrap();
}

fn run(p: &Place, model: &Path, more: &[&str]) -> Ran {
    let base = [
        "run",
        str(model),
        "--raw",
        "-p",
        "one two three four",
        "--in-place",
    ];
    p.run(&[&base[..], &["--greedy", "--ignore-eos", "--json"], more].concat())
}

#[test]
fn max_length_counts_the_prompt_and_max_tokens_goes_before_it() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    let count = |report: &Value, key: &str| report[key].as_array().unwrap().len();
    let prompt = count(&run(&p, &model, &["-n", "1"]).json(), "prompt_token_ids");
    config(&model, json!({"max_length": prompt + 7}));
    assert_eq!(count(&run(&p, &model, &[]).json(), "token_ids"), 7);
    assert_eq!(count(&run(&p, &model, &["-n", "9"]).json(), "token_ids"), 9);
    config(
        &model,
        json!({"max_length": prompt + 7, "max_new_tokens": 3}),
    );
    assert_eq!(count(&run(&p, &model, &[]).json(), "token_ids"), 3);
    config(&model, json!({"max_length": prompt}));
    run(&p, &model, &[]).refused(2, &["max_length", "--max-tokens"]);
    run(&p, &model, &["-n", "2"]).done();
}

#[test]
fn stop_strings_of_the_model_end_its_answers() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    let text = |report: &Value| report["text"].as_str().unwrap().to_string();
    let whole = text(&run(&p, &model, &["-n", "40"]).json());
    let chars: Vec<char> = whole.chars().collect();
    let half = chars.len() / 2;
    let stop: String = chars[half..half + 3].iter().collect();
    config(&model, json!({"stop_strings": ["never-there", stop]}));
    let stopped = run(&p, &model, &["-n", "40"]).json();
    assert_eq!(text(&stopped), whole[..whole.find(&stop).unwrap()]);
    assert_eq!(stopped["finish_reason"], "stop");
    // The user's own take their place.
    let own = run(&p, &model, &["-n", "40", "--stop", "not-this-either"]).json();
    assert_eq!(text(&own), whole);
}

/// Answers and errors of a job, by custom_id.
fn batch(p: &Place, model: &Path, rows: &[Value], code: i32, more: &[&str]) -> (Value, Value) {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let input = p.file("rows.jsonl", lines.join("\n"));
    let output = p.path("answers.jsonl");
    let base = ["batch", str(model), "-i", &input, "-o", str(&output)];
    let rest = ["--in-place", "--greedy", "--ignore-eos", "--order", "input"];
    let ran = p.run(&[&base[..], &rest, more].concat());
    assert_eq!(ran.code, code, "{}", ran.stderr);
    let by_id = |name: &str, key: &str| {
        let text = std::fs::read_to_string(p.path(name)).unwrap_or_default();
        let rows = text.lines().map(|l| serde_json::from_str(l).unwrap());
        let named =
            rows.map(|r: Value| (r["custom_id"].as_str().unwrap().to_string(), r[key].clone()));
        Value::Object(named.collect())
    };
    (
        by_id("answers.jsonl", "response"),
        by_id("answers.errors.jsonl", "error"),
    )
}

fn chat(id: &str, words: usize, more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "word ".repeat(words)}]});
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    json!({"custom_id": id, "body": body})
}

#[test]
fn max_length_bounds_the_rows_of_a_job_that_say_nothing() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    let usage = |answers: &Value, id: &str, key: &str| {
        let count = &answers[id]["body"]["usage"][key];
        count.as_u64().unwrap_or_else(|| panic!("{id}: {answers}"))
    };
    let row = |id: &str, words| chat(id, words, json!({}));
    let one = [
        chat("short", 2, json!({"max_tokens": 1})),
        chat("long", 9, json!({"max_tokens": 1})),
    ];
    let (answers, _) = batch(&p, &model, &one, 0, &[]);
    let prompt = |id| usage(&answers, id, "prompt_tokens");
    let (short, long) = (prompt("short"), prompt("long"));
    assert!(long > short + 5);
    config(&model, json!({"max_length": short + 5}));
    let completion = json!({"custom_id": "text", "body": {"prompt": "word"}});
    let rows = [
        row("short", 2),
        row("long", 9),
        chat("own", 9, json!({"max_tokens": 3})),
        completion,
    ];
    let (answers, errors) = batch(&p, &model, &rows, 3, &["--overwrite"]);
    let tokens = |id| usage(&answers, id, "completion_tokens");
    assert_eq!((tokens("short"), tokens("own"), tokens("text")), (5, 3, 16));
    assert_eq!(errors["long"]["code"], "invalid_prompt", "{errors}");
    let message = errors["long"]["message"].as_str().unwrap();
    assert!(
        message.contains(&format!("max_length {}", short + 5))
            && message.contains("give the row max_tokens"),
        "{message}"
    );
    // batch-check counts them so too.
    let input = p.path("rows.jsonl");
    let check = [
        "batch-check",
        str(&model),
        "--in-place",
        "-i",
        str(&input),
        "--json",
    ];
    let rates = [
        "--disk-gb-per-s",
        "1",
        "--memory-gb-per-s",
        "9",
        "--cpu-gflops",
        "9",
    ];
    let checked = p.run(&[&check[..], &rates].concat());
    assert_eq!(checked.code, 3, "{}", checked.stderr);
    let checked: Value = serde_json::from_str(&checked.stdout).unwrap();
    assert_eq!(
        (&checked["rows_bad"], &checked["output_tokens_at_most"]),
        (&json!(1), &json!(24))
    );
    // What the file says is part of what a job is.
    config(&model, json!({"max_length": short + 6}));
    let refused = batch(&p, &model, &rows, 2, &[]).0;
    assert_eq!(refused, answers);
    // The command's own goes before it.
    let (answers, _) = batch(&p, &model, &rows, 0, &["--overwrite", "-n", "2"]);
    assert_eq!(usage(&answers, "long", "completion_tokens"), 2);
}

#[test]
fn stop_strings_of_the_model_end_the_answers_of_a_job() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    let text = |answers: &Value, id: &str| {
        let choice = &answers[id]["body"]["choices"][0];
        let text = choice["message"]["content"].as_str().unwrap().to_string();
        (text, choice["finish_reason"].as_str().unwrap().to_string())
    };
    let row = |id: &str, more: Value| {
        let mut row = chat(id, 3, json!({"max_tokens": 40}));
        row["body"]
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        row
    };
    let rows = [
        row("silent", json!({})),
        row("own", json!({"stop": "not-this-either"})),
        row("none", json!({"stop": []})),
    ];
    let (answers, _) = batch(&p, &model, &rows, 0, &[]);
    let whole = text(&answers, "silent").0;
    let chars: Vec<char> = whole.chars().collect();
    let half = chars.len() / 2;
    let stop: String = chars[half..half + 3].iter().collect();
    // More of them than a row may have.
    let mut stops: Vec<String> = (0..20).map(|i| format!("never-there-{i}")).collect();
    stops.push(stop.clone());
    config(&model, json!({"stop_strings": stops}));
    let (answers, _) = batch(&p, &model, &rows, 0, &["--overwrite"]);
    let ended = (
        whole[..whole.find(&stop).unwrap()].to_string(),
        "stop".to_string(),
    );
    assert_eq!(text(&answers, "silent"), ended);
    for id in ["own", "none"] {
        assert_eq!(text(&answers, id).0, whole, "{id}");
    }
    let (answers, _) = batch(&p, &model, &rows, 0, &["--overwrite", "--stop", "nor-this"]);
    assert_eq!(text(&answers, "silent").0, whole);
}

#[test]
fn what_is_not_followed_is_named_once() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    config(
        &model,
        json!({"no_repeat_ngram_size": 2, "suppress_tokens": [3], "bad_words_ids": null, "num_beams": 1}),
    );
    let told = run(&p, &model, &["-n", "2"]).done().stderr;
    assert_eq!(
        told.matches("sets no_repeat_ngram_size, suppress_tokens, which is not followed")
            .count(),
        1,
        "{told}"
    );
    assert!(!told.contains("bad_words_ids") && !told.contains("num_beams"));
    assert_eq!(run(&p, &model, &["-n", "2", "-q"]).done().stderr, "");
}

#[test]
fn messages_and_raw_exclude_each_other_and_say_so() {
    let p = Place::new();
    let file = p.file("m.json", r#"[{"role": "user", "content": "hi"}]"#);
    let model = fixture("qwen2-bf16");
    p.run(&["run", str(&model), "--messages", &file, "--raw"])
        .refused(2, &["--messages", "cannot be used with", "--raw"]);
}

#[test]
fn what_is_typed_wins_over_variables_that_go_against_it() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let run = |env: &[(&str, &str)], more: &[&str]| {
        let base = [
            "run",
            str(&model),
            "-n",
            "16",
            "--json",
            "-q",
            "--ignore-eos",
        ];
        let mut command = p.command(&[&base[..], more].concat());
        command.envs(env.iter().copied());
        Ran::from(command.output().unwrap())
    };
    let ids = |ran: Ran| ran.json()["token_ids"].clone();
    let hot = ["-p", "x", "--temperature", "5"];
    let greedy = ids(run(&[], &["-p", "x", "--greedy"]));
    let drawn = ids(run(&[], &hot));
    assert_ne!(greedy, drawn);
    assert_eq!(ids(run(&[("TENSORPAGER_GREEDY", "1")], &hot)), drawn);
    // Both from the environment: greedy is greedy.
    let both = [
        ("TENSORPAGER_GREEDY", "1"),
        ("TENSORPAGER_TEMPERATURE", "5"),
    ];
    assert_eq!(ids(run(&both, &["-p", "x"])), greedy);
    // A prompt beside another kind of prompt.
    let file = p.file("prompt.txt", "x");
    let prompt = [("TENSORPAGER_PROMPT", "something else")];
    assert_eq!(
        ids(run(&prompt, &["--prompt-file", &file, "--greedy"])),
        greedy
    );
    let file = [("TENSORPAGER_PROMPT_FILE", "/no/such/file")];
    assert_eq!(ids(run(&file, &["-p", "x", "--greedy"])), greedy);
    let two = ["-p", "x", "--prompt-file", "/no/such/file"];
    run(&[], &two).refused(2, &["leave one of them out"]);
}

#[test]
fn two_budgets_for_the_same_memory_are_refused() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let run = |env: &[(&str, &str)], more: &[&str]| {
        let base = ["run", str(&model), "-p", "x", "-n", "1", "--in-place"];
        let mut command = p.command(&[&base[..], more].concat());
        command.envs(env.iter().copied());
        Ran::from(command.output().unwrap())
    };
    let map = ["--max-memory", "cpu=1GiB"];
    run(&[], &[&map[..], &["--cpu-memory", "2GiB"]].concat())
        .refused(2, &["--max-memory cpu=1GiB", "--cpu-memory 2048MiB"]);
    run(&[], &[&map[..], &["--cpu-memory", "1GiB"]].concat()).done();
    // What is typed wins: 1 MiB would be refused.
    run(&[("TENSORPAGER_CPU_MEMORY", "1MiB")], &map).done();
    run(
        &[("TENSORPAGER_MAX_MEMORY", "cpu=1MiB")],
        &["--cpu-memory", "1GiB"],
    )
    .done();
}

#[test]
fn what_is_reported_is_what_was_used() {
    let p = Place::new();
    let report = run(
        &p,
        &fixture("qwen2-bf16"),
        &["-n", "2", "--device-map", "disk", "--queue-depth", "65536"],
    );
    assert_eq!(report.json()["paging"]["queue_depth"], 4096);
    let model = fixture("qwen2-bf16");
    let bench = |flag: &str, value: &str| p.run(&["bench", "io", str(&model), flag, value]);
    bench("--depth", "0").refused(2, &["--depth", "from 1 to 4096"]);
    bench("--block", "1000").refused(2, &["--block", "4096"]);
}

#[test]
fn the_names_that_a_dtype_map_takes_are_listed() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let map = p.file("types.json", r#"{"lm_haed": "float32"}"#);
    p.run(&["run", str(&model), "--dtype", &map, "-p", "x"])
        .refused(2, &["lm_haed", "inspect MODEL --units"]);
    let listed = p.run(&["inspect", str(&model), "--units"]).done().stdout;
    let name = "model.layers.1.mlp.up_proj.weight";
    assert!(listed.lines().any(|l| l.trim() == name), "{listed}");
    let units = p.run(&["inspect", str(&model), "--json"]).json()["units"].clone();
    let names = |u: &Value| u["tensor_names"].as_array().unwrap().contains(&json!(name));
    assert_eq!(
        units
            .as_array()
            .unwrap()
            .iter()
            .filter(|u| names(u))
            .count(),
        1
    );
}

#[test]
fn the_offload_limit_holds_beside_a_pack_that_is_ready() {
    let p = Place::new();
    let packs = || {
        let listed = p.run(&["inspect", "--json"]).json();
        let packs = listed["packs"].as_array().unwrap();
        packs.iter().map(|p| p["name"].clone()).collect::<Vec<_>>()
    };
    for name in ["qwen2-bf16", "qwen3-bf16"] {
        p.run(&["pack", str(&fixture(name)), "-q"]).done();
    }
    let model = fixture("qwen2-bf16");
    let run = |limit: &str| {
        let args = [
            "run",
            str(&model),
            "-p",
            "x",
            "-n",
            "1",
            "--offload-limit",
            limit,
        ];
        p.run(&args).done().stderr
    };
    run("1GiB");
    assert_eq!(packs().len(), 2);
    // A limit that even this pack is beyond: said, and run.
    let told = run("1k");
    assert!(
        told.contains("offload limit of 1000 B is too small"),
        "{told}"
    );
    let told = run("450k");
    assert!(told.contains("removed qwen3-bf16--bf16"), "{told}");
    assert_eq!(packs(), ["qwen2-bf16--bf16"]);
    // Where there is none yet, the error says what to raise.
    p.run(&["pack", str(&fixture("qwen3-bf16")), "--offload-limit", "1k"])
        .refused(1, &["raise --offload-limit to "]);
}

#[test]
fn a_named_pack_that_stays_is_a_failure() {
    let p = Place::new();
    p.run(&["pack", str(&fixture("qwen2-bf16")), "-q"]).done();
    let dir = std::fs::File::open(p.offload().join("qwen2-bf16--bf16")).unwrap();
    dir.lock_shared().unwrap();
    let named = ["clean", "qwen2-bf16--bf16"];
    p.run(&named)
        .refused(1, &["qwen2-bf16--bf16 was not removed", "in use by"]);
    let all = p.run(&["clean", "--all"]).done().stdout;
    assert!(all.contains("kept qwen2-bf16--bf16"), "{all}");
    drop(dir);
    p.run(&named).done();
}

#[test]
fn logits_that_no_disk_can_hold_are_refused_before_packing() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    let ids: Vec<usize> = (0..500).map(|i| i % 50).collect();
    let line = format!("{}\n", json!({"input_ids": ids}));
    let input = p.file("in.jsonl", line.repeat(4));
    // It has no room for anything.
    let ran = p.run(&[
        "score",
        str(&model),
        "--input",
        &input,
        "--output",
        "/proc/logits.safetensors",
    ]);
    ran.refused(1, &["no room for the logits", "MB, and 0 B are free"]);
    assert!(!p.offload().exists());
}
