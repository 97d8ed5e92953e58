//! Sizes, ids and alignment: the small words every module shares.

use std::fmt;

use crate::error::{Code, Error, Result};

/// O_DIRECT granularity: file offset, length and memory address are multiples of this.
pub const ALIGN_BYTES: u64 = 4096;
/// Verification granularity: one checksum a block, blocks counted from the start of a file.
pub const BLOCK_BYTES: u64 = 64 * 1024;
/// Alignment of each tensor inside a packed file.
pub const TENSOR_ALIGN_BYTES: u64 = 256;

/// `x` rounded up to a multiple of `align` (any positive number).
pub const fn align_up(x: u64, align: u64) -> u64 {
    x.div_ceil(align) * align
}

/// `x` rounded down to a multiple of `align` (any positive number).
pub const fn align_down(x: u64, align: u64) -> u64 {
    x / align * align
}

/// Index of a unit in the model's unit list: what is paged at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitId(pub u32);

impl UnitId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Index of a file in a store's file list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

impl FileId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Element type of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Dtype {
    #[serde(rename = "float16")]
    F16,
    #[serde(rename = "bfloat16")]
    BF16,
    #[serde(rename = "float32")]
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// `float16`, `bfloat16`, `float32`: as configs and flags write it.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            Dtype::F32 => "float32",
        }
    }

    /// `f16`, `bf16`, `f32`: as folder names write it.
    pub const fn short(self) -> &'static str {
        match self {
            Dtype::F16 => "f16",
            Dtype::BF16 => "bf16",
            Dtype::F32 => "f32",
        }
    }

    /// Accepts `float16|bfloat16|float32`, `f16|bf16|f32`, `F16|BF16|F32`, each with or without `torch.`.
    pub fn parse(text: &str) -> Option<Dtype> {
        match text.strip_prefix("torch.").unwrap_or(text) {
            "float16" | "f16" | "F16" | "fp16" | "half" => Some(Dtype::F16),
            "bfloat16" | "bf16" | "BF16" => Some(Dtype::BF16),
            "float32" | "f32" | "F32" | "fp32" | "float" => Some(Dtype::F32),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Reads `8GiB`, `512MiB`, `25.6k`, `1GB`, `4096`: binary for `Ki`…`Ti`, decimal for `k`…`T`.
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::new(
            Code::Usage,
            format!("`{text}` is not a size"),
            "a size is a number with an optional unit",
            "write it like 8GiB, 512MiB, 25.6k or 4096",
        )
    };
    let t = text.trim();
    let split = t
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(t.len());
    let number: f64 = t[..split].parse().map_err(|_| bad())?;
    let unit = t[split..].trim().to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let factor: f64 = match unit {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "t" => 1e12,
        "ki" => 1024.0,
        "mi" => 1024f64.powi(2),
        "gi" => 1024f64.powi(3),
        "ti" => 1024f64.powi(4),
        _ => return Err(bad()),
    };
    let bytes = number * factor;
    if !bytes.is_finite() || bytes >= 2f64.powi(63) {
        return Err(bad());
    }
    Ok(bytes.round() as u64)
}

/// A number of bytes for people: `466.1 MB`, `3.09 GB`.
pub fn human_bytes(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        0..=9_999 => format!("{bytes} B"),
        10_000..=999_999 => format!("{:.1} kB", b / 1e3),
        1_000_000..=999_999_999 => format!("{:.1} MB", b / 1e6),
        _ => format!("{:.2} GB", b / 1e9),
    }
}

/// So many of something whose plural ends in s: `1 file`, `3 files`.
pub fn counted(n: u64, one: &str) -> String {
    match n {
        1 => format!("1 {one}"),
        n => format!("{n} {one}s"),
    }
}

/// A number of bytes as a flag takes it: the smallest whole `MiB` that holds it, so that it can be pasted.
pub fn flag_size(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(parse_size("8GiB").unwrap(), 8 << 30);
        assert_eq!(parse_size("512 MiB").unwrap(), 512 << 20);
        assert_eq!(parse_size("25.6k").unwrap(), 25_600);
        assert_eq!(parse_size("1GB").unwrap(), 1_000_000_000);
        assert_eq!(parse_size("4096").unwrap(), 4096);
        for bad in ["", "GiB", "-1", "1.2.3", "8 parsecs", "1e400", "99999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_is_not_a_plural() {
        assert_eq!(counted(0, "file"), "0 files");
        assert_eq!(counted(1, "file"), "1 file");
        assert_eq!(counted(2, "file"), "2 files");
    }

    #[test]
    fn alignment() {
        assert_eq!(align_up(1, 4096), 4096);
        assert_eq!(align_up(4096, 4096), 4096);
        assert_eq!(align_down(4097, 4096), 4096);
    }
}
