//! What `offload_folder` holds: packed models, found or made, locked while in use, verified, listed and removed.
//!
//! A packed folder and a checkpoint read in place come out as the same [`Store`]: units, their extents and the tensors
//! inside them, and checksums for every 64 KiB block. Whoever reads units need not know which of the two it is.

mod cast;
mod checksums;
mod clean;
mod direct;
mod dtype;
mod durable;
mod inspect;
mod layout;
mod lock;
mod manifest;
mod outline;
mod pack;
mod plan;
mod prepare;
pub(crate) mod record;
mod space;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use checksums::Checksums;
pub use clean::{CleanOptions, Cleaned, clean, clean_command};
pub use dtype::{DtypeLabel, DtypePolicy};
pub use inspect::{ModelInfo, PackInfo, PackState, UnitInfo, describe, list_packs};
pub use layout::{Extent, MERGE_GAP_BYTES, Place, UnitLayout};
pub use lock::Holder;
pub use manifest::FORMAT_VERSION;
pub use outline::{Outline, free_for_pack, outline};
pub use pack::{FailPoint, PackProgress, PackReport, Step, TensorWarning};
pub use prepare::{InPlace, PackOptions, Prepared};
pub use space::free_bytes;
pub use verify::{Problem, ProblemKind, VerifyReport, verify};

use crate::checkpoint::{Checkpoint, SourceFile, SourceKind};
use crate::error::{Code, Error, Result};
use crate::spec::{ModelSpec, UnitKind, parse_config};
use crate::units::{Dtype, FileId, UnitId};
use lock::{Lock, LockMode};
use manifest::{Manifest, Opened};

/// What the fuzzers call (src/fuzzing.rs).
#[cfg(any(test, feature = "testing"))]
pub(crate) mod fuzz {
    use super::*;

    /// A manifest with this text behind a hash that fits, held against the config in `dir`. True where it was accepted.
    pub(crate) fn manifest(dir: &Path, body: &[u8]) -> bool {
        let Ok(body) = std::str::from_utf8(body) else {
            return false;
        };
        let hash = checksums::hash_bytes(body.as_bytes());
        let text = format!("{{\n  \"xxh3\": \"{hash:016x}\",\n{body}");
        let opened = Manifest::from_text(dir, &text).and_then(|m| manifest::validate(dir, &m));
        opened.is_ok()
    }

    /// Units laid out as a pack has them, and the bytes of its files.
    pub(crate) fn layouts(units: &[crate::spec::UnitSpec]) -> Result<(Vec<UnitLayout>, Vec<u64>)> {
        let (files, layouts) = layout::plan_packed(units, &|_| Dtype::BF16)?;
        Ok((layouts, files.iter().map(|f| f.bytes).collect()))
    }
}

/// A model's weights where they lie, ready to be read unit by unit.
#[derive(Debug)]
pub struct Store {
    /// The packed folder, or the checkpoint's.
    pub dir: PathBuf,
    /// Name of the model: folder or hub name, `/` as `--`.
    pub label: String,
    pub spec: ModelSpec,
    pub dtype: DtypeLabel,
    /// By [`FileId`].
    pub files: Vec<SourceFile>,
    /// By `UnitId`.
    pub units: Vec<UnitLayout>,
    /// Where `config.json`, tokenizer and chat template lie.
    pub text_dir: PathBuf,
    pub checksums: Arc<Checksums>,
    pub in_place: bool,
    /// Keeps a packed folder from being replaced or cleaned while it is read. None in place.
    _lock: Option<Lock>,
}

impl Store {
    /// Opens a packed folder for reading. Every file is there in full and the manifest is whole; the weights themselves
    /// are verified as they are read.
    ///
    /// # Errors
    /// `Store`: unfinished, damaged, foreign or of another version. `Locked`: being packed just now.
    pub fn open_packed(dir: &Path) -> Result<Store> {
        let Some(lock) = lock::try_lock(dir, LockMode::Shared)? else {
            return Err(Error::new(
                Code::Locked,
                format!("{} is being packed", dir.display()),
                format!("{} holds its lock", lock::holder(dir)),
                "wait until it has finished",
            ));
        };
        let manifest = Manifest::load(dir)?.ok_or_else(|| unpacked(dir))?;
        let opened = manifest::validate(dir, &manifest)?;
        check_files_on_disk(dir, &manifest)?;
        check_copies(dir, &manifest)?;
        Store::from_manifest(dir, &manifest, opened, lock)
    }

    /// Streams from the checkpoint's own files: no second copy, no cast.
    ///
    /// # Errors
    /// What `Checkpoint::check` says about missing tensors and wrong shapes.
    pub fn open_in_place(ckpt: &Checkpoint) -> Result<Store> {
        if ckpt.kind == SourceKind::Packed {
            return Store::open_packed(&ckpt.dir);
        }
        let spec = parse_config(&ckpt.config)?;
        let dtype_of = |name: &str| ckpt.tensors.get(name).map_or(Dtype::F32, |t| t.dtype);
        let units = spec.units(&dtype_of);
        ckpt.check(&units)?;
        let layouts = layout::plan_in_place(&units, &|name| plan::find(ckpt, name))?;
        let dtypes = layouts.iter().flat_map(|u| &u.places).map(|p| p.dtype);
        let file_bytes: Vec<u64> = ckpt.files.iter().map(|f| f.bytes).collect();
        Ok(Store {
            dir: ckpt.dir.clone(),
            label: ckpt.label.clone(),
            spec,
            dtype: DtypeLabel::of(dtypes)
                .ok_or_else(|| Error::internal("a model without tensors"))?,
            files: ckpt.files.clone(),
            units: layouts,
            text_dir: ckpt.config_dir.clone(),
            checksums: Arc::new(Checksums::unseen(ckpt.identity.hash(), &file_bytes)?),
            in_place: true,
            _lock: None,
        })
    }

