//! The elementary functions that the graph evaluator, the tile evaluator and every kernel share, bit for bit.
//!
//! Each function comes twice: on numbers, and as `build_*`, which emits the very same sequence of IEEE operations into tile
//! IR for a scalar (F32) or a logical vector (VecF32). Nothing here calls a library's `exp`: that would differ from machine to
//! machine. Deliberately absent: functions whose result does not reach the bits of a model (RoPE tables are computed when
//! a model is built).

use crate::tile::build::Builder;
use crate::tile::{Compare, Reduce, Shift, Type, Value};

/// [`exp`] clamps its argument to this; `exp(EXP_MAX)` is about 2.2e38.
pub const EXP_MAX: f32 = 88.3;
/// [`exp`] gives zero below this: its result is never subnormal.
pub const EXP_MIN: f32 = -87.3;

/// Adding it to a number below 2^22 in magnitude leaves the nearest integer (ties to even) in the low bits.
const ROUND_MAGIC: f32 = 12_582_912.0;
/// ln 2 in two parts; a small integer times the first is exact.
const LN2_HIGH: f32 = 0.693_145_75;
const LN2_LOW: f32 = 1.428_606_8e-6;
/// e^r = 1 + r + Σ c·r^i on |r| ≤ ln 2 / 2, relative error 3.3e-9: r^6 first, down to r^2, as bits.
const EXP_COEFFICIENTS: [u32; 5] = [0x3ab5_68ac, 0x3c09_1f98, 0x3d2a_ac27, 0x3e2a_aa45, 0x3eff_fffe];

/// tanh x = x + x³·Σ c·x^2i for |x| < 1/2, relative error 1.5e-8: x^6 first, down to the constant, as bits.
const TANH_COEFFICIENTS: [u32; 4] = [0x3c8d_3e07, 0xbd59_463b, 0x3e08_74fe, 0xbeaa_aa6b];
/// 2·√(2/π).
const GELU_STEP: f32 = 1.595_769_2;
const GELU_CUBE: f32 = 0.044_715;

/// e^x within 1 ulp for `EXP_MIN <= x <= EXP_MAX`; 0 below, `exp(EXP_MAX)` above, NaN for NaN.
///
/// Cody-Waite reduction `x = n·ln 2 + r`, a polynomial of degree 6 by Horner's rule with FMA, and `n` added to the exponent.
pub fn exp(x: f32) -> f32 {
    let clamped = min(EXP_MAX, x);
    let t = clamped.mul_add(std::f32::consts::LOG2_E, ROUND_MAGIC);
    let n = t - ROUND_MAGIC;
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    let [first, rest @ ..] = EXP_COEFFICIENTS.map(f32::from_bits);
    let mut p = first;
    for c in rest {
        p = p.mul_add(r, c);
    }
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    let y = f32::from_bits(p.to_bits().wrapping_add(t.to_bits() << 23));
    if x < EXP_MIN { 0.0 } else { y }
}

/// [`exp`] of an F32 or VecF32 in tile IR.
pub fn build_exp(b: &mut Builder, x: Value) -> Value {
    let ty = b.ty(x);
    let max = constant(b, ty, EXP_MAX);
    let clamped = b.min(max, x);
    let log2e = constant(b, ty, std::f32::consts::LOG2_E);
    let magic = constant(b, ty, ROUND_MAGIC);
    let t = b.fma(clamped, log2e, magic);
    let n = b.sub(t, magic);
    let ln2_high = constant(b, ty, -LN2_HIGH);
    let r = b.fma(n, ln2_high, clamped);
    let ln2_low = constant(b, ty, -LN2_LOW);
    let r = b.fma(n, ln2_low, r);
    let [first, rest @ ..] = EXP_COEFFICIENTS.map(f32::from_bits);
    let mut p = constant(b, ty, first);
    for c in rest {
        let c = constant(b, ty, c);
        p = b.fma(p, r, c);
    }
    let one = constant(b, ty, 1.0);
    p = b.fma(p, r, one);
    p = b.fma(p, r, one);
    let bits = if ty == Type::F32 { Type::Int } else { Type::VecI32 };
    let p = b.bitcast(bits, p);
    let t = b.bitcast(bits, t);
    let t = b.shift(Shift::Left, t, 23);
    let y = b.add(p, t);
    let y = b.bitcast(ty, y);
    let min = constant(b, ty, EXP_MIN);
    let below = b.compare(Compare::Less, x, min);
    let zero = constant(b, ty, 0.0);
    b.select(below, zero, y)
}

