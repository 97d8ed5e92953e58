//! Several jobs, several starts, several shards: nobody's rows are lost, counted wrongly or mixed up.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use super::program::{apart, own_cache};
use super::{batch, code, command, done, model, read_rows, write_rows};

fn good(id: &str) -> Value {
    json!({"custom_id": id, "body": {"prompt": "the sea", "max_tokens": 2}})
}

fn bad(id: &str) -> Value {
    json!({"custom_id": id, "body": {"prompt": "the sea", "frobnicate": 1}})
}

#[track_caller]
fn refused(mut c: Command, exit: i32, words: &[&str]) -> Output {
    let out = c.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(code(&out), exit, "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
    out
}

#[test]
fn two_jobs_never_share_an_errors_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let errors = at("errors.jsonl");
    let to = ["--errors", errors.to_str().unwrap()];
    write_rows(&at("a.jsonl"), &[good("a0"), bad("a1")]);
    write_rows(&at("b.jsonl"), &[good("b0"), bad("b1")]);
    let mut unreadable = fs::read_to_string(at("b.jsonl")).unwrap();
    done(batch(&at("a.jsonl"), &at("a.out"), &to), 3);
    let before = fs::read(&errors).unwrap();
    assert_eq!(read_rows(&errors)[0]["custom_id"], "a1");
    let overwriting = [&to[..], &["--overwrite"]].concat();
    for more in [&to[..], &overwriting] {
        refused(
            batch(&at("b.jsonl"), &at("b.out"), more),
            2,
            &["errors of another job", "`a1`", "--errors"],
        );
        assert_eq!(fs::read(&errors).unwrap(), before, "{more:?}");
    }
    // Its own job goes on with it, and may begin anew.
    done(batch(&at("a.jsonl"), &at("a.out"), &to), 3);
    done(batch(&at("a.jsonl"), &at("a.out"), &overwriting), 3);
    assert_eq!(fs::read(&errors).unwrap(), before);
    // Errors that name no row: told by their line.
    unreadable.insert_str(0, "no JSON\n");
    fs::write(at("c.jsonl"), "{\"custom_id\": \n").unwrap();
    fs::write(at("b.jsonl"), unreadable).unwrap();
    let shared = at("nameless.jsonl");
    let to = ["--errors", shared.to_str().unwrap()];
    done(batch(&at("c.jsonl"), &at("c.out"), &to), 3);
    refused(
        batch(&at("b.jsonl"), &at("b2.out"), &to),
        2,
        &["errors of another job", "line 1"],
    );
    // The line was mended: the job that wrote it knows the file for its own.
    write_rows(&at("c.jsonl"), &[good("c0")]);
    done(batch(&at("c.jsonl"), &at("c.out"), &to), 0);
    assert!(!shared.exists());
}

fn merge(dir: &Path, more: &[&str]) -> Command {
    let mut c = command("batch-merge");
    c.arg("-i")
        .arg(dir.join("in.jsonl"))
        .arg("-o")
        .arg(dir.join("o.jsonl"))
        .arg("--json")
        .args(more);
    c
}

