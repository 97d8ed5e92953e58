//! A checkpoint with a real model's layer shapes and random weights, really allocated and synced.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use serde_json::{Map, Value, json};

use crate::error::{Code, Error, Result};
use crate::spec::parse_config;
use crate::units::{Dtype, human_bytes};

/// What was written.
pub struct Synthetic {
    pub layers: usize,
    pub vocab: usize,
    pub bytes: u64,
}

/// Bytes of one decoder layer of the 7B geometry below, bf16.
const LAYER_BYTES: u64 = 466_115_584;
/// A small vocabulary: the demonstration is about layers.
const VOCAB: usize = 4096;
const CHUNK_BYTES: usize = 4 << 20;
/// Room left on the disk beside the checkpoint.
const MARGIN_BYTES: u64 = 256 << 20;

/// Qwen2.5-7B's geometry with as many layers as `size` holds (one at least).
fn config(layers: usize) -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": layers,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": VOCAB,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": true, "use_sliding_window": false, "torch_dtype": "bfloat16"
    })
}

/// Writes config and weights into `dir`. `progress(done, of)` in bytes.
pub fn make(
    dir: &Path,
    size: u64,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Synthetic> {
    let layers = (size / LAYER_BYTES).max(1) as usize;
    let config = config(layers);
    let spec = parse_config(&config)?;
    let wrap = |e: std::io::Error| Error::io(format!("{} cannot be written", dir.display()), &e);
    std::fs::create_dir_all(dir).map_err(wrap)?;
    let mut header = Map::new();
    let mut at = 0u64;
    for unit in spec.units(&|_| Dtype::BF16) {
        for t in unit.tensors {
            let bytes = t.shape.iter().product::<usize>() as u64 * 2;
            // A tied head names the embedding again.
            if !header.contains_key(&t.name) {
                header.insert(
                    t.name,
                    json!({"dtype": "BF16", "shape": t.shape, "data_offsets": [at, at + bytes]}),
                );
                at += bytes;
            }
        }
    }
    check_space(dir, at)?;
    let mut head = Value::Object(header).to_string().into_bytes();
    head.resize(head.len().div_ceil(8) * 8, b' ');
    let path = dir.join("model.safetensors");
    let mut file = File::create(&path).map_err(wrap)?;
    file.write_all(&(head.len() as u64).to_le_bytes()).map_err(wrap)?;
    file.write_all(&head).map_err(wrap)?;
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut chunk = vec![0u8; CHUNK_BYTES];
    let mut done = 0;
    while done < at {
        if cancel.load(Relaxed) {
            return Err(crate::paging::interrupted());
        }
        let n = (at - done).min(CHUNK_BYTES as u64) as usize;
        random.fill_bf16(&mut chunk[..n]);
        file.write_all(&chunk[..n]).map_err(wrap)?;
        done += n as u64;
        progress(done, at);
    }
    file.sync_all().map_err(wrap)?;
    std::fs::write(dir.join("config.json"), config.to_string()).map_err(wrap)?;
    Ok(Synthetic {
        layers,
        vocab: VOCAB,
        bytes: at,
    })
}

fn check_space(dir: &Path, bytes: u64) -> Result<()> {
    let free = crate::store::free_bytes(dir)?;
    if free < bytes + MARGIN_BYTES {
        return Err(Error::new(
            Code::Space,
            format!("no room for a synthetic checkpoint of {}", human_bytes(bytes)),
            format!("{} has {} free", dir.display(), human_bytes(free)),
            "give a smaller --size, or another --offload-folder",
        ));
    }
    Ok(())
}

/// xorshift64*: any bits do, as long as they are not zeros.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// bf16 values of random sign and mantissa between 2⁻⁷ and 2⁻⁶: finite, small, not compressible.
    fn fill_bf16(&mut self, out: &mut [u8]) {
        for eight in out.chunks_mut(8) {
            let bits = (self.next() & 0x807F_807F_807F_807F) | 0x3C00_3C00_3C00_3C00;
            eight.copy_from_slice(&bits.to_le_bytes()[..eight.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layers_are_those_of_a_7b_model() {
        let spec = parse_config(&config(1)).unwrap();
        let layer = spec
            .units(&|_| Dtype::BF16)
            .into_iter()
            .find(|u| matches!(u.kind, crate::spec::UnitKind::Layer(0)))
            .unwrap();
        assert_eq!(layer.bytes(&|_| Dtype::BF16), LAYER_BYTES);
    }

    #[test]
    fn random_weights_are_finite_and_small() {
        let mut bytes = [0u8; 4096];
        Random(1).fill_bf16(&mut bytes);
        for pair in bytes.chunks_exact(2) {
            let v = half::bf16::from_le_bytes([pair[0], pair[1]]).to_f32().abs();
            assert!((0.0078..0.0157).contains(&v), "{v}");
        }
    }
}
