//! The tile IR: how one kernel computes.
//!
//! A [`Function`] is straight-line SSA code with counted loops over scalars and *logical vectors* of 16 lanes. It is written
//! once, by a kernel generator, and lowered several times: to Cranelift IR (four 128-bit values a vector), to wide x86 (one
//! `zmm` or two `ymm`), and it runs on the evaluator, which defines the bits. Lanes never mix except in the `reduce`
//! operations, whose order is fixed; so every lowering gives the same bits.
//!
//! Read [`Op`] first; [`build::Builder`] is how functions are made. Deliberately absent: memory allocation, calls,
//! branches other than loops, and types that depend on a CPU.

pub mod build;
pub mod eval;
pub mod parse;
pub mod rules;
pub mod text;
pub mod verify;

use std::fmt;

/// A value's type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Type {
    /// 64-bit integer: counts, offsets, addresses. Arithmetic wraps.
    Int,
    /// 32-bit float.
    F32,
    /// Truth value of a scalar comparison.
    Bool,
    /// 16 lanes of f32.
    VecF32,
    /// 16 lanes of 32-bit integers (signed where it matters).
    VecI32,
    /// 64 bytes: 16 lanes of four.
    VecI8,
    /// 16 truth values: a comparison of vectors.
    Mask,
}

impl Type {
    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Type::Int => "int",
            Type::F32 => "f32",
            Type::Bool => "bool",
            Type::VecF32 => "f32x16",
            Type::VecI32 => "i32x16",
            Type::VecI8 => "i8x64",
            Type::Mask => "mask",
        }
    }

    /// The type named `name` in text form.
    pub fn from_name(name: &str) -> Option<Type> {
        [Type::Int, Type::F32, Type::Bool, Type::VecF32, Type::VecI32, Type::VecI8, Type::Mask]
            .into_iter()
            .find(|t| t.name() == name)
    }

    /// Whether it has 16 lanes.
    pub const fn is_vector(self) -> bool {
        matches!(self, Type::VecF32 | Type::VecI32 | Type::VecI8 | Type::Mask)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An SSA value of a function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Value(pub u32);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

/// An address in memory: `base + offset` bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Address {
    /// An [`Type::Int`] value.
    pub base: Value,
    /// Constant bytes added to it; must fit 32 bits signed.
    pub offset: i32,
}

/// How 16 lanes (or one scalar) lie in memory and what they become.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Memory {
    /// f32 ↔ f32.
    F32,
    /// bf16 in memory, f32 in the lane. Loads append zero bits; there are no stores.
    Bf16,
    /// IEEE half in memory, f32 in the lane. Loads are exact (NaN becomes quiet); stores round to nearest even, overflow to
    /// infinity.
    F16,
    /// i32 ↔ i32.
    I32,
    /// Signed bytes in memory, i32 in the lane; loads sign-extend, stores keep the low byte.
    I8,
}

impl Memory {
    /// Bytes of one element in memory.
    pub const fn bytes(self) -> usize {
        match self {
            Memory::F32 | Memory::I32 => 4,
            Memory::Bf16 | Memory::F16 => 2,
            Memory::I8 => 1,
        }
    }

    /// The vector type that a load gives and a store takes.
    pub const fn vector(self) -> Type {
        match self {
            Memory::F32 | Memory::Bf16 | Memory::F16 => Type::VecF32,
            Memory::I32 | Memory::I8 => Type::VecI32,
        }
    }

    /// The scalar type that a scalar load gives and a scalar store takes.
    pub const fn scalar(self) -> Type {
        match self {
            Memory::F32 | Memory::Bf16 | Memory::F16 => Type::F32,
            Memory::I32 | Memory::I8 => Type::Int,
        }
    }

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Memory::F32 => "f32",
            Memory::Bf16 => "bf16",
            Memory::F16 => "f16",
            Memory::I32 => "i32",
            Memory::I8 => "i8",
        }
    }

    /// The memory format named `name` in text form.
    pub fn from_name(name: &str) -> Option<Memory> {
        [Memory::F32, Memory::Bf16, Memory::F16, Memory::I32, Memory::I8].into_iter().find(|m| m.name() == name)
    }
}

