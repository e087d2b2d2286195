//! The stored weights under moec's names: their types and shapes, their bytes, their values as f32.
//!
//! Every weight that the configuration needs was found and checked before a table exists, so reading cannot fail.
//! All methods take `&self` and may be called from many threads. Deliberately absent: conversion to packed layouts.

use super::config::ModelConfig;
use super::dequantize;
use super::dequantize::codes::{self, CodedRows};
use super::dtype::Dtype;
use super::error::{ImportError, clip};
use super::header::{Element, Entry};
use super::names::{self, HeadOrder, Naming, Part, Slot};
use super::packed::{self, Packed, Packing, Stored};
use super::shards::{self, Files, Shard, ShardIdentity};
use moec_ir::graph::Layout;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// What is known of a weight without reading it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo {
    /// The type all elements fit in exactly: the stored one, or f32 where the pieces (experts) differ.
    pub dtype: Dtype,
    /// The layout that holds its codes and scales as they are; `None` when there is none, and for weights of floats.
    pub exact: Option<Layout>,
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

/// The matrix of one expert (or the only one).
#[derive(Debug)]
enum Piece {
    /// Rows of blocks inside a file.
    Blocks(Blocks),
    /// Codes and scales in several tensors.
    Packed(Packed),
}

#[derive(Debug)]
struct Blocks {
    shard: usize,
    /// Of its first row.
    offset: usize,
    dtype: Dtype,
    /// In which order the rows of a head lie, if it is not that of moec.
    order: Option<HeadOrder>,
    /// Whether 1 is to be added to what is stored.
    less_one: bool,
}

impl TensorTable {
    /// Maps the weight files of a directory and checks that they hold just what the configuration needs.
    ///
    /// # Errors
    /// A file that is missing or damaged; a tensor that is missing, foreign, of another shape or of a type that is not supported.
    pub fn open(directory: &Path, config: &ModelConfig) -> Result<TensorTable, ImportError> {
        TensorTable::new(shards::open(directory)?, config, Naming::HuggingFace, directory)
    }

