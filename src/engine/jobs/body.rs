//! The body of a request: every field is understood, refused by name, or not there.

use serde_json::{Map, Value};
use twox_hash::XxHash3_64;

use super::fields::Fields;
use super::request::{Endpoint, RowError, Rules, TextTools};
use crate::media::{MediaRequest, requests, unread_field, without_media};
use crate::text::{
    AnswerLength, ChatTemplate, Message, RenderOptions, SamplingParams, StopStrings,
};

/// As in OpenAI's API.
const MAX_CHOICES: u64 = 128;
const MAX_TOP_LOGPROBS: u64 = 20;
const MAX_STOP_STRINGS: usize = 16;
/// What a completion without `max_tokens` gets, as in OpenAI's API and vLLM.
const COMPLETION_MAX_TOKENS: usize = 16;

/// A prompt as tokens.
pub type Prompt = Vec<u32>;

/// A request ready to run.
#[derive(Clone, Debug)]
pub struct Body {
    /// Each picture still one token: see [`Looker`](super::Looker).
    pub prompt: Prompt,
    pub pictures: Vec<MediaRequest>,
    pub length: AnswerLength,
    pub sampling: SamplingParams,
    pub choices: u32,
    pub stop: StopStrings,
    pub stop_tokens: Vec<u32>,
    /// Log-probabilities wanted, with so many of the likeliest tokens.
    pub logprobs: Option<usize>,
    /// The model the row asks for, where it does.
    pub model: Option<String>,
}

impl Body {
    pub fn parse(
        endpoint: Endpoint,
        custom_id: &str,
        body: Map<String, Value>,
        rules: &Rules,
        text: &TextTools<'_>,
    ) -> Result<Body, RowError> {
        let mut f = Fields::new(body);
        let model = f.text("model")?;
        let (logprobs, (prompt, pictures)) = match endpoint {
            Endpoint::Chat => (chat_logprobs(&mut f)?, chat_prompt(&mut f, text)?),
            Endpoint::Completions => {
                let top = f.count("logprobs", 0..=MAX_TOP_LOGPROBS)?;
                (top, (completion_prompt(&mut f, text)?, Vec::new()))
            }
        };
        let length = length(&mut f, endpoint, rules)?;
        let choices = f.count("n", 1..=MAX_CHOICES)?.unwrap_or(1) as u32;
        let mut sampling = sampling(&mut f, custom_id, rules)?;
        sampling.logit_bias = logit_bias(&mut f, text)?;
        sampling.validate().map_err(|e| {
            let param = e.what().split_whitespace().next().unwrap_or_default();
            RowError::about(
                "invalid_value",
                param,
                format!("{}: {}", e.what(), e.cause()),
            )
        })?;
        let stop = stop_strings(&mut f, rules)?;
        let mut stop_tokens = match f.flag("ignore_eos")? {
            Some(true) => Vec::new(),
            _ => rules.stop_tokens.clone(),
        };
        stop_tokens.extend(token_list(&mut f, "stop_token_ids", text)?.unwrap_or_default());
        refuse_the_rest(f, endpoint, choices)?;
        Ok(Body {
            prompt,
            pictures,
            length,
            sampling,
            choices,
            stop,
            stop_tokens,
            logprobs,
            model,
        })
    }
}

impl Body {
    /// Tokens that may follow the prompt, which has so many with all its pictures.
    pub fn max_tokens(&self, prompt_tokens: usize) -> Result<usize, RowError> {
        self.length.after(prompt_tokens).map_err(|e| {
            // Another length for the whole job would be another job.
            let fix =
                "shorten the prompt, or give the row max_tokens (plain prompts: --max-tokens)";
            RowError::from_error("invalid_prompt", &e.with_fix(fix))
        })
    }
}

#[cfg(any(test, feature = "testing"))]
impl Body {
    /// Whether no picture is read from a file.
    pub(crate) fn all_inline(&self) -> bool {
        let inline = |at: &String| crate::media::is_inline(at);
        self.pictures.iter().all(|picture| match picture {
            MediaRequest::Image { at, .. } => inline(at),
            MediaRequest::Frames { at, .. } => at.iter().all(inline),
            MediaRequest::Video { .. } => false,
        })
    }
}

