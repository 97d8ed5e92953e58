//! Rows of the output, byte for byte the same for the same answer.

use serde::Serialize;
use serde_json::{Map, Value};

use super::request::{Endpoint, RowError};
use super::scan::ID_PREFIX;
use crate::engine::{FinishReason, Logprobs};
use crate::error::Result;
use crate::text::Tokenizer;

/// One finished choice.
pub struct Answered {
    pub text: String,
    /// Generated tokens, those of a stop string included.
    pub tokens: usize,
    pub reason: FinishReason,
    pub logprobs: Option<Vec<(u32, Box<Logprobs>)>>,
}

/// Everything a result row tells.
pub struct Answer<'a> {
    pub id: u128,
    pub custom_id: &'a str,
    pub endpoint: Endpoint,
    pub created: u64,
    pub model: &'a str,
    pub prompt_tokens: usize,
    pub choices: &'a [Answered],
}

#[derive(Serialize)]
struct Row<'a> {
    id: String,
    custom_id: &'a str,
    response: Response<'a>,
    error: Option<()>,
}

#[derive(Serialize)]
struct Response<'a> {
    status_code: u16,
    request_id: String,
    body: ResponseBody<'a>,
}

#[derive(Serialize)]
struct ResponseBody<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: Usage,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<AssistantMessage<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    logprobs: Option<Value>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct AssistantMessage<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
}

/// A row of the errors file.
#[derive(Serialize)]
pub struct ErrorRow<'a> {
    id: String,
    custom_id: Option<&'a str>,
    /// Of the input, from 1.
    line: u64,
    response: Option<()>,
    error: ErrorBody<'a>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    code: &'a str,
    message: String,
    param: Option<&'a str>,
    line: u64,
}

impl Answer<'_> {
    /// The row as JSON.
    pub fn row(&self, tokenizer: &Tokenizer) -> Result<impl Serialize> {
        let id = format!("{:032x}", self.id);
        let chat = self.endpoint == Endpoint::Chat;
        let mut choices = Vec::with_capacity(self.choices.len());
        for (index, c) in self.choices.iter().enumerate() {
            let logprobs = match (&c.logprobs, chat) {
                (None, _) => None,
                (Some(l), true) => Some(chat_logprobs(l, tokenizer)?),
                (Some(l), false) => Some(completion_logprobs(l, tokenizer)?),
            };
            choices.push(Choice {
                index,
                message: chat.then_some(AssistantMessage {
                    role: "assistant",
                    content: &c.text,
                }),
                text: (!chat).then_some(&c.text),
                logprobs,
                finish_reason: c.reason.name(),
            });
        }
        let completion_tokens = self.choices.iter().map(|c| c.tokens).sum();
        Ok(Row {
            id: format!("{ID_PREFIX}{id}"),
            custom_id: self.custom_id,
            response: Response {
                status_code: 200,
                request_id: format!("req_{id}"),
                body: ResponseBody {
                    id: format!("{}{id}", if chat { "chatcmpl-" } else { "cmpl-" }),
                    object: if chat {
                        "chat.completion"
                    } else {
                        "text_completion"
                    },
                    created: self.created,
                    model: self.model,
                    choices,
                    usage: Usage {
                        prompt_tokens: self.prompt_tokens,
                        total_tokens: self.prompt_tokens + completion_tokens,
                        completion_tokens,
                    },
                },
            },
            error: None,
        })
    }
}

impl<'a> ErrorRow<'a> {
    pub fn new(id: u128, custom_id: Option<&'a str>, line: u64, e: &'a RowError) -> ErrorRow<'a> {
        ErrorRow {
            id: format!("{ID_PREFIX}{id:032x}"),
            custom_id,
            line,
            response: None,
            error: ErrorBody {
                code: e.code,
                message: format!("line {line}: {}", e.message),
                param: e.param.as_deref(),
                line,
            },
        }
    }
}

/// `{"content": [{token, logprob, bytes, top_logprobs: […]}]}`
fn chat_logprobs(tokens: &[(u32, Box<Logprobs>)], tokenizer: &Tokenizer) -> Result<Value> {
    let entry = |id: u32, logprob: f32| -> Result<Map<String, Value>> {
        let token = tokenizer.decode(&[id], false)?;
        let mut map = Map::new();
        let bytes: Vec<Value> = token.bytes().map(Value::from).collect();
        map.insert("token".into(), token.into());
        map.insert("logprob".into(), number(logprob));
        map.insert("bytes".into(), bytes.into());
        Ok(map)
    };
    let mut content = Vec::with_capacity(tokens.len());
    for (id, logprobs) in tokens {
        let mut map = entry(*id, logprobs.chosen)?;
        let top = logprobs
            .top
            .iter()
            .map(|t| entry(t.id, t.logprob).map(Value::Object));
        map.insert(
            "top_logprobs".into(),
            Value::Array(top.collect::<Result<_>>()?),
        );
        content.push(Value::Object(map));
    }
    Ok(serde_json::json!({ "content": content }))
}

/// `{"text_offset": […], "token_logprobs": […], "tokens": […], "top_logprobs": [{…}]}`
fn completion_logprobs(tokens: &[(u32, Box<Logprobs>)], tokenizer: &Tokenizer) -> Result<Value> {
    let (mut offsets, mut values, mut texts, mut tops) = (vec![], vec![], vec![], vec![]);
    let mut offset = 0;
    for (id, logprobs) in tokens {
        let text = tokenizer.decode(&[*id], false)?;
        offsets.push(Value::from(offset));
        offset += text.chars().count();
        let mut top = Map::new();
        for t in &logprobs.top {
            // Tokens that are parts of characters read alike: the likeliest stands for them.
            let text = tokenizer.decode(&[t.id], false)?;
            top.entry(text).or_insert_with(|| number(t.logprob));
        }
        top.entry(text.clone())
            .or_insert_with(|| number(logprobs.chosen));
        texts.push(Value::from(text));
        values.push(number(logprobs.chosen));
        tops.push(Value::Object(top));
    }
    Ok(serde_json::json!({
        "text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": tops,
    }))
}

/// The shortest decimal that reads back as this float32, not as its float64 neighbour.
fn number(x: f32) -> Value {
    x.to_string()
        .parse::<f64>()
        .ok()
        .and_then(serde_json::Number::from_f64)
        .map_or(Value::Null, Value::Number)
}
