//! The chat: a prompt at a terminal. Each turn renders the whole conversation and reads it anew, in one pass if it fits.

use std::io::Write;

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::generate::generate;
use super::prompt::render;
use crate::engine::{Engine, Job};
use crate::error::{Code, Error, Result};
use crate::text::{ChatTemplate, Message, StopStrings, Tokenizer};

/// Tokens a chat may grow to where nobody says.
pub const DEFAULT_CONTEXT: usize = 4096;

const HELP: &str = "/reset forgets the conversation, /exit (or Ctrl-D) leaves";

/// Reads lines until the user leaves. `like` carries sampling, stop tokens and the answer's length.
pub fn chat(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    like: Job,
    stops: StopStrings,
    system: Option<&str>,
) -> Result<u8> {
    let mut editor = DefaultEditor::new().map_err(|e| terminal(&e))?;
    eprintln!("{HELP}");
    let start: Vec<Message> = system
        .map(|s| Message::new("system", s))
        .into_iter()
        .collect();
    let mut messages = start.clone();
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(0),
            Err(e) => return Err(terminal(&e)),
        };
        match line.trim() {
            "" => continue,
            "/exit" => return Ok(0),
            "/reset" => {
                messages.clone_from(&start);
                continue;
            }
            "/help" => {
                eprintln!("{HELP}");
                continue;
            }
            _ => {}
        }
        let _ = editor.add_history_entry(&line);
        let prompt = match template {
            Some(template) => {
                messages.push(Message::new("user", &line));
                render(&messages, tokenizer, template)?
            }
            None => tokenizer.encode(&line, true)?,
        };
        let job = Job {
            prompt,
            ..like.clone()
        };
        let answer = generate(engine, tokenizer, job, stops.clone(), &mut |_, _| {}, &mut |t| {
            print!("{t}");
            let _ = std::io::stdout().flush();
        });
        println!();
        match answer {
            Ok(answer) => messages.push(Message::new("assistant", &answer.text)),
            // A prompt that outgrew the context is the user's to shorten; the chat goes on.
            Err(e) if e.code() == Code::Usage => {
                eprintln!("{e}");
                messages.pop();
            }
            Err(e) => return Err(e),
        }
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
