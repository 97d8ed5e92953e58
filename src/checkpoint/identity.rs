//! Which checkpoint this is, without reading its weights.

use std::hash::Hasher;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

/// What a source is known by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Commit of a hub-cache snapshot.
    pub revision: Option<String>,
    /// xxh3-64 of config.json: another rope is another model.
    pub config_hash: u64,
    /// In the order of the checkpoint's files.
    pub files: Vec<FileIdentity>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Name in the model's folder; the whole path where it lies outside.
    pub name: String,
    pub bytes: u64,
    /// xxh3-64 of a safetensors header, or of accelerate's index entry.
    pub header_hash: u64,
    /// Last change of content, nanoseconds since 1970.
    pub mtime_ns: i64,
}

impl Identity {
    /// One number for all of it. Times count only where no commit vouches for the content: a model retrained in place has
    /// the same header as before, while a copy of a hub cache is the same model.
    pub fn hash(&self) -> u64 {
        let mut hasher = XxHash3_64::new();
        let mut field = |bytes: &[u8]| {
            hasher.write(&(bytes.len() as u64).to_le_bytes());
            hasher.write(bytes);
        };
        field(self.revision.as_deref().unwrap_or("").as_bytes());
        field(&self.config_hash.to_le_bytes());
        for file in &self.files {
            field(file.name.as_bytes());
            field(&file.bytes.to_le_bytes());
            field(&file.header_hash.to_le_bytes());
            if self.revision.is_none() {
                field(&file.mtime_ns.to_le_bytes());
            }
        }
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let file = FileIdentity {
            name: "model.safetensors".to_string(),
            bytes: 10,
            header_hash: 7,
            mtime_ns: 1,
        };
        Identity {
            revision: None,
            config_hash: 5,
            files: vec![file],
        }
    }

    #[test]
    fn everything_counts() {
        let base = identity();
        let change = |f: fn(&mut Identity)| {
            let mut other = identity();
            f(&mut other);
            other.hash() != base.hash()
        };
        assert!(change(|i| i.revision = Some("a".to_string())));
        assert!(change(|i| i.config_hash = 6));
        assert!(change(|i| i.files[0].name.push('x')));
        assert!(change(|i| i.files[0].bytes = 11));
        assert!(change(|i| i.files[0].header_hash = 8));
        assert!(change(|i| i.files[0].mtime_ns = 2));
        assert!(change(|i| i.files.clear()));
        assert_eq!(base.hash(), identity().hash());
    }

    #[test]
    fn a_commit_vouches_for_the_content() {
        let mut a = identity();
        a.revision = Some("c0ffee".to_string());
        let mut b = a.clone();
        b.files[0].mtime_ns = 99;
        assert_eq!(a.hash(), b.hash());
    }

    #[test]
    fn it_survives_json() {
        let text = serde_json::to_string(&identity()).unwrap();
        assert_eq!(serde_json::from_str::<Identity>(&text).unwrap(), identity());
    }
}
