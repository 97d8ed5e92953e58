//! Rotary embedding keys: `rope_theta` and `rope_scaling` beside the others (hub), or all in `rope_parameters`
//! (transformers 5). `rope_scaling` wins where both are, as it does in transformers.

use super::keys::{Keys, invalid, unsupported};
use crate::error::Result;
use crate::spec::{Family, RopeScaling, RopeSpec};

const MAX_THETA: f64 = 1e12;
const MAX_FACTOR: f64 = 1e6;
const MIN_FACTOR: f64 = 1e-6;
const MAX_ORIGINAL_POSITIONS: usize = 1 << 30;

pub(super) fn parse(
    text: &Keys,
    family: Family,
    head_size: usize,
    max_positions: usize,
) -> Result<RopeSpec> {
    let scaling = non_empty(text.object("rope_scaling")?);
    let parameters = match scaling {
        Some(keys) => Some(keys),
        None => non_empty(text.object("rope_parameters")?),
    };
    let theta = theta(text, parameters.as_ref(), family)?;
    refuse_partial(text)?;
    let Some(keys) = parameters else {
        if family == Family::Qwen2_5Vl {
            return Err(text.missing("rope_scaling.mrope_section"));
        }
        return Ok(RopeSpec {
            theta,
            scaling: RopeScaling::Default,
            mrope_section: None,
        });
    };
    refuse_partial(&keys)?;
    for layer_type in ["full_attention", "sliding_attention"] {
        if keys.get(layer_type).is_some() {
            let why = "rope parameters that differ by layer are not implemented";
            return Err(unsupported(&keys, layer_type, "an object", why));
        }
    }
    Ok(RopeSpec {
        theta,
        scaling: scaling_of(text, &keys, family, max_positions)?,
        mrope_section: mrope_section(&keys, family, head_size)?,
    })
}

fn non_empty(keys: Option<Keys>) -> Option<Keys> {
    keys.filter(|k| !k.is_empty())
}

fn theta(text: &Keys, parameters: Option<&Keys>, family: Family) -> Result<f64> {
    let key = "rope_theta";
    let in_range = |keys: &Keys| keys.optional_number_in(key, 1.0 + 1e-6, MAX_THETA);
    if let Some(theta) = parameters.map(in_range).transpose()?.flatten() {
        return Ok(theta);
    }
    if let Some(theta) = in_range(text)? {
        return Ok(theta);
    }
    // Exception: transformers had no such key before 4.32 (August 2023) and computed Llama with 10000 throughout;
    // Llama 2's own configs are of that age.
    if family == Family::Llama && written_before_4_32(text)? {
        return Ok(10_000.0);
    }
    Err(text.missing(key))
}

fn written_before_4_32(text: &Keys) -> Result<bool> {
    let Some(version) = text.optional_str("transformers_version")? else {
        return Ok(false);
    };
    let mut parts = version.split('.').map(|p| p.parse::<u32>().ok());
    Ok(match (parts.next().flatten(), parts.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) < (4, 32),
        _ => false,
    })
}

fn refuse_partial(keys: &Keys) -> Result<()> {
    let key = "partial_rotary_factor";
    match keys.optional_number(key)? {
        None => Ok(()),
        Some(1.0) => Ok(()),
        Some(x) => {
            let why = "rotating a part of each head is not implemented";
            Err(unsupported(keys, key, &x.to_string(), why))
        }
    }
}

fn scaling_of(
    text: &Keys,
    keys: &Keys,
    family: Family,
    max_positions: usize,
) -> Result<RopeScaling> {
    let key = if keys.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let factor = |k: &str| keys.number_in(k, MIN_FACTOR, MAX_FACTOR);
    match keys.optional_str(key)? {
        // transformers reads an absent type as default; only `rope_parameters: {rope_theta}` lacks it in practice.
        None if keys.get("factor").is_some() => Err(keys.missing("rope_type")),
        None | Some("default") => Ok(RopeScaling::Default),
        Some("mrope") if family == Family::Qwen2_5Vl => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear {
            factor: factor("factor")?,
        }),
        Some("llama3") => llama3(keys),
        Some("yarn") => yarn(text, keys, max_positions),
        Some(other) => Err(unsupported(
            keys,
            key,
            other,
            "the rope types default, linear, llama3 and yarn are implemented",
        )),
    }
}

fn llama3(keys: &Keys) -> Result<RopeScaling> {
    let factor = |k: &str| keys.number_in(k, MIN_FACTOR, MAX_FACTOR);
    let low_freq_factor = factor("low_freq_factor")?;
    let high_freq_factor = factor("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(invalid(
            keys,
            "high_freq_factor",
            &high_freq_factor.to_string(),
            format!("it must be greater than low_freq_factor = {low_freq_factor}"),
        ));
    }
    Ok(RopeScaling::Llama3 {
        factor: factor("factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_positions: keys
            .size("original_max_position_embeddings", MAX_ORIGINAL_POSITIONS)?,
    })
}

fn yarn(text: &Keys, keys: &Keys, max_positions: usize) -> Result<RopeScaling> {
    let key = "original_max_position_embeddings";
    // Exception: absent means max_position_embeddings, in every release of transformers that has yarn.
    let original = match text.optional_size(key, MAX_ORIGINAL_POSITIONS)? {
        Some(n) => n,
        None => keys
            .optional_size(key, MAX_ORIGINAL_POSITIONS)?
            .unwrap_or(max_positions),
    };
    // A factor of null, written so on purpose, means the ratio of the two lengths.
    let factor = match keys.optional_number_in("factor", MIN_FACTOR, MAX_FACTOR)? {
        Some(factor) => factor,
        None if keys.has("factor") => max_positions as f64 / original as f64,
        None => return Err(keys.missing("factor")),
    };
    // Zero counts as absent for the four below, as it does in transformers; the betas are the paper's.
    let given = |k: &str| -> Result<Option<f64>> {
        let x = keys.optional_number_in(k, 0.0, MAX_FACTOR)?;
        Ok(x.filter(|x| *x > 0.0))
    };
    let beta_fast = given("beta_fast")?.unwrap_or(32.0);
    let beta_slow = given("beta_slow")?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        return Err(invalid(
            keys,
            "beta_fast",
            &beta_fast.to_string(),
            format!("it must not be less than beta_slow = {beta_slow}"),
        ));
    }
    Ok(RopeScaling::Yarn {
        factor,
        original_max_positions: original,
        beta_fast,
        beta_slow,
        attention_factor: keys.optional_number_in("attention_factor", 0.0, MAX_FACTOR)?,
        mscale: given("mscale")?,
        mscale_all_dim: given("mscale_all_dim")?,
        truncate: keys.optional_bool("truncate")?.unwrap_or(true),
    })
}

fn mrope_section(keys: &Keys, family: Family, head_size: usize) -> Result<Option<[usize; 3]>> {
    let key = "mrope_section";
    if family != Family::Qwen2_5Vl {
        return match keys.get(key) {
            None => Ok(None),
            Some(_) => Err(unsupported(
                keys,
                key,
                "set",
                "this model type has no M-RoPE",
            )),
        };
    }
    let list = keys.counts(key, head_size, 3)?;
    match <[usize; 3]>::try_from(list.as_slice()) {
        Ok(section) if section.iter().sum::<usize>() == head_size / 2 => Ok(Some(section)),
        _ => Err(invalid(
            keys,
            key,
            &format!("{list:?}"),
            format!(
                "it must be three numbers that add up to half the head size, {}",
                head_size / 2
            ),
        )),
    }
}
