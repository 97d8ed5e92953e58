//! Text on both ends of the model: prompt → token ids, logits → token id → text.

/// Chat templates, rendered as transformers renders them.
pub mod chat;
/// `generation_config.json`: end-of-sequence ids and sampling defaults.
pub mod generation_config;
/// Logits → token id.
pub mod sampler;
/// Stop strings across token boundaries.
pub mod stop;
/// Token ids → text, whole characters only, as they come.
pub mod stream;
/// Text ↔ token ids.
pub mod tokenizer;

pub use chat::{ChatTemplate, Message, RenderOptions};
pub use generation_config::{AnswerLength, GenerationConfig};
pub use sampler::{Draw, History, Sampler, SamplingParams, TokenLogprob};
pub use stop::{StopMatcher, StopStrings};
pub use stream::TokenStream;
pub use tokenizer::Tokenizer;

use std::path::Path;

use crate::error::{Code, Error, Result};

/// A JSON file of a model folder; `None` where there is none. The cap keeps a hostile file from filling memory.
fn read_json(path: &Path, max_bytes: u64) -> Result<Option<serde_json::Value>> {
    let Some(text) = read_text(path, max_bytes)? else {
        return Ok(None);
    };
    match serde_json::from_str(&text) {
        Ok(value) => Ok(Some(value)),
        Err(e) => Err(Error::new(
            Code::Text,
            format!("cannot read {}", path.display()),
            format!("it is not valid JSON: {e}"),
            "copy the file again from the model's source",
        )),
    }
}

/// A UTF-8 file of a model folder; `None` where there is none. Only regular files are opened, so that a pipe cannot block.
fn read_text(path: &Path, max_bytes: u64) -> Result<Option<String>> {
    let failed = |e: &std::io::Error| Error::io(format!("cannot read {}", path.display()), e);
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(&e)),
    };
    let refuse = |cause: String| {
        Error::new(
            Code::Text,
            format!("cannot read {}", path.display()),
            cause,
            "copy the file again from the model's source",
        )
    };
    if !meta.is_file() {
        return Err(refuse("it is not a regular file".into()));
    }
    if meta.len() > max_bytes {
        return Err(refuse(format!(
            "it has {} bytes; at most {max_bytes} are accepted",
            meta.len()
        )));
    }
    let bytes = std::fs::read(path).map_err(|e| failed(&e))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(e) => Err(refuse(format!("it is not UTF-8: {e}"))),
    }
}
