//! A row of the input: `{"custom_id", "method", "url", "body"}`.

use std::hash::Hasher;

use serde_json::{Map, Value};
use twox_hash::{XxHash3_64, XxHash3_128};

use super::body::Body;
use super::fields::Fields;
use super::input::{Line, MAX_ROW_BYTES, Source, TooLong};
use super::limits::{ROW_SHARE, RowLimits};
use super::pictures::{Looker, PictureIds};
use crate::error::Error;
use crate::media::{Options, is_inline};
use crate::text::{AnswerLength, ChatTemplate, SamplingParams, Tokenizer};
use crate::units::human_bytes;

/// Part of every row id: raised when the same request would be answered differently by a later version.
const ANSWER_VERSION: u64 = 1;
const MAX_ID_BYTES: usize = 512;
const MAX_ROW_LIMIT: u64 = MAX_ROW_BYTES as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    Completions,
}

impl Endpoint {
    pub fn url(self) -> &'static str {
        match self {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
        }
    }
}

/// What all rows share and their answers depend on.
#[derive(Clone, Debug)]
pub struct Rules {
    /// As answers name it.
    pub model: String,
    /// Of weights, tokenizer and templates: see [`super::fingerprint`].
    pub fingerprint: u64,
    /// Where a row is silent.
    pub sampling: SamplingParams,
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    /// The model's end-of-text tokens; empty where they are to be ignored.
    pub stop_tokens: Vec<u32>,
    /// Of chat rows that say nothing, and where `max_tokens` is `None` too.
    pub chat_length: AnswerLength,
    /// How pictures are looked at where a row is silent; `None` where the model sees none.
    pub look: Option<Options>,
    /// Given by the user; a default that follows the memory at hand does not belong here.
    pub context: Option<usize>,
}

impl Rules {
    /// A hash of everything here.
    pub fn key(&self) -> u64 {
        let mut hash = XxHash3_64::with_seed(ANSWER_VERSION);
        let s = &self.sampling;
        let chat_length = match self.chat_length {
            AnswerLength::Tokens(n) => n.to_string(),
            AnswerLength::Together(all) => format!("max_length {all}"),
        };
        hash.write(&self.fingerprint.to_le_bytes());
        let parts = format!(
            "{} {} {} {} {} {} {} {:?} {} {:?} {:?} {:?} {} {:?} {}",
            s.temperature,
            s.top_k,
            s.top_p,
            s.min_p,
            s.repetition_penalty,
            s.presence_penalty,
            s.frequency_penalty,
            s.logit_bias,
            s.seed,
            self.max_tokens,
            self.stop,
            self.stop_tokens,
            chat_length,
            self.context,
            self.model,
        );
        hash.write(parts.as_bytes());
        if let Some(look) = &self.look {
            hash.write(format!("{look:?}").as_bytes());
        }
        hash.finish()
    }
}

/// What turns a body into tokens and pictures.
#[derive(Clone, Copy)]
pub struct TextTools<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    /// None where the model sees no pictures.
    pub looker: Option<&'a Looker>,
    pub limits: RowLimits,
}

/// What identifies rows. The default, without anything, is for those who do not compare ids.
#[derive(Clone, Copy, Default)]
pub struct RowIds<'a> {
    /// Of the rules.
    pub key: u64,
    /// The contents of a row's pictures count where the model sees them.
    pub pictures: Option<&'a PictureIds>,
}

/// Why a row cannot be answered. Never stops the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowError {
    /// Stable: scripts match on it.
    pub code: &'static str,
    pub message: String,
    /// The field concerned.
    pub param: Option<String>,
}

impl RowError {
    pub fn new(code: &'static str, message: impl Into<String>) -> RowError {
        RowError {
            code,
            message: message.into(),
            param: None,
        }
    }

    pub fn about(code: &'static str, param: &str, message: impl Into<String>) -> RowError {
        RowError {
            param: Some(param.to_owned()),
            ..RowError::new(code, message)
        }
    }

