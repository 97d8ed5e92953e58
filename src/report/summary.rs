//! The closing figures of a run, for people and as JSON. The field names are a contract (DESIGN: "Command line").

use std::time::Duration;

use serde::Serialize;

use crate::engine::{Engine, EngineStats, VisionStats};
use crate::paging::{PagingStats, Tier, VerifyWhen};
use crate::units::{counted, human_bytes};

/// Seconds, each from the start of what it names.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Timings {
    pub pack_s: f64,
    /// Opening: planning, allocating, loading resident units.
    pub load_s: f64,
    pub time_to_first_token_s: f64,
    /// From the first token to the last.
    pub decode_s: f64,
    pub output_tokens_per_s: f64,
    pub total_s: f64,
}

/// What the pager did in the decode passes. Rates in 10⁹ bytes a second.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PagingReport {
    pub passes: u64,
    pub units: u64,
    pub bytes_per_pass: u64,
    pub disk_bytes: u64,
    pub disk_bytes_per_pass: u64,
    pub disk_s: f64,
    pub disk_gb_per_s: f64,
    pub h2d_bytes: u64,
    /// Time that copies of weights took, and their rate; that of keys and values where there were no others.
    pub h2d_s: f64,
    pub h2d_gb_per_s: f64,
    /// The part of `h2d_bytes` that was keys and values in host memory, the time they took beside the weights, and what of them went back.
    pub kv_h2d_bytes: u64,
    pub kv_h2d_s: f64,
    pub d2h_bytes: u64,
    pub stall_s: f64,
    pub stall_disk_s: f64,
    pub stall_copy_s: f64,
    pub compute_s: f64,
    pub overlap: f64,
    pub resident_gpu_bytes: u64,
    pub resident_cpu_bytes: u64,
    /// Where keys and values lie: `gpu` or `cpu`.
    pub kv_tier: &'static str,
    pub prefetch_depth: usize,
    pub page_size: u64,
    pub queue_depth: usize,
    /// Pinned frames between disk and GPU; 0 where the CPU computes.
    pub ring_frames: usize,
    pub io: &'static str,
    pub direct: bool,
    pub verify: &'static str,
    pub verified_bytes: u64,
    pub probed_disk_gb_per_s: Option<f64>,
    /// Of copies from pinned memory to the GPU.
    pub probed_h2d_gb_per_s: Option<f64>,
    pub percent_of_bound: Option<f64>,
    pub peak_memory_bytes: u64,
}

/// How the reader was set up, for the report's sake.
#[derive(Clone, Copy, Debug)]
pub struct ReadSettings {
    pub page_bytes: u64,
    pub queue_depth: usize,
    pub verify: VerifyWhen,
    /// The source had no checksums: those of the first read are what later reads are compared with.
    pub self_recorded: bool,
    /// The best rate any setting reached on this folder and machine, 10⁹ bytes a second.
    pub probed_disk_gb_per_s: Option<f64>,
    /// The best rate of copies from pinned memory to this machine's GPU, 10⁹ bytes a second.
    pub probed_h2d_gb_per_s: Option<f64>,
}

