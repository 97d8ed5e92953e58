//! Reads every byte of a pack and compares it with what was recorded.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::checksums::Checksums;
use super::direct::{AlignedBuf, DirectFile};
use super::layout::UnitLayout;
use super::lock::{self, LockMode};
use super::manifest::{self, CHECKSUMS, MANIFEST, Manifest};
use super::{LAST_USED, load_checksums, unpacked};
use crate::error::{Code, Error, Result};
use crate::units::{ALIGN_BYTES, BLOCK_BYTES, FileId};

const READERS: usize = 4;
const CHUNK_BYTES: u64 = 4 << 20;
/// Mismatches listed one by one; beyond that they are only counted.
const MAX_LISTED: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// A block's bytes are not those recorded.
    Mismatch,
    Missing,
    /// The file is shorter or longer than recorded.
    Length,
    /// The disk refused to read it.
    Unreadable,
    /// A config or tokenizer file was changed.
    Changed,
    /// A file that does not belong there.
    Extra,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub kind: ProblemKind,
    pub file: String,
    /// 64 KiB block of the file.
    pub block: Option<u64>,
    /// The units whose bytes lie there: `layer 3`.
    pub units: Vec<String>,
    pub detail: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    pub dir: PathBuf,
    pub files: usize,
    pub bytes: u64,
    pub seconds: f64,
    /// Blocks that differ, listed or not.
    pub bad_blocks: u64,
    pub problems: Vec<Problem>,
}

impl VerifyReport {
    /// True when every byte that the model needs is as recorded; files that do not belong there do no harm.
    pub fn is_good(&self) -> bool {
        self.problems.iter().all(|p| p.kind == ProblemKind::Extra)
    }
}

/// Reads all of the packed folder `dir`. `progress`: bytes done, bytes in all.
///
/// # Errors
/// `Store` when manifest or checksums are no guide any more, `Locked` while somebody packs there, `Interrupted`.
/// Damaged, missing or truncated weight files are no error but problems in the report.
pub fn verify(
    dir: &Path,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<VerifyReport> {
    let start = Instant::now();
    let Some(_lock) = lock::try_lock(dir, LockMode::Shared)? else {
        return Err(Error::new(
            Code::Locked,
            format!("{} is being packed", dir.display()),
            format!("{} holds its lock", lock::holder(dir)),
            "wait until it has finished",
        ));
    };
    let manifest = Manifest::load(dir)?.ok_or_else(|| unpacked(dir))?;
    let opened = manifest::validate(dir, &manifest)?;
    let checksums = load_checksums(dir, &manifest)?;
    let scan = Scan {
        dir,
        manifest: &manifest,
        units: &opened.units,
        checksums: &checksums,
        cancel,
        chunks: chunks(&manifest),
        next: AtomicUsize::new(0),
        done_bytes: AtomicU64::new(0),
        bad_blocks: AtomicU64::new(0),
        problems: Mutex::new(Vec::new()),
    };
    scan.check_lengths();
    scan.check_copies();
    scan.check_extras()?;
    scan.read_all(progress);
    if cancel.load(Ordering::Relaxed) {
        return Err(Error::new(
            Code::Interrupted,
            "verifying was interrupted",
            "a stop was asked for",
            "run the command again",
        ));
    }
    let bad_blocks = scan.bad_blocks.load(Ordering::Relaxed);
    let bytes = scan.done_bytes.load(Ordering::Relaxed);
    let mut problems = scan
        .problems
        .into_inner()
        .unwrap_or_else(|p| p.into_inner());
    problems.sort_by(|a, b| (&a.file, a.block).cmp(&(&b.file, b.block)));
    Ok(VerifyReport {
        dir: dir.to_path_buf(),
        files: manifest.files.len(),
        bytes,
        seconds: start.elapsed().as_secs_f64(),
        bad_blocks,
        problems,
    })
}

/// File, offset, length.
fn chunks(manifest: &Manifest) -> Vec<(usize, u64, u64)> {
    let mut chunks = Vec::new();
    for (i, file) in manifest.files.iter().enumerate() {
        for offset in (0..file.bytes).step_by(CHUNK_BYTES as usize) {
            chunks.push((i, offset, CHUNK_BYTES.min(file.bytes - offset)));
        }
    }
    chunks
}

struct Scan<'a> {
    dir: &'a Path,
    manifest: &'a Manifest,
    units: &'a [UnitLayout],
    checksums: &'a Checksums,
    cancel: &'a AtomicBool,
    chunks: Vec<(usize, u64, u64)>,
    next: AtomicUsize,
    done_bytes: AtomicU64,
    bad_blocks: AtomicU64,
    problems: Mutex<Vec<Problem>>,
}

