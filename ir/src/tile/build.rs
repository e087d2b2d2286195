//! How kernel generators write tile IR.
//!
//! A [`Builder`] appends operations to the innermost open block and gives each result its type at once; an operation whose
//! operands do not fit is a bug in the generator and panics with the function's name. Deliberately absent: optimization —
//! what a generator writes is what is lowered.

use super::{Address, Binary, Compare, Function, Inst, Loop, Memory, Op, Reduce, Shift, Type, Value};

/// A function under construction.
#[derive(Debug)]
pub struct Builder {
    name: String,
    params: Vec<(Value, String)>,
    types: Vec<Type>,
    blocks: Vec<Vec<Inst>>,
}

impl Builder {
    /// Starts a function with Int parameters of the given names; returns their values in order.
    pub fn new<const N: usize>(name: impl Into<String>, params: [&str; N]) -> (Builder, [Value; N]) {
        let values = std::array::from_fn(|i| Value(i as u32));
        let named = params.iter().zip(values).map(|(n, v)| (v, (*n).to_string())).collect();
        let builder = Builder { name: name.into(), params: named, types: vec![Type::Int; N], blocks: vec![Vec::new()] };
        (builder, values)
    }

    /// The finished function.
    pub fn finish(mut self) -> Function {
        let body = self.blocks.pop().expect("a builder has its outermost block");
        assert!(self.blocks.is_empty(), "{}: finished inside a loop", self.name);
        Function { name: self.name, params: self.params, types: self.types, body }
    }

    /// A value's type.
    pub fn ty(&self, v: Value) -> Type {
        self.types[v.0 as usize]
    }

    fn fresh(&mut self, ty: Type) -> Value {
        self.types.push(ty);
        Value(u32::try_from(self.types.len() - 1).expect("fewer than 2^32 values"))
    }

    fn push(&mut self, op: Op, ty: Type) -> Value {
        let v = self.fresh(ty);
        self.effect_with(vec![v], op);
        v
    }

    fn effect(&mut self, op: Op) {
        self.effect_with(Vec::new(), op);
    }

    fn effect_with(&mut self, results: Vec<Value>, op: Op) {
        self.blocks.last_mut().expect("a builder has an open block").push(Inst { results, op });
    }

    #[track_caller]
    fn same(&self, a: Value, b: Value) -> Type {
        assert_eq!(self.ty(a), self.ty(b), "{}: operands {a} and {b} differ in type", self.name);
        self.ty(a)
    }

    #[track_caller]
    fn want(&self, v: Value, allowed: &[Type]) -> Type {
        let ty = self.ty(v);
        assert!(allowed.contains(&ty), "{}: {v} is {ty}, expected one of {allowed:?}", self.name);
        ty
    }

    /// An Int constant.
    pub fn int(&mut self, n: i64) -> Value {
        self.push(Op::Int(n), Type::Int)
    }

    /// An F32 constant.
    pub fn f32(&mut self, x: f32) -> Value {
        self.push(Op::F32(x.to_bits()), Type::F32)
    }

    /// The same F32 constant in all lanes.
    pub fn splat_f32(&mut self, x: f32) -> Value {
        let s = self.f32(x);
        self.splat(s)
    }

    /// The same i32 constant in all lanes.
    pub fn splat_i32(&mut self, n: i32) -> Value {
        self.push(Op::Lanes([n; 16]), Type::VecI32)
    }

    /// 16 i32 constants.
    pub fn lanes(&mut self, n: [i32; 16]) -> Value {
        self.push(Op::Lanes(n), Type::VecI32)
    }

    /// Two-operand arithmetic.
    #[track_caller]
    pub fn binary(&mut self, op: Binary, a: Value, b: Value) -> Value {
        use Type::{F32, Int, VecF32, VecI8, VecI32};
        let ty = self.same(a, b);
        self.want(
            a,
            match op {
                Binary::Add | Binary::Sub | Binary::Mul => &[Int, F32, VecF32, VecI32],
                Binary::Div => &[F32, VecF32],
                Binary::Min | Binary::Max => &[Int, F32, VecF32],
                Binary::And | Binary::Or | Binary::Xor => &[Int, VecI32, VecI8],
            },
        );
        self.push(Op::Binary(op, a, b), ty)
    }

