//! JSON files of a checkpoint, and their fields with errors that name file and field.

use super::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// The fields of one JSON object, with errors that name file and field.
pub struct Fields<'a> {
    pub path: &'a Path,
    pub json: &'a Value,
}

impl Fields<'_> {
    pub fn error(&self, reason: String) -> Error {
        Error::input(self.path.display().to_string(), reason)
    }

    /// Refuses a field that is there and is not `expected`.
    pub fn only(&self, name: &str, expected: Value) -> Result<()> {
        match &self.json[name] {
            Value::Null => Ok(()),
            value if *value == expected => Ok(()),
            other => Err(self.error(format!("{name}: expected {expected}, got {other}"))),
        }
    }

    /// Refuses a field that is neither true nor false.
    pub fn is_flag(&self, name: &str) -> Result<()> {
        match &self.json[name] {
            Value::Null | Value::Bool(_) => Ok(()),
            other => Err(self.error(format!("{name}: expected true or false, got {other}"))),
        }
    }

    pub fn optional(&self, name: &str) -> Result<Option<f64>> {
        match &self.json[name] {
            Value::Null => Ok(None),
            value => value
                .as_f64()
                .filter(|number| *number > 0.0)
                .map(Some)
                .ok_or_else(|| self.error(format!("{name}: expected a number above 0, got {value}"))),
        }
    }

    pub fn number(&self, name: &str) -> Result<f64> {
        self.optional(name)?.ok_or_else(|| self.error(format!("{name}: missing")))
    }

    pub fn extent(&self, name: &str) -> Result<usize> {
        match &self.json[name] {
            Value::Null => Err(self.error(format!("{name}: missing"))),
            value => value
                .as_u64()
                .filter(|extent| (1..1 << 32).contains(extent))
                .map(|extent| extent as usize)
                .ok_or_else(|| self.error(format!("{name}: expected a whole number above 0, got {value}"))),
        }
    }

    pub fn extent_or(&self, name: &str, default: usize) -> Result<usize> {
        if self.json[name].is_null() { Ok(default) } else { self.extent(name) }
    }

    /// A whole number, 0 among them.
    pub fn whole_or(&self, name: &str, default: usize) -> Result<usize> {
        if self.json[name] == 0 { Ok(0) } else { self.extent_or(name, default) }
    }

    /// A list of so many numbers above 0.
    pub fn numbers(&self, name: &str, count: usize) -> Result<Vec<f64>> {
        let value = &self.json[name];
        let number = |value: &Value| value.as_f64().filter(|number| *number > 0.0);
        let numbers: Option<Vec<f64>> =
            value.as_array().and_then(|values| values.iter().map(number).collect());
        numbers.filter(|numbers| numbers.len() == count).ok_or_else(|| {
            let got = value.as_array().map_or(value.to_string(), |values| format!("{} values", values.len()));
            self.error(format!("{name}: expected {count} numbers above 0, got {got}"))
        })
    }
}

/// Reads a JSON file, as Python writes it: `NaN` and `Infinity` are read as null.
///
/// # Errors
/// [`Error::Input`] naming the file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|error| Error::input(path.display().to_string(), error))?;
    serde_json::from_slice(&without_nan(&text))
        .map_err(|error| Error::input(path.display().to_string(), error))
}

/// The same text with null for numbers that JSON has not, outside of strings.
fn without_nan(text: &[u8]) -> Vec<u8> {
    let (mut out, mut rest, mut in_string) = (Vec::with_capacity(text.len()), text, false);
    while let Some(&byte) = rest.first() {
        let name = [&b"NaN"[..], b"Infinity", b"-Infinity"].into_iter().find(|name| rest.starts_with(name));
        let len = match name {
            Some(name) if !in_string => {
                out.extend_from_slice(b"null");
                name.len()
            }
            // What follows a backslash ends no string.
            _ if in_string && byte == b'\\' => {
                out.extend_from_slice(&rest[..rest.len().min(2)]);
                rest.len().min(2)
            }
            _ => {
                in_string ^= byte == b'"';
                out.push(byte);
                1
            }
        };
        rest = &rest[len..];
    }
    out
}
