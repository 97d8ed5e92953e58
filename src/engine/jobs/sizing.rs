//! How much a job may run at once: sequences, KV room and context, from a look at its rows.

use std::collections::BinaryHeap;

use super::BatchJob;
use super::body::Body;
use super::input::{Line, Source};
use super::request::{RowIds, Rules, TextTools};
use super::scan::{State, parse_line};
use crate::engine::VisionRoom;
use crate::error::Result;
use crate::media::{Measure, Options};
use crate::model::kv::{BLOCK_TOKENS, block_bytes};
use crate::paging::{PassCost, best_concurrency};
use crate::spec::{ModelSpec, VisionSpec};

/// What other than the fixed rule has to bring, predicted: rates measured on a busy machine are on record too, and where computing is the bound
/// they make few sequences look as good as many.
const EARNED: f64 = 1.05;
/// KV room over what rows take on average.
const KV_MARGIN: f64 = 1.1;
/// Keys and values get one part in so many of the memory they lie in, the first of these that leaves room for the model.
pub const KV_SHARES: [u64; 5] = [2, 4, 8, 16, 32];
/// Rows looked at, spread evenly over the input, and as many of the longest.
const SAMPLED_ROWS: usize = 128;
/// Sequences at once where nobody says otherwise.
const DEFAULT_SEQUENCES: usize = 256;
/// Jobs that wait in the engine besides those that may run, so that a place never stays empty for a pass.
const AHEAD: usize = 16;
/// Long rows are kept while the file is read: at most a few megabytes, for a row that would fill memory is no sample.
const KEPT_ROWS: usize = 16;
const KEPT_BYTES: usize = 1 << 20;
/// Pictures that are remembered for advice: a few tens of megabytes.
const MOST_PICTURES: usize = 1 << 16;
/// Tokens of pictures that go through the vision tower in one wave where memory allows: a few dozen images, so that streaming the tower for
/// them is little beside computing.
const WAVE_TOKENS: usize = 16384;

/// What rows look like, from some of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowSample {
    /// Prompt and longest possible answer of a sequence, on average.
    pub mean_tokens: f64,
    pub longest_tokens: usize,
    /// Sequences a row stands for (its `n`), on average.
    pub choices: f64,
    pub pictures: PictureSample,
    /// Memory that reading the largest row takes for a moment.
    pub reading_bytes: u64,
}

/// The pictures of a row as they were measured, each with what was said of it.
pub type RowPictures = Vec<(Measure, Options)>;

/// What the pictures of the rows to do look like; of all rows, since room is made for the largest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PictureSample {
    pub rows: u64,
    pub patches: usize,
    /// Patches of the largest image or frame pair.
    pub slice: usize,
    pub tokens: usize,
    /// Of one row.
    pub longest_tokens: usize,
    /// Host memory of the resized pixels, in all and of one row.
    pub pixel_bytes: u64,
    pub largest_pixel_bytes: u64,
    /// What decoding the largest one takes besides.
    pub decode_bytes: u64,
}

impl PictureSample {
    /// The pictures of one more row.
    pub fn add(&mut self, row: &[Measure]) {
        if row.is_empty() {
            return;
        }
        let tokens: usize = row.iter().map(|m| m.tokens).sum();
        let bytes: u64 = row.iter().map(|m| m.pixel_bytes).sum();
        self.rows += 1;
        self.tokens += tokens;
        self.longest_tokens = self.longest_tokens.max(tokens);
        self.pixel_bytes += bytes;
        self.largest_pixel_bytes = self.largest_pixel_bytes.max(bytes);
        for m in row {
            self.patches += m.grid.patches();
            self.slice = self.slice.max(m.grid.slice());
            self.decode_bytes = self.decode_bytes.max(m.decode_bytes);
        }
    }
}

/// What to open an engine with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizing {
    pub sequences: usize,
    pub kv_tokens: usize,
    pub context: usize,
    /// What a row takes at most, on average: prompts and answers of all its choices.
    pub row_tokens: usize,
    /// Sequences that wait in the engine besides those that may run.
    pub ahead: usize,
    /// Room for pictures; `None` where no row has any.
    pub vision: Option<VisionRoom>,
    /// Bytes of resized pixels that rows in the engine may hold, and those of the largest row.
    pub pixels: u64,
    pub largest_pixels: u64,
    /// Host memory that reading a row or decoding a picture takes for a moment.
    pub reading_bytes: u64,
}

