//! One worker of a pack: fills a chunk from the source, writes it, syncs a file when its last chunk is down.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Chunk, Shared, Step};
use crate::checkpoint::TensorEntry;
use crate::error::{Code, Error, Result};
use crate::store::cast::{Counts, cast};
use crate::store::direct::{AlignedBuf, DirectFile};
use crate::store::layout::Piece;
use crate::units::{ALIGN_BYTES, FileId};

/// What all workers met in one piece.
#[derive(Default)]
pub(crate) struct TensorCounts {
    nan: AtomicU64,
    infinite: AtomicU64,
    overflow: AtomicU64,
}

impl TensorCounts {
    fn add(&self, counts: Counts) {
        self.nan.fetch_add(counts.nan, Ordering::Relaxed);
        self.infinite.fetch_add(counts.infinite, Ordering::Relaxed);
        self.overflow.fetch_add(counts.overflow, Ordering::Relaxed);
    }

    pub fn get(&self) -> Counts {
        Counts {
            nan: self.nan.load(Ordering::Relaxed),
            infinite: self.infinite.load(Ordering::Relaxed),
            overflow: self.overflow.load(Ordering::Relaxed),
        }
    }
}

/// An output file a worker has open.
pub(crate) struct Output {
    index: usize,
    file: DirectFile,
}

impl Output {
    pub fn open(index: usize, path: &Path) -> Result<Output> {
        let file = DirectFile::open_write(path)
            .map_err(|e| Error::io(format!("cannot open {}", path.display()), &e))?;
        Ok(Output { index, file })
    }
}

pub(crate) struct Worker<'a> {
    shared: &'a Shared<'a>,
    source: Option<(FileId, DirectFile)>,
    output: Option<Output>,
    input: AlignedBuf,
}

impl<'a> Worker<'a> {
    pub fn new(shared: &'a Shared<'a>, chunk_bytes: usize) -> Worker<'a> {
        Worker {
            shared,
            source: None,
            output: None,
            input: AlignedBuf::new(2 * chunk_bytes + 2 * ALIGN_BYTES as usize),
        }
    }

    /// The bytes of `chunk`: pieces of tensors, zeros between them.
    pub fn fill(&mut self, chunk: Chunk, out: &mut [u8]) -> Result<()> {
        let shared = self.shared;
        let pieces = &shared.plan.files[chunk.file].pieces;
        let end = chunk.offset + chunk.bytes as u64;
        let mut filled = chunk.offset;
        let first = pieces.partition_point(|p| p.end() <= chunk.offset);
        for (i, piece) in pieces.iter().enumerate().skip(first) {
            if piece.offset >= end {
                break;
            }
            let (from, to) = (piece.offset.max(chunk.offset), piece.end().min(end));
            let at = |x: u64| (x - chunk.offset) as usize;
            out[at(filled)..at(from)].fill(0);
            let counts = self.copy(piece, from - piece.offset, &mut out[at(from)..at(to)])?;
            if counts != Counts::default() {
                shared.counts[chunk.file][i].add(counts);
                let refused = counts.overflow > 0 && !shared.context.allow_overflow
                    || counts.nan + counts.infinite > 0 && shared.context.refuse_nonfinite;
                if refused {
                    shared.refused.store(true, Ordering::Relaxed);
                }
            }
            filled = to;
        }
        out[(filled - chunk.offset) as usize..].fill(0);
        Ok(())
    }

    /// Elements of `piece` from byte `skip` of the target on, cast into `out`. Chunks start at multiples of 64 KiB and
    /// pieces at multiples of 256, so that no element is ever cut in two.
    fn copy(&mut self, piece: &Piece, skip: u64, out: &mut [u8]) -> Result<Counts> {
        let entry = self.shared.plan.source(&piece.name)?;
        let target_bytes = piece.dtype.bytes() as u64;
        let first = piece.first_element + skip / target_bytes;
        let elements = out.len() as u64 / target_bytes;
        let source_bytes = entry.dtype.bytes() as u64;
        let offset = entry.offset + first * source_bytes;
        let want = (elements * source_bytes) as usize;
        self.open_source(entry)?;
        let Some((_, source)) = &self.source else {
            return Err(Error::internal("no source file is open"));
        };
        let path = &self.shared.plan.ckpt.files[entry.file.index()].path;
        let bytes = source.read(offset, want, &mut self.input).map_err(|e| {
            Error::io(
                format!("cannot read {want} bytes at {offset} of {}", path.display()),
                &e,
            )
        })?;
        if bytes.len() < want {
            return Err(Error::new(
                Code::Checkpoint,
                format!("cannot read {} from {}", piece.name, path.display()),
                format!("the file ends {} bytes too early", want - bytes.len()),
                "fetch the checkpoint again; if it is being downloaded, wait until that is done",
            ));
        }
        Ok(cast(bytes, entry.dtype, out, piece.dtype))
    }

    fn open_source(&mut self, entry: &TensorEntry) -> Result<()> {
        if self.source.as_ref().is_none_or(|(id, _)| *id != entry.file) {
            let path = &self.shared.plan.ckpt.files[entry.file.index()].path;
            let file = DirectFile::open(path)
                .map_err(|e| Error::io(format!("cannot open {}", path.display()), &e))?;
            self.source = Some((entry.file, file));
        }
        Ok(())
    }

    /// Writes a filled chunk; whoever writes a file's last one syncs it.
    pub fn write(&mut self, chunk: Chunk, bytes: &[u8]) -> Result<()> {
        let shared = self.shared;
        let name = || shared.plan.files[chunk.file].name.clone();
        if self.output.as_ref().is_none_or(|o| o.index != chunk.file) {
            self.output = Some(shared.output(chunk.file)?);
        }
        let Some(output) = &self.output else {
            return Err(Error::internal("no output file is open"));
        };
        let failed = |what: &str, e: std::io::Error| {
            Error::io(
                format!("cannot {what} {}", shared.dir.join(name()).display()),
                &e,
            )
        };
        shared
            .context
            .step(Step::Write(name(), chunk.offset))
            .and_then(|()| output.file.write(chunk.offset, bytes))
            .map_err(|e| failed("write", e))?;
        // AcqRel: the syncing worker must see that the others' writes have returned.
        if shared.left[chunk.file].fetch_sub(1, Ordering::AcqRel) == 1 {
            shared
                .context
                .step(Step::SyncFile(name()))
                .and_then(|()| output.file.sync())
                .map_err(|e| failed("sync", e))?;
        }
        Ok(())
    }
}
