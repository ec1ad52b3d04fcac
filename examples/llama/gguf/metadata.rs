//! Typed access to a GGUF file's metadata, with errors that name file and field.

use super::super::error::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;
use std::path::Path;

/// The key-value pairs of a header.
pub struct Metadata<'a> {
    pub path: &'a Path,
    pub values: &'a HashMap<String, Value>,
}

impl<'a> Metadata<'a> {
    pub fn error(&self, reason: String) -> Error {
        Error::input(self.path.display().to_string(), reason)
    }

    pub fn missing(&self, key: &str) -> Error {
        self.error(format!("{key}: missing"))
    }

    /// The error for a value that is not what was expected.
    pub fn unexpected(&self, key: &str, expected: &str) -> Error {
        let got = match self.values.get(key) {
            Some(Value::Array(values)) => format!("an array of {}", values.len()),
            Some(Value::String(text)) => format!("{text:?}"),
            Some(value) => format!("{value:?}"),
            None => "none".into(),
        };
        self.error(format!("{key}: expected {expected}, got {got}"))
    }

    pub fn architecture(&self) -> Result<&'a str> {
        let key = "general.architecture";
        self.text(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.unexpected(key, "a string")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.unexpected(key, "true or false")),
        }
    }

    /// A whole number, 0 or more.
    pub fn whole(&self, key: &str) -> Result<Option<u64>> {
        let number = |value| whole(value).ok_or_else(|| self.unexpected(key, "a whole number"));
        self.values.get(key).map(number).transpose()
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::F32(number)) => Ok(Some(f64::from(*number))),
            Some(Value::F64(number)) => Ok(Some(*number)),
            Some(value) => match whole(value) {
                Some(number) => Ok(Some(number as f64)),
                None => Err(self.unexpected(key, "a number")),
            },
        }
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let text =
            |value: &'a Value| if let Value::String(text) = value { Some(text.as_str()) } else { None };
        self.array(key, "an array of strings", text)
    }

    pub fn wholes(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.array(key, "an array of whole numbers", whole)
    }

    fn array<T>(
        &self,
        key: &str,
        expected: &str,
        element: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let elements = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::Array(values)) => values.iter().map(element).collect::<Option<Vec<T>>>(),
            Some(_) => None,
        };
        elements.map(Some).ok_or_else(|| self.unexpected(key, expected))
    }
}

fn whole(value: &Value) -> Option<u64> {
    match *value {
        Value::U8(number) => Some(number.into()),
        Value::U16(number) => Some(number.into()),
        Value::U32(number) => Some(number.into()),
        Value::U64(number) => Some(number),
        Value::I8(number) => number.try_into().ok(),
        Value::I16(number) => number.try_into().ok(),
        Value::I32(number) => number.try_into().ok(),
        Value::I64(number) => number.try_into().ok(),
        _ => None,
    }
}
