//! Find the pack of a checkpoint, or make it, or stream the checkpoint in place.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::checksums::hash_bytes;
use super::dtype::{DtypeLabel, DtypePolicy};
use super::layout::{PackedFile, UnitLayout, plan_packed};
use super::lock::{self, Holder, Lock, LockMode, LockWait};
use super::manifest::{
    COPIES, CopyRecord, ExtentRecord, FORMAT, FORMAT_VERSION, FileRecord, MAX_COPY_BYTES, Manifest,
    SourceFileRecord, SourceRecord, TensorRecord, UnitRecord, block_shape, kind_name, validate,
};
use super::pack::{FailPoint, PackContext, PackProgress, PackReport, pack_into};
use super::{Store, check_copies, check_files_on_disk, clean, durable};
use crate::checkpoint::{Checkpoint, SourceKind, TensorEntry};
use crate::error::{Code, Error, Result};
use crate::spec::{ModelSpec, UnitSpec, parse_config};
use crate::units::{ALIGN_BYTES, BLOCK_BYTES, Dtype};

/// Whether a pack is made at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InPlace {
    Never,
    /// Only where the disk has no room for a pack (and no cast is asked for).
    #[default]
    WhenShort,
    Always,
}

/// How to find or make a pack.
#[derive(Clone)]
pub struct PackOptions {
    pub offload_folder: PathBuf,
    pub dtype: DtypePolicy,
    pub in_place: InPlace,
    /// Values too large for the target type become infinite instead of refusing the pack.
    pub allow_overflow: bool,
    /// Refuses NaN and infinite weights instead of only counting them.
    pub refuse_nonfinite: bool,
    /// Most bytes that all packs together may take; the longest unused go first.
    pub offload_limit: Option<u64>,
    /// Packs anew even if a good pack is there.
    pub repack: bool,
    /// Longest wait for another packer or for readers of a stale pack; zero fails at once.
    pub wait: Duration,
    /// Memory of the copying workers together.
    pub buffer_bytes: u64,
    /// Set from outside (Ctrl-C) to stop and clean up.
    pub cancel: Arc<AtomicBool>,
    /// For tests: called before each step.
    pub fail_point: Option<FailPoint>,
}

impl PackOptions {
    pub fn new(offload_folder: impl Into<PathBuf>) -> PackOptions {
        PackOptions {
            offload_folder: offload_folder.into(),
            dtype: DtypePolicy::Auto,
            in_place: InPlace::default(),
            allow_overflow: false,
            refuse_nonfinite: false,
            offload_limit: None,
            repack: false,
            wait: Duration::from_secs(24 * 3600),
            buffer_bytes: 48 << 20,
            cancel: Arc::new(AtomicBool::new(false)),
            fail_point: None,
        }
    }
}

/// A store ready to be read, and how it came to be.
#[derive(Debug)]
pub struct Prepared {
    pub store: Store,
    /// Present when this call packed.
    pub packed: Option<PackReport>,
    /// For the user: why it streams in place, what was removed, what was counted.
    pub notes: Vec<String>,
}

