//! How fast this machine multiplies, its CPU or a GPU: measured once, kept in the user's cache.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::busy::Turns;
use super::predict::ComputeRates;
use super::rates::{cache_dir, machine_name, sane_rate};
use crate::device::cuda::{Copier, CudaDevice, Piece, Slot, Ticks};
use crate::device::{Acts, Device, Into, Rows, WeightView};
use crate::error::{Code, Error, Result};
use crate::store::record;
use crate::units::Dtype;

/// Rows measured: one sequence, a few, and enough that arithmetic decides.
const ROWS: [usize; 4] = [1, 8, 64, 256];
/// Weights multiplied: more than a last-level cache holds, so that one row meets the memory.
const WEIGHT_BYTES: usize = 160 << 20;
/// With less there is nothing to measure.
const LEAST_BYTES: usize = 1 << 20;
const COLS: usize = 3584;
/// What a product of the most rows takes besides its weights.
const PRODUCT_BYTES: usize = 16 << 20;
/// The matrix is walked in pieces like a layer's tensors are.
const PIECES: usize = 4;
const TIME_EACH: Duration = Duration::from_millis(250);
/// One row with all weights takes no longer, or fewer weights are taken: an emulated GPU would be measured for minutes.
const SLOWEST: Duration = Duration::from_millis(100);
/// Products are timed in runs of about this: a GPU is given work and waited for in a tenth of a millisecond, which is not its rate.
const RUN: Duration = Duration::from_millis(2);
const MOST_REPEATS: usize = 64;

/// How much faster than its record a machine must be seen before the record is doubted.
const BEATEN_BY: f64 = 1.1;
/// A measurement that waited for cores longer than this part of its time says nothing of the machine.
const MOST_LOST: f64 = 0.1;
/// Records of CPUs before this one did not know whether the machine had been busy.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Record {
    #[serde(default)]
    version: u32,
    machine: String,
    device: String,
    dtype: Dtype,
    #[serde(default)]
    rates: Option<ComputeRates>,
    /// What runs of one row a pass last took on a GPU, everything that a layer computes included, nanoseconds per byte of weights.
    #[serde(default)]
    ran_ns_per_byte: Option<f64>,
}

/// What a device multiplies at.
#[derive(Clone, Debug, PartialEq)]
pub struct AskedCompute {
    pub rates: ComputeRates,
    /// Measured now on a busy CPU, and not kept: the part of the time that it waited for a core.
    pub lost: Option<f64>,
}

/// The record of this machine's products in one weight type.
#[derive(Clone, Debug)]
pub struct KeptCompute {
    path: PathBuf,
    device: String,
    dtype: Dtype,
    /// Records from before this version say nothing of it.
    oldest: u32,
}

impl KeptCompute {
    pub fn of(device: &Device, dtype: Dtype) -> KeptCompute {
        KeptCompute::within(cache_dir(), device, dtype)
    }

    fn within(dir: PathBuf, device: &Device, dtype: Dtype) -> KeptCompute {
        // A GPU was never slower for what the host does.
        let oldest = device.as_cuda().map_or(VERSION, |_| 0);
        let device = device.describe();
        let key = twox_hash::XxHash3_64::oneshot(device.as_bytes());
        KeptCompute {
            path: dir.join(format!("compute-{}-{key:016x}.json", dtype.name())),
            device,
            dtype,
            oldest,
        }
    }

