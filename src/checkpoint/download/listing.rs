//! What the hub says of a revision: its files, and which of them a model needs.

use serde::Deserialize;

use super::super::files::{TEXT_FILES, plain_name};
use super::super::hub::HubId;
use crate::error::{Code, Error};

/// What the hub says of a revision.
#[derive(Deserialize)]
pub(super) struct Listing {
    pub sha: String,
    pub siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
pub(super) struct Sibling {
    pub rfilename: String,
    pub size: Option<u64>,
    pub lfs: Option<Lfs>,
}

#[derive(Deserialize)]
pub(super) struct Lfs {
    pub sha256: Option<String>,
}

impl Listing {
    pub fn find(&self, name: &str) -> Option<&Sibling> {
        self.siblings.iter().find(|s| s.rfilename == name)
    }

    /// The text files to fetch, `config.json` first.
    pub fn texts(&self) -> Vec<&Sibling> {
        let templates = self.siblings.iter().filter(|s| {
            s.rfilename
                .strip_prefix("additional_chat_templates/")
                .is_some_and(|n| plain_name(n) && n.ends_with(".jinja"))
        });
        let named = TEXT_FILES.iter().filter_map(|name| self.find(name));
        named.chain(templates).collect()
    }

    /// Why there is nothing to run.
    pub fn no_weights(&self, id: &HubId) -> Error {
        let ends = |ends: &[&str]| {
            let mut names = self.siblings.iter().map(|s| &s.rfilename);
            names.any(|n| ends.iter().any(|e| n.ends_with(e)))
        };
        let cause = if ends(&[".gguf"]) {
            "it holds GGUF files"
        } else if ends(&[".bin", ".pt", ".pth", ".ckpt"]) {
            "it holds PyTorch pickles, which can run code and are never opened"
        } else if self.find("adapter_config.json").is_some() {
            "it is an adapter, not a whole model"
        } else {
            "it has neither model.safetensors nor model.safetensors.index.json"
        };
        Error::new(
            Code::Unsupported,
            format!("{} has no weights in safetensors", id.repo),
            cause,
            "choose the repository with the model's safetensors checkpoint",
        )
    }
}
