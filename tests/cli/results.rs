//! What the commands print: text, JSON with the contract's names, JSONL, files. Results on stdout, the rest on stderr.

use std::io::Read;

use serde_json::{Value, json};

use super::process::{Place, fixture, str};

fn golden(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name).join("golden.json")).unwrap()).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[test]
fn run_json_has_the_contracts_names() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let args = [
        "run",
        str(&model),
        "-p",
        "What is paging?",
        "-n",
        "6",
        "--greedy",
        "--ignore-eos",
        "--json",
        "--device-map",
        "disk",
    ];
    let ran = p.run(&args).done();
    assert!(
        ran.stderr.contains("packed qwen2-bf16"),
        "progress goes to stderr: {}",
        ran.stderr
    );
    let report = ran.json();
    for key in [
        "model",
        "device",
        "dtype",
        "prompt_tokens",
        "prompt_token_ids",
        "token_ids",
        "text",
        "finish_reason",
        "timings",
        "paging",
    ] {
        assert!(report.get(key).is_some(), "no {key}");
    }
    for key in [
        "pack_s",
        "load_s",
        "time_to_first_token_s",
        "decode_s",
        "output_tokens_per_s",
        "total_s",
    ] {
        assert!(report["timings"][key].is_f64(), "no timings.{key}");
    }
    let paging = &report["paging"];
    for key in [
        "passes",
        "units",
        "bytes_per_pass",
        "disk_bytes",
        "disk_bytes_per_pass",
        "h2d_bytes",
        "resident_gpu_bytes",
        "resident_cpu_bytes",
        "prefetch_depth",
        "page_size",
        "queue_depth",
    ] {
        assert!(paging[key].is_u64(), "no paging.{key}");
    }
    for key in [
        "disk_s",
        "disk_gb_per_s",
        "h2d_s",
        "h2d_gb_per_s",
        "stall_s",
        "stall_disk_s",
        "stall_copy_s",
        "compute_s",
        "overlap",
    ] {
        assert!(paging[key].is_f64(), "no paging.{key}");
    }
    for key in [
        "io",
        "direct",
        "verify",
        "probed_disk_gb_per_s",
        "percent_of_bound",
    ] {
        assert!(paging.get(key).is_some(), "no paging.{key}");
    }
    assert_eq!(report["model"], "qwen2-bf16");
    assert_eq!(
        (&report["device"], &report["dtype"]),
        (&json!("cpu"), &json!("bfloat16"))
    );
    assert_eq!(report["token_ids"].as_array().unwrap().len(), 6);
    assert_eq!(report["finish_reason"], "length");
    assert_eq!(
        paging["passes"], 5,
        "decode passes: one a token but the first"
    );
    assert!(paging["disk_bytes_per_pass"].as_u64().unwrap() > 100_000);
    assert_eq!(paging["verify"], "always");
    // The chat template was rendered as transformers renders it.
    assert_eq!(
        report["prompt_token_ids"],
        golden("qwen2-bf16")["chat"]["input_ids"]
    );
    // Again: the pack is found, and the answer is the same.
    let again = p.run(&args).json();
    assert_eq!(again["timings"]["pack_s"], 0.0);
    assert_eq!(again["token_ids"], report["token_ids"]);
    assert_eq!(keys(&again), keys(&report));
}

