//! The chat: a prompt at a terminal. Each turn renders the whole conversation and reads it anew, in one pass if it fits.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::generate::generate;
use super::prompt::render;
use super::signals::ChatSignals;
use crate::engine::{Engine, Job};
use crate::error::{Code, Error, Result};
use crate::report::progress::PrefillProgress;
use crate::report::summary::{answer_line, tokens_per_s};
use crate::text::{AnswerLength, ChatTemplate, Message, StopStrings, Tokenizer};

/// Tokens a chat may grow to where nobody says.
pub const DEFAULT_CONTEXT: usize = 4096;

const HELP: &str =
    "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends an answer";

/// What every turn of a chat has in common.
pub struct Chat<'a> {
    pub tokenizer: &'a Tokenizer,
    /// None: a model that continues text, which grows turn by turn.
    pub template: Option<&'a ChatTemplate>,
    /// Carries sampling and stop tokens.
    pub like: Job,
    pub length: AnswerLength,
    pub stops: StopStrings,
    pub system: Option<&'a str>,
    pub quiet: bool,
}

/// What was said so far.
struct Conversation {
    messages: Vec<Message>,
    /// The same as one text, for a model without a chat template.
    text: String,
}

/// Reads lines until the user leaves: 0, or 130 where Ctrl-C ended it.
pub fn chat(engine: &mut Engine, chat: &Chat<'_>, signals: &ChatSignals) -> Result<u8> {
    let mut editor = DefaultEditor::new().map_err(|e| terminal(&e))?;
    engine.pause_by(signals.turn.clone());
    if !chat.quiet {
        eprintln!("{HELP}");
        if chat.template.is_none() {
            eprintln!("without a chat template: the text so far is sent as it is, and continued");
        }
    }
    let start: Vec<Message> = chat
        .system
        .map(|s| Message::new("system", s))
        .into_iter()
        .collect();
    let mut said = Conversation {
        messages: start.clone(),
        text: String::new(),
    };
    loop {
        signals.turn.store(false, Relaxed);
        signals.at_prompt.store(true, SeqCst);
        // Asked in this order: of a signal that comes later whoever waits for one hears at the prompt.
        if signals.cancel.load(SeqCst) {
            return Ok(130);
        }
        let line = editor.readline("> ");
        signals.at_prompt.store(false, Relaxed);
        let line = match line {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => return Ok(130),
            // It may be the editor's call that the signal cut off.
            Err(_) if signals.turn.load(Relaxed) => return Ok(130),
            Err(ReadlineError::Eof) => return Ok(0),
            Err(e) => return Err(terminal(&e)),
        };
        match line.trim() {
            "" => continue,
            "/exit" => return Ok(0),
            "/reset" => {
                said.messages.clone_from(&start);
                said.text.clear();
                continue;
            }
            "/help" => {
                eprintln!("{HELP}");
                continue;
            }
            _ => {}
        }
        let _ = editor.add_history_entry(&line);
        match turn(engine, chat, &mut said, &line) {
            Ok(()) => {}
            // A prompt that outgrew the context is the user's to shorten; the chat goes on.
            Err(e) if e.code() == Code::Usage => eprintln!("{}", with_reset(&e, engine)),
            Err(e) if e.code() == Code::Interrupted && !signals.cancel.load(Relaxed) => {
                eprintln!("(interrupted)");
            }
            Err(e) => return Err(e),
        }
    }
}

/// One line and its answer. Of an answer that was interrupted, what came belongs to the conversation.
fn turn(engine: &mut Engine, chat: &Chat<'_>, said: &mut Conversation, line: &str) -> Result<()> {
    let before = said.text.len();
    let prompt = match chat.template {
        Some(template) => {
            said.messages.push(Message::new("user", line));
            render(&said.messages, chat.tokenizer, template)
        }
        None => {
            if !said.text.is_empty() {
                said.text.push('\n');
            }
            said.text += line;
            chat.tokenizer.encode(&said.text, true)
        }
    };
    let mut text = String::new();
    let answer = prompt.and_then(|prompt| {
        let tokens = prompt.len();
        let job = Job {
            max_tokens: chat.length.after(tokens)?,
            prompt,
            ..chat.like.clone()
        };
        let mut progress = PrefillProgress::new(chat.quiet);
        let answer = generate(
            engine,
            chat.tokenizer,
            job,
            chat.stops.clone(),
            &mut |at| progress.update(at),
            &mut |t| {
                text += t;
                // A closed pipe is met by the line's end below.
                let _ = super::run::print(t);
            },
        );
        answer.map(|answer| (tokens, answer))
    });
    if answer.is_ok() || !text.is_empty() {
        super::run::print("\n")?;
        said.text += &text;
        said.messages.push(Message::new("assistant", &text));
    } else {
        said.text.truncate(before);
        if chat.template.is_some() {
            said.messages.pop();
        }
    }
    let (tokens, answer) = answer?;
    if !chat.quiet {
        let rate = tokens_per_s(answer.tokens.len(), answer.decode);
        let first_s = answer.to_first_token.as_secs_f64();
        eprintln!(
            "({})",
            answer_line(tokens, answer.tokens.len(), first_s, rate)
        );
    }
    Ok(())
}

/// At the model's own limit a larger context is no way out.
fn with_reset(e: &Error, engine: &Engine) -> Error {
    let reset = "/reset forgets the conversation so far";
    let at_limit = engine.context() >= engine.spec().max_positions;
    match at_limit && e.fix().contains("--context") {
        true => e.clone().with_fix(reset),
        false => e.clone().with_fix(format!("{}; {reset}", e.fix())),
    }
}

fn terminal(e: &ReadlineError) -> Error {
    Error::new(
        Code::Io,
        "the terminal cannot be read",
        e.to_string(),
        "give a --prompt instead",
    )
}
