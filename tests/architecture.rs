//! The rules of docs/ARCHITECTURE.md that the compiler does not know, read off the sources.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Who may import whom: the layers of the way of a byte. A module may always import itself.
const MAY_IMPORT: [(&str, &[&str]); 17] = [
    ("error", &[]),
    ("planted", &[]),
    ("units", &["error"]),
    ("spec", &["error", "units"]),
    ("checkpoint", &["error", "units", "spec"]),
    ("io", &["error", "units", "spec"]),
    ("device", &["error", "units", "spec"]),
    ("text", &["error", "units", "spec"]),
    ("media", &["error", "units", "spec"]),
    ("store", &["error", "units", "spec", "checkpoint"]),
    ("model", &["error", "units", "spec", "device"]),
    (
        "paging",
        &["error", "units", "spec", "store", "io", "device"],
    ),
    (
        "engine",
        &[
            "error",
            "units",
            "spec",
            "model",
            "paging",
            "text",
            "media",
            "device",
            "store",
            "io",
            "checkpoint",
        ],
    ),
    (
        "report",
        &[
            "error",
            "units",
            "spec",
            "engine",
            "model",
            "paging",
            "text",
            "media",
            "device",
            "store",
            "io",
            "checkpoint",
        ],
    ),
    (
        "cli",
        &[
            "error",
            "units",
            "spec",
            "report",
            "engine",
            "model",
            "paging",
            "text",
            "media",
            "device",
            "store",
            "io",
            "checkpoint",
        ],
    ),
    (
        "fuzzing",
        &[
            "units",
            "spec",
            "checkpoint",
            "store",
            "paging",
            "text",
            "media",
            "engine",
        ],
    ),
    ("main", &["cli"]),
];

/// The order of `src/lib.rs`.
const ORDER: [&str; 16] = [
    "error",
    "planted",
    "units",
    "spec",
    "checkpoint",
    "store",
    "io",
    "device",
    "paging",
    "model",
    "text",
    "media",
    "engine",
    "report",
    "cli",
    "fuzzing",
];

const MOST_LINES: usize = 700;

struct Source {
    /// From `src/`, with `/`.
    name: String,
    lines: Vec<String>,
}

impl Source {
    fn module(&self) -> &str {
        self.name.split(['/', '.']).next().unwrap()
    }

    fn is_test(&self) -> bool {
        self.name.contains("/tests/")
            || self.name.ends_with("tests.rs")
            || self.name.ends_with("/testing.rs")
    }

    /// Lines of code with their numbers: comments and the test module at the end left out.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let end = self
            .lines
            .windows(2)
            .position(|w| {
                w[0].trim() == "#[cfg(test)]" && w[1].trim_start().starts_with("mod tests {")
            })
            .unwrap_or(self.lines.len());
        self.lines[..end]
            .iter()
            .enumerate()
            .map(|(i, l)| (i + 1, l.split("//").next().unwrap_or_default()))
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(dir) = folders.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path
                    .strip_prefix(&root)
                    .unwrap()
                    .to_string_lossy()
                    .replace('\\', "/");
                let text = std::fs::read_to_string(&path).unwrap();
                found.push(Source {
                    name,
                    lines: text.lines().map(str::to_string).collect(),
                });
            }
        }
    }
    assert!(found.len() > 50, "the sources are there");
    found
}

