//! Arithmetic, comparisons, reductions and dot products.

use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{InstBuilder, Value as ClifValue, types};
use moec_ir::tile::{Binary, Compare, Shift, Type, Value};

use super::{Lowering, Parts};

impl Lowering<'_> {
    pub(super) fn binary(&mut self, op: Binary, a: Value, b: Value) -> Parts {
        let ty = self.ty(a);
        if let (Binary::Mul, Some(n)) = (op, self.ints[b.0 as usize])
            && n > 0
            && n.count_ones() == 1
        {
            // Addressing modes can scale by a shift.
            let a = self.scalar(a);
            return Parts::One(self.b.ins().ishl_imm_u(a, i64::from(n.trailing_zeros())));
        }
        self.zip(a, b, |s, a, b| s.binary_part(op, ty, a, b))
    }

    fn binary_part(&mut self, op: Binary, ty: Type, a: ClifValue, b: ClifValue) -> ClifValue {
        let float = matches!(ty, Type::F32 | Type::VecF32);
        match op {
            Binary::Add if float => self.b.ins().fadd(a, b),
            Binary::Add => self.b.ins().iadd(a, b),
            Binary::Sub if float => self.b.ins().fsub(a, b),
            Binary::Sub => self.b.ins().isub(a, b),
            Binary::Mul if float => self.b.ins().fmul(a, b),
            Binary::Mul => self.b.ins().imul(a, b),
            Binary::Div => self.b.ins().fdiv(a, b),
            Binary::Min if float => self.choose_less(ty, a, b, a, b),
            Binary::Min => self.b.ins().smin(a, b),
            Binary::Max if float => self.choose_less(ty, b, a, a, b),
            Binary::Max => self.b.ins().smax(a, b),
            Binary::And => self.b.ins().band(a, b),
            Binary::Or => self.b.ins().bor(a, b),
            Binary::Xor => self.b.ins().bxor(a, b),
        }
    }

    /// `if x < y { a } else { b }`, in the shape that x86-64 has as `minps` and `maxps`.
    fn choose_less(&mut self, ty: Type, x: ClifValue, y: ClifValue, a: ClifValue, b: ClifValue) -> ClifValue {
        let less = self.b.ins().fcmp(FloatCC::LessThan, x, y);
        if ty == Type::F32 {
            return self.b.ins().select(less, a, b);
        }
        let less = self.cast(types::F32X4, less);
        self.b.ins().bitselect(less, a, b)
    }

    pub(super) fn shift(&mut self, op: Shift, a: Value, by: u8) -> Parts {
        self.map(a, |s, a| match op {
            Shift::Left => s.b.ins().ishl_imm_u(a, i64::from(by)),
            Shift::RightUnsigned => s.b.ins().ushr_imm_u(a, i64::from(by)),
            Shift::RightSigned => s.b.ins().sshr_imm_u(a, i64::from(by)),
        })
    }

    pub(super) fn compare(&mut self, op: Compare, a: Value, b: Value) -> Parts {
        let float = matches!(self.ty(a), Type::F32 | Type::VecF32);
        let (float_cc, int_cc) = match op {
            Compare::Equal => (FloatCC::Equal, IntCC::Equal),
            Compare::Less => (FloatCC::LessThan, IntCC::SignedLessThan),
            Compare::LessEqual => (FloatCC::LessThanOrEqual, IntCC::SignedLessThanOrEqual),
            Compare::Greater => (FloatCC::GreaterThan, IntCC::SignedGreaterThan),
            Compare::GreaterEqual => (FloatCC::GreaterThanOrEqual, IntCC::SignedGreaterThanOrEqual),
        };
        self.zip(a, b, |s, a, b| if float { s.b.ins().fcmp(float_cc, a, b) } else { s.b.ins().icmp(int_cc, a, b) })
    }

    /// Of vectors as integers: x86-64 blends when it sees that the condition comes from a comparison of the same type.
    pub(super) fn select(&mut self, c: Value, a: Value, b: Value) -> Parts {
        if self.ty(c) == Type::Bool {
            let c = self.scalar(c);
            return self.zip(a, b, |s, a, b| s.b.ins().select(c, a, b));
        }
        let (c, float) = (self.vector(c), self.ty(a) == Type::VecF32);
        let mut part = 0;
        self.zip(a, b, |s, a, b| {
            let c = c[part];
            part += 1;
            if !float {
                return s.b.ins().bitselect(c, a, b);
            }
            let (a, b) = (s.cast(types::I32X4, a), s.cast(types::I32X4, b));
            let chosen = s.b.ins().bitselect(c, a, b);
            s.cast(types::F32X4, chosen)
        })
    }

    pub(super) fn splat(&mut self, a: Value) -> Parts {
        let (int, float) = (self.ints[a.0 as usize], self.floats[a.0 as usize]);
        let part = match (int, float) {
            (Some(n), _) => self.constant32(types::I32X4, n as u32),
            (_, Some(bits)) => self.constant32(types::F32X4, bits),
            _ if self.ty(a) == Type::F32 => {
                let a = self.scalar(a);
                self.b.ins().splat(types::F32X4, a)
            }
            _ => {
                let a = self.scalar(a);
                let a = self.b.ins().ireduce(types::I32, a);
                self.b.ins().splat(types::I32X4, a)
            }
        };
        Parts::Four([part; 4])
    }

    /// Lanes `l` and `l + 8`, then `l + 4`, within parts; `l + 2` and `l + 1` as scalars.
    pub(super) fn reduce(&mut self, a: Value, op: Binary) -> Parts {
        let ty = self.ty(a);
        let [p0, p1, p2, p3] = self.vector(a);
        let low = self.binary_part(op, ty, p0, p2);
        let high = self.binary_part(op, ty, p1, p3);
        let four = self.binary_part(op, ty, low, high);
        let [l0, l1, l2, l3] = [0u8, 1, 2, 3].map(|l| self.b.ins().extractlane(four, l));
        let scalar = if ty == Type::VecF32 { Type::F32 } else { Type::Int };
        let even = self.binary_part(op, scalar, l0, l2);
        let odd = self.binary_part(op, scalar, l1, l3);
        let all = self.binary_part(op, scalar, even, odd);
        Parts::One(if scalar == Type::Int { self.b.ins().sextend(types::I64, all) } else { all })
    }

    /// One part of a dot product: bytes `w`, signed or not, and signed bytes `a`.
    pub(super) fn dot(&mut self, acc: ClifValue, w: ClifValue, a: ClifValue, signed: bool) -> ClifValue {
        let as_tree = !self.cpu.x86 || (self.cpu.dot && !signed);
        if as_tree { self.dot_tree(acc, w, a, signed) } else { self.dot_pairs(acc, w, a, signed) }
    }

    /// The expression that, with unsigned `w`, Cranelift turns into one `vpdpbusd` (it wants the signed operand first) or `usdot` (the unsigned
    /// one first). It is also right where it is not folded: products fit 16 bits signed.
    fn dot_tree(&mut self, acc: ClifValue, w: ClifValue, a: ClifValue, signed: bool) -> ClifValue {
        let (a_low, a_high) = (self.b.ins().swiden_low(a), self.b.ins().swiden_high(a));
        let (w_low, w_high) = match signed {
            true => (self.b.ins().swiden_low(w), self.b.ins().swiden_high(w)),
            false => (self.b.ins().uwiden_low(w), self.b.ins().uwiden_high(w)),
        };
        let product = |s: &mut Self, a, w| if s.cpu.x86 { s.b.ins().imul(a, w) } else { s.b.ins().imul(w, a) };
        let products = [product(self, a_low, w_low), product(self, a_high, w_high)];
        let [low, high] = products.map(|p| {
            let (low, high) = (self.b.ins().swiden_low(p), self.b.ins().swiden_high(p));
            self.b.ins().iadd_pairwise(low, high)
        });
        let sum = self.b.ins().iadd_pairwise(low, high);
        self.b.ins().iadd(sum, acc)
    }

    /// By `pmaddwd` of even and of odd bytes as 16 bits.
    fn dot_pairs(&mut self, acc: ClifValue, w: ClifValue, a: ClifValue, signed: bool) -> ClifValue {
        let ([w_even, w_odd], [a_even, a_odd]) = (self.pairs(w, signed), self.pairs(a, true));
        let even = self.multiply_add_pairs(w_even, a_even);
        let odd = self.multiply_add_pairs(w_odd, a_odd);
        let sum = self.b.ins().iadd(even, odd);
        self.b.ins().iadd(acc, sum)
    }

    /// The even bytes and the odd bytes of `bytes` as 16 bits.
    fn pairs(&mut self, bytes: ClifValue, signed: bool) -> [ClifValue; 2] {
        if let Some(&made) = self.made.pairs.get(&(bytes, signed)) {
            return made;
        }
        let both = self.cast(types::I16X8, bytes);
        let made = if signed {
            let even = self.b.ins().ishl_imm_u(both, 8);
            [self.b.ins().sshr_imm_u(even, 8), self.b.ins().sshr_imm_u(both, 8)]
        } else {
            let low = self.constant32(types::I16X8, 0x00ff_00ff);
            [self.b.ins().band(both, low), self.b.ins().ushr_imm_u(both, 8)]
        };
        self.made.pairs.insert((bytes, signed), made);
        made
    }

    /// The expression that Cranelift turns into `pmaddwd`.
    fn multiply_add_pairs(&mut self, x: ClifValue, y: ClifValue) -> ClifValue {
        let (x_low, y_low) = (self.b.ins().swiden_low(x), self.b.ins().swiden_low(y));
        let (x_high, y_high) = (self.b.ins().swiden_high(x), self.b.ins().swiden_high(y));
        let low = self.b.ins().imul(x_low, y_low);
        let high = self.b.ins().imul(x_high, y_high);
        self.b.ins().iadd_pairwise(low, high)
    }
}
