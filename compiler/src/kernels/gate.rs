//! A row multiplied by the sigmoid of its gate: what a shared expert's result goes through.
//!
//! Deliberately absent: the gate's product, which is a matrix of one row.

use moec_abi::LANES;
use moec_ir::math::build_sigmoid;
use moec_ir::tile::{Function, Memory, build::Builder};

use super::common::{VECTOR, load_f32, store_f32};

/// `y[i] = x[i] × sigmoid(gate)` for `n` f32 elements.
///
/// Parameters: `x` — address of f32; `gate` — address of one f32; `y` — address of f32, may be `x`, does not overlap it otherwise;
/// `n` — a count, a multiple of 16.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GateRow;

impl GateRow {
    /// The kernel's name.
    pub fn name(&self) -> String {
        "gate_row".to_string()
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["x", "gate", "y", "n"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [x, gate, y, n]) = Builder::new(self.name(), ["x", "gate", "y", "n"]);
        let b = &mut builder;
        let gate = b.load_scalar(Memory::F32, gate, 0);
        let open = build_sigmoid(b, gate);
        let open = b.splat(open);
        let start = b.int(0);
        let end = b.mul_int(n, VECTOR / LANES as i64);
        b.for_loop(start, end, VECTOR, &[], |b, at, _| {
            let from = b.add(x, at);
            let v = load_f32(b, from, 0);
            let v = b.mul(v, open);
            let to = b.add(y, at);
            store_f32(b, v, to, 0);
            Vec::new()
        });
        builder.finish()
    }
}
