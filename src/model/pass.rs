//! What one traversal of the layers works on: any mix of prompts, prompt chunks and decode steps.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::planted::{self, Bug};

/// One sequence's tokens in a pass. Its rows are contiguous: segment after segment, in order.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Index in its sequence of the first token here: what lies before is in the KV cache already.
    pub start: u32,
    /// Tokens of this segment.
    pub len: u32,
    /// KV blocks of the whole sequence, these tokens included.
    pub table: Vec<u32>,
    /// The last `logits` rows of the segment are wanted (1 to generate, `len` to score, 0 for a chunk in the middle).
    pub logits: u32,
}

/// Embedding rows that were computed rather than looked up: a picture's.
#[derive(Debug, Default)]
pub struct Embeddings {
    /// Width of a row: the decoder's hidden size.
    pub cols: usize,
    /// `[rows, cols]`
    pub values: Vec<f32>,
}

impl Embeddings {
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.cols).unwrap_or(0)
    }
}

/// Rows of the pass that take their embeddings from here, in place of the table's.
#[derive(Clone, Debug)]
pub struct Given {
    /// First such row of the pass.
    pub row: usize,
    pub rows: usize,
    pub from: Arc<Embeddings>,
    /// First row of `from`.
    pub first: usize,
}

/// One traversal of all units for a ragged batch. Built anew each pass; its vectors are reused.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// One id a row.
    pub tokens: Vec<u32>,
    /// t, h, w a row; text has all three equal.
    pub positions: Vec<[u32; 3]>,
    pub segments: Vec<Segment>,
    /// Ascending by row, apart from one another. The tokens of such rows are placeholders.
    pub given: Vec<Given>,
}

impl Pass {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.segments.clear();
        self.given.clear();
    }

    /// Appends text tokens of one sequence whose first one has index and position `start`.
    pub fn push_text(&mut self, tokens: &[u32], start: usize, table: &[u32], logits: usize) {
        let too_far = usize::from(start > 0 && planted::is(Bug::RopeOffByOne));
        let positions = (start..start + tokens.len()).map(|p| [(p + too_far) as u32; 3]);
        self.push(tokens, positions, start, table, logits);
    }

    /// As [`Pass::push_text`], with a position for each token.
    pub fn push(
        &mut self,
        tokens: &[u32],
        positions: impl Iterator<Item = [u32; 3]>,
        start: usize,
        table: &[u32],
        logits: usize,
    ) {
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(positions);
        self.segments.push(Segment {
            start: start as u32,
            len: tokens.len() as u32,
            table: table.to_vec(),
            logits: logits as u32,
        });
    }

    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows whose embeddings are looked up, in order.
    pub fn looked_up(&self) -> impl Iterator<Item = usize> + '_ {
        let mut given = self.given.iter().peekable();
        (0..self.rows()).filter(move |row| {
            while given.next_if(|g| g.row + g.rows <= *row).is_some() {}
            given.peek().is_none_or(|g| *row < g.row)
        })
    }

    /// Row indices whose logits are wanted, in order.
    pub fn wanted_rows(&self) -> impl Iterator<Item = usize> + '_ {
        let mut first = 0usize;
        self.segments.iter().flat_map(move |s| {
            let end = first + s.len as usize;
            first = end;
            end - s.logits as usize..end
        })
    }

    pub fn wanted(&self) -> usize {
        self.segments.iter().map(|s| s.logits as usize).sum()
    }

    /// Catches a scheduler's mistake before it becomes a wrong token.
    pub fn check(&self, vocab: usize, kv_blocks: usize) -> Result<()> {
        let mut behind = 0;
        for g in &self.given {
            if g.row < behind || g.row + g.rows > self.rows() || g.first + g.rows > g.from.rows() {
                return Err(Error::internal(
                    "given embeddings that do not fit their pass",
                ));
            }
            behind = g.row + g.rows;
        }
        let rows: usize = self.segments.iter().map(|s| s.len as usize).sum();
        if rows != self.tokens.len() || rows != self.positions.len() {
            return Err(Error::internal(
                "a pass whose segments do not cover its rows",
            ));
        }
        for s in &self.segments {
            let tokens = (s.start + s.len) as usize;
            if s.logits > s.len
                || tokens > s.table.len() * super::kv::BLOCK_TOKENS
                || s.table.iter().any(|b| *b as usize >= kv_blocks)
            {
                return Err(Error::internal("a segment outside its KV blocks"));
            }
        }
        if let Some(t) = self.tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::new(
                crate::error::Code::Text,
                format!("token id {t} is outside the vocabulary"),
                format!("the model's embedding has {vocab} rows"),
                "use the tokenizer that belongs to this model",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_rows_are_the_tails_of_their_segments() {
        let mut p = Pass::default();
        p.push_text(&[1, 2, 3], 0, &[0], 1);
        p.push_text(&[4], 7, &[1], 1);
        p.push_text(&[5, 6], 0, &[2], 0);
        p.push_text(&[7, 8], 0, &[3], 2);
        assert_eq!(p.wanted_rows().collect::<Vec<_>>(), [2, 3, 6, 7]);
        assert_eq!(p.wanted(), 4);
        assert!(p.check(9, 4).is_ok());
        assert!(p.check(8, 4).is_err(), "token 8 has no row");
        assert!(p.check(9, 3).is_err(), "block 3 does not exist");
    }

    #[test]
    fn given_rows_are_not_looked_up() {
        let mut p = Pass::default();
        p.push_text(&[1; 8], 0, &[0], 1);
        let from = Arc::new(Embeddings {
            cols: 2,
            values: vec![0.0; 6],
        });
        let given = |row, rows, first| Given {
            row,
            rows,
            from: from.clone(),
            first,
        };
        p.given = vec![given(0, 2, 1), given(2, 1, 0), given(5, 2, 0)];
        assert_eq!(p.looked_up().collect::<Vec<_>>(), [3, 4, 7]);
        assert!(p.check(9, 4).is_ok());
        for wrong in [given(7, 2, 0), given(4, 1, 0), given(7, 1, 3)] {
            let mut bad = p.clone();
            bad.given.push(wrong);
            assert!(bad.check(9, 4).is_err());
        }
    }
}
