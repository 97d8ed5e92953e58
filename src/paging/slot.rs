//! From a unit's extents to the reads that fill a slot, and to where each tensor then lies in it.

use crate::planted::{self, Bug};
use crate::spec::{Role, UnitKind};
use crate::store::UnitLayout;
use crate::units::{ALIGN_BYTES, BLOCK_BYTES, Dtype, FileId, align_down, align_up};

/// One read of at most a page: `len` bytes from `offset`, of which `want` exist in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRead {
    pub file: FileId,
    pub offset: u64,
    pub len: u64,
    pub want: u64,
}

/// Where a tensor lies in the filled slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotWeight {
    pub role: Role,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    /// From the start of the slot, bytes. Any alignment: sources opened in place have their own.
    pub offset: u64,
    pub bytes: u64,
}

/// How one unit fills a slot: its reads in order, each landing right behind the one before.
#[derive(Clone, Debug)]
pub struct SlotLayout {
    pub kind: UnitKind,
    pub reads: Vec<PageRead>,
    pub weights: Vec<SlotWeight>,
    /// Room the reads take, whole [`ALIGN_BYTES`].
    pub slot_bytes: u64,
    /// Bytes that come from disk.
    pub read_bytes: u64,
}

impl SlotLayout {
    /// Reads cover each extent from the checksum block it begins in to the block it ends in, so that every byte used is
    /// verified; they are cut at multiples of `page_bytes` (a multiple of [`BLOCK_BYTES`]).
    pub fn new(unit: &UnitLayout, file_bytes: &[u64], page_bytes: u64) -> SlotLayout {
        debug_assert_eq!(page_bytes % BLOCK_BYTES, 0);
        let mut reads = Vec::new();
        let mut starts = Vec::with_capacity(unit.extents.len());
        let mut slot_bytes = 0;
        let mut read_bytes = 0;
        for extent in &unit.extents {
            let file_end = file_bytes[extent.file.index()];
            let first = align_down(extent.offset, BLOCK_BYTES);
            let short = u64::from(planted::is(Bug::ExtentTooShort)) * BLOCK_BYTES;
            let end = (extent.offset + extent.bytes).saturating_sub(short);
            let last = align_up(end, BLOCK_BYTES).min(file_end);
            starts.push(slot_bytes + (extent.offset - first));
            let mut at = first;
            while at < last {
                let want = page_bytes.min(last - at);
                let len = align_up(want, ALIGN_BYTES);
                reads.push(PageRead {
                    file: extent.file,
                    offset: at,
                    len,
                    want,
                });
                slot_bytes += len;
                read_bytes += want;
                at += want;
            }
        }
        let weights = unit
            .places
            .iter()
            .map(|p| SlotWeight {
                role: p.role,
                dtype: p.dtype,
                rows: p.rows,
                cols: p.cols,
                offset: starts[p.extent] + p.offset + off_by_one(p.dtype),
                bytes: (p.rows * p.cols * p.dtype.bytes()) as u64,
            })
            .collect();
        SlotLayout {
            kind: unit.kind,
            reads,
            weights,
            slot_bytes,
            read_bytes,
        }
    }
}

/// 0, but for [`Bug::ExtentOffByOne`].
fn off_by_one(dtype: Dtype) -> u64 {
    match planted::is(Bug::ExtentOffByOne) {
        true => dtype.bytes() as u64,
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Extent, Place};
    use crate::units::UnitId;

    fn unit(extents: Vec<Extent>, places: Vec<Place>) -> UnitLayout {
        UnitLayout {
            id: UnitId(0),
            kind: UnitKind::Layer(0),
            bytes: extents.iter().map(|e| e.bytes).sum(),
            extents,
            places,
        }
    }

    #[test]
    fn unaligned_extents_are_read_as_whole_blocks_and_found_again() {
        let e = |offset, bytes| Extent {
            file: FileId(0),
            offset,
            bytes,
        };
        let place = |extent, offset| Place {
            role: Role::Embed,
            name: "t".into(),
            dtype: Dtype::BF16,
            rows: 1,
            cols: 4,
            extent,
            offset,
        };
        let u = unit(
            vec![e(70_001, 100), e(300_000, 9)],
            vec![place(0, 2), place(1, 1)],
        );
        let layout = SlotLayout::new(&u, &[300_009], 65_536);
        assert_eq!(
            layout.reads,
            [
                PageRead {
                    file: FileId(0),
                    offset: 65_536,
                    len: 65_536,
                    want: 65_536
                },
                PageRead {
                    file: FileId(0),
                    offset: 262_144,
                    len: 40_960,
                    want: 37_865
                },
            ]
        );
        assert_eq!(layout.weights[0].offset, 70_001 - 65_536 + 2);
        assert_eq!(layout.weights[1].offset, 65_536 + 300_000 - 262_144 + 1);
        assert_eq!(layout.slot_bytes, 65_536 + 40_960);
    }

    #[test]
    fn pages_cut_at_their_size() {
        let u = unit(
            vec![Extent {
                file: FileId(0),
                offset: 0,
                bytes: 300_000,
            }],
            vec![],
        );
        let layout = SlotLayout::new(&u, &[303_104], 131_072);
        let wants: Vec<u64> = layout.reads.iter().map(|r| r.want).collect();
        assert_eq!(wants, [131_072, 131_072, 303_104 - 262_144]);
        assert_eq!(layout.read_bytes, 303_104);
    }
}