pub(crate) fn prepare(
    ckpt: &Checkpoint,
    options: &PackOptions,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Prepared> {
    if ckpt.kind == SourceKind::Packed {
        return open_given_pack(ckpt, options, progress);
    }
    let plan = Plan::new(ckpt, &options.dtype)?;
    if options.in_place == InPlace::Always {
        return in_place(&plan, Vec::new());
    }
    match find_or_pack(&plan, options, progress) {
        Err(e)
            if e.code() == Code::Space
                && options.in_place == InPlace::WhenShort
                && !plan.casts() =>
        {
            let note = format!("streaming from the checkpoint's own files: {}", e.cause());
            in_place(&plan, vec![note])
        }
        other => other,
    }
}

fn in_place(plan: &Plan<'_>, notes: Vec<String>) -> Result<Prepared> {
    if let Some((name, from, to)) = plan.first_cast() {
        return Err(Error::new(
            Code::Usage,
            format!("{} cannot be cast in place", plan.label),
            format!("{name} is {from} in the checkpoint and {to} was asked for"),
            "drop --in-place, so that a cast copy is packed, or use --dtype auto",
        ));
    }
    Ok(Prepared {
        store: Store::open_in_place(plan.ckpt)?,
        packed: None,
        notes,
    })
}

/// MODEL is itself a packed folder: it is used as it is.
fn open_given_pack(
    ckpt: &Checkpoint,
    options: &PackOptions,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Prepared> {
    let lock = lock_waiting(&ckpt.dir, LockMode::Shared, options, progress)?;
    let store = Store::open_packed(&ckpt.dir)?;
    drop(lock);
    if options.in_place == InPlace::Never && options.repack {
        return Err(already_packed(
            &store,
            "it cannot be packed again from itself",
        ));
    }
    for place in store.units.iter().flat_map(|u| &u.places) {
        let wanted = options.dtype.resolve(&place.name, &place.name, place.dtype);
        if wanted != place.dtype {
            let cause = format!("{} is {} in it, not {wanted}", place.name, place.dtype);
            return Err(already_packed(&store, &cause));
        }
    }
    Ok(Prepared {
        store,
        packed: None,
        notes: Vec::new(),
    })
}

fn already_packed(store: &Store, cause: &str) -> Error {
    Error::new(
        Code::Usage,
        format!("{} is a packed model already", store.dir.display()),
        cause,
        "name the checkpoint it was made of instead",
    )
}

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
    fn folder_names(&self) -> [String; 2] {
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

    fn first_cast(&self) -> Option<(&str, Dtype, Dtype)> {
        let mut pieces = self.files.iter().flat_map(|f| &f.pieces);
        pieces.find_map(|p| {
            let source = self.ckpt.tensors.get(&p.name)?;
            (source.dtype != p.dtype).then_some((p.name.as_str(), source.dtype, p.dtype))
        })
    }

    fn casts(&self) -> bool {
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

    fn has_dtypes_of(&self, units: &[UnitLayout]) -> bool {
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

fn absolute(dir: &Path) -> String {
    let path = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_path_buf());
    path.to_string_lossy().into_owned()
}

/// What a folder is to this plan.
enum Fit {
    /// Not there, empty, or begun and never finished: ours to fill.
    Free,
    /// A good pack of this source and these types.
    Ready(Box<Manifest>),
    /// The same, but the tokenizer or a config beside the weights differs: only these are copied again.
    OldCopies(Box<Manifest>),
    /// A pack of what this source used to be, or a damaged one.
    Stale,
    /// Another source's, other types', or not ours at all.
    Other,
}

fn assess(dir: &Path, plan: &Plan<'_>) -> Result<Fit> {
    let manifest = match Manifest::load(dir) {
        Ok(Some(manifest)) => manifest,
        Ok(None) if lock::marked(dir) || is_empty(dir) => return Ok(Fit::Free),
        Err(e) if e.code() == Code::Store && lock::marked(dir) => return Ok(Fit::Stale),
        Ok(None) => return Ok(Fit::Other),
        Err(e) if e.code() == Code::Store => return Ok(Fit::Other),
        Err(e) => return Err(e),
    };
    if manifest.source.identity != plan.identity {
        let moved_on = manifest.source.path == absolute(&plan.ckpt.dir);
        return Ok(if moved_on { Fit::Stale } else { Fit::Other });
    }
    let config = plan.copies.iter().find(|(name, _)| name == "config.json");
    let recorded = manifest.copies.iter().find(|c| c.name == "config.json");
    if !matches!((config, recorded), (Some((_, raw)), Some(r)) if r.fits(raw)) {
        return Ok(Fit::Stale);
    }
    let opened = match validate(dir, &manifest) {
        Ok(opened) => opened,
        Err(_) => return Ok(Fit::Stale),
    };
    if !plan.has_dtypes_of(&opened.units) {
        return Ok(Fit::Other);
    }
    if check_files_on_disk(dir, &manifest).is_err()
        || super::load_checksums(dir, &manifest).is_err()
    {
        return Ok(Fit::Stale);
    }
    let wanted = plan
        .copies
        .iter()
        .map(|(name, raw)| CopyRecord::of(name, raw));
    if !manifest.copies.iter().cloned().eq(wanted) || check_copies(dir, &manifest).is_err() {
        return Ok(Fit::OldCopies(Box::new(manifest)));
    }
    Ok(Fit::Ready(Box::new(manifest)))
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

/// Rounds of look, lock and look again; more means that somebody deletes what is packed.
const MAX_ROUNDS: usize = 8;

fn find_or_pack(
    plan: &Plan<'_>,
    options: &PackOptions,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Prepared> {
    let mut packed: Option<PackReport> = None;
    let mut repack = options.repack;
    for _ in 0..MAX_ROUNDS {
        let mut target = None;
        for name in plan.folder_names() {
            let dir = options.offload_folder.join(&name);
            if !dir.exists() {
                target = Some(dir);
                break;
            }
            let lock = match lock_waiting(&dir, LockMode::Shared, options, progress) {
                Err(_) if !dir.exists() => {
                    target = Some(dir);
                    break;
                }
                other => other?,
            };
            match assess(&dir, plan)? {
                Fit::Other => continue,
                Fit::Ready(manifest) if !repack => {
                    let opened = validate(&dir, &manifest)?;
                    let store = Store::from_manifest(&dir, &manifest, opened, lock)?;
                    return Ok(finished(store, packed));
                }
                _ => {
                    target = Some(dir);
                    break;
                }
            }
        }
        let Some(dir) = target else {
            return Err(not_ours(plan, options));
        };
        if let Some(report) = fill(&dir, plan, options, repack, progress)? {
            packed = Some(report);
            repack = false;
        }
    }
    Err(Error::new(
        Code::Store,
        format!("cannot keep a pack of {}", plan.label),
        "it was changed or removed each time it had been made",
        "make sure that no other program writes into the offload folder",
    ))
}

fn not_ours(plan: &Plan<'_>, options: &PackOptions) -> Error {
    let names = plan.folder_names().join(" and ");
    Error::new(
        Code::Store,
        format!(
            "no place for {} in {}",
            plan.label,
            options.offload_folder.display()
        ),
        format!("the folders {names} are there and are not packs of this model"),
        "move them away or choose another --offload-folder",
    )
}

fn finished(store: Store, packed: Option<PackReport>) -> Prepared {
    let mut notes = Vec::new();
    for name in packed.iter().flat_map(|p| &p.removed) {
        notes.push(format!("removed {name} to keep the offload limit"));
    }
    for w in packed.iter().flat_map(|p| &p.warnings) {
        notes.push(format!(
            "{} has {} NaN and {} infinite values; {} became infinite",
            w.tensor, w.nan, w.infinite, w.overflow
        ));
    }
    Prepared {
        store,
        packed,
        notes,
    }
}

/// Takes the folder for this process and packs, unless another process has done so meanwhile (None).
fn fill(
    dir: &Path,
    plan: &Plan<'_>,
    options: &PackOptions,
    repack: bool,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Option<PackReport>> {
    fs::create_dir_all(dir)
        .map_err(|e| Error::io(format!("cannot create {}", dir.display()), &e))?;
    let lock = match lock_waiting(dir, LockMode::Exclusive, options, progress) {
        // Its last user removed it: the next round makes it again.
        Err(_) if !dir.exists() => return Ok(None),
        other => other?,
    };
    match assess(dir, plan)? {
        Fit::Ready(_) if !repack => return Ok(None),
        Fit::Other => return Ok(None),
        Fit::OldCopies(manifest) if !repack => {
            renew_copies(dir, plan, *manifest)?;
            return Ok(None);
        }
        _ => {}
    }
    let result = make_room_and_pack(dir, plan, options, progress);
    if result.is_err() {
        // A folder made for nothing goes; one with anything in it (a stale pack that still runs) stays.
        let _ = fs::remove_dir(dir);
    }
    drop(lock);
    result.map(Some)
}

fn make_room_and_pack(
    dir: &Path,
    plan: &Plan<'_>,
    options: &PackOptions,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<PackReport> {
    let removed = match options.offload_limit {
        Some(limit) => clean::make_room(&options.offload_folder, limit, plan.bytes(), dir)?,
        None => Vec::new(),
    };
    let context = PackContext {
        buffer_bytes: options.buffer_bytes,
        allow_overflow: options.allow_overflow,
        refuse_nonfinite: options.refuse_nonfinite,
        cancel: &options.cancel,
        fail_point: options.fail_point.as_ref(),
    };
    let report = pack_into(dir, plan, &context, progress)?;
    Ok(PackReport { removed, ..report })
}

/// Copies tokenizer and configs again; the weights stay.
fn renew_copies(dir: &Path, plan: &Plan<'_>, mut manifest: Manifest) -> Result<()> {
    let failed =
        |e: std::io::Error| Error::io(format!("cannot renew the copies in {}", dir.display()), &e);
    for old in &manifest.copies {
        if plan.copies.iter().all(|(name, _)| *name != old.name) {
            durable::remove(&dir.join(&old.name)).map_err(failed)?;
        }
    }
    for (name, raw) in &plan.copies {
        durable::replace(dir, name, raw).map_err(failed)?;
    }
    manifest.copies = plan
        .copies
        .iter()
        .map(|(name, raw)| CopyRecord::of(name, raw))
        .collect();
    manifest.save(dir)
}

fn lock_waiting(
    dir: &Path,
    mode: LockMode,
    options: &PackOptions,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Lock> {
    let mut on_wait = |holder: &Holder, waited: Duration| {
        let holder = holder.clone();
        progress(PackProgress::Waiting { holder, waited });
    };
    let mut wait = LockWait {
        limit: options.wait,
        cancel: &options.cancel,
        on_wait: &mut on_wait,
    };
    lock::lock(dir, mode, &mut wait)
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
