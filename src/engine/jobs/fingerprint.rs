//! Is it still the same model? A hash of what an answer depends on, the same packed or in place.

use std::fs::File;
use std::hash::Hasher;
use std::os::unix::fs::FileExt;

use twox_hash::XxHash3_64;

use crate::error::{Error, Result};
use crate::store::Store;

/// Bytes looked at in each tensor: a fine-tune changes them all, and 7B models have a few hundred.
const SAMPLE_BYTES: u64 = 4096;
/// Files beside the weights that decide what tokens and pictures mean and when an answer ends.
const TEXT_FILES: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
];

/// A hash of the text files and of the first bytes of every tensor, in its stored type. Code::Io where a file cannot be read.
pub fn fingerprint(store: &Store) -> Result<u64> {
    let mut hash = XxHash3_64::new();
    for name in TEXT_FILES {
        match std::fs::read(store.text_dir.join(name)) {
            Ok(bytes) => {
                hash.write(name.as_bytes());
                hash.write(&(bytes.len() as u64).to_le_bytes());
                hash.write(&bytes);
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(format!("{name} cannot be read"), &e)),
        }
    }
    let files: Vec<Option<File>> = store
        .files
        .iter()
        .map(|f| File::open(&f.path).ok())
        .collect();
    let mut buffer = vec![0; SAMPLE_BYTES as usize];
    for place in store
        .units
        .iter()
        .flat_map(|u| u.places.iter().map(move |p| (u, p)))
    {
        let (unit, p) = place;
        let extent = &unit.extents[p.extent];
        let sample = &mut buffer[..p.bytes().min(SAMPLE_BYTES) as usize];
        let path = &store.file(extent.file).path;
        let failed =
            |e: &std::io::Error| Error::io(format!("{} cannot be read", path.display()), e);
        match &files[extent.file.index()] {
            Some(file) => file
                .read_exact_at(sample, extent.offset + p.offset)
                .map_err(|e| failed(&e))?,
            None => return Err(failed(&std::io::Error::from_raw_os_error(libc::ENOENT))),
        }
        hash.write(p.name.as_bytes());
        hash.write(format!("{:?} {} {}", p.dtype, p.rows, p.cols).as_bytes());
        hash.write(sample);
    }
    Ok(hash.finish())
}
