//! `config.json` → [`ModelSpec`]. Reads the flat style of the hub (`rope_theta`, `rope_scaling`, `torch_dtype`) and the
//! style transformers 5 writes (`rope_parameters`, `dtype`, `text_config`).
//!
//! A missing key is an error that names it, never a class default: transformers' defaults belong to one model of a
//! family, not to the one at hand. The exceptions are keys that younger releases added, where an absent key has
//! one documented meaning; each is marked *Exception* below.

mod keys;
mod rope;
mod vision;

use serde_json::Value;

use self::keys::{Keys, invalid, unsupported};
use super::{Family, ModelSpec};
use crate::error::{Code, Error, Result};
use crate::units::Dtype;

// Limits on everything. They also keep every product below from overflowing: the largest tensor has under
// 2^47 elements, 4096 layers of those under 2^61 bytes.
const MAX_LAYERS: usize = 4096;
const MAX_HIDDEN: usize = 1 << 20;
const MAX_INTERMEDIATE: usize = 1 << 22;
const MAX_HEADS: usize = 1 << 13;
const MAX_HEAD_SIZE: usize = 1 << 13;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 30;

/// Geometry from the parsed `config.json`.
///
/// Errors: [`Code::Config`] for a key that is missing, of the wrong type, out of range or at odds with another;
/// [`Code::Unsupported`] for a model type, activation, rope type or quantisation this engine does not have. Each names
/// the key with its path (`text_config.hidden_size`).
pub fn parse_config(config: &Value) -> Result<ModelSpec> {
    let root = Keys::root(config)?;
    let model_type = root.str("model_type")?;
    let family = family(model_type)?;
    refuse_quantized(&root)?;
    let nested = match family {
        Family::Qwen2_5Vl => root.object("text_config")?,
        _ => None,
    };
    // Flat vision-language configs of the hub keep the text keys at the top.
    let text = nested.as_ref().unwrap_or(&root);
    refuse_quantized(text)?;

    let hidden = text.size("hidden_size", MAX_HIDDEN)?;
    let layers = text.size("num_hidden_layers", MAX_LAYERS)?;
    let heads = text.size("num_attention_heads", MAX_HEADS)?;
    let kv_heads = kv_heads(text, family, heads)?;
    let head_size = head_size(text, family, hidden, heads)?;
    let max_positions = text.size("max_position_embeddings", MAX_POSITIONS)?;
    refuse_activation(text)?;
    let attention_bias = match family {
        Family::Qwen2 | Family::Qwen2_5Vl | Family::Mistral => false,
        // Exception: the key is younger than the families; absent has always meant no bias.
        Family::Llama | Family::Qwen3 => text.optional_bool("attention_bias")?.unwrap_or(false),
    };
    // Exception: as above, added to Llama in transformers 4.42.
    let mlp_bias = family == Family::Llama && text.optional_bool("mlp_bias")?.unwrap_or(false);
    let rope = rope::parse(text, family, head_size, max_positions)?;
    let vocab = text.size("vocab_size", MAX_VOCAB)?;
    let spec = ModelSpec {
        family,
        model_type: model_type.to_string(),
        hidden,
        intermediate: text.size("intermediate_size", MAX_INTERMEDIATE)?,
        layers,
        heads,
        kv_heads,
        head_size,
        vocab,
        rms_eps: rms_eps(text)?,
        tied_head: tied_head(&root, text)?,
        qkv_bias: attention_bias || matches!(family, Family::Qwen2 | Family::Qwen2_5Vl),
        o_bias: attention_bias,
        mlp_bias,
        qk_norm: family == Family::Qwen3,
        window: windows(text, family, layers)?,
        rope,
        max_positions,
        config_dtype: config_dtype(text)?.or(config_dtype(&root)?),
        vision: match family {
            Family::Qwen2_5Vl => Some(vision::parse(&root, hidden, vocab)?),
            _ => None,
        },
    };
    Ok(spec)
}

fn family(model_type: &str) -> Result<Family> {
    match model_type {
        "llama" => Ok(Family::Llama),
        "mistral" => Ok(Family::Mistral),
        "qwen2" => Ok(Family::Qwen2),
        "qwen3" => Ok(Family::Qwen3),
        "qwen2_5_vl" => Ok(Family::Qwen2_5Vl),
        other => Err(Error::new(
            Code::Unsupported,
            format!(
                "config.json: model_type `{}` is not supported",
                keys::clip(other)
            ),
            "this engine has the decoders of llama, mistral, qwen2, qwen3 and qwen2_5_vl",
            "choose a model of one of these types",
        )),
    }
}

fn refuse_quantized(keys: &Keys) -> Result<()> {
    match keys.get("quantization_config") {
        None => Ok(()),
        Some(_) => Err(Error::new(
            Code::Unsupported,
            format!("config.json: `{}` is set", keys.path("quantization_config")),
            "the weights are quantised; this engine runs float16, bfloat16 and float32 weights",
            "use the model's unquantised checkpoint",
        )),
    }
}

fn refuse_activation(keys: &Keys) -> Result<()> {
    match keys.str("hidden_act")? {
        "silu" => Ok(()),
        other => Err(unsupported(
            keys,
            "hidden_act",
            other,
            "only `silu` (SwiGLU) is implemented",
        )),
    }
}

fn kv_heads(text: &Keys, family: Family, heads: usize) -> Result<usize> {
    let key = "num_key_value_heads";
    let kv_heads = match text.optional_size(key, MAX_HEADS)? {
        Some(n) => n,
        // Exception: Llama configs written before grouped-query attention existed do not have the key.
        None if family == Family::Llama => heads,
        None => return Err(text.missing(key)),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(invalid(
            text,
            key,
            &kv_heads.to_string(),
            format!("it does not divide num_attention_heads = {heads}"),
        ));
    }
    Ok(kv_heads)
}

