//! A published model tells its published story. It lies with the larger fixtures (TENSORPAGER_FIXTURES).

use std::path::PathBuf;

use serde_json::Value;

use super::process::{Place, str};

#[test]
fn stories260k_tells_its_published_story() {
    let Some(fixtures) = std::env::var_os("TENSORPAGER_FIXTURES") else {
        return println!("skipped: larger fixtures (TENSORPAGER_FIXTURES is not set)");
    };
    let model = PathBuf::from(fixtures).join("stories260k");
    let expected = std::fs::read(model.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    let story = expected["text"].as_str().unwrap();
    let p = Place::new();
    // From memory and from disk, packed and in place.
    for more in [&["--device-map", "disk"][..], &["--in-place"]] {
        let args = [
            "run",
            str(&model),
            "--raw",
            "-p",
            "",
            "-n",
            "300",
            "--greedy",
        ];
        let json = ["--ignore-eos", "--json", "-q"];
        let report = p.run(&[&args[..], &json, more].concat()).json();
        assert_eq!(report["prompt_token_ids"], expected["prompt_ids"]);
        let text = report["text"].as_str().unwrap().trim_start();
        assert!(text.starts_with(story), "{more:?}: {text}");
    }
}
