//! Super-blocks of 256 with scales of 16 or 32 elements, themselves integers times one or two factors: Q2_K to Q6_K and IQ4_XS.

use super::{IQ4, half};

const BLOCK: usize = 256;

/// 16 bytes of 4-bit scales and offsets; 64 bytes of 2-bit codes; factor; factor of offsets. Codes of 32 neighbours lie in the same two
/// bits of 32 bytes.
pub(super) fn q2(block: &[u8; 84], out: &mut [f32; BLOCK]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half(&block[80..]), half(&block[82..]));
    for (i, out) in out.iter_mut().enumerate() {
        let scale = scales[i / 16];
        let (scale, offset) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        *out = scale * f32::from(code_q2(codes, i)) - offset;
    }
}

/// Code `i` of 64 bytes of 2-bit codes.
pub(super) fn code_q2(codes: &[u8], i: usize) -> u8 {
    (codes[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4))) & 3
}

/// 32 bytes of third bits; 64 bytes of low bits; 12 bytes of 6-bit scales with 32 added; factor. A third bit that is *not* set takes 4 off.
pub(super) fn q3(block: &[u8; 110], out: &mut [f32; BLOCK]) {
    let d = half(&block[108..]);
    for (i, out) in out.iter_mut().enumerate() {
        let scale = d * (f32::from(scale_q3(block, i / 16)) - 32.0);
        *out = scale * (f32::from(code_q3(block, i)) - 4.0);
    }
}

/// Code `i` of a block of Q3_K, to which 4 was added.
pub(super) fn code_q3(block: &[u8; 110], i: usize) -> u8 {
    code_q2(&block[32..96], i) | ((block[i % 32] >> (i / 32)) & 1) << 2
}

/// Scale `j` of a block of Q3_K, to which 32 was added.
pub(super) fn scale_q3(block: &[u8; 110], j: usize) -> u8 {
    let scales = &block[96..108];
    let low = (scales[j % 8] >> (4 * (j / 8))) & 15;
    let top = (scales[8 + j % 4] >> (2 * (j / 4))) & 3;
    low | (top << 4)
}

/// The 6-bit scale and offset of 32 elements, out of the 12 bytes that hold eight of each.
pub(super) fn six_bits(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let low = packed[j + 4];
        ((low & 15) | ((packed[j - 4] >> 2) & 48), (low >> 4) | ((packed[j] >> 2) & 48))
    }
}

/// Factor; factor of offsets; 12 bytes of 6-bit scales and offsets; 128 bytes of nibbles, 32 low ones and then 32 high ones for each 64.
pub(super) fn q4(block: &[u8; 144], out: &mut [f32; BLOCK]) {
    let (d, dmin, packed, codes) = (half(block), half(&block[2..]), &block[4..16], &block[16..]);
    for (j, out) in out.chunks_mut(32).enumerate() {
        let (scale, offset) = six_bits(packed, j);
        let (scale, offset) = (d * f32::from(scale), dmin * f32::from(offset));
        for (out, byte) in out.iter_mut().zip(&codes[j / 2 * 32..]) {
            *out = scale * f32::from((byte >> (4 * (j % 2))) & 15) - offset;
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit `j` of byte `i` is of element `32 × j + i`.
pub(super) fn q5(block: &[u8; 176], out: &mut [f32; BLOCK]) {
    let (d, dmin, packed) = (half(block), half(&block[2..]), &block[4..16]);
    let (high, codes) = (&block[16..48], &block[48..]);
    for (j, out) in out.chunks_mut(32).enumerate() {
        let (scale, offset) = six_bits(packed, j);
        let (scale, offset) = (d * f32::from(scale), dmin * f32::from(offset));
        for ((out, byte), high) in out.iter_mut().zip(&codes[j / 2 * 32..]).zip(high) {
            let code = ((byte >> (4 * (j % 2))) & 15) | (((high >> j) & 1) << 4);
            *out = scale * f32::from(code) - offset;
        }
    }
}

/// 128 bytes of low nibbles; 64 bytes of two high bits; 16 signed scales; factor. 32 was added to each code.
pub(super) fn q6(block: &[u8; 210], out: &mut [f32; BLOCK]) {
    let (scales, d) = (&block[192..208], half(&block[208..]));
    for (i, out) in out.iter_mut().enumerate() {
        let scale = d * f32::from(scales[i / 16] as i8);
        *out = scale * (f32::from(code_q6(block, i)) - 32.0);
    }
}

/// Code `i` of a block of Q6_K, to which 32 was added.
pub(super) fn code_q6(block: &[u8; 210], i: usize) -> u8 {
    let (low, high) = (&block[..128], &block[128..192]);
    let nibble = (low[i / 128 * 64 + i % 64] >> (4 * (i / 64 % 2))) & 15;
    nibble | code_q2(high, i) << 4
}

/// Factor; 2 bytes of high and 4 of low bits of 6-bit scales with 32 added; nibbles that number the code book, in blocks of 32.
pub(super) fn iq4_xs(block: &[u8; 136], out: &mut [f32; BLOCK]) {
    let (d, codes) = (half(block), &block[8..]);
    for (j, out) in out.chunks_mut(32).enumerate() {
        let scale = d * (f32::from(scale_iq4_xs(block, j)) - 32.0);
        for (i, byte) in codes[16 * j..][..16].iter().enumerate() {
            out[i] = scale * f32::from(IQ4[usize::from(byte & 15)]);
            out[i + 16] = scale * f32::from(IQ4[usize::from(byte >> 4)]);
        }
    }
}

/// Scale `j` of a block of IQ4_XS, to which 32 was added.
pub(super) fn scale_iq4_xs(block: &[u8; 136], j: usize) -> u8 {
    let high = u16::from_le_bytes([block[2], block[3]]);
    ((block[4 + j / 2] >> (4 * (j % 2))) & 15) | ((((high >> (2 * j)) & 3) as u8) << 4)
}
