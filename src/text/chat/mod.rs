//! Chat templates: a conversation → the text the model was trained to see.
//!
//! Templates are Jinja, written for transformers, which renders them with Jinja2 in a sandbox. Here minijinja renders them,
//! with Python's methods, formats and `tojson` where it has its own ways. A template comes with a model from somewhere and is
//! not trusted: it runs for a bounded number of steps, writes a bounded amount, and can reach nothing but its arguments.
//! The engine has no bound on the values a template builds on the way: one that doubles a string in a loop can still fill memory.

mod environment;
mod message;
mod python;
mod source;

pub use message::Message;

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use environment::{Raised, environment};
use source::{Sources, Tokens};

/// Instructions a template may run: far more than any published one needs for a conversation of that size.
const FUEL: u64 = 2_000_000;
/// More of them for each JSON value in the conversation: templates walk it, some once per message.
const FUEL_PER_VALUE: u64 = 10_000;
/// Bytes a template may write beyond eight times what it was given.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// A list nested in itself a million times is taken down recursively; the thread's stack is only touched where used.
const STACK_BYTES: usize = 256 << 20;

/// What a rendering depends on besides the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions<'a> {
    /// End with the beginning of an answer.
    pub add_generation_prompt: bool,
    /// JSON schemas of functions the model may call; chooses the template named `tool_use` where there is one.
    pub tools: Option<&'a [Value]>,
    /// Further variables (`enable_thinking`, …); they win over everything the engine sets.
    pub variables: Option<&'a Map<String, Value>>,
    /// The clock that `strftime_now` reads; the local time where `None`.
    pub now: Option<chrono::NaiveDateTime>,
}

/// The chat template of a model, with its special tokens.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    sources: Sources,
    /// `bos_token`, `eos_token`, … as the templates see them.
    tokens: Tokens,
}

impl ChatTemplate {
    /// Reads the template where transformers looks for it: `chat_template.jinja` with `additional_chat_templates/`, then
    /// `chat_template.json`, then `tokenizer_config.json`. `None`: the model has none. A template that is not Jinja is
    /// an error that names file and line (Code::Text).
    pub fn load(dir: &Path) -> Result<Option<ChatTemplate>> {
        let (sources, tokens) = source::load(dir)?;
        let Some(sources) = sources else {
            return Ok(None);
        };
        let template = ChatTemplate { sources, tokens };
        for (name, text) in template.sources.all() {
            template.compile(name, text)?;
        }
        Ok(Some(template))
    }

    /// From Jinja source; `tokens` are pairs such as `("bos_token", "<s>")`.
    pub fn from_source(source: &str, tokens: &[(&str, &str)]) -> Result<ChatTemplate> {
        let template = ChatTemplate {
            sources: Sources::single(source, "the chat template"),
            tokens: tokens
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect(),
        };
        for (name, text) in template.sources.all() {
            template.compile(name, text)?;
        }
        Ok(template)
    }

    /// Whether the word stands anywhere in the template: what it does not name it cannot read. (What it names it may read of something
    /// else: `name` of a message, say, where only a tool's is meant.)
    pub fn names(&self, word: &str) -> bool {
        let in_word = |c: char| c.is_alphanumeric() || c == '_';
        self.sources.all().any(|(_, text)| {
            text.match_indices(word).any(|(at, _)| {
                let before = text[..at].chars().next_back();
                let behind = text[at + word.len()..].chars().next();
                !before.is_some_and(in_word) && !behind.is_some_and(in_word)
            })
        })
    }

