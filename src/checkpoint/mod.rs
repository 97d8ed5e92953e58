//! What the source of a model holds: which tensors, of which type and shape, at which bytes of which files. Opens
//! Hugging Face folders, accelerate's offload folders and the local hub cache; reads headers and indexes, never weights.
//!
//! Nothing here trusts the folder: see `files` (names, links, FIFOs) and `header` (bounded cost, checked arithmetic).
//! Pickles are refused.

mod accelerate;
#[cfg(feature = "hub")]
mod download;
mod files;
mod header;
mod hub;
mod identity;
mod json;
mod safetensors;
mod synthetic;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

#[cfg(feature = "hub")]
pub use self::download::{DownloadProgress, Downloaded, Hub, wants_download};
pub(crate) use self::files::TEXT_FILES;
use self::files::{Folder, MAX_CONFIG_BYTES, clip};
use self::header::Stored;
pub use self::hub::{ModelPath, resolve_model};
pub use self::identity::{FileIdentity, Identity};
use crate::error::{Code, Error, Result};
use crate::planted::{self, Bug};
use crate::spec::{UnitKind, UnitSpec, canonical_name};
use crate::units::{Dtype, FileId};
pub use synthetic::{outline_synthetic, synthetic_bytes, write_synthetic};

/// Over all files of a model.
const MAX_TENSORS: usize = 1 << 18;

/// What the fuzzers call (src/fuzzing.rs): parsers alone, with no file around them. True where the input was accepted.
#[cfg(any(test, feature = "testing"))]
pub(crate) mod fuzz {
    use super::*;

    /// An accepted header's tensors fill the bytes behind it exactly.
    pub(crate) fn header(json: &[u8], data_bytes: u64) -> bool {
        let Ok(tensors) = header::parse(json, data_bytes) else {
            return false;
        };
        let mut end = 0;
        for t in &tensors {
            assert!(t.begin == end && t.end >= t.begin && header::sane_name(&t.name));
            end = t.end;
        }
        assert_eq!(end, data_bytes);
        true
    }

    /// An accepted index names plain files only.
    pub(crate) fn shard_index(json: &[u8]) -> bool {
        let Ok(shards) = safetensors::parse_index(json) else {
            return false;
        };
        assert!(shards.keys().all(|name| files::plain_name(name)));
        true
    }

    pub(crate) fn accelerate_index(json: &[u8]) -> bool {
        accelerate::parse_index(json).is_ok()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// `model.safetensors`, or shards with `model.safetensors.index.json`.
    HfFolder,
    /// `index.json` and a `.dat` a tensor.
    Accelerate,
    /// This engine's own: `manifest.json` and `checksums.bin`. The store opens it; here it has no files or tensors.
    Packed,
}

/// A file with weights. `path` is canonical: no link left to follow.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceFile {
    pub path: PathBuf,
    pub bytes: u64,
}

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorEntry {
    /// [`canonical_name`] of `source_name`.
    pub name: String,
    pub source_name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub file: FileId,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// A tensor of a type this engine does not compute with (fp8, integers …). Fine unless a unit needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct UnsupportedTensor {
    pub source_name: String,
    /// As the source writes it.
    pub dtype: String,
}

/// An opened source.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub dir: PathBuf,
    /// Folder name, or hub name with `/` as `--`.
    pub label: String,
    pub kind: SourceKind,
    /// Where config.json and the tokenizer lie.
    pub config_dir: PathBuf,
    pub config: serde_json::Value,
    pub files: Vec<SourceFile>,
    /// By canonical name.
    pub tensors: BTreeMap<String, TensorEntry>,
    /// By canonical name.
    pub unsupported: BTreeMap<String, UnsupportedTensor>,
    pub identity: Identity,
}

#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// `--config-from`: the folder with config.json and the tokenizer, where it is not the model's own.
    pub config_from: Option<PathBuf>,
    /// `--allow-external`: links and index entries may name files outside the folder.
    pub allow_external: bool,
}

impl Checkpoint {
    /// Finds `model` (see [`resolve_model`]), reads its config, indexes and headers, and checks them against the files'
    /// sizes.
    ///
    /// Errors: as [`resolve_model`]; [`Code::Checkpoint`] for damaged, incomplete or hostile files, each named;
    /// [`Code::Config`] for a config that is not JSON; [`Code::Unsupported`] for pickles and casts.
    pub fn open(model: &str, options: &OpenOptions) -> Result<Checkpoint> {
        let place = resolve_model(model)?;
        Checkpoint::open_at(&place, options)
    }