/// Names behind `crate::` (`crate::{a, b::c}` too) in a line.
fn imported(line: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.trim()
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let mut names = Vec::new();
    for part in line.split("crate::").skip(1) {
        match part.strip_prefix('{') {
            None => names.push(word(part)),
            Some(list) => {
                let mut depth = 0;
                let mut start = 0;
                for (i, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => {
                            names.push(word(&list[start..i]));
                            start = list.len();
                        }
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            names.push(word(&list[start..i]));
                            start = i + 1;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    names.retain(|n| !n.is_empty());
    names
}

#[test]
fn imports_are_read_as_rust_reads_them() {
    assert_eq!(imported("use crate::io::{Arena, Frame};"), ["io"]);
    assert_eq!(
        imported("use crate::{error::Result, units, io::{A, B}};"),
        ["error", "units", "io"]
    );
    assert_eq!(
        imported("let a = crate::store::x(crate::units::y);"),
        ["store", "units"]
    );
    assert_eq!(imported("pub(crate) fn f() {}"), Vec::<String>::new());
}

#[test]
fn modules_import_only_what_lies_below_them() {
    let mut broken = Vec::new();
    for source in sources()
        .iter()
        .filter(|s| s.name != "lib.rs" && !s.is_test())
    {
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(m, _)| *m == source.module()) else {
            panic!("src/{} belongs to no module of the table", source.name);
        };
        for (number, line) in source.code() {
            for name in imported(line) {
                // Constants in every build that counts, and so no dependency.
                if name == "planted" {
                    continue;
                }
                if name != source.module() && !allowed.contains(&name.as_str()) {
                    broken.push(format!(
                        "src/{}:{number}: {} imports {name}",
                        source.name,
                        source.module()
                    ));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn foreign_crates_stay_behind_one_file() {
    let mut broken = Vec::new();
    for source in sources() {
        for (number, line) in source.code() {
            let names = |crate_name: &str| {
                line.split(crate_name)
                    .skip(1)
                    .any(|rest| rest.starts_with("::"))
                    || line.trim().starts_with(&format!("use {crate_name};"))
            };
            let uring = names("io_uring")
                && !["io/uring.rs", "io/uring_tests.rs"].contains(&source.name.as_str());
            let cuda = (line.contains("driver::sys") || line.contains("driver::result"))
                && source.name != "device/cuda/ffi.rs";
            if uring || cuda {
                broken.push(format!("src/{}:{number}: {line}", source.name));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn unsafe_stays_where_it_is_allowed_and_says_who_guarantees_what() {
    let allowed = |name: &str| {
        ["io/arena.rs", "io/uring.rs", "io/mmap.rs", "io/heap.rs"].contains(&name)
            || name.starts_with("device/c")
    };
    let mut broken = Vec::new();
    for source in sources() {
        for (number, line) in source.code() {
            let is_unsafe = line
                .split(|c: char| !(c.is_alphanumeric() || c == '_'))
                .any(|word| word == "unsafe");
            if !is_unsafe || line.contains("#![") {
                continue;
            }
            if !allowed(&source.name) {
                broken.push(format!(
                    "src/{}:{number}: unsafe code is not allowed here",
                    source.name
                ));
            }
            // The lines above, attributes and the doc comment of an unsafe function included.
            let above = &source.lines[number.saturating_sub(14)..number];
            let said = above
                .iter()
                .any(|l| l.contains("SAFETY") || l.contains("# Safety"));
            // A private function's contract is in its words; the block that calls it says who keeps it.
            let promises = ["unsafe {", "unsafe impl", "pub unsafe fn"]
                .iter()
                .any(|what| line.contains(what));
            if promises && !said {
                broken.push(format!(
                    "src/{}:{number}: no SAFETY: {}",
                    source.name,
                    line.trim()
                ));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// Of the tests, with their names from the repository's root.
fn test_sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("tests")];
    let mut found = Vec::new();
    while let Some(dir) = folders.pop() {
        for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(root).unwrap().display().to_string();
                found.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found
}

/// A test that starts the program as it is would leave rates in the user's cache, and find those of other runs there.
#[test]
fn tests_start_the_program_with_a_cache_of_their_own() {
    // Written so that this file does not count.
    let variable = ["CARGO_BIN_EXE", "_tensorpager"].concat();
    let constant = ["PRO", "GRAM"].concat();
    let taken = ["get_", "program("].concat();
    let (mut starts, mut broken) = (0, Vec::new());
    for (name, text) in test_sources() {
        if name == "tests/common/program.rs" {
            assert!(text.contains(&variable) && text.contains("XDG_CACHE_HOME"));
            continue;
        }
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let names = |word: &str| text.split(|c| !is_word(c)).any(|w| w == word);
        if names(&variable) {
            broken.push(format!("{name}: {variable}: start it with program()"));
        }
        if names(&constant) && !text.contains("apart(") {
            broken.push(format!("{name}: {constant}, and no command is apart"));
        }
        // Another program starts it in its turn.
        if text.contains(&taken) && !text.contains("apart(") && !text.contains("get_envs(") {
            broken.push(format!("{name}: {taken}..), and not its environment"));
        }
        starts += usize::from(names("program") || names("program_within"));
    }
    assert!(starts > 5, "the tests that start it are found");
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn lib_rs_lists_the_modules_in_order_with_one_line_each() {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let mut listed = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        if let Some(name) = line.strip_prefix("pub mod ") {
            assert!(
                i > 0 && lines[i - 1].starts_with("// "),
                "{name} says what it is"
            );
            listed.push(name.trim_end_matches(';'));
        }
    }
    let expected: Vec<&str> = ORDER.into_iter().filter(|m| listed.contains(m)).collect();
    assert_eq!(listed, expected);
    let modules: BTreeSet<&str> = listed.iter().copied().collect();
    for source in sources()
        .iter()
        .filter(|s| !["lib.rs", "main.rs"].contains(&s.name.as_str()))
    {
        assert!(
            modules.contains(source.module()),
            "src/{} is listed nowhere",
            source.name
        );
    }
}

#[test]
fn no_file_outgrows_a_reader() {
    for source in sources() {
        assert!(
            source.lines.len() <= MOST_LINES,
            "src/{} has {} lines",
            source.name,
            source.lines.len()
        );
    }
}

#[test]
fn nothing_is_left_for_later() {
    for source in sources() {
        for (number, line) in source.code() {
            for word in ["todo!", "unimplemented!", "dbg!("] {
                assert!(!line.contains(word), "src/{}:{number}: {word}", source.name);
            }
        }
    }
}
