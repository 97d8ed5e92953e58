//! Reads by io_uring: one thread owns the ring, files and buffers are registered, many reads cost one system call.
//!
//! The kernel delivers completions only to the thread that made the ring, and only inside [`Reader::reap`]. What the kernel lacks is
//! dropped step by step (see [`LADDER`]); a kernel or a sandbox that refuses rings altogether is reported with its reason, so that
//! the caller can take threads instead.

use std::time::{Duration, Instant};

use io_uring::{EnterFlags, IoUring, opcode, squeue, types};

use super::{Arena, OpenFile, RawDone, ReadOp, Reader, describe_files, errno};
use crate::error::{Code, Error, Result};

/// Most bytes the kernel moves in one read; what is left is resumed like any short read.
const MAX_READ_BYTES: usize = 0x7fff_f000;
/// How long a drop waits for the kernel to let go of reads in flight.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// Marks the completion of the cancel request a drop sends; reads are marked by their slot.
const CANCEL: u64 = u64::MAX;

/// Setup flags, newest first; each rung is tried when the kernel answers EINVAL to the one above.
const LADDER: [Rung; 3] = [
    // 6.1: completions run when this thread asks for them, never interrupting it.
    Rung {
        name: "SINGLE_ISSUER|DEFER_TASKRUN|SUBMIT_ALL",
        defer: true,
        coop: false,
    },
    // 5.19: no interrupts between processors.
    Rung {
        name: "COOP_TASKRUN|SUBMIT_ALL",
        defer: false,
        coop: true,
    },
    Rung {
        name: "plain",
        defer: false,
        coop: false,
    },
];

#[derive(Clone, Copy)]
struct Rung {
    name: &'static str,
    defer: bool,
    coop: bool,
}

impl Rung {
    fn build(self, entries: u32) -> std::io::Result<IoUring> {
        let mut builder = IoUring::builder();
        if self.defer {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        if self.coop {
            builder.setup_coop_taskrun();
        }
        if self.defer || self.coop {
            builder.setup_submit_all();
        }
        builder.dontfork().build(entries)
    }
}

/// What to ask of the kernel: everything, unless a test wants to see how the reader does with less.
#[derive(Clone, Copy)]
struct Setup {
    first_rung: usize,
    register: bool,
}

/// Why there is no ring. The files come back, for another reader.
pub(super) struct Refusal {
    pub(super) files: Vec<OpenFile>,
    pub(super) reason: String,
}

impl Refusal {
    pub(super) fn into_error(self) -> Error {
        Error::new(
            Code::Unsupported,
            "cannot read with io_uring",
            self.reason,
            "give --io threads (or auto), or allow io_uring: sysctl kernel.io_uring_disabled=0, and a container profile that permits it",
        )
    }
}

pub(super) struct UringReader {
    ring: IoUring,
    /// Reads in flight by slot; the kernel carries the slot's number.
    slots: Vec<Option<(ReadOp, usize)>>,
    free: Vec<u32>,
    fixed_files: bool,
    fixed_buffers: bool,
    describe: String,
    files: Vec<OpenFile>,
    /// Keeps registered memory mapped at least as long as the ring.
    arena: Arena,
}

impl UringReader {
    pub(super) fn new(
        files: Vec<OpenFile>,
        arena: &Arena,
        depth: usize,
    ) -> std::result::Result<UringReader, Refusal> {
        let setup = Setup {
            first_rung: 0,
            register: true,
        };
        UringReader::with(files, arena, depth, setup)
    }

    fn with(
        files: Vec<OpenFile>,
        arena: &Arena,
        depth: usize,
        setup: Setup,
    ) -> std::result::Result<UringReader, Refusal> {
        // One entry more than reads: a drop's cancel request finds room.
        let (ring, rung) = match build((depth + 1) as u32, setup.first_rung) {
            Ok(built) => built,
            Err(reason) => return Err(Refusal { files, reason }),
        };
        if !ring.params().is_feature_ext_arg() {
            let reason = "the kernel's io_uring cannot wait with a time limit (before 5.11)".into();
            return Err(Refusal { files, reason });
        }
        let (fixed_files, files_text) = match setup.register {
            true => register_files(&ring, &files),
            false => (false, "plain files".to_string()),
        };
        let (fixed_buffers, buffers_text) = match setup.register {
            true => register_buffers(&ring, arena),
            false => (false, "plain buffers".to_string()),
        };
        let describe = format!(
            "io_uring: depth {depth}, {}, {files_text}, {buffers_text}, {}",
            rung.name,
            describe_files(&files)
        );
        Ok(UringReader {
            ring,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth as u32).rev().collect(),
            fixed_files,
            fixed_buffers,
            describe,
            files,
            arena: arena.clone(),
        })
    }

