//! What lies in an offload folder, and what a model consists of.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

use super::layout::UnitLayout;
use super::lock::{self, Holder, LockMode};
use super::manifest::{FORMAT_VERSION, Manifest, SourceRecord, claims};
use super::{LAST_USED, Store, check_copies, check_files_on_disk, clean, manifest, scratch};
use crate::checkpoint::{Checkpoint, SourceKind};
use crate::error::{Error, Result};
use crate::units::Dtype;

/// What a folder in the offload folder is worth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PackState {
    Ready,
    /// Good, but the checkpoint it was made of is no longer there: perhaps the only copy.
    SourceGone,
    /// The checkpoint it was made of has changed since.
    SourceChanged,
    /// Somebody has it alone: it is being packed or removed.
    Packing,
    /// Packing did not finish.
    Unfinished,
    /// Written by another version.
    OtherFormat,
    /// Says it is finished and is not whole.
    Damaged(String),
    /// Left behind by a demo that was killed.
    Abandoned,
    /// Not made by this engine.
    Foreign,
}

impl PackState {
    /// What `clean --stale` removes.
    pub fn is_stale(&self) -> bool {
        !matches!(
            self,
            PackState::Ready | PackState::Packing | PackState::Foreign
        )
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct PackInfo {
    pub name: String,
    pub dir: PathBuf,
    pub state: PackState,
    /// On the disk now.
    pub bytes: u64,
    pub model: Option<String>,
    pub model_type: Option<String>,
    pub dtype: Option<String>,
    pub units: Option<usize>,
    /// Folder of the checkpoint it was made of.
    pub source: Option<String>,
    pub revision: Option<String>,
    #[serde(serialize_with = "unix_seconds")]
    pub last_used: Option<SystemTime>,
    /// Who packs it, while somebody does.
    pub holder: Option<Holder>,
}

fn unix_seconds<S: serde::Serializer>(
    time: &Option<SystemTime>,
    s: S,
) -> std::result::Result<S::Ok, S::Error> {
    let since = time.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map(|d| d.as_secs()).serialize(s)
}

/// Every folder in the offload folder, by name. An offload folder that is not there has none.
pub fn list_packs(offload_folder: &Path) -> Result<Vec<PackInfo>> {
    let failed =
        |e: &std::io::Error| Error::io(format!("cannot list {}", offload_folder.display()), e);
    let entries = match fs::read_dir(offload_folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(&e)),
    };
    let mut packs = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| failed(&e))?;
        let dir = entry.path();
        if dir.is_dir() {
            packs.push(inspect_pack(
                &dir,
                entry.file_name().to_string_lossy().into_owned(),
            ));
        }
    }
    packs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(packs)
}

fn inspect_pack(dir: &Path, name: String) -> PackInfo {
    let (state, manifest) = pack_state(dir);
    let used = [LAST_USED, manifest::MANIFEST, "lock"];
    let last_used = used
        .iter()
        .find_map(|f| fs::metadata(dir.join(f)).ok()?.modified().ok());
    PackInfo {
        name,
        bytes: match scratch::is_marked(dir) {
            true => scratch::bytes(dir),
            false => clean::recognised_bytes(dir),
        },
        holder: (state == PackState::Packing).then(|| lock::holder(dir)),
        state,
        model: manifest.as_ref().map(|m| m.model.clone()),
        model_type: manifest.as_ref().map(|m| m.model_type.clone()),
        dtype: manifest.as_ref().map(|m| m.dtype.clone()),
        units: manifest.as_ref().map(|m| m.units.len()),
        source: manifest.as_ref().map(|m| m.source.path.clone()),
        revision: manifest.as_ref().and_then(|m| m.source.revision.clone()),
        last_used,
        dir: dir.to_path_buf(),
    }
}

fn pack_state(dir: &Path) -> (PackState, Option<Manifest>) {
    let lock = lock::try_lock(dir, LockMode::Shared);
    if matches!(lock, Ok(None)) {
        return (PackState::Packing, None);
    }
    if scratch::is_marked(dir) {
        return (PackState::Abandoned, None);
    }
    let loaded = Manifest::load(dir);
    if !clean::is_begun(dir) && claims(dir).is_none() {
        return (PackState::Foreign, None);
    }
    let manifest = match loaded {
        Ok(Some(manifest)) => manifest,
        Ok(None) => return (PackState::Unfinished, None),
        Err(_) if claims(dir).is_some_and(|v| v != u64::from(FORMAT_VERSION)) => {
            return (PackState::OtherFormat, None);
        }
        Err(e) => return (PackState::Damaged(e.cause().to_string()), None),
    };
    let whole = manifest::validate(dir, &manifest)
        .and_then(|_| check_files_on_disk(dir, &manifest))
        .and_then(|()| check_copies(dir, &manifest))
        .and_then(|()| super::load_checksums(dir, &manifest).map(drop));
    let state = match whole {
        Ok(()) => source_state(&manifest.source),
        Err(e) => PackState::Damaged(e.cause().to_string()),
    };
    (state, Some(manifest))
}

