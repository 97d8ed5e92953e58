//! `flock` on a pack's folder: readers share it, a packer or cleaner has it alone.
//!
//! The lock is on the folder itself, not on a file in it: deleting the contents cannot split it into two locks. It
//! ends with the process, however that ends.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::durable;
use crate::error::{Code, Error, Result};
use crate::planted::{self, Bug};

/// First line of the `lock` file: marks a folder as ours, finished or not.
pub(crate) const LOCK_MAGIC: &str = "tensorpager pack";
/// How often a waiter looks again.
const POLL: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Many readers at once.
    Shared,
    /// One packer or cleaner, no reader.
    Exclusive,
}

/// Who stands in the way.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Holder {
    pub pid: Option<u32>,
    pub host: Option<String>,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.pid, &self.host) {
            (Some(pid), Some(host)) => write!(f, "process {pid} on {host}"),
            (Some(pid), None) => write!(f, "process {pid}"),
            _ => write!(f, "another process"),
        }
    }
}

/// How to behave when the folder is taken.
pub struct LockWait<'a> {
    /// Longest wait; zero fails at once.
    pub limit: Duration,
    /// Set from outside (Ctrl-C) to give up.
    pub cancel: &'a AtomicBool,
    /// Told who holds the lock and how long this has lasted: at once, then about once a second.
    pub on_wait: &'a mut dyn FnMut(&Holder, Duration),
}

/// A held lock; released on drop.
#[derive(Debug)]
pub struct Lock {
    _dir: File,
}

/// Takes the lock without waiting. `Ok(None)`: somebody else has it.
pub(crate) fn try_lock(dir: &Path, mode: LockMode) -> Result<Option<Lock>> {
    let failed = |e: &io::Error| Error::io(format!("cannot lock {}", dir.display()), e);
    // Nothing but a folder: a FIFO under this name would be waited for.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(dir)
        .map_err(|e| failed(&e))?;
    let tried = match mode {
        _ if planted::is(Bug::LockIgnored) => Ok(()),
        LockMode::Shared => file.try_lock_shared(),
        LockMode::Exclusive => file.try_lock(),
    };
    match tried {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(e)) => {
            return Err(failed(&e).with_fix(
                "the file system must support flock on folders: choose an --offload-folder on a local disk",
            ));
        }
    }
    // The folder may have been removed, or replaced, between open and lock: then this locks nothing that matters.
    let held = file.metadata().map_err(|e| failed(&e))?;
    let named = fs::metadata(dir).map_err(|e| failed(&e))?;
    if (held.dev(), held.ino()) != (named.dev(), named.ino()) {
        return Ok(None);
    }
    Ok(Some(Lock { _dir: file }))
}

/// Takes the lock, waiting for whoever has it as `wait` allows.
pub(crate) fn lock(dir: &Path, mode: LockMode, wait: &mut LockWait<'_>) -> Result<Lock> {
    let start = Instant::now();
    let mut told: Option<Instant> = None;
    loop {
        if let Some(lock) = try_lock(dir, mode)? {
            return Ok(lock);
        }
        let holder = holder(dir);
        if wait.cancel.load(Ordering::Relaxed) {
            return Err(interrupted(dir));
        }
        if start.elapsed() >= wait.limit {
            return Err(Error::new(
                Code::Locked,
                format!("{} is in use", dir.display()),
                format!("{holder} holds its lock"),
                "wait until it has finished, or end that process",
            ));
        }
        if told.is_none_or(|t| t.elapsed() >= Duration::from_secs(1)) {
            (wait.on_wait)(&holder, start.elapsed());
            told = Some(Instant::now());
        }
        std::thread::sleep(POLL.min(wait.limit));
    }
}

fn interrupted(dir: &Path) -> Error {
    Error::new(
        Code::Interrupted,
        format!("stopped while waiting for {}", dir.display()),
        "interrupted",
        "run the command again",
    )
}

/// Who holds the lock: the kernel's own list where it can be read, else what the last packer wrote.
pub(crate) fn holder(dir: &Path) -> Holder {
    let written = read_holder(dir);
    match kernel_holder(dir) {
        Some(pid) if written.pid == Some(pid) => written,
        Some(pid) => Holder {
            pid: Some(pid),
            host: host_name(),
        },
        None => written,
    }
}

/// `/proc/locks`: `1: FLOCK  ADVISORY  WRITE 1234 fe:01:5678 0 EOF` (device numbers in hex, waiters marked `->`).
fn kernel_holder(dir: &Path) -> Option<u32> {
    let inode = fs::metadata(dir).ok()?.ino().to_string();
    let own = std::process::id();
    let list = fs::read_to_string("/proc/locks").ok()?;
    let pids = list.lines().filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let kind = words.next()?;
        let pid = words.nth(2)?.parse::<u32>().ok()?;
        let id = words.next()?;
        (kind == "FLOCK" && id.rsplit(':').next() == Some(inode.as_str()) && pid > 0).then_some(pid)
    });
    let pids: Vec<u32> = pids.collect();
    pids.iter()
        .copied()
        .find(|&p| p != own)
        .or(pids.first().copied())
}

