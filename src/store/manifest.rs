//! `manifest.json`: what a packed folder holds. Written last; a folder without a valid one is unfinished.
//!
//! The first line carries the hash of all that follows it, so that a torn or edited manifest is no manifest.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checksums::hash_bytes;
use super::durable;
use crate::error::{Code, Error, Result};
use crate::units::{ALIGN_BYTES, BLOCK_BYTES, Dtype};

pub(crate) use validate::{Opened, block_shape, kind_name, validate};

mod validate;

pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const CHECKSUMS: &str = "checksums.bin";
pub(crate) const FORMAT: &str = "tensorpager";
/// Version of the format this engine writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;
/// A manifest of a 1000-layer model has about 4 MB.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// Text files that are copied beside the weights, so that a packed folder is a model of its own.
pub(crate) use crate::checkpoint::TEXT_FILES as COPIES;
/// Larger ones are no configs.
pub(crate) const MAX_COPY_BYTES: u64 = 512 << 20;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub format: String,
    pub version: u32,
    /// Folder or hub name of the source, `/` as `--`.
    pub model: String,
    pub model_type: String,
    /// `float16`, `bfloat16`, `float32` or `mixed`.
    pub dtype: String,
    pub align_bytes: u64,
    pub block_bytes: u64,
    /// `config.json` as a reader of the manifest wants to see it; the copy beside it, whose hash is in `copies`, counts.
    pub spec: Value,
    pub source: SourceRecord,
    pub copies: Vec<CopyRecord>,
    /// In the order of file ids.
    pub files: Vec<FileRecord>,
    pub checksums: CopyRecord,
    pub units: Vec<UnitRecord>,
}

