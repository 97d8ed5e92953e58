//! The pager as the forward pass sees it: units by role, nothing of disks or slots.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::device::{Bytes, WeightView};
use crate::error::{Error, Result};
use crate::model::{UnitSource, UnitView};
use crate::paging::{Pager, SlotWeight};
use crate::units::UnitId;

pub(super) struct Paged<'p> {
    pager: &'p mut Pager,
    /// Told how many units of the pass are done, and of how many, after each.
    watch: Option<&'p mut Watch<'p>>,
    /// Up: the pass is to end.
    pause: Option<&'p AtomicBool>,
    /// Units of the pass, as far as anybody asks.
    units: usize,
    done: usize,
}

/// Called with (units done, units of the pass).
pub(super) type Watch<'w> = dyn FnMut(usize, usize) + 'w;

impl<'p> Paged<'p> {
    pub fn new(pager: &'p mut Pager) -> Paged<'p> {
        Paged {
            pager,
            watch: None,
            pause: None,
            units: 0,
            done: 0,
        }
    }

    /// `watch(units done, units)` after each unit.
    pub fn watched(
        pager: &'p mut Pager,
        units: usize,
        watch: &'p mut Watch<'p>,
        pause: Option<&'p AtomicBool>,
    ) -> Paged<'p> {
        Paged {
            watch: Some(watch),
            pause,
            units,
            ..Paged::new(pager)
        }
    }
}

impl UnitSource for Paged<'_> {
    fn with_unit(
        &mut self,
        unit: UnitId,
        compute: &mut dyn FnMut(&UnitView<'_>) -> Result<()>,
    ) -> Result<()> {
        if self.pause.is_some_and(|flag| flag.load(Relaxed)) {
            return Err(Error::interrupted());
        }
        let lease = self.pager.acquire(unit)?;
        let bytes = self.pager.bytes(&lease);
        let mut view = UnitView::empty();
        for w in self.pager.weights(unit) {
            view.set(w.role, weight(w, bytes));
        }
        let done = compute(&view);
        // What went wrong first is what is said.
        let released = self.pager.release(lease);
        let done = done.and(released);
        self.done += 1;
        if let Some(watch) = &mut self.watch {
            watch(self.done, self.units);
        }
        done
    }

    fn gather_rows(
        &mut self,
        _unit: UnitId,
        tokens: &[u32],
        row: &mut dyn FnMut(usize, &WeightView<'_>) -> Result<()>,
    ) -> Result<()> {
        let (dtype, cols) = self.pager.embed_shape();
        self.pager.gather(tokens, &mut |i, bytes| {
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
