//! Where each unit's bytes lie. Packed or in place, a unit is a list of extents and of tensors inside them, so that
//! whoever reads it need not know which it is.

use crate::checkpoint::TensorEntry;
use crate::error::{Error, Result};
use crate::spec::{Role, TensorSpec, UnitKind, UnitSpec};
use crate::units::{ALIGN_BYTES, Dtype, FileId, TENSOR_ALIGN_BYTES, UnitId, align_up};

/// Two tensors of a unit whose bytes in a source file are at most this far apart are read as one extent.
pub const MERGE_GAP_BYTES: u64 = 64 * 1024;

/// A run of bytes in a file: exactly what is wanted, not aligned to anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub file: FileId,
    pub offset: u64,
    pub bytes: u64,
}

impl Extent {
    pub fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

/// Where one tensor of a unit lies inside the unit's extents: `rows * cols` elements, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub role: Role,
    /// Canonical name.
    pub name: String,
    pub dtype: Dtype,
    /// Rows in this unit (a row block of the head has some of the tensor's); a vector is one row.
    pub rows: usize,
    pub cols: usize,
    /// Index in the unit's extents.
    pub extent: usize,
    /// Inside that extent.
    pub offset: u64,
}

impl Place {
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * self.cols as u64 * self.dtype.bytes() as u64
    }
}

/// One unit: what is read, and what is in it.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitLayout {
    pub id: UnitId,
    pub kind: UnitKind,
    /// Sum of the extents' bytes: padding and merged gaps included.
    pub bytes: u64,
    pub extents: Vec<Extent>,
    /// In the order of the unit's tensors in the spec.
    pub places: Vec<Place>,
}

/// One tensor (or some of its rows) inside a packed file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub name: String,
    pub dtype: Dtype,
    /// First element of the tensor that belongs here, and how many follow.
    pub first_element: u64,
    pub elements: u64,
    /// In the file; a multiple of 256.
    pub offset: u64,
}

impl Piece {
    pub fn end(&self) -> u64 {
        self.offset + self.elements * self.dtype.bytes() as u64
    }
}

/// A file of a packed folder: pieces in ascending order, zeros between and behind them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PackedFile {
    pub name: String,
    /// A multiple of 4096.
    pub bytes: u64,
    pub pieces: Vec<Piece>,
}

/// Name of the file that holds a unit.
pub(crate) fn file_name(kind: UnitKind) -> String {
    match kind {
        UnitKind::Embed => "embed.dat".to_string(),
        UnitKind::Layer(i) => format!("layer.{i:03}.dat"),
        UnitKind::Norm => "norm.dat".to_string(),
        UnitKind::Head(i) => format!("head.{i:03}.dat"),
        UnitKind::VisionEmbed => "vision.embed.dat".to_string(),
        UnitKind::VisionBlock(i) => format!("vision.{i:03}.dat"),
        UnitKind::VisionMerger => "vision.merger.dat".to_string(),
    }
}

