//! A reader of packed matrices, written from the description of the layouts.

use crate::model::Memory;
use half::{bf16, f16};
use moec::emit::pack::{Stored, float_rows, quantized_rows};
use moec::plan::layout::{CODEBOOK, Format};
use moec::plan::payload::PayloadItem;

/// One element of a tile as it lies in memory.
#[derive(PartialEq, Debug)]
pub(crate) enum Element {
    Float(f32),
    /// The code as the kernels see it, and the scale.
    Code(u8, f32),
}

/// Reads row `row`, column `k` of a matrix in tiles, from the description of the layouts.
pub(crate) fn read(matrix: &[u8], format: Format, length: usize, row: usize, k: usize) -> Element {
    let (tile, lane) = (row / 16, row % 16);
    let half = |at: usize| u16::from_le_bytes([matrix[at], matrix[at + 1]]);
    let aligned = |bytes: usize| bytes.div_ceil(64) * 64;
    match format {
        Format::F32 => {
            let at = tile * aligned(length * 64) + (k * 16 + lane) * 4;
            Element::Float(f32::from_le_bytes(matrix[at..at + 4].try_into().expect("four bytes")))
        }
        Format::Bf16 => {
            // Two columns in a word.
            let word = tile * aligned(length * 32) + (k / 2 * 16 + lane) * 4;
            Element::Float(bf16::from_bits(half(word + k % 2 * 2)).to_f32())
        }
        Format::F16 => Element::Float(f16::from_bits(half(tile * aligned(length * 32) + (k * 16 + lane) * 2)).to_f32()),
        Format::Q8 | Format::Q4 => {
            let block_bytes = if format == Format::Q8 { 512 } else { 256 };
            let blocks = length.div_ceil(32);
            let group_bytes = |blocks: usize| aligned(blocks * 32) + blocks * block_bytes;
            let tail = if blocks.is_multiple_of(4) { 0 } else { group_bytes(blocks % 4) };
            let tile_bytes = blocks / 4 * group_bytes(4) + tail;
            let group = tile * tile_bytes + k / 128 * group_bytes(4);
            let in_group = (blocks - k / 128 * 4).min(4);
            let (block, i) = (k % 128 / 32, k % 32);
            let scale = bf16::from_bits(half(group + (block * 16 + lane) * 2)).to_f32();
            let codes = &matrix[group + aligned(in_group * 32) + block * block_bytes..];
            let code = if format == Format::Q8 {
                codes[i / 4 * 64 + lane * 4 + i % 4]
            } else {
                let byte = codes[i % 16 / 4 * 64 + lane * 4 + i % 4];
                CODEBOOK[usize::from(if i < 16 { byte & 15 } else { byte >> 4 })]
            };
            Element::Code(code, scale)
        }
        Format::Q8_0
        | Format::Q5_1
        | Format::Q5K
        | Format::Q4_0
        | Format::Q4_1
        | Format::Q4K
        | Format::Iq4Nl
        | Format::Mxfp4
        | Format::Q6K
        | Format::Q3K
        | Format::Q2K
        | Format::Iq4Xs => {
            panic!("{format}: codes that a file has are not made from weights; `kernels` and `gguf` test them")
        }
    }
}

pub(crate) const FORMATS: [Format; 5] = [Format::F32, Format::Bf16, Format::F16, Format::Q8, Format::Q4];

/// Where element `i` of an axis that is divided into heads goes.
pub(crate) fn spread(i: usize, head_dim: Option<usize>) -> usize {
    let Some(dim) = head_dim else { return i };
    let half = dim / 2;
    let padded_half = half.div_ceil(16) * 16;
    let (head, i) = (i / dim, i % dim);
    head * 2 * padded_half + if i < half { i } else { padded_half + i - half }
}

/// Checks all of a packed matrix: what must be there is there, and everything else is zero.
pub(crate) fn check(
    payload: &[u8],
    item: &PayloadItem,
    source: &Memory,
    rows: &[(&str, usize)],
    place: impl Fn(usize, usize) -> usize,
) {
    let context = format!("{item}");
    for expert in 0..item.experts {
        let matrix = &payload[item.offset + expert * item.expert_bytes()..];
        let mut seen = vec![false; item.padded_rows() * item.k()];
        for (part, &(name, count)) in rows.iter().enumerate() {
            let tensor = &source.0[name];
            let expert_of = (item.experts > 1).then_some(expert);
            let stored = Stored { tensor: name, expert: expert_of, rows: 0..count, columns: item.columns };
            let quantized = item
                .format
                .is_quantized()
                .then(|| quantized_rows(source, &stored, item.column_heads, item.format).expect("sound weights"));
            let floats = quantized.is_none().then(|| float_rows(source, &stored, item.format).expect("sound weights"));
            for row in 0..count {
                let to = place(part, row);
                for column in 0..item.columns {
                    let k = spread(column, item.column_heads);
                    seen[to * item.k() + k] = true;
                    let found = read(matrix, item.format, item.k(), to, k);
                    let weight = tensor.at(expert, row, column);
                    match (&quantized, &floats) {
                        (Some(matrix), _) => {
                            let code = matrix.codes[row * matrix.columns + k];
                            let scale = matrix.scales[(row * matrix.columns + k) / 32];
                            assert_eq!(found, Element::Code(code, scale), "{context} row {row} column {column}");
                            let value = scale * (f32::from(code) - 128.0);
                            assert!((value - weight).abs() <= 20.0 * scale.abs(), "{context}: {value} for {weight}");
                        }
                        (None, floats) => {
                            let expected = match item.format {
                                Format::Bf16 => bf16::from_f32(weight).to_f32(),
                                Format::F16 => f16::from_f32(weight).to_f32(),
                                _ => weight,
                            };
                            assert_eq!(found, Element::Float(expected), "{context} row {row} column {column}");
                            let floats = floats.as_ref().expect("floats are not quantized");
                            assert_eq!(floats[row * item.columns + column], expected, "{context}");
                        }
                    }
                }
            }
        }
        let used: Vec<bool> = seen.chunks(item.k()).map(|row| row.iter().any(|&seen| seen)).collect();
        for (at, _) in seen.iter().enumerate().filter(|(_, seen)| !**seen) {
            let (row, k) = (at / item.k(), at % item.k());
            match read(matrix, item.format, item.k(), row, k) {
                Element::Float(value) => assert_eq!(value.to_bits(), 0, "{context} row {row} k {k}"),
                // In a row of weights, padding along K meets activations that are zero: any code does.
                Element::Code(_, scale) => assert!(used[row] || scale == 0.0, "{context} row {row} k {k}"),
            }
        }
    }
}
