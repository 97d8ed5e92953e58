//! What picture files hold, as a hash: is it still the picture that an answer is about?

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use twox_hash::XxHash3_128;

use super::MediaRequest;
use super::locate::frame_files;
use super::locate::{Located, inline_left_out, locate};

/// Files up to this size are hashed whole.
const WHOLE_BYTES: u64 = 8 << 20;
/// Of larger ones (videos) the length and so many pieces, from the first byte to the last.
const PIECES: u64 = 64;
const PIECE_BYTES: u64 = 64 << 10;

/// Hashes of files, each read once while it stays as it is.
#[derive(Debug, Default)]
pub struct FileIds {
    seen: HashMap<PathBuf, (Stamp, u128)>,
}

/// Length, time of change, inode.
type Stamp = (u64, i64, i64, u64);

impl FileIds {
    /// A hash of the contents of the files that `request` names; relative paths are taken from `base`. Never fails: what cannot be read has
    /// an identity of its own, which changes once it can be. A `data:` URL holds its picture itself and adds nothing.
    pub fn of(&mut self, request: &MediaRequest, base: &Path) -> u128 {
        let mut hash = XxHash3_128::new();
        let mut add = |path: &Path| hash.write(&self.file(path).to_le_bytes());
        let mut place = |at: &str| match locate(inline_left_out(at), base) {
            Ok(Located::File(path)) if path.is_dir() => match frame_files(&path) {
                Ok(files) => files.iter().for_each(|f| add(f)),
                Err(_) => add(&path),
            },
            Ok(Located::File(path)) => add(&path),
            _ => {}
        };
        match request {
            MediaRequest::Image { at, .. } | MediaRequest::Video { at, .. } => place(at),
            MediaRequest::Frames { at, .. } => at.iter().for_each(|at| place(at)),
        }
        hash.finish_128()
    }

    fn file(&mut self, path: &Path) -> u128 {
        const UNREADABLE: u128 = 0;
        let Ok(meta) = std::fs::metadata(path) else {
            return UNREADABLE;
        };
        if !meta.is_file() {
            return UNREADABLE;
        }
        let stamp = (meta.len(), meta.mtime(), meta.mtime_nsec(), meta.ino());
        match self.seen.get(path) {
            Some((seen, id)) if *seen == stamp => *id,
            _ => {
                let id = contents(path, meta.len()).unwrap_or(UNREADABLE);
                self.seen.insert(path.to_path_buf(), (stamp, id));
                id
            }
        }
    }
}

fn contents(path: &Path, len: u64) -> std::io::Result<u128> {
    let file = File::open(path)?;
    let mut hash = XxHash3_128::new();
    hash.write(&len.to_le_bytes());
    let mut buffer = vec![0; len.min(WHOLE_BYTES.max(PIECE_BYTES)) as usize];
    if len <= WHOLE_BYTES {
        file.read_exact_at(&mut buffer, 0)?;
        hash.write(&buffer);
        return Ok(hash.finish_128());
    }
    let piece = &mut buffer[..PIECE_BYTES as usize];
    for i in 0..PIECES {
        file.read_exact_at(piece, (len - PIECE_BYTES) / (PIECES - 1) * i)?;
        hash.write(piece);
    }
    file.read_exact_at(piece, len - PIECE_BYTES)?;
    hash.write(piece);
    Ok(hash.finish_128())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::Options;

    fn image(at: &str) -> MediaRequest {
        MediaRequest::Image {
            at: at.into(),
            options: Options::default(),
        }
    }

    #[test]
    fn contents_count_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &[u8]| std::fs::write(dir.path().join(name), text).unwrap();
        let id = |request: &MediaRequest| FileIds::default().of(request, dir.path());
        write("a.png", b"one");
        write("b.png", b"one");
        assert_eq!(id(&image("a.png")), id(&image("b.png")));
        let before = id(&image("a.png"));
        let missing = id(&image("c.png"));
        assert_ne!(before, missing);
        write("c.png", b"one");
        assert_eq!(id(&image("c.png")), before);
        // Seen before, and changed since.
        let mut ids = FileIds::default();
        assert_eq!(ids.of(&image("a.png"), dir.path()), before);
        write("a.png", b"three");
        assert_ne!(ids.of(&image("a.png"), dir.path()), before);
    }

    #[test]
    fn frames_count_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("0.png", "x"), ("1.png", "y")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let frames = |at: &[&str]| MediaRequest::Frames {
            at: at.iter().map(|s| s.to_string()).collect(),
            options: Options::default(),
        };
        let id = |request: &MediaRequest| FileIds::default().of(request, dir.path());
        let folder = MediaRequest::Video {
            at: ".".into(),
            options: Options::default(),
        };
        assert_eq!(id(&frames(&["0.png", "1.png"])), id(&folder));
        assert_ne!(id(&frames(&["1.png", "0.png"])), id(&folder));
    }

    #[test]
    fn a_large_file_is_sampled_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.mp4");
        let mut bytes = vec![7u8; WHOLE_BYTES as usize + 12345];
        let mut last = None;
        for at in [0, 1000, bytes.len() - 1] {
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            let id = FileIds::default().of(&image("v.mp4"), dir.path());
            assert_ne!(Some(id), last, "byte {at}");
            last = Some(id);
        }
    }
}
