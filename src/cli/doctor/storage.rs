//! The offload folder: can it be written, how does its file system read, how fast is the disk, how much room is left.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Access, StatxFlags, access, statfs, statx};

use super::Check;
use crate::engine::HostMemory;
use crate::io::{OpenFile, ReaderKind, Sweep, sweep};
use crate::store::{PackState, free_bytes, list_packs};
use crate::units::{ALIGN_BYTES, human_bytes};

/// One pass over the decoder layers of Qwen2.5-VL-7B, the model that the design takes for scale.
const PASS_BYTES: f64 = 14.14e9;
/// A 7B model packed in 16 bits.
const PACK_BYTES: u64 = 16_000_000_000;
/// Written without a name where there is no pack to read.
const TRIAL_BYTES: u64 = 256 << 20;
/// Enough for a rate.
const LEAST_PACK_BYTES: u64 = 64 << 20;

pub(super) fn check(folder: &Path, measure: bool, say: &mut dyn FnMut(Check)) {
    let (place, check) = writable(folder);
    say(check);
    let Some(place) = place else {
        return;
    };
    let system = FileSystem::of(&place);
    let probe = Probe::open(folder, &place);
    say(file_system(&place, &system, probe.as_ref()));
    if measure {
        say(disk_rate(&place, &system, probe));
    }
    say(free_space(&place));
}

/// The folder, or the nearest existing one above it, where it will be made.
fn writable(folder: &Path) -> (Option<PathBuf>, Check) {
    const NAME: &str = "offload folder";
    let shown = folder.display();
    let choose = "give another --offload-folder (or set TENSORPAGER_OFFLOAD_FOLDER)";
    let mut place = match std::path::absolute(folder) {
        Ok(path) => path,
        Err(e) => return (None, Check::fail(NAME, format!("{shown}: {e}"), choose)),
    };
    while let Err(e) = fs::symlink_metadata(&place) {
        if e.kind() != std::io::ErrorKind::NotFound || !place.pop() {
            return (None, Check::fail(NAME, format!("{shown}: {e}"), choose));
        }
    }
    if !place.is_dir() {
        let found = format!("{} is not a folder", place.display());
        return (None, Check::fail(NAME, found, choose));
    }
    let check = match may_write(&place) {
        Err(WhyNot::Rights(why)) => Check::fail(
            NAME,
            format!("{} cannot be written: {why}", place.display()),
            format!(
                "{choose}, take possession of it (sudo chown $USER {}), or stream with --in-place",
                place.display()
            ),
        ),
        Err(WhyNot::Place(why)) => Check::fail(
            NAME,
            format!("nothing can be kept in {}: {why}", place.display()),
            format!("{choose}, or stream with --in-place"),
        ),
        Ok(()) if place.ends_with(folder) || folder.exists() => {
            Check::pass(NAME, format!("{shown} can be written"))
        }
        Ok(()) => Check::pass(NAME, format!("{shown} will be made in {}", place.display())),
    };
    (
        Some(place),
        check.with("path", folder.display().to_string()),
    )
}

enum WhyNot {
    /// The user's own.
    Rights(String),
    /// Nobody could.
    Place(String),
}

/// Whether a file could be made in `place`. Root may write everywhere and can do so in few places that are no disk, so a file
/// without a name is tried.
fn may_write(place: &Path) -> Result<(), WhyNot> {
    access(place, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|e| WhyNot::Rights(std::io::Error::from(e).to_string()))?;
    if FileSystem::of(place).kind == Kind::Kernel {
        return Err(WhyNot::Place("it is the kernel's own".into()));
    }
    match nameless(place) {
        Ok(_) => Ok(()),
        // Not every file system has files without a name; that says nothing.
        Err(e) => match e.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT | libc::EINVAL) => Ok(()),
            _ => Err(WhyNot::Place(e.to_string())),
        },
    }
}

/// A file without a name, gone when it is closed.
fn nameless(place: &Path) -> std::io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(place)
}

struct FileSystem {
    name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Disk,
    Memory,
    /// A container's upper layer.
    Layer,
    Network,
    /// What the kernel shows of itself as files.
    Kernel,
    Unknown,
}

