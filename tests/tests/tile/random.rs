//! Random verified functions, from a list of numbers (which proptest can shrink).
//!
//! A function reads the first argument's memory and writes the others': f32 words, f16 words, and integers. Integers never
//! come from the bits of a NaN, whose sign and payload IEEE leaves open.

use moec_ir::tile::build::Builder;
use moec_ir::tile::{Binary, Compare, Function, Memory, Reduce, Shift, Type, Value};
use moec_tests::native::Arg;

/// One step: what to do, and numbers to choose operands by.
pub type Step = (u8, u16, u16, u16, u32);

/// Bytes of the memory that is read.
pub const INPUT: usize = 2048;
/// Bytes of each memory that is written.
pub const OUTPUT: usize = 8192;

const TYPES: [Type; 7] = [Type::Int, Type::F32, Type::Bool, Type::VecF32, Type::VecI32, Type::VecI8, Type::Mask];
const FORMATS: [Memory; 5] = [Memory::F32, Memory::Bf16, Memory::F16, Memory::I32, Memory::I8];

/// The arguments: random input of which half are ordinary numbers, and zeros.
pub fn arguments(seed: u64) -> Vec<Arg> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    let special =
        [0x0000_0000, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x0000_0001, 0x3f80_0000, 0xbf00_0000];
    let words = (0..INPUT / 4).map(|_| match next() % 4 {
        0 => next(),
        1 => special[next() as usize % special.len()],
        _ => ((next() as i32) as f32 / 2.0f32.powi(24 + (next() % 8) as i32)).to_bits(),
    });
    let input = words.flat_map(u32::to_le_bytes).collect();
    let output = || Arg::Memory(vec![0; OUTPUT]);
    vec![Arg::Memory(input), output(), output(), output()]
}

/// The function that `steps` spell.
pub fn function(steps: &[Step]) -> Function {
    let (b, [input, floats, halves, ints]) = Builder::new("random", ["input", "floats", "halves", "ints"]);
    let mut g = Generator { b, outputs: [floats, halves, ints], input, used: [0; 3], pools: Default::default() };
    g.begin();
    g.steps(steps, 0);
    g.finish()
}

struct Generator {
    b: Builder,
    input: Value,
    /// Where floats, halves and integers go.
    outputs: [Value; 3],
    /// Bytes of them that are taken.
    used: [i64; 3],
    /// Values to choose from, by the order of [`TYPES`].
    pools: [Vec<Value>; 7],
}

impl Generator {
    fn begin(&mut self) {
        let int = self.b.int(7);
        let vector = self.b.load(Memory::F32, self.input, 0);
        let scalar = self.b.load_scalar(Memory::F32, self.input, 64);
        let lanes = self.b.lanes(std::array::from_fn(|l| l as i32 - 3));
        let bytes = self.b.load_bytes(self.input, 128);
        for v in [int, vector, scalar, lanes, bytes] {
            self.keep(v);
        }
        let yes = self.b.compare(Compare::Less, int, int);
        let mask = self.b.compare(Compare::Less, vector, vector);
        self.keep(yes);
        self.keep(mask);
    }

    fn keep(&mut self, v: Value) {
        let ty = self.b.ty(v);
        let pool = TYPES.iter().position(|t| *t == ty).expect("all types are listed");
        self.pools[pool].push(v);
    }

    fn pick(&self, ty: Type, n: u16) -> Value {
        let pool = &self.pools[TYPES.iter().position(|t| *t == ty).expect("all types are listed")];
        // Recent values more often than old ones.
        let back =
            if n.is_multiple_of(4) { usize::from(n / 4) % pool.len() } else { usize::from(n / 4) % pool.len().min(4) };
        pool[pool.len() - 1 - back]
    }

    fn steps(&mut self, steps: &[Step], depth: usize) {
        let mut at = 0;
        while at < steps.len() {
            let (op, x, y, z, n) = steps[at];
            at += 1;
            if op % 32 == 31 && depth < 2 {
                let inner = (usize::from(y) % 8).min(steps.len() - at);
                self.run_loop(&steps[at..at + inner], depth, (x, z, n));
                at += inner;
            } else {
                self.step(op % 32, [x, y, z], n);
            }
        }
    }

    fn run_loop(&mut self, steps: &[Step], depth: usize, (x, z, n): (u16, u16, u32)) {
        let start = self.b.int(i64::from(n % 5) - 2);
        let end = self.b.int(i64::from(n / 5 % 7) - 1);
        let carried_types: Vec<Type> = (0..z % 4).map(|i| TYPES[usize::from(z / 4 + i * 3) % 7]).collect();
        let initial: Vec<Value> = carried_types.iter().map(|&ty| self.pick(ty, x)).collect();
        let outer = self.pools.clone();
        // The builder is inside the closure while the body is written.
        let (dummy, []) = Builder::new("", []);
        let mut b = std::mem::replace(&mut self.b, dummy);
        let results = b.for_loop(start, end, i64::from(n / 35 % 3) + 1, &initial, |b, index, carried| {
            std::mem::swap(b, &mut self.b);
            self.keep(index);
            for &c in carried {
                self.keep(c);
            }
            self.steps(steps, depth + 1);
            let next = carried_types.iter().map(|&ty| self.pick(ty, 0)).collect();
            std::mem::swap(b, &mut self.b);
            next
        });
        self.b = b;
        self.pools = outer;
        for r in results {
            self.keep(r);
        }
    }

