//! What a pager needs to know of a store: enough to open another one later, without the store at hand.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::spec::UnitKind;
use crate::store::{Checksums, Store};
use crate::units::{Dtype, FileId, UnitId};

/// Where embedding rows lie.
#[derive(Clone, Copy)]
pub(super) struct EmbedAt {
    pub(super) file: FileId,
    pub(super) offset: u64,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: Dtype,
    pub(super) unit: UnitId,
}

/// What a pager needs to know of a store: enough to open another one later, without the store at hand. The store's lock must outlive it.
#[derive(Clone)]
pub struct Origin {
    pub(super) paths: Vec<std::path::PathBuf>,
    pub(super) file_bytes: Vec<u64>,
    pub(super) checksums: Arc<Checksums>,
    pub(super) embed: EmbedAt,
    /// First row and rows of each head unit where the head is tied.
    pub(super) tied_head: Vec<(usize, usize, UnitId)>,
}

impl Origin {
    pub fn of(store: &Store) -> Result<Origin> {
        Ok(Origin {
            paths: store.files.iter().map(|f| f.path.clone()).collect(),
            file_bytes: store.files.iter().map(|f| f.bytes).collect(),
            checksums: store.checksums.clone(),
            embed: embed_at(store)?,
            tied_head: tied_head(store),
        })
    }
}

fn embed_at(store: &Store) -> Result<EmbedAt> {
    let unit = store
        .units
        .iter()
        .find(|u| u.kind == UnitKind::Embed)
        .ok_or_else(|| Error::internal("a store without an embedding"))?;
    let place = unit
        .places
        .first()
        .ok_or_else(|| Error::internal("an embedding without its tensor"))?;
    let extent = &unit.extents[place.extent];
    Ok(EmbedAt {
        file: extent.file,
        offset: extent.offset + place.offset,
        rows: place.rows,
        cols: place.cols,
        dtype: place.dtype,
        unit: unit.id,
    })
}

fn tied_head(store: &Store) -> Vec<(usize, usize, UnitId)> {
    if !store.spec.tied_head {
        return Vec::new();
    }
    let mut first = 0;
    let mut rows = Vec::new();
    for unit in &store.units {
        if let (UnitKind::Head(_), Some(place)) = (unit.kind, unit.places.first()) {
            rows.push((first, place.rows, unit.id));
            first += place.rows;
        }
    }
    rows
}

/// `layer 12`, `head block 0`: as reports and errors name a unit.
pub fn unit_name(kind: UnitKind) -> String {
    match kind {
        UnitKind::Embed => "the embedding".into(),
        UnitKind::Layer(i) => format!("layer {i}"),
        UnitKind::Norm => "the final norm".into(),
        UnitKind::Head(i) => format!("head block {i}"),
        UnitKind::VisionEmbed => "the patch embedding".into(),
        UnitKind::VisionBlock(i) => format!("vision block {i}"),
        UnitKind::VisionMerger => "the vision merger".into(),
    }
}
