//! The bytes of one tile, from 16 lanes of f32.
//!
//! Deliberately absent: which rows a tile holds ([`super::item`]) and how codes are chosen ([`crate::plan::quant`]).

use crate::plan::layout::{BLOCK, Format};
use crate::plan::quant::{Block, Lanes, Unfit, Vectorized, narrow, quantize_q4, quantize_q8, vectorize, widen};
use half::f16;
use half::slice::HalfFloatSliceExt;
use moec_abi::LANES;

/// What storing some weights lost.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Loss {
    /// Sum of the squared differences between weights and what was stored.
    pub(crate) error: f64,
    /// Sum of the squared weights.
    pub(crate) energy: f64,
}

impl Loss {
    pub(crate) fn add(&mut self, other: Loss) {
        self.error += other.error;
        self.energy += other.energy;
    }
}

/// Writes a tile of `columns`, `[K][lane]`, into `out`. For the quantized formats K is a whole number of blocks, and
/// `real` says which of their columns are not padding ([`real_columns`](crate::plan::quant::real_columns)).
pub(crate) fn encode_tile(format: Format, columns: &[Lanes<f32>], real: &[u32], out: &mut [u8]) -> Result<Loss, Unfit> {
    debug_assert_eq!(out.len(), format.tile_bytes(columns.len()));
    match format {
        Format::Bf16 => vectorize(Pairs { columns, out }),
        Format::F32 | Format::F16 => {
            let elements = columns.as_flattened();
            let used = elements.len() * if format == Format::F32 { 4 } else { 2 };
            out[used..].fill(0);
            encode_floats(format, elements, &mut out[..used])
        }
        Format::Q8 | Format::Q4 => vectorize(Quantize { four: format == Format::Q4, columns, real, out }),
        exact => unreachable!("weights are not quantized to {exact}"),
    }
}

/// Writes `elements` one after another into `out`, rounded to a float format.
pub(crate) fn encode_floats(format: Format, elements: &[f32], out: &mut [u8]) -> Result<Loss, Unfit> {
    vectorize(Floats { format, elements, out })
}

struct Floats<'a> {
    format: Format,
    elements: &'a [f32],
    out: &'a mut [u8],
}

/// Elements that are converted at a time.
const CHUNK: usize = 512;

impl Vectorized for Floats<'_> {
    type Output = Result<Loss, Unfit>;

    #[inline(always)]
    fn run(self) -> Self::Output {
        let mut watched = Watched::default();
        let bytes = if self.format == Format::F32 { 4 } else { 2 };
        let mut halves = [f16::ZERO; CHUNK];
        let mut stored = [0.0; CHUNK];
        for (elements, out) in self.elements.chunks(CHUNK).zip(self.out.chunks_mut(CHUNK * bytes)) {
            let stored = &mut stored[..elements.len()];
            match self.format {
                Format::Bf16 => {
                    for ((element, stored), out) in elements.iter().zip(&mut *stored).zip(out.chunks_exact_mut(2)) {
                        let bits = narrow(*element) as u16;
                        out.copy_from_slice(&bits.to_le_bytes());
                        *stored = widen(bits);
                    }
                }
                Format::F16 => {
                    let halves = &mut halves[..elements.len()];
                    halves.convert_from_f32_slice(elements);
                    halves.convert_to_f32_slice(stored);
                    for (half, out) in halves.iter().zip(out.chunks_exact_mut(2)) {
                        out.copy_from_slice(&half.to_le_bytes());
                    }
                }
                _ => {
                    for (element, out) in elements.iter().zip(out.chunks_exact_mut(4)) {
                        out.copy_from_slice(&element.to_le_bytes());
                    }
                    stored.copy_from_slice(elements);
                }
            }
            let (elements, last_elements) = elements.as_chunks::<LANES>();
            let (stored, last_stored) = stored.as_chunks::<LANES>();
            for (elements, stored) in elements.iter().zip(stored) {
                watched.add(elements, stored);
            }
            if !last_elements.is_empty() {
                let mut last = [[0.0; LANES]; 2];
                last[0][..last_elements.len()].copy_from_slice(last_elements);
                last[1][..last_stored.len()].copy_from_slice(last_stored);
                watched.add(&last[0], &last[1]);
            }
        }
        watched.loss(self.format, self.elements)
    }
}

/// The columns of a tile in bf16, two and two in words.
struct Pairs<'a> {
    columns: &'a [Lanes<f32>],
    out: &'a mut [u8],
}