/// True for every name [`file_name`] can give: what may be opened from a manifest, or deleted by `clean`.
pub(crate) fn is_file_name(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(".dat") else {
        return false;
    };
    if matches!(stem, "embed" | "norm" | "vision.embed" | "vision.merger") {
        return true;
    }
    let number = ["layer.", "head.", "vision."]
        .iter()
        .find_map(|p| stem.strip_prefix(p));
    number.is_some_and(|n| (3..=9).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Lays the units out as packed files: one a unit, tensors in the spec's order, 256-byte aligned. The row blocks of a
/// tied head have no files: they lie in the embedding's.
pub(crate) fn plan_packed(
    units: &[UnitSpec],
    dtype_of: &dyn Fn(&str) -> Dtype,
) -> Result<(Vec<PackedFile>, Vec<UnitLayout>)> {
    let mut files: Vec<PackedFile> = Vec::new();
    let mut layouts = Vec::with_capacity(units.len());
    for unit in units {
        if let Some(layout) = tied_block(unit, &files, dtype_of)? {
            layouts.push(layout);
            continue;
        }
        let file = FileId(files.len() as u32);
        let (mut end, mut pieces, mut places) = (0u64, Vec::new(), Vec::new());
        for t in &unit.tensors {
            let dtype = dtype_of(&t.name);
            let place = place(t, dtype, 0, align_up(end, TENSOR_ALIGN_BYTES));
            end = checked_bytes(t, dtype)?
                .checked_add(place.offset)
                .ok_or_else(|| too_large(t))?;
            pieces.push(Piece {
                name: t.name.clone(),
                dtype,
                first_element: t.rows.start as u64 * t.cols() as u64,
                elements: t.rows.len() as u64 * t.cols() as u64,
                offset: place.offset,
            });
            places.push(place);
        }
        files.push(PackedFile {
            name: file_name(unit.kind),
            bytes: align_up(end, ALIGN_BYTES),
            pieces,
        });
        layouts.push(UnitLayout {
            id: unit.id,
            kind: unit.kind,
            bytes: end,
            extents: vec![Extent {
                file,
                offset: 0,
                bytes: end,
            }],
            places,
        });
    }
    Ok((files, layouts))
}

/// A head block whose tensor is already in the embedding's file.
fn tied_block(
    unit: &UnitSpec,
    files: &[PackedFile],
    dtype_of: &dyn Fn(&str) -> Dtype,
) -> Result<Option<UnitLayout>> {
    let (UnitKind::Head(_), [t]) = (unit.kind, unit.tensors.as_slice()) else {
        return Ok(None);
    };
    let embed = file_name(UnitKind::Embed);
    let found = files.iter().enumerate().find_map(|(i, f)| {
        let piece = f.pieces.iter().find(|p| p.name == t.name)?;
        (f.name == embed).then_some((FileId(i as u32), piece))
    });
    let Some((file, piece)) = found else {
        return Ok(None);
    };
    let dtype = dtype_of(&t.name);
    let row_bytes = t.cols() as u64 * dtype.bytes() as u64;
    let extent = Extent {
        file,
        offset: piece.offset + t.rows.start as u64 * row_bytes,
        bytes: checked_bytes(t, dtype)?,
    };
    if extent.end() > piece.end() {
        return Err(Error::internal(format!(
            "rows of {} beyond the embedding",
            t.name
        )));
    }
    Ok(Some(UnitLayout {
        id: unit.id,
        kind: unit.kind,
        bytes: extent.bytes,
        extents: vec![extent],
        places: vec![place(t, dtype, 0, 0)],
    }))
}

fn place(t: &TensorSpec, dtype: Dtype, extent: usize, offset: u64) -> Place {
    Place {
        role: t.role,
        name: t.name.clone(),
        dtype,
        rows: t.rows.len(),
        cols: t.cols(),
        extent,
        offset,
    }
}

fn checked_bytes(t: &TensorSpec, dtype: Dtype) -> Result<u64> {
    let elements = (t.rows.len() as u64).checked_mul(t.cols() as u64);
    elements
        .and_then(|e| e.checked_mul(dtype.bytes() as u64))
        .filter(|&b| b < 1 << 60)
        .ok_or_else(|| too_large(t))
}

fn too_large(t: &TensorSpec) -> Error {
    Error::internal(format!("{} is larger than any file can be", t.name))
}

/// Lays the units out over the source's own files. `find` gives a tensor of the source by canonical name; it has the
/// spec's shape (`Checkpoint::check` has seen to that).
pub(crate) fn plan_in_place<'a>(
    units: &[UnitSpec],
    find: &dyn Fn(&str) -> Result<&'a TensorEntry>,
) -> Result<Vec<UnitLayout>> {
    units.iter().map(|unit| in_place_unit(unit, find)).collect()
}

fn in_place_unit<'a>(
    unit: &UnitSpec,
    find: &dyn Fn(&str) -> Result<&'a TensorEntry>,
) -> Result<UnitLayout> {
    let mut wanted = Vec::with_capacity(unit.tensors.len());
    for t in &unit.tensors {
        let entry = find(&t.name)?;
        let row_bytes = t.cols() as u64 * entry.dtype.bytes() as u64;
        let piece = Extent {
            file: entry.file,
            offset: entry.offset + t.rows.start as u64 * row_bytes,
            bytes: checked_bytes(t, entry.dtype)?,
        };
        if piece.end() > entry.offset + entry.bytes {
            return Err(Error::internal(format!(
                "rows of {} beyond its bytes",
                t.name
            )));
        }
        wanted.push((piece, entry.dtype));
    }
    let extents = merged(wanted.iter().map(|(piece, _)| *piece).collect());
    let places = unit.tensors.iter().zip(&wanted).map(|(t, (piece, dtype))| {
        // Every piece lies in exactly one merged extent: the last that starts no later than it.
        let after = extents.partition_point(|e| (e.file, e.offset) <= (piece.file, piece.offset));
        let extent = after - 1;
        place(t, *dtype, extent, piece.offset - extents[extent].offset)
    });
    Ok(UnitLayout {
        id: unit.id,
        kind: unit.kind,
        bytes: extents.iter().map(|e| e.bytes).sum(),
        places: places.collect(),
        extents,
    })
}

