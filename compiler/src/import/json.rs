//! Reading JSON files whose every value may be absent, null or of the wrong type.
//!
//! The getters tell absent from null, because model configurations give the two different meanings.
//! Deliberately absent: what the keys mean.

use super::error::{ImportError, clip};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::Path;

/// No JSON file of a model is longer than this many bytes; the largest tokenizers have about 40 MB.
const LIMIT: u64 = 512 << 20;

/// The bytes of a file, or `None` if there is none. Only regular files are read.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, ImportError> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ImportError::read(path, error)),
    };
    if !metadata.is_file() {
        return Err(ImportError::path(path, "expected a regular file"));
    }
    if metadata.len() > LIMIT {
        let what = format!("expected at most {} MiB, found {} bytes", LIMIT >> 20, metadata.len());
        return Err(ImportError::path(path, what));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    File::open(path)
        .and_then(|file| file.take(LIMIT).read_to_end(&mut bytes))
        .map_err(|error| ImportError::read(path, error))?;
    Ok(Some(bytes))
}

/// The object that a JSON file holds.
pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Map<String, Value>, ImportError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(ImportError::Key {
            path: path.into(),
            key: "the file".into(),
            expected: "a JSON object".into(),
            found: describe(&other),
        }),
        Err(source) => Err(ImportError::Json { path: path.into(), source }),
    }
}

/// A value in words, short enough for an error message.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => quote(value),
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::Object(_) => "an object".into(),
    }
}

/// A text in quotes, short enough for an error message.
pub(crate) fn quote(text: &str) -> String {
    format!("\"{}\"", clip(text))
}

/// What a key holds.
pub(crate) enum Field<T> {
    Absent,
    Null,
    Value(T),
}

impl<T> Field<T> {
    /// The value, if there is one.
    pub(crate) fn some(self) -> Option<T> {
        match self {
            Field::Absent | Field::Null => None,
            Field::Value(value) => Some(value),
        }
    }
}

/// A JSON object, and where it came from.
#[derive(Clone, Copy)]
pub(crate) struct Object<'a> {
    pub(crate) path: &'a Path,
    /// Keys that lead to this object, each followed by a dot.
    pub(crate) prefix: &'a str,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    pub(crate) fn field(self, key: &str) -> Field<&'a Value> {
        match self.map.get(key) {
            None => Field::Absent,
            Some(Value::Null) => Field::Null,
            Some(value) => Field::Value(value),
        }
    }

    pub(crate) fn wrong(self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> ImportError {
        ImportError::Key {
            path: self.path.into(),
            key: format!("{}{}", self.prefix, clip(key)),
            expected: expected.into(),
            found: found.into(),
        }
    }

    pub(crate) fn unsupported(self, key: &str, found: impl Into<String>, supported: impl Into<String>) -> ImportError {
        ImportError::Unsupported {
            path: self.path.into(),
            key: format!("{}{}", self.prefix, clip(key)),
            found: found.into(),
            supported: supported.into(),
        }
    }

    fn typed<T>(
        self,
        key: &str,
        expected: impl Into<String>,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Field<T>, ImportError> {
        match self.field(key) {
            Field::Absent => Ok(Field::Absent),
            Field::Null => Ok(Field::Null),
            Field::Value(value) => {
                get(value).map(Field::Value).ok_or_else(|| self.wrong(key, expected, describe(value)))
            }
        }
    }

    /// A whole number in `range`.
    pub(crate) fn integer(self, key: &str, range: RangeInclusive<usize>) -> Result<Field<usize>, ImportError> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.typed(key, expected, |value| {
            let value = usize::try_from(value.as_u64()?).ok()?;
            range.contains(&value).then_some(value)
        })
    }

    /// A whole number in `range` which may be absent, but not null.
    pub(crate) fn size(self, key: &str, default: usize, range: RangeInclusive<usize>) -> Result<usize, ImportError> {
        match self.integer(key, range.clone())? {
            Field::Absent => Ok(default),
            Field::Null => {
                Err(self.wrong(key, format!("a whole number from {} to {}", range.start(), range.end()), "null"))
            }
            Field::Value(value) => Ok(value),
        }
    }

    /// A number above 0 and at most `max`.
    pub(crate) fn positive(self, key: &str, max: f64) -> Result<Field<f64>, ImportError> {
        self.typed(key, format!("a number above 0 and at most {max:e}"), |value| {
            value.as_f64().filter(|value| *value > 0.0 && *value <= max)
        })
    }

    /// A number from 0 to `max`.
    pub(crate) fn not_negative(self, key: &str, max: f64) -> Result<Field<f64>, ImportError> {
        self.typed(key, format!("a number from 0 to {max:e}"), |value| {
            value.as_f64().filter(|value| (0.0..=max).contains(value))
        })
    }

    pub(crate) fn boolean(self, key: &str) -> Result<Field<bool>, ImportError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn string(self, key: &str) -> Result<Field<&'a str>, ImportError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn list(self, key: &str) -> Result<Field<&'a Vec<Value>>, ImportError> {
        self.typed(key, "a list", Value::as_array)
    }

    pub(crate) fn object(self, key: &str) -> Result<Field<&'a Map<String, Value>>, ImportError> {
        self.typed(key, "an object", Value::as_object)
    }
}
