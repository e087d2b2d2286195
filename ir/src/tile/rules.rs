//! The rules of types: which operands an operation takes and what it gives. The builder and the verifier both ask here.
//!
//! Deliberately absent: scopes and loops ([`super::verify`]).

use super::{Address, Binary, Memory, Op, Reduce, Shift, Type, Value};

impl Op {
    /// Calls `f` with each value that the operation uses; of a loop, those used outside its body.
    pub fn for_each_operand(&self, mut f: impl FnMut(Value)) {
        match self {
            Op::Int(_) | Op::F32(_) | Op::Lanes(_) => {}
            Op::Shift(_, a, _)
            | Op::Sqrt(a)
            | Op::Abs(a)
            | Op::Round(a)
            | Op::Splat(a)
            | Op::IntToFloat(a)
            | Op::FloatToInt(a)
            | Op::Bitcast(_, a)
            | Op::Reduce(_, a)
            | Op::NibbleLow(a)
            | Op::NibbleHigh(a)
            | Op::Lookup(_, a) => f(*a),
            Op::Binary(_, a, b) | Op::Compare(_, a, b) => [*a, *b].into_iter().for_each(f),
            Op::Fma(a, b, c) | Op::Select(a, b, c) | Op::DotU8S8(a, b, c) | Op::DotS8S8(a, b, c) => {
                [*a, *b, *c].into_iter().for_each(f)
            }
            Op::Load(_, at)
            | Op::LoadBytes(at)
            | Op::LoadSplat(_, at)
            | Op::LoadSplatBytes(at)
            | Op::LoadScalar(_, at)
            | Op::LoadInt(at)
            | Op::LoadU32(at)
            | Op::Prefetch(at) => f(at.base),
            Op::Store(_, v, at) | Op::StoreStrided(_, v, at, _) | Op::StoreScalar(_, v, at) => {
                f(*v);
                f(at.base);
            }
            Op::For(l) => {
                f(l.start);
                f(l.end);
                l.initial.iter().copied().for_each(f);
            }
        }
    }
}

