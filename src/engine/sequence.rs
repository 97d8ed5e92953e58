//! One request on its way: its tokens, its KV, and where it stands.

use std::sync::Arc;

use super::pictures::Pictures;
use crate::error::Result;
use crate::media::Visual;
use crate::model::kv::KvTable;
use crate::spec::VisionSpec;
use crate::text::SamplingParams;

/// What to generate. The engine deals in tokens; text, chat templates and stop strings are its clients' business.
#[derive(Clone, Debug)]
pub struct Job {
    /// With every picture's placeholder repeated: see [`super::expand_pictures`].
    pub prompt: Vec<u32>,
    /// The prompt's pictures, in the order of their placeholders.
    pub media: Vec<Arc<Visual>>,
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Which of a request's answers this is; part of the key of every draw.
    pub choice: u32,
    /// Generation ends before one of these (the end-of-text tokens, unless they are to be ignored).
    pub stop_tokens: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token came, or the client cancelled because of a stop string.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was chosen.
    Token { job: JobId, token: u32 },
    /// Nothing more will come for this job.
    Finished { job: JobId, reason: FinishReason },
}

pub(super) struct Sequence {
    pub id: JobId,
    pub job: Job,
    /// Prompt and generated tokens.
    pub tokens: Vec<u32>,
    pub table: KvTable,
    pub pictures: Option<Pictures>,
}

impl Sequence {
    /// Errors where the prompt and its pictures do not match.
    pub fn new(id: JobId, job: Job, vision: Option<&VisionSpec>) -> Result<Sequence> {
        let pictures = Pictures::new(&job.prompt, &job.media, vision)?;
        let mut tokens = Vec::with_capacity(job.prompt.len() + job.max_tokens.min(4096));
        tokens.extend_from_slice(&job.prompt);
        Ok(Sequence {
            id,
            job,
            tokens,
            table: KvTable::default(),
            pictures,
        })
    }

    /// Its pictures have not all been through the tower.
    pub fn waits_for_pictures(&self) -> bool {
        self.pictures.as_ref().is_some_and(Pictures::wait)
    }

    /// Tokens whose keys and values are not in the cache yet. One for a sequence that decodes.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.table.len()
    }

    pub fn generated(&self) -> usize {
        self.tokens.len() - self.job.prompt.len()
    }
}