    /// As [`Checkpoint::open`], for a model already found.
    pub fn open_at(place: &ModelPath, options: &OpenOptions) -> Result<Checkpoint> {
        let folder = place.folder(options.allow_external);
        let config_folder = match &options.config_from {
            Some(dir) => hub::locate(dir)?.folder(options.allow_external),
            None => folder.clone(),
        };
        let (config, config_hash) = read_config(&config_folder, place.kind)?;
        config_folder.check_text_files()?;
        let mut listing = Listing::default();
        match place.kind {
            SourceKind::HfFolder => safetensors::list(&folder, &mut listing)?,
            SourceKind::Accelerate => accelerate::list(&folder, &mut listing)?,
            SourceKind::Packed => {}
        }
        Ok(Checkpoint {
            dir: place.dir.clone(),
            label: place.label.clone(),
            kind: place.kind,
            config_dir: config_folder.dir,
            config,
            files: listing.files,
            tensors: listing.tensors,
            unsupported: listing.unsupported,
            identity: Identity {
                revision: place.revision.clone(),
                config_hash,
                files: listing.identities,
            },
        })
    }

    /// Checks that every tensor the units need is there, of a type this engine has and of the right shape. Returns the
    /// source names of the tensors that no unit needs (rotary `inv_freq` of old saves, a stored copy of a tied head).
    ///
    /// Errors: [`Code::Checkpoint`] naming the first tensor that is missing or of another shape, [`Code::Unsupported`]
    /// for one of another type, [`Code::Config`] for a bias or norm that the config does not announce: ignoring it
    /// would compute another model.
    pub fn check(&self, units: &[UnitSpec]) -> Result<Vec<String>> {
        let mut needed = HashSet::new();
        let mut layers = 0;
        for unit in units {
            layers += usize::from(matches!(unit.kind, UnitKind::Layer(_)));
            for tensor in &unit.tensors {
                if needed.insert(tensor.name.as_str()) {
                    self.check_tensor(unit.kind, &tensor.name, &tensor.shape)?;
                }
            }
        }
        let sources = self.tensors.iter().map(|(n, t)| (n, &t.source_name));
        let unsupported = self.unsupported.iter().map(|(n, t)| (n, &t.source_name));
        let mut left = Vec::new();
        for (name, source_name) in sources.chain(unsupported) {
            if needed.contains(name.as_str()) {
                continue;
            }
            if changes_the_model(name, layers) {
                return Err(Error::new(
                    Code::Config,
                    format!("config.json does not account for tensor `{source_name}`"),
                    "the checkpoint has a bias or norm that the config does not announce; without it the results would be wrong",
                    "restore config.json from the model's repository",
                ));
            }
            left.push(source_name.clone());
        }
        Ok(left)
    }

    fn check_tensor(&self, unit: UnitKind, name: &str, shape: &[usize]) -> Result<()> {
        if let Some(tensor) = self.tensors.get(name) {
            if tensor.shape == shape {
                return Ok(());
            }
            return Err(Error::new(
                Code::Checkpoint,
                format!(
                    "tensor `{}` ({unit}) has the wrong shape",
                    tensor.source_name
                ),
                format!("it is {:?}, config.json asks for {shape:?}", tensor.shape),
                "check that config.json and the weights belong together",
            ));
        }
        if let Some(tensor) = self.unsupported.get(name) {
            return Err(Error::new(
                Code::Unsupported,
                format!(
                    "tensor `{}` ({unit}) is stored as {}",
                    tensor.source_name, tensor.dtype
                ),
                "this engine runs float16, bfloat16 and float32 weights",
                "use a checkpoint in one of these types",
            ));
        }
        let cause = match self.tensors.values().next() {
            _ if name == "lm_head.weight" => {
                "config.json says tie_word_embeddings = false, so the head needs a matrix of its own"
                    .to_string()
            }
            Some(first) => format!(
                "the checkpoint has {} tensors, `{}` first, but not this one",
                self.tensors.len(),
                first.source_name
            ),
            None => "the checkpoint has no tensors of a supported type".to_string(),
        };
        let fix = match self.kind {
            SourceKind::Accelerate => {
                "offload every module (device_map={\"\": \"disk\"}), or use the original checkpoint"
            }
            _ => "finish the download, and check that config.json and the weights belong together",
        };
        let what = format!("tensor `{name}` ({unit}) is missing");
        Err(Error::new(Code::Checkpoint, what, cause, fix))
    }

    /// Checks that no file with weights changed in size or time since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        for (file, identity) in self.files.iter().zip(&self.identity.files) {
            let (_, metadata) = files::open_regular(&file.path)?;
            let same =
                metadata.len() == file.bytes && files::mtime_ns(&metadata) == identity.mtime_ns;
            if !same && !planted::is(Bug::SourceChangeMissed) {
                return Err(Error::new(
                    Code::Checkpoint,
                    format!("{} changed while it was in use", file.path.display()),
                    "its size or modification time is another than when it was opened",
                    "wait until nothing writes to the model's folder, then start again",
                ));
            }
        }
        Ok(())
    }
}

/// A tensor beside those the config asks for, in a module that is used: transformers would warn and ignore it; here it
/// means that the config is not this checkpoint's.
fn changes_the_model(name: &str, layers: usize) -> bool {
    let in_use = match name.strip_prefix("model.layers.") {
        Some(rest) => rest
            .split('.')
            .next()
            .and_then(|i| i.parse::<usize>().ok())
            .is_some_and(|i| i < layers),
        None => name.starts_with("lm_head."),
    };
    in_use && (name.ends_with(".bias") || name.ends_with("norm.weight"))
}

