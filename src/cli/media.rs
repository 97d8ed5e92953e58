//! Pictures on the command line and in messages.

use std::path::Path;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::advice::Looked;
use super::prompt::{Prompt, PromptOptions, render};
use crate::engine::{HostMemory, SLACK_BYTES, expand_pictures};
use crate::error::{Code, Error, Result};
use crate::media::{
    Clock, Look, Measure, MediaRequest, Options, Processor, Sampling, VideoTools, Visual, requests,
    without_media,
};
use crate::spec::VisionSpec;
use crate::text::{ChatTemplate, Message, Tokenizer};
use crate::units::{flag_size, human_bytes, parse_size};

/// Pictures that come with a prompt.
#[derive(Args, Clone, Debug, Default)]
pub struct PictureOptions {
    /// An image to look at: PNG, JPEG or WebP (may be given more than once)
    #[arg(long, value_name = "FILE", help_heading = "Pictures")]
    pub image: Vec<String>,
    /// A video file (decoded by the system's ffmpeg) or a folder of frames (may be given more than once)
    #[arg(long, value_name = "FILE|DIR", help_heading = "Pictures")]
    pub video: Vec<String>,
}

/// How pictures are looked at. What is not given is the model's own way.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct LookOptions {
    /// Frames looked at a second of video; for a folder of frames, how many of them are a second [default: 2]
    #[arg(long, value_name = "N", value_parser = rate, help_heading = "Pictures")]
    pub fps: Option<f64>,
    /// Most frames of a video
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Pictures")]
    pub max_frames: Option<u32>,
    /// Images and frames are enlarged to this many pixels at least
    #[arg(long, value_name = "N", value_parser = pixels, help_heading = "Pictures")]
    pub min_pixels: Option<u64>,
    /// Images and frames are shrunk to this many pixels at most: fewer take less memory and time
    #[arg(long, value_name = "N", value_parser = pixels, help_heading = "Pictures")]
    pub max_pixels: Option<u64>,
    /// Which frames: spread as transformers (arange) or as qwen-vl-utils (linspace) does
    #[arg(long, value_enum, default_value = "arange", help_heading = "Pictures")]
    pub frame_sampling: SamplingArg,
    /// Seconds between frame pairs: whole ones (transformers 5.17) or exact (other releases, vLLM); equal at 2 frames a second
    #[arg(long, value_enum, default_value = "whole", help_heading = "Pictures")]
    pub video_clock: ClockArg,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ClockArg {
    #[default]
    Whole,
    Exact,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SamplingArg {
    #[default]
    Arange,
    Linspace,
}

fn rate(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(r) if r.is_finite() && r > 0.0 => Ok(r),
        _ => Err("give a number of frames a second above 0".into()),
    }
}

fn pixels(text: &str) -> std::result::Result<u64, String> {
    match parse_size(text) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("give a number of pixels, such as 200704 or 1M".into()),
    }
}

impl PictureOptions {
    pub fn is_empty(&self) -> bool {
        self.image.is_empty() && self.video.is_empty()
    }

    /// As parts of a message: images first, then videos, then the text.
    fn parts(&self, text: &str) -> Vec<Value> {
        let images = self
            .image
            .iter()
            .map(|at| json!({"type": "image", "image": at}));
        let videos = self
            .video
            .iter()
            .map(|at| json!({"type": "video", "video": at}));
        images
            .chain(videos)
            .chain(std::iter::once(json!({"type": "text", "text": text})))
            .collect()
    }
}

impl LookOptions {
    pub fn options(&self) -> Options {
        Options {
            min_pixels: self.min_pixels,
            max_pixels: self.max_pixels,
            fps: self.fps,
            max_frames: self.max_frames.map(|n| n as usize),
            sampling: match self.frame_sampling {
                SamplingArg::Arange => Sampling::Arange,
                SamplingArg::Linspace => Sampling::Linspace,
            },
            clock: match self.video_clock {
                ClockArg::Whole => Clock::Whole,
                ClockArg::Exact => Clock::Exact,
            },
        }
    }
}

/// Token ids with every picture's placeholder repeated, and the pictures.
#[derive(Default)]
pub struct Rendered {
    pub ids: Vec<u32>,
    pub media: Vec<Arc<Visual>>,
    /// The pictures as they were measured, where there are any.
    pub looked: Option<Looked>,
}

/// Says, of pictures that do not fit in a prompt of so many tokens, under which limits they would.
pub type Advise<'a> = dyn Fn(Looked, usize) -> Option<String> + 'a;

