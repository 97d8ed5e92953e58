//! The pictures of a prompt, or of a job's rows, ready to be asked what they would take with fewer pixels or frames.

use crate::engine::VisionRoom;
use crate::engine::jobs::{PictureSample, RowPictures};
use crate::media::{Kind, Measure, Options, Processor};

/// The pictures of a prompt, or of a job's rows, as they were measured.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Looked {
    processor: Processor,
    pictures: Vec<Picture>,
    /// What the command line says of all pictures.
    given: Options,
    /// Of their pixels, those that are in memory already.
    pub held_bytes: u64,
    /// The context was chosen to hold the prompt, so that fewer tokens make it shorter.
    pub context_follows: bool,
    /// Tokens of the prompt that are not theirs.
    pub text_tokens: usize,
}

#[derive(Clone, Copy, Debug)]
struct Picture {
    /// Of a job.
    row: usize,
    measure: Measure,
    options: Options,
}

/// Bounds laid over what the command line says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limit {
    pub max_pixels: Option<u64>,
    pub max_frames: Option<usize>,
}

/// What pictures take.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(in crate::cli) struct Need {
    pub room: VisionRoom,
    pub tokens: usize,
    pub pixel_bytes: u64,
    /// Of the one whose decoding takes most.
    pub decode_bytes: u64,
    /// The same as a job is sized by it, row by row.
    pub sample: PictureSample,
}

impl Looked {
    /// `given`: what the command line says of all pictures.
    pub fn new(processor: &Processor, given: Options) -> Looked {
        Looked {
            processor: processor.clone(),
            pictures: Vec::new(),
            given,
            held_bytes: 0,
            context_follows: false,
            text_tokens: 0,
        }
    }

    pub fn add(&mut self, measure: Measure, options: Options) {
        self.pictures.push(Picture {
            row: 0,
            measure,
            options,
        });
    }

    /// Those of all rows of a job.
    pub fn of_job(processor: &Processor, given: Options, rows: Vec<RowPictures>) -> Looked {
        let picture = |row, (measure, options)| Picture {
            row,
            measure,
            options,
        };
        let rows = rows.into_iter().enumerate();
        Looked {
            pictures: rows
                .flat_map(|(row, all)| all.into_iter().map(move |p| picture(row, p)))
                .collect(),
            ..Looked::new(processor, given)
        }
    }

    pub fn need(&self) -> Need {
        self.under(Limit::default()).unwrap_or_default()
    }

    /// What they would take. `None` where a picture cannot be made so small.
    pub(super) fn under(&self, limit: Limit) -> Option<Need> {
        let mut need = Need::default();
        let smaller = |p: &Picture| {
            let options = self.laid_over(p, limit);
            self.processor.remeasure(&p.measure, &options).ok()
        };
        for row in self.pictures.chunk_by(|a, b| a.row == b.row) {
            let row = row.iter().map(smaller).collect::<Option<Vec<Measure>>>()?;
            need.sample.add(&row);
            for m in row {
                need.room.patches += m.grid.patches();
                need.room.slice = need.room.slice.max(m.grid.slice());
                need.room.tokens += m.tokens;
                need.pixel_bytes += m.pixel_bytes;
                need.decode_bytes = need.decode_bytes.max(m.decode_bytes);
            }
        }
        need.tokens = need.room.tokens;
        Some(need)
    }

    /// A picture that says itself how large it is to be does not follow the command line.
    fn laid_over(&self, p: &Picture, limit: Limit) -> Options {
        let mut options = p.options;
        if let Some(most) = limit.max_pixels
            && options.max_pixels == self.given.max_pixels
        {
            options.max_pixels = Some(most);
            if options.min_pixels == self.given.min_pixels {
                options.min_pixels = options.min_pixels.map(|least| least.min(most));
            }
        }
        if let Some(most) = limit.max_frames
            && options.max_frames == self.given.max_frames
        {
            options.max_frames = Some(most);
        }
        options
    }

