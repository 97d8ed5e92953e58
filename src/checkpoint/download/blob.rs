//! One file into `blobs/`: resumed, compared with its length and hash, and only then named.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::super::files::clip;
use super::super::hub::HubId;
use super::web::{Trouble, Web};
use super::{DownloadProgress, interrupted};
use crate::error::{Code, Error, Result};

const CHUNK_BYTES: usize = 256 << 10;

/// A file as the hub describes it.
pub(super) struct Wanted {
    pub name: String,
    /// The blob's name.
    pub etag: String,
    pub bytes: u64,
    pub digest: Digest,
}

impl Wanted {
    /// huggingface_hub's name for it: either program goes on where the other stopped.
    pub(super) fn partial_name(&self) -> String {
        format!("{}.incomplete", self.etag)
    }
}

/// The hash a file must have, in lower-case hex.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Digest {
    /// Of the content: files in large-file storage.
    Sha256(String),
    /// Git's, of `blob LENGTH\0` and the content: the others.
    Git(String),
    /// A mirror's ETag that is no hash: the length is all there is to compare.
    Unknown,
}

impl Digest {
    pub(super) fn of(tag: &str) -> Digest {
        let hex = tag.bytes().all(|b| b.is_ascii_hexdigit());
        match tag.len() {
            64 if hex => Digest::Sha256(tag.to_ascii_lowercase()),
            40 if hex => Digest::Git(tag.to_ascii_lowercase()),
            _ => Digest::Unknown,
        }
    }

    fn start(&self, bytes: u64) -> Running {
        match self {
            Digest::Sha256(_) => Running::Sha256(Sha256::new()),
            Digest::Git(_) => {
                let mut sha = Sha1::new();
                sha.update(format!("blob {bytes}\0"));
                Running::Git(sha)
            }
            Digest::Unknown => Running::None,
        }
    }
}

enum Running {
    Sha256(Sha256),
    Git(Sha1),
    None,
}

impl Running {
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Running::Sha256(sha) => sha.update(bytes),
            Running::Git(sha) => sha.update(bytes),
            Running::None => {}
        }
    }

    fn matches(self, digest: &Digest) -> bool {
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        match (self, digest) {
            (Running::Sha256(sha), Digest::Sha256(want)) => hex(&sha.finalize()) == *want,
            (Running::Git(sha), Digest::Git(want)) => hex(&sha.finalize()) == *want,
            _ => true,
        }
    }
}

pub(super) struct Job<'a> {
    pub web: &'a Web,
    pub id: &'a HubId,
    pub cancel: &'a AtomicBool,
    pub url: String,
    pub wanted: &'a Wanted,
    pub blobs: PathBuf,
    pub locks: PathBuf,
}

/// Gets one blob. Returns the bytes that came over the network. `progress` makes a message of the bytes that are here.
pub(super) fn fetch(
    job: &Job,
    tell: &mut dyn FnMut(DownloadProgress),
    progress: &mut dyn FnMut(u64) -> DownloadProgress<'static>,
) -> Result<u64> {
    let whole = job.blobs.join(&job.wanted.etag);
    let _lock = job.lock(tell)?;
    if fs::metadata(&whole).is_ok_and(|m| m.is_file() && m.len() == job.wanted.bytes) {
        return Ok(0);
    }
    let mut partial = Partial::open(job)?;
    let mut received = 0;
    for last in [false, true] {
        received += partial.fill(tell, progress)?;
        if partial.is_sound() {
            partial.name_it(&whole)?;
            return Ok(received);
        }
        log::warn!("hub: {} came damaged", job.wanted.name);
        partial.restart()?;
        if !last {
            tell(DownloadProgress::Retrying {
                file: &job.wanted.name,
                why: "its hash is another than the hub's",
            });
        }
    }
    let _ = fs::remove_file(&partial.path);
    Err(Error::new(
        Code::Corrupt,
        format!("{} came damaged, twice", clip(&job.wanted.name)),
        "its hash is another than the hub says; what came was thrown away",
        "try again; a proxy or mirror in between may change files",
    ))
}

impl Job<'_> {
    /// The lock that huggingface_hub takes for the same blob.
    fn lock(&self, tell: &mut dyn FnMut(DownloadProgress)) -> Result<File> {
        let path = self.locks.join(format!("{}.lock", self.wanted.etag));
        let fail = |e: std::io::Error| Error::io(format!("cannot lock {}", path.display()), &e);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(fail)?;
        let mut told = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(e) if e == rustix::io::Errno::WOULDBLOCK => {}
                // File systems without locks: two downloads at once only cost time, the hash decides.
                Err(_) => return Ok(file),
            }
            if !told {
                told = true;
                tell(DownloadProgress::Waiting {
                    file: &self.wanted.name,
                });
            }
            if self.cancel.load(Relaxed) {
                return Err(interrupted());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A download as far as it came.
struct Partial<'a> {
    job: &'a Job<'a>,
    path: PathBuf,
    file: File,
    here: u64,
    hash: Running,
}