/// Two-operand arithmetic. Floats are IEEE single, rounded to nearest even, never contracted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Binary {
    /// Addition: Int, F32, VecF32, VecI32.
    Add,
    /// Subtraction: Int, F32, VecF32, VecI32.
    Sub,
    /// Multiplication: Int, F32, VecF32, VecI32 (low 32 bits).
    Mul,
    /// Division: F32, VecF32.
    Div,
    /// `if a < b { a } else { b }` (so NaN in either gives `b`): Int (signed), F32, VecF32.
    Min,
    /// `if a > b { a } else { b }` (so NaN in either gives `b`): Int (signed), F32, VecF32.
    Max,
    /// Bitwise and: Int, VecI32, VecI8.
    And,
    /// Bitwise or: Int, VecI32, VecI8.
    Or,
    /// Bitwise exclusive or: Int, VecI32, VecI8.
    Xor,
}

impl Binary {
    /// All of them.
    pub const ALL: [Binary; 9] = [
        Binary::Add,
        Binary::Sub,
        Binary::Mul,
        Binary::Div,
        Binary::Min,
        Binary::Max,
        Binary::And,
        Binary::Or,
        Binary::Xor,
    ];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Binary::Add => "add",
            Binary::Sub => "sub",
            Binary::Mul => "mul",
            Binary::Div => "div",
            Binary::Min => "min",
            Binary::Max => "max",
            Binary::And => "and",
            Binary::Or => "or",
            Binary::Xor => "xor",
        }
    }
}

/// Shifts by a constant.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Shift {
    /// Left: Int, VecI32.
    Left,
    /// Right, zeros come in: Int, VecI32.
    RightUnsigned,
    /// Right, the sign comes in: Int, VecI32.
    RightSigned,
}

impl Shift {
    /// All of them.
    pub const ALL: [Shift; 3] = [Shift::Left, Shift::RightUnsigned, Shift::RightSigned];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Shift::Left => "shl",
            Shift::RightUnsigned => "shr",
            Shift::RightSigned => "sar",
        }
    }
}

/// Comparisons; signed for integers, false when a float operand is NaN.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Compare {
    /// `a == b`.
    Equal,
    /// `a < b`.
    Less,
    /// `a <= b`.
    LessEqual,
    /// `a > b`.
    Greater,
    /// `a >= b`.
    GreaterEqual,
}

impl Compare {
    /// All of them.
    pub const ALL: [Compare; 5] =
        [Compare::Equal, Compare::Less, Compare::LessEqual, Compare::Greater, Compare::GreaterEqual];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Compare::Equal => "eq",
            Compare::Less => "lt",
            Compare::LessEqual => "le",
            Compare::Greater => "gt",
            Compare::GreaterEqual => "ge",
        }
    }
}

/// A reduction across the lanes of a vector to a scalar. The order is fixed: lanes `l` and `l + 8`, then `l` and `l + 4`,
/// then `l + 2`, then `l + 1`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reduce {
    /// Sum: VecF32 → F32, VecI32 → Int (sign-extended).
    Add,
    /// Maximum ([`Binary::Max`] of the lower lane and the higher): VecF32 → F32.
    Max,
}

impl Reduce {
    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Reduce::Add => "reduce_add",
            Reduce::Max => "reduce_max",
        }
    }
}

