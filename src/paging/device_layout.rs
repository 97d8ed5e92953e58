//! Where a unit's tensors lie in a slot on a GPU, and which bytes of each page go there.
//!
//! A slot in host memory keeps what surrounds the tensors on disk; one on a GPU holds the tensors alone, each 256-byte aligned as the
//! kernels want them, wherever the source has them.

use super::slot::{SlotLayout, SlotWeight};
use crate::device::cuda::Piece;
use crate::units::{TENSOR_ALIGN_BYTES, align_up};

/// A unit as it lies on a GPU.
#[derive(Clone, Debug, Default)]
pub(super) struct DeviceLayout {
    /// The unit's tensors, offsets from the start of the slot.
    pub weights: Vec<SlotWeight>,
    /// By read: what of its page goes where.
    pages: Vec<Vec<Piece>>,
    /// The same from a region in host memory that holds the unit as read.
    pub whole: Vec<Piece>,
    pub bytes: u64,
}

impl DeviceLayout {
    pub fn new(layout: &SlotLayout) -> DeviceLayout {
        let mut order: Vec<usize> = (0..layout.weights.len()).collect();
        order.sort_by_key(|i| layout.weights[*i].offset);
        let mut weights = layout.weights.clone();
        let mut bytes = 0;
        for &i in &order {
            weights[i].offset = align_up(bytes, TENSOR_ALIGN_BYTES);
            bytes = weights[i].offset + weights[i].bytes;
        }
        let cut = |first: u64, len: u64| {
            let mut pieces: Vec<Piece> = Vec::new();
            for &i in &order {
                let (from, to) = (&layout.weights[i], &weights[i]);
                let start = from.offset.max(first);
                let end = (from.offset + from.bytes).min(first + len);
                if start < end {
                    join(
                        &mut pieces,
                        Piece {
                            from: (start - first) as usize,
                            to: (to.offset + start - from.offset) as usize,
                            bytes: (end - start) as usize,
                        },
                    );
                }
            }
            pieces
        };
        let mut at = 0;
        let mut pages = Vec::with_capacity(layout.reads.len());
        for read in &layout.reads {
            pages.push(cut(at, read.len));
            at += read.len;
        }
        DeviceLayout {
            whole: cut(0, layout.slot_bytes),
            weights,
            pages,
            bytes,
        }
    }

    pub fn page(&self, read: usize) -> &[Piece] {
        &self.pages[read]
    }
}

/// Adds a piece, as part of the last where both move by the same distance and what lies between is only padding.
fn join(pieces: &mut Vec<Piece>, next: Piece) {
    if let Some(last) = pieces.last_mut() {
        let same = next.to.wrapping_sub(last.to) == next.from.wrapping_sub(last.from);
        let gap = next.from - (last.from + last.bytes).min(next.from);
        if same && gap < TENSOR_ALIGN_BYTES as usize && last.from + last.bytes <= next.from {
            last.bytes = next.from + next.bytes - last.from;
            return;
        }
    }
    pieces.push(next);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::PageRead;
    use crate::spec::{Role, UnitKind};
    use crate::units::{Dtype, FileId};

    fn layout(tensors: &[(u64, u64)], reads: &[u64]) -> SlotLayout {
        SlotLayout {
            kind: UnitKind::Layer(0),
            reads: reads
                .iter()
                .map(|len| PageRead {
                    file: FileId(0),
                    offset: 0,
                    len: *len,
                    want: *len,
                })
                .collect(),
            weights: tensors
                .iter()
                .map(|(offset, bytes)| SlotWeight {
                    role: Role::Embed,
                    dtype: Dtype::BF16,
                    rows: 1,
                    cols: *bytes as usize / 2,
                    offset: *offset,
                    bytes: *bytes,
                })
                .collect(),
            slot_bytes: reads.iter().sum(),
            read_bytes: reads.iter().sum(),
        }
    }

    /// Copies as the GPU would, through pages or whole, and compares every tensor.
    fn check(l: &SlotLayout) {
        let host: Vec<u8> = (0..l.slot_bytes).map(|i| (i % 251) as u8).collect();
        let d = DeviceLayout::new(l);
        for whole in [false, true] {
            let mut slot = vec![0xEE; d.bytes as usize];
            let mut copy = |first: usize, pieces: &[Piece]| {
                for p in pieces {
                    let from = &host[first + p.from..][..p.bytes];
                    slot[p.to..p.to + p.bytes].copy_from_slice(from);
                }
            };
            if whole {
                copy(0, &d.whole);
            } else {
                let mut at = 0;
                for (i, read) in l.reads.iter().enumerate() {
                    copy(at, d.page(i));
                    at += read.len as usize;
                }
            }
            for (from, to) in l.weights.iter().zip(&d.weights) {
                assert_eq!(to.offset % TENSOR_ALIGN_BYTES, 0);
                let is = &slot[to.offset as usize..][..to.bytes as usize];
                assert_eq!(is, &host[from.offset as usize..][..from.bytes as usize]);
            }
        }
    }

    #[test]
    fn tensors_at_any_place_and_across_pages_arrive_aligned() {
        check(&layout(
            &[(0, 512), (512, 1000), (1536, 2600)],
            &[4096, 4096],
        ));
        check(&layout(
            &[(7, 5001), (5100, 30), (9001, 3000)],
            &[4096, 4096, 4096],
        ));
        check(&layout(&[(9000, 100), (10, 4000)], &[4096, 8192]));
    }

    #[test]
    fn a_packed_page_is_one_copy() {
        let d = DeviceLayout::new(&layout(&[(0, 512), (512, 1000), (1536, 2000)], &[4096]));
        assert_eq!(d.page(0).len(), 1);
        assert_eq!(d.whole, d.page(0));
        let d = DeviceLayout::new(&layout(&[(3, 512), (600, 1000)], &[4096]));
        assert_eq!(d.page(0).len(), 2);
    }
}