    /// The record of that name in `dir`, of a device that is called so too.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn named(name: &str, dir: &std::path::Path) -> KeptCompute {
        KeptCompute {
            path: dir.join(name),
            device: name.to_string(),
            dtype: Dtype::BF16,
            oldest: VERSION,
        }
    }

    fn record(&self) -> Option<Record> {
        let record: Record = serde_json::from_str(&record::read(&self.path)?).ok()?;
        let ours = (self.oldest..=VERSION).contains(&record.version)
            && record.machine == machine_name()
            && record.device == self.device
            && record.dtype == self.dtype;
        ours.then_some(record)
    }

    fn keep(&self, change: impl FnOnce(&mut Record)) {
        let mut record = self.record().unwrap_or_else(|| Record {
            version: VERSION,
            machine: machine_name(),
            device: self.device.clone(),
            dtype: self.dtype,
            rates: None,
            ran_ns_per_byte: None,
        });
        change(&mut record);
        // A record that cannot be kept costs a second next time, no more.
        if let Ok(text) = serde_json::to_string(&record) {
            record::write(&self.path, &text);
        }
    }

    /// What was measured before on this machine with these threads, or with this GPU.
    pub fn known(&self) -> Option<ComputeRates> {
        let record = self.record()?;
        let rates = record.rates.filter(ComputeRates::makes_sense)?;
        Some(match record.ran_ns_per_byte {
            Some(ran) if sane_rate(1.0 / ran) => rates.with_one_row(ran),
            _ => rates,
        })
    }

    /// A run multiplied one row at this rate on a CPU. A record it beats clearly was taken while the machine was slow in a way that nobody
    /// counts (its host's other guests on the same memory): it is given up, and the next who asks measures anew. Everything a pass computes
    /// counts as multiplying, so a run never flatters itself.
    pub fn ran_at(&self, memory_gb_per_s: f64) {
        let beaten = |known: ComputeRates| memory_gb_per_s > known.memory_gb_per_s * BEATEN_BY;
        if self.known().is_some_and(beaten) {
            // One that cannot be removed is only a worse prediction.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// As [`KeptCompute::ran_at`], on a GPU, whose own clock timed it: kept as it is, since a layer there is much more than its products
    /// (a launch each of a dozen kernels) and nothing else computes beside it.
    pub fn ran_on_gpu_at(&self, memory_gb_per_s: f64) {
        if memory_gb_per_s.is_finite() && memory_gb_per_s > 0.0 {
            self.keep(|r| r.ran_ns_per_byte = Some(1.0 / memory_gb_per_s));
        }
    }

    /// What is known, else measured now: about a second, and [`WEIGHT_BYTES`] of the device's memory for that long. A CPU is measured within
    /// about `room` bytes, though never with less than a few megabytes; fewer weights than usual may lie in a cache, and what they are
    /// multiplied at is not kept. Nor is what a busy CPU gave: whoever asks next measures again, until it is quiet.
    ///
    /// # Errors
    /// `Memory`: a GPU without room for anything to measure; those of the device.
    pub fn known_or_measured(&self, device: &Device, room: u64) -> Result<AskedCompute> {
        if let Some(rates) = self.known() {
            return Ok(AskedCompute { rates, lost: None });
        }
        let on_host = device.as_cuda().is_none();
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let bytes = match on_host {
            true => WEIGHT_BYTES.min(room.saturating_sub(PRODUCT_BYTES).max(LEAST_BYTES)),
            false => WEIGHT_BYTES,
        };
        let before = Turns::now(device.threads());
        let measured = measure(device, self.dtype, bytes, TIME_EACH)?;
        let lost = Turns::now(device.threads()).lost_since(&before);
        // A GPU is not slower for what the host does.
        let lost = Some(lost).filter(|l| on_host && *l > MOST_LOST);
        Ok(self.asked(measured, lost, bytes == WEIGHT_BYTES))
    }

    /// Keeps what was `measured`, with all weights and on a quiet machine. What somebody else kept meanwhile goes before what a busy one gave.
    fn asked(&self, measured: ComputeRates, lost: Option<f64>, all: bool) -> AskedCompute {
        if all && lost.is_none() {
            self.keep(|r| r.rates = Some(measured.clone()));
        }
        let known = self.known().filter(|_| all);
        AskedCompute {
            lost: lost.filter(|_| known.is_none()),
            rates: known.unwrap_or(measured),
        }
    }
}

/// Weights in the device's memory. Small finite values of any type: what they are does not matter, that they are no zeros' page does.
enum Weights {
    Host(Vec<u8>),
    Gpu(Slot),
}

impl Weights {
    fn new(device: &Device, dtype: Dtype, bytes: usize) -> Result<Weights> {
        let one: &[u8] = match dtype {
            Dtype::BF16 => &[0x00, 0x3c],
            Dtype::F16 => &[0x00, 0x1c],
            Dtype::F32 => &[0x00, 0x00, 0x00, 0x3c],
        };
        let pattern = |bytes| one.iter().copied().cycle().take(bytes).collect();
        match device.as_cuda() {
            None => Ok(Weights::Host(pattern(bytes))),
            Some(gpu) => Weights::on_gpu(gpu, pattern(bytes.min(LEAST_BYTES)), bytes),
        }
    }

    /// `pattern` again and again.
    fn on_gpu(gpu: &CudaDevice, pattern: Vec<u8>, bytes: usize) -> Result<Weights> {
        let context = gpu.context();
        let mut copier = Copier::new(context, 1)?;
        copier.bind()?;
        let mut slot = Slot::new(context, bytes as u64, "weights to measure products with")?;
        let pieces: Vec<Piece> = (0..bytes)
            .step_by(pattern.len())
            .map(|to| Piece {
                from: 0,
                to,
                bytes: pattern.len().min(bytes - to),
            })
            .collect();
        copier.begin(&mut slot)?;
        copier.send(pattern, &pieces, &slot)?;
        copier.finish(&mut slot)?;
        copier.reclaim(true)?;
        gpu.compute().acquire(&mut slot, &Ticks::new(context)?)?;
        Ok(Weights::Gpu(slot))
    }

    fn view(&self, dtype: Dtype, rows: usize) -> WeightView<'_> {
        match self {
            Weights::Host(bytes) => WeightView::packed(dtype, rows, COLS, bytes),
            Weights::Gpu(slot) => WeightView {
                dtype,
                rows,
                cols: COLS,
                row_stride: COLS * dtype.bytes(),
                data: slot.bytes(),
            },
        }
    }
}

