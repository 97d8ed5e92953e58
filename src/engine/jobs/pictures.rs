//! The pictures of rows: found, measured, read, and part of what identifies a row.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use serde_json::{Map, Value};
use twox_hash::XxHash3_128;

use super::body::Body;
use super::request::RowError;
use crate::engine::pictures::{expand, expand_pictures, placeholder};
use crate::error::{Error, Result};
use crate::media::{
    FileIds, Look, Measure, MediaRequest, Options, Processor, VideoTools, Visual, requests_to_files,
};
use crate::spec::VisionSpec;

/// How the rows of a job get their pictures. Nothing of the model's folder is read before the first one comes.
pub struct Looker {
    /// The model's folder.
    dir: PathBuf,
    spec: VisionSpec,
    /// Where a row is silent.
    options: Options,
    /// How closely pictures are measured.
    look: Look,
    tools: VideoTools,
    processor: OnceCell<Result<Processor>>,
    ids: PictureIds,
    /// Pictures that some row holds. Rows that name the same one share it.
    held: RefCell<HashMap<u128, Weak<Visual>>>,
    /// Pictures measured before, as most jobs repeat some.
    measured: RefCell<HashMap<u128, Measure>>,
}

/// What the files of a job's pictures hold.
pub struct PictureIds {
    /// Relative paths are taken from here: the job file's folder.
    base: PathBuf,
    files: RefCell<FileIds>,
}

impl PictureIds {
    /// `job`: the file whose rows name pictures.
    pub fn new(job: &Path) -> PictureIds {
        PictureIds {
            base: job.parent().unwrap_or(Path::new("")).to_path_buf(),
            files: RefCell::default(),
        }
    }

    fn of(&self, request: &MediaRequest) -> u128 {
        self.files.borrow_mut().of(request, &self.base)
    }

    /// A hash of the contents of the files that a request's messages name; `None` where they name none.
    pub(super) fn identity(&self, body: &Map<String, Value>) -> Option<u128> {
        let mut hash = XxHash3_128::new();
        let mut found = false;
        for request in named(body) {
            found = true;
            hash.write(&self.of(&request).to_le_bytes());
        }
        found.then(|| hash.finish_128())
    }

    /// Whether all files that a request's messages name can be read.
    pub(super) fn are_there(&self, body: &Map<String, Value>) -> bool {
        named(body).all(|request| request.is_there(&self.base))
    }
}

/// The files that a request's messages name. Inline pictures are in the row itself.
fn named(body: &Map<String, Value>) -> impl Iterator<Item = MediaRequest> {
    let messages = body.get("messages").and_then(Value::as_array);
    let parts = messages.into_iter().flatten();
    parts
        .filter_map(|m| m.get("content")?.as_array())
        .flat_map(|p| requests_to_files(p, &Options::default()).unwrap_or_default())
}

/// A row with its pictures measured.
pub(super) struct Measured {
    /// Of the prompt, every picture's placeholder repeated.
    pub prompt_tokens: usize,
    pub pictures: Vec<Measure>,
}

impl Looker {
    /// `dir`: the model's folder. `job`: the file whose rows name pictures.
    pub fn new(dir: &Path, spec: &VisionSpec, options: Options, job: &Path, look: Look) -> Looker {
        Looker {
            dir: dir.to_path_buf(),
            spec: spec.clone(),
            options,
            look,
            tools: VideoTools::default(),
            processor: OnceCell::new(),
            ids: PictureIds::new(job),
            held: RefCell::default(),
            measured: RefCell::default(),
        }
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    pub fn ids(&self) -> &PictureIds {
        &self.ids
    }

    pub fn spec(&self) -> &VisionSpec {
        &self.spec
    }

    /// Errors (Code::Config) where the model does not say how its pictures are made: no row's fault.
    pub fn processor(&self) -> Result<&Processor> {
        let made = self
            .processor
            .get_or_init(|| Processor::load(&self.dir, &self.spec));
        made.as_ref().map_err(Error::clone)
    }

    /// How long a row's prompt is, and how large its pictures are.
    pub(super) fn measure(&self, body: &Body) -> Result<Measured, RowError> {
        let processor = self.processor().map_err(|e| refused(&e))?;
        let one = |request: &MediaRequest| -> Result<Measure, RowError> {
            let key = self.key(request);
            if let Some(known) = self.measured.borrow().get(&key) {
                return Ok(*known);
            }
            let measure = processor
                .measure(request, &self.ids.base, &self.tools, self.look)
                .map_err(|e| refused(&e))?;
            self.measured.borrow_mut().insert(key, measure);
            Ok(measure)
        };
        let pictures: Vec<Measure> = body.pictures.iter().map(one).collect::<Result<_, _>>()?;
        let sizes = pictures
            .iter()
            .map(|m| (placeholder(m.kind, &self.spec), m.tokens));
        let ids = expand(&body.prompt, sizes, &self.spec).map_err(|e| mismatch(&e))?;
        Ok(Measured {
            prompt_tokens: ids.len(),
            pictures,
        })
    }

    /// Reads a row's pictures, and repeats their placeholders in its prompt.
    pub(super) fn load(&self, body: &mut Body) -> Result<Vec<Arc<Visual>>, RowError> {
        let media: Vec<Arc<Visual>> = body
            .pictures
            .iter()
            .map(|request| self.visual(request).map_err(|e| refused(&e)))
            .collect::<Result<_, _>>()?;
        body.prompt =
            expand_pictures(&body.prompt, &media, Some(&self.spec)).map_err(|e| mismatch(&e))?;
        Ok(media)
    }

    /// Host memory of the pictures that rows hold now.
    pub(super) fn held_bytes(&self) -> u64 {
        let held = self.held.borrow();
        held.values()
            .filter_map(Weak::upgrade)
            .map(|v| v.bytes())
            .sum()
    }

    fn visual(&self, request: &MediaRequest) -> Result<Arc<Visual>> {
        let key = self.key(request);
        if let Some(held) = self.held.borrow().get(&key).and_then(Weak::upgrade) {
            return Ok(held);
        }
        let processor = self.processor()?;
        let visual = Arc::new(processor.load_request(request, &self.ids.base, &self.tools)?);
        let mut held = self.held.borrow_mut();
        held.retain(|_, v| v.strong_count() > 0);
        held.insert(key, Arc::downgrade(&visual));
        Ok(visual)
    }

    /// The same for requests that see the same picture in the same way.
    fn key(&self, request: &MediaRequest) -> u128 {
        request.hash() ^ self.ids.of(request).rotate_left(64)
    }
}

fn refused(e: &Error) -> RowError {
    RowError::about(
        "invalid_picture",
        "messages",
        format!("{}: {}", e.what(), e.cause()),
    )
}

fn mismatch(e: &Error) -> RowError {
    RowError::from_error("invalid_prompt", e)
}