/// Says in the folder who packs it. Written and synced before the first weight byte: it is also what tells an
/// unfinished pack from a folder of somebody else's.
pub(crate) fn write_holder(dir: &Path) -> io::Result<()> {
    let host = host_name().unwrap_or_else(|| "?".to_string());
    let text = format!("{LOCK_MAGIC}\npid {}\nhost {host}\n", std::process::id());
    durable::replace(dir, "lock", text.as_bytes())
}

fn read_holder(dir: &Path) -> Holder {
    let text = small_text(&dir.join("lock")).unwrap_or_default();
    let field = |key: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(key))?;
        Some(line.trim().to_string()).filter(|v| !v.is_empty() && v.len() < 256)
    };
    Holder {
        pid: field("pid ").and_then(|p| p.parse().ok()),
        host: field("host "),
    }
}

/// True where a packer of ours has begun (and perhaps finished) in this folder.
pub(crate) fn marked(dir: &Path) -> bool {
    small_text(&dir.join("lock")).is_some_and(|t| t.lines().next() == Some(LOCK_MAGIC))
}

/// A regular file of at most 4 KiB, as text.
fn small_text(path: &Path) -> Option<String> {
    let meta = fs::symlink_metadata(path).ok()?;
    if !meta.is_file() || meta.len() > 4096 {
        return None;
    }
    fs::read_to_string(path).ok()
}

fn host_name() -> Option<String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now<'a>(
        cancel: &'a AtomicBool,
        on_wait: &'a mut dyn FnMut(&Holder, Duration),
    ) -> LockWait<'a> {
        LockWait {
            limit: Duration::ZERO,
            cancel,
            on_wait,
        }
    }

    #[test]
    fn readers_share_and_a_packer_is_alone() {
        let dir = tempfile::tempdir().unwrap();
        let never = AtomicBool::new(false);
        let a = try_lock(dir.path(), LockMode::Shared).unwrap().unwrap();
        let b = try_lock(dir.path(), LockMode::Shared).unwrap().unwrap();
        assert!(try_lock(dir.path(), LockMode::Exclusive).unwrap().is_none());
        let error = lock(
            dir.path(),
            LockMode::Exclusive,
            &mut now(&never, &mut |_, _| {}),
        )
        .unwrap_err();
        assert_eq!(error.code(), Code::Locked);
        assert!(
            error.cause().contains(&std::process::id().to_string()),
            "{error}"
        );
        drop((a, b));
        let alone = try_lock(dir.path(), LockMode::Exclusive).unwrap().unwrap();
        assert!(try_lock(dir.path(), LockMode::Shared).unwrap().is_none());
        drop(alone);
    }

    #[test]
    fn waiting_ends_when_the_holder_goes_and_says_who_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let held = try_lock(dir.path(), LockMode::Exclusive).unwrap().unwrap();
        write_holder(dir.path()).unwrap();
        assert!(marked(dir.path()));
        let never = AtomicBool::new(false);
        let mut seen = Vec::new();
        std::thread::scope(|s| {
            s.spawn(move || {
                std::thread::sleep(Duration::from_millis(200));
                drop(held);
            });
            let mut wait = LockWait {
                limit: Duration::from_secs(20),
                cancel: &never,
                on_wait: &mut |h, _| seen.push(h.clone()),
            };
            lock(dir.path(), LockMode::Exclusive, &mut wait).unwrap();
        });
        assert_eq!(seen[0].pid, Some(std::process::id()));
        assert!(seen[0].host.is_some());
    }

    #[test]
    fn waiting_can_be_interrupted() {
        let dir = tempfile::tempdir().unwrap();
        let _held = try_lock(dir.path(), LockMode::Exclusive).unwrap().unwrap();
        let cancel = AtomicBool::new(true);
        let mut wait = LockWait {
            limit: Duration::from_secs(60),
            cancel: &cancel,
            on_wait: &mut |_, _| {},
        };
        let error = lock(dir.path(), LockMode::Shared, &mut wait).unwrap_err();
        assert_eq!(error.code(), Code::Interrupted);
    }

    #[test]
    fn a_folder_replaced_under_the_lock_is_not_locked() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("pack");
        fs::create_dir(&dir).unwrap();
        let old = File::open(&dir).unwrap();
        old.try_lock().unwrap();
        fs::rename(&dir, parent.path().join("gone")).unwrap();
        fs::create_dir(&dir).unwrap();
        assert!(try_lock(&dir, LockMode::Exclusive).unwrap().is_some());
        assert!(try_lock(&parent.path().join("absent"), LockMode::Shared).is_err());
    }

    #[test]
    fn a_strange_lock_file_is_no_marker() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!marked(dir.path()));
        fs::write(dir.path().join("lock"), "something else\npid 1\n").unwrap();
        assert!(!marked(dir.path()));
        fs::remove_file(dir.path().join("lock")).unwrap();
        fs::create_dir(dir.path().join("lock")).unwrap();
        assert!(!marked(dir.path()));
        assert_eq!(read_holder(dir.path()).pid, None);
    }
}
