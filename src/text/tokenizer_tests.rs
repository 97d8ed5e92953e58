use super::*;
use serde_json::json;
use std::path::PathBuf;

/// A byte-level BPE tokenizer as GPT-2's family has it: the 256 bytes, a few merges, two added tokens.
pub(in crate::text) fn byte_level() -> Value {
    let alphabet: Vec<char> = (0u32..256).map(byte_char).collect();
    let mut vocab = Map::new();
    for c in &alphabet {
        vocab.insert(c.to_string(), vocab.len().into());
    }
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©", "ð Ł"];
    for merge in merges {
        vocab.insert(merge.replace(' ', ""), vocab.len().into());
    }
    let n = vocab.len();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(n, "<|end|>", true), added(n + 1, "<tool>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false},
    })
}

/// A Llama-style one: metaspace words, byte fallback, a leading space that is stripped.
pub(in crate::text) fn byte_fallback() -> Value {
    let mut vocab = Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    let merges = ["▁ a", "b c", "▁ bc", "▁a bc"];
    for token in ["▁", "a", "b", "c", "é", "▁a", "bc", "▁bc", "▁abc"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "dropout": null, "unk_token": "<unk>",
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true},
    })
}

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": special})
}

/// GPT-2's `bytes_to_unicode`.
fn byte_char(byte: u32) -> char {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = if printable(byte) {
        byte
    } else {
        0x100 + (0..byte).filter(|b| !printable(*b)).count() as u32
    };
    char::from_u32(code).unwrap()
}

pub(in crate::text) fn load(json: &Value, config: Option<&Value>) -> Tokenizer {
    Tokenizer::from_json(json.to_string().as_bytes(), config, "tokenizer.json").unwrap()
}

#[test]
fn encodes_and_decodes() {
    let t = load(&byte_level(), None);
    assert_eq!(t.encode("hello", true).unwrap(), [259]);
    let text = "hello wörld é 🚀<|end|>";
    let ids = t.encode(text, false).unwrap();
    assert_eq!(t.decode(&ids, false).unwrap(), text);
    assert_eq!(t.decode(&ids, true).unwrap(), "hello wörld é 🚀");
    assert_eq!(t.decode(&[999_999], false).unwrap(), "");
    assert_eq!((t.vocab_size(), t.id_limit()), (265, 265));
    assert_eq!(t.special_ids(), [263]);
    assert!(t.is_special(263) && !t.is_special(264) && !t.is_special(9_999));

    let t = load(&byte_fallback(), None);
    let ids = t.encode("abc é ż", true).unwrap();
    assert_eq!(ids[0], 1);
    assert_eq!(t.decode(&ids, true).unwrap(), "abc é ż");
    assert_eq!(t.encode("abc", false).unwrap().len(), 1);
}

#[test]
fn special_tokens_of_the_config() {
    let config = json!({
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": false, "normalized": true, "rstrip": false, "single_word": false},
        "eos_token": "<eot>", "pad_token": null, "image_token": "<image>",
        "additional_special_tokens": ["<extra>", {"content": "<tool>", "special": true}],
        "added_tokens_decoder": {"264": {"content": "<tool>", "special": false}, "270": {"content": "<listed>", "special": false}},
        "add_bos_token": true, "model_max_length": 1e30,
    });
    let t = load(&byte_level(), Some(&config));
    assert_eq!((t.bos_token(), t.eos_token()), (Some("<s>"), Some("<eot>")));
    assert_eq!(t.named("pad_token"), None);
    for token in ["<s>", "<eot>", "<image>", "<extra>", "<tool>"] {
        let id = t.token_to_id(token).expect(token);
        assert!(t.is_special(id), "{token}");
        assert_eq!(t.encode(token, false).unwrap(), [id], "{token}");
    }
    assert_eq!(t.token_to_id("<tool>"), Some(264));
    let listed = t.token_to_id("<listed>").unwrap();
    assert!(!t.is_special(listed));
    assert_eq!(t.eos_id(), t.token_to_id("<eot>"));
    assert_eq!(t.id_limit(), t.vocab_size());
}

#[test]
fn saved_truncation_and_padding_do_not_apply() {
    let mut json = byte_level();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let t = load(&json, None);
    assert_eq!(t.encode("abcdefgh", false).unwrap().len(), 8);
}

#[test]
fn what_is_missing_or_broken_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let load = || Tokenizer::load(dir.path()).unwrap_err();
    let e = load();
    assert_eq!(e.code(), Code::Text);
    assert!(e.fix().contains("copy tokenizer.json"), "{e}");

    std::fs::write(dir.path().join("tokenizer.model"), b"x").unwrap();
    let e = load();
    assert!(e.cause().contains("tokenizer.model"), "{e}");
    assert!(e.fix().contains("save_pretrained"), "{e}");

    let file = dir.path().join("tokenizer.json");
    for broken in ["", "{", "[]", "{\"model\": {}}", "\u{0}"] {
        std::fs::write(&file, broken).unwrap();
        let e = load();
        assert_eq!(e.code(), Code::Text);
        assert!(e.what().contains("tokenizer.json"), "{e}");
    }
    std::fs::write(&file, [0xff, 0xfe]).unwrap();
    assert!(load().cause().contains("UTF-8"));
    let mut hollow = byte_level();
    hollow["model"]["vocab"] = json!({});
    hollow["model"]["merges"] = json!([]);
    hollow["added_tokens"] = json!([]);
    std::fs::write(&file, hollow.to_string()).unwrap();
    assert!(load().cause().contains("empty"));
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    assert!(load().cause().contains("regular file"));

    std::fs::remove_dir(&file).unwrap();
    std::fs::write(&file, byte_level().to_string()).unwrap();
    assert!(Tokenizer::load(dir.path()).is_ok());
    std::fs::write(dir.path().join("tokenizer_config.json"), "{,}").unwrap();
    assert!(load().what().contains("tokenizer_config.json"));
}

#[test]
fn legacy_special_tokens_map() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), byte_level().to_string()).unwrap();
    std::fs::write(
        dir.path().join("special_tokens_map.json"),
        json!({"eos_token": {"content": "<|end|>", "lstrip": false}}).to_string(),
    )
    .unwrap();
    let t = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(t.eos_id(), Some(263));
}

/// Reference encodings of the published Qwen vocabulary; its 11 MB stay outside the repository.
#[test]
fn qwen_golden() {
    let Some(dir) = std::env::var_os("TENSORPAGER_FIXTURES") else {
        eprintln!("skipped: TENSORPAGER_FIXTURES does not say where the reference tokenizer lies");
        return;
    };
    let dir = PathBuf::from(dir).join("qwen-tokenizer");
    let t = Tokenizer::load(&dir).unwrap();
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    for case in golden.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(t.encode(text, false).unwrap(), ids, "{text:?}");
        let mut stream = crate::text::TokenStream::new(&t, false);
        let mut out = String::new();
        for id in &ids {
            stream.push(*id, &mut out).unwrap();
            assert!(!out.contains('\u{FFFD}'));
        }
        stream.finish(&mut out).unwrap();
        assert_eq!(out, t.decode(&ids, false).unwrap());
    }
}
