//! The search behind `tune`, and the record it keeps: page size × queue depth × prefetch depth × reader on this machine.
//!
//! Successive halving rather than a full grid: all candidates once, the better half again, and so on. The default setting runs between
//! the others all the time and every time is divided by the default's at that moment, so a disk that drifts fools nobody. What wins is
//! compared with the default once more, in pairs, and kept only where it is better beyond the noise of these pairs.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::rates::{kept_path, machine_name};
use crate::error::Result;
use crate::io::ReaderKind;

/// File name of the record.
pub const TUNE_FILE: &str = "tune.json";
const FORMAT_VERSION: u32 = 1;

/// How units are read ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Setting {
    pub reader: ReaderKind,
    pub page_bytes: u64,
    /// Reads in flight.
    pub queue_depth: usize,
    /// Units ahead of the one computing.
    pub prefetch_depth: usize,
}

/// What is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    pub default: Setting,
    pub readers: Vec<ReaderKind>,
    pub page_bytes: Vec<u64>,
    pub queue_depths: Vec<usize>,
    pub prefetch_depths: Vec<usize>,
    /// Units a pass streams: each step of prefetch depth takes the memory of one of them from the residents, and counts as that much.
    pub streamed_units: usize,
}

/// One setting's standing.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    pub setting: Setting,
    /// Time over the default's, each pair close in time: the median.
    pub ratio: f64,
    pub runs: usize,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// The default, unless another was better beyond the noise.
    pub best: Setting,
    /// Time of `best` over the default's in the closing pairs: median, and the distance within which it could as well be 1.
    pub ratio: f64,
    pub noise: f64,
    pub pairs: usize,
    /// Everything tried, the fastest first.
    pub curve: Vec<Score>,
}

/// Runs between two of the default.
const BETWEEN_DEFAULTS: usize = 5;
/// Pairs in the closing comparison.
const PAIRS: usize = 7;
/// Settings that go on to the prefetch depths.
const FINALISTS: usize = 3;
/// A gain below this is not worth a setting of its own.
const LEAST_GAIN: f64 = 0.02;

/// Runs measured, at most: for a progress bar.
pub fn most_runs(space: &Space) -> usize {
    let mut n = first_candidates(space).len();
    let mut runs = 0;
    let sweep = |n: usize| n + n.div_ceil(BETWEEN_DEFAULTS) + 1;
    while n > FINALISTS {
        runs += sweep(n);
        n = n.div_ceil(2);
    }
    runs + 2 * sweep((FINALISTS + 1) * space.prefetch_depths.len()) + 2 * PAIRS
}

fn first_candidates(space: &Space) -> Vec<Setting> {
    let mut all = Vec::new();
    for &reader in &space.readers {
        for &page_bytes in &space.page_bytes {
            for &queue_depth in &space.queue_depths {
                let setting = Setting {
                    reader,
                    page_bytes,
                    queue_depth,
                    ..space.default
                };
                if setting != space.default {
                    all.push(setting);
                }
            }
        }
    }
    all
}

/// Finds the best setting. `run` gives the seconds of one short run under a setting; the numbers need mean something only next to one
/// another.
///
/// # Errors
/// Those of `run`.
pub fn tune(space: &Space, run: &mut dyn FnMut(&Setting) -> Result<f64>) -> Result<Tuned> {
    let mut trials = Trials {
        default: space.default,
        ratios: Vec::new(),
        sweeps: 0,
    };
    let mut alive = first_candidates(space);
    while alive.len() > FINALISTS {
        trials.sweep(&alive, run)?;
        alive = trials.ranked(&alive);
        alive.truncate(alive.len().div_ceil(2));
    }
    alive = alive
        .iter()
        .chain([&space.default])
        .flat_map(|s| {
            space.prefetch_depths.iter().map(|d| Setting {
                prefetch_depth: *d,
                ..*s
            })
        })
        .filter(|s| *s != space.default)
        .collect();
    trials.sweep(&alive, run)?;
    trials.sweep(&alive, run)?;
    let worth = |s: &Setting| {
        let deeper = s.prefetch_depth as f64 - space.default.prefetch_depth as f64;
        trials.score(s) * (1.0 + deeper.max(0.0) / space.streamed_units.max(1) as f64)
    };
    let best = alive
        .iter()
        .copied()
        .min_by(|a, b| worth(a).total_cmp(&worth(b)))
        .unwrap_or(space.default);
    let price = worth(&best) / trials.score(&best).max(1e-12);
    let (ratio, noise) = closing_pairs(&space.default, &best, run)?;
    let better = ratio * price + noise.max(LEAST_GAIN) < 1.0;
    Ok(Tuned {
        best: if better { best } else { space.default },
        ratio,
        noise,
        pairs: PAIRS,
        curve: trials.curve(),
    })
}

