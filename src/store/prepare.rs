//! Find the pack of a checkpoint, or make it, or stream the checkpoint in place.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::dtype::DtypePolicy;
use super::lock::{self, Holder, Lock, LockMode, LockWait};
use super::manifest::{CopyRecord, Manifest, validate};
use super::pack::{FailPoint, PackContext, PackProgress, PackReport, pack_into};
use super::plan::{Plan, absolute};
use super::{Store, check_copies, check_files_on_disk, clean, durable};
use crate::checkpoint::{Checkpoint, SourceKind};
use crate::error::{Code, Error, Result};

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
        Ok(None) if clean::is_begun(dir) => return Ok(Fit::Free),
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
                    let kept = match packed {
                        None => keep_limit(&dir, plan, options),
                        Some(_) => Vec::new(),
                    };
                    let mut prepared = finished(store, packed);
                    prepared.notes.extend(kept);
                    return Ok(prepared);
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

/// The limit holds beside a pack that is there already, too. Where it cannot be kept that is said: it is no reason not to run.
fn keep_limit(dir: &Path, plan: &Plan<'_>, options: &PackOptions) -> Vec<String> {
    let Some(limit) = options.offload_limit else {
        return Vec::new();
    };
    match clean::make_room(&options.offload_folder, limit, plan.bytes(), dir) {
        Ok(removed) => removed.iter().map(|name| removed_note(name)).collect(),
        Err(e) => vec![format!("{}: {}", e.what(), e.cause())],
    }
}

fn removed_note(name: &str) -> String {
    format!("removed {name} to keep the offload limit")
}

fn finished(store: Store, packed: Option<PackReport>) -> Prepared {
    let mut notes = Vec::new();
    for name in packed.iter().flat_map(|p| &p.removed) {
        notes.push(removed_note(name));
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
        .map_err(|e| {
            Error::io(format!("cannot create {}", dir.display()), &e).with_fix(
                "give an --offload-folder that you may write to, or stream from the checkpoint with --in-place",
            )
        })?;
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