/// Turns prompts and messages of one model into ids and pictures. The preprocessor's configuration is read when the first picture comes.
pub struct Renderer<'m> {
    /// Where the preprocessor's configuration lies.
    dir: &'m Path,
    /// None: the model cannot look at pictures.
    tower: Option<&'m VisionSpec>,
    pub tokenizer: &'m Tokenizer,
    /// None: text is sent as it is.
    pub template: Option<&'m ChatTemplate>,
    pub look: LookOptions,
    processor: Option<Processor>,
    tools: VideoTools,
    /// Memory this process may take in all.
    budget: u64,
    advise: Option<&'m Advise<'m>>,
}

impl<'m> Renderer<'m> {
    pub fn new(
        dir: &'m Path,
        tower: Option<&'m VisionSpec>,
        tokenizer: &'m Tokenizer,
        template: Option<&'m ChatTemplate>,
        look: LookOptions,
        budget: Option<u64>,
    ) -> Renderer<'m> {
        Renderer {
            dir,
            tower,
            tokenizer,
            template,
            look,
            processor: None,
            tools: VideoTools::default(),
            budget: budget.unwrap_or_else(|| HostMemory::read().default_budget()),
            advise: None,
        }
    }

    pub fn with_advice(mut self, advise: &'m Advise<'m>) -> Renderer<'m> {
        self.advise = Some(advise);
        self
    }

    /// What the user typed, with the pictures named beside it. Without a chat template (or with --raw) the text must hold the placeholders.
    pub fn prompt(
        &mut self,
        prompt: &Prompt,
        options: &PromptOptions,
        pictures: &PictureOptions,
    ) -> Result<Rendered> {
        if options.system.is_some() && self.template.is_none() {
            return Err(Error::new(
                Code::Usage,
                "--system cannot be followed",
                "this model comes without a chat template, so there are no roles",
                "write what it says into the prompt itself, or leave it out",
            ));
        }
        match (prompt, self.template) {
            (Prompt::Chat, _) if !pictures.is_empty() => Err(Error::new(
                Code::Usage,
                "pictures need a prompt",
                "without one this is a chat, which takes text only",
                "give --prompt beside --image and --video",
            )),
            (Prompt::Chat, _) => Ok(Rendered::default()),
            (Prompt::Text(text), Some(_)) => {
                let mut messages = Vec::new();
                if let Some(system) = &options.system {
                    messages.push(Message::new("system", system));
                }
                messages.push(match pictures.is_empty() {
                    true => Message::new("user", text),
                    false => Message::with_parts("user", pictures.parts(text))?,
                });
                self.messages(&messages, Path::new(""))
            }
            (Prompt::Text(text), None) => {
                let ids = self.tokenizer.encode(text, true)?;
                let wanted = requests(&pictures.parts(""), &self.look.options())?;
                self.expanded(ids, &wanted, Path::new(""))
            }
            (Prompt::Messages(_), _) if !pictures.is_empty() => Err(Error::new(
                Code::Usage,
                "--image and --video do not go with --messages",
                "the messages say themselves where their pictures stand",
                r#"write {"type": "image_url", "image_url": {"url": "cat.jpg"}} parts into them"#,
            )),
            (Prompt::Messages(messages), Some(_)) => self.messages(messages, Path::new("")),
            (Prompt::Messages(_), None) => Err(Error::new(
                Code::Text,
                "messages cannot be rendered",
                "this model comes without a chat template",
                "give a plain --prompt instead",
            )),
        }
    }

    /// A conversation whose parts may be pictures; their relative paths are taken from `base`.
    pub fn messages(&mut self, messages: &[Message], base: &Path) -> Result<Rendered> {
        let template = self.template.ok_or_else(|| {
            Error::new(
                Code::Text,
                "messages cannot be rendered",
                "this model comes without a chat template",
                "give token ids or a plain prompt instead",
            )
        })?;
        let mut wanted = Vec::new();
        let mut plain = Vec::with_capacity(messages.len());
        for message in messages {
            let found = match message.parts() {
                Some(parts) => requests(parts, &self.look.options())?,
                None => Vec::new(),
            };
            plain.push(match (found.is_empty(), message.parts()) {
                (false, Some(parts)) => message.with_content(without_media(parts)),
                _ => message.clone(),
            });
            wanted.extend(found);
        }
        let ids = render(&plain, self.tokenizer, template)?;
        self.expanded(ids, &wanted, base)
    }

    fn expanded(
        &mut self,
        ids: Vec<u32>,
        wanted: &[MediaRequest],
        base: &Path,
    ) -> Result<Rendered> {
        let spec = match (self.tower, wanted) {
            (tower, []) => {
                return Ok(Rendered {
                    ids: match tower {
                        Some(_) => expand_pictures(&ids, &[], tower)?,
                        None => ids,
                    },
                    ..Rendered::default()
                });
            }
            (None, _) => return Err(no_tower()),
            (Some(spec), _) => spec,
        };
        let processor = match &mut self.processor {
            Some(p) => p,
            none => none.insert(Processor::load(self.dir, spec)?),
        };
        let mut looked = Looked::new(processor, self.look.options());
        let mut measures = Vec::with_capacity(wanted.len());
        for request in wanted {
            let measure = processor.measure(request, base, &self.tools, Look::Header)?;
            looked.add(measure, *request.options());
            measures.push(measure);
        }
        let mut media = Vec::with_capacity(wanted.len());
        for (request, measure) in wanted.iter().zip(&measures) {
            let less = || {
                // A placeholder a picture becomes its tokens.
                let tokens = ids.len() + looked.need().tokens - wanted.len().min(ids.len());
                self.advise?(looked.clone(), tokens)
            };
            fits(request, measure, self.budget, &less)?;
            let visual = processor.load_request(request, base, &self.tools)?;
            media.push(Arc::new(visual));
            looked.held_bytes += measure.pixel_bytes;
        }
        Ok(Rendered {
            ids: expand_pictures(&ids, &media, Some(spec))?,
            media,
            looked: Some(looked),
        })
    }
}

