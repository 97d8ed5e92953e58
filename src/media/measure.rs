//! How large a picture will be, before its pixels are there.

use std::path::Path;

use super::decode::{Head, head, read_head};
use super::locate::{Located, at_name, frame_files, locate, video_file};
use super::processor::no_frames;
use super::{Grid, Kind, MediaRequest, Options, Processor, VideoTools, decode, read_image};
use crate::error::Result;

/// Bytes that a frame of a video file and its resizing take for each pixel.
const FRAME_BYTES_PER_PIXEL: u64 = 12;

/// What [`Processor::load_request`] would make of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    pub kind: Kind,
    /// Height and width of what the file holds.
    pub from: (usize, usize),
    /// Frames that are looked at; 1 of an image.
    pub frames: usize,
    pub grid: Grid,
    /// Tokens it becomes in the prompt.
    pub tokens: usize,
    /// Host memory of the resized frames.
    pub pixel_bytes: u64,
    /// Host memory that making them takes for a moment besides, the largest file's own bytes included.
    pub decode_bytes: u64,
}

impl Measure {
    /// Of each frame, resized.
    pub fn pixels(&self) -> u64 {
        self.pixel_bytes / 3 / self.frames as u64
    }

    /// Pixels of a frame that become one token.
    pub fn cell_pixels(&self) -> u64 {
        self.pixels() * self.grid.t as u64 / self.tokens as u64
    }
}

/// How closely files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Headers only.
    Header,
    /// Every image is decoded, so that a broken one is found out. Of a video file only the first frame is.
    Whole,
}

impl Processor {
    /// As [`Processor::load_request`], but for the pixels. Errors are the same, as far as `look` sees them.
    pub fn measure(
        &self,
        request: &MediaRequest,
        base: &Path,
        tools: &VideoTools,
        look: Look,
    ) -> Result<Measure> {
        match request {
            MediaRequest::Image { at, options } => {
                let from = image_head(at, base, look)?;
                let to = self.image_target((from.height, from.width), &at_name(at), options)?;
                let from_size = (from.height, from.width);
                Ok(self.measured(Kind::Image, 1, from.decode_bytes, from_size, to))
            }
            MediaRequest::Frames { at, options } => {
                let mut head = |i: usize| image_head(&at[i], base, look);
                self.listed_size(at.len(), &mut head, options)
            }
            MediaRequest::Video { at, options } => {
                let path = video_file(at, base)?;
                if path.is_dir() {
                    let files = frame_files(&path)?;
                    let mut head = |i: usize| file_head(&files[i], look);
                    return self.listed_size(files.len(), &mut head, options);
                }
                let clip = tools.open(&path)?;
                let chosen = self.choose_sampled(&clip, options)?;
                let first = clip.decode(&[0])?.next().ok_or_else(no_frames)??;
                let from = (first.height, first.width);
                let to = self.frame_target(from, chosen.indices.len(), options)?;
                Ok(self.measured(
                    self.video_kind(chosen.fps, options)?,
                    chosen.indices.len(),
                    (from.0 * from.1) as u64 * FRAME_BYTES_PER_PIXEL,
                    from,
                    to,
                ))
            }
        }
    }

    fn listed_size(
        &self,
        count: usize,
        head: &mut dyn FnMut(usize) -> Result<Head>,
        options: &Options,
    ) -> Result<Measure> {
        let chosen = self.choose_listed(count, options)?;
        let (first, others) = chosen.indices.split_first().ok_or_else(no_frames)?;
        let from = head(*first)?;
        let mut decode_bytes = from.decode_bytes;
        for i in others {
            decode_bytes = decode_bytes.max(head(*i)?.decode_bytes);
        }
        let from = (from.height, from.width);
        let to = self.frame_target(from, chosen.indices.len(), options)?;
        Ok(self.measured(
            self.video_kind(chosen.fps, options)?,
            chosen.indices.len(),
            decode_bytes,
            from,
            to,
        ))
    }

    /// What `seen` would be under other bounds on its pixels, or fewer frames; no file is looked at again. Its place in time stays.
    pub fn remeasure(&self, seen: &Measure, options: &Options) -> Result<Measure> {
        let together = self.shape.temporal;
        let (count, to) = match seen.kind {
            Kind::Image => (1, self.image_target(seen.from, "", options)?),
            Kind::Video { .. } => {
                let most = options.max_frames.unwrap_or(usize::MAX);
                let count = match seen.frames > most {
                    true => (most / together * together).max(together).min(seen.frames),
                    false => seen.frames,
                };
                (count, self.frame_target(seen.from, count, options)?)
            }
        };
        Ok(self.measured(seen.kind, count, seen.decode_bytes, seen.from, to))
    }

    /// `from` what the file holds, brought to `height` × `width`.
    fn measured(
        &self,
        kind: Kind,
        count: usize,
        decode_bytes: u64,
        from: (usize, usize),
        (height, width): (usize, usize),
    ) -> Measure {
        let s = self.shape;
        let grid = Grid {
            t: count.div_ceil(s.temporal),
            h: height / s.patch,
            w: width / s.patch,
        };
        Measure {
            kind,
            from,
            frames: count,
            grid,
            tokens: grid.patches() / (s.merge * s.merge),
            pixel_bytes: (count * height * width * 3) as u64,
            decode_bytes,
        }
    }
}

