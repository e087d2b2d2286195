//! The header of a safetensors file: which tensor lies where. Everything it claims is checked against the file.
//!
//! The `safetensors` crate checks the same, but its errors do not name the tensor, and of two tensors with one name it
//! keeps one. Deliberately absent: which tensors a model needs ([`super::names`]).

use super::dtype::Dtype;
use super::error::{ImportError, clip};
use safetensors::tensor::TensorInfo;
use serde::de::{Error, MapAccess, Visitor};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Longest header that is read, the limit of the format's own library.
const LIMIT: u64 = 100_000_000;

/// What the elements of a stored tensor are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Element {
    /// A type that weights may have.
    Known(Dtype),
    /// Another, by the name that its file format gives it.
    Other(String),
}

impl From<safetensors::Dtype> for Element {
    fn from(dtype: safetensors::Dtype) -> Element {
        match dtype {
            safetensors::Dtype::F32 => Element::Known(Dtype::F32),
            safetensors::Dtype::BF16 => Element::Known(Dtype::Bf16),
            safetensors::Dtype::F16 => Element::Known(Dtype::F16),
            safetensors::Dtype::F8_E4M3 => Element::Known(Dtype::Fp8),
            other => Element::Other(other.to_string()),
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Element::Known(dtype) => f.write_str(dtype.name()),
            Element::Other(name) => f.write_str(name),
        }
    }
}

/// One tensor of a file.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) element: Element,
    pub(crate) shape: Vec<usize>,
    /// Bytes from the start of the file; not aligned to anything.
    pub(crate) offset: usize,
    /// Size in bytes: that of the shape and the type, and inside the file. 0 for a type of which it is not known.
    pub(crate) bytes: usize,
}

/// What a safetensors file says of itself.
#[derive(Debug)]
pub(crate) struct Header {
    /// In order of offset; together they cover the file after the header, without overlap.
    pub(crate) entries: Vec<Entry>,
    /// Hash of the header's bytes, its length included.
    pub(crate) hash: [u8; 32],
}

impl Header {
    /// Reads the header of a whole file. `path` is only for messages.
    pub(crate) fn parse(file: &[u8], path: &Path) -> Result<Header, ImportError> {
        let bad = |what: String| ImportError::header(path, what);
        let Some((length, rest)) = file.split_first_chunk::<8>() else {
            return Err(bad(format!("not a safetensors file, or truncated: it has {} bytes", file.len())));
        };
        let length = u64::from_le_bytes(*length);
        if length > LIMIT {
            return Err(bad(format!(
                "not a safetensors file: its header would have {length} bytes, and none has over {LIMIT}"
            )));
        }
        let length = length as usize;
        let Some((text, data)) = rest.split_at_checked(length) else {
            return Err(bad(format!(
                "truncated: the header should have {length} bytes, and {} are there; download it again",
                rest.len()
            )));
        };
        let claims: Claims = serde_json::from_slice(text)
            .map_err(|error| bad(format!("not a safetensors file, or damaged: its header is unsound: {error}")))?;
        let mut entries = Vec::with_capacity(claims.0.len());
        for (name, claim) in claims.0 {
            entries.push(check(name, claim, 8 + length, data.len(), path)?);
        }
        entries.sort_by_key(|entry| (entry.offset, entry.bytes));
        let mut position = 8 + length;
        for entry in &entries {
            if entry.offset != position {
                let what = if entry.offset < position { "overlapping the one before" } else { "behind a gap" };
                return Err(ImportError::tensor(
                    path,
                    &entry.name,
                    format!("to start at byte {position} of the file, where the one before ends"),
                    format!("a start at byte {}, {what}", entry.offset),
                ));
            }
            position += entry.bytes;
        }
        if position != file.len() {
            return Err(bad(format!(
                "damaged: its tensors end at byte {position}, but it has {} bytes; download it again",
                file.len()
            )));
        }
        let hash = *blake3::hash(&file[..8 + length]).as_bytes();
        Ok(Header { entries, hash })
    }
}

/// What the header says of each tensor, in its own order; every name once.
struct Claims(Vec<(String, TensorInfo)>);

impl<'de> serde::Deserialize<'de> for Claims {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Claims, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Claims;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Claims, A::Error> {
                let mut claims = Vec::new();
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<Option<BTreeMap<String, String>>>()
                            .map_err(|error| A::Error::custom(format!("`__metadata__`: {error}")))?;
                        continue;
                    }
                    let info = map.next_value::<TensorInfo>().map_err(|error| {
                        A::Error::custom(format!("tensor `{}`: {}", clip(&name), clip(&error.to_string())))
                    })?;
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("tensor `{}` is there twice", clip(&name))));
                    }
                    claims.push((name, info));
                }
                Ok(Claims(claims))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// Checks that one tensor's bytes are those of its shape, and in the file. `start` is where the data starts.
fn check(name: String, claim: TensorInfo, start: usize, data: usize, path: &Path) -> Result<Entry, ImportError> {
    let wrong = |expected: String, found: String| Err(ImportError::tensor(path, &name, expected, found));
    let (begin, end) = claim.data_offsets;
    if end < begin {
        return wrong("offsets in order".into(), format!("an end ({end}) before its start ({begin})"));
    }
    if end > data {
        return wrong(
            format!("bytes {begin}..{end} of the data"),
            format!("only {data} bytes of data: the file is truncated (download it again) or its header is damaged"),
        );
    }
    let bits = claim
        .shape
        .iter()
        .try_fold(claim.dtype.bitsize(), |product, &length| product.checked_mul(length))
        .filter(|bits| bits.is_multiple_of(8));
    match bits {
        Some(bits) if bits / 8 == end - begin => {
            Ok(Entry { element: claim.dtype.into(), shape: claim.shape, offset: start + begin, bytes: bits / 8, name })
        }
        Some(bits) => wrong(
            format!("{} bytes, as its shape is {:?} of {}", bits / 8, claim.shape, claim.dtype),
            format!("{} bytes", end - begin),
        ),
        None => wrong(
            "a shape that can be stored".into(),
            format!("{:?} of {}, whose size in bytes is not a number", claim.shape, claim.dtype),
        ),
    }
}
