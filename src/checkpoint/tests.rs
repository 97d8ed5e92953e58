mod accelerate;
mod folders;
mod header_cost;
mod headers;
mod hub;

use std::fs;
use std::path::Path;

use super::testing::{self, Tensor};
use super::{Checkpoint, OpenOptions};
use crate::error::{Code, Error, Result};
use crate::units::Dtype;

fn open(dir: &Path) -> Result<Checkpoint> {
    Checkpoint::open(dir.to_str().unwrap(), &OpenOptions::default())
}

fn open_external(dir: &Path) -> Result<Checkpoint> {
    let options = OpenOptions {
        allow_external: true,
        ..OpenOptions::default()
    };
    Checkpoint::open(dir.to_str().unwrap(), &options)
}

fn check(checkpoint: &Checkpoint) -> Result<Vec<String>> {
    let spec = testing::spec(&checkpoint.config);
    let dtype_of = |name: &str| checkpoint.tensors.get(name).map_or(Dtype::F32, |t| t.dtype);
    checkpoint.check(&spec.units(&dtype_of))
}

fn tensors() -> Vec<Tensor> {
    testing::tensors(&testing::spec(&testing::config()), Dtype::BF16)
}

/// Reads each tensor where the checkpoint says it lies.
fn assert_bytes(checkpoint: &Checkpoint, tensors: &[Tensor]) {
    assert_eq!(checkpoint.tensors.len(), tensors.len());
    for t in tensors {
        let entry = &checkpoint.tensors[&t.name];
        assert_eq!((&entry.shape, entry.bytes), (&t.shape, t.data.len() as u64));
        let file = &checkpoint.files[entry.file.index()];
        let bytes = fs::read(&file.path).unwrap();
        assert_eq!(bytes.len() as u64, file.bytes);
        let start = entry.offset as usize;
        assert_eq!(
            bytes[start..start + entry.bytes as usize],
            t.data,
            "{}",
            t.name
        );
    }
}

fn refused(result: Result<Checkpoint>, code: Code, words: &[&str]) -> Error {
    let error = result.map(|c| c.files).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.code(), code, "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` not in: {text}");
    }
    assert!(text.len() < 2000 && !error.fix().is_empty());
    error
}
