//! At a terminal: the chat, Ctrl-C in it, and what is shown while a prompt is read.

use std::time::Duration;

use serde_json::Value;

use super::process::{Place, fixture, str};
use super::signals::{large, signal};
use super::terminal::Terminal;

fn chat(p: &Place, model: &str, more: &[&str]) -> Terminal {
    let args = ["run", model, "--in-place", "--greedy", "--ignore-eos"];
    Terminal::start(p.command(&[&args[..], more].concat()))
}

#[test]
fn turns_end_with_figures_and_the_input_with_the_chat() {
    let p = Place::new();
    let mut t = chat(&p, str(&fixture("llama3-bf16")), &["-n", "4"]);
    t.wait_for("Ctrl-D");
    t.wait_for("> ");
    t.press("hello\r");
    t.wait_for(" prompt tokens, first token after ");
    t.wait_for("; 4 tokens at ");
    t.wait_for("> ");
    t.press("and again\r");
    t.wait_for("; 4 tokens at ");
    t.wait_for("> ");
    t.press("\u{4}");
    let (code, shown) = t.ended();
    assert_eq!(code, Some(0), "{shown}");
    assert!(
        shown.contains("all weights in RAM"),
        "what it cost: {shown}"
    );
    // The second prompt carries the first turn.
    let tokens: Vec<usize> = shown
        .match_indices(" prompt tokens, first")
        .map(|(at, _)| shown[..at].rsplit('(').next().unwrap().parse().unwrap())
        .collect();
    assert!(tokens.len() == 2 && tokens[1] > tokens[0] + 4, "{tokens:?}");
}

// hazard: sigint: in a chat: ends the answer, and the chat goes on
#[test]
fn ctrl_c_ends_an_answer_and_at_the_prompt_the_chat() {
    let p = Place::new();
    let model = large(&p);
    for map in ["disk", "cpu"] {
        let mut t = chat(&p, &model, &["-n", "30000", "--device-map", map]);
        t.wait_for("> ");
        for line in ["hi", "go on"] {
            t.press(&format!("{line}\r"));
            // What a line editor sends when it has its line.
            t.wait_for("\u{1b}[?2004l");
            // The answer is under way: the terminal is as it was before the line was read, and Ctrl-C a signal.
            std::thread::sleep(Duration::from_millis(500));
            t.press("\u{3}");
            t.wait_for("(interrupted)");
            t.wait_for("> ");
        }
        let (screen, before) = (t.screen(), t.before);
        match map {
            "disk" => t.press("\u{3}"),
            // Behind an answer that was interrupted no signal is the second one.
            _ => signal(&t.child, libc::SIGTERM),
        }
        let (code, shown) = t.ended();
        assert_eq!(code, Some(130), "{shown}");
        assert!(!shown.contains("error"), "{shown}");
        assert_eq!(screen.modes(), before, "the terminal is given back");
    }
}

#[test]
fn a_chat_that_is_told_to_end_ends() {
    let p = Place::new();
    for which in [libc::SIGTERM, libc::SIGHUP] {
        let mut t = chat(&p, str(&fixture("llama3-bf16")), &["-n", "4"]);
        let (screen, before) = (t.screen(), t.before);
        t.wait_for("> ");
        // The prompt is drawn just before it is waited at.
        std::thread::sleep(Duration::from_millis(200));
        assert_ne!(screen.modes(), before, "an editor has the terminal");
        signal(&t.child, which);
        let (code, shown) = t.ended();
        assert_eq!(code, Some(130), "{shown}");
        // As the shell behind it wants it: lines, echo, and pastes unmarked.
        assert_eq!(screen.modes(), before);
        assert!(
            shown.rfind("\u{1b}[?2004l") > shown.rfind("\u{1b}[?2004h"),
            "{shown}"
        );
    }
}

#[test]
fn without_a_chat_template_the_text_goes_on() {
    let p = Place::new();
    let copy = p.copy("llama3-bf16", "model");
    let at = copy.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&at).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("chat_template");
    std::fs::write(&at, config.to_string()).unwrap();
    let _ = std::fs::remove_file(copy.join("chat_template.jinja"));
    let mut t = chat(&p, str(&copy), &["-n", "5"]);
    t.wait_for("without a chat template");
    let mut tokens = Vec::new();
    for line in ["one two three\r", "four\r"] {
        t.wait_for("> ");
        t.press(line);
        t.wait_for(" first token after ");
        let told = t.text.rsplit('(').next().unwrap();
        tokens.push(told.split(' ').next().unwrap().parse::<usize>().unwrap());
    }
    assert!(
        tokens[1] > tokens[0],
        "the second has the first in it: {tokens:?}"
    );
    // At the model's own limit.
    t.wait_for("> ");
    t.press(&format!("{}\r", "word ".repeat(700)));
    t.wait_for("is too long");
    t.wait_for("/reset forgets");
    t.wait_for("> ");
    t.press("/exit\r");
    assert_eq!(t.ended().0, Some(0));
    p.run(&["run", str(&copy), "-p", "hi", "--system", "Be brief."])
        .refused(2, &["--system", "without a chat template"]);
}

#[test]
fn a_prompt_of_one_pass_is_seen_to_move() {
    let p = Place::new();
    let model = large(&p);
    let prompt = "word ".repeat(300);
    let args = [
        "run",
        &model,
        "--in-place",
        "--raw",
        "-n",
        "2",
        "-p",
        &prompt,
    ];
    let t = Terminal::start(p.command(&args));
    let (code, shown) = t.ended();
    assert_eq!(code, Some(0), "{shown}");
    let lines: Vec<&str> = shown
        .split("\r\u{1b}[K")
        .filter(|l| l.starts_with("prefill: "))
        .collect();
    assert!(lines.len() > 2, "{shown}");
    assert!(lines[0].contains(" 0 % of ") && lines[0].contains("(unit 0 of "));
    let moved = &lines[lines.len() - 1];
    assert!(
        !moved.contains("unit 0 of") && moved.contains(" s left"),
        "{moved}"
    );
    // The line is gone before the answer comes.
    let last = shown.rfind("prefill: ").unwrap();
    assert!(shown[last..].contains("\r\u{1b}[K"), "{shown}");
}
