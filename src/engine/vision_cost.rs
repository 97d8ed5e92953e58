//! What looking at one more picture costs, from the geometry alone.

use serde::Serialize;

use crate::device::DeviceKind;
use crate::model::kv::{BLOCK_TOKENS, block_bytes};
use crate::model::vision::{Limits, Tower};
use crate::spec::{ModelSpec, UnitKind, VisionSpec};

/// A picture of so many pixels, and what it takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PictureCost {
    pub what: &'static str,
    pub pixels: u64,
    pub patches: usize,
    /// Tokens of the prompt.
    pub tokens: usize,
    pub kv_bytes: u64,
    /// Host memory while it is looked at: pixels, the tower's activations, embeddings.
    pub memory_bytes: u64,
    /// Floating point operations of the tower.
    pub flops: f64,
}

/// One more megapixel of image, and one more frame of video as large as the processor makes them by default. `element_bytes`: of the KV
/// cache. `None` where the model has no tower.
pub fn picture_costs(spec: &ModelSpec, element_bytes: usize) -> Option<[PictureCost; 2]> {
    let vision = spec.vision.as_ref()?;
    let cell = (vision.patch * vision.merge).pow(2) as u64;
    let kv_token = block_bytes(spec.layers, spec.kv_heads, spec.head_size, element_bytes);
    let kv_token = kv_token / BLOCK_TOKENS as u64;
    let cost = |what, cells: usize, frames_a_cell: usize| {
        let slice = cells * vision.merge * vision.merge;
        // Frames share a temporal patch.
        let (patches, tokens) = (slice / frames_a_cell, cells / frames_a_cell);
        let limits = Limits { wave: slice, slice };
        let room = |l| Tower::room(DeviceKind::Cpu, vision, l).host;
        let scratch = room(limits) - room(EMPTY);
        PictureCost {
            what,
            pixels: cells as u64 * cell,
            patches,
            tokens,
            kv_bytes: tokens as u64 * kv_token,
            memory_bytes: scratch / frames_a_cell as u64
                + cells as u64 * cell * 3
                + (tokens * vision.out_hidden * 4) as u64,
            flops: tower_flops(spec, vision, patches, slice),
        }
    };
    Some([
        cost("a megapixel of image", (1_000_000 / cell) as usize, 1),
        cost("a frame of video", 768, vision.temporal_patch),
    ])
}

const EMPTY: Limits = Limits { wave: 0, slice: 0 };

/// Floating point operations of the tower for `patches`, each in an image or frame pair of `slice`: products of the weights, and attention: in
/// windows, or over the whole `slice` in the full blocks.
pub fn tower_flops(spec: &ModelSpec, v: &VisionSpec, patches: usize, slice: usize) -> f64 {
    let units = spec.units(&|_| crate::units::Dtype::BF16);
    let weights = |wanted: fn(UnitKind) -> bool| -> f64 {
        let tensors = units.iter().filter(|u| wanted(u.kind));
        let tensors = tensors.flat_map(|u| &u.tensors);
        tensors.map(|t| (t.rows.len() * t.cols()) as f64).sum()
    };
    let blocks = weights(|k| matches!(k, UnitKind::VisionBlock(_) | UnitKind::VisionEmbed));
    let merger = weights(|k| matches!(k, UnitKind::VisionMerger)) / (v.merge * v.merge) as f64;
    let window = (v.window / v.patch).pow(2);
    let full = v.full_attention_blocks.len();
    let keys = (v.depth - full) * window.min(slice) + full * slice;
    (2.0 * (blocks + merger) + 4.0 * (v.hidden * keys) as f64) * patches as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::parse_config;
    use serde_json::json;

    #[test]
    fn a_megapixel_of_the_7b() {
        let config = json!({
            "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 128000,
            "hidden_act": "silu", "tie_word_embeddings": false, "use_sliding_window": false,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
            "vision_config": {
                "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
                "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2
            }
        });
        let spec = parse_config(&config).unwrap();
        let [image, frame] = picture_costs(&spec, 2).unwrap();
        assert_eq!((image.tokens, image.patches), (1275, 5100));
        // 57,344 bytes of KV a token, as the 7B has.
        assert_eq!(image.kv_bytes, 1275 * 57_344);
        // 32 blocks of 19.7 million weights, the merger's 44.6 million for every fourth patch, 4 blocks that see all 5100 patches.
        let attention = 4.0 * 1280.0 * f64::from(28 * 64 + 4 * 5100);
        let by_hand = (2.0 * (32.0 * 19.7e6 + 44.6e6 / 4.0 + 1.5e6) + attention) * 5100.0;
        assert!(
            (image.flops / by_hand - 1.0).abs() < 0.01,
            "{:e} {by_hand:e}",
            image.flops
        );
        assert_eq!((frame.tokens, frame.patches), (384, 1536));
        assert!(
            image.memory_bytes > 5100 * 1280 * 4 * 4 && image.memory_bytes < 256 << 20,
            "{}",
            image.memory_bytes
        );
    }
}