/// `x / (1 + exp(0 - x))`.
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(0.0 - x))
}

/// [`silu`] of an F32 or VecF32 in tile IR.
pub fn build_silu(b: &mut Builder, x: Value) -> Value {
    let (_, below) = build_below(b, x);
    b.div(x, below)
}

/// `1 / (1 + exp(0 - x))`.
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(0.0 - x))
}

/// [`sigmoid`] of an F32 or VecF32 in tile IR.
pub fn build_sigmoid(b: &mut Builder, x: Value) -> Value {
    let (one, below) = build_below(b, x);
    b.div(one, below)
}

/// `x × sigmoid(2·√(2/π)·(x + 0.044715·x³))`, which is the tanh approximation of GELU, `x/2 × (1 + tanh(√(2/π)·(x + 0.044715·x³)))`, without its
/// cancellation: `x / (1 + exp(0 - s))` with `s = (GELU_STEP·x) × fma(GELU_CUBE·x, x, 1)`.
pub fn gelu(x: f32) -> f32 {
    let s = (GELU_STEP * x) * (GELU_CUBE * x).mul_add(x, 1.0);
    x / (1.0 + exp(0.0 - s))
}

/// [`gelu`] of an F32 or VecF32 in tile IR.
pub fn build_gelu(b: &mut Builder, x: Value) -> Value {
    let ty = b.ty(x);
    let (step, cube, one) = (constant(b, ty, GELU_STEP), constant(b, ty, GELU_CUBE), constant(b, ty, 1.0));
    let cubed = b.mul(cube, x);
    let cubed = b.fma(cubed, x, one);
    let s = b.mul(step, x);
    let s = b.mul(s, cubed);
    let (_, below) = build_below(b, s);
    b.div(x, below)
}

/// tanh within 2 ulp, of x's sign, never beyond ±1; NaN for NaN.
///
/// Below 1/2 in magnitude `x + x³·R(x²)` with R of degree 3; else `1 - 2 / (exp(2·|x|) + 1)` with the sign of x.
pub fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    let far = 1.0 - 2.0 / (exp(magnitude + magnitude) + 1.0);
    let far = if x < 0.0 { 0.0 - far } else { far };
    let square = x * x;
    let [first, rest @ ..] = TANH_COEFFICIENTS.map(f32::from_bits);
    let r = rest.into_iter().fold(first, |r, c| r.mul_add(square, c));
    let near = (x * square).mul_add(r, x);
    if magnitude < 0.5 { near } else { far }
}

/// [`tanh`] of an F32 or VecF32 in tile IR.
pub fn build_tanh(b: &mut Builder, x: Value) -> Value {
    let ty = b.ty(x);
    let magnitude = b.abs(x);
    let doubled = b.add(magnitude, magnitude);
    let e = build_exp(b, doubled);
    let (zero, one, two) = (constant(b, ty, 0.0), constant(b, ty, 1.0), constant(b, ty, 2.0));
    let e = b.add(e, one);
    let short = b.div(two, e);
    let far = b.sub(one, short);
    let negative = b.compare(Compare::Less, x, zero);
    let negated = b.sub(zero, far);
    let far = b.select(negative, negated, far);
    let square = b.mul(x, x);
    let [first, rest @ ..] = TANH_COEFFICIENTS.map(f32::from_bits);
    let mut r = constant(b, ty, first);
    for c in rest {
        let c = constant(b, ty, c);
        r = b.fma(r, square, c);
    }
    let cube = b.mul(x, square);
    let near = b.fma(cube, r, x);
    let half = constant(b, ty, 0.5);
    let is_near = b.compare(Compare::Less, magnitude, half);
    b.select(is_near, near, far)
}

/// `cap × tanh(x × (1 / cap))`: what soft-capping with `cap` makes of a logit.
pub fn soft_cap(x: f32, cap: f32) -> f32 {
    cap * tanh(x * (1.0 / cap))
}

/// [`soft_cap`] of an F32 or VecF32 in tile IR.
pub fn build_soft_cap(b: &mut Builder, x: Value, cap: f32) -> Value {
    let ty = b.ty(x);
    let inverse = constant(b, ty, 1.0 / cap);
    let x = b.mul(x, inverse);
    let y = build_tanh(b, x);
    let cap = constant(b, ty, cap);
    b.mul(cap, y)
}

/// 1, and `1 + exp(0 - x)`.
fn build_below(b: &mut Builder, x: Value) -> (Value, Value) {
    let ty = b.ty(x);
    let zero = constant(b, ty, 0.0);
    let negated = b.sub(zero, x);
    let e = build_exp(b, negated);
    let one = constant(b, ty, 1.0);
    let below = b.add(one, e);
    (one, below)
}

