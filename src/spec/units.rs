//! From geometry to units: which tensors lie in which unit, with their expected shapes.

use std::fmt;
use std::ops::Range;

use super::{ModelSpec, VisionSpec};
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

impl fmt::Display for UnitKind {
    /// As error messages and reports name a unit: `layer 3`, `head block 0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UnitKind::Embed => f.write_str("embedding"),
            UnitKind::Layer(i) => write!(f, "layer {i}"),
            UnitKind::Norm => f.write_str("final norm"),
            UnitKind::Head(i) => write!(f, "head block {i}"),
            UnitKind::VisionEmbed => f.write_str("vision patch embedding"),
            UnitKind::VisionBlock(i) => write!(f, "vision block {i}"),
            UnitKind::VisionMerger => f.write_str("vision merger"),
        }
    }
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

    /// Place in a table of [`Role::COUNT`] entries.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// True for the right-hand sides of matrix products and the embedding table; false for norms and biases.
    pub const fn is_matrix(self) -> bool {
        matches!(
            self,
            Role::Embed
                | Role::QProj
                | Role::KProj
                | Role::VProj
                | Role::OProj
                | Role::GateProj
                | Role::UpProj
                | Role::DownProj
                | Role::Head
                | Role::PatchEmbed
                | Role::QkvProj
                | Role::MergerFc1
                | Role::MergerFc2
        )
    }
}

/// One tensor a unit must have.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    pub role: Role,
    /// Canonical checkpoint name (see [`canonical_name`]), e.g. `model.layers.3.mlp.up_proj.weight`.
    pub name: String,
    /// Shape of the whole tensor in the checkpoint.
    pub shape: Vec<usize>,
    /// The rows of it that belong to this unit (all of them but for head blocks). A 1-D tensor is one row.
    pub rows: Range<usize>,
}

impl TensorSpec {
    fn whole(role: Role, name: String, shape: Vec<usize>) -> TensorSpec {
        let rows = 0..if shape.len() == 1 { 1 } else { shape[0] };
        TensorSpec {
            role,
            name,
            shape,
            rows,
        }
    }

    /// Elements of one row: everything behind the first dimension (a 1-D tensor is one row).
    pub fn cols(&self) -> usize {
        match self.shape.len() {
            1 => self.shape[0],
            _ => self.shape[1..].iter().product(),
        }
    }

