//! A job as it lies on disk: input, output, errors, and how far it got.

use super::files::{JobMark, Paths, RowLog, Sidecar, default_errors};
use super::input::{GIVE_ROWS, Source};
use super::limits::RowLimits;
use super::pictures::Looker;
use super::request::{RowIds, Rules};
use super::run::{JobProgress, JobSummary};
use super::scan::{Scan, State};
use super::shard::Shard;
use crate::error::{Code, Error, Result};

/// Of the output's rows, once all are there. While a job runs they are written as they finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Input,
    Completion,
}

/// Failed rows at which a job gives up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaxErrors {
    Rows(u64),
    /// Of the job's rows.
    Percent(f64),
}

impl MaxErrors {
    /// `10` or `2.5%`.
    pub fn parse(text: &str) -> Result<MaxErrors> {
        let parsed = match text.strip_suffix('%') {
            Some(p) => p
                .trim()
                .parse()
                .ok()
                .filter(|p| (0.0..=100.0).contains(p))
                .map(MaxErrors::Percent),
            None => text.trim().parse().ok().map(MaxErrors::Rows),
        };
        parsed.ok_or_else(|| {
            Error::new(
                Code::Usage,
                format!("`{text}` is no number of errors"),
                "it is a number of rows, or a share of them in percent",
                "write --max-errors 100 or --max-errors 2%",
            )
        })
    }

    fn allows(self, failed: u64, rows: u64) -> bool {
        match self {
            MaxErrors::Rows(n) => failed <= n,
            MaxErrors::Percent(p) => failed as f64 <= rows as f64 * p / 100.0,
        }
    }
}

/// What to do and where.
#[derive(Clone, Debug)]
pub struct JobSpec {
    pub source: Source,
    pub paths: Paths,
    pub rules: Rules,
    pub shard: Shard,
    pub order: Order,
    pub overwrite: bool,
    pub retry_errors: bool,
    pub max_errors: Option<MaxErrors>,
    /// Unix seconds that answers carry as `created`; the job's first start where `None`.
    pub created: Option<u64>,
    /// The same as the text tools of the run have.
    pub limits: RowLimits,
}

/// A job that is open: its output is locked, and what is finished is known.
pub struct BatchJob {
    pub(super) spec: JobSpec,
    pub(super) rules_key: u64,
    pub(super) created: u64,
    pub(super) scan: Scan,
    pub(super) output: RowLog,
    pub(super) errors: RowLog,
    /// Held for its lock.
    _sidecar: Sidecar,
}