    /// The limit as it is typed.
    pub(super) fn told(&self, limit: Limit) -> String {
        let mut words = Vec::new();
        if let Some(most) = limit.max_pixels {
            // The bounds must ascend.
            if self.given.min_pixels.is_some_and(|least| least > most) {
                words.push(format!("--min-pixels {most}"));
            }
            words.push(format!("--max-pixels {most}"));
        }
        if let Some(most) = limit.max_frames {
            words.push(format!("--max-frames {most}"));
        }
        words.join(" ")
    }

    /// The loosest limits under which `enough` holds, on pixels and on frames; none where no limit is enough, or where nothing would change.
    pub(super) fn loosest(&self, enough: &dyn Fn(&Need) -> bool) -> Vec<(Limit, Need)> {
        [
            self.fewest_lost(self.pixel_limits(), enough),
            self.fewest_lost(self.frame_limits(), enough),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// A quarter and a sixteenth of the largest picture's pixels; half and a quarter of the longest video's frames.
    pub(super) fn steps(&self) -> Vec<(Limit, Need)> {
        let pixels = self.pixel_limits();
        let frames = self.frame_limits();
        let mut steps = Vec::new();
        for part in [4, 16] {
            steps.extend(pixels.as_ref().and_then(|l| self.at(l, l.now / part)));
        }
        for part in [2, 4] {
            steps.extend(frames.as_ref().and_then(|l| self.at(l, l.now / part)));
        }
        steps
    }

    fn at(&self, limits: &Limits, steps: usize) -> Option<(Limit, Need)> {
        let limit = (limits.make)(steps);
        let need = (steps > 0).then(|| self.under(limit))??;
        (need != self.need()).then_some((limit, need))
    }

    /// By the cells that tokens are made of.
    fn pixel_limits(&self) -> Option<Limits> {
        let cell = self.pictures.first()?.measure.cell_pixels();
        let largest = self.pictures.iter().map(|p| p.measure.pixels()).max()?;
        Some(Limits {
            now: (largest / cell) as usize,
            make: Box::new(move |cells| Limit {
                max_pixels: Some(cells as u64 * cell),
                ..Limit::default()
            }),
        })
    }

    /// By pairs of frames, or as many as share a patch.
    fn frame_limits(&self) -> Option<Limits> {
        let videos = self
            .pictures
            .iter()
            .filter(|p| p.measure.kind != Kind::Image);
        let longest = videos.map(|p| p.measure).max_by_key(|m| m.frames)?;
        let together = longest.frames.div_ceil(longest.grid.t.max(1)).max(1);
        Some(Limits {
            now: longest.grid.t,
            make: Box::new(move |pairs| Limit {
                max_frames: Some(pairs * together),
                ..Limit::default()
            }),
        })
    }

    fn fewest_lost(
        &self,
        limits: Option<Limits>,
        enough: &dyn Fn(&Need) -> bool,
    ) -> Option<(Limit, Need)> {
        let limits = limits?;
        // Below the least that pictures are enlarged to there are none.
        let mut low = 1;
        while low < limits.now && self.under((limits.make)(low)).is_none() {
            low += 1;
        }
        let mut high = limits.now;
        let fits = |n: usize| self.at(&limits, n).filter(|(_, need)| enough(need));
        let mut best = fits(low)?;
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match fits(middle) {
                Some(found) => (low, best) = (middle, found),
                None => high = middle,
            }
        }
        Some(best)
    }
}

/// Limits of one kind, in steps: `now` is what the largest picture takes.
struct Limits {
    now: usize,
    make: Box<dyn Fn(usize) -> Limit>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::{Look, MediaRequest, VideoTools};
    use crate::spec::VisionSpec;
    use serde_json::json;
    use std::path::Path;

