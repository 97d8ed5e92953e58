//! The best rates any setting ever reached on a folder and this machine, of the disk and of copies to the GPU: what "share of the bound" is
//! a share of.
//!
//! Kept beside the weights where the folder is ours, else under the user's cache directory. A run never lowers it: the
//! bound must not follow a slow run down.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::strategy::TierRates;
use crate::error::Result;
use crate::io::{ReaderKind, Sweep, sweep};
use crate::store::record;

/// File name of the record.
pub const RATES_FILE: &str = "rates.json";

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Record {
    machine: String,
    disk_gb_per_s: f64,
    /// What the last pass that waited for the disk got out of it.
    #[serde(default)]
    streamed_gb_per_s: Option<f64>,
    #[serde(default)]
    h2d: Option<CopyRate>,
}

/// From pinned memory to a GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyRate {
    /// As the device describes itself.
    pub gpu: String,
    pub gb_per_s: f64,
}

/// What is known of a machine by which units are placed, 10⁹ bytes a second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KnownRates {
    pub disk_gb_per_s: Option<f64>,
    pub h2d: Option<CopyRate>,
}

impl KnownRates {
    /// The same for the GPU that describes itself so: a rate of another's copies is none, what was `measured` now stands in for one.
    pub fn on(&self, gpu: &str, measured: Option<f64>) -> KnownRates {
        let measured = || {
            measured.map(|gb_per_s| CopyRate {
                gpu: gpu.to_string(),
                gb_per_s,
            })
        };
        KnownRates {
            h2d: self.h2d.clone().filter(|h| h.gpu == gpu).or_else(measured),
            ..*self
        }
    }

    /// As the planner weighs them; a usual machine's where nothing is known.
    pub fn tiers(&self) -> TierRates {
        let usual = TierRates::default();
        let h2d = self.h2d.as_ref().map(|h| h.gb_per_s);
        TierRates {
            disk_gb_per_s: self.disk_gb_per_s.unwrap_or(usual.disk_gb_per_s),
            h2d_gb_per_s: h2d.unwrap_or(usual.h2d_gb_per_s),
        }
    }
}

/// 10⁹ bytes or operations a second that a machine may have: a record in a pack may come from anybody, and a pass is predicted from it.
pub(super) fn sane_rate(rate: f64) -> bool {
    (1e-9..=1e9).contains(&rate)
}

/// Where the record of one model's files lies.
#[derive(Clone, Debug)]
pub struct DiskRates {
    path: PathBuf,
}

impl DiskRates {
    /// `folder`: the packed folder, or the source when it is streamed in place (`ours` false).
    pub fn of(folder: &Path, ours: bool) -> DiskRates {
        DiskRates {
            path: kept_path(folder, ours, RATES_FILE),
        }
    }

    /// For a folder that goes away.
    pub fn forget(&self) {
        let _ = std::fs::remove_file(&self.path);
    }

    fn record(&self) -> Option<Record> {
        let text = record::read(&self.path)?;
        let record: Record = serde_json::from_str(&text).ok()?;
        (record.machine == machine_name()).then_some(record)
    }

    /// The best rate on record for this machine, 10⁹ bytes a second.
    pub fn best(&self) -> Option<f64> {
        Some(self.record()?.disk_gb_per_s).filter(|r| sane_rate(*r))
    }

    /// What the engine itself last read at, with computing and verifying beside it: what a pass is predicted from.
    pub fn streamed(&self) -> Option<f64> {
        self.record()?.streamed_gb_per_s.filter(|r| sane_rate(*r))
    }

    /// Keeps `rate` if it beats what is known. A record that cannot be written is only a figure less, never an error.
    pub fn raise(&self, rate: f64) {
        if rate.is_finite() && rate > self.best().unwrap_or(0.0) {
            self.keep(|r| r.disk_gb_per_s = rate);
        }
    }

    /// Keeps what passes that waited for the disk read at; it counts for the best rate too.
    pub fn ran_at(&self, rate: f64) {
        if rate.is_finite() && rate > 0.0 {
            self.keep(|r| {
                let best = Some(r.disk_gb_per_s).filter(|r| sane_rate(*r));
                r.disk_gb_per_s = best.map_or(rate, |best| best.max(rate));
                r.streamed_gb_per_s = Some(rate);
            });
        }
    }

    /// The best rate from pinned memory to the GPU of this machine last opened, 10⁹ bytes a second.
    pub fn h2d(&self) -> Option<f64> {
        Some(self.record()?.h2d?.gb_per_s).filter(|r| sane_rate(*r))
    }

    /// As [`DiskRates::h2d`], to this GPU.
    pub fn h2d_to(&self, gpu: &str) -> Option<f64> {
        let record = self.record()?.h2d.filter(|h| h.gpu == gpu)?;
        Some(record.gb_per_s).filter(|r| sane_rate(*r))
    }

    /// What units are placed by, for `plan` and for runs alike. What runs read at comes before the best.
    pub fn known(&self) -> KnownRates {
        KnownRates {
            disk_gb_per_s: self.streamed().or_else(|| self.best()),
            h2d: self
                .record()
                .and_then(|r| r.h2d)
                .filter(|h| sane_rate(h.gb_per_s)),
        }
    }

    /// Keeps the rate of copies to `gpu` if it beats what is known of that one.
    pub fn raise_h2d(&self, gpu: &str, rate: f64) {
        if rate.is_finite() && rate > self.h2d_to(gpu).unwrap_or(0.0) {
            self.keep(|r| {
                r.h2d = Some(CopyRate {
                    gpu: gpu.to_string(),
                    gb_per_s: rate,
                });
            });
        }
    }

