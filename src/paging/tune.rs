//! The search behind `tune`: page size × queue depth × prefetch depth × reader on this machine, and frames in flight where a GPU computes.
//!
//! Successive halving rather than a full grid: all candidates once, the better half again, and so on. The default setting runs between
//! the others all the time and every time is divided by the default's at that moment, so a disk that drifts fools nobody. What wins is
//! compared with the default once more, in pairs, and kept only where it is better beyond the noise of these pairs.

use std::fmt;

use super::plan::{Frames, Ring};
use crate::error::Result;
use crate::io::ReaderKind;
use crate::units::flag_size;

/// How units are read ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Setting {
    pub reader: ReaderKind,
    pub page_bytes: u64,
    /// Reads in flight.
    pub queue_depth: usize,
    /// Units ahead of the one computing.
    pub prefetch_depth: usize,
    /// Pinned frames of a page each, through which all goes to a GPU; `None`: as many as [`RING_BYTES`] hold. Nothing on a CPU.
    pub ring_frames: Option<usize>,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} × {}, prefetch {}",
            self.reader.name(),
            flag_size(self.page_bytes),
            self.queue_depth,
            self.prefetch_depth
        )?;
        match self.ring_frames {
            Some(n) => write!(f, ", {n} frames"),
            None => Ok(()),
        }
    }
}

/// What is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    pub default: Setting,
    pub readers: Vec<ReaderKind>,
    pub page_bytes: Vec<u64>,
    pub queue_depths: Vec<usize>,
    pub prefetch_depths: Vec<usize>,
    /// `[None]` where the CPU computes.
    pub ring_frames: Vec<Option<usize>>,
    /// Units a pass streams, and bytes of the largest: each step of prefetch depth takes the memory of one of them from the residents, and
    /// counts as that much; so do pinned frames beyond those of the default.
    pub streamed_units: usize,
    pub unit_bytes: u64,
}

impl Space {
    /// Units that must stay on disk for it, beyond those of the default.
    fn units_taken(&self, s: &Setting) -> f64 {
        let deeper = s.prefetch_depth.saturating_sub(self.default.prefetch_depth);
        let ring = |s: &Setting| {
            let frames = Frames {
                page_bytes: s.page_bytes,
                count: s.ring_frames,
            };
            Ring::of_largest(self.unit_bytes, frames).bytes()
        };
        let pinned = ring(s).saturating_sub(ring(&self.default));
        deeper as f64 + pinned as f64 / self.unit_bytes.max(1) as f64
    }
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
    /// Time of the best other setting over the default's in the closing pairs: median, and the distance within which it could as well be 1.
    pub ratio: f64,
    pub noise: f64,
    /// 0 where no other setting could be run: then the ratio is 1.
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
                for &ring_frames in &space.ring_frames {
                    let setting = Setting {
                        reader,
                        page_bytes,
                        // Each read has a frame of its own: fewer of these are fewer reads in flight.
                        queue_depth: queue_depth.min(ring_frames.unwrap_or(usize::MAX)),
                        ring_frames,
                        ..space.default
                    };
                    if setting != space.default && !all.contains(&setting) {
                        all.push(setting);
                    }
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
        trials.score(s) * (1.0 + space.units_taken(s) / space.streamed_units.max(1) as f64)
    };
    let mut tuned = Tuned {
        best: space.default,
        ratio: 1.0,
        noise: 0.0,
        pairs: 0,
        curve: trials.curve(),
    };
    // What does not fit takes for ever.
    let fitting = alive.iter().filter(|s| worth(s).is_finite());
    let Some(best) = fitting.min_by(|a, b| worth(a).total_cmp(&worth(b))) else {
        return Ok(tuned);
    };
    let price = worth(best) / trials.score(best).max(1e-12);
    if let Some((ratio, noise)) = closing_pairs(&space.default, best, run)? {
        if ratio * price + noise.max(LEAST_GAIN) < 1.0 {
            tuned.best = *best;
        }
        (tuned.ratio, tuned.noise, tuned.pairs) = (ratio, noise, PAIRS);
    }
    Ok(tuned)
}

