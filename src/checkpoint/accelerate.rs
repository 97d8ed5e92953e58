//! accelerate's offload folder (`accelerate/utils/offload.py`): a raw little-endian `NAME.dat` a tensor, and `index.json`
//! with `{dtype, shape}` for each. bf16 bits are written as int16 but labelled `bfloat16`; a 0-d tensor is one element. An
//! entry may instead name a tensor of a safetensors file, `{safetensors_file, weight_name, dtype}`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use twox_hash::XxHash3_64;

use super::files::{self, Folder, MAX_INDEX_BYTES, base_name, clip};
use super::header::{self, MAX_DIMS, MAX_NAME_BYTES, Stored, Tensor};
use super::json::{Parsed, Reader};
use super::{FileIdentity, Listing, Place, safetensors};
use crate::error::{Code, Error, Result};
use crate::units::{Dtype, FileId};

pub(super) const INDEX: &str = "index.json";
const MAX_SAFETENSORS_FILES: usize = 1024;

/// One entry of `index.json`.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Entry {
    name: String,
    dtype: Option<String>,
    shape: Option<Vec<u64>>,
    safetensors_file: Option<String>,
    weight_name: Option<String>,
}

pub(super) fn list(folder: &Folder, listing: &mut Listing) -> Result<()> {
    let index_path = folder.need(INDEX, "the folder's listing")?;
    let bytes = files::read_small(&index_path, MAX_INDEX_BYTES)?;
    let entries = parse_index(&bytes).map_err(|flaw| {
        Error::new(
            Code::Checkpoint,
            format!("{} is not a sound accelerate index", index_path.display()),
            format!("{} (byte {})", flaw.why, flaw.at),
            "offload the model again",
        )
    })?;
    drop(bytes);
    let mut opened = Opened::default();
    for entry in entries {
        match &entry.safetensors_file {
            Some(path) => opened.add(folder, &entry, path, listing)?,
            None => add_dat(folder, entry, listing)?,
        }
    }
    Ok(())
}

pub(super) fn parse_index(bytes: &[u8]) -> Parsed<Vec<Entry>> {
    let mut reader = Reader::new(bytes)?;
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    reader.object(MAX_NAME_BYTES, |r, name| {
        if !header::sane_name(&name) {
            return r.flaw("a tensor name that is empty or has slashes, blanks or odd characters");
        }
        if entries.len() == super::MAX_TENSORS {
            return r.flaw(format!("more than {} tensors", super::MAX_TENSORS));
        }
        if !names.insert(XxHash3_64::oneshot(name.as_bytes())) {
            return r.flaw(format!("tensor `{name}` appears twice"));
        }
        entries.push(parse_entry(r, name.into_owned())?);
        Ok(())
    })?;
    reader.end()?;
    Ok(entries)
}

fn parse_entry(r: &mut Reader, name: String) -> Parsed<Entry> {
    let mut entry = Entry {
        name,
        ..Entry::default()
    };
    r.object(64, |r, key| {
        let text = |r: &mut Reader, max: usize| r.string(max).map(|s| s.into_owned());
        let again = match key.as_ref() {
            "dtype" => entry.dtype.replace(text(r, 32)?).is_some(),
            "shape" => entry.shape.replace(r.numbers(MAX_DIMS)?).is_some(),
            "safetensors_file" => entry.safetensors_file.replace(text(r, 4096)?).is_some(),
            "weight_name" => entry
                .weight_name
                .replace(text(r, MAX_NAME_BYTES)?)
                .is_some(),
            _ => return r.skip(),
        };
        match again {
            true => r.flaw(format!("tensor `{}` has a key twice", entry.name)),
            false => Ok(()),
        }
    })?;
    Ok(entry)
}

fn broken(entry: &Entry, why: impl Into<String>) -> Error {
    Error::new(
        Code::Checkpoint,
        format!("accelerate's tensor `{}` is not sound", entry.name),
        why,
        "offload the model again",
    )
}