    fn looked(dir: &Path, wanted: &[MediaRequest], given: Options) -> Looked {
        let config = json!({"min_pixels": 3136, "max_pixels": 1_000_000});
        let config = config.as_object().unwrap();
        let processor = Processor::from_config(config, None, &VisionSpec::tiny()).unwrap();
        let mut looked = Looked::new(&processor, given);
        for request in wanted {
            let m = processor.measure(request, dir, &VideoTools::default(), Look::Header);
            looked.add(m.unwrap(), *request.options());
        }
        looked
    }

    fn image(dir: &Path, name: &str, options: Options) -> MediaRequest {
        image::RgbImage::from_pixel(640, 480, image::Rgb([9, 8, 7]))
            .save(dir.join(name))
            .unwrap();
        MediaRequest::Image {
            at: name.into(),
            options,
        }
    }

    #[test]
    fn the_loosest_limit_is_enough_and_the_next_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let given = Options::default();
        let one = looked(dir.path(), &[image(dir.path(), "a.png", given)], given);
        let now = one.need().tokens;
        for most in [now - 1, now / 2, 20] {
            let found = one.loosest(&|need| need.tokens <= most);
            let [(limit, need)] = found[..] else {
                panic!("{found:?}")
            };
            assert!(
                need.tokens <= most && need.tokens * 5 > most * 4,
                "{need:?} {most}"
            );
            let looser = Limit {
                max_pixels: limit.max_pixels.map(|n| n + 784),
                ..limit
            };
            assert!(one.under(looser).unwrap().tokens > most);
            assert_eq!(
                one.told(limit),
                format!("--max-pixels {}", limit.max_pixels.unwrap())
            );
        }
        // 3136 pixels are the least, 4 cells.
        assert!(one.loosest(&|need| need.tokens < 2).is_empty());
        assert!(one.loosest(&|_| false).is_empty());
    }

    #[test]
    fn a_picture_that_says_itself_how_large_it_is_stays_so() {
        let dir = tempfile::tempdir().unwrap();
        let own = Options {
            max_pixels: Some(200_000),
            ..Options::default()
        };
        let two = [
            image(dir.path(), "a.png", own),
            image(dir.path(), "b.png", Options::default()),
        ];
        let two = looked(dir.path(), &two, Options::default());
        let of_own = looked(dir.path(), &[image(dir.path(), "a.png", own)], own)
            .need()
            .tokens;
        let found = two.loosest(&|need| need.tokens <= of_own + 20);
        assert_eq!(found.len(), 1);
        assert!(two.loosest(&|need| need.tokens < of_own).is_empty());
    }

    #[test]
    fn a_lower_bound_above_the_limit_goes_down_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let given = Options {
            min_pixels: Some(500_000),
            max_pixels: Some(600_000),
            ..Options::default()
        };
        let one = looked(dir.path(), &[image(dir.path(), "a.png", given)], given);
        let [(limit, need)] = one.loosest(&|need| need.tokens <= 100)[..] else {
            panic!()
        };
        let most = limit.max_pixels.unwrap();
        assert!(need.tokens > 80);
        assert_eq!(
            one.told(limit),
            format!("--min-pixels {most} --max-pixels {most}")
        );
    }

    #[test]
    fn frames_are_given_up_in_pairs() {
        let dir = tempfile::tempdir().unwrap();
        let given = Options::default();
        for i in 0..9 {
            image(dir.path(), &format!("{i}.png"), given);
        }
        let at = (0..9).map(|i| format!("{i}.png")).collect();
        let video = looked(
            dir.path(),
            &[MediaRequest::Frames { at, options: given }],
            given,
        );
        let now = video.need();
        let half = video.loosest(&|need| need.tokens <= now.tokens / 2);
        let frames = half.iter().find(|(l, _)| l.max_frames.is_some()).unwrap();
        assert_eq!(frames.0.max_frames, Some(4));
        assert_eq!(frames.1.tokens, now.tokens / 5 * 2);
        assert!(half.iter().any(|(l, _)| l.max_pixels.is_some()));
        assert!(video.steps().len() >= 3, "{:?}", video.steps());
    }
}
