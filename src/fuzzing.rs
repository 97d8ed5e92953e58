//! Everything that is parsed, as one function a parser: what `fuzz/` and the seeded sample at the end of this file call.
//!
//! A target must return whatever the bytes: an error is an answer, a panic is a finding. Its own assertions say what an accepted input
//! must be. `seeds` are inputs that are accepted, for a fuzzer to begin with.
#![cfg(any(test, feature = "testing"))]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::checkpoint::{self, Checkpoint, OpenOptions};
use crate::engine::jobs::{self, Looker, RowLimits, Rules, TextTools};
use crate::media;
use crate::paging::{self, Placement, Plan, SlotLayout};
use crate::spec::parse_config;
use crate::store::{self, PackOptions, Store};
use crate::text::{
    AnswerLength, ChatTemplate, GenerationConfig, Message, RenderOptions, SamplingParams, Tokenizer,
};
use crate::units::Dtype;

/// One parser.
pub struct Target {
    pub name: &'static str,
    /// True where the input was accepted.
    pub run: fn(&[u8]) -> bool,
    pub seeds: fn() -> Vec<Vec<u8>>,
}

pub const TARGETS: [Target; 12] = [
    Target {
        name: "safetensors_header",
        run: header,
        seeds: header_seeds,
    },
    Target {
        name: "shard_index",
        run: checkpoint::fuzz::shard_index,
        seeds: || vec![fixture("llama3-bf16/model.safetensors.index.json")],
    },
    Target {
        name: "config_plan",
        run: config_plan,
        seeds: config_seeds,
    },
    Target {
        name: "manifest",
        run: |bytes| store::fuzz::manifest(&packed().dir, bytes),
        seeds: || vec![packed().manifest.clone()],
    },
    Target {
        name: "accelerate_index",
        run: checkpoint::fuzz::accelerate_index,
        seeds: || vec![fixture("accelerate-qwen2-bf16/index.json")],
    },
    Target {
        name: "job_line",
        run: job_line,
        seeds: job_seeds,
    },
    Target {
        name: "chat_messages",
        run: chat_messages,
        seeds: chat_seeds,
    },
    Target {
        name: "chat_template",
        run: chat_template,
        seeds: template_seeds,
    },
    Target {
        name: "generation_config",
        run: generation_config,
        seeds: generation_seeds,
    },
    Target {
        name: "tokenizer_config",
        run: tokenizer_config,
        seeds: tokenizer_config_seeds,
    },
    Target {
        name: "kept_record",
        run: |bytes| in_a_folder(|dir| paging::fuzz::kept_record(dir, bytes)),
        seeds: paging::fuzz::kept_records,
    },
    Target {
        name: "image",
        run: image,
        seeds: image_seeds,
    },
];

/// Runs the target of that name.
///
/// # Panics
/// Where there is none of that name, and on a finding.
pub fn run(name: &str, bytes: &[u8]) -> bool {
    let target = TARGETS.iter().find(|t| t.name == name);
    (target.expect("a target of fuzzing::TARGETS").run)(bytes)
}

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The first eight bytes say how long the data behind the header are.
fn header(bytes: &[u8]) -> bool {
    match bytes.split_first_chunk::<8>() {
        Some((length, json)) => checkpoint::fuzz::header(json, u64::from_le_bytes(*length)),
        None => false,
    }
}