#[test]
fn the_same_tokens_on_every_way_in() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let accelerate = fixture("accelerate-qwen2-bf16");
    let ids = |args: &[&str]| {
        let base = [
            "run",
            "-p",
            "The disk",
            "--raw",
            "-n",
            "8",
            "--greedy",
            "--ignore-eos",
            "--json",
        ];
        p.run(&[&base[..], args].concat()).json()["token_ids"].clone()
    };
    let first = ids(&[str(&model)]);
    let pack = p.offload().join("qwen2-bf16--bf16");
    for args in [
        &[str(&model), "--in-place"][..],
        &[str(&pack)],
        &[str(&accelerate), "--config-from", str(&model)],
        &[str(&accelerate), "--config-from", str(&model), "--in-place"],
        &[
            str(&model),
            "--io",
            "threads",
            "--device-map",
            "disk",
            "--page-size",
            "64KiB",
            "--prefetch-depth",
            "4",
        ],
        &[
            str(&model),
            "--io",
            "mmap",
            "--device-map",
            "disk",
            "--verify",
            "first",
            "--threads",
            "3",
        ],
        &[
            str(&model),
            "--max-memory",
            "0=1GiB,cpu=200MiB",
            "--queue-depth",
            "1",
        ],
    ] {
        assert_eq!(ids(args), first, "{args:?}");
    }
    // A hub id in the local cache.
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = p.path("hf/hub/models--org--tiny/snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    for entry in std::fs::read_dir(&model).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), snapshot.join(entry.file_name())).unwrap();
    }
    std::fs::create_dir_all(p.path("hf/hub/models--org--tiny/refs")).unwrap();
    p.file("hf/hub/models--org--tiny/refs/main", commit);
    assert_eq!(ids(&["org/tiny"]), first);
    assert!(
        p.offload()
            .join("org--tiny--bf16")
            .join("manifest.json")
            .is_file()
    );
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let p = Place::new();
    for name in ["llama3-bf16", "mistral-bf16", "qwen3-bf16", "llama-f32"] {
        let model = fixture(name);
        for prompt in golden(name)["prompts"].as_array().unwrap() {
            let text = prompt["text"].as_str().unwrap();
            let report = p
                .run(&[
                    "run",
                    str(&model),
                    "--raw",
                    "-p",
                    text,
                    "-n",
                    "8",
                    "--greedy",
                    "--ignore-eos",
                    "--json",
                    "-q",
                ])
                .json();
            assert_eq!(report["prompt_token_ids"], prompt["input_ids"], "{name}");
            // The fixtures' seeds make the first steps clear by more than 16-bit rounding moves them.
            let margin = prompt["margins"][0].as_f64().unwrap();
            assert!(margin > 0.05);
            assert_eq!(
                report["token_ids"][0], prompt["greedy_ids"][0],
                "{name}: {text}"
            );
        }
    }
}

#[test]
fn text_streams_on_stdout_in_whole_characters() {
    let p = Place::new();
    let model = fixture("llama3-bf16");
    let args = [
        "run",
        str(&model),
        "-p",
        "żółw",
        "-n",
        "400",
        "--ignore-eos",
        "--temperature",
        "2",
        "--seed",
        "5",
    ];
    let report = p.run(&[&args[..], &["--json", "-q"]].concat()).json();
    let mut child = p.command(&args).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let (mut pieces, mut text) = (0, String::new());
    let mut buffer = [0u8; 4096];
    loop {
        let n = out.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        pieces += 1;
        text += std::str::from_utf8(&buffer[..n]).expect("a piece ends at a character's end");
    }
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success());
    assert_eq!(
        text.strip_suffix('\n').unwrap(),
        report["text"].as_str().unwrap()
    );
    assert!(pieces > 3, "it streams: {pieces} pieces");
    assert!(
        text.chars().any(|c| c.len_utf8() > 1 && c != '\u{fffd}'),
        "there were characters of several bytes"
    );
    let told = String::from_utf8(ended.stderr).unwrap();
    assert!(
        told.contains("tokens/s") && told.contains("peak memory"),
        "closing figures: {told}"
    );
}