/// What the user asked for, and what there is.
#[derive(Clone, Copy, Debug)]
pub struct SizingInput {
    pub sequences: Option<usize>,
    pub kv_bytes: Option<u64>,
    /// Where `kv_bytes` is not given: one part in so many of the memory that keys and values lie in.
    pub kv_share: u64,
    pub context: Option<usize>,
    /// Bytes this process may take of host memory in all.
    pub budget: u64,
    /// Bytes it may take of the GPU beside context and kernels, where one computes: keys and values lie there.
    pub gpu: Option<u64>,
    pub element_bytes: usize,
    /// Rows to do.
    pub rows: u64,
}

impl BatchJob {
    /// Looks at some of the rows that remain. Bad rows are passed over.
    pub fn sample(&self, text: &TextTools<'_>) -> Result<RowSample> {
        let open = |i: &usize| self.scan.marks[*i].state == State::Pending;
        let all: Vec<usize> = (0..self.scan.marks.len()).filter(open).collect();
        let mut sample = sample(&self.spec.source, &self.spec.rules, text, &all)?;
        // A short row may ask for the longest answer of all.
        let asked = self.scan.longest_answer;
        sample.longest_tokens = sample.longest_tokens.max(asked);
        sample.reading_bytes = self.scan.reading_bytes();
        Ok(sample)
    }
}

impl BatchJob {
    /// The pictures of each row that remains and has some, as they were measured and what is said of each: to ask what they would take if
    /// they were smaller. `None` where no row has any, or all have too many.
    pub fn pictures(&self, text: &TextTools<'_>) -> Result<Option<Vec<RowPictures>>> {
        let Some(looker) = text.looker else {
            return Ok(None);
        };
        let (source, rules) = (&self.spec.source, &self.spec.rules);
        let mut lines = source.lines_up_to(text.limits.row_bytes)?;
        let (mut rows, mut left) = (Vec::new(), MOST_PICTURES);
        for mark in &self.scan.marks {
            let Some(mut line) = lines.next_line()? else {
                break;
            };
            if mark.state != State::Pending || !may_hold_pictures(&line.bytes) {
                continue;
            }
            // Bad rows are passed over.
            let body = parsed(source, rules, text, &mut line);
            let Some(body) = body.filter(|b| !b.pictures.is_empty()) else {
                continue;
            };
            let Ok(measured) = looker.measure(&body) else {
                continue;
            };
            let Some(rest) = left.checked_sub(body.pictures.len()) else {
                return Ok(None);
            };
            left = rest;
            let said = body.pictures.iter().map(|p| *p.options());
            rows.push(measured.pictures.into_iter().zip(said).collect());
        }
        Ok((!rows.is_empty()).then_some(rows))
    }
}

/// The row on a line, where it is a good one. Of a long one the text is given up.
fn parsed(source: &Source, rules: &Rules, text: &TextTools<'_>, line: &mut Line) -> Option<Body> {
    let request = parse_line(source, line, RowIds::default()).request.ok()?;
    if line.bytes.len() >= KEPT_BYTES {
        line.bytes = Vec::new();
    }
    request.body(rules, text).ok()
}

