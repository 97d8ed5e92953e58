//! Reads a request's fields one by one, so that what was not read is known and named.

use serde_json::{Map, Value};

use super::request::RowError;

/// The fields of a JSON object, taken out as they are read.
pub struct Fields(Map<String, Value>);

impl Fields {
    pub fn new(map: Map<String, Value>) -> Fields {
        Fields(map)
    }

    /// The value of `key`; null is the same as absent.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(key).filter(|v| !v.is_null())
    }

    fn read<T>(
        &mut self,
        key: &str,
        wanted: &str,
        get: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, RowError> {
        match self.take(key) {
            None => Ok(None),
            Some(v) => match get(&v) {
                Some(t) => Ok(Some(t)),
                None => Err(RowError::value(key, wanted, &v)),
            },
        }
    }

    pub fn text(&mut self, key: &str) -> Result<Option<String>, RowError> {
        self.read(key, "a string", |v| v.as_str().map(str::to_owned))
    }

    pub fn flag(&mut self, key: &str) -> Result<Option<bool>, RowError> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub fn number(&mut self, key: &str) -> Result<Option<f32>, RowError> {
        self.read(key, "a number", |v| v.as_f64().map(|x| x as f32))
    }

    /// A whole number within `range`.
    pub fn count(
        &mut self,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<usize>, RowError> {
        let wanted = match *range.end() {
            u64::MAX => format!("a whole number from {}", range.start()),
            end => format!("a whole number from {} to {end}", range.start()),
        };
        self.read(key, &wanted, |v| {
            v.as_u64()
                .filter(|n| range.contains(n))
                .and_then(|n| usize::try_from(n).ok())
        })
    }

    pub fn object(&mut self, key: &str) -> Result<Option<Map<String, Value>>, RowError> {
        self.read(key, "an object", |v| v.as_object().cloned())
    }

    /// Accepts `key` only with a value that asks for nothing.
    pub fn neutral(&mut self, key: &str, neutral: &[Value]) -> Result<(), RowError> {
        match self.take(key) {
            Some(v) if !neutral.contains(&v) => Err(RowError::unsupported(key)),
            _ => Ok(()),
        }
    }

    /// Whatever was not taken is unknown.
    pub fn finish(self, place: &str) -> Result<(), RowError> {
        let left = self.0.iter().find(|(_, v)| !v.is_null());
        match left {
            None => Ok(()),
            Some((key, _)) => Err(RowError::unknown(key, place)),
        }
    }
}
