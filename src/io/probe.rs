//! What each reader gets out of a set of files: the rates `bench io` prints and the planner's bound is made of.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::{Arena, Flights, MAX_QUEUE_DEPTH, OpenFile, ReadOp, ReaderKind, Region, mmap};
use crate::error::{Code, Error, Result};
use crate::units::{ALIGN_BYTES, align_up};

/// Measurements to make: every kind with every block size at every depth.
#[derive(Clone, Debug)]
pub struct Sweep {
    pub files: Vec<PathBuf>,
    pub kinds: Vec<ReaderKind>,
    /// Bytes of one read, multiples of 4096.
    pub block_bytes: Vec<usize>,
    /// Reads in flight.
    pub depths: Vec<usize>,
    /// Time for each measurement. One that goes through the page cache ends with the files, before it reads from memory.
    pub each: Duration,
    /// Raised by whoever wants no more of it.
    pub cancel: Arc<AtomicBool>,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct IoRow {
    /// `io_uring`, `threads` or `mmap`: the one that ran, whatever was asked for.
    pub reader: &'static str,
    pub block_bytes: usize,
    pub depth: usize,
    /// 10^9 bytes a second.
    pub gb_per_s: f64,
    /// Processor seconds of the whole process for each 10^9 bytes.
    pub cpu_s_per_gb: f64,
    /// Whether every file was read past the page cache.
    pub direct: bool,
}

/// How long a wait for the drive may keep a wish to stop waiting.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Runs the sweep, row by row, telling each to `progress` as it comes.
///
/// Memory: the largest block size times its depth. Errors: those of reading; [`Code::Usage`] for a sweep of nothing;
/// [`Code::Interrupted`] soon after `cancel` was raised.
pub fn sweep(what: &Sweep, progress: &mut dyn FnMut(&IoRow)) -> Result<Vec<IoRow>> {
    let block_ok = |&b: &usize| b > 0 && b.is_multiple_of(ALIGN_BYTES as usize);
    if what.files.is_empty() || !what.block_bytes.iter().all(block_ok) {
        return Err(Error::new(
            Code::Usage,
            "cannot measure reading",
            "there are no files, or a block size is no multiple of 4096",
            "give a model with weights and block sizes like 256KiB or 4MiB",
        ));
    }
    let mut rows = Vec::new();
    for &kind in &what.kinds {
        for &block in &what.block_bytes {
            for &depth in &what.depths {
                let row = measure(what, kind, block, depth.clamp(1, MAX_QUEUE_DEPTH))?;
                progress(&row);
                rows.push(row);
            }
        }
    }
    Ok(rows)
}

fn measure(what: &Sweep, kind: ReaderKind, block: usize, depth: usize) -> Result<IoRow> {
    let files = what
        .files
        .iter()
        .map(|path| OpenFile::open(path, true))
        .collect::<Result<Vec<_>>>()?;
    let uncached = kind != ReaderKind::Mmap && files.iter().all(OpenFile::direct);
    if !uncached {
        files.iter().for_each(|file| mmap::drop_cache(file.file()));
    }
    let lengths: Vec<u64> = files.iter().map(|file| file.bytes).collect();
    let arena = Arena::new((block * depth) as u64)?;
    let frames = (0..depth).map_while(|_| arena.take(block as u64)).collect();
    let reader = super::open_reader(kind, files, &arena, depth)?;
    let flights = Flights::new(reader, what.files.clone(), Flights::DEFAULT_STALL_LIMIT);
    let mut run = Run {
        flights,
        frames,
        walk: Walk::new(lengths, block as u64),
        out: Vec::with_capacity(depth),
        bytes: 0,
    };
    let cpu = cpu_seconds();
    let start = Instant::now();
    run.read(what.each, !uncached, &what.cancel)?;
    let seconds = start.elapsed().as_secs_f64();
    // Taken while the reader's threads still live: the time of ended ones is not listed.
    let cpu = cpu_seconds() - cpu;
    let gb = run.bytes as f64 / 1e9;
    Ok(IoRow {
        reader: run.flights.name(),
        block_bytes: block,
        depth,
        gb_per_s: gb / seconds,
        cpu_s_per_gb: if gb > 0.0 { cpu / gb } else { 0.0 },
        direct: uncached,
    })
}

/// Reads block after block of file after file, `depth` of them in flight.
struct Run {
    flights: Flights,
    frames: Vec<Region>,
    walk: Walk,
    out: Vec<ReadOp>,
    bytes: u64,
}

impl Run {
    fn read(&mut self, time: Duration, once: bool, cancel: &AtomicBool) -> Result<()> {
        let start = Instant::now();
        for frame in 0..self.frames.len() {
            self.send(frame, once);
        }
        while self.flights.in_flight() > 0 {
            if cancel.load(Relaxed) {
                return Err(Error::interrupted());
            }
            self.flights.reap(LONGEST_WAIT, &mut self.out)?;
            while let Some(op) = self.out.pop() {
                self.bytes += op.want as u64;
                let frame = op.tag as usize;
                drop(op);
                if start.elapsed() < time {
                    self.send(frame, once);
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, index: usize, once: bool) {
        if once && self.walk.rounds > 0 {
            return;
        }
        let Some((file, offset, want)) = self.walk.next() else {
            return;
        };
        let region = &mut self.frames[index];
        region.rewind();
        self.flights.submit(ReadOp {
            file,
            offset,
            frame: region.lend(align_up(want as u64, ALIGN_BYTES) as usize),
            want,
            tag: index as u64,
        });
    }
}

/// The blocks of a set of files, round and round.
struct Walk {
    lengths: Vec<u64>,
    block: u64,
    file: usize,
    offset: u64,
    /// Times the whole set has been handed out.
    rounds: u64,
}

impl Walk {
    fn new(lengths: Vec<u64>, block: u64) -> Walk {
        Walk {
            lengths,
            block,
            file: 0,
            offset: 0,
            rounds: 0,
        }
    }

    /// File, offset and wanted bytes; `None` when all files are empty.
    fn next(&mut self) -> Option<(u32, u64, usize)> {
        if self.lengths.iter().all(|&bytes| bytes == 0) {
            return None;
        }
        while self.lengths[self.file] == 0 {
            self.turn();
        }
        let left = self.lengths[self.file] - self.offset;
        let want = left.min(self.block);
        let block = (self.file as u32, self.offset, want as usize);
        self.offset += want;
        if want == left {
            self.turn();
        }
        Some(block)
    }

    fn turn(&mut self) {
        self.offset = 0;
        self.file += 1;
        if self.file == self.lengths.len() {
            self.file = 0;
            self.rounds += 1;
        }
    }
}

/// Processor time of the process's living threads, kernel workers of its rings included. 0 where the system does not tell.
fn cpu_seconds() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        return 0.0;
    };
    let nanoseconds: u64 = tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    nanoseconds as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walk_covers_every_byte_once_a_round() {
        let mut walk = Walk::new(vec![0, 10_000, 0, 4096], 8192);
        let round: Vec<_> = std::iter::from_fn(|| walk.next()).take(3).collect();
        assert_eq!(round, [(1, 0, 8192), (1, 8192, 1808), (3, 0, 4096)]);
        assert_eq!(walk.rounds, 1);
        assert_eq!(walk.next(), Some((1, 0, 8192)));
        assert_eq!(Walk::new(vec![0, 0], 4096).next(), None);
    }

    #[test]
    fn a_sweep_has_a_row_for_each_setting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, vec![1u8; 300_000]).unwrap();
        let what = Sweep {
            files: vec![path],
            kinds: vec![ReaderKind::Auto, ReaderKind::Threads, ReaderKind::Mmap],
            block_bytes: vec![4096, 65536],
            depths: vec![1, 4],
            each: Duration::from_millis(20),
            cancel: Arc::default(),
        };
        let mut told = 0;
        let rows = sweep(&what, &mut |_| told += 1).unwrap();
        assert_eq!((rows.len(), told), (12, 12));
        assert!(rows.iter().all(|row| row.gb_per_s > 0.0));
        assert!(rows.iter().all(|row| row.cpu_s_per_gb >= 0.0));
        assert!(rows.iter().any(|row| row.reader == "mmap" && !row.direct));
    }

    #[test]
    fn a_sweep_of_nothing_is_refused() {
        let what = Sweep {
            files: vec![],
            kinds: vec![ReaderKind::Auto],
            block_bytes: vec![4096],
            depths: vec![1],
            each: Duration::from_millis(1),
            cancel: Arc::default(),
        };
        assert_eq!(sweep(&what, &mut |_| ()).unwrap_err().code(), Code::Usage);
    }

    #[test]
    fn a_wish_to_stop_is_heard_within_a_measurement() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, vec![1u8; 300_000]).unwrap();
        let cancel = Arc::new(AtomicBool::new(false));
        let what = Sweep {
            files: vec![path],
            kinds: vec![ReaderKind::Threads],
            block_bytes: vec![65536],
            depths: vec![1],
            each: Duration::from_secs(60),
            cancel: cancel.clone(),
        };
        let start = Instant::now();
        let error = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                cancel.store(true, Relaxed);
            });
            sweep(&what, &mut |_| ()).unwrap_err()
        });
        assert_eq!(error.code(), Code::Interrupted);
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
