//! `tune`, what it keeps and who uses it; `bench` and `bench compare`.

use serde_json::json;

use super::process::{Place, Ran, fixture, str};

fn run_json(p: &Place, more: &[&str]) -> serde_json::Value {
    let model = fixture("qwen2-bf16");
    let mut args = vec![
        "run",
        str(&model),
        "-p",
        "hello",
        "-n",
        "3",
        "--greedy",
        "--ignore-eos",
        "--json",
        "--quiet",
        "--raw",
        "--device-map",
        "disk",
    ];
    args.extend(more);
    p.run(&args).done().json()
}

/// Prompts of eight tokens, and `more`.
fn bench(p: &Place, more: &[&str]) -> Ran {
    let model = fixture("qwen2-bf16");
    p.run(&[&["bench", str(&model), "-p", "8"], more].concat())
}

/// At rates given by hand, and `more`.
fn plan(p: &Place, model: &str, more: &[&str]) -> Ran {
    let model = fixture(model);
    p.run(&[&["plan", str(&model)], &RATES[..], more].concat())
}

#[test]
fn tune_keeps_a_setting_that_runs_use() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let ran = p
        .run(&[
            "tune",
            str(&model),
            "--json",
            "--seconds",
            "0.001",
            "--page-sizes",
            "64KiB,1MiB",
            "--queue-depths",
            "4,32",
            "--prefetch-depths",
            "1,2",
        ])
        .done();
    let said = ran.stderr.clone();
    let report = ran.json();
    let rows = report["curve"].as_array().unwrap();
    // Two readers of two page sizes and two depths, and the defaults.
    assert!(rows.len() > 8, "{report}");
    assert!(rows.iter().all(|r| r["ratio"].as_f64().unwrap() > 0.0));
    assert!(
        said.contains("kept in") && said.contains("--no-tune"),
        "{said}"
    );

    let kept = p.offload().join("qwen2-bf16--bf16/tune.json");
    let mut record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&kept).unwrap()).unwrap();
    assert_eq!(record["best"]["page_size"], report["best"]["page_size"]);
    record["best"] =
        json!({"io": "threads", "page_size": 131_072, "queue_depth": 5, "prefetch_depth": 2});
    std::fs::write(&kept, record.to_string()).unwrap();

    let tuned = run_json(&p, &[]);
    assert_eq!(tuned["paging"]["page_size"], 131_072);
    assert_eq!(tuned["paging"]["queue_depth"], 5);
    assert_eq!(tuned["paging"]["prefetch_depth"], 2);
    assert_eq!(tuned["paging"]["io"], "threads");
    let said = run_json(&p, &["--page-size", "64KiB"]);
    assert_eq!(
        said["paging"]["page_size"], 65_536,
        "what the user says comes first"
    );
    assert_eq!(said["paging"]["queue_depth"], 5);
    let plain = run_json(&p, &["--no-tune"]);
    assert_eq!(plain["paging"]["page_size"], 4 << 20);
    assert_eq!(plain["paging"]["queue_depth"], 32);
    for other in [said, plain] {
        assert_eq!(
            tuned["token_ids"], other["token_ids"],
            "how bytes are read changes no token"
        );
    }
    // The record is ours: the pack verifies with it.
    p.run(&["verify", str(&p.offload().join("qwen2-bf16--bf16"))])
        .done();
}