/// The fewest extents that cover all pieces without reading more than 64 KiB between two of them.
fn merged(mut pieces: Vec<Extent>) -> Vec<Extent> {
    pieces.sort_by_key(|p| (p.file, p.offset, p.bytes));
    let mut extents: Vec<Extent> = Vec::new();
    for piece in pieces {
        match extents.last_mut() {
            Some(last)
                if last.file == piece.file
                    && piece.offset <= last.end().saturating_add(MERGE_GAP_BYTES) =>
            {
                last.bytes = last.end().max(piece.end()) - last.offset;
            }
            _ => extents.push(piece),
        }
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(file: u32, offset: u64, bytes: u64) -> Extent {
        Extent {
            file: FileId(file),
            offset,
            bytes,
        }
    }

    #[test]
    fn small_gaps_are_merged_large_ones_are_not() {
        let gap = MERGE_GAP_BYTES;
        let pieces = vec![
            extent(0, 2000 + gap, 10),
            extent(0, 1000, 1000),
            extent(1, 0, 5),
        ];
        assert_eq!(
            merged(pieces),
            [extent(0, 1000, 1010 + gap), extent(1, 0, 5)]
        );
        let pieces = vec![extent(0, 2001 + gap, 10), extent(0, 1000, 1000)];
        assert_eq!(
            merged(pieces),
            [extent(0, 1000, 1000), extent(0, 2001 + gap, 10)]
        );
        assert_eq!(merged(Vec::new()), []);
    }

    proptest! {
        #[test]
        fn merged_extents_cover_every_piece_and_keep_their_distance(
            raw in prop::collection::vec((0u32..3, 0u64..2_000_000, 0u64..100_000), 0..30)
        ) {
            let pieces: Vec<Extent> = raw.iter().map(|&(f, o, b)| extent(f, o, b)).collect();
            let extents = merged(pieces.clone());
            for p in &pieces {
                let holders = extents
                    .iter()
                    .filter(|e| e.file == p.file && e.offset <= p.offset && p.end() <= e.end());
                prop_assert_eq!(holders.count(), 1);
            }
            for pair in extents.windows(2) {
                prop_assert!(pair[0].file < pair[1].file || pair[1].offset > pair[0].end() + MERGE_GAP_BYTES);
            }
        }
    }

    #[test]
    fn file_names_are_recognised_and_nothing_else_is() {
        let kinds = [
            UnitKind::Embed,
            UnitKind::Layer(0),
            UnitKind::Layer(1234),
            UnitKind::Norm,
            UnitKind::Head(7),
            UnitKind::VisionEmbed,
            UnitKind::VisionBlock(31),
            UnitKind::VisionMerger,
        ];
        for kind in kinds {
            assert!(is_file_name(&file_name(kind)), "{kind:?}");
        }
        let strangers = [
            "../layer.000.dat",
            "layer.000.dat/..",
            "layer.00.dat",
            "layer..dat",
            "layer.0000000000.dat",
            "layer.00a.dat",
            "head.000",
            "model.norm.weight.dat",
            "/embed.dat",
            "",
            ".dat",
        ];
        for name in strangers {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