/// Fields that ask for nothing are let through; all others are named.
fn refuse_the_rest(mut f: Fields, endpoint: Endpoint, choices: u32) -> Result<(), RowError> {
    let none = || Value::Array(Vec::new());
    f.neutral("stream", &[false.into()])?;
    // Labels for the service's own accounting: no answer depends on them.
    f.take("user");
    f.take("metadata");
    f.neutral("store", &[false.into()])?;
    f.neutral("service_tier", &["auto".into(), "default".into()])?;
    f.neutral("min_tokens", &[0.into()])?;
    f.neutral("skip_special_tokens", &[true.into()])?;
    f.neutral("include_stop_str_in_output", &[false.into()])?;
    f.neutral("response_format", &[serde_json::json!({"type": "text"})])?;
    f.neutral("use_beam_search", &[false.into()])?;
    f.neutral("echo", &[false.into()])?;
    match endpoint {
        Endpoint::Chat => {
            f.neutral("tools", &[none()])?;
            f.neutral("tool_choice", &["none".into(), "auto".into()])?;
            f.neutral("parallel_tool_calls", &[true.into(), false.into()])?;
            f.neutral("modalities", &[serde_json::json!(["text"])])?;
            f.neutral("add_generation_prompt", &[true.into()])?;
            f.neutral("continue_final_message", &[false.into()])?;
        }
        Endpoint::Completions => {
            f.neutral("best_of", &[choices.into()])?;
            f.neutral("suffix", &["".into()])?;
        }
    }
    f.finish(match endpoint {
        Endpoint::Chat => "a chat completion",
        Endpoint::Completions => "a completion",
    })
}

fn chat_logprobs(f: &mut Fields) -> Result<Option<usize>, RowError> {
    let wanted = f.flag("logprobs")?.unwrap_or(false);
    let top = f.count("top_logprobs", 0..=MAX_TOP_LOGPROBS)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(RowError::about(
            "invalid_value",
            "top_logprobs",
            "`top_logprobs` needs `logprobs`: true",
        )),
    }
}

fn chat_prompt(
    f: &mut Fields,
    text: &TextTools<'_>,
) -> Result<(Prompt, Vec<MediaRequest>), RowError> {
    let Some(messages) = f.take("messages") else {
        let e = "`messages` is missing: a list of {\"role\", \"content\"}";
        return Err(RowError::about("missing_field", "messages", e));
    };
    let variables = f.object("chat_template_kwargs")?;
    let wrong = |cause: &str| RowError::about("invalid_value", "messages", cause);
    let mut messages = Message::take_list(messages, "`messages`").map_err(|e| wrong(e.cause()))?;
    let Some(template) = text.template else {
        let e = "this model comes without a chat template: use /v1/completions with `prompt`";
        return Err(RowError::about("no_chat_template", "messages", e));
    };
    let mut pictures = Vec::new();
    for message in &mut messages {
        expect_fields_read(message, template)?;
        let Some(parts) = message.parts() else {
            continue;
        };
        let found = part_pictures(parts, text)?;
        if !found.is_empty() {
            *message = message.with_content(without_media(parts));
            pictures.extend(found);
        }
    }
    let options = RenderOptions {
        add_generation_prompt: true,
        variables: variables.as_ref(),
        ..RenderOptions::default()
    };
    let rendered = template
        .render(&messages, &options)
        .map_err(|e| RowError::about("chat_template", "messages", explain(&e)))?;
    drop(messages);
    let prompt = encode(&rendered, false, "messages", text)?;
    Ok((prompt, pictures))
}

/// A text as tokens, unless it is longer than what the context holds or memory allows.
fn encode(
    prompt: &str,
    special: bool,
    param: &str,
    text: &TextTools<'_>,
) -> Result<Prompt, RowError> {
    let failed = |e| RowError::about("tokenizer", param, explain(&e));
    let limits = &text.limits;
    let (bytes, context) = (prompt.len(), limits.context);
    let refuse = |message| Err(RowError::about("invalid_prompt", param, message));
    if bytes > limits.usual_text_bytes() {
        // Counted in pieces: the margin is for what is cut in two.
        let enough = context.saturating_add(context / 8 + 16);
        let tokenizer = text.tokenizer;
        if tokenizer.count_up_to(prompt, enough).map_err(failed)? > enough {
            return refuse(format!(
                "the prompt has {bytes} bytes and more than {enough} tokens, the context holds {context}"
            ));
        }
    }
    if bytes > limits.text_bytes {
        return refuse(format!(
            "the prompt has {bytes} bytes, and there is memory to tokenize {}: more --cpu-memory allows more",
            limits.text_bytes
        ));
    }
    text.tokenizer.encode(prompt, special).map_err(failed)
}

