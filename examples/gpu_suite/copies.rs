//! Copies: within the device, from pinned memory, from pageable memory, and beside kernels.

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use tensorpager::device::cuda::{Copier, CudaOptions, Piece, Pin, Slot, Ticks};
use tensorpager::device::{Device, Into};
use tensorpager::units::Dtype;

use super::bed::{Bed, Random};
use super::goals::Goal;
use super::{Outcome, Suite, ops};

/// Pinned memory, as the engine's frames have it: pages of a mapping, registered with the driver.
pub struct Frame(Arc<MmapMut>);

impl Deref for Frame {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

fn frames(device: &Device, bytes: usize, count: usize) -> Outcome<(Vec<Frame>, Vec<Pin>)> {
    let context = device.as_cuda().ok_or("no GPU")?.context();
    let (mut frames, mut pins) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let mut memory = MmapMut::map_anon(bytes)?;
        memory.fill(1); // pages that exist
        let memory = Arc::new(memory);
        pins.push(Pin::new(context, &memory[..], Box::new(memory.clone()))?);
        frames.push(Frame(memory));
    }
    Ok((frames, pins))
}

/// Whether memory of a mapping can be pinned here: what the engine's frames rest on.
pub fn pinning(device: &Device) -> String {
    match frames(device, 1 << 20, 1) {
        Ok(_) => "can be pinned".into(),
        Err(why) => format!("cannot be pinned: {}", one_line(&*why)),
    }
}

/// What went wrong, for a cell.
pub fn one_line(why: &dyn std::error::Error) -> String {
    why.to_string().trim().replace('\n', "; ")
}

/// Keeps copies of whole frames going until `enough`, at least one round; bytes and seconds, all done.
fn keep_copying<F: Deref<Target = [u8]>>(
    device: &Device,
    frames: Vec<F>,
    enough: Duration,
) -> Outcome<(u64, f64)> {
    let context = device.as_cuda().ok_or("no GPU")?.context();
    let bytes = frames[0].len();
    let mut slot = Slot::new(context, bytes as u64, "what is copied")?;
    let mut copier = Copier::new(context, frames.len())?;
    copier.begin(&mut slot)?;
    let all = [Piece {
        from: 0,
        to: 0,
        bytes,
    }];
    let mut idle = frames;
    let warm = idle.len();
    let (mut sent, mut done, mut started) = (0, 0, Instant::now());
    loop {
        while let Some(frame) = idle.pop() {
            copier.send(frame, &all, &slot)?;
            sent += 1;
        }
        let Some((frame, _)) = copier.reclaim(true)? else {
            break;
        };
        done += 1;
        if done == warm {
            started = Instant::now();
        }
        if done < 2 * warm || started.elapsed() < enough {
            idle.push(frame);
        }
    }
    copier.finish(&mut slot)?;
    Ok((
        (sent - warm) as u64 * bytes as u64,
        started.elapsed().as_secs_f64(),
    ))
}

/// A product long enough to run beside copies: rows, n and k.
fn work(suite: &Suite) -> (usize, usize, usize) {
    match suite.smoke {
        true => (16, 64, 64),
        false => (1024, 18944, 3584),
    }
}

pub fn section(suite: &mut Suite) -> Outcome<()> {
    let bed = ops::open(Dtype::BF16, 128, None)?;
    let enough = Duration::from_millis(if suite.smoke { 1 } else { 400 });
    suite.report.table("Copies", &["what", "GB/s", "of pinned"]);
    within_device(suite, &bed)?;
    let mib = 1usize << 20;
    let sizes: &[usize] = match suite.smoke {
        true => &[mib / 16],
        false => &[mib / 4, mib, 4 * mib, 64 * mib],
    };
    let mut rates = Vec::new();
    for bytes in sizes {
        let count = (256 * mib / bytes).clamp(4, 64);
        let (list, pins) = match frames(&bed.device, *bytes, count) {
            Ok(pinned) => pinned,
            Err(why) => {
                let what = format!("pinned, frames of {} KiB", bytes >> 10);
                suite.report.not_run(&what, &one_line(&*why));
                continue;
            }
        };
        let (moved, seconds) = keep_copying(&bed.device, list, enough)?;
        drop(pins);
        rates.push((*bytes, moved as f64 / seconds / 1e9));
    }
    let pins = !rates.is_empty();
    suite.pinned_gb_per_s = match rates.iter().map(|r| r.1).reduce(f64::max) {
        // Where memory cannot be registered the driver may still have pinned memory of its own to give.
        None => bed.device.as_cuda().ok_or("no GPU")?.measure_copies()?,
        peak => peak,
    };
    let peak = suite.pinned_gb_per_s;
    let share = |rate: f64| peak.map_or("-".into(), |p| format!("{:.0} %", 100.0 * rate / p));
    if let Some(peak) = peak.filter(|_| !pins) {
        let what = "pinned, allocated by the driver";
        suite
            .report
            .row(&[what, &format!("{peak:.2}"), &share(peak)]);
    }
    for (bytes, rate) in &rates {
        let what = format!("pinned, frames of {} KiB", bytes >> 10);
        suite
            .report
            .row(&[&what, &format!("{rate:.2}"), &share(*rate)]);
    }
    let bytes = if suite.smoke { mib } else { 64 * mib };
    let pageable = (0..4).map(|_| vec![1u8; bytes]).collect();
    let (moved, seconds) = keep_copying::<Vec<u8>>(&bed.device, pageable, enough)?;
    let rate = moved as f64 / seconds / 1e9;
    suite
        .report
        .row(&["pageable", &format!("{rate:.2}"), &share(rate)]);
    if !pins {
        suite.report.note("Slot ready to its first kernel, copies beside products: not run, they want frames that are pinned.");
        return Ok(());
    }
    to_first_kernel(suite, &bed)?;
    drop(bed);
    beside_kernels(suite, enough)
}