fn header_seeds() -> Vec<Vec<u8>> {
    let of = |name: &str| {
        let file = fixture(name);
        let (length, rest) = file
            .split_first_chunk::<8>()
            .expect("a fixture has a header");
        let (json, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        [&(data.len() as u64).to_le_bytes()[..], json].concat()
    };
    vec![
        of("qwen2-bf16/model.safetensors"),
        of("mistral-bf16/model.safetensors"),
        of("llama-f32/model.safetensors"),
    ]
}

/// An accepted config's units can be laid out, and a plan for them either fits its budget or is refused.
fn config_plan(bytes: &[u8]) -> bool {
    let Ok(config) = serde_json::from_slice::<Value>(bytes) else {
        return false;
    };
    let Ok(spec) = parse_config(&config) else {
        return false;
    };
    // A model of thousands of layers is laid out as any other, but not thousands of times a second.
    if spec.layers > 256 {
        return true;
    }
    let Ok((layouts, file_bytes)) = store::fuzz::layouts(&spec.units(&|_| Dtype::BF16)) else {
        return true;
    };
    let slots: Vec<SlotLayout> = layouts
        .iter()
        // Larger units would be cut into millions of reads.
        .filter(|u| u.bytes < 1 << 32)
        .map(|u| SlotLayout::new(u, &file_bytes, 4 << 20))
        .collect();
    if slots.len() == layouts.len() {
        let budget = 1 << 32;
        if let Ok(plan) = Plan::new(&slots, budget, 1, &Placement::Auto, spec.tied_head) {
            assert!(plan.arena_bytes() <= budget);
        }
    }
    true
}

fn config_seeds() -> Vec<Vec<u8>> {
    [
        "qwen2-bf16",
        "qwen3-bf16",
        "llama3-bf16",
        "llama-yarn-bf16",
        "mistral-bf16",
        "vl-bf16",
    ]
    .iter()
    .map(|name| fixture(&format!("{name}/config.json")))
    .collect()
}

/// A small pack, for manifests to be held against.
struct Packed {
    dir: PathBuf,
    /// What stands behind the line with the hash.
    manifest: Vec<u8>,
}

fn packed() -> &'static Packed {
    static PACKED: OnceLock<Packed> = OnceLock::new();
    PACKED.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen2-bf16");
        let offload = std::env::temp_dir().join(format!("tensorpager-fuzz-{}", std::process::id()));
        let checkpoint = Checkpoint::open(&source.display().to_string(), &OpenOptions::default());
        let store = checkpoint
            .and_then(|c| Store::pack(&c, &PackOptions::new(&offload), &mut |_| {}))
            .expect("a fixture packs")
            .store;
        let text = std::fs::read_to_string(store.dir.join("manifest.json")).unwrap_or_default();
        let body = text.splitn(3, '\n').nth(2).unwrap_or_default();
        Packed {
            manifest: body.as_bytes().to_vec(),
            dir: store.dir.clone(),
        }
    })
}

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| Tokenizer::load(&seeing()).expect("a fixture has a tokenizer"))
}

/// A model that sees pictures.
fn seeing() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vl-bf16")
}

fn job_line(bytes: &[u8]) -> bool {
    let rules = Rules {
        model: "fuzz".into(),
        fingerprint: 1,
        sampling: SamplingParams::greedy(),
        max_tokens: Some(16),
        stop: Vec::new(),
        stop_tokens: Vec::new(),
        chat_length: AnswerLength::Tokens(16),
        context: Some(512),
        look: Some(media::Options::default()),
    };
    static TEMPLATE: OnceLock<ChatTemplate> = OnceLock::new();
    let load = || ChatTemplate::load(&seeing()).ok().flatten();
    let template = TEMPLATE.get_or_init(|| load().expect("a fixture has a template"));
    // It counts in cells: one a thread.
    thread_local!(static LOOKER: Looker = looker());
    LOOKER.with(|looker| {
        let text = TextTools {
            tokenizer: tokenizer(),
            template: Some(template),
            looker: Some(looker),
            limits: RowLimits::within(512, 64 << 20, 32 << 20),
        };
        jobs::fuzz::job_line(bytes, &rules, &text)
    })
}

fn looker() -> Looker {
    let dir = seeing();
    let config = serde_json::from_slice(&fixture("vl-bf16/config.json"));
    let spec = parse_config(&config.expect("a fixture's config is JSON"));
    let vision = spec.expect("a fixture's config").vision;
    let options = media::Options::default();
    Looker::new(
        &dir,
        &vision.expect("a vision-language fixture"),
        options,
        &dir.join("job.jsonl"),
        media::Look::Header,
    )
}

