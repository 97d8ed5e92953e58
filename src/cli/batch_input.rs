//! What a job is made of, for `batch` and `batch-check` alike: where its rows come from, and what reads them.

use std::path::{Path, PathBuf};

use clap::Args;

use super::batch_room::budget;
use super::generate::DEFAULT_MAX_TOKENS;
use super::media::LookOptions;
use super::model::stop_tokens;
use super::options::{MachineOptions, SamplingOptions};
use crate::engine::jobs::{Looker, RowLimits, Rules, Shard, Source, TextTools};
use crate::engine::{HostMemory, SLACK_BYTES};
use crate::error::{Code, Error, Result};
use crate::media::Look;
use crate::spec::ModelSpec;
use crate::text::{AnswerLength, ChatTemplate, GenerationConfig, Tokenizer};

/// Where rows come from.
#[derive(Args, Clone, Debug)]
pub struct InputOptions {
    /// Requests, one JSON object a line, in the OpenAI batch format
    #[arg(
        long,
        short = 'i',
        value_name = "FILE.jsonl",
        conflicts_with = "prompts",
        help_heading = "Job"
    )]
    pub input: Option<PathBuf>,
    /// Plain text instead: a prompt a line
    #[arg(long, value_name = "FILE.txt", help_heading = "Job")]
    pub prompts: Option<PathBuf>,
    /// Continue the prompts as they are, without the chat template
    #[arg(long, requires = "prompts", help_heading = "Job")]
    pub raw: bool,
    /// The rows r with r mod n = i, into an output of their own [default: as Slurm or Kubernetes say]
    #[arg(
        long,
        value_name = "i/n",
        env = "TENSORPAGER_SHARD",
        help_heading = "Job"
    )]
    pub shard: Option<String>,
    /// What answers call the model
    #[arg(long, value_name = "NAME", help_heading = "Job")]
    pub served_model_name: Option<String>,
    #[command(flatten)]
    pub look: LookOptions,
}

impl InputOptions {
    /// `has_template`: plain prompts are a user's messages where the model can chat.
    pub fn source(&self, has_template: bool) -> Result<Source> {
        match (&self.input, &self.prompts) {
            (Some(path), None) => Ok(Source::Jsonl(path.clone())),
            (None, Some(path)) => Ok(Source::Prompts {
                path: path.clone(),
                chat: has_template && !self.raw,
            }),
            _ => Err(Error::new(
                Code::Usage,
                "there is nothing to answer",
                "no input is given",
                "give -i FILE.jsonl or --prompts FILE.txt",
            )),
        }
    }

    /// What sees the rows' pictures, where the model can. `dir`: the model's folder.
    pub fn looker(&self, dir: &Path, spec: &ModelSpec, look: Look) -> Option<Looker> {
        let job = self.input.as_deref()?;
        let vision = spec.vision.as_ref()?;
        Some(Looker::new(dir, vision, self.look.options(), job, look))
    }

    pub fn shard(&self) -> Result<Shard> {
        match &self.shard {
            Some(text) => Shard::parse(text),
            None => Ok(Shard::from_env(|name| std::env::var(name).ok())?.unwrap_or(Shard::WHOLE)),
        }
    }
}

/// Text and picture tools and rules of a model.
pub struct Texts {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub generation: GenerationConfig,
    pub looker: Option<Looker>,
    pub limits: RowLimits,
}

impl Texts {
    pub fn tools(&self) -> TextTools<'_> {
        TextTools {
            tokenizer: &self.tokenizer,
            template: self.template.as_ref(),
            looker: self.looker.as_ref(),
            limits: self.limits,
        }
    }

    pub fn rules(
        &self,
        label: &str,
        fingerprint: u64,
        sampling: &SamplingOptions,
        context: Option<usize>,
    ) -> Result<Rules> {
        Ok(Rules {
            model: label.to_owned(),
            fingerprint,
            sampling: sampling.over(&self.generation)?,
            max_tokens: sampling.max_tokens,
            stop: match sampling.stop.is_empty() {
                true => self.generation.stop_strings.clone(),
                false => sampling.stop.clone(),
            },
            stop_tokens: match sampling.ignore_eos {
                true => Vec::new(),
                false => stop_tokens(&self.generation, &self.tokenizer),
            },
            look: self.looker.as_ref().map(|l| *l.options()),
            chat_length: chat_length(sampling.max_tokens, &self.generation),
            context,
        })
    }
}

/// Of chat rows that say nothing. Under `--max-tokens` no row has it, and what was begun before `max_length` was heeded is
/// still the same job.
fn chat_length(max_tokens: Option<usize>, generation: &GenerationConfig) -> AnswerLength {
    let usual = generation.max_new_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    match max_tokens {
        Some(_) => AnswerLength::Tokens(usual),
        None => AnswerLength::new(None, generation, usual),
    }
}

/// How large a row may be. To be asked once tokenizer and template are there.
pub(super) fn row_limits(spec: &ModelSpec, machine: &MachineOptions) -> Result<RowLimits> {
    let context = machine.context.unwrap_or(spec.max_positions);
    let budget = budget(machine)?;
    let room = budget.saturating_sub(HostMemory::read().resident + SLACK_BYTES);
    Ok(RowLimits::within(
        context.min(spec.max_positions),
        budget,
        room,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn max_length_has_no_part_in_a_job_whose_length_the_command_says() {
        let without = GenerationConfig::default();
        let with = GenerationConfig {
            max_length: Some(7),
            ..without.clone()
        };
        let usual = AnswerLength::Tokens(DEFAULT_MAX_TOKENS);
        assert_eq!(chat_length(Some(5), &with), usual);
        assert_eq!(chat_length(None, &without), usual);
        assert_eq!(chat_length(None, &with), AnswerLength::Together(7));
    }
}
