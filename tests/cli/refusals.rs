//! Wrong input of each kind: three lines that name it, the right exit code, no panic, no result.

use std::process::Stdio;

use serde_json::{Value, json};

use super::process::{Place, fixture, str};

fn qwen2() -> String {
    str(&fixture("qwen2-bf16")).to_string()
}

#[test]
fn models_that_are_none() {
    let p = Place::new();
    p.run(&["run", "/no/such/folder", "-p", "x"])
        .refused(2, &["/no/such/folder"]);
    p.run(&["run", "some-org/some-model", "-p", "x"])
        .refused(2, &["some-org/some-model"]);
    std::fs::create_dir(p.path("empty")).unwrap();
    p.run(&["run", "empty", "-p", "x"]).refused(1, &["empty"]);
    let file = p.file("plain.txt", "x");
    p.run(&["run", &file, "-p", "x"]).refused(2, &["plain.txt"]);
    std::fs::create_dir(p.path("weightless")).unwrap();
    p.file("weightless/config.json", "{}");
    p.run(&["run", "weightless", "-p", "x"])
        .refused(1, &["weightless"]);
    assert!(
        !p.offload().exists(),
        "nothing was made for a model that is none"
    );
}

#[test]
fn a_name_that_is_no_folder_is_not_looked_for_on_the_hub() {
    let p = Place::new();
    // Nothing answers there: asking would fail with other words.
    let mut command = p.command(&["run", "Qwen2.5-7B", "-p", "x"]);
    command
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_ENDPOINT", "http://127.0.0.1:9");
    super::process::Ran::from(command.output().unwrap()).refused(
        2,
        &[
            "there is no model at `Qwen2.5-7B`",
            "only org/name",
            "pull Qwen2.5-7B",
        ],
    );
}

#[test]
fn jobs_of_what_is_no_file_are_refused_and_leave_nothing() {
    let p = Place::new();
    let model = qwen2();
    let rows = p.file(
        "rows.jsonl",
        "{\"custom_id\": \"a\", \"body\": {\"prompt\": \"x\"}}\n",
    );
    let fifo = p.fifo("fifo");
    std::fs::create_dir(p.path("folder")).unwrap();
    // Before anything is packed.
    let before = p.files();
    for output in ["folder", fifo.as_str(), "-", "/dev/null"] {
        let ran = run_briefly(&p, &["batch", &model, "-i", &rows, "-o", output]);
        ran.refused(2, &["cannot hold results"]);
        assert_eq!(p.files(), before, "-o {output}");
    }
    let errors = [
        "batch",
        &model,
        "-i",
        &rows,
        "-o",
        "out.jsonl",
        "--errors",
        "folder",
    ];
    run_briefly(&p, &errors).refused(2, &["folder cannot hold results"]);
    for (input, output) in [("nowhere.jsonl", "out.jsonl"), (&rows, "nowhere/out.jsonl")] {
        let ran = p.run(&["batch", &model, "-i", input, "-o", output]);
        assert_ne!(ran.code, 0);
        ran.refused(ran.code, &["nowhere"]);
        assert_eq!(p.files(), before, "{input} {output}");
    }
    for input in ["folder", fifo.as_str(), "-"] {
        let ran = run_briefly(&p, &["batch", &model, "-i", input, "-o", "out.jsonl"]);
        ran.refused(
            2,
            &["cannot be the input of a job", "put the rows into a file"],
        );
    }
    assert_eq!(p.files(), before);
}