impl FileSystem {
    fn of(place: &Path) -> FileSystem {
        let magic = statfs(place).map_or(0, |s| s.f_type as u64 & 0xffff_ffff);
        FileSystem::named(magic)
    }

    /// By the number that statfs(2) gives.
    fn named(magic: u64) -> FileSystem {
        let (name, kind) = match magic {
            0xef53 => ("ext4", Kind::Disk),
            0x5846_5342 => ("xfs", Kind::Disk),
            0x9123_683e => ("btrfs", Kind::Disk),
            0x2fc1_2fc1 => ("zfs", Kind::Disk),
            0xf2f5_2010 => ("f2fs", Kind::Disk),
            0xca45_1a4e => ("bcachefs", Kind::Disk),
            0x0102_1994 => ("tmpfs", Kind::Memory),
            0x8584_58f6 => ("ramfs", Kind::Memory),
            0x794c_7630 => ("overlayfs", Kind::Layer),
            0x6969 => ("nfs", Kind::Network),
            0xff53_4d42 | 0xfe53_4d42 => ("cifs", Kind::Network),
            0x6573_5546 => ("fuse", Kind::Network),
            0x0102_1997 => ("9p", Kind::Network),
            0x9fa0 => ("proc", Kind::Kernel),
            0x6265_6572 => ("sysfs", Kind::Kernel),
            0x0027_e0eb | 0x6367_7270 => ("cgroup", Kind::Kernel),
            0x6462_6720 => ("debugfs", Kind::Kernel),
            0x1cd1 => ("devpts", Kind::Kernel),
            _ => ("unknown", Kind::Unknown),
        };
        FileSystem { name, kind }
    }
}

/// What the file system and the disk are tried with.
struct Probe {
    files: Vec<PathBuf>,
    /// The pack they belong to; `None` for a file without a name, kept open here.
    pack: Option<String>,
    nameless: Option<File>,
}

impl Probe {
    /// The largest pack, else a file without a name; `None` where neither can be had.
    fn open(folder: &Path, place: &Path) -> Option<Probe> {
        let packs = list_packs(folder).unwrap_or_default();
        let whole = packs.into_iter().filter(|p| {
            matches!(p.state, PackState::Ready | PackState::SourceGone)
                && p.bytes >= LEAST_PACK_BYTES
        });
        if let Some(pack) = whole.max_by_key(|p| p.bytes) {
            let mut files: Vec<PathBuf> = fs::read_dir(&pack.dir)
                .ok()?
                .filter_map(|e| Some(e.ok()?.path()))
                .filter(|p| p.extension().is_some_and(|e| e == "dat"))
                .collect();
            files.sort();
            return Some(Probe {
                files,
                pack: Some(pack.name),
                nameless: None,
            });
        }
        let file = nameless(place).ok()?;
        (&file).write_all(&[1; 2 * ALIGN_BYTES as usize]).ok()?;
        Some(Probe {
            files: vec![PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))],
            pack: None,
            nameless: Some(file),
        })
    }

    fn direct(&self) -> bool {
        let first = self.files.first().map(|f| OpenFile::open(f, true));
        matches!(first, Some(Ok(file)) if file.direct())
    }

    /// Alignment that direct reads need, of memory and offset, as the file system reports it.
    fn alignment(&self) -> Option<(u32, u32)> {
        let first = self.files.first()?;
        let found = statx(
            rustix::fs::CWD,
            first,
            rustix::fs::AtFlags::empty(),
            StatxFlags::DIOALIGN,
        )
        .ok()?;
        let (memory, offset) = (found.stx_dio_mem_align, found.stx_dio_offset_align);
        (memory > 0 && offset > 0).then_some((memory, offset))
    }

    /// Fills the nameless file with bytes that neither compress nor repeat.
    fn fill(&self) -> std::io::Result<()> {
        let Some(mut file) = self.nameless.as_ref() else {
            return Ok(());
        };
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut block = vec![0u8; 1 << 20];
        for _ in 0..TRIAL_BYTES / block.len() as u64 {
            for word in block.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            file.write_all(&block)?;
        }
        file.sync_all()
    }
}

