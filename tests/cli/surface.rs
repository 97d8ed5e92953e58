//! Completions, help, variables, logs, colours.

use std::process::Command;

use super::process::{Place, fixture, str};
use super::program::{PROGRAM, apart};

fn qwen2() -> String {
    str(&fixture("qwen2-bf16")).to_string()
}

#[test]
fn completions_are_scripts_that_know_the_commands() {
    let p = Place::new();
    for (shell, checker) in [("bash", "bash"), ("zsh", "zsh"), ("fish", "fish")] {
        let ran = p.run(&["completions", shell]).done();
        for word in [
            "run",
            "batch-check",
            "doctor",
            "offload-folder",
            "cpu-memory",
        ] {
            assert!(ran.stdout.contains(word), "{shell}: {word}");
        }
        let file = p.file(shell, &ran.stdout);
        match Command::new(checker).args(["-n", &file]).output() {
            Ok(o) => assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr)),
            Err(_) => println!("skipped: no {checker} to check its script with"),
        }
    }
    p.run(&["completions", "tcsh"])
        .refused(2, &["tcsh", "bash"]);
}

#[test]
fn the_first_page_groups_the_commands() {
    let p = Place::new();
    let page = p.run(&["--help"]).done().stdout;
    for title in [
        "Generate:",
        "Files of requests:",
        "Models:",
        "This machine:",
        "Examples:",
    ] {
        assert!(page.contains(title), "{title}\n{page}");
    }
    assert!(page.lines().count() <= 50, "{page}");
    assert!(page.lines().all(|l| l.chars().count() <= 120), "{page}");
    let run = p.run(&["run", "--help"]).done().stdout;
    for title in ["Weights:", "Machine:", "Sampling:", "Examples:"] {
        assert!(run.contains(title), "{title}\n{run}");
    }
    let short = p.run(&["run", "-h"]).done().stdout;
    assert!(short.lines().count() <= 70, "{short}");
    assert!(!short.contains("--queue-depth") && run.contains("--queue-depth"));
}

#[test]
fn options_come_from_the_environment_and_flags_win() {
    let p = Place::new();
    let model = qwen2();
    let run = |env: &[(&str, &str)], more: &[&str]| {
        let mut args = vec!["run", &model, "-p", "x", "--greedy", "--ignore-eos"];
        args.extend(more);
        let mut command = p.command(&args);
        command.envs(env.iter().copied());
        super::process::Ran::from(command.output().unwrap())
    };
    let json = run(
        &[("TENSORPAGER_JSON", "yes"), ("TENSORPAGER_MAX_TOKENS", "3")],
        &[],
    )
    .json();
    assert_eq!(json["token_ids"].as_array().unwrap().len(), 3);
    let json = run(
        &[("TENSORPAGER_JSON", "1"), ("TENSORPAGER_MAX_TOKENS", "3")],
        &["--max-tokens", "2"],
    )
    .json();
    assert_eq!(json["token_ids"].as_array().unwrap().len(), 2);
    // A flag that is off, and a value that makes no sense.
    let plain = run(
        &[("TENSORPAGER_JSON", "0"), ("TENSORPAGER_QUIET", "true")],
        &["-n", "1"],
    )
    .done();
    assert!(
        !plain.stdout.starts_with('{') && plain.stderr.is_empty(),
        "{}",
        plain.stderr
    );
    run(&[("TENSORPAGER_QUIET", "perhaps")], &[]).refused(2, &["perhaps", "--quiet"]);
    run(&[("TENSORPAGER_CPU_MEMORY", "lots")], &[]).refused(2, &["lots", "--cpu-memory"]);
}

#[test]
fn logs_go_to_stderr_when_asked_for() {
    let p = Place::new();
    let args = ["run", &qwen2(), "-p", "x", "--greedy", "-n", "2"];
    let silent = p.run(&args).done();
    let loud = p.env("RUST_LOG", "tensorpager=debug", &args).done();
    assert_eq!(silent.stdout, loud.stdout);
    assert!(
        !silent.stderr.contains("INFO") && loud.stderr.contains("INFO "),
        "{}",
        loud.stderr
    );
}