    /// Bytes of this unit's rows when stored as `dtype`.
    pub fn bytes(&self, dtype: Dtype) -> u64 {
        self.rows.len() as u64 * self.cols() as u64 * dtype.bytes() as u64
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct UnitSpec {
    pub id: UnitId,
    pub kind: UnitKind,
    pub tensors: Vec<TensorSpec>,
}

impl UnitSpec {
    /// Bytes of all tensors of the unit, without padding; `dtype_of` gives each tensor's type by canonical name.
    pub fn bytes(&self, dtype_of: &dyn Fn(&str) -> Dtype) -> u64 {
        self.tensors
            .iter()
            .map(|t| t.bytes(dtype_of(&t.name)))
            .sum()
    }
}

/// Rows of a head block are a multiple of this (the last block's excepted): whole tiles for every device.
pub const HEAD_ROWS_MULTIPLE: usize = 64;

impl ModelSpec {
    /// Name of the tensor that the head multiplies with: the embedding's own when tied.
    pub fn head_name(&self) -> &'static str {
        if self.tied_head {
            "model.embed_tokens.weight"
        } else {
            "lm_head.weight"
        }
    }

    /// Every unit of the model, ids counting from 0, in the order Embed, Layer 0.., Norm, Head 0.., and for a
    /// vision model VisionEmbed, VisionBlock 0.., VisionMerger.
    ///
    /// `dtype_of` gives a tensor's type by canonical name; it only decides how many rows a head block has, so that
    /// no block is larger than the largest decoder layer (and no slot is sized for the head).
    pub fn units(&self, dtype_of: &dyn Fn(&str) -> Dtype) -> Vec<UnitSpec> {
        let mut units = UnitList(Vec::new());
        units.push(
            UnitKind::Embed,
            vec![TensorSpec::whole(
                Role::Embed,
                "model.embed_tokens.weight".to_string(),
                vec![self.vocab, self.hidden],
            )],
        );
        for i in 0..self.layers {
            units.push(UnitKind::Layer(i as u32), self.layer_tensors(i));
        }
        let layer_bytes = units.0[1..].iter().map(|u| u.bytes(dtype_of)).max();
        units.push(
            UnitKind::Norm,
            vec![TensorSpec::whole(
                Role::FinalNorm,
                "model.norm.weight".to_string(),
                vec![self.hidden],
            )],
        );
        let head = self.head_name();
        let row_bytes = self.hidden as u64 * dtype_of(head).bytes() as u64;
        let rows = head_block_rows(self.vocab, row_bytes, layer_bytes.unwrap_or(0));
        for (block, start) in (0..self.vocab).step_by(rows).enumerate() {
            units.push(
                UnitKind::Head(block as u32),
                vec![TensorSpec {
                    role: Role::Head,
                    name: head.to_string(),
                    shape: vec![self.vocab, self.hidden],
                    rows: start..(start + rows).min(self.vocab),
                }],
            );
        }
        if let Some(vision) = &self.vision {
            units.push(UnitKind::VisionEmbed, vision.embed_tensors());
            for i in 0..vision.depth {
                units.push(UnitKind::VisionBlock(i as u32), vision.block_tensors(i));
            }
            units.push(UnitKind::VisionMerger, vision.merger_tensors());
        }
        units.0
    }

    /// The tensors of decoder layer `i`, in the order the forward pass meets them.
    fn layer_tensors(&self, i: usize) -> Vec<TensorSpec> {
        let (hidden, inner) = (self.hidden, self.intermediate);
        let q = self.heads * self.head_size;
        let kv = self.kv_heads * self.head_size;
        let mut list = Tensors::new(format!("model.layers.{i}."));
        list.add(Role::InputNorm, "input_layernorm.weight", &[hidden]);
        list.add(Role::QProj, "self_attn.q_proj.weight", &[q, hidden]);
        list.add_if(self.qkv_bias, Role::QBias, "self_attn.q_proj.bias", &[q]);
        list.add(Role::KProj, "self_attn.k_proj.weight", &[kv, hidden]);
        list.add_if(self.qkv_bias, Role::KBias, "self_attn.k_proj.bias", &[kv]);
        list.add(Role::VProj, "self_attn.v_proj.weight", &[kv, hidden]);
        list.add_if(self.qkv_bias, Role::VBias, "self_attn.v_proj.bias", &[kv]);
        let head = [self.head_size];
        list.add_if(self.qk_norm, Role::QNorm, "self_attn.q_norm.weight", &head);
        list.add_if(self.qk_norm, Role::KNorm, "self_attn.k_norm.weight", &head);
        list.add(Role::OProj, "self_attn.o_proj.weight", &[hidden, q]);
        list.add_if(self.o_bias, Role::OBias, "self_attn.o_proj.bias", &[hidden]);
        list.add(Role::PostNorm, "post_attention_layernorm.weight", &[hidden]);
        list.add_mlp(hidden, inner, self.mlp_bias);
        list.tensors
    }
}

impl VisionSpec {
    fn embed_tensors(&self) -> Vec<TensorSpec> {
        let mut list = Tensors::new("visual.patch_embed.".to_string());
        // A 3-D convolution whose stride is its kernel: a matrix product over flattened patches.
        let (c, t, p) = (self.channels, self.temporal_patch, self.patch);
        list.add(Role::PatchEmbed, "proj.weight", &[self.hidden, c, t, p, p]);
        list.tensors
    }

