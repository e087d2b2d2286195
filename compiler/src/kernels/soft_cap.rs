//! Soft-capping of a row: what some models do with their logits.
//!
//! Deliberately absent: soft-capping of attention's scores, which [`super::Attention`] does while it has them.

use moec_abi::LANES;
use moec_ir::math::build_soft_cap;
use moec_ir::tile::{Function, build::Builder};

use super::common::{VECTOR, load_f32, store_f32};

/// `y[i] = cap × tanh(x[i] / cap)` for `n` f32 elements.
///
/// Parameters: `x`, `y` — addresses of f32; `y` may be `x`, and does not overlap it otherwise; `n` — a count, a multiple of 16.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SoftCap {
    /// The cap as the bits of an f32.
    pub cap_bits: u32,
}

impl SoftCap {
    /// The kernel's name.
    pub fn name(&self) -> String {
        format!("soft_cap_{:08x}", self.cap_bits)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["x", "y", "n"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [x, y, n]) = Builder::new(self.name(), ["x", "y", "n"]);
        let b = &mut builder;
        let start = b.int(0);
        let end = b.mul_int(n, VECTOR / LANES as i64);
        b.for_loop(start, end, VECTOR, &[], |b, at, _| {
            let from = b.add(x, at);
            let v = load_f32(b, from, 0);
            let v = build_soft_cap(b, v, f32::from_bits(self.cap_bits));
            let to = b.add(y, at);
            store_f32(b, v, to, 0);
            Vec::new()
        });
        builder.finish()
    }
}
