//! One answer, from prompt tokens to streamed text: what `run`, the chat and `demo` share.

use std::time::{Duration, Instant};

use crate::engine::{Engine, EngineStats, Event, FinishReason, Job};
use crate::error::Result;
use crate::text::{StopMatcher, StopStrings, TokenStream, Tokenizer};

/// A finished answer and what it cost.
pub struct Answer {
    pub tokens: Vec<u32>,
    pub text: String,
    pub reason: FinishReason,
    pub to_first_token: Duration,
    /// First token to last.
    pub decode: Duration,
    /// The passes after the first token.
    pub during_decode: EngineStats,
    /// All passes.
    pub during_all: EngineStats,
}

/// Runs `job` to its end, giving `emit` each piece of text that is certain to belong to the answer. `prefill(done, of)`
/// hears of prompt tokens while there is no first token yet.
pub fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    job: Job,
    stops: StopStrings,
    prefill: &mut dyn FnMut(usize, usize),
    emit: &mut dyn FnMut(&str),
) -> Result<Answer> {
    let started = Instant::now();
    let before = engine.stats();
    let prompt_tokens = job.prompt.len();
    let mut stream = TokenStream::after(tokenizer, true, &job.prompt)?;
    let mut matcher = StopMatcher::new(stops);
    let id = engine.submit(job)?;
    let mut events = Vec::new();
    let mut answer = Answer {
        tokens: Vec::new(),
        text: String::new(),
        reason: FinishReason::Length,
        to_first_token: Duration::ZERO,
        decode: Duration::ZERO,
        during_decode: EngineStats::default(),
        during_all: EngineStats::default(),
    };
    let mut at_first: Option<(Instant, EngineStats)> = None;
    let mut last = started;
    let (mut fresh, mut piece) = (String::new(), String::new());
    prefill(0, prompt_tokens);
    while engine.pending() > 0 {
        events.clear();
        engine.step(&mut events)?;
        if at_first.is_none() {
            let rows = (engine.stats().rows - before.rows) as usize;
            prefill(rows.min(prompt_tokens), prompt_tokens);
        }
        for event in &events {
            match event {
                Event::Token { token, .. } => {
                    last = Instant::now();
                    at_first.get_or_insert_with(|| (last, engine.stats()));
                    answer.tokens.push(*token);
                    fresh.clear();
                    stream.push(*token, &mut fresh)?;
                    piece.clear();
                    let hit = matcher.push(&fresh, &mut piece);
                    answer.text.push_str(&piece);
                    emit(&piece);
                    if hit {
                        answer.reason = FinishReason::Stop;
                        engine.cancel(id);
                    }
                }
                Event::Finished { reason, .. } => answer.reason = *reason,
                Event::Failed { error, .. } => return Err(error.clone()),
            }
        }
    }
    if matcher.matched().is_none() {
        fresh.clear();
        stream.finish(&mut fresh)?;
        piece.clear();
        matcher.push(&fresh, &mut piece);
        matcher.finish(&mut piece);
        answer.text.push_str(&piece);
        emit(&piece);
    }
    let end = engine.stats();
    answer.during_all = end.since(&before);
    if let Some((first, stats)) = at_first {
        answer.to_first_token = first - started;
        answer.decode = last - first;
        answer.during_decode = end.since(&stats);
    }
    Ok(answer)
}