    /// Finds the weights of `config` in files. `place` is only for messages.
    pub(crate) fn new(
        files: Files,
        config: &ModelConfig,
        naming: Naming,
        place: &Path,
    ) -> Result<TensorTable, ImportError> {
        let Files { shards, tensors } = files;
        let by_name: HashMap<&str, usize> =
            tensors.iter().enumerate().map(|(number, (_, entry))| (entry.name.as_str(), number)).collect();
        let mut finder = Finder::new(&shards, &tensors, &by_name, naming, config.packing);
        let mut weights = Vec::new();
        let stored = Tensors { entries: &tensors, by_name: &by_name };
        let shape_of = |name: &str| match (stored.get(name), config.packing) {
            (Some((_, entry)), _) => Some(entry.shape.clone()),
            (None, Some(packing)) => packed::shape(&stored, packing, name),
            (None, None) => None,
        };
        names::for_each_slot(config, naming, &shape_of, |slot| {
            weights.extend(finder.take(slot)?);
            Ok::<(), ImportError>(())
        })?;
        finder.finish(place, config)?;
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
            match piece {
                Piece::Blocks(blocks) => (blocks.shard, blocks.offset),
                Piece::Packed(packed) => {
                    let (shard, range) = packed.stretch(0..0);
                    (shard, range.start)
                }
            }
        };
        start("embed") == start("output")
    }

    /// What tells this state of the weight files from any other.
    pub fn identities(&self) -> impl Iterator<Item = &ShardIdentity> {
        self.shards.iter().map(|shard| &shard.identity)
    }

    /// Reads rows as f32, exactly. `out` has `rows.len() × cols` elements.
    pub fn read_rows(&self, name: &str, expert: usize, rows: Range<usize>, out: &mut [f32]) {
        let (weight, piece) = self.piece(name, expert, &rows);
        assert_eq!(out.len(), rows.len() * weight.cols, "reading `{name}` into a buffer of another size");
        let blocks = match piece {
            Piece::Blocks(blocks) => blocks,
            Piece::Packed(packed) => return packed.read(&self.shards, rows, out),
        };
        let shard = &self.shards[blocks.shard];
        let read = |rows: Range<usize>, out: &mut [f32]| {
            dequantize::read(blocks.dtype, shard.bytes(blocks.range(weight.cols, rows)), out);
            if blocks.less_one {
                out.iter_mut().for_each(|x| *x += 1.0);
            }
        };
        match blocks.order {
            None => read(rows, out),
            Some(order) if weight.info.shape.len() == 1 => {
                // A vector is one row, and its elements are those of heads.
                let mut stored = vec![0.0; weight.cols];
                read(rows, &mut stored);
                for (i, out) in out.iter_mut().enumerate() {
                    *out = stored[order.place(i)];
                }
            }
            Some(order) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(weight.cols)) {
                    let row = order.place(row);
                    read(row..row + 1, out);
                }
            }
        }
    }

    /// Reads the codes and scales of rows as they are. Rows `first ..` of `out`, which has the weight's columns, take them.
    ///
    /// # Panics
    /// When [`TensorInfo::exact`] says that no layout holds them.
    pub fn read_codes(&self, name: &str, expert: usize, rows: Range<usize>, out: &mut CodedRows, first: usize) {
        let (weight, piece) = self.piece(name, expert, &rows);
        assert_eq!(out.columns, weight.cols, "reading `{name}` into rows of another size");
        let (columns, blocks) = (weight.cols, weight.cols / codes::BLOCK);
        let (codes, scales) = (&mut out.codes[first * columns..], &mut out.scales[first * blocks..]);
        match piece {
            Piece::Packed(packed) => packed.read_codes(&self.shards, rows, codes, scales),
            Piece::Blocks(stored) => {
                let shard = &self.shards[stored.shard];
                let places = codes.chunks_exact_mut(columns).zip(scales.chunks_exact_mut(blocks));
                for (row, (codes, scales)) in rows.zip(places) {
                    let row = stored.order.map_or(row, |order| order.place(row));
                    codes::read(stored.dtype, shard.bytes(stored.range(columns, row..row + 1)), codes, scales);
                }
            }
        }
    }

    /// Rows as they are stored.
    ///
    /// # Panics
    /// When the rows do not lie one after the other in one tensor, or are to be changed.
    pub fn raw(&self, name: &str, expert: usize, rows: Range<usize>) -> RawRows<'_> {
        let (weight, piece) = self.piece(name, expert, &rows);
        match piece {
            Piece::Blocks(blocks) if blocks.order.is_none() && !blocks.less_one => {
                RawRows { dtype: blocks.dtype, bytes: self.shards[blocks.shard].bytes(blocks.range(weight.cols, rows)) }
            }
            Piece::Blocks(_) | Piece::Packed(_) => {
                panic!("the rows of `{name}` do not lie one after the other as they are")
            }
        }
    }

    /// Gives the memory of rows that were read back to the system, so that a walk over a model larger than memory stays small.
    /// They can be read again.
    pub fn release(&self, name: &str, expert: usize, rows: Range<usize>) {
        let (shard, range) = self.stretch(name, expert, rows);
        shard.release(range);
    }

    /// Asks the system to start reading rows from disk.
    pub fn prefetch(&self, name: &str, expert: usize, rows: Range<usize>) {
        let (shard, range) = self.stretch(name, expert, rows);
        shard.prefetch(range);
    }

    fn weight(&self, name: &str) -> &Weight {
        match self.by_name.get(name) {
            Some(&number) => &self.weights[number],
            None => panic!("the model has no weight `{name}`"),
        }
    }

    fn piece(&self, name: &str, expert: usize, rows: &Range<usize>) -> (&Weight, &Piece) {
        let weight = self.weight(name);
        assert!(
            rows.start <= rows.end && rows.end <= weight.rows && expert < weight.pieces.len(),
            "rows {rows:?} of expert {expert} of `{name}`, which has {} × {} rows",
            weight.pieces.len(),
            weight.rows
        );
        (weight, &weight.pieces[expert])
    }

    /// The part of a file in which rows lie, with others of their heads between them if these are in another order.
    fn stretch(&self, name: &str, expert: usize, rows: Range<usize>) -> (&Shard, Range<usize>) {
        let (weight, piece) = self.piece(name, expert, &rows);
        let blocks = match piece {
            Piece::Blocks(blocks) => blocks,
            Piece::Packed(packed) => {
                let (shard, range) = packed.stretch(rows);
                return (&self.shards[shard], range);
            }
        };
        let rows = match blocks.order {
            Some(order) if weight.info.shape.len() > 1 => {
                let head_dim = order.head_dim();
                rows.start / head_dim * head_dim..rows.end.next_multiple_of(head_dim)
            }
            Some(_) | None => rows,
        };
        (&self.shards[blocks.shard], blocks.range(weight.cols, rows))
    }
}