/// The type of the result of `op`, `None` when it has none; or what is wrong with its operands. `types` are those of all values. A
/// loop has as many results as carried values: it is not asked here.
pub fn result_type(op: &Op, types: &[Type]) -> Result<Option<Type>, String> {
    use Type::{F32, Int, VecF32, VecI8, VecI32};
    let rules = Rules { types };
    Ok(Some(match op {
        Op::Int(_) => Int,
        Op::F32(_) => F32,
        Op::Lanes(_) => VecI32,
        Op::Binary(op, a, b) => {
            rules.same(*a, *b)?;
            rules.one_of(*a, operand_types(*op))?
        }
        Op::Shift(op, a, by) => {
            let ty = rules.one_of(*a, &[Int, VecI32])?;
            let bits = if ty == Int { 64 } else { 32 };
            if *by >= bits {
                return Err(shift_too_far(*op, ty, *by, bits));
            }
            ty
        }
        Op::Sqrt(a) | Op::Abs(a) | Op::Round(a) => rules.one_of(*a, &[F32, VecF32])?,
        Op::Fma(a, b, c) => {
            rules.same(*a, *b)?;
            rules.same(*a, *c)?;
            rules.one_of(*a, &[F32, VecF32])?
        }
        Op::Compare(_, a, b) => {
            rules.same(*a, *b)?;
            if rules.one_of(*a, &[Int, F32, VecF32, VecI32])?.is_vector() { Type::Mask } else { Type::Bool }
        }
        Op::Select(c, a, b) => {
            rules.same(*a, *b)?;
            let scalar = rules.one_of(*c, &[Type::Bool, Type::Mask])? == Type::Bool;
            rules.one_of(*a, if scalar { &[Int, F32] } else { &[VecF32, VecI32] })?
        }
        Op::Splat(a) => {
            if rules.one_of(*a, &[F32, Int])? == F32 {
                VecF32
            } else {
                VecI32
            }
        }
        Op::IntToFloat(a) => {
            rules.one_of(*a, &[VecI32])?;
            VecF32
        }
        Op::FloatToInt(a) => {
            rules.one_of(*a, &[VecF32])?;
            VecI32
        }
        Op::Bitcast(to, a) => {
            let from: &[Type] = match to {
                VecF32 | VecI32 | VecI8 => &[VecF32, VecI32, VecI8],
                Int => &[F32],
                F32 => &[Int],
                Type::Bool | Type::Mask => return Err(format!("nothing can be cast to {to}")),
            };
            rules.one_of(*a, from)?;
            *to
        }
        Op::Reduce(Reduce::Add, a) => {
            if rules.one_of(*a, &[VecF32, VecI32])? == VecF32 {
                F32
            } else {
                Int
            }
        }
        Op::Reduce(Reduce::Max, a) => {
            rules.one_of(*a, &[VecF32])?;
            F32
        }
        Op::DotU8S8(acc, w, a) | Op::DotS8S8(acc, w, a) => {
            rules.one_of(*w, &[VecI8])?;
            rules.one_of(*a, &[VecI8])?;
            rules.one_of(*acc, &[VecI32])?
        }
        Op::NibbleLow(a) | Op::NibbleHigh(a) | Op::Lookup(_, a) => rules.one_of(*a, &[VecI8])?,
        Op::Load(format, at) | Op::LoadSplat(format, at) => {
            rules.address(at)?;
            format.vector()
        }
        Op::LoadBytes(at) | Op::LoadSplatBytes(at) => {
            rules.address(at)?;
            VecI8
        }
        Op::LoadScalar(format, at) => {
            rules.address(at)?;
            format.scalar()
        }
        Op::LoadInt(at) | Op::LoadU32(at) => {
            rules.address(at)?;
            Int
        }
        Op::Store(format, v, at) => {
            storable(*format)?;
            rules.one_of(*v, &[format.vector()])?;
            rules.address(at)?;
            return Ok(None);
        }
        Op::StoreStrided(format, v, at, _) => {
            if !matches!(format, Memory::F32 | Memory::F16) {
                return Err(format!("there are no strided stores of {}", format.name()));
            }
            rules.one_of(*v, &[VecF32])?;
            rules.address(at)?;
            return Ok(None);
        }
        Op::StoreScalar(format, v, at) => {
            storable(*format)?;
            rules.one_of(*v, &[format.scalar()])?;
            rules.address(at)?;
            return Ok(None);
        }
        Op::Prefetch(at) => {
            rules.address(at)?;
            return Ok(None);
        }
        Op::For(_) => return Ok(None),
    }))
}

fn operand_types(op: Binary) -> &'static [Type] {
    use Type::{F32, Int, VecF32, VecI8, VecI32};
    match op {
        Binary::Add | Binary::Sub | Binary::Mul => &[Int, F32, VecF32, VecI32],
        Binary::Div => &[F32, VecF32],
        Binary::Min | Binary::Max => &[Int, F32, VecF32],
        Binary::And | Binary::Or | Binary::Xor => &[Int, VecI32, VecI8],
    }
}

fn shift_too_far(op: Shift, ty: Type, by: u8, bits: u8) -> String {
    format!("{} of {ty} by {by}, expected less than {bits}", op.name())
}

fn storable(format: Memory) -> Result<(), String> {
    if format == Memory::Bf16 { Err("there are no stores of bf16".to_string()) } else { Ok(()) }
}

struct Rules<'a> {
    types: &'a [Type],
}

impl Rules<'_> {
    fn ty(&self, v: Value) -> Result<Type, String> {
        self.types.get(v.0 as usize).copied().ok_or_else(|| format!("{v} has no type"))
    }

    fn same(&self, a: Value, b: Value) -> Result<(), String> {
        let (ta, tb) = (self.ty(a)?, self.ty(b)?);
        if ta == tb { Ok(()) } else { Err(format!("{a} is {ta} and {b} is {tb}, expected the same type")) }
    }

    fn one_of(&self, v: Value, allowed: &[Type]) -> Result<Type, String> {
        let ty = self.ty(v)?;
        if allowed.contains(&ty) {
            return Ok(ty);
        }
        let names: Vec<&str> = allowed.iter().map(|t| t.name()).collect();
        Err(format!("{v} is {ty}, expected {}", names.join(" or ")))
    }

    fn address(&self, at: &Address) -> Result<(), String> {
        self.one_of(at.base, &[Type::Int]).map(|_| ())
    }
}
