//! The bytes of one tile from codes and scales that are kept as they are stored.
//!
//! Deliberately absent: taking stored blocks apart ([`TensorTable::read_codes`](crate::import::TensorTable::read_codes)).

use crate::import::{BlockScale, CodedRows};
use crate::plan::layout::{BLOCK, Codes, Format, GROUP, Scales};
use crate::plan::quant::{Unfit, widen};
use half::f16;
use moec_abi::LANES;

/// Bytes of 16 halves.
const HALVES: usize = 2 * LANES;

/// Writes a tile, 16 rows of codes, into `out`.
///
/// # Errors
/// A scale that is not finite: then neither are all weights.
pub(crate) fn encode_exact(format: Format, rows: &CodedRows, out: &mut [u8]) -> Result<(), Unfit> {
    debug_assert_eq!(out.len(), format.tile_bytes(rows.columns));
    let finite = |scale: &BlockScale| {
        let (scale, offset) = factors(format, *scale);
        scale.is_finite() && offset.is_finite()
    };
    if !rows.scales.iter().all(finite) {
        return Err(Unfit::NotFinite);
    }
    let blocks = rows.columns / BLOCK;
    let mut out = out;
    for first in (0..blocks).step_by(GROUP / BLOCK) {
        let group = first..blocks.min(first + GROUP / BLOCK);
        let (scales, codes);
        (scales, out) = out.split_at_mut(format.scale_bytes(group.len()));
        (codes, out) = out.split_at_mut(group.len() * format.block_bytes());
        scales.fill(0);
        for lane in 0..LANES {
            for (i, scale) in rows.scales[lane * blocks..][group.clone()].iter().enumerate() {
                put_scale(format, scales, i, lane, *scale);
            }
        }
        for (block, codes) in group.zip(codes.chunks_exact_mut(format.block_bytes())) {
            for lane in 0..LANES {
                put_codes(format, &rows.codes[lane * rows.columns + block * BLOCK..][..BLOCK], lane, codes);
            }
        }
    }
    Ok(())
}

/// The two numbers that are stored for a block, in which its scale and its offset are counted or which they are.
fn factors(format: Format, scale: BlockScale) -> (f32, f32) {
    match format.scales() {
        Some(Scales::Bf16) => (widen(scale.scale), 0.0),
        _ => (f16::from_bits(scale.scale).to_f32(), f16::from_bits(scale.offset).to_f32()),
    }
}

/// The scales and the offsets of a block, in the order of the columns that share them.
pub(crate) fn scales_of(format: Format, scale: BlockScale) -> impl Iterator<Item = (f32, f32)> {
    let (factor, offset) = factors(format, scale);
    let stepped = matches!(format.scales(), Some(Scales::Steps { .. }));
    scale.steps.into_iter().take(format.parts()).map(move |[step, shift]| match stepped {
        true => (factor * f32::from(step as i8), offset * f32::from(opposite(shift))),
        false => (factor, offset),
    })
}

/// The step of an offset out of that of what is taken away.
fn opposite(step: u8) -> i8 {
    (step as i8).wrapping_neg()
}

fn put_scale(format: Format, out: &mut [u8], block: usize, lane: usize, scale: BlockScale) {
    let mut half = |at: usize, bits: u16| out[at + 2 * lane..][..2].copy_from_slice(&bits.to_le_bytes());
    match format.scales() {
        None => {}
        Some(Scales::Bf16 | Scales::F16) => half(HALVES * block, scale.scale),
        Some(Scales::Pairs) => {
            half(2 * HALVES * block, scale.scale);
            half(2 * HALVES * block + HALVES, scale.offset);
        }
        Some(Scales::Steps { offsets, parts }) => {
            half(0, scale.scale);
            if offsets {
                half(HALVES, scale.offset);
            }
            let steps = if offsets { 2 } else { 1 };
            let first = Scales::factor_bytes(offsets) + block * parts * steps * LANES + lane;
            for (part, of_part) in scale.steps.iter().take(parts).enumerate() {
                let [step, shift] = *of_part;
                for (i, step) in [step, opposite(shift) as u8].into_iter().take(steps).enumerate() {
                    out[first + (part * steps + i) * LANES] = step;
                }
            }
        }
    }
}

/// The 32 codes of one row.
fn put_codes(format: Format, codes: &[u8], lane: usize, out: &mut [u8]) {
    let words = out.chunks_exact_mut(4 * LANES).map(|out| &mut out[4 * lane..][..4]);
    match format.codes() {
        None => {}
        Some(Codes::Bytes | Codes::PlainBytes) => {
            for (out, codes) in words.zip(codes.chunks_exact(4)) {
                out.copy_from_slice(codes);
            }
        }
        Some(Codes::Book(_) | Codes::Nibbles) => {
            let (low, high) = codes.split_at(BLOCK / 2);
            for (out, (low, high)) in words.zip(low.chunks_exact(4).zip(high.chunks_exact(4))) {
                for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
                    *out = low | high << 4;
                }
            }
        }
    }
}