/// Default and challenger in turn: the median of their ratios, and three standard errors.
fn closing_pairs(
    default: &Setting,
    challenger: &Setting,
    run: &mut dyn FnMut(&Setting) -> Result<f64>,
) -> Result<(f64, f64)> {
    let mut ratios = Vec::new();
    for i in 0..PAIRS {
        let (a, b) = if i % 2 == 0 {
            let a = run(default)?;
            (a, run(challenger)?)
        } else {
            let b = run(challenger)?;
            (run(default)?, b)
        };
        ratios.push(b / a.max(1e-12));
    }
    let n = ratios.len() as f64;
    let mean = ratios.iter().sum::<f64>() / n;
    let variance = ratios.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0);
    Ok((median(&mut ratios), 3.0 * (variance / n).sqrt()))
}

struct Trials {
    default: Setting,
    ratios: Vec<(Setting, Vec<f64>)>,
    sweeps: usize,
}

impl Trials {
    /// Each of `settings` once, the default before, between and after them. Every other sweep goes backwards.
    fn sweep(
        &mut self,
        settings: &[Setting],
        run: &mut dyn FnMut(&Setting) -> Result<f64>,
    ) -> Result<()> {
        let mut order = settings.to_vec();
        if self.sweeps % 2 == 1 {
            order.reverse();
        }
        self.sweeps += 1;
        let mut before = run(&self.default)?;
        for group in order.chunks(BETWEEN_DEFAULTS) {
            let times = group.iter().map(&mut *run).collect::<Result<Vec<f64>>>()?;
            let after = run(&self.default)?;
            for (i, (setting, time)) in group.iter().zip(times).enumerate() {
                let at = (i + 1) as f64 / (group.len() + 1) as f64;
                let default = before + (after - before) * at;
                self.record(*setting, time / default.max(1e-12));
            }
            before = after;
        }
        Ok(())
    }

    fn record(&mut self, setting: Setting, ratio: f64) {
        match self.ratios.iter_mut().find(|(s, _)| *s == setting) {
            Some((_, ratios)) => ratios.push(ratio),
            None => self.ratios.push((setting, vec![ratio])),
        }
    }

    fn score(&self, setting: &Setting) -> f64 {
        if *setting == self.default {
            return 1.0;
        }
        let found = self.ratios.iter().find(|(s, _)| s == setting);
        found.map_or(f64::INFINITY, |(_, r)| median(&mut r.clone()))
    }

    fn ranked(&self, settings: &[Setting]) -> Vec<Setting> {
        let mut ranked = settings.to_vec();
        ranked.sort_by(|a, b| self.score(a).total_cmp(&self.score(b)));
        ranked
    }

    fn curve(&self) -> Vec<Score> {
        let mut curve: Vec<Score> = self
            .ratios
            .iter()
            .map(|(setting, ratios)| Score {
                setting: *setting,
                ratio: median(&mut ratios.clone()),
                runs: ratios.len(),
            })
            .collect();
        curve.push(Score {
            setting: self.default,
            ratio: 1.0,
            runs: self.sweeps,
        });
        curve.sort_by(|a, b| a.ratio.total_cmp(&b.ratio));
        curve
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::INFINITY,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

#[derive(Serialize, Deserialize)]
struct SettingRecord {
    io: String,
    page_size: u64,
    queue_depth: usize,
    prefetch_depth: usize,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    machine: String,
    /// What computes: processor, instruction set, threads.
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
        }
    }

