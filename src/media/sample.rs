//! Which frames of a video are looked at.

use crate::error::{Code, Error, Result};

/// How the chosen number of frames is spread over the video.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sampling {
    /// transformers: `arange(0, total, total / n)`: from the first frame on, never the last. The default.
    #[default]
    Arange,
    /// qwen-vl-utils: `linspace(0, total − 1, n)` rounded half to even: first and last frame included.
    Linspace,
}

/// Indices of the frames to look at, ascending: `total / source_fps · fps` of them, between `min_frames` and `max_frames`, never more than
/// there are, and a multiple of `factor` (frames a temporal patch takes). A video of a single frame gives that frame.
pub fn sample_frames(
    total: usize,
    source_fps: f64,
    fps: f64,
    (min_frames, max_frames): (usize, usize),
    factor: usize,
    sampling: Sampling,
) -> Result<Vec<usize>> {
    let bad = |cause: String| {
        Error::new(
            Code::Media,
            "cannot choose frames of the video",
            cause,
            "give a video with frames, and --fps above 0",
        )
    };
    if total == 0 {
        return Err(bad("it has no frames".into()));
    }
    let positive = |x: f64| x.is_finite() && x > 0.0;
    if !positive(source_fps) || !positive(fps) {
        return Err(bad(format!(
            "{source_fps} frames a second, sampled at {fps}"
        )));
    }
    let factor = factor.max(1);
    if total < factor {
        return Ok((0..total).collect());
    }
    let floor = |n: usize| n / factor * factor;
    let most = floor(max_frames.min(total)).max(factor);
    let wanted = total as f64 / source_fps * fps;
    let wanted = wanted
        .max(min_frames as f64)
        .min(most as f64)
        .min(total as f64);
    let n = floor(wanted as usize).max(factor);
    Ok(match sampling {
        Sampling::Arange => {
            let step = total as f64 / n as f64;
            // torch may count one more, rounded up to `total`: a frame that is not there, and that the reference then fails on.
            let count = (total as f64 / step).ceil() as usize;
            (0..n)
                .map(|i| (torch_arange(i, count, step) as usize).min(total - 1))
                .collect()
        }
        Sampling::Linspace => linspace(total, n),
    })
}

/// Element `i` of `count` of torch's float32 `arange(0, …, step)`: whole groups of eight count from a first element that is rounded already,
/// which decides here and there on which side of a whole number the others fall.
fn torch_arange(i: usize, count: usize, step: f64) -> f32 {
    const LANES: usize = 8;
    let group = i / LANES * LANES;
    if group + LANES > count {
        return (step * i as f64) as f32;
    }
    let base = (step * group as f64) as f32;
    (f64::from(base) + (i - group) as f64 * step) as f32
}

/// torch's float32 linspace is symmetric: the second half counts down from the end. Products and sums are fused.
fn linspace(total: usize, n: usize) -> Vec<usize> {
    if n == 1 {
        return vec![0];
    }
    let end = (total - 1) as f32;
    let step = f64::from(end / (n - 1) as f32);
    (0..n)
        .map(|i| {
            let x = if i < n / 2 {
                step * i as f64
            } else {
                f64::from(end) - step * (n - 1 - i) as f64
            };
            (x as f32).round_ties_even() as usize
        })
        .collect()
}

#[cfg(test)]
mod tests;
