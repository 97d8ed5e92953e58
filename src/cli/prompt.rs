//! Where a prompt comes from, and how messages become token ids.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::error::{Code, Error, Result};
use crate::text::{ChatTemplate, Message, RenderOptions, Tokenizer};
use crate::units::human_bytes;

/// Most bytes a prompt file or standard input may have: more than any context holds.
const MAX_PROMPT_BYTES: u64 = 256 << 20;

#[derive(Args, Clone, Debug)]
pub struct PromptOptions {
    /// The prompt
    #[arg(long, short = 'p', value_name = "TEXT", conflicts_with_all = ["prompt_file", "messages"], help_heading = "Prompt")]
    pub prompt: Option<String>,
    /// A file with the prompt; - is standard input
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "messages",
        help_heading = "Prompt"
    )]
    pub prompt_file: Option<PathBuf>,
    /// A JSON file: a list of {"role", "content"}
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "raw",
        help_heading = "Prompt"
    )]
    pub messages: Option<PathBuf>,
    /// A system message before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["messages", "raw"], help_heading = "Prompt")]
    pub system: Option<String>,
    /// Send the text as it is, without the chat template
    #[arg(long, env = "TENSORPAGER_RAW", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Prompt")]
    pub raw: bool,
}

/// What the user asked to be answered.
pub enum Prompt {
    Text(String),
    Messages(Vec<Message>),
    /// Nothing given, and a person at the terminal.
    Chat,
}

impl PromptOptions {
    pub fn read(&self) -> Result<Prompt> {
        if let Some(text) = &self.prompt {
            return Ok(Prompt::Text(text.clone()));
        }
        if let Some(path) = &self.messages {
            let text = read_text(path)?;
            let messages: Vec<Message> = serde_json::from_str(&text).map_err(|e| {
                Error::new(
                    Code::Usage,
                    format!("{} is not a list of messages", path.display()),
                    e.to_string(),
                    "write [{\"role\": \"user\", \"content\": \"…\"}]",
                )
            })?;
            return Ok(Prompt::Messages(messages));
        }
        if let Some(path) = &self.prompt_file {
            return Ok(Prompt::Text(read_text(path)?));
        }
        if std::io::stdin().is_terminal() {
            return Ok(Prompt::Chat);
        }
        let text = read_text(Path::new("-"))?;
        if text.trim().is_empty() {
            return Err(Error::new(
                Code::Usage,
                "there is no prompt",
                "none was given, and standard input holds none and is no terminal to chat at",
                "give --prompt, --prompt-file or --messages, or text on standard input",
            ));
        }
        Ok(Prompt::Text(text))
    }
}

fn read_text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin()
            .lock()
            .take(MAX_PROMPT_BYTES + 1)
            .read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|f| f.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes))
    };
    read.map_err(|e| {
        let error = Error::io(format!("{} cannot be read", path.display()), &e);
        match path.to_string_lossy().trim_start().starts_with(['[', '{']) {
            true => error.with_fix(
                "put the JSON into a file and give its name, or - and the JSON on standard input",
            ),
            false => error,
        }
    })?;
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        return Err(Error::new(
            Code::Usage,
            format!("{} is too large for a prompt", path.display()),
            format!("a prompt has at most {}", human_bytes(MAX_PROMPT_BYTES)),
            "give a shorter one",
        ));
    }
    String::from_utf8(bytes).map_err(|e| {
        Error::new(
            Code::Usage,
            format!("{} is not UTF-8 text", path.display()),
            format!(
                "byte {} does not belong to any character",
                e.utf8_error().valid_up_to()
            ),
            "convert it (iconv -t UTF-8) and try again",
        )
    })
}

/// Messages → text by the model's template (which writes its own special tokens) → ids.
pub fn render(
    messages: &[Message],
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> Result<Vec<u32>> {
    let text = template.render(
        messages,
        &RenderOptions {
            add_generation_prompt: true,
            ..RenderOptions::default()
        },
    )?;
    tokenizer.encode(&text, false)
}