    /// The text of `messages`. Where the template itself refuses them (`raise_exception`), the error's cause is its message.
    /// All errors are Code::Text.
    pub fn render(&self, messages: &[Message], options: &RenderOptions<'_>) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::new(
                Code::Text,
                "the conversation is empty",
                "a chat template needs at least one message",
                "give a prompt or a message",
            ));
        }
        let (name, text) = self.sources.choose(options.tools.is_some())?;
        // A thread of its own for its stack: see STACK_BYTES.
        let rendered = std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("chat-template".into())
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || self.render_here(name, text, messages, options))
                .map(|thread| thread.join())
        });
        match rendered {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(self.failed(name, "the template engine failed on it".into())),
            Err(e) => Err(Error::io("cannot start a thread for the chat template", &e)),
        }
    }

    fn render_here(
        &self,
        name: &str,
        text: &str,
        messages: &[Message],
        options: &RenderOptions<'_>,
    ) -> Result<String> {
        let values = messages.iter().map(|m| count(m.fields())).sum::<u64>()
            + options
                .tools
                .iter()
                .flat_map(|t| t.iter())
                .map(count_value)
                .sum::<u64>();
        let bytes = messages.iter().map(|m| size(m.fields())).sum::<usize>();
        let mut env = environment();
        env.set_fuel(Some(FUEL + FUEL_PER_VALUE * values));
        let template = env
            .template_from_named_str(name, text)
            .map_err(|e| self.not_jinja(name, &e))?;
        let mut out = Bounded {
            bytes: Vec::new(),
            limit: MAX_OUTPUT_BYTES + 8 * bytes,
        };
        template
            .render_captured_to(self.context(messages, options), &mut out)
            .map_err(|e| self.explain(name, &e, out.bytes.len() >= out.limit))?;
        String::from_utf8(out.bytes).map_err(|_| Error::internal("a chat template wrote no UTF-8"))
    }

    fn context(&self, messages: &[Message], options: &RenderOptions<'_>) -> minijinja::Value {
        use minijinja::Value as V;
        let mut context: Vec<(String, V)> = self
            .tokens
            .iter()
            .map(|(k, v)| (k.clone(), V::from(v.as_str())))
            .collect();
        let now = options.now;
        let list: Vec<&Map<String, Value>> = messages.iter().map(Message::fields).collect();
        context.extend([
            ("messages".into(), V::from_serialize(&list)),
            ("tools".into(), V::from_serialize(options.tools)),
            ("documents".into(), V::from(())),
            (
                "add_generation_prompt".into(),
                V::from(options.add_generation_prompt),
            ),
            (
                "strftime_now".into(),
                V::from_function(move |format: &str| python::strftime(now, format)),
            ),
        ]);
        for (key, value) in options.variables.into_iter().flatten() {
            context.push((key.clone(), V::from_serialize(value)));
        }
        context.into_iter().collect()
    }

    fn compile(&self, name: &str, text: &str) -> Result<()> {
        environment()
            .template_from_named_str(name, text)
            .map(|_| ())
            .map_err(|e| self.not_jinja(name, &e))
    }

    fn not_jinja(&self, name: &str, e: &minijinja::Error) -> Error {
        self.failed(
            name,
            format!("it is not a valid Jinja template: {}", line(e)),
        )
    }

    fn failed(&self, name: &str, cause: String) -> Error {
        Error::new(
            Code::Text,
            format!(
                "cannot use the chat template `{name}` of {}",
                self.sources.place()
            ),
            cause,
            "send the text as it is with --raw, or copy the template again from the model's source",
        )
    }

    fn explain(&self, name: &str, e: &minijinja::Error, full: bool) -> Error {
        if full {
            return self.failed(
                name,
                "it writes more text than any conversation needs".into(),
            );
        }
        if let Some(message) = Raised::find(e) {
            return Error::new(
                Code::Text,
                "the chat template refuses this conversation",
                message,
                "change the messages accordingly, or send the text as it is with --raw",
            );
        }
        match e.kind() {
            minijinja::ErrorKind::OutOfFuel => self.failed(
                name,
                "it runs on and on: more steps than any conversation needs".into(),
            ),
            _ => self.failed(name, line(e)),
        }
    }
}

/// An engine error in one line: what, where in the template, and why.
fn line(e: &minijinja::Error) -> String {
    let mut text = e.to_string();
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// JSON values in `map`.
fn count(map: &Map<String, Value>) -> u64 {
    1 + map.values().map(count_value).sum::<u64>()
}

fn count_value(value: &Value) -> u64 {
    match value {
        Value::Array(list) => 1 + list.iter().map(count_value).sum::<u64>(),
        Value::Object(map) => count(map),
        _ => 1,
    }
}

/// Bytes of text in `map`.
fn size(map: &Map<String, Value>) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::String(s) => s.len(),
            Value::Array(list) => list.iter().map(of).sum(),
            Value::Object(map) => size(map),
            _ => 8,
        }
    }
    map.iter().map(|(k, v)| k.len() + of(v)).sum()
}

/// A writer that takes `limit` bytes and no more.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let room = self.limit - self.bytes.len();
        let taken = data.len().min(room);
        self.bytes.extend_from_slice(&data[..taken]);
        // Zero bytes taken is an error for write_all.
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
