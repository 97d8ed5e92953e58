//! How much memory there is, how much this process has taken, and what the parts of an engine may take.

use std::fs;
use std::path::Path;

use crate::error::{Code, Error, Result};
use crate::units::{flag_size, human_bytes};

/// Kept aside in every budget for what is allocated while running: text, JSON, the allocator's own slack, thread stacks.
pub const SLACK_BYTES: u64 = 24 << 20;

/// Host memory as the kernel sees it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// What could still be allocated, the tightest of machine and cgroups.
    pub available: u64,
    /// This process's peak so far.
    pub peak: u64,
    /// This process's resident set now.
    pub resident: u64,
}

impl HostMemory {
    pub fn read() -> HostMemory {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let machine = kib_field(&meminfo, "MemAvailable:").unwrap_or(1 << 30);
        HostMemory {
            available: machine.min(cgroup_room().unwrap_or(u64::MAX)),
            peak: kib_field(&status, "VmHWM:").unwrap_or(0),
            resident: kib_field(&status, "VmRSS:").unwrap_or(0),
        }
    }

    /// 90 % of what this process could have in all: what it holds and what is free.
    pub fn default_budget(&self) -> u64 {
        (self.available + self.resident) / 10 * 9
    }
}

/// Memory that may be pinned for a GPU where nobody says: half of what the machine has, or the tightest cgroup gives, or of a `budget` beyond
/// that. Pinned pages cannot be moved or reclaimed, whoever else is short of memory.
pub fn default_pinned(budget: u64) -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let machine = kib_field(&meminfo, "MemTotal:").unwrap_or(0);
    let limit = cgroup_limit().unwrap_or(u64::MAX);
    machine.min(limit).max(budget) / 2
}

/// The peak resident set so far, bytes.
pub fn peak_bytes() -> u64 {
    HostMemory::read().peak
}

/// `Name:   1234 kB` as /proc writes it.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = rest.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// The tightest limit of the cgroups (v1 or v2) this process lies in; `None` where there is none.
pub fn cgroup_limit() -> Option<u64> {
    over_cgroups(&|root, group, limit, _| tightest(root, group, limit, "-"))
}

/// Room left under the tightest cgroup this process lies in.
fn cgroup_room() -> Option<u64> {
    over_cgroups(&tightest)
}

/// The least of what `ask(root, group, limit file, usage file)` gives over the groups of this process.
fn over_cgroups(ask: &dyn Fn(&Path, &str, &str, &str) -> Option<u64>) -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    groups
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            if controllers.is_empty() {
                ask(
                    Path::new("/sys/fs/cgroup"),
                    path,
                    "memory.max",
                    "memory.current",
                )
            } else if controllers.split(',').any(|c| c == "memory") {
                let root = Path::new("/sys/fs/cgroup/memory");
                ask(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes")
            } else {
                None
            }
        })
        .min()
}

/// Walks from the process's group up to the root: any ancestor may be the tight one. Page cache counts as used here but
/// gives way under pressure, so it is added back. Without a file of that name nothing is used.
fn tightest(root: &Path, group: &str, limit: &str, used: &str) -> Option<u64> {
    let mut dir = root.join(group.trim_start_matches('/'));
    let mut room: Option<u64> = None;
    loop {
        let number = |name: &str| -> Option<u64> {
            fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok()
        };
        // `max`, or v1's huge number, says that there is no limit.
        if let Some(limit) = number(limit).filter(|l| *l < 1 << 60) {
            let cache = fs::read_to_string(dir.join("memory.stat"))
                .ok()
                .and_then(|s| {
                    s.lines().find_map(|l| {
                        let (name, value) = l.split_once(' ')?;
                        matches!(name, "file" | "total_cache").then(|| value.parse().ok())?
                    })
                })
                .unwrap_or(0);
            let here = limit.saturating_sub(number(used).unwrap_or(0).saturating_sub(cache));
            room = Some(room.map_or(here, |r| r.min(here)));
        }
        if dir == root || !dir.pop() || !dir.starts_with(root) {
            return room;
        }
    }
}

/// What the parts of an engine take besides weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charges {
    /// Resident before the engine allocates anything: code, tokenizer, checksums.
    pub base: u64,
    /// What the caller takes for a moment now and then: a row that is read, a picture that is decoded.
    pub reserve: u64,
    pub kv: u64,
    pub scratch: u64,
    pub logits: u64,
    /// The vision tower while it runs, and the embeddings it leaves.
    pub vision: u64,
}

impl Charges {
    pub fn total(&self) -> u64 {
        self.base + self.reserve + self.kv + self.scratch + self.logits + self.vision + SLACK_BYTES
    }

    /// The reserve as causes name it, where there is one.
    pub fn reserve_told(&self) -> String {
        match self.reserve {
            0 => String::new(),
            n => format!(
                "reading the longest row or largest picture {}, ",
                human_bytes(n)
            ),
        }
    }

    /// What to ask less of.
    pub fn smaller(&self) -> &'static str {
        let largest = self.kv.max(self.scratch + self.logits).max(self.vision);
        match self.vision {
            _ if self.reserve > largest => {
                "or make the longest row or the largest picture file smaller (--max-pixels changes neither)"
            }
            0 => "or a smaller --context",
            _ => "fewer pictures or --max-frames, a smaller --max-pixels, or a smaller --context",
        }
    }

    /// What is left of `budget` for the pager.
    pub fn left_of(&self, budget: u64) -> Result<u64> {
        budget.checked_sub(self.total()).ok_or_else(|| {
            Error::new(
                Code::Memory,
                format!(
                    "{} of memory is too little before any weight is loaded",
                    human_bytes(budget)
                ),
                format!(
                    "the process takes {}, {}KV {}, activations and logits {}, pictures {}, slack {}",
                    human_bytes(self.base),
                    self.reserve_told(),
                    human_bytes(self.kv),
                    human_bytes(self.scratch + self.logits),
                    human_bytes(self.vision),
                    human_bytes(SLACK_BYTES)
                ),
                format!(
                    "give --cpu-memory more than {}, {}",
                    flag_size(self.total()),
                    self.smaller()
                ),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_size() {
        let m = HostMemory::read();
        assert!(
            m.resident > 0 && m.peak >= m.resident && m.available > 0,
            "{m:?}"
        );
        assert!(m.default_budget() < m.available + m.resident);
    }

    // hazard: cgroup: the smallest limit of the group and its ancestors counts
    #[test]
    fn a_group_and_its_ancestors_are_read_and_cache_is_added_back() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        fs::write(dir.path().join("a/memory.max"), "1000\n").unwrap();
        fs::write(dir.path().join("a/memory.current"), "700\n").unwrap();
        fs::write(dir.path().join("a/memory.stat"), "anon 500\nfile 200\n").unwrap();
        assert_eq!(
            tightest(dir.path(), "/a/b", "memory.max", "memory.current"),
            Some(500)
        );
    }
}
