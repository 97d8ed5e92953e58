//! A manifest is a stranger's file: nothing in it is used before it has been held against the model's own spec.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::{
    COPIES, MAX_COPY_BYTES, Manifest, TensorRecord, UnitRecord, check_alignment, invalid,
    read_small,
};
use crate::error::Result;
use crate::spec::{ModelSpec, TensorSpec, UnitKind, UnitSpec, parse_config};
use crate::store::dtype::DtypeLabel;
use crate::store::layout::{Extent, Place, UnitLayout, is_file_name};
use crate::units::{ALIGN_BYTES, BLOCK_BYTES, Dtype, FileId};

/// What a valid manifest says, in the words of the rest of the engine.
#[derive(Debug)]
pub(crate) struct Opened {
    pub spec: ModelSpec,
    pub dtype: DtypeLabel,
    pub units: Vec<UnitLayout>,
}

/// Holds the manifest of `dir` against the folder's `config.json`: names, counts, shapes, offsets, order. The weight
/// files themselves are not looked at.
pub(crate) fn validate(dir: &Path, manifest: &Manifest) -> Result<Opened> {
    check_alignment(dir, manifest)?;
    check_files(dir, manifest)?;
    let spec = read_spec(dir, manifest)?;
    let mut dtypes: BTreeMap<&str, Dtype> = BTreeMap::new();
    for t in manifest.units.iter().flat_map(|u| &u.tensors) {
        if *dtypes.entry(&t.name).or_insert(t.dtype) != t.dtype {
            return Err(invalid(dir, format!("{} has two types", t.name)));
        }
    }
    let dtype = DtypeLabel::of(dtypes.values().copied())
        .filter(|l| l.name() == manifest.dtype)
        .ok_or_else(|| invalid(dir, format!("its tensors are not {}", manifest.dtype)))?;
    // A name the manifest lacks is found missing below, whatever type is assumed for it here.
    let expected = spec.units(&|name| dtypes.get(name).copied().unwrap_or(Dtype::F32));
    if expected.len() != manifest.units.len() {
        let (has, needs) = (manifest.units.len(), expected.len());
        return Err(invalid(
            dir,
            format!("it has {has} units, the model has {needs}"),
        ));
    }
    let mut units = Vec::with_capacity(expected.len());
    for (spec, record) in expected.iter().zip(&manifest.units) {
        let unit = check_unit(manifest, spec, record)
            .map_err(|cause| invalid(dir, format!("{}: {cause}", spec.kind)))?;
        units.push(unit);
    }
    check_overlaps(&expected, &units).map_err(|cause| invalid(dir, cause))?;
    Ok(Opened { spec, dtype, units })
}

fn check_files(dir: &Path, manifest: &Manifest) -> Result<()> {
    let mut seen = HashSet::new();
    let mut blocks = 0u64;
    for file in &manifest.files {
        if !is_file_name(&file.name) || !seen.insert(&file.name) {
            return Err(invalid(
                dir,
                format!(
                    "`{}` is no name of a weight file, or twice there",
                    file.name
                ),
            ));
        }
        if file.bytes == 0 || file.bytes % ALIGN_BYTES != 0 || file.bytes >= 1 << 60 {
            return Err(invalid(
                dir,
                format!("{} has an impossible length", file.name),
            ));
        }
        blocks = blocks.saturating_add(file.bytes.div_ceil(BLOCK_BYTES));
    }
    if manifest.checksums.name != super::CHECKSUMS
        || Some(manifest.checksums.bytes) != blocks.checked_mul(8)
    {
        return Err(invalid(dir, "the checksums do not fit the files"));
    }
    let mut seen = HashSet::new();
    for copy in &manifest.copies {
        if !COPIES.contains(&copy.name.as_str())
            || !seen.insert(&copy.name)
            || copy.bytes > MAX_COPY_BYTES
        {
            return Err(invalid(
                dir,
                format!("`{}` is no file that belongs into a pack", copy.name),
            ));
        }
    }
    Ok(())
}

/// The copy of `config.json`, whole and unchanged, is where the spec comes from: the same bytes the source has, so
/// that the same numbers come out of them.
fn read_spec(dir: &Path, manifest: &Manifest) -> Result<ModelSpec> {
    let record = manifest
        .copies
        .iter()
        .find(|c| c.name == "config.json")
        .ok_or_else(|| invalid(dir, "it names no config.json"))?;
    let raw = read_small(dir, "config.json", MAX_COPY_BYTES)?
        .filter(|raw| record.fits(raw))
        .ok_or_else(|| invalid(dir, "config.json is missing or was changed since"))?;
    let config =
        serde_json::from_slice(&raw).map_err(|e| invalid(dir, format!("config.json: {e}")))?;
    let spec = parse_config(&config)?;
    if spec.model_type != manifest.model_type {
        return Err(invalid(dir, "its model type is not that of config.json"));
    }
    Ok(spec)
}

pub(crate) fn kind_name(kind: UnitKind) -> &'static str {
    match kind {
        UnitKind::Embed => "embed",
        UnitKind::Layer(_) => "layer",
        UnitKind::Norm => "norm",
        UnitKind::Head(_) => "head",
        UnitKind::VisionEmbed => "vision_embed",
        UnitKind::VisionBlock(_) => "vision_block",
        UnitKind::VisionMerger => "vision_merger",
    }
}

