//! A hub on this machine with a small model, and a cache to fill.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::super::web::Patience;
use super::super::{Downloaded, Hub, is_complete};
use crate::checkpoint::hub::{HubId, resolve_in};
use crate::checkpoint::testing::{self, Tensor};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::error::{Error, Result};
use crate::units::Dtype;

#[path = "../../../../tests/common/hub_server.rs"]
pub mod hub_server;
use hub_server::{COMMIT, Server, etag};

pub const WEIGHTS: &str = "model.safetensors";

/// A hub with a small model and a cache to fill.
pub struct Bed {
    pub server: Server,
    pub dir: tempfile::TempDir,
    pub cancel: Arc<AtomicBool>,
}

pub fn weights() -> Vec<u8> {
    let tensors: Vec<Tensor> = testing::tensors(&testing::spec(&testing::config()), Dtype::BF16);
    let dir = tempfile::tempdir().unwrap();
    let snapshot = testing::write_cache(dir.path(), "models--a--b", COMMIT, &tensors);
    fs::read(snapshot.join(WEIGHTS)).unwrap()
}

pub fn bed() -> Bed {
    let config = testing::config().to_string();
    Bed {
        server: Server::start(&[
            ("config.json", config.as_bytes()),
            ("tokenizer.json", b"{}"),
            ("additional_chat_templates/tool.jinja", b"{{ messages }}"),
            (WEIGHTS, &weights()),
            ("pytorch_model.bin", b"\x80\x02 a pickle"),
            ("README.md", b"# tiny"),
            ("onnx/model.onnx", b"other"),
        ]),
        dir: tempfile::tempdir().unwrap(),
        cancel: Arc::default(),
    }
}

impl Bed {
    pub fn cache(&self) -> PathBuf {
        self.dir.path().join("hub")
    }

    pub fn store(&self) -> PathBuf {
        self.cache().join("models--org--tiny")
    }

    pub fn hub(&self, more: &[(&str, &str)]) -> Hub {
        let env = |key: &str| {
            let all = [
                ("HF_HUB_CACHE", self.cache().to_str().unwrap().to_string()),
                ("HF_ENDPOINT", self.server.address.clone()),
            ];
            let more = more.iter().find(|(k, _)| *k == key);
            let value = more.map(|(_, v)| v.to_string());
            let value = value.or_else(|| Some(all.iter().find(|(k, _)| *k == key)?.1.clone()));
            value.map(OsString::from)
        };
        let patience = Patience {
            silence: Duration::from_millis(300),
            attempts: 3,
            pause: Duration::from_millis(1),
        };
        Hub::from_vars(&env, self.cancel.clone(), patience).unwrap()
    }

    pub fn download(&self) -> Result<Downloaded> {
        self.hub(&[]).download("org/tiny", &mut |_| {})
    }

    pub fn refused(&self) -> Error {
        let error = self.download().unwrap_err();
        self.nothing_trusted();
        error
    }

    /// Neither a revision nor a blob of the weights that counts.
    pub fn nothing_trusted(&self) {
        assert!(!self.store().join("refs/main").exists());
        let blobs = fs::read_dir(self.store().join("blobs"));
        for blob in blobs.into_iter().flatten().flatten() {
            let name = blob.file_name().into_string().unwrap();
            let bytes = fs::read(blob.path()).unwrap();
            let hash = [hub_server::git(&bytes), hub_server::sha256(&bytes)];
            assert!(
                name.ends_with(".incomplete") || hash.contains(&name),
                "{name} is not what its name says"
            );
        }
        assert!(resolve_in("org/tiny", Some(&self.cache())).is_err());
    }

    pub fn partial(&self) -> PathBuf {
        let name = format!("{}.incomplete", etag(WEIGHTS, &weights()));
        self.store().join("blobs").join(name)
    }

    /// Everything is here and opens.
    pub fn whole(&self) {
        let place = resolve_in("org/tiny", Some(&self.cache())).unwrap();
        let checkpoint = Checkpoint::open_at(&place, &OpenOptions::default()).unwrap();
        assert_eq!(checkpoint.identity.revision.as_deref(), Some(COMMIT));
        assert_eq!(fs::read(place.dir.join(WEIGHTS)).unwrap(), weights());
        assert!(!self.partial().exists());
        let id = HubId::parse("org/tiny").unwrap();
        assert!(is_complete(&self.store(), &id));
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
