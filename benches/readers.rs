//! Each reader at several block sizes and queue depths, reading one file from the disk.
//!
//! `cargo bench --bench readers`. The file lies under `target/` (a temporary directory may be memory); its pages are dropped from the
//! page cache before every reading that would go through it.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tensorpager::io::{
    Arena, Flights, OpenFile, ReadOp, ReaderKind, Region, drop_page_cache, open_reader,
};

const FILE_BYTES: usize = 256 << 20;

struct Bench {
    flights: Flights,
    frames: Vec<Region>,
    block: usize,
    out: Vec<ReadOp>,
}

impl Bench {
    /// `None`, with the reason printed, where the system has no io_uring.
    fn new(kind: ReaderKind, path: &Path, block: usize, depth: usize) -> Option<Bench> {
        let arena = Arena::new((block * depth) as u64).expect("memory for frames");
        let frames = (0..depth).map_while(|_| arena.take(block as u64)).collect();
        let file = OpenFile::open(path, true).expect("the file just written opens");
        match open_reader(kind, vec![file], &arena, depth) {
            Ok(reader) => Some(Bench {
                flights: Flights::new(reader, vec![path.into()], Flights::DEFAULT_STALL_LIMIT),
                frames,
                block,
                out: Vec::with_capacity(depth),
            }),
            Err(error) => {
                println!("skipped {kind}: {}", error.cause());
                None
            }
        }
    }

    fn send(&mut self, frame: usize, offset: usize) {
        self.frames[frame].rewind();
        self.flights.submit(ReadOp {
            file: 0,
            offset: offset as u64,
            frame: self.frames[frame].lend(self.block),
            want: self.block,
            tag: frame as u64,
        });
    }

    /// The whole file once, the queue kept full.
    fn read(&mut self) -> Duration {
        let start = Instant::now();
        let mut next = 0;
        for frame in 0..self.frames.len() {
            if next < FILE_BYTES {
                self.send(frame, next);
                next += self.block;
            }
        }
        while self.flights.in_flight() > 0 {
            let wait = Duration::from_secs(1);
            self.flights
                .reap(wait, &mut self.out)
                .expect("reads succeed");
            while let Some(op) = self.out.pop() {
                let frame = op.tag as usize;
                drop(op);
                if next < FILE_BYTES {
                    self.send(frame, next);
                    next += self.block;
                }
            }
        }
        start.elapsed()
    }
}

fn readers(c: &mut Criterion) {
    let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    let piece: Vec<u8> = (0..1u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for _ in 0..FILE_BYTES / piece.len() {
        file.write_all(&piece).expect("room for 256 MiB");
    }
    file.as_file().sync_all().expect("written");
    let mut group = c.benchmark_group("read");
    group.throughput(Throughput::Bytes(FILE_BYTES as u64));
    group.sample_size(10);
    group.warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(3));
    for kind in [ReaderKind::IoUring, ReaderKind::Threads, ReaderKind::Mmap] {
        for block in [256 << 10, 1 << 20, 4 << 20] {
            for depth in [1, 8, 32] {
                let Some(mut bench) = Bench::new(kind, file.path(), block, depth) else {
                    continue;
                };
                let id = BenchmarkId::new(kind.name(), format!("{}KiB x {depth}", block >> 10));
                group.bench_function(id, |b| {
                    b.iter_custom(|rounds| {
                        (0..rounds)
                            .map(|_| {
                                drop_page_cache(file.path()).expect("the file is there");
                                bench.read()
                            })
                            .sum()
                    })
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, readers);
criterion_main!(benches);
