//! Opening what a model folder holds. A folder is not trusted: names are plain, links stay inside, and only regular files
//! are opened, without ever waiting on a FIFO.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};
use crate::planted::{self, Bug};

/// Real ones have a few kilobytes; parsed into a tree, this much costs under 64 MiB.
pub(super) const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Indexes of shards and of accelerate's tensors.
pub(super) const MAX_INDEX_BYTES: u64 = 32 << 20;

/// The text files of a model that this engine or a pack of it has a use for.
pub(crate) const TEXT_FILES: [&str; 14] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
];
const MORE_TEMPLATES: &str = "additional_chat_templates";

/// A model folder and how far its links may lead.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    /// Canonical.
    pub dir: PathBuf,
    /// Links must stay below this: `dir` itself, or the model's own directory of a hub cache. Canonical.
    pub root: PathBuf,
    /// The user allows links and entries that lead elsewhere.
    pub allow_external: bool,
}

impl Folder {
    /// The canonical path of a file of this folder, `None` where there is nothing of that name.
    pub(super) fn find(&self, name: &str) -> Result<Option<PathBuf>> {
        if !plain_name(name) {
            return Err(Error::new(
                Code::Checkpoint,
                format!("{} names a file `{}`", self.dir.display(), clip(name)),
                "only plain file names of the folder itself are followed",
                "restore the model's files from its repository",
            ));
        }
        let path = self.dir.join(name);
        match fs::symlink_metadata(&path) {
            Ok(_) => self.confine(&path).map(Some),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("cannot look at {}", path.display()), &e)),
        }
    }

    /// As [`Folder::find`], where the file must be there. `who`: what names it, for the message.
    pub(super) fn need(&self, name: &str, who: &str) -> Result<PathBuf> {
        self.find(name)?.ok_or_else(|| {
            Error::new(
                Code::Checkpoint,
                format!("{} has no file {}", self.dir.display(), clip(name)),
                format!("{who} names it"),
                "finish the download of the model, or copy the missing file",
            )
        })
    }

    /// The canonical form of a path that must lie inside.
    pub(super) fn confine(&self, path: &Path) -> Result<PathBuf> {
        let real = fs::canonicalize(path).map_err(|e| {
            let what = format!("cannot follow {}", path.display());
            match e.kind() {
                ErrorKind::NotFound => {
                    Error::io(what, &e).with_fix("the link leads nowhere: download the model again")
                }
                _ => Error::io(what, &e),
            }
        })?;
        let inside = real.starts_with(&self.root) || planted::is(Bug::LinkFollowed);
        if self.allow_external || inside {
            return Ok(real);
        }
        Err(Error::new(
            Code::Checkpoint,
            format!("{} lies outside the model's folder", path.display()),
            format!(
                "it leads to {}, and only files below {} are read",
                real.display(),
                self.root.display()
            ),
            "copy the file into the folder, or pass --allow-external if you trust this folder",
        ))
    }

    /// Holds the files that others will read as text to the same rules, so that none of them waits on a FIFO or copies
    /// what a link brings in from elsewhere.
    pub(super) fn check_text_files(&self) -> Result<()> {
        for name in TEXT_FILES {
            if let Some(path) = self.find(name)? {
                let metadata = fs::symlink_metadata(&path);
                let metadata = metadata
                    .map_err(|e| Error::io(format!("cannot look at {}", path.display()), &e))?;
                refuse_irregular(&self.dir.join(name), &metadata)?;
            }
        }
        let Ok(entries) = fs::read_dir(self.dir.join(MORE_TEMPLATES)) else {
            return Ok(());
        };
        for entry in entries.take(10_000).filter_map(|e| e.ok()) {
            self.confine(&entry.path())?;
        }
        Ok(())
    }

    /// Names of the files in the folder, sorted; for messages only.
    pub(super) fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .take(10_000)
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }
}

/// One component, nothing that leads elsewhere.
pub(super) fn plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && name.len() <= 255
        && !name
            .chars()
            .any(|c| matches!(c, '/' | '\\') || c.is_control())
}