#[test]
fn sampling_is_reproducible_and_greedy_is_greedy() {
    let p = Place::new();
    let model = fixture("qwen3-bf16");
    let ids = |args: &[&str]| {
        let base = [
            "run",
            str(&model),
            "-p",
            "sample",
            "-n",
            "24",
            "--ignore-eos",
            "--json",
            "-q",
        ];
        p.run(&[&base[..], args].concat()).json()["token_ids"].clone()
    };
    let hot = ["--temperature", "1.5", "--seed", "7"];
    assert_eq!(ids(&hot), ids(&hot));
    assert_eq!(
        ids(&hot),
        ids(&[
            &hot[..],
            &["--threads", "3", "--in-place", "--device-map", "disk"]
        ]
        .concat())
    );
    assert_ne!(ids(&hot), ids(&["--temperature", "1.5", "--seed", "8"]));
    let greedy = ids(&["--greedy"]);
    assert_eq!(greedy, ids(&["--greedy", "--seed", "9"]));
    assert_eq!(greedy, ids(&["--temperature", "0"]));
    assert_eq!(greedy, ids(&["--temperature", "5", "--top-k", "1"]));
    assert_eq!(greedy, ids(&["--temperature", "5", "--top-p", "0.0001"]));
    assert_eq!(greedy, ids(&["--temperature", "5", "--min-p", "1"]));
    let penalised = ids(&["--greedy", "--repetition-penalty", "20"]);
    let mut seen = std::collections::HashSet::new();
    assert!(
        penalised
            .as_array()
            .unwrap()
            .iter()
            .all(|t| seen.insert(t.as_u64())),
        "{penalised}"
    );
}

#[test]
fn generation_config_is_respected_and_flags_win() {
    let p = Place::new();
    let copy = p.copy("qwen2-bf16", "model");
    let config = |value: Value| {
        std::fs::write(copy.join("generation_config.json"), value.to_string()).unwrap()
    };
    let go = |args: &[&str]| {
        let base = [
            "run",
            str(&copy),
            "-p",
            "hello",
            "--in-place",
            "--json",
            "-q",
        ];
        p.run(&[&base[..], args].concat()).json()
    };
    config(json!({"max_new_tokens": 5}));
    assert_eq!(
        go(&["--ignore-eos"])["token_ids"].as_array().unwrap().len(),
        5
    );
    assert_eq!(
        go(&["--ignore-eos", "-n", "7"])["token_ids"]
            .as_array()
            .unwrap()
            .len(),
        7
    );
    // An end token of several: generation ends before it.
    let tokens = go(&["--ignore-eos", "-n", "9", "--greedy"])["token_ids"].clone();
    let fourth = tokens[3].as_u64().unwrap();
    let first = tokens
        .as_array()
        .unwrap()
        .iter()
        .position(|t| t.as_u64() == Some(fourth))
        .unwrap();
    config(json!({"eos_token_id": [1_000, fourth]}));
    let stopped = go(&["-n", "9", "--greedy"]);
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["token_ids"].as_array().unwrap().len(), first);
    config(json!({"do_sample": true, "temperature": 1.3, "top_k": 20}));
    assert_ne!(
        go(&["-n", "20", "--seed", "1", "--ignore-eos"])["token_ids"],
        go(&["-n", "20", "--seed", "2", "--ignore-eos"])["token_ids"]
    );
    assert_eq!(
        go(&["-n", "9", "--greedy", "--ignore-eos"])["token_ids"],
        tokens
    );
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let args = [
        "run",
        str(&model),
        "-p",
        "stop",
        "-n",
        "60",
        "--ignore-eos",
        "--temperature",
        "1",
        "--seed",
        "3",
    ];
    let whole = p.run(&[&args[..], &["--json", "-q"]].concat()).json()["text"]
        .as_str()
        .unwrap()
        .to_string();
    // Any piece of the middle, cut at characters, as long as it says something.
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 3].iter().collect();
    let at = whole.find(&stop).unwrap();
    let ran = p
        .run(
            &[
                &args[..],
                &["--json", "-q", "--stop", "never-there", "--stop", &stop],
            ]
            .concat(),
        )
        .json();
    assert_eq!(ran["text"].as_str().unwrap(), &whole[..at]);
    assert_eq!(ran["finish_reason"], "stop");
    let plain = p
        .run(&[&args[..], &["-q", "--stop", &stop]].concat())
        .done();
    assert_eq!(plain.stdout, format!("{}\n", &whole[..at]));
    assert_eq!(plain.stderr, "", "quiet is quiet");
}

