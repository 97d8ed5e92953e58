//! Pictures in messages: OpenAI's parts, and those of the Qwen cookbooks.

use std::path::Path;

use serde_json::{Map, Value, json};
use twox_hash::XxHash3_128;

use super::Sampling;
use super::locate::{Located, at_name, inline_left_out, locate};
use crate::error::{Code, Error, Result};

/// What a person may say about how a picture is looked at; `None` is the model's own way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options {
    pub min_pixels: Option<u64>,
    pub max_pixels: Option<u64>,
    /// Frames looked at a second of video; of listed frames, how many a second they are.
    pub fps: Option<f64>,
    pub max_frames: Option<usize>,
    pub sampling: Sampling,
    pub clock: Clock,
}

/// How the seconds between a video's frame pairs count in positions. Equal at 2 frames a second, the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// Rounded down to whole seconds, as transformers 5.17 does: at 4 frames a second all frames are at one time.
    #[default]
    Whole,
    /// As they are: transformers before and after that (5.24), and vLLM.
    Exact,
}

/// A picture somebody wants looked at. `at` is a path, a `file:` or a `data:` URL.
#[derive(Clone, Debug, PartialEq)]
pub enum MediaRequest {
    Image {
        at: String,
        options: Options,
    },
    /// A video file or a folder of frames.
    Video {
        at: String,
        options: Options,
    },
    /// Frames in their order, used as they are.
    Frames {
        at: Vec<String>,
        options: Options,
    },
}

impl MediaRequest {
    /// Of everything it says, so that equal requests see the same of equal files.
    pub fn hash(&self) -> u128 {
        let mut hash = XxHash3_128::new();
        let mut add = |at: &str| {
            hash.write(&(at.len() as u64).to_le_bytes());
            hash.write(at.as_bytes());
        };
        let (kind, options) = match self {
            MediaRequest::Image { at, options } => {
                add(at);
                ("image", options)
            }
            MediaRequest::Video { at, options } => {
                add(at);
                ("video", options)
            }
            MediaRequest::Frames { at, options } => {
                at.iter().for_each(|at| add(at));
                ("frames", options)
            }
        };
        hash.write(format!("{kind} {options:?}").as_bytes());
        hash.finish_128()
    }

    pub fn options(&self) -> &Options {
        match self {
            MediaRequest::Image { options, .. }
            | MediaRequest::Video { options, .. }
            | MediaRequest::Frames { options, .. } => options,
        }
    }

    /// Whether all its files are there; relative paths are taken from `base`. A `data:` URL always is.
    pub fn is_there(&self, base: &Path) -> bool {
        let there = |at: &String| match locate(inline_left_out(at), base) {
            Ok(Located::File(path)) => path.exists(),
            _ => true,
        };
        match self {
            MediaRequest::Image { at, .. } | MediaRequest::Video { at, .. } => there(at),
            MediaRequest::Frames { at, .. } => at.iter().all(there),
        }
    }

    /// As errors name it: a data: URL is not repeated whole.
    pub fn name(&self) -> String {
        match self {
            MediaRequest::Image { at, .. } | MediaRequest::Video { at, .. } => at_name(at),
            MediaRequest::Frames { at, .. } => {
                let first = at.first().map(|at| at_name(at)).unwrap_or_default();
                format!(
                    "{first} and the {} frames behind it",
                    at.len().saturating_sub(1)
                )
            }
        }
    }
}

/// The pictures of a message's parts, in order; `defaults` holds where a part says nothing. Errors (Code::Usage) name the part: what a part
/// says and nobody would read is one of them (see [`unread_field`]).
pub fn requests(parts: &[Value], defaults: &Options) -> Result<Vec<MediaRequest>> {
    found(parts, defaults, &str::to_owned)
}

/// As [`requests`], without the contents of `data:` URLs.
pub fn requests_to_files(parts: &[Value], defaults: &Options) -> Result<Vec<MediaRequest>> {
    found(parts, defaults, &|at| inline_left_out(at).to_owned())
}

fn found(
    parts: &[Value],
    defaults: &Options,
    keep: &dyn Fn(&str) -> String,
) -> Result<Vec<MediaRequest>> {
    let mut found = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let Some(map) = part.as_object() else {
            continue;
        };
        let request = match kind(map) {
            Some("image") => image(map, i, defaults, keep)?,
            Some("video") => video(map, i, defaults, keep)?,
            _ => continue,
        };
        if let Some(field) = unread_field(map) {
            return Err(bad(i, &format!("`{field}` would not be read")));
        }
        found.push(request);
    }
    Ok(found)
}