/// The sum of 16 lanes in the order of [`Reduce::Add`].
pub fn reduce_add(lanes: [f32; 16]) -> f32 {
    reduce(lanes, |a, b| a + b)
}

/// The maximum of 16 lanes in the order of [`Reduce::Max`].
pub fn reduce_max(lanes: [f32; 16]) -> f32 {
    reduce(lanes, max)
}

/// Lanes `l` and `l + 8`, then `l` and `l + 4`, then `l + 2`, then `l + 1`.
pub(crate) fn reduce<T: Copy>(mut lanes: [T; 16], f: impl Fn(T, T) -> T) -> T {
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] = f(lanes[l], lanes[l + half]);
        }
    }
    lanes[0]
}

/// `1 / sqrt(mean(x²) + eps)`, what RMS norm multiplies a row by. The squares go into 16 partial sums, element `i` into
/// `i mod 16`, by FMA; then [`reduce_add`].
pub fn rms_scale(x: &[f32], eps: f32) -> f32 {
    padded_rms_scale(x, x.len(), eps)
}

/// [`rms_scale`] of a row with zeros between its `width` elements.
pub fn padded_rms_scale(x: &[f32], width: usize, eps: f32) -> f32 {
    let mut partial = [0.0f32; 16];
    for (i, &v) in x.iter().enumerate() {
        partial[i % 16] = v.mul_add(v, partial[i % 16]);
    }
    1.0 / (reduce_add(partial) / width as f32 + eps).sqrt()
}

/// The end of [`rms_scale`] in tile IR: `partial` holds the 16 sums over a row of `width` elements; the result is an F32.
pub fn build_rms_scale(b: &mut Builder, partial: Value, width: usize, eps: f32) -> Value {
    let sum = b.reduce(Reduce::Add, partial);
    let width = b.f32(width as f32);
    let mean = b.div(sum, width);
    let eps = b.f32(eps);
    let mean = b.add(mean, eps);
    let root = b.sqrt(mean);
    let one = b.f32(1.0);
    b.div(one, root)
}

/// Scale of a block of activations whose greatest magnitude is `amax`, and what to multiply the block by before it is
/// rounded to bytes: `(amax / 127, 127 / amax)`, the second 0 where it would be infinite (`amax` is 0 or below 127 / [`f32::MAX`]),
/// so that such a block becomes zeros.
pub fn quantize_scale(amax: f32) -> (f32, f32) {
    let inverse = 127.0 / amax;
    (amax * (1.0 / 127.0), if inverse == f32::INFINITY { 0.0 } else { inverse })
}

/// [`quantize_scale`] of an F32 in tile IR.
pub fn build_quantize_scale(b: &mut Builder, amax: Value) -> (Value, Value) {
    let step = b.f32(1.0 / 127.0);
    let scale = b.mul(amax, step);
    let zero = b.f32(0.0);
    let top = b.f32(127.0);
    let inverse = b.div(top, amax);
    let infinity = b.f32(f32::INFINITY);
    let is_infinite = b.compare(Compare::Equal, inverse, infinity);
    (scale, b.select(is_infinite, zero, inverse))
}

/// To the nearest integer, ties to even; `i32::MIN` for NaN and for what does not fit. [`crate::tile::Op::FloatToInt`].
pub fn float_to_int(x: f32) -> i32 {
    let r = x.round_ties_even();
    if (-2_147_483_648.0..2_147_483_648.0).contains(&r) { r as i32 } else { i32::MIN }
}

/// `if a < b { a } else { b }`: [`crate::tile::Binary::Min`].
pub fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// `if a > b { a } else { b }`: [`crate::tile::Binary::Max`].
pub fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

