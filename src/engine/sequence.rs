//! One request on its way: its tokens, its KV, and where it stands.

use std::sync::Arc;

use twox_hash::XxHash3_128;

use super::pictures::Pictures;
use crate::error::Error;
use crate::media::Visual;
use crate::model::kv::{BLOCK_TOKENS, BlockKey, KvTable};
use crate::text::{SamplingParams, TokenLogprob};

/// What to generate. The engine deals in tokens; text, chat templates and stop strings are its clients' business.
#[derive(Clone, Debug)]
pub struct Job {
    /// With every picture's placeholder repeated: see [`super::expand_pictures`].
    pub prompt: Vec<u32>,
    /// The prompt's pictures, in the order of their placeholders. KV is shared only between prompts with the same ones.
    pub media: Vec<Arc<Visual>>,
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Which of a request's answers this is; part of the key of every draw.
    pub choice: u32,
    /// Generation ends before one of these (the end-of-text tokens, unless they are to be ignored).
    pub stop_tokens: Vec<u32>,
    /// Log-probabilities wanted with each token: its own and those of so many of the likeliest.
    pub logprobs: Option<usize>,
    /// Jobs with the same salt share the KV of the tokens they begin with; `None` shares with nobody. What a position's KV
    /// depends on besides the tokens (images) belongs into the salt.
    pub prefix_salt: Option<u64>,
}

impl Default for Job {
    /// An empty prompt, greedy, one token, sharing prefixes.
    fn default() -> Job {
        Job {
            prompt: Vec::new(),
            media: Vec::new(),
            max_tokens: 1,
            sampling: SamplingParams::greedy(),
            choice: 0,
            stop_tokens: Vec::new(),
            logprobs: None,
            prefix_salt: Some(0),
        }
    }
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

/// What the model thought of the token that was chosen, and of the likeliest ones, best first.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    pub chosen: f32,
    pub top: Vec<TokenLogprob>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was chosen.
    Token {
        job: JobId,
        token: u32,
        /// Where the job asked for them.
        logprobs: Option<Box<Logprobs>>,
    },
    /// Nothing more will come for this job.
    Finished { job: JobId, reason: FinishReason },
    /// This job cannot go on (its logits are not numbers); the others are untouched.
    Failed { job: JobId, error: Error },
}

pub(super) struct Sequence {
    pub id: JobId,
    pub job: Job,
    /// Prompt and generated tokens.
    pub tokens: Vec<u32>,
    pub table: KvTable,
    /// Of the full blocks of `tokens`, as far as they were asked for.
    keys: Vec<BlockKey>,
    pub pictures: Option<Pictures>,
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
            keys: Vec::new(),
            pictures: None,
        }
    }

    pub fn with_pictures(self, pictures: Option<Pictures>) -> Sequence {
        Sequence { pictures, ..self }
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

    /// Keys of the first `blocks` full blocks: each is a hash of the key before it and of the block's tokens. Empty where
    /// the job shares nothing.
    pub fn keys(&mut self, blocks: usize) -> &[BlockKey] {
        let Some(salt) = self.job.prefix_salt else {
            return &[];
        };
        // Placeholders are the same token whatever they stand for.
        let salt = salt ^ self.pictures.as_ref().map_or(0, |p| p.salt);
        while self.keys.len() < blocks {
            let block = self.keys.len();
            let mut hash = XxHash3_128::with_seed(salt);
            hash.write(&self.keys.last().copied().unwrap_or(0).to_le_bytes());
            for token in &self.tokens[block * BLOCK_TOKENS..][..BLOCK_TOKENS] {
                hash.write(&token.to_le_bytes());
            }
            self.keys.push(hash.finish_128());
        }
        &self.keys[..blocks]
    }
}
