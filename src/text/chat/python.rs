//! Python's ways with values, as far as chat templates show them: `str`, `repr`, `json.dumps`, a few string methods, `strftime`.

use std::fmt::Write;

use chrono::format::{Item, StrftimeItems};
use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, Value};

/// Values nested deeper are refused: rendering them would recurse as deep.
const MAX_DEPTH: usize = 200;

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Appends `str(value)`.
pub(super) fn write_str(out: &mut String, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => {
            out.push_str(text);
            Ok(())
        }
        None => write_repr(out, value, 0),
    }
}

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("a value is nested too deeply to be shown"));
    }
    match value.kind() {
        ValueKind::String => quote(out, value.as_str().unwrap_or_default()),
        ValueKind::Number => write_number(out, value, "inf", "nan"),
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => write!(out, "{value}").map_err(Error::from)?,
    }
    Ok(())
}

/// `repr` of a string: single quotes unless only those occur inside.
fn quote(out: &mut String, text: &str) {
    let mark = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == mark => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7f..0xa0).contains(&(c as u32)) || c == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(mark);
}

fn write_number(out: &mut String, value: &Value, infinity: &str, nan: &str) {
    if value.is_integer() {
        let _ = write!(out, "{value}");
        return;
    }
    let Ok(x) = f64::try_from(value.clone()) else {
        let _ = write!(out, "{value}");
        return;
    };
    if x.is_nan() {
        out.push_str(nan);
    } else if x.is_infinite() {
        out.push_str(if x < 0.0 { "-" } else { "" });
        out.push_str(infinity);
    } else {
        write_float(out, x);
    }
}

/// `repr(float)`: shortest digits that read back, an exponent below 1e-4 and from 1e16 on.
fn write_float(out: &mut String, x: f64) {
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{mantissa}e{sign}{:02}", exponent.abs());
    } else {
        let _ = write!(out, "{x:?}");
    }
}

/// How `json.dumps` lays out.
pub(super) struct JsonStyle {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort: bool,
}

impl JsonStyle {
    pub(super) fn new(
        ensure_ascii: Option<Value>,
        indent: Option<Value>,
        separators: Option<Value>,
        sort_keys: Option<Value>,
    ) -> Result<JsonStyle, Error> {
        let is_true = |v: Option<Value>| v.is_some_and(|v| v.is_true());
        let given = |v: Option<Value>| v.filter(|v| !v.is_none() && !v.is_undefined());
        let indent = match given(indent) {
            None => None,
            Some(v) => Some(match v.as_str() {
                Some(text) => text.to_owned(),
                // A negative indent breaks lines and indents nothing.
                None => " ".repeat(i64::try_from(v)?.clamp(0, 64) as usize),
            }),
        };
        let (item, key) = match given(separators) {
            Some(pair) => {
                let text = |i: usize| -> Result<String, Error> {
                    pair.get_item_by_index(i)?
                        .as_str()
                        .map(str::to_owned)
                        .ok_or_else(|| invalid("separators are two strings"))
                };
                (text(0)?, text(1)?)
            }
            None if indent.is_some() => (",".into(), ": ".into()),
            None => (", ".into(), ": ".into()),
        };
        Ok(JsonStyle {
            ascii: is_true(ensure_ascii),
            indent,
            item,
            key,
            sort: is_true(sort_keys),
        })
    }
}

/// `json.dumps(value, …)`.
pub(super) fn json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_json(&mut out, value, style, 0)?;
    Ok(out)
}

fn write_json(
    out: &mut String,
    value: &Value,
    style: &JsonStyle,
    depth: usize,
) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("a value is nested too deeply for JSON"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => write_number(out, value, "Infinity", "NaN"),
        ValueKind::String => json_string(out, value.as_str().unwrap_or_default(), style.ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(out, style, depth, ('[', ']'), &items, |out, item| {
                write_json(out, item, style, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort {
                keys.sort();
            }
            write_items(out, style, depth, ('{', '}'), &keys, |out, key| {
                json_key(out, key, style)?;
                out.push_str(&style.key);
                write_json(out, &value.get_item(key)?, style, depth + 1)
            })?;
        }
        kind => return Err(invalid(format!("a value of type {kind} is not JSON"))),
    }
    Ok(())
}

fn write_items(
    out: &mut String,
    style: &JsonStyle,
    depth: usize,
    (open, close): (char, char),
    items: &[Value],
    mut write: impl FnMut(&mut String, &Value) -> Result<(), Error>,
) -> Result<(), Error> {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    out.push(open);
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push_str(&style.item);
        }
        line(out, depth + 1);
        write(out, item)?;
    }
    if !items.is_empty() {
        line(out, depth);
    }
    out.push(close);
    Ok(())
}

fn json_key(out: &mut String, key: &Value, style: &JsonStyle) -> Result<(), Error> {
    match key.kind() {
        ValueKind::String => json_string(out, key.as_str().unwrap_or_default(), style.ascii),
        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
            let mut text = String::new();
            write_json(&mut text, key, style, 0)?;
            json_string(out, &text, style.ascii);
        }
        kind => return Err(invalid(format!("a {kind} cannot be a key in JSON"))),
    }
    Ok(())
}

