//! Files of rows that survive anything: appended whole, synced before they count, a torn end cut off.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Code, Error, Result};
use crate::planted::{self, Bug};

/// Where a job's results go.
#[derive(Clone, Debug)]
pub struct Paths {
    pub output: PathBuf,
    pub errors: PathBuf,
}

/// `answers.jsonl` → `answers.errors.jsonl`.
pub fn default_errors(output: &Path) -> PathBuf {
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    match output.extension() {
        Some(e) => output.with_file_name(format!("{stem}.errors.{}", e.to_string_lossy())),
        None => output.with_file_name(format!("{stem}.errors")),
    }
}

/// `answers.jsonl` → `answers.jsonl.job`: when the job began, and the lock that lets one process at a time write.
pub fn sidecar(output: &Path) -> PathBuf {
    beside(output, ".job")
}

/// `path` with `end` appended to its name.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(end);
    path.with_file_name(name)
}

/// One row of a file: where it lies, line end included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub offset: u64,
    pub bytes: u64,
}

/// An append-only file of JSON rows.
pub struct RowLog {
    path: PathBuf,
    file: File,
    /// Up to here the file is whole rows, synced.
    len: u64,
    fresh: Vec<u8>,
    locked: bool,
}

impl RowLog {
    /// Opens or creates. Nothing is cut yet: see [`RowLog::scan`].
    pub fn open(path: &Path) -> Result<RowLog> {
        let failed = |e: &std::io::Error| trouble(path, e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|e| failed(&e))?;
        if !file.metadata().map_err(|e| failed(&e))?.is_file() {
            return Err(Error::new(
                Code::Usage,
                format!("{} cannot hold results", path.display()),
                "it is not a regular file, and results are read back to resume",
                "give the path of a file",
            ));
        }
        let len = file.seek(SeekFrom::End(0)).map_err(|e| failed(&e))?;
        sync_folder(path);
        Ok(RowLog {
            path: path.to_path_buf(),
            file,
            len,
            fresh: Vec::new(),
            locked: false,
        })
    }

    /// Keeps others from writing to it as long as this is open. Code::Locked where another process does.
    pub fn lock(&mut self) -> Result<()> {
        match self.file.try_lock() {
            Ok(()) => {
                self.locked = true;
                Ok(())
            }
            Err(std::fs::TryLockError::WouldBlock) => Err(Error::new(
                Code::Locked,
                format!("{} is being written", self.path.display()),
                "another job writes its errors there",
                "give --errors another file",
            )),
            Err(std::fs::TryLockError::Error(e)) => Err(trouble(&self.path, &e)),
        }
    }

