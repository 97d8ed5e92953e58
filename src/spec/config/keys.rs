//! Typed access to one level of `config.json`, with errors that name the key and its path.

use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};

/// One object of the config and where it lies (`""`, `"text_config."`).
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Keys<'a> {
    pub(super) fn root(config: &'a Value) -> Result<Keys<'a>> {
        let map = config.as_object().ok_or_else(|| {
            Error::new(
                Code::Config,
                "config.json is not a model configuration",
                "its top level is not a JSON object",
                "restore config.json from the model's repository",
            )
        })?;
        let prefix = String::new();
        Ok(Keys { map, prefix })
    }

    pub(super) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// True even where the value is null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The value, unless it is absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        Error::new(
            Code::Config,
            format!("config.json: key `{}` is missing", self.path(key)),
            "the model's geometry is never guessed",
            "restore config.json from the model's repository, or add the key",
        )
    }

    fn required(&self, key: &str) -> Result<&'a Value> {
        self.get(key).ok_or_else(|| self.missing(key))
    }

    fn wrong_type(&self, key: &str, value: &Value, wanted: &str) -> Error {
        invalid(self, key, &shown(value), format!("it must be {wanted}"))
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Keys<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                let prefix = format!("{}{key}.", self.prefix);
                Ok(Some(Keys { map, prefix }))
            }
            Some(other) => Err(self.wrong_type(key, other, "an object")),
        }
    }

    pub(super) fn optional_str(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(key, other, "a string")),
        }
    }

    pub(super) fn str(&self, key: &str) -> Result<&'a str> {
        self.optional_str(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn optional_bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.wrong_type(key, other, "true or false")),
        }
    }

    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
                Some(x) => Ok(Some(x)),
                None => Err(self.wrong_type(key, value, "a number")),
            },
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<f64> {
        self.optional_number(key)?.ok_or_else(|| self.missing(key))
    }

    /// A number in `low..=high`.
    pub(super) fn number_in(&self, key: &str, low: f64, high: f64) -> Result<f64> {
        let x = self.number(key)?;
        self.within(key, x, low, high)
    }

    pub(super) fn optional_number_in(&self, key: &str, low: f64, high: f64) -> Result<Option<f64>> {
        match self.optional_number(key)? {
            None => Ok(None),
            Some(x) => self.within(key, x, low, high).map(Some),
        }
    }

    fn within(&self, key: &str, x: f64, low: f64, high: f64) -> Result<f64> {
        if (low..=high).contains(&x) {
            Ok(x)
        } else {
            let why = format!("it must lie between {low} and {high}");
            Err(invalid(self, key, &x.to_string(), why))
        }
    }

    fn integer(&self, key: &str, value: &Value, low: usize, high: usize) -> Result<usize> {
        let n = value
            .as_u64()
            .filter(|n| (low as u64..=high as u64).contains(n));
        match n {
            Some(n) => Ok(n as usize),
            None => {
                Err(self.wrong_type(key, value, &format!("a whole number from {low} to {high}")))
            }
        }
    }

    /// A whole number in `1..=max`.
    pub(super) fn size(&self, key: &str, max: usize) -> Result<usize> {
        self.integer(key, self.required(key)?, 1, max)
    }

    pub(super) fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => self.integer(key, value, 1, max).map(Some),
        }
    }

    /// A whole number in `0..=max`.
    pub(super) fn count(&self, key: &str, max: usize) -> Result<usize> {
        self.integer(key, self.required(key)?, 0, max)
    }

    /// A list of whole numbers in `0..=max`, at most `entries` of them.
    pub(super) fn counts(&self, key: &str, max: usize, entries: usize) -> Result<Vec<usize>> {
        let value = self.required(key)?;
        let list = value
            .as_array()
            .filter(|list| list.len() <= entries)
            .ok_or_else(|| {
                self.wrong_type(key, value, &format!("a list of at most {entries} numbers"))
            })?;
        list.iter()
            .map(|entry| self.integer(key, entry, 0, max))
            .collect()
    }
}

/// A key whose value makes no sense.
pub(super) fn invalid(keys: &Keys, key: &str, value: &str, why: String) -> Error {
    Error::new(
        Code::Config,
        format!(
            "config.json: `{}` = {} is not usable",
            keys.path(key),
            clip(value)
        ),
        why,
        "restore config.json from the model's repository",
    )
}

/// A key whose value asks for something this engine does not have.
pub(super) fn unsupported(keys: &Keys, key: &str, value: &str, why: &str) -> Error {
    Error::new(
        Code::Unsupported,
        format!(
            "config.json: `{}` = {} is not supported",
            keys.path(key),
            clip(value)
        ),
        why,
        "choose a model without it",
    )
}

/// A value for a message. Never the whole of a hostile one.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("[… {} entries]", list.len()),
        Value::Object(map) => format!("{{… {} keys}}", map.len()),
        scalar => clip(&scalar.to_string()),
    }
}

/// The first 80 characters of text from a file, without control characters.
pub(super) fn clip(text: &str) -> String {
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut out: String = text.chars().take(80).map(clean).collect();
    if text.chars().nth(80).is_some() {
        out.push('…');
    }
    out
}
