//! Removing packs: only files this engine writes, only folders it has marked, never while somebody reads.

use std::fs;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use super::inspect::{PackInfo, PackState, list_packs};
use super::layout::is_file_name;
use super::lock::{self, LockMode};
use super::manifest::{CHECKSUMS, COPIES, MANIFEST};
use super::{LAST_USED, durable, scratch};
use crate::error::{Code, Error, Result};
use crate::units::{flag_size, human_bytes};

/// What `clean` is asked to do.
#[derive(Clone, Debug, Default)]
pub struct CleanOptions {
    /// Only unfinished or damaged packs, those of another format, and those whose source is gone or has changed.
    pub stale: bool,
    /// Only this one folder of the offload folder.
    pub name: Option<String>,
    /// Says what would go and leaves it.
    pub dry_run: bool,
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Cleaned {
    pub removed: Vec<PackInfo>,
    /// Folder name and why it stays.
    pub kept: Vec<(String, String)>,
    pub bytes: u64,
}

/// What removes this one pack, wherever it lies.
pub fn clean_command(pack: &Path) -> String {
    let pack = pack.canonicalize().unwrap_or_else(|_| pack.to_path_buf());
    let name = pack.file_name().unwrap_or_default().display();
    let folder = pack.parent().unwrap_or(Path::new(".")).display();
    format!("tensorpager clean --offload-folder {folder} {name}")
}

/// Removes packs from an offload folder. Folders and files that are not ours stay, with the reason.
pub fn clean(offload_folder: &Path, options: &CleanOptions) -> Result<Cleaned> {
    let mut result = Cleaned::default();
    let packs = list_packs(offload_folder)?;
    if let Some(name) = &options.name
        && packs.iter().all(|p| p.name != *name)
    {
        return Err(Error::new(
            Code::Usage,
            format!("there is no pack `{name}` in {}", offload_folder.display()),
            "no folder of that name lies there",
            "`tensorpager inspect` lists the packs",
        ));
    }
    for pack in packs {
        if options.name.as_ref().is_some_and(|n| *n != pack.name) {
            continue;
        }
        if pack.state == PackState::Foreign {
            result
                .kept
                .push((pack.name, "not made by this engine".to_string()));
            continue;
        }
        if options.stale && !pack.state.is_stale() {
            continue;
        }
        match remove_pack(&pack, options.dry_run)? {
            None => {
                result.bytes += pack.bytes;
                result.removed.push(pack);
            }
            Some(reason) => result.kept.push((pack.name, reason)),
        }
    }
    Ok(result)
}

/// Removes one pack that nobody uses. Some: why it, or a part of it, stays.
fn remove_pack(pack: &PackInfo, dry_run: bool) -> Result<Option<String>> {
    let dir = &pack.dir;
    let Some(lock) = lock::try_lock(dir, LockMode::Exclusive)? else {
        return Ok(Some(format!("in use by {}", lock::holder(dir))));
    };
    if dry_run {
        return Ok(None);
    }
    let failed = |e: io::Error| Error::io(format!("cannot remove {}", dir.display()), &e);
    let strangers = match pack.state {
        PackState::Abandoned => scratch::remove_contents(dir),
        _ => remove_contents(dir),
    };
    let strangers = strangers.map_err(failed)?;
    if let Some(first) = strangers.first() {
        return Ok(Some(format!("emptied; {first} in it is not ours")));
    }
    // A linked folder is emptied; the link, the user's own, stays.
    let linked = fs::symlink_metadata(dir).is_ok_and(|m| m.is_symlink());
    if !linked {
        fs::remove_dir(dir).map_err(failed)?;
    }
    drop(lock);
    Ok(None)
}

/// True for every name this engine writes into a pack's folder.
fn is_recognised(name: &str) -> bool {
    let ours = [
        MANIFEST,
        CHECKSUMS,
        LAST_USED,
        "lock",
        "tune.json",
        "tune-gpu.json",
        "rates.json",
    ];
    let base = name.strip_suffix(".tmp").unwrap_or(name);
    // A record's unfinished file has its writer's number.
    let base = match base.rsplit_once('.') {
        Some((record, pid)) if name.ends_with(".tmp") && pid.parse::<u32>().is_ok() => record,
        _ => base,
    };
    is_file_name(name) || ours.contains(&base) || COPIES.contains(&base)
}

/// True where a packer of ours began: the mark is there, or it was killed before it could write it (an empty folder, or
/// one with nothing but the unfinished mark, holds nothing of anybody's).
pub(crate) fn is_begun(dir: &Path) -> bool {
    let bare = || {
        entries(dir)
            .is_ok_and(|(ours, others)| others.is_empty() && ours.iter().all(|n| n == "lock.tmp"))
    };
    lock::marked(dir) || bare()
}

/// Files of ours in a folder, and the names of everything else.
fn entries(dir: &Path) -> io::Result<(Vec<String>, Vec<String>)> {
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_recognised(&name) && !entry.file_type()?.is_dir() {
            ours.push(name);
        } else {
            others.push(name);
        }
    }
    Ok((ours, others))
}

