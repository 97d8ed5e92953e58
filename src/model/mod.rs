//! The forward pass: one decoder for every family, over a ragged pass and a paged KV cache. Never files, never streams:
//! weights come through [`UnitSource`].

pub mod forward;
pub mod kv;
pub mod mrope;
mod normed;
pub mod pass;
pub mod rope;
mod scratch;
pub mod vision;

use crate::device::WeightView;
use crate::error::{Error, Result};
use crate::spec::Role;
use crate::units::UnitId;

/// The tensors of a unit that is on the device, by role.
pub struct UnitView<'a> {
    weights: [Option<WeightView<'a>>; Role::COUNT],
}

impl<'a> UnitView<'a> {
    pub fn empty() -> UnitView<'a> {
        UnitView {
            weights: [None; Role::COUNT],
        }
    }

    pub fn set(&mut self, role: Role, weight: WeightView<'a>) {
        self.weights[role as usize] = Some(weight);
    }

    pub fn get(&self, role: Role) -> Option<&WeightView<'a>> {
        self.weights[role as usize].as_ref()
    }

    /// A tensor that the checkpoint was checked to have.
    pub fn need(&self, role: Role) -> Result<&WeightView<'a>> {
        self.get(role)
            .ok_or_else(|| Error::internal(format!("a unit came without its {role:?} tensor")))
    }
}

/// Where units come from. The forward pass asks in the order of its schedule; what is behind it (a slot filled from disk,
/// a resident unit, a test's own memory) is none of its business.
pub trait UnitSource {
    /// Waits until `unit` is on the device, lends it to `compute`, and takes it back when `compute` returns.
    fn with_unit(
        &mut self,
        unit: UnitId,
        compute: &mut dyn FnMut(&UnitView<'_>) -> Result<()>,
    ) -> Result<()>;

    /// Calls `row(i, bytes)` once for each of `tokens`, with row `tokens[i]` of the embedding `unit`; the order is free.
    fn gather_rows(
        &mut self,
        unit: UnitId,
        tokens: &[u32],
        row: &mut dyn FnMut(usize, &WeightView<'_>) -> Result<()>,
    ) -> Result<()>;
}
