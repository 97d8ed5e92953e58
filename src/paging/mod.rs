//! Units into slots just ahead of the forward pass: the only place that sees both the disk and the device.

mod busy;
mod compute_rates;
mod copies;
mod device_layout;
mod device_map;
mod gather;
mod gpu;
mod kept_setting;
mod origin;
mod pager;
mod plan;
mod planner;
mod predict;
mod rates;
mod slot;
mod stats;
mod strategy;
mod stream;
mod sync;
mod trace;
mod tune;

pub use compute_rates::{AskedCompute, KeptCompute};
pub use device_map::parse_device_map;
pub use kept_setting::KeptSetting;
pub use origin::{Origin, unit_name};
pub use pager::{Lease, Pager, PagerOptions, WrapReader};
pub use plan::{
    Frames, GATHER_BLOCKS, GpuPart, Placement, Plan, RING_BYTES, Ring, Tier, Walk, is_streamed,
    is_vision,
};
pub use planner::Planner;
pub use predict::{
    ComputeRates, MachineRates, PassCost, PassWork, best_concurrency, predict,
    rows_that_hide_the_disk,
};
pub use rates::{CopyRate, DiskRates, KnownRates, RATES_FILE, cache_dir, machine_name};
pub use slot::{PageRead, SlotLayout, SlotWeight};
pub use stats::PagingStats;
pub use strategy::{Budget, Needs, Problem, Strategy, TierRates, UnitSize};
pub use stream::VerifyWhen;
pub use trace::{Happening, TRACE_EVENTS, Trace, TraceEvent};
pub use tune::{Score, Setting, Space, Tuned, most_runs, tune};

/// What the fuzzers call (src/fuzzing.rs).
#[cfg(any(test, feature = "testing"))]
pub(crate) mod fuzz {
    use std::path::Path;

    use super::rates::sane_rate;
    use super::*;

    /// Which record the first byte says.
    const NAMES: [&str; 4] = [RATES_FILE, "tune.json", "tune-gpu.json", "compute.json"];

    /// The rest of `bytes` as a record in a pack of `dir`, read as runs and `plan` read it. What is believed has to make sense; true where
    /// anything is.
    pub(crate) fn kept_record(dir: &Path, bytes: &[u8]) -> bool {
        let Some((which, text)) = bytes.split_first() else {
            return false;
        };
        for name in NAMES {
            let _ = std::fs::remove_file(dir.join(name));
        }
        let name = NAMES[usize::from(*which) % NAMES.len()];
        std::fs::write(dir.join(name), text).expect("a file of a temporary folder");
        let rates = DiskRates::of(dir, true);
        let disk = [rates.best(), rates.streamed(), rates.h2d()];
        let tiers = rates.known().tiers();
        let placed_by = [tiers.disk_gb_per_s, tiers.h2d_gb_per_s];
        for rate in disk.iter().flatten().chain(&placed_by) {
            assert!(sane_rate(*rate), "{name}: {rate} GB/s");
        }
        let compute = KeptCompute::named("compute.json", dir).known();
        for rows in [1, 7, 256, 1 << 16].iter().filter(|_| compute.is_some()) {
            let seconds = compute
                .as_ref()
                .map_or(0.0, |c| c.seconds(1 << 30, 2.0, *rows));
            assert!(seconds.is_finite() && seconds > 0.0, "{name}: {seconds} s");
        }
        let settings = [false, true].map(|on_gpu| KeptSetting::of(dir, true, on_gpu));
        let curves = settings.each_ref().map(KeptSetting::curve);
        let believed = settings.iter().filter_map(KeptSetting::best).count();
        for score in curves.iter().flatten() {
            assert!(score.ratio.is_finite() && score.ratio > 0.0, "{name}");
        }
        // What a run adds has to make a sound record of it, whatever was there.
        rates.ran_at(1.5);
        assert_eq!(rates.streamed(), Some(1.5), "{name}");
        assert!(rates.best().is_some_and(|best| best >= 1.5), "{name}");
        believed > 0 || compute.is_some() || disk.iter().any(Option::is_some)
    }

    /// Records of this machine.
    pub(crate) fn kept_records() -> Vec<Vec<u8>> {
        let machine = machine_name();
        let setting = r#""io":"threads","page_size":1048576,"queue_depth":64,"prefetch_depth":2"#;
        let tuned = format!(
            r#"{{"version":1,"machine":"{machine}","device":"a processor","best":{{{setting},"ring_frames":8}},"ratio":0.9,"noise":0.01,"curve":[{{{setting},"ratio":0.9,"runs":3}},{{{setting},"ratio":1e9,"runs":1}}]}}"#
        );
        let texts = [
            format!(
                r#"{{"machine":"{machine}","disk_gb_per_s":2.5,"streamed_gb_per_s":2.25,"h2d":{{"gpu":"a GPU","gb_per_s":21.5}}}}"#
            ),
            tuned.clone(),
            tuned,
            format!(
                r#"{{"version":1,"machine":"{machine}","device":"compute.json","dtype":"bfloat16","rates":{{"memory_gb_per_s":20.5,"gflops":300.0,"element_bytes":2.0,"points":[[1,0.05],[8,0.0625],[64,0.25],[256,1.0]]}},"ran_ns_per_byte":0.0625}}"#
            ),
        ];
        let numbered = (0u8..).zip(texts);
        numbered
            .map(|(which, text)| [&[which][..], text.as_bytes()].concat())
            .collect()
    }
}
