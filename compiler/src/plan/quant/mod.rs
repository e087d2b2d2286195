//! Choosing codes: how the weights of a `q8` or `q4` matrix become codes and scales.
//!
//! A weight is `scale × value`. 32 weights of one row share a bf16 scale; the value is an integer from −127 to 127 in
//! `q8`, one of the 16 of [`CODEBOOK`] in `q4`. The scale is chosen by a search that minimizes the squared error, and
//! rounded to bf16 *before* the weights are quantized against it.
//!
//! ## The code book
//! At 4.5 bits a weight, an uneven grid beats an even one; kernels look values up with one byte shuffle, so any book
//! costs them the same as long as its values span no more than 64 integers: CPUs without a dot product of bytes sum up
//! twice as many products of values that small at once (`Small` in [`layout`](super::layout)). Ours was found by
//! moving levels one by one and in runs, from what Lloyd's iteration finds without that bound, while the error falls
//! over blocks scaled by the exhaustive search, 70 % Gaussian and 30 % Student t with 8 degrees of freedom. It is not
//! symmetric: a negative scale mirrors it, so each block has two grids to choose from. Of books with about the same
//! error this one loses less of large weights, and less NLL, than those that are better for Gaussian weights alone.
//!
//! Relative RMS error in percent:
//!
//! | | Gaussian | Student t, 8 | Laplace | Student t, 4 | numerals |
//! | --- | --- | --- | --- | --- | --- |
//! | even −8..7, scale from the maximum | 8.61 | 9.78 | 10.68 | 11.60 | 8.62 |
//! | even −8..7, exhaustive search | 8.10 | 9.28 | 10.20 | 11.13 | 8.11 |
//! | normal-float (NF4), exhaustive search | 7.50 | 7.85 | 8.24 | 8.65 | 7.51 |
//! | the levels of llama.cpp's IQ4_NL, exhaustive search | 7.32 | 7.96 | 8.45 | 9.03 | 7.35 |
//! | values from −127 to 127 by Lloyd's iteration, exhaustive search | 7.27 | 7.77 | 8.21 | 8.71 | 7.29 |
//! | this book, exhaustive search | 7.37 | 7.86 | 8.23 | 8.66 | |
//! | this book, the search of `quantize_q4` | 7.39 | 7.87 | 8.24 | 8.67 | 7.38 |
//! | `q8`, scale from the maximum | 0.540 | 0.616 | 0.678 | 0.738 | 0.543 |
//! | `q8`, the search of `quantize_q8` | 0.492 | 0.565 | 0.626 | 0.687 | 0.496 |
//!
//! Deliberately absent: where codes go in memory ([`layout`](super::layout) and [`pack`](crate::emit::pack)), and which
//! weight gets which format.

mod block;
mod vectors;

pub(crate) use block::{Block, narrow, quantize_q4, quantize_q8};
pub(crate) use vectors::{Vectorized, vectorize};

use super::layout::{BLOCK, CODEBOOK, Format};
use moec_abi::LANES;

/// One element of each of the 16 rows of a tile.
pub type Lanes<T> = [T; LANES];

/// Why weights cannot be stored as wished.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unfit {
    /// Some weight is infinite or not a number.
    #[error("infinite or not a number")]
    NotFinite,
    /// Some weight is finite, but beyond the largest value of the format.
    #[error("too large for {0}")]
    TooLarge(Format),
}

/// A quantized matrix as it is computed with: row-major, every `q4` code already looked up.
#[derive(Clone, PartialEq, Debug)]
pub struct QuantizedMatrix {
    /// Number of rows.
    pub rows: usize,
    /// Columns, padded to a multiple of [`BLOCK`].
    pub columns: usize,
    /// Columns that share a scale.
    pub scale_columns: usize,
    /// `value + 128`, or the value in a format with offsets, `[rows][columns]`.
    pub codes: Vec<u8>,
    /// The scales as f32, `[rows][columns / scale_columns]`.
    pub scales: Vec<f32>,
    /// The offsets, as many; empty in a format without.
    pub offsets: Vec<f32>,
}

impl QuantizedMatrix {
    /// The weight that row `row`, column `column` stands for.
    pub fn weight(&self, row: usize, column: usize) -> f32 {
        let place = row * self.columns + column;
        let (code, scale) = (f32::from(self.codes[place]), self.scales[place / self.scale_columns]);
        match self.offsets.get(place / self.scale_columns) {
            None => scale * (code - 128.0),
            Some(offset) => scale * code + offset,
        }
    }
}

/// Quantizes a row-major matrix with `columns` columns, exactly as packing does.
///
/// # Errors
/// A weight that is not finite.
///
/// # Panics
/// When `format` is not `q8` or `q4`, or `data` does not consist of whole rows.
pub fn quantize_matrix(format: Format, columns: usize, data: &[f32]) -> Result<QuantizedMatrix, Unfit> {
    assert!(format.is_quantized() && !format.is_exact(), "weights are not quantized to {format}");
    assert!(columns > 0 && data.len().is_multiple_of(columns), "{} elements in rows of {columns}", data.len());
    quantize_spread(format, columns, &real_columns(columns, [(0, columns)]), data)
}