    /// Opens to read.
    pub fn open_existing(path: &Path) -> Result<RowLog> {
        let failed = |e: std::io::Error| trouble(path, &e);
        let file = File::open(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        Ok(RowLog {
            path: path.to_path_buf(),
            file,
            len,
            fresh: Vec::new(),
            locked: false,
        })
    }

    /// Shows each line to `row`; changes nothing.
    pub fn read_rows(&self, row: &mut dyn FnMut(Span, &[u8]) -> Result<()>) -> Result<()> {
        let failed = |e: std::io::Error| trouble(&self.path, &e);
        let mut reader = BufReader::with_capacity(1 << 18, &self.file);
        reader.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut offset = 0u64;
        let mut line = Vec::new();
        loop {
            line.clear();
            let bytes = reader.read_until(b'\n', &mut line).map_err(failed)? as u64;
            if bytes == 0 {
                return Ok(());
            }
            row(Span { offset, bytes }, &line)?;
            offset += bytes;
        }
    }

    /// Writes a file of the rows that `next` gives, through a second file and a rename.
    pub fn write_new(path: &Path, next: &mut dyn FnMut() -> Result<Option<Vec<u8>>>) -> Result<()> {
        let temporary = beside(path, ".merging");
        let write = |next: &mut dyn FnMut() -> Result<Option<Vec<u8>>>| -> Result<()> {
            let failed = |e: std::io::Error| trouble(&temporary, &e);
            let file = File::create(&temporary).map_err(failed)?;
            let mut out = std::io::BufWriter::with_capacity(1 << 18, file);
            while let Some(row) = next()? {
                out.write_all(&row).map_err(failed)?;
            }
            let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
            file.sync_all().map_err(failed)?;
            std::fs::rename(&temporary, path).map_err(failed)
        };
        let written = write(next);
        match &written {
            Ok(()) => sync_folder(path),
            Err(_) => {
                let _ = std::fs::remove_file(&temporary);
            }
        }
        written
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Shows each row to `row`, which says whether it is one. A last row that is torn (no line end, or not a row) is cut
    /// off; anything else that is not a row is an error that names the line, and the file is left as it is.
    pub fn scan(&mut self, row: &mut dyn FnMut(Span, &[u8]) -> Result<bool>) -> Result<()> {
        let failed = |e: &std::io::Error| trouble(&self.path, e);
        let mut reader = BufReader::with_capacity(1 << 18, &self.file);
        reader.seek(SeekFrom::Start(0)).map_err(|e| failed(&e))?;
        let (mut offset, mut number) = (0u64, 0u64);
        let mut line = Vec::new();
        let mut good = 0;
        loop {
            line.clear();
            let n = reader
                .read_until(b'\n', &mut line)
                .map_err(|e| failed(&e))? as u64;
            if n == 0 {
                break;
            }
            number += 1;
            let span = Span { offset, bytes: n };
            let whole = line.ends_with(b"\n") || planted::is(Bug::TornRowTrusted);
            let is_row = whole && row(span, &line)?;
            offset += n;
            if is_row {
                good = offset;
                continue;
            }
            let torn = good > 0 || is_beginning(&line);
            if !torn || !reader.fill_buf().map_err(|e| failed(&e))?.is_empty() {
                return Err(Error::new(
                    Code::Usage,
                    format!("line {number} of {} is no result row", self.path.display()),
                    "the file was not written by this command, or was edited since",
                    "choose another output file, or --overwrite to begin anew",
                ));
            }
        }
        if good < offset {
            self.cut(good)?;
        }
        Ok(())
    }

    /// Keeps the first `len` bytes.
    pub fn cut(&mut self, len: u64) -> Result<()> {
        self.fresh.clear();
        self.file
            .set_len(len)
            .and_then(|()| self.file.sync_all())
            .map_err(|e| trouble(&self.path, &e))?;
        self.len = len;
        Ok(())
    }

    /// Adds a row. It counts after [`RowLog::sync`].
    pub fn push(&mut self, row: &impl Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.fresh, row)
            .map_err(|e| Error::internal(format!("a row cannot be written as JSON: {e}")))?;
        self.fresh.push(b'\n');
        Ok(())
    }

    /// Writes and syncs what was added. When the disk refuses, nothing of it counts and nothing of it stays.
    pub fn sync(&mut self) -> Result<()> {
        if self.fresh.is_empty() {
            return Ok(());
        }
        let written =
            self.file
                .write_all_at(&self.fresh, self.len)
                .and_then(|()| match planted::is(Bug::ResultsNotSynced) {
                    true => Ok(()),
                    false => self.file.sync_data(),
                });
        let written = match planted::is(Bug::ResultWriteIgnored) {
            true => Ok(()),
            false => written,
        };
        match written {
            Ok(()) => {
                self.len += self.fresh.len() as u64;
                self.fresh.clear();
                Ok(())
            }
            Err(e) => {
                // Best effort: a torn row that stays is cut off at the next start.
                if !planted::is(Bug::FailedRowKept) {
                    let _ = self.file.set_len(self.len);
                }
                Err(trouble(&self.path, &e))
            }
        }
    }

    /// Rewrites the file with `rows` in this order, through a second file and a rename: a crash leaves the one or the other.
    pub fn reorder(&mut self, rows: &[Span]) -> Result<()> {
        let temporary = beside(&self.path, ".sorting");
        let written = write_rows(&temporary, &self.file, rows)
            .inspect(|file| {
                if self.locked {
                    // Nobody else knows it yet.
                    let _ = file.try_lock();
                }
            })
            .and_then(|file| std::fs::rename(&temporary, &self.path).map(|()| file));
        match written {
            Ok(file) => {
                sync_folder(&self.path);
                self.file = file;
                self.len = rows.iter().map(|r| r.bytes).sum();
                Ok(())
            }
            Err(e) => {
                let _ = std::fs::remove_file(&temporary);
                Err(trouble(&temporary, &e))
            }
        }
    }

    /// The bytes of one row.
    pub fn read(&self, span: Span) -> Result<Vec<u8>> {
        let mut bytes = vec![0; span.bytes as usize];
        self.file
            .read_exact_at(&mut bytes, span.offset)
            .map_err(|e| trouble(&self.path, &e))?;
        Ok(bytes)
    }
}

/// Could this be the beginning of a row of ours that a crash cut short? A file of somebody else's is never touched.
fn is_beginning(line: &[u8]) -> bool {
    let begins = format!("{{\"id\":\"{}", super::scan::ID_PREFIX);
    let n = line.len().min(begins.len());
    line[..n] == begins.as_bytes()[..n] || line.iter().all(|b| *b == 0)
}

fn write_rows(path: &Path, from: &File, rows: &[Span]) -> std::io::Result<File> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let mut out = std::io::BufWriter::with_capacity(1 << 18, &mut file);
    let mut row = Vec::new();
    for span in rows {
        row.resize(span.bytes as usize, 0);
        from.read_exact_at(&mut row, span.offset)?;
        out.write_all(&row)?;
    }
    out.flush()?;
    drop(out);
    file.sync_all()?;
    Ok(file)
}

