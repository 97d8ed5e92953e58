//! Looks a job over before it runs: every row parsed and counted, no model loaded.

use super::body::Body;
use super::input::Source;
use super::request::{RowError, RowIds, Rules, TextTools};
use super::scan::{Scan, State, parse_line};
use super::shapes::{Shape, Shapes};
use super::shard::Shard;
use super::sizing::RowSample;
use crate::error::Result;
use crate::media::Measure;
use crate::model::kv::BLOCK_TOKENS;

/// What a job will take.
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// Patches that each patch of a picture may look at, summed: those of its image or frame pair.
    pub patch_pairs: u64,
    /// Of the good rows.
    pub shapes: Shapes,
    /// What an engine for them is sized by.
    pub sample: RowSample,
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
    let mut seen = Seen::default();
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
                    .and_then(|b| Row::of(b, text))
                    .and_then(|row| fits(row.prompt, context).map(|()| row));
                (Some(custom_id), counted)
            }
        };
        match counted {
            Ok(row) => seen.count(&mut report, row, context),
            Err(e) => {
                report.bad += 1;
                bad(line.number, custom_id.as_deref(), &e);
            }
        }
    }
    seen.sample(&mut report, &scan);
    Ok(report)
}

/// What is remembered from row to row.
#[derive(Default)]
struct Seen {
    good: u64,
    /// Prompts and answers as the rows ask for them, of all sequences.
    tokens: f64,
    /// The last row's prompt.
    prompt: Vec<u32>,
}

impl Seen {
    fn count(&mut self, report: &mut CheckReport, row: Row, context: usize) {
        let prompt = row.prompt as u64;
        let answer = row.max_tokens.min(context - row.prompt);
        let n = u64::from(row.choices);
        report.pictures += row.pictures.len() as u64;
        for picture in &row.pictures {
            let patches = picture.grid.patches() as u64;
            report.picture_tokens += picture.tokens as u64;
            report.patches += patches;
            report.patch_pairs += patches * picture.grid.slice() as u64;
        }
        report.sample.pictures.add(&row.pictures);
        report.sequences += n;
        report.prompt_tokens += prompt;
        report.output_tokens += answer as u64 * n;
        report.longest_prompt = report.longest_prompt.max(prompt);
        report.longest_row = report.longest_row.max(prompt + answer as u64);
        let longest = &mut report.sample.longest_tokens;
        // As `batch` counts; a row may ask for more than any number holds.
        let tokens = row.prompt.saturating_add(row.max_tokens);
        *longest = (*longest).max(tokens);
        self.good += 1;
        self.tokens += n as f64 * tokens as f64;
        // The last token of a prompt is computed in any case.
        let whole = row.prompt.saturating_sub(1) / BLOCK_TOKENS;
        let common = self.prompt.iter().zip(&row.ids);
        let common = common.take_while(|(a, b)| a == b).count() / BLOCK_TOKENS;
        for choice in 0..row.choices {
            report.shapes.push(Shape {
                prompt: row.prompt,
                shared_blocks: match choice {
                    0 => common.min(whole),
                    _ => whole,
                },
                answer,
            });
        }
        self.prompt = row.ids;
    }

    fn sample(&self, report: &mut CheckReport, scan: &Scan) {
        let sample = &mut report.sample;
        sample.mean_tokens = self.tokens / report.sequences.max(1) as f64;
        sample.choices = (report.sequences as f64 / self.good.max(1) as f64).max(1.0);
        // As `batch` has it: a row that is bad now may be good then.
        sample.longest_tokens = sample.longest_tokens.max(scan.longest_answer);
        sample.reading_bytes = scan.reading_bytes();
    }
}

/// What is counted of a row.
struct Row {
    prompt: usize,
    /// The prompt, where other rows may begin with the same; with pictures it is not looked into.
    ids: Vec<u32>,
    max_tokens: usize,
    choices: u32,
    pictures: Vec<Measure>,
}

impl Row {
    fn of(body: Body, text: &TextTools<'_>) -> Result<Row, RowError> {
        let (prompt, pictures) = match text.looker {
            Some(looker) => {
                let m = looker.measure(&body)?;
                (m.prompt_tokens, m.pictures)
            }
            None => (body.prompt.len(), Vec::new()),
        };
        Ok(Row {
            prompt,
            max_tokens: body.max_tokens(prompt)?,
            choices: body.choices,
            ids: match pictures.is_empty() {
                true => body.prompt,
                false => Vec::new(),
            },
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
