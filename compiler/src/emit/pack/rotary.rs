//! Rotary position embedding: angles, and their cosines and sines as tables.
//!
//! Computed in f64 and rounded once. The rules are those of transformers (`modeling_rope_utils.py`), which computes in
//! f32.

use crate::import::{Rope, RopeScaling};
use std::f64::consts::TAU;
use std::ops::Range;

/// How one pair of elements of a head is rotated.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rotation {
    /// Radians from one position to the next.
    pub frequency: f64,
    /// What cosine and sine are multiplied by.
    pub amplitude: f64,
}

impl Rotation {
    /// Leaves the pair as it is.
    const NONE: Rotation = Rotation { frequency: 0.0, amplitude: 1.0 };

    /// Cosine and sine at a position, rounded.
    pub fn at(self, position: usize) -> (f32, f32) {
        let (sine, cosine) = (position as f64 * self.frequency).sin_cos();
        ((self.amplitude * cosine) as f32, (self.amplitude * sine) as f32)
    }
}

/// The rotation of each of the `head_dim / 2` pairs of a head, in sequences of at most `context` tokens.
pub fn rotations(rope: &Rope, head_dim: usize, context: usize) -> Vec<Rotation> {
    let dims = rope.rotated.unwrap_or(head_dim);
    let plain = |pair: usize| rope.theta.powf(-((2 * pair) as f64) / dims as f64);
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
                |turns: f64| dims as f64 * (original_context as f64 / (turns * TAU)).ln() / (2.0 * rope.theta.ln());
            let (low, high) = (pair_of(beta_fast), pair_of(beta_slow));
            let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, high) = (low.max(0.0), high.min((dims - 1) as f64));
            let high = if low == high { high + 0.001 } else { high };
            let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency / factor * divided + frequency * (1.0 - divided)
        }
        RopeScaling::Long { ref short, ref long, original_context, .. } => {
            let divisors = if context > original_context { long } else { short };
            frequency / f64::from(divisors[pair])
        }
        RopeScaling::Divided { ref divisors } => frequency / f64::from(divisors[pair]),
    };
    let rotation = |pair: usize| match pair < dims / 2 {
        true => Rotation { frequency: scaled(pair, plain(pair)), amplitude: rope.amplitude() },
        false => Rotation::NONE,
    };
    (0..head_dim / 2).map(rotation).collect()
}

/// Writes rows `positions` of a table into `out`: f32, `columns` (at least one for each rotation, the rest is 0) a
/// row, cosines or sines.
pub(crate) fn encode(sine: bool, rotations: &[Rotation], columns: usize, positions: Range<usize>, out: &mut [u8]) {
    for (position, row) in positions.zip(out.chunks_exact_mut(4 * columns)) {
        row.fill(0);
        for (rotation, out) in rotations.iter().zip(row.chunks_exact_mut(4)) {
            let (cos, sin) = rotation.at(position);
            out.copy_from_slice(&(if sine { sin } else { cos }).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The frequencies of heads of this size.
    fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f64> {
        rotations(rope, head_dim, 1).into_iter().map(|rotation| rotation.frequency).collect()
    }

    #[test]
    fn plain_and_linear() {
        let rope = Rope { theta: 10000.0, rotated: None, scaling: RopeScaling::None };
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
        let found = frequencies(&Rope { theta: 500000.0, rotated: None, scaling }, 128);
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

    #[test]
    fn what_is_not_rotated_stays_as_it_is() {
        let scaling = RopeScaling::Linear { factor: 2.0 };
        let rope = Rope { theta: 10000.0, rotated: Some(4), scaling };
        let found = rotations(&rope, 8, 1);
        assert_eq!(found[2..], [Rotation::NONE; 2]);
        assert_eq!(found[2].at(12345), (1.0, 0.0));
        assert!((found[0].frequency - 0.5).abs() < 1e-12 && (found[1].frequency - 0.005).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn long_rope_depends_on_the_longest_sequence() {
        let scaling = RopeScaling::Long {
            short: vec![1.0, 2.0],
            long: vec![4.0, 8.0],
            original_context: 100,
            attention_factor: 1.5,
        };
        let rope = Rope { theta: 10000.0, rotated: None, scaling };
        for (context, divisors) in [(1, [1.0, 2.0]), (100, [1.0, 2.0]), (101, [4.0, 8.0])] {
            let found = rotations(&rope, 4, context);
            let expected = [1.0 / divisors[0], 0.01 / divisors[1]];
            assert!(found.iter().zip(expected).all(|(a, b)| (a.frequency / b - 1.0).abs() < 1e-12), "{found:?}");
            assert!(found.iter().all(|rotation| rotation.amplitude == 1.5));
        }
    }
}