    fn entry(&self, op: &mut ReadOp, skip: usize, slot: u32) -> squeue::Entry {
        let buffer = match self.fixed_buffers && op.frame.is_of(&self.arena) {
            true => op.frame.segment(),
            false => None,
        };
        let len = (op.frame.len() - skip).min(MAX_READ_BYTES) as u32;
        let at = op.frame.pointer().wrapping_add(skip);
        let offset = op.offset + skip as u64;
        // A file that is not there gets the answer the kernel has for it: EBADF.
        let fd = types::Fd(self.files.get(op.file as usize).map_or(-1, OpenFile::fd));
        let file = types::Fixed(op.file);
        let entry = match (self.fixed_files, buffer) {
            (true, Some(b)) => opcode::ReadFixed::new(file, at, len, b)
                .offset(offset)
                .build(),
            (true, None) => opcode::Read::new(file, at, len).offset(offset).build(),
            (false, Some(b)) => opcode::ReadFixed::new(fd, at, len, b)
                .offset(offset)
                .build(),
            (false, None) => opcode::Read::new(fd, at, len).offset(offset).build(),
        };
        entry.user_data(u64::from(slot))
    }

    /// Moves completions at hand to `out`; how many.
    fn collect(&mut self, out: &mut Vec<RawDone>) -> usize {
        let mut got = 0;
        for completion in self.ring.completion() {
            let slot = completion.user_data();
            let Some(taken) = self.slots.get_mut(slot as usize).and_then(Option::take) else {
                debug_assert_eq!(slot, CANCEL, "a completion for no read in flight");
                continue;
            };
            let (op, skip) = taken;
            self.free.push(slot as u32);
            let result = completion.result();
            out.push(RawDone { op, skip, result });
            got += 1;
        }
        got
    }

    /// One `io_uring_enter`: submits everything, runs deferred completions and waits for `want` more of them, within `timeout`.
    fn enter(&mut self, want: usize, timeout: Duration) -> std::io::Result<()> {
        let submit = self.ring.submission().len() as u32;
        let time = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&time);
        let flags = EnterFlags::EXT_ARG | EnterFlags::GETEVENTS;
        let submitter = self.ring.submitter();
        // The crate's own calls leave GETEVENTS out when nothing is waited for, and deferred completions would never run.
        // SAFETY: `submit` entries are in the queue, each pushed under the promise of `submit`; the argument is the one EXT_ARG
        // announces, and the kernel reads it only during the call.
        let answer = unsafe { submitter.enter(submit, want as u32, flags.bits(), Some(&args)) };
        match answer.map_err(|e| (e.raw_os_error(), e)) {
            Ok(_) => Ok(()),
            // Time over, interrupted by a signal, or short of kernel memory or completion room for a moment: the caller looks
            // at what completed, and at its own clock.
            Err((Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY), _)) => Ok(()),
            Err((_, error)) => Err(error),
        }
    }

    fn ring_error(&self, error: &std::io::Error) -> Error {
        if error.raw_os_error() == Some(libc::EEXIST) {
            return Error::internal("a ring was used by another thread than the one that made it");
        }
        Error::new(
            Code::Io,
            "io_uring stopped working",
            errno::describe_error(error),
            "give --io threads",
        )
    }

    /// Asks the kernel to give up what it can and waits for the rest. Whether everything came back.
    fn drain(&mut self) -> bool {
        let mut back = Vec::with_capacity(self.slots.len());
        self.collect(&mut back);
        if self.in_flight() == 0 {
            return true;
        }
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any())
            .build()
            .user_data(CANCEL);
        // SAFETY: the request refers to no memory. Kernels before 5.19 refuse it; then the reads are waited for.
        let _ = unsafe { self.ring.submission().push(&cancel) };
        let start = Instant::now();
        while self.in_flight() > 0 {
            let left = DRAIN_LIMIT.saturating_sub(start.elapsed());
            if left.is_zero() || self.enter(1, left).is_err() {
                return false;
            }
            self.collect(&mut back);
            back.clear();
        }
        true
    }
}

