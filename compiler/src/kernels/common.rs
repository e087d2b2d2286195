//! What the kernel families share: constants of the numerics contract and short idioms of the builder.
//!
//! Deliberately absent: anything with a loop that one family alone needs.

use moec_ir::graph::Activation;
use moec_ir::math::{build_gelu, build_silu};
use moec_ir::tile::{Compare, Memory, Type, Value, build::Builder};

/// Bytes of one logical vector of f32.
pub const VECTOR: i64 = 64;

/// Zero in all lanes.
pub fn zeros(b: &mut Builder) -> Value {
    b.splat_f32(0.0)
}

/// The lane numbers plus `first`.
pub fn lane_numbers(b: &mut Builder, first: i32) -> Value {
    b.lanes(std::array::from_fn(|l| first + l as i32))
}

/// The vector `v` with lanes from `count` on set to zero.
pub fn keep_lanes(b: &mut Builder, v: Value, count: usize) -> Value {
    debug_assert_eq!(b.ty(v), Type::VecF32);
    if count >= 16 {
        return v;
    }
    let lane = lane_numbers(b, 0);
    let limit = b.splat_i32(count as i32);
    let mask = b.compare(Compare::Less, lane, limit);
    let zero = zeros(b);
    b.select(mask, v, zero)
}

/// A loop over `count` (a constant) steps whose body gets the carried values; none is made for 0 steps and no loop for one.
pub fn counted(
    b: &mut Builder,
    count: usize,
    carried: Vec<Value>,
    body: impl FnOnce(&mut Builder, &[Value]) -> Vec<Value>,
) -> Vec<Value> {
    match count {
        0 => carried,
        1 => body(b, &carried),
        _ => {
            let (start, end) = (b.int(0), b.int(count as i64));
            b.for_loop(start, end, 1, &carried, |b, _, carried| body(b, carried))
        }
    }
}

/// The code of an activation.
pub fn build_activation(b: &mut Builder, activation: Activation, x: Value) -> Value {
    match activation {
        Activation::Silu => build_silu(b, x),
        Activation::Gelu => build_gelu(b, x),
    }
}

/// Loads 16 f32.
pub fn load_f32(b: &mut Builder, base: Value, offset: i64) -> Value {
    b.load(Memory::F32, base, offset)
}

/// Stores 16 f32.
pub fn store_f32(b: &mut Builder, v: Value, base: Value, offset: i64) {
    b.store(Memory::F32, v, base, offset);
}

/// Prefetches the lines of `bytes` at `base + offset`.
pub fn prefetch(b: &mut Builder, base: Value, offset: i64, bytes: i64) {
    for line in (0..bytes).step_by(64) {
        b.prefetch(base, offset + line);
    }
}