impl<'a> Partial<'a> {
    /// What an earlier attempt left, hashed; or a new file.
    fn open(job: &'a Job<'a>) -> Result<Partial<'a>> {
        let path = job.blobs.join(job.wanted.partial_name());
        let fail = |e: std::io::Error| Error::io(format!("cannot write {}", path.display()), &e);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path)
            .map_err(fail)?;
        let hash = job.wanted.digest.start(job.wanted.bytes);
        let mut partial = Partial {
            job,
            path,
            file,
            here: 0,
            hash,
        };
        let length = partial.file.metadata().map_err(|e| partial.fail(&e))?.len();
        if length > job.wanted.bytes {
            partial.restart()?;
        } else if length > 0 {
            log::info!("hub: {} goes on at byte {length}", job.wanted.name);
            partial.hash_prefix()?;
        }
        Ok(partial)
    }

    fn hash_prefix(&mut self) -> Result<()> {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            if self.job.cancel.load(Relaxed) {
                return Err(interrupted());
            }
            let n = self.file.read(&mut buffer).map_err(|e| self.fail(&e))?;
            if n == 0 {
                return Ok(());
            }
            self.hash.update(&buffer[..n]);
            self.here += n as u64;
        }
    }

    fn fail(&self, e: &std::io::Error) -> Error {
        let error = Error::io(format!("cannot write {}", self.path.display()), e);
        match error.code() {
            Code::Space => error.with_fix(format!(
                "free some space there and run the same command again (it goes on at byte {}), or set HF_HUB_CACHE to \
                 a folder on a larger disk",
                self.here
            )),
            _ => error,
        }
    }

    fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(|e| self.fail(&e))?;
        self.file
            .seek(SeekFrom::Start(0))
            .map_err(|e| self.fail(&e))?;
        self.here = 0;
        self.hash = self.job.wanted.digest.start(self.job.wanted.bytes);
        Ok(())
    }

    /// Downloads until the length is right. Attempts count as failures only if not a byte came.
    fn fill(
        &mut self,
        tell: &mut dyn FnMut(DownloadProgress),
        progress: &mut dyn FnMut(u64) -> DownloadProgress<'static>,
    ) -> Result<u64> {
        let (mut failures, mut received) = (0, 0);
        while self.here < self.job.wanted.bytes {
            let before = received;
            match self.attempt(&mut received, tell, progress) {
                Ok(()) => {}
                Err(Trouble::Final(e)) => return Err(e),
                Err(Trouble::Passing { why, wait }) => {
                    failures = if received > before { 1 } else { failures + 1 };
                    let (web, name) = (self.job.web, &self.job.wanted.name);
                    web.pause(failures, &why, wait, self.job.cancel, name, tell)?;
                }
            }
        }
        Ok(received)
    }

    fn attempt(
        &mut self,
        received: &mut u64,
        tell: &mut dyn FnMut(DownloadProgress),
        progress: &mut dyn FnMut(u64) -> DownloadProgress<'static>,
    ) -> std::result::Result<(), Trouble> {
        let job = self.job;
        let (body, start) = job
            .web
            .body(&job.url, job.id, &job.wanted.name, self.here)?;
        if start != self.here {
            self.restart()?;
        }
        if start > self.here {
            return Err(job.web.nonsense("another part than was asked for").into());
        }
        let mut body = body.into_reader();
        let mut buffer = vec![0; CHUNK_BYTES];
        while self.here < job.wanted.bytes {
            if job.cancel.load(Relaxed) {
                return Err(interrupted().into());
            }
            let room = (job.wanted.bytes - self.here).min(CHUNK_BYTES as u64) as usize;
            let n = match body.read(&mut buffer[..room]) {
                Ok(0) => {
                    return Err(Trouble::Passing {
                        why: format!(
                            "the connection ended at byte {} of {}",
                            self.here, job.wanted.bytes
                        ),
                        wait: None,
                    });
                }
                Ok(n) => n,
                Err(e) => {
                    return Err(Trouble::Passing {
                        why: clip(&e.to_string()),
                        wait: None,
                    });
                }
            };
            self.file
                .write_all(&buffer[..n])
                .map_err(|e| self.fail(&e))?;
            self.hash.update(&buffer[..n]);
            self.here += n as u64;
            *received += n as u64;
            tell(progress(self.here));
        }
        Ok(())
    }

    /// Whether the whole is what the hub promised.
    fn is_sound(&mut self) -> bool {
        let hash = std::mem::replace(&mut self.hash, Running::None);
        hash.matches(&self.job.wanted.digest)
    }

    fn name_it(&self, whole: &std::path::Path) -> Result<()> {
        self.file.sync_all().map_err(|e| self.fail(&e))?;
        fs::rename(&self.path, whole)
            .and_then(|()| File::open(&self.job.blobs)?.sync_all())
            .map_err(|e| Error::io(format!("cannot write {}", whole.display()), &e))
    }
}