/// Which source a pack was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SourceRecord {
    /// Absolute folder.
    pub path: String,
    pub revision: Option<String>,
    #[serde(with = "hex")]
    pub config_xxh3: u64,
    /// Hash of all of these: 16 hex digits.
    #[serde(with = "hex")]
    pub identity: u64,
    pub files: Vec<SourceFileRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SourceFileRecord {
    pub name: String,
    pub bytes: u64,
    #[serde(with = "hex")]
    pub header_xxh3: u64,
    pub mtime_ns: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CopyRecord {
    pub name: String,
    pub bytes: u64,
    #[serde(with = "hex")]
    pub xxh3: u64,
}

impl CopyRecord {
    pub fn of(name: &str, bytes: &[u8]) -> CopyRecord {
        CopyRecord {
            name: name.to_string(),
            bytes: bytes.len() as u64,
            xxh3: hash_bytes(bytes),
        }
    }

    pub fn fits(&self, bytes: &[u8]) -> bool {
        *self == CopyRecord::of(&self.name, bytes)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileRecord {
    pub name: String,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnitRecord {
    pub id: u32,
    /// `embed`, `layer`, `norm`, `head`, `vision_embed`, `vision_block`, `vision_merger`.
    pub kind: String,
    /// Of the decoded unit: the extents' `bytes` one after the other.
    pub bytes: u64,
    pub extents: Vec<ExtentRecord>,
    pub tensors: Vec<TensorRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExtentRecord {
    pub file: u32,
    pub offset: u64,
    /// Bytes in the file.
    pub stored_bytes: u64,
    /// Bytes once decoded.
    pub bytes: u64,
    /// `raw`: stored as they are.
    pub encoding: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorRecord {
    pub name: String,
    pub dtype: Dtype,
    /// Of what lies in this unit: a row block has the block's rows.
    pub shape: Vec<usize>,
    /// Number of planes an element is split into: 1.
    pub parts: u32,
    /// In the decoded unit.
    pub offset: u64,
    /// First row of the whole tensor that lies here.
    pub first_row: usize,
}

/// 64-bit hashes as 16 hex digits: JSON numbers of that size do not survive every tool.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format!("{value:016x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        let text = String::deserialize(d)?;
        let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        digits
            .then(|| u64::from_str_radix(&text, 16).ok())
            .flatten()
            .ok_or_else(|| D::Error::custom(format!("`{text}` is not 16 hex digits")))
    }
}

/// `{` and the hash line.
const HEAD_BYTES: usize = "{\n  \"xxh3\": \"0123456789abcdef\",\n".len();

impl Manifest {
    pub fn to_text(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::internal(format!("a manifest that is no JSON: {e}")))?;
        let body = text.strip_prefix("{\n").unwrap_or_default();
        let hash = hash_bytes(body.as_bytes());
        Ok(format!("{{\n  \"xxh3\": \"{hash:016x}\",\n{body}"))
    }

    /// Reads the text back. `dir` is for messages only.
    pub fn from_text(dir: &Path, text: &str) -> Result<Manifest> {
        let bad = |cause: String| invalid(dir, cause);
        let (head, body) = text
            .split_at_checked(HEAD_BYTES)
            .ok_or_else(|| bad("it is cut short".to_string()))?;
        check_version(dir, text)?;
        let hash = head
            .strip_prefix("{\n  \"xxh3\": \"")
            .and_then(|h| h.strip_suffix("\",\n"))
            .ok_or_else(|| bad("its first line is not the hash of the rest".to_string()))?;
        if hash != format!("{:016x}", hash_bytes(body.as_bytes())) {
            return Err(bad(
                "its hash does not fit: it was cut short or changed".to_string()
            ));
        }
        serde_json::from_str(&format!("{{\n{body}")).map_err(|e| bad(e.to_string()))
    }

    /// Reads `dir/manifest.json`. None: there is none. Err: it is no valid manifest of this version.
    pub fn load(dir: &Path) -> Result<Option<Manifest>> {
        let Some(raw) = read_small(dir, MANIFEST, MAX_MANIFEST_BYTES)? else {
            return Ok(None);
        };
        let text = String::from_utf8(raw).map_err(|e| invalid(dir, e.to_string()))?;
        Manifest::from_text(dir, &text).map(Some)
    }

    /// Writes `dir/manifest.json` in one step, durably.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let text = self.to_text()?;
        durable::replace(dir, MANIFEST, text.as_bytes()).map_err(|e| {
            Error::io(
                format!("cannot write the manifest of {}", dir.display()),
                &e,
            )
        })
    }

    pub fn file_bytes(&self) -> Vec<u64> {
        self.files.iter().map(|f| f.bytes).collect()
    }
}

/// A newer version is told apart from a damaged file, and before any of its fields is looked at.
fn check_version(dir: &Path, text: &str) -> Result<()> {
    #[derive(Deserialize)]
    struct Header {
        format: String,
        version: u64,
    }
    let header: Header =
        serde_json::from_str(text).map_err(|e| invalid(dir, format!("not one of ours: {e}")))?;
    if header.format != FORMAT {
        return Err(invalid(
            dir,
            format!("its format is `{}`, not `{FORMAT}`", header.format),
        ));
    }
    if header.version != u64::from(FORMAT_VERSION) {
        return Err(Error::new(
            Code::Store,
            format!("{} was packed by another version", dir.display()),
            format!(
                "it has format version {}, this engine knows {FORMAT_VERSION}",
                header.version
            ),
            "pack the model again, or use the version that made it",
        ));
    }
    Ok(())
}

/// The format version that a `manifest.json` of ours claims, whole or not. None: no such file, or not of ours.
pub(crate) fn claims(dir: &Path) -> Option<u64> {
    #[derive(Deserialize)]
    struct Header {
        format: String,
        version: u64,
    }
    let raw = read_small(dir, MANIFEST, MAX_MANIFEST_BYTES).ok()??;
    let header: Header = serde_json::from_slice(&raw).ok()?;
    (header.format == FORMAT).then_some(header.version)
}

/// A packed folder that cannot be trusted, and why.
pub(crate) fn invalid(dir: &Path, cause: impl Into<String>) -> Error {
    Error::new(
        Code::Store,
        format!("{} is no valid packed model", dir.display()),
        cause,
        format!(
            "pack the model again (`tensorpager pack`), or remove the folder (`{}`)",
            super::clean_command(dir)
        ),
    )
}

/// A regular file of at most `limit` bytes, whole. None: there is none of that name.
pub(crate) fn read_small(dir: &Path, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    let path = dir.join(name);
    let meta = match fs::symlink_metadata(&path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(format!("cannot read {}", path.display()), &e)),
    };
    if !meta.is_file() || meta.len() > limit {
        return Err(invalid(
            dir,
            format!("{name} is no regular file of at most {limit} bytes"),
        ));
    }
    let mut raw = Vec::new();
    fs::File::open(&path)
        .and_then(|f| f.take(limit).read_to_end(&mut raw))
        .map_err(|e| Error::io(format!("cannot read {}", path.display()), &e))?;
    Ok(Some(raw))
}

/// The granularities a manifest must name: files of another one cannot be read by this engine.
fn check_alignment(dir: &Path, manifest: &Manifest) -> Result<()> {
    let found = (manifest.align_bytes, manifest.block_bytes);
    if found != (ALIGN_BYTES, BLOCK_BYTES) {
        return Err(invalid(
            dir,
            format!(
                "page alignment and checksum block {found:?} are not ({ALIGN_BYTES}, {BLOCK_BYTES})"
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