#[test]
fn files_that_are_no_jobs_are_refused_before_anything_is_made() {
    let p = Place::new();
    let model = qwen2();
    let row = "{\"custom_id\": \"a\", \"body\": {\"prompt\": \"x\", \"max_tokens\": 1}}\n";
    let noise: Vec<u8> = (0..100_000u32)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    let wide: Vec<u8> = row.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (i, (bytes, word)) in [
        (&noise[..], "not text"),
        (&[b"\xff\xfe", &wide[..]].concat(), "UTF-16"),
        (&wide[..], "not text"),
        (b"id,prompt\n1,hello\n2,bye\n", "first 3 lines"),
        (
            b"[\n{\"custom_id\": \"a\",\n\"body\": {}}\n]\n",
            "first 4 lines",
        ),
        (b"hello", "only line"),
        (b"\n \n", "blank"),
        (b"", "blank"),
    ]
    .into_iter()
    .enumerate()
    {
        let input = p.file(&format!("in{i}.jsonl"), bytes);
        let before = p.files();
        for args in [
            &["batch", &model, "-i", &input, "-o", "out.jsonl"][..],
            &["batch-check", &model, "-i", &input],
        ] {
            p.run(args).refused(2, &[&input, "has no rows", word]);
            assert_eq!(p.files(), before, "{args:?}");
        }
    }
    let latin = p.file("latin.txt", b"caf\xe9\nna\xefve\n");
    p.run(&["batch", &model, "--prompts", &latin, "-o", "out.jsonl"])
        .refused(2, &["has no rows", "UTF-8"]);
    // One bad line among good ones, a mark at the beginning, and a row longer than what is looked at, are rows.
    let long = format!(
        "{{\"custom_id\": \"long\", \"body\": {{\"prompt\": \"x\", \"max_tokens\": 1, \"user\": \"{}\"}}}}\n",
        "y".repeat(2 << 20)
    );
    for (bytes, rows, bad) in [
        (format!("nonsense\n{row}"), 2, 1),
        (format!("\u{feff}{row}"), 1, 0),
        (long, 1, 0),
        ("{'custom_id': 'a'}\n{\"b\": 1,}\n".to_string(), 2, 2),
    ] {
        let input = p.file("good.jsonl", bytes);
        let ran = p.run(&["batch-check", &model, "-i", &input, "--json"]);
        let said: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(
            (&said["rows"], &said["rows_bad"]),
            (&json!(rows), &json!(bad))
        );
    }
}

#[test]
fn what_is_not_packed_is_not_verified_and_why() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    p.run(&["verify", str(&model)]).refused(
        2,
        &["is not a packed folder", "as it was downloaded", "pack"],
    );
    p.run(&["pack", str(&model)]).done();
    p.run(&["verify", str(&p.offload())])
        .refused(2, &["in which packs lie", "model--bf16"]);
    std::fs::remove_file(p.offload().join("model--bf16/manifest.json")).unwrap();
    p.run(&["verify", "model--bf16"])
        .refused(1, &["packing did not finish"]);
}

#[test]
fn records_that_could_not_be_written_are_refused_before_the_run() {
    let p = Place::new();
    std::fs::create_dir(p.path("folder")).unwrap();
    for (flag, path) in [("--trace", "nowhere/t.json"), ("--report", "folder")] {
        p.run(&["run", &qwen2(), "-p", "x", flag, path])
            .refused(2, &[path, "cannot be written"]);
    }
    p.run(&["tune", &qwen2(), "--trace", "t.json"])
        .refused(2, &["`tune` writes no --trace"]);
    p.run(&[
        "run",
        &qwen2(),
        "-p",
        "x",
        "--device-map",
        "gpu",
        "--device",
        "cpu",
    ])
    .refused(2, &["--device-map gpu"]);
    assert!(!p.offload().exists());
}

#[test]
fn broken_configs() {
    let config = |change: &dyn Fn(&mut Value)| -> (Place, String) {
        let p = Place::new();
        let copy = p.copy("qwen2-bf16", "model");
        let path = copy.join("config.json");
        let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(&path, value.to_string()).unwrap();
        (p, str(&copy).to_string())
    };
    let refused = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let (p, model) = config(change);
        for more in [&[][..], &["--in-place"]] {
            let mut args = vec!["run", &model, "-p", "x"];
            args.extend(more);
            p.run(&args).refused(1, words);
        }
        p.run(&["pack", &model]).refused(1, words);
    };
    refused(&|c| c["model_type"] = json!("hyena"), &["hyena"]);
    refused(
        &|c| {
            c.as_object_mut().unwrap().remove("model_type");
        },
        &["model_type"],
    );
    refused(
        &|c| {
            c.as_object_mut().unwrap().remove("hidden_size");
        },
        &["hidden_size"],
    );
    refused(
        &|c| c["num_attention_heads"] = json!(0),
        &["num_attention_heads"],
    );
    refused(&|c| c["hidden_act"] = json!("gelu_new"), &["gelu_new"]);
    refused(&|c| c["num_hidden_layers"] = json!(4), &["layers.3"]);
    refused(
        &|c| c["intermediate_size"] = json!(88),
        &["mlp", "84", "88"],
    );
    refused(&|c| c["vocab_size"] = json!(289), &["288", "289"]);
    let p = Place::new();
    let copy = p.copy("qwen2-bf16", "model");
    std::fs::write(copy.join("config.json"), "{\"model_type\": ").unwrap();
    p.run(&["run", str(&copy), "-p", "x"])
        .refused(1, &["config.json"]);
    std::fs::remove_file(copy.join("config.json")).unwrap();
    p.run(&["run", str(&copy), "-p", "x"])
        .refused(1, &["config.json"]);
}

