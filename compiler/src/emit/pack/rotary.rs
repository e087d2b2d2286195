//! Rotary position embedding: angles, and their cosines and sines as tables.
//!
//! Computed in f64 and rounded once. The rules are those of transformers (`modeling_rope_utils.py`), which computes in
//! f32.

use crate::import::{Rope, RopeScaling};
use std::f64::consts::TAU;
use std::ops::Range;

/// The angle between one position and the next, in radians, for each of the `head_dim / 2` pairs of a head.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f64> {
    let plain = |pair: usize| rope.theta.powf(-((2 * pair) as f64) / head_dim as f64);
    let scaled = |pair: usize, frequency: f64| match rope.scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            // How often the pair turns within the context of the first training.
            let turns = original_context as f64 * frequency / TAU;
            let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            frequency * keep + frequency / factor * (1.0 - keep)
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, truncate, .. } => {
            // The pair that turns so often within the context of the first training.
            let pair_of =
                |turns: f64| head_dim as f64 * (original_context as f64 / (turns * TAU)).ln() / (2.0 * rope.theta.ln());
            let (low, high) = (pair_of(beta_fast), pair_of(beta_slow));
            let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, high) = (low.max(0.0), high.min((head_dim - 1) as f64));
            let high = if low == high { high + 0.001 } else { high };
            let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency / factor * divided + frequency * (1.0 - divided)
        }
        RopeScaling::Divided { ref divisors } => frequency / f64::from(divisors[pair]),
    };
    (0..head_dim / 2).map(|pair| scaled(pair, plain(pair))).collect()
}

/// Writes rows `positions` of a table into `out`: f32, `columns` (at least one for each frequency, the rest is 0) a
/// row, cosines or sines times `amplitude`.
pub(crate) fn encode(
    sine: bool,
    frequencies: &[f64],
    amplitude: f64,
    columns: usize,
    positions: Range<usize>,
    out: &mut [u8],
) {
    for (position, row) in positions.zip(out.chunks_exact_mut(4 * columns)) {
        row.fill(0);
        for (frequency, out) in frequencies.iter().zip(row.chunks_exact_mut(4)) {
            let angle = position as f64 * frequency;
            let factor = if sine { angle.sin() } else { angle.cos() };
            out.copy_from_slice(&((amplitude * factor) as f32).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_and_linear() {
        let rope = Rope { theta: 10000.0, scaling: RopeScaling::None };
        let expected = [1.0, 0.1, 0.01, 0.001];
        for (found, expected) in frequencies(&rope, 8).into_iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-12, "{found} {expected}");
        }
        let linear = Rope { scaling: RopeScaling::Linear { factor: 4.0 }, ..rope.clone() };
        for (found, expected) in frequencies(&linear, 8).into_iter().zip(expected) {
            assert!((found / expected * 4.0 - 1.0).abs() < 1e-12, "{found} {expected}");
        }
    }

    /// The inverse frequencies that transformers 5.23 computes for Llama 3.1 (head_dim 128), some of them.
    #[test]
    fn llama3() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let found = frequencies(&Rope { theta: 500000.0, scaling }, 128);
        let expected = [
            (0, 1.0),
            (1, 0.8146172165870667),
            (28, 0.0032114461064338684),
            (29, 0.0021665706299245358),
            (30, 0.0013718936825171113),
            (32, 0.0005248460220173001),
            (34, 0.0001785077911335975),
            (35, 9.556212171446532e-05),
            (63, 3.068925877869333e-07),
        ];
        for (pair, expected) in expected {
            assert!((found[pair] / expected - 1.0).abs() < 3e-6, "pair {pair}: {} {expected}", found[pair]);
        }
    }
}
