//! One elementary operation on rows: what a model is made of before passes fuse it away.
//!
//! Deliberately absent: broadcasting and strides — operands are consecutive elements.

use moec_ir::math::{build_gelu, build_silu};
use moec_ir::tile::{Function, build::Builder};

use super::common::{VECTOR, load_f32, store_f32};

/// What an [`Elementwise`] kernel computes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ElementwiseOp {
    /// `y = a + b`; parameters `a, b, y, n`.
    Add,
    /// `y = a × b`; parameters `a, b, y, n`.
    Mul,
    /// `y = silu(a) × b`; parameters `a, b, y, n`.
    SiluMul,
    /// `y = silu(a)`; parameters `a, y, n`.
    Silu,
    /// `y = gelu(a)`; parameters `a, y, n`.
    Gelu,
    /// `y = a`; parameters `a, y, n`.
    Copy,
}

impl ElementwiseOp {
    /// All of them.
    pub const ALL: [ElementwiseOp; 6] = [
        ElementwiseOp::Add,
        ElementwiseOp::Mul,
        ElementwiseOp::SiluMul,
        ElementwiseOp::Silu,
        ElementwiseOp::Gelu,
        ElementwiseOp::Copy,
    ];

    /// The name in a kernel's name.
    pub const fn name(self) -> &'static str {
        match self {
            ElementwiseOp::Add => "add",
            ElementwiseOp::Mul => "mul",
            ElementwiseOp::SiluMul => "silu_mul",
            ElementwiseOp::Silu => "silu",
            ElementwiseOp::Gelu => "gelu",
            ElementwiseOp::Copy => "copy",
        }
    }

    /// Whether it takes two operands.
    pub const fn is_binary(self) -> bool {
        match self {
            ElementwiseOp::Add | ElementwiseOp::Mul | ElementwiseOp::SiluMul => true,
            ElementwiseOp::Silu | ElementwiseOp::Gelu | ElementwiseOp::Copy => false,
        }
    }
}

/// `y[i] = op(a[i], b[i])` for `n` f32 elements.
///
/// Parameters: `a`, `b` (two-operand operations only), `y` — addresses of f32; `n` — a count, a multiple of 16. `y` may be `a`
/// or `b`; it does not overlap them otherwise.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Elementwise {
    /// The operation.
    pub op: ElementwiseOp,
}

impl Elementwise {
    /// The kernel's name.
    pub fn name(&self) -> String {
        self.op.name().to_string()
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        if self.op.is_binary() { &["a", "b", "y", "n"] } else { &["a", "y", "n"] }
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, a, second, y, n) = if self.op.is_binary() {
            let (b, [a, second, y, n]) = Builder::new(self.name(), ["a", "b", "y", "n"]);
            (b, a, Some(second), y, n)
        } else {
            let (b, [a, y, n]) = Builder::new(self.name(), ["a", "y", "n"]);
            (b, a, None, y, n)
        };
        let b = &mut builder;
        let start = b.int(0);
        let end = b.mul_int(n, 4);
        b.for_loop(start, end, VECTOR, &[], |b, at, _| {
            let from = b.add(a, at);
            let a = load_f32(b, from, 0);
            let second = second.map(|base| {
                let from = b.add(base, at);
                load_f32(b, from, 0)
            });
            let out = match (self.op, second) {
                (ElementwiseOp::Add, Some(s)) => b.add(a, s),
                (ElementwiseOp::Mul, Some(s)) => b.mul(a, s),
                (ElementwiseOp::SiluMul, Some(s)) => {
                    let gate = build_silu(b, a);
                    b.mul(gate, s)
                }
                (ElementwiseOp::Silu, _) => build_silu(b, a),
                (ElementwiseOp::Gelu, _) => build_gelu(b, a),
                (ElementwiseOp::Copy, _) => a,
                (ElementwiseOp::Add | ElementwiseOp::Mul | ElementwiseOp::SiluMul, None) => {
                    unreachable!("two-operand operations have two operands")
                }
            };
            let to = b.add(y, at);
            store_f32(b, out, to, 0);
            Vec::new()
        });
        builder.finish()
    }
}