/// Parses some of the rows at `open` (sorted indices), the longest rows of the file by bytes, and every open row with pictures.
fn sample(
    source: &Source,
    rules: &Rules,
    text: &TextTools<'_>,
    open: &[usize],
) -> Result<RowSample> {
    let mut lines = source.lines_up_to(text.limits.row_bytes)?;
    let stride = open.len().div_ceil(SAMPLED_ROWS).max(1);
    let mut chosen = open.iter().copied().step_by(stride).peekable();
    let mut open = open.iter().copied().peekable();
    let mut longest: BinaryHeap<std::cmp::Reverse<(usize, Vec<u8>, u64)>> = BinaryHeap::new();
    let mut sizes: Vec<(usize, u32)> = Vec::new();
    let mut longest_tokens = 0;
    let mut pictures = PictureSample::default();
    let parsed = |line: &mut Line| parsed(source, rules, text, line);
    let plain = |b: Body| (b.length.in_all(b.prompt.len()), b.choices);
    let mut index = 0;
    while let Some(mut line) = lines.next_line()? {
        let is_open = open.next_if_eq(&index).is_some();
        let is_chosen = chosen.next_if_eq(&index).is_some();
        let looker = text
            .looker
            .filter(|_| is_open && may_hold_pictures(&line.bytes));
        let looked_at = looker.is_some() || is_chosen;
        let body = looked_at.then(|| parsed(&mut line)).flatten();
        if let (Some(looker), Some(body)) = (looker, &body)
            && !body.pictures.is_empty()
        {
            // What the model's files do not say is no row's fault.
            looker.processor()?;
            if let Ok(m) = looker.measure(body) {
                pictures.add(&m.pictures);
                let row = body.length.in_all(m.prompt_tokens);
                longest_tokens = longest_tokens.max(row);
                if is_chosen {
                    sizes.push((row, body.choices));
                }
            }
        } else if is_chosen {
            sizes.extend(body.map(plain));
        } else if let Some(body) = body {
            longest_tokens = longest_tokens.max(plain(body).0);
        } else if (1..KEPT_BYTES).contains(&line.bytes.len()) {
            let least = longest.peek().map_or(0, |r| r.0.0);
            if longest.len() < KEPT_ROWS || line.bytes.len() > least {
                longest.push(std::cmp::Reverse((
                    line.bytes.len(),
                    line.bytes,
                    line.number,
                )));
                if longest.len() > KEPT_ROWS {
                    longest.pop();
                }
            }
        }
        index += 1;
    }
    for std::cmp::Reverse((_, bytes, number)) in longest {
        let mut line = Line {
            number,
            bytes,
            too_long: None,
        };
        let body = parsed(&mut line).filter(|b| b.pictures.is_empty());
        longest_tokens = longest_tokens.max(body.map_or(0, |b| plain(b).0));
    }
    let n = sizes.len().max(1) as f64;
    let sequences: f64 = sizes.iter().map(|(_, c)| f64::from(*c)).sum();
    let tokens: f64 = sizes.iter().map(|(t, c)| *t as f64 * f64::from(*c)).sum();
    Ok(RowSample {
        mean_tokens: tokens / sequences.max(1.0),
        longest_tokens: sizes
            .iter()
            .map(|(t, _)| *t)
            .fold(longest_tokens, usize::max),
        choices: (sequences / n).max(1.0),
        pictures,
        reading_bytes: 0,
    })
}

/// A row without these letters has no picture; with them it is looked into.
fn may_hold_pictures(row: &[u8]) -> bool {
    ["image", "video"]
        .iter()
        .any(|word| row.windows(word.len()).any(|w| w == word.as_bytes()))
}

impl Sizing {
    /// A deep queue: memory goes to KV and to sequences before it goes to weights. What the user asked for is taken as it is.
    /// The context is the model's own: it costs nothing, and were it chosen by what memory holds or by the rows that happen
    /// to remain, a long answer would end elsewhere in a resumed job than in a whole one.
    pub fn choose(spec: &ModelSpec, sample: &RowSample, i: &SizingInput) -> Sizing {
        let token_bytes = block_bytes(spec.layers, spec.kv_heads, spec.head_size, i.element_bytes)
            / BLOCK_TOKENS as u64;
        let room = i.gpu.unwrap_or(i.budget) / i.kv_share.max(1);
        let kv_room = i.kv_bytes.unwrap_or(room) / token_bytes.max(1);
        // Logits and pictures take of both.
        let least = i.gpu.map_or(i.budget, |gpu| gpu.min(i.budget));
        let context = i.context.unwrap_or(spec.max_positions);
        let context = context.clamp(2, spec.max_positions.max(2));
        let sequences = i.sequences.unwrap_or_else(|| {
            let there_are = (i.rows as f64 * sample.choices).ceil() as usize;
            let mut n = DEFAULT_SEQUENCES.min(there_are);
            // Whole rows of logits are kept for the sampler.
            while n > 1 && (n * spec.vocab * 4) as u64 > least / 8 {
                n /= 2;
            }
            n
        });
        let sequences = sequences.max(1);
        let wanted = (sequences as f64 * sample.mean_tokens * KV_MARGIN) as usize;
        let longest = sample.longest_tokens.min(context);
        let kv_tokens = match i.kv_bytes {
            Some(_) => kv_room as usize,
            None => wanted.max(longest).min(kv_room as usize),
        };
        let sizing = Sizing {
            sequences,
            kv_tokens: kv_tokens.max(BLOCK_TOKENS),
            context,
            row_tokens: (sample.mean_tokens * sample.choices).ceil() as usize,
            ahead: AHEAD,
            // While pictures are decoded, of the row there is the text that holds them.
            reading_bytes: sample
                .reading_bytes
                .max(sample.reading_bytes / 2 + sample.pictures.decode_bytes),
            ..Sizing::default()
        };
        match &spec.vision {
            Some(vision) if sample.pictures.rows > 0 => {
                sizing.with_pictures(vision, &sample.pictures, least)
            }
            _ => sizing,
        }
    }

