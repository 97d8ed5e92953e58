//! A model from the Hugging Face hub into the local hub cache, in huggingface_hub's own layout, so that both use the same
//! files (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>):
//!
//! ```text
//! models--ORG--NAME/blobs/ETAG              the bytes, named by their hash
//!                   blobs/ETAG.incomplete   as far as a download came
//!                   snapshots/COMMIT/FILE   a link to a blob
//!                   refs/REVISION           the commit, written when everything is there
//! ```
//!
//! Only what this engine reads is fetched: configs, tokenizer, chat template, safetensors. `config.json` is judged before
//! the weights, free space before the first of them. A blob gets its name after its length and hash were compared with
//! what the hub says, never before.

mod address;
mod blob;
mod listing;
mod web;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use self::address::escape;
use self::blob::{Digest, Wanted};
use self::listing::{Listing, Sibling};
use self::web::{Patience, Web};
use super::files::{MAX_CONFIG_BYTES, MAX_INDEX_BYTES, clip, free_bytes, read_small};
use super::hub::{self, HubId};
use super::safetensors::{INDEX, SINGLE, shard_names};
use crate::error::{Code, Error, Result};
use crate::spec::parse_config;
use crate::units::human_bytes;

/// Larger ones are no tokenizer.
const MAX_TEXT_BYTES: u64 = 512 << 20;
const MAX_FILES: usize = 100_000;

/// What a download tells while it runs.
#[derive(Clone, Copy, Debug)]
pub enum DownloadProgress<'a> {
    /// Before the first weights: bytes of all of them, and how many are here already.
    Plan {
        files: usize,
        bytes: u64,
        have: u64,
        to: &'a Path,
    },
    Bytes {
        done: u64,
        total: u64,
    },
    /// The connection failed; another attempt follows.
    Retrying {
        file: &'a str,
        why: &'a str,
    },
    /// Another process downloads the same file.
    Waiting {
        file: &'a str,
    },
}

/// What a download did.
#[derive(Clone, Debug)]
pub struct Downloaded {
    /// The snapshot's folder.
    pub dir: PathBuf,
    pub commit: String,
    /// Bytes that came over the network.
    pub bytes: u64,
    /// Bytes of all files of the snapshot that the engine uses.
    pub total: u64,
}

/// The hub, as the environment describes it.
pub struct Hub {
    web: Web,
    cache: PathBuf,
    offline: bool,
    cancel: Arc<AtomicBool>,
}

/// Whether `model` is a hub id whose weights or config the local cache lacks, so that only a download can help. False for
/// everything else: folders, nonsense, and what is here already.
pub fn wants_download(model: &str) -> bool {
    // A bare name is far more often a misspelt folder than one of the hub's oldest models: `pull` takes it.
    let Some(id) = hub_id(model).filter(|id| id.repo.contains('/')) else {
        return false;
    };
    let cache = hub::cache_dir(&|key| std::env::var_os(key));
    !cache.is_some_and(|cache| is_complete(&cache.join(id.folder()), &id))
}

/// `model` as a hub id; `None` where there is something of that name here.
fn hub_id(model: &str) -> Option<HubId> {
    match fs::symlink_metadata(model) {
        Ok(_) => None,
        Err(_) => HubId::parse(model),
    }
}

/// Whether the snapshot has a config and every file of its weights. What else it may lack only a listing can tell.
fn is_complete(store: &Path, id: &HubId) -> bool {
    let Some(dir) = hub::snapshot_dir(store, id) else {
        return false;
    };
    let there = |name: &str| fs::metadata(dir.join(name)).is_ok_and(|m| m.is_file());
    let shards = || {
        let path = fs::canonicalize(dir.join(INDEX)).ok()?;
        shard_names(&read_small(&path, MAX_INDEX_BYTES).ok()?).ok()
    };
    there("config.json")
        && (there(SINGLE) || shards().is_some_and(|names| names.iter().all(|n| there(n))))
}

impl Hub {
    /// From `HF_ENDPOINT`, `HF_TOKEN` (or the token that `hf auth login` stored), `HF_HUB_OFFLINE`, `HF_HUB_CACHE` and
    /// the rest of huggingface_hub's variables, and the proxies' own.
    pub fn from_env(cancel: Arc<AtomicBool>) -> Result<Hub> {
        Hub::from_vars(&|key| std::env::var_os(key), cancel, Patience::default())
    }

