//! Everything about a pack that is decided before the first byte: names, types, layout, manifest.

use std::fs;
use std::path::{Path, PathBuf};

use super::Store;
use super::checksums::hash_bytes;
use super::dtype::{DtypeLabel, DtypePolicy};
use super::layout::{PackedFile, UnitLayout, plan_packed};
use super::manifest::{
    COPIES, CopyRecord, ExtentRecord, FORMAT, FORMAT_VERSION, FileRecord, MAX_COPY_BYTES, Manifest,
    SourceFileRecord, SourceRecord, TensorRecord, UnitRecord, block_shape, kind_name,
};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::error::{Code, Error, Result};
use crate::spec::{ModelSpec, UnitSpec, parse_config};
use crate::units::{ALIGN_BYTES, BLOCK_BYTES, Dtype};

/// A tensor of the source by canonical name.
pub(crate) fn find<'c>(ckpt: &'c Checkpoint, name: &str) -> Result<&'c TensorEntry> {
    ckpt.tensors
        .get(name)
        .ok_or_else(|| Error::internal(format!("{name} was checked and is not there")))
}

/// Everything about a pack that is decided before the first byte.
pub(crate) struct Plan<'c> {
    pub ckpt: &'c Checkpoint,
    /// Safe as a folder name.
    pub label: String,
    pub spec: ModelSpec,
    pub dtype: DtypeLabel,
    pub files: Vec<PackedFile>,
    /// Hash of the source: the seed of all checksums.
    pub identity: u64,
    /// Configs and tokenizer: name and contents.
    pub copies: Vec<(String, Vec<u8>)>,
    units: Vec<UnitSpec>,
    layouts: Vec<UnitLayout>,
    /// Hash of source and types together: tells packs of one name apart.
    variant: u64,
}

impl<'c> Plan<'c> {
    pub fn new(ckpt: &'c Checkpoint, policy: &DtypePolicy) -> Result<Plan<'c>> {
        let spec = parse_config(&ckpt.config)?;
        let names = ckpt
            .tensors
            .values()
            .map(|t| (t.name.as_str(), t.source_name.as_str()));
        policy.check_used(names)?;
        let dtype_of = |name: &str| {
            ckpt.tensors.get(name).map_or(Dtype::F32, |t| {
                policy.resolve(name, &t.source_name, t.dtype)
            })
        };
        let units = spec.units(&dtype_of);
        ckpt.check(&units)?;
        let (files, layouts) = plan_packed(&units, &dtype_of)?;
        let places = || layouts.iter().flat_map(|u| &u.places);
        let dtype = DtypeLabel::of(places().map(|p| p.dtype))
            .ok_or_else(|| Error::internal("a model without tensors"))?;
        let identity = ckpt.identity.hash();
        let variant = match dtype {
            DtypeLabel::Uniform(_) => identity,
            DtypeLabel::Mixed => {
                let list: String = places()
                    .map(|p| format!("{}={};", p.name, p.dtype))
                    .collect();
                identity ^ hash_bytes(list.as_bytes())
            }
        };
        let copies = read_copies(&ckpt.config_dir)?;
        Ok(Plan {
            ckpt,
            label: safe_label(&ckpt.label),
            spec,
            dtype,
            files,
            identity,
            copies,
            units,
            layouts,
            variant,
        })
    }

    pub fn source(&self, name: &str) -> Result<&'c TensorEntry> {
        find(self.ckpt, name)
    }

    /// Bytes of everything a pack writes, but for the manifest.
    pub fn bytes(&self) -> u64 {
        let weights = self
            .files
            .iter()
            .map(|f| f.bytes + f.bytes.div_ceil(BLOCK_BYTES) * 8);
        let copies = self.copies.iter().map(|(_, raw)| raw.len() as u64);
        weights.chain(copies).fold(0, u64::saturating_add)
    }

    /// The folder's usual name, and the one to take where that is another source's.
    pub fn folder_names(&self) -> [String; 2] {
        let base = format!("{}--{}", self.label, self.dtype.short());
        let second = format!("{base}-{:08x}", self.variant >> 32);
        [base, second]
    }

    /// Where its pack may lie.
    pub fn folders(&self, offload_folder: &Path) -> [PathBuf; 2] {
        self.folder_names().map(|name| offload_folder.join(name))
    }

    pub fn layouts(&self) -> &[UnitLayout] {
        &self.layouts
    }

    /// Whether `store` is the pack of this source with these types.
    pub fn made(&self, store: &Store) -> bool {
        store.checksums.made_of(self.identity) && self.has_dtypes_of(&store.units)
    }

    pub fn first_cast(&self) -> Option<(&str, Dtype, Dtype)> {
        let mut pieces = self.files.iter().flat_map(|f| &f.pieces);
        pieces.find_map(|p| {
            let source = self.ckpt.tensors.get(&p.name)?;
            (source.dtype != p.dtype).then_some((p.name.as_str(), source.dtype, p.dtype))
        })
    }

