//! Units into slots just ahead of the forward pass: the only place that sees both the disk and the device.

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

pub use compute_rates::KeptCompute;
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
