//! The model's `preprocessor_config.json`, and what it makes of pictures.

mod config;

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use self::config::{bad, bounds, missing, number, read, three};
use super::locate::{at_name, frame_files, open, video_file};
use super::request::{Clock, MediaRequest, Options};
use super::video::{Clip, VideoTools};
use super::visual::{Collector, Shape};
use super::{Kind, Rgb, Visual, read_image, sample_frames};
use crate::error::{Code, Error, Result};
use crate::spec::VisionSpec;

/// CLIP's statistics: what the processor class falls back to where the file is silent.
const MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];
/// A target size beyond this is a mistake in the config, not a picture.
const MAX_TARGET_PIXELS: u64 = 1 << 28;
/// Frames a second where nobody says.
const FPS: f64 = 2.0;

/// (value / 255 − mean) / std of each byte, computed as the PIL backend does: divided in float64, the rest in float32.
#[derive(Clone, Debug)]
pub(super) struct Normalize(Arc<[[f32; 256]; 3]>);

impl Normalize {
    fn new(mean: [f64; 3], std: [f64; 3], rescale: f64) -> Normalize {
        let mut tables = [[0.0; 256]; 3];
        for (c, table) in tables.iter_mut().enumerate() {
            for (v, out) in table.iter_mut().enumerate() {
                let scaled = (v as f64 * rescale) as f32;
                *out = (scaled - mean[c] as f32) / std[c] as f32;
            }
        }
        Normalize(Arc::new(tables))
    }

    pub fn table(&self, channel: usize) -> &[f32; 256] {
        &self.0[channel]
    }
}

/// Bounds on a video, per frame and in all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VideoLimits {
    pub min_pixels: u64,
    pub max_pixels: u64,
    /// Shared evenly by the temporal patches' frames: 90 % of 128,000 tokens' worth of pixels.
    pub total_pixels: u64,
    pub min_frames: usize,
    pub max_frames: usize,
}

/// The frames of a video that are looked at, and how many of them a second.
pub(super) struct Chosen {
    pub indices: Vec<usize>,
    pub fps: f64,
}

/// Files and frames → [`Visual`]s for one model.
#[derive(Clone, Debug)]
pub struct Processor {
    pub(super) shape: Shape,
    normalize: Normalize,
    min_pixels: u64,
    max_pixels: u64,
    pub video: VideoLimits,
}

impl Processor {
    /// From the model's folder: `preprocessor_config.json` (or `processor_config.json`, as transformers 5 writes it) and, where there is one,
    /// `video_preprocessor_config.json`. Sizes of patches must be those of the tower. Errors are Code::Config.
    pub fn load(dir: &Path, spec: &VisionSpec) -> Result<Processor> {
        let nested = read(dir, "processor_config.json")?.unwrap_or_default();
        let part = |key: &str| nested.get(key).and_then(Value::as_object).cloned();
        let image = match read(dir, "preprocessor_config.json")? {
            Some(config) => config,
            None => part("image_processor").ok_or_else(|| missing(dir))?,
        };
        let video = match read(dir, "video_preprocessor_config.json")? {
            Some(config) => Some(config),
            None => part("video_processor"),
        };
        Processor::from_config(&image, video.as_ref(), spec)
    }

    /// From the contents of the two files.
    pub fn from_config(
        image: &Map<String, Value>,
        video: Option<&Map<String, Value>>,
        spec: &VisionSpec,
    ) -> Result<Processor> {
        for (key, want) in [
            ("patch_size", spec.patch),
            ("temporal_patch_size", spec.temporal_patch),
            ("merge_size", spec.merge),
        ] {
            if let Some(got) = number(image, key)?
                && got != want as f64
            {
                let cause = format!("config.json says {want}");
                return Err(bad(&format!("`{key}` = {got}"), cause));
            }
        }
        if spec.channels != 3 {
            let cause = "pictures have three channels".to_string();
            return Err(bad(
                &format!("a tower of {} channels", spec.channels),
                cause,
            ));
        }
        for key in ["do_resize", "do_rescale", "do_normalize"] {
            if image.get(key) == Some(&Value::Bool(false)) {
                let cause = "this engine always resizes, rescales and normalises".to_string();
                return Err(bad(&format!("`{key}` = false"), cause));
            }
        }
        if let Some(filter) = number(image, "resample")?
            && filter != 3.0
        {
            return Err(bad(
                &format!("`resample` = {filter}"),
                "only 3 (bicubic) is there".into(),
            ));
        }
        let unit = (spec.patch * spec.merge).pow(2) as u64;
        let (min_pixels, max_pixels) = bounds(Some(image), (4 * unit, 1280 * unit))?;
        let (video_min, video_max) = bounds(video, (128 * unit, 768 * unit))?;
        let frames = |key: &str, default: usize| -> Result<usize> {
            let given = video.map_or(Ok(None), |v| number(v, key))?;
            Ok(given.map_or(default, |n| (n as usize).clamp(1, 1 << 16)))
        };
        let rescale = number(image, "rescale_factor")?.unwrap_or(1.0 / 255.0);
        Ok(Processor {
            shape: Shape {
                patch: spec.patch,
                temporal: spec.temporal_patch,
                merge: spec.merge,
            },
            normalize: Normalize::new(
                three(image, "image_mean", MEAN)?,
                three(image, "image_std", STD)?,
                rescale,
            ),
            min_pixels,
            max_pixels,
            video: VideoLimits {
                min_pixels: video_min,
                max_pixels: video_max,
                total_pixels: 115_200 * unit,
                min_frames: frames("min_frames", 4)?,
                max_frames: frames("max_frames", 768)?,
            },
        })
    }

