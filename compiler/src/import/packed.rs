//! Quantized matrices of safetensors files, whose codes and scales are in several tensors: FP8, GPTQ and AWQ.
//!
//! [`Packing`] is what `quantization_config` says, [`find`] puts a matrix together and checks it, [`Packed::read`] gives its rows as f32: codes
//! minus zero points, times scales, in f32. The formats are those of transformers' `finegrained_fp8`, AutoGPTQ and AutoAWQ. Deliberately
//! absent: other widths than 4 and 8 bits, and formats that quantize activations only.

use super::dequantize::codes::{self, BlockScale};
use super::dtype::Dtype;
use super::error::ImportError;
use super::header::{Element, Entry};
use super::json::{Object, describe, quote};
use super::shards::Shard;
use super::{dequantize, names};
use moec_ir::graph;
use serde_json::Value;
use std::ops::Range;

/// How the matrices of a directory are quantized.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packing {
    /// 8-bit floats, with a scale for the matrix, for each row, or for blocks of these rows and columns.
    Fp8 {
        /// Rows and columns that share a scale, where the scales are a matrix.
        block: Option<(usize, usize)>,
    },
    /// 4-bit codes, eight neighbours along K in a word.
    Gptq {
        /// Columns that share a scale.
        group: Option<usize>,
        /// What is added to stored zero points.
        zero: u8,
    },
    /// 4-bit codes, eight rows in a word.
    Awq {
        /// Columns that share a scale.
        group: Option<usize>,
    },
}

/// What `quantization_config` says; `None` when there is none.
pub(crate) fn parse(config: Object) -> Result<Option<Packing>, ImportError> {
    const SUPPORTED: &str =
        "fp8, fbgemm_fp8, compressed-tensors (float-quantized), gptq and awq of 4 bits, or no quantization";
    for key in ["quantization_config", "compression_config"] {
        let Some(map) = config.object(key)?.some() else { continue };
        let prefix = format!("{key}.");
        let inner = Object { path: config.path, prefix: &prefix, map };
        let bits = |key: &str| match inner.integer(key, 1..=64)?.some() {
            None | Some(4) => Ok(()),
            Some(bits) => Err(inner.unsupported(key, bits.to_string(), "4")),
        };
        let group = || {
            let value = map.get("group_size").or_else(|| map.get("q_group_size"));
            match value.map(|value| (value, value.as_i64())) {
                None | Some((Value::Null, _) | (_, Some(-1))) => Ok(None),
                Some((_, Some(size))) if size > 0 && size <= 1 << 20 => Ok(Some(size as usize)),
                Some((other, _)) => Err(inner.wrong("group_size", "a whole number above 0, or -1", describe(other))),
            }
        };
        let method = inner.string("quant_method")?.some();
        return match method {
            Some("fp8" | "fbgemm_fp8") => {
                let block = match inner.list("weight_block_size")?.some().map(Vec::as_slice) {
                    None => None,
                    Some([rows, columns]) => match (rows.as_u64(), columns.as_u64()) {
                        (Some(rows @ 1..=65536), Some(columns @ 1..=65536)) => Some((rows as usize, columns as usize)),
                        _ => return Err(inner.wrong("weight_block_size", "two sizes", "others")),
                    },
                    Some(other) => {
                        return Err(inner.wrong(
                            "weight_block_size",
                            "two sizes",
                            format!("a list of {}", other.len()),
                        ));
                    }
                };
                Ok(Some(Packing::Fp8 { block }))
            }
            Some("compressed-tensors") => match inner.string("format")?.some() {
                Some("float-quantized" | "naive-quantized") => Ok(Some(Packing::Fp8 { block: None })),
                other => Err(inner.unsupported("format", other.map_or("none".into(), quote), "\"float-quantized\"")),
            },
            Some("gptq") => {
                bits("bits")?;
                let zero = match inner.string("checkpoint_format")?.some() {
                    None | Some("gptq") => 1,
                    Some("gptq_v2") => 0,
                    Some(other) => {
                        return Err(inner.unsupported("checkpoint_format", quote(other), "\"gptq\", \"gptq_v2\""));
                    }
                };
                Ok(Some(Packing::Gptq { group: group()?, zero }))
            }
            Some("awq") => {
                bits("bits")?;
                bits("w_bit")?;
                if let Some(version) = inner.string("version")?.some().filter(|v| !v.eq_ignore_ascii_case("gemm")) {
                    return Err(inner.unsupported("version", quote(version), "\"gemm\""));
                }
                if inner.boolean("zero_point")?.some() == Some(false) {
                    return Err(inner.unsupported("zero_point", "false", "true"));
                }
                Ok(Some(Packing::Awq { group: group()? }))
            }
            other => Err(config.unsupported(key, other.map_or_else(|| "an object".into(), quote), SUPPORTED)),
        };
    }
    Ok(None)
}

