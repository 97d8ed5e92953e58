//! Other places on this machine where packs could lie: local disks with room, and how fast they are known to read.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access, major, minor, stat};

use crate::paging::DiskRates;
use crate::store::{free_bytes, list_packs};
use crate::units::human_bytes;

/// File systems of local disks. Whatever else is mounted is never touched: a server that is gone would hold the program up for ever.
const LOCAL: [&str; 8] = [
    "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs",
];
/// Mounted for the system itself: large enough or not, no place for weights.
const SYSTEMS_OWN: [&str; 7] = ["/boot", "/efi", "/etc", "/nix", "/run", "/snap", "/usr"];
/// More than so many are a list nobody reads.
const MOST: usize = 3;

/// A folder for packs on a local disk.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Folder {
    pub path: PathBuf,
    pub free: u64,
    /// The disk under it, as the kernel calls it.
    pub disk: String,
}

impl Folder {
    /// The best rate that runs or `bench io` got out of packs there, 10⁹ bytes a second.
    pub fn known_rate(&self) -> Option<f64> {
        let packs = list_packs(&self.path).unwrap_or_default();
        let rates = packs
            .iter()
            .filter_map(|p| DiskRates::of(&p.dir, true).best());
        rates.reduce(f64::max)
    }

    pub fn on_the_disk_of(&self, place: &Path) -> bool {
        nearest(place).is_some_and(|s| s.disk == self.disk)
    }

    /// As advice names it.
    pub fn told(&self) -> String {
        format!(
            "--offload-folder {} has {} free",
            self.path.display(),
            human_bytes(self.free)
        )
    }
}

/// Folders on other file systems than that of `place`, with room for `needed` bytes, the emptiest first.
pub(super) fn others(place: &Path, needed: u64) -> Vec<Folder> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let own = ["HOME", "TMPDIR"].iter().filter_map(std::env::var_os);
    let own: Vec<PathBuf> = own
        .map(PathBuf::from)
        .chain([PathBuf::from("/var/tmp")])
        .filter(|p| p.is_absolute())
        .collect();
    let here = nearest(place).map(|s| s.device);
    let mut found = candidates(&table, &own, &mut |at| Seen::of(at));
    found.retain(|(seen, _)| Some(seen.device) != here && seen.free >= needed);
    found.sort_by_key(|(seen, _)| std::cmp::Reverse(seen.free));
    found.truncate(MOST);
    let folder = |(seen, at): (Seen, PathBuf)| Folder {
        path: at.join("offload_folder"),
        free: seen.free,
        disk: seen.disk,
    };
    found.into_iter().map(folder).collect()
}

/// A folder that may be written to.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    device: u64,
    disk: String,
    free: u64,
}

impl Seen {
    fn of(at: &Path) -> Option<Seen> {
        if !at.is_dir() {
            return None;
        }
        access(at, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).ok()?;
        let device = stat(at).ok()?.st_dev;
        Some(Seen {
            device,
            disk: disk_of(major(device), minor(device)),
            free: free_bytes(at).ok()?,
        })
    }
}

/// Of the nearest folder above `place` that is there.
fn nearest(place: &Path) -> Option<Seen> {
    let place = std::path::absolute(place).ok()?;
    let there = place.ancestors().find(|p| p.exists())?;
    let device = stat(there).ok()?.st_dev;
    Some(Seen {
        device,
        disk: disk_of(major(device), minor(device)),
        free: 0,
    })
}

/// The disk under a block device: of a partition its disk, of a mapped volume what it lies on where that is one disk. File systems over several
/// disks have a number of their own, and so a name of their own.
fn disk_of(major: u32, minor: u32) -> String {
    let number = format!("{major}:{minor}");
    let Ok(mut dir) = fs::canonicalize(format!("/sys/dev/block/{number}")) else {
        return number;
    };
    loop {
        if dir.join("partition").exists() {
            dir.pop();
            continue;
        }
        let under = fs::read_dir(dir.join("slaves")).map(|dir| dir.flatten().collect::<Vec<_>>());
        match under.as_deref() {
            Ok([one]) => match fs::canonicalize(one.path()) {
                Ok(disk) => dir = disk,
                Err(_) => return number,
            },
            _ => return dir.display().to_string(),
        }
    }
}

/// One folder a local file system of the mount `table`, one of `own` where one lies there; `see` is asked of no other.
fn candidates(
    table: &str,
    own: &[PathBuf],
    see: &mut dyn FnMut(&Path) -> Option<Seen>,
) -> Vec<(Seen, PathBuf)> {
    let mounts: Vec<Mount> = table.lines().filter_map(Mount::parse).collect();
    let local = |place: &Path| {
        // Of two on one place the later one is seen; a longer path is nearer.
        let over = mounts.iter().filter(|m| place.starts_with(&m.at));
        let nearest = over.max_by_key(|m| m.at.components().count());
        nearest.is_some_and(|m| m.local)
    };
    let roots = mounts
        .iter()
        .map(|m| &m.at)
        .filter(|at| at.parent().is_some() && !SYSTEMS_OWN.iter().any(|own| at.starts_with(own)));
    let mut found: Vec<(Seen, PathBuf)> = Vec::new();
    for place in own.iter().chain(roots) {
        if !local(place) {
            continue;
        }
        if let Some(seen) = see(place)
            && found.iter().all(|(other, _)| other.device != seen.device)
        {
            found.push((seen, place.clone()));
        }
    }
    found
}

