//! From geometry to units: which tensors lie in which unit, with their expected shapes.

use std::ops::Range;

use super::ModelSpec;
use crate::units::{Dtype, UnitId};

/// What a unit is. `Embed` is gathered row by row and never streamed; `Norm` is a few kilobytes and always resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UnitKind {
    Embed,
    Layer(u32),
    /// The final norm before the head.
    Norm,
    /// A block of rows of the output head.
    Head(u32),
    /// Patch embedding of the vision tower.
    VisionEmbed,
    VisionBlock(u32),
    VisionMerger,
}

/// What a tensor is for inside its unit. The forward pass looks tensors up by role, never by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    Embed,
    InputNorm,
    QProj,
    QBias,
    KProj,
    KBias,
    VProj,
    VBias,
    QNorm,
    KNorm,
    OProj,
    OBias,
    PostNorm,
    GateProj,
    GateBias,
    UpProj,
    UpBias,
    DownProj,
    DownBias,
    FinalNorm,
    Head,
    // The vision tower reuses InputNorm (norm1), PostNorm (norm2), OProj/OBias, Gate*, Up*, Down*.
    PatchEmbed,
    QkvProj,
    QkvBias,
    MergerNorm,
    MergerFc1,
    MergerFc1Bias,
    MergerFc2,
    MergerFc2Bias,
}

impl Role {
    pub const COUNT: usize = Role::MergerFc2Bias as usize + 1;
}

/// One tensor a unit must have.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    pub role: Role,
    /// Canonical checkpoint name (see [`canonical_name`]), e.g. `model.layers.3.mlp.up_proj.weight`.
    pub name: String,
    /// Shape of the whole tensor in the checkpoint.
    pub shape: Vec<usize>,
    /// The rows of it that belong to this unit (all of them but for head blocks).
    pub rows: Range<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct UnitSpec {
    pub id: UnitId,
    pub kind: UnitKind,
    pub tensors: Vec<TensorSpec>,
}