impl PagingReport {
    /// `during`: the passes reported on.
    pub fn new(engine: &Engine, during: &EngineStats, settings: &ReadSettings) -> PagingReport {
        let plan = engine.plan();
        let pager = engine.pager();
        let p = &during.paging;
        let passes = p.passes.max(1) as f64;
        let disk_s = p.disk_busy.as_secs_f64();
        let compute_s = during.compute.as_secs_f64();
        let used_per_pass = p.used_bytes as f64 / passes;
        let bounds = Bounds {
            disk_s: seconds_at(p.used_bytes, settings.probed_disk_gb_per_s),
            // The two directions of the bus do not wait for one another.
            copy_s: seconds_at(
                p.copied_bytes.max(p.d2h_bytes),
                settings.probed_h2d_gb_per_s,
            ),
            compute_s,
        };
        let share = bounds.share_of(during.pass.as_secs_f64());
        PagingReport {
            passes: p.passes,
            units: p.units,
            bytes_per_pass: plan.pass_bytes,
            disk_bytes: p.disk_bytes,
            disk_bytes_per_pass: used_per_pass as u64,
            disk_s,
            disk_gb_per_s: rate(p.disk_bytes, disk_s),
            h2d_bytes: p.h2d_bytes,
            h2d_s: p.h2d.as_secs_f64(),
            h2d_gb_per_s: match p.h2d.is_zero() {
                true => rate(p.kv_bytes, p.kv_h2d.as_secs_f64()),
                false => rate(p.h2d_bytes - p.kv_bytes, p.h2d.as_secs_f64()),
            },
            kv_h2d_bytes: p.kv_bytes,
            kv_h2d_s: p.kv_h2d.as_secs_f64(),
            d2h_bytes: p.d2h_bytes,
            stall_s: (p.stall_disk + p.stall_copy).as_secs_f64(),
            stall_disk_s: p.stall_disk.as_secs_f64(),
            stall_copy_s: p.stall_copy.as_secs_f64(),
            compute_s,
            overlap: share.unwrap_or(0.0),
            resident_cpu_bytes: plan.resident_bytes,
            resident_gpu_bytes: plan.gpu.map_or(0, |g| g.resident_bytes),
            kv_tier: match engine.kv_in_host() {
                true => Tier::Cpu.name(),
                false => Tier::Gpu.name(),
            },
            prefetch_depth: plan.depth,
            page_size: settings.page_bytes,
            queue_depth: settings.queue_depth,
            ring_frames: plan.ring().frames,
            io: pager.reader_name(),
            direct: pager.direct(),
            verify: match (settings.verify, settings.self_recorded) {
                (VerifyWhen::Never, _) => "never",
                (_, true) => "self",
                (VerifyWhen::Always, _) => "always",
                (VerifyWhen::First, _) => "first",
            },
            verified_bytes: p.verified_bytes,
            probed_disk_gb_per_s: settings.probed_disk_gb_per_s,
            probed_h2d_gb_per_s: settings.probed_h2d_gb_per_s,
            percent_of_bound: share.map(|s| s * 100.0),
            peak_memory_bytes: crate::engine::peak_bytes(),
        }
    }
}

/// What each part of the passes takes at the best rate known of it. `None`: no rate is known of what was moved.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    disk_s: Option<f64>,
    copy_s: Option<f64>,
    compute_s: f64,
}

impl Bounds {
    /// max(bytes / best disk rate, bytes / best copy rate, compute) over the measured time. `None` where the bound is not known, or nothing
    /// ran.
    fn share_of(&self, pass_s: f64) -> Option<f64> {
        let bound = self.disk_s?.max(self.copy_s?).max(self.compute_s);
        (pass_s > 0.0).then(|| bound / pass_s)
    }
}

/// `None` where bytes were moved and no rate is known.
fn seconds_at(bytes: u64, best_gb_per_s: Option<f64>) -> Option<f64> {
    match (bytes, best_gb_per_s) {
        (0, _) => Some(0.0),
        (bytes, Some(rate)) if rate > 0.0 => Some(bytes as f64 / (rate * 1e9)),
        _ => None,
    }
}

/// What kept the passes from their bound, each part as a share of the time; parts below a percent are left out. Against a
/// bound of the disk: the disk slower than it can be, and the disk with nothing to do; against one of copies likewise. Against one of
/// computing: waits, and what is neither (rows of the embedding, sampling).
fn where_the_rest_went(p: &PagingReport, during: &PagingStats, pass_s: f64) -> Option<String> {
    let disk_s = seconds_at(during.used_bytes, p.probed_disk_gb_per_s)?;
    let copied = during.copied_bytes.max(during.d2h_bytes);
    let copy_s = seconds_at(copied, p.probed_h2d_gb_per_s)?;
    // More may have been moved than was used: passes end with slots full.
    let busy = |s: f64| s.min(pass_s);
    // Weights, keys and values share the bus: its time is at most the sum of theirs.
    let bus_s = busy(p.h2d_s + p.kv_h2d_s);
    let parts = if copy_s >= disk_s.max(p.compute_s) {
        vec![
            ("copies below their best rate", bus_s - copy_s),
            ("waits for the disk", p.stall_disk_s),
            (
                "copies without a free slot",
                pass_s - bus_s - p.stall_disk_s,
            ),
        ]
    } else if disk_s >= p.compute_s {
        vec![
            ("the disk below its best rate", busy(p.disk_s) - disk_s),
            ("the disk without a free slot", pass_s - busy(p.disk_s)),
        ]
    } else {
        vec![
            ("waits for the disk", p.stall_disk_s),
            ("waits for copies", p.stall_copy_s),
            ("outside the layers", pass_s - p.stall_s - p.compute_s),
        ]
    };
    let words: Vec<String> = parts
        .into_iter()
        .map(|(what, s)| (what, 100.0 * s / pass_s.max(1e-12)))
        .filter(|(_, percent)| *percent >= 1.0)
        .map(|(what, percent)| format!("{percent:.0} % {what}"))
        .collect();
    (!words.is_empty()).then(|| words.join(", "))
}