fn job_seeds() -> Vec<Vec<u8>> {
    let rows = [
        r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":"the sea","max_tokens":4,"temperature":0.9,"top_p":0.9,"n":3,"seed":7,"stop":["x"],"logprobs":2,"logit_bias":{"5":1.5},"user":"u"}}"#,
        r#"{"custom_id":"b","url":"/v1/completions","body":{"prompt":[1,2,3],"max_tokens":4,"ignore_eos":true,"repetition_penalty":1.1}}"#,
        r#"{"custom_id":"c","method":"POST","url":"/v1/chat/completions","body":{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"max_tokens":4,"logprobs":true,"top_logprobs":2}}"#,
        r#"{"id":"batch_req_00ff","custom_id":"a","response":{"status_code":200},"error":null}"#,
        r#"{"id":"batch_req_00ff","custom_id":"a","line":3,"error":{"code":"x","message":"y"}}"#,
    ];
    let mut seeds: Vec<Vec<u8>> = rows.iter().map(|r| r.as_bytes().to_vec()).collect();
    seeds.push(chat_row().to_string().into_bytes());
    seeds
}

/// A conversation with a picture and frames inline.
fn chat_row() -> Value {
    let image = image_seeds().swap_remove(0);
    let at = format!("data:image/png;base64,{}", STANDARD.encode(image));
    serde_json::json!({"custom_id": "d", "body": {"max_completion_tokens": 3, "messages": [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": at, "detail": "auto"}, "max_pixels": 3136},
            {"type": "video", "video": [at, at], "fps": 2, "max_frames": 2},
            {"type": "text", "text": "What?"},
        ]},
    ]}})
}

fn cases() -> &'static [Value] {
    static CASES: OnceLock<Vec<Value>> = OnceLock::new();
    CASES.get_or_init(|| serde_json::from_slice(&fixture("chat.json")).expect("chat.json is JSON"))
}

/// The first byte chooses one of the published templates, the rest are messages.
fn chat_messages(bytes: &[u8]) -> bool {
    static TEMPLATES: OnceLock<Vec<ChatTemplate>> = OnceLock::new();
    let templates = TEMPLATES.get_or_init(|| {
        let mut texts: Vec<&str> = cases()
            .iter()
            .filter_map(|c| c["template"].as_str())
            .collect();
        texts.sort_unstable();
        texts.dedup();
        let compile = |t: &&str| ChatTemplate::from_source(t, &[("bos_token", "<s>")]).ok();
        texts.iter().filter_map(compile).collect()
    });
    let Some((which, json)) = bytes.split_first() else {
        return false;
    };
    let Ok(json) = serde_json::from_slice::<Value>(json) else {
        return false;
    };
    let Ok(messages) = Message::list(&json, "the fuzzer's messages") else {
        return false;
    };
    let template = &templates[usize::from(*which) % templates.len()];
    let options = RenderOptions {
        add_generation_prompt: true,
        ..RenderOptions::default()
    };
    template.render(&messages, &options).is_ok()
}

fn chat_seeds() -> Vec<Vec<u8>> {
    let with = |c: &Value| [&[0u8][..], c["messages"].to_string().as_bytes()].concat();
    cases().iter().map(with).collect()
}

/// A template from a stranger, and two messages.
fn chat_template(bytes: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(bytes) else {
        return false;
    };
    let Ok(template) = ChatTemplate::from_source(source, &[("bos_token", "<s>")]) else {
        return false;
    };
    let messages = [
        Message::new("user", "Hi"),
        Message::new("assistant", "Yes?"),
    ];
    template
        .render(&messages, &RenderOptions::default())
        .is_ok()
}

fn template_seeds() -> Vec<Vec<u8>> {
    let text = |c: &Value| c["template"].as_str().map(|t| t.as_bytes().to_vec());
    cases().iter().filter_map(text).take(8).collect()
}