/// Refuses a picture whose pixels would not fit, before they are made. What the tower takes for it the engine knows. `less`: limits under which
/// all pictures of the prompt would fit.
fn fits(
    request: &MediaRequest,
    m: &Measure,
    budget: u64,
    less: &dyn Fn() -> Option<String>,
) -> Result<()> {
    let taken = HostMemory::read().resident + SLACK_BYTES;
    let needed = taken + m.pixel_bytes + m.decode_bytes;
    if needed <= budget {
        return Ok(());
    }
    Err(Error::new(
        Code::Memory,
        format!(
            "the picture {} does not fit in {}",
            request.name(),
            human_bytes(budget)
        ),
        format!(
            "its pixels take {}, decoding takes {}, and the process itself {}",
            human_bytes(m.pixel_bytes),
            human_bytes(m.decode_bytes),
            human_bytes(taken)
        ),
        match less() {
            Some(less) => format!("{}; {less}", enough_memory(needed)),
            None => smaller_picture(request, m, needed, budget.saturating_sub(taken)),
        },
    ))
}

/// What the process itself takes is not quite the same at each start: a budget that is named must do at the next one.
const STARTS_DIFFER: u64 = 4 << 20;

fn enough_memory(needed: u64) -> String {
    format!(
        "give --cpu-memory {} or more",
        flag_size(needed + STARTS_DIFFER)
    )
}

/// What helps: fewer pixels and frames do where those kept are what takes the memory, and decoding the file leaves room for some.
/// `room`: what the process itself leaves of the budget.
fn smaller_picture(request: &MediaRequest, m: &Measure, needed: u64, room: u64) -> String {
    let more = enough_memory(needed);
    let is_video = !matches!(request, MediaRequest::Image { .. });
    match (room.saturating_sub(m.decode_bytes), is_video) {
        // Less than a sixteenth of the pixels is another picture.
        (left, true) if left > m.pixel_bytes / 16 => {
            format!("{more}, a smaller --max-pixels, or fewer --max-frames")
        }
        (left, false) if left > m.pixel_bytes / 16 => format!("{more}, or a smaller --max-pixels"),
        _ => {
            let times = (m.decode_bytes + m.pixel_bytes) as f64 / room.max(1) as f64;
            let smaller = match times < 100.0 {
                true => format!(", or make the file smaller first, to 1/{times:.1} of its size"),
                false => String::new(),
            };
            format!("{more}{smaller}: --max-pixels changes what is kept, not what decoding takes")
        }
    }
}

fn no_tower() -> Error {
    Error::new(
        Code::Usage,
        "this model cannot look at pictures",
        "it has no vision tower",
        "choose a vision-language model, or leave the pictures out",
    )
}
