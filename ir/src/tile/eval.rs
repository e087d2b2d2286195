//! The evaluator: runs tile IR on numbers, and thereby defines the bits that every lowering must give.
//!
//! Memory is a set of regions with made-up addresses far apart; an access outside every region is an error that names the
//! instruction, which machine code could not tell. Deliberately absent: speed beyond what tests need, and verification — a
//! function whose types do not fit ([`super::verify`]) makes it panic.
//!
//! ```
//! use moec_ir::tile::{Memory as Format, build::Builder, eval::{Memory, run}};
//!
//! let (mut b, [x, y]) = Builder::new("double", ["x", "y"]);
//! let v = b.load(Format::F32, x, 0);
//! let v = b.add(v, v);
//! b.store(Format::F32, v, y, 0);
//! let double = b.finish();
//!
//! let mut memory = Memory::new();
//! let x = memory.add_f32(&[1.5; 16]);
//! let y = memory.add_zeros(64);
//! run(&double, &[x, y], &mut memory)?;
//! assert_eq!(memory.f32s(y), [3.0; 16]);
//! # Ok::<(), moec_ir::tile::eval::Error>(())
//! ```

mod memory;

pub use memory::{Error, Fault, Memory};

use half::f16;

use super::{Address, Binary, Compare, Function, Inst, Loop, Memory as Format, Op, Reduce, Shift, Type, Value, text};
use crate::math;

/// Runs `function` with these arguments on `memory`.
pub fn run(function: &Function, args: &[i64], memory: &mut Memory) -> Result<(), Error> {
    if args.len() != function.params.len() {
        let line = text::header(function);
        return Err(Error { function: function.name.clone(), line, fault: Fault::Arguments(args.len()) });
    }
    let mut machine = Machine { function, values: vec![Content::None; function.types.len()], memory };
    for ((v, _), &arg) in function.params.iter().zip(args) {
        machine.values[v.0 as usize] = Content::Int(arg);
    }
    machine.block(&function.body)
}

/// What a value holds.
#[derive(Clone, Copy)]
enum Content {
    None,
    Int(i64),
    F32(f32),
    Bool(bool),
    VecF32([f32; 16]),
    VecI32([i32; 16]),
    VecI8([u8; 64]),
    Mask([bool; 16]),
}

struct Machine<'a> {
    function: &'a Function,
    values: Vec<Content>,
    memory: &'a mut Memory,
}