    /// Reads and prepares what a message asks for. Relative paths are taken from `base`. One that cannot be used is one error, which names
    /// it (Code::Media, Code::Io, Code::Usage).
    pub fn load_request(
        &self,
        request: &MediaRequest,
        base: &Path,
        tools: &VideoTools,
    ) -> Result<Visual> {
        match request {
            MediaRequest::Image { at, options } => {
                self.image(&open(at, base)?, &at_name(at), options)
            }
            MediaRequest::Frames { at, options } => {
                let mut frame = |i: usize| open(&at[i], base);
                self.listed(at.len(), &mut frame, options)
            }
            MediaRequest::Video { at, options } => {
                let path = video_file(at, base)?;
                if path.is_dir() {
                    let files = frame_files(&path)?;
                    let mut frame = |i: usize| read_image(&files[i]);
                    return self.listed(files.len(), &mut frame, options);
                }
                self.clip(&path, tools, options)
            }
        }
    }

    /// An image, resized within the model's bounds (or those of `options`).
    pub fn image(&self, image: &Rgb, name: &str, options: &Options) -> Result<Visual> {
        let size = self.image_target((image.height, image.width), name, options)?;
        let mut collector = Collector::new(size);
        collector.push(image);
        Ok(collector.finish(Kind::Image, self.shape, self.normalize.clone()))
    }

    /// Frames somebody chose: used as they are, `options.fps` of them a second, unless there are more than `options.max_frames`, of which an
    /// even selection is then taken.
    fn listed(
        &self,
        count: usize,
        frame: &mut dyn FnMut(usize) -> Result<Rgb>,
        options: &Options,
    ) -> Result<Visual> {
        let chosen = self.choose_listed(count, options)?;
        let mut frames = chosen.indices.iter().map(|i| frame(*i));
        self.frames(chosen.indices.len(), &mut frames, chosen.fps, options)
    }

    fn clip(&self, path: &Path, tools: &VideoTools, options: &Options) -> Result<Visual> {
        let clip = tools.open(path)?;
        let chosen = self.choose_sampled(&clip, options)?;
        let mut frames = clip.decode(&chosen.indices)?;
        self.frames(chosen.indices.len(), &mut frames, chosen.fps, options)
    }

    pub(super) fn choose_listed(&self, count: usize, options: &Options) -> Result<Chosen> {
        let fps = options.fps.unwrap_or(FPS);
        let limit = options.max_frames.unwrap_or(self.video.max_frames);
        let indices = if count > limit {
            let (all, factor) = (count as f64, self.shape.temporal);
            sample_frames(count, all, all, (1, limit), factor, options.sampling)?
        } else {
            (0..count).collect()
        };
        Ok(Chosen {
            fps: fps * indices.len() as f64 / count.max(1) as f64,
            indices,
        })
    }

    pub(super) fn choose_sampled(&self, clip: &Clip<'_>, options: &Options) -> Result<Chosen> {
        let range = (
            self.video.min_frames,
            options.max_frames.unwrap_or(self.video.max_frames),
        );
        let indices = sample_frames(
            clip.frames,
            clip.fps,
            options.fps.unwrap_or(FPS),
            range,
            self.shape.temporal,
            options.sampling,
        )?;
        Ok(Chosen {
            fps: clip.fps * indices.len() as f64 / clip.frames as f64,
            indices,
        })
    }

