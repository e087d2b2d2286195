//! How kernel generators write tile IR.
//!
//! A [`Builder`] appends operations to the innermost open block and gives each result its type at once; an operation whose
//! operands do not fit is a bug in the generator and panics with the function's name. Deliberately absent: optimization —
//! what a generator writes is what is lowered.

use super::rules::result_type;
use super::verify::verify;
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
        let (builder, values) = Builder::with_params(name, &params);
        (builder, values.try_into().expect("as many values as parameters"))
    }

    /// As [`Builder::new`], for a function whose parameters are not known before.
    pub fn with_params(name: impl Into<String>, params: &[&str]) -> (Builder, Vec<Value>) {
        let values: Vec<Value> = (0..params.len()).map(|i| Value(i as u32)).collect();
        let named = params.iter().zip(&values).map(|(n, &v)| (v, (*n).to_string())).collect();
        let types = vec![Type::Int; params.len()];
        (Builder { name: name.into(), params: named, types, blocks: vec![Vec::new()] }, values)
    }

    /// The finished function, verified.
    pub fn finish(mut self) -> Function {
        let body = self.blocks.pop().expect("a builder has its outermost block");
        assert!(self.blocks.is_empty(), "{}: finished inside a loop", self.name);
        let function = Function { name: self.name, params: self.params, types: self.types, body };
        if let Err(error) = verify(&function) {
            panic!("{error}\n{}", error.annotate(&function));
        }
        function
    }

    /// A value's type.
    pub fn ty(&self, v: Value) -> Type {
        self.types[v.0 as usize]
    }

    fn fresh(&mut self, ty: Type) -> Value {
        self.types.push(ty);
        Value(u32::try_from(self.types.len() - 1).expect("fewer than 2^32 values"))
    }

    /// Appends an operation that has a result.
    #[track_caller]
    fn push(&mut self, op: Op) -> Value {
        let ty = self.check(&op).unwrap_or_else(|| panic!("{}: {op:?} has no result", self.name));
        let v = self.fresh(ty);
        self.append(vec![v], op);
        v
    }

    /// Appends an operation that has none.
    #[track_caller]
    fn effect(&mut self, op: Op) {
        self.check(&op);
        self.append(Vec::new(), op);
    }

    #[track_caller]
    fn check(&self, op: &Op) -> Option<Type> {
        result_type(op, &self.types).unwrap_or_else(|message| panic!("{}: {op:?}: {message}", self.name))
    }

    fn append(&mut self, results: Vec<Value>, op: Op) {
        self.blocks.last_mut().expect("a builder has an open block").push(Inst { results, op });
    }

    /// An Int constant.
    pub fn int(&mut self, n: i64) -> Value {
        self.push(Op::Int(n))
    }

    /// An F32 constant.
    pub fn f32(&mut self, x: f32) -> Value {
        self.push(Op::F32(x.to_bits()))
    }

    /// The same F32 constant in all lanes.
    pub fn splat_f32(&mut self, x: f32) -> Value {
        let s = self.f32(x);
        self.splat(s)
    }

    /// The same i32 constant in all lanes.
    pub fn splat_i32(&mut self, n: i32) -> Value {
        self.push(Op::Lanes([n; 16]))
    }

    /// 16 i32 constants.
    pub fn lanes(&mut self, n: [i32; 16]) -> Value {
        self.push(Op::Lanes(n))
    }

    /// Two-operand arithmetic.
    #[track_caller]
    pub fn binary(&mut self, op: Binary, a: Value, b: Value) -> Value {
        self.push(Op::Binary(op, a, b))
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
        self.push(Op::Shift(op, a, by))
    }

    /// Square root.
    #[track_caller]
    pub fn sqrt(&mut self, a: Value) -> Value {
        self.push(Op::Sqrt(a))
    }

    /// Absolute value.
    #[track_caller]
    pub fn abs(&mut self, a: Value) -> Value {
        self.push(Op::Abs(a))
    }

    /// Nearest integral value, ties to even.
    #[track_caller]
    pub fn round(&mut self, a: Value) -> Value {
        self.push(Op::Round(a))
    }

    /// `a × b + c`, rounded once.
    #[track_caller]
    pub fn fma(&mut self, a: Value, b: Value, c: Value) -> Value {
        self.push(Op::Fma(a, b, c))
    }

    /// Comparison.
    #[track_caller]
    pub fn compare(&mut self, op: Compare, a: Value, b: Value) -> Value {
        self.push(Op::Compare(op, a, b))
    }

    /// `if c { a } else { b }`.
    #[track_caller]
    pub fn select(&mut self, c: Value, a: Value, b: Value) -> Value {
        self.push(Op::Select(c, a, b))
    }

    /// A scalar in all lanes.
    #[track_caller]
    pub fn splat(&mut self, a: Value) -> Value {
        self.push(Op::Splat(a))
    }

    /// i32 lanes to f32.
    #[track_caller]
    pub fn int_to_float(&mut self, a: Value) -> Value {
        self.push(Op::IntToFloat(a))
    }

    /// f32 lanes to i32, nearest even.
    #[track_caller]
    pub fn float_to_int(&mut self, a: Value) -> Value {
        self.push(Op::FloatToInt(a))
    }

    /// The same bits as type `to`.
    #[track_caller]
    pub fn bitcast(&mut self, to: Type, a: Value) -> Value {
        self.push(Op::Bitcast(to, a))
    }

    /// Reduction across lanes.
    #[track_caller]
    pub fn reduce(&mut self, op: Reduce, a: Value) -> Value {
        self.push(Op::Reduce(op, a))
    }

    /// Dot products of four unsigned bytes `w` and four signed bytes `a` in each lane, added to `acc`.
    #[track_caller]
    pub fn dot_u8s8(&mut self, acc: Value, w: Value, a: Value) -> Value {
        self.push(Op::DotU8S8(acc, w, a))
    }

    /// Dot products of four signed bytes `w` and four signed bytes `a`, none of which is −128, in each lane, added to `acc`.
    #[track_caller]
    pub fn dot_s8s8(&mut self, acc: Value, w: Value, a: Value) -> Value {
        self.push(Op::DotS8S8(acc, w, a))
    }

    /// Low four bits of each byte.
    #[track_caller]
    pub fn nibble_low(&mut self, a: Value) -> Value {
        self.push(Op::NibbleLow(a))
    }

    /// High four bits of each byte.
    #[track_caller]
    pub fn nibble_high(&mut self, a: Value) -> Value {
        self.push(Op::NibbleHigh(a))
    }

    /// Table look-up for each byte.
    #[track_caller]
    pub fn lookup(&mut self, table: [u8; 16], a: Value) -> Value {
        self.push(Op::Lookup(table, a))
    }

    #[track_caller]
    fn address(&self, base: Value, offset: i64) -> Address {
        let offset = i32::try_from(offset)
            .unwrap_or_else(|_| panic!("{}: offset {offset} from {base} exceeds 32 bits", self.name));
        Address { base, offset }
    }

    /// 16 consecutive elements.
    #[track_caller]
    pub fn load(&mut self, memory: Memory, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::Load(memory, at))
    }

    /// 64 consecutive bytes.
    #[track_caller]
    pub fn load_bytes(&mut self, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadBytes(at))
    }

    /// One element in all lanes.
    #[track_caller]
    pub fn load_splat(&mut self, memory: Memory, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadSplat(memory, at))
    }

    /// Four bytes in all lanes.
    #[track_caller]
    pub fn load_splat_bytes(&mut self, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadSplatBytes(at))
    }

    /// One element as a scalar.
    #[track_caller]
    pub fn load_scalar(&mut self, memory: Memory, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadScalar(memory, at))
    }

    /// A 64-bit integer (an address, too).
    #[track_caller]
    pub fn load_int(&mut self, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadInt(at))
    }

    /// A 32-bit integer, zero-extended.
    #[track_caller]
    pub fn load_u32(&mut self, base: Value, offset: i64) -> Value {
        let at = self.address(base, offset);
        self.push(Op::LoadU32(at))
    }

    /// Stores 16 consecutive elements.
    #[track_caller]
    pub fn store(&mut self, memory: Memory, value: Value, base: Value, offset: i64) {
        let at = self.address(base, offset);
        self.effect(Op::Store(memory, value, at));
    }

    /// Stores lane `l` at `base + offset + l × stride` bytes.
    #[track_caller]
    pub fn store_strided(&mut self, memory: Memory, value: Value, base: Value, offset: i64, stride: i32) {
        let at = self.address(base, offset);
        self.effect(Op::StoreStrided(memory, value, at, stride));
    }

    /// Stores one element.
    #[track_caller]
    pub fn store_scalar(&mut self, memory: Memory, value: Value, base: Value, offset: i64) {
        let at = self.address(base, offset);
        self.effect(Op::StoreScalar(memory, value, at));
    }

    /// Hints that a cache line will be read soon ([`Op::Prefetch`]).
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
        for bound in [start, end] {
            assert_eq!(self.ty(bound), Type::Int, "{}: {bound} bounds a loop", self.name);
        }
        let index = self.fresh(Type::Int);
        let carried: Vec<Value> = initial.iter().map(|&v| self.fresh(self.ty(v))).collect();
        self.blocks.push(Vec::new());
        let next = body(self, index, &carried);
        let inner = self.blocks.pop().expect("the loop's block is open");
        assert_eq!(next.len(), carried.len(), "{}: a loop body returns one value per carried value", self.name);
        for (&c, &n) in carried.iter().zip(&next) {
            assert_eq!(self.ty(c), self.ty(n), "{}: {n} cannot become {c}", self.name);
        }
        let results: Vec<Value> = initial.iter().map(|&v| self.fresh(self.ty(v))).collect();
        let op = Loop { start, end, step, index, initial: initial.to_vec(), carried, body: inner, next };
        self.append(results.clone(), Op::For(Box::new(op)));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "f: Binary(Add, Value(0), Value(1)): v0 is int and v1 is f32, expected the same type")]
    fn operands_that_do_not_fit_are_refused_at_once() {
        let (mut b, [x]) = Builder::new("f", ["x"]);
        let one = b.f32(1.0);
        b.add(x, one);
    }

    #[test]
    #[should_panic(expected = "v4 was defined in a loop that has ended")]
    fn values_do_not_leave_their_loop() {
        let (mut b, [x]) = Builder::new("f", ["x"]);
        let mut inner = None;
        b.repeat(4, 1, |b, i| inner = Some(b.add(x, i)));
        b.prefetch(inner.unwrap(), 0);
        b.finish();
    }
}
