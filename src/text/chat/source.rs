//! Where a model's chat templates lie, and which one is meant.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use crate::text::tokenizer::Special;
use crate::text::{read_json, read_text};

/// The longest published templates have a few tens of kilobytes.
const MAX_BYTES: u64 = 1 << 20;
const MAX_CONFIG_BYTES: u64 = 256 << 20;
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Names and spellings of special tokens: `bos_token`, `<s>`.
pub(super) type Tokens = Vec<(String, String)>;

/// Named templates and the file they come from.
#[derive(Clone, Debug)]
pub(super) struct Sources {
    place: String,
    templates: Vec<(String, String)>,
}

impl Sources {
    pub(super) fn single(text: &str, place: &str) -> Sources {
        Sources::new(place.into(), vec![(DEFAULT.into(), text.into())])
    }

    fn new(place: String, mut templates: Vec<(String, String)>) -> Sources {
        for (_, text) in &mut templates {
            *text = prepare(text);
        }
        Sources { place, templates }
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.templates.iter().map(|(n, t)| (n.as_str(), t.as_str()))
    }

    /// As transformers chooses: `tool_use` where tools are given and such a template is there, else `default`.
    pub(super) fn choose(&self, tools: bool) -> Result<(&str, &str)> {
        let find = |name: &str| self.all().find(|(n, _)| *n == name);
        tools
            .then(|| find(TOOL_USE))
            .flatten()
            .or_else(|| find(DEFAULT))
            .ok_or_else(|| {
                let names: Vec<&str> = self.all().map(|(n, _)| n).collect();
                Error::new(
                    Code::Text,
                    format!("{} has no chat template named `{DEFAULT}`", self.place),
                    format!("its templates are: {}", names.join(", ")),
                    "send the text as it is with --raw",
                )
            })
    }
}

/// The templates of a model folder, if any, and the special tokens they may name.
pub(super) fn load(dir: &Path) -> Result<(Option<Sources>, Tokens)> {
    let object = |name: &str| -> Result<Map<String, Value>> {
        let json = read_json(&dir.join(name), MAX_CONFIG_BYTES)?;
        Ok(match json {
            Some(Value::Object(map)) => map,
            _ => Map::new(),
        })
    };
    let config = object("tokenizer_config.json")?;
    let legacy = object("special_tokens_map.json")?;
    let tokens = Special::read(&config, &legacy)
        .for_templates()
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();

    let files = template_files(dir)?;
    if !files.is_empty() {
        let place = dir.join("chat_template.jinja").display().to_string();
        return Ok((Some(Sources::new(place, files)), tokens));
    }
    let processor = object("chat_template.json")?;
    for (file, map) in [
        ("chat_template.json", &processor),
        ("tokenizer_config.json", &config),
    ] {
        let place = dir.join(file).display().to_string();
        if let Some(templates) = from_json(map.get("chat_template"), &place)? {
            return Ok((Some(Sources::new(place, templates)), tokens));
        }
    }
    Ok((None, tokens))
}

/// `chat_template.jinja` and `additional_chat_templates/NAME.jinja`.
fn template_files(dir: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    if let Some(text) = read_text(&dir.join("chat_template.jinja"), MAX_BYTES)? {
        found.push((DEFAULT.to_owned(), text));
    }
    let Ok(entries) = std::fs::read_dir(dir.join("additional_chat_templates")) else {
        return Ok(found);
    };
    let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().and_then(|n| n.to_str());
        let Some(name) = name.and_then(|n| n.strip_suffix(".jinja")) else {
            continue;
        };
        if let Some(text) = read_text(&path, MAX_BYTES)? {
            found.push((name.to_owned(), text));
        }
    }
    Ok(found)
}

/// A template as JSON files hold it: the text, a list of `{name, template}`, or an object of name → text.
fn from_json(value: Option<&Value>, place: &str) -> Result<Option<Vec<(String, String)>>> {
    let wrong = || {
        Error::new(
            Code::Text,
            format!("cannot use `chat_template` in {place}"),
            "it is neither a text nor a list of named templates",
            "send the text as it is with --raw, or copy the file again from the model's source",
        )
    };
    let named = |name: &str, text: Option<&Value>| {
        let text = text.and_then(Value::as_str).ok_or_else(wrong)?;
        Ok((name.to_owned(), text.to_owned()))
    };
    let templates: Vec<(String, String)> = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => vec![(DEFAULT.into(), text.clone())],
        Some(Value::Array(list)) => list
            .iter()
            .map(|t| {
                let name = t.get("name").and_then(Value::as_str).ok_or_else(wrong)?;
                named(name, t.get("template"))
            })
            .collect::<Result<_>>()?,
        Some(Value::Object(map)) => map
            .iter()
            .map(|(name, text)| named(name, Some(text)))
            .collect::<Result<_>>()?,
        Some(_) => return Err(wrong()),
    };
    if templates.iter().any(|(_, t)| t.len() as u64 > MAX_BYTES) {
        return Err(wrong());
    }
    Ok((!templates.is_empty()).then_some(templates))
}

/// What Jinja2 and transformers do to a template before or while reading it: line ends become `\n`; and the blocks
/// `{% generation %} … {% endgeneration %}`, which mark what an assistant said, become a scope of their own.
fn prepare(text: &str) -> String {
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    if !text.contains("generation") {
        return text;
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    let mut raw = false;
    while let Some(at) = rest.find("{%").into_iter().chain(rest.find("{#")).min() {
        let comment = !raw && rest[at..].starts_with("{#");
        let end = if comment { "#}" } else { "%}" };
        // Behind the two characters it begins with: `{%}` is no tag.
        let Some(len) = rest[at + 2..].find(end) else {
            break;
        };
        let (tag, after) = rest[at..].split_at(len + 4);
        out.push_str(&rest[..at]);
        let word =
            tag[2..tag.len() - 2].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let replacement = match word {
            _ if comment => None,
            "raw" => {
                raw = true;
                None
            }
            "endraw" => {
                raw = false;
                None
            }
            "generation" if !raw => Some("with"),
            "endgeneration" if !raw => Some("endwith"),
            _ => None,
        };
        match replacement {
            Some(new) => out.push_str(&tag.replacen(word, new, 1)),
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}
