//! Writing a packed folder: cast, align, checksum, and the manifest last.
//!
//! A few workers each take the next chunk of the output, read what belongs there from the source, cast it, hash it and
//! write it: reads, arithmetic and writes overlap without a queue, and memory stays at the workers' own buffers.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::checksums::Checksums;
use super::direct::AlignedBuf;
use super::layout::PackedFile;
use super::lock::Holder;
use super::manifest::{CHECKSUMS, CopyRecord, MANIFEST};
use super::plan::Plan;
use super::{clean, durable, lock, space};
use crate::error::{Code, Error, Result};
use crate::planted::{self, Bug};
use crate::units::{BLOCK_BYTES, FileId, align_down, human_bytes};
use worker::{Output, TensorCounts, Worker};

mod worker;

/// Workers enough to keep a drive busy with reads and writes while others cast.
const WORKERS: usize = 4;
/// Bytes of chunk a worker's buffers take: the chunk itself and a source of twice the element size.
const BUFFERS_PER_CHUNK: u64 = 3;
/// Room asked for beside the weights: folder entries, the file system's own records.
const SLACK_BYTES: u64 = 1 << 20;

/// What a pack is doing, for whoever shows it.
#[derive(Clone, Debug)]
pub enum PackProgress {
    /// Another process has the folder.
    Waiting { holder: Holder, waited: Duration },
    /// Bytes of the packed files written so far; the rate and the time left follow from these.
    Packing {
        bytes_done: u64,
        bytes_total: u64,
        elapsed: Duration,
    },
    /// All weights are written; the manifest is next.
    Finishing,
}

/// What a finished pack has to say.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct PackReport {
    pub bytes: u64,
    pub seconds: f64,
    /// Tensors with NaN or infinite values, or values that the target type cannot hold.
    pub warnings: Vec<TensorWarning>,
    /// Packs removed to keep the offload limit.
    pub removed: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TensorWarning {
    pub tensor: String,
    pub nan: u64,
    pub infinite: u64,
    pub overflow: u64,
}

/// The steps of a pack, in order, for tests that stop or break it at each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Mark,
    RemoveManifest,
    RemoveOld,
    Allocate(String),
    Write(String, u64),
    SyncFile(String),
    Copy(String),
    Checksums,
    SyncFolder,
    Manifest,
    Done,
}

/// Called before each step; an error fails that step as the system call would. For tests only.
pub type FailPoint = Arc<dyn Fn(&Step) -> io::Result<()> + Send + Sync>;

/// How to write, as opposed to what.
pub(crate) struct PackContext<'a> {
    pub buffer_bytes: u64,
    pub allow_overflow: bool,
    pub refuse_nonfinite: bool,
    pub cancel: &'a AtomicBool,
    pub fail_point: Option<&'a FailPoint>,
}

impl PackContext<'_> {
    pub fn step(&self, step: Step) -> io::Result<()> {
        self.fail_point.map_or(Ok(()), |f| f(&step))
    }
}

/// A piece of one output file, for one worker at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    file: usize,
    offset: u64,
    bytes: usize,
}

/// What the workers share.
pub(crate) struct Shared<'a> {
    plan: &'a Plan<'a>,
    context: &'a PackContext<'a>,
    dir: &'a Path,
    chunks: Vec<Chunk>,
    next: AtomicUsize,
    /// Chunks of each file that are not written yet.
    left: Vec<AtomicUsize>,
    done_bytes: AtomicU64,
    /// Set by the first worker that fails.
    stop: AtomicBool,
    /// Set when something was counted that refuses the pack: from then on only counting goes on.
    refused: AtomicBool,
    counts: Vec<Vec<TensorCounts>>,
    checksums: Checksums,
}

/// Packs into `dir`, which this process has locked for itself. On any error everything written is removed again; an
/// error before the first byte leaves the folder as it was.
pub(crate) fn pack_into(
    dir: &Path,
    plan: &Plan<'_>,
    context: &PackContext<'_>,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<PackReport> {
    let needed = plan.bytes().saturating_add(SLACK_BYTES);
    space::require(dir, needed, clean::recognised_bytes(dir))?;
    let result = write_all(dir, plan, context, progress);
    if result.is_err() {
        // What cannot be removed stays unfinished and is removed by the next packer or cleaner.
        let _ = clean::remove_contents(dir);
    }
    result
}