impl Machine<'_> {
    fn block(&mut self, block: &[Inst]) -> Result<(), Error> {
        for inst in block {
            if let Op::For(l) = &inst.op {
                self.run_loop(l, &inst.results)?;
                continue;
            }
            match self.step(&inst.op) {
                Ok(content) => {
                    if let [result] = inst.results[..] {
                        self.values[result.0 as usize] = content;
                    }
                }
                Err(fault) => {
                    let line = text::line(self.function, inst);
                    return Err(Error { function: self.function.name.clone(), line, fault });
                }
            }
        }
        Ok(())
    }

    fn run_loop(&mut self, l: &Loop, results: &[Value]) -> Result<(), Error> {
        let (mut index, end) = (self.int(l.start), self.int(l.end));
        self.assign(&l.carried, &l.initial);
        while index < end {
            self.values[l.index.0 as usize] = Content::Int(index);
            self.block(&l.body)?;
            self.assign(&l.carried, &l.next);
            index = index.wrapping_add(l.step);
        }
        self.assign(results, &l.carried);
        Ok(())
    }

    /// All of `to` at once become `from`.
    fn assign(&mut self, to: &[Value], from: &[Value]) {
        let contents: Vec<Content> = from.iter().map(|v| self.values[v.0 as usize]).collect();
        for (v, content) in to.iter().zip(contents) {
            self.values[v.0 as usize] = content;
        }
    }

    fn bug(&self, v: Value) -> ! {
        panic!("{}: {v} is used as what it is not; verify tile IR before it is run", self.function.name)
    }

    fn int(&self, v: Value) -> i64 {
        let Content::Int(n) = self.values[v.0 as usize] else { self.bug(v) };
        n
    }

    fn f32(&self, v: Value) -> f32 {
        let Content::F32(x) = self.values[v.0 as usize] else { self.bug(v) };
        x
    }

    fn vec_f32(&self, v: Value) -> &[f32; 16] {
        let Content::VecF32(x) = &self.values[v.0 as usize] else { self.bug(v) };
        x
    }

    fn vec_i32(&self, v: Value) -> &[i32; 16] {
        let Content::VecI32(n) = &self.values[v.0 as usize] else { self.bug(v) };
        n
    }

    fn vec_i8(&self, v: Value) -> &[u8; 64] {
        let Content::VecI8(n) = &self.values[v.0 as usize] else { self.bug(v) };
        n
    }

    /// `acc` and the dot products of four bytes `w`, whose values `value` gives, and four signed bytes `a`.
    fn dots(&self, acc: Value, w: Value, a: Value, value: impl Fn(u8) -> i32) -> [i32; 16] {
        let (w, a) = (self.vec_i8(w), self.vec_i8(a));
        let mut sums = *self.vec_i32(acc);
        for (sum, (w, a)) in sums.iter_mut().zip(w.chunks_exact(4).zip(a.chunks_exact(4))) {
            let dot: i32 = w.iter().zip(a).map(|(&w, &a)| value(w) * i32::from(a as i8)).sum();
            *sum = sum.wrapping_add(dot);
        }
        sums
    }

    fn address(&self, at: Address) -> i64 {
        self.int(at.base).wrapping_add(i64::from(at.offset))
    }

    /// Runs anything but a loop; the result, if it has one.
    fn step(&mut self, op: &Op) -> Result<Content, Fault> {
        use Content::{Bool, F32, Int, Mask, VecF32, VecI8, VecI32};
        let get = |v: Value| self.values[v.0 as usize];
        Ok(match *op {
            Op::Int(n) => Int(n),
            Op::F32(bits) => F32(f32::from_bits(bits)),
            Op::Lanes(n) => VecI32(n),
            Op::Binary(op, a, b) => match (&self.values[a.0 as usize], &self.values[b.0 as usize]) {
                (&Int(x), &Int(y)) => Int(binary_int(op, x, y)),
                (&F32(x), &F32(y)) => F32(binary_f32(op, x, y)),
                (VecF32(x), VecF32(y)) => VecF32(zip(x, y, |x, y| binary_f32(op, x, y))),
                (VecI32(x), VecI32(y)) => VecI32(zip(x, y, |x, y| binary_i32(op, x, y))),
                (VecI8(x), VecI8(y)) => VecI8(zip(x, y, |x, y| binary_u8(op, x, y))),
                _ => self.bug(a),
            },
            Op::Shift(op, a, by) => match &self.values[a.0 as usize] {
                &Int(n) => Int(shift_int(op, n, by)),
                VecI32(n) => VecI32(n.map(|n| match op {
                    Shift::Left => n << by,
                    Shift::RightUnsigned => ((n as u32) >> by) as i32,
                    Shift::RightSigned => n >> by,
                })),
                _ => self.bug(a),
            },
            Op::Sqrt(a) => self.float(a, f32::sqrt),
            Op::Abs(a) => self.float(a, f32::abs),
            Op::Round(a) => self.float(a, f32::round_ties_even),
            Op::Fma(a, b, c) => match get(c) {
                F32(z) => F32(self.f32(a).mul_add(self.f32(b), z)),
                VecF32(mut z) => {
                    for (z, (x, y)) in z.iter_mut().zip(self.vec_f32(a).iter().zip(self.vec_f32(b))) {
                        *z = x.mul_add(*y, *z);
                    }
                    VecF32(z)
                }
                _ => self.bug(c),
            },
            Op::Compare(op, a, b) => match (&self.values[a.0 as usize], &self.values[b.0 as usize]) {
                (&Int(x), &Int(y)) => Bool(compare(op, x, y)),
                (&F32(x), &F32(y)) => Bool(compare(op, x, y)),
                (VecF32(x), VecF32(y)) => Mask(zip(x, y, |x, y| compare(op, x, y))),
                (VecI32(x), VecI32(y)) => Mask(zip(x, y, |x, y| compare(op, x, y))),
                _ => self.bug(a),
            },
            Op::Select(c, a, b) => match (get(c), get(a), get(b)) {
                (Bool(c), x, y) => {
                    if c {
                        x
                    } else {
                        y
                    }
                }
                (Mask(c), VecF32(x), VecF32(y)) => VecF32(std::array::from_fn(|l| if c[l] { x[l] } else { y[l] })),
                (Mask(c), VecI32(x), VecI32(y)) => VecI32(std::array::from_fn(|l| if c[l] { x[l] } else { y[l] })),
                _ => self.bug(c),
            },
            Op::Splat(a) => match get(a) {
                F32(x) => VecF32([x; 16]),
                Int(n) => VecI32([n as i32; 16]),
                _ => self.bug(a),
            },
            Op::IntToFloat(a) => VecF32(self.vec_i32(a).map(|n| n as f32)),
            Op::FloatToInt(a) => VecI32(self.vec_f32(a).map(math::float_to_int)),
            Op::Bitcast(to, a) => self.bitcast(to, a),
            Op::Reduce(op, a) => match (op, get(a)) {
                (Reduce::Add, VecF32(x)) => F32(math::reduce_add(x)),
                (Reduce::Max, VecF32(x)) => F32(math::reduce_max(x)),
                (Reduce::Add, VecI32(n)) => Int(i64::from(math::reduce(n, i32::wrapping_add))),
                _ => self.bug(a),
            },
            Op::DotU8S8(acc, w, a) => VecI32(self.dots(acc, w, a, i32::from)),
            Op::DotS8S8(_, _, a) if self.vec_i8(a).contains(&0x80) => return Err(Fault::LeastByte),
            Op::DotS8S8(acc, w, a) => VecI32(self.dots(acc, w, a, |w| i32::from(w as i8))),
            Op::NibbleLow(a) => VecI8(self.vec_i8(a).map(|b| b & 15)),
            Op::NibbleHigh(a) => VecI8(self.vec_i8(a).map(|b| b >> 4)),
            Op::Lookup(table, a) => {
                let bytes = self.vec_i8(a);
                if let Some(&b) = bytes.iter().find(|b| **b >= 16) {
                    return Err(Fault::LookupIndex(b));
                }
                VecI8(bytes.map(|b| table[usize::from(b)]))
            }
            Op::Load(format, at) => {
                let bytes = self.memory.read(self.address(at), 16 * format.bytes())?;
                let lane = |l: usize| &bytes[l * format.bytes()..];
                match format.vector() {
                    Type::VecF32 => VecF32(std::array::from_fn(|l| read_f32(format, lane(l)))),
                    _ => VecI32(std::array::from_fn(|l| read_i32(format, lane(l)))),
                }
            }
            Op::LoadBytes(at) => {
                let bytes = self.memory.read(self.address(at), 64)?;
                VecI8(std::array::from_fn(|i| bytes[i]))
            }
            Op::LoadSplat(format, at) => {
                let bytes = self.memory.read(self.address(at), format.bytes())?;
                match format.vector() {
                    Type::VecF32 => VecF32([read_f32(format, bytes); 16]),
                    _ => VecI32([read_i32(format, bytes); 16]),
                }
            }
            Op::LoadSplatBytes(at) => {
                let bytes = self.memory.read(self.address(at), 4)?;
                VecI8(std::array::from_fn(|i| bytes[i % 4]))
            }
            Op::LoadScalar(format, at) => {
                let bytes = self.memory.read(self.address(at), format.bytes())?;
                match format.vector() {
                    Type::VecF32 => F32(read_f32(format, bytes)),
                    _ => Int(i64::from(read_i32(format, bytes))),
                }
            }
            Op::LoadInt(at) => {
                let bytes = self.memory.read(self.address(at), 8)?;
                Int(i64::from_le_bytes(std::array::from_fn(|i| bytes[i])))
            }
            Op::LoadU32(at) => {
                let bytes = self.memory.read(self.address(at), 4)?;
                Int(i64::from(read_i32(Format::I32, bytes) as u32))
            }
            Op::Store(format, v, at) => {
                let mut bytes = [0; 64];
                for l in 0..16 {
                    let to = &mut bytes[l * format.bytes()..];
                    match self.values[v.0 as usize] {
                        VecF32(x) => write_f32(format, x[l], to),
                        VecI32(n) => write_i32(format, n[l], to),
                        _ => self.bug(v),
                    }
                }
                let at = self.address(at);
                self.memory.write(at, &bytes[..16 * format.bytes()])?;
                Content::None
            }
            Op::StoreStrided(format, v, at, stride) => {
                let (lanes, at) = (*self.vec_f32(v), self.address(at));
                for (l, &x) in lanes.iter().enumerate() {
                    let mut bytes = [0; 4];
                    write_f32(format, x, &mut bytes);
                    let at = at.wrapping_add(l as i64 * i64::from(stride));
                    self.memory.write(at, &bytes[..format.bytes()])?;
                }
                Content::None
            }
            Op::StoreScalar(format, v, at) => {
                let mut bytes = [0; 4];
                match self.values[v.0 as usize] {
                    F32(x) => write_f32(format, x, &mut bytes),
                    Int(n) => write_i32(format, n as i32, &mut bytes),
                    _ => self.bug(v),
                }
                let at = self.address(at);
                self.memory.write(at, &bytes[..format.bytes()])?;
                Content::None
            }
            Op::Prefetch(_) => Content::None,
            Op::For(_) => unreachable!("{}: loops are run by run_loop", self.function.name),
        })
    }

    fn float(&self, a: Value, f: impl Fn(f32) -> f32) -> Content {
        match self.values[a.0 as usize] {
            Content::F32(x) => Content::F32(f(x)),
            Content::VecF32(x) => Content::VecF32(x.map(f)),
            _ => self.bug(a),
        }
    }

    fn bitcast(&self, to: Type, a: Value) -> Content {
        let bytes: [u8; 64] = match self.values[a.0 as usize] {
            Content::F32(x) if to == Type::Int => return Content::Int(i64::from(x.to_bits())),
            Content::Int(n) if to == Type::F32 => return Content::F32(f32::from_bits(n as u32)),
            Content::VecF32(x) => std::array::from_fn(|i| x[i / 4].to_le_bytes()[i % 4]),
            Content::VecI32(n) => std::array::from_fn(|i| n[i / 4].to_le_bytes()[i % 4]),
            Content::VecI8(b) => b,
            _ => self.bug(a),
        };
        match to {
            Type::VecF32 => Content::VecF32(std::array::from_fn(|l| read_f32(Format::F32, &bytes[4 * l..]))),
            Type::VecI32 => Content::VecI32(std::array::from_fn(|l| read_i32(Format::I32, &bytes[4 * l..]))),
            Type::VecI8 => Content::VecI8(bytes),
            Type::Int | Type::F32 | Type::Bool | Type::Mask => self.bug(a),
        }
    }
}

