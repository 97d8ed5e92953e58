//! The files of a model's image processor, and what their keys may say.

use std::path::Path;

use serde_json::{Map, Value};

use super::MAX_TARGET_PIXELS;
use crate::error::{Code, Error, Result};

const MAX_CONFIG_BYTES: u64 = 1 << 20;

pub(super) fn read(dir: &Path, file: &str) -> Result<Option<Map<String, Value>>> {
    let path = dir.join(file);
    let meta = match std::fs::metadata(&path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(format!("cannot read {}", path.display()), &e)),
    };
    if !meta.is_file() || meta.len() > MAX_CONFIG_BYTES {
        let what = path.display().to_string();
        return Err(bad(
            &what,
            "it is no regular file of up to a megabyte".into(),
        ));
    }
    let text = std::fs::read(&path)
        .map_err(|e| Error::io(format!("cannot read {}", path.display()), &e))?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(bad(
            &path.display().to_string(),
            "it is not a JSON object".into(),
        )),
        Err(e) => Err(bad(&path.display().to_string(), e.to_string())),
    }
}

pub(super) fn missing(dir: &Path) -> Error {
    Error::new(
        Code::Config,
        format!("{} has no preprocessor_config.json", dir.display()),
        "how the model wants its pictures is never guessed",
        "copy preprocessor_config.json from the model's source",
    )
}

pub(super) fn bad(what: &str, cause: String) -> Error {
    Error::new(
        Code::Config,
        format!("the image preprocessor's configuration cannot be followed: {what}"),
        cause,
        "restore preprocessor_config.json from the model's source",
    )
}

pub(super) fn number(config: &Map<String, Value>, key: &str) -> Result<Option<f64>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => match v.as_f64() {
            Some(x) if x >= 0.0 => Ok(Some(x)),
            _ => Err(bad(
                &format!("`{key}`"),
                "it must be a positive number".into(),
            )),
        },
    }
}

pub(super) fn three(config: &Map<String, Value>, key: &str, default: [f64; 3]) -> Result<[f64; 3]> {
    let Some(value) = config.get(key).filter(|v| !v.is_null()) else {
        return Ok(default);
    };
    let list: Option<Vec<f64>> = value
        .as_array()
        .and_then(|l| l.iter().map(Value::as_f64).collect());
    match list.as_deref() {
        Some([a, b, c]) if key != "image_std" || *a * *b * *c != 0.0 => Ok([*a, *b, *c]),
        _ => Err(bad(&format!("`{key}`"), "it must be three numbers".into())),
    }
}

/// Fewest and most pixels: `min_pixels`/`max_pixels` where given, else `size`'s edges (pixel counts, whatever their names say).
pub(super) fn bounds(
    config: Option<&Map<String, Value>>,
    default: (u64, u64),
) -> Result<(u64, u64)> {
    let Some(config) = config else {
        return Ok(default);
    };
    let empty = Map::new();
    let size = config
        .get("size")
        .and_then(Value::as_object)
        .unwrap_or(&empty);
    let pick = |own: &str, edge: &str, default: u64| -> Result<u64> {
        let found = match number(config, own)? {
            Some(n) => Some(n),
            None => match number(size, edge)? {
                Some(n) => Some(n),
                None => number(size, own)?,
            },
        };
        Ok(found.map_or(default, |n| n as u64))
    };
    let min = pick("min_pixels", "shortest_edge", default.0)?;
    let max = pick("max_pixels", "longest_edge", default.1)?;
    if min > max || max > MAX_TARGET_PIXELS {
        let cause = format!("they must ascend and stay below {MAX_TARGET_PIXELS}");
        return Err(bad(&format!("{min} to {max} pixels"), cause));
    }
    Ok((min, max))
}