/// Products of a number of rows with all weights.
struct Products<'w> {
    whole: WeightView<'w>,
    rows: usize,
    acts: Acts,
    out: Rows,
}

impl<'w> Products<'w> {
    fn new(device: &Device, whole: WeightView<'w>, rows: usize) -> Result<Products<'w>> {
        let x = device.rows(rows, COLS)?;
        let mut acts = device.acts(rows, COLS, whole.dtype)?;
        device.rmsnorm(&x, 0, rows, &whole.slice_rows(0, 1), 1e-6, &mut acts)?;
        Ok(Products {
            out: device.rows(rows, whole.rows.div_ceil(PIECES))?,
            whole,
            rows,
            acts,
        })
    }

    /// Seconds for all weights once, in a run of `repeats`.
    fn time(&mut self, device: &Device, repeats: usize) -> Result<f64> {
        let piece = self.whole.rows.div_ceil(PIECES);
        let begin = Instant::now();
        for _ in 0..repeats {
            for first in (0..self.whole.rows).step_by(piece) {
                let n = piece.min(self.whole.rows - first);
                device.reshape(&mut self.out, n);
                device.linear(
                    &self.acts,
                    self.rows,
                    &self.whole.slice_rows(first, n),
                    None,
                    &mut self.out,
                    0,
                    Into::Store,
                )?;
            }
        }
        device.synchronize()?;
        Ok(begin.elapsed().as_secs_f64() / repeats as f64)
    }

    /// The median of runs for `each`; one where that takes longer than a few times `each`.
    fn median(&mut self, device: &Device, each: Duration) -> Result<f64> {
        let warm = self.time(device, 1)?;
        let repeats = ((RUN.as_secs_f64() / warm.max(1e-9)) as usize).clamp(1, MOST_REPEATS);
        let mut times = Vec::new();
        let started = Instant::now();
        let wanted = |n: usize| match started.elapsed() {
            spent if spent > 4 * each => n == 0,
            spent => n < 3 || (spent < each && n < 64),
        };
        while wanted(times.len()) {
            times.push(self.time(device, repeats)?);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

/// Bytes of weights to measure with: `most`, or what the device has room for, or multiplies in a bearable time.
fn affordable(device: &Device, dtype: Dtype, most: usize) -> Result<usize> {
    let left = match device.as_cuda() {
        None => most,
        Some(gpu) => (gpu.left() / 2).min(most as u64) as usize,
    };
    if left < LEAST_BYTES.min(most) {
        return Err(Error::new(
            Code::Memory,
            "there is no GPU memory to measure products with",
            format!("{left} bytes are left beside the driver's context and the kernels"),
            "give a larger --gpu-memory",
        ));
    }
    let few = LEAST_BYTES.min(left);
    let weights = Weights::new(device, dtype, few)?;
    let rows = few / (COLS * dtype.bytes());
    let mut products = Products::new(device, weights.view(dtype, rows.max(1)), 1)?;
    products.time(device, 1)?;
    let all_s = products.time(device, 1)? * left as f64 / few as f64;
    let share = (SLOWEST.as_secs_f64() / all_s.max(1e-9)).min(1.0);
    Ok(((left as f64 * share) as usize).clamp(few / 16, left))
}

/// Times products of a few numbers of rows with `bytes` of weights, or fewer; the median of each.
fn measure(device: &Device, dtype: Dtype, bytes: usize, each: Duration) -> Result<ComputeRates> {
    let bytes = affordable(device, dtype, bytes)?;
    let out_rows = (bytes / (COLS * dtype.bytes())).max(1);
    let bytes = out_rows * COLS * dtype.bytes();
    let weights = Weights::new(device, dtype, bytes)?;
    let mut points = Vec::new();
    for rows in ROWS {
        let mut products = Products::new(device, weights.view(dtype, out_rows), rows)?;
        let seconds = products.median(device, each)?;
        points.push((rows, seconds * 1e9 / bytes as f64));
    }
    let one_row = points[0].1;
    let (rows, many) = points[points.len() - 1];
    Ok(ComputeRates {
        memory_gb_per_s: 1.0 / one_row,
        // ns per byte → operations per ns
        gflops: 2.0 * rows as f64 / dtype.bytes() as f64 / many,
        element_bytes: dtype.bytes() as f64,
        points,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_kept_for_this_machine_only() {
        let dir = tempfile::tempdir().unwrap();
        let device = Device::cpu(Some(1), None).unwrap();
        let kept = KeptCompute::within(dir.path().into(), &device, Dtype::BF16);
        assert!(kept.known().is_none());
        let rates = measure(&device, Dtype::BF16, 1 << 20, Duration::from_millis(2)).unwrap();
        assert!(rates.memory_gb_per_s > 0.0 && rates.gflops > 0.0);
        let times: Vec<f64> = rates.points.iter().map(|p| p.1).collect();
        assert!(
            times[3] > times[0],
            "256 rows take longer than one: {times:?}"
        );
        let mut record = Record {
            version: VERSION,
            machine: machine_name(),
            device: device.describe(),
            dtype: Dtype::BF16,
            rates: Some(rates.clone()),
            ran_ns_per_byte: None,
        };
        std::fs::write(&kept.path, serde_json::to_string(&record).unwrap()).unwrap();
        let known = kept.known().unwrap();
        // Decimal text may differ in the last bit.
        assert!((known.gflops / rates.gflops - 1.0).abs() < 1e-12);
        assert_eq!(known.points.len(), rates.points.len());
        kept.ran_at(known.memory_gb_per_s * 1.05);
        assert!(kept.known().is_some(), "a run about as fast agrees with it");
        kept.ran_at(known.memory_gb_per_s * 1.2);
        assert_eq!(kept.known(), None, "a run much faster refutes it");
        record.machine = "another".into();
        std::fs::write(&kept.path, serde_json::to_string(&record).unwrap()).unwrap();
        assert_eq!(kept.known(), None);
    }

    #[test]
    fn what_a_busy_machine_gave_is_told_and_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let device = Device::cpu(Some(1), None).unwrap();
        let kept = KeptCompute::within(dir.path().into(), &device, Dtype::BF16);
        let rates = |gb_per_s| ComputeRates {
            memory_gb_per_s: gb_per_s,
            gflops: 100.0,
            element_bytes: 2.0,
            points: Vec::new(),
        };
        let busy = kept.asked(rates(3.0), Some(0.4), true);
        assert_eq!((busy.rates, busy.lost), (rates(3.0), Some(0.4)));
        assert_eq!(kept.known(), None);
        // The next one, on a quiet machine, stands.
        let quiet = kept.asked(rates(20.0), None, true);
        assert_eq!((quiet.rates, quiet.lost), (rates(20.0), None));
        assert_eq!(kept.known(), Some(rates(20.0)));
        // Somebody else's, where it was kept while a busy one measured.
        let busy = kept.asked(rates(3.0), Some(0.4), true);
        assert_eq!((busy.rates, busy.lost), (rates(20.0), None));
        // A record from before anybody looked is none, but of a GPU.
        let text = std::fs::read_to_string(&kept.path).unwrap();
        let old = text.replace("\"version\":1,", "");
        assert_ne!(old, text);
        std::fs::write(&kept.path, old).unwrap();
        assert_eq!(kept.known(), None);
        let of_gpu = KeptCompute {
            oldest: 0,
            ..kept.clone()
        };
        assert_eq!(of_gpu.known(), Some(rates(20.0)));
        // Few weights may lie in a cache.
        kept.asked(rates(90.0), None, false);
        assert_eq!(kept.known(), None);
    }

    #[test]
    fn what_runs_on_a_gpu_took_stands_for_one_row() {
        let dir = tempfile::tempdir().unwrap();
        let device = Device::cpu(Some(1), None).unwrap();
        let kept = KeptCompute::within(dir.path().into(), &device, Dtype::BF16);
        kept.ran_on_gpu_at(500.0);
        assert_eq!(kept.known(), None, "nothing is known of more rows");
        let measured = ComputeRates {
            memory_gb_per_s: 2000.0,
            gflops: 1e5,
            element_bytes: 2.0,
            points: vec![(1, 0.0005), (8, 0.0006), (256, 0.01)],
        };
        kept.keep(|r| r.rates = Some(measured.clone()));
        let known = kept.known().unwrap();
        assert_eq!(known.memory_gb_per_s, 2000.0);
        // What one row takes, eight take at least.
        assert_eq!(known.points, [(1, 0.002), (8, 0.002), (256, 0.01)]);
        assert_eq!(known.gflops, measured.gflops);
        kept.ran_on_gpu_at(f64::NAN);
        kept.ran_on_gpu_at(1000.0);
        assert_eq!(kept.known().unwrap().points[0], (1, 0.001));
    }
}