fn zip<T: Copy, U, const N: usize>(a: &[T; N], b: &[T; N], f: impl Fn(T, T) -> U) -> [U; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

fn read_f32(format: Format, bytes: &[u8]) -> f32 {
    match format {
        Format::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        Format::Bf16 => f32::from_le_bytes([0, 0, bytes[0], bytes[1]]),
        Format::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        Format::I32 | Format::I8 => unreachable!("{} is read as an integer", format.name()),
    }
}

fn read_i32(format: Format, bytes: &[u8]) -> i32 {
    match format {
        Format::I32 => i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        Format::I8 => i32::from(bytes[0] as i8),
        Format::F32 | Format::Bf16 | Format::F16 => unreachable!("{} is read as a float", format.name()),
    }
}

fn write_f32(format: Format, x: f32, to: &mut [u8]) {
    match format {
        Format::F32 => to[..4].copy_from_slice(&x.to_le_bytes()),
        Format::F16 => to[..2].copy_from_slice(&f16::from_f32(x).to_le_bytes()),
        Format::Bf16 | Format::I32 | Format::I8 => unreachable!("no float is stored as {}", format.name()),
    }
}

fn write_i32(format: Format, n: i32, to: &mut [u8]) {
    match format {
        Format::I32 => to[..4].copy_from_slice(&n.to_le_bytes()),
        Format::I8 => to[0] = n as u8,
        Format::F32 | Format::Bf16 | Format::F16 => unreachable!("no integer is stored as {}", format.name()),
    }
}

fn binary_f32(op: Binary, a: f32, b: f32) -> f32 {
    match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Min => math::min(a, b),
        Binary::Max => math::max(a, b),
        Binary::And | Binary::Or | Binary::Xor => unreachable!("no {} of floats", op.name()),
    }
}

