//! What `batch` says at its end: one JSON object, or a few lines for people.

use serde::Serialize;

use super::batch::Opened;
use super::model::Model;
use super::run::print;
use crate::engine::jobs::{BatchJob, JobSummary, Sizing};
use crate::error::{Error, Result};
use crate::report::job::Figures;
use crate::report::summary::{PagingReport, Timings, VisionReport};

/// What `--json` ends with.
#[derive(Serialize)]
struct BatchReport<'a> {
    model: &'a str,
    device: &'a str,
    dtype: &'a str,
    output: String,
    errors: String,
    /// Of this job or shard.
    rows: u64,
    rows_done: u64,
    rows_failed: u64,
    rows_remaining: u64,
    /// What this start did.
    this_run: Figures,
    prompt_tokens: u64,
    output_tokens: u64,
    sequences: usize,
    kv_tokens: usize,
    context: usize,
    timings: Timings,
    paging: PagingReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    vision: Option<VisionReport>,
    /// What would be faster on this machine.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    advice: &'a [String],
}

pub fn print_json(
    model: &Model,
    job: &BatchJob,
    summary: &JobSummary,
    opened: Option<&Opened>,
    paging: PagingReport,
    timings: Timings,
    advice: &[String],
) -> Result<()> {
    let p = &summary.progress;
    let sizing = opened.map_or_else(Sizing::default, |o| o.sizing);
    let report = BatchReport {
        model: &job.rules().model,
        device: opened.map_or("cpu", |o| o.engine.device().name()),
        dtype: &model.dtype(),
        output: job.paths().output.display().to_string(),
        errors: job.paths().errors.display().to_string(),
        rows: job.rows(),
        rows_done: job.done(),
        rows_failed: summary.failed,
        rows_remaining: summary.remaining,
        this_run: Figures::new(p),
        prompt_tokens: p.prompt_tokens,
        output_tokens: p.output_tokens,
        sequences: sizing.sequences,
        kv_tokens: sizing.kv_tokens,
        context: opened.map_or(0, |o| o.engine.context()),
        timings,
        paging,
        vision: VisionReport::new(&p.vision),
        advice,
    };
    let text = serde_json::to_string(&report)
        .map_err(|e| Error::internal(format!("the report cannot be written: {e}")))?;
    print(&format!("{text}\n"))
}

pub fn last_words(job: &BatchJob, s: &JobSummary) -> String {
    let f = Figures::new(&s.progress);
    let mut text = format!("{} of {} rows answered", job.done(), job.rows());
    if f.output_tokens > 0 {
        text += &format!(
            "; {} tokens out in {:.1} s: {:.1} tokens/s",
            f.output_tokens, f.elapsed_s, f.output_tokens_per_s
        );
    }
    if f.shared_prompt_tokens > 0 {
        text += &format!("; {} prompt tokens shared", f.shared_prompt_tokens);
    }
    if s.failed > 0 {
        text += &format!(
            "; {} failed: see {}",
            s.failed,
            job.paths().errors.display()
        );
    }
    if s.other_model > 0 {
        text += &format!(
            "\n{} rows ask for another model than {}; they were answered by this one",
            s.other_model,
            job.rules().model
        );
    }
    if s.remaining > 0 {
        text += &format!(
            "\ninterrupted: {} rows remain; the same command goes on",
            s.remaining
        );
    }
    text
}
