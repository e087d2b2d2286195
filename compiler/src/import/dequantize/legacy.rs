//! Blocks of 32 with one scale: the older formats, IQ4_NL and MXFP4.
//!
//! Nibble `i` of the low halves is element `i`, of the high halves element `16 + i`.

use super::{IQ4, half};

const BLOCK: usize = 32;

/// Both nibbles of 16 bytes, each as `value` gives it from its place and code.
fn nibbles(packed: &[u8], out: &mut [f32; BLOCK], value: impl Fn(usize, u8) -> f32) {
    for (i, &byte) in packed.iter().enumerate().take(BLOCK / 2) {
        out[i] = value(i, byte & 15);
        out[i + BLOCK / 2] = value(i + BLOCK / 2, byte >> 4);
    }
}

/// Scale; 32 signed bytes.
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; BLOCK]) {
    let d = half(block);
    for (out, &code) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(code as i8) * d;
    }
}

/// Scale; nibbles with 8 added.
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; BLOCK]) {
    let d = half(block);
    nibbles(&block[2..], out, |_, code| d * (f32::from(code) - 8.0));
}

/// Scale; offset; nibbles.
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; BLOCK]) {
    let (d, m) = (half(block), half(&block[2..]));
    nibbles(&block[4..], out, |_, code| d * f32::from(code) + m);
}

/// The fifth bit of element `i`, in its place.
pub(super) fn fifth(bits: &[u8], i: usize) -> u8 {
    ((bits[i / 8] >> (i % 8)) & 1) << 4
}

/// Scale; 32 fifth bits; nibbles; 16 was added to each code.
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; BLOCK]) {
    let (d, high) = (half(block), &block[2..6]);
    nibbles(&block[6..], out, |i, code| d * (f32::from(code | fifth(high, i)) - 16.0));
}

/// Scale; offset; 32 fifth bits; nibbles.
pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; BLOCK]) {
    let (d, m, high) = (half(block), half(&block[2..]), &block[4..8]);
    nibbles(&block[8..], out, |i, code| d * f32::from(code | fifth(high, i)) + m);
}

/// Scale; nibbles that number the code book.
pub(super) fn iq4_nl(block: &[u8; 18], out: &mut [f32; BLOCK]) {
    let d = half(block);
    nibbles(&block[2..], out, |_, code| d * f32::from(IQ4[usize::from(code)]));
}

/// Half the power of two of an exponent.
pub(super) fn mxfp4_scale(exponent: u8) -> f32 {
    let exponent = u32::from(exponent);
    f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 })
}

/// Exponent; nibbles that are E2M1 floats. The exponent's power of two is halved, the floats are doubled.
pub(super) fn mxfp4(block: &[u8; 17], out: &mut [f32; BLOCK]) {
    const DOUBLED: [f32; 16] =
        [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];
    let d = mxfp4_scale(block[0]);
    nibbles(&block[1..], out, |_, code| d * DOUBLED[usize::from(code)]);
}
