//! Units into slots just ahead of the forward pass: the only place that sees both the disk and the device.

mod pager;
mod plan;
mod slot;
mod stats;
mod stream;

pub use pager::{Lease, Pager, PagerOptions, unit_name};
pub use plan::{GATHER_BLOCKS, Placement, Plan, Tier, is_streamed};
pub use slot::{PageRead, SlotLayout, SlotWeight};
pub use stats::PagingStats;
pub use stream::VerifyWhen;
