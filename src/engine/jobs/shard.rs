//! Which rows are ours, where several processes share a job: row r belongs to shard r mod n.

use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};

/// Shard `index` of `count`, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub index: u64,
    pub count: u64,
}

impl Shard {
    pub const WHOLE: Shard = Shard { index: 0, count: 1 };

    pub fn new(index: u64, count: u64) -> Result<Shard> {
        if index < count {
            return Ok(Shard { index, count });
        }
        Err(Error::new(
            Code::Usage,
            format!("there is no shard {index}/{count}"),
            "shards are counted from 0",
            format!(
                "give --shard 0/{} to {}/{}",
                count.max(1),
                count.max(1) - 1,
                count.max(1)
            ),
        ))
    }

    /// `i/n`.
    pub fn parse(text: &str) -> Result<Shard> {
        let parts = text
            .split_once('/')
            .and_then(|(i, n)| Some((i.trim().parse().ok()?, n.trim().parse().ok()?)));
        match parts {
            Some((index, count)) => Shard::new(index, count),
            None => Err(Error::new(
                Code::Usage,
                format!("`{text}` is not a shard"),
                "a shard is a number from 0, a slash, and how many there are",
                "write --shard 0/4",
            )),
        }
    }

    /// What a cluster's scheduler says: a Slurm array task, or an indexed Kubernetes job (whose completions must be given in
    /// JOB_COMPLETIONS, since Kubernetes does not tell). `None` where neither runs this.
    pub fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Option<Shard>> {
        let number = |name: &str| -> Result<Option<u64>> {
            let Some(text) = get(name).filter(|t| !t.is_empty()) else {
                return Ok(None);
            };
            match text.trim().parse() {
                Ok(n) => Ok(Some(n)),
                Err(_) => Err(Error::new(
                    Code::Usage,
                    format!("the environment variable {name} is not a number"),
                    format!("it is `{text}`"),
                    "unset it, or say which rows are meant with --shard i/n (0/1 for all)",
                )),
            }
        };
        if let Some(task) = number("SLURM_ARRAY_TASK_ID")? {
            let Some(count) = number("SLURM_ARRAY_TASK_COUNT")? else {
                return Err(count_missing(
                    "SLURM_ARRAY_TASK_ID",
                    "SLURM_ARRAY_TASK_COUNT",
                ));
            };
            // Arrays may begin anywhere and leave gaps: --array=1-7:2.
            let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
            let step = number("SLURM_ARRAY_TASK_STEP")?.unwrap_or(1).max(1);
            return Shard::new(task.saturating_sub(first) / step, count).map(Some);
        }
        if let Some(index) = number("JOB_COMPLETION_INDEX")? {
            let Some(count) = number("JOB_COMPLETIONS")? else {
                return Err(count_missing("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"));
            };
            return Shard::new(index, count).map(Some);
        }
        Ok(None)
    }

    pub fn has(self, row: u64) -> bool {
        row % self.count == self.index
    }

    /// Where this shard writes: `answers.jsonl` → `answers.0-of-4.jsonl`. The path itself where there is one shard.
    pub fn path(self, path: &Path) -> PathBuf {
        if self.count == 1 {
            return path.to_path_buf();
        }
        let mark = format!("{}-of-{}", self.index, self.count);
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        match path.extension() {
            Some(e) => path.with_file_name(format!("{stem}.{mark}.{}", e.to_string_lossy())),
            None => path.with_file_name(format!("{stem}.{mark}")),
        }
    }
}

fn count_missing(index: &str, count: &str) -> Error {
    Error::new(
        Code::Usage,
        format!("{index} is set, but not how many shards there are"),
        format!("{count} is not set"),
        format!("set {count}, or say which rows are meant with --shard i/n (0/1 for all)"),
    )
}