impl BatchJob {
    /// Reads the input once and what is finished of it. Code::Locked when another process works on it; Code::Usage when the
    /// output belongs to another job. `looker`: what sees the rows' pictures. `progress(rows)` while the input is read.
    pub fn open(
        spec: JobSpec,
        looker: Option<&Looker>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<BatchJob> {
        check_paths(&spec.source, &spec.paths)?;
        let rules_key = spec.rules.key();
        let ids = RowIds {
            key: rules_key,
            pictures: looker.map(Looker::ids),
        };
        let scan = Scan::read(&spec.source, spec.shard, ids, &spec.limits, progress)?;
        if scan.marks.is_empty() {
            return Err(spec.source.no_rows("every line is blank", GIVE_ROWS));
        }
        let mut sidecar = Sidecar::open(&spec.paths.output)?;
        let mark = sidecar.read()?;
        let mut job = BatchJob {
            rules_key,
            created: 0,
            scan,
            output: RowLog::open(&spec.paths.output)?,
            errors: RowLog::open(&spec.paths.errors)?,
            _sidecar: sidecar,
            spec,
        };
        job.errors.lock()?;
        let ours = {
            let kept = mark.as_ref().and_then(|m| m.errors.as_ref());
            let paths = &job.spec.paths;
            paths.errors == default_errors(&paths.output) || kept == Some(&absolute(&paths.errors))
        };
        if !(ours && job.spec.overwrite) {
            job.scan.expect_own_errors(&job.errors, ours)?;
        }
        if job.spec.overwrite {
            job.output.cut(0)?;
            job.errors.cut(0)?;
        }
        job.scan.resume(&mut job.output)?;
        let retry = job.spec.retry_errors;
        job.scan.resume_errors(&mut job.errors, retry)?;
        job.settle_created(mark)?;
        // What failed before counts, unless it is tried again.
        job.check_errors(job.failed())?;
        Ok(job)
    }

    /// The job's start: what was asked for, what the sidecar or an answer already written says, or now.
    fn settle_created(&mut self, mark: Option<JobMark>) -> Result<()> {
        let fits = mark.filter(|m| m.version == 1 && m.settings == self.rules_key);
        self.created = match (self.first_created()?, self.spec.created, fits) {
            // Answers of one job agree; those already written decide.
            (Some(created), _, _) | (None, Some(created), _) => created,
            (None, None, Some(mark)) => mark.created,
            (None, None, None) => now(),
        };
        let mark = JobMark {
            version: 1,
            created: self.created,
            settings: self.rules_key,
            errors: Some(absolute(&self.spec.paths.errors)),
        };
        self._sidecar.write(&mark)
    }

    fn first_created(&mut self) -> Result<Option<u64>> {
        let mut created = None;
        if self.scan.count(State::Done) > 0 {
            self.output.scan(&mut |_, bytes| {
                if created.is_none() {
                    created = serde_json::from_slice::<serde_json::Value>(bytes)
                        .ok()
                        .and_then(|row| row["response"]["body"]["created"].as_u64());
                }
                Ok(true)
            })?;
        }
        Ok(created)
    }

    pub fn rules(&self) -> &Rules {
        &self.spec.rules
    }

    pub fn paths(&self) -> &Paths {
        &self.spec.paths
    }

    /// Rows of this shard.
    pub fn rows(&self) -> u64 {
        self.scan.ours()
    }

    /// Rows answered.
    pub fn done(&self) -> u64 {
        self.scan.count(State::Done)
    }

    /// Rows whose error is written.
    pub fn failed(&self) -> u64 {
        self.scan.count(State::Failed)
    }

    /// Rows neither answered nor failed.
    pub fn remaining(&self) -> u64 {
        self.rows() - self.done() - self.failed()
    }

    /// The summary of a job of which nothing remains to be done; its rows are put in order where they are not yet.
    pub fn settled(&mut self) -> Result<JobSummary> {
        self.finish()?;
        Ok(JobSummary {
            progress: JobProgress {
                rows: self.rows(),
                before: self.done() + self.failed(),
                ..JobProgress::default()
            },
            failed: self.failed(),
            remaining: self.remaining(),
            other_model: 0,
        })
    }

    pub(super) fn check_errors(&self, failed: u64) -> Result<()> {
        let rows = self.rows();
        match self.spec.max_errors {
            Some(max) if !max.allows(failed, rows) => Err(Error::new(
                Code::Rows,
                format!("{failed} of {rows} rows have failed"),
                "--max-errors allows no more",
                format!(
                    "look into {}, correct the rows, and give the same command again",
                    self.spec.paths.errors.display()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Once no row remains: rows in the order asked for, and no empty errors file.
    pub(super) fn finish(&mut self) -> Result<()> {
        if self.remaining() > 0 {
            return Ok(());
        }
        if self.spec.order == Order::Input {
            for log in [&mut self.output, &mut self.errors] {
                if let Some(rows) = self.scan.input_order(log)? {
                    log.reorder(&rows)?;
                }
            }
        }
        if self.errors.bytes() == 0 {
            // It was made to find out early whether it can be.
            let _ = std::fs::remove_file(self.errors.path());
        }
        Ok(())
    }
}

pub(super) fn absolute(path: &std::path::Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// Before anything is made beside them: results are read back to resume, so they lie in files.
fn expect_files(paths: &Paths) -> Result<()> {
    for path in [&paths.output, &paths.errors] {
        let cause = match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => "it is a folder",
            Ok(meta) if !meta.is_file() => {
                "it is not a regular file, and results are read back to resume"
            }
            _ if path == std::path::Path::new("-") => {
                "results are read back to resume, and standard output cannot be"
            }
            _ => match path.parent() {
                Some(folder) if folder != std::path::Path::new("") && !folder.is_dir() => {
                    "its folder is not there"
                }
                _ => continue,
            },
        };
        return Err(Error::new(
            Code::Usage,
            format!("{} cannot hold results", path.display()),
            cause,
            "give the path of a file",
        ));
    }
    Ok(())
}

/// That a job could read its rows and write its results, which is worth knowing before hours of packing. Makes nothing.
///
/// # Errors
/// `Usage`: input or output is no file or has no folder, one is the other, or the input holds no rows; `Io`: the input cannot
/// be read.
pub fn check_paths(source: &Source, paths: &Paths) -> Result<()> {
    let real = |p: &std::path::Path| p.canonicalize().unwrap_or_else(|_| p.to_path_buf());
    source.expect_rows()?;
    let input = real(source.path());
    let (output, errors) = (real(&paths.output), real(&paths.errors));
    let clash = match () {
        () if output == input => "the output is the input",
        () if errors == input => "the errors file is the input",
        () if errors == output => "the errors file is the output",
        () => return expect_files(paths),
    };
    Err(Error::new(
        Code::Usage,
        format!("{} cannot be written", paths.output.display()),
        clash,
        "give each its own file",
    ))
}
