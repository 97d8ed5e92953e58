//! What `batch-check` foresees: the plan that `batch` makes, and as many passes as it runs.

use std::path::Path;

use serde_json::{Value, json};

use super::{batch, code, command, done, model, write_rows};

/// Rows of 8 tokens in and as many out as `answers` says.
fn job(dir: &Path, answers: impl Iterator<Item = usize>) -> std::path::PathBuf {
    let rows: Vec<Value> = answers
        .enumerate()
        .map(|(i, n)| {
            let prompt: Vec<usize> = (0..8).map(|k| 3 + (i * 8 + k) % 200).collect();
            json!({"custom_id": format!("row-{i}"), "url": "/v1/completions", "body": {"prompt": prompt, "max_tokens": n}})
        })
        .collect();
    let input = dir.join("in.jsonl");
    write_rows(&input, &rows);
    input
}

const RATES: [&str; 6] = [
    "--disk-gb-per-s",
    "0.01",
    "--memory-gb-per-s",
    "1",
    "--cpu-gflops",
    "10",
];

fn foreseen(input: &Path, more: &[&str]) -> Value {
    let mut check = command("batch-check");
    check
        .arg(model())
        .args(["--in-place", "--threads", "2", "--cpu-memory", "512MiB"])
        .args(["--json", "--ignore-eos", "-i"])
        .arg(input)
        .args(more);
    done(check, 0)["prediction"].clone()
}

fn by_hand(input: &Path, more: &[&str]) -> Value {
    foreseen(input, &[&RATES[..], more].concat())
}

fn number(of: &Value, name: &str) -> f64 {
    of[name].as_f64().unwrap_or_else(|| panic!("{name}: {of}"))
}

#[test]
fn more_at_once_are_fewer_passes_and_residents_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let input = job(dir.path(), (0..40).map(|i| 3 + i % 9));
    let disk = ["--device-map", "disk"];
    let at = |n: &str| by_hand(&input, &[&disk[..], &["--max-sequences", n]].concat());
    let (one, eight, all) = (at("1"), at("8"), by_hand(&input, &disk));
    // Alone, every token is a pass.
    let tokens: usize = (0..40).map(|i| 3 + i % 9).sum();
    assert_eq!(
        (&one["passes"], &one["at_once"]),
        (&json!(tokens), &json!(1))
    );
    assert_eq!(eight["at_once"], 8);
    assert_eq!((&all["passes"], &all["at_once"]), (&json!(11), &json!(40)));
    let passes = number(&eight, "passes");
    assert!(
        passes >= tokens as f64 / 8.0 && passes < 1.3 * tokens as f64 / 8.0,
        "{eight}"
    );
    assert!(number(&one, "at_most_s") > number(&eight, "at_most_s"));
    assert!(number(&eight, "at_most_s") > number(&all, "at_most_s"));
    let bytes = number(&eight, "bytes_per_pass");
    assert!(bytes > 0.0 && number(&eight, "disk_bytes") >= bytes * passes);
    // The disk is the bound: what it takes is what the passes take.
    let stream = number(&eight, "stream_s");
    assert!(
        (number(&eight, "at_most_s") / stream - 1.0).abs() < 0.2,
        "{eight}"
    );
    assert!((stream / (number(&eight, "disk_bytes") / 1e7) - 1.0).abs() < 1e-6);

    let cpu = by_hand(&input, &["--device-map", "cpu"]);
    assert_eq!(
        (&cpu["bytes_per_pass"], &cpu["stream_s"]),
        (&json!(0), &json!(0.0))
    );
    assert_eq!(cpu["disk_gb_per_s"], Value::Null);
    assert_eq!(cpu["passes"], all["passes"]);
    assert!(
        number(&cpu, "at_most_s") > 0.0 && number(&cpu, "at_most_s") < number(&all, "at_most_s")
    );
    // Little room for keys and values: fewer at once, or some of them twice.
    let narrow = by_hand(&input, &["--device-map", "disk", "--kv-memory", "1"]);
    assert!(
        number(&narrow, "passes") >= number(&all, "passes"),
        "{narrow}"
    );
    assert!(number(&narrow, "kv_tokens") < number(&all, "kv_tokens"));
}

