//! Hugging Face's `hf_device_map`, verbatim: module names → device, longest prefix wins.

use serde_json::Value;

use super::plan::Tier;
use crate::error::{Code, Error, Result};
use crate::spec::{UnitKind, canonical_name};

/// A tier for each unit of `kinds`, from a JSON object of module name → `"cpu"`, `"disk"` or a GPU: a number, `"gpu"`, `"cuda:0"`.
/// A unit that no entry covers is an error: accelerate refuses such a map too.
pub fn parse_device_map(json: &Value, kinds: &[UnitKind]) -> Result<Vec<Tier>> {
    let entries = json.as_object().ok_or_else(|| {
        bad(
            "it is not a JSON object".into(),
            "write {\"model.layers.0\": \"cpu\", \"\": \"disk\"}",
        )
    })?;
    let mut rules: Vec<(Vec<String>, Tier)> = Vec::new();
    for (module, device) in entries {
        rules.push((path_of(module), tier_of(module, device)?));
    }
    // Longest first, so that the first match is the most specific.
    rules.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
    kinds
        .iter()
        .map(|kind| {
            let module: Vec<String> = module_of(*kind).split('.').map(str::to_string).collect();
            rules
                .iter()
                .find(|(path, _)| module.starts_with(path))
                // The final norm is a few kilobytes: no pass streams it, so it rests in memory wherever the map puts it.
                .map(|(_, tier)| {
                    if *kind == UnitKind::Norm {
                        Tier::Cpu
                    } else {
                        *tier
                    }
                })
                .ok_or_else(|| {
                    bad(
                        format!("no entry covers `{}`", module.join(".")),
                        "add it, or \"\": \"disk\" for all that is not named",
                    )
                })
        })
        .collect()
}

/// The module of a unit, in canonical names.
fn module_of(kind: UnitKind) -> String {
    match kind {
        UnitKind::Embed => "model.embed_tokens".into(),
        UnitKind::Layer(i) => format!("model.layers.{i}"),
        UnitKind::Norm => "model.norm".into(),
        UnitKind::Head(_) => "lm_head".into(),
        UnitKind::VisionEmbed => "visual.patch_embed".into(),
        UnitKind::VisionBlock(i) => format!("visual.blocks.{i}"),
        UnitKind::VisionMerger => "visual.merger".into(),
    }
}

/// `model.language_model.layers.3` → `[model, layers, 3]`; the empty name is the whole model.
fn path_of(module: &str) -> Vec<String> {
    if module.is_empty() {
        return Vec::new();
    }
    // canonical_name works on tensor names; a stand-in tensor makes a module one.
    let name = canonical_name(&format!("{module}.weight"));
    let name = name.strip_suffix(".weight").unwrap_or(&name);
    name.split('.').map(str::to_string).collect()
}

fn tier_of(module: &str, device: &Value) -> Result<Tier> {
    match device.as_str() {
        Some("cpu") => Ok(Tier::Cpu),
        Some("disk") => Ok(Tier::Disk),
        Some(d) if d == "gpu" || d.starts_with("cuda") => Ok(Tier::Gpu),
        None if device.is_u64() => Ok(Tier::Gpu),
        _ => Err(bad(
            format!("`{module}` is mapped to {device}"),
            "map it to 0, \"gpu\", \"cpu\" or \"disk\"",
        )),
    }
}

fn bad(cause: String, fix: &str) -> Error {
    Error::new(Code::Usage, "the device map cannot be followed", cause, fix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const KINDS: [UnitKind; 4] = [
        UnitKind::Embed,
        UnitKind::Layer(1),
        UnitKind::Layer(10),
        UnitKind::Head(0),
    ];

    #[test]
    fn the_longest_prefix_of_whole_components_wins() {
        let map = json!({"": "disk", "model.language_model.layers.1": "cpu", "lm_head": "cpu"});
        assert_eq!(
            parse_device_map(&map, &KINDS).unwrap(),
            [Tier::Disk, Tier::Cpu, Tier::Disk, Tier::Cpu]
        );
    }

    #[test]
    fn the_final_norm_is_never_left_on_disk() {
        let kinds = [UnitKind::Layer(0), UnitKind::Norm];
        assert_eq!(
            parse_device_map(&json!({"": "disk"}), &kinds).unwrap(),
            [Tier::Disk, Tier::Cpu]
        );
    }

    #[test]
    fn gaps_and_gpus_are_named() {
        let e = parse_device_map(&json!({"model.layers": "cpu"}), &KINDS).unwrap_err();
        assert!(e.cause().contains("model.embed_tokens"), "{e}");
        let e = parse_device_map(&json!({"": "npu"}), &KINDS).unwrap_err();
        assert!(e.cause().contains("npu"), "{e}");
        for gpu in [json!(0), json!("cuda:0"), json!("gpu")] {
            let map = json!({"": gpu});
            assert_eq!(parse_device_map(&map, &KINDS).unwrap(), [Tier::Gpu; 4]);
        }
    }
}