#[test]
fn shards_whose_errors_lie_elsewhere_are_merged() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let rows = [good("r0"), bad("r1"), good("r2"), bad("r3"), good("r4")];
    write_rows(&at("in.jsonl"), &rows);
    done(batch(&at("in.jsonl"), &at("whole.jsonl"), &[]), 3);
    fs::create_dir(at("failed")).unwrap();
    let errors = at("failed/e.jsonl");
    for shard in ["0/2", "1/2"] {
        let more = ["--shard", shard, "--errors", errors.to_str().unwrap()];
        let expected = if shard == "0/2" { 0 } else { 3 };
        done(batch(&at("in.jsonl"), &at("o.jsonl"), &more), expected);
    }
    let report = done(merge(dir.path(), &[]), 3);
    assert_eq!(
        (&report["rows_done"], &report["rows_failed"]),
        (&json!(3), &json!(2))
    );
    for (merged, whole) in [
        ("o.jsonl", "whole.jsonl"),
        ("o.errors.jsonl", "whole.errors.jsonl"),
    ] {
        assert_eq!(fs::read(at(merged)).unwrap(), fs::read(at(whole)).unwrap());
    }
    // Copied together to another place, they are found beside the output.
    let moved = tempfile::tempdir().unwrap();
    for name in ["o.0-of-2.jsonl", "o.1-of-2.jsonl", "in.jsonl"] {
        fs::copy(at(name), moved.path().join(name)).unwrap();
        let _ = fs::copy(
            at(&format!("{name}.job")),
            moved.path().join(format!("{name}.job")),
        );
    }
    fs::rename(
        at("failed/e.1-of-2.jsonl"),
        moved.path().join("e.1-of-2.jsonl"),
    )
    .unwrap();
    done(merge(moved.path(), &[]), 3);
    fs::rename(
        moved.path().join("e.1-of-2.jsonl"),
        at("failed/e.1-of-2.jsonl"),
    )
    .unwrap();

    // Mended and tried again, nothing has failed, and nothing is left that says so.
    let text = fs::read_to_string(at("in.jsonl")).unwrap();
    fs::write(
        at("in.jsonl"),
        text.replace(",\"frobnicate\":1", "")
            .replace("\"frobnicate\":1,", ""),
    )
    .unwrap();
    let more = [
        "--shard",
        "1/2",
        "--errors",
        errors.to_str().unwrap(),
        "--retry-errors",
    ];
    done(batch(&at("in.jsonl"), &at("o.jsonl"), &more), 0);
    let report = done(merge(dir.path(), &[]), 0);
    assert_eq!(report["rows_done"], 5);
    assert!(!at("o.errors.jsonl").exists());

    // A file of something else under that name is left alone.
    fs::write(at("notes.txt"), "my notes\n").unwrap();
    done(
        merge(dir.path(), &["--errors", at("notes.txt").to_str().unwrap()]),
        0,
    );
    assert_eq!(fs::read_to_string(at("notes.txt")).unwrap(), "my notes\n");

    // Answers to what the input no longer asks are not merged.
    let text = fs::read_to_string(at("in.jsonl")).unwrap();
    let changed = text.replacen("the sea", "the moon", 3);
    assert_ne!(changed, text);
    fs::write(at("in.jsonl"), changed).unwrap();
    let before = fs::read(at("o.jsonl")).unwrap();
    refused(
        merge(dir.path(), &[]),
        2,
        &["not what the shards worked on", "line 1", "--overwrite"],
    );
    assert_eq!(fs::read(at("o.jsonl")).unwrap(), before);
}

#[test]
fn plain_prompts_in_shards_are_known_again() {
    let dir = tempfile::tempdir().unwrap();
    let (prompts, output) = (dir.path().join("p.txt"), dir.path().join("o.jsonl"));
    for raw in [&[][..], &["--raw"]] {
        fs::write(&prompts, "one\ntwo\nthree\n").unwrap();
        for shard in ["0/2", "1/2"] {
            let mut c = command("batch");
            c.arg(model())
                .args([
                    "--in-place",
                    "--cpu-memory",
                    "512MiB",
                    "--max-tokens",
                    "2",
                    "--overwrite",
                ])
                .args(["--shard", shard, "--quiet", "--prompts"])
                .arg(&prompts)
                .arg("-o")
                .arg(&output)
                .args(raw);
            done(c, 0);
        }
        let merge = || {
            let mut c = command("batch-merge");
            c.arg("--prompts")
                .arg(&prompts)
                .arg("-o")
                .arg(&output)
                .arg("--json");
            c
        };
        assert_eq!(done(merge(), 0)["rows_done"], 3);
        fs::write(&prompts, "one\ntwo\nfour\n").unwrap();
        refused(merge(), 2, &["line 3"]);
    }
}

#[test]
fn max_errors_counts_what_failed_before() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let mut rows = vec![bad("b0"), bad("b1"), bad("b2"), good("g")];
    write_rows(&input, &rows);
    done(batch(&input, &output, &["--max-errors", "3"]), 3);
    refused(
        batch(&input, &output, &["--max-errors", "2"]),
        1,
        &["3 of 4 rows", "--max-errors"],
    );
    refused(
        batch(&input, &output, &["--max-errors", "50%"]),
        1,
        &["--max-errors"],
    );
    // One is mended since, and no longer counts; or all are tried again.
    rows[0] = good("b0");
    write_rows(&input, &rows);
    done(batch(&input, &output, &["--max-errors", "2"]), 3);
    let again = ["--max-errors", "1", "--retry-errors"];
    refused(batch(&input, &output, &again), 1, &["2 of 4 rows"]);
    write_rows(&input, &["b0", "b1", "b2", "g"].map(good));
    done(batch(&input, &output, &again), 0);
}

