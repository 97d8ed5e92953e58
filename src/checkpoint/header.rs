//! The header of a safetensors file: 8 bytes of length (little endian), that much JSON, then the tensors' bytes.
//! <https://huggingface.co/docs/safetensors>. Stricter than the reference: duplicate keys, white space in front and
//! names that could be paths are refused, and the cost of a hostile header is bounded (64 MiB + twice its size).

use std::fs::File;
use std::io::Read;
use std::path::Path;

use twox_hash::XxHash3_64;

use super::files;
use super::json::{Flaw, Parsed, Reader};
use crate::error::{Code, Error, Result};
use crate::planted::{self, Bug};
use crate::units::Dtype;

/// The reference allows 100 MB. A file of as many tensors as below, with names of the usual length, has a header of 10 MB; the
/// lower limit is what keeps a hostile one under 200 ms.
pub(super) const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Of one file. The largest published models have under 100 thousand tensors in all, in dozens of files.
const MAX_TENSORS: usize = 1 << 16;
const MAX_METADATA: usize = 1 << 12;
pub(super) const MAX_NAME_BYTES: usize = 256;
pub(super) const MAX_DIMS: usize = 8;

/// A tensor as a header lists it. `begin..end`: bytes behind the header.
#[derive(Debug, PartialEq)]
pub(super) struct Tensor {
    pub name: String,
    pub dtype: Stored,
    pub shape: Vec<usize>,
    pub begin: u64,
    pub end: u64,
}

/// The type of stored elements.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Stored {
    Ours(Dtype),
    /// Fine as long as nobody needs the tensor.
    Other(String),
}

#[derive(Debug)]
pub(super) struct Header {
    pub tensors: Vec<Tensor>,
    /// From the start of the file to the first tensor.
    pub data_offset: u64,
    /// xxh3-64 of length and JSON.
    pub hash: u64,
}

/// Reads and checks the header of the open file at `path` (for messages), which is `file_bytes` long.
pub(super) fn read(file: &File, path: &Path, file_bytes: u64) -> Result<Header> {
    let broken = |why: String| {
        Error::new(
            Code::Checkpoint,
            format!("{} is not a sound safetensors file", path.display()),
            why,
            "download the file again",
        )
    };
    let mut start = Vec::with_capacity(256);
    let read = |e: std::io::Error| Error::io(format!("cannot read {}", path.display()), &e);
    file.take(256).read_to_end(&mut start).map_err(read)?;
    let length = start
        .first_chunk::<8>()
        .map(|bytes| u64::from_le_bytes(*bytes));
    let Some(length) = length.filter(|n| *n <= MAX_HEADER_BYTES && start.get(8) == Some(&b'{'))
    else {
        files::refuse_foreign(&start, path)?;
        return Err(broken(match length {
            None => format!("it is {file_bytes} bytes long, too short for a header"),
            Some(n) if n > MAX_HEADER_BYTES => {
                format!("its header claims {n} bytes; the limit is {MAX_HEADER_BYTES}")
            }
            Some(_) => "its header does not begin with `{`".to_string(),
        }));
    };
    let data_offset = 8 + length;
    if data_offset > file_bytes {
        return Err(broken(format!(
            "its header claims {length} bytes, but the file ends at {file_bytes}: truncated"
        )));
    }
    // Grown to the one size it needs: the file's own length bounds it.
    let wanted = data_offset as usize;
    let mut bytes = start;
    bytes.truncate(wanted);
    bytes.reserve_exact(wanted - bytes.len());
    let rest = (wanted - bytes.len()) as u64;
    file.take(rest).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() != wanted {
        return Err(broken("it was truncated while it was read".to_string()));
    }
    let hash = XxHash3_64::oneshot(&bytes);
    let tensors = parse(&bytes[8..], file_bytes - data_offset)
        .map_err(|flaw| broken(format!("{} (byte {})", flaw.why, flaw.at + 8)))?;
    Ok(Header {
        tensors,
        data_offset,
        hash,
    })
}

/// The tensors of a header's JSON, in the order of their bytes, which must fill `data_bytes` exactly: no hole, no overlap,
/// nothing behind.
pub(super) fn parse(json: &[u8], data_bytes: u64) -> Parsed<Vec<Tensor>> {
    if json.first() != Some(&b'{') {
        let why = "the header does not begin with `{`".into();
        return Err(Flaw { at: 0, why });
    }
    let mut reader = Reader::new(json)?;
    let mut tensors = Vec::new();
    let mut metadata = 0;
    reader.object(MAX_NAME_BYTES, |r, key| {
        if key == "__metadata__" {
            metadata += 1;
            return match (metadata, r.peek()) {
                (1, Some(b'{')) => metadata_of(r),
                (1, _) => r.flaw("`__metadata__` is not an object"),
                _ => r.flaw("`__metadata__` appears twice"),
            };
        }
        if !sane_name(&key) {
            return r.flaw("a tensor name that is empty or has slashes, blanks or odd characters");
        }
        if tensors.len() == MAX_TENSORS {
            return r.flaw(format!("more than {MAX_TENSORS} tensors"));
        }
        tensors.push(tensor(r, key.into_owned())?);
        Ok(())
    })?;
    reader.end()?;
    check_names(&mut tensors)?;
    check_offsets(&mut tensors, data_bytes)?;
    Ok(tensors)
}