    /// As [`Sizing::choose`], with KV room for as many sequences as give the most tokens a second, and how many these are: memory that holds keys and
    /// values holds no weights, and whether that costs more than the sequences bring is a matter of the disk's rate and of computing. `pass`
    /// divides the memory for a sizing and predicts passes of so many sequences; `None` where they do not fit. The fixed rule's answer is one
    /// of those compared, and stands unless another earns [`EARNED`]. `None`: nothing fits.
    pub fn fastest(
        spec: &ModelSpec,
        sample: &RowSample,
        i: &SizingInput,
        pass: &mut dyn FnMut(&Sizing, usize) -> Option<PassCost>,
    ) -> Option<(Sizing, f64)> {
        let rate = |rows: usize, cost: &PassCost| rows as f64 / cost.pass_s.max(1e-12);
        let mut shares = KV_SHARES.iter().map(|kv_share| SizingInput {
            kv_share: *kv_share,
            ..*i
        });
        let fixed = shares.find_map(|input| {
            let sizing = Sizing::choose(spec, sample, &input);
            let rows = sizing.running(sample);
            Some((sizing, rate(rows, &pass(&sizing, rows)?)))
        });
        // Places stay as many: rows that turn out shorter than they may be, or share a prefix, run in them.
        let whole = Sizing::choose(spec, sample, &SizingInput { kv_share: 1, ..*i });
        let mut at = |n: usize| {
            let wanted = (n as f64 * sample.mean_tokens * KV_MARGIN) as usize;
            let sizing = Sizing {
                kv_tokens: wanted.max(whole.longest(sample)).min(whole.kv_tokens),
                ..whole
            };
            Some((pass(&sizing, sizing.running(sample))?, sizing))
        };
        let best = best_concurrency(whole.sequences, &mut at);
        let best = best.map(|(_, cost, s)| (s, rate(s.running(sample), &cost)));
        match (fixed, best) {
            (Some(fixed), Some(best)) if best.1 < EARNED * fixed.1 => Some(fixed),
            (fixed, best) => best.or(fixed),
        }
    }

    /// The longest row, as far as the context goes.
    fn longest(&self, sample: &RowSample) -> usize {
        sample.longest_tokens.min(self.context)
    }

    /// Sequences that the KV room holds at once.
    pub fn running(&self, sample: &RowSample) -> usize {
        let held = self.kv_tokens as f64 / sample.mean_tokens.max(1.0);
        self.sequences.min(held as usize).max(1)
    }

    /// Room for the largest row's pictures, and for as many more as make a wave worth its while.
    fn with_pictures(self, vision: &VisionSpec, p: &PictureSample, budget: u64) -> Sizing {
        let token_bytes = (vision.out_hidden * 4) as u64;
        let wave = WAVE_TOKENS.min((budget / 16 / token_bytes) as usize);
        let tokens = p.tokens.min(wave.max(p.longest_tokens));
        // Pixels take a few percent of what the KV of their tokens takes.
        let held = (budget / 16)
            .max(2 * p.largest_pixel_bytes)
            .min(p.pixel_bytes);
        let mean = p.tokens / p.rows.max(1) as usize;
        Sizing {
            // A wave of pictures is looked at before the rows they belong to begin.
            ahead: self.ahead.max(tokens / mean.max(1)),
            vision: Some(VisionRoom {
                patches: p
                    .patches
                    .min(tokens * vision.merge * vision.merge)
                    .max(p.slice),
                slice: p.slice,
                tokens,
                pixel_bytes: held,
            }),
            pixels: held,
            largest_pixels: p.largest_pixel_bytes,
            ..self
        }
    }
}
