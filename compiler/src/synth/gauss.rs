//! Random bf16 weights, made anywhere in a tensor from its key alone: several gigabytes a second a core.
//!
//! A counter is mixed to 64 bits, and each 16 of them choose one of 8192 equally likely values: the quantiles of a normal distribution, which
//! so comes out with its deviation and shape up to 3.8 deviations. Deliberately absent: randomness fit for statistics.

use half::bf16;

/// Number of distinct values.
const VALUES: usize = 1 << 13;

/// Quantiles of the standard normal distribution, in order.
pub(super) struct Quantiles(Box<[f64; VALUES]>);

impl Quantiles {
    pub(super) fn new() -> Quantiles {
        let mut values = Box::new([0.0; VALUES]);
        for number in 0..VALUES / 2 {
            let value = quantile((number as f64 + 0.5) / VALUES as f64);
            values[number] = value;
            values[VALUES - 1 - number] = -value;
        }
        Quantiles(values)
    }
}

/// The values that the elements of a tensor are drawn from.
pub(super) struct Normal(Box<[[u8; 2]; VALUES]>);

impl Normal {
    pub(super) fn new(quantiles: &Quantiles, mean: f64, deviation: f64) -> Normal {
        let mut values = Box::new([[0; 2]; VALUES]);
        for (value, quantile) in values.iter_mut().zip(quantiles.0.iter()) {
            *value = bf16::from_f64(mean + deviation * quantile).to_le_bytes();
        }
        Normal(values)
    }

    /// Fills `out` with the bytes of the tensor `key` from byte `start` on.
    pub(super) fn fill(&self, key: u64, start: u64, out: &mut [u8]) {
        let mut counter = start / 8;
        let head = out.len().min((start.next_multiple_of(8) - start) as usize);
        let (head, out) = out.split_at_mut(head);
        if !head.is_empty() {
            let first = (start % 8) as usize;
            head.copy_from_slice(&self.group(mix(key, counter))[first..first + head.len()]);
            counter += 1;
        }
        let (groups, tail) = out.as_chunks_mut::<8>();
        for group in groups {
            *group = self.group(mix(key, counter));
            counter += 1;
        }
        tail.copy_from_slice(&self.group(mix(key, counter))[..tail.len()]);
    }

    fn group(&self, bits: u64) -> [u8; 8] {
        let value = |shift: u32| u64::from(u16::from_le_bytes(self.0[(bits >> shift) as usize % VALUES]));
        (value(0) | value(16) << 16 | value(32) << 32 | value(48) << 48).to_le_bytes()
    }
}

/// SplitMix64: D. Lemire's and S. Vigna's mixing of a counter (<https://prng.di.unimi.it/splitmix64.c>).
fn mix(key: u64, counter: u64) -> u64 {
    let x = key.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The standard normal quantile, by halving an interval over [`cumulative`].
fn quantile(probability: f64) -> f64 {
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..40 {
        let middle = (low + high) / 2.0;
        if cumulative(middle) < probability { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// The standard normal distribution function: 1/2 + φ(x) (x + x³/3 + x⁵/(3·5) + …), Marsaglia, "Evaluating the Normal Distribution", 2004.
fn cumulative(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 2.0;
        term *= x * x / n;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (probability, expected) in [(0.5, 0.0), (0.975, 1.959964), (0.9, 1.281552), (0.001, -3.090232)] {
            assert!((quantile(probability) - expected).abs() < 1e-6, "{probability}");
        }
    }

    #[test]
    fn elements_do_not_depend_on_where_filling_starts() {
        let normal = Normal::new(&Quantiles::new(), 0.0, 1.0);
        let mut whole = [0; 210];
        normal.fill(7, 0, &mut whole);
        for (start, end) in [(64, 210), (0, 3), (1, 2), (5, 8), (7, 17), (13, 210), (8, 8), (9, 9), (209, 210)] {
            let mut part = vec![0; end - start];
            normal.fill(7, start as u64, &mut part);
            assert_eq!(whole[start..end], part, "{start}..{end}");
        }
    }

    #[test]
    fn the_moments_are_right() {
        let mut bytes = vec![0; 1 << 20];
        Normal::new(&Quantiles::new(), 1.0, 0.25).fill(3, 0, &mut bytes);
        let values: Vec<f64> = bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let square = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / values.len() as f64;
        assert!((mean - 1.0).abs() < 2e-3, "{mean}");
        assert!((square.sqrt() - 0.25).abs() < 2e-3, "{square}");
        let (mut other, mut again) = (vec![0; 64], vec![0; 64]);
        Normal::new(&Quantiles::new(), 1.0, 0.25).fill(4, 0, &mut other);
        Normal::new(&Quantiles::new(), 1.0, 0.25).fill(3, 0, &mut again);
        assert_eq!(again, bytes[..64]);
        assert_ne!(again, other);
    }
}
