//! The pictures of a sequence: which of its tokens they are, where those lie in time and space, and their embeddings.

use std::hash::Hasher;
use std::sync::Arc;

use crate::error::{Code, Error, Result};
use crate::media::{Kind, Visual};
use crate::model::mrope::{self, PictureSpan};
use crate::model::pass::{Embeddings, Given, Pass};
use crate::spec::VisionSpec;

/// Replaces each placeholder token of `ids` by as many as its picture has tokens. `media`: in the order of the placeholders.
/// Errors (Code::Usage) where the two do not match.
pub fn expand_pictures(
    ids: &[u32],
    media: &[Arc<Visual>],
    spec: Option<&VisionSpec>,
) -> Result<Vec<u32>> {
    let Some(spec) = spec else {
        return match media.is_empty() {
            true => Ok(ids.to_vec()),
            false => Err(text_only()),
        };
    };
    let sizes = media
        .iter()
        .map(|v| (placeholder(v.kind, spec), v.tokens()));
    expand(ids, sizes, spec)
}

/// As [`expand_pictures`], from each picture's placeholder and tokens.
pub(super) fn expand(
    ids: &[u32],
    sizes: impl ExactSizeIterator<Item = (u32, usize)>,
    spec: &VisionSpec,
) -> Result<Vec<u32>> {
    let mut out = Vec::with_capacity(ids.len());
    let count = sizes.len();
    let mut next = sizes;
    for &id in ids {
        if id != spec.image_token && id != spec.video_token {
            out.push(id);
            continue;
        }
        match next.next() {
            Some((own, tokens)) if id == own => out.extend(std::iter::repeat_n(id, tokens)),
            _ => return Err(mismatch(ids, count, spec)),
        }
    }
    match next.next() {
        None => Ok(out),
        Some(_) => Err(mismatch(ids, count, spec)),
    }
}

/// The token that stands for a picture.
pub(super) fn placeholder(kind: Kind, spec: &VisionSpec) -> u32 {
    match kind {
        Kind::Image => spec.image_token,
        Kind::Video { .. } => spec.video_token,
    }
}

fn mismatch(ids: &[u32], pictures: usize, spec: &VisionSpec) -> Error {
    let found = |id| ids.iter().filter(|t| **t == id).count();
    Error::new(
        Code::Usage,
        "the prompt and its pictures do not belong together",
        format!(
            "the prompt has {} image and {} video placeholders, and there are {pictures} pictures (or their order differs)",
            found(spec.image_token),
            found(spec.video_token)
        ),
        "give one picture for each placeholder, in order; text must not hold the placeholder tokens itself",
    )
}

pub(super) fn text_only() -> Error {
    Error::new(
        Code::Usage,
        "this model cannot look at pictures",
        "it has no vision tower",
        "choose a vision-language model, or leave the pictures out",
    )
}

/// A picture in a sequence.
pub(super) struct Run {
    start: usize,
    pub visual: Arc<Visual>,
    pub embeddings: Option<Arc<Embeddings>>,
}

impl Run {
    fn end(&self) -> usize {
        self.start + self.visual.tokens()
    }
}

/// What a sequence with pictures knows beyond its tokens.
pub(super) struct Pictures {
    positions: Vec<[u32; 3]>,
    /// Added to a generated token's index to get its position.
    delta: i64,
    /// What the KV of such a prompt depends on besides its tokens.
    pub salt: u64,
    pub runs: Vec<Run>,
}

impl Pictures {
    /// `prompt`: with every placeholder repeated. None without pictures.
    pub fn new(
        prompt: &[u32],
        media: &[Arc<Visual>],
        spec: Option<&VisionSpec>,
    ) -> Result<Option<Pictures>> {
        let Some(spec) = spec else {
            return match media.is_empty() {
                true => Ok(None),
                false => Err(text_only()),
            };
        };
        let stands_in = |id: u32| id == spec.image_token || id == spec.video_token;
        let mut runs = Vec::with_capacity(media.len());
        let mut at = 0;
        for visual in media {
            let start = (at..prompt.len())
                .find(|i| stands_in(prompt[*i]))
                .unwrap_or(prompt.len());
            let run = Run {
                start,
                visual: visual.clone(),
                embeddings: None,
            };
            at = run.end();
            let own = prompt.get(start..at);
            let token = placeholder(visual.kind, spec);
            if !own.is_some_and(|ids| ids.iter().all(|id| *id == token)) {
                return Err(mismatch(prompt, media.len(), spec));
            }
            runs.push(run);
        }
        if prompt[at.min(prompt.len())..]
            .iter()
            .any(|id| stands_in(*id))
        {
            return Err(mismatch(prompt, media.len(), spec));
        }
        if runs.is_empty() {
            return Ok(None);
        }
        let spans: Vec<PictureSpan> = runs.iter().map(|r| span(r, spec)).collect();
        let (positions, delta) = mrope::positions(prompt.len(), &spans)?;
        let mut hash = twox_hash::XxHash3_64::new();
        for (run, span) in runs.iter().zip(&spans) {
            hash.write(&run.visual.content_hash().to_le_bytes());
            hash.write(&span.step.to_le_bytes());
        }
        Ok(Some(Pictures {
            positions,
            delta,
            salt: hash.finish(),
            runs,
        }))
    }

    /// Some picture has not been through the tower yet.
    pub fn wait(&self) -> bool {
        self.runs.iter().any(|r| r.embeddings.is_none())
    }

    /// Gives up the embeddings of pictures whose KV is there: those that end within the first `tokens`.
    pub fn release(&mut self, tokens: usize) {
        for run in self.runs.iter_mut().filter(|r| r.end() <= tokens) {
            run.embeddings = None;
        }
    }

    /// Puts tokens `start..start + tokens.len()` of the sequence into the pass.
    pub fn push(
        &self,
        pass: &mut Pass,
        tokens: &[u32],
        start: usize,
        table: &[u32],
        logits: usize,
    ) -> Result<()> {
        let (first_row, end) = (pass.rows(), start + tokens.len());
        for run in &self.runs {
            let (from, to) = (run.start.max(start), run.end().min(end));
            if from >= to {
                continue;
            }
            let embeddings = run
                .embeddings
                .clone()
                .ok_or_else(|| Error::internal("a picture enters a pass without its embeddings"))?;
            pass.given.push(Given {
                row: first_row + from - start,
                rows: to - from,
                from: embeddings,
                first: from - run.start,
            });
        }
        let positions = (start..end).map(|i| match self.positions.get(i) {
            Some(p) => *p,
            None => [(i as i64 + self.delta) as u32; 3],
        });
        pass.push(tokens, positions, start, table, logits);
        Ok(())
    }
}

fn span(run: &Run, spec: &VisionSpec) -> PictureSpan {
    let grid = run.visual.grid;
    PictureSpan {
        start: run.start,
        cells: [grid.t, grid.h / spec.merge, grid.w / spec.merge],
        step: match run.visual.kind {
            Kind::Image => 1.0,
            Kind::Video { seconds_per_grid } => {
                mrope::time_step(spec.tokens_per_second, seconds_per_grid)
            }
        },
    }
}

/// Puts tokens into the pass, with or without pictures.
pub(super) fn push(
    pictures: Option<&Pictures>,
    pass: &mut Pass,
    tokens: &[u32],
    start: usize,
    table: &[u32],
    logits: usize,
) -> Result<()> {
    match pictures {
        Some(p) => p.push(pass, tokens, start, table, logits),
        None => {
            pass.push_text(tokens, start, table, logits);
            Ok(())
        }
    }
}
