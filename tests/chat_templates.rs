//! Chat templates render as transformers renders them: `tests/fixtures/chat.json` holds what it made of each case.

use std::path::Path;

use serde_json::{Map, Value};
use tensorpager::error::Code;
use tensorpager::text::{ChatTemplate, Message, RenderOptions, TokenStream, Tokenizer};

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

/// Whole folders: template, special tokens, encoding and streamed decoding agree with transformers.
#[test]
fn reference_folders() {
    let Some(dir) = std::env::var_os("TENSORPAGER_FIXTURES") else {
        eprintln!("skipped: TENSORPAGER_FIXTURES does not say where the reference folders lie");
        return;
    };
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).expect("TENSORPAGER_FIXTURES is a folder") {
        let dir = entry.expect("an entry").path();
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
        let (Some(golden), Some(_)) = (read("golden.json"), read("tokenizer_config.json")) else {
            continue;
        };
        let golden: Value = serde_json::from_str(&golden).expect("golden.json");
        let tokenizer = Tokenizer::load(&dir).expect("a tokenizer");
        let ids = |v: &Value| serde_json::from_value::<Vec<u32>>(v.clone()).expect("token ids");
        for case in golden["prompts"].as_array().into_iter().flatten() {
            let text = case["text"].as_str().expect("text");
            let input = ids(&case["input_ids"]);
            assert_eq!(tokenizer.encode(text, true).unwrap(), input, "{text:?}");
            let greedy = ids(&case["greedy_ids"]);
            let mut stream = TokenStream::new(&tokenizer, false);
            let mut out = String::new();
            for id in &greedy {
                stream.push(*id, &mut out).unwrap();
            }
            stream.finish(&mut out).unwrap();
            assert_eq!(out, tokenizer.decode(&greedy, false).unwrap());
            seen += 1;
        }
        if let Some(chat) = golden.get("chat") {
            let messages = Message::list(&chat["messages"], "golden.json").unwrap();
            let template = ChatTemplate::load(&dir).unwrap().expect("a chat template");
            let options = RenderOptions {
                add_generation_prompt: true,
                ..RenderOptions::default()
            };
            let text = template.render(&messages, &options).unwrap();
            assert_eq!(text, chat["rendered"].as_str().unwrap());
            assert_eq!(
                tokenizer.encode(&text, false).unwrap(),
                ids(&chat["input_ids"])
            );
        }
    }
    assert!(seen > 0, "no golden.json with prompts found");
}
