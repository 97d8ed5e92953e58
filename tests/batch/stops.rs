//! Whatever stops a job: kill -9, Ctrl-C, a full disk, too little KV room.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tensorpager::text::Draw;

use super::{batch, code, done, read_rows, row, write_rows};

// hazard: job-killed: at any moment: resumed to the same bytes
#[test]
fn killed_at_any_moment_a_job_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let mut rows: Vec<Value> = (0..150).map(row).collect();
    rows[40]["body"]["frobnicate"] = json!(1);
    write_rows(&input, &rows);
    let whole = dir.path().join("whole.jsonl");
    let started = Instant::now();
    done(batch(&input, &whole, &["--max-sequences", "4"]), 3);
    let took = started.elapsed();
    let expected = fs::read_to_string(&whole).unwrap();
    let expected_errors = fs::read_to_string(dir.path().join("whole.errors.jsonl")).unwrap();
    assert_eq!(expected.lines().count(), 149);

    let jobs: u64 = std::env::var("TENSORPAGER_KILL_JOBS").map_or(1, |n| n.parse().unwrap());
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |t| t.as_nanos() as u64);
    let mut kills = 0;
    for job in 0..jobs {
        let output = dir.path().join(format!("killed-{job}.jsonl"));
        println!("job {job}, moments from seed {seed}");
        kills += killed_until_done(
            &input,
            &output,
            &expected,
            &expected_errors,
            took,
            seed + job,
        );
    }
    println!("{jobs} jobs, killed {kills} times");
}