impl Scan<'_> {
    fn report(&self, problem: Problem) {
        let mut problems = self.problems.lock().unwrap_or_else(|p| p.into_inner());
        if problems.len() < MAX_LISTED {
            problems.push(problem);
        }
    }

    fn problem(&self, kind: ProblemKind, file: &str, detail: impl Into<String>) {
        self.report(Problem {
            kind,
            file: file.to_string(),
            block: None,
            units: Vec::new(),
            detail: detail.into(),
        });
    }

    fn check_lengths(&self) {
        for (i, file) in self.manifest.files.iter().enumerate() {
            let (kind, detail) = match fs::symlink_metadata(self.dir.join(&file.name)) {
                Ok(m) if !m.is_file() => (ProblemKind::Missing, "not a regular file".to_string()),
                Ok(m) if m.len() == file.bytes => continue,
                Ok(m) => (
                    ProblemKind::Length,
                    format!("{} bytes instead of {}", m.len(), file.bytes),
                ),
                Err(e) => (ProblemKind::Missing, e.to_string()),
            };
            self.report(Problem {
                kind,
                file: file.name.clone(),
                block: None,
                units: self.units_at(i, 0, file.bytes),
                detail,
            });
        }
    }

    fn check_copies(&self) {
        for copy in &self.manifest.copies {
            match manifest::read_small(self.dir, &copy.name, copy.bytes) {
                Ok(Some(raw)) if copy.fits(&raw) => {}
                Ok(None) => self.problem(ProblemKind::Missing, &copy.name, "it is not there"),
                _ => self.problem(
                    ProblemKind::Changed,
                    &copy.name,
                    "not the bytes that were packed",
                ),
            }
        }
    }

    fn check_extras(&self) -> Result<()> {
        let failed =
            |e: std::io::Error| Error::io(format!("cannot list {}", self.dir.display()), &e);
        let fixed = [
            MANIFEST,
            CHECKSUMS,
            LAST_USED,
            "lock",
            "tune.json",
            "tune-gpu.json",
            "rates.json",
        ];
        for entry in fs::read_dir(self.dir).map_err(failed)? {
            let name = entry
                .map_err(failed)?
                .file_name()
                .to_string_lossy()
                .into_owned();
            let known = fixed.contains(&name.as_str())
                || self.manifest.files.iter().any(|f| f.name == name)
                || self.manifest.copies.iter().any(|c| c.name == name);
            if !known {
                self.problem(ProblemKind::Extra, &name, "the manifest does not name it");
            }
        }
        Ok(())
    }

    fn read_all(&self, progress: &mut dyn FnMut(u64, u64)) {
        let total = self.manifest.files.iter().map(|f| f.bytes).sum();
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS)
                .map(|_| scope.spawn(|| self.read_chunks()))
                .collect();
            while readers.iter().any(|r| !r.is_finished()) {
                progress(self.done_bytes.load(Ordering::Relaxed), total);
                // Short models end soon, long ones want few calls.
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        progress(self.done_bytes.load(Ordering::Relaxed), total);
    }

    fn read_chunks(&self) {
        let mut buffer = AlignedBuf::new((CHUNK_BYTES + 2 * ALIGN_BYTES) as usize);
        let mut open: Option<(usize, DirectFile)> = None;
        while !self.cancel.load(Ordering::Relaxed) {
            let Some(&(index, offset, bytes)) =
                self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed))
            else {
                return;
            };
            if open.as_ref().is_none_or(|(i, _)| *i != index) {
                let path = self.dir.join(&self.manifest.files[index].name);
                // A missing or strange file has been reported already, with its units.
                let regular = fs::symlink_metadata(&path).is_ok_and(|m| m.is_file());
                let file = if regular {
                    DirectFile::open(&path).ok()
                } else {
                    None
                };
                open = file.map(|f| (index, f));
            }
            let Some((_, file)) = &open else {
                continue;
            };
            match file.read(offset, bytes as usize, &mut buffer) {
                Ok(read) => self.compare(index, offset, bytes, read),
                Err(e) => self.report(Problem {
                    kind: ProblemKind::Unreadable,
                    file: self.manifest.files[index].name.clone(),
                    block: Some(offset / BLOCK_BYTES),
                    units: self.units_at(index, offset, bytes),
                    detail: format!("{bytes} bytes at {offset}: {e}"),
                }),
            }
            self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    fn compare(&self, index: usize, offset: u64, bytes: u64, read: &[u8]) {
        let mut block = offset / BLOCK_BYTES;
        let end = (offset + bytes).div_ceil(BLOCK_BYTES);
        let mut rest = read;
        while block < end {
            // An empty rest checks nothing: what is not there is bad.
            let checked = match rest.is_empty() {
                true => Err(block),
                false => self.checksums.check(FileId(index as u32), block, rest),
            };
            let Err(bad) = checked else {
                block += rest.len().div_ceil(BLOCK_BYTES as usize) as u64;
                rest = &[];
                continue;
            };
            self.bad_blocks.fetch_add(1, Ordering::Relaxed);
            let at = bad * BLOCK_BYTES;
            self.report(Problem {
                kind: ProblemKind::Mismatch,
                file: self.manifest.files[index].name.clone(),
                block: Some(bad),
                units: self.units_at(index, at, BLOCK_BYTES),
                detail: format!("the 64 KiB at {at} are not those recorded"),
            });
            let skip = ((bad + 1 - block) * BLOCK_BYTES) as usize;
            rest = &rest[skip.min(rest.len())..];
            block = bad + 1;
        }
    }

    fn units_at(&self, file: usize, offset: u64, bytes: u64) -> Vec<String> {
        let touches = |u: &&UnitLayout| {
            u.extents.iter().any(|e| {
                e.file.index() == file
                    && e.offset < offset.saturating_add(bytes)
                    && offset < e.end()
            })
        };
        self.units
            .iter()
            .filter(touches)
            .map(|u| u.kind.to_string())
            .collect()
    }
}