fn add_dat(folder: &Folder, entry: Entry, listing: &mut Listing) -> Result<()> {
    let (Some(dtype), Some(shape)) = (&entry.dtype, &entry.shape) else {
        return Err(broken(&entry, "index.json gives it no dtype and shape"));
    };
    let name = format!("{}.dat", entry.name);
    let path = folder.need(&name, INDEX)?;
    let (_, metadata) = files::open_regular(&path)?;
    let bytes = metadata.len();
    let stored = match Dtype::parse(dtype) {
        Some(dtype) => Stored::Ours(dtype),
        None => Stored::Other(clip(dtype)),
    };
    if let Stored::Ours(dtype) = stored {
        let wanted = shape
            .iter()
            .try_fold(dtype.bytes() as u64, |product, &dim| {
                product.checked_mul(dim)
            });
        if wanted != Some(bytes) {
            let why = format!(
                "{name} has {bytes} bytes, which {dtype} of shape {shape:?} does not take: truncated or foreign"
            );
            return Err(broken(&entry, why));
        }
    }
    let dims: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let Some(dims) = dims else {
        return Err(broken(&entry, "its shape is absurd"));
    };
    let identity = FileIdentity {
        name,
        bytes,
        header_hash: XxHash3_64::oneshot(format!("{} {dtype} {shape:?}", entry.name).as_bytes()),
        mtime_ns: files::mtime_ns(&metadata),
    };
    let file = listing.add_file(&path, identity);
    let place = Place {
        dtype: stored,
        shape: dims,
        file,
        offset: 0,
        bytes,
    };
    listing.add_tensor(entry.name, place)
}

/// Safetensors files that entries name, each opened once.
#[derive(Default)]
struct Opened {
    files: BTreeMap<PathBuf, OpenedFile>,
    tensors: usize,
}

struct OpenedFile {
    file: FileId,
    data_offset: u64,
    tensors: HashMap<String, Tensor>,
}

impl Opened {
    fn add(
        &mut self,
        folder: &Folder,
        entry: &Entry,
        named: &str,
        listing: &mut Listing,
    ) -> Result<()> {
        // Relative paths mean this folder: what they mean to accelerate depends on where it happens to run.
        let path = folder.confine(&folder.dir.join(named))?;
        if !self.files.contains_key(&path) {
            let opened = self.open(folder, entry, &path, listing)?;
            self.files.insert(path.clone(), opened);
        }
        let weight = entry.weight_name.as_ref().unwrap_or(&entry.name);
        let found = self
            .files
            .get(&path)
            .and_then(|f| Some((f, f.tensors.get(weight)?)));
        let Some((opened, tensor)) = found else {
            let why = format!("{} has no tensor `{}`", path.display(), clip(weight));
            return Err(broken(entry, why));
        };
        if let (Some(label), Stored::Ours(stored)) = (&entry.dtype, &tensor.dtype)
            && Dtype::parse(label) != Some(*stored)
        {
            return Err(Error::new(
                Code::Unsupported,
                format!(
                    "accelerate's tensor `{}` would be cast while it is read",
                    entry.name
                ),
                format!(
                    "index.json says {}, {} holds {stored}",
                    clip(label),
                    path.display()
                ),
                "pack the original checkpoint with --dtype instead",
            ));
        }
        let place = Place {
            dtype: tensor.dtype.clone(),
            shape: tensor.shape.clone(),
            file: opened.file,
            offset: opened.data_offset + tensor.begin,
            bytes: tensor.end - tensor.begin,
        };
        listing.add_tensor(entry.name.clone(), place)
    }

    fn open(
        &mut self,
        folder: &Folder,
        entry: &Entry,
        path: &Path,
        listing: &mut Listing,
    ) -> Result<OpenedFile> {
        let name = match path.parent() == Some(folder.dir.as_path()) {
            true => base_name(path),
            false => path.to_string_lossy().into_owned(),
        };
        let (header, identity) = safetensors::open(path, name)?;
        self.tensors += header.tensors.len();
        if self.files.len() == MAX_SAFETENSORS_FILES || self.tensors > super::MAX_TENSORS {
            return Err(broken(
                entry,
                format!(
                    "index.json names more than {MAX_SAFETENSORS_FILES} files or {} tensors in them",
                    super::MAX_TENSORS
                ),
            ));
        }
        let file = listing.add_file(path, identity);
        let by_name = |t: Tensor| (t.name.clone(), t);
        Ok(OpenedFile {
            file,
            data_offset: header.data_offset,
            tensors: header.tensors.into_iter().map(by_name).collect(),
        })
    }
}
