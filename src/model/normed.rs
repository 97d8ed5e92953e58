//! RMSNorm and the products that begin with it: queries, keys and values, or gate and up.

use super::UnitView;
use crate::device::{Acts, Device, Product, Rows, WeightView};
use crate::error::Result;
use crate::spec::Role;

/// Rows of the residual stream before their norm.
pub(super) struct Normed<'n> {
    pub x: &'n Rows,
    pub first: usize,
    pub rows: usize,
    pub norm: &'n WeightView<'n>,
    pub eps: f32,
    /// Whether they stay as they are where the device would round them ([`Acts::keep_exact`]).
    pub exact: bool,
}

/// What goes to `out`, by the roles of its weight and its bias.
pub(super) fn product<'p>(
    unit: &'p UnitView<'p>,
    weight: Role,
    bias: Role,
    out: &'p mut Rows,
) -> Result<Product<'p>> {
    Ok(Product {
        w: unit.need(weight)?,
        bias: unit.get(bias),
        out,
    })
}

impl Normed<'_> {
    /// out = n·w + bias for each of `products`, n = RMSNorm(x) in the weights' type, kept in `normed`: neighbours of one type share it, and the
    /// device's one op.
    pub fn multiply(
        &self,
        device: &Device,
        products: &mut [Product<'_>],
        normed: &mut Acts,
    ) -> Result<()> {
        for alike in products.chunk_by_mut(|a, b| a.w.dtype == b.w.dtype) {
            let dtype = alike[0].w.dtype;
            match self.exact {
                true => normed.keep_exact(dtype),
                false => normed.round_to(dtype),
            }
            let (first, rows) = (self.first, self.rows);
            device.rmsnorm(self.x, first, rows, self.norm, self.eps, normed)?;
            device.linear_each(normed, rows, alike)?;
        }
        Ok(())
    }
}