/// Runs the job, which takes about `took`, killed again and again at random moments, until it ends; how often it was killed.
fn killed_until_done(
    input: &Path,
    output: &Path,
    expected: &str,
    expected_errors: &str,
    took: Duration,
    seed: u64,
) -> u64 {
    let few = ["--max-sequences", "4"];
    let mut kept = Vec::new();
    let mut cut_short = 0u64;
    for round in 0..200u64 {
        let mut child = batch(input, output, &few)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let draw = Draw {
            seed,
            choice: 0,
            position: round,
        };
        std::thread::sleep(took.mul_f64(draw.uniform()));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let now = fs::read_to_string(output).unwrap_or_default();
        match (ended, cut_short) {
            (Some(_), 0) => {
                for file in [output, &output.with_extension("errors.jsonl")] {
                    let _ = fs::remove_file(file);
                }
                continue;
            }
            (Some(_), _) => break,
            (None, _) => {}
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
            fs::write(output, torn).unwrap();
            let last = now.trim_end().rfind('\n').map_or(0, |at| at + 1);
            let id =
                serde_json::from_str::<Value>(&now[last..]).map(|r| r["custom_id"].to_string());
            kept.retain(|k| id.as_ref().is_ok_and(|id| id != k));
        }
    }
    done(batch(input, output, &few), 3);
    assert!(cut_short > 0, "no run was long enough to be killed");
    assert_eq!(fs::read_to_string(output).unwrap(), expected);
    let errors = fs::read_to_string(output.with_extension("errors.jsonl")).unwrap();
    assert_eq!(errors, expected_errors);
    // And once more changes nothing.
    let report = done(batch(input, output, &few), 3);
    assert_eq!(report["this_run"]["output_tokens"], 0);
    assert_eq!(fs::read_to_string(output).unwrap(), expected);
    cut_short
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
    let child = started(batch(&input, &output, &["--max-sequences", "2"]), &output);
    interrupt(&child);
    let out = child.wait_with_output().unwrap();
    assert_eq!(code(&out), 130, "{}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let finished = read_rows(&output).len() as u64;
    assert!((2..400).contains(&finished));
    assert_eq!(report["rows_done"], finished);
    assert_eq!(report["rows_remaining"], 400 - finished);
}

/// The job under way: a first row is written.
fn started(mut job: Command, output: &Path) -> Child {
    let child = job
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while fs::read(output).unwrap_or_default().is_empty() {
        assert!(Instant::now() < until, "no row in a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn interrupt(child: &Child) {
    let kill = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
}

// hazard: sigint-twice: stops at once with 130; finished rows stay, the same command goes on
#[test]
fn interrupted_twice_it_stops_at_once_and_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    // A short row, so that it is seen to run, among rows that would take long to finish.
    let rows: Vec<Value> = (0..60)
        .map(|i| {
            let n = if i == 0 { 1 } else { 450 };
            json!({"custom_id": format!("r{i}"),
                   "body": {"prompt": format!("row {i}"), "max_tokens": n, "ignore_eos": true}})
        })
        .collect();
    write_rows(&input, &rows);
    let child = started(batch(&input, &output, &["--max-sequences", "60"]), &output);
    interrupt(&child);
    // Two signals at the same moment are one to a process.
    std::thread::sleep(Duration::from_millis(30));
    interrupt(&child);
    let asked = Instant::now();
    let out = child.wait_with_output().unwrap();
    let took = asked.elapsed();
    assert_eq!(code(&out), 130);
    assert!(out.stdout.is_empty(), "it did not wait to report");
    assert!(took < Duration::from_secs(2), "{took:?}");
    let kept = read_rows(&output).len();
    assert!((1..60).contains(&kept), "{kept} rows");
    let report = done(batch(&input, &output, &[]), 0);
    assert_eq!(report["this_run"]["rows_done"], 60);
    let whole = dir.path().join("whole.jsonl");
    done(batch(&input, &whole, &["--max-sequences", "7"]), 0);
    assert_eq!(fs::read(&output).unwrap(), fs::read(&whole).unwrap());
}

// hazard: no-kv: a row that can never fit: an error row; answered once there is room
#[test]
fn a_row_that_outgrows_kv_fails_alone_and_is_answered_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let row = |id: &str, prompt: String, n: usize| json!({"custom_id": id, "body": {"prompt": prompt, "max_tokens": n, "ignore_eos": true}});
    write_rows(
        &input,
        &[
            row("short", "a".into(), 5),
            row("long answer", "b".into(), 300),
            row("long prompt", "c ".repeat(150), 5),
            row("short too", "d".into(), 9),
        ],
    );
    // 24 KiB are 4 blocks of 16 tokens, and there is one more for each sequence.
    let tight = ["--kv-memory", "24KiB", "--max-sequences", "1"];
    let report = done(batch(&input, &output, &tight), 3);
    assert_eq!(report["rows_done"], 2);
    assert_eq!(
        report["context"], 512,
        "the model's own, whatever memory holds"
    );
    let errors = read_rows(&dir.path().join("out.errors.jsonl"));
    assert_eq!(errors.len(), 2);
    for e in &errors {
        assert_eq!(e["error"]["code"], "kv_room");
        let message = e["error"]["message"].as_str().unwrap();
        assert!(message.contains("--kv-memory"), "{message}");
    }
    done(batch(&input, &output, &["--retry-errors"]), 0);
    let whole = dir.path().join("whole.jsonl");
    done(batch(&input, &whole, &[]), 0);
    assert_eq!(fs::read(&output).unwrap(), fs::read(&whole).unwrap());
    assert!(!dir.path().join("out.errors.jsonl").exists());
}

#[test]
fn in_the_order_they_finish_where_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let rows: Vec<Value> = [40, 2, 20]
        .iter()
        .map(|n| {
            json!({"custom_id": format!("{n} tokens"),
                   "body": {"prompt": "x", "max_tokens": n, "ignore_eos": true}})
        })
        .collect();
    write_rows(&input, &rows);
    done(batch(&input, &output, &["--order", "completion"]), 0);
    let ids = || -> Vec<Value> {
        let rows = read_rows(&output);
        rows.iter().map(|r| r["custom_id"].clone()).collect()
    };
    assert_eq!(ids(), ["2 tokens", "20 tokens", "40 tokens"]);
    // Asked for the other order, a finished job is put into it.
    let report = done(batch(&input, &output, &[]), 0);
    assert_eq!(report["this_run"]["passes"], 0);
    assert_eq!(ids(), ["40 tokens", "2 tokens", "20 tokens"]);
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