    /// Finds the pack of this checkpoint under the options' offload folder, or makes it, or opens the source in place.
    pub fn prepare(
        ckpt: &Checkpoint,
        options: &PackOptions,
        progress: &mut dyn FnMut(PackProgress),
    ) -> Result<Prepared> {
        prepare::prepare(ckpt, options, progress)
    }

    /// [`Store::prepare`], never in place.
    pub fn pack(
        ckpt: &Checkpoint,
        options: &PackOptions,
        progress: &mut dyn FnMut(PackProgress),
    ) -> Result<Prepared> {
        let options = PackOptions {
            in_place: InPlace::Never,
            ..options.clone()
        };
        prepare::prepare(ckpt, &options, progress)
    }

    /// The same model without its layers from `layers` on: what short measurements run. It computes nothing meaningful.
    pub fn first_layers(mut self, layers: usize) -> Store {
        self.spec.layers = self.spec.layers.min(layers);
        let kept = self.spec.layers as u32;
        self.units
            .retain(|u| !matches!(u.kind, UnitKind::Layer(i) if i >= kept));
        for (i, unit) in self.units.iter_mut().enumerate() {
            unit.id = UnitId(i as u32);
        }
        self
    }

    pub fn file(&self, id: FileId) -> &SourceFile {
        &self.files[id.index()]
    }

    fn from_manifest(dir: &Path, manifest: &Manifest, opened: Opened, lock: Lock) -> Result<Store> {
        let checksums = load_checksums(dir, manifest)?;
        let files = manifest.files.iter().map(|f| SourceFile {
            path: dir.join(&f.name),
            bytes: f.bytes,
        });
        touch_last_used(dir);
        Ok(Store {
            dir: dir.to_path_buf(),
            label: manifest.model.clone(),
            spec: opened.spec,
            dtype: opened.dtype,
            files: files.collect(),
            units: opened.units,
            text_dir: dir.to_path_buf(),
            checksums: Arc::new(checksums),
            in_place: false,
            _lock: Some(lock),
        })
    }
}

/// What a folder without a manifest is instead of a pack.
fn unpacked(dir: &Path) -> Error {
    if clean::is_begun(dir) {
        return manifest::invalid(dir, "it has no manifest.json: packing did not finish");
    }
    let not_a_pack = |cause: String, fix: String| {
        Error::new(
            Code::Usage,
            format!("{} is not a packed folder", dir.display()),
            cause,
            fix,
        )
    };
    let packs = list_packs(dir).unwrap_or_default();
    let ours = packs.iter().find(|p| p.state != PackState::Foreign);
    match ours {
        Some(pack) => not_a_pack(
            format!("it is a folder in which packs lie, such as {}", pack.name),
            format!("name one: {}", pack.dir.display()),
        ),
        None if dir.join("config.json").exists() => not_a_pack(
            "it has a config.json and no manifest.json: a model as it was downloaded, which has no checksums to compare with"
                .into(),
            format!(
                "`tensorpager pack {}` makes a pack of it, and `tensorpager verify` without a name checks every pack",
                dir.display()
            ),
        ),
        None => not_a_pack(
            "it has no manifest.json".into(),
            "`tensorpager inspect` lists the packs".into(),
        ),
    }
}

fn load_checksums(dir: &Path, manifest: &Manifest) -> Result<Checksums> {
    let record = &manifest.checksums;
    let raw = manifest::read_small(dir, &record.name, record.bytes)?
        .filter(|raw| record.fits(raw))
        .ok_or_else(|| manifest::invalid(dir, "checksums.bin is missing or damaged"))?;
    Checksums::from_bytes(manifest.source.identity, &manifest.file_bytes(), &raw)?
        .ok_or_else(|| manifest::invalid(dir, "checksums.bin does not fit the files"))
}

/// Every weight file is a regular file of the recorded length.
fn check_files_on_disk(dir: &Path, manifest: &Manifest) -> Result<()> {
    for file in &manifest.files {
        let cause = match fs::symlink_metadata(dir.join(&file.name)) {
            Ok(meta) if meta.is_file() && meta.len() == file.bytes => continue,
            Ok(meta) if meta.is_file() => {
                format!(
                    "{} has {} bytes instead of {}",
                    file.name,
                    meta.len(),
                    file.bytes
                )
            }
            Ok(_) => format!("{} is no regular file", file.name),
            Err(e) => format!("{}: {e}", file.name),
        };
        return Err(manifest::invalid(dir, cause));
    }
    Ok(())
}

/// Tokenizer and configs are as they were packed: a changed one would change the tokens.
fn check_copies(dir: &Path, manifest: &Manifest) -> Result<()> {
    for copy in &manifest.copies {
        let raw = manifest::read_small(dir, &copy.name, copy.bytes)?;
        if !raw.is_some_and(|raw| copy.fits(&raw)) {
            return Err(manifest::invalid(
                dir,
                format!("{} is missing or was changed since", copy.name),
            ));
        }
    }
    Ok(())
}

/// Remembers when the pack was last opened, for `--offload-limit`. A folder that is not ours to write is simply not
/// remembered.
fn touch_last_used(dir: &Path) {
    record::touch(&dir.join(LAST_USED));
}

pub(crate) const LAST_USED: &str = "last_used";
