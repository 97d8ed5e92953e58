//! One answer, from prompt tokens to streamed text: what `run`, the chat and `demo` share.

use std::time::{Duration, Instant};

use crate::engine::{Engine, EngineStats, Event, FinishReason, Job, JobId, Stage};
use crate::error::Result;
use crate::report::progress::Prefill;
use crate::text::{GenerationConfig, StopMatcher, StopStrings, TokenStream, Tokenizer};

/// Tokens generated where neither the user nor the model says how many.
pub(super) const DEFAULT_MAX_TOKENS: usize = 512;

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

/// Runs `job` to its end, giving `emit` each piece of text that is certain to belong to the answer. `prefill` hears,
/// unit by unit, how far the prompt is while there is no first token yet. After an error the engine holds nothing of the job any more.
pub fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    job: Job,
    stops: StopStrings,
    prefill: &mut dyn FnMut(&Prefill),
    emit: &mut dyn FnMut(&str),
) -> Result<Answer> {
    let mut stream = TokenStream::after(tokenizer, true, &job.prompt)?;
    let prompt_tokens = job.prompt.len();
    let id = engine.submit(job)?;
    let answer = answered(engine, id, prompt_tokens, &mut stream, stops, prefill, emit);
    if answer.is_err() {
        engine.cancel(id);
    }
    answer
}

fn answered(
    engine: &mut Engine,
    id: JobId,
    prompt_tokens: usize,
    stream: &mut TokenStream,
    stops: StopStrings,
    prefill: &mut dyn FnMut(&Prefill),
    emit: &mut dyn FnMut(&str),
) -> Result<Answer> {
    let started = Instant::now();
    let before = engine.stats();
    let mut matcher = StopMatcher::new(stops);
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
    let mut at = Prefill {
        tokens: prompt_tokens,
        done: 0,
        rows: 0,
        unit: 0,
        units: engine.units_of_a_pass(),
        pictures: None,
    };
    while engine.pending() > 0 {
        events.clear();
        let waiting = at_first.is_none();
        if waiting {
            at.rows = engine.next_pass_rows().min(prompt_tokens - at.done);
            at.unit = 0;
            prefill(&at);
        }
        engine.step_watched(&mut events, &mut |stage, unit, units| {
            if !waiting {
                return;
            }
            match stage {
                Stage::Pictures => at.pictures = Some((unit, units)),
                Stage::Layers => (at.unit, at.units, at.pictures) = (unit, units, None),
            }
            prefill(&at);
        })?;
        if waiting {
            let rows = (engine.stats().rows - before.rows) as usize;
            at.done = rows.min(prompt_tokens);
            at.unit = 0;
            prefill(&at);
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

/// Answers differ from transformers' where it follows what is not followed here: that is said.
pub(super) fn warn_of_unheeded(generation: &GenerationConfig, quiet: bool) {
    if !quiet && !generation.unheeded.is_empty() {
        eprintln!(
            "warning: generation_config.json sets {}, which is not followed here: answers may differ from transformers'",
            generation.unheeded.join(", ")
        );
    }
}