fn head_size(text: &Keys, family: Family, hidden: usize, heads: usize) -> Result<usize> {
    let key = "head_dim";
    let head_size = match text.optional_size(key, MAX_HEAD_SIZE)? {
        Some(n) => n,
        // Qwen3's heads are not hidden/heads: a guess would be wrong.
        None if family == Family::Qwen3 => return Err(text.missing(key)),
        // Exception: absent or null means hidden/heads, as documented.
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(invalid(
                text,
                "num_attention_heads",
                &heads.to_string(),
                format!("it does not divide hidden_size = {hidden}, and there is no `head_dim`"),
            ));
        }
    };
    if head_size > MAX_HEAD_SIZE {
        return Err(invalid(
            text,
            "num_attention_heads",
            &heads.to_string(),
            format!("heads of {head_size} elements are over the limit of {MAX_HEAD_SIZE}"),
        ));
    }
    if !head_size.is_multiple_of(2) {
        return Err(invalid(
            text,
            key,
            &head_size.to_string(),
            "rotary embeddings turn pairs of elements, so the head size must be even".to_string(),
        ));
    }
    if family == Family::Qwen2_5Vl && head_size * heads != hidden {
        return Err(invalid(
            text,
            key,
            &head_size.to_string(),
            format!("in this model type it is hidden_size/num_attention_heads = {hidden}/{heads}"),
        ));
    }
    Ok(head_size)
}

fn rms_eps(text: &Keys) -> Result<f32> {
    let key = "rms_norm_eps";
    let eps = text.number(key)?;
    if !(1e-30..=1.0).contains(&eps) {
        let why = "it must lie between 1e-30 and 1".to_string();
        return Err(invalid(text, key, &eps.to_string(), why));
    }
    Ok(eps as f32)
}

/// The head is tied if either level says so: releases before 5 wrote the key beside the text's keys only.
fn tied_head(root: &Keys, text: &Keys) -> Result<bool> {
    let key = "tie_word_embeddings";
    match (root.optional_bool(key)?, text.optional_bool(key)?) {
        (None, None) => Err(root.missing(key)),
        (a, b) => Ok(a.unwrap_or(false) || b.unwrap_or(false)),
    }
}

/// `dtype` (transformers 5) or `torch_dtype`: what the weights were saved as. Only a hint, so an unknown one is none.
fn config_dtype(keys: &Keys) -> Result<Option<Dtype>> {
    let name = match keys.optional_str("dtype")? {
        Some(name) => Some(name),
        None => keys.optional_str("torch_dtype")?,
    };
    Ok(name.and_then(Dtype::parse))
}

/// Per layer, how many keys a query sees (its own included), `None` for all.
fn windows(text: &Keys, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match family {
        Family::Llama => None,
        // null is a statement (full attention), an absent key is not.
        Family::Mistral if text.has("sliding_window") => {
            text.optional_size("sliding_window", MAX_POSITIONS)?
        }
        Family::Mistral => return Err(text.missing("sliding_window")),
        _ => gated_window(text)?,
    };
    if let Some(types) = text.get("layer_types") {
        return windows_by_type(text, types, family, layers, window);
    }
    let first = match (family, window) {
        (Family::Qwen2 | Family::Qwen3 | Family::Qwen2_5Vl, Some(_)) => {
            text.count("max_window_layers", MAX_LAYERS)?
        }
        _ => 0,
    };
    Ok((0..layers).map(|i| window.filter(|_| i >= first)).collect())
}

/// The Qwen families: `sliding_window` counts only where `use_sliding_window` is true.
fn gated_window(text: &Keys) -> Result<Option<usize>> {
    match text.optional_bool("use_sliding_window")? {
        Some(true) if text.has("sliding_window") => {
            text.optional_size("sliding_window", MAX_POSITIONS)
        }
        Some(true) => Err(text.missing("sliding_window")),
        Some(false) => Ok(None),
        None if text.get("sliding_window").is_none() => Ok(None),
        None => Err(text.missing("use_sliding_window")),
    }
}

fn windows_by_type(
    text: &Keys,
    types: &Value,
    family: Family,
    layers: usize,
    window: Option<usize>,
) -> Result<Vec<Option<usize>>> {
    let key = "layer_types";
    let bad = |why: String| invalid(text, key, &keys::shown(types), why);
    let list = types
        .as_array()
        .ok_or_else(|| bad("it must be a list of strings".to_string()))?;
    if list.len() != layers {
        return Err(bad(format!(
            "it has {} entries for num_hidden_layers = {layers}",
            list.len()
        )));
    }
    let mut windows = Vec::with_capacity(layers);
    for (i, entry) in list.iter().enumerate() {
        let sliding = match entry.as_str() {
            Some("full_attention") => false,
            Some("sliding_attention") => true,
            _ => {
                let why = format!("layer {i} has an attention type this engine does not have");
                return Err(unsupported(text, key, &keys::shown(entry), &why));
            }
        };
        match (sliding, window) {
            (true, None) => return Err(bad(format!("layer {i} slides, but there is no window"))),
            // Mistral slides everywhere or nowhere; transformers ignores the list, other engines do not.
            (false, Some(_)) if family == Family::Mistral => {
                let why = "`sliding_window` is set, and mixed layers are another model type";
                return Err(unsupported(text, key, &keys::shown(entry), why));
            }
            (true, Some(w)) => windows.push(Some(w)),
            (false, _) => windows.push(None),
        }
    }
    Ok(windows)
}

#[cfg(test)]
mod tests;