impl Piece {
    /// The layout that holds it exactly.
    fn exact(&self) -> Option<Layout> {
        match self {
            Piece::Blocks(blocks) => codes::exact(blocks.dtype).filter(|_| !blocks.less_one),
            Piece::Packed(packed) => packed.exact(),
        }
    }

    /// The type that its elements fit in exactly.
    fn dtype(&self) -> Dtype {
        match self {
            Piece::Blocks(blocks) if blocks.less_one => Dtype::F32,
            Piece::Blocks(blocks) => blocks.dtype,
            Piece::Packed(packed) => packed.dtype,
        }
    }
}

impl Blocks {
    /// The bytes of rows of `cols` elements.
    fn range(&self, cols: usize, rows: Range<usize>) -> Range<usize> {
        let stride = self.dtype.bytes(cols).expect("rows are whole blocks");
        self.offset + rows.start * stride..self.offset + rows.end * stride
    }
}

/// The tensors of all files by name.
struct Tensors<'a> {
    entries: &'a [(usize, Entry)],
    by_name: &'a HashMap<&'a str, usize>,
}

impl Stored for Tensors<'_> {
    fn get(&self, name: &str) -> Option<(usize, &Entry)> {
        let (shard, entry) = &self.entries[*self.by_name.get(name)?];
        Some((*shard, entry))
    }
}

/// Matches what is stored with what is needed.
struct Finder<'a> {
    shards: &'a [Shard],
    entries: &'a [(usize, Entry)],
    by_name: &'a HashMap<&'a str, usize>,
    naming: Naming,
    packing: Option<Packing>,
    used: Vec<bool>,
    parameters: u64,
    /// The first missing tensor, its shape, and how many are missing.
    missing: Option<(String, Vec<usize>, usize)>,
}

