//! The pager as the forward pass sees it: units by role, nothing of disks or slots.

use crate::device::{Bytes, WeightView};
use crate::error::Result;
use crate::model::{UnitSource, UnitView};
use crate::paging::{Pager, SlotWeight};
use crate::units::UnitId;

pub(super) struct Paged<'p>(pub &'p mut Pager);

impl UnitSource for Paged<'_> {
    fn with_unit(
        &mut self,
        unit: UnitId,
        compute: &mut dyn FnMut(&UnitView<'_>) -> Result<()>,
    ) -> Result<()> {
        let lease = self.0.acquire(unit)?;
        let bytes = self.0.bytes(&lease);
        let mut view = UnitView::empty();
        for w in self.0.weights(unit) {
            view.set(w.role, weight(w, bytes));
        }
        let done = compute(&view);
        self.0.release(lease)?;
        done
    }

    fn gather_rows(
        &mut self,
        _unit: UnitId,
        tokens: &[u32],
        row: &mut dyn FnMut(usize, &WeightView<'_>) -> Result<()>,
    ) -> Result<()> {
        let (dtype, cols) = self.0.embed_shape();
        self.0.gather(tokens, &mut |i, bytes| {
            row(
                i,
                &WeightView {
                    dtype,
                    rows: 1,
                    cols,
                    row_stride: bytes.len(),
                    data: Bytes::Host(bytes),
                },
            )
        })
    }
}

fn weight<'a>(w: &SlotWeight, bytes: Bytes<'a>) -> WeightView<'a> {
    WeightView {
        dtype: w.dtype,
        rows: w.rows,
        cols: w.cols,
        row_stride: w.cols * w.dtype.bytes(),
        data: bytes.part(w.offset as usize, w.bytes as usize),
    }
}