fn file_system(place: &Path, system: &FileSystem, probe: Option<&Probe>) -> Check {
    const NAME: &str = "file system";
    let name = system.name;
    let Some(probe) = probe else {
        return Check::warn(
            NAME,
            format!("{name}; nothing can be tried in {}", place.display()),
            "give an --offload-folder that you may write to",
        );
    };
    let direct = probe.direct();
    let alignment = probe.alignment();
    let aligned = match alignment {
        Some((_, offset)) => format!(", direct reads aligned to {offset} bytes"),
        None => String::new(),
    };
    let found = format!("{name}{aligned}");
    let other = "give an --offload-folder on a local ext4 or xfs disk";
    let check = match system.kind {
        Kind::Memory => Check::warn(
            NAME,
            format!("{found}: it lies in RAM, so weights there take memory twice"),
            "give an --offload-folder on a disk",
        ),
        _ if !direct => Check::warn(
            NAME,
            format!(
                "{found} refuses O_DIRECT: reads go through the page cache, which a model larger than RAM defeats"
            ),
            other,
        ),
        Kind::Layer => Check::warn(
            NAME,
            format!("{found}: a container's own layer, gone with the container and slower"),
            "mount a volume and give it as --offload-folder (docker run -v /data/offload:/offload)",
        ),
        Kind::Network => Check::warn(
            NAME,
            format!("{found}: every byte comes over a network or through a daemon"),
            other,
        ),
        _ => match alignment {
            Some((memory, offset)) if u64::from(memory.max(offset)) > ALIGN_BYTES => Check::warn(
                NAME,
                format!("{found}, more than the {ALIGN_BYTES} of a pack"),
                "give an --offload-folder on a disk with sectors of 4096 bytes or less",
            ),
            _ => Check::pass(NAME, format!("{found}, O_DIRECT works")),
        },
    };
    let check = check.with("file_system", name).with("direct", direct);
    match alignment {
        Some((memory, offset)) => check
            .with("dio_memory_align_bytes", memory)
            .with("dio_offset_align_bytes", offset),
        None => check,
    }
}

fn disk_rate(place: &Path, system: &FileSystem, probe: Option<Probe>) -> Check {
    const NAME: &str = "disk rate";
    if system.kind == Kind::Memory {
        return Check::pass(NAME, "not measured: the folder lies in RAM");
    }
    let Some(probe) = probe else {
        return Check::warn(
            NAME,
            "not measured: there is no pack to read and no file can be made",
            "give an --offload-folder that you may write to",
        );
    };
    let how = match &probe.pack {
        Some(pack) => format!("reading {pack}"),
        None => format!("reading a nameless file of {}", human_bytes(TRIAL_BYTES)),
    };
    if probe.pack.is_none() {
        let room = free_bytes(place).unwrap_or(0);
        if room < 4 * TRIAL_BYTES {
            return Check::warn(
                NAME,
                format!(
                    "not measured: no pack to read, and {} free",
                    human_bytes(room)
                ),
                "free some space in the offload folder",
            );
        }
        if let Err(e) = probe.fill() {
            return Check::warn(
                NAME,
                format!("not measured: a file without a name cannot be written: {e}"),
                "look at the disk (dmesg), or give another --offload-folder",
            );
        }
    }
    let block = match HostMemory::read().available {
        n if n > 1 << 30 => 4 << 20,
        _ => 1 << 20,
    };
    let rows = sweep(
        &Sweep {
            files: probe.files.clone(),
            kinds: vec![ReaderKind::Auto],
            block_bytes: vec![block >> 2, block],
            depths: vec![8, 32],
            each: Duration::from_millis(400),
            cancel: Arc::default(),
        },
        &mut |_| {},
    );
    let best = rows.map(|rows| {
        rows.into_iter()
            .max_by(|a, b| a.gb_per_s.total_cmp(&b.gb_per_s))
    });
    match best {
        Ok(Some(row)) => {
            judge_rate(place, row.gb_per_s, row.direct, &how).with("reader", row.reader)
        }
        Ok(None) => Check::warn(NAME, "not measured: nothing to read", "pack a model first"),
        Err(e) => Check::fail(NAME, format!("{}: {}", e.what(), e.cause()), e.fix()),
    }
}