#[test]
fn time_follows_the_rates_that_are_given() {
    let dir = tempfile::tempdir().unwrap();
    let input = job(dir.path(), (0..20).map(|i| 5 + i % 7));
    let with = |disk: &str, gflops: &str| {
        foreseen(
            &input,
            &[
                "--device-map",
                "disk",
                "--max-sequences",
                "4",
                "--disk-gb-per-s",
                disk,
                "--memory-gb-per-s",
                "1000",
                "--cpu-gflops",
                gflops,
            ],
        )
    };
    let (slow, fast) = (with("0.01", "1000"), with("0.02", "1000"));
    for name in ["stream_s", "at_most_s"] {
        let ratio = number(&slow, name) / number(&fast, name);
        assert!((ratio - 2.0).abs() < 0.05, "{name}: {slow} {fast}");
    }
    // A disk beyond all bounds: computing is all there is.
    let (slow, fast) = (with("1000", "0.01"), with("1000", "0.02"));
    for name in ["compute_s", "at_most_s"] {
        let ratio = number(&slow, name) / number(&fast, name);
        assert!((ratio - 2.0).abs() < 0.05, "{name}: {slow} {fast}");
    }
    assert_eq!(fast["compute_gflops"], 0.02);
    let mut check = command("batch-check");
    check
        .arg(model())
        .args(["--disk-gb-per-s", "0", "-i"])
        .arg(&input);
    assert_eq!(check.output().unwrap().status.code(), Some(2));
}

/// The engine of the run is the one that was planned, and its scheduler makes the passes of the model.
#[test]
fn a_job_takes_the_passes_that_were_foreseen() {
    let dir = tempfile::tempdir().unwrap();
    let input = job(dir.path(), (0..60).map(|i| 4 + i * 7 % 23));
    for (map, sequences) in [("disk", "6"), ("cpu", "16")] {
        let more = ["--device-map", map, "--max-sequences", sequences];
        let expected = by_hand(&input, &more);
        let output = dir.path().join(format!("{map}.jsonl"));
        let ran = done(
            batch(&input, &output, &[&more[..], &["--ignore-eos"]].concat()),
            0,
        );
        let passes = number(&ran["paging"], "passes");
        let share = number(&expected, "passes") / passes;
        assert!((share - 1.0).abs() < 0.05, "{expected} {}", ran["paging"]);
        // A run also reads embedding rows, and a little more than a file's bytes at its unaligned ends.
        let (told, read) = (
            number(&expected, "bytes_per_pass"),
            number(&ran["paging"], "disk_bytes_per_pass"),
        );
        assert!(
            read >= told && (read == 0.0) == (told == 0.0),
            "{told} {read}"
        );
    }
}

#[test]
fn the_exit_code_of_a_check_is_that_of_the_job() {
    let dir = tempfile::tempdir().unwrap();
    let good = json!({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}});
    let bad =
        json!({"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "x", "colour": 1}});
    let input = dir.path().join("rows.jsonl");
    let check = |rows: &[&Value], memory: &str, json: bool| {
        write_rows(
            &input,
            &rows.iter().map(|r| (*r).clone()).collect::<Vec<_>>(),
        );
        let mut check = command("batch-check");
        check
            .arg(model())
            .args(["--in-place", "--cpu-memory", memory]);
        check.args(RATES).arg("-i").arg(&input);
        check.args(json.then_some("--json"));
        check.output().unwrap()
    };
    for (rows, enough, bad) in [
        (&[&good][..], 0, 0),
        (&[&good, &bad][..], 3, 1),
        (&[&bad][..], 3, 1),
    ] {
        assert_eq!(code(&check(rows, "512MiB", true)), enough);
        // No plan is made for rows of which none can run.
        let without = if rows.len() == bad { enough } else { 1 };
        let out = check(rows, "1MiB", true);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(code(&out), without, "{said}");
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(report["rows_bad"], bad, "{report}");
        assert!(report["prediction"].is_null());
        let error = &report["prediction_error"];
        assert_eq!(error.is_null(), without != 1, "{report}");
        if without == 1 {
            assert_eq!(error["code"], "memory");
            assert!(said.contains(error["what"].as_str().unwrap()), "{said}");
            let text = check(rows, "1MiB", false);
            assert_eq!(code(&text), 1);
            let counts = String::from_utf8(text.stdout).unwrap();
            assert!(counts.contains(&format!("{bad} of them bad")), "{counts}");
        }
    }
}