fn image_head(at: &str, base: &Path, look: Look) -> Result<Head> {
    match locate(at, base)? {
        Located::File(path) => file_head(&path, look),
        Located::Bytes(bytes) => {
            let found = head(&bytes, &at_name(at))?;
            if look == Look::Whole {
                decode(&bytes, &at_name(at))?;
            }
            Ok(found)
        }
    }
}

fn file_head(path: &Path, look: Look) -> Result<Head> {
    let found = read_head(path)?;
    if look == Look::Whole {
        read_image(path)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::Visual;
    use crate::spec::VisionSpec;
    use serde_json::json;

    fn processor() -> Processor {
        let config = json!({"min_pixels": 3136, "max_pixels": 100_000});
        Processor::from_config(config.as_object().unwrap(), None, &VisionSpec::tiny()).unwrap()
    }

    fn write(path: &Path, width: u32, height: u32) {
        image::RgbImage::from_pixel(width, height, image::Rgb([9, 8, 7]))
            .save(path)
            .unwrap();
    }

    fn agree(measure: &Measure, visual: &Visual) {
        assert_eq!((measure.kind, measure.grid), (visual.kind, visual.grid));
        assert_eq!(measure.tokens, visual.tokens());
        assert_eq!(measure.pixel_bytes, visual.bytes());
    }

    #[test]
    fn what_is_measured_is_what_comes() {
        let dir = tempfile::tempdir().unwrap();
        let p = processor();
        let tools = VideoTools::default();
        std::fs::create_dir(dir.path().join("frames")).unwrap();
        for i in 0..5 {
            write(&dir.path().join(format!("frames/{i}.png")), 70, 45);
        }
        let at = |name: &str| name.to_string();
        let options = Options::default();
        let mut wanted = vec![
            MediaRequest::Video {
                at: at("frames"),
                options: Options {
                    fps: Some(3.0),
                    ..options
                },
            },
            MediaRequest::Frames {
                at: (0..5).map(|i| format!("frames/{i}.png")).collect(),
                options: Options {
                    max_frames: Some(3),
                    ..options
                },
            },
        ];
        for (i, (width, height)) in [(5, 5), (640, 480), (31, 900), (1200, 40)]
            .iter()
            .enumerate()
        {
            write(&dir.path().join(format!("{i}.jpg")), *width, *height);
            wanted.push(MediaRequest::Image {
                at: format!("{i}.jpg"),
                options,
            });
        }
        for request in &wanted {
            let visual = p.load_request(request, dir.path(), &tools).unwrap();
            for look in [Look::Header, Look::Whole] {
                let measure = p.measure(request, dir.path(), &tools, look).unwrap();
                agree(&measure, &visual);
                assert_eq!(measure.pixels() * 3 * measure.frames as u64, visual.bytes());
                assert_eq!(measure.cell_pixels(), 784);
            }
        }
    }

    #[test]
    fn measured_again_under_other_options_is_what_comes_then() {
        let dir = tempfile::tempdir().unwrap();
        let (p, tools) = (processor(), VideoTools::default());
        for i in 0..7 {
            write(&dir.path().join(format!("{i}.png")), 400, 300);
        }
        let image = |options| MediaRequest::Image {
            at: "0.png".into(),
            options,
        };
        let frames = |options| MediaRequest::Frames {
            at: (0..7).map(|i| format!("{i}.png")).collect(),
            options,
        };
        let plain = Options::default();
        let fewer = |max_pixels, max_frames| Options {
            max_pixels,
            max_frames,
            ..plain
        };
        let mut changed = 0;
        for options in [
            fewer(Some(50_000), None),
            fewer(None, Some(5)),
            fewer(None, Some(1)),
            fewer(Some(120_000), Some(2)),
        ] {
            for (was, is) in [
                (image(plain), image(options)),
                (frames(plain), frames(options)),
            ] {
                let was = p.measure(&was, dir.path(), &tools, Look::Header).unwrap();
                let is = p.measure(&is, dir.path(), &tools, Look::Header).unwrap();
                let again = p.remeasure(&was, &options).unwrap();
                assert_eq!(
                    Measure {
                        kind: is.kind,
                        ..again
                    },
                    is,
                    "{options:?}"
                );
                changed += usize::from(is.grid != was.grid);
            }
        }
        assert!(changed >= 4, "{changed}");
        let small = fewer(Some(100), None);
        let was = p
            .measure(&image(plain), dir.path(), &tools, Look::Header)
            .unwrap();
        assert!(p.remeasure(&was, &small).is_err(), "below the least");
    }

    #[test]
    fn only_a_whole_look_finds_what_the_header_hides() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        write(&path, 64, 64);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 30]).unwrap();
        let request = MediaRequest::Image {
            at: "a.png".into(),
            options: Options::default(),
        };
        let p = processor();
        let look = |look| p.measure(&request, dir.path(), &VideoTools::default(), look);
        assert!(look(Look::Header).is_ok() && look(Look::Whole).is_err());
        std::fs::write(&path, b"no picture").unwrap();
        assert!(look(Look::Header).is_err());
    }
}