fn rate(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        bytes as f64 / seconds / 1e9
    } else {
        0.0
    }
}

/// What looking at pictures cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct VisionReport {
    /// Images and videos that went through the tower.
    pub pictures: u64,
    pub patches: u64,
    /// Times the tower was streamed.
    pub waves: u64,
    pub disk_bytes: u64,
    pub seconds: f64,
    pub compute_s: f64,
}

impl VisionReport {
    /// `None` where nothing was looked at.
    pub fn new(stats: &VisionStats) -> Option<VisionReport> {
        (stats.pictures > 0).then_some(VisionReport {
            pictures: stats.pictures,
            patches: stats.patches,
            waves: stats.waves,
            disk_bytes: stats.disk_bytes,
            seconds: stats.time.as_secs_f64(),
            compute_s: stats.compute.as_secs_f64(),
        })
    }

    /// For people.
    pub fn line(&self) -> String {
        let count = |n: u64, one: &str, more: &str| match n {
            1 => format!("1 {one}"),
            n => format!("{n} {more}"),
        };
        format!(
            "looked at {} ({} patches) in {:.1} s, {} from disk in {} of the vision tower",
            count(self.pictures, "picture", "pictures"),
            self.patches,
            self.seconds,
            human_bytes(self.disk_bytes),
            count(self.waves, "pass", "passes"),
        )
    }
}

/// Tokens a second from the first token to the last; `tokens` counts both.
pub fn tokens_per_s(tokens: usize, decode: Duration) -> f64 {
    let s = decode.as_secs_f64();
    if tokens > 1 && s > 0.0 {
        (tokens - 1) as f64 / s
    } else {
        0.0
    }
}

/// Two lines for people: what it cost, and where the time went.
pub fn closing_lines(
    prompt_tokens: usize,
    tokens: usize,
    t: &Timings,
    paging: &PagingReport,
    during: &EngineStats,
    engine: &Engine,
) -> String {
    format!(
        "{}\n{}",
        answer_line(
            prompt_tokens,
            tokens,
            t.time_to_first_token_s,
            t.output_tokens_per_s
        ),
        paging_line(paging, during, engine)
    )
}

/// What an answer took, in one line for people.
pub fn answer_line(prompt_tokens: usize, tokens: usize, first_s: f64, per_s: f64) -> String {
    format!(
        "{}, first token after {first_s:.2} s; {}{}",
        counted(prompt_tokens as u64, "prompt token"),
        counted(tokens as u64, "token"),
        // The rate is that from the first to the last.
        match tokens {
            0 | 1 => String::new(),
            _ => format!(" at {per_s:.2} tokens/s"),
        },
    )
}

