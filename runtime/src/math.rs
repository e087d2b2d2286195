//! Functions whose bits must not depend on the machine's math library: sampling and scores repeat everywhere.

/// e to the power `x`, to about 1 unit in the last place, out of IEEE operations only: `x = n ln 2 + r`, a Taylor
/// polynomial in `r`, and a shift of the exponent.
pub fn exp(x: f64) -> f64 {
    /// ln 2 in two parts: the high one has few bits, so that `n * HIGH` is exact.
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    const COEFFICIENTS: [f64; 14] = {
        let mut c = [1.0; 14];
        let mut i = 1;
        while i < 14 {
            c[i] = c[i - 1] / i as f64;
            i += 1;
        }
        c
    };
    if x.is_nan() {
        return x;
    }
    if x < -708.0 {
        return 0.0;
    }
    if x > 709.0 {
        return f64::INFINITY;
    }
    let n = (x * std::f64::consts::LOG2_E).round_ties_even();
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let sum = COEFFICIENTS.iter().rev().fold(0.0, |sum, c| sum * r + c);
    sum * f64::from_bits(((1023 + n as i64) as u64) << 52)
}

/// Index of the largest value, the first of equals; NaN is less than everything. `None` for an empty slice.
pub fn argmax(values: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (index, &value) in values.iter().enumerate() {
        let value = if value.is_nan() { f32::NEG_INFINITY } else { value };
        if best.is_none_or(|(_, most)| value > most) {
            best = Some((index, value));
        }
    }
    best.map(|(index, _)| index)
}

/// ln of the sum of e to the power of each value.
pub fn log_sum_exp(values: &[f32]) -> f64 {
    let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let most = f64::from(most);
    let sum: f64 = values.iter().map(|value| exp(f64::from(*value) - most)).sum();
    most + sum.ln()
}

/// FNV-1a, 64 bit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Fnv1a {
        Fnv1a(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv1a {
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// Adds the bits of values, each as four bytes in little-endian order.
    pub fn update_f32(&mut self, values: &[f32]) {
        values.iter().for_each(|value| self.update(&value.to_bits().to_le_bytes()));
    }

    /// The hash of all that was added.
    pub fn finish(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_as_good_as_the_library() {
        let mut worst: f64 = 0.0;
        for i in -7000..7000 {
            let x = f64::from(i) * 0.1 + 0.0123;
            let expected = x.exp();
            worst = worst.max(((exp(x) - expected) / expected).abs());
        }
        assert!(worst < 4e-16, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(-1e9), exp(f64::NEG_INFINITY), exp(1e9)), (0.0, 0.0, f64::INFINITY));
        assert!(exp(f64::NAN).is_nan());
    }

    #[test]
    fn the_first_of_equals_is_largest() {
        assert_eq!(argmax(&[1.0, 3.0, f32::NAN, 3.0]), Some(1));
        assert_eq!(argmax(&[f32::NAN, f32::NAN]), Some(0));
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn log_sum_exp_of_equals() {
        let x = log_sum_exp(&[100.0; 8]);
        assert!((x - (100.0 + 8f64.ln())).abs() < 1e-12);
    }

    #[test]
    fn fnv_of_known_texts() {
        let hash = |text: &str| {
            let mut hash = Fnv1a::default();
            hash.update(text.as_bytes());
            hash.finish()
        };
        assert_eq!(hash(""), 0xcbf29ce484222325);
        assert_eq!(hash("foobar"), 0x85944171f73967e8);
    }
}