impl Vectorized for Pairs<'_> {
    type Output = Result<Loss, Unfit>;

    #[inline(always)]
    fn run(self) -> Self::Output {
        let mut watched = Watched::default();
        let (words, _) = self.out.as_chunks_mut::<4>();
        for (pair, words) in self.columns.chunks(2).zip(words.chunks_exact_mut(LANES)) {
            let mut bits = [[0u16; LANES]; 2];
            for (column, bits) in pair.iter().zip(&mut bits) {
                *bits = column.map(|element| narrow(element) as u16);
                watched.add(column, &bits.map(widen));
            }
            for (lane, word) in words.iter_mut().enumerate() {
                *word = (u32::from(bits[1][lane]) << 16 | u32::from(bits[0][lane])).to_le_bytes();
            }
        }
        watched.loss(Format::Bf16, self.columns.as_flattened())
    }
}

/// What storing some elements did to them.
#[derive(Default)]
struct Watched {
    /// The largest magnitude of what was stored, as bits (rounding never brings an infinity back, so it tells of both).
    largest: Lanes<u32>,
    error: Lanes<f64>,
    energy: Lanes<f64>,
}

impl Watched {
    #[inline(always)]
    fn add(&mut self, elements: &Lanes<f32>, stored: &Lanes<f32>) {
        let Watched { largest, error, energy } = self;
        for lane in 0..LANES {
            let bits = stored[lane].to_bits() & 0x7fff_ffff;
            largest[lane] = if bits > largest[lane] { bits } else { largest[lane] };
            let (element, rest) = (f64::from(elements[lane]), f64::from(elements[lane]) - f64::from(stored[lane]));
            error[lane] += rest * rest;
            energy[lane] += element * element;
        }
    }

    /// What was lost of these elements, all of which were added.
    ///
    /// # Errors
    /// When some are no numbers, or none of the format.
    #[inline(always)]
    fn loss(self, format: Format, elements: &[f32]) -> Result<Loss, Unfit> {
        if self.largest.iter().any(|&bits| bits >= f32::INFINITY.to_bits()) {
            let finite = elements.iter().all(|element| element.is_finite());
            return Err(if finite { Unfit::TooLarge(format) } else { Unfit::NotFinite });
        }
        Ok(Loss { error: self.error.iter().sum(), energy: self.energy.iter().sum() })
    }
}

struct Quantize<'a> {
    four: bool,
    columns: &'a [Lanes<f32>],
    real: &'a [u32],
    out: &'a mut [u8],
}

impl Vectorized for Quantize<'_> {
    type Output = Result<Loss, Unfit>;

    #[inline(always)]
    fn run(self) -> Self::Output {
        let format = if self.four { Format::Q4 } else { Format::Q8 };
        let (blocks, rest) = self.columns.as_chunks::<BLOCK>();
        debug_assert!(rest.is_empty());
        let mut loss = Loss::default();
        let mut out = self.out;
        for (group, real) in blocks.chunks(4).zip(self.real.chunks(4)) {
            let (scales, codes);
            (scales, out) = out.split_at_mut(format.scale_bytes(group.len()));
            (codes, out) = out.split_at_mut(group.len() * format.block_bytes());
            scales[group.len() * LANES * 2..].fill(0);
            let places = scales.chunks_exact_mut(LANES * 2).zip(codes.chunks_exact_mut(format.block_bytes()));
            for ((columns, &real), (scales, codes)) in group.iter().zip(real).zip(places) {
                let block = if self.four { quantize_q4(columns, real) } else { quantize_q8(columns) };
                if !block.finite {
                    return Err(Unfit::NotFinite);
                }
                for (scale, out) in block.scales.iter().zip(scales.chunks_exact_mut(2)) {
                    out.copy_from_slice(&scale.to_le_bytes());
                }
                if self.four {
                    pack_q4(&block, codes)
                } else {
                    pack_q8(&block, codes)
                }
                loss.add(Loss { error: block.error.iter().sum(), energy: block.energy.iter().sum() });
            }
        }
        Ok(loss)
    }
}

/// `[8][16][4]` bytes: four of K for each row in a 32-bit word.
#[inline(always)]
fn pack_q8(block: &Block, out: &mut [u8]) {
    for (codes, out) in block.codes.as_chunks::<4>().0.iter().zip(out.chunks_exact_mut(4 * LANES)) {
        for (lane, out) in out.chunks_exact_mut(4).enumerate() {
            let word = codes[0][lane] | codes[1][lane] << 8 | codes[2][lane] << 16 | codes[3][lane] << 24;
            out.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// `[4][16][4]` bytes: the first 16 of K in the low nibbles, the second 16 in the high ones.
#[inline(always)]
fn pack_q4(block: &Block, out: &mut [u8]) {
    let (low, high) = block.codes.split_at(BLOCK / 2);
    let pairs = low.as_chunks::<4>().0.iter().zip(high.as_chunks::<4>().0);
    for ((low, high), out) in pairs.zip(out.chunks_exact_mut(4 * LANES)) {
        for (lane, out) in out.chunks_exact_mut(4).enumerate() {
            let mut word = 0;
            for j in 0..4 {
                word |= (low[j][lane] | high[j][lane] << 4) << (8 * j);
            }
            out.copy_from_slice(&word.to_le_bytes());
        }
    }
}
