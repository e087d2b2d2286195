//! From stored blocks to f32, to the bit as the `gguf` package of llama.cpp computes it.
//!
//! [`read`] is the way in; [`codes`] leaves blocks as they are. Every value is computed in f32 from f16 factors and small integers, in the order in which that package does it.
//! The formats are defined by `ggml-common.h` and `ggml-quants.c` of ggml. Deliberately absent: where the blocks are, and formats whose
//! scales are in other tensors ([`super::packed`]).

pub(crate) mod codes;
mod k;
mod legacy;

use super::dtype::Dtype;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Converts stored elements: `out` has as many as `bytes` hold.
///
/// # Panics
/// When `bytes` are not the whole blocks of `out.len()` elements, or `dtype` has no blocks.
pub(crate) fn read(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.bytes(out.len()), Some(bytes.len()), "blocks of {dtype} for {} elements", out.len());
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::Bf16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Dtype::F16 => halves(bytes, out),
        Dtype::Q8_0 => blocks(bytes, out, legacy::q8_0),
        Dtype::Q4_0 => blocks(bytes, out, legacy::q4_0),
        Dtype::Q4_1 => blocks(bytes, out, legacy::q4_1),
        Dtype::Q5_0 => blocks(bytes, out, legacy::q5_0),
        Dtype::Q5_1 => blocks(bytes, out, legacy::q5_1),
        Dtype::Iq4Nl => blocks(bytes, out, legacy::iq4_nl),
        Dtype::Mxfp4 => blocks(bytes, out, legacy::mxfp4),
        Dtype::Q2K => blocks(bytes, out, k::q2),
        Dtype::Q3K => blocks(bytes, out, k::q3),
        Dtype::Q4K => blocks(bytes, out, k::q4),
        Dtype::Q5K => blocks(bytes, out, k::q5),
        Dtype::Q6K => blocks(bytes, out, k::q6),
        Dtype::Iq4Xs => blocks(bytes, out, k::iq4_xs),
        Dtype::Fp8 | Dtype::Gptq | Dtype::Awq => unreachable!("{dtype} has no blocks"),
    }
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    one: fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    for (block, out) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<ELEMENTS>().0) {
        one(block, out);
    }
}

fn halves(bytes: &[u8], out: &mut [f32]) {
    const CHUNK: usize = 1024;
    let mut aligned = [f16::ZERO; CHUNK];
    for (values, bytes) in out.chunks_mut(CHUNK).zip(bytes.chunks(2 * CHUNK)) {
        let aligned = &mut aligned[..values.len()];
        for (value, bytes) in aligned.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = f16::from_le_bytes(*bytes);
        }
        aligned.convert_to_f32_slice(values);
    }
}

/// The f16 at the start of `bytes`, as f32.
fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// What the codes of IQ4_NL and IQ4_XS stand for.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
