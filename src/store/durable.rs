//! Writing so that a power cut leaves the old state or the new one, never a mixture.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use crate::planted::{self, Bug};

/// Makes the names inside `dir` (created, removed, renamed) survive a power cut.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    if planted::is(Bug::FolderNotSynced) {
        return Ok(());
    }
    File::open(dir)?.sync_all()
}

/// Writes a new file and waits until its bytes are on the disk. Its name lasts once [`sync_dir`] has run.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Replaces `dir/name` in one step: readers and crashes see the old contents or the new, whole.
pub(crate) fn replace(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.tmp"));
    write_synced(&temporary, bytes)?;
    fs::rename(&temporary, dir.join(name))?;
    sync_dir(dir)
}

/// Removes a file; one that is not there is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