#[test]
fn damaged_weights_and_tokenizers() {
    let p = Place::new();
    let copy = p.copy("qwen2-bf16", "model");
    let weights = copy.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    p.run(&["run", str(&copy), "-p", "x"])
        .refused(1, &["model.safetensors"]);
    std::fs::write(&weights, &whole[..5]).unwrap();
    p.run(&["run", str(&copy), "-p", "x"])
        .refused(1, &["model.safetensors"]);
    std::fs::write(&weights, &whole).unwrap();
    std::fs::write(copy.join("tokenizer.json"), "{}").unwrap();
    p.run(&["run", str(&copy), "-p", "x"])
        .refused(1, &["tokenizer.json"]);
    std::fs::remove_file(copy.join("tokenizer.json")).unwrap();
    p.run(&["run", str(&copy), "-p", "x"])
        .refused(1, &["tokenizer"]);
    // Scoring ids needs no tokenizer.
    p.run_with(&["score", str(&copy)], "{\"input_ids\": [1, 2]}\n")
        .done();
    let shards = p.copy("llama3-bf16", "shards");
    std::fs::remove_file(shards.join("model-00003-of-00006.safetensors")).unwrap();
    p.run(&["run", str(&shards), "-p", "x"])
        .refused(1, &["model-00003-of-00006.safetensors"]);
    p.run(&["run", str(&fixture("accelerate-qwen2-bf16")), "-p", "x"])
        .refused(1, &["--config-from"]);
}

// hazard: gpu-absent: `--device cuda`: one error
#[test]
fn flags_that_make_no_sense_are_usage_errors() {
    let p = Place::new();
    let model = qwen2();
    for (flags, words) in [
        (&["--no-such-flag"][..], &["--no-such-flag"][..]),
        (&["--page-size", "1000"], &["--page-size"]),
        (&["--page-size", "3MiB"], &["power of two"]),
        (&["--page-size", "32KiB"], &["64KiB"]),
        (&["--cpu-memory", "lots"], &["lots"]),
        (&["--cpu-memory", "-1"], &["-1"]),
        (&["--cpu-memory", "1.2.3GiB"], &["1.2.3GiB"]),
        (&["--max-memory", "cpu:1GiB"], &["cpu:1GiB"]),
        (&["--max-memory", "cpu=much"], &["much"]),
        (&["--io", "carrier-pigeon"], &["carrier-pigeon", "io_uring"]),
        (&["--verify", "sometimes"], &["sometimes", "always"]),
        (&["--threads", "0"], &["--threads"]),
        (&["--threads", "1000000"], &["--threads"]),
        (
            &["--prefetch-depth", "18446744073709551615"],
            &["--prefetch-depth"],
        ),
        (&["--queue-depth", "x"], &["--queue-depth"]),
        (&["--max-tokens", "0"], &["--max-tokens"]),
        (&["--max-tokens", "-3"], &["-3"]),
        (&["--context", "0"], &["--context"]),
        (&["--device", "abacus"], &["abacus"]),
        (&["--device-map", "/no/such.json"], &["/no/such.json"]),
        (&["--dtype", "int3"], &["int3"]),
        (&["--raw", "--system", "s"], &["--system"]),
        (&["--temperature=-1"], &["temperature"]),
        (&["--top-p", "nan"], &["top_p"]),
        (&["--top-p", "1.5"], &["top_p"]),
        (&["--min-p=-0.1"], &["min_p"]),
        (&["--repetition-penalty", "0"], &["repetition_penalty"]),
        (&["--seed", "x"], &["--seed"]),
        (&["--stop", ""], &["stop"]),
        (&["--prompt-file", "also.txt"], &["--prompt-file"]),
        (
            &["--messages", "also.json"],
            &["--messages", "leave one of them out"],
        ),
        (&["--seed"], &["--seed", "without its value"]),
    ] {
        let mut args = vec!["run", &model, "--prompt", "hi"];
        args.extend(flags);
        p.run(&args).refused(2, words);
    }
    p.run(&["run"]).refused(2, &["MODEL"]);
    p.run(&["frobnicate"]).refused(2, &["frobnicate"]);
    p.run(&["bench", "io", &model, "--seconds", "0"])
        .refused(2, &["--seconds"]);
    p.run(&["pack", &model, "--in-place"])
        .refused(2, &["--in-place"]);
    p.run(&["run", &model, "--in-place", "--dtype", "float32", "-p", "x"])
        .refused(2, &["cast"]);
    p.run(&["run", &model, "--dtype", "/no/such.json", "-p", "x"])
        .refused(1, &["/no/such.json"]);
    p.run(&["run", &model, "--device", "cuda", "-p", "x"])
        .refused(1, &["GPU"]);
    assert!(!p.offload().exists(), "a mistyped flag packs nothing");
    // A bare call gets the help, and asking for it is no failure.
    let bare = p.run(&[]);
    assert!(bare.code == 2 && bare.stderr.contains("Usage") && bare.stdout.is_empty());
    let help = p.run(&["run", "--help"]).done();
    assert!(help.stdout.contains("--prefetch-depth") && help.stderr.is_empty());
    assert!(
        p.run(&["--version"])
            .done()
            .stdout
            .starts_with("tensorpager ")
    );
}