/// That the model's template reads all that a message says: `role` and `content`, and `tool_calls`, `tool_call_id`, `reasoning_content`,
/// `name` or whatever else its text names. What asks for nothing (null, an empty list, as API answers that are sent back carry them in
/// `refusal`, `annotations`, `tool_calls`) is let through.
fn expect_fields_read(message: &Message, template: &ChatTemplate) -> Result<(), RowError> {
    let empty = |v: &Value| v.is_null() || v.as_array().is_some_and(Vec::is_empty);
    let read = |key: &str| matches!(key, "role" | "content") || template.names(key);
    let unread = |(key, value): &(&String, &Value)| !empty(value) && !read(key.as_str());
    match message.fields().iter().find(unread) {
        None => Ok(()),
        Some((key, _)) => Err(RowError::unknown(key, "a message")),
    }
}

/// The pictures of a message's parts; all other parts must be text.
fn part_pictures(parts: &[Value], text: &TextTools<'_>) -> Result<Vec<MediaRequest>, RowError> {
    let wrong = |cause: &str| RowError::about("invalid_value", "messages", cause);
    for part in parts.iter().filter_map(Value::as_object) {
        if let Some(field) = unread_field(part) {
            return Err(RowError::unknown(&field, "such a part of a message"));
        }
    }
    let defaults = text.looker.map(|l| *l.options()).unwrap_or_default();
    let found = requests(parts, &defaults).map_err(|e| wrong(&explain(&e)))?;
    if text.looker.is_none() && !found.is_empty() {
        let e = "the messages hold pictures, and this model has no vision tower";
        return Err(RowError::about("images_unavailable", "messages", e));
    }
    for part in without_media(parts) {
        match part.get("type").and_then(Value::as_str) {
            Some("text" | "image" | "video") => {}
            Some(kind) => {
                let e = format!("a part of type `{kind}`: text, images and video are understood");
                return Err(RowError::about("unsupported_field", "messages", e));
            }
            None => return Err(wrong("a part of `content` has no `type`")),
        }
    }
    Ok(found)
}

fn completion_prompt(f: &mut Fields, text: &TextTools<'_>) -> Result<Prompt, RowError> {
    let special = f.flag("add_special_tokens")?.unwrap_or(true);
    let encode = |s: &str| encode(s, special, "prompt", text);
    let wanted = "a string, a list of token ids, or a list with one of either";
    match f.take("prompt") {
        None => Err(RowError::about(
            "missing_field",
            "prompt",
            "`prompt` is missing",
        )),
        Some(Value::String(s)) => encode(&s),
        Some(Value::Array(list)) => match list.as_slice() {
            [Value::String(s)] => encode(s),
            [Value::Array(ids)] => ids_of("prompt", ids, text),
            [Value::Number(_), ..] => ids_of("prompt", &list, text),
            [Value::String(_), ..] => Err(RowError::about(
                "unsupported_field",
                "prompt",
                format!(
                    "`prompt` holds {} prompts; write a row for each",
                    list.len()
                ),
            )),
            _ => Err(RowError::value("prompt", wanted, &Value::Array(list))),
        },
        Some(v) => Err(RowError::value("prompt", wanted, &v)),
    }
}

/// Token ids that the tokenizer has.
fn ids_of(key: &str, list: &[Value], text: &TextTools<'_>) -> Result<Vec<u32>, RowError> {
    let limit = text.tokenizer.id_limit();
    let id = |v: &Value| {
        v.as_u64()
            .filter(|id| (*id as usize) < limit)
            .map(|id| id as u32)
            .ok_or_else(|| RowError::value(key, &format!("made of token ids below {limit}"), v))
    };
    list.iter().map(id).collect()
}

fn token_list(
    f: &mut Fields,
    key: &str,
    text: &TextTools<'_>,
) -> Result<Option<Vec<u32>>, RowError> {
    match f.take(key) {
        None => Ok(None),
        Some(Value::Array(list)) => ids_of(key, &list, text).map(Some),
        Some(v) => Err(RowError::value(key, "a list of token ids", &v)),
    }
}