    fn step(&mut self, op: u8, [x, y, z]: [u16; 3], n: u32) {
        use Type::{Bool, F32, Int, Mask, VecF32, VecI8, VecI32};
        let choice = n as usize;
        let float = if n & 1 == 0 { VecF32 } else { F32 };
        let v = match op {
            0 => self.b.int(i64::from(n as i32) << (x % 33)),
            1 => self.b.f32(f32::from_bits(n)),
            2 => self.b.lanes(std::array::from_fn(|l| (n as i32).wrapping_mul(l as i32 + i32::from(x)))),
            3..=6 => {
                let ops = [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Min, Binary::Max];
                let (a, b) = (self.pick(float, x), self.pick(float, y));
                self.b.binary(ops[choice / 2 % ops.len()], a, b)
            }
            7 => {
                let ops = [
                    Binary::Add,
                    Binary::Sub,
                    Binary::Mul,
                    Binary::Min,
                    Binary::Max,
                    Binary::And,
                    Binary::Or,
                    Binary::Xor,
                ];
                let (a, b) = (self.pick(Int, x), self.pick(Int, y));
                self.b.binary(ops[choice % ops.len()], a, b)
            }
            8 | 9 => {
                let ops = [Binary::Add, Binary::Sub, Binary::Mul, Binary::And, Binary::Or, Binary::Xor];
                let (a, b) = (self.pick(VecI32, x), self.pick(VecI32, y));
                self.b.binary(ops[choice % ops.len()], a, b)
            }
            10 => {
                let ops = [Binary::And, Binary::Or, Binary::Xor];
                let (a, b) = (self.pick(VecI8, x), self.pick(VecI8, y));
                self.b.binary(ops[choice % ops.len()], a, b)
            }
            11 => {
                let (ty, bits) = if n & 1 == 0 { (VecI32, 32) } else { (Int, 64) };
                let a = self.pick(ty, x);
                self.b.shift(Shift::ALL[choice / 2 % 3], a, (y % bits) as u8)
            }
            12 => {
                let a = self.pick(float, x);
                match choice / 2 % 3 {
                    0 => self.b.sqrt(a),
                    1 => self.b.abs(a),
                    _ => self.b.round(a),
                }
            }
            13 | 14 => {
                let (a, b, c) = (self.pick(float, x), self.pick(float, y), self.pick(float, z));
                self.b.fma(a, b, c)
            }
            15 | 16 => {
                let ty = [VecF32, VecI32, F32, Int][choice % 4];
                let (a, b) = (self.pick(ty, x), self.pick(ty, y));
                self.b.compare(Compare::ALL[choice / 4 % 5], a, b)
            }
            17 | 18 => {
                let (c, ty) = [(Mask, VecF32), (Mask, VecI32), (Bool, F32), (Bool, Int)][choice % 4];
                let (c, a, b) = (self.pick(c, x), self.pick(ty, y), self.pick(ty, z));
                self.b.select(c, a, b)
            }
            19 => {
                let a = self.pick(if n & 1 == 0 { F32 } else { Int }, x);
                self.b.splat(a)
            }
            20 => {
                let a = self.pick(VecI32, x);
                self.b.int_to_float(a)
            }
            21 => {
                let a = self.pick(VecF32, x);
                self.b.float_to_int(a)
            }
            22 => match choice % 5 {
                0 => {
                    let a = self.number(F32, x);
                    self.b.bitcast(Int, a)
                }
                1 => {
                    let a = self.number(VecF32, x);
                    self.b.bitcast([VecI32, VecI8][choice / 5 % 2], a)
                }
                2 => {
                    let a = self.pick(Int, x);
                    self.b.bitcast(F32, a)
                }
                3 => {
                    let a = self.pick(VecI32, x);
                    self.b.bitcast([VecF32, VecI8, VecI32][choice / 5 % 3], a)
                }
                _ => {
                    let a = self.pick(VecI8, x);
                    self.b.bitcast([VecF32, VecI32, VecI8][choice / 5 % 3], a)
                }
            },
            23 => {
                let (op, ty) = [(Reduce::Add, VecF32), (Reduce::Max, VecF32), (Reduce::Add, VecI32)][choice % 3];
                let a = self.pick(ty, x);
                self.b.reduce(op, a)
            }
            24 => {
                let (acc, w, a) = (self.pick(VecI32, x), self.pick(VecI8, y), self.pick(VecI8, z));
                if n & 1 == 0 {
                    self.b.dot_u8s8(acc, w, a)
                } else {
                    // The second factor of signed bytes is never −128.
                    let odd = self.b.lanes([0x0101_0101; 16]);
                    let odd = self.b.bitcast(VecI8, odd);
                    let a = self.b.binary(Binary::Or, a, odd);
                    self.b.dot_s8s8(acc, w, a)
                }
            }
            25 => {
                let a = self.pick(VecI8, x);
                let nibbles = if n & 1 == 0 { self.b.nibble_low(a) } else { self.b.nibble_high(a) };
                if n & 2 == 0 { nibbles } else { self.b.lookup(std::array::from_fn(|i| (n >> i) as u8), nibbles) }
            }
            26 | 27 => {
                let format = FORMATS[choice % 5];
                let at = i64::from(y) % (INPUT as i64 - 64);
                match choice / 5 % 7 {
                    0 | 1 => self.b.load(format, self.input, at),
                    2 => self.b.load_bytes(self.input, at),
                    3 => self.b.load_splat(format, self.input, at),
                    4 => self.b.load_splat_bytes(self.input, at),
                    5 => self.b.load_scalar(format, self.input, at),
                    _ => {
                        if x & 1 == 0 {
                            self.b.load_int(self.input, at)
                        } else {
                            self.b.load_u32(self.input, at)
                        }
                    }
                }
            }
            28 => {
                self.b.prefetch(self.input, i64::from(n as i32));
                return;
            }
            _ => {
                let ty = TYPES[choice % 7];
                let v = self.pick(ty, x);
                self.store(v, y);
                return;
            }
        };
        self.keep(v);
    }