/// One line for people: where the weights were, what came from disk, and how near the bound it was.
pub fn paging_line(paging: &PagingReport, during: &EngineStats, engine: &Engine) -> String {
    let plan = engine.plan();
    let held = |tier: Tier| plan.tiers.iter().filter(|t| **t == tier).count();
    let mut text = String::new();
    if let Some(gpu) = plan.gpu {
        text += &format!(
            "{} on the GPU, {} in RAM, {} a token from disk at {:.2} GB/s; copied at {:.2} GB/s; the GPU waited {:.2} s for the disk and {:.2} s for copies; ",
            human_bytes(gpu.resident_bytes),
            human_bytes(plan.resident_bytes),
            human_bytes(during.paging.used_bytes / during.rows.max(1)),
            paging.disk_gb_per_s,
            paging.h2d_gb_per_s,
            paging.stall_disk_s,
            paging.stall_copy_s,
        );
        if engine.kv_in_host() {
            text += &format!(
                "keys and values in RAM, {} of them copied a pass; ",
                human_bytes(during.paging.kv_bytes / during.paging.passes.max(1))
            );
        }
        if !plan.unpinned.is_empty() {
            text += &format!(
                "{} in RAM beyond --pinned-memory; ",
                counted(plan.unpinned.len() as u64, "unit")
            );
        }
        if let Some(why) = engine.pager().pin_note() {
            text += &format!("host memory is not pinned ({why}); ");
        }
    } else if plan.streamed_bytes == 0 {
        text += &format!(
            "all weights in RAM ({}); ",
            human_bytes(plan.resident_bytes)
        );
    } else {
        text += &format!(
            "{} in RAM ({} of {} units), {} a token from disk at {:.2} GB/s; waited for it {:.0} % of the time; ",
            human_bytes(plan.resident_bytes),
            held(Tier::Cpu),
            plan.tiers.len(),
            human_bytes(during.paging.used_bytes / during.rows.max(1)),
            paging.disk_gb_per_s,
            100.0 * paging.stall_disk_s / (paging.stall_disk_s + paging.compute_s).max(1e-9),
        );
    }
    match paging.percent_of_bound {
        Some(p) => {
            text += &format!("{p:.0} % of this machine's bound");
            if let Some(rest) =
                where_the_rest_went(paging, &during.paging, during.pass.as_secs_f64())
            {
                text += &format!(" ({rest})");
            }
            text += "; ";
        }
        // No pass, no share of anything.
        None if paging.passes == 0 => {}
        None => text += "bound unknown (run `tensorpager bench io` once); ",
    }
    text + &format!("peak memory {}", human_bytes(paging.peak_memory_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slower_pass_is_further_from_the_bound() {
        let bytes = |rate| seconds_at(1_000_000_000, rate);
        let bounds = |disk_s, copy_s| Bounds {
            disk_s,
            copy_s,
            compute_s: 0.2,
        };
        let at = |pass| bounds(bytes(Some(2.0)), Some(0.0)).share_of(pass).unwrap();
        assert!((at(0.5) - 1.0).abs() < 1e-9, "the disk alone takes 0.5 s");
        assert!((at(1.0) - 0.5).abs() < 1e-9, "a sleep in the reader shows");
        assert_eq!(bounds(bytes(None), Some(0.0)).share_of(0.5), None);
        assert_eq!(bounds(Some(0.0), Some(0.0)).share_of(0.4), Some(0.5));
        let copied = bounds(bytes(Some(2.0)), bytes(Some(1.25)));
        assert_eq!(copied.share_of(0.8), Some(1.0));
        assert_eq!(copied.share_of(1.6), Some(0.5), "a sleep in the copy shows");
        assert_eq!(bounds(Some(0.1), bytes(None)).share_of(0.5), None);
    }

    /// A pass of one second; the bound's share and the parts make a whole where there is nothing else.
    #[test]
    fn the_rest_is_explained_by_what_the_bound_is_of() {
        let at = |disk_gb: f64, copied_gb: f64, compute_s: f64, p: PagingReport| {
            let moved = PagingStats {
                used_bytes: (disk_gb * 1e9) as u64,
                copied_bytes: (copied_gb * 1e9) as u64,
                ..PagingStats::default()
            };
            let p = PagingReport {
                probed_disk_gb_per_s: Some(1.0),
                probed_h2d_gb_per_s: Some(10.0),
                compute_s,
                ..p
            };
            where_the_rest_went(&p, &moved, 1.0)
        };
        // The disk could have done in 0.6 s what took it 0.7.
        let p = PagingReport {
            disk_s: 0.7,
            ..PagingReport::default()
        };
        assert_eq!(
            at(0.6, 0.0, 0.2, p).as_deref(),
            Some("10 % the disk below its best rate, 30 % the disk without a free slot")
        );
        // Copies of weights and of keys and values: 0.5 s at best.
        let p = PagingReport {
            h2d_s: 0.4,
            kv_h2d_s: 0.2,
            stall_disk_s: 0.25,
            ..PagingReport::default()
        };
        assert_eq!(
            at(0.1, 5.0, 0.2, p).as_deref(),
            Some(
                "10 % copies below their best rate, 25 % waits for the disk, 15 % copies without a free slot"
            )
        );
        let p = PagingReport {
            stall_s: 0.15,
            stall_disk_s: 0.1,
            stall_copy_s: 0.05,
            ..PagingReport::default()
        };
        assert_eq!(
            at(0.1, 1.0, 0.8, p).as_deref(),
            Some("10 % waits for the disk, 5 % waits for copies, 5 % outside the layers")
        );
        // Nothing worth a word; and no rate of what was read.
        assert_eq!(at(0.1, 0.0, 0.995, PagingReport::default()), None);
        let unknown = PagingStats {
            used_bytes: 1,
            ..PagingStats::default()
        };
        assert_eq!(
            where_the_rest_went(&PagingReport::default(), &unknown, 1.0),
            None
        );
    }
}
