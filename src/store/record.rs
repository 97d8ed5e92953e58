//! Small records that are kept beside weights: measured rates, tuned settings, when a pack was last used.
//!
//! A packed folder may come from somebody else, so what lies in it under these names is nobody's promise: links are not followed,
//! neither to be read nor to be written through, and a FIFO is not waited for. A record that cannot be kept is a measurement to be
//! made again, never an error.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

/// Far above any record: a tuning curve of some hundred settings.
const MAX_BYTES: u64 = 1 << 20;

/// The text of a record; `None` for what is no regular file of at most 1 MiB.
pub(crate) fn read(path: &Path) -> Option<String> {
    let file = open(path, File::options().read(true))?;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).ok()?;
    (text.len() as u64 <= MAX_BYTES).then_some(text)
}

/// Replaces a record in one step, and makes the folder that it lies in; whether it is written.
pub(crate) fn write(path: &Path, text: &str) -> bool {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return false;
    };
    // Each process has its own, or one would rename what another has half written.
    let temporary = dir.join(format!(
        "{}.{}.tmp",
        name.to_string_lossy(),
        std::process::id()
    ));
    let written = || {
        fs::create_dir_all(dir)?;
        // Left by a process of this number that was killed; `create_new` follows no link.
        let _ = fs::remove_file(&temporary);
        File::create_new(&temporary)?.write_all(text.as_bytes())?;
        fs::rename(&temporary, path)
    };
    let done = written().is_ok();
    if !done {
        let _ = fs::remove_file(&temporary);
    }
    done
}

/// Gives an empty record the present time, and makes it where it is not there.
pub(super) fn touch(path: &Path) {
    if let Some(file) = open(path, File::options().write(true).create(true)) {
        let _ = file.set_modified(SystemTime::now());
    }
}

/// A regular file, opened without waiting and through no link.
fn open(path: &Path, options: &mut fs::OpenOptions) -> Option<File> {
    let file = options
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    file.metadata().ok()?.is_file().then_some(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode};

    use super::*;

    #[test]
    fn records_are_neither_read_nor_written_through_links_and_fifos_are_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let link = dir.path().join("link");
        symlink(&victim, &link).unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();

        for path in [&link, &fifo] {
            assert_eq!(read(path), None);
            touch(path);
            assert!(write(path, "{}"));
            assert_eq!(read(path).as_deref(), Some("{}"));
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        let times = |p: &Path| fs::metadata(p).unwrap().modified().unwrap();
        assert!(times(&victim) <= times(&link));
    }

    #[test]
    fn a_record_is_replaced_whole_and_nothing_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/rates.json");
        assert!(write(&path, "first and longer"));
        assert!(write(&path, "second"));
        assert_eq!(read(&path).as_deref(), Some("second"));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        fs::write(&path, vec![b' '; MAX_BYTES as usize + 1]).unwrap();
        assert_eq!(read(&path), None);
    }

    #[test]
    fn touching_keeps_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("last_used");
        touch(&path);
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        fs::write(&path, "kept").unwrap();
        touch(&path);
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }
}