/// A new name counts once its folder is synced. Some file systems cannot; they have no better to offer.
fn sync_folder(path: &Path) {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

pub(super) fn trouble(path: &Path, e: &std::io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => Error::new(
            Code::Space,
            format!("{} cannot grow", path.display()),
            "the disk is full",
            "free some space and give the same command again: finished rows are kept",
        ),
        _ => Error::io(format!("{} cannot be used for results", path.display()), e),
    }
}

/// When a job began and under which settings, kept beside its output; open and locked as long as the job runs.
pub struct Sidecar {
    file: File,
    path: PathBuf,
}

/// What the sidecar says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct JobMark {
    pub version: u32,
    /// Unix seconds.
    pub created: u64,
    /// Hash of model and settings.
    pub settings: u64,
    /// Where failed rows go.
    #[serde(default)]
    pub errors: Option<PathBuf>,
}

impl JobMark {
    /// The errors file of `output`: where this says, or beside the output under that name where the files were moved together.
    pub fn errors_of(mark: Option<&JobMark>, output: &Path) -> PathBuf {
        let Some(path) = mark.and_then(|m| m.errors.as_deref()) else {
            return default_errors(output);
        };
        let moved = output.with_file_name(path.file_name().unwrap_or_default());
        match moved.exists() || !path.exists() {
            true => moved,
            false => path.to_path_buf(),
        }
    }
}

impl Sidecar {
    /// Takes the lock. Code::Locked when another process works on the same output.
    pub fn open(output: &Path) -> Result<Sidecar> {
        let path = sidecar(output);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| trouble(&path, &e))?;
        match file.try_lock() {
            Ok(()) => Ok(Sidecar { file, path }),
            Err(std::fs::TryLockError::WouldBlock) => Err(Error::new(
                Code::Locked,
                format!("{} is being written", output.display()),
                "another process works on this job",
                "wait for it, or give another output (or --shard i/n to share the work)",
            )),
            Err(std::fs::TryLockError::Error(e)) => Err(trouble(&path, &e)),
        }
    }

    /// What the sidecar of `output` says, where there is one that can be read.
    pub fn peek(output: &Path) -> Option<JobMark> {
        let text = std::fs::read_to_string(sidecar(output)).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// `None` where the job is new, or died before it had written this.
    pub fn read(&mut self) -> Result<Option<JobMark>> {
        let mut text = String::new();
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| (&self.file).take(64 << 10).read_to_string(&mut text))
            .map_err(|e| trouble(&self.path, &e))?;
        Ok(serde_json::from_str(&text).ok())
    }

    pub fn write(&mut self, mark: &JobMark) -> Result<()> {
        let text = serde_json::to_string(mark)
            .map_err(|e| Error::internal(format!("the job's mark cannot be written: {e}")))?;
        self.file
            .set_len(0)
            .and_then(|()| self.file.write_all_at(format!("{text}\n").as_bytes(), 0))
            .and_then(|()| self.file.sync_all())
            .map_err(|e| trouble(&self.path, &e))
    }
}
