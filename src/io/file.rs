//! A file opened for paging: a regular file, past the page cache where the file system allows it.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{errno, mmap};
use crate::error::{Code, Error, Result};
use crate::units::ALIGN_BYTES;

/// An open source of bytes. Closed when the reader that owns it goes.
#[derive(Debug)]
pub struct OpenFile {
    pub path: PathBuf,
    /// Length when it was opened.
    pub bytes: u64,
    direct: bool,
    file: File,
}

impl OpenFile {
    /// Opens a regular file for reading; symbolic links are followed (the hub's cache is made of them). With `direct`, O_DIRECT is
    /// tried and proven with one read; a file system that refuses it gets buffered reads with read-ahead switched off
    /// ([`OpenFile::direct`] tells which).
    ///
    /// Errors: [`Code::Io`] with the system's reason; directories, FIFOs, sockets and devices are refused unopened.
    pub fn open(path: &Path, direct: bool) -> Result<OpenFile> {
        let fail =
            |error: &std::io::Error| Error::io(format!("cannot open {}", path.display()), error);
        // O_PATH opens nothing but the name: it neither blocks on a FIFO nor wakes a device.
        let handle = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
            .map_err(|e| fail(&e))?;
        let kind = handle.metadata().map_err(|e| fail(&e))?.file_type();
        if !kind.is_file() {
            return Err(Error::new(
                Code::Io,
                format!("cannot open {}", path.display()),
                format!("it is {}, not a regular file", kind_name(&kind)),
                "check the path: weights are read from regular files only",
            ));
        }
        let reopen = |flags: i32| reopen(&handle, path, flags);
        if direct && let Ok(file) = reopen(libc::O_DIRECT) {
            // Some file systems take the flag and refuse every read.
            if direct_read_works(&file) {
                return Ok(OpenFile {
                    path: path.to_path_buf(),
                    bytes: file.metadata().map_err(|e| fail(&e))?.len(),
                    direct: true,
                    file,
                });
            }
        }
        let file = reopen(0).map_err(|e| fail(&e))?;
        if direct {
            mmap::advise_random(&file);
        }
        Ok(OpenFile {
            path: path.to_path_buf(),
            bytes: file.metadata().map_err(|e| fail(&e))?.len(),
            direct: false,
            file,
        })
    }

    /// Whether reads go past the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// One `pread`: bytes, or the negative errno.
    pub(super) fn read_at(&self, into: &mut [u8], offset: u64) -> i32 {
        match self.file.read_at(into, offset) {
            Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The very file behind `handle`, opened for reading. Without /proc the name is opened again.
fn reopen(handle: &File, path: &Path, flags: i32) -> std::io::Result<File> {
    let open = |path: &Path| OpenOptions::new().read(true).custom_flags(flags).open(path);
    let same = PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()));
    match open(&same) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => open(path),
        opened => opened,
    }
}

/// One read of 4096 bytes at the front. Only EINVAL means that the file system refuses; a bad sector is told when it is met.
fn direct_read_works(file: &File) -> bool {
    let page = ALIGN_BYTES as usize;
    let mut buffer = vec![0u8; 2 * page];
    let at = buffer.as_ptr().align_offset(page).min(page);
    match file.read_at(&mut buffer[at..at + page], 0) {
        Ok(_) => true,
        Err(error) => {
            !matches!(error.raw_os_error(), Some(e) if e == libc::EINVAL || e == libc::EOPNOTSUPP)
        }
    }
}

fn kind_name(kind: &std::fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// The current length of the file at `path`, for the cause of an error; empty when it cannot be told.
pub(super) fn length_now(path: &Path) -> String {
    match std::fs::metadata(path) {
        Ok(meta) => format!("; it has {} bytes now", meta.len()),
        Err(error) => format!(
            "; it cannot be looked at: {}",
            errno::describe_error(&error)
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, FileType, Mode};

    use super::*;

    #[test]
    fn only_regular_files_open() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        for (path, why) in [
            (dir.path(), "a directory"),
            (Path::new("/dev/null"), "a device"),
            (&socket, "a socket"),
        ] {
            let error = OpenFile::open(path, true).unwrap_err();
            assert_eq!(error.code(), Code::Io);
            assert!(error.cause().contains(why), "{error}");
        }
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let error = OpenFile::open(&fifo, false).unwrap_err();
        assert!(error.cause().contains("a FIFO"), "{error}");
        let error = OpenFile::open(&dir.path().join("none"), true).unwrap_err();
        assert!(error.what().contains("none"), "{error}");
    }

    #[test]
    fn links_are_followed_and_lengths_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![1u8; 5000]).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for direct in [true, false] {
            let file = OpenFile::open(&link, direct).unwrap();
            assert_eq!(file.bytes, 5000);
            assert!(direct || !file.direct());
        }
        std::fs::write(&path, b"").unwrap();
        assert_eq!(OpenFile::open(&path, true).unwrap().bytes, 0);
    }
}
