//! Checkpoints with a real model's shapes and random weights, really allocated and synced: what demonstrations, benchmarks
//! and tests of large models run on.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::spec::{ModelSpec, parse_config};
use crate::units::Dtype;

const CHUNK_BYTES: usize = 4 << 20;

/// What a checkpoint of this geometry takes, and where each tensor would lie: `(header, bytes of data)`.
fn header(spec: &ModelSpec) -> (Map<String, Value>, u64) {
    let mut header = Map::new();
    let mut at = 0u64;
    for unit in spec.units(&|_| Dtype::BF16) {
        for t in unit.tensors {
            // A tied head names the embedding again, and head blocks share one tensor.
            if !header.contains_key(&t.name) {
                let bytes = t.shape.iter().product::<usize>() as u64 * 2;
                header.insert(
                    t.name,
                    json!({"dtype": "BF16", "shape": t.shape, "data_offsets": [at, at + bytes]}),
                );
                at += bytes;
            }
        }
    }
    (header, at)
}

/// Bytes of weights that [`write_synthetic`] would write.
pub fn synthetic_bytes(config: &Value) -> Result<u64> {
    Ok(header(&parse_config(config)?).1)
}

/// Makes the folder with a `model.safetensors` of this header; where its data begins, and how much that is to be.
fn begin(dir: &Path, config: &Value) -> Result<(File, u64, u64)> {
    let wrap = |e: std::io::Error| Error::io(format!("{} cannot be written", dir.display()), &e);
    let (header, bytes) = header(&parse_config(config)?);
    std::fs::create_dir_all(dir).map_err(wrap)?;
    let mut head = Value::Object(header).to_string().into_bytes();
    head.resize(head.len().div_ceil(8) * 8, b' ');
    let mut file = File::create(dir.join("model.safetensors")).map_err(wrap)?;
    file.write_all(&(head.len() as u64).to_le_bytes())
        .map_err(wrap)?;
    file.write_all(&head).map_err(wrap)?;
    Ok((file, 8 + head.len() as u64, bytes))
}

/// As [`write_synthetic`], with a hole in place of the weights: enough to plan by, and no room on the disk.
pub fn outline_synthetic(dir: &Path, config: &Value) -> Result<u64> {
    let (file, at, bytes) = begin(dir, config)?;
    file.set_len(at + bytes)
        .and_then(|()| std::fs::write(dir.join("config.json"), config.to_string()))
        .map_err(|e| Error::io(format!("{} cannot be written", dir.display()), &e))?;
    Ok(bytes)
}

/// Writes `config.json` and one `model.safetensors` of random bf16 weights (the same for the same config) into `dir`.
/// `progress(done, of)` in bytes; an error from it ends the writing.
pub fn write_synthetic(
    dir: &Path,
    config: &Value,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<u64> {
    let wrap = |e: std::io::Error| Error::io(format!("{} cannot be written", dir.display()), &e);
    let (mut file, _, bytes) = begin(dir, config)?;
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut chunk = vec![0u8; CHUNK_BYTES];
    let mut done = 0;
    while done < bytes {
        let n = (bytes - done).min(CHUNK_BYTES as u64) as usize;
        random.fill_bf16(&mut chunk[..n]);
        file.write_all(&chunk[..n]).map_err(wrap)?;
        done += n as u64;
        progress(done, bytes)?;
    }
    file.sync_all().map_err(wrap)?;
    std::fs::write(dir.join("config.json"), config.to_string()).map_err(wrap)?;
    Ok(bytes)
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
    fn random_weights_are_finite_and_small() {
        let mut bytes = [0u8; 4096];
        Random(1).fill_bf16(&mut bytes);
        for pair in bytes.chunks_exact(2) {
            let v = half::bf16::from_le_bytes([pair[0], pair[1]]).to_f32().abs();
            assert!((0.0078..0.0157).contains(&v), "{v}");
        }
    }

    #[test]
    fn what_is_written_opens_as_a_checkpoint() {
        let config = json!({
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
            "tie_word_embeddings": true, "use_sliding_window": false, "torch_dtype": "bfloat16"
        });
        let dir = tempfile::tempdir().unwrap();
        let bytes = write_synthetic(dir.path(), &config, &mut |_, _| Ok(())).unwrap();
        assert_eq!(bytes, synthetic_bytes(&config).unwrap());
        let length = |dir: &Path| {
            std::fs::metadata(dir.join("model.safetensors"))
                .unwrap()
                .len()
        };
        let outline = tempfile::tempdir().unwrap();
        assert_eq!(outline_synthetic(outline.path(), &config).unwrap(), bytes);
        assert_eq!(length(outline.path()), length(dir.path()));
        let ckpt = crate::checkpoint::Checkpoint::open(
            &dir.path().display().to_string(),
            &crate::checkpoint::OpenOptions::default(),
        )
        .unwrap();
        let spec = parse_config(&config).unwrap();
        assert!(
            ckpt.check(&spec.units(&|_| Dtype::BF16))
                .unwrap()
                .is_empty()
        );
    }
}