fn write_all(
    dir: &Path,
    plan: &Plan<'_>,
    context: &PackContext<'_>,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<PackReport> {
    let start = Instant::now();
    let failed =
        |what: &str, e: io::Error| Error::io(format!("cannot {what} in {}", dir.display()), &e);
    begin(dir, context).map_err(|e| failed("begin packing", e))?;
    for file in &plan.files {
        context
            .step(Step::Allocate(file.name.clone()))
            .and_then(|()| allocate(dir, file))
            .map_err(|e| failed(&format!("make room for {}", file.name), e))?;
    }
    plan.ckpt.check_unchanged()?;
    let (checksums, warnings) = write_weights(dir, plan, context, progress)?;
    if !planted::is(Bug::ManifestEarly) {
        sync_weights(dir, plan, context)?;
    }
    progress(PackProgress::Finishing);
    for (name, raw) in &plan.copies {
        context
            .step(Step::Copy(name.clone()))
            .and_then(|()| durable::write_synced(&dir.join(name), raw))
            .map_err(|e| failed(&format!("write {name}"), e))?;
    }
    let raw = checksums
        .to_bytes()
        .ok_or_else(|| Error::internal("a block was packed without its checksum"))?;
    context
        .step(Step::Checksums)
        .and_then(|()| durable::write_synced(&dir.join(CHECKSUMS), &raw))
        .map_err(|e| failed("write checksums.bin", e))?;
    plan.ckpt.check_unchanged()?;
    if context.cancel.load(Ordering::Relaxed) {
        return Err(interrupted());
    }
    context
        .step(Step::SyncFolder)
        .and_then(|()| durable::sync_dir(dir))
        .map_err(|e| failed("sync the folder", e))?;
    context
        .step(Step::Manifest)
        .map_err(|e| failed("write the manifest", e))?;
    plan.manifest(CopyRecord::of(CHECKSUMS, &raw))?.save(dir)?;
    if planted::is(Bug::ManifestEarly) {
        sync_weights(dir, plan, context)?;
    }
    // The folder's own name must last as well.
    context
        .step(Step::Done)
        .and_then(|()| dir.parent().map_or(Ok(()), durable::sync_dir))
        .map_err(|e| failed("sync the folder's parent", e))?;
    Ok(PackReport {
        bytes: plan.bytes(),
        seconds: start.elapsed().as_secs_f64(),
        warnings,
        removed: Vec::new(),
    })
}

/// Marks the folder as ours, then clears it; the manifest goes first, so that no crash leaves one beside other files
/// than it names.
fn begin(dir: &Path, context: &PackContext<'_>) -> io::Result<()> {
    context.step(Step::Mark)?;
    lock::write_holder(dir)?;
    context.step(Step::RemoveManifest)?;
    durable::remove(&dir.join(MANIFEST))?;
    durable::sync_dir(dir)?;
    context.step(Step::RemoveOld)?;
    clean::remove_old_data(dir)
}

/// Takes the file's blocks from the file system now, so that a full disk is met before the first byte is copied.
fn allocate(dir: &Path, file: &PackedFile) -> io::Result<()> {
    let handle = fs::File::create_new(dir.join(&file.name))?;
    loop {
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&handle, flags, 0, file.bytes) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => return handle.set_len(file.bytes),
            Err(e) => return Err(e.into()),
        }
    }
}

