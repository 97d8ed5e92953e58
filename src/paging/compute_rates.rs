//! How fast this machine multiplies: measured once, kept in the user's cache.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::predict::ComputeRates;
use super::rates::{cache_dir, machine_name};
use crate::device::{Device, Into, WeightView};
use crate::error::Result;
use crate::units::Dtype;

/// Rows measured: one sequence, a few, and enough that arithmetic decides.
const ROWS: [usize; 4] = [1, 8, 64, 256];
/// Weights multiplied: more than a last-level cache holds, so that one row meets the memory.
const WEIGHT_BYTES: usize = 160 << 20;
const COLS: usize = 3584;
/// Rows of one product, as a layer's: the matrix is walked in pieces like a layer's tensors are.
const TIME_EACH: Duration = Duration::from_millis(250);

/// How much faster than its record a machine must be seen before the record is doubted.
const BEATEN_BY: f64 = 1.1;

#[derive(Serialize, Deserialize)]
struct Record {
    machine: String,
    device: String,
    dtype: Dtype,
    rates: ComputeRates,
}

/// The record of this machine's products in one weight type.
#[derive(Clone, Debug)]
pub struct KeptCompute {
    path: PathBuf,
    device: String,
    dtype: Dtype,
}

impl KeptCompute {
    pub fn of(device: &Device, dtype: Dtype) -> KeptCompute {
        KeptCompute::within(cache_dir(), device, dtype)
    }

    fn within(dir: PathBuf, device: &Device, dtype: Dtype) -> KeptCompute {
        let device = device.describe();
        let key = twox_hash::XxHash3_64::oneshot(device.as_bytes());
        KeptCompute {
            path: dir.join(format!("compute-{}-{key:016x}.json", dtype.name())),
            device,
            dtype,
        }
    }

    /// What was measured before on this machine with these threads.
    pub fn known(&self) -> Option<ComputeRates> {
        let record: Record =
            serde_json::from_str(&std::fs::read_to_string(&self.path).ok()?).ok()?;
        let ours = record.machine == machine_name()
            && record.device == self.device
            && record.dtype == self.dtype
            && record.rates.memory_gb_per_s > 0.0
            && record.rates.gflops > 0.0;
        ours.then_some(record.rates)
    }

    /// A run multiplied one row at this rate. A record it beats clearly was taken on a busy machine: it is given up, and the next
    /// who asks measures anew. Everything a pass computes counts as multiplying, so a run never flatters itself.
    pub fn ran_at(&self, memory_gb_per_s: f64) {
        let beaten = |known: ComputeRates| memory_gb_per_s > known.memory_gb_per_s * BEATEN_BY;
        if self.known().is_some_and(beaten) {
            // One that cannot be removed is only a worse prediction.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// What is known, else measured now: about a second, and [`WEIGHT_BYTES`] of memory for that long.
    pub fn known_or_measured(&self, device: &Device) -> Result<ComputeRates> {
        if let Some(rates) = self.known() {
            return Ok(rates);
        }
        let rates = measure(device, self.dtype, WEIGHT_BYTES, TIME_EACH)?;
        let record = Record {
            machine: machine_name(),
            device: self.device.clone(),
            dtype: self.dtype,
            rates,
        };
        // A record that cannot be kept costs a second next time, no more.
        if let (Some(dir), Ok(text)) = (self.path.parent(), serde_json::to_string(&record)) {
            let _ = std::fs::create_dir_all(dir);
            let _ = std::fs::write(&self.path, text);
        }
        Ok(record.rates)
    }
}

/// Times products of a few numbers of rows with `bytes` of weights; the median of each.
fn measure(device: &Device, dtype: Dtype, bytes: usize, each: Duration) -> Result<ComputeRates> {
    let row_bytes = COLS * dtype.bytes();
    let out_rows = (bytes / row_bytes).max(1);
    // Small finite values of any type: what they are does not matter, that they are no zeros' page does.
    let one: &[u8] = match dtype {
        Dtype::BF16 => &[0x00, 0x3c],
        Dtype::F16 => &[0x00, 0x1c],
        Dtype::F32 => &[0x00, 0x00, 0x00, 0x3c],
    };
    let weights: Vec<u8> = one
        .iter()
        .copied()
        .cycle()
        .take(out_rows * row_bytes)
        .collect();
    let whole = WeightView::packed(dtype, out_rows, COLS, &weights);
    let norm = WeightView::packed(dtype, 1, COLS, &weights[..row_bytes]);
    let piece = out_rows.div_ceil(4);
    let mut points = Vec::new();
    for rows in ROWS {
        let x = device.rows(rows, COLS)?;
        let mut acts = device.acts(rows, COLS, dtype)?;
        device.rmsnorm(&x, 0, rows, &norm, 1e-6, &mut acts)?;
        let mut out = device.rows(rows, piece)?;
        let mut times = Vec::new();
        let started = Instant::now();
        while times.len() < 3 || (started.elapsed() < each && times.len() < 64) {
            let begin = Instant::now();
            for first in (0..out_rows).step_by(piece) {
                let n = piece.min(out_rows - first);
                device.reshape(&mut out, n);
                device.linear(
                    &acts,
                    rows,
                    &whole.slice_rows(first, n),
                    None,
                    &mut out,
                    0,
                    Into::Store,
                )?;
            }
            times.push(begin.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        points.push((rows, times[times.len() / 2] * 1e9 / weights.len() as f64));
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
            machine: machine_name(),
            device: device.describe(),
            dtype: Dtype::BF16,
            rates: rates.clone(),
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
}