#[test]
fn device_maps() {
    let p = Place::new();
    let model = qwen2();
    let go = |json: &str| {
        let map = p.file("map.json", json);
        p.run(&[
            "run",
            &model,
            "-p",
            "hi",
            "-n",
            "4",
            "--greedy",
            "--device-map",
            &map,
        ])
    };
    let plain = p
        .run(&["run", &model, "-p", "hi", "-n", "4", "--greedy"])
        .done()
        .stdout;
    for good in [
        "{\"\": \"disk\"}",
        "{\"\": \"cpu\"}",
        "{\"model\": \"disk\", \"lm_head\": \"cpu\"}",
    ] {
        assert_eq!(go(good).done().stdout, plain, "{good}");
    }
    go("{\"model.layers\": \"disk\"}").refused(2, &["embed_tokens"]);
    go("{\"\": \"moon\"}").refused(2, &["moon"]);
    go("{\"\": 0}").refused(2, &["GPU"]);
    go("[1]").refused(2, &["device map"]);
    go("{").refused(2, &["map.json"]);
}

#[test]
fn prompts_that_cannot_be_answered() {
    let p = Place::new();
    let model = qwen2();
    let bytes = p.file("bytes.txt", b"good \xff\xfe bad");
    p.run(&["run", &model, "--prompt-file", &bytes])
        .refused(2, &["bytes.txt", "UTF-8", "byte 5"]);
    p.run(&["run", &model, "--prompt-file", "/no/such.txt"])
        .refused(1, &["/no/such.txt"]);
    p.run_with(&["run", &model], b"\xff").refused(2, &["UTF-8"]);
    let long = "word ".repeat(2000);
    p.run(&["run", &model, "-p", &long])
        .refused(2, &["too long", "512"]);
    p.run(&["run", &model, "-p", "several words here", "--context", "4"])
        .refused(2, &["too long", "--context"]);
    p.run(&["run", &model, "--raw", "-p", ""])
        .refused(2, &["prompt"]);
    for bad in ["{}", "[{\"content\": \"hi\"}]", "[", "\"hi\""] {
        let file = p.file("messages.json", bad);
        p.run(&["run", &model, "--messages", &file])
            .refused(2, &["messages.json"]);
    }
    #[cfg(unix)]
    {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        let mut command = p.command(&["run", &model, "--prompt"]);
        command.arg(OsStr::from_bytes(b"\xff\xfe"));
        super::process::Ran::from(command.output().unwrap()).refused(2, &["UTF-8"]);
    }
}