    fn from_vars(
        env: &dyn Fn(&str) -> Option<OsString>,
        cancel: Arc<AtomicBool>,
        patience: Patience,
    ) -> Result<Hub> {
        let cache = hub::cache_dir(env).ok_or_else(|| {
            Error::new(
                Code::Usage,
                "there is no place for a download",
                "neither HF_HUB_CACHE nor HOME says where the hub cache lies",
                "set HF_HUB_CACHE to a folder",
            )
        })?;
        let on = |key: &str| {
            let value = env(key)
                .unwrap_or_default()
                .to_string_lossy()
                .to_uppercase();
            ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
        };
        Ok(Hub {
            web: Web::new(env, patience)?,
            cache,
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            cancel,
        })
    }

    /// Downloads what the cache lacks of `model`, an id with or without `@revision`.
    ///
    /// Errors: [`Code::Usage`] for what is no id or is not on the hub; [`Code::Hub`] where the hub refuses or cannot be
    /// reached; [`Code::Space`] before the weights where they do not fit; [`Code::Corrupt`] where what came is not what
    /// the hub promised; those of [`parse_config`]. In every case what is here stays as it was, partial files apart, from
    /// which the next attempt goes on.
    pub fn download(
        &self,
        model: &str,
        tell: &mut dyn FnMut(DownloadProgress),
    ) -> Result<Downloaded> {
        let id = HubId::parse(model).ok_or_else(|| {
            Error::new(
                Code::Usage,
                format!("`{}` is not a hub id", clip(model)),
                "an id is org/name or org/name@revision",
                "write it as the model's page on the hub does, like Qwen/Qwen2.5-0.5B-Instruct",
            )
        })?;
        if self.offline {
            return Err(Error::new(
                Code::Usage,
                format!("model `{}` is not in the local cache", clip(model)),
                format!(
                    "{} lacks it or a part of it, and HF_HUB_OFFLINE forbids to download",
                    self.cache.display()
                ),
                "unset HF_HUB_OFFLINE, copy the model into the cache, or give a folder",
            ));
        }
        let listing = self.listing(&id, tell)?;
        Fetch {
            hub: self,
            id: &id,
            listing: &listing,
            store: self.cache.join(id.folder()),
            bytes: 0,
        }
        .run(tell)
    }

    fn listing(&self, id: &HubId, tell: &mut dyn FnMut(DownloadProgress)) -> Result<Listing> {
        let revision = escape(&id.revision).replace('/', "%2F");
        let path = format!("api/models/{}/revision/{revision}?blobs=true", id.repo);
        let url = self.web.url(&path);
        let text = self
            .web
            .patiently(&self.cancel, &id.repo, tell, || self.web.text(&url, id, ""))?;
        let listing: Listing = serde_json::from_slice(&text)
            .map_err(|e| self.web.nonsense(&format!("its list of files: {e}")))?;
        if !hub::is_commit(&listing.sha) || listing.siblings.len() > MAX_FILES {
            return Err(self.web.nonsense("its list of files names no commit"));
        }
        Ok(listing)
    }

    fn check_cancel(&self) -> Result<()> {
        if self.cancel.load(Relaxed) {
            return Err(interrupted());
        }
        Ok(())
    }
}

pub(super) fn interrupted() -> Error {
    Error::new(
        Code::Interrupted,
        "the download was interrupted",
        "Ctrl-C or a signal",
        "run the same command again: it goes on where it stopped",
    )
}

/// One download under way.
struct Fetch<'a> {
    hub: &'a Hub,
    id: &'a HubId,
    listing: &'a Listing,
    /// `models--ORG--NAME` in the cache.
    store: PathBuf,
    bytes: u64,
}

