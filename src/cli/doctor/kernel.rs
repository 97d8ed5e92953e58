//! The kernel: its version, io_uring, locked memory, open files.

use std::fs;
use std::path::Path;

use super::Check;
use crate::io::{Arena, OpenFile, ReaderKind, open_reader};
use crate::units::human_bytes;

/// What the ring is tried with: more than the least limit on locked memory that systems set.
const TRIAL_BYTES: u64 = 16 << 20;

pub(super) fn check(say: &mut dyn FnMut(Check)) {
    say(version());
    let reader = try_ring();
    say(match &reader {
        Ok(how) => Check::pass("io_uring", how.clone()).with("io", "io_uring"),
        Err(why) => Check::warn(
            "io_uring",
            format!("{why}; threads read instead"),
            remedy(&Sandbox::read()),
        )
        .with("io", "threads"),
    });
    say(locked_memory(reader.as_deref().unwrap_or_default()));
    say(open_files());
}

fn version() -> Check {
    let uname = rustix::system::uname();
    let text = |s: &std::ffi::CStr| s.to_string_lossy().into_owned();
    let (release, machine) = (text(uname.release()), text(uname.machine()));
    let found = format!("Linux {release}, {machine}");
    let check = match parse_release(&release) {
        Some(v) if v < (5, 6) => Check::warn(
            "kernel",
            format!("{found}: older than 5.6, so without a usable io_uring"),
            "run a kernel from 5.6 on, 6.1 or later for the best ring; threads read meanwhile",
        ),
        _ => Check::pass("kernel", found),
    };
    check.with("release", release).with("machine", machine)
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A ring as the engine opens it, on this program's own file.
fn try_ring() -> Result<String, String> {
    let arena = Arena::new(TRIAL_BYTES).map_err(|e| e.cause().to_string())?;
    let open = || {
        let file = OpenFile::open(Path::new("/proc/self/exe"), false)?;
        open_reader(ReaderKind::IoUring, vec![file], &arena, 32)
    };
    open()
        .map(|reader| reader.describe())
        // Its own file is read through the cache: that says nothing about the offload folder.
        .map(|how| {
            let how = how.split(", buffered").next().unwrap_or_default();
            how.trim_start_matches("io_uring: ").to_string()
        })
        .map_err(|e| e.cause().to_string())
}

/// What can forbid io_uring.
struct Sandbox {
    /// `kernel.io_uring_disabled`: 0 for all, 1 for a group, 2 for nobody.
    sysctl: Option<u32>,
    group: Option<i64>,
    seccomp: bool,
}

impl Sandbox {
    fn read() -> Sandbox {
        let number = |name: &str| -> Option<i64> {
            let path = Path::new("/proc/sys/kernel").join(name);
            fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Sandbox {
            sysctl: number("io_uring_disabled").map(|n| n as u32),
            group: number("io_uring_group"),
            seccomp: status
                .lines()
                .filter_map(|l| l.strip_prefix("Seccomp:"))
                .any(|mode| mode.trim() == "2"),
        }
    }
}

fn remedy(sandbox: &Sandbox) -> String {
    match sandbox {
        Sandbox {
            sysctl: Some(2), ..
        } => "sudo sysctl kernel.io_uring_disabled=0 (in a container: on its host)".to_string(),
        Sandbox {
            sysctl: Some(1),
            group,
            ..
        } => match group {
            Some(gid) if *gid >= 0 => {
                format!("add this user to group {gid} (kernel.io_uring_group), or sudo sysctl kernel.io_uring_disabled=0")
            }
            _ => "sudo sysctl kernel.io_uring_disabled=0".to_string(),
        },
        Sandbox { seccomp: true, .. } => {
            "a seccomp filter forbids it: start the container with a profile that allows io_uring_setup, \
             io_uring_enter and io_uring_register (docker run --security-opt seccomp=FILE.json)"
                .to_string()
        }
        _ => "run a kernel with CONFIG_IO_URING, 5.6 or later".to_string(),
    }
}

/// `reader`: what the ring said of itself, empty where there is none.
fn locked_memory(reader: &str) -> Check {
    use rustix::process::{Resource, getrlimit};
    let limit = getrlimit(Resource::Memlock).current;
    let text = match limit {
        Some(bytes) => format!("limit {}", human_bytes(bytes)),
        None => "no limit".to_string(),
    };
    let check = if reader.contains("plain buffers") {
        Check::warn(
            "locked memory",
            format!(
                "{text}: buffers cannot be registered with the ring, reads cost a little more processor"
            ),
            "ulimit -l unlimited, or for good: a line `* - memlock unlimited` in /etc/security/limits.conf \
             (systemd: LimitMEMLOCK=infinity, docker: --ulimit memlock=-1)",
        )
    } else if reader.is_empty() {
        Check::pass(
            "locked memory",
            format!("{text}; not needed without io_uring"),
        )
    } else {
        Check::pass("locked memory", format!("{text}; buffers are registered"))
    };
    check.with("memlock_bytes", limit)
}

/// A pack has a file a layer, a checkpoint up to some hundred shards.
fn open_files() -> Check {
    use rustix::process::{Resource, getrlimit};
    let limit = getrlimit(Resource::Nofile).current;
    let check = match limit {
        Some(n) if n < 256 => Check::warn(
            "open files",
            format!("limit {n}: a model of many layers has more files"),
            "ulimit -n 1024",
        ),
        Some(n) => Check::pass("open files", format!("limit {n}")),
        None => Check::pass("open files", "no limit"),
    };
    check.with("nofile", limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_forbid_the_ring_has_its_own_remedy() {
        let sandbox = |sysctl, group, seccomp| Sandbox {
            sysctl,
            group,
            seccomp,
        };
        assert!(remedy(&sandbox(Some(2), Some(-1), true)).contains("io_uring_disabled=0"));
        assert!(remedy(&sandbox(Some(1), Some(105), false)).contains("group 105"));
        assert!(!remedy(&sandbox(Some(1), Some(-1), false)).contains("group"));
        assert!(remedy(&sandbox(Some(0), None, true)).contains("seccomp"));
        assert!(remedy(&sandbox(None, None, false)).contains("CONFIG_IO_URING"));
    }

    #[test]
    fn releases_are_read() {
        assert_eq!(parse_release("6.18.44-custom"), Some((6, 18)));
        assert_eq!(parse_release("5.4-generic"), Some((5, 4)));
        assert_eq!(parse_release("5.15.0-91-generic"), Some((5, 15)));
        assert_eq!(parse_release("odd"), None);
    }

    #[test]
    fn plain_buffers_are_a_warning() {
        let check =
            locked_memory("io_uring: plain buffers (ENOMEM: raise ulimit -l to register them)");
        assert!(check.fix.contains("ulimit -l unlimited"));
        assert!(locked_memory("registered buffers").fix.is_empty());
    }
}