/// The stored tensors by name.
pub(crate) trait Stored {
    /// A tensor and the number of its file.
    fn get(&self, name: &str) -> Option<(usize, &Entry)>;
}

/// The shape `[rows, columns]` of the matrix of which `name` (ending in `.weight`) is the plain name, if it is there in words of codes.
pub(crate) fn shape(stored: &dyn Stored, packing: Packing, name: &str) -> Option<Vec<usize>> {
    let base = name.strip_suffix(".weight")?;
    let (_, entry) = stored.get(&format!("{base}.qweight"))?;
    let &[a, b] = entry.shape.as_slice() else { return None };
    match packing {
        Packing::Gptq { .. } => Some(vec![b, a.checked_mul(8)?]),
        Packing::Awq { .. } => Some(vec![b.checked_mul(8)?, a]),
        Packing::Fp8 { .. } => None,
    }
}

/// Where a tensor's numbers are.
#[derive(Clone, Copy, Debug)]
struct At {
    shard: usize,
    offset: usize,
}

/// A quantized matrix in its files.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) dtype: Dtype,
    weight: At,
    scales: At,
    scale_type: Dtype,
    layout: Layout,
    /// Rows of the whole matrix.
    rows: usize,
    columns: usize,
    /// Rows of the matrix before those that are wanted.
    first: usize,
}

#[derive(Debug)]
enum Layout {
    /// Scales for blocks of rows and columns; `across` of them in a row.
    Fp8 { block: (usize, usize), across: usize },
    /// The group of each column, if they are not in order.
    Words { zeros: At, group: usize, groups: Option<At>, zero: u8, by_rows: bool },
}

