//! A small thread pool: the caller works too, idle workers spin briefly and then sleep, nothing is allocated per job.
//!
//! A job is `tasks` calls of one function, handed out by a counter. A worker that wakes too late finds the job closed and is
//! not waited for, so a busy machine costs throughput, not a stall per job.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use super::scratch::Scratch;

/// Rounds of spinning before a thread sleeps: some tens of microseconds, the gap between two ops of a layer.
const SPINS: u32 = 2_000;

/// `Shared::state`: workers inside the job (low half), whether workers may still enter, and the job's number above.
const OPEN: u64 = 1 << 32;
const NUMBER: u64 = 1 << 33;
const INSIDE: u64 = OPEN - 1;

type Work<'a> = dyn Fn(usize, &mut Scratch) + Sync + 'a;

struct Job {
    /// Borrowed from the caller of `Pool::run`, which does not return before every worker has left.
    work: *const Work<'static>,
    tasks: usize,
    caller: Thread,
}

struct Shared {
    state: AtomicU64,
    next_task: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    panicked: AtomicBool,
    payload: Mutex<Option<Box<dyn Any + Send>>>,
    shutdown: AtomicBool,
}

// SAFETY: `job` is written only while the job is closed and nobody is inside (state says so), read only by those inside;
// the pointer in it refers to a `Sync` function.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is bound to a thread.
unsafe impl Send for Shared {}

/// See the module's documentation.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// The caller's scratch; holding it is also what lets one job run at a time.
    caller_scratch: Mutex<Scratch>,
}

impl Pool {
    /// `threads` in all, the caller counted; at least one. When the system refuses a thread, fewer.
    pub(crate) fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next_task: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            payload: Mutex::new(None),
            shutdown: AtomicBool::new(false),
        });
        let workers = (1..threads)
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("compute-{i}"))
                    .spawn(move || work_until_shutdown(&shared))
                    .ok()
            })
            .collect();
        Pool {
            shared,
            workers,
            caller_scratch: Mutex::new(Scratch::new()),
        }
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work(task, scratch)` once for each task below `tasks`, on any thread, in any order, and returns when all are done.
    /// A panic in a task is raised again here. Must not be called from inside a task.
    pub(crate) fn run(&self, tasks: usize, work: &Work<'_>) {
        // A job that panicked leaves nothing behind in scratch that the next one could read.
        let mut scratch = self
            .caller_scratch
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if tasks <= 1 || self.workers.is_empty() {
            for task in 0..tasks {
                work(task, &mut scratch);
            }
            return;
        }
        self.open(tasks, work);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            take_tasks(&self.shared.next_task, tasks, work, &mut scratch)
        }));
        if outcome.is_err() {
            self.shared.next_task.store(tasks, Ordering::Relaxed);
        }
        self.close();
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        if self.shared.panicked.swap(false, Ordering::AcqRel) {
            let payload = self
                .shared
                .payload
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            resume_unwind(payload.unwrap_or_else(|| Box::new("a compute thread panicked")));
        }
    }

    fn open(&self, tasks: usize, work: &Work<'_>) {
        let job = Job {
            // SAFETY: only the lifetime changes; `run` keeps `work` borrowed until `close` has seen every worker leave.
            work: unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) },
            tasks,
            caller: thread::current(),
        };
        // SAFETY: the last job is closed and empty (`close` waited), and the caller's scratch lock keeps other callers out.
        unsafe { *self.shared.job.get() = Some(job) };
        self.shared.next_task.store(0, Ordering::Relaxed);
        let state = self.shared.state.load(Ordering::Relaxed);
        debug_assert_eq!(state & (OPEN | INSIDE), 0);
        self.shared
            .state
            .store(state.wrapping_add(NUMBER) | OPEN, Ordering::Release);
        for worker in self.workers.iter().take(tasks - 1) {
            worker.thread().unpark();
        }
    }

    fn close(&self) {
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.shared.state.load(Ordering::Acquire) & INSIDE != 0 {
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                thread::park();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its tasks' panics; were it gone all the same, there is nothing left to stop.
            let _ = worker.join();
        }
    }
}

fn take_tasks(next: &AtomicUsize, tasks: usize, work: &Work<'_>, scratch: &mut Scratch) {
    loop {
        let task = next.fetch_add(1, Ordering::Relaxed);
        if task >= tasks {
            return;
        }
        work(task, scratch);
    }
}

fn work_until_shutdown(shared: &Shared) {
    let mut scratch = Scratch::new();
    let mut last = 0;
    let mut spins = 0;
    while !shared.shutdown.load(Ordering::Acquire) {
        let state = shared.state.load(Ordering::Acquire);
        let number = state / NUMBER;
        if state & OPEN == 0 || number == last {
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                // An unpark between the look at `state` and here makes this return at once.
                thread::park();
                spins = 0;
            }
            continue;
        }
        if shared
            .state
            .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
        {
            last = number;
            spins = 0;
            work_inside(shared, &mut scratch);
        }
    }
}

/// One worker's share of the open job it has entered; leaves it.
fn work_inside(shared: &Shared, scratch: &mut Scratch) {
    // SAFETY: this thread is counted inside, so the job is not replaced before it leaves below.
    let job = unsafe { (*shared.job.get()).as_ref() };
    let caller = job.map(|job| {
        // SAFETY: the caller of `run` keeps the function borrowed until this thread has left.
        let work = unsafe { &*job.work };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            take_tasks(&shared.next_task, job.tasks, work, scratch)
        }));
        if let Err(payload) = outcome {
            shared.next_task.store(job.tasks, Ordering::Relaxed);
            *shared
                .payload
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(payload);
            shared.panicked.store(true, Ordering::Release);
        }
        job.caller.clone()
    });
    let left = shared.state.fetch_sub(1, Ordering::AcqRel) - 1;
    if left & (OPEN | INSIDE) == 0
        && let Some(caller) = caller
    {
        caller.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in [0usize, 1, 2, 7, 100] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> =
                        (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|t, _| {
                        counts[t].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn many_small_jobs_with_pauses_between() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        for round in 0..5_000usize {
            pool.run(4, &|t, _| {
                sum.fetch_add(t, Ordering::Relaxed);
            });
            if round % 500 == 0 {
                thread::sleep(std::time::Duration::from_millis(2));
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), 5_000 * 6);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        pool.run(3, &|_, _| {
                            sum.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 3 * 300 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(3);
        for bad in 0..6 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(6, &|t, _| assert!(t != bad, "task {t}"))
            }));
            let payload = outcome.expect_err("the panic is raised again");
            let text = payload
                .downcast_ref::<String>()
                .expect("the task's own words");
            assert!(text.contains(&format!("task {bad}")), "{text}");
            let done = AtomicUsize::new(0);
            pool.run(6, &|_, _| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 6);
        }
    }
}