fn constant(b: &mut Builder, ty: Type, x: f32) -> Value {
    match ty {
        Type::F32 => b.f32(x),
        Type::VecF32 => b.splat_f32(x),
        Type::Int | Type::Bool | Type::VecI32 | Type::VecI8 | Type::Mask => panic!("no elementary functions of {ty}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Error of `got` in units of the last place of the f32 nearest to `exact`.
    fn ulps(got: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        let ulp = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
        ((f64::from(got) - exact) / ulp).abs()
    }

    #[test]
    fn exp_is_accurate_to_one_ulp() {
        let (low, high) = ((-EXP_MIN).to_bits(), EXP_MAX.to_bits());
        let worst = (0..low).step_by(997).map(|b| -f32::from_bits(b)).chain((0..high).step_by(997).map(f32::from_bits));
        let (error, at) =
            worst.map(|x| (ulps(exp(x), f64::from(x).exp()), x)).fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a });
        assert!(error < 1.0, "exp({at}) is off by {error} ulp");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-3.0e38), 0.0);
        assert_eq!(exp(-87.31), 0.0);
        assert!(exp(EXP_MIN) >= f32::MIN_POSITIVE);
        assert_eq!(exp(f32::INFINITY), exp(EXP_MAX));
        assert!(exp(EXP_MAX).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn silu_follows_its_definition() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(200.0), 200.0);
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
        assert!((silu(-5.0) + 0.033_464_26).abs() < 1e-7);
        assert!(silu(-1000.0).abs() < 1e-30);
    }

    #[test]
    fn sigmoid_follows_its_definition() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert_eq!(sigmoid(200.0), 1.0);
        assert!((sigmoid(1.0) - 0.731_058_6).abs() < 1e-6);
        assert!(sigmoid(-1000.0) < 1e-30 && sigmoid(-5.0) > 0.006);
    }

    #[test]
    fn tanh_is_accurate_to_two_ulps() {
        let magnitudes = || (0..9.5f32.to_bits()).step_by(997).map(f32::from_bits);
        let all = magnitudes().chain(magnitudes().map(|x| -x));
        let (error, at) = all
            .map(|x| (ulps(tanh(x.abs()), f64::from(x.abs()).tanh()), x))
            .fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a });
        assert!(error < 2.0, "tanh({at}) is off by {error} ulp");
        assert!(magnitudes().all(|x| tanh(-x) == -tanh(x)));
        assert_eq!([tanh(0.0), tanh(20.0), tanh(-20.0), tanh(f32::INFINITY)], [0.0, 1.0, -1.0, 1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn gelu_follows_its_definition() {
        let expected =
            |x: f64| x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
        for i in -600..=600 {
            let x = i as f32 / 100.0;
            let difference = (f64::from(gelu(x)) - expected(f64::from(x))).abs();
            assert!(difference < 4e-7 * f64::from(x.abs().max(0.1)), "gelu({x}) is off by {difference:e}");
        }
        assert_eq!((gelu(0.0), gelu(200.0)), (0.0, 200.0));
        assert!(gelu(-1000.0).abs() < 1e-30);
    }

    #[test]
    fn soft_caps_keep_small_numbers_and_bound_large_ones() {
        assert!((soft_cap(0.01, 30.0) - 0.01).abs() < 1e-8);
        assert!((f64::from(soft_cap(25.0, 50.0)) - 50.0 * 0.5f64.tanh()).abs() < 1e-5);
        assert_eq!((soft_cap(1e9, 30.0), soft_cap(-1e9, 30.0)), (30.0, -30.0));
    }

    #[test]
    fn reductions_follow_the_tree() {
        // 1e8 + 1 is lost in f32, so the order shows: lane 0 meets lane 8 first.
        let mut lanes = [0.0; 16];
        (lanes[0], lanes[8], lanes[1]) = (1.0e8, -1.0e8, 1.0);
        assert_eq!(reduce_add(lanes), 1.0);
        (lanes[8], lanes[1], lanes[9]) = (1.0, -1.0e8, 0.0);
        assert_eq!(reduce_add(lanes), 0.0);
        assert_eq!(reduce_max(std::array::from_fn(|i| -(i as f32))), 0.0);
    }

    #[test]
    fn rms_of_a_constant_row() {
        assert_eq!(rms_scale(&[2.0; 48], 0.0), 0.5);
    }

    #[test]
    fn blocks_too_small_for_a_scale_become_zeros() {
        assert_eq!(quantize_scale(0.0), (0.0, 0.0));
        assert_eq!(quantize_scale(1e-37).1, 0.0);
        assert_eq!(quantize_scale(f32::from_bits(1)).1, 0.0);
        let least = 127.0 / f32::MAX;
        assert!(quantize_scale(least).1.is_finite() && quantize_scale(least).1 > 3e38);
        assert_eq!(quantize_scale(254.0), (2.0, 0.5));
    }

    #[test]
    fn float_to_int_is_total() {
        assert_eq!([0.5, 1.5, 2.5, -0.5, -1.5].map(float_to_int), [0, 2, 2, 0, -2]);
        assert_eq!([f32::NAN, f32::INFINITY, 2_147_483_648.0, -3.0e9].map(float_to_int), [i32::MIN; 4]);
        assert_eq!(float_to_int(2_147_483_520.0), 2_147_483_520);
    }
}
