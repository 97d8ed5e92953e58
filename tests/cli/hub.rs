//! Hub ids on the command line, against a hub on this machine.

#[path = "../common/hub_server.rs"]
mod hub_server;

use std::process::Command;

use hub_server::{COMMIT, Fault, Server};

use super::process::{Place, Ran, fixture, str};

const ID: &str = "org/tiny";
const GREEDY: [&str; 5] = ["-p", "x", "--greedy", "-n", "4"];

fn online(place: &Place, server: &Server, args: &[&str]) -> Command {
    let mut command = place.command(args);
    command
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_ENDPOINT", &server.address);
    command
}

fn run(command: &mut Command) -> Ran {
    Ran::from(command.output().unwrap())
}

fn with<'a>(first: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [first, more].concat()
}

#[test]
fn a_hub_id_is_downloaded_once_and_gives_what_its_folder_gives() {
    let p = Place::new();
    let folder = fixture("qwen2-bf16");
    let server = Server::of_folder(&folder);
    let args = with(&["run", ID], &with(&GREEDY, &["--json"]));
    let ran = run(&mut online(&p, &server, &args)).done();
    assert!(
        ran.stderr.contains("downloading org/tiny"),
        "{}",
        ran.stderr
    );
    let here = p
        .run(&with(&["run", str(&folder)], &with(&GREEDY, &["--json"])))
        .json();
    let there = ran.json();
    assert_eq!(there["token_ids"], here["token_ids"]);
    assert_eq!(there["model"], "org--tiny");
    let requests = server.seen().len();
    // From now on nobody is asked.
    let again = run(&mut online(&p, &server, &args)).json();
    assert_eq!(again["token_ids"], here["token_ids"]);
    assert_eq!(server.seen().len(), requests);
    p.run(&args).done();
}

#[test]
fn pull_fetches_and_names_the_folder() {
    let p = Place::new();
    let server = Server::of_folder(&fixture("llama3-bf16"));
    let first = run(&mut online(&p, &server, &["pull", ID, "--json"])).json();
    assert_eq!(first["commit"], COMMIT);
    assert!(first["bytes"].as_u64().unwrap() > 0);
    assert_eq!(first["bytes"], first["downloaded_bytes"]);
    let again = run(&mut online(&p, &server, &["pull", ID])).done();
    assert_eq!(again.stdout.trim(), first["dir"].as_str().unwrap());
    let model = again.stdout.trim().to_string();
    p.run(&with(&["run", &model], &GREEDY)).done();
}

#[test]
fn the_same_trouble_is_told_once() {
    let p = Place::new();
    let mut command = p.command(&["pull", ID]);
    // A name that never resolves (RFC 6761).
    command
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_ENDPOINT", "http://hub.invalid");
    for proxy in [
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(proxy);
    }
    let ran = run(&mut command);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!(lines.len(), 4, "one line and an error of three: {lines:#?}");
    assert!(lines[0].ends_with("trying again") && lines[2].contains("(5 attempts)"));
}

#[test]
fn what_the_hub_refuses_is_three_lines() {
    let p = Place::new();
    let server = Server::of_folder(&fixture("qwen2-bf16"));
    server.change(|s| s.refuse = Some((401, "RepoNotFound")));
    let args = with(&["run", ID], &GREEDY);
    run(&mut online(&p, &server, &args)).refused(2, &[ID, "spelling"]);
    server.change(|s| s.refuse = Some((403, "GatedRepo")));
    run(&mut online(&p, &server, &args)).refused(1, &["gated", "HF_TOKEN"]);
    p.run(&args).refused(2, &["HF_HUB_OFFLINE"]);
    server.change(|s| s.refuse = None);
    server.fault("model.safetensors", &[Fault::Flip, Fault::Flip]);
    let ran = run(&mut online(&p, &server, &args));
    ran.refused(1, &["model.safetensors", "damaged"]);
    assert!(!p.offload().exists(), "nothing was packed");
    // A folder that is there is never looked for on the hub.
    std::fs::create_dir_all(p.path("org/tiny")).unwrap();
    let requests = server.seen().len();
    run(&mut online(&p, &server, &args)).refused(1, &["holds no weights"]);
    assert_eq!(server.seen().len(), requests);
}
