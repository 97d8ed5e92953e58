//! Large reads and writes past the page cache: packing or verifying a model must not push everything else out of it.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use memmap2::MmapMut;
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::units::{ALIGN_BYTES, align_down, align_up};

const ALIGN: usize = ALIGN_BYTES as usize;

/// Bytes whose address is a multiple of 4096, as O_DIRECT wants it. They lie in a mapping of their own, which goes back to the
/// system when it is dropped: the heap would keep it, and a run that packs first would hold tens of megabytes more than one that
/// finds its pack.
pub(crate) struct AlignedBuf {
    memory: Memory,
    len: usize,
}

enum Memory {
    Mapped(MmapMut),
    /// Where the system gives no mapping: the heap then decides whether there is memory at all.
    Heap {
        raw: Vec<u8>,
        start: usize,
    },
}

impl AlignedBuf {
    /// `len` zeros.
    pub fn new(len: usize) -> AlignedBuf {
        let memory = MmapMut::map_anon(len.max(1)).map_or_else(
            |_| {
                let raw = vec![0; len + ALIGN];
                let start = raw.as_ptr().align_offset(ALIGN);
                // align_offset may give up (it never does on real machines): then O_DIRECT fails with EINVAL, nothing worse.
                let start = if start > ALIGN { 0 } else { start };
                Memory::Heap { raw, start }
            },
            Memory::Mapped,
        );
        AlignedBuf { memory, len }
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Mapped(map) => &map[..self.len],
            Memory::Heap { raw, start } => &raw[*start..start + self.len],
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Mapped(map) => &mut map[..self.len],
            Memory::Heap { raw, start } => &mut raw[*start..*start + self.len],
        }
    }
}

/// A file opened with O_DIRECT, or without where the file system refuses it.
pub(crate) struct DirectFile {
    file: File,
    direct: bool,
}

impl DirectFile {
    /// For reading. Only regular files; a FIFO or device is an error and does not block.
    pub fn open(path: &Path) -> io::Result<DirectFile> {
        DirectFile::open_with(path, OpenOptions::new().read(true))
    }

    /// For writing into a file that is there and has its length.
    pub fn open_write(path: &Path) -> io::Result<DirectFile> {
        DirectFile::open_with(path, OpenOptions::new().write(true))
    }

    fn open_with(path: &Path, options: &mut OpenOptions) -> io::Result<DirectFile> {
        let calm = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let direct = options.custom_flags(calm | libc::O_DIRECT).open(path);
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                (options.custom_flags(calm).open(path)?, false)
            }
            Err(e) => return Err(e),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        Ok(DirectFile { file, direct })
    }

    /// False where the file system refused O_DIRECT.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Reads `want` bytes at `offset` into `buffer`, which has room for them and 8 KiB more. The slice holds the bytes
    /// that are there: fewer than `want` only at the end of the file.
    pub fn read<'b>(
        &self,
        offset: u64,
        want: usize,
        buffer: &'b mut AlignedBuf,
    ) -> io::Result<&'b [u8]> {
        let first = align_down(offset, ALIGN_BYTES);
        let skip = (offset - first) as usize;
        let span = align_up((skip + want) as u64, ALIGN_BYTES) as usize;
        let target = &mut buffer.bytes_mut()[..span];
        let mut have = 0usize;
        while have < skip + want {
            // Under O_DIRECT a short read is resumed at the last 4096 boundary, not at the odd byte.
            let at = if self.direct {
                have / ALIGN * ALIGN
            } else {
                have
            };
            match self.file.read_at(&mut target[at..], first + at as u64) {
                Ok(n) if at + n <= have => break,
                Ok(n) => have = at + n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if !self.direct {
            self.forget(first, span);
        }
        let end = have.min(skip + want);
        Ok(&buffer.bytes()[skip.min(end)..end])
    }

    /// Writes `bytes` (from an [`AlignedBuf`], a multiple of 4096) at `offset` (a multiple of 4096).
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Everything written so far is on the disk, and no longer in the page cache.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()?;
        if !self.direct {
            self.forget(0, 0);
        }
        Ok(())
    }

    fn forget(&self, offset: u64, bytes: usize) {
        // Advice: where it is not taken, memory is merely used less well.
        let _ = fadvise(
            &self.file,
            offset,
            NonZeroU64::new(bytes as u64),
            Advice::DontNeed,
        );
    }
}

/// A file read from the page cache alone.
pub(crate) struct CachedFile(File);

impl CachedFile {
    pub fn open(path: &Path) -> io::Result<CachedFile> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        // A miss must not start reading ahead what is then read past the cache.
        let _ = fadvise(&file, 0, None, Advice::Random);
        Ok(CachedFile(file))
    }

    /// `want` bytes at `offset`, where the page cache has all of them: a checkpoint that was just downloaded need not be
    /// read from the disk again. None where it has not.
    pub fn read<'b>(
        &self,
        offset: u64,
        want: usize,
        buffer: &'b mut AlignedBuf,
    ) -> Option<&'b [u8]> {
        let target = &mut buffer.bytes_mut()[..want];
        let mut have = 0;
        while have < want {
            let rest = &mut [IoSliceMut::new(&mut target[have..])];
            match preadv2(&self.0, rest, offset + have as u64, ReadWriteFlags::NOWAIT) {
                Ok(n) if n > 0 => have += n,
                Err(Errno::INTR) => {}
                _ => return None,
            }
        }
        Some(&buffer.bytes()[..want])
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode};

    use super::*;

    #[test]
    fn any_range_of_a_file_of_odd_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let data: Vec<u8> = (0..3 * ALIGN + 77).map(|i| (i % 253) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let file = DirectFile::open(&path).unwrap();
        let mut buffer = AlignedBuf::new(data.len() + 2 * ALIGN);
        assert_eq!(buffer.bytes().as_ptr() as usize % ALIGN, 0);
        for offset in [
            0,
            1,
            ALIGN - 1,
            ALIGN,
            2 * ALIGN + 5,
            data.len() - 1,
            data.len(),
        ] {
            for want in [0, 1, 100, ALIGN, ALIGN + 1, data.len()] {
                let expected = &data[offset..data.len().min(offset + want)];
                let got = file.read(offset as u64, want, &mut buffer).unwrap();
                assert_eq!(got, expected, "{offset}+{want}");
            }
        }
    }

    #[test]
    fn the_cache_gives_the_same_bytes_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let data: Vec<u8> = (0..5 * ALIGN + 77).map(|i| (i % 253) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let file = CachedFile::open(&path).unwrap();
        let mut buffer = AlignedBuf::new(data.len() + ALIGN);
        for (offset, want) in [(0, 10), (1, data.len() - 1), (ALIGN - 1, ALIGN + 2)] {
            if let Some(got) = file.read(offset as u64, want, &mut buffer) {
                assert_eq!(got, &data[offset..offset + want]);
            }
        }
        // Never fewer bytes than wanted.
        assert!(file.read(data.len() as u64 - 5, 6, &mut buffer).is_none());
    }

    #[test]
    fn a_fifo_or_a_folder_is_refused_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        assert!(DirectFile::open(dir.path()).is_err());
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(DirectFile::open(&fifo).is_err());
        assert!(DirectFile::open(Path::new("/dev/zero")).is_err());
    }
}
