//! One request on its way: its tokens, its KV, and where it stands.

use crate::model::kv::KvTable;
use crate::text::SamplingParams;

/// What to generate. The engine deals in tokens; text, chat templates and stop strings are its clients' business.
#[derive(Clone, Debug)]
pub struct Job {
    pub prompt: Vec<u32>,
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
}

impl Sequence {
    pub fn new(id: JobId, job: Job) -> Sequence {
        let mut tokens = Vec::with_capacity(job.prompt.len() + job.max_tokens.min(4096));
        tokens.extend_from_slice(&job.prompt);
        Sequence {
            id,
            job,
            tokens,
            table: KvTable::default(),
        }
    }

    /// Tokens whose keys and values are not in the cache yet. One for a sequence that decodes.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.table.len()
    }

    pub fn generated(&self) -> usize {
        self.tokens.len() - self.job.prompt.len()
    }
}
