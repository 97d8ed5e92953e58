//! How large a row may be, so that reading it stays within the memory there is.

use super::input::{Line, MAX_ROW_BYTES};
use super::scan::Scan;

/// Memory that tokenizing takes for each byte of a text, at most.
const ENCODE_BYTES: u64 = 220;
/// Copies of a row that there are at once while it is read: the line and its JSON, or that and what is taken out of it.
const ROW_COPIES: u64 = 2;
/// Copies of a row's text besides: what a template sees, what it writes.
const TEXT_COPIES: u64 = 2;
/// A row may have one part in so many of the free memory: it is there several times, and the rest is for weights, KV and pictures.
pub const ROW_SHARE: u64 = 6;
/// Reading that no budget has to know of: it is part of every budget's slack.
const SLACK_BYTES: u64 = 4 << 20;
/// Bytes of text for each token of the context that are tokenized whatever the budget: few texts have more.
const TOKEN_BYTES: usize = 8;
const LEAST_TEXT_BYTES: usize = 16 << 10;
const LEAST_ROW_BYTES: u64 = 1 << 20;

/// Bounds on rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLimits {
    /// Tokens of a prompt: the context.
    pub context: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Bytes of a prompt's text.
    pub text_bytes: usize,
}

impl RowLimits {
    /// Of a process that may take `budget` bytes, of which `room` are free.
    pub fn within(context: usize, budget: u64, room: u64) -> RowLimits {
        let row = (room / ROW_SHARE).max(LEAST_ROW_BYTES);
        let text = (budget / 16 / ENCODE_BYTES) as usize;
        RowLimits {
            context,
            row_bytes: usize::try_from(row)
                .unwrap_or(usize::MAX)
                .min(MAX_ROW_BYTES),
            text_bytes: text.max(usual_bytes(context)),
        }
    }

    /// Bytes of text from which on its tokens are first counted, about.
    pub fn usual_text_bytes(&self) -> usize {
        usual_bytes(self.context)
    }
}

fn usual_bytes(context: usize) -> usize {
    context.saturating_mul(TOKEN_BYTES).max(LEAST_TEXT_BYTES)
}

impl Default for RowLimits {
    /// What no row exceeds, in a process of any size.
    fn default() -> RowLimits {
        RowLimits {
            context: usize::MAX,
            row_bytes: MAX_ROW_BYTES,
            text_bytes: usize::MAX,
        }
    }
}

/// The largest rows of a job, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Largest {
    /// Of a row that is read.
    pub row: usize,
    /// Of all strings of a row but inline pictures.
    pub text: usize,
    /// Of those that are tokenized whole.
    pub encoded: usize,
}

impl Largest {
    pub(super) fn add(&mut self, line: &Line, text: usize, limits: &RowLimits) {
        // Of what is passed over, so much is held once, until it is known to be too long.
        let row = match line.too_long {
            Some(_) => limits.row_bytes / ROW_COPIES as usize,
            None => line.bytes.len(),
        };
        self.row = self.row.max(row);
        self.text = self.text.max(text);
        if text <= limits.text_bytes {
            self.encoded = self.encoded.max(text);
        }
    }
}

impl Scan {
    /// Memory that reading the largest row takes for a moment, beside what every budget leaves for such things.
    pub fn reading_bytes(&self) -> u64 {
        let l = &self.largest;
        let copies = l.row as u64 * ROW_COPIES + l.text as u64 * TEXT_COPIES;
        (copies + l.encoded as u64 * ENCODE_BYTES).saturating_sub(SLACK_BYTES)
    }
}