#[test]
fn prompts_come_from_flags_files_messages_and_stdin() {
    let p = Place::new();
    let model = fixture("llama3-bf16");
    let model = str(&model);
    let chat = golden("llama3-bf16")["chat"].clone();
    let text = chat["messages"][0]["content"].as_str().unwrap();
    let ids = |args: &[&str], stdin: &str| {
        let base = ["run", model, "-n", "1", "--json", "-q"];
        p.run_with(&[&base[..], args].concat(), stdin).json()["prompt_token_ids"].clone()
    };
    let file = p.file("prompt.txt", text);
    let messages = p.file("messages.json", chat["messages"].to_string());
    for (args, stdin) in [
        (&["-p", text][..], ""),
        (&["--prompt-file", &file], ""),
        (&["--prompt-file", "-"], text),
        (&["--messages", &messages], ""),
        (&[], text),
    ] {
        assert_eq!(ids(args, stdin), chat["input_ids"], "{args:?}");
    }
    let with_system = ids(&["-p", text, "--system", "Be brief."], "");
    assert!(with_system.as_array().unwrap().len() > chat["input_ids"].as_array().unwrap().len());
    let raw = ids(&["-p", "Layer 7", "--raw"], "");
    assert_eq!(raw, golden("llama3-bf16")["prompts"][1]["input_ids"]);
}