const IMAGE_PLACES: [&str; 4] = ["image_url", "image", "url", "path"];
const VIDEO_PLACES: [&str; 4] = ["video", "video_url", "url", "path"];
const IMAGE_OPTIONS: [&str; 2] = ["min_pixels", "max_pixels"];
const VIDEO_OPTIONS: [&str; 4] = ["fps", "max_frames", "min_pixels", "max_pixels"];

/// The first field of a content part (of text, an image or a video) that says something and is not read; one inside `image_url` as
/// `image_url.detail`. Of a part of another type: none, since the type itself is what is not known.
///
/// What asks for nothing is let through: null, and a `detail` of `"auto"`. OpenAI's other levels of detail stand for sizes of its own
/// models' pictures, which `max_pixels` says here; `resized_height`, `nframes` and the like of qwen-vl-utils are not read either.
pub fn unread_field(part: &Map<String, Value>) -> Option<String> {
    let (places, options): (&[&str], &[&str]) = match kind(part) {
        Some("image") => (&IMAGE_PLACES, &IMAGE_OPTIONS),
        Some("video") => (&VIDEO_PLACES, &VIDEO_OPTIONS),
        _ if part.get("type").and_then(Value::as_str) == Some("text") => (&[], &["text"]),
        _ => return None,
    };
    let place = places.iter().find(|key| part.contains_key(**key));
    let neutral = |key: &str, value: &Value| {
        value.is_null() || (key == "detail" && kind(part) == Some("image") && value == "auto")
    };
    let read = |key: &str| key == "type" || options.contains(&key) || place == Some(&key);
    let unread = part
        .iter()
        .find(|(key, value)| !read(key.as_str()) && !neutral(key.as_str(), value));
    if let Some((key, _)) = unread {
        return Some(key.clone());
    }
    let place = place?;
    let inside = part.get(*place)?.as_object()?;
    inside
        .iter()
        .find(|(key, value)| *key != "url" && !neutral(key.as_str(), value))
        .map(|(key, _)| format!("{place}.{key}"))
}

/// The parts as a chat template needs them: that there is a picture, not the picture.
pub fn without_media(parts: &[Value]) -> Vec<Value> {
    parts
        .iter()
        .map(|part| match part.as_object().and_then(kind) {
            Some(kind) => json!({ "type": kind }),
            None => part.clone(),
        })
        .collect()
}

/// `image`, `video`, or neither.
fn kind(part: &Map<String, Value>) -> Option<&'static str> {
    match part.get("type").and_then(Value::as_str) {
        Some("image" | "image_url" | "input_image") => Some("image"),
        Some("video" | "video_url" | "input_video") => Some("video"),
        Some(_) => None,
        None if part.contains_key("image") || part.contains_key("image_url") => Some("image"),
        None if part.contains_key("video") || part.contains_key("video_url") => Some("video"),
        None => None,
    }
}

/// The value under the first of `keys` that is there; `{"url": …}` is unwrapped.
fn place<'a>(part: &'a Map<String, Value>, keys: &[&str]) -> Option<&'a Value> {
    let found = keys.iter().find_map(|k| part.get(*k))?;
    Some(found.get("url").unwrap_or(found))
}

fn image(
    part: &Map<String, Value>,
    index: usize,
    defaults: &Options,
    keep: &dyn Fn(&str) -> String,
) -> Result<MediaRequest> {
    match place(part, &IMAGE_PLACES).and_then(Value::as_str) {
        Some(at) => Ok(MediaRequest::Image {
            at: keep(at),
            options: options(part, index, defaults)?,
        }),
        None => Err(bad(index, "an image part needs `image_url` with a `url`")),
    }
}

fn video(
    part: &Map<String, Value>,
    index: usize,
    defaults: &Options,
    keep: &dyn Fn(&str) -> String,
) -> Result<MediaRequest> {
    let options = options(part, index, defaults)?;
    match place(part, &VIDEO_PLACES) {
        Some(Value::String(at)) => Ok(MediaRequest::Video {
            at: keep(at),
            options,
        }),
        Some(Value::Array(list)) => {
            let at: Option<Vec<String>> = list.iter().map(|v| v.as_str().map(keep)).collect();
            match at {
                Some(at) if !at.is_empty() => Ok(MediaRequest::Frames { at, options }),
                _ => Err(bad(index, "a list of frames has paths, and at least one")),
            }
        }
        _ => Err(bad(
            index,
            "a video part needs `video` with a path or a list of frames",
        )),
    }
}