#[test]
fn a_number_of_errors_that_is_none_is_refused_before_anything_is_packed() {
    let dir = tempfile::tempdir().unwrap();
    let (input, offload) = (dir.path().join("in.jsonl"), dir.path().join("offload"));
    write_rows(&input, &[good("g")]);
    let mut c = command("batch");
    c.arg(model())
        .args(["--max-errors", "abc", "--offload-folder"])
        .arg(&offload)
        .arg("-i")
        .arg(&input)
        .arg("-o")
        .arg(dir.path().join("out.jsonl"));
    refused(c, 2, &["`abc`", "--max-errors 2%"]);
    assert!(!offload.exists() && !dir.path().join("out.jsonl").exists());
}

#[test]
fn what_a_message_says_and_nobody_reads_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let chat = |id: &str, message: Value| json!({"custom_id": id, "body": {"messages": [message], "max_tokens": 2}});
    let part = json!({"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}});
    write_rows(
        &input,
        &[
            chat(
                "weight",
                json!({"role": "user", "content": "Hi", "weight": 0}),
            ),
            chat("part", json!({"role": "user", "content": [part]})),
            chat(
                "empty",
                json!({"role": "user", "content": "Hi", "refusal": null, "annotations": [], "tool_calls": []}),
            ),
        ],
    );
    done(batch(&input, &output, &[]), 3);
    assert_eq!(read_rows(&output)[0]["custom_id"], "empty");
    let errors = read_rows(&dir.path().join("out.errors.jsonl"));
    let told: Vec<(&str, &str)> = errors
        .iter()
        .map(|e| {
            (
                e["error"]["code"].as_str().unwrap(),
                e["error"]["param"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            ("unknown_field", "weight"),
            ("unknown_field", "cache_control")
        ]
    );
}

/// `script` gives the program a terminal.
#[test]
fn progress_is_shown_as_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    // Long enough for the first plain line, which comes after a second.
    let rows: Vec<Value> = (0..6000)
        .map(|i| {
            let body = json!({"prompt": format!("row {i}"), "max_tokens": 60, "ignore_eos": true});
            json!({"custom_id": format!("r{i}"), "body": body})
        })
        .collect();
    write_rows(&input, &rows);
    let said = |kind: &str, terminal: bool| {
        // A job whose terminal was closed may hold its output a little longer.
        let output = dir.path().join(format!("{kind}-{terminal}.jsonl"));
        let mut c = batch(
            &input,
            &output,
            &["--progress", kind, "--max-sequences", "8"],
        );
        c.env("TERM", "xterm").env_remove("NO_COLOR");
        let mut child = match terminal {
            false => c,
            true => {
                let line: Vec<String> = std::iter::once(c.get_program())
                    .chain(c.get_args())
                    .map(|a| format!("'{}'", a.to_str().unwrap()))
                    .collect();
                let mut s = Command::new("script");
                apart(&mut s, own_cache())
                    .args(["-q", "-e", "-c", &line.join(" "), "/dev/null"])
                    .env("TERM", "xterm");
                s
            }
        };
        let log = dir.path().join(format!("{kind}-{terminal}"));
        let err = fs::File::create(&log).unwrap();
        let out = err.try_clone().unwrap();
        let stdout = if terminal {
            out.into()
        } else {
            std::process::Stdio::null()
        };
        let mut child = child
            .stdin(std::process::Stdio::null())
            .stdout(stdout)
            .stderr(err)
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2500));
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{kind}: over before it said anything");
        child.kill().unwrap();
        child.wait().unwrap();
        fs::read_to_string(log).unwrap()
    };
    let plain = said("plain", false);
    assert!(plain.lines().any(|l| l.contains("/6000 rows: ")), "{plain}");
    assert!(
        !plain.contains('\u{1b}') && !plain.contains('\r'),
        "{plain:?}"
    );
    assert!(
        said("auto", false).contains("/6000 rows: "),
        "no terminal, no bar"
    );
    assert!(said("none", false).is_empty());
    if Command::new("script").arg("--version").output().is_ok() {
        let bar = said("bar", true);
        assert!(bar.contains("/6000 rows") && bar.contains('\r'), "{bar:?}");
        let none = said("none", true);
        assert!(!none.contains("rows"), "{none:?}");
    } else {
        println!("skipped the bar: no `script` to give it a terminal");
    }
}
