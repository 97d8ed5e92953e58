//! Chat templates render as transformers renders them: `tests/fixtures/chat.json` holds what it made of each case.

use std::path::Path;

use serde_json::{Map, Value};
use tensorpager::error::Code;
use tensorpager::text::{ChatTemplate, Message, RenderOptions};

fn cases() -> Vec<Map<String, Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("chat.json is a list of cases")
}

fn text<'a>(case: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    case.get(key).and_then(Value::as_str)
}

#[test]
fn rendered_as_transformers_renders() {
    let cases = cases();
    assert!(cases.len() >= 20, "only {} cases", cases.len());
    let mut wrong = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        let name = text(case, "name").map_or_else(|| format!("case {i}"), str::to_owned);
        let tokens: Vec<(&str, &str)> = ["bos_token", "eos_token"]
            .into_iter()
            .filter_map(|key| Some((key, text(case, key)?)))
            .collect();
        let source = text(case, "template").expect("template");
        let messages = Message::list(&case["messages"], &name).expect("messages");
        let options = RenderOptions {
            add_generation_prompt: case["add_generation_prompt"] == true,
            tools: case
                .get("tools")
                .and_then(Value::as_array)
                .map(Vec::as_slice),
            now: text(case, "now").map(|t| t.parse().expect("a time")),
            ..RenderOptions::default()
        };
        let got =
            ChatTemplate::from_source(source, &tokens).and_then(|t| t.render(&messages, &options));
        match (got, text(case, "expected"), text(case, "error")) {
            (Ok(got), Some(expected), None) if got == expected => {}
            (Err(e), None, Some(message)) if e.code() == Code::Text && e.cause() == message => {}
            (got, expected, error) => {
                let wanted = expected.or(error);
                wrong.push(format!("{name}:\n  wanted {wanted:?}\n  got    {got:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