/// The columns of each block that hold weights, not padding: bit `i` of the `b`-th number is column `32 b + i`. `runs`
/// are the first columns and the lengths of what there is among `columns`.
pub(crate) fn real_columns(columns: usize, runs: impl IntoIterator<Item = (usize, usize)>) -> Vec<u32> {
    let mut real = vec![0; columns.div_ceil(BLOCK)];
    for (first, length) in runs {
        for column in first..first + length {
            real[column / BLOCK] |= 1 << (column % BLOCK);
        }
    }
    real
}

/// [`quantize_matrix`] of a matrix in which some columns are padding: zeros that [`real_columns`] does not count.
pub(crate) fn quantize_spread(
    format: Format,
    columns: usize,
    real: &[u32],
    data: &[f32],
) -> Result<QuantizedMatrix, Unfit> {
    vectorize(QuantizeMatrix { format, columns, real, data })
}

struct QuantizeMatrix<'a> {
    format: Format,
    columns: usize,
    real: &'a [u32],
    data: &'a [f32],
}

impl Vectorized for QuantizeMatrix<'_> {
    type Output = Result<QuantizedMatrix, Unfit>;

    #[inline(always)]
    fn run(self) -> Self::Output {
        let rows = self.data.len() / self.columns;
        let blocks = self.columns.div_ceil(BLOCK);
        let columns = blocks * BLOCK;
        let mut codes = vec![0; rows * columns];
        let mut scales = vec![0.0; rows * blocks];
        for first in (0..rows).step_by(LANES) {
            for block in 0..blocks {
                let mut weights = [[0.0; LANES]; BLOCK];
                for row in first..rows.min(first + LANES) {
                    let from = row * self.columns + block * BLOCK;
                    let to = from + BLOCK.min(self.columns - block * BLOCK);
                    for (weights, &weight) in weights.iter_mut().zip(&self.data[from..to]) {
                        weights[row - first] = weight;
                    }
                }
                let found = match self.format {
                    Format::Q4 => quantize_q4(&weights, self.real[block]),
                    _ => quantize_q8(&weights),
                };
                if !found.finite {
                    return Err(Unfit::NotFinite);
                }
                for row in first..rows.min(first + LANES) {
                    let lane = row - first;
                    scales[row * blocks + block] = widen(found.scales[lane]);
                    let codes = &mut codes[row * columns + block * BLOCK..][..BLOCK];
                    for (code, found) in codes.iter_mut().zip(&found.codes) {
                        *code = match self.format {
                            Format::Q4 => CODEBOOK[found[lane] as usize],
                            _ => found[lane] as u8,
                        };
                    }
                }
            }
        }
        Ok(QuantizedMatrix { rows, columns, scale_columns: BLOCK, codes, scales, offsets: Vec::new() })
    }
}

/// The f32 with the bits of a bf16.
pub(crate) const fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between −1 and 1, some of them zero, in blocks of very different size.
    fn numbers(count: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..count)
            .map(|i| {
                let magnitude = 10f32.powi((i / BLOCK % 60) as i32 - 30);
                if i % 17 == 0 { 0.0 } else { (next() + next() + next() - 1.5) * magnitude }
            })
            .collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let data = numbers(40 * 500);
        for format in [Format::Q8, Format::Q4] {
            let real = real_columns(500, [(0, 500)]);
            let work = QuantizeMatrix { format, columns: 500, real: &real, data: &data };
            let plain = QuantizeMatrix { ..work }.run().expect("finite numbers");
            assert_eq!(plain.scales.iter().filter(|scale| **scale == 0.0).count(), 0);
            for (name, found) in vectors::every(|| QuantizeMatrix { ..work }) {
                assert!(found.expect("finite numbers") == plain, "{format} {name}");
            }
        }
    }

    #[test]
    fn levels_are_in_order() {
        assert!(CODEBOOK.is_sorted());
    }

    #[test]
    fn padding_does_not_count() {
        let data = numbers(BLOCK * 20);
        let short = quantize_matrix(Format::Q4, 20, &data).expect("finite numbers");
        let mut spread = vec![0.0; BLOCK * BLOCK];
        for (row, spread) in data.chunks(20).zip(spread.chunks_mut(BLOCK)) {
            spread[..10].copy_from_slice(&row[..10]);
            spread[16..26].copy_from_slice(&row[10..]);
        }
        let real = real_columns(BLOCK, [(0, 10), (16, 10)]);
        let long = quantize_spread(Format::Q4, BLOCK, &real, &spread).expect("finite numbers");
        assert_eq!(short.scales, long.scales);
        for row in 0..BLOCK {
            for i in 0..20 {
                let k = if i < 10 { i } else { i + 6 };
                assert_eq!(short.weight(row, i), long.weight(row, k));
            }
        }
    }
}
