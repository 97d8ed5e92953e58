//! The README's troubleshooting: each entry is an error that the program really prints.

use std::path::{Path, PathBuf};

use super::process::{Place, fixture, str};

/// The first lines of the entries, without `error: `.
fn entries() -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(readme).unwrap();
    let section = text.split("\n## Troubleshooting\n").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let errors = section.lines().filter_map(|l| l.strip_prefix("error: "));
    errors.map(str::to_string).collect()
}

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The string literals of a source that could be a message: split at their `{…}`.
fn formats(text: &str) -> Vec<Vec<String>> {
    let literals = text.split('"').skip(1).step_by(2);
    let mut found = Vec::new();
    // An odd quote shifts the pairs: both readings are taken.
    for literal in literals.chain(text.split('"').step_by(2)) {
        if literal.len() > 300 || literal.contains('\n') {
            continue;
        }
        let mut parts = vec![String::new()];
        let mut inside = false;
        for c in literal.chars() {
            match c {
                '{' => inside = true,
                '}' => {
                    inside = false;
                    parts.push(String::new());
                }
                c if !inside => parts.last_mut().unwrap().push(c),
                _ => {}
            }
        }
        if parts.iter().map(String::len).sum::<usize>() >= 10 {
            found.push(parts);
        }
    }
    found
}

fn matches(parts: &[String], text: &str) -> bool {
    let Some(mut rest) = text.strip_prefix(parts[0].as_str()) else {
        return false;
    };
    if parts.len() == 1 {
        return rest.is_empty();
    }
    for part in &parts[1..parts.len() - 1] {
        match rest.find(part.as_str()) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(parts[parts.len() - 1].as_str())
}

#[test]
fn formats_are_matched_as_they_are_printed() {
    let formats = formats(r#"new(format!("the model {} has no {name} at all"), "x")"#);
    assert!(
        formats
            .iter()
            .any(|f| matches(f, "the model a/b has no c at all"))
    );
    assert!(
        !formats
            .iter()
            .any(|f| matches(f, "the model a/b has c at all"))
    );
    assert!(
        !formats
            .iter()
            .any(|f| matches(f, "the model a/b has no c at all, more"))
    );
}

#[test]
fn each_entry_is_an_error_of_the_program() {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    let known: Vec<Vec<String>> = files
        .iter()
        .flat_map(|f| formats(&std::fs::read_to_string(f).unwrap()))
        .collect();
    let entries = entries();
    assert!(entries.len() >= 10, "{entries:?}");
    for entry in &entries {
        assert!(
            known.iter().any(|f| matches(f, entry)),
            "no source has an error like `{entry}`"
        );
    }
}

/// What a command prints as its first line.
fn first_line(p: &Place, args: &[&str]) -> String {
    let ran = p.run(args);
    assert_ne!(ran.code, 0, "{}", ran.stdout);
    let line = ran.stderr.lines().find(|l| l.starts_with("error: "));
    line.unwrap_or_default()
        .trim_start_matches("error: ")
        .to_string()
}

#[test]
fn the_entries_that_a_command_can_bring_about_are_brought_about() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    let reset = || drop(p.copy("qwen2-bf16", "model"));
    let entries = entries();
    let printed = |line: String, entry: &str| {
        let here = line.replace(str(&model), "./model");
        assert_eq!(here, entry);
        assert!(
            entries.iter().any(|e| e == entry),
            "the README has `{entry}`"
        );
    };
    let prompt = ["-p", "x"];
    let run = |model: &str, more: &[&str]| {
        let args = [&["run", model], &prompt[..], more].concat();
        first_line(&p, &args)
    };
    printed(
        run("./Qwen2.5-7B", &[]),
        "there is no model at `./Qwen2.5-7B`",
    );
    if cfg!(feature = "hub") {
        printed(
            run("Qwen/Qwen2.5-0.5B-Instruct", &[]),
            "model `Qwen/Qwen2.5-0.5B-Instruct` is not in the local cache",
        );
    }
    let no_driver = "the GPU cannot be used: no NVIDIA driver was found";
    if tensorpager::device::cuda::available().is_err_and(|e| e.what() == no_driver) {
        printed(run("./model", &["--device", "cuda"]), no_driver);
    }
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    printed(
        run("./model", &["--in-place"]),
        "./model has no tokenizer.json",
    );
    reset();
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    printed(run("./model", &[]), "./model holds no weights");
    std::fs::write(model.join("pytorch_model.bin"), b"\x80\x02pickle").unwrap();
    printed(
        run("./model", &[]),
        "./model/pytorch_model.bin does not hold safetensors",
    );
    reset();
    let config = std::fs::read_to_string(fixture("qwen2-bf16").join("config.json")).unwrap();
    let other = config.replace("\"qwen2\"", "\"gpt2\"");
    std::fs::write(model.join("config.json"), other).unwrap();
    printed(
        run("./model", &[]),
        "config.json: model_type `gpt2` is not supported",
    );
    reset();
    let line = run("./model", &["--cpu-memory", "1MiB"]);
    assert!(
        line.contains("1048.6 kB") || line.contains("1.0 MB") || line.contains("memory"),
        "{line}"
    );
}
