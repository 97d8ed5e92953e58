//! Looks a job over before it runs: every row parsed and counted, no model loaded.

use super::body::Body;
use super::input::Source;
use super::request::{RowError, RowIds, Rules, TextTools};
use super::scan::{Scan, State, parse_line};
use super::shard::Shard;
use crate::error::Result;
use crate::media::Measure;

/// What a job will take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    pub rows: u64,
    pub bad: u64,
    /// Sequences: a row's `n` counts.
    pub sequences: u64,
    pub prompt_tokens: u64,
    /// At most, with every answer as long as it may be.
    pub output_tokens: u64,
    pub longest_prompt: u64,
    /// Prompt and answer together.
    pub longest_row: u64,
    /// Images and videos, and what they come to: tokens of the prompts, patches through the vision tower.
    pub pictures: u64,
    pub picture_tokens: u64,
    pub patches: u64,
}

/// Parses and tokenizes every row of the shard. `context`: rows whose prompt fills it are bad. Each bad row is told to `bad`
/// with its line number. `progress(rows)` now and then.
///
/// # Errors
/// `Usage`: the file holds no rows; `Io`: it cannot be read.
pub fn check(
    source: &Source,
    shard: Shard,
    rules: &Rules,
    text: &TextTools<'_>,
    context: usize,
    bad: &mut dyn FnMut(u64, Option<&str>, &RowError),
    progress: &mut dyn FnMut(u64),
) -> Result<CheckReport> {
    source.expect_rows()?;
    let ids = RowIds::default();
    let limits = &text.limits;
    let scan = Scan::read(source, shard, ids, limits, &mut |_| {})?;
    let mut lines = source.lines_up_to(limits.row_bytes)?;
    let mut report = CheckReport::default();
    for mark in &scan.marks {
        let Some(line) = lines.next_line()? else {
            break;
        };
        if mark.state == State::Elsewhere {
            continue;
        }
        report.rows += 1;
        if report.rows.is_multiple_of(256) {
            progress(report.rows);
        }
        let (custom_id, counted) = match parse_line(source, &line, ids).request {
            Err((custom_id, e)) => (custom_id, Err(e)),
            Ok(request) if mark.state == State::Duplicate => {
                let first = scan
                    .find(&request.custom_id)
                    .map_or(0, |i| scan.marks[i].line);
                let message = format!("the custom_id is already on line {first}");
                let e = RowError::about("duplicate_custom_id", "custom_id", message);
                (Some(request.custom_id), Err(e))
            }
            Ok(request) => {
                let custom_id = request.custom_id.clone();
                let counted = request
                    .body(rules, text)
                    .and_then(|b| Row::of(&b, text))
                    .and_then(|row| fits(row.prompt, context).map(|()| row));
                (Some(custom_id), counted)
            }
        };
        match counted {
            Ok(row) => {
                let prompt = row.prompt as u64;
                let answer = row.max_tokens.min(context - row.prompt) as u64;
                let n = u64::from(row.choices);
                report.pictures += row.pictures.len() as u64;
                for picture in &row.pictures {
                    report.picture_tokens += picture.tokens as u64;
                    report.patches += picture.grid.patches() as u64;
                }
                report.sequences += n;
                report.prompt_tokens += prompt;
                report.output_tokens += answer * n;
                report.longest_prompt = report.longest_prompt.max(prompt);
                report.longest_row = report.longest_row.max(prompt + answer);
            }
            Err(e) => {
                report.bad += 1;
                bad(line.number, custom_id.as_deref(), &e);
            }
        }
    }
    Ok(report)
}

/// What is counted of a row.
struct Row {
    prompt: usize,
    max_tokens: usize,
    choices: u32,
    pictures: Vec<Measure>,
}

impl Row {
    fn of(body: &Body, text: &TextTools<'_>) -> Result<Row, RowError> {
        let (prompt, pictures) = match text.looker {
            Some(looker) => {
                let m = looker.measure(body)?;
                (m.prompt_tokens, m.pictures)
            }
            None => (body.prompt.len(), Vec::new()),
        };
        Ok(Row {
            prompt,
            max_tokens: body.max_tokens,
            choices: body.choices,
            pictures,
        })
    }
}

fn fits(prompt: usize, context: usize) -> Result<(), RowError> {
    match prompt {
        0 => Err(RowError::new("invalid_prompt", "the prompt has no tokens")),
        n if n >= context => Err(RowError::new(
            "invalid_prompt",
            format!("the prompt has {n} tokens, the context holds {context}"),
        )),
        _ => Ok(()),
    }
}