/// [`Op::Binary`] of integers.
pub fn binary_int(op: Binary, a: i64, b: i64) -> i64 {
    match op {
        Binary::Add => a.wrapping_add(b),
        Binary::Sub => a.wrapping_sub(b),
        Binary::Mul => a.wrapping_mul(b),
        Binary::Min => a.min(b),
        Binary::Max => a.max(b),
        Binary::And => a & b,
        Binary::Or => a | b,
        Binary::Xor => a ^ b,
        Binary::Div => unreachable!("no division of integers"),
    }
}

/// [`Op::Shift`] of an integer.
pub fn shift_int(op: Shift, n: i64, by: u8) -> i64 {
    match op {
        Shift::Left => n << by,
        Shift::RightUnsigned => ((n as u64) >> by) as i64,
        Shift::RightSigned => n >> by,
    }
}

fn binary_i32(op: Binary, a: i32, b: i32) -> i32 {
    match op {
        Binary::Add => a.wrapping_add(b),
        Binary::Sub => a.wrapping_sub(b),
        Binary::Mul => a.wrapping_mul(b),
        Binary::And => a & b,
        Binary::Or => a | b,
        Binary::Xor => a ^ b,
        Binary::Div | Binary::Min | Binary::Max => unreachable!("no {} of i32 lanes", op.name()),
    }
}

