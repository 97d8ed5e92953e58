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
mod merge;
mod pictures;
mod request;
mod run;
mod scan;
mod shard;
mod sizing;
#[cfg(test)]
mod tests;

pub use body::{Body, Prompt};
pub use check::{CheckReport, check};
pub use files::{Paths, default_errors};
pub use fingerprint::fingerprint;
pub use input::Source;
pub use job::{BatchJob, JobSpec, MaxErrors, Order};
pub use merge::{MergeReport, merge};
pub use pictures::Looker;
pub use request::{Endpoint, Request, RowError, RowIds, Rules, TextTools};
pub use run::{JobProgress, JobSummary};
pub use shard::Shard;
pub use sizing::{PictureSample, RowSample, Sizing, SizingInput};