#[test]
fn no_color_is_honoured_on_a_terminal() {
    let p = Place::new();
    let on_a_terminal = |color: bool| {
        let mut command = Command::new("script");
        command
            .args(["-qec", &format!("{PROGRAM} --help"), "/dev/null"])
            .env("TERM", "xterm-256color")
            .env_remove("CI")
            .env_remove("NO_COLOR")
            .env_remove("CLICOLOR")
            .current_dir(p.path("."));
        if !color {
            command.env("NO_COLOR", "1");
        }
        apart(&mut command, p.path("cache")).output()
    };
    let Ok(colored) = on_a_terminal(true) else {
        return println!("skipped: no `script` to make a terminal with");
    };
    assert!(
        colored.stdout.contains(&0x1b),
        "a terminal gets bold headings"
    );
    let plain = on_a_terminal(false).unwrap();
    assert!(plain.status.success() && !plain.stdout.contains(&0x1b));
}

#[test]
fn a_stderr_that_takes_nothing_costs_no_answer() {
    let p = Place::new();
    let args = ["run", &qwen2(), "-p", "x", "--greedy", "-n", "2"];
    let expected = p.run(&args).done().stdout;
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = p.command(&args).stderr(full).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    // Nor is there a panic where nobody reads an error.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let refused = p
        .command(&["run", "./nothing", "-p", "x"])
        .stderr(writer)
        .output();
    assert_eq!(refused.unwrap().status.code(), Some(2));
}

#[test]
fn too_little_memory_is_answered_with_this_machines_numbers() {
    let p = Place::new();
    let args = [
        "run",
        &qwen2(),
        "-p",
        "x",
        "-n",
        "400",
        "--cpu-memory",
        "1MiB",
    ];
    let ran = p.run(&args);
    ran.refused(1, &["--cpu-memory ", "this machine has "]);
    assert!(!p.offload().exists(), "refused before anything is packed");
    // What is named as enough is enough.
    let named = ran.stderr.split("--cpu-memory ").nth(1).unwrap();
    let named = named.split_whitespace().next().unwrap();
    p.run(&[
        "run",
        &qwen2(),
        "-p",
        "x",
        "-n",
        "400",
        "--cpu-memory",
        named,
        "-q",
    ])
    .done();
}

#[test]
fn too_little_memory_is_told_by_every_command_before_anything_is_made() {
    let p = Place::new();
    let model = qwen2();
    let rows = p.file(
        "rows.jsonl",
        "{\"custom_id\": \"a\", \"body\": {\"prompt\": \"x\"}}\n",
    );
    let ids = p.file("ids.jsonl", "{\"input_ids\": [1, 2, 3]}\n");
    let before = p.files();
    for args in [
        &["batch", &model, "-i", &rows, "-o", "out.jsonl"][..],
        &["score", &model, "--input", &ids],
        &["bench", &model, "-o", "json"],
        &["tune", &model],
    ] {
        let ran = p.run(&[args, &["--cpu-memory", "1MiB"]].concat());
        ran.refused(1, &["does not fit in 1.0 MB", "give --cpu-memory "]);
        assert_eq!(p.files(), before, "{args:?}");
    }
}

#[test]
fn a_context_beyond_the_models_is_said_once() {
    let p = Place::new();
    let run = |more: &[&str]| {
        p.run(&[&["run", &qwen2(), "-p", "x", "-n", "1"], more].concat())
            .done()
            .stderr
    };
    let said = run(&["--context", "9000000"]);
    assert_eq!(
        said.matches("--context 9000000: this model goes up to ")
            .count(),
        1,
        "{said}"
    );
    assert!(!run(&["--context", "9000000", "-q"]).contains("--context"));
    assert!(!run(&["--context", "64"]).contains("--context"));
    let rows = p.file(
        "rows.jsonl",
        "{\"custom_id\": \"a\", \"body\": {\"prompt\": \"x\", \"max_tokens\": 1}}\n",
    );
    for args in [
        &["batch", &qwen2(), "-i", &rows, "-o", "out.jsonl"][..],
        &["batch-check", &qwen2(), "-i", &rows],
        &["plan", &qwen2()],
    ] {
        let ran = p.run(&[args, &["--context", "9000000"]].concat()).done();
        let said = ran.stderr.matches("--context 9000000: ").count();
        assert_eq!(said, 1, "{args:?}: {}", ran.stderr);
    }
}

#[test]
fn a_missing_tokenizer_is_told_before_anything_is_packed() {
    let p = Place::new();
    let model = p.copy("qwen2-bf16", "model");
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    p.run(&["run", str(&model), "-p", "x"])
        .refused(1, &["has no tokenizer.json"]);
    assert!(!p.offload().exists());
}