    /// `a + b`.
    #[track_caller]
    pub fn add(&mut self, a: Value, b: Value) -> Value {
        self.binary(Binary::Add, a, b)
    }

    /// `a - b`.
    #[track_caller]
    pub fn sub(&mut self, a: Value, b: Value) -> Value {
        self.binary(Binary::Sub, a, b)
    }

    /// `a × b`.
    #[track_caller]
    pub fn mul(&mut self, a: Value, b: Value) -> Value {
        self.binary(Binary::Mul, a, b)
    }

    /// `a ÷ b`.
    #[track_caller]
    pub fn div(&mut self, a: Value, b: Value) -> Value {
        self.binary(Binary::Div, a, b)
    }

    /// The lesser.
    #[track_caller]
    pub fn min(&mut self, a: Value, b: Value) -> Value {
        self.binary(Binary::Min, a, b)
    }

    /// The greater.
    #[track_caller]
    pub fn max(&mut self, a: Value, b: Value) -> Value {
        self.binary(Binary::Max, a, b)
    }

    /// `a + n` for an Int.
    #[track_caller]
    pub fn add_int(&mut self, a: Value, n: i64) -> Value {
        if n == 0 {
            return a;
        }
        let n = self.int(n);
        self.add(a, n)
    }

    /// `a × n` for an Int.
    #[track_caller]
    pub fn mul_int(&mut self, a: Value, n: i64) -> Value {
        if n == 1 {
            return a;
        }
        let n = self.int(n);
        self.mul(a, n)
    }

    /// Shift by a constant.
    #[track_caller]
    pub fn shift(&mut self, op: Shift, a: Value, by: u8) -> Value {
        let ty = self.want(a, &[Type::Int, Type::VecI32]);
        self.push(Op::Shift(op, a, by), ty)
    }

    /// Square root.
    #[track_caller]
    pub fn sqrt(&mut self, a: Value) -> Value {
        let ty = self.want(a, &[Type::F32, Type::VecF32]);
        self.push(Op::Sqrt(a), ty)
    }

    /// Absolute value.
    #[track_caller]
    pub fn abs(&mut self, a: Value) -> Value {
        let ty = self.want(a, &[Type::F32, Type::VecF32]);
        self.push(Op::Abs(a), ty)
    }

    /// Nearest integral value, ties to even.
    #[track_caller]
    pub fn round(&mut self, a: Value) -> Value {
        let ty = self.want(a, &[Type::F32, Type::VecF32]);
        self.push(Op::Round(a), ty)
    }

    /// `a × b + c`, rounded once.
    #[track_caller]
    pub fn fma(&mut self, a: Value, b: Value, c: Value) -> Value {
        self.same(a, b);
        let ty = self.same(a, c);
        self.want(a, &[Type::F32, Type::VecF32]);
        self.push(Op::Fma(a, b, c), ty)
    }

    /// Comparison.
    #[track_caller]
    pub fn compare(&mut self, op: Compare, a: Value, b: Value) -> Value {
        self.same(a, b);
        let ty = match self.want(a, &[Type::Int, Type::F32, Type::VecF32, Type::VecI32]) {
            Type::VecF32 | Type::VecI32 => Type::Mask,
            Type::Int | Type::F32 | Type::Bool | Type::VecI8 | Type::Mask => Type::Bool,
        };
        self.push(Op::Compare(op, a, b), ty)
    }

    /// `if c { a } else { b }`.
    #[track_caller]
    pub fn select(&mut self, c: Value, a: Value, b: Value) -> Value {
        let ty = self.same(a, b);
        match self.want(c, &[Type::Bool, Type::Mask]) {
            Type::Bool => self.want(a, &[Type::Int, Type::F32]),
            _ => self.want(a, &[Type::VecF32, Type::VecI32]),
        };
        self.push(Op::Select(c, a, b), ty)
    }