/// Puts together the matrix `name` (its plain name, ending in `.weight`); `None` when it is stored plainly. `skip` is the number of rows before
/// those that are wanted. Calls `used` with each tensor that belongs to it.
pub(crate) fn find(
    stored: &dyn Stored,
    shards: &[Shard],
    packing: Packing,
    name: &str,
    skip: usize,
    used: &mut dyn FnMut(&str),
) -> Result<Option<Packed>, ImportError> {
    let Some(base) = name.strip_suffix(".weight") else { return Ok(None) };
    let mut part = |suffix: &str, shape: &[usize], words: bool| -> Result<(At, Dtype), ImportError> {
        let name = format!("{base}.{suffix}");
        let Some((shard, entry)) = stored.get(&name) else {
            let expected = format!("shape {shape:?}, as `{base}` is quantized");
            let path = shards[0].path.clone();
            return Err(ImportError::Missing { path, tensor: super::error::clip(&name), expected, others: 0 });
        };
        let path = &shards[shard].path;
        if !names::same_shape(&entry.shape, shape) {
            return Err(ImportError::tensor(path, &name, format!("shape {shape:?}"), format!("{:?}", entry.shape)));
        }
        let dtype = match &entry.element {
            Element::Other(kind) if words && kind == "I32" => Dtype::F32,
            Element::Known(dtype) if !words && dtype.is_float() => *dtype,
            other => {
                let expected = if words { "elements of type I32" } else { "elements of type F32, BF16 or F16" };
                return Err(ImportError::tensor(path, &name, expected, other.to_string()));
            }
        };
        used(&name);
        Ok((At { shard, offset: entry.offset }, dtype))
    };
    if let Packing::Fp8 { block } = packing {
        let Some((shard, entry)) = stored.get(name).filter(|(_, e)| e.element == Element::Known(Dtype::Fp8)) else {
            return Ok(None);
        };
        let &[rows, columns] = entry.shape.as_slice() else {
            let found = format!("{:?}", entry.shape);
            return Err(ImportError::tensor(&shards[shard].path, name, "a matrix, as it is fp8", found));
        };
        let weight = At { shard, offset: entry.offset };
        let suffix = ["weight_scale_inv", "weight_scale"]
            .into_iter()
            .find(|suffix| stored.get(&format!("{base}.{suffix}")).is_some())
            .unwrap_or("weight_scale");
        let shape = stored.get(&format!("{base}.{suffix}")).map_or(&[][..], |(_, entry)| &entry.shape);
        let count: usize = shape.iter().product();
        let (expected, block) = match block {
            Some((r, c)) => (vec![rows.div_ceil(r), columns.div_ceil(c)], (r, c)),
            None if count == rows && count > 1 => (shape.to_vec(), (1, columns)),
            None => (vec![1], (rows, columns)),
        };
        let (scales, scale_type) = part(suffix, &expected, false)?;
        let across = columns.div_ceil(block.1);
        let layout = Layout::Fp8 { block, across };
        return Ok(Some(Packed { dtype: Dtype::Fp8, weight, scales, scale_type, layout, rows, columns, first: skip }));
    }
    let Some(shape) = self::shape(stored, packing, name) else { return Ok(None) };
    let (rows, columns) = (shape[0], shape[1]);
    let (group, zero, by_rows, dtype) = match packing {
        Packing::Gptq { group, zero } => (group, zero, false, Dtype::Gptq),
        Packing::Awq { group } => (group, 0, true, Dtype::Awq),
        Packing::Fp8 { .. } => unreachable!("done above"),
    };
    let group = group.unwrap_or(columns);
    let count = columns.div_ceil(group);
    let words = if by_rows { [columns, rows / 8] } else { [columns / 8, rows] };
    let (weight, _) = part("qweight", &words, true)?;
    let (zeros, _) = part("qzeros", &[count, rows / 8], true)?;
    let (scales, scale_type) = part("scales", &[count, rows], false)?;
    let mut groups = None;
    if stored.get(&format!("{base}.g_idx")).is_some() {
        let (at, _) = part("g_idx", &[columns], true)?;
        let name = format!("{base}.g_idx");
        for k in 0..columns {
            let index = word(shards, at, k);
            if index as usize >= count {
                let expected = format!("indices below {count}, the number of groups");
                return Err(ImportError::tensor(&shards[at.shard].path, &name, expected, (index as i32).to_string()));
            }
        }
        // Most files have the list even if it says nothing.
        let in_order = (0..columns).all(|k| word(shards, at, k) as usize == k / group);
        groups = Some(at).filter(|_| !in_order);
    }
    if !rows.is_multiple_of(8) {
        let expected = "a number of rows that is a multiple of 8";
        return Err(ImportError::tensor(&shards[zeros.shard].path, name, expected, rows.to_string()));
    }
    let layout = Layout::Words { zeros, group, groups, zero, by_rows };
    Ok(Some(Packed { dtype, weight, scales, scale_type, layout, rows, columns, first: skip }))
}

/// The `index`-th word of a tensor.
fn word(shards: &[Shard], at: At, index: usize) -> u32 {
    let start = at.offset + 4 * index;
    u32::from_le_bytes(*shards[at.shard].bytes(start..start + 4).first_chunk().expect("four bytes"))
}

/// Columns whose scales have common factors in [`graph::Layout::Q4K`].
const GROUP: usize = 128;

/// Nibble `place` of a word.
fn nibble(word: u32, place: usize) -> u8 {
    ((word >> (4 * place)) & 15) as u8
}

