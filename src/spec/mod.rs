//! What a model is: its geometry, its units and the tensors each unit must have. Pure: no files, no memory.

mod config;
mod units;

pub use config::parse_config;
pub use units::{HEAD_ROWS_MULTIPLE, Role, TensorSpec, UnitKind, UnitSpec, canonical_name};

use crate::units::Dtype;

/// The decoder families. One decoder serves them all; they differ in flags only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Qwen2_5Vl,
}

/// Rotary position embedding (Su et al. 2021) and how its frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    pub scaling: RopeScaling,
    /// M-RoPE: how many of the half dimensions take their position from t, h, w.
    pub mrope_section: Option<[usize; 3]>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    Default,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: usize,
    },
    /// Peng et al. 2023, as transformers' `_compute_yarn_parameters`.
    Yarn {
        factor: f64,
        original_max_positions: usize,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: Option<f64>,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        truncate: bool,
    },
}

/// Geometry of a decoder. Every field comes from `config.json`; a missing key is an error, never a guess.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    pub family: Family,
    /// `model_type` as the config writes it.
    pub model_type: String,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub vocab: usize,
    pub rms_eps: f32,
    pub tied_head: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention output projection (Llama's `attention_bias`).
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k before RoPE (Qwen3).
    pub qk_norm: bool,
    /// Per layer: `Some(w)` sees the last `w` keys (its own included) only.
    pub window: Vec<Option<usize>>,
    pub rope: RopeSpec,
    pub max_positions: usize,
    /// `torch_dtype` / `dtype` of the config, if it names one of ours.
    pub config_dtype: Option<Dtype>,
    pub vision: Option<VisionSpec>,
}

/// Geometry of Qwen2.5-VL's vision tower.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionSpec {
    pub depth: usize,
    pub hidden: usize,
    pub heads: usize,
    pub intermediate: usize,
    pub out_hidden: usize,
    pub channels: usize,
    pub patch: usize,
    pub temporal_patch: usize,
    pub merge: usize,
    pub window: usize,
    pub full_attention_blocks: Vec<usize>,
    pub tokens_per_second: f64,
    pub image_token: u32,
    pub video_token: u32,
    pub vision_start_token: u32,
}

#[cfg(test)]
impl VisionSpec {
    /// A tower of one block, with the patches, windows and frame pairs of Qwen2.5-VL.
    pub fn tiny() -> VisionSpec {
        VisionSpec {
            depth: 1,
            hidden: 8,
            heads: 2,
            intermediate: 8,
            out_hidden: 8,
            channels: 3,
            patch: 14,
            temporal_patch: 2,
            merge: 2,
            window: 112,
            full_attention_blocks: vec![],
            tokens_per_second: 2.0,
            image_token: 0,
            video_token: 1,
            vision_start_token: 2,
        }
    }
}
