//! Quantizing 16 blocks at once, one in each lane.
//!
//! Both searches work on blocks normalized to a largest magnitude of 1, so that no square over- or underflows.
//! Deliberately absent: intrinsics. The loops over lanes are written so that the compiler vectorizes them.

use super::Lanes;
use crate::plan::layout::{BLOCK, CODEBOOK};
use moec_abi::LANES;

/// 16 quantized blocks.
pub(crate) struct Block {
    /// `[element][block]`: for `q8` value + 128, for `q4` the index into the code book.
    pub(crate) codes: [Lanes<u32>; BLOCK],
    /// The scales, bits of a bf16.
    pub(crate) scales: Lanes<u16>,
    /// Sum of the squared errors.
    pub(crate) error: Lanes<f64>,
    /// Sum of the squared weights.
    pub(crate) energy: Lanes<f64>,
    /// Whether all weights are finite. If not, the other fields mean nothing.
    pub(crate) finite: bool,
}

/// Blocks whose largest magnitude is below this are stored as zeros, so that scales and their inverses are normal
/// numbers.
const SMALLEST: f32 = 1.0 / (1u128 << 100) as f32;

/// Bits of infinity: the magnitudes from here on are not finite.
const INFINITE: u32 = 0x7f80_0000;

/// Values of the code book.
const LEVELS: [f32; 16] = {
    let mut levels = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        levels[i] = (CODEBOOK[i] as i32 - 128) as f32;
        i += 1;
    }
    levels
};

/// Halfway between one level and the next: a number has the index of how many of these lie below it.
const MIDDLES: [f32; 15] = {
    let mut middles = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        middles[i] = (LEVELS[i] + LEVELS[i + 1]) * 0.5;
        i += 1;
    }
    middles
};

/// Where on the code book the search puts the largest magnitude of a block. Negative places mirror the book. With these
/// 12 the RMS error is within 0.2 % of what 114 evenly spread ones reach.
const PLACES: [f32; 12] = [-34.25, -32.75, -31.5, -30.5, -29.25, -24.0, 23.0, 24.75, 29.25, 30.75, 32.25, 34.0];

/// The `q8` scales that are tried: the bf16 numbers from one below to six above `maximum / 127`. Coarser grids lose
/// less by their step than they gain by chance: the best of these 8 has 9 % less RMS error than the first that reaches
/// the maximum.
const STEPS: std::ops::RangeInclusive<i32> = -1..=6;

/// Largest magnitude in each lane, as bits: the order of magnitudes is that of their bits, with infinities and NaNs on
/// top.
#[inline(always)]
fn largest(weights: &[Lanes<f32>; BLOCK]) -> Lanes<u32> {
    let mut largest = [0; LANES];
    for column in weights {
        for lane in 0..LANES {
            let bits = column[lane].to_bits() & 0x7fff_ffff;
            largest[lane] = if bits > largest[lane] { bits } else { largest[lane] };
        }
    }
    largest
}

/// The magnitudes with these bits, those below [`SMALLEST`] replaced by 0.
#[inline(always)]
fn magnitudes(bits: &Lanes<u32>) -> Lanes<f32> {
    let mut magnitudes = [0.0; LANES];
    for lane in 0..LANES {
        let magnitude = f32::from_bits(bits[lane]);
        magnitudes[lane] = if magnitude >= SMALLEST { magnitude } else { 0.0 };
    }
    magnitudes
}

/// The reciprocals, or 0 for 0.
#[inline(always)]
fn inverse(numbers: &Lanes<f32>) -> Lanes<f32> {
    let mut inverse = [0.0; LANES];
    for lane in 0..LANES {
        inverse[lane] = if numbers[lane] == 0.0 { 0.0 } else { 1.0 / numbers[lane] };
    }
    inverse
}

/// Bits of the nearest bf16, ties to even. The number must be finite.
#[inline(always)]
pub(crate) fn narrow(number: f32) -> u32 {
    let bits = number.to_bits();
    bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16
}

/// The 16 blocks divided by their largest magnitudes.
#[inline(always)]
fn normalize(weights: &[Lanes<f32>; BLOCK], inverse: &Lanes<f32>) -> ([Lanes<f32>; BLOCK], Lanes<f32>) {
    let mut normal = [[0.0; LANES]; BLOCK];
    let mut energy = [0.0; LANES];
    for (normal, column) in normal.iter_mut().zip(weights) {
        for lane in 0..LANES {
            normal[lane] = column[lane] * inverse[lane];
            energy[lane] += normal[lane] * normal[lane];
        }
    }
    (normal, energy)
}

#[inline(always)]
fn denormalize(sums: &Lanes<f32>, largest: &Lanes<f32>) -> Lanes<f64> {
    let mut out = [0.0; LANES];
    for lane in 0..LANES {
        let factor = f64::from(largest[lane]);
        out[lane] = f64::from(sums[lane]) * factor * factor;
    }
    out
}

