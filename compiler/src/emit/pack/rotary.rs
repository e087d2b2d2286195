//! Rotary position embedding: angles, and their cosines and sines as tables.
//!
//! Computed in f64 and rounded once. The rules are those of `transformers` (`modeling_rope_utils.py`), which computes in f32.

use super::item::Rotary;
use moec_abi::{LANES, round_up};
use std::ops::Range;

/// Writes rows `positions` of a table into `out`: f32 `[position][pairs, padded with zeros to 16]`.
pub(crate) fn encode(table: Rotary, frequencies: &[f64], positions: Range<usize>, out: &mut [u8]) {
    let stride = 4 * round_up(frequencies.len(), LANES);
    for (position, row) in positions.zip(out.chunks_exact_mut(stride)) {
        row.fill(0);
        for (frequency, out) in frequencies.iter().zip(row.chunks_exact_mut(4)) {
            let angle = position as f64 * frequency;
            let factor = match table {
                Rotary::Cos => angle.cos(),
                Rotary::Sin => angle.sin(),
            };
            out.copy_from_slice(&(factor as f32).to_le_bytes());
        }
    }
}
