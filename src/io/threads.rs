//! Reads by a pool of threads, one `pread` each at a time: for systems without io_uring.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::{OpenFile, RawDone, ReadOp, Reader, describe_files};
use crate::error::{Error, Result};

/// Past this many threads the scheduler costs more than the drive gains.
const MAX_THREADS: usize = 64;
/// A reading thread needs hardly any stack.
const STACK_BYTES: usize = 128 * 1024;
/// How long a drop waits for reads the system does not finish.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

pub(super) struct ThreadsReader {
    /// `None` once closed: the threads end when the queue is empty.
    jobs: Option<Sender<(ReadOp, usize)>>,
    /// The threads' end of `jobs`, to take back what nobody has started.
    todo: Receiver<(ReadOp, usize)>,
    done: Receiver<RawDone>,
    workers: Vec<JoinHandle<()>>,
    depth: usize,
    in_flight: usize,
    describe: String,
}

impl ThreadsReader {
    /// `reason`: why threads stand in for io_uring, when nobody asked for them.
    pub(super) fn new(
        files: Vec<OpenFile>,
        depth: usize,
        reason: Option<String>,
    ) -> Result<ThreadsReader> {
        let count = depth.min(MAX_THREADS);
        let mut describe = format!("threads: {count} x pread, {}", describe_files(&files));
        if let Some(reason) = reason {
            describe += &format!("; not io_uring: {reason}");
        }
        let files: Arc<[OpenFile]> = files.into();
        // Bounded channels hold their slots from the start: no allocation per read.
        let (jobs, todo) = bounded::<(ReadOp, usize)>(depth);
        let (finished, done) = bounded(depth);
        let mut workers = Vec::with_capacity(count);
        for index in 0..count {
            let (files, todo, finished) = (files.clone(), todo.clone(), finished.clone());
            let worker = std::thread::Builder::new()
                .name(format!("read-{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || work(&files, &todo, &finished))
                .map_err(|e| {
                    Error::io("cannot start a reading thread", &e)
                        .with_fix("raise the process limit (ulimit -u) or lower --queue-depth")
                })?;
            workers.push(worker);
        }
        Ok(ThreadsReader {
            jobs: Some(jobs),
            todo,
            done,
            workers,
            depth,
            in_flight: 0,
            describe,
        })
    }
}

fn work(files: &[OpenFile], todo: &Receiver<(ReadOp, usize)>, finished: &Sender<RawDone>) {
    for (mut op, skip) in todo {
        let result = match files.get(op.file as usize) {
            Some(file) => file.read_at(&mut op.frame[skip..], op.offset + skip as u64),
            None => -libc::EBADF,
        };
        // Nobody listens any more: the reader was dropped and the frame goes back with `op`.
        if finished.send(RawDone { op, skip, result }).is_err() {
            return;
        }
    }
}

impl Reader for ThreadsReader {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn capacity(&self) -> usize {
        self.depth
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn submit(&mut self, op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp> {
        if self.in_flight == self.depth {
            return Err(op);
        }
        let Some(jobs) = &self.jobs else {
            return Err(op);
        };
        // Never blocks: at most `depth` reads are out, and that is the channel's room.
        match jobs.try_send((op, skip)) {
            Ok(()) => {
                self.in_flight += 1;
                Ok(())
            }
            Err(refused) => Err(refused.into_inner().0),
        }
    }

    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()> {
        let start = Instant::now();
        let min = min.min(self.in_flight);
        let mut got = 0;
        while got < self.in_flight {
            let next = if got < min {
                let left = timeout.saturating_sub(start.elapsed());
                self.done.recv_timeout(left).ok()
            } else {
                self.done.try_recv().ok()
            };
            let Some(done) = next else { break };
            out.push(done);
            got += 1;
        }
        self.in_flight -= got;
        Ok(())
    }

    fn describe(&self) -> String {
        self.describe.clone()
    }
}

impl Drop for ThreadsReader {
    /// Lets reads in flight finish and ends the threads. One that the system does not let go of is left behind: it owns its frame.
    fn drop(&mut self) {
        self.jobs = None;
        while self.todo.try_recv().is_ok() {}
        let start = Instant::now();
        while self
            .done
            .recv_timeout(DRAIN_LIMIT.saturating_sub(start.elapsed()))
            .is_ok()
        {}
        for worker in self.workers.drain(..) {
            if worker.is_finished() || start.elapsed() < DRAIN_LIMIT {
                let _ = worker.join();
            }
        }
    }
}
