//! The one error type. Every error a user can meet is three lines: what happened, why, and what to do.

use std::fmt;

/// What class of thing went wrong. Stable: scripts and tests match on [`Code::as_str`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The command line or a value given by the user does not make sense.
    Usage,
    /// `config.json`: a key is missing, absurd or contradicts the weights.
    Config,
    /// A model type, dtype, encoding or feature this engine does not have.
    Unsupported,
    /// The source checkpoint is damaged, incomplete or hostile.
    Checkpoint,
    /// The packed folder is unfinished, foreign or of another version.
    Store,
    /// Somebody else holds the lock.
    Locked,
    /// The model hub refuses, or cannot be reached.
    Hub,
    /// Not enough disk space.
    Space,
    /// A memory budget cannot be kept.
    Memory,
    /// A file system call failed.
    Io,
    /// Bytes read differ from the bytes that were recorded.
    Corrupt,
    /// Nothing happened within the time limit.
    Stalled,
    /// CPU features, GPU or driver.
    Device,
    /// Tokenizer or chat template.
    Text,
    /// An image or video.
    Media,
    /// More rows of a job failed than were allowed to.
    Rows,
    /// Ctrl-C.
    Interrupted,
    /// A promise inside the engine was broken: a bug.
    Internal,
}

impl Code {
    pub fn as_str(self) -> &'static str {
        match self {
            Code::Usage => "usage",
            Code::Config => "config",
            Code::Unsupported => "unsupported",
            Code::Checkpoint => "checkpoint",
            Code::Store => "store",
            Code::Locked => "locked",
            Code::Hub => "hub",
            Code::Space => "space",
            Code::Memory => "memory",
            Code::Io => "io",
            Code::Corrupt => "corrupt",
            Code::Stalled => "stalled",
            Code::Device => "device",
            Code::Text => "text",
            Code::Media => "media",
            Code::Rows => "rows",
            Code::Interrupted => "interrupted",
            Code::Internal => "internal",
        }
    }
}

/// What failed, why, and what the user can do about it.
#[derive(Clone, PartialEq, Eq)]
pub struct Error(Box<Parts>);

#[derive(Clone, PartialEq, Eq)]
struct Parts {
    code: Code,
    what: String,
    cause: String,
    fix: String,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `what`: what could not be done, naming the file, layer, key or flag concerned.
    pub fn new(
        code: Code,
        what: impl Into<String>,
        cause: impl Into<String>,
        fix: impl Into<String>,
    ) -> Error {
        Error(Box::new(Parts {
            code,
            what: what.into(),
            cause: cause.into(),
            fix: fix.into(),
        }))
    }

    /// A bug in the engine: a broken invariant that tests should have met first.
    pub fn internal(what: impl Into<String>) -> Error {
        Error::new(
            Code::Internal,
            what,
            "an internal invariant does not hold",
            "please report this with the command line that led here",
        )
    }

    /// A failed system call on `path`. Says which errno; the fix follows from it where one is known.
    pub fn io(what: impl Into<String>, error: &std::io::Error) -> Error {
        let (code, fix) = match error.raw_os_error() {
            Some(libc::ENOSPC) | Some(libc::EDQUOT) => (
                Code::Space,
                "free some disk space or choose another --offload-folder",
            ),
            Some(libc::EACCES) | Some(libc::EPERM) | Some(libc::EROFS) => {
                (Code::Io, "check the permissions of that path")
            }
            Some(libc::ENOENT) => (Code::Io, "check that the path exists"),
            Some(libc::EMFILE) | Some(libc::ENFILE) => {
                (Code::Io, "raise the open file limit (ulimit -n)")
            }
            Some(libc::EIO) => (
                Code::Io,
                "the disk reports a failure: check the kernel log (dmesg) and the drive",
            ),
            _ => (Code::Io, "check the path and the disk behind it"),
        };
        Error::new(code, what, error.to_string(), fix)
    }

    /// Somebody asked for an end: the first Ctrl-C.
    pub fn interrupted() -> Error {
        Error::new(
            Code::Interrupted,
            "interrupted",
            "Ctrl-C, or a request to stop",
            "run the same command again",
        )
    }

    pub fn code(&self) -> Code {
        self.0.code
    }
    pub fn what(&self) -> &str {
        &self.0.what
    }
    pub fn cause(&self) -> &str {
        &self.0.cause
    }
    pub fn fix(&self) -> &str {
        &self.0.fix
    }

    /// The same error, with the fix replaced by one that fits the caller's situation better.
    pub fn with_fix(mut self, fix: impl Into<String>) -> Error {
        self.0.fix = fix.into();
        self
    }

    /// Exit code of the process: 2 usage, 130 interrupted, 1 everything else.
    pub fn exit_code(&self) -> u8 {
        match self.0.code {
            Code::Usage => 2,
            Code::Interrupted => 130,
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "error: {}\ncause: {}\nfix: {}",
            self.0.what, self.0.cause, self.0.fix
        )
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {self}", self.0.code.as_str())
    }
}

impl std::error::Error for Error {}