fn write_weights(
    dir: &Path,
    plan: &Plan<'_>,
    context: &PackContext<'_>,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<(Checksums, Vec<TensorWarning>)> {
    let per_worker = context.buffer_bytes / (WORKERS as u64 * BUFFERS_PER_CHUNK);
    let chunk_bytes = align_down(per_worker, BLOCK_BYTES).clamp(BLOCK_BYTES, 64 << 20);
    let shared = Shared::new(dir, plan, context, chunk_bytes)?;
    let workers = WORKERS.min(shared.chunks.len());
    let total = plan.files.iter().map(|f| f.bytes).sum();
    let start = Instant::now();
    let result = std::thread::scope(|scope| {
        let (ended, endings) = mpsc::channel();
        for _ in 0..workers {
            let (ended, shared) = (ended.clone(), &shared);
            scope.spawn(move || {
                let result = run_worker(shared, chunk_bytes as usize);
                if result.is_err() {
                    shared.stop.store(true, Ordering::Relaxed);
                }
                let _ = ended.send(result);
            });
        }
        drop(ended);
        let mut first_error = None;
        loop {
            match endings.recv_timeout(Duration::from_millis(100)) {
                Ok(Ok(())) => {}
                Ok(Err(e)) => first_error = first_error.or(Some(e)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            progress(PackProgress::Packing {
                bytes_done: shared.done_bytes.load(Ordering::Relaxed),
                bytes_total: total,
                elapsed: start.elapsed(),
            });
        }
        first_error.map_or(Ok(()), Err)
    });
    result?;
    let warnings = shared.warnings();
    shared.refuse(&warnings)?;
    Ok((shared.checksums, warnings))
}

/// Together, not one by one on the way: written past the page cache, only the file system's own records are left, and the
/// first sync takes most of them along.
fn sync_weights(dir: &Path, plan: &Plan<'_>, context: &PackContext<'_>) -> Result<()> {
    for file in &plan.files {
        let path = dir.join(&file.name);
        context
            .step(Step::SyncFile(file.name.clone()))
            .and_then(|()| match planted::is(Bug::WeightsNotSynced) {
                true => Ok(()),
                false => fs::File::open(&path)?.sync_all(),
            })
            .map_err(|e| Error::io(format!("cannot sync {}", path.display()), &e))?;
    }
    Ok(())
}

fn run_worker(shared: &Shared<'_>, chunk_bytes: usize) -> Result<()> {
    let mut worker = Worker::new(shared, chunk_bytes);
    let mut out = AlignedBuf::new(chunk_bytes);
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        if shared.context.cancel.load(Ordering::Relaxed) {
            return Err(interrupted());
        }
        let Some(&chunk) = shared
            .chunks
            .get(shared.next.fetch_add(1, Ordering::Relaxed))
        else {
            return Ok(());
        };
        let out = &mut out.bytes_mut()[..chunk.bytes];
        worker.fill(chunk, out)?;
        let first_block = chunk.offset / BLOCK_BYTES;
        shared
            .checksums
            .check(FileId(chunk.file as u32), first_block, out)
            .map_err(|_| Error::internal("a block was packed twice"))?;
        if !shared.refused.load(Ordering::Relaxed) {
            let written = worker.write(chunk, out);
            if !planted::is(Bug::PackWriteIgnored) {
                written?;
            }
        }
        shared
            .done_bytes
            .fetch_add(chunk.bytes as u64, Ordering::Relaxed);
    }
}

impl<'a> Shared<'a> {
    fn new(
        dir: &'a Path,
        plan: &'a Plan<'a>,
        context: &'a PackContext<'a>,
        chunk_bytes: u64,
    ) -> Result<Shared<'a>> {
        let mut chunks = Vec::new();
        let mut left = Vec::new();
        for (file, f) in plan.files.iter().enumerate() {
            let before = chunks.len();
            for offset in (0..f.bytes).step_by(chunk_bytes as usize) {
                let bytes = chunk_bytes.min(f.bytes - offset) as usize;
                chunks.push(Chunk {
                    file,
                    offset,
                    bytes,
                });
            }
            left.push(AtomicUsize::new(chunks.len() - before));
        }
        let lengths: Vec<u64> = plan.files.iter().map(|f| f.bytes).collect();
        let counts = plan
            .files
            .iter()
            .map(|f| f.pieces.iter().map(|_| TensorCounts::default()));
        Ok(Shared {
            plan,
            context,
            dir,
            chunks,
            next: AtomicUsize::new(0),
            left,
            done_bytes: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            counts: counts.map(Iterator::collect).collect(),
            checksums: Checksums::unseen(plan.identity, &lengths)?,
        })
    }

    fn output(&self, file: usize) -> Result<Output> {
        Output::open(file, &self.dir.join(&self.plan.files[file].name))
    }

    /// One line a tensor, however many files its rows went to.
    fn warnings(&self) -> Vec<TensorWarning> {
        let mut warnings: Vec<TensorWarning> = Vec::new();
        for (file, counts) in self.plan.files.iter().zip(&self.counts) {
            for (piece, count) in file.pieces.iter().zip(counts) {
                let c = count.get();
                if c == Default::default() {
                    continue;
                }
                match warnings.iter_mut().find(|w| w.tensor == piece.name) {
                    Some(w) => {
                        w.nan += c.nan;
                        w.infinite += c.infinite;
                        w.overflow += c.overflow;
                    }
                    None => warnings.push(TensorWarning {
                        tensor: piece.name.clone(),
                        nan: c.nan,
                        infinite: c.infinite,
                        overflow: c.overflow,
                    }),
                }
            }
        }
        warnings
    }

    fn refuse(&self, warnings: &[TensorWarning]) -> Result<()> {
        if !self.context.allow_overflow {
            let list = named(warnings, |w| w.overflow);
            if !list.is_empty() {
                return Err(Error::new(
                    Code::Unsupported,
                    format!("{} cannot be cast without loss", self.plan.label),
                    format!("values too large for the target type: {list}"),
                    "use --dtype bfloat16, float32 or auto, or allow the overflow (they become infinite)",
                ));
            }
        }
        if self.context.refuse_nonfinite {
            let list = named(warnings, |w| w.nan + w.infinite);
            if !list.is_empty() {
                return Err(Error::new(
                    Code::Checkpoint,
                    format!("{} has weights that are no numbers", self.plan.label),
                    format!("NaN or infinite values: {list}"),
                    "get an undamaged checkpoint, or pack without refusing them",
                ));
            }
        }
        Ok(())
    }
}

/// `model.norm.weight (3), lm_head.weight (1) and 7 more tensors`.
fn named(warnings: &[TensorWarning], count: impl Fn(&TensorWarning) -> u64) -> String {
    let hits: Vec<String> = warnings
        .iter()
        .filter(|w| count(w) > 0)
        .map(|w| format!("{} ({})", w.tensor, count(w)))
        .collect();
    match hits.len() {
        0..=5 => hits.join(", "),
        n => format!("{} and {} more tensors", hits[..5].join(", "), n - 5),
    }
}

pub(crate) fn interrupted() -> Error {
    Error::new(
        Code::Interrupted,
        "packing was interrupted",
        "a stop was asked for",
        "run the command again: what was written has been removed",
    )
}

impl PackReport {
    /// `14.14 GB in 7.1 s, 1.99 GB/s`.
    pub fn summary(&self) -> String {
        let rate = self.bytes as f64 / self.seconds.max(1e-9) / 1e9;
        format!(
            "{} in {:.1} s, {rate:.2} GB/s",
            human_bytes(self.bytes),
            self.seconds
        )
    }
}