/// A folder of this thread's own, for what is only read from files.
fn in_a_folder<T>(run: impl FnOnce(&Path) -> T) -> T {
    struct Folder(PathBuf);
    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
    static MADE: AtomicU32 = AtomicU32::new(0);
    thread_local!(static FOLDER: Folder = {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("tensorpager-fuzz-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        Folder(dir)
    });
    FOLDER.with(|folder| run(&folder.0))
}

/// Both files that ids come from are the same stranger's. What is accepted has probabilities to sample by, or is refused as a request is.
fn generation_config(bytes: &[u8]) -> bool {
    in_a_folder(|dir| {
        for name in ["generation_config.json", "config.json"] {
            std::fs::write(dir.join(name), bytes).expect("a file of a temporary folder");
        }
        let Ok(config) = GenerationConfig::load(dir) else {
            return false;
        };
        config.sampling().validate().is_ok()
    })
}

fn generation_seeds() -> Vec<Vec<u8>> {
    [
        r#"{"eos_token_id":[151645,151643],"bos_token_id":1,"pad_token_id":null,"do_sample":true,"temperature":0.7,"top_k":20,"top_p":0.8,"min_p":0.0,"repetition_penalty":1.05,"max_new_tokens":2048,"transformers_version":"4.51.0"}"#,
        r#"{"eos_token_id":2,"max_length":4096,"stop_strings":["\n\n","</s>"],"num_beams":4,"suppress_tokens":[1,2],"typical_p":0.9,"guidance_scale":1.5}"#,
        r#"{"text_config":{"eos_token_id":[7],"bos_token_id":5},"model_type":"qwen2_5_vl"}"#,
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// The special tokens of a stranger's `tokenizer_config.json` beside a sound tokenizer, and its chat template.
fn tokenizer_config(bytes: &[u8]) -> bool {
    static SOUND: OnceLock<Vec<u8>> = OnceLock::new();
    let sound = SOUND.get_or_init(|| fixture("vl-bf16/tokenizer.json"));
    let Ok(config) = serde_json::from_slice::<Value>(bytes) else {
        return false;
    };
    let template = in_a_folder(|dir| {
        std::fs::write(dir.join("tokenizer_config.json"), bytes)
            .expect("a file of a temporary folder");
        ChatTemplate::load(dir)
    });
    let tokenizer = Tokenizer::from_json(sound, Some(&config), "the fuzzer's tokenizer");
    let (Ok(template), Ok(tokenizer)) = (template, tokenizer) else {
        return false;
    };
    if let Ok(ids) = tokenizer.encode("<|im_start|>user the sea<s>", true) {
        let known = |id: &u32| (*id as usize) < tokenizer.id_limit();
        assert!(ids.iter().all(known), "an id that has no token: {ids:?}");
        let _ = tokenizer.decode(&ids, false);
    }
    let ids = [tokenizer.bos_id(), tokenizer.eos_id()];
    assert!(
        ids.iter()
            .flatten()
            .all(|id| tokenizer.id_to_token(*id).is_some())
    );
    if let Some(template) = template {
        let _ = template.render(&[Message::new("user", "Hi")], &RenderOptions::default());
    }
    true
}

fn tokenizer_config_seeds() -> Vec<Vec<u8>> {
    let named = r#"{"bos_token":{"content":"<s>","lstrip":false,"normalized":false,"rstrip":true,"single_word":false,"special":true},"eos_token":"</s>","add_bos_token":true,"additional_special_tokens":["<a>","<b>"],"added_tokens_decoder":{"3":{"content":"<x>","special":true}},"chat_template":[{"name":"default","template":"{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"},{"name":"tool_use","template":"{{ tools }}"}]}"#;
    vec![
        fixture("vl-bf16/tokenizer_config.json"),
        fixture("llama3-bf16/tokenizer_config.json"),
        named.as_bytes().to_vec(),
    ]
}

/// An accepted image has as many bytes as pixels.
fn image(bytes: &[u8]) -> bool {
    match media::decode(bytes, "fuzz") {
        Ok(rgb) => {
            assert_eq!(rgb.data.len(), rgb.width * rgb.height * 3);
            true
        }
        Err(_) => false,
    }
}

fn image_seeds() -> Vec<Vec<u8>> {
    let rgb = image::RgbImage::from_fn(13, 9, |x, y| image::Rgb([x as u8 * 19, y as u8 * 28, 77]));
    let encode = |format| {
        let mut out = std::io::Cursor::new(Vec::new());
        rgb.write_to(&mut out, format)
            .expect("a small image encodes");
        out.into_inner()
    };
    vec![
        encode(image::ImageFormat::Png),
        encode(image::ImageFormat::Jpeg),
        encode(image::ImageFormat::WebP),
    ]
}

#[cfg(test)]
mod tests;