    fn block_tensors(&self, i: usize) -> Vec<TensorSpec> {
        let (hidden, inner) = (self.hidden, self.intermediate);
        let mut list = Tensors::new(format!("visual.blocks.{i}."));
        list.add(Role::InputNorm, "norm1.weight", &[hidden]);
        list.add(Role::QkvProj, "attn.qkv.weight", &[3 * hidden, hidden]);
        list.add(Role::QkvBias, "attn.qkv.bias", &[3 * hidden]);
        list.add(Role::OProj, "attn.proj.weight", &[hidden, hidden]);
        list.add(Role::OBias, "attn.proj.bias", &[hidden]);
        list.add(Role::PostNorm, "norm2.weight", &[hidden]);
        list.add_mlp(hidden, inner, true);
        list.tensors
    }

    fn merger_tensors(&self) -> Vec<TensorSpec> {
        let wide = self.hidden * self.merge * self.merge;
        let mut list = Tensors::new("visual.merger.".to_string());
        list.add(Role::MergerNorm, "ln_q.weight", &[self.hidden]);
        list.add(Role::MergerFc1, "mlp.0.weight", &[wide, wide]);
        list.add(Role::MergerFc1Bias, "mlp.0.bias", &[wide]);
        list.add(Role::MergerFc2, "mlp.2.weight", &[self.out_hidden, wide]);
        list.add(Role::MergerFc2Bias, "mlp.2.bias", &[self.out_hidden]);
        list.tensors
    }
}

/// Rows of each head block: as many as fit into `limit_bytes`, a multiple of 64, at least 64.
fn head_block_rows(vocab: usize, row_bytes: u64, limit_bytes: u64) -> usize {
    let fit = (limit_bytes / row_bytes.max(1)).min(vocab as u64) as usize;
    if fit >= vocab {
        return vocab;
    }
    (fit / HEAD_ROWS_MULTIPLE * HEAD_ROWS_MULTIPLE).max(HEAD_ROWS_MULTIPLE)
}

struct UnitList(Vec<UnitSpec>);

impl UnitList {
    fn push(&mut self, kind: UnitKind, tensors: Vec<TensorSpec>) {
        let id = UnitId(self.0.len() as u32);
        self.0.push(UnitSpec { id, kind, tensors });
    }
}

struct Tensors {
    prefix: String,
    tensors: Vec<TensorSpec>,
}

impl Tensors {
    fn new(prefix: String) -> Tensors {
        let tensors = Vec::new();
        Tensors { prefix, tensors }
    }

    fn add(&mut self, role: Role, suffix: &str, shape: &[usize]) {
        let name = format!("{}{suffix}", self.prefix);
        self.tensors
            .push(TensorSpec::whole(role, name, shape.to_vec()));
    }

    fn add_if(&mut self, present: bool, role: Role, suffix: &str, shape: &[usize]) {
        if present {
            self.add(role, suffix, shape);
        }
    }

    fn add_mlp(&mut self, hidden: usize, inner: usize, bias: bool) {
        self.add(Role::GateProj, "mlp.gate_proj.weight", &[inner, hidden]);
        self.add_if(bias, Role::GateBias, "mlp.gate_proj.bias", &[inner]);
        self.add(Role::UpProj, "mlp.up_proj.weight", &[inner, hidden]);
        self.add_if(bias, Role::UpBias, "mlp.up_proj.bias", &[inner]);
        self.add(Role::DownProj, "mlp.down_proj.weight", &[hidden, inner]);
        self.add_if(bias, Role::DownBias, "mlp.down_proj.bias", &[hidden]);
    }
}

/// A checkpoint's tensor name as this engine writes it. The same weights go by several names: on the hub
/// (`model.layers.0…`, `visual.…`), in transformers' memory and in accelerate folders (`model.language_model.layers.0…`,
/// `model.visual.…`), in older vision-language saves (`language_model.model.layers.0…`), and without a prefix where
/// the model was saved without its head.
pub fn canonical_name(name: &str) -> String {
    let name = name
        .strip_prefix("model.language_model.")
        .or_else(|| name.strip_prefix("language_model."))
        .or_else(|| name.strip_prefix("model.visual.").map(|_| &name[6..]))
        .unwrap_or(name);
    let bare = ["layers.", "embed_tokens.", "norm."];
    if bare.iter().any(|b| name.starts_with(b)) {
        format!("model.{name}")
    } else {
        name.to_string()
    }
}

#[cfg(test)]
mod tests;