#[test]
fn score_writes_likelihoods_and_logits() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let golden_json = golden("qwen2-bf16");
    let prompts = golden_json["prompts"].as_array().unwrap();
    let mut input = String::new();
    for prompt in prompts {
        input += &format!(
            "{}\n\n",
            json!({"input_ids": prompt["input_ids"], "custom_id": "x"})
        );
    }
    input += &format!("{}\n", json!({"messages": golden_json["chat"]["messages"]}));
    let file = p.file("in.jsonl", &input);
    let output = p.path("out.safetensors");
    std::fs::write(&output, "an older file").unwrap();
    let from_file = p
        .run(&[
            "score",
            str(&model),
            "--input",
            &file,
            "--output",
            str(&output),
        ])
        .done();
    let piped = p
        .run_with(
            &[
                "score",
                str(&model),
                "--device-map",
                "disk",
                "--io",
                "threads",
                "--page-size",
                "64KiB",
            ],
            &input,
        )
        .done();
    assert_eq!(from_file.stdout, piped.stdout, "every digit");
    let lines: Vec<Value> = from_file
        .stdout
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len(), prompts.len() + 1);
    let bytes = std::fs::read(&output).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!((8 + n) % 8, 0);
    let header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let tensor = |name: &str| -> &[u8] {
        let at = |i: usize| header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        &bytes[8 + n..][at(0)..at(1)]
    };
    for (i, line) in lines.iter().enumerate() {
        let ids: Vec<u64> = match prompts.get(i) {
            Some(prompt) => prompt["input_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|t| t.as_u64().unwrap())
                .collect(),
            None => golden_json["chat"]["input_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|t| t.as_u64().unwrap())
                .collect(),
        };
        assert_eq!(
            (&line["index"], &line["tokens"]),
            (&json!(i), &json!(ids.len()))
        );
        assert_eq!(
            header[format!("logits.{i}")]["shape"],
            json!([ids.len(), 288])
        );
        assert_eq!(header[format!("logits.{i}")]["dtype"], "F32");
        assert_eq!(header[format!("input_ids.{i}")]["dtype"], "I32");
        let written: Vec<u64> = tensor(&format!("input_ids.{i}"))
            .chunks_exact(4)
            .map(|b| u64::from(u32::from_le_bytes(b.try_into().unwrap())))
            .collect();
        assert_eq!(written, ids);
        let logits: Vec<f32> = tensor(&format!("logits.{i}"))
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let expected: Vec<f64> = (1..ids.len())
            .map(|t| {
                let row = &logits[(t - 1) * 288..][..288];
                let max = row.iter().copied().fold(f32::MIN, f32::max);
                let sum: f64 = row.iter().map(|v| f64::from(v - max).exp()).sum();
                f64::from(row[ids[t] as usize]) - f64::from(max) - sum.ln()
            })
            .collect();
        let got: Vec<f64> = line["token_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap())
            .collect();
        assert_eq!(got.len(), expected.len());
        assert!(got.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
        let sum: f64 = expected.iter().sum();
        assert!((line["log_likelihood"].as_f64().unwrap() - sum).abs() < 1e-3);
        match ids.len() {
            1 => {
                assert!(
                    line["perplexity"].is_null()
                        && line["log_likelihood"]
                            .as_f64()
                            .is_some_and(|l| l.to_bits() == 0)
                )
            }
            n => {
                let expected = (-sum / (n - 1) as f64).exp();
                assert!((line["perplexity"].as_f64().unwrap() / expected - 1.0).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn pack_inspect_verify_clean() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let packed = p.run(&["pack", str(&model), "--json"]).json();
    assert_eq!(
        (&packed["model"], &packed["dtype"]),
        (&json!("qwen2-bf16"), &json!("bfloat16"))
    );
    let dir = p.offload().join("qwen2-bf16--bf16");
    for file in [
        "manifest.json",
        "checksums.bin",
        "layer.000.dat",
        "layer.002.dat",
        "embed.dat",
        "head.000.dat",
        "config.json",
        "tokenizer.json",
    ] {
        assert!(dir.join(file).is_file(), "no {file}");
        assert!(
            !file.ends_with(".dat")
                || std::fs::metadata(dir.join(file))
                    .unwrap()
                    .len()
                    .is_multiple_of(4096)
        );
    }
    let again = p.run(&["pack", str(&model)]).done();
    assert!(
        again.stderr.contains("already packed")
            && again.stdout.trim().ends_with("qwen2-bf16--bf16")
    );
    p.run(&["pack", str(&model), "--dtype", "float32", "-q"])
        .done();
    let map = p.file(
        "types.json",
        "{\"lm_head\": \"float32\", \"model.layers.1\": \"float16\"}",
    );
    let mixed = p
        .run(&[
            "run",
            str(&model),
            "--dtype",
            &map,
            "-p",
            "hi",
            "-n",
            "3",
            "--json",
        ])
        .json();
    assert_eq!(mixed["dtype"], "mixed");
    let listed = p.run(&["inspect", "--json"]).json();
    let names: Vec<&str> = listed["packs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    assert!(
        names.contains(&"qwen2-bf16--bf16")
            && names.contains(&"qwen2-bf16--f32")
            && names.contains(&"qwen2-bf16--mixed"),
        "{names:?}"
    );
    let of_one_file = p.run(&["inspect", str(&model)]).done().stdout;
    assert!(of_one_file.contains(" in 1 file: "), "{of_one_file}");
    let info = p.run(&["inspect", str(&model), "--json"]).json();
    assert_eq!((&info["layers"], &info["vocab"]), (&json!(3), &json!(288)));
    assert!(
        p.run(&["inspect", str(&model), "--units"])
            .done()
            .stdout
            .contains("layer 2")
    );
    // A streamed run leaves the disk's rate beside the weights: still a good pack, and still all ours.
    p.run(&[
        "run",
        str(&model),
        "-p",
        "hi",
        "-n",
        "3",
        "--device-map",
        "disk",
        "-q",
    ])
    .done();
    assert!(p.run(&["verify"]).done().stdout.contains("good"));
    assert!(
        p.run(&["verify", "qwen2-bf16--bf16", "--json"]).json()["packs"][0]["problems"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    let mut bytes = std::fs::read(dir.join("layer.001.dat")).unwrap();
    bytes[77] ^= 4;
    std::fs::write(dir.join("layer.001.dat"), bytes).unwrap();
    let bad = p.run(&["verify", str(&dir)]);
    assert!(
        bad.code == 1 && bad.stdout.contains("layer.001.dat block 0 (layer 1)"),
        "{}",
        bad.stdout
    );
    p.run(&["run", str(&model), "-p", "hi", "-n", "3", "-q"])
        .refused(1, &["layer 1", "layer.001.dat", "block 0", "verify"]);
    let would = p.run(&["clean", "--dry-run", "--json"]).json();
    assert!(would["removed"].as_array().unwrap().len() >= 2);
    assert!(dir.exists());
    std::fs::write(p.offload().join("notes.txt"), "mine").unwrap();
    for unasked in [&["clean"][..], &["clean", "--json"]] {
        p.run(unasked)
            .refused(2, &["nothing was removed", "qwen2-bf16--bf16 (", "--all"]);
    }
    p.run(&["clean", "--all", "qwen2-bf16--f32"])
        .refused(2, &["--all"]);
    assert!(dir.exists(), "nothing goes unasked");
    p.run(&["clean", "qwen2-bf16--f32"]).done();
    assert!(dir.exists() && !p.offload().join("qwen2-bf16--f32").exists());
    p.run(&["clean", "--all"]).done();
    let left: Vec<_> = std::fs::read_dir(p.offload())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(
        left,
        ["notes.txt"],
        "everything of ours is gone, nothing else"
    );
    assert!(p.run(&["inspect"]).done().stdout.contains("no packs"));
    assert!(p.run(&["verify"]).done().stdout.contains("no packs"));
}

#[test]
fn a_stale_pack_is_made_anew_and_the_limit_removes_the_longest_unused() {
    let p = Place::new();
    let copy = p.copy("qwen2-bf16", "model");
    p.run(&["pack", str(&copy), "-q"]).done();
    let first = p
        .run(&[
            "run",
            str(&copy),
            "-p",
            "hi",
            "--greedy",
            "-n",
            "6",
            "-q",
            "--ignore-eos",
        ])
        .done()
        .stdout;
    let weights = copy.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let n = bytes.len();
    bytes[n - 60_000..]
        .iter_mut()
        .step_by(2)
        .for_each(|b| *b ^= 0x55);
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::write(&weights, bytes).unwrap();
    let second = p
        .run(&[
            "run",
            str(&copy),
            "-p",
            "hi",
            "--greedy",
            "-n",
            "6",
            "-q",
            "--ignore-eos",
        ])
        .done()
        .stdout;
    assert_ne!(first, second, "the weights changed, so did the answer");
    p.run(&[
        "pack",
        str(&fixture("qwen3-bf16")),
        "-q",
        "--offload-limit",
        "450k",
    ])
    .done();
    let listed = p.run(&["inspect", "--json"]).json();
    let names: Vec<&str> = listed["packs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["qwen3-bf16--bf16"]);
    std::fs::remove_dir_all(&copy).unwrap();
    p.run(&["clean", "--stale"]).done();
    assert_eq!(
        p.run(&["inspect", "--json"]).json()["packs"]
            .as_array()
            .unwrap()
            .len(),
        1,
        "nothing stale is left"
    );
}

#[test]
fn bench_io_measures_each_setting() {
    let p = Place::new();
    let model = fixture("mistral-bf16");
    let args = [
        "bench",
        "io",
        str(&model),
        "--seconds",
        "0.02",
        "--readers",
        "threads,mmap",
        "--block",
        "64KiB,256KiB",
        "--depth",
        "1,4",
    ];
    let report = p.run(&[&args[..], &["--json"]].concat()).json();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert!(
            row["gb_per_s"].as_f64().unwrap() > 0.0 && row["cpu_s_per_gb"].is_f64(),
            "{row}"
        );
        assert!(
            row["reader"].is_string()
                && row["block_bytes"].is_u64()
                && row["depth"].is_u64()
                && row["direct"].is_boolean()
        );
    }
    let table = p.run(&args).done().stdout;
    assert_eq!(table.lines().count(), 9, "{table}");
    assert!(table.starts_with("reader"));
}
