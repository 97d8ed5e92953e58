//! Job files without a model.

use std::path::Path;

use super::files::{RowLog, Span};
use super::input::{Line, Source, TooLong};
use super::request::{Request, RowIds};
use super::shard::Shard;
use crate::error::Code;

fn id(row: &str) -> u128 {
    let line = Line {
        number: 1,
        bytes: row.as_bytes().to_vec(),
        too_long: None,
    };
    let source = Source::Jsonl("x".into());
    Request::parse(&source, &line).unwrap().id(RowIds {
        key: 7,
        pictures: None,
    })
}

#[test]
fn a_row_is_identified_by_what_it_means() {
    let row = r#"{"custom_id":"a","url":"/v1/completions","body":{"prompt":"x","max_tokens":3}}"#;
    let same = r#" {"body" : {"max_tokens":3, "prompt":"x"}, "custom_id":"a"} "#;
    assert_eq!(id(row), id(same));
    for other in [
        r#"{"custom_id":"b","body":{"prompt":"x","max_tokens":3}}"#,
        r#"{"custom_id":"a","body":{"prompt":"x","max_tokens":4}}"#,
        r#"{"custom_id":"a","body":{"prompt":["x"],"max_tokens":3}}"#,
        r#"{"custom_id":"a","url":"/v1/chat/completions","body":{"prompt":"x","max_tokens":3}}"#,
    ] {
        assert_ne!(id(row), id(other), "{other}");
    }
}

#[test]
fn a_row_that_is_too_long_is_one_whatever_it_begins_with() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let blanks = " ".repeat(100_000);
    std::fs::write(&path, format!("{blanks}{{}}\n{blanks}\n{{}}\n")).unwrap();
    let mut lines = Source::Jsonl(path.clone()).lines_up_to(80_000).unwrap();
    let mut seen = Vec::new();
    while let Some(line) = lines.next_line().unwrap() {
        seen.push((line.number, line.too_long.is_some()));
    }
    assert_eq!(seen, [(1, true), (3, false)]);

    // A mark at the beginning is no part of the row, whatever the limit.
    let text = format!("\u{feff}{}", "x".repeat(200_000));
    std::fs::write(&path, text).unwrap();
    let hash = |limit| {
        let mut lines = Source::Jsonl(path.clone()).lines_up_to(limit).unwrap();
        lines.next_line().unwrap().unwrap().hash_of_beginning(0)
    };
    assert_eq!(hash(80_000), hash(300_000));
}

#[test]
fn lines_are_counted_blank_or_not_and_huge_ones_are_passed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in");
    let huge = vec![b'x'; super::input::MAX_ROW_BYTES + 5];
    let text = [b"\xef\xbb\xbfone\r\n \n\n".as_slice(), &huge, b"\nlast"].concat();
    std::fs::write(&path, text).unwrap();
    let mut lines = Source::Jsonl(path).lines().unwrap();
    let mut seen = Vec::new();
    while let Some(l) = lines.next_line().unwrap() {
        seen.push((l.number, l.bytes.len().min(9), l.too_long));
    }
    let too_long = TooLong {
        bytes: huge.len() as u64,
        limit: super::input::MAX_ROW_BYTES as u64,
    };
    assert_eq!(seen, [(1, 3, None), (4, 9, Some(too_long)), (5, 4, None)]);
}

fn rows_of(log: &mut RowLog) -> crate::error::Result<Vec<Span>> {
    let mut spans = Vec::new();
    log.scan(&mut |span, bytes| {
        spans.push(span);
        Ok(serde_json::from_slice::<serde_json::Value>(bytes).is_ok())
    })?;
    Ok(spans)
}

#[test]
fn a_torn_end_is_cut_and_a_torn_middle_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut log = RowLog::open(&path).unwrap();
    let row = serde_json::json!({"id": "batch_req_1"});
    for _ in 0..3 {
        log.push(&row).unwrap();
    }
    log.sync().unwrap();
    let whole = std::fs::read(&path).unwrap();
    for cut in 1..whole.len() / 3 {
        std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
        let mut log = RowLog::open(&path).unwrap();
        rows_of(&mut log).unwrap();
        assert_eq!(
            std::fs::read(&path).unwrap(),
            whole[..whole.len() / 3 * 2],
            "cut {cut}"
        );
    }
    // A first row torn right at its start is ours; a note is not.
    for (text, kept) in [("{\"id\":\"batch_r", ""), ("note", "note"), ("\0\0\0", "")] {
        std::fs::write(&path, text).unwrap();
        let mut log = RowLog::open(&path).unwrap();
        assert_eq!(rows_of(&mut log).is_ok(), kept.is_empty());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);
    }
    let mut broken = whole.clone();
    broken[whole.len() / 3 + 1] = b'}';
    std::fs::write(&path, &broken).unwrap();
    let mut log = RowLog::open(&path).unwrap();
    assert_eq!(rows_of(&mut log).unwrap_err().code(), Code::Usage);
    assert_eq!(std::fs::read(&path).unwrap(), broken);
}

#[test]
fn shards_from_the_environment() {
    let env = |pairs: &'static [(&str, &str)]| {
        Shard::from_env(|name| {
            let found = pairs.iter().find(|(k, _)| *k == name);
            found.map(|(_, v)| v.to_string())
        })
    };
    let is = |i, n| Some(Shard { index: i, count: n });
    assert_eq!(env(&[]).unwrap(), None);
    assert_eq!(
        env(&[
            ("SLURM_ARRAY_TASK_ID", "5"),
            ("SLURM_ARRAY_TASK_COUNT", "3"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_STEP", "2")
        ])
        .unwrap(),
        is(2, 3)
    );
    assert_eq!(
        env(&[("JOB_COMPLETION_INDEX", "0"), ("JOB_COMPLETIONS", "2")]).unwrap(),
        is(0, 2)
    );
    for bad in [
        env(&[("JOB_COMPLETION_INDEX", "1")]),
        env(&[("SLURM_ARRAY_TASK_ID", "x")]),
        env(&[
            ("SLURM_ARRAY_TASK_ID", "9"),
            ("SLURM_ARRAY_TASK_COUNT", "3"),
        ]),
    ] {
        assert_eq!(bad.unwrap_err().code(), Code::Usage);
    }
    assert_eq!(
        Shard::parse("1/4").unwrap().path(Path::new("a/b.jsonl")),
        Path::new("a/b.1-of-4.jsonl")
    );
    assert_eq!(Shard::WHOLE.path(Path::new("b")), Path::new("b"));
    for bad in ["4/4", "1", "a/b", "0/0", "-1/2"] {
        assert!(Shard::parse(bad).is_err(), "{bad}");
    }
}
