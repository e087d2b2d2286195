//! The container of a GGUF file: metadata by key, and which tensor lies where. Everything it claims is checked against the file.
//!
//! The format is that of `ggml/docs/gguf.md`, versions 2 and 3, little endian. Nothing is allocated for a count or a length before the file is known
//! to have room for as much, so the work is bounded by the file's size. Deliberately absent: what keys and tensors mean.

use super::super::dtype::Dtype;
use super::super::error::{ImportError, clip};
use super::super::header::{Element, Entry};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Most elements of a list; the largest lists are those of a tokenizer.
const MAX_LIST: u64 = 1 << 24;

/// Most axes of a tensor.
const MAX_AXES: u32 = 4;

/// What a key holds.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Value {
    /// A whole number of any width, from 0.
    Unsigned(u64),
    /// A whole number of any signed width.
    Signed(i64),
    /// A float of any width.
    Float(f64),
    /// Yes or no.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Numbers of any type, as f64.
    Numbers(Vec<f64>),
}

impl Value {
    /// In words, short enough for an error message.
    pub(crate) fn describe(&self) -> String {
        match self {
            Value::Unsigned(value) => value.to_string(),
            Value::Signed(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::Text(text) => format!("\"{}\"", clip(text)),
            Value::Texts(texts) => format!("a list of {} texts", texts.len()),
            Value::Numbers(numbers) => format!("a list of {} numbers", numbers.len()),
        }
    }
}

/// What a GGUF file says of itself.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) metadata: BTreeMap<String, Value>,
    /// In the file's order; each inside the file and of the size of its shape.
    pub(crate) entries: Vec<Entry>,
    /// Hash of all bytes before the tensors' data.
    pub(crate) hash: [u8; 32],
}

impl Container {
    /// Reads the metadata and tensor list of a whole file. `path` is only for messages.
    pub(crate) fn parse(file: &[u8], path: &Path) -> Result<Container, ImportError> {
        let mut reader = Reader { file, at: 0, path };
        if reader.file.get(..4) != Some(b"GGUF") {
            return Err(reader.bad("not a GGUF file: it does not begin with \"GGUF\""));
        }
        reader.at = 4;
        match reader.u32("the version")? {
            2 | 3 => {}
            1 => return Err(reader.bad("GGUF version 1, of the first weeks of the format; convert the model again")),
            version if version.swap_bytes() <= 3 => {
                return Err(reader.bad("a big-endian GGUF file; moec reads little-endian ones"));
            }
            version => return Err(reader.bad(format!("GGUF version {version}; moec reads versions 2 and 3"))),
        }
        let tensors = reader.count("tensors", 24, u64::MAX)?;
        let keys = reader.count("metadata keys", 13, u64::MAX)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = reader.text("a key")?;
            let kind = reader.u32(&key)?;
            let value = reader.value(&key, kind)?;
            if metadata.contains_key(&key) {
                return Err(reader.bad(format!("damaged: the key `{}` is there twice", clip(&key))));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(&Value::Unsigned(n)) if n.is_power_of_two() && (8..=1 << 20).contains(&n) => n as usize,
            Some(other) => {
                return Err(ImportError::Key {
                    path: path.into(),
                    key: "general.alignment".into(),
                    expected: "a power of two from 8 to 1048576".into(),
                    found: other.describe(),
                });
            }
        };
        let mut claims = Vec::with_capacity(tensors);
        for _ in 0..tensors {
            claims.push(reader.claim()?);
        }
        let start = reader.at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
        let hash = *blake3::hash(&file[..reader.at]).as_bytes();
        let mut names = HashSet::with_capacity(claims.len());
        let mut entries = Vec::with_capacity(claims.len());
        for claim in claims {
            if !names.insert(claim.name.clone()) {
                return Err(reader.bad(format!("damaged: tensor `{}` is there twice", clip(&claim.name))));
            }
            entries.push(claim.check(start, alignment, file.len(), path)?);
        }
        Ok(Container { metadata, entries, hash })
    }
}