fn binary_u8(op: Binary, a: u8, b: u8) -> u8 {
    match op {
        Binary::And => a & b,
        Binary::Or => a | b,
        Binary::Xor => a ^ b,
        Binary::Add | Binary::Sub | Binary::Mul | Binary::Div | Binary::Min | Binary::Max => {
            unreachable!("no {} of bytes", op.name())
        }
    }
}

fn compare<T: PartialOrd>(op: Compare, a: T, b: T) -> bool {
    match op {
        Compare::Equal => a == b,
        Compare::Less => a < b,
        Compare::LessEqual => a <= b,
        Compare::Greater => a > b,
        Compare::GreaterEqual => a >= b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tile::build::Builder;

    #[test]
    fn built_functions_have_the_bits_of_the_functions() {
        type Build = fn(&mut Builder, Value) -> Value;
        const BUILDERS: [Build; 5] = [math::build_exp, math::build_silu, math::build_gelu, math::build_tanh, |b, x| {
            math::build_soft_cap(b, x, 30.0)
        }];
        const FUNCTIONS: [fn(f32) -> f32; 5] =
            [math::exp, math::silu, math::gelu, math::tanh, |x| math::soft_cap(x, 30.0)];
        let (mut b, [x, y]) = Builder::new("functions", ["x", "y"]);
        b.repeat(4096 * 4, 64, |b, i| {
            let at = b.add(x, i);
            let v = b.load(Format::F32, at, 0);
            let s = b.load_scalar(Format::F32, at, 0);
            let vectors = BUILDERS.map(|build| build(b, v));
            let scalars = BUILDERS.map(|build| build(b, s));
            let to = b.mul_int(i, 2 * BUILDERS.len() as i64);
            let to = b.add(y, to);
            for (i, (vector, scalar)) in vectors.into_iter().zip(scalars).enumerate() {
                b.store(Format::F32, vector, to, 128 * i as i64);
                b.store_scalar(Format::F32, scalar, to, 128 * i as i64 + 64);
            }
        });
        let function = b.finish();
        let xs: Vec<f32> =
            (0..4096).map(|i| (i as f32 - 2048.0) * if i % 2 == 0 { 0.0873 } else { 0.000_873 }).collect();
        let mut memory = Memory::new();
        let x = memory.add_f32(&xs);
        let y = memory.add_zeros(2 * BUILDERS.len() * 4096 * 4);
        run(&function, &[x, y], &mut memory).unwrap();
        let got = memory.f32s(y);
        for (i, &x) in xs.iter().enumerate() {
            for (f, function) in FUNCTIONS.into_iter().enumerate() {
                let at = (i / 16 * FUNCTIONS.len() + f) * 32 + i % 16;
                assert_eq!(got[at].to_bits(), function(x).to_bits(), "function {f} of {x}");
                if i % 16 == 0 {
                    assert_eq!(got[at + 16].to_bits(), function(x).to_bits(), "function {f} of {x}");
                }
            }
        }
    }

    #[test]
    fn an_access_outside_memory_names_the_instruction() {
        let (mut b, [x]) = Builder::new("outside", ["x"]);
        let v = b.load(Format::F32, x, 4);
        b.store(Format::F32, v, x, 0);
        let mut memory = Memory::new();
        let x = memory.add_zeros(64);
        let error = run(&b.finish(), &[x], &mut memory).unwrap_err();
        assert_eq!(
            error.to_string(),
            "outside: `v1: f32x16 = load.f32 v0 + 4`: 64 bytes at 0x100000004 are outside memory (the region at 0x100000000 \
             has 64 bytes)"
        );
    }

    #[test]
    fn carried_values_change_all_at_once() {
        let (mut b, [to]) = Builder::new("fibonacci", ["to"]);
        let (zero, one, ten) = (b.int(0), b.int(1), b.int(10));
        let last = b.for_loop(zero, ten, 1, &[zero, one], |b, _, c| vec![c[1], b.add(c[0], c[1])]);
        b.store_scalar(Format::I32, last[0], to, 0);
        let mut memory = Memory::new();
        let to = memory.add_zeros(4);
        run(&b.finish(), &[to], &mut memory).unwrap();
        assert_eq!(memory.bytes(to), 55i32.to_le_bytes());
    }
}