/// Removes every file of ours, the manifest first and the mark last, so that a crash leaves an unfinished pack and
/// never a manifest without its files. Returns what else lies there.
pub(crate) fn remove_contents(dir: &Path) -> io::Result<Vec<String>> {
    durable::remove(&dir.join(MANIFEST))?;
    remove_old_data(dir)?;
    durable::remove(&dir.join("lock"))?;
    durable::sync_dir(dir)?;
    Ok(entries(dir)?.1)
}

/// Removes every file of ours but the mark.
pub(crate) fn remove_old_data(dir: &Path) -> io::Result<()> {
    for name in entries(dir)?.0 {
        if name != "lock" {
            durable::remove(&dir.join(name))?;
        }
    }
    durable::sync_dir(dir)
}

/// Disk space that removing our files here would give back.
pub(crate) fn recognised_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let ours = entries(dir).map(|(ours, _)| ours).unwrap_or_default();
    let sizes = ours.iter().map(|name| {
        let meta = fs::symlink_metadata(dir.join(name));
        meta.map_or(0, |m| m.blocks().saturating_mul(512))
    });
    sizes.fold(0, u64::saturating_add)
}

/// Removes the longest unused packs until `needed` more bytes keep all packs together within `limit`.
///
/// Packs in use stay, and so do those whose source is gone: they may be the only copy of their model.
pub(crate) fn make_room(
    offload_folder: &Path,
    limit: u64,
    needed: u64,
    own: &Path,
) -> Result<Vec<String>> {
    let mut packs = list_packs(offload_folder)?;
    packs.retain(|p| p.dir != own && p.state != PackState::Foreign);
    packs.sort_by_key(|p| p.last_used.unwrap_or(SystemTime::UNIX_EPOCH));
    let mut total = packs
        .iter()
        .map(|p| p.bytes)
        .fold(needed, u64::saturating_add);
    let mut removable: Vec<&PackInfo> = packs
        .iter()
        .filter(|p| p.state != PackState::SourceGone)
        .collect();
    // Unfinished and outdated ones first, whatever their age.
    removable.sort_by_key(|p| !p.state.is_stale());
    let possible = removable
        .iter()
        .map(|p| p.bytes)
        .fold(0, u64::saturating_add);
    if total.saturating_sub(possible) > limit {
        return Err(beyond_limit(limit, needed, total - possible));
    }
    let mut removed = Vec::new();
    for pack in removable {
        if total <= limit {
            break;
        }
        if remove_pack(pack, false)?.is_none() {
            total -= pack.bytes;
            removed.push(pack.name.clone());
        }
    }
    if total > limit {
        return Err(beyond_limit(limit, needed, total));
    }
    Ok(removed)
}

fn beyond_limit(limit: u64, needed: u64, total: u64) -> Error {
    Error::new(
        Code::Space,
        format!("the offload limit of {} is too small", human_bytes(limit)),
        format!(
            "this pack needs {}; with the packs that cannot be removed that makes {}",
            human_bytes(needed),
            human_bytes(total)
        ),
        format!(
            "raise --offload-limit to {} or more, or stream with --in-place",
            flag_size(total)
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::is_recognised;

    #[test]
    fn unfinished_files_of_ours_are_ours() {
        for name in [
            "rates.json",
            "manifest.json.tmp",
            "rates.json.1234.tmp",
            "tune-gpu.json.7.tmp",
        ] {
            assert!(is_recognised(name), "{name}");
        }
        for name in [
            "rates.json.1234",
            "notes.1234.tmp",
            "rates.json.x.tmp",
            ".rates.json.1",
        ] {
            assert!(!is_recognised(name), "{name}");
        }
    }
}
