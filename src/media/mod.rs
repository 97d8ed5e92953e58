//! Images and video frames → pixel values, as the Qwen2-VL processor of transformers 5.17 makes them (its PIL backend).
//!
//! Nothing here knows a model's weights: files and messages come in, [`Visual`]s go out. A visual keeps the resized bytes and makes
//! float32 patches only where they are asked for, so that a long video costs three bytes a pixel and not twenty-four.
//!
//! Choices, where references differ:
//! - Alpha is dropped and palettes are looked up, as Pillow's `convert("RGB")` does. 16-bit samples keep their high byte; Pillow does the
//!   same for colour, but clips 16-bit grey to white at 255, which is never what the picture shows.
//! - EXIF orientation is applied, as transformers' `load_image` does.
//! - Frames are sampled as transformers does ([`Sampling::Arange`]); qwen-vl-utils' way is [`Sampling::Linspace`].
//! - Seconds between frame pairs count as transformers 5.17 counts them ([`Clock::Whole`]); [`Clock::Exact`] is what other releases do.
//! - A video's frames keep within an even share of the total budget, as qwen-vl-utils does (transformers' `cap_pixels_per_frame`).
//! - Video frames are resized by the same arithmetic as images; torchvision's differs from it by one level on 0.1 % of samples.

mod decode;
mod identity;
mod locate;
mod measure;
mod processor;
mod request;
mod resize;
mod sample;
mod video;
mod visual;

pub use decode::{Rgb, decode, read_image};
pub use identity::FileIds;
pub use locate::{Located, is_inline, locate};
pub use measure::{Look, Measure};
pub use processor::{Processor, VideoLimits, smart_resize};
pub use request::{
    Clock, MediaRequest, Options, requests, requests_to_files, unread_field, without_media,
};
pub use resize::resize;
pub use sample::{Sampling, sample_frames};
pub use video::VideoTools;
pub use visual::{Grid, Kind, Visual};
