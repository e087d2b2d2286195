//! Conversions between element types, exact by integer arithmetic where Cranelift has no instruction for them.

use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{InstBuilder, Value as ClifValue, types};
use moec_ir::tile::{Type, Value};

use super::{Lowering, Parts};

impl Lowering<'_> {
    pub(super) fn bitcast(&mut self, to: Type, a: Value) -> Parts {
        match to {
            Type::Int => {
                let a = self.scalar(a);
                let bits = self.cast(types::I32, a);
                Parts::One(self.b.ins().uextend(types::I64, bits))
            }
            Type::F32 => {
                let a = self.scalar(a);
                let bits = self.b.ins().ireduce(types::I32, a);
                Parts::One(self.cast(types::F32, bits))
            }
            Type::VecF32 | Type::VecI32 | Type::VecI8 if to == self.ty(a) => self.values[a.0 as usize],
            Type::VecF32 | Type::VecI32 | Type::VecI8 => self.map(a, |s, a| s.cast(super::clif_type(to), a)),
            Type::Bool | Type::Mask => unreachable!("{}: no bitcast to {to}", self.function.name),
        }
    }

    /// One part, nearest even; `i32::MIN` where it does not fit, which x86-64's conversion gives by itself.
    pub(super) fn float_to_int(&mut self, x: ClifValue) -> ClifValue {
        let x = self.b.ins().nearest(x);
        if self.cpu.x86 {
            return self.b.ins().x86_cvtt2dq(types::I32X4, x);
        }
        let n = self.b.ins().fcvt_to_sint_sat(types::I32X4, x);
        let limit = self.constant32(types::F32X4, 2_147_483_648.0f32.to_bits());
        let fits = self.b.ins().fcmp(FloatCC::LessThan, x, limit);
        let least = self.constant32(types::I32X4, i32::MIN.cast_unsigned());
        self.b.ins().bitselect(fits, n, least)
    }

    /// Four f16 in the low halves of 32-bit lanes, sign-extended, to f32.
    ///
    /// The bits move to where a float has them, and a multiplication by 2^112 corrects the exponent, of subnormal numbers too. An
    /// exponent of all ones is completed before, so that infinity stays what it is; the multiplication makes NaN quiet.
    pub(super) fn widen_f16(&mut self, h: ClifValue) -> ClifValue {
        let moved = self.b.ins().ishl_imm_u(h, 13);
        let kept = self.constant32(types::I32X4, 0x8fff_e000);
        let bits = self.b.ins().band(moved, kept);
        let exponent = self.constant32(types::I32X4, 0x0f80_0000);
        let masked = self.b.ins().band(moved, exponent);
        let special = self.b.ins().icmp(IntCC::Equal, masked, exponent);
        let rest = self.constant32(types::I32X4, 0x7000_0000);
        let completion = self.b.ins().band(special, rest);
        let bits = self.b.ins().bor(bits, completion);
        let x = self.cast(types::F32X4, bits);
        let scale = self.constant32(types::F32X4, (127 + 112) << 23);
        self.b.ins().fmul(x, scale)
    }

    /// Four f32 to f16 in the low halves of 32-bit lanes, the high halves zero; nearest even, overflow to infinity, NaN
    /// quiet with its upper payload bits.
    pub(super) fn narrow_f16(&mut self, x: ClifValue) -> ClifValue {
        let bits = self.cast(types::I32X4, x);
        let mut constant = |bits| self.constant32(types::I32X4, bits);
        let magnitude_mask = constant(0x7fff_ffff);
        let one = constant(1);
        // Moves the exponent's bias, and half of the last place kept minus one.
        let rebias = constant(0xc800_0fff);
        // The least normal number, and where rounding may no longer carry to infinity by itself.
        let (least_normal, too_large) = (constant(0x3880_0000), constant(0x4780_0000));
        let (infinity, f32_infinity) = (constant(0x7c00), constant(0x7f80_0000));
        let (payload, quiet) = (constant(0x01ff), constant(0x7e00));
        // 0.5, whose last place is the least subnormal number of f16.
        let half_bits = constant(0x3f00_0000);

        let magnitude = self.b.ins().band(bits, magnitude_mask);
        let sign = self.b.ins().bxor(bits, magnitude);
        let sign = self.b.ins().ushr_imm_u(sign, 16);
        let shifted = self.b.ins().ushr_imm_u(magnitude, 13);

        let odd = self.b.ins().band(shifted, one);
        let normal = self.b.ins().iadd(magnitude, rebias);
        let normal = self.b.ins().iadd(normal, odd);
        let normal = self.b.ins().ushr_imm_u(normal, 13);

        let half = self.cast(types::F32X4, half_bits);
        let subnormal = self.cast(types::F32X4, magnitude);
        let subnormal = self.b.ins().fadd(subnormal, half);
        let subnormal = self.cast(types::I32X4, subnormal);
        let subnormal = self.b.ins().isub(subnormal, half_bits);

        let nan = self.b.ins().band(shifted, payload);
        let nan = self.b.ins().bor(nan, quiet);

        // Magnitudes are not negative, so signed comparisons do.
        let is_subnormal = self.b.ins().icmp(IntCC::SignedLessThan, magnitude, least_normal);
        let is_large = self.b.ins().icmp(IntCC::SignedGreaterThanOrEqual, magnitude, too_large);
        let is_nan = self.b.ins().icmp(IntCC::SignedGreaterThan, magnitude, f32_infinity);
        let h = self.b.ins().bitselect(is_subnormal, subnormal, normal);
        let h = self.b.ins().bitselect(is_large, infinity, h);
        let h = self.b.ins().bitselect(is_nan, nan, h);
        self.b.ins().bor(h, sign)
    }
}
