//! The codes and scales of stored blocks as they are, for the formats that a layout holds exactly.
//!
//! [`exact`] says which those are, [`read`] takes them apart. Both ends agree on what a code is ([`Layout`] says which): for a layout of bytes
//! without offsets the value plus 128, otherwise the stored bits. Deliberately absent: the layouts' order in memory.

use super::super::dtype::Dtype;
use super::k::{code_q2, code_q3, code_q6, scale_iq4_xs, scale_q3, six_bits};
use super::legacy::{fifth, mxfp4_scale};
use moec_ir::graph::Layout;

/// Columns that share a [`BlockScale`].
pub const BLOCK: usize = 32;

/// How the codes of 32 columns of a row become numbers, in the bits that are stored.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct BlockScale {
    /// The scale, or the factor of its step: f16, of MXFP4 bf16.
    pub scale: u16,
    /// The offset, or the factor of its step, in f16; 0 where there is none.
    pub offset: u16,
    /// The steps of the scale and of the offset, where there are any: a scale is its step times its factor, an offset the negative of that. Of the
    /// first 16 columns and of the second; of both, where 32 share a scale, the first.
    pub steps: [[u8; 2]; 2],
}

/// Rows of codes.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct CodedRows {
    /// Columns of a row, a multiple of 32.
    pub columns: usize,
    /// Row after row.
    pub codes: Vec<u8>,
    /// Row after row, one for each 32 columns.
    pub scales: Vec<BlockScale>,
}

impl CodedRows {
    /// `rows` rows of `columns` zeros.
    pub fn reset(&mut self, rows: usize, columns: usize) {
        self.columns = columns;
        self.codes.clear();
        self.codes.resize(rows * columns, 0);
        self.scales.clear();
        self.scales.resize(rows * (columns / BLOCK), BlockScale::default());
    }
}

/// The layout that holds blocks of this type exactly.
pub(crate) const fn exact(dtype: Dtype) -> Option<Layout> {
    Some(match dtype {
        Dtype::Q8_0 | Dtype::Q5_0 => Layout::Q8_0,
        Dtype::Q5_1 => Layout::Q5_1,
        Dtype::Q5K => Layout::Q5K,
        Dtype::Q4_0 => Layout::Q4_0,
        Dtype::Q4_1 => Layout::Q4_1,
        Dtype::Q4K => Layout::Q4K,
        Dtype::Iq4Nl => Layout::Iq4Nl,
        Dtype::Mxfp4 => Layout::Mxfp4,
        Dtype::Q6K => Layout::Q6K,
        Dtype::Q3K => Layout::Q3K,
        Dtype::Q2K => Layout::Q2K,
        Dtype::Iq4Xs => Layout::Iq4Xs,
        _ => return None,
    })
}