    fn keep(&self, change: impl FnOnce(&mut Record)) {
        let mut record = self.record().unwrap_or_else(|| Record {
            machine: machine_name(),
            ..Record::default()
        });
        change(&mut record);
        self.write(&record);
    }

    fn write(&self, record: &Record) {
        if let Ok(text) = serde_json::to_string(record) {
            record::write(&self.path, &text);
        }
    }

    /// The best known rate, measured now (about a second) when none is, with at most `room` bytes of memory. Without room
    /// for a few reads there is nothing worth measuring.
    pub fn best_or_probe(&self, files: &[PathBuf], room: u64) -> Result<Option<f64>> {
        if let Some(rate) = self.best() {
            return Ok(Some(rate));
        }
        let Some((block_bytes, depths)) = probe_settings(room) else {
            return Ok(None);
        };
        let rows = sweep(
            &Sweep {
                files: files.to_vec(),
                kinds: vec![ReaderKind::Auto],
                block_bytes,
                depths,
                each: Duration::from_millis(300),
                cancel: Arc::default(),
            },
            &mut |_| {},
        )?;
        let best = rows
            .iter()
            .filter(|r| r.direct)
            .map(|r| r.gb_per_s)
            .fold(0.0, f64::max);
        if best == 0.0 {
            return Ok(None);
        }
        self.raise(best);
        Ok(Some(best))
    }
}

/// Block sizes and depths whose largest product fits in `room`.
fn probe_settings(room: u64) -> Option<(Vec<usize>, Vec<usize>)> {
    let deepest = 32;
    if room < deepest * (128 << 10) {
        return None;
    }
    let largest = 1 << (room / deepest).min(4 << 20).ilog2();
    let smaller = if largest > 1 << 20 {
        largest >> 2
    } else {
        largest >> 1
    };
    Some((vec![smaller, largest], vec![8, deepest as usize]))
}

/// Where a record on one model's files lies: beside them, or under the user's cache directory where the folder is not ours to write.
pub(super) fn kept_path(folder: &Path, ours: bool, name: &str) -> PathBuf {
    if ours {
        return folder.join(name);
    }
    let key = twox_hash::XxHash3_64::oneshot(folder.as_os_str().as_encoded_bytes());
    let stem = name.strip_suffix(".json").unwrap_or(name);
    cache_dir().join(format!("{stem}-{key:016x}.json"))
}

/// This machine, as records name it: kernel's machine id, else the host's name.
pub fn machine_name() -> String {
    ["/etc/machine-id", "/proc/sys/kernel/hostname"]
        .iter()
        .find_map(|p| {
            let text = std::fs::read_to_string(p).ok()?;
            let text = text.trim();
            (!text.is_empty()).then(|| text.to_string())
        })
        .unwrap_or_default()
}

/// Where records go that have no folder of ours to lie in.
#[cfg(not(test))]
pub fn cache_dir() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|h| Path::new(&h).join(".cache"));
    std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .unwrap_or_else(std::env::temp_dir)
        .join("tensorpager")
}

/// Each test, a thread of its own, finds nothing there, and what it keeps goes with it.
#[cfg(test)]
pub fn cache_dir() -> PathBuf {
    thread_local!(static CACHE: tempfile::TempDir = tempfile::tempdir().unwrap());
    CACHE.with(|cache| cache.path().to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_keeps_within_its_room() {
        assert_eq!(probe_settings(3 << 20), None);
        for room in [4 << 20, 5 << 20, 33 << 20, 127 << 20, 128 << 20, u64::MAX] {
            let (blocks, depths) = probe_settings(room).unwrap();
            let most = blocks.iter().max().unwrap() * depths.iter().max().unwrap();
            assert!(
                most as u64 <= room && blocks.iter().all(|b| b % 4096 == 0),
                "{room} {blocks:?}"
            );
        }
        assert_eq!(
            probe_settings(u64::MAX),
            Some((vec![1 << 20, 4 << 20], vec![8, 32]))
        );
    }

    #[test]
    fn a_slower_rate_never_replaces_a_faster_one() {
        let dir = tempfile::tempdir().unwrap();
        let rates = DiskRates::of(dir.path(), true);
        assert_eq!(rates.best(), None);
        rates.raise(2.0);
        rates.raise(1.0);
        rates.raise(f64::NAN);
        assert_eq!(rates.best(), Some(2.0));
        rates.raise(3.0);
        assert_eq!(rates.best(), Some(3.0));
        assert_eq!(rates.streamed(), None);
        rates.ran_at(2.5);
        assert_eq!((rates.best(), rates.streamed()), (Some(3.0), Some(2.5)));
        rates.ran_at(3.5);
        rates.raise(4.0);
        assert_eq!((rates.best(), rates.streamed()), (Some(4.0), Some(3.5)));
        rates.raise_h2d("a GPU", 20.0);
        rates.raise_h2d("a GPU", 10.0);
        assert_eq!(rates.h2d(), Some(20.0));
        // Another GPU has a rate of its own.
        rates.raise_h2d("another", 12.0);
        assert_eq!((rates.h2d(), rates.best()), (Some(12.0), Some(4.0)));
        assert_eq!(rates.h2d_to("another"), Some(12.0));
        assert_eq!(rates.h2d_to("a GPU"), None);
        let known = rates.known();
        let tiers = |k: &KnownRates| {
            let t = k.tiers();
            (t.disk_gb_per_s, t.h2d_gb_per_s)
        };
        // What runs read at, and the copies of the GPU that is there; measured ones only where none are known.
        assert_eq!(tiers(&known.on("another", Some(30.0))), (3.5, 12.0));
        assert_eq!(tiers(&known.on("a GPU", Some(30.0))), (3.5, 30.0));
        let usual = TierRates::default().h2d_gb_per_s;
        assert_eq!(tiers(&known.on("a GPU", None)), (3.5, usual));
    }
}