/// An operation. Unless said otherwise it has one result.
#[derive(Clone, PartialEq, Debug)]
pub enum Op {
    /// An Int constant.
    Int(i64),
    /// An F32 constant, by its bits.
    F32(u32),
    /// A vector of 16 constants (VecI32).
    Lanes([i32; 16]),
    /// Arithmetic of two values of one type, which is the result's.
    Binary(Binary, Value, Value),
    /// Shift of an Int (by 0..=63) or VecI32 (by 0..=31).
    Shift(Shift, Value, u8),
    /// Square root, correctly rounded: F32, VecF32.
    Sqrt(Value),
    /// Absolute value (clears the sign bit): F32, VecF32.
    Abs(Value),
    /// Rounded to an integral value, ties to even: F32, VecF32.
    Round(Value),
    /// `a × b + c` with one rounding: F32, VecF32.
    Fma(Value, Value, Value),
    /// Comparison of two values of one type: Int, F32 → Bool; VecF32, VecI32 → Mask.
    Compare(Compare, Value, Value),
    /// `if c { a } else { b }`: c is Bool and a, b any scalar type; or c is a Mask and a, b VecF32 or VecI32.
    Select(Value, Value, Value),
    /// A scalar in all lanes: F32 → VecF32, Int → VecI32 (low 32 bits).
    Splat(Value),
    /// Lane-wise conversion to f32, rounded to nearest even: VecI32 → VecF32.
    IntToFloat(Value),
    /// Lane-wise conversion to i32, rounded to nearest even; `i32::MIN` for NaN and what does not fit: VecF32 → VecI32.
    FloatToInt(Value),
    /// The same bits as another type: VecF32, VecI32, VecI8 to one of them; F32 → Int (zero-extended), Int → F32 (low 32 bits).
    Bitcast(Type, Value),
    /// Reduction across lanes.
    Reduce(Reduce, Value),
    /// `acc[l] + Σ_{j<4} w[4l+j] × a[4l+j]`, exact, with `w` unsigned bytes, `a` signed bytes: (acc VecI32, w VecI8, a VecI8) →
    /// VecI32.
    DotU8S8(Value, Value, Value),
    /// The same with signed bytes `w`; no byte of `a` may be −128: (acc VecI32, w VecI8, a VecI8) → VecI32.
    DotS8S8(Value, Value, Value),
    /// Each byte's low four bits: VecI8.
    NibbleLow(Value),
    /// Each byte's high four bits, moved down: VecI8.
    NibbleHigh(Value),
    /// `table[b]` for each byte `b`, which must be below 16: VecI8.
    Lookup([u8; 16], Value),
    /// 16 consecutive elements → VecF32 or VecI32, as [`Memory::vector`] says.
    Load(Memory, Address),
    /// 64 consecutive bytes → VecI8.
    LoadBytes(Address),
    /// One element in all lanes, as [`Memory::vector`] says.
    LoadSplat(Memory, Address),
    /// Four consecutive bytes in each lane → VecI8.
    LoadSplatBytes(Address),
    /// One element: F32/Bf16/F16 → F32; I32 → Int, sign-extended; I8 → Int, sign-extended.
    LoadScalar(Memory, Address),
    /// A 64-bit integer → Int.
    LoadInt(Address),
    /// A 32-bit integer, zero-extended → Int.
    LoadU32(Address),
    /// Stores 16 consecutive elements; no result.
    Store(Memory, Value, Address),
    /// Stores lane `l` at `address + l × stride` bytes (F32 or F16); no result.
    StoreStrided(Memory, Value, Address, i32),
    /// Stores one element: F32 as F32 or F16; Int (low bits) as I32 or I8; no result.
    StoreScalar(Memory, Value, Address),
    /// Hints that the cache line at the address will be read, though not next: it is wanted near, not nearest (L2); no result, and any address
    /// is allowed.
    Prefetch(Address),
    /// A counted loop; its results are the carried values after the last iteration.
    For(Box<Loop>),
}

/// `for index in (start..end).step_by(step)`, with values carried from one iteration to the next. Runs
/// `max(0, ceil((end − start) / step))` times; `end + step` must not overflow.
#[derive(Clone, PartialEq, Debug)]
pub struct Loop {
    /// The first index (Int).
    pub start: Value,
    /// The index before which the loop ends (Int).
    pub end: Value,
    /// Added to the index each time; positive.
    pub step: i64,
    /// The index in the body (Int).
    pub index: Value,
    /// What the carried values are before the first iteration.
    pub initial: Vec<Value>,
    /// The carried values in the body, one for each of `initial`, of the same types.
    pub carried: Vec<Value>,
    /// What is run each time.
    pub body: Vec<Inst>,
    /// What the carried values become after an iteration.
    pub next: Vec<Value>,
}

/// An operation with the values it defines.
#[derive(Clone, PartialEq, Debug)]
pub struct Inst {
    /// None for stores and prefetches; one for each carried value of a loop; one otherwise.
    pub results: Vec<Value>,
    /// What is done.
    pub op: Op,
}

/// A kernel.
#[derive(Clone, PartialEq, Debug)]
pub struct Function {
    /// Name, an identifier unique in its object; for people, never decided upon.
    pub name: String,
    /// Parameters (all Int), with names for people.
    pub params: Vec<(Value, String)>,
    /// Type of each value, by its index.
    pub types: Vec<Type>,
    /// The code.
    pub body: Vec<Inst>,
}

impl Function {
    /// A value's type.
    pub fn ty(&self, v: Value) -> Type {
        self.types[v.0 as usize]
    }
}
