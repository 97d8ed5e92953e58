//! What a run tells about itself: progress while it works, figures at its end.

pub mod html;
pub mod job;
pub mod progress;
pub mod summary;
pub mod trace;
