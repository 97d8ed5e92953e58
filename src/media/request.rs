//! Pictures in messages: OpenAI's parts, and those of the Qwen cookbooks.

use serde_json::{Map, Value, json};

use super::Sampling;
use super::locate::at_name;
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

/// The pictures of a message's parts, in order; `defaults` holds where a part says nothing. Errors (Code::Usage) name the part.
pub fn requests(parts: &[Value], defaults: &Options) -> Result<Vec<MediaRequest>> {
    let mut found = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let Some(map) = part.as_object() else {
            continue;
        };
        match kind(map) {
            Some("image") => found.push(image(map, i, defaults)?),
            Some("video") => found.push(video(map, i, defaults)?),
            _ => {}
        }
    }
    Ok(found)
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

fn image(part: &Map<String, Value>, index: usize, defaults: &Options) -> Result<MediaRequest> {
    match place(part, &["image_url", "image", "url", "path"]).and_then(Value::as_str) {
        Some(at) => Ok(MediaRequest::Image {
            at: at.into(),
            options: options(part, index, defaults)?,
        }),
        None => Err(bad(index, "an image part needs `image_url` with a `url`")),
    }
}

fn video(part: &Map<String, Value>, index: usize, defaults: &Options) -> Result<MediaRequest> {
    let options = options(part, index, defaults)?;
    match place(part, &["video", "video_url", "url", "path"]) {
        Some(Value::String(at)) => Ok(MediaRequest::Video {
            at: at.clone(),
            options,
        }),
        Some(Value::Array(list)) => {
            let at: Option<Vec<String>> = list
                .iter()
                .map(|v| v.as_str().map(str::to_string))
                .collect();
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
            json!({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
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