    /// A scalar in all lanes.
    #[track_caller]
    pub fn splat(&mut self, a: Value) -> Value {
        let ty = match self.want(a, &[Type::F32, Type::Int]) {
            Type::F32 => Type::VecF32,
            _ => Type::VecI32,
        };
        self.push(Op::Splat(a), ty)
    }

    /// i32 lanes to f32.
    #[track_caller]
    pub fn int_to_float(&mut self, a: Value) -> Value {
        self.want(a, &[Type::VecI32]);
        self.push(Op::IntToFloat(a), Type::VecF32)
    }

    /// f32 lanes to i32, nearest even.
    #[track_caller]
    pub fn float_to_int(&mut self, a: Value) -> Value {
        self.want(a, &[Type::VecF32]);
        self.push(Op::FloatToInt(a), Type::VecI32)
    }

    /// The same bits as type `to`.
    #[track_caller]
    pub fn bitcast(&mut self, to: Type, a: Value) -> Value {
        let from = self.ty(a);
        let fits = match to {
            Type::VecF32 | Type::VecI32 | Type::VecI8 => {
                matches!(from, Type::VecF32 | Type::VecI32 | Type::VecI8)
            }
            Type::Int => from == Type::F32,
            Type::F32 => from == Type::Int,
            Type::Bool | Type::Mask => false,
        };
        assert!(fits, "{}: no bitcast of {a} from {from} to {to}", self.name);
        self.push(Op::Bitcast(to, a), to)
    }

    /// Reduction across lanes.
    #[track_caller]
    pub fn reduce(&mut self, op: Reduce, a: Value) -> Value {
        let ty = match (op, self.ty(a)) {
            (_, Type::VecF32) => Type::F32,
            (Reduce::Add, Type::VecI32) => Type::Int,
            (_, other) => panic!("{}: no {} of {other}", self.name, op.name()),
        };
        self.push(Op::Reduce(op, a), ty)
    }

    /// Dot products of four unsigned bytes `w` and four signed bytes `a` in each lane, added to `acc`.
    #[track_caller]
    pub fn dot_u8s8(&mut self, acc: Value, w: Value, a: Value) -> Value {
        self.want(acc, &[Type::VecI32]);
        self.want(w, &[Type::VecI8]);
        self.want(a, &[Type::VecI8]);
        self.push(Op::DotU8S8(acc, w, a), Type::VecI32)
    }

    /// Low four bits of each byte.
    #[track_caller]
    pub fn nibble_low(&mut self, a: Value) -> Value {
        self.want(a, &[Type::VecI8]);
        self.push(Op::NibbleLow(a), Type::VecI8)
    }

    /// High four bits of each byte.
    #[track_caller]
    pub fn nibble_high(&mut self, a: Value) -> Value {
        self.want(a, &[Type::VecI8]);
        self.push(Op::NibbleHigh(a), Type::VecI8)
    }

    /// Table look-up for each byte.
    #[track_caller]
    pub fn lookup(&mut self, table: [u8; 16], a: Value) -> Value {
        self.want(a, &[Type::VecI8]);
        self.push(Op::Lookup(table, a), Type::VecI8)
    }

    #[track_caller]
    fn address(&self, base: Value, offset: i64) -> Address {
        self.want(base, &[Type::Int]);
        let offset = i32::try_from(offset)
            .unwrap_or_else(|_| panic!("{}: offset {offset} from {base} exceeds 32 bits", self.name));
        Address { base, offset }
    }