    pub fn casts(&self) -> bool {
        self.first_cast().is_some()
    }

    pub fn manifest(&self, checksums: CopyRecord) -> Result<Manifest> {
        let files = self.files.iter().map(|f| FileRecord {
            name: f.name.clone(),
            bytes: f.bytes,
        });
        let units = self
            .units
            .iter()
            .zip(&self.layouts)
            .map(|(spec, layout)| unit_record(spec, layout));
        Ok(Manifest {
            format: FORMAT.to_string(),
            version: FORMAT_VERSION,
            model: self.ckpt.label.clone(),
            model_type: self.spec.model_type.clone(),
            dtype: self.dtype.name().to_string(),
            align_bytes: ALIGN_BYTES,
            block_bytes: BLOCK_BYTES,
            spec: self.ckpt.config.clone(),
            source: self.source_record(),
            copies: self
                .copies
                .iter()
                .map(|(name, raw)| CopyRecord::of(name, raw))
                .collect(),
            files: files.collect(),
            checksums,
            units: units.collect(),
        })
    }

    fn source_record(&self) -> SourceRecord {
        let identity = &self.ckpt.identity;
        let files = identity.files.iter().map(|f| SourceFileRecord {
            name: f.name.clone(),
            bytes: f.bytes,
            header_xxh3: f.header_hash,
            mtime_ns: f.mtime_ns,
        });
        SourceRecord {
            path: absolute(&self.ckpt.dir),
            revision: identity.revision.clone(),
            config_xxh3: identity.config_hash,
            identity: self.identity,
            files: files.collect(),
        }
    }

    pub fn has_dtypes_of(&self, units: &[UnitLayout]) -> bool {
        let mine = self
            .layouts
            .iter()
            .flat_map(|u| &u.places)
            .map(|p| (&p.name, p.dtype));
        mine.eq(units
            .iter()
            .flat_map(|u| &u.places)
            .map(|p| (&p.name, p.dtype)))
    }
}

fn unit_record(spec: &UnitSpec, layout: &UnitLayout) -> UnitRecord {
    let extents = layout.extents.iter().map(|e| ExtentRecord {
        file: e.file.0,
        offset: e.offset,
        stored_bytes: e.bytes,
        bytes: e.bytes,
        encoding: "raw".to_string(),
    });
    // A packed unit has one extent: offsets in it are offsets in the unit.
    let tensors = spec
        .tensors
        .iter()
        .zip(&layout.places)
        .map(|(t, place)| TensorRecord {
            name: t.name.clone(),
            dtype: place.dtype,
            shape: block_shape(t),
            parts: 1,
            offset: place.offset,
            first_row: t.rows.start,
        });
    UnitRecord {
        id: spec.id.0,
        kind: kind_name(spec.kind).to_string(),
        bytes: layout.bytes,
        extents: extents.collect(),
        tensors: tensors.collect(),
    }
}

fn read_copies(dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut copies = Vec::new();
    for name in COPIES {
        let path = dir.join(name);
        // Hub snapshots are symbolic links: followed, but only to regular files.
        let Ok(meta) = fs::metadata(&path) else {
            continue;
        };
        if !meta.is_file() || meta.len() > MAX_COPY_BYTES {
            return Err(Error::new(
                Code::Checkpoint,
                format!("{} cannot be copied", path.display()),
                format!("it is no regular file of at most {MAX_COPY_BYTES} bytes"),
                "fetch the checkpoint again",
            ));
        }
        let raw = fs::read(&path)
            .map_err(|e| Error::io(format!("cannot read {}", path.display()), &e))?;
        copies.push((name.to_string(), raw));
    }
    Ok(copies)
}

/// A label as a folder name: no separators, no leading dot, at most 160 bytes.
fn safe_label(label: &str) -> String {
    let clean = |c: char| {
        if c.is_alphanumeric() || "-_.+=@".contains(c) {
            c
        } else {
            '-'
        }
    };
    let mut name: String = label.replace('/', "--").chars().map(clean).collect();
    while name.len() > 160 {
        name.pop();
    }
    let name = name.trim_start_matches('.');
    if name.is_empty() {
        "model".to_string()
    } else {
        name.to_string()
    }
}

/// The folder's canonical path, as the manifest names it.
pub(crate) fn absolute(dir: &Path) -> String {
    let path = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_path_buf());
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_become_folder_names() {
        assert_eq!(safe_label("Qwen/Qwen2.5-7B"), "Qwen--Qwen2.5-7B");
        assert_eq!(safe_label("../../etc"), "--..--etc");
        assert_eq!(safe_label("..."), "model");
        assert_eq!(safe_label("a b\0c"), "a-b-c");
        assert!(safe_label(&"é".repeat(500)).len() <= 160);
    }
}
