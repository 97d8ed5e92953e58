//! Logits at every position of given tokens: several inputs share a pass, long ones take several.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::pictures::{self, Pictures};
use super::{Engine, no_kv_room};
use crate::error::{Code, Error, Result};
use crate::media::Visual;
use crate::model::kv::KvTable;

/// Part of the logits of one input: `values` is `[rows, ids]`, row-major, float32.
pub struct ScoreBlock<'a> {
    /// Index of the input, in the order given.
    pub input: usize,
    pub first_row: usize,
    pub rows: usize,
    pub first_id: usize,
    pub ids: usize,
    pub values: &'a [f32],
}

struct Scoring<'t> {
    input: usize,
    tokens: &'t [u32],
    table: KvTable,
    pictures: Option<Pictures>,
}

/// Tokens to score, with the pictures among them.
#[derive(Clone, Debug, Default)]
pub struct ScoreInput {
    /// With every picture's placeholder repeated.
    pub tokens: Vec<u32>,
    pub media: Vec<Arc<Visual>>,
}

impl Engine {
    /// Streams the logits of all `inputs` into `sink`. Blocks of one input come in order of rows, and within the rows of
    /// a pass in order of ids; blocks of inputs that share a pass interleave. No job may be pending.
    pub fn score(
        &mut self,
        inputs: &[Vec<u32>],
        sink: &mut dyn FnMut(&ScoreBlock<'_>) -> Result<()>,
    ) -> Result<()> {
        let inputs: Vec<ScoreInput> = inputs
            .iter()
            .map(|tokens| ScoreInput {
                tokens: tokens.clone(),
                media: Vec::new(),
            })
            .collect();
        self.score_inputs(&inputs, sink)
    }

    /// As [`Engine::score`], for inputs that may hold pictures.
    pub fn score_inputs(
        &mut self,
        inputs: &[ScoreInput],
        sink: &mut dyn FnMut(&ScoreBlock<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut open: Vec<Scoring<'_>> = Vec::new();
        let result = self.score_into(inputs, sink, &mut open);
        // Whatever ended it, the KV blocks go back.
        for s in &mut open {
            self.scheduler.pool.release(&mut s.table);
        }
        result
    }

    fn score_into<'t>(
        &mut self,
        inputs: &'t [ScoreInput],
        sink: &mut dyn FnMut(&ScoreBlock<'_>) -> Result<()>,
        open: &mut Vec<Scoring<'t>>,
    ) -> Result<()> {
        for (i, input) in inputs.iter().enumerate() {
            self.check_input(i, &input.tokens)?;
        }
        let most = self.forward.max_tokens().min(self.forward.max_wanted());
        let mut next = 0;
        // (input, first row in the input, rows) of each segment of the pass
        let mut parts: Vec<(usize, usize, usize)> = Vec::new();
        while next < inputs.len() || !open.is_empty() {
            if self.cancel.load(Relaxed) {
                return Err(Error::interrupted());
            }
            self.scheduler.pass.clear();
            parts.clear();
            for s in open.iter_mut() {
                self.push_part(s, most, &mut parts)?;
            }
            while next < inputs.len() && self.scheduler.pass.rows() < most {
                let Some(pictures) = self.look_at(&inputs[next..])? else {
                    break;
                };
                let mut s = Scoring {
                    input: next,
                    tokens: &inputs[next].tokens,
                    table: KvTable::default(),
                    pictures,
                };
                if !self.push_part(&mut s, most, &mut parts)? {
                    break;
                }
                open.push(s);
                next += 1;
            }
            if parts.is_empty() {
                return Err(no_kv_room(1));
            }
            let mut hand_over = |first_id: usize, ids: usize, block: &[f32]| {
                let mut at = 0;
                for &(input, first_row, rows) in &parts {
                    sink(&ScoreBlock {
                        input,
                        first_row,
                        rows,
                        first_id,
                        ids,
                        values: &block[at * ids..(at + rows) * ids],
                    })?;
                    at += rows;
                }
                Ok(())
            };
            self.run_pass(&mut hand_over, &mut |_, _| {})?;
            for s in open.iter_mut() {
                if s.table.len() == s.tokens.len() {
                    self.scheduler.pool.release(&mut s.table);
                }
            }
            open.retain(|s| !s.table.is_empty());
        }
        Ok(())
    }

    /// The pictures of the first of `inputs`, looked at together with those of the inputs behind it as room allows. `None`: there is no
    /// room until inputs under way are done.
    fn look_at(&mut self, inputs: &[ScoreInput]) -> Result<Option<Option<Pictures>>> {
        let first = &inputs[0];
        let pictures = Pictures::new(&first.tokens, &first.media, self.spec.vision.as_ref())?;
        let Some(mut pictures) = pictures else {
            return Ok(Some(None));
        };
        let vision = self.vision.as_mut().ok_or_else(super::no_vision_room)?;
        vision.check(&pictures)?;
        vision.fill(&mut pictures);
        if pictures.wait() {
            let wave = vision.wave(inputs.iter().map(|i| i.media.as_slice()));
            vision.encode(&self.device, &self.cancel, &wave, &mut |_, _| {})?;
            vision.fill(&mut pictures);
        }
        Ok((!pictures.wait()).then_some(Some(pictures)))
    }

    /// Puts as many of the input's next tokens into the pass as fit. False when none did.
    fn push_part(
        &mut self,
        s: &mut Scoring<'_>,
        most: usize,
        parts: &mut Vec<(usize, usize, usize)>,
    ) -> Result<bool> {
        let done = s.table.len();
        let mut rows = (s.tokens.len() - done).min(most - self.scheduler.pass.rows());
        // What the free blocks and the room in the last one hold.
        let room = self.scheduler.pool.room_for(&s.table);
        rows = rows.min(room);
        if rows == 0 || self.scheduler.pool.extend(&mut s.table, rows).is_err() {
            return Ok(false);
        }
        let part = &s.tokens[done..done + rows];
        let (table, pass) = (s.table.blocks(), &mut self.scheduler.pass);
        pictures::push(s.pictures.as_ref(), pass, part, done, table, rows)?;
        if let Some(pictures) = &mut s.pictures {
            pictures.release(done + rows);
        }
        parts.push((s.input, done, rows));
        Ok(true)
    }

    fn check_input(&self, index: usize, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() || tokens.len() > self.context {
            return Err(Error::new(
                Code::Usage,
                format!("input {index} has {} tokens", tokens.len()),
                format!(
                    "an input has 1 to {} tokens under this context",
                    self.context
                ),
                "split it, or raise --context",
            ));
        }
        let vocab = self.spec.vocab;
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::new(
                Code::Usage,
                format!("input {index} has token id {id}"),
                format!("the model's vocabulary has {vocab} ids"),
                "use the tokenizer that belongs to this model",
            ));
        }
        Ok(())
    }
}
