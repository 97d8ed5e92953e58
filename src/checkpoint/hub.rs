//! What MODEL means: a folder, or a hub id in the local Hugging Face cache
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>). Looks; `download` fetches.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::SourceKind;
use super::files::{self, Folder, base_name, clip};
use crate::error::{Code, Error, Result};

/// The command that fetches a model.
const DOWNLOAD: &str = match cfg!(feature = "hub") {
    true => "tensorpager pull",
    false => "hf download",
};

/// A model folder that was found.
#[derive(Clone, Debug)]
pub struct ModelPath {
    /// Canonical path of the folder.
    pub dir: PathBuf,
    /// Folder name, or hub name with `/` as `--`.
    pub label: String,
    /// Commit of a hub-cache snapshot.
    pub revision: Option<String>,
    pub kind: SourceKind,
    /// Links inside the folder may lead below this only.
    pub(super) root: PathBuf,
}

impl ModelPath {
    pub(super) fn folder(&self, allow_external: bool) -> Folder {
        Folder {
            dir: self.dir.clone(),
            root: self.root.clone(),
            allow_external,
        }
    }
}

/// The folder that `model` names: an existing folder as given, else `org/name` or `org/name@revision` in the hub cache
/// (`HF_HUB_CACHE`, `HF_HOME/hub`, `XDG_CACHE_HOME/huggingface/hub`, `~/.cache/huggingface/hub`; without a
/// revision, `main`).
///
/// Errors: [`Code::Usage`] where it is neither; [`Code::Checkpoint`] where it is there but damaged or holds no weights;
/// [`Code::Unsupported`] where its weights are of another format.
pub fn resolve_model(model: &str) -> Result<ModelPath> {
    resolve_in(model, cache_dir(&|key| std::env::var_os(key)).as_deref())
}

/// The hub cache as huggingface_hub finds it. `env` reads a variable.
pub(super) fn cache_dir(env: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let var = |key: &str| env(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || var("HOME");
    let expand = |path: PathBuf| match (path.strip_prefix("~"), home()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    };
    let hub = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE"));
    if let Some(hub) = hub {
        return Some(expand(hub));
    }
    let hf_home = var("HF_HOME").or_else(|| {
        let cache = var("XDG_CACHE_HOME").or_else(|| Some(home()?.join(".cache")));
        Some(cache?.join("huggingface"))
    });
    Some(expand(hf_home?).join("hub"))
}

pub(super) fn resolve_in(model: &str, cache: Option<&Path>) -> Result<ModelPath> {
    match fs::metadata(model) {
        Ok(m) if m.is_dir() => return folder(Path::new(model)),
        Ok(m) => {
            // What people give instead of a folder is best named by what it is.
            if m.is_file()
                && let Ok(path) = fs::canonicalize(model)
                && let Some(start) = files::read_start(&path)
            {
                files::refuse_foreign(&start, Path::new(model))?;
            }
            return Err(Error::new(
                Code::Usage,
                format!("{} is not a folder", clip(model)),
                "a model is a folder with config.json and its weights",
                "give the folder that holds the file",
            ));
        }
        Err(_) => {}
    }
    let Some(id) = HubId::parse(model) else {
        if let Some(id) = id_of_address(model) {
            return Err(Error::new(
                Code::Usage,
                format!("`{}` is an address, not a model", clip(model)),
                "models are named as the hub names them, or by a folder",
                format!("give the id alone: {id}"),
            ));
        }
        return Err(Error::new(
            Code::Usage,
            format!("there is no model at `{}`", clip(model)),
            "the folder does not exist, and it is not a hub id (org/name or org/name@revision)",
            "check the path",
        ));
    };
    let absent = |cause: String| {
        Error::new(
            Code::Usage,
            format!("model `{}` was not found", clip(model)),
            cause,
            format!("download it (`{} {}`), or give a folder", DOWNLOAD, id.repo),
        )
    };
    let Some(cache) = cache else {
        return Err(absent(
            "there is no such folder, and HOME is not set to find the hub cache".to_string(),
        ));
    };
    let store = cache.join(id.folder());
    if !store.is_dir() && !id.repo.contains('/') {
        return Err(Error::new(
            Code::Usage,
            format!("there is no model at `{}`", clip(model)),
            format!(
                "there is no such folder, the hub cache {} has nothing of that name, and only org/name is looked for on the hub",
                cache.display()
            ),
            format!("check the path, or fetch it (`{DOWNLOAD} {}`)", id.repo),
        ));
    }
    if !store.is_dir() {
        return Err(absent(format!(
            "there is no such folder, and the hub cache {} does not have it",
            cache.display()
        )));
    }
    snapshot(&store, &id, &absent)
}

/// `org/name` of `https://huggingface.co/org/name…`, as people copy it from a browser.
fn id_of_address(model: &str) -> Option<String> {
    let rest = model
        .split_once("://")
        .filter(|(s, _)| matches!(*s, "https" | "http"))?
        .1;
    let mut parts = rest.split(['/', '?', '#']).skip(1);
    let id = format!("{}/{}", parts.next()?, parts.next()?);
    HubId::parse(&id).map(|_| id)
}

/// The folder of a revision's snapshot, as it is; `None` where there is none. For looking only: [`resolve_in`] checks.
#[cfg(feature = "hub")]
pub(super) fn snapshot_dir(store: &Path, id: &HubId) -> Option<PathBuf> {
    let commit = match files::read_small(&store.join("refs").join(&id.revision), 256) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).trim().to_string(),
        Err(_) => id.revision.clone(),
    };
    let dir = store.join("snapshots").join(&commit);
    (is_commit(&commit) && dir.is_dir()).then_some(dir)
}