    fn setting(&self) -> Option<Setting> {
        let sane = self.page_size.is_power_of_two()
            && (64 << 10..=1 << 30).contains(&self.page_size)
            && (1..=1 << 16).contains(&self.queue_depth)
            && self.prefetch_depth <= 1 << 16;
        Some(Setting {
            reader: ReaderKind::ALL
                .into_iter()
                .find(|k| sane && k.name() == self.io)?,
            page_bytes: self.page_size,
            queue_depth: self.queue_depth,
            prefetch_depth: self.prefetch_depth,
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
    pub fn of(folder: &Path, ours: bool) -> KeptSetting {
        let mut paths = vec![kept_path(folder, false, TUNE_FILE)];
        if ours {
            paths.insert(0, kept_path(folder, true, TUNE_FILE));
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
            let text = std::fs::read_to_string(path).ok()?;
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
        let written = |path: &&PathBuf| {
            path.parent()
                .is_some_and(|dir| std::fs::create_dir_all(dir).is_ok())
                && std::fs::write(path, &text).is_ok()
        };
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

    const DEFAULT: Setting = Setting {
        reader: ReaderKind::IoUring,
        page_bytes: 4 << 20,
        queue_depth: 32,
        prefetch_depth: 1,
    };

    fn space() -> Space {
        Space {
            default: DEFAULT,
            readers: vec![ReaderKind::IoUring, ReaderKind::Threads],
            page_bytes: vec![256 << 10, 1 << 20, 4 << 20, 16 << 20],
            queue_depths: vec![8, 32, 128],
            prefetch_depths: vec![1, 2, 4],
            streamed_units: 33,
        }
    }

    /// A disk with a curve, noise, and a rate that falls by half while it is measured.
    fn measure(curve: impl Fn(&Setting) -> f64, noise: f64, drift: f64) -> (Tuned, usize) {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut runs = 0;
        let tuned = tune(&space(), &mut |s| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let unit = (state >> 33) as f64 / (1u64 << 31) as f64 - 0.5;
            runs += 1;
            Ok(curve(s) * (1.0 + noise * unit) * (1.0 + drift * runs as f64))
        })
        .unwrap();
        (tuned, runs)
    }

    #[test]
    fn a_flat_curve_keeps_the_default_whatever_the_noise() {
        for noise in [0.0, 0.02, 0.1, 0.4] {
            let (tuned, runs) = measure(|_| 1.0, noise, 0.01);
            assert_eq!(
                tuned.best, DEFAULT,
                "{noise}: {} ± {}",
                tuned.ratio, tuned.noise
            );
            assert!(
                runs <= most_runs(&space()),
                "{runs} of {}",
                most_runs(&space())
            );
        }
    }

    #[test]
    fn a_better_setting_is_found_while_the_disk_slows_down() {
        let curve = |s: &Setting| {
            let page = match s.page_bytes >> 20 {
                16 => 0.9,
                1 => 1.05,
                _ => 1.0,
            };
            let queue = if s.queue_depth >= 128 { 0.85 } else { 1.0 };
            let reader = if s.reader == ReaderKind::Threads {
                1.2
            } else {
                1.0
            };
            page * queue * reader
        };
        let (tuned, _) = measure(curve, 0.03, 0.02);
        assert_eq!(tuned.best.reader, ReaderKind::IoUring);
        assert_eq!(
            (tuned.best.page_bytes, tuned.best.queue_depth),
            (16 << 20, 128)
        );
        assert!(
            tuned.ratio < 0.85 && tuned.curve[0].ratio < 0.9,
            "{tuned:?}"
        );
        assert!(
            tuned
                .curve
                .iter()
                .any(|s| s.setting == DEFAULT && s.ratio == 1.0)
        );
    }

    #[test]
    fn a_deeper_prefetch_must_earn_the_memory_it_takes() {
        let gain = |by: f64| {
            let curve = move |s: &Setting| if s.prefetch_depth == 4 { by } else { 1.0 };
            measure(curve, 0.0, 0.0).0.best.prefetch_depth
        };
        // Three units of 33 stay on disk for it: nine percent.
        assert_eq!(gain(0.95), 1);
        assert_eq!(gain(0.8), 4);
    }

    #[test]
    fn the_record_is_for_this_machine_and_this_version() {
        let dir = tempfile::tempdir().unwrap();
        let kept = KeptSetting {
            paths: vec!["/proc/nowhere/tune.json".into(), dir.path().join(TUNE_FILE)],
        };
        assert_eq!(kept.best(), None);
        let (tuned, _) = measure(|s| 1.0 / s.queue_depth as f64, 0.0, 0.0);
        let path = kept.keep(&tuned, "a processor").unwrap().to_path_buf();
        assert_eq!(
            path,
            dir.path().join(TUNE_FILE),
            "the first place cannot be written"
        );
        assert_eq!(kept.best(), Some(tuned.best));
        assert_eq!(tuned.best.queue_depth, 128);
        assert_eq!(kept.curve().len(), tuned.curve.len());
        let text = std::fs::read_to_string(&path).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (pointer, wrong) in [
            ("/machine", serde_json::json!("elsewhere")),
            ("/version", serde_json::json!(2)),
            ("/best/page_size", serde_json::json!(5)),
            ("/best/io", serde_json::json!("telepathy")),
        ] {
            let right = std::mem::replace(json.pointer_mut(pointer).unwrap(), wrong);
            std::fs::write(&path, json.to_string()).unwrap();
            assert_eq!(kept.best(), None, "{pointer}");
            *json.pointer_mut(pointer).unwrap() = right;
        }
    }
}