/// Opens a regular file for reading. Looks before it opens, since opening alone can do something (a tape, a FIFO with a
/// writer); opens without blocking and looks again, since the name may have changed hands.
pub(super) fn open_regular(path: &Path) -> Result<(File, Metadata)> {
    let io = |e: std::io::Error| Error::io(format!("cannot open {}", path.display()), &e);
    refuse_irregular(path, &fs::symlink_metadata(path).map_err(io)?)?;
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path)
        .map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    refuse_irregular(path, &metadata)?;
    Ok((file, metadata))
}

fn refuse_irregular(path: &Path, metadata: &Metadata) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(());
    }
    let found = match kind {
        k if k.is_dir() => "a folder",
        k if k.is_fifo() => "a FIFO",
        k if k.is_socket() => "a socket",
        k if k.is_symlink() => "a symbolic link",
        _ => "a device",
    };
    Err(Error::new(
        Code::Checkpoint,
        format!("{} is not a regular file", path.display()),
        format!("it is {found}"),
        "restore the model's files from its repository",
    ))
}

/// Bytes that this process may still write below `path`; `None` where the system does not tell.
#[cfg(feature = "hub")]
pub(super) fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Nanoseconds since 1970 of the last change of content.
pub(super) fn mtime_ns(metadata: &Metadata) -> i64 {
    metadata
        .mtime()
        .saturating_mul(1_000_000_000)
        .saturating_add(metadata.mtime_nsec())
}

/// The whole of a small file.
pub(super) fn read_small(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let (file, metadata) = open_regular(path)?;
    let mut bytes = Vec::with_capacity(metadata.len().min(max_bytes) as usize);
    file.take(max_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(format!("cannot read {}", path.display()), &e))?;
    if bytes.len() as u64 > max_bytes {
        return Err(Error::new(
            Code::Checkpoint,
            format!("{} is too large", path.display()),
            format!("a file of this kind has at most {max_bytes} bytes"),
            "restore the file from the model's repository",
        ));
    }
    Ok(bytes)
}

/// The first bytes of a file, to tell what it is; `None` where it cannot be read.
pub(super) fn read_start(path: &Path) -> Option<Vec<u8>> {
    let (file, _) = open_regular(path).ok()?;
    let mut start = Vec::with_capacity(64);
    file.take(64).read_to_end(&mut start).ok()?;
    Some(start)
}

/// Names what a file with these first bytes is, where it is something people mistake for safetensors.
pub(super) fn refuse_foreign(start: &[u8], path: &Path) -> Result<()> {
    let pickle_fix = "convert it in Python: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT), \
        then use OUT; do so only if you trust its author, since loading a pickle runs its code";
    let (code, cause, fix) = match start {
        [b'P', b'K', 3, 4, ..] => (
            Code::Unsupported,
            "it is a zip archive of pickles, as torch.save writes it; pickles can run code and are never opened",
            pickle_fix,
        ),
        [0x80, 1..=5, ..] => (
            Code::Unsupported,
            "it is a Python pickle; pickles can run code and are never opened",
            pickle_fix,
        ),
        [b'G', b'G', b'U', b'F', ..] => (
            Code::Unsupported,
            "it is a GGUF file",
            "use the model's safetensors checkpoint",
        ),
        _ if start.starts_with(b"version https://git-lfs") => (
            Code::Checkpoint,
            "it is a git-lfs pointer, not the file itself",
            "run `git lfs pull` in the model's folder",
        ),
        _ => return Ok(()),
    };
    Err(Error::new(
        code,
        format!("{} does not hold safetensors", path.display()),
        cause,
        fix,
    ))
}

/// Text from a file for a message: short, without control characters.
pub(super) fn clip(text: &str) -> String {
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut out: String = text.chars().take(120).map(clean).collect();
    if text.chars().nth(120).is_some() {
        out.push('…');
    }
    out
}

/// The last component as text.
pub(super) fn base_name(path: &Path) -> String {
    let name = path.file_name().map(OsStr::to_string_lossy);
    name.map(|n| n.into_owned()).unwrap_or_default()
}