/// The snapshot of a revision below `store`, the model's own directory in the cache.
fn snapshot(store: &Path, id: &HubId, absent: &dyn Fn(String) -> Error) -> Result<ModelPath> {
    let io = |e: std::io::Error| Error::io(format!("cannot open {}", store.display()), &e);
    let root = fs::canonicalize(store).map_err(io)?;
    let inside = Folder {
        dir: root.clone(),
        root: root.clone(),
        allow_external: false,
    };
    let reference = root.join("refs").join(&id.revision);
    let commit = if reference.is_file() {
        let bytes = files::read_small(&inside.confine(&reference)?, 256)?;
        let text = String::from_utf8_lossy(&bytes).trim().to_string();
        if !is_commit(&text) {
            return Err(Error::new(
                Code::Checkpoint,
                format!("{} does not name a commit", reference.display()),
                "the hub cache is damaged",
                format!("download the model again (`{} {}`)", DOWNLOAD, id.repo),
            ));
        }
        text
    } else {
        id.revision.clone()
    };
    let dir = root.join("snapshots").join(&commit);
    if !is_commit(&commit) || !dir.is_dir() {
        return Err(absent(format!(
            "the hub cache {} has no revision `{}`",
            root.display(),
            id.revision
        )));
    }
    folder(&inside.confine(&dir)?)
}

fn folder(path: &Path) -> Result<ModelPath> {
    let located = locate(path)?;
    let kind = super::kind_of(&located.folder(true))?;
    let Located {
        folder,
        label,
        revision,
    } = located;
    Ok(ModelPath {
        dir: folder.dir,
        label,
        revision,
        kind,
        root: folder.root,
    })
}

/// A folder, whatever it holds.
pub(super) struct Located {
    folder: Folder,
    label: String,
    revision: Option<String>,
}

impl Located {
    pub(super) fn folder(&self, allow_external: bool) -> Folder {
        Folder {
            allow_external,
            ..self.folder.clone()
        }
    }
}

pub(super) fn locate(path: &Path) -> Result<Located> {
    let io = |e: std::io::Error| Error::io(format!("cannot open {}", path.display()), &e);
    let dir = fs::canonicalize(path).map_err(io)?;
    let (root, label, revision) = match cache_of(&dir) {
        Some((root, label)) => (root, label, Some(base_name(&dir))),
        None => (dir.clone(), base_name(&dir), None),
    };
    let folder = Folder {
        dir,
        root,
        allow_external: false,
    };
    Ok(Located {
        folder,
        label,
        revision,
    })
}

/// `…/models--org--name/snapshots/COMMIT`: the model's own directory and its label.
fn cache_of(dir: &Path) -> Option<(PathBuf, String)> {
    let snapshots = dir.parent().filter(|p| p.ends_with("snapshots"))?;
    let store = snapshots.parent()?;
    let label = base_name(store).strip_prefix("models--")?.to_string();
    (is_commit(&base_name(dir)) && !label.is_empty()).then(|| (store.to_path_buf(), label))
}

pub(super) fn is_commit(text: &str) -> bool {
    (40..=64).contains(&text.len()) && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// `org/name@revision`, checked: it becomes a path.
pub(super) struct HubId {
    pub(super) repo: String,
    pub(super) revision: String,
}

impl HubId {
    pub(super) fn parse(text: &str) -> Option<HubId> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let part = |p: &str| {
            let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            let edge = |c: char| matches!(c, '-' | '.');
            (1..=96).contains(&p.len())
                && p.bytes().all(good)
                && !p.starts_with(edge)
                && !p.ends_with(edge)
                && !p.contains("..")
                && !p.contains("--")
        };
        let component = |p: &str| files::plain_name(p) && p.is_ascii();
        let repo_ok = repo.split('/').count() <= 2 && repo.split('/').all(part);
        // Branch names may have slashes (refs/pr/1).
        (repo_ok && revision.split('/').all(component)).then(|| HubId {
            repo: repo.to_string(),
            revision: revision.to_string(),
        })
    }

    /// Its directory in the cache.
    pub(super) fn folder(&self) -> String {
        format!("models--{}", self.repo.replace('/', "--"))
    }
}
