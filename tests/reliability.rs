//! docs/RELIABILITY.md's table is made of the tests: each hazard below must be named by a test, which says the outcome.
//!
//! A test names a hazard by a line above it, `// hazard: KEY: outcome`. `BLESS=1 cargo test --test reliability` writes the table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Section, key, what can go wrong.
const HAZARDS: &[(&str, &[(&str, &str)])] = &[
    (
        "Source files",
        &[
            ("truncated", "a file is truncated, or has trailing bytes"),
            ("header-length", "header length 0, huge, or beyond the file"),
            ("header-cost", "a header made to cost much"),
            ("header-layout", "tensors overlap, or leave holes"),
            ("header-keys", "duplicate keys"),
            ("header-names", "hostile tensor names"),
            ("shape-overflow", "shape products that overflow"),
            ("disagrees", "dtype or shape that disagrees with the config"),
            ("tensors", "missing or extra tensors"),
            ("config", "absurd configs (0 heads, 2^31 layers)"),
            ("shard-names", "shard names with `/`, `..`, absolute"),
            ("links", "symlinks out of the model's own folder or cache"),
            ("fifos", "FIFOs, devices and folders in place of files"),
            ("changed", "a file changes between header and read"),
            ("pickles", "pickles offered as weights"),
            ("nonfinite", "NaN or infinite weights"),
            ("overflow", "bf16 values that float16 cannot hold"),
            ("token-range", "token ids beyond the embedding"),
            (
                "templates",
                "a chat template that loops, grows or reaches out",
            ),
            ("images", "broken or hostile images"),
            (
                "videos",
                "a video that makes its decoder hang, write, or reach a network",
            ),
            ("hostile-files", "anything else that is parsed, mutated"),
        ],
    ),
    (
        "Packing",
        &[
            ("pack-killed", "killed at any call"),
            ("pack-call-fails", "EIO, ENOSPC or EINTR in any call"),
            ("pack-power-cut", "the power goes"),
            ("pack-disk-full", "the disk is full, or fills up on the way"),
            ("two-packers", "two packers"),
            (
                "packer-beside-runner",
                "a packer or cleaner beside a runner",
            ),
            (
                "other-source",
                "another or newer source than the manifest names",
            ),
            (
                "manifest",
                "a manifest that was torn, edited, or is of another version",
            ),
        ],
    ),
    (
        "Reading",
        &[
            ("short-reads", "short reads"),
            (
                "eintr-eagain",
                "EINTR, EAGAIN, delays, any order of completion",
            ),
            ("eio", "EIO"),
            ("stall", "a read that never completes"),
            ("bit-rot", "flipped bits"),
            (
                "wrong-block",
                "a block in the wrong place, or of an older pack",
            ),
            ("deleted", "the folder is deleted under a run"),
            ("cut-under-run", "a file is truncated under a run"),
            ("unverified", "a byte used that was not verified"),
            ("interleaving", "slots and reads in any interleaving"),
        ],
    ),
    (
        "Machine",
        &[
            ("memlock", "little locked memory"),
            (
                "cgroup",
                "less memory in the control group than in the machine",
            ),
            ("no-io-uring", "io_uring forbidden"),
            ("no-o-direct", "no O_DIRECT"),
            ("gpu-absent", "no GPU"),
            ("gpu-driver-old", "a driver that is too old"),
            ("gpu-full", "the GPU's memory is full"),
            ("gpu-lost", "the GPU is lost in the middle of a run"),
            ("gpu-unpinned", "the system does not pin memory"),
            ("gpu-pinned-bound", "more weights in RAM than may be pinned"),
            ("budget", "a budget that is too small"),
        ],
    ),
    (
        "Jobs",
        &[
            ("bad-line", "a malformed line, or one that is not UTF-8"),
            ("duplicate-id", "a duplicate id"),
            ("long-prompt", "a prompt that is too long"),
            ("no-kv", "no room for KV"),
            ("job-killed", "killed at any call, resumed"),
            ("job-call-fails", "EIO, ENOSPC or EINTR in any call"),
            ("job-power-cut", "the power goes"),
            (
                "job-disk-full",
                "the disk is full while results are written",
            ),
            ("sigint", "SIGINT once"),
            ("sigint-twice", "SIGINT twice"),
        ],
    ),
];

/// A test that names a hazard.
struct Named {
    key: String,
    outcome: String,
    file: String,
    test: String,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn named() -> Vec<Named> {
    let mut files = Vec::new();
    for dir in ["src", "tests"] {
        rust_files(&root().join(dir), &mut files);
    }
    files.sort();
    let mut all = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let file = path.strip_prefix(root()).unwrap().display().to_string();
        let mut open: Vec<(String, String)> = Vec::new();
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix("// hazard: ") {
                let (key, outcome) = rest
                    .split_once(": ")
                    .unwrap_or_else(|| panic!("{file}: {line}"));
                open.push((key.to_string(), outcome.to_string()));
            } else if line == "#[test]" {
                is_test = true;
            } else if let Some(rest) = line.strip_prefix("fn ") {
                let test: String = rest
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                assert!(
                    open.is_empty() || is_test,
                    "{file}: {test} names a hazard and is no test"
                );
                for (key, outcome) in open.drain(..) {
                    all.push(Named {
                        key,
                        outcome,
                        file: file.clone(),
                        test: test.clone(),
                    });
                }
                is_test = false;
            }
        }
        assert!(open.is_empty(), "{file}: a hazard without a test");
    }
    all
}

fn table(named: &[Named]) -> String {
    let mut by_key: BTreeMap<&str, Vec<&Named>> = BTreeMap::new();
    for n in named {
        by_key.entry(&n.key).or_default().push(n);
    }
    let mut text = String::new();
    let mut missing = Vec::new();
    for (section, hazards) in HAZARDS {
        let _ = writeln!(
            text,
            "### {section}\n\n| hazard | outcome | test |\n|---|---|---|"
        );
        for (key, what) in *hazards {
            let Some(tests) = by_key.remove(key) else {
                missing.push(*key);
                continue;
            };
            for (i, n) in tests.iter().enumerate() {
                let what = if i == 0 { *what } else { "" };
                let _ = writeln!(
                    text,
                    "| {what} | {} | `{}` in `{}` |",
                    n.outcome, n.test, n.file
                );
            }
        }
        text.push('\n');
    }
    assert!(
        missing.is_empty(),
        "hazards that no test names: {missing:?}"
    );
    let unknown: Vec<&&str> = by_key.keys().collect();
    assert!(
        unknown.is_empty(),
        "tests name hazards that are not listed: {unknown:?}"
    );
    text
}

const BEGIN: &str =
    "<!-- table: begin (made of the tests by `BLESS=1 cargo test --test reliability`) -->\n";
const END: &str = "<!-- table: end -->";

#[test]
fn the_table_of_hazards_is_that_of_the_tests() {
    let path = root().join("docs/RELIABILITY.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the table's first line");
    let (there, after) = rest.split_once(END).expect("the table's last line");
    let made = format!("\n{}", table(&named()));
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{made}{END}{after}")).unwrap();
        return;
    }
    assert!(
        there == made,
        "the table is not up to date: BLESS=1 cargo test --test reliability"
    );
}
