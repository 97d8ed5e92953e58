//! Where a picture lies: a path, a `file:` URL or a `data:` URL. Nothing is fetched from a network.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::{alphabet, engine::DecodePaddingMode};

use super::decode::MAX_FILE_BYTES;
use super::{Rgb, decode, read_image};
use crate::error::{Code, Error, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Located {
    File(PathBuf),
    /// The contents of a `data:` URL.
    Bytes(Vec<u8>),
}

/// A `data:` URL: it holds the picture itself.
pub fn is_inline(at: &str) -> bool {
    at.get(..5).is_some_and(|s| s.eq_ignore_ascii_case("data:"))
}

/// `at`, without the picture where it holds that itself.
pub(super) fn inline_left_out(at: &str) -> &str {
    match is_inline(at) {
        true => "data:,",
        false => at,
    }
}

/// Resolves `at`; a relative path is taken from `base`. Errors are Code::Usage.
pub fn locate(at: &str, base: &Path) -> Result<Located> {
    let scheme = at
        .split_once(':')
        .map(|(s, _)| s.to_ascii_lowercase())
        .filter(|s| s.len() > 1 && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+'));
    match scheme.as_deref() {
        Some("data") => data(at).map(Located::Bytes),
        Some("file") => file(&at[5..]).map(Located::File),
        Some("http" | "https" | "ftp" | "s3") => Err(refused(
            at,
            "nothing is fetched from a network",
            "download it, and give its path",
        )),
        // A colon may be part of a file's name.
        _ if at.is_empty() => Err(refused(at, "the place is empty", "give a path")),
        _ => Ok(Located::File(base.join(at))),
    }
}

fn file(rest: &str) -> Result<PathBuf> {
    let bad = |cause: &str| {
        refused(
            &format!("file:{rest}"),
            cause,
            "write file:///absolute/path",
        )
    };
    // file:///path, file://localhost/path and file:/path are the same.
    let path = match rest.strip_prefix("//") {
        Some(rest) => match rest.find('/') {
            Some(0) => rest,
            Some(end) if rest[..end].eq_ignore_ascii_case("localhost") => &rest[end..],
            _ => return Err(bad("it names another host")),
        },
        None => rest,
    };
    if !path.starts_with('/') {
        return Err(bad("a file: URL has an absolute path"));
    }
    let bytes =
        percent_decoded(path.as_bytes()).ok_or_else(|| bad("a % is not followed by two digits"))?;
    String::from_utf8(bytes)
        .map(PathBuf::from)
        .map_err(|_| bad("it is not UTF-8"))
}

fn data(url: &str) -> Result<Vec<u8>> {
    let name: String = url.chars().take(40).collect();
    let bad = |cause: &str| refused(&format!("{name}…"), cause, "write data:image/png;base64,…");
    let (head, body) = url
        .split_once(',')
        .ok_or_else(|| bad("a data: URL has a comma before its data"))?;
    if body.len() as u64 > MAX_FILE_BYTES / 3 * 4 {
        return Err(bad("it is longer than an image may be"));
    }
    // Copied only where something has to go: a picture inline is megabytes.
    let mut body = Cow::Borrowed(body.as_bytes());
    if body.contains(&b'%') {
        let decoded = percent_decoded(&body);
        body = Cow::Owned(decoded.ok_or_else(|| bad("a % is not followed by two digits"))?);
    }
    if !head.to_ascii_lowercase().ends_with(";base64") {
        return Ok(body.into_owned());
    }
    let mut clean = body;
    if clean.iter().any(u8::is_ascii_whitespace) {
        clean.to_mut().retain(|b| !b.is_ascii_whitespace());
    }
    // With or without padding, in either alphabet: all four are met in the wild.
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let alphabet = match clean.iter().any(|b| matches!(b, b'-' | b'_')) {
        true => &alphabet::URL_SAFE,
        false => &alphabet::STANDARD,
    };
    GeneralPurpose::new(alphabet, config)
        .decode(&clean)
        .map_err(|e| bad(&format!("it is not base64: {e}")))
}

fn percent_decoded(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] == b'%' {
            let digits = bytes.get(i + 1..i + 3)?;
            if !digits.iter().all(u8::is_ascii_hexdigit) {
                return None;
            }
            let digits = std::str::from_utf8(digits).ok()?;
            out.push(u8::from_str_radix(digits, 16).ok()?);
            i += 3;
        } else {
            out.push(bytes[i]);
            i += 1;
        }
    }
    Some(out)
}