impl Fetch<'_> {
    fn run(mut self, tell: &mut dyn FnMut(DownloadProgress)) -> Result<Downloaded> {
        self.make_folders()?;
        let mut total = 0;
        for sibling in self.listing.texts() {
            let wanted = self.wanted(sibling, tell)?;
            let most = match wanted.name.as_str() {
                "config.json" => MAX_CONFIG_BYTES,
                _ => MAX_TEXT_BYTES,
            };
            total += self.text(&wanted, most, tell)?;
            if wanted.name == "config.json" {
                self.judge_config(&wanted)?;
            }
        }
        let weights = self.weights(&mut total, tell)?;
        let all: u64 = weights.iter().map(|w| w.bytes).sum();
        self.room_for(&weights)?;
        let mut done: u64 = weights.iter().map(|w| self.here(w)).sum();
        tell(DownloadProgress::Plan {
            files: weights.len(),
            bytes: all,
            have: done,
            to: &self.store,
        });
        for wanted in &weights {
            let before = done - self.here(wanted);
            self.blob(wanted, tell, &mut |here| DownloadProgress::Bytes {
                done: before + here,
                total: all,
            })?;
            self.link(wanted)?;
            done = before + wanted.bytes;
        }
        self.write_ref()?;
        Ok(Downloaded {
            dir: self.snapshot(),
            commit: self.listing.sha.clone(),
            bytes: self.bytes,
            total: total + all,
        })
    }

    fn snapshot(&self) -> PathBuf {
        self.store.join("snapshots").join(&self.listing.sha)
    }

    fn blobs(&self) -> PathBuf {
        self.store.join("blobs")
    }

    fn make_folders(&self) -> Result<()> {
        let locks = self.hub.cache.join(".locks").join(self.id.folder());
        for dir in [
            self.blobs(),
            self.snapshot(),
            self.store.join("refs"),
            locks,
        ] {
            fs::create_dir_all(&dir).map_err(|e| {
                Error::io(format!("cannot create {}", dir.display()), &e)
                    .with_fix("set HF_HUB_CACHE to a folder that you may write to")
            })?;
        }
        Ok(())
    }

    /// What the hub says of one file: its size, its name in the cache, its hash.
    fn wanted(&self, s: &Sibling, tell: &mut dyn FnMut(DownloadProgress)) -> Result<Wanted> {
        let web = &self.hub.web;
        let url = self.url(&s.rfilename);
        let meta = web.patiently(&self.hub.cancel, &s.rfilename, tell, || {
            web.metadata(&url, self.id, &s.rfilename)
        })?;
        if meta.commit.is_some_and(|c| c != self.listing.sha) {
            return Err(web.nonsense(&format!("another commit for {}", clip(&s.rfilename))));
        }
        let said = s.lfs.as_ref().and_then(|l| l.sha256.as_deref());
        let bytes = match (meta.bytes, s.size) {
            (Some(a), Some(b)) if a != b => {
                let why = format!("two sizes for {}: {a} and {b} bytes", clip(&s.rfilename));
                return Err(web.nonsense(&why));
            }
            (a, b) => a.or(b),
        };
        let bytes =
            bytes.ok_or_else(|| web.nonsense(&format!("no size for {}", clip(&s.rfilename))))?;
        Ok(Wanted {
            name: s.rfilename.clone(),
            digest: Digest::of(said.unwrap_or(&meta.etag)),
            etag: meta.etag,
            bytes,
        })
    }

    fn url(&self, name: &str) -> String {
        let (repo, sha, name) = (&self.id.repo, &self.listing.sha, escape(name));
        self.hub.web.url(&format!("{repo}/resolve/{sha}/{name}"))
    }

    fn text(
        &mut self,
        wanted: &Wanted,
        most: u64,
        tell: &mut dyn FnMut(DownloadProgress),
    ) -> Result<u64> {
        if wanted.bytes > most {
            return Err(Error::new(
                Code::Checkpoint,
                format!("{} of {} is too large", wanted.name, self.id.repo),
                format!(
                    "it has {}; a file of this kind has at most {}",
                    human_bytes(wanted.bytes),
                    human_bytes(most)
                ),
                "check that this is the repository you mean",
            ));
        }
        let here = self.here(wanted);
        self.blob(wanted, tell, &mut |done| DownloadProgress::Bytes {
            done: done.max(here),
            total: 0,
        })?;
        self.link(wanted)?;
        Ok(wanted.bytes)
    }

    fn blob(
        &mut self,
        wanted: &Wanted,
        tell: &mut dyn FnMut(DownloadProgress),
        progress: &mut dyn FnMut(u64) -> DownloadProgress<'static>,
    ) -> Result<()> {
        self.hub.check_cancel()?;
        let locks = self.hub.cache.join(".locks").join(self.id.folder());
        self.bytes += blob::fetch(
            &blob::Job {
                web: &self.hub.web,
                id: self.id,
                cancel: &self.hub.cancel,
                url: self.url(&wanted.name),
                wanted,
                blobs: self.blobs(),
                locks,
            },
            tell,
            progress,
        )?;
        Ok(())
    }

    /// Bytes of a file that are here, whole or in part.
    fn here(&self, wanted: &Wanted) -> u64 {
        let length = |name: &str| fs::metadata(self.blobs().join(name)).map_or(0, |m| m.len());
        match length(&wanted.etag) {
            n if n == wanted.bytes => n,
            _ => length(&wanted.partial_name()).min(wanted.bytes),
        }
    }

    /// A model that this engine cannot run is refused before its weights come.
    fn judge_config(&self, wanted: &Wanted) -> Result<()> {
        let bytes = read_small(&self.blobs().join(&wanted.etag), MAX_CONFIG_BYTES)?;
        let config: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|e| self.hub.web.nonsense(&format!("config.json: {e}")))?;
        parse_config(&config).map(|_| ())
    }

    /// The files with weights, the index fetched on the way.
    fn weights(
        &mut self,
        total: &mut u64,
        tell: &mut dyn FnMut(DownloadProgress),
    ) -> Result<Vec<Wanted>> {
        if self.listing.find("config.json").is_none() {
            let missing = self.listing.no_weights(self.id);
            return Err(match self.listing.find(SINGLE) {
                Some(_) => Error::new(
                    Code::Config,
                    format!("{} has no config.json", self.id.repo),
                    "the model's geometry is never guessed",
                    "choose the repository with the model's own config.json",
                ),
                None => missing,
            });
        }
        if let Some(single) = self.listing.find(SINGLE) {
            return Ok(vec![self.wanted(single, tell)?]);
        }
        let Some(index) = self.listing.find(INDEX) else {
            return Err(self.listing.no_weights(self.id));
        };
        let index = self.wanted(index, tell)?;
        *total += self.text(&index, MAX_INDEX_BYTES, tell)?;
        let bytes = read_small(&self.blobs().join(&index.etag), MAX_INDEX_BYTES)?;
        let names =
            shard_names(&bytes).map_err(|why| self.hub.web.nonsense(&format!("{INDEX}: {why}")))?;
        let mut wanted = Vec::with_capacity(names.len());
        for name in &names {
            let shard = self.listing.find(name).ok_or_else(|| {
                Error::new(
                    Code::Checkpoint,
                    format!("{} has no file {}", self.id.repo, clip(name)),
                    format!("its {INDEX} names it"),
                    "tell the repository's author, or choose another revision",
                )
            })?;
            wanted.push(self.wanted(shard, tell)?);
        }
        Ok(wanted)
    }

    fn room_for(&self, weights: &[Wanted]) -> Result<()> {
        // Two files with the same content are one blob.
        let blobs: BTreeMap<&str, u64> = weights
            .iter()
            .map(|w| (w.etag.as_str(), w.bytes - self.here(w)))
            .collect();
        let needed: u64 = blobs.values().sum();
        let Some(free) = free_bytes(&self.store) else {
            return Ok(());
        };
        if needed <= free {
            return Ok(());
        }
        Err(Error::new(
            Code::Space,
            format!("not enough disk space at {}", self.hub.cache.display()),
            format!(
                "the download still needs {}, {} are free",
                human_bytes(needed),
                human_bytes(free)
            ),
            format!(
                "free {} there, or set HF_HUB_CACHE to a folder on a larger disk",
                human_bytes(needed - free)
            ),
        ))
    }

    /// `snapshots/COMMIT/NAME` → the blob, replaced whole or not at all.
    fn link(&self, wanted: &Wanted) -> Result<()> {
        let link = self.snapshot().join(&wanted.name);
        let up = "../".repeat(2 + wanted.name.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{}", wanted.etag));
        if fs::read_link(&link).is_ok_and(|t| t == target) {
            return Ok(());
        }
        let fail = |e: std::io::Error| Error::io(format!("cannot link {}", link.display()), &e);
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent).map_err(fail)?;
        }
        let fresh = self
            .snapshot()
            .join(format!(".link.{}", std::process::id()));
        let _ = fs::remove_file(&fresh);
        std::os::unix::fs::symlink(target, &fresh).map_err(fail)?;
        fs::rename(&fresh, &link).map_err(fail)
    }

    /// Last of all: from here on the revision counts as here.
    fn write_ref(&self) -> Result<()> {
        if self.id.revision == self.listing.sha {
            return Ok(());
        }
        let path = self.store.join("refs").join(&self.id.revision);
        let fail = |e: std::io::Error| Error::io(format!("cannot write {}", path.display()), &e);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(fail)?;
        }
        let fresh = self.store.join(format!(".ref.{}", std::process::id()));
        fs::write(&fresh, &self.listing.sha).map_err(fail)?;
        fs::rename(&fresh, &path).map_err(fail)
    }
}