    pub fn value(key: &str, wanted: &str, got: &Value) -> RowError {
        let got = got.to_string();
        let shown: String = got.chars().take(60).collect();
        RowError::about(
            "invalid_value",
            key,
            format!("`{key}` must be {wanted}, and is {shown}"),
        )
    }

    pub fn unsupported(key: &str) -> RowError {
        let message = format!("`{key}` is not supported by this engine with that value");
        RowError::about("unsupported_field", key, message)
    }

    pub fn unknown(key: &str, place: &str) -> RowError {
        let message = format!("`{key}` is not a field of {place} that this engine knows");
        RowError::about("unknown_field", key, message)
    }

    /// An engine error about this row alone.
    pub fn from_error(code: &'static str, e: &Error) -> RowError {
        RowError::new(code, format!("{}: {}; {}", e.what(), e.cause(), e.fix()))
    }
}

/// A row that was understood as far as its frame goes.
#[derive(Clone, Debug)]
pub struct Request {
    pub custom_id: String,
    pub endpoint: Endpoint,
    body: Map<String, Value>,
}

impl Request {
    /// The row on `line`. An error carries the custom_id where there is one.
    pub fn parse(source: &Source, line: &Line) -> Result<Request, (Option<String>, RowError)> {
        if let Some(TooLong { bytes, limit }) = line.too_long {
            let why = match limit {
                MAX_ROW_LIMIT => "a row may have".to_string(),
                _ => format!(
                    "there is memory for: about {} more of --cpu-memory reads it",
                    human_bytes((bytes - limit.min(bytes)) * ROW_SHARE)
                ),
            };
            let message = format!("the row takes {bytes} bytes, more than the {limit} {why}");
            return Err((None, RowError::new("row_too_long", message)));
        }
        match source {
            Source::Jsonl(_) => Request::parse_json(&line.bytes),
            Source::Prompts { chat, .. } => Request::from_prompt(line, *chat),
        }
    }

    fn from_prompt(line: &Line, chat: bool) -> Result<Request, (Option<String>, RowError)> {
        let custom_id = format!("prompt-{}", line.number);
        let Ok(text) = std::str::from_utf8(&line.bytes) else {
            let e = RowError::new("invalid_text", "the prompt is not UTF-8");
            return Err((Some(custom_id), e));
        };
        let mut body = Map::new();
        if chat {
            let message = serde_json::json!([{"role": "user", "content": text}]);
            body.insert("messages".into(), message);
        } else {
            body.insert("prompt".into(), text.into());
        }
        Ok(Request {
            custom_id,
            endpoint: if chat {
                Endpoint::Chat
            } else {
                Endpoint::Completions
            },
            body,
        })
    }

    fn parse_json(bytes: &[u8]) -> Result<Request, (Option<String>, RowError)> {
        let bad = |e: RowError| (None, e);
        let row: Map<String, Value> = serde_json::from_slice(bytes).map_err(|e| {
            let message = match e.classify() {
                serde_json::error::Category::Data => "the row is not a JSON object".to_owned(),
                _ => format!("the row is not valid JSON: column {}: {e}", e.column()),
            };
            bad(RowError::new("invalid_json", message))
        })?;
        let mut row = Fields::new(row);
        let custom_id = row.text("custom_id").map_err(bad)?.ok_or_else(|| {
            bad(RowError::about(
                "missing_field",
                "custom_id",
                "`custom_id` is missing: answers are told apart by it",
            ))
        })?;
        if custom_id.is_empty() || custom_id.len() > MAX_ID_BYTES {
            let e = RowError::about(
                "invalid_value",
                "custom_id",
                format!("`custom_id` must have 1 to {MAX_ID_BYTES} bytes"),
            );
            return Err(bad(e));
        }
        Request::parse_frame(row, custom_id.clone()).map_err(|e| (Some(custom_id), e))
    }