fn refused(at: &str, cause: &str, fix: &str) -> Error {
    let at: String = at.chars().take(200).collect();
    Error::new(
        Code::Usage,
        format!("cannot find the picture `{at}`"),
        cause,
        fix,
    )
}

/// The picture that lies at `at`.
pub(super) fn open(at: &str, base: &Path) -> Result<Rgb> {
    match locate(at, base)? {
        Located::File(path) => read_image(&path),
        Located::Bytes(bytes) => decode(&bytes, &at_name(at)),
    }
}

/// Where a video or a folder of frames lies.
pub(super) fn video_file(at: &str, base: &Path) -> Result<PathBuf> {
    match locate(at, base)? {
        Located::File(path) => Ok(path),
        Located::Bytes(_) => Err(Error::new(
            Code::Media,
            format!("cannot use the video {}", at_name(at)),
            "a video is read from a file, not from a data: URL",
            "give a path, a file: URL, or a list of frames",
        )),
    }
}

/// A place as errors name it: a data: URL is not repeated whole.
pub(super) fn at_name(at: &str) -> String {
    match at.split_once(',') {
        Some((head, _)) if is_inline(at) && head.len() < 80 => format!("{head},…"),
        _ => at.chars().take(200).collect(),
    }
}

/// The pictures of a folder, in the order of their names.
pub(super) fn frame_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e: &std::io::Error| Error::io(format!("cannot list {}", dir.display()), e);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| failed(&e))? {
        let path = entry.map_err(|e| failed(&e))?.path();
        let known = path
            .extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| ["png", "jpg", "jpeg", "webp"].contains(&&*e.to_ascii_lowercase()));
        if known && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::new(
            Code::Media,
            format!("cannot use {} as a video", dir.display()),
            "the folder has no PNG, JPEG or WebP files",
            "give a folder of frames named in their order",
        ));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_urls() {
        let base = Path::new("/jobs");
        let file = |p: &str| Located::File(PathBuf::from(p));
        for (at, want) in [
            ("a/b.png", "/jobs/a/b.png"),
            ("/x.png", "/x.png"),
            ("12:30.png", "/jobs/12:30.png"),
            ("file:///tmp/a%20b.png", "/tmp/a b.png"),
            ("file://localhost/x", "/x"),
            ("FILE:/x", "/x"),
        ] {
            assert_eq!(locate(at, base).unwrap(), file(want), "{at}");
        }
        for at in [
            "http://x/y.png",
            "https://x",
            "file://elsewhere/x",
            "file:x",
            "file:///%zz",
            "",
        ] {
            assert_eq!(locate(at, base).unwrap_err().code(), Code::Usage, "{at}");
        }
    }

    #[test]
    fn data_urls() {
        let bytes = |at: &str| locate(at, Path::new("/")).unwrap();
        for at in [
            "data:image/png;base64,aGk/Pz4=",
            "data:image/png;base64,aGk/Pz4",
            "data:;base64,aGk_\nPz4%3D",
            "DATA:text/plain,hi%3f%3F>",
        ] {
            assert_eq!(bytes(at), Located::Bytes(b"hi??>".to_vec()), "{at}");
        }
        for at in ["data:image/png;base64", "data:;base64,!!!!", "data:,%4"] {
            assert!(locate(at, Path::new("/")).is_err(), "{at}");
        }
    }
}
