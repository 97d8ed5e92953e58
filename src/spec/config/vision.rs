//! `vision_config` of Qwen2.5-VL, and the special token ids beside it.

use super::keys::{Keys, invalid, unsupported};
use super::refuse_activation;
use crate::error::Result;
use crate::spec::VisionSpec;

const MAX_DEPTH: usize = 1024;
const MAX_HIDDEN: usize = 1 << 16;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_PATCH: usize = 256;
const MAX_CHANNELS: usize = 64;
const MAX_MERGE: usize = 16;
const MAX_WINDOW: usize = 1 << 16;
/// The axial rope of the tower; the hub's configs do not have the key, newer ones write this value.
const THETA: f64 = 10_000.0;

/// `text_hidden`, `vocab`: of the decoder, which the merger's output and the special ids must fit.
pub(super) fn parse(root: &Keys, text_hidden: usize, vocab: usize) -> Result<VisionSpec> {
    let Some(keys) = root.object("vision_config")? else {
        return Err(root.missing("vision_config"));
    };
    refuse_activation(&keys)?;
    refuse_other_rope(&keys)?;
    // The hub writes in_chans, transformers 5 in_channels (and keeps the old one beside it).
    let channels = match keys.optional_size("in_channels", MAX_CHANNELS)? {
        Some(n) => n,
        None => keys.size("in_chans", MAX_CHANNELS)?,
    };
    let depth = keys.size("depth", MAX_DEPTH)?;
    let id = |key: &str| root.count(key, vocab - 1).map(|n| n as u32);
    let vision = VisionSpec {
        depth,
        hidden: keys.size("hidden_size", MAX_HIDDEN)?,
        heads: keys.size("num_heads", MAX_HIDDEN)?,
        intermediate: keys.size("intermediate_size", MAX_INTERMEDIATE)?,
        out_hidden: keys.size("out_hidden_size", super::MAX_HIDDEN)?,
        channels,
        patch: keys.size("patch_size", MAX_PATCH)?,
        temporal_patch: keys.size("temporal_patch_size", MAX_PATCH)?,
        merge: keys.size("spatial_merge_size", MAX_MERGE)?,
        window: keys.size("window_size", MAX_WINDOW)?,
        full_attention_blocks: keys.counts("fullatt_block_indexes", depth - 1, depth)?,
        tokens_per_second: keys.number_in("tokens_per_second", 0.0, 1e6)?,
        image_token: id("image_token_id")?,
        video_token: id("video_token_id")?,
        vision_start_token: id("vision_start_token_id")?,
    };
    check(&keys, &vision, text_hidden)?;
    Ok(vision)
}

fn check(keys: &Keys, vision: &VisionSpec, text_hidden: usize) -> Result<()> {
    let hidden = vision.hidden;
    // Half of each head is rotated by row, half by column, both in pairs.
    if !hidden.is_multiple_of(4 * vision.heads) {
        let why = format!("hidden_size = {hidden} must be num_heads times a multiple of 4");
        return Err(invalid(keys, "num_heads", &vision.heads.to_string(), why));
    }
    let cell = vision.patch * vision.merge;
    if vision.window < cell {
        let why = format!("a window must hold one merged cell of {cell} pixels");
        return Err(invalid(
            keys,
            "window_size",
            &vision.window.to_string(),
            why,
        ));
    }
    if vision.out_hidden != text_hidden {
        return Err(invalid(
            keys,
            "out_hidden_size",
            &vision.out_hidden.to_string(),
            format!("the decoder's hidden_size is {text_hidden}"),
        ));
    }
    Ok(())
}

fn refuse_other_rope(keys: &Keys) -> Result<()> {
    let Some(rope) = keys.object("rope_parameters")? else {
        return Ok(());
    };
    match rope.optional_str("rope_type")? {
        None | Some("axial" | "default") => {}
        Some(other) => {
            let why = "the vision tower's rope is axial";
            return Err(unsupported(&rope, "rope_type", other, why));
        }
    }
    match rope.optional_number("rope_theta")? {
        None => Ok(()),
        Some(theta) if theta == THETA => Ok(()),
        Some(theta) => {
            let why = "the vision tower's theta is 10000";
            Err(unsupported(&rope, "rope_theta", &theta.to_string(), why))
        }
    }
}