fn length(f: &mut Fields, endpoint: Endpoint, rules: &Rules) -> Result<AnswerLength, RowError> {
    let old = f.count("max_tokens", 1..=u64::MAX)?;
    let new = match endpoint {
        Endpoint::Chat => f.count("max_completion_tokens", 1..=u64::MAX)?,
        Endpoint::Completions => None,
    };
    if let (Some(a), Some(b)) = (old, new)
        && a != b
    {
        let e = "`max_tokens` and `max_completion_tokens` contradict each other";
        return Err(RowError::about("invalid_value", "max_completion_tokens", e));
    }
    let silent = match endpoint {
        Endpoint::Chat => rules.chat_length,
        Endpoint::Completions => AnswerLength::Tokens(COMPLETION_MAX_TOKENS),
    };
    let asked = old.or(new).or(rules.max_tokens);
    Ok(asked.map_or(silent, AnswerLength::Tokens))
}

/// The job's settings with the row's laid over them. A row that truncates but names no temperature wants to sample.
fn sampling(f: &mut Fields, custom_id: &str, rules: &Rules) -> Result<SamplingParams, RowError> {
    let mut p = rules.sampling.clone();
    let temperature = f.number("temperature")?;
    let (top_p, min_p) = (f.number("top_p")?, f.number("min_p")?);
    // vLLM's −1 and 0 both mean all tokens.
    let top_k = match f.take("top_k") {
        None => None,
        Some(v) if v.as_i64() == Some(-1) => Some(0),
        Some(v) => Some(
            v.as_u64()
                .ok_or_else(|| RowError::value("top_k", "a whole number, or -1 for all", &v))?
                as usize,
        ),
    };
    if p.is_greedy() && (top_p.is_some() || min_p.is_some() || top_k.is_some()) {
        p.temperature = 1.0;
    }
    p.temperature = temperature.unwrap_or(p.temperature);
    p.top_p = top_p.unwrap_or(p.top_p);
    p.min_p = min_p.unwrap_or(p.min_p);
    p.top_k = top_k.unwrap_or(p.top_k);
    for (key, value) in [
        ("repetition_penalty", &mut p.repetition_penalty),
        ("presence_penalty", &mut p.presence_penalty),
        ("frequency_penalty", &mut p.frequency_penalty),
    ] {
        *value = f.number(key)?.unwrap_or(*value);
    }
    p.seed = match f.take("seed") {
        // Rows differ in their draws even where their prompts are the same.
        None => XxHash3_64::oneshot_with_seed(p.seed, custom_id.as_bytes()),
        Some(v) => match (v.as_u64(), v.as_i64()) {
            (Some(n), _) => n,
            (None, Some(n)) => n as u64,
            (None, None) => return Err(RowError::value("seed", "a whole number", &v)),
        },
    };
    Ok(p)
}

fn logit_bias(f: &mut Fields, text: &TextTools<'_>) -> Result<Vec<(u32, f32)>, RowError> {
    let limit = text.tokenizer.id_limit();
    let Some(map) = f.object("logit_bias")? else {
        return Ok(Vec::new());
    };
    map.iter()
        .map(|(id, bias)| {
            let token = id.parse::<u32>().ok().filter(|t| (*t as usize) < limit);
            match (token, bias.as_f64()) {
                (Some(token), Some(bias)) => Ok((token, bias as f32)),
                _ => Err(RowError::about(
                    "invalid_value",
                    "logit_bias",
                    format!("`logit_bias` maps token ids below {limit} to numbers, and holds {id}: {bias}"),
                )),
            }
        })
        .collect()
}

fn stop_strings(f: &mut Fields, rules: &Rules) -> Result<StopStrings, RowError> {
    let wanted = "a string or a list of strings";
    let refused = |e| RowError::about("invalid_value", "stop", explain(&e));
    let stops = match f.take("stop") {
        // The job's, or the model's own, however many these are.
        None => return StopStrings::new(&rules.stop).map_err(refused),
        Some(Value::String(s)) => vec![s],
        Some(Value::Array(list)) => list
            .iter()
            .map(|v| {
                v.as_str()
                    .map(str::to_owned)
                    .ok_or_else(|| RowError::value("stop", wanted, v))
            })
            .collect::<Result<_, _>>()?,
        Some(v) => return Err(RowError::value("stop", wanted, &v)),
    };
    if stops.len() > MAX_STOP_STRINGS {
        let e = format!(
            "`stop` holds {} strings; at most {MAX_STOP_STRINGS}",
            stops.len()
        );
        return Err(RowError::about("invalid_value", "stop", e));
    }
    StopStrings::new(stops).map_err(refused)
}

fn explain(e: &crate::error::Error) -> String {
    format!("{}: {}", e.what(), e.cause())
}
