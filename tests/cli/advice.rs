//! Advice is followed: what a message says would do does.

use serde_json::{Value, json};
use tensorpager::checkpoint::{outline_synthetic, write_synthetic};

use super::process::{Place, Ran, fixture};

/// A model of 12 layers in float32, 107 MB: large beside what a process takes.
fn model(p: &Place) -> String {
    let config = config(12, 512, 1024);
    let dir = p.path("model");
    write_synthetic(&dir, &config, &mut |_, _| Ok(())).unwrap();
    let mut config = config;
    config["torch_dtype"] = json!("float32");
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let file = dir.join("model.safetensors");
    let widened = in_float32(&std::fs::read(&file).unwrap());
    std::fs::write(&file, widened).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("qwen2-bf16").join(name), dir.join(name)).unwrap();
    }
    "model".into()
}

fn config(layers: usize, hidden: usize, intermediate: usize) -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden / 64, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 288,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    })
}

/// The same values: bfloat16 is the upper half of float32.
fn in_float32(file: &[u8]) -> Vec<u8> {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + n]).unwrap();
    for (name, tensor) in header.as_object_mut().unwrap() {
        if name == "__metadata__" {
            continue;
        }
        assert_eq!(tensor["dtype"], "BF16");
        tensor["dtype"] = json!("F32");
        for at in tensor["data_offsets"].as_array_mut().unwrap() {
            *at = json!(2 * at.as_u64().unwrap());
        }
    }
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().div_ceil(8) * 8, b' ');
    let mut wide = (header.len() as u64).to_le_bytes().to_vec();
    wide.extend(header);
    let values = file[8 + n..].chunks_exact(2);
    wide.extend(values.flat_map(|b| [0, 0, b[0], b[1]]));
    wide
}

/// The word behind `before`.
#[track_caller]
fn word(text: &str, before: &str) -> String {
    let rest = text.split(before).nth(1);
    let rest = rest.unwrap_or_else(|| panic!("`{before}` is not in: {text}"));
    let word = rest.split_whitespace().next().unwrap();
    word.trim_end_matches([';', ',', ':']).to_string()
}

fn run(p: &Place, model: &str, more: &[&str]) -> Ran {
    let args = [
        "run",
        model,
        "-p",
        "x",
        "-n",
        "6",
        "--ignore-eos",
        "--device",
        "cpu",
    ];
    p.run(&[&args, more].concat())
}

#[test]
fn float32_weights_that_do_not_fit_do_in_16_bits() {
    let p = Place::new();
    let model = model(&p);
    let ran = run(&p, &model, &["--cpu-memory", "1MiB"]);
    ran.refused(1, &["--dtype bfloat16 (weights rounded to 16 bits) "]);
    let named = word(&ran.stderr, "(weights rounded to 16 bits) ");
    let whole = word(&ran.stderr, "give --cpu-memory ");
    let half = ["--dtype", "bfloat16", "--cpu-memory", &named];
    run(&p, &model, &half).done();
    run(&p, &model, &["--cpu-memory", &named]).refused(1, &["does not fit"]);
    let ran = run(&p, &model, &["--cpu-memory", &whole, "--json"]).json();
    assert_eq!(ran["dtype"], "float32");
}

#[test]
fn a_slow_run_is_told_what_would_be_faster_and_it_is() {
    let p = Place::new();
    let model = model(&p);
    let least = word(
        &run(&p, &model, &["--cpu-memory", "1MiB"]).stderr,
        "give --cpu-memory ",
    );
    let little = ["--cpu-memory", &least];
    let said = run(&p, &model, &little).done().stderr;
    let faster = said.lines().find(|l| l.starts_with("faster: "));
    let faster = faster.unwrap_or_else(|| panic!("{said}"));
    assert!(faster.contains(" tokens/s (+"), "{faster}");
    let bytes = |more: &[&str]| {
        let ran = run(&p, &model, &[more, &["--json"]].concat()).json();
        let advice = ran["advice"].clone();
        (
            ran["paging"]["disk_bytes_per_pass"].as_u64().unwrap(),
            advice,
        )
    };
    let (slow, advice) = bytes(&little);
    assert!(advice.as_array().unwrap().len() >= 2, "{advice}");
    assert!(slow > 80_000_000, "{slow}");
    let more = word(faster, "--cpu-memory ");
    let (none, advice) = bytes(&["--cpu-memory", &more]);
    assert_eq!((none, advice), (0, Value::Null));
    assert!(faster.contains("--dtype bfloat16"), "{faster}");
    let (half, _) = bytes(&[&little[..], &["--dtype", "bfloat16"]].concat());
    assert!(half <= slow / 2, "{half} {slow}");
    let quiet = run(&p, &model, &[&little[..], &["-q"]].concat()).done();
    assert_eq!(quiet.stderr, "");
}