    /// `count` frames sampled at `fps`, all brought to the size the first one asks for.
    pub fn frames(
        &self,
        count: usize,
        frames: &mut dyn Iterator<Item = Result<Rgb>>,
        fps: f64,
        options: &Options,
    ) -> Result<Visual> {
        let kind = self.video_kind(fps, options)?;
        let mut collector: Option<Collector> = None;
        for frame in frames {
            let frame = frame?;
            let collector = match &mut collector {
                Some(c) => c,
                None => {
                    let size = self.frame_target((frame.height, frame.width), count, options)?;
                    collector.insert(Collector::new(size))
                }
            };
            collector.push(&frame);
        }
        let collector = collector.ok_or_else(no_frames)?;
        Ok(collector.finish(kind, self.shape, self.normalize.clone()))
    }

    pub(super) fn video_kind(&self, fps: f64, options: &Options) -> Result<Kind> {
        if !fps.is_finite() || fps <= 0.0 {
            return Err(Error::new(
                Code::Usage,
                "cannot place the video's frames in time",
                format!("{fps} frames a second make no sense"),
                "give an fps above 0",
            ));
        }
        let seconds = self.shape.temporal as f64 / fps;
        Ok(Kind::Video {
            seconds_per_grid: match options.clock {
                Clock::Whole => seconds.trunc(),
                Clock::Exact => seconds,
            },
        })
    }

    /// The (height, width) an image of `size` is brought to.
    pub(super) fn image_target(
        &self,
        size: (usize, usize),
        name: &str,
        options: &Options,
    ) -> Result<(usize, usize)> {
        let min = options.min_pixels.unwrap_or(self.min_pixels);
        let max = options.max_pixels.unwrap_or(self.max_pixels);
        self.target(size, name, min, max)
    }

    /// The (height, width) that each of `count` frames is brought to, the first of which has `size`.
    pub(super) fn frame_target(
        &self,
        size: (usize, usize),
        count: usize,
        options: &Options,
    ) -> Result<(usize, usize)> {
        let limits = &self.video;
        let min = options.min_pixels.unwrap_or(limits.min_pixels);
        let share = limits.total_pixels * self.shape.temporal as u64 / count.max(1) as u64;
        let max = options.max_pixels.unwrap_or(limits.max_pixels).min(share);
        let max = max.max(min + min / 20);
        self.target(size, "of the first frame", min, max)
    }

    fn target(
        &self,
        (height, width): (usize, usize),
        name: &str,
        min: u64,
        max: u64,
    ) -> Result<(usize, usize)> {
        if max > MAX_TARGET_PIXELS || min > max {
            return Err(Error::new(
                Code::Usage,
                format!("a picture of {min} to {max} pixels cannot be made"),
                format!("the bounds must ascend and stay below {MAX_TARGET_PIXELS}"),
                "give other --min-pixels and --max-pixels",
            ));
        }
        smart_resize(height, width, self.shape.factor(), min, max).ok_or_else(|| {
            let cause =
                format!("{width} x {height} pixels: one side is more than 200 times the other");
            super::decode::broken(name, &cause)
        })
    }
}

/// The (height, width) a picture is resized to: both multiples of `factor`, near its own aspect, between `min` and `max` pixels.
/// Rounded half to even, as Python rounds. `None` where one side is more than 200 times the other.
pub fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    min: u64,
    max: u64,
) -> Option<(usize, usize)> {
    let (h, w, f) = (height as f64, width as f64, factor as f64);
    if height == 0 || width == 0 || h.max(w) / h.min(w) > 200.0 {
        return None;
    }
    let round = |x: f64| (x / f).round_ties_even() as usize * factor;
    let (high, wide) = (round(h), round(w));
    let pixels = (high * wide) as u64;
    Some(if pixels > max {
        let beta = (h * w / max as f64).sqrt();
        let fit = |x: f64| factor.max((x / beta / f).floor() as usize * factor);
        (fit(h), fit(w))
    } else if pixels < min {
        let beta = (min as f64 / (h * w)).sqrt();
        let fit = |x: f64| (x * beta / f).ceil() as usize * factor;
        (fit(h), fit(w))
    } else {
        (high, wide)
    })
}

pub(super) fn no_frames() -> Error {
    Error::new(
        Code::Media,
        "cannot use the video",
        "it has no frames",
        "give a video, or a folder or list of PNG, JPEG or WebP frames",
    )
}

#[cfg(test)]
mod tests;
