//! A checkpoint of a 7B model's geometry (random weights): as many layers as the disk has room for, written while there is time.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tensorpager::checkpoint::{synthetic_bytes, write_synthetic};
use tensorpager::error::{Code, Error};

use super::{Outcome, Suite, TIME_IS_UP};

const LAYERS: usize = 28;
/// On the disk, beyond the checkpoint.
const MARGIN: u64 = 2 << 30;

/// Qwen2.5-7B's text part.
fn config(layers: usize) -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": layers, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": false, "use_sliding_window": false, "torch_dtype": "bfloat16"
    })
}

fn smoke_config() -> Value {
    let mut config = config(3);
    let small = [
        ("hidden_size", 128),
        ("intermediate_size", 192),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("vocab_size", 288),
    ];
    for (key, value) in small {
        config[key] = json!(value);
    }
    config
}

pub struct Checkpoint {
    pub folder: PathBuf,
    pub packs: PathBuf,
    pub layers: usize,
    pub bytes: u64,
}

fn free_bytes(folder: &Path) -> Outcome<u64> {
    let s = rustix::fs::statvfs(folder)?;
    Ok(s.f_bavail * s.f_frsize)
}

/// As many layers as the disk has room for. It is streamed in place: accelerate reads the very same file.
pub fn checkpoint(suite: &Suite) -> Outcome<Checkpoint> {
    let folder = suite.scratch.join("7b");
    let packs = suite.scratch.join("7b-packs");
    let free = free_bytes(&suite.scratch)?;
    let room = |layers: usize| {
        Ok::<_, tensorpager::error::Error>(synthetic_bytes(&config(layers))? + MARGIN)
    };
    let made = folder.join("made");
    // One that is written already is as long as it was.
    let mut layers = match std::fs::read_to_string(&made) {
        Ok(layers) => layers.parse()?,
        Err(_) => LAYERS,
    };
    let config = match suite.smoke {
        true => smoke_config(),
        false => {
            while !made.exists() && layers > 1 && room(layers)? > free {
                layers -= 1;
            }
            config(layers)
        }
    };
    if !made.exists() {
        write(suite, &folder, &config).inspect_err(|_| {
            let _ = std::fs::remove_dir_all(&folder);
        })?;
        std::fs::write(&made, layers.to_string())?;
    }
    Ok(Checkpoint {
        bytes: synthetic_bytes(&config)?,
        layers: config["num_hidden_layers"].as_u64().unwrap_or(0) as usize,
        folder,
        packs,
    })
}

/// Each is on the disk before the next is written, so that the disk's rate is known and no sync at the end takes minutes.
const SYNCED: u64 = 1 << 30;

/// Writes the weights, unless that would take more than half of the time left.
fn write(suite: &Suite, folder: &Path, config: &Value) -> Outcome<()> {
    std::fs::create_dir_all(folder)?;
    let (started, left) = (Instant::now(), suite.left());
    let mut synced = 0;
    write_synthetic(folder, config, &mut |done, of| {
        if suite.up() {
            return Err(unwritten(TIME_IS_UP.to_string()));
        }
        if done - synced < SYNCED {
            return Ok(());
        }
        synced = done;
        let file = folder.join("model.safetensors");
        let sync = std::fs::File::open(&file).and_then(|f| f.sync_data());
        sync.map_err(|e| Error::io(format!("{} cannot be synced", file.display()), &e))?;
        match too_slow(started.elapsed(), done, of, left) {
            None => Ok(()),
            Some(why) => Err(unwritten(why)),
        }
    })?;
    super::models::tokenizer(suite, folder)
}

fn unwritten(why: String) -> Error {
    let fix = "give a faster --scratch, or more --minutes";
    Error::new(
        Code::Stalled,
        "the checkpoint was not written whole",
        why,
        fix,
    )
}

/// Where writing at this rate would take more than half of the time that there was.
fn too_slow(spent: Duration, done: u64, of: u64, left: Duration) -> Option<String> {
    let all = spent.as_secs_f64() * of as f64 / done as f64;
    (all > left.as_secs_f64() / 2.0).then(|| {
        format!(
            "the disk takes {:.2} GB/s: {:.1} GB would take {all:.0} of the {:.0} s left",
            done as f64 / spent.as_secs_f64() / 1e9,
            of as f64 / 1e9,
            left.as_secs_f64()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_disk_too_slow_for_the_time_left_is_told_after_a_piece() {
        let seconds = Duration::from_secs;
        assert_eq!(too_slow(seconds(2), GIB, 14 * GIB, seconds(60)), None);
        let why = too_slow(seconds(10), GIB, 14 * GIB, seconds(200)).unwrap();
        assert!(
            why.contains("0.11 GB/s") && why.contains("140 of the 200 s"),
            "{why}"
        );
    }
}