/// Whether the checkpoint is still what it was: folder, names, lengths and times.
fn source_state(source: &SourceRecord) -> PackState {
    let dir = Path::new(&source.path);
    if !dir.is_dir() {
        return PackState::SourceGone;
    }
    let found: Vec<_> = source
        .files
        .iter()
        .map(|f| (f, fs::metadata(dir.join(&f.name)).ok()))
        .collect();
    if found.iter().all(|(_, meta)| meta.is_none()) {
        return PackState::SourceGone;
    }
    // As in `Identity::hash`: times count only where no commit vouches for the content.
    let timed = source.revision.is_none();
    let same = found.iter().all(|(f, meta)| {
        let time = |m: &fs::Metadata| {
            m.mtime()
                .saturating_mul(1_000_000_000)
                .saturating_add(m.mtime_nsec())
        };
        meta.as_ref()
            .is_some_and(|m| m.len() == f.bytes && (!timed || time(m) == f.mtime_ns))
    });
    if same {
        PackState::Ready
    } else {
        PackState::SourceChanged
    }
}

/// A unit as `inspect MODEL` lists it.
#[derive(Clone, Debug, Serialize)]
pub struct UnitInfo {
    pub id: u32,
    /// `layer 3`, `head block 0`, …
    pub unit: String,
    pub bytes: u64,
    pub tensors: usize,
    pub extents: usize,
    pub dtypes: Vec<Dtype>,
    /// As a dtype map names them.
    pub tensor_names: Vec<String>,
}

/// A model as `inspect MODEL` describes it.
#[derive(Clone, Debug, Serialize)]
pub struct ModelInfo {
    pub model: String,
    pub dir: PathBuf,
    /// `hugging face folder`, `accelerate offload folder` or `packed`.
    pub kind: &'static str,
    pub model_type: String,
    pub dtype: String,
    pub layers: usize,
    pub hidden: usize,
    pub vocab: usize,
    pub tied_head: bool,
    /// Weights, each counted once.
    pub parameters: u64,
    /// Bytes of these weights.
    pub bytes: u64,
    pub bytes_by_dtype: BTreeMap<&'static str, u64>,
    pub files: usize,
    pub units: Vec<UnitInfo>,
    pub notes: Vec<String>,
}

/// Describes a MODEL without reading its weights.
pub fn describe(ckpt: &Checkpoint) -> Result<ModelInfo> {
    let store = Store::open_in_place(ckpt)?;
    let kind = match ckpt.kind {
        SourceKind::HfFolder => "hugging face folder",
        SourceKind::Accelerate => "accelerate offload folder",
        SourceKind::Packed => "packed",
    };
    let mut info = ModelInfo {
        model: store.label.clone(),
        dir: store.dir.clone(),
        kind,
        model_type: store.spec.model_type.clone(),
        dtype: store.dtype.name().to_string(),
        layers: store.spec.layers,
        hidden: store.spec.hidden,
        vocab: store.spec.vocab,
        tied_head: store.spec.tied_head,
        parameters: 0,
        bytes: 0,
        bytes_by_dtype: BTreeMap::new(),
        files: store.files.len(),
        units: store.units.iter().map(unit_info).collect(),
        notes: Vec::new(),
    };
    // A tied head's rows are the embedding's: counted once.
    let mut seen = HashSet::new();
    for unit in &store.units {
        for place in &unit.places {
            let extent = unit.extents[place.extent];
            if seen.insert((extent.file, extent.offset + place.offset))
                && !shares_embedding(&store, place)
            {
                let elements = place.rows as u64 * place.cols as u64;
                info.parameters += elements;
                info.bytes += place.bytes();
                *info.bytes_by_dtype.entry(place.dtype.name()).or_default() += place.bytes();
            }
        }
    }
    let wide = info
        .bytes_by_dtype
        .get(Dtype::F32.name())
        .copied()
        .unwrap_or(0);
    if store.dtype == super::DtypeLabel::Uniform(Dtype::F32) && !is_meant_wide(ckpt) {
        info.notes.push(format!(
            "the weights are stored as float32, {}: packing with --dtype bfloat16 or float16 halves what is read in each pass",
            crate::units::human_bytes(wide)
        ));
    }
    Ok(info)
}

/// The head's rows of a tied model.
fn shares_embedding(store: &Store, place: &super::Place) -> bool {
    store.spec.tied_head && place.role == crate::spec::Role::Head
}

/// A float32 checkpoint whose packing would change nothing: it is packed already.
fn is_meant_wide(ckpt: &Checkpoint) -> bool {
    ckpt.kind == SourceKind::Packed
}

fn unit_info(unit: &UnitLayout) -> UnitInfo {
    let mut dtypes: Vec<Dtype> = Vec::new();
    for place in &unit.places {
        if !dtypes.contains(&place.dtype) {
            dtypes.push(place.dtype);
        }
    }
    UnitInfo {
        id: unit.id.0,
        unit: unit.kind.to_string(),
        bytes: unit.bytes,
        tensors: unit.places.len(),
        extents: unit.extents.len(),
        dtypes,
        tensor_names: unit.places.iter().map(|p| p.name.clone()).collect(),
    }
}