    /// A float that is no NaN.
    fn number(&mut self, ty: Type, n: u16) -> Value {
        let v = self.pick(ty, n);
        let number = self.b.compare(Compare::Equal, v, v);
        let zero = if ty == Type::F32 { self.b.f32(0.0) } else { self.b.splat_f32(0.0) };
        self.b.select(number, v, zero)
    }

    /// Stores a value where nothing was stored before, in one of the ways there are.
    fn store(&mut self, v: Value, way: u16) {
        let outputs = self.outputs;
        let mut place = |which: usize, bytes: i64| {
            let at = self.used[which];
            self.used[which] += bytes;
            (at + bytes <= OUTPUT as i64).then_some(at)
        };
        match self.b.ty(v) {
            Type::VecF32 => match way % 4 {
                0 => place(1, 32).map(|at| self.b.store(Memory::F16, v, outputs[1], at)),
                1 => place(1, 96).map(|at| self.b.store_strided(Memory::F16, v, outputs[1], at, 6)),
                2 => place(0, 128).map(|at| self.b.store_strided(Memory::F32, v, outputs[0], at + 60, -4)),
                _ => place(0, 64).map(|at| self.b.store(Memory::F32, v, outputs[0], at)),
            },
            Type::F32 => match way % 2 {
                0 => place(0, 4).map(|at| self.b.store_scalar(Memory::F32, v, outputs[0], at)),
                _ => place(1, 2).map(|at| self.b.store_scalar(Memory::F16, v, outputs[1], at)),
            },
            Type::VecI32 => match way % 2 {
                0 => place(2, 64).map(|at| self.b.store(Memory::I32, v, outputs[2], at)),
                _ => place(2, 16).map(|at| self.b.store(Memory::I8, v, outputs[2], at)),
            },
            Type::Int => match way % 3 {
                0 => place(2, 1).map(|at| self.b.store_scalar(Memory::I8, v, outputs[2], at)),
                1 => place(2, 4).map(|at| self.b.store_scalar(Memory::I32, v, outputs[2], at)),
                _ => {
                    let high = self.b.shift(Shift::RightSigned, v, 32);
                    place(2, 4).map(|at| self.b.store_scalar(Memory::I32, high, outputs[2], at))
                }
            },
            Type::VecI8 => {
                let lanes = self.b.bitcast(Type::VecI32, v);
                place(2, 64).map(|at| self.b.store(Memory::I32, lanes, outputs[2], at))
            }
            Type::Bool => {
                let (yes, no) = (self.b.int(1), self.b.int(2));
                let n = self.b.select(v, yes, no);
                place(2, 1).map(|at| self.b.store_scalar(Memory::I8, n, outputs[2], at))
            }
            Type::Mask => {
                let (yes, no) = (self.b.splat_i32(1), self.b.splat_i32(2));
                let n = self.b.select(v, yes, no);
                place(2, 16).map(|at| self.b.store(Memory::I8, n, outputs[2], at))
            }
        };
    }

    /// Stores what is left in the pools.
    fn finish(mut self) -> Function {
        let pools = std::mem::take(&mut self.pools);
        for (i, &v) in pools.iter().flat_map(|pool| pool.iter().rev().take(12)).enumerate() {
            self.store(v, i as u16);
        }
        self.b.finish()
    }
}