fn judge_rate(place: &Path, rate: f64, direct: bool, how: &str) -> Check {
    const NAME: &str = "disk rate";
    let pass = PASS_BYTES / (rate * 1e9);
    let cached = if direct {
        ""
    } else {
        ", through the page cache"
    };
    let found = format!(
        "{rate:.2} GB/s ({how}{cached}): a 7B model's {} take {pass:.1} s a pass",
        human_bytes(PASS_BYTES as u64)
    );
    let check = if rate >= 1.0 {
        Check::pass(NAME, found)
    } else {
        let why = match spinning(place) {
            Some(true) => "this is a spinning disk: ",
            _ => "",
        };
        Check::warn(
            NAME,
            found,
            format!(
                "{why}give an --offload-folder on an NVMe drive (at 3 GB/s a pass takes {:.1} s), or more of the model in RAM",
                PASS_BYTES / 3e9
            ),
        )
    };
    check.with("gb_per_s", rate).with("direct", direct)
}

/// Whether the disk behind `place` has platters, where the kernel tells.
fn spinning(place: &Path) -> Option<bool> {
    let device = fs::metadata(place).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let base = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // A partition's queue is its disk's.
    let text = ["queue/rotational", "../queue/rotational"]
        .iter()
        .find_map(|name| fs::read_to_string(base.join(name)).ok())?;
    Some(text.trim() == "1")
}

fn free_space(place: &Path) -> Check {
    const NAME: &str = "free space";
    let free = match free_bytes(place) {
        Ok(free) => free,
        Err(e) => return Check::warn(NAME, e.cause(), e.fix()),
    };
    let found = format!("{} at {}", human_bytes(free), place.display());
    let check = if free >= PACK_BYTES {
        Check::pass(NAME, found)
    } else {
        Check::warn(
            NAME,
            format!("{found}; a 7B model takes {}", human_bytes(PACK_BYTES)),
            "remove packs (`tensorpager clean --stale`), give another --offload-folder, or stream with --in-place",
        )
    };
    check.with("free_bytes", free)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Status;

    #[test]
    fn a_folder_to_be_made_is_looked_at_where_it_will_lie() {
        let dir = tempfile::tempdir().unwrap();
        let (place, check) = writable(&dir.path().join("a/b"));
        assert_eq!(place.as_deref(), Some(dir.path()));
        assert!(check.status == Status::Pass && check.found.contains("will be made"));
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        for path in [file.clone(), file.join("below")] {
            let (place, check) = writable(&path);
            assert!(place.is_none() && check.status == Status::Fail, "{check:?}");
        }
        assert!(!dir.path().join("a").exists(), "nothing was made");
    }

    #[test]
    fn measuring_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let Some(probe) = Probe::open(dir.path(), dir.path()) else {
            println!("skipped: no nameless files at {}", dir.path().display());
            return;
        };
        let system = FileSystem::of(dir.path());
        let check = file_system(dir.path(), &system, Some(&probe));
        assert!(check.figures.contains_key("direct"), "{check:?}");
        drop(probe);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn rates_are_judged_by_what_a_pass_takes() {
        let fast = judge_rate(Path::new("/"), 2.828, true, "x");
        assert!(fast.status == Status::Pass && fast.found.contains("5.0 s a pass"));
        let slow = judge_rate(Path::new("/"), 0.1, false, "x");
        assert!(slow.status == Status::Warn && slow.found.contains("page cache"));
        assert!(slow.fix.contains("NVMe"));
    }

    #[test]
    fn file_systems_are_known_by_their_numbers() {
        assert_eq!(FileSystem::named(0xef53).name, "ext4");
        assert!(FileSystem::named(0x0102_1994).kind == Kind::Memory);
        assert!(FileSystem::named(1).kind == Kind::Unknown);
        assert!(FileSystem::of(Path::new("/proc")).kind == Kind::Kernel);
    }
}
