//! Units into slots just ahead of the forward pass: the only place that sees both the disk and the device.

mod device_map;
mod pager;
mod plan;
mod rates;
mod slot;
mod stats;
mod stream;
mod sync;

pub use device_map::parse_device_map;
pub(crate) use pager::interrupted;
pub use pager::{Lease, Origin, Pager, PagerOptions};
pub use plan::{GATHER_BLOCKS, Placement, Plan, Tier, Walk, is_streamed};
pub use rates::{DiskRates, RATES_FILE};
pub use slot::{PageRead, SlotLayout, SlotWeight, unit_name};
pub use stats::PagingStats;
pub use stream::VerifyWhen;