/// In which nibble of a word AWQ keeps each of eight rows.
const AWQ_ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Packed {
    /// Whether these are all the rows that the matrix should have.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The layout that holds it exactly: with f16 scales for whole groups of [`GROUP`] columns in order, zero points are steps of scales.
    pub(crate) fn exact(&self) -> Option<graph::Layout> {
        let Layout::Words { group, groups: None, .. } = self.layout else { return None };
        let fits = self.columns.is_multiple_of(codes::BLOCK) && (group.is_multiple_of(GROUP) || group >= self.columns);
        (fits && self.scale_type == Dtype::F16).then_some(graph::Layout::Q4K)
    }

    /// Reads the codes and scales of rows, row after row.
    ///
    /// # Panics
    /// When [`Packed::exact`] has no layout for them.
    pub(crate) fn read_codes(&self, shards: &[Shard], rows: Range<usize>, out: &mut [u8], scales: &mut [BlockScale]) {
        let Layout::Words { zeros, group, groups: None, zero, by_rows } = self.layout else {
            unreachable!("only words in order are exact")
        };
        let rows = self.first + rows.start..self.first + rows.end;
        for (i, row) in rows.enumerate() {
            let out = &mut out[i * self.columns..][..self.columns];
            for (k, out) in out.iter_mut().enumerate() {
                *out = self.code(shards, by_rows, row, k);
            }
            let blocks = self.columns / codes::BLOCK;
            for (block, scale) in scales[i * blocks..][..blocks].iter_mut().enumerate() {
                let index = block * codes::BLOCK / group;
                let at = self.scales.offset + 2 * (index * self.rows + row);
                let bytes = shards[self.scales.shard].bytes(at..at + 2);
                let factor = u16::from_le_bytes([bytes[0], bytes[1]]);
                let zero = self.zero(shards, zeros, by_rows, index, row) + zero;
                *scale = BlockScale { scale: factor, offset: factor, steps: [[1, zero], [0; 2]] };
            }
        }
    }

    /// The code of a row and column in words.
    fn code(&self, shards: &[Shard], by_rows: bool, row: usize, k: usize) -> u8 {
        if by_rows {
            nibble(word(shards, self.weight, k * (self.rows / 8) + row / 8), AWQ_ORDER[row % 8])
        } else {
            nibble(word(shards, self.weight, k / 8 * self.rows + row), k % 8)
        }
    }

    /// The stored zero point of a row in a group.
    fn zero(&self, shards: &[Shard], zeros: At, by_rows: bool, index: usize, row: usize) -> u8 {
        let place = if by_rows { AWQ_ORDER[row % 8] } else { row % 8 };
        nibble(word(shards, zeros, index * (self.rows / 8) + row / 8), place)
    }

    /// The part of a file that holds the codes of rows, when they lie together.
    pub(crate) fn stretch(&self, rows: Range<usize>) -> (usize, Range<usize>) {
        let Layout::Fp8 { .. } = self.layout else {
            return (self.weight.shard, self.weight.offset..self.weight.offset);
        };
        let at = |row: usize| self.weight.offset + (self.first + row) * self.columns;
        (self.weight.shard, at(rows.start)..at(rows.end))
    }

    /// Reads rows as f32, row after row.
    pub(crate) fn read(&self, shards: &[Shard], rows: Range<usize>, out: &mut [f32]) {
        let rows = self.first + rows.start..self.first + rows.end;
        let scale = |index: usize| {
            let bytes = self.scale_type.bytes(1).expect("scales are floats");
            let start = self.scales.offset + index * bytes;
            let mut value = [0.0];
            dequantize::read(self.scale_type, shards[self.scales.shard].bytes(start..start + bytes), &mut value);
            value[0]
        };
        match self.layout {
            Layout::Fp8 { block, across } => {
                for (row, out) in rows.zip(out.chunks_exact_mut(self.columns)) {
                    let start = self.weight.offset + row * self.columns;
                    let codes = shards[self.weight.shard].bytes(start..start + self.columns);
                    for (i, (out, codes)) in out.chunks_mut(block.1).zip(codes.chunks(block.1)).enumerate() {
                        let scale = scale(row / block.0 * across + i);
                        for (out, &code) in out.iter_mut().zip(codes) {
                            *out = e4m3(code) * scale;
                        }
                    }
                }
            }
            Layout::Words { zeros, group, groups, zero, by_rows } => {
                // Zero points and scales of the wanted rows in the group at hand.
                let mut known = (usize::MAX, Vec::new());
                for k in 0..self.columns {
                    let index = groups.map_or(k / group, |groups| word(shards, groups, k) as usize);
                    if known.0 != index {
                        let of = |row: usize| {
                            let zero = self.zero(shards, zeros, by_rows, index, row) + zero;
                            (f32::from(zero), scale(index * self.rows + row))
                        };
                        known = (index, rows.clone().map(of).collect());
                    }
                    for (i, row) in rows.clone().enumerate() {
                        let code = f32::from(self.code(shards, by_rows, row, k));
                        let (zero, scale) = known.1[i];
                        out[i * self.columns + k] = (code - zero) * scale;
                    }
                }
            }
        }
    }
}

/// An 8-bit float with 4 bits of exponent (bias 7) and 3 of mantissa; no infinities.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(code >> 3 & 15), u32::from(code & 7));
    let magnitude = match (exponent, mantissa) {
        (0, mantissa) => mantissa as f32 / 512.0,
        (15, 7) => f32::NAN,
        (exponent, mantissa) => f32::from_bits((exponent + 120) << 23 | mantissa << 20),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats() {
        let expected =
            [(0x00, 0.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0), (0x38, 1.0), (0xb9, -1.125), (0x7e, 448.0)];
        for (code, value) in expected {
            assert_eq!(e4m3(code), value, "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!(e4m3(0x80).to_bits(), (-0.0f32).to_bits());
    }
}