/// What a folder holds, by the files it has. The order is transformers': one file before shards.
fn kind_of(folder: &Folder) -> Result<SourceKind> {
    let has = |name: &str| folder.dir.join(name).symlink_metadata().is_ok();
    if has("manifest.json") && has("checksums.bin") {
        Ok(SourceKind::Packed)
    } else if has(safetensors::SINGLE) || has(safetensors::INDEX) {
        Ok(SourceKind::HfFolder)
    } else if has(accelerate::INDEX) {
        Ok(SourceKind::Accelerate)
    } else {
        Err(no_weights(folder))
    }
}

fn no_weights(folder: &Folder) -> Error {
    // Of a folder that may not be looked into nothing else is known.
    if let Err(e) = std::fs::read_dir(&folder.dir) {
        return Error::io(format!("cannot open {}", folder.dir.display()), &e);
    }
    let names = folder.names();
    let foreign = |n: &&String| {
        let ends = [".bin", ".pt", ".pth", ".ckpt", ".gguf", ".pkl"];
        ends.iter().any(|e| n.ends_with(e))
    };
    // By content: the first file that is one of the formats people mistake for safetensors explains best.
    for name in names.iter().filter(foreign) {
        let start = folder
            .find(name)
            .ok()
            .flatten()
            .and_then(|path| files::read_start(&path));
        if let Some(Err(e)) = start.map(|s| files::refuse_foreign(&s, &folder.dir.join(name))) {
            return e;
        }
    }
    let shown: Vec<String> = names.iter().take(6).map(|n| clip(n)).collect();
    let cause = match shown.is_empty() {
        true => "the folder is empty".to_string(),
        false => format!("it holds {} files: {} …", names.len(), shown.join(", ")),
    };
    Error::new(
        Code::Checkpoint,
        format!("{} holds no weights", folder.dir.display()),
        cause,
        "give a folder with model.safetensors, its shards, or accelerate's index.json and .dat files",
    )
}

fn read_config(folder: &Folder, kind: SourceKind) -> Result<(serde_json::Value, u64)> {
    let name = "config.json";
    let Some(path) = folder.find(name)? else {
        let fix = match kind {
            SourceKind::Accelerate => {
                "pass --config-from DIR, the folder of the original checkpoint"
            }
            _ => "download the model again, its configuration included",
        };
        return Err(Error::new(
            Code::Config,
            format!("{} has no config.json", folder.dir.display()),
            "the model's geometry is never guessed",
            fix,
        ));
    };
    let bytes = files::read_small(&path, MAX_CONFIG_BYTES)?;
    let config = serde_json::from_slice(&bytes).map_err(|e| {
        Error::new(
            Code::Config,
            format!("{} is not JSON", path.display()),
            clip(&e.to_string()),
            "restore config.json from the model's repository",
        )
    })?;
    Ok((config, twox_hash::XxHash3_64::oneshot(&bytes)))
}

/// What the readers of the formats fill.
#[derive(Default)]
struct Listing {
    files: Vec<SourceFile>,
    identities: Vec<FileIdentity>,
    tensors: BTreeMap<String, TensorEntry>,
    unsupported: BTreeMap<String, UnsupportedTensor>,
}

impl Listing {
    fn add_file(&mut self, path: &Path, identity: FileIdentity) -> FileId {
        let id = FileId(self.files.len() as u32);
        self.files.push(SourceFile {
            path: path.to_path_buf(),
            bytes: identity.bytes,
        });
        self.identities.push(identity);
        id
    }

    /// Two names of one tensor, or one name twice, are an error: which of them is meant?
    fn add_tensor(&mut self, source_name: String, place: Place) -> Result<()> {
        let name = canonical_name(&source_name);
        let other = self.tensors.get(&name).map(|t| &t.source_name);
        let other = other.or(self.unsupported.get(&name).map(|t| &t.source_name));
        if let Some(other) = other {
            return Err(Error::new(
                Code::Checkpoint,
                format!("the checkpoint has tensor `{source_name}` twice"),
                format!("it is the same tensor as `{other}`"),
                "restore the model's files from its repository",
            ));
        }
        if self.tensors.len() + self.unsupported.len() == MAX_TENSORS {
            return Err(Error::new(
                Code::Checkpoint,
                format!("the checkpoint has more than {MAX_TENSORS} tensors"),
                "no supported model has as many",
                "restore the model's files from its repository",
            ));
        }
        match place.dtype {
            Stored::Ours(dtype) => {
                let entry = TensorEntry {
                    name: name.clone(),
                    source_name,
                    dtype,
                    shape: place.shape,
                    file: place.file,
                    offset: place.offset,
                    bytes: place.bytes,
                };
                self.tensors.insert(name, entry);
            }
            Stored::Other(dtype) => {
                self.unsupported
                    .insert(name, UnsupportedTensor { source_name, dtype });
            }
        }
        Ok(())
    }
}

/// Where a tensor lies, before its names are known.
struct Place {
    dtype: Stored,
    shape: Vec<usize>,
    file: FileId,
    offset: u64,
    bytes: u64,
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
