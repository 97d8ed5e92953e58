//! What a model would be made of once it is packed, or as it lies: sizes and places, without reading or writing a weight.

use std::path::PathBuf;

use super::dtype::{DtypeLabel, DtypePolicy};
use super::layout::UnitLayout;
use super::plan::Plan;
use super::{Store, space};
use crate::checkpoint::{Checkpoint, SourceKind};
use crate::error::Result;
use crate::spec::ModelSpec;
use crate::units::BLOCK_BYTES;

/// A model's units and files before anything is opened for reading.
#[derive(Debug)]
pub struct Outline {
    pub label: String,
    pub spec: ModelSpec,
    pub dtype: DtypeLabel,
    /// By `UnitId`.
    pub units: Vec<UnitLayout>,
    /// Length of each file the units' extents name, by `FileId`.
    pub file_bytes: Vec<u64>,
    /// Files that exist now and lie where the weights are read from (or will be packed from).
    pub files: Vec<PathBuf>,
    /// The folder they lie in.
    pub dir: PathBuf,
    pub text_dir: PathBuf,
    /// Bytes that packing would write; 0 in place or when the pack is there.
    pub pack_bytes: u64,
    /// Of the configs and the tokenizer among them, which opening a pack reads to compare.
    pub copy_bytes: u64,
    /// The pack itself, or the source read in place, as opposed to one still to be made.
    pub ready: bool,
    pub in_place: bool,
}

/// Describes the pack of `ckpt` under `offload_folder` (whether it is there or not), or the source read in place.
///
/// # Errors
/// What opening would say: missing tensors, wrong shapes, a cast in place.
pub fn outline(
    ckpt: &Checkpoint,
    dtype: &DtypePolicy,
    offload_folder: &std::path::Path,
    in_place: bool,
) -> Result<Outline> {
    if in_place || ckpt.kind == SourceKind::Packed {
        return Ok(of_store(Store::open_in_place(ckpt)?));
    }
    let plan = Plan::new(ckpt, dtype)?;
    for dir in plan.folders(offload_folder) {
        // Another process may be packing or removing it: then it is planned as if it were not there.
        if let Ok(store) = Store::open_packed(&dir)
            && plan.made(&store)
        {
            return Ok(of_store(store));
        }
    }
    Ok(Outline {
        label: ckpt.label.clone(),
        pack_bytes: plan.bytes(),
        copy_bytes: plan.copies.iter().map(|(_, raw)| raw.len() as u64).sum(),
        file_bytes: plan.files.iter().map(|f| f.bytes).collect(),
        files: ckpt.files.iter().map(|f| f.path.clone()).collect(),
        dir: ckpt.dir.clone(),
        text_dir: ckpt.config_dir.clone(),
        ready: false,
        in_place: false,
        dtype: plan.dtype,
        units: plan.layouts().to_vec(),
        spec: plan.spec,
    })
}

fn of_store(store: Store) -> Outline {
    Outline {
        label: store.label.clone(),
        spec: store.spec.clone(),
        dtype: store.dtype,
        units: store.units.clone(),
        file_bytes: store.files.iter().map(|f| f.bytes).collect(),
        files: store.files.iter().map(|f| f.path.clone()).collect(),
        dir: store.dir.clone(),
        text_dir: store.text_dir.clone(),
        pack_bytes: 0,
        copy_bytes: 0,
        ready: true,
        in_place: store.in_place,
    }
}

impl Outline {
    /// Memory that its checksums take once it is opened for reading, where they are not held yet, and opening it leaves behind.
    pub fn opening_bytes(&self) -> u64 {
        if self.ready && !self.in_place {
            return 0;
        }
        let blocks = self.file_bytes.iter().map(|b| b.div_ceil(BLOCK_BYTES));
        // The copies are read once to be written and once to be compared.
        blocks.sum::<u64>() * 8 + 2 * self.copy_bytes
    }
}

/// Bytes free where a pack would be written: in `folder`, or the nearest parent that is there.
pub fn free_for_pack(folder: &std::path::Path) -> Option<u64> {
    let folder = std::path::absolute(folder).ok()?;
    folder
        .ancestors()
        .find(|d| d.exists())
        .and_then(|d| space::free_bytes(d).ok())
}