struct Mount {
    at: PathBuf,
    /// A disk's, that may be written to.
    local: bool,
}

impl Mount {
    /// A line of /proc/self/mounts: device, place, type, options.
    fn parse(line: &str) -> Option<Mount> {
        let mut fields = line.split(' ');
        let (_, at, kind, options) = (
            fields.next()?,
            fields.next()?,
            fields.next()?,
            fields.next()?,
        );
        Some(Mount {
            at: PathBuf::from(unescaped(at)),
            local: LOCAL.contains(&kind) && options.split(',').all(|o| o != "ro"),
        })
    }
}

/// The kernel writes blanks and backslashes of a path as `\040` and the like.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let code = part.get(..3).and_then(|c| u8::from_str_radix(c, 8).ok());
        match code {
            Some(c) => {
                text.push(c as char);
                text.push_str(&part[3..]);
            }
            None => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
proc /proc proc rw,relatime 0 0
/dev/vda / ext4 rw,relatime 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/vdb /data xfs rw,noatime 0 0
server:/x /data/far nfs4 rw,hard 0 0
/dev/vdc /mnt/two\\040words btrfs rw,subvol=/ 0 0
/dev/vdd /old ext4 ro,relatime 0 0
/dev/vde /boot ext4 rw 0 0
pool /pool zfs rw,xattr 0 0
sshfs /home/far fuse.sshfs rw 0 0
/dev/loop3 /snap/core squashfs ro 0 0
/dev/vdf /gone ext4 rw 0 0
tmpfs /gone tmpfs rw 0 0
";

    fn seen(table: &str, own: &[&str]) -> (Vec<String>, Vec<String>) {
        let own: Vec<PathBuf> = own.iter().map(PathBuf::from).collect();
        let mut asked = Vec::new();
        let mut see = |at: &Path| {
            asked.push(at.display().to_string());
            let device = match at.components().nth(1)?.as_os_str().to_str()? {
                "data" => 2,
                "mnt" => 3,
                "pool" => 4,
                _ => 1,
            };
            Some(Seen {
                device,
                disk: device.to_string(),
                free: 1,
            })
        };
        let found = candidates(table, &own, &mut see);
        let found = found.into_iter().map(|(_, at)| at.display().to_string());
        (found.collect(), asked)
    }

    #[test]
    fn only_local_disks_are_looked_at_each_once() {
        let (found, asked) = seen(TABLE, &["/root", "/tmp/mine", "/var/tmp"]);
        // One folder a device; the user's own before a mount's root.
        assert_eq!(found, ["/root", "/data", "/mnt/two words", "/pool"]);
        // A dead server, RAM, what is read only or the system's own: not even asked.
        for never in ["/tmp", "/data/far", "/old", "/boot", "/home/far", "/gone"] {
            assert!(!asked.iter().any(|a| a.starts_with(never)), "{asked:?}");
        }
    }

    #[test]
    fn a_home_on_a_server_is_no_disk() {
        let (found, asked) = seen(TABLE, &["/home/far/me", "/data/me"]);
        assert_eq!(found, ["/data/me", "/mnt/two words", "/pool"]);
        assert!(!asked.contains(&"/home/far/me".to_string()), "{asked:?}");
    }

    #[test]
    fn paths_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescaped("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescaped("/a\\9"), "/a\\9");
        assert_eq!(unescaped("/plain"), "/plain");
    }

    #[test]
    fn the_best_rate_of_the_packs_there_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder {
            path: dir.path().to_path_buf(),
            free: 1,
            disk: String::new(),
        };
        assert_eq!(folder.known_rate(), None);
        for (name, rate) in [("a--bf16", 3.0), ("b--bf16", 5.0)] {
            let pack = dir.path().join(name);
            fs::create_dir(&pack).unwrap();
            fs::write(pack.join("layer.000.dat"), [0; 4096]).unwrap();
            fs::write(
                pack.join("manifest.json"),
                r#"{"format": "tensorpager", "version": 1}"#,
            )
            .unwrap();
            DiskRates::of(&pack, true).raise(rate);
        }
        assert_eq!(folder.known_rate(), Some(5.0));
        assert!(!folder.on_the_disk_of(dir.path()));
    }

    #[test]
    fn here_is_not_another_place() {
        let dir = tempfile::tempdir().unwrap();
        let here = nearest(&dir.path().join("not/there")).unwrap();
        assert_eq!(here.device, stat(dir.path()).unwrap().st_dev);
        let found = others(&dir.path().join("not/there"), 1);
        assert!(
            found
                .iter()
                .all(|f| stat(f.path.parent().unwrap()).unwrap().st_dev != here.device),
            "{found:?}"
        );
        assert!(others(dir.path(), u64::MAX).is_empty());
    }
}