/// From the end of a slot's copy to the first kernel that waits for it. The compute stream begins to wait before the copy begins, so its
/// wait less the copy's own time is an upper bound.
fn to_first_kernel(suite: &mut Suite, bed: &Bed) -> Outcome<()> {
    let cuda = bed.device.as_cuda().ok_or("no GPU")?;
    let (context, compute) = (cuda.context(), cuda.compute());
    let bytes = if suite.smoke { 1 << 16 } else { 16 << 20 };
    let (mut idle, pins) = frames(&bed.device, bytes, 1)?;
    let mut slot = Slot::new(context, bytes as u64, "what is copied")?;
    let mut copier = Copier::new(context, 1)?;
    let ticks = Ticks::new(context)?;
    let all = [Piece {
        from: 0,
        to: 0,
        bytes,
    }];
    let x = bed.rows(&[1.0; 64], 64)?;
    let mut out = bed.device.acts(1, 64, bed.half)?;
    let mut gaps = Vec::new();
    for _ in 0..21 {
        cuda.synchronize()?;
        copier.begin(&mut slot)?;
        compute.reach(&ticks)?;
        copier.send(idle.pop().ok_or("no frame")?, &all, &slot)?;
        copier.finish(&mut slot)?;
        compute.acquire(&mut slot, &ticks)?;
        bed.device.round(&x, 1, 64, &mut out)?;
        compute.release(&mut slot, &ticks)?;
        cuda.synchronize()?;
        let (frame, copied) = copier.reclaim(true)?.ok_or("no copy")?;
        idle.push(frame);
        let (waited, _) = ticks.spent()?;
        gaps.push(waited.as_secs_f64() - copied.as_secs_f64());
    }
    drop(pins);
    gaps.sort_by(f64::total_cmp);
    let [median, worst] = [gaps[gaps.len() / 2], gaps[gaps.len() - 1]].map(|g| g * 1e6);
    let said = format!(
        "Slot ready to its first kernel: at most {median:.0} µs (median of 21; the longest {worst:.0} µs)."
    );
    suite.report.note(&said);
    suite.goals.seen(Goal::Ready, median);
    Ok(())
}

/// One buffer to another: every byte is read and written.
fn within_device(suite: &mut Suite, bed: &Bed) -> Outcome<()> {
    let elements = if suite.smoke { 1 << 16 } else { 256 << 20 };
    let d = &bed.device;
    let from = d.rows(1, elements)?;
    let mut to = d.rows(1, elements)?;
    let cuda = d.as_cuda().ok_or("no GPU")?;
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let times = 8;
        cuda.synchronize()?;
        let started = Instant::now();
        for _ in 0..times {
            d.copy_rows(&from, 0, &mut to, 0, 1)?;
        }
        cuda.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64() / f64::from(times));
    }
    let rate = 2.0 * 4.0 * elements as f64 / best / 1e9;
    suite.memory_gb_per_s = Some(rate);
    let what = "within the device, read + written";
    suite.report.row(&[what, &format!("{rate:.0}"), ""]);
    Ok(())
}

/// Copies and products at once, against each alone.
fn beside_kernels(suite: &mut Suite, enough: Duration) -> Outcome<()> {
    let (rows, n, k) = work(suite);
    let options = CudaOptions {
        ordinal: 0,
        half: Dtype::BF16,
        head_size: 128,
        vision_head_size: None,
        memory: None,
        gemm: tensorpager::device::cuda::Gemm::Own,
    };
    let bed = Bed {
        device: Device::cuda(&options)?,
        half: Dtype::BF16,
    };
    let mut random = Random::new(1);
    let a = bed.acts(&random.values(rows * k, 1.0), k)?;
    let w = bed.weight_bytes(vec![0x3c; n * k * 2], n, k)?;
    let mut out = bed.device.rows(rows, n)?;
    let mut products = |times: usize| -> Outcome<()> {
        for _ in 0..times {
            bed.device
                .linear(&a, rows, &w.view(), None, &mut out, 0, Into::Store)?;
        }
        Ok(())
    };
    let cuda = bed.device.as_cuda().ok_or("no GPU")?;
    products(2)?;
    cuda.synchronize()?;
    let started = Instant::now();
    products(8)?;
    cuda.synchronize()?;
    let one = started.elapsed().as_secs_f64() / 8.0;
    // Launches beyond what the driver queues would keep the host from copying.
    let times = (enough.as_secs_f64() / one).ceil().clamp(1.0, 500.0) as usize;
    let enough = enough.min(Duration::from_secs_f64(one * times as f64));
    let bytes = if suite.smoke { 1 << 16 } else { 4 << 20 };
    let (list, pins) = frames(&bed.device, bytes, 16)?;
    let (moved, seconds) = keep_copying(&bed.device, list, enough)?;
    let alone = moved as f64 / seconds / 1e9;
    drop(pins);
    let (list, pins) = frames(&bed.device, bytes, 16)?;
    cuda.synchronize()?;
    let started = Instant::now();
    products(times)?;
    let (moved, seconds) = keep_copying(&bed.device, list, enough)?;
    cuda.synchronize()?;
    let both = started.elapsed().as_secs_f64();
    drop(pins);
    let beside = moved as f64 / seconds / 1e9;
    suite
        .report
        .table("Copies beside products", &["what", "alone", "together"]);
    suite.report.row(&[
        "pinned copies, GB/s",
        &format!("{alone:.2}"),
        &format!("{beside:.2}"),
    ]);
    suite.report.row(&[
        &format!("{times} products {rows} x {n} x {k}, s"),
        &format!("{:.3}", one * times as f64),
        &format!("{both:.3}"),
    ]);
    Ok(())
}