/// Text to text, of no interest here.
fn metadata_of(r: &mut Reader) -> Parsed<()> {
    let mut entries = 0;
    r.members_raw(|r| {
        entries += 1;
        if entries > MAX_METADATA {
            return r.flaw(format!("more than {MAX_METADATA} entries of metadata"));
        }
        match r.peek() {
            Some(b'"') => r.skip(),
            _ => r.flaw("metadata that is not text"),
        }
    })
}

/// Tensor names become file names in accelerate's folders, and go into messages: printable, no separators, no `..`.
pub(super) fn sane_name(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b'\\' | b'`');
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.bytes().all(good)
        && !name.starts_with('.')
        && !name.contains("..")
}

fn tensor(r: &mut Reader, name: String) -> Parsed<Tensor> {
    let (mut dtype, mut shape, mut offsets) = (None, None, None);
    r.object(16, |r, key| {
        let again = match key.as_ref() {
            "dtype" => dtype.replace(r.string(16)?.into_owned()).is_some(),
            "shape" => shape.replace(r.numbers(MAX_DIMS)?).is_some(),
            "data_offsets" => offsets.replace(r.numbers(2)?).is_some(),
            _ => return r.flaw(format!("tensor `{name}` has an unknown key")),
        };
        match again {
            true => r.flaw(format!("tensor `{name}` has a key twice")),
            false => Ok(()),
        }
    })?;
    let (Some(dtype), Some(shape), Some(offsets)) = (dtype, shape, offsets) else {
        return r.flaw(format!(
            "tensor `{name}` lacks dtype, shape or data_offsets"
        ));
    };
    let [begin, end] = offsets[..] else {
        return r.flaw(format!("tensor `{name}` needs two data_offsets"));
    };
    let claimed = end.checked_sub(begin);
    let Some(claimed) = claimed else {
        return r.flaw(format!("tensor `{name}` ends before it begins"));
    };
    let elements = shape
        .iter()
        .try_fold(1u64, |product, &dim| product.checked_mul(dim));
    if let Some(bits) = element_bits(&dtype) {
        let bytes = elements
            .and_then(|n| n.checked_mul(bits))
            .filter(|bits| bits.is_multiple_of(8))
            .map(|bits| bits / 8);
        if bytes != Some(claimed) {
            return r.flaw(format!(
                "tensor `{name}`: {dtype} of shape {shape:?} does not take the {claimed} bytes of its data_offsets"
            ));
        }
    }
    let shape: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let (Some(shape), Some(_)) = (shape, elements) else {
        return r.flaw(format!("tensor `{name}` has an absurd shape"));
    };
    let dtype = match dtype.as_str() {
        "F16" => Stored::Ours(Dtype::F16),
        "BF16" => Stored::Ours(Dtype::BF16),
        "F32" => Stored::Ours(Dtype::F32),
        _ => Stored::Other(dtype),
    };
    Ok(Tensor {
        name,
        dtype,
        shape,
        begin,
        end,
    })
}

/// Bits of one element of the types the format names; `None` for younger ones, whose sizes are not checked.
fn element_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

fn check_names(tensors: &mut [Tensor]) -> Parsed<()> {
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        None => Ok(()),
        Some(pair) => whole_file(format!("tensor `{}` appears twice", pair[0].name)),
    }
}

fn check_offsets(tensors: &mut [Tensor], data_bytes: u64) -> Parsed<()> {
    tensors.sort_unstable_by_key(|t| (t.begin, t.end));
    let mut end = 0;
    for t in tensors.iter() {
        if t.begin != end && !(t.begin < end && planted::is(Bug::OverlapAccepted)) {
            let what = if t.begin < end {
                "overlaps the one before it"
            } else {
                "leaves a hole before it"
            };
            return whole_file(format!("tensor `{}` {what}", t.name));
        }
        end = t.end;
    }
    match end.cmp(&data_bytes) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => whole_file(format!(
            "its tensors take {end} bytes, but only {data_bytes} follow the header: truncated"
        )),
        std::cmp::Ordering::Less => whole_file(format!(
            "its tensors take {end} bytes, but {data_bytes} follow the header: trailing bytes"
        )),
    }
}

fn whole_file<T>(why: String) -> Parsed<T> {
    let why = why.into();
    Err(Flaw { at: 0, why })
}