/// What the file says of a tensor.
struct Claim {
    name: String,
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

impl Claim {
    fn check(self, start: usize, alignment: usize, file: usize, path: &Path) -> Result<Entry, ImportError> {
        let wrong = |expected: String, found: String| Err(ImportError::tensor(path, &self.name, expected, found));
        let Some(dtype) = dtype(self.kind) else {
            // Of a type whose blocks are unknown nothing but the start can be checked, and nothing is read.
            let element = Element::Other(kind_name(self.kind));
            return Ok(Entry { name: self.name, element, shape: self.shape, offset: start, bytes: 0 });
        };
        let (block, _) = dtype.block().expect("types of GGUF files have blocks");
        let columns = self.shape.last().copied().unwrap_or(0);
        if !columns.is_multiple_of(block) {
            return wrong(format!("rows of whole blocks of {block}, as its type is {dtype}"), format!("{columns}"));
        }
        let elements = self.shape.iter().try_fold(1usize, |product, &length| product.checked_mul(length));
        let Some(bytes) = elements.and_then(|elements| dtype.bytes(elements)) else {
            let found = format!("{:?} of {dtype}, whose size in bytes is not a number", self.shape);
            return wrong("a shape that can be stored".into(), found);
        };
        let offset = usize::try_from(self.offset).ok().and_then(|offset| offset.checked_add(start));
        match offset.and_then(|offset| offset.checked_add(bytes)) {
            Some(end) if end <= file => {}
            _ => {
                let found = format!(
                    "a start at byte {} of the data, and a file of {file} bytes: it is truncated (download it again) or damaged",
                    self.offset
                );
                return wrong(format!("{bytes} bytes inside the file"), found);
            }
        }
        if !self.offset.is_multiple_of(alignment as u64) {
            let found = format!("byte {} of the data", self.offset);
            return wrong(format!("to start at a multiple of {alignment} (general.alignment)"), found);
        }
        let offset = offset.expect("inside the file");
        Ok(Entry { name: self.name, element: Element::Known(dtype), shape: self.shape, offset, bytes })
    }
}

/// The type of a tensor by its number in the file.
fn dtype(kind: u32) -> Option<Dtype> {
    Some(match kind {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Q4_0,
        3 => Dtype::Q4_1,
        6 => Dtype::Q5_0,
        7 => Dtype::Q5_1,
        8 => Dtype::Q8_0,
        10 => Dtype::Q2K,
        11 => Dtype::Q3K,
        12 => Dtype::Q4K,
        13 => Dtype::Q5K,
        14 => Dtype::Q6K,
        20 => Dtype::Iq4Nl,
        23 => Dtype::Iq4Xs,
        30 => Dtype::Bf16,
        39 => Dtype::Mxfp4,
        _ => return None,
    })
}

/// The name of a type that is not read.
fn kind_name(kind: u32) -> String {
    let known = match kind {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        other => return format!("type {other}"),
    };
    known.into()
}

/// A place in the file.
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    fn bad(&self, what: impl Into<String>) -> ImportError {
        ImportError::header(self.path, what)
    }

    fn rest(&self) -> &'a [u8] {
        &self.file[self.at..]
    }

    fn take(&mut self, length: u64, what: &str) -> Result<&'a [u8], ImportError> {
        let taken = usize::try_from(length).ok().and_then(|length| self.rest().get(..length));
        let Some(taken) = taken else {
            return Err(self.bad(format!(
                "truncated or damaged: `{}` would need {length} bytes from byte {} on, and the file has {}; download it again",
                clip(what),
                self.at,
                self.file.len()
            )));
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ImportError> {
        let taken = self.take(N as u64, what)?;
        Ok(*taken.first_chunk().expect("as many as were asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, ImportError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ImportError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things of which each takes `least` bytes or more.
    fn count(&mut self, what: &str, least: u64, limit: u64) -> Result<usize, ImportError> {
        let count = self.u64(what)?;
        if count > limit {
            return Err(self.bad(format!("`{}` has {count} elements; moec reads lists of up to {limit}", clip(what))));
        }
        let room = self.rest().len() as u64;
        if count.checked_mul(least).is_none_or(|bytes| bytes > room) {
            return Err(self.bad(format!(
                "truncated or damaged: `{}` has {count} elements, for which the file's remaining {room} bytes are too few",
                clip(what)
            )));
        }
        Ok(count as usize)
    }

    fn text(&mut self, what: &str) -> Result<String, ImportError> {
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.into()),
            Err(_) => Err(self.bad(format!("damaged: the text of `{}` is not UTF-8", clip(what)))),
        }
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, ImportError> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array::<1>(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => {
                    return Err(self.bad(format!("damaged: `{}` is neither true nor false but {other}", clip(key))));
                }
            },
            8 => Value::Text(self.text(key)?),
            9 => return self.list(key),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => {
                return Err(
                    self.bad(format!("damaged: `{}` has a value of type {other}, which there is not", clip(key)))
                );
            }
        })
    }

    fn list(&mut self, key: &str) -> Result<Value, ImportError> {
        let kind = self.u32(key)?;
        if kind == 8 {
            let count = self.count(key, 8, MAX_LIST)?;
            let mut texts = Vec::with_capacity(count);
            for _ in 0..count {
                texts.push(self.text(key)?);
            }
            return Ok(Value::Texts(texts));
        }
        let bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            other => {
                return Err(self.bad(format!("`{}` is a list of type {other}, which moec does not read", clip(key))));
            }
        };
        let count = self.count(key, bytes, MAX_LIST)?;
        let mut numbers = Vec::with_capacity(count);
        for _ in 0..count {
            numbers.push(match self.value(key, kind)? {
                Value::Unsigned(number) => number as f64,
                Value::Signed(number) => number as f64,
                Value::Float(number) => number,
                Value::Bool(yes) => f64::from(u8::from(yes)),
                Value::Text(_) | Value::Texts(_) | Value::Numbers(_) => unreachable!("a list of numbers"),
            });
        }
        Ok(Value::Numbers(numbers))
    }

    fn claim(&mut self) -> Result<Claim, ImportError> {
        let name = self.text("a tensor's name")?;
        let axes = self.u32(&name)?;
        if axes == 0 || axes > MAX_AXES {
            return Err(ImportError::tensor(self.path, &name, format!("1 to {MAX_AXES} axes"), axes.to_string()));
        }
        let mut shape = Vec::with_capacity(axes as usize);
        for _ in 0..axes {
            let length = self.u64(&name)?;
            match usize::try_from(length) {
                Ok(length) if length > 0 => shape.push(length),
                _ => return Err(ImportError::tensor(self.path, &name, "axes of at least 1", length.to_string())),
            }
        }
        // The fastest axis comes first in the file.
        shape.reverse();
        let kind = self.u32(&name)?;
        let offset = self.u64(&name)?;
        Ok(Claim { name, shape, kind, offset })
    }
}
