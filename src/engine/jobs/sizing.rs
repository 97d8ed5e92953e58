//! How much a job may run at once: sequences, KV room and context, from a look at its rows.

use std::collections::BinaryHeap;

use super::BatchJob;
use super::input::Source;
use super::request::{Rules, TextTools};
use super::scan::{State, parse_line};
use crate::error::Result;
use crate::model::kv::{BLOCK_TOKENS, block_bytes};
use crate::spec::ModelSpec;

/// Rows looked at, spread evenly over the input, and as many of the longest.
const SAMPLED_ROWS: usize = 128;
/// Sequences at once where nobody says otherwise.
const DEFAULT_SEQUENCES: usize = 256;

/// What rows look like, from some of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowSample {
    /// Prompt and longest possible answer of a sequence, on average.
    pub mean_tokens: f64,
    pub longest_tokens: usize,
    /// Sequences a row stands for (its `n`), on average.
    pub choices: f64,
}

/// What to open an engine with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizing {
    pub sequences: usize,
    pub kv_tokens: usize,
    pub context: usize,
    /// What a row takes at most, on average: prompts and answers of all its choices.
    pub row_tokens: usize,
}

/// What the user asked for, and what there is.
#[derive(Clone, Copy, Debug)]
pub struct SizingInput {
    pub sequences: Option<usize>,
    pub kv_bytes: Option<u64>,
    /// Where `kv_bytes` is not given: one part in so many of the budget, or more where all weights fit beside it.
    pub kv_share: u64,
    pub context: Option<usize>,
    /// Bytes this process may take in all.
    pub budget: u64,
    /// Bytes of all weights.
    pub weights: u64,
    pub element_bytes: usize,
    /// Rows to do.
    pub rows: u64,
}

impl BatchJob {
    /// Looks at some of the rows that remain. Bad rows are passed over.
    pub fn sample(&self, text: &TextTools<'_>) -> Result<RowSample> {
        let open = |i: &usize| self.scan.marks[*i].state == State::Pending;
        let all: Vec<usize> = (0..self.scan.marks.len()).filter(open).collect();
        let stride = all.len().div_ceil(SAMPLED_ROWS).max(1);
        let chosen: Vec<usize> = all.iter().copied().step_by(stride).collect();
        let mut sample = sample(&self.spec.source, &self.spec.rules, text, &chosen)?;
        // A short row may ask for the longest answer of all.
        let asked = self.scan.longest_answer;
        sample.longest_tokens = sample.longest_tokens.max(asked);
        Ok(sample)
    }
}

/// Parses the rows at `chosen` (sorted indices) and the longest rows of the file by bytes.
fn sample(
    source: &Source,
    rules: &Rules,
    text: &TextTools<'_>,
    chosen: &[usize],
) -> Result<RowSample> {
    let mut lines = source.lines()?;
    let mut chosen = chosen.iter().copied().peekable();
    let mut longest: BinaryHeap<std::cmp::Reverse<(usize, Vec<u8>, u64)>> = BinaryHeap::new();
    let mut sizes: Vec<(usize, u32)> = Vec::new();
    let mut longest_tokens = 0;
    let measure = |line: &super::input::Line| -> Option<(usize, u32)> {
        let request = parse_line(source, line, 0).request.ok()?;
        let body = request.body(rules, text).ok()?;
        Some((body.prompt.len() + body.max_tokens, body.choices))
    };
    let mut index = 0;
    // Long rows are kept while the file is read: at most a few megabytes, for a row that would fill memory is no sample.
    const KEPT_ROWS: usize = 16;
    const KEPT_BYTES: usize = 1 << 20;
    while let Some(line) = lines.next_line()? {
        if chosen.next_if_eq(&index).is_some() {
            sizes.extend(measure(&line));
        } else if line.bytes.len() < KEPT_BYTES {
            let least = longest.peek().map_or(0, |r| r.0.0);
            if longest.len() < KEPT_ROWS || line.bytes.len() > least {
                longest.push(std::cmp::Reverse((
                    line.bytes.len(),
                    line.bytes,
                    line.number,
                )));
                if longest.len() > KEPT_ROWS {
                    longest.pop();
                }
            }
        }
        index += 1;
    }
    for std::cmp::Reverse((_, bytes, number)) in longest {
        let line = super::input::Line {
            number,
            bytes,
            too_long: false,
        };
        longest_tokens = longest_tokens.max(measure(&line).map_or(0, |(n, _)| n));
    }
    let n = sizes.len().max(1) as f64;
    let sequences: f64 = sizes.iter().map(|(_, c)| f64::from(*c)).sum();
    let tokens: f64 = sizes.iter().map(|(t, c)| *t as f64 * f64::from(*c)).sum();
    Ok(RowSample {
        mean_tokens: tokens / sequences.max(1.0),
        longest_tokens: sizes
            .iter()
            .map(|(t, _)| *t)
            .fold(longest_tokens, usize::max),
        choices: (sequences / n).max(1.0),
    })
}

impl Sizing {
    /// A deep queue: memory goes to KV and to sequences before it goes to weights. What the user asked for is taken as it is.
    /// The context is the model's own: it costs nothing, and were it chosen by what memory holds or by the rows that happen
    /// to remain, a long answer would end elsewhere in a resumed job than in a whole one.
    pub fn choose(spec: &ModelSpec, sample: &RowSample, i: &SizingInput) -> Sizing {
        let token_bytes = block_bytes(spec.layers, spec.kv_heads, spec.head_size, i.element_bytes)
            / BLOCK_TOKENS as u64;
        let room = (i.budget / i.kv_share.max(1)).max(i.budget.saturating_sub(i.weights) / 2);
        let kv_room = i.kv_bytes.unwrap_or(room) / token_bytes.max(1);
        let context = i.context.unwrap_or(spec.max_positions);
        let context = context.clamp(2, spec.max_positions.max(2));
        let sequences = i.sequences.unwrap_or_else(|| {
            let there_are = (i.rows as f64 * sample.choices).ceil() as usize;
            let mut n = DEFAULT_SEQUENCES.min(there_are);
            // Whole rows of logits are kept for the sampler.
            while n > 1 && (n * spec.vocab * 4) as u64 > i.budget / 8 {
                n /= 2;
            }
            n
        });
        let sequences = sequences.max(1);
        let wanted = (sequences as f64 * sample.mean_tokens * 1.1) as usize;
        let longest = sample.longest_tokens.min(context);
        let kv_tokens = match i.kv_bytes {
            Some(_) => kv_room as usize,
            None => wanted.max(longest).min(kv_room as usize),
        };
        Sizing {
            sequences,
            kv_tokens: kv_tokens.max(BLOCK_TOKENS),
            context,
            row_tokens: (sample.mean_tokens * sample.choices).ceil() as usize,
        }
    }
}
