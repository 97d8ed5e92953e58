//! The demo's large model: a 7B model's layer shapes, as many layers as fit.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use serde_json::{Value, json};

use crate::checkpoint::{outline_synthetic, write_synthetic};
use crate::error::{Code, Error, Result};
use crate::units::human_bytes;

/// What was, or is to be, written.
pub struct Synthetic {
    pub layers: usize,
    pub vocab: usize,
    pub bytes: u64,
}

/// Bytes of one decoder layer of the geometry below, bf16.
const LAYER_BYTES: u64 = 466_115_584;
/// A small vocabulary: the demonstration is about layers.
const VOCAB: usize = 4096;
/// Room left on the disk beside the checkpoint.
const MARGIN_BYTES: u64 = 256 << 20;

/// Qwen2.5-7B's geometry with `layers` layers.
fn config(layers: usize) -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": layers,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": VOCAB,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": true, "use_sliding_window": false, "torch_dtype": "bfloat16"
    })
}

/// Makes the outline of as many layers as `size` holds (one at least) in `dir`: a model that can be planned for, with a hole for weights.
/// Refused where the disk has no room for them.
pub fn outline(dir: &Path, size: u64) -> Result<Synthetic> {
    let layers = (size / LAYER_BYTES).max(1) as usize;
    let bytes = outline_synthetic(dir, &config(layers))?;
    let free = crate::store::free_bytes(dir)?;
    if free < bytes + MARGIN_BYTES {
        return Err(Error::new(
            Code::Space,
            format!(
                "no room for a synthetic checkpoint of {}",
                human_bytes(bytes)
            ),
            format!("{} has {} free", dir.display(), human_bytes(free)),
            "give a smaller --size, or another --offload-folder",
        ));
    }
    Ok(Synthetic {
        layers,
        vocab: VOCAB,
        bytes,
    })
}

/// Writes the weights. `progress(done, of)` in bytes.
pub fn fill(
    dir: &Path,
    made: &Synthetic,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    write_synthetic(dir, &config(made.layers), &mut |done, of| {
        if cancel.load(Relaxed) {
            return Err(Error::interrupted());
        }
        progress(done, of);
        Ok(())
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{UnitKind, parse_config};
    use crate::units::Dtype;

    #[test]
    fn the_layers_are_those_of_a_7b_model() {
        let spec = parse_config(&config(1)).unwrap();
        let layer = spec
            .units(&|_| Dtype::BF16)
            .into_iter()
            .find(|u| matches!(u.kind, UnitKind::Layer(0)))
            .unwrap();
        assert_eq!(layer.bytes(&|_| Dtype::BF16), LAYER_BYTES);
    }
}