    fn parse_frame(mut row: Fields, custom_id: String) -> Result<Request, RowError> {
        if let Some(method) = row.text("method")?
            && method != "POST"
        {
            let e = format!("`method` must be POST, and is {method}");
            return Err(RowError::about("invalid_value", "method", e));
        }
        let url = row.text("url")?;
        let body = row.object("body")?.ok_or_else(|| {
            RowError::about(
                "missing_field",
                "body",
                "`body` is missing: it holds the request",
            )
        })?;
        row.finish("a row")?;
        let endpoint = match url.as_deref() {
            Some("/v1/chat/completions") => Endpoint::Chat,
            Some("/v1/completions") => Endpoint::Completions,
            None if body.contains_key("prompt") && !body.contains_key("messages") => {
                Endpoint::Completions
            }
            None => Endpoint::Chat,
            Some(url) => {
                let message = format!(
                    "`url` is {url}; this engine answers /v1/chat/completions and /v1/completions"
                );
                return Err(RowError::about("unsupported_url", "url", message));
            }
        };
        Ok(Request {
            custom_id,
            endpoint,
            body,
        })
    }

    /// What identifies the answer: a hash of the row, of everything in the rules, and of the contents of the files the row names.
    pub fn id(&self, ids: RowIds<'_>) -> u128 {
        let mut hash = XxHash3_128::with_seed(ids.key);
        hash.write(&(self.custom_id.len() as u64).to_le_bytes());
        hash.write(self.custom_id.as_bytes());
        hash.write(self.endpoint.url().as_bytes());
        hash_object(&self.body, &mut hash);
        if let Some(contents) = ids.pictures.and_then(|p| p.identity(&self.body)) {
            hash.write(&contents.to_le_bytes());
        }
        hash.finish_128()
    }

    /// The request in full: every field checked, the prompt as tokens.
    pub fn body(self, rules: &Rules, text: &TextTools<'_>) -> Result<Body, RowError> {
        Body::parse(self.endpoint, &self.custom_id, self.body, rules, text)
    }

    pub(super) fn fields(&self) -> &Map<String, Value> {
        &self.body
    }

    /// Bytes of all strings but inline pictures.
    pub fn text_bytes(&self) -> usize {
        self.body.values().map(text_bytes).sum()
    }

    /// Answer tokens asked for; 0 where the row leaves that to the job.
    pub fn max_tokens(&self) -> usize {
        let asked = |key: &str| self.body.get(key).and_then(Value::as_u64);
        let most = asked("max_tokens").max(asked("max_completion_tokens"));
        most.map_or(0, |n| usize::try_from(n).unwrap_or(usize::MAX))
    }
}

fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(s) if is_inline(s) => 0,
        Value::String(s) => s.len(),
        Value::Array(list) => list.iter().map(text_bytes).sum(),
        Value::Object(map) => map.values().map(text_bytes).sum(),
        _ => 0,
    }
}

/// Hashes JSON by meaning: neither white space nor the order of an object's keys counts.
fn hash_value(value: &Value, hash: &mut XxHash3_128) {
    match value {
        Value::Null => hash.write(b"n"),
        Value::Bool(b) => hash.write(if *b { b"t" } else { b"f" }),
        Value::Number(n) => {
            hash.write(b"#");
            hash.write(n.to_string().as_bytes());
            hash.write(b"\0");
        }
        Value::String(s) => hash_text(s, hash),
        Value::Array(list) => {
            hash.write(b"[");
            hash.write(&(list.len() as u64).to_le_bytes());
            list.iter().for_each(|v| hash_value(v, hash));
        }
        Value::Object(map) => hash_object(map, hash),
    }
}

fn hash_object(map: &Map<String, Value>, hash: &mut XxHash3_128) {
    hash.write(b"{");
    hash.write(&(map.len() as u64).to_le_bytes());
    let mut entries: Vec<(&String, &Value)> = map.iter().collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    for (key, value) in entries {
        hash_text(key, hash);
        hash_value(value, hash);
    }
}

fn hash_text(text: &str, hash: &mut XxHash3_128) {
    hash.write(b"\"");
    hash.write(&(text.len() as u64).to_le_bytes());
    hash.write(text.as_bytes());
}