impl Reader for UringReader {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn capacity(&self) -> usize {
        self.slots.len()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn submit(&mut self, mut op: ReadOp, skip: usize) -> std::result::Result<(), ReadOp> {
        let Some(slot) = self.free.pop() else {
            return Err(op);
        };
        let entry = self.entry(&mut op, skip, slot);
        // SAFETY: the entry's memory is the frame's, exclusively owned by `op`, which the slot keeps until the completion is reaped;
        // a drop waits for the completion or leaks the frame. The descriptor is open (or -1) as long as `files` lives, and so is the
        // registered table. Registered buffers lie in `arena`.
        match unsafe { self.ring.submission().push(&entry) } {
            Ok(()) => {
                self.slots[slot as usize] = Some((op, skip));
                Ok(())
            }
            Err(_) => {
                self.free.push(slot);
                Err(op)
            }
        }
    }

    fn reap(&mut self, min: usize, timeout: Duration, out: &mut Vec<RawDone>) -> Result<()> {
        let min = min.min(self.in_flight());
        let mut got = self.collect(out);
        if self.in_flight() == 0 || (got > 0 && got >= min && self.ring.submission().is_empty()) {
            return Ok(());
        }
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            self.enter(min.saturating_sub(got), left)
                .map_err(|error| self.ring_error(&error))?;
            got += self.collect(out);
            if got >= min || start.elapsed() >= timeout {
                return Ok(());
            }
        }
    }

    fn describe(&self) -> String {
        self.describe.clone()
    }
}

impl Drop for UringReader {
    /// Reads in flight come back before the ring goes. Those the kernel keeps (a hanging device, or a drop on another thread) keep
    /// their frames for good: leaked memory cannot be written to under somebody else.
    fn drop(&mut self) {
        if !self.drain() {
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// The ring of the highest rung the kernel takes.
fn build(entries: u32, first_rung: usize) -> std::result::Result<(IoUring, Rung), String> {
    let mut reason = String::new();
    for rung in &LADDER[first_rung..] {
        match rung.build(entries) {
            Ok(ring) => return Ok((ring, *rung)),
            Err(error) => {
                reason = format!(
                    "the system refuses io_uring: {}",
                    errno::describe_error(&error)
                );
                match error.raw_os_error() {
                    Some(libc::EINVAL) => {}
                    Some(libc::EPERM) => {
                        reason += " (kernel.io_uring_disabled, or a container's profile)";
                        break;
                    }
                    Some(libc::ENOSYS) => {
                        reason += " (a kernel or sandbox without it)";
                        break;
                    }
                    _ => break,
                }
            }
        }
    }
    Err(reason)
}

fn register_files(ring: &IoUring, files: &[OpenFile]) -> (bool, String) {
    let fds: Vec<_> = files.iter().map(OpenFile::fd).collect();
    match ring.submitter().register_files(&fds) {
        Ok(()) => (true, "registered files".to_string()),
        Err(error) => (
            false,
            format!("plain files ({})", errno::describe_error(&error)),
        ),
    }
}

fn register_buffers(ring: &IoUring, arena: &Arena) -> (bool, String) {
    let buffers: Vec<libc::iovec> = arena
        .segments()
        .map(|segment| libc::iovec {
            iov_base: segment.address as *mut libc::c_void,
            iov_len: segment.bytes,
        })
        .collect();
    // SAFETY: the segments are the arena's mapping, which the reader's own handle keeps alive until after the ring is gone.
    match unsafe { ring.submitter().register_buffers(&buffers) } {
        Ok(()) => (true, "registered buffers".to_string()),
        Err(error) => {
            let mut why = errno::describe_error(&error);
            if error.raw_os_error() == Some(libc::ENOMEM) {
                why += ": raise ulimit -l to register them";
            }
            (false, format!("plain buffers ({why})"))
        }
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