/// Takes blocks apart; `codes` has an element for each that `bytes` hold, `scales` one for each 32.
///
/// # Panics
/// When the sizes do not fit, or no layout holds `dtype` exactly.
pub(crate) fn read(dtype: Dtype, bytes: &[u8], codes: &mut [u8], scales: &mut [BlockScale]) {
    assert_eq!(dtype.bytes(codes.len()), Some(bytes.len()), "blocks of {dtype} for {} elements", codes.len());
    assert_eq!(scales.len() * BLOCK, codes.len(), "a scale for each 32 codes");
    match dtype {
        Dtype::Q8_0 => blocks::<34, 32>(bytes, codes, scales, |block, codes, scales| {
            scales[0].scale = word(block, 0);
            for (code, &byte) in codes.iter_mut().zip(&block[2..]) {
                *code = byte ^ 0x80;
            }
        }),
        Dtype::Q5_0 => blocks::<22, 32>(bytes, codes, scales, |block, codes, scales| {
            scales[0].scale = word(block, 0);
            nibbles(&block[6..], codes, |i, code| (code | fifth(&block[2..6], i)) + 112);
        }),
        Dtype::Q5_1 => blocks::<24, 32>(bytes, codes, scales, |block, codes, scales| {
            (scales[0].scale, scales[0].offset) = (word(block, 0), word(block, 2));
            nibbles(&block[8..], codes, |i, code| code | fifth(&block[4..8], i));
        }),
        Dtype::Q4_0 | Dtype::Iq4Nl => blocks::<18, 32>(bytes, codes, scales, |block, codes, scales| {
            scales[0].scale = word(block, 0);
            nibbles(&block[2..], codes, |_, code| code);
        }),
        Dtype::Q4_1 => blocks::<20, 32>(bytes, codes, scales, |block, codes, scales| {
            (scales[0].scale, scales[0].offset) = (word(block, 0), word(block, 2));
            nibbles(&block[4..], codes, |_, code| code);
        }),
        Dtype::Mxfp4 => blocks::<17, 32>(bytes, codes, scales, |block, codes, scales| {
            // A power of two, down to the subnormal ones: the upper half of the f32 is all of it.
            scales[0].scale = (mxfp4_scale(block[0]).to_bits() >> 16) as u16;
            nibbles(&block[1..], codes, |_, code| code);
        }),
        Dtype::Q4K => blocks::<144, 256>(bytes, codes, scales, |block, codes, scales| {
            steps(block, scales);
            for (j, codes) in codes.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                for (code, byte) in codes.iter_mut().zip(&block[16 + j / 2 * 32..]) {
                    *code = (byte >> (4 * (j % 2))) & 15;
                }
            }
        }),
        Dtype::Q5K => blocks::<176, 256>(bytes, codes, scales, |block, codes, scales| {
            steps(block, scales);
            let (high, low) = (&block[16..48], &block[48..]);
            for (j, codes) in codes.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                for ((code, byte), high) in codes.iter_mut().zip(&low[j / 2 * 32..]).zip(high) {
                    *code = ((byte >> (4 * (j % 2))) & 15) | (((high >> j) & 1) << 4);
                }
            }
        }),
        Dtype::Q6K => blocks::<210, 256>(bytes, codes, scales, |block, codes, scales| {
            for (i, code) in codes.iter_mut().enumerate() {
                *code = code_q6(block, i) + 96;
            }
            for (j, scale) in scales.iter_mut().enumerate() {
                let step = |part: usize| [block[192 + 2 * j + part], 0];
                *scale = BlockScale { scale: word(block, 208), offset: 0, steps: [step(0), step(1)] };
            }
        }),
        Dtype::Q3K => blocks::<110, 256>(bytes, codes, scales, |block, codes, scales| {
            for (i, code) in codes.iter_mut().enumerate() {
                *code = code_q3(block, i);
            }
            for (j, scale) in scales.iter_mut().enumerate() {
                let step = |part: usize| [(scale_q3(block, 2 * j + part) as i8 - 32) as u8, 0];
                *scale = BlockScale { scale: word(block, 108), offset: 0, steps: [step(0), step(1)] };
            }
        }),
        Dtype::Q2K => blocks::<84, 256>(bytes, codes, scales, |block, codes, scales| {
            for (i, code) in codes.iter_mut().enumerate() {
                *code = code_q2(&block[16..80], i);
            }
            for (j, scale) in scales.iter_mut().enumerate() {
                let step = |part: usize| [block[2 * j + part] & 15, block[2 * j + part] >> 4];
                *scale = BlockScale { scale: word(block, 80), offset: word(block, 82), steps: [step(0), step(1)] };
            }
        }),
        Dtype::Iq4Xs => blocks::<136, 256>(bytes, codes, scales, |block, codes, scales| {
            for (j, (codes, scale)) in codes.as_chunks_mut::<BLOCK>().0.iter_mut().zip(scales).enumerate() {
                nibbles(&block[8 + 16 * j..][..16], codes, |_, code| code);
                let step = (scale_iq4_xs(block, j) as i8 - 32) as u8;
                *scale = BlockScale { scale: word(block, 0), offset: 0, steps: [[step, 0], [0; 2]] };
            }
        }),
        other => unreachable!("no layout holds {other} exactly"),
    }
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    codes: &mut [u8],
    scales: &mut [BlockScale],
    one: impl Fn(&[u8; BYTES], &mut [u8; ELEMENTS], &mut [BlockScale]),
) {
    let places = codes.as_chunks_mut::<ELEMENTS>().0.iter_mut().zip(scales.chunks_exact_mut(ELEMENTS / BLOCK));
    for (block, (codes, scales)) in bytes.as_chunks::<BYTES>().0.iter().zip(places) {
        one(block, codes, scales);
    }
}

/// The 16 bits at `at`.
fn word(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// Factors and 6-bit steps at the start of a block of Q4_K or Q5_K.
fn steps(block: &[u8], scales: &mut [BlockScale]) {
    for (j, scale) in scales.iter_mut().enumerate() {
        let (step, offset) = six_bits(&block[4..16], j);
        *scale = BlockScale { scale: word(block, 0), offset: word(block, 2), steps: [[step, offset], [0; 2]] };
    }
}

/// Both nibbles of 16 bytes, each as `code` gives it from its place and bits.
fn nibbles(packed: &[u8], out: &mut [u8; BLOCK], code: impl Fn(usize, u8) -> u8) {
    for (i, &byte) in packed.iter().enumerate().take(BLOCK / 2) {
        out[i] = code(i, byte & 15);
        out[i + BLOCK / 2] = code(i + BLOCK / 2, byte >> 4);
    }
}
