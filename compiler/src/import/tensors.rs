//! The stored weights under moec's names: their types and shapes, their bytes, their values as f32.
//!
//! Every weight that the configuration needs was found and checked before a table exists, so reading cannot fail.
//! All methods take `&self` and may be called from many threads. Deliberately absent: conversion to packed layouts.

use super::config::ModelConfig;
use super::error::{ImportError, clip};
use super::header::Entry;
use super::names::{self, Slot};
use super::shards::{self, Files, Shard, ShardIdentity};
use half::slice::HalfFloatSliceExt;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// How the elements of a stored weight are kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }

    /// The name used in dumps and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What is known of a weight without reading it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo {
    /// The type all elements fit in exactly: the stored one, or f32 where the pieces (experts) differ.
    pub dtype: Dtype,
    /// `[n]` for norms, `[rows, cols]` for matrices, `[experts, rows, cols]` for experts.
    pub shape: Vec<usize>,
}

/// Rows of a weight as they are stored, little endian and not aligned to anything.
#[derive(Clone, Copy, Debug)]
pub struct RawRows<'a> {
    /// The type of these elements.
    pub dtype: Dtype,
    /// Row after row, without padding.
    pub bytes: &'a [u8],
}

/// Every weight of a model, in files that stay mapped as long as the table lives.
///
/// Rows are addressed by weight, expert (0 for weights that are no experts) and row (a norm is one row).
/// Unknown names and rows out of range are bugs of the caller and panic.
#[derive(Debug)]
pub struct TensorTable {
    shards: Vec<Shard>,
    weights: Vec<Weight>,
    by_name: HashMap<String, usize>,
    parameters: u64,
}

#[derive(Debug)]
struct Weight {
    name: String,
    info: TensorInfo,
    rows: usize,
    cols: usize,
    pieces: Vec<Piece>,
}

/// The matrix of one expert (or the only one), inside a file.
#[derive(Debug)]
struct Piece {
    shard: usize,
    offset: usize,
    dtype: Dtype,
}

impl TensorTable {
    /// Maps the weight files of a directory and checks that they hold just what the configuration needs.
    ///
    /// # Errors
    /// A file that is missing or damaged; a tensor that is missing, foreign, of another shape or of a type other than f32, bf16, f16.
    pub fn open(directory: &Path, config: &ModelConfig) -> Result<TensorTable, ImportError> {
        let Files { shards, tensors } = shards::open(directory)?;
        let by_name: HashMap<&str, usize> =
            tensors.iter().enumerate().map(|(number, (_, entry))| (entry.name.as_str(), number)).collect();
        let mut finder = Finder::new(&shards, &tensors, &by_name);
        let mut weights = Vec::new();
        names::for_each_slot(
            config,
            |name| by_name.contains_key(name),
            |slot| {
                weights.extend(finder.take(slot)?);
                Ok::<(), ImportError>(())
            },
        )?;
        finder.finish(directory, config)?;
        let parameters = finder.parameters;
        let by_name = weights.iter().enumerate().map(|(number, weight)| (weight.name.clone(), number)).collect();
        Ok(TensorTable { shards, weights, by_name, parameters })
    }

    /// Names of all weights, in the order in which a step reads them. `output` is always there, also when it is the embedding.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.iter().map(|weight| weight.name.as_str())
    }

    /// Type and shape of a weight.
    pub fn info(&self, name: &str) -> &TensorInfo {
        &self.weight(name).info
    }

    /// Number of parameters; a tied output counts once.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Whether the output projection is the embedding's tensor.
    pub fn is_tied(&self) -> bool {
        let start = |name: &str| {
            let piece = &self.weight(name).pieces[0];
            (piece.shard, piece.offset)
        };
        start("embed") == start("output")
    }

    /// What tells this state of the weight files from any other.
    pub fn identities(&self) -> impl Iterator<Item = &ShardIdentity> {
        self.shards.iter().map(|shard| &shard.identity)
    }

    /// Reads rows as f32, exactly. `out` has `rows.len() × cols` elements.
    pub fn read_rows(&self, name: &str, expert: usize, rows: Range<usize>, out: &mut [f32]) {
        let raw = self.raw(name, expert, rows);
        assert_eq!(out.len() * raw.dtype.bytes(), raw.bytes.len(), "reading `{name}` into a buffer of another size");
        widen(raw, out);
    }

    /// Rows as they are stored.
    pub fn raw(&self, name: &str, expert: usize, rows: Range<usize>) -> RawRows<'_> {
        let (shard, range, dtype) = self.locate(name, expert, rows);
        RawRows { dtype, bytes: shard.bytes(range) }
    }

    /// Gives the memory of rows that were read back to the system, so that a walk over a model larger than memory stays small.
    /// They can be read again.
    pub fn release(&self, name: &str, expert: usize, rows: Range<usize>) {
        let (shard, range, _) = self.locate(name, expert, rows);
        shard.release(range);
    }

    /// Asks the system to start reading rows from disk.
    pub fn prefetch(&self, name: &str, expert: usize, rows: Range<usize>) {
        let (shard, range, _) = self.locate(name, expert, rows);
        shard.prefetch(range);
    }

    fn weight(&self, name: &str) -> &Weight {
        match self.by_name.get(name) {
            Some(&number) => &self.weights[number],
            None => panic!("the model has no weight `{name}`"),
        }
    }

    fn locate(&self, name: &str, expert: usize, rows: Range<usize>) -> (&Shard, Range<usize>, Dtype) {
        let weight = self.weight(name);
        assert!(
            rows.start <= rows.end && rows.end <= weight.rows && expert < weight.pieces.len(),
            "rows {rows:?} of expert {expert} of `{name}`, which has {} × {} rows",
            weight.pieces.len(),
            weight.rows
        );
        let piece = &weight.pieces[expert];
        let stride = weight.cols * piece.dtype.bytes();
        let range = piece.offset + rows.start * stride..piece.offset + rows.end * stride;
        (&self.shards[piece.shard], range, piece.dtype)
    }
}

