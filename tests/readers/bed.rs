//! What every test here is made of: files on a disk, a reader over them, memory to read into.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tensorpager::error::{Code, Result};
use tensorpager::io::{
    Arena, FaultReader, Faults, Flights, OpenFile, ReadOp, Reader, ReaderKind, Region, open_reader,
};
use tensorpager::units::{ALIGN_BYTES, align_up};

pub const KINDS: [ReaderKind; 3] = [ReaderKind::IoUring, ReaderKind::Threads, ReaderKind::Mmap];
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Files on a disk (the system's temporary directory may be memory).
pub fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn content(bytes: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

pub fn file(dir: &Path, name: &str, bytes: usize) -> (PathBuf, Vec<u8>) {
    let path = dir.join(name);
    let content = content(bytes, bytes as u64);
    std::fs::write(&path, &content).unwrap();
    (path, content)
}

/// `None`, with the reason printed, where the system has no io_uring.
pub fn reader(
    kind: ReaderKind,
    paths: &[PathBuf],
    arena: &Arena,
    depth: usize,
) -> Option<Box<dyn Reader>> {
    let files = paths
        .iter()
        .map(|p| OpenFile::open(p, true).unwrap())
        .collect();
    match open_reader(kind, files, arena, depth) {
        Ok(reader) => Some(reader),
        Err(error) if error.code() == Code::Unsupported => {
            println!("skipped {kind}: {}", error.cause());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// One reader over some files, a region that can hold what is read, and the reads.
pub struct Bed {
    pub flights: Flights,
    pub region: Region,
    pub out: Vec<ReadOp>,
    pub order: Vec<u64>,
}

impl Bed {
    pub fn new(
        kind: ReaderKind,
        faults: Option<Faults>,
        paths: &[PathBuf],
        room: u64,
        depth: usize,
    ) -> Option<Bed> {
        Bed::with_limit(kind, faults, paths, room, depth, PATIENCE)
    }

    pub fn with_limit(
        kind: ReaderKind,
        faults: Option<Faults>,
        paths: &[PathBuf],
        room: u64,
        depth: usize,
        limit: Duration,
    ) -> Option<Bed> {
        let arena = Arena::new(room).unwrap();
        let region = arena.take(room).unwrap();
        let bare = reader(kind, paths, &arena, depth)?;
        let reader: Box<dyn Reader> = match faults {
            Some(faults) => Box::new(FaultReader::new(bare, faults)),
            None => bare,
        };
        Some(Bed::over(reader, paths.to_vec(), region, limit))
    }

    pub fn over(
        reader: Box<dyn Reader>,
        paths: Vec<PathBuf>,
        region: Region,
        limit: Duration,
    ) -> Bed {
        Bed {
            out: Vec::with_capacity(reader.capacity()),
            flights: Flights::new(reader, paths, limit),
            region,
            order: Vec::new(),
        }
    }

    pub fn send(&mut self, file: u32, offset: u64, len: usize, want: usize, tag: u64) {
        let frame = self.region.lend(len);
        self.flights.submit(ReadOp {
            file,
            offset,
            frame,
            want,
            tag,
        });
    }

    pub fn reap(&mut self) -> Result<()> {
        self.flights.reap(PATIENCE, &mut self.out)?;
        self.order.extend(self.out.drain(..).map(|op| op.tag));
        Ok(())
    }

    /// Reads `bytes` of file 0 into the front of the region, block by block, the queue kept full.
    pub fn read_file(&mut self, bytes: usize, block: usize) -> Result<()> {
        let mut offset = 0;
        let mut tag = 0;
        while offset < bytes || self.flights.in_flight() > 0 {
            while offset < bytes && self.flights.room() > 0 {
                let want = block.min(bytes - offset);
                let len = align_up(want as u64, ALIGN_BYTES) as usize;
                self.send(0, offset as u64, len, want, tag);
                offset += want;
                tag += 1;
            }
            self.reap()?;
        }
        Ok(())
    }
}

pub fn none() -> Faults {
    Faults::default()
}