/// Quantizes 16 blocks, `[element][block]`, to `q4`. Bit `k` of `real` tells whether element `k` is a weight; the
/// others are padding, which must be zero and does not count as an error.
///
/// For each place of the largest magnitude on the code book: assign the weights, take the scale that then is best
/// (least squares), and what squared error that leaves. The best scale is rounded to bf16, and the weights are assigned
/// once more against it.
#[inline(always)]
pub(crate) fn quantize_q4(weights: &[Lanes<f32>; BLOCK], real: u32) -> Block {
    let largest = largest(weights);
    let maximum = magnitudes(&largest);
    let to_normal = inverse(&maximum);
    let (normal, energy) = normalize(weights, &to_normal);

    let mut best_score = [0.0; LANES];
    let mut best_scale = [0.0; LANES];
    for place in PLACES {
        let mut product = [0.0; LANES];
        let mut square = [0.0; LANES];
        for (k, column) in normal.iter().enumerate() {
            if real >> k & 1 == 0 {
                continue;
            }
            for lane in 0..LANES {
                let number = column[lane] * place;
                let mut level = LEVELS[0];
                for i in 0..MIDDLES.len() {
                    level = if number > MIDDLES[i] { LEVELS[i + 1] } else { level };
                }
                product[lane] += column[lane] * level;
                square[lane] += level * level;
            }
        }
        for lane in 0..LANES {
            let scale = product[lane] / square[lane];
            let score = product[lane] * scale;
            let better = score > best_score[lane];
            best_score[lane] = if better { score } else { best_score[lane] };
            best_scale[lane] = if better { scale } else { best_scale[lane] };
        }
    }

    let mut scales = [0; LANES];
    let mut rounded = [0.0; LANES];
    for lane in 0..LANES {
        let bits = narrow(best_scale[lane] * maximum[lane]);
        scales[lane] = bits as u16;
        rounded[lane] = f32::from_bits(bits << 16);
    }
    let to_level = inverse(&rounded);
    let mut codes = [[0; LANES]; BLOCK];
    let mut error = [0.0; LANES];
    for (k, codes) in codes.iter_mut().enumerate() {
        let counts = if real >> k & 1 == 0 { 0.0 } else { 1.0 };
        for lane in 0..LANES {
            let number = weights[k][lane] * to_level[lane];
            let mut level = LEVELS[0];
            let mut code = 0;
            for i in 0..MIDDLES.len() {
                let above = number > MIDDLES[i];
                level = if above { LEVELS[i + 1] } else { level };
                code += u32::from(above);
            }
            let rest = normal[k][lane] - level * (rounded[lane] * to_normal[lane]);
            error[lane] += rest * rest * counts;
            codes[lane] = code;
        }
    }
    Block {
        codes,
        scales,
        error: denormalize(&error, &maximum),
        energy: denormalize(&energy, &maximum),
        finite: largest.iter().all(|&bits| bits < INFINITE),
    }
}

/// The nearest integer (ties to even), at most 127 in magnitude, as a number and as bits whose low half is the integer
/// in two's complement. `number` must be below 2²² in magnitude.
#[inline(always)]
fn round(number: f32) -> (f32, u32) {
    /// Adding this moves the integer part of a small number to the low end of the mantissa.
    const SHIFT: f32 = 12_582_912.0;
    let number = if number > 127.0 { 127.0 } else { number };
    let number = if number < -127.0 { -127.0 } else { number };
    let shifted = number + SHIFT;
    (shifted - SHIFT, shifted.to_bits())
}

/// Quantizes 16 blocks, `[element][block]`, to `q8`: tries a few bf16 scales, and keeps the one that leaves the least
/// squared error.
#[inline(always)]
pub(crate) fn quantize_q8(weights: &[Lanes<f32>; BLOCK]) -> Block {
    let largest = largest(weights);
    let maximum = magnitudes(&largest);
    let to_normal = inverse(&maximum);
    let (normal, energy) = normalize(weights, &to_normal);

    let mut first = [0; LANES];
    for lane in 0..LANES {
        first[lane] = narrow(maximum[lane] * (1.0 / 127.0));
    }
    let mut best_error = [f32::INFINITY; LANES];
    let mut best = [0; LANES];
    for step in STEPS {
        let mut bits = [0; LANES];
        let mut scale = [0.0; LANES];
        for lane in 0..LANES {
            bits[lane] = first[lane].wrapping_add_signed(step);
            scale[lane] = f32::from_bits(bits[lane] << 16) * to_normal[lane];
        }
        let to_value = inverse(&scale);
        let mut error = [0.0; LANES];
        for column in &normal {
            for lane in 0..LANES {
                let (value, _) = round(column[lane] * to_value[lane]);
                let rest = column[lane] - value * scale[lane];
                error[lane] += rest * rest;
            }
        }
        for lane in 0..LANES {
            let better = error[lane] < best_error[lane];
            best_error[lane] = if better { error[lane] } else { best_error[lane] };
            best[lane] = if better { bits[lane] } else { best[lane] };
        }
    }

    let mut scales = [0; LANES];
    let mut rounded = [0.0; LANES];
    for lane in 0..LANES {
        let bits = if maximum[lane] > 0.0 { best[lane] } else { 0 };
        scales[lane] = bits as u16;
        rounded[lane] = f32::from_bits(bits << 16);
    }
    let to_value = inverse(&rounded);
    let mut codes = [[0; LANES]; BLOCK];
    let mut error = [0.0; LANES];
    for (k, codes) in codes.iter_mut().enumerate() {
        for lane in 0..LANES {
            let (value, bits) = round(weights[k][lane] * to_value[lane]);
            let rest = normal[k][lane] - value * (rounded[lane] * to_normal[lane]);
            error[lane] += rest * rest;
            codes[lane] = bits.wrapping_add(128) & 0xff;
        }
    }
    Block {
        codes,
        scales,
        error: denormalize(&error, &maximum),
        energy: denormalize(&energy, &maximum),
        finite: largest.iter().all(|&bits| bits < INFINITE),
    }
}
