//! JSONL jobs: rows in and out in the OpenAI batch format, durable, resumed wherever they were cut off.
//!
//! A row counts once its answer is on disk: appended and synced. Which rows are finished is read from the output itself, whose
//! row ids are hashes of everything an answer depends on; nothing else has to be trusted or repaired after a crash.

mod answer;
mod body;
mod check;
mod fields;
mod files;
mod fingerprint;
mod input;
mod job;
mod limits;
mod merge;
mod passes;
mod pictures;
mod request;
mod run;
mod scan;
mod shapes;
mod shard;
mod sizing;
#[cfg(test)]
mod tests;

pub use body::{Body, Prompt};

/// What the fuzzers call (src/fuzzing.rs).
#[cfg(any(test, feature = "testing"))]
pub(crate) mod fuzz {
    use super::*;

    /// A line of a job file, read as far as the model is not needed; then as a line of a results file. True where it was accepted.
    pub(crate) fn job_line(bytes: &[u8], rules: &Rules, text: &TextTools<'_>) -> bool {
        let source = Source::Jsonl("fuzz".into());
        let line = input::Line {
            number: 1,
            bytes: bytes.to_vec(),
            too_long: None,
        };
        let read_as_result = scan::result_head(bytes).is_some() | scan::error_head(bytes).is_some();
        let parsed = scan::parse_line(&source, &line, RowIds::default());
        let body = parsed.request.and_then(|r| {
            // What names files is not followed: a fuzzer would name any.
            let body = r.body(rules, text).map_err(|e| (None, e))?;
            match text.looker.filter(|_| body.all_inline()) {
                Some(looker) => looker.measure(&body).map(drop).map_err(|e| (None, e)),
                None => Ok(()),
            }
        });
        body.is_ok() | read_as_result
    }
}

pub use check::{CheckReport, check};
pub use files::{Paths, default_errors};
pub use fingerprint::fingerprint;
pub use input::Source;
pub use job::{BatchJob, JobSpec, MaxErrors, Order, check_paths};
pub use limits::RowLimits;
pub use merge::{MergeReport, merge};
pub use passes::{JobPasses, PassLoad, foresee};
pub use pictures::Looker;
pub use request::{Endpoint, Request, RowError, RowIds, Rules, TextTools};
pub use run::{JobProgress, JobSummary};
pub use shapes::{Shape, Shapes};
pub use shard::Shard;
pub use sizing::{KV_SHARES, PictureSample, RowPictures, RowSample, Sizing, SizingInput};