impl<'a> Finder<'a> {
    fn new(
        shards: &'a [Shard],
        entries: &'a [(usize, Entry)],
        by_name: &'a HashMap<&'a str, usize>,
        naming: Naming,
        packing: Option<Packing>,
    ) -> Finder<'a> {
        Finder {
            shards,
            entries,
            by_name,
            naming,
            packing,
            used: vec![false; entries.len()],
            parameters: 0,
            missing: None,
        }
    }

    /// The weight of a slot; `None` if a part is missing, which [`Finder::finish`] reports.
    fn take(&mut self, slot: Slot) -> Result<Option<Weight>, ImportError> {
        let mut pieces = Vec::with_capacity(slot.parts.len());
        for part in slot.parts {
            if let Some(packed) = self.packed(&part)? {
                pieces.push(Piece::Packed(packed));
                continue;
            }
            let Some(&number) = self.by_name.get(part.stored.as_str()) else {
                self.missing.get_or_insert((part.stored, part.stored_shape, 0)).2 += 1;
                continue;
            };
            let (shard, entry) = &self.entries[number];
            let path = &self.shards[*shard].path;
            if !names::same_shape(&entry.shape, &part.stored_shape) {
                let (expected, found) = (format!("shape {:?}", part.stored_shape), format!("{:?}", entry.shape));
                return Err(ImportError::tensor(path, &part.stored, expected, found));
            }
            let dtype = match &entry.element {
                Element::Known(dtype) if dtype.block().is_some() => *dtype,
                other => {
                    let expected = match self.naming {
                        Naming::HuggingFace => "elements of type F32, BF16 or F16".to_string(),
                        Naming::Gguf => {
                            let blocks = Dtype::ALL.into_iter().filter(|dtype| dtype.block().is_some());
                            format!("one of the types {}", blocks.map(Dtype::name).collect::<Vec<_>>().join(", "))
                        }
                    };
                    return Err(ImportError::tensor(path, &part.stored, expected, other.to_string()));
                }
            };
            if !std::mem::replace(&mut self.used[number], true) {
                self.parameters += entry.shape.iter().product::<usize>() as u64;
            }
            // What is skipped are rows, or elements of a vector.
            let row = if slot.shape.len() == 1 { 1 } else { slot.shape[slot.shape.len() - 1] };
            let Some(skipped) = dtype.bytes(part.skip * row) else {
                let expected = "a type whose elements are no blocks, as it is several vectors in one";
                return Err(ImportError::tensor(path, &part.stored, expected, dtype.name()));
            };
            let offset = entry.offset + skipped;
            pieces.push(Piece::Blocks(Blocks {
                shard: *shard,
                offset,
                dtype,
                order: part.order,
                less_one: part.less_one,
            }));
        }
        let (&cols, rows) = slot.shape.split_last().expect("a weight has at least one dimension");
        let rows = rows.last().copied().unwrap_or(1);
        let Some(first) = pieces.first().map(Piece::dtype) else { return Ok(None) };
        let dtype = if pieces.iter().all(|piece| piece.dtype() == first) { first } else { Dtype::F32 };
        let exact = pieces[0].exact().filter(|_| slot.shape.len() > 1);
        let exact = exact.filter(|&exact| pieces.iter().all(|piece| piece.exact() == Some(exact)));
        let info = TensorInfo { dtype, exact, shape: slot.shape };
        Ok(Some(Weight { name: slot.weight, info, rows, cols, pieces }))
    }

    /// The matrix of a part, if it is stored as codes and scales.
    fn packed(&mut self, part: &Part) -> Result<Option<Packed>, ImportError> {
        let Some(packing) = self.packing else { return Ok(None) };
        let stored = Tensors { entries: self.entries, by_name: self.by_name };
        let mut names = Vec::new();
        let mut used = |name: &str| names.push(name.to_string());
        let found = packed::find(&stored, self.shards, packing, &part.stored, part.skip, &mut used)?;
        let Some(packed) = found else { return Ok(None) };
        names.push(part.stored.clone());
        if !names::same_shape(&packed.shape(), &part.stored_shape) {
            let (expected, found) = (format!("shape {:?}", part.stored_shape), format!("{:?}", packed.shape()));
            let path = self.by_name.get(names[0].as_str()).map(|&number| &self.shards[self.entries[number].0].path);
            return Err(ImportError::tensor(path.unwrap_or(&self.shards[0].path), &part.stored, expected, found));
        }
        let mut new = false;
        for name in &names {
            if let Some(&number) = self.by_name.get(name.as_str()) {
                new |= !std::mem::replace(&mut self.used[number], true);
            }
        }
        if new {
            self.parameters += packed.shape().iter().product::<usize>() as u64;
        }
        Ok(Some(packed))
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
        let packed = self.packing.is_some();
        let mut extra = self
            .entries
            .iter()
            .zip(&self.used)
            .filter(|((_, entry), used)| !**used && !names::is_ignored(&entry.name, packed));
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