fn options(part: &Map<String, Value>, index: usize, defaults: &Options) -> Result<Options> {
    let mut options = *defaults;
    let number = |key: &str| match part.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => match v.as_f64().filter(|x| *x > 0.0) {
            Some(x) => Ok(Some(x)),
            None => Err(bad(index, &format!("`{key}` must be a number above 0"))),
        },
    };
    if let Some(fps) = number("fps")? {
        options.fps = Some(fps);
    }
    if let Some(n) = number("max_frames")? {
        options.max_frames = Some(n as usize);
    }
    if let Some(n) = number("min_pixels")? {
        options.min_pixels = Some(n as u64);
    }
    if let Some(n) = number("max_pixels")? {
        options.max_pixels = Some(n as u64);
    }
    Ok(options)
}

fn bad(index: usize, cause: &str) -> Error {
    Error::new(
        Code::Usage,
        format!("part {index} of a message cannot be used"),
        cause,
        r#"write {"type": "image_url", "image_url": {"url": "cat.jpg"}} or {"type": "video", "video": "clip.mp4", "fps": 2}"#,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_every_spelling_are_found_in_order() {
        let parts = [
            json!({"type": "text", "text": "image"}),
            json!({"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}),
            json!({"type": "image_url", "image_url": "b.png"}),
            json!({"type": "video", "video": ["0.png", "1.png"], "fps": 4}),
            json!({"image": "c.png", "max_pixels": 1000}),
            json!({"type": "video_url", "video_url": {"url": "d.mp4"}}),
        ];
        let defaults = Options {
            fps: Some(1.0),
            ..Options::default()
        };
        let fps = |fps| Options {
            fps: Some(fps),
            ..defaults
        };
        let image = |at: &str, options| MediaRequest::Image {
            at: at.into(),
            options,
        };
        assert_eq!(
            requests(&parts, &defaults).unwrap(),
            [
                image("a.png", defaults),
                image("b.png", defaults),
                MediaRequest::Frames {
                    at: vec!["0.png".into(), "1.png".into()],
                    options: fps(4.0)
                },
                image(
                    "c.png",
                    Options {
                        max_pixels: Some(1000),
                        ..defaults
                    }
                ),
                MediaRequest::Video {
                    at: "d.mp4".into(),
                    options: defaults
                },
            ]
        );
        let shown = without_media(&parts);
        assert_eq!(shown[0], parts[0]);
        assert_eq!(shown[1], json!({"type": "image"}));
        assert_eq!(shown[5], json!({"type": "video"}));
    }

    #[test]
    fn what_nobody_reads_is_named() {
        let image = |more: Value| {
            let mut part = json!({"type": "image_url", "image_url": {"url": "a.png"}});
            let part_fields = part.as_object_mut().unwrap();
            part_fields.extend(more.as_object().unwrap().clone());
            part
        };
        for (part, field) in [
            (
                image(json!({"image_url": {"url": "a", "detail": "low"}})),
                "image_url.detail",
            ),
            (
                image(json!({"image_url": {"url": "a", "detail": "high"}})),
                "image_url.detail",
            ),
            (image(json!({"detail": "low"})), "detail"),
            (image(json!({"resized_height": 280})), "resized_height"),
            (image(json!({"fps": 2})), "fps"),
            (image(json!({"image": "b.png"})), "image"),
            (
                json!({"type": "video", "video": "a.mp4", "nframes": 8}),
                "nframes",
            ),
            (
                json!({"type": "video", "video": "a.mp4", "detail": "auto"}),
                "detail",
            ),
            (
                json!({"type": "text", "text": "a", "cache_control": {}}),
                "cache_control",
            ),
        ] {
            let map = part.as_object().unwrap();
            assert_eq!(unread_field(map).as_deref(), Some(field), "{part}");
            if kind(map).is_some() {
                let e = requests(&[part], &Options::default()).unwrap_err();
                assert!(e.cause().contains(field), "{e}");
            }
        }
        for part in [
            image(json!({"detail": "auto", "max_pixels": 9, "resized_width": null})),
            json!({"type": "video", "video": "a.mp4", "fps": 1, "max_frames": 4, "min_pixels": 9}),
            json!({"type": "text", "text": "a"}),
            json!({"type": "input_audio", "input_audio": {}}),
        ] {
            assert_eq!(unread_field(part.as_object().unwrap()), None, "{part}");
        }
    }

    #[test]
    fn parts_that_make_no_sense_are_named() {
        for part in [
            json!({"type": "image"}),
            json!({"type": "image_url", "image_url": {"detail": "low"}}),
            json!({"type": "video", "video": []}),
            json!({"type": "video", "video": [1]}),
            json!({"type": "video", "video": "x.mp4", "fps": 0}),
            json!({"type": "image", "image": "x.png", "max_pixels": "many"}),
        ] {
            let e = requests(
                &[json!({"type": "text"}), part.clone()],
                &Options::default(),
            );
            assert!(e.unwrap_err().what().contains("part 1"), "{part}");
        }
    }
}
