//! One worker of a pack: fills a chunk from the source and writes it.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Chunk, Shared, Step};
use crate::checkpoint::TensorEntry;
use crate::error::{Code, Error, Result};
use crate::store::cast::{Counts, cast};
use crate::store::direct::{AlignedBuf, CachedFile, DirectFile};
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

/// Most reads past the page cache before it is asked again: misses one after the other double their number.
const MAX_COLD_READS: u32 = 16;

/// A source file a worker has open, past the page cache and through it.
struct Source {
    id: FileId,
    direct: DirectFile,
    cached: CachedFile,
    /// Reads until the cache is asked again, and how many they were after the last miss.
    cold: u32,
    backoff: u32,
}

impl Source {
    fn open(id: FileId, path: &Path) -> std::io::Result<Source> {
        Ok(Source {
            id,
            direct: DirectFile::open(path)?,
            cached: CachedFile::open(path)?,
            cold: 0,
            backoff: 0,
        })
    }

    fn read<'b>(
        &mut self,
        offset: u64,
        want: usize,
        buffer: &'b mut AlignedBuf,
    ) -> std::io::Result<&'b [u8]> {
        if self.cold > 0 {
            self.cold -= 1;
        } else if self.cached.read(offset, want, buffer).is_some() {
            self.backoff = 0;
            return Ok(&buffer.bytes()[..want]);
        } else {
            self.cold = self.backoff;
            self.backoff = (2 * self.backoff).clamp(1, MAX_COLD_READS);
        }
        self.direct.read(offset, want, buffer)
    }
}

pub(crate) struct Worker<'a> {
    shared: &'a Shared<'a>,
    source: Option<Source>,
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
        let Some(source) = &mut self.source else {
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
        if self.source.as_ref().is_none_or(|s| s.id != entry.file) {
            let path = &self.shared.plan.ckpt.files[entry.file.index()].path;
            let source = Source::open(entry.file, path)
                .map_err(|e| Error::io(format!("cannot open {}", path.display()), &e))?;
            self.source = Some(source);
        }
        Ok(())
    }

    /// Writes a filled chunk.
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
        // AcqRel: whoever is last must see that the others' writes have returned.
        let last = shared.left[chunk.file].fetch_sub(1, Ordering::AcqRel) == 1;
        if last && !output.file.is_direct() {
            // Through the page cache: out of it again before the next file fills it.
            output.file.sync().map_err(|e| failed("sync", e))?;
        }
        Ok(())
    }
}