/// Default and challenger in turn: the median of their ratios, and three standard errors. `None`: the challenger no longer fits.
fn closing_pairs(
    default: &Setting,
    challenger: &Setting,
    run: &mut dyn FnMut(&Setting) -> Result<f64>,
) -> Result<Option<(f64, f64)>> {
    let mut ratios = Vec::new();
    for i in 0..PAIRS {
        let (a, b) = if i % 2 == 0 {
            let a = run(default)?;
            (a, run(challenger)?)
        } else {
            let b = run(challenger)?;
            (run(default)?, b)
        };
        if b.is_infinite() {
            return Ok(None);
        }
        ratios.push(b / a.max(1e-12));
    }
    let n = ratios.len() as f64;
    let mean = ratios.iter().sum::<f64>() / n;
    let variance = ratios.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0);
    Ok(Some((median(&mut ratios), 3.0 * (variance / n).sqrt())))
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

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Setting = Setting {
        reader: ReaderKind::IoUring,
        page_bytes: 4 << 20,
        queue_depth: 32,
        prefetch_depth: 1,
        ring_frames: None,
    };

    fn space() -> Space {
        Space {
            default: DEFAULT,
            readers: vec![ReaderKind::IoUring, ReaderKind::Threads],
            page_bytes: vec![256 << 10, 1 << 20, 4 << 20, 16 << 20],
            queue_depths: vec![8, 32, 128],
            prefetch_depths: vec![1, 2, 4],
            ring_frames: vec![None],
            streamed_units: 33,
            unit_bytes: 100 << 20,
        }
    }

    /// A disk with a curve, noise, and a rate that falls by half while it is measured.
    fn measure(curve: impl Fn(&Setting) -> f64, noise: f64, drift: f64) -> (Tuned, usize) {
        measure_in(&space(), curve, noise, drift)
    }

    fn measure_in(
        space: &Space,
        curve: impl Fn(&Setting) -> f64,
        noise: f64,
        drift: f64,
    ) -> (Tuned, usize) {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut runs = 0;
        let tuned = tune(space, &mut |s| {
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

    /// Nothing but the default fits, or what wins fits no longer when it is compared once more.
    #[test]
    fn what_does_not_fit_is_not_compared() {
        let only_default = |s: &Setting| match *s == DEFAULT {
            true => 1.0,
            false => f64::INFINITY,
        };
        let (tuned, _) = measure(only_default, 0.1, 0.01);
        assert_eq!((tuned.best, tuned.pairs), (DEFAULT, 0));
        assert_eq!((tuned.ratio, tuned.noise), (1.0, 0.0));
        let runs = std::cell::Cell::new(0);
        let until = |last: usize| {
            runs.set(0);
            let curve = |s: &Setting| {
                runs.set(runs.get() + 1);
                match (*s == DEFAULT, runs.get() > last) {
                    (true, _) => 1.0,
                    (false, false) => 0.5,
                    (false, true) => f64::INFINITY,
                }
            };
            (measure(curve, 0.0, 0.0).0, runs.get())
        };
        let (always, all) = until(usize::MAX);
        assert!(always.best != DEFAULT && always.pairs == PAIRS);
        let (tuned, _) = until(all - 4);
        assert_eq!((tuned.best, tuned.pairs), (DEFAULT, 0), "{tuned:?}");
    }

    #[test]
    fn frames_in_flight_are_tried_where_a_gpu_computes() {
        let gpu = Space {
            ring_frames: vec![None, Some(32)],
            ..space()
        };
        // 128 reads need 128 frames: with 32 they are 32 reads.
        let tried = first_candidates(&gpu);
        assert_eq!(tried.len(), 2 * 4 * 5 - 1);
        let frames = |s: &Setting| s.ring_frames.unwrap_or(usize::MAX);
        assert!(tried.iter().all(|s| s.queue_depth <= frames(s)));
        let few = |s: &Setting| if s.ring_frames == Some(32) { 0.8 } else { 1.0 };
        let (tuned, runs) = measure_in(&gpu, few, 0.02, 0.01);
        assert_eq!(tuned.best.ring_frames, Some(32), "{tuned:?}");
        assert!(runs <= most_runs(&gpu));
        assert!(tuned.best.to_string().ends_with(", 32 frames"));
        let (tuned, _) = measure_in(&gpu, |_| 1.0, 0.1, 0.01);
        assert_eq!(tuned.best, DEFAULT);
        // 512 MiB of frames where the default has 256: in place of nine tenths of a unit of ten, nine percent.
        let costly = |by: f64| {
            let gpu = Space {
                page_bytes: vec![4 << 20, 16 << 20],
                unit_bytes: 300 << 20,
                streamed_units: 10,
                ..gpu.clone()
            };
            let much = move |s: &Setting| match (s.ring_frames, s.page_bytes >> 20) {
                (Some(32), 16) => by,
                _ => 1.0,
            };
            measure_in(&gpu, much, 0.0, 0.0).0.best.ring_frames
        };
        assert_eq!((costly(0.95), costly(0.8)), (None, Some(32)));
    }
}