/// The shape of what lies in a unit: the tensor's own, with the unit's rows.
pub(crate) fn block_shape(t: &TensorSpec) -> Vec<usize> {
    let mut shape = t.shape.clone();
    if shape.len() > 1 {
        shape[0] = t.rows.len();
    }
    shape
}

fn check_unit(
    manifest: &Manifest,
    spec: &UnitSpec,
    record: &UnitRecord,
) -> Result<UnitLayout, String> {
    if record.id != spec.id.0 || record.kind != kind_name(spec.kind) {
        return Err(format!(
            "the manifest has {} {} in its place",
            record.kind, record.id
        ));
    }
    let mut total = 0u64;
    let mut extents = Vec::with_capacity(record.extents.len());
    for e in &record.extents {
        if e.encoding != "raw" || e.stored_bytes != e.bytes {
            return Err(format!("encoding `{}` is not known", e.encoding));
        }
        let file = manifest
            .files
            .get(e.file as usize)
            .ok_or("an extent in a file that is not there")?;
        let end = e
            .offset
            .checked_add(e.bytes)
            .ok_or("an extent of impossible length")?;
        if e.bytes == 0 || end > file.bytes {
            return Err(format!("an extent beyond the end of {}", file.name));
        }
        total = total
            .checked_add(e.bytes)
            .ok_or("extents of impossible length")?;
        extents.push(Extent {
            file: FileId(e.file),
            offset: e.offset,
            bytes: e.bytes,
        });
    }
    if total != record.bytes {
        return Err("its length is not that of its extents".to_string());
    }
    if record.tensors.len() != spec.tensors.len() {
        return Err(format!(
            "{} tensors instead of {}",
            record.tensors.len(),
            spec.tensors.len()
        ));
    }
    let mut places = Vec::with_capacity(spec.tensors.len());
    let mut end = 0u64;
    for (t, r) in spec.tensors.iter().zip(&record.tensors) {
        if r.offset < end {
            return Err(format!("{} overlaps the tensor before it", t.name));
        }
        let place = check_tensor(t, r, &extents)?;
        end = r.offset + place.bytes();
        places.push(place);
    }
    Ok(UnitLayout {
        id: spec.id,
        kind: spec.kind,
        bytes: total,
        extents,
        places,
    })
}

fn check_tensor(t: &TensorSpec, r: &TensorRecord, extents: &[Extent]) -> Result<Place, String> {
    if r.name != t.name {
        return Err(format!("`{}` instead of {}", r.name, t.name));
    }
    if r.shape != block_shape(t) || r.first_row != t.rows.start {
        return Err(format!(
            "{} has shape {:?} from row {}",
            t.name, r.shape, r.first_row
        ));
    }
    if r.parts != 1 {
        return Err(format!(
            "{} is split into {} parts, which is not known",
            t.name, r.parts
        ));
    }
    let elements = (t.rows.len() as u64).checked_mul(t.cols() as u64);
    let end = elements
        .and_then(|e| e.checked_mul(r.dtype.bytes() as u64))
        .and_then(|bytes| bytes.checked_add(r.offset))
        .ok_or_else(|| format!("{} has an impossible length", t.name))?;
    let mut start = 0u64;
    for (extent, e) in extents.iter().enumerate() {
        if r.offset >= start && end <= start + e.bytes {
            return Ok(Place {
                role: t.role,
                name: t.name.clone(),
                dtype: r.dtype,
                rows: t.rows.len(),
                cols: t.cols(),
                extent,
                offset: r.offset - start,
            });
        }
        start += e.bytes;
    }
    Err(format!("{} lies outside the unit", t.name))
}

/// No two units share bytes, but for the row blocks of a tied head: those are the embedding's own rows, exactly.
fn check_overlaps(expected: &[UnitSpec], units: &[UnitLayout]) -> Result<(), String> {
    let mut rows_at: BTreeMap<&str, (FileId, u64)> = BTreeMap::new();
    let mut taken: Vec<(Extent, UnitKind)> = Vec::new();
    for (spec, unit) in expected.iter().zip(units) {
        if let (UnitKind::Head(_), [place]) = (unit.kind, unit.places.as_slice())
            && let Some(&(file, offset)) = rows_at.get(place.name.as_str())
        {
            let extent = unit.extents[place.extent];
            let row_bytes = place.cols as u64 * place.dtype.bytes() as u64;
            let row = spec.tensors[0].rows.start as u64;
            let exact = row
                .checked_mul(row_bytes)
                .and_then(|o| o.checked_add(offset));
            if unit.extents.len() != 1
                || (extent.file, Some(extent.offset + place.offset)) != (file, exact)
            {
                return Err(format!("{}: not the embedding's rows", unit.kind));
            }
            continue;
        }
        if let (UnitKind::Embed, [place]) = (unit.kind, unit.places.as_slice()) {
            let extent = unit.extents[place.extent];
            rows_at.insert(&place.name, (extent.file, extent.offset + place.offset));
        }
        taken.extend(unit.extents.iter().map(|e| (*e, unit.kind)));
    }
    taken.sort_by_key(|(e, _)| (e.file, e.offset));
    for pair in taken.windows(2) {
        let ((a, a_kind), (b, b_kind)) = (pair[0], pair[1]);
        if a.file == b.file && b.offset < a.end() {
            return Err(format!("{a_kind} and {b_kind} overlap"));
        }
    }
    Ok(())
}