#[test]
fn bench_rows_can_be_compared() {
    let p = Place::new();
    let asked = [
        "-n", "4", "--pg", "8,4", "-b", "1,8", "-r", "3", "-o", "json",
    ];
    let rows = bench(&p, &[&asked[..], &["--device-map", "disk"]].concat());
    let rows = rows.done().json();
    assert_eq!(rows["rows"].as_array().unwrap().len(), 6);
    for row in rows["rows"].as_array().unwrap() {
        assert_eq!(row["samples_s"].as_array().unwrap().len(), 3);
        assert!(row["tokens_per_s"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["paging"]["disk_bytes_per_pass"].as_u64().unwrap() > 0);
    }
    let mut twice = rows.clone();
    for row in twice["rows"].as_array_mut().unwrap() {
        row["tokens_per_s"] = json!(row["tokens_per_s"].as_f64().unwrap() * 2.0);
        row["tokens_per_s_deviation"] = json!(0.0);
    }
    // One row has no partner, and says so.
    twice["rows"].as_array_mut().unwrap().pop();
    let (a, b) = (
        p.file("a.json", rows.to_string()),
        p.file("b.json", twice.to_string()),
    );
    let compared = p.run(&["bench", "compare", &a, &b]).done();
    assert!(compared.stdout.contains("+100.0 %"), "{}", compared.stdout);
    assert!(compared.stdout.contains("only in"), "{}", compared.stdout);
    let same = p.run(&["bench", "compare", &a, &a]).done();
    assert_eq!(same.stdout.matches("same").count(), 6, "{}", same.stdout);
    let bad = p.file("bad.json", "{\"rows\": 3}");
    let refused = p.run(&["bench", "compare", &a, &bad]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("bad.json"), "{}", refused.stderr);
}

const RATES: [&str; 6] = [
    "--disk-gb-per-s",
    "2",
    "--memory-gb-per-s",
    "20",
    "--cpu-gflops",
    "300",
];

#[test]
fn plan_answers_without_loading_anything() {
    let p = Place::new();
    let planned = plan(&p, "qwen2-bf16", &["--device-map", "disk", "--json"]);
    let plan = planned.done().json();
    assert_eq!(
        plan["rows"].as_array().unwrap().len(),
        4,
        "1, 8, 64 and 256 sequences"
    );
    assert!(plan["disk_bytes_per_pass"].as_u64().unwrap() > 0);
    assert!(
        plan["pack_bytes"].as_u64().unwrap() > 0,
        "nothing is packed yet"
    );
    assert!(plan["pictures"].is_null(), "this model sees nothing");
    assert!(!p.offload().exists(), "planning writes no weights");
    let measured = run_json(&p, &["--no-tune"]);
    let per_pass = measured["paging"]["disk_bytes_per_pass"].as_u64().unwrap();
    // Embedding rows are blocks of 64 KiB: one where two are predicted, or the other way round.
    let predicted = plan["rows"][0]["disk_bytes_per_pass"].as_u64().unwrap();
    assert!(
        per_pass.abs_diff(predicted) <= 2 * 65_536,
        "{per_pass} read, {predicted} predicted"
    );
    let model = fixture("qwen2-bf16");
    let refused = p.run(&["plan", str(&model), "--disk-gb-per-s", "-1"]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
}

#[test]
fn plan_says_what_pictures_cost_and_that_text_reads_none_of_the_tower() {
    let p = Place::new();
    let args = ["--device-map", "disk"];
    let table = plan(&p, "vl-bf16", &args).done().stdout;
    assert!(
        table.contains("a megapixel of image more") && table.contains("never by a pass over text"),
        "{table}"
    );
    let json = plan(&p, "vl-bf16", &[&args[..], &["--json"]].concat());
    let plan = json.done().json();
    let of = |words: &str| {
        let units = plan["units"].as_array().unwrap().iter();
        units
            .filter(|u| u["unit"].as_str().unwrap().starts_with(words))
            .map(|u| u["bytes"].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(
        plan["disk_bytes_per_pass"].as_u64().unwrap(),
        of("layer") + of("head")
    );
}

#[test]
fn a_report_is_one_page_that_needs_nothing_else() {
    let p = Place::new();
    let (page, trace) = (p.path("run.html"), p.path("run.json"));
    run_json(&p, &["--report", str(&page), "--trace", str(&trace)]);
    let html = std::fs::read_to_string(&page).unwrap();
    for words in [
        "Passes over time",
        "Waits by unit",
        "Where each unit rests",
        "Tuning curve",
        "layer 0",
        "<svg",
    ] {
        assert!(html.contains(words), "no {words}");
    }
    for outside in ["http:", "https:", "<script", "<link", "@import", "url("] {
        assert!(!html.contains(outside), "{outside}");
    }
    // Three tokens: the prompt's pass and two more.
    assert!(html.contains("3 passes"), "{html}");
    let events: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&trace).unwrap()).unwrap();
    assert!(events["traceEvents"].as_array().unwrap().len() > 10);
}

#[test]
fn plan_for_a_gpu_that_is_not_here() {
    let p = Place::new();
    let model = fixture("qwen2-bf16");
    let base = [
        "plan",
        str(&model),
        "--max-memory",
        "0=2GiB,cpu=2GiB",
        "--json",
    ];
    let refused = p.run(&base);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("--h2d-gb-per-s"),
        "{}",
        refused.stderr
    );
    let mut args = [&base[..], &RATES].concat();
    args.extend([
        "--h2d-gb-per-s",
        "12",
        "--gpu-gb-per-s",
        "400",
        "--gpu-gflops",
        "50000",
    ]);
    let all = p.run(&args).done().json();
    assert!(all["resident_gpu_bytes"].as_u64().unwrap() > 0, "{all}");
    assert_eq!(all["rows"][0]["copied_bytes_per_pass"], 0);
    args.extend(["--device-map", "cpu"]);
    let host = p.run(&args).done().json();
    assert_eq!(host["disk_bytes_per_pass"], 0);
    assert!(
        host["rows"][0]["copied_bytes_per_pass"].as_u64().unwrap() > 0,
        "{host}"
    );
    let pass = |plan: &serde_json::Value| plan["rows"][0]["pass_s"].as_f64().unwrap();
    assert!(pass(&host) > pass(&all), "copying costs");
}

#[test]
fn bench_records_each_test_and_reads_llama_benchs_spelling() {
    let p = Place::new();
    let records = ["--trace", "t.json", "--report", "r.html"];
    let args = ["-n", "0", "-pg", "8,4", "-r", "1", "-o", "json"];
    let report = bench(&p, &[&args[..], &records].concat()).json();
    let tests: Vec<&str> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["test"].as_str().unwrap())
        .collect();
    assert_eq!(tests, ["pp8", "pp8+tg4"]);
    for name in tests {
        let trace = std::fs::read(p.path(&format!("t.{name}.b1.json"))).unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&trace).unwrap();
        assert!(!trace["traceEvents"].as_array().unwrap().is_empty());
        assert!(p.path(&format!("r.{name}.b1.html")).is_file());
    }
    bench(&p, &["-n", "0", "-r", "1", "--trace", "one.json"]).done();
    assert!(p.path("one.json").is_file());
}
