//! What `tune` found, kept for runs to come: beside the weights, and for the machine that measured it only.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::rates::{kept_path, machine_name};
use super::tune::{Score, Setting, Tuned};
use crate::io::ReaderKind;
use crate::store::record;

/// File names of the records: reading for a CPU and reading for a GPU are tuned apart.
const TUNE_FILE: &str = "tune.json";
const TUNE_GPU_FILE: &str = "tune-gpu.json";
const FORMAT_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct SettingRecord {
    io: String,
    page_size: u64,
    queue_depth: usize,
    prefetch_depth: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ring_frames: Option<usize>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    machine: String,
    /// What computes: processor, instruction set, threads; or the GPU.
    device: String,
    best: SettingRecord,
    /// Time over the default's.
    ratio: f64,
    noise: f64,
    curve: Vec<CurveRecord>,
}

#[derive(Serialize, Deserialize)]
struct CurveRecord {
    #[serde(flatten)]
    setting: SettingRecord,
    ratio: f64,
    runs: usize,
}

impl SettingRecord {
    fn of(s: &Setting) -> SettingRecord {
        SettingRecord {
            io: s.reader.name().to_string(),
            page_size: s.page_bytes,
            queue_depth: s.queue_depth,
            prefetch_depth: s.prefetch_depth,
            ring_frames: s.ring_frames,
        }
    }

    fn setting(&self) -> Option<Setting> {
        let sane = self.page_size.is_power_of_two()
            && (64 << 10..=1 << 30).contains(&self.page_size)
            && (1..=1 << 16).contains(&self.queue_depth)
            && self.prefetch_depth <= 1 << 16
            && self.ring_frames.is_none_or(|n| (1..=1 << 16).contains(&n));
        Some(Setting {
            reader: ReaderKind::ALL
                .into_iter()
                .find(|k| sane && k.name() == self.io)?,
            page_bytes: self.page_size,
            queue_depth: self.queue_depth,
            prefetch_depth: self.prefetch_depth,
            ring_frames: self.ring_frames,
        })
    }
}

/// Where the setting of one model's files is kept.
#[derive(Clone, Debug)]
pub struct KeptSetting {
    /// Beside the weights, then under the user's cache directory, where the folder is not ours to write.
    paths: Vec<PathBuf>,
}

impl KeptSetting {
    /// `folder`: the packed folder, or the source when it is streamed in place (`ours` false).
    /// `on_gpu`: one computes.
    pub fn of(folder: &Path, ours: bool, on_gpu: bool) -> KeptSetting {
        let name = match on_gpu {
            true => TUNE_GPU_FILE,
            false => TUNE_FILE,
        };
        let mut paths = vec![kept_path(folder, false, name)];
        if ours {
            paths.insert(0, kept_path(folder, true, name));
        }
        KeptSetting { paths }
    }

    /// What was measured on this machine, if anything.
    pub fn best(&self) -> Option<Setting> {
        self.record()?.best.setting()
    }

    /// The curve measured on this machine, the fastest first.
    pub fn curve(&self) -> Vec<Score> {
        let record = self.record();
        let rows = record.iter().flat_map(|r| &r.curve);
        let rows = rows.filter(|r| r.ratio.is_finite() && r.ratio > 0.0);
        rows.filter_map(|r| {
            Some(Score {
                setting: r.setting.setting()?,
                ratio: r.ratio,
                runs: r.runs,
            })
        })
        .collect()
    }

    fn record(&self) -> Option<Record> {
        self.paths.iter().find_map(|path| {
            let text = record::read(path)?;
            let record: Record = serde_json::from_str(&text).ok()?;
            let ours = record.version == FORMAT_VERSION && record.machine == machine_name();
            ours.then_some(record)
        })
    }

    /// Keeps what came out, and says where. `None`: it can be written nowhere, which is only a measurement to be made again.
    pub fn keep(&self, tuned: &Tuned, device: &str) -> Option<&Path> {
        let record = Record {
            version: FORMAT_VERSION,
            machine: machine_name(),
            device: device.to_string(),
            best: SettingRecord::of(&tuned.best),
            ratio: tuned.ratio,
            noise: tuned.noise,
            curve: tuned.curve.iter().map(CurveRecord::of).collect(),
        };
        let text = serde_json::to_string_pretty(&record).ok()?;
        let written = |path: &&PathBuf| record::write(path, &text);
        self.paths.iter().find(written).map(PathBuf::as_path)
    }
}

impl CurveRecord {
    fn of(score: &Score) -> CurveRecord {
        CurveRecord {
            setting: SettingRecord::of(&score.setting),
            // JSON has no infinity: a setting that could not run.
            ratio: if score.ratio.is_finite() {
                score.ratio
            } else {
                1e9
            },
            runs: score.runs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_for_this_machine_and_this_version() {
        let dir = tempfile::tempdir().unwrap();
        let kept = KeptSetting {
            paths: vec!["/proc/nowhere/tune.json".into(), dir.path().join(TUNE_FILE)],
        };
        assert_eq!(kept.best(), None);
        let best = Setting {
            reader: ReaderKind::IoUring,
            page_bytes: 1 << 20,
            queue_depth: 128,
            prefetch_depth: 2,
            ring_frames: Some(64),
        };
        let tuned = Tuned {
            best,
            ratio: 0.9,
            noise: 0.01,
            pairs: 7,
            // The second did not fit.
            curve: [0.9, f64::INFINITY]
                .map(|ratio| Score {
                    setting: best,
                    ratio,
                    runs: 3,
                })
                .to_vec(),
        };
        let path = kept.keep(&tuned, "a processor").unwrap().to_path_buf();
        assert_eq!(
            path,
            dir.path().join(TUNE_FILE),
            "the first place cannot be written"
        );
        assert_eq!(kept.best(), Some(tuned.best));
        assert_eq!(kept.curve().len(), tuned.curve.len());
        let text = std::fs::read_to_string(&path).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (pointer, wrong) in [
            ("/machine", serde_json::json!("elsewhere")),
            ("/version", serde_json::json!(2)),
            ("/best/page_size", serde_json::json!(5)),
            ("/best/io", serde_json::json!("telepathy")),
            ("/best/ring_frames", serde_json::json!(0)),
        ] {
            let right = std::mem::replace(json.pointer_mut(pointer).unwrap(), wrong);
            std::fs::write(&path, json.to_string()).unwrap();
            assert_eq!(kept.best(), None, "{pointer}");
            *json.pointer_mut(pointer).unwrap() = right;
        }
        // As records were before there were frames.
        json["best"].as_object_mut().unwrap().remove("ring_frames");
        std::fs::write(&path, json.to_string()).unwrap();
        assert_eq!(kept.best().unwrap().ring_frames, None);
    }
}