#[test]
fn slow_jobs_and_scores_are_told_too() {
    let p = Place::new();
    let model = model(&p);
    let row = |i| json!({"custom_id": format!("r{i}"), "body": {"prompt": "x", "max_tokens": 3}});
    let rows: Vec<String> = (0..12).map(|i| row(i).to_string()).collect();
    let rows = p.file("rows.jsonl", rows.join("\n"));
    let batch = |output: &str, more: &[&str]| {
        let args = [
            "batch",
            &model,
            "-i",
            &rows,
            "-o",
            output,
            "--device-map",
            "disk",
        ];
        let rest = ["--ignore-eos", "--context", "64", "--device", "cpu"];
        p.run(&[&args[..], &rest, more].concat()).done()
    };
    let one = batch("one.jsonl", &["--max-sequences", "1", "--json"]);
    assert!(one.stderr.contains("faster: "), "{}", one.stderr);
    let named = word(&one.stderr, "--max-sequences ");
    assert!(["2", "4", "8"].contains(&named.as_str()), "{}", one.stderr);
    let report = |ran: &Ran| -> Value { serde_json::from_str(&ran.stdout).unwrap() };
    let passes = |ran: &Ran| report(ran)["paging"]["passes"].as_u64().unwrap();
    let advice = report(&one)["advice"].to_string();
    assert!(advice.contains("--max-sequences"), "{advice}");
    let more = batch("more.jsonl", &["--max-sequences", &named, "--json"]);
    assert!(
        passes(&more) < passes(&one),
        "{} {}",
        passes(&more),
        passes(&one)
    );
    let quiet = batch("quiet.jsonl", &["--max-sequences", "1", "-q"]);
    assert_eq!(quiet.stderr, "");
    let bench = ["--bench", "8", "--input-len", "2", "--output-len", "2"];
    let args = [
        "batch",
        &model,
        "--device-map",
        "disk",
        "--max-sequences",
        "1",
    ];
    let bench = p
        .run(&[&args[..], &bench, &["--device", "cpu"]].concat())
        .done();
    assert!(bench.stderr.contains("--max-sequences"), "{}", bench.stderr);

    let ids = p.file("ids.jsonl", "{\"input_ids\": [1, 2, 3]}\n");
    let score = |more: &[&str]| {
        let args = ["score", &model, "--input", &ids, "--device", "cpu"];
        p.run(&[&args[..], more].concat())
    };
    let refused = score(&["--cpu-memory", "1MiB"]);
    let least = word(&refused.stderr, "give --cpu-memory ");
    let slow = score(&["--cpu-memory", &least]).done();
    assert!(slow.stderr.contains("faster: "), "{}", slow.stderr);
    assert!(slow.stderr.contains("--dtype bfloat16"), "{}", slow.stderr);
    let quiet = score(&["--cpu-memory", &least, "-q"]).done();
    assert_eq!(
        (quiet.stderr.as_str(), quiet.stdout == slow.stdout),
        ("", true)
    );
}

#[test]
fn a_full_disk_is_told_what_takes_less() {
    let p = Place::new();
    let dir = p.path("model");
    let free = rustix::fs::statvfs(p.path(".")).unwrap();
    let free = free.f_bavail * free.f_frsize;
    // Three quarters of what is free in 16 bits, half as much again in 32.
    let layer_bytes = outline_synthetic(&p.path("one"), &config(1, 4096, 16384)).unwrap();
    let layers = (free / 4 * 3).div_ceil(layer_bytes) as usize;
    outline_synthetic(&dir, &config(layers, 4096, 16384)).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("qwen2-bf16").join(name), dir.join(name)).unwrap();
    }
    let pack = p.run(&["pack", "model", "--dtype", "float32"]);
    pack.refused(
        1,
        &[
            "not enough disk space",
            "nothing there is stale",
            "--dtype bfloat16 needs ",
            ", which fits",
        ],
    );
    // A cast cannot be streamed from the checkpoint's own files.
    assert!(!pack.stderr.contains("--in-place"), "{}", pack.stderr);
    let other = ["no other local disk", "--offload-folder /"];
    assert!(
        other.iter().any(|o| pack.stderr.contains(o)),
        "{}",
        pack.stderr
    );
}