/// Converts stored elements to f32. Every value of the narrow types is one.
fn widen(raw: RawRows, out: &mut [f32]) {
    const CHUNK: usize = 1024;
    match raw.dtype {
        Dtype::F32 => {
            for (value, bytes) in out.iter_mut().zip(raw.bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::Bf16 => {
            for (value, bytes) in out.iter_mut().zip(raw.bytes.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Dtype::F16 => {
            let mut aligned = [half::f16::ZERO; CHUNK];
            for (values, bytes) in out.chunks_mut(CHUNK).zip(raw.bytes.chunks(2 * CHUNK)) {
                let aligned = &mut aligned[..values.len()];
                for (value, bytes) in aligned.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = half::f16::from_le_bytes(*bytes);
                }
                aligned.convert_to_f32_slice(values);
            }
        }
    }
}

/// Matches what is stored with what is needed.
struct Finder<'a> {
    shards: &'a [Shard],
    entries: &'a [(usize, Entry)],
    by_name: &'a HashMap<&'a str, usize>,
    used: Vec<bool>,
    parameters: u64,
    /// The first missing tensor, its shape, and how many are missing.
    missing: Option<(String, Vec<usize>, usize)>,
}

impl<'a> Finder<'a> {
    fn new(shards: &'a [Shard], entries: &'a [(usize, Entry)], by_name: &'a HashMap<&'a str, usize>) -> Finder<'a> {
        Finder { shards, entries, by_name, used: vec![false; entries.len()], parameters: 0, missing: None }
    }

    /// The weight of a slot; `None` if a part is missing, which [`Finder::finish`] reports.
    fn take(&mut self, slot: Slot) -> Result<Option<Weight>, ImportError> {
        let mut pieces = Vec::with_capacity(slot.parts.len());
        for part in slot.parts {
            let Some(&number) = self.by_name.get(part.stored.as_str()) else {
                self.missing.get_or_insert((part.stored, part.stored_shape, 0)).2 += 1;
                continue;
            };
            let (shard, entry) = &self.entries[number];
            let path = &self.shards[*shard].path;
            if entry.shape != part.stored_shape {
                let (expected, found) = (format!("shape {:?}", part.stored_shape), format!("{:?}", entry.shape));
                return Err(ImportError::tensor(path, &part.stored, expected, found));
            }
            let dtype = match entry.dtype {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::BF16 => Dtype::Bf16,
                safetensors::Dtype::F16 => Dtype::F16,
                other => {
                    let expected = "elements of type F32, BF16 or F16";
                    return Err(ImportError::tensor(path, &part.stored, expected, other.to_string()));
                }
            };
            if !std::mem::replace(&mut self.used[number], true) {
                self.parameters += (entry.bytes / dtype.bytes()) as u64;
            }
            pieces.push(Piece { shard: *shard, offset: entry.offset + part.skip * dtype.bytes(), dtype });
        }
        let (&cols, rows) = slot.shape.split_last().expect("a weight has at least one dimension");
        let rows = rows.last().copied().unwrap_or(1);
        let Some(first) = pieces.first().map(|piece| piece.dtype) else { return Ok(None) };
        let dtype = if pieces.iter().all(|piece| piece.dtype == first) { first } else { Dtype::F32 };
        let info = TensorInfo { dtype, shape: slot.shape };
        Ok(Some(Weight { name: slot.weight, info, rows, cols, pieces }))
    }

    fn finish(&self, directory: &Path, config: &ModelConfig) -> Result<(), ImportError> {
        if let Some((tensor, shape, count)) = &self.missing {
            let why = if tensor == "lm_head.weight" { " (`tie_word_embeddings` is false)" } else { "" };
            let path = if let [shard] = self.shards { &shard.path } else { directory };
            return Err(ImportError::Missing {
                path: path.into(),
                tensor: clip(tensor),
                expected: format!("shape {shape:?}{why}"),
                others: count - 1,
            });
        }
        let mut extra =
            self.entries.iter().zip(&self.used).filter(|((_, entry), used)| !**used && !names::is_ignored(&entry.name));
        if let Some(((shard, entry), _)) = extra.next() {
            return Err(ImportError::Extra {
                path: self.shards[*shard].path.clone(),
                tensor: clip(&entry.name),
                expected: describe(config),
                others: extra.count(),
            });
        }
        Ok(())
    }
}

fn describe(config: &ModelConfig) -> String {
    let experts = config.experts.map_or_else(String::new, |experts| format!(" and {} experts", experts.count));
    format!("a {} with {} layers{experts}", config.architecture, config.layers)
}