fn json_string(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ascii && (c as u32) > 0x7e) => {
                let mut units = [0u16; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// What Python's `str` calls white space: Unicode's, and four separators more.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// String methods that minijinja's contrib crate lacks, or where it differs (`find` counts bytes there). `None`: not here.
pub(super) fn string_method(
    text: &str,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let trim = |front: bool, back: bool| -> Result<Value, Error> {
        let (chars,): (Option<&str>,) = from_args(args)?;
        let cut = |c: char| chars.map_or_else(|| is_space(c), |set| set.contains(c));
        let mut rest = text;
        if front {
            rest = rest.trim_start_matches(cut);
        }
        if back {
            rest = rest.trim_end_matches(cut);
        }
        Ok(Value::from(rest))
    };
    let position = |at: Option<usize>| match at {
        Some(byte) => Value::from(text[..byte].chars().count()),
        None => Value::from(-1),
    };
    Ok(Some(match name {
        "strip" => trim(true, true)?,
        "lstrip" => trim(true, false)?,
        "rstrip" => trim(false, true)?,
        "find" => position(text.find(from_args::<(&str,)>(args)?.0)),
        "rfind" => position(text.rfind(from_args::<(&str,)>(args)?.0)),
        "index" => match text.find(from_args::<(&str,)>(args)?.0) {
            Some(byte) => position(Some(byte)),
            None => return Err(invalid("substring not found")),
        },
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            partition(text, separator, name == "rpartition")?
        }
        "rsplit" => {
            let (separator, max): (Option<&str>, Option<i64>) = from_args(args)?;
            rsplit(text, separator, max)?
        }
        "split" => {
            let (separator, max): (Option<&str>, Option<i64>) = from_args(args)?;
            split(text, separator, max)?
        }
        // Of an empty string Python says no to each of these.
        "isdigit" | "isnumeric" | "isalnum" | "isalpha" | "isspace" if text.is_empty() => {
            Value::from(false)
        }
        "isspace" => Value::from(text.chars().all(is_space)),
        "islower" => Value::from(
            text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase),
        ),
        "isupper" => Value::from(
            text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase),
        ),
        "swapcase" => {
            let swap = |c: char| -> String {
                if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect()
                }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        _ => return Ok(None),
    }))
}

fn partition(text: &str, separator: &str, last: bool) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let found = if last {
        text.rsplit_once(separator)
    } else {
        text.split_once(separator)
    };
    let parts = match found {
        Some((a, b)) => [a, separator, b],
        None if last => ["", "", text],
        None => [text, "", ""],
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

/// `str.split`: at white space where no separator is given; `max` splits, negative for all.
fn split(text: &str, separator: Option<&str>, max: Option<i64>) -> Result<Value, Error> {
    let max = max.and_then(|m| usize::try_from(m).ok());
    match separator {
        Some("") => Err(invalid("empty separator")),
        Some(s) => Ok(match max {
            Some(m) => text
                .splitn(m.saturating_add(1), s)
                .map(Value::from)
                .collect(),
            None => text.split(s).map(Value::from).collect(),
        }),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_start_matches(is_space);
            while !rest.is_empty() {
                if max.is_some_and(|m| parts.len() >= m) {
                    parts.push(Value::from(rest));
                    break;
                }
                let end = rest.find(is_space).unwrap_or(rest.len());
                parts.push(Value::from(&rest[..end]));
                rest = rest[end..].trim_start_matches(is_space);
            }
            Ok(Value::from(parts))
        }
    }
}

fn rsplit(text: &str, separator: Option<&str>, max: Option<i64>) -> Result<Value, Error> {
    let max = max.and_then(|m| usize::try_from(m).ok());
    let mut parts: Vec<Value> = Vec::new();
    match (separator, max) {
        (_, None) => return split(text, separator, None),
        (Some(""), _) => return Err(invalid("empty separator")),
        (Some(s), Some(m)) => parts.extend(text.rsplitn(m.saturating_add(1), s).map(Value::from)),
        (None, Some(m)) => {
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() {
                if parts.len() >= m {
                    parts.push(Value::from(rest));
                    break;
                }
                let start = rest
                    .char_indices()
                    .rev()
                    .find(|(_, c)| is_space(*c))
                    .map_or(0, |(i, c)| i + c.len_utf8());
                parts.push(Value::from(&rest[start..]));
                rest = rest[..start].trim_end_matches(is_space);
            }
        }
    }
    parts.reverse();
    Ok(Value::from(parts))
}

/// `datetime.now().strftime(format)`.
pub(super) fn strftime(now: Option<chrono::NaiveDateTime>, format: &str) -> Result<String, Error> {
    let now = now.unwrap_or_else(|| chrono::Local::now().naive_local());
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    let bad = || invalid(format!("`{format}` is not a date format"));
    if items.iter().any(|item| matches!(item, Item::Error)) {
        return Err(bad());
    }
    let mut out = String::new();
    // Writing fails where the format wants what a local time does not know, such as a time zone.
    write!(out, "{}", now.format_with_items(items.into_iter())).map_err(|_| bad())?;
    Ok(out)
}
