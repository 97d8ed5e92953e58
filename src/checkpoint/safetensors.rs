//! A Hugging Face folder: `model.safetensors`, or shards with an index.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::files::{self, Folder, MAX_INDEX_BYTES};
use super::header::{self, Header, MAX_NAME_BYTES};
use super::json::{Parsed, Reader};
use super::{FileIdentity, Listing, Place};
use crate::error::{Code, Error, Result};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const MAX_SHARDS: usize = 4096;

pub(super) fn list(folder: &Folder, listing: &mut Listing) -> Result<()> {
    if let Some(path) = folder.find(SINGLE)? {
        let (header, identity) = open(&path, SINGLE.to_string())?;
        return add_all(header, &path, identity, listing);
    }
    let index_path = folder.need(INDEX, "the folder's listing")?;
    let bytes = files::read_small(&index_path, MAX_INDEX_BYTES)?;
    let shards = parse_index(&bytes).map_err(|flaw| {
        Error::new(
            Code::Checkpoint,
            format!("{} is not a sound index", index_path.display()),
            format!("{} (byte {})", flaw.why, flaw.at),
            "download the index again",
        )
    })?;
    drop(bytes);
    for (shard, names) in shards {
        let path = folder.need(&shard, INDEX)?;
        let (mut header, identity) = open(&path, shard)?;
        keep_listed(&mut header, &names, &path)?;
        add_all(header, &path, identity, listing)?;
    }
    Ok(())
}

/// Opens one file and reads its header. `name`: how the folder calls it.
pub(super) fn open(path: &Path, name: String) -> Result<(Header, FileIdentity)> {
    let (file, metadata) = files::open_regular(path)?;
    let header = header::read(&file, path, metadata.len())?;
    let identity = FileIdentity {
        name,
        bytes: metadata.len(),
        header_hash: header.hash,
        mtime_ns: files::mtime_ns(&metadata),
    };
    Ok((header, identity))
}

fn add_all(
    header: Header,
    path: &Path,
    identity: FileIdentity,
    listing: &mut Listing,
) -> Result<()> {
    let file = listing.add_file(path, identity);
    for tensor in header.tensors {
        let place = Place {
            dtype: tensor.dtype,
            shape: tensor.shape,
            file,
            offset: header.data_offset + tensor.begin,
            bytes: tensor.end - tensor.begin,
        };
        listing.add_tensor(tensor.name, place)?;
    }
    Ok(())
}

/// The index decides where a tensor is: what a shard holds beyond it is left alone, what it promises must be there.
fn keep_listed(header: &mut Header, names: &[String], path: &Path) -> Result<()> {
    header
        .tensors
        .retain(|t| names.binary_search(&t.name).is_ok());
    if header.tensors.len() == names.len() {
        return Ok(());
    }
    let there: HashSet<&str> = header.tensors.iter().map(|t| t.name.as_str()).collect();
    let missing = names.iter().find(|n| !there.contains(n.as_str()));
    let missing = missing.map_or("", |n| n.as_str());
    Err(Error::new(
        Code::Checkpoint,
        format!("{} has no tensor `{missing}`", path.display()),
        format!("{INDEX} says that it has"),
        "download the file and the index again",
    ))
}

/// Shard → the sorted names of its tensors.
pub(super) fn parse_index(bytes: &[u8]) -> Parsed<BTreeMap<String, Vec<String>>> {
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut reader = Reader::new(bytes)?;
    let mut maps = 0;
    let mut tensors = 0;
    reader.object(MAX_NAME_BYTES, |r, key| {
        if key != "weight_map" {
            return r.skip();
        }
        maps += 1;
        r.object(MAX_NAME_BYTES, |r, name| {
            if !header::sane_name(&name) {
                return r
                    .flaw("a tensor name that is empty or has slashes, blanks or odd characters");
            }
            let shard = r.string(255)?;
            if !files::plain_name(&shard) || !shard.ends_with(".safetensors") {
                return r.flaw("a shard that is not the plain name of a .safetensors file");
            }
            tensors += 1;
            if tensors > super::MAX_TENSORS {
                return r.flaw(format!("more than {} tensors", super::MAX_TENSORS));
            }
            if !shards.contains_key(shard.as_ref()) {
                if shards.len() == MAX_SHARDS {
                    return r.flaw(format!("more than {MAX_SHARDS} shards"));
                }
                shards.insert(shard.to_string(), Vec::new());
            }
            if let Some(names) = shards.get_mut(shard.as_ref()) {
                names.push(name.into_owned());
            }
            Ok(())
        })
    })?;
    reader.end()?;
    if maps != 1 {
        return reader.flaw("it needs one `weight_map`");
    }
    for names in shards.values_mut() {
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return reader.flaw(format!("tensor `{}` appears twice", pair[0]));
        }
    }
    Ok(shards)
}