// hazard: token-range: refused; names line, id and vocabulary
#[test]
fn lines_that_cannot_be_scored() {
    let p = Place::new();
    let model = qwen2();
    let output = p.path("out.safetensors");
    let go = |input: &[u8]| p.run_with(&["score", &model, "--output", str(&output)], input);
    let good = b"{\"input_ids\": [1, 2]}\n".to_vec();
    let after_good = |bad: &[u8]| [&good[..], bad].concat();
    go(b"").refused(2, &["nothing to score"]);
    go(b"\n \n").refused(2, &["nothing to score"]);
    for (bad, words) in [
        (&b"nonsense"[..], &["line 2"][..]),
        (b"{\"input_ids\": [1, -2]}", &["line 2", "-2"]),
        (b"{\"input_ids\": [1, 2.5]}", &["line 2"]),
        (b"{\"input_ids\": []}", &["line 2", "no tokens"]),
        (b"{}", &["line 2", "input_ids"]),
        (
            b"{\"input_ids\": [1], \"messages\": []}",
            &["line 2", "exactly one"],
        ),
        (b"{\"inputs\": [1]}", &["line 2", "inputs"]),
        (
            b"{\"input_ids\": [1, 288]}",
            &["line 2", "288", "vocabulary"],
        ),
        (b"{\"input_ids\": [1, 4294967296]}", &["line 2"]),
        (b"\xff\xfe", &["line 2", "UTF-8"]),
    ] {
        go(&after_good(bad)).refused(2, words);
    }
    let long = format!("{{\"input_ids\": {:?}}}", vec![1; 513]);
    go(&after_good(long.as_bytes())).refused(2, &["line 2", "513", "512"]);
    p.run(&["score", &model, "--input", "/no/such.jsonl"])
        .refused(1, &["/no/such.jsonl"]);
    assert!(!output.exists(), "a refusal leaves no output");
    let there: Vec<_> = std::fs::read_dir(output.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.starts_with("out."))
        .collect();
    assert!(there.is_empty(), "{there:?}");
}

#[test]
fn places_that_cannot_be_written() {
    let p = Place::new();
    let model = qwen2();
    let input = "{\"input_ids\": [1, 2]}\n";
    p.run_with(
        &["score", &model, "--output", "/no/such/dir/x.safetensors"],
        input,
    )
    .refused(1, &["/no/such/dir"]);
    let dir = p.path("adir");
    std::fs::create_dir(&dir).unwrap();
    p.run_with(&["score", &model, "--output", str(&dir)], input)
        .refused(1, &["adir"]);
    let file = p.file("not-a-folder", "x");
    p.run(&[
        "pack",
        &model,
        "--offload-folder",
        &format!("{file}/inside"),
    ])
    .refused(1, &["not-a-folder"]);
    p.run(&["verify", "no-such-pack"])
        .refused(2, &["no-such-pack"]);
    p.run(&["clean", "no-such-pack"])
        .refused(2, &["no-such-pack"]);
}

#[test]
fn a_closed_pipe_is_an_error_and_no_panic() {
    let p = Place::new();
    let model = qwen2();
    p.run(&["pack", &model]).done();
    for args in [
        &["run", &model, "-p", "hi", "-n", "400", "--ignore-eos"][..],
        &["run", &model, "-p", "hi", "-n", "4", "--json"],
        &["inspect"],
        &["inspect", &model, "--units"],
        &["verify"],
        &[
            "bench",
            "io",
            &model,
            "--seconds",
            "0.01",
            "--readers",
            "threads",
            "--block",
            "64KiB",
            "--depth",
            "1",
        ],
        &["pack", &model],
        &["clean", "--all"],
    ] {
        let mut command = p.command(args);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command.stdout(Stdio::from(writer)).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(
            stderr.contains("standard output") && !stderr.contains("panicked"),
            "{args:?}: {stderr}"
        );
    }
}

/// The files beside the weights that are read, or copied into a pack.
const TEXT_FILES: [&str; 14] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
];