    /// 16 consecutive elements.
    #[track_caller]
    pub fn load(&mut self, memory: Memory, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::Load(memory, at), memory.vector())
    }

    /// 64 consecutive bytes.
    #[track_caller]
    pub fn load_bytes(&mut self, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadBytes(at), Type::VecI8)
    }

    /// One element in all lanes.
    #[track_caller]
    pub fn load_splat(&mut self, memory: Memory, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadSplat(memory, at), memory.vector())
    }

    /// Four bytes in all lanes.
    #[track_caller]
    pub fn load_splat_bytes(&mut self, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadSplatBytes(at), Type::VecI8)
    }

    /// One element as a scalar.
    #[track_caller]
    pub fn load_scalar(&mut self, memory: Memory, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        let ty = match memory.vector() {
            Type::VecF32 => Type::F32,
            _ => Type::Int,
        };
        self.push(Op::LoadScalar(memory, at), ty)
    }

    /// A 64-bit integer (an address, too).
    #[track_caller]
    pub fn load_int(&mut self, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadInt(at), Type::Int)
    }

    /// A 32-bit integer, zero-extended.
    #[track_caller]
    pub fn load_u32(&mut self, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadU32(at), Type::Int)
    }

    /// Stores 16 consecutive elements.
    #[track_caller]
    pub fn store(&mut self, memory: Memory, value: Value, base: Value, offset: i64) {
        assert!(memory != Memory::Bf16, "{}: no stores of bf16", self.name);
        self.want(value, &[memory.vector()]);
        let at = self.address(base, offset);
        self.effect(Op::Store(memory, value, at));
    }

    /// Stores lane `l` at `base + offset + l × stride` bytes.
    #[track_caller]
    pub fn store_strided(&mut self, memory: Memory, value: Value, base: Value, offset: i64, stride: i32) {
        assert!(matches!(memory, Memory::F32 | Memory::F16), "{}: strided stores are f32 or f16", self.name);
        self.want(value, &[Type::VecF32]);
        let at = self.address(base, offset);
        self.effect(Op::StoreStrided(memory, value, at, stride));
    }

    /// Stores one element.
    #[track_caller]
    pub fn store_scalar(&mut self, memory: Memory, value: Value, base: Value, offset: i64) {
        match memory {
            Memory::F32 | Memory::F16 => self.want(value, &[Type::F32]),
            Memory::I32 | Memory::I8 => self.want(value, &[Type::Int]),
            Memory::Bf16 => panic!("{}: no stores of bf16", self.name),
        };
        let at = self.address(base, offset);
        self.effect(Op::StoreScalar(memory, value, at));
    }

    /// Hints that a cache line will be read.
    #[track_caller]
    pub fn prefetch(&mut self, base: Value, offset: i64) {
        let at = self.address(base, offset);
        self.effect(Op::Prefetch(at));
    }

    /// `for index in (start..end).step_by(step)` with carried values: `body` gets the index and the carried values and returns
    /// what they become; the results are their last values.
    #[track_caller]
    pub fn for_loop(
        &mut self,
        start: Value,
        end: Value,
        step: i64,
        initial: &[Value],
        body: impl FnOnce(&mut Builder, Value, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        assert!(step > 0, "{}: a loop's step is positive", self.name);
        self.want(start, &[Type::Int]);
        self.want(end, &[Type::Int]);
        let index = self.fresh(Type::Int);
        let carried: Vec<Value> = initial.iter().map(|&v| self.fresh(self.ty(v))).collect();
        self.blocks.push(Vec::new());
        let next = body(self, index, &carried);
        let inner = self.blocks.pop().expect("the loop's block is open");
        assert_eq!(next.len(), carried.len(), "{}: a loop body returns one value per carried value", self.name);
        for (&c, &n) in carried.iter().zip(&next) {
            self.same(c, n);
        }
        let results: Vec<Value> = initial.iter().map(|&v| self.fresh(self.ty(v))).collect();
        let op = Loop { start, end, step, index, initial: initial.to_vec(), carried, body: inner, next };
        self.effect_with(results.clone(), Op::For(Box::new(op)));
        results
    }

    /// A loop from 0 to the constant `count` without carried values.
    #[track_caller]
    pub fn repeat(&mut self, count: i64, step: i64, body: impl FnOnce(&mut Builder, Value)) {
        let start = self.int(0);
        let end = self.int(count);
        self.for_loop(start, end, step, &[], |b, i, _| {
            body(b, i);
            Vec::new()
        });
    }
}
