//! Folders of passing work inside the offload folder, such as the demo's. One goes away with its owner. One whose owner was killed
//! bears the mark and is locked by nobody: the next owner removes it, and so does `clean`.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::durable;
use super::lock::{self, Lock, LockMode};
use crate::error::{Code, Error, Result};

/// Marks a folder as one of these.
const MARK: &str = "scratch";
/// Everything of the owner's lies below this.
const WORK: &str = "work";
const PREFIX: &str = "demo-";

/// A folder that is ours while this lives.
pub struct Scratch {
    dir: PathBuf,
    _lock: Lock,
}

impl Scratch {
    /// Makes one in `offload_folder`, named after this process.
    pub fn new(offload_folder: &Path) -> Result<Scratch> {
        let dir = offload_folder.join(format!("{PREFIX}{}", std::process::id()));
        let failed = |e: io::Error| Error::io(format!("{} cannot be made", dir.display()), &e);
        fs::create_dir_all(&dir).map_err(failed)?;
        let lock = lock::try_lock(&dir, LockMode::Exclusive)?.ok_or_else(|| {
            Error::new(
                Code::Locked,
                format!("{} is in use", dir.display()),
                "another process has locked it",
                "try again, or give another --offload-folder",
            )
        })?;
        fs::write(dir.join(MARK), "tensorpager scratch\n").map_err(failed)?;
        fs::create_dir_all(dir.join(WORK)).map_err(failed)?;
        Ok(Scratch { dir, _lock: lock })
    }

    /// Where its owner may write.
    pub fn work(&self) -> PathBuf {
        Scratch::work_of(&self.dir)
    }

    /// Where the owner of `dir` wrote.
    pub fn work_of(dir: &Path) -> PathBuf {
        dir.join(WORK)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = remove_contents(&self.dir);
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Removes those in `offload_folder` whose owner was killed. Each with what lay in it, in bytes.
pub fn sweep(offload_folder: &Path) -> Vec<(PathBuf, u64)> {
    let entries = fs::read_dir(offload_folder).into_iter().flatten().flatten();
    let mut removed = Vec::new();
    for dir in entries.map(|e| e.path()).filter(|d| is_marked(d)) {
        let Ok(Some(_lock)) = lock::try_lock(&dir, LockMode::Exclusive) else {
            continue;
        };
        let held = bytes(&dir);
        if remove_contents(&dir).is_ok_and(|strangers| strangers.is_empty())
            && fs::remove_dir(&dir).is_ok()
        {
            removed.push((dir, held));
        }
    }
    removed
}

/// A folder of this kind, whether its owner lives or not.
pub(super) fn is_marked(dir: &Path) -> bool {
    let named = dir
        .file_name()
        .and_then(|n| n.to_str()?.strip_prefix(PREFIX))
        .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    named
        && fs::symlink_metadata(dir).is_ok_and(|m| m.is_dir())
        && fs::symlink_metadata(dir.join(MARK)).is_ok_and(|m| m.is_file())
}

/// Removes what its owner made, the mark last. Returns what else lies there.
pub(super) fn remove_contents(dir: &Path) -> io::Result<Vec<String>> {
    match fs::remove_dir_all(dir.join(WORK)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => durable::remove(&dir.join(MARK))?,
    }
    fs::read_dir(dir)?
        .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// What it takes on the disk.
pub(super) fn bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes(&entry.path()),
        Ok(meta) => meta.blocks().saturating_mul(512),
        Err(_) => 0,
    });
    sizes.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{CleanOptions, PackState, clean, list_packs};

    /// What a killed demo leaves: everything but its lock.
    fn killed(offload: &Path, pid: u32) -> PathBuf {
        let dir = offload.join(format!("demo-{pid}"));
        fs::create_dir_all(dir.join("work/packed")).unwrap();
        fs::write(dir.join(MARK), "tensorpager scratch\n").unwrap();
        fs::write(dir.join("work/packed/weights"), vec![1; 50_000]).unwrap();
        dir
    }

    #[test]
    fn it_goes_with_its_owner_and_is_left_alone_meanwhile() {
        let offload = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(offload.path()).unwrap();
        fs::write(scratch.work().join("x"), "y").unwrap();
        assert!(sweep(offload.path()).is_empty());
        let cleaned = clean(offload.path(), &CleanOptions::default()).unwrap();
        assert!(cleaned.removed.is_empty() && cleaned.kept.len() == 1);
        assert!(scratch.work().join("x").is_file());
        drop(scratch);
        assert_eq!(fs::read_dir(offload.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_owners_is_swept() {
        let offload = tempfile::tempdir().unwrap();
        let dead = killed(offload.path(), 4_000_000);
        // What only looks like one stays.
        fs::create_dir_all(offload.path().join("demo-1/work")).unwrap();
        let swept = sweep(offload.path());
        assert_eq!(swept.len(), 1);
        assert!(swept[0].0 == dead && swept[0].1 >= 50_000 && !dead.exists());
        assert!(offload.path().join("demo-1/work").is_dir());
    }

    #[test]
    fn clean_removes_a_dead_owners_and_nothing_of_anybody_elses() {
        let offload = tempfile::tempdir().unwrap();
        let dead = killed(offload.path(), 4_000_000);
        let listed = list_packs(offload.path()).unwrap();
        assert_eq!(listed[0].state, PackState::Abandoned);
        let stale = CleanOptions {
            stale: true,
            ..CleanOptions::default()
        };
        let cleaned = clean(offload.path(), &stale).unwrap();
        assert!(cleaned.bytes >= 50_000 && !dead.exists());
        let dead = killed(offload.path(), 4_000_001);
        fs::write(dead.join("notes.txt"), "mine").unwrap();
        let cleaned = clean(offload.path(), &CleanOptions::default()).unwrap();
        assert!(cleaned.kept[0].1.contains("notes.txt"), "{cleaned:?}");
        assert!(dead.join("notes.txt").is_file() && !dead.join("work").exists());
    }
}