/// As [`Place::run`], but ended after half a minute.
fn run_briefly(p: &Place, args: &[&str]) -> super::process::Ran {
    let mut command = std::process::Command::new("timeout");
    let plain = p.command(args);
    command.arg("30").arg(plain.get_program()).args(args);
    command.current_dir(plain.get_current_dir().unwrap());
    for (key, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    super::process::Ran::from(command.output().unwrap())
}

// hazard: fifos: in place of any file beside the weights: refused at once, by every command
// hazard: links: of any file beside the weights: refused unless `--allow-external`; nothing from elsewhere gets into a pack
#[test]
fn no_file_of_a_model_folder_makes_the_process_wait_or_look_elsewhere() {
    let p = Place::new();
    let secret = p.file("secret.txt", "the user's own");
    let job = p.file(
        "job.jsonl",
        "{\"custom_id\": \"a\", \"body\": {\"prompt\": \"x\", \"max_tokens\": 1}}\n",
    );
    let output = p.path("out.jsonl");
    for (i, name) in TEXT_FILES.into_iter().enumerate() {
        let copy = p.copy("qwen2-bf16", &format!("model-{i}"));
        let place = copy.join(name);
        let _ = std::fs::remove_file(&place);
        p.fifo(&format!("model-{i}/{name}"));
        for args in [
            &["run", str(&copy), "-p", "x", "-n", "1"][..],
            &["pack", str(&copy)],
            &["batch", str(&copy), "-i", &job, "-o", str(&output)],
        ] {
            let ran = run_briefly(&p, args);
            assert_ne!(ran.code, 124, "{name}: {args:?} waits for ever");
            ran.refused(1, &[name]);
        }
        std::fs::remove_file(&place).unwrap();
        std::os::unix::fs::symlink(&secret, &place).unwrap();
        let ran = run_briefly(&p, &["pack", str(&copy)]);
        ran.refused(1, &[name, "outside", "--allow-external"]);
        assert!(
            !p.offload()
                .join(format!("model-{i}--bf16"))
                .join(name)
                .exists()
        );
    }
}

// hazard: links: in place of what a pack keeps about itself: not followed; replaced where something is to be kept
// hazard: fifos: in place of what a pack keeps about itself: not waited for; replaced where something is to be kept
#[test]
fn what_a_pack_keeps_about_itself_leads_nowhere() {
    let p = Place::new();
    let secret = p.file("secret.txt", "the user's own");
    let model = qwen2();
    p.run(&["pack", &model]).done();
    let made = std::fs::read_dir(p.offload()).unwrap();
    let pack = made
        .map(|e| e.unwrap().path())
        .find(|path| path.join("manifest.json").exists())
        .unwrap();
    for name in ["last_used", "rates.json", "tune.json", "tune-gpu.json"] {
        let place = pack.join(name);
        for commands in [
            &["run", str(&pack), "-p", "x", "-n", "1"][..],
            &["run", &model, "-p", "x", "-n", "1"],
            &[
                "bench",
                "io",
                str(&pack),
                "--depth",
                "1",
                "--block",
                "64KiB",
            ],
        ] {
            let _ = std::fs::remove_file(&place);
            p.fifo(str(&place));
            let ran = run_briefly(&p, commands);
            assert_eq!(ran.code, 0, "{name}: {commands:?}: {}", ran.stderr);
            let _ = std::fs::remove_file(&place);
            std::os::unix::fs::symlink(&secret, &place).unwrap();
            assert_eq!(run_briefly(&p, commands).code, 0);
            assert_eq!(
                std::fs::read_to_string(&secret).unwrap(),
                "the user's own",
                "{name}: {commands:?}"
            );
        }
        std::fs::remove_file(&place).unwrap();
    }
    // A FIFO under a pack's own name.
    std::fs::remove_dir_all(&pack).unwrap();
    p.fifo(str(&pack));
    let ran = run_briefly(&p, &["run", &model, "-p", "x", "-n", "1"]);
    assert_ne!(ran.code, 124, "a FIFO under a pack's name is waited for");
}

#[test]
fn reading_by_mmap_is_not_taken_for_the_disk() {
    let p = Place::new();
    let model = qwen2();
    let run = [
        "run",
        &model,
        "-p",
        "x",
        "-n",
        "8",
        "--json",
        "--device-map",
        "disk",
        "--io",
    ];
    let mapped = p.run(&[&run[..], &["mmap"]].concat()).json();
    assert_eq!(mapped["paging"]["direct"], false);
}

#[test]
fn flags_may_come_from_the_environment() {
    let p = Place::new();
    let model = qwen2();
    let args = ["run", &model, "-p", "hi", "-n", "4", "--json"];
    let packed = |value: &serde_json::Value| value["timings"]["pack_s"].as_f64().unwrap() > 0.0;
    let in_place = p.env("TENSORPAGER_IN_PLACE", "1", &args).json();
    assert!(!packed(&in_place) && in_place["paging"]["verify"] == "self");
    assert!(packed(
        &p.env("TENSORPAGER_IN_PLACE", "false", &args).json()
    ));
    assert_eq!(
        p.env("TENSORPAGER_VERIFY", "never", &args).json()["paging"]["verify"],
        "never"
    );
    p.env("TENSORPAGER_THREADS", "many", &args)
        .refused(2, &["--threads"]);
}
