//! What MODEL means.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::checkpoint::hub::{cache_dir, resolve_in};
use crate::checkpoint::testing::{self, Tensor};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::error::{Code, Result};
use crate::units::Dtype;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn tensors() -> Vec<Tensor> {
    testing::tensors(&testing::spec(&testing::config()), Dtype::BF16)
}

fn open(model: &str, cache: &Path) -> Result<Checkpoint> {
    let place = resolve_in(model, Some(cache))?;
    Checkpoint::open_at(&place, &OpenOptions::default())
}

#[test]
fn the_cache_is_where_huggingface_hub_has_it() {
    let find = |vars: &[(&str, &str)]| {
        let vars: HashMap<_, _> = vars.iter().copied().collect();
        cache_dir(&|key| vars.get(key).map(OsString::from))
    };
    let path = |p: &str| Some(PathBuf::from(p));
    assert_eq!(find(&[]), None);
    assert_eq!(find(&[("HOME", "/h")]), path("/h/.cache/huggingface/hub"));
    assert_eq!(
        find(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]),
        path("/x/huggingface/hub")
    );
    assert_eq!(
        find(&[("HOME", "/h"), ("HF_HOME", "/f"), ("XDG_CACHE_HOME", "/x")]),
        path("/f/hub")
    );
    assert_eq!(
        find(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f")]),
        path("/c")
    );
    assert_eq!(
        find(&[("HOME", "/h"), ("HF_HUB_CACHE", "~/c")]),
        path("/h/c")
    );
    assert_eq!(
        find(&[("HOME", "/h"), ("HF_HUB_CACHE", "")]),
        path("/h/.cache/huggingface/hub")
    );
}

#[test]
fn a_hub_id_opens_its_snapshot() {
    let cache = tempfile::tempdir().unwrap();
    let snapshot = testing::write_cache(cache.path(), "models--org--tiny", COMMIT, &tensors());
    fs::create_dir_all(cache.path().join("models--org--tiny/refs/refs/pr")).unwrap();
    fs::write(
        cache.path().join("models--org--tiny/refs/refs/pr/1"),
        format!("{COMMIT}\n"),
    )
    .unwrap();
    let by_commit = format!("org/tiny@{COMMIT}");
    for model in [
        "org/tiny",
        "org/tiny@main",
        by_commit.as_str(),
        "org/tiny@refs/pr/1",
        snapshot.to_str().unwrap(),
    ] {
        let checkpoint = open(model, cache.path()).unwrap();
        assert_eq!(checkpoint.label, "org--tiny", "{model}");
        assert_eq!(checkpoint.identity.revision.as_deref(), Some(COMMIT));
        assert_eq!(checkpoint.tensors.len(), tensors().len());
        assert!(
            checkpoint.files[0]
                .path
                .to_str()
                .unwrap()
                .contains("/blobs/")
        );
        assert_eq!(checkpoint.identity.files[0].name, "model.safetensors");
    }
    testing::write_cache(cache.path(), "models--gpt", COMMIT, &tensors());
    assert_eq!(open("gpt", cache.path()).unwrap().label, "gpt");
}

#[test]
fn what_is_not_there_is_said_with_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    testing::write_cache(cache.path(), "models--org--tiny", COMMIT, &tensors());
    let other = format!("org/tiny@{}", COMMIT.replace('0', "f"));
    for model in ["org/other", "org/tiny@v2", other.as_str(), "org/tiny@a/b"] {
        let error = open(model, cache.path()).unwrap_err();
        assert_eq!(error.code(), Code::Usage, "{error}");
        assert!(error.fix().contains("hf download org/"), "{error}");
    }
    for model in [
        "./nowhere",
        "/nowhere",
        "a/b/c",
        "org/../tiny",
        "org/tiny@../../x",
        "org/tiny@",
        "org/tiny@/etc",
        "",
        "--x",
        "org--tiny",
        "org/ti ny",
        "\u{1b}[2J",
    ] {
        let error = open(model, cache.path()).unwrap_err();
        assert_eq!(error.code(), Code::Usage, "{model}: {error}");
        assert!(
            error.what().contains("no model") && !error.what().contains('\u{1b}'),
            "{error}"
        );
    }
    let file = cache.path().join("model.safetensors");
    fs::write(&file, "x").unwrap();
    let error = open(file.to_str().unwrap(), cache.path()).unwrap_err();
    assert!(error.what().contains("not a folder"), "{error}");
}

#[test]
fn damaged_caches_are_refused() {
    let cache = tempfile::tempdir().unwrap();
    testing::write_cache(cache.path(), "models--org--tiny", COMMIT, &tensors());
    let main = cache.path().join("models--org--tiny/refs/main");
    for text in [
        "",
        "../../../etc",
        "main",
        &"a".repeat(300),
        "0123456789ABCDEF0123456789abcdef01234567",
    ] {
        fs::write(&main, text).unwrap();
        let error = open("org/tiny", cache.path()).unwrap_err();
        assert_eq!(error.code(), Code::Checkpoint, "{text}: {error}");
        assert!(error.what().contains("refs/main"), "{error}");
    }
}

// hazard: links: links of a hub snapshot lead into its own cache only
#[test]
fn links_of_a_snapshot_stay_in_the_models_own_cache() {
    let cache = tempfile::tempdir().unwrap();
    let snapshot = testing::write_cache(cache.path(), "models--org--tiny", COMMIT, &tensors());
    testing::write_cache(cache.path(), "models--org--other", COMMIT, &tensors());
    let link = snapshot.join("model.safetensors");
    fs::remove_file(&link).unwrap();
    symlink(
        "../../../models--org--other/blobs/model.safetensors-blob",
        &link,
    )
    .unwrap();
    let error = open("org/tiny", cache.path()).unwrap_err();
    assert_eq!(error.code(), Code::Checkpoint);
    assert!(error.what().contains("outside"), "{error}");

    // The whole snapshot led elsewhere, and a reference that is a link.
    fs::remove_dir_all(&snapshot).unwrap();
    symlink(
        cache
            .path()
            .join("models--org--other/snapshots")
            .join(COMMIT),
        &snapshot,
    )
    .unwrap();
    let error = open("org/tiny", cache.path()).unwrap_err();
    assert!(error.what().contains("outside"), "{error}");
    let main = cache.path().join("models--org--tiny/refs/main");
    fs::remove_file(&main).unwrap();
    symlink("/etc/hostname", &main).unwrap();
    let error = open("org/tiny", cache.path()).unwrap_err();
    assert!(error.what().contains("outside"), "{error}");
}
