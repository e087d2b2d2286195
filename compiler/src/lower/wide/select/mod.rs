//! Instruction selection: tile IR → machine instructions over virtual registers.
//!
//! Operations are taken in order. What need not be in a register yet stays as it is ([`Form`]): constants, sums that become addressing
//! modes, and loads with one use, which become memory operands of the instruction that uses them. A fused multiply-add or dot
//! product overwrites the operand that dies. Deliberately absent: scheduling (generators choose the order, the CPU reorders) and registers
//! ([`super::allocate`]).

mod bytes;
mod constants;
mod memory;
mod scalar;
mod uses;
mod vector;

use moec_ir::tile::{self, Inst as TileInst, Loop, Op, Type, Value};
use regalloc2::{RegClass, VReg};
use std::collections::HashMap;

use super::Cpu;
use super::machine::{Base, Builder, Function, INT, Inst, MASK, Mem, Operand, VECTOR};
use super::table::{Name, Width};
use bytes::Bytes;
use constants::Constants;
use uses::Uses;

/// A kernel in machine instructions, and for each instruction of the tile IR, in the order of its text, the number of the first machine
/// instruction that it became.
pub struct Selected {
    /// The machine instructions.
    pub function: Function,
    /// Where each tile instruction begins.
    pub trace: Vec<usize>,
}

/// Most parameters that come in registers (System V).
pub const REGISTER_PARAMS: usize = 6;

/// Selects instructions for `function`.
pub fn select(function: &tile::Function, cpu: Cpu) -> Selected {
    let mut select = Select {
        function,
        cpu,
        out: Builder::new(function.name.clone(), cpu.width),
        forms: vec![Form::Undefined; function.types.len()],
        uses: Uses::new(function),
        bytes: Bytes::new(function),
        deferred: Vec::new(),
        constants: Constants::default(),
        pairs: HashMap::new(),
        magnitudes: HashMap::new(),
        nibbles: HashMap::new(),
        block: 0,
        trace: Vec::new(),
    };
    select.entry();
    select.body(&function.body);
    select.out.push(Inst::Return);
    Selected { function: select.out.finish(), trace: select.trace }
}

/// The registers of a value: those of a vector's parts, or twice the one of a scalar.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Regs([VReg; 2]);

/// An integer that is not in a register: `base + index × scale + offset`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Linear {
    base: Option<VReg>,
    index: Option<(VReg, u8)>,
    offset: i64,
}

/// A load that has not been done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Load {
    /// Of a whole vector.
    Whole(Mem),
    /// Of four bytes for all lanes.
    Spread(Mem),
}

/// What is known of a value.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    /// Nothing yet.
    Undefined,
    /// An Int constant.
    Int(i64),
    /// An Int that only addresses and other sums use.
    Linear(Linear),
    /// An F32 constant, by its bits.
    Float(u32),
    /// A vector with the same 32 bits in all lanes.
    Spread(u32),
    /// A vector of constants.
    Lanes([i32; 16]),
    /// A vector that is loaded where it is used, once.
    Load(Load),
    /// The low or the high four bits of each of these bytes, where a table look-up can take them out by itself.
    Nibbles(Regs, bool),
    /// A sum of dot products that is not finished.
    Pairs(Pairs),
    /// In registers.
    Regs(Regs),
}

/// A sum of dot products of which some are still sums of two products, in 16 bits: they are added to the rest when it is used for anything but one more.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Pairs {
    /// The rest, if it is not 0.
    before: Option<Regs>,
    pairs: Regs,
    /// The largest bytes of all vectors multiplied, together.
    most: u8,
}

/// The last source of an instruction, which may be memory.
#[derive(Clone, Copy, Debug)]
enum Source {
    Regs(Regs),
    /// Part 0's memory, and the bytes to the next part's.
    Mem(Mem, i32),
}

impl Source {
    fn part(self, part: usize) -> Operand {
        match self {
            Source::Regs(r) => Operand::Use(r.0[part]),
            Source::Mem(mem, step) => Operand::Mem(mem.plus(step * part as i32)),
        }
    }
}

struct Select<'a> {
    function: &'a tile::Function,
    cpu: Cpu,
    out: Builder,
    forms: Vec<Form>,
    uses: Uses,
    bytes: Bytes,
    /// Values whose form is a load or a sum of pairs, in order.
    deferred: Vec<Value>,
    constants: Constants,
    /// Even and odd bytes as 16 bits of vectors of bytes, signed or not, made in this block.
    pairs: HashMap<(VReg, bool), [VReg; 2]>,
    /// Magnitudes of signed bytes, made in this block.
    magnitudes: HashMap<VReg, VReg>,
    /// Low or high four bits of vectors of bytes, by the first part, taken out in this block.
    nibbles: HashMap<(VReg, bool), Regs>,
    /// Number of the tile IR's current block.
    block: usize,
    trace: Vec<usize>,
}

impl Select<'_> {
    fn entry(&mut self) {
        let params = &self.function.params;
        let arrived: Vec<VReg> = params.iter().take(REGISTER_PARAMS).map(|_| self.out.vreg(INT)).collect();
        self.out.push(Inst::Entry(arrived.clone()));
        for (i, (v, _)) in params.iter().enumerate() {
            let reg = match arrived.get(i) {
                Some(&reg) => reg,
                None => {
                    let offset = 8 * (i - REGISTER_PARAMS) as i32;
                    let mem = Mem { base: Base::StackParams, index: None, offset, broadcast: false };
                    self.op1(Name::Load64, INT, Operand::Mem(mem))
                }
            };
            self.set(*v, Form::Regs(Regs([reg; 2])));
        }
    }

    fn body(&mut self, insts: &[TileInst]) {
        for inst in insts {
            self.trace.push(self.out.count());
            inst.op.for_each_operand(|v| self.uses.consume(v));
            match &inst.op {
                Op::For(l) => self.run_loop(l, &inst.results),
                op => {
                    if let Some(form) = self.operation(op, inst.results.first().copied()) {
                        let [result] = inst.results[..] else { unreachable!("{op:?} has one result") };
                        self.set(result, form);
                    }
                }
            }
        }
    }

    /// The test is at the end of the body; before the loop it is left out when constants tell that the body runs. Vectors that leave the loop are
    /// copies: otherwise the allocator keeps them in one place with what the loop carries, and when little room is left after the loop that place is memory.
    fn run_loop(&mut self, l: &Loop, results: &[Value]) {
        self.load_deferred();
        let bounds = (self.forms[index(l.start)], self.forms[index(l.end)]);
        let runs = matches!(bounds, (Form::Int(start), Form::Int(end)) if start < end);
        let start = self.scalar(l.start);
        let mut arguments = vec![start];
        arguments.extend(self.flat(&l.initial));
        let (body, exit) = (self.out.block(), self.out.block());
        let counter = self.out.param(body, INT);
        self.set(l.index, Form::Regs(Regs([counter; 2])));
        self.block_params(body, &l.carried);
        self.block_params(exit, results);

        self.constants.leave_block();
        if l.body.iter().all(|i| !matches!(i.op, Op::For(_))) {
            for op in l.body.iter().map(|i| &i.op) {
                self.hoist_constants(op);
            }
        }
        if runs {
            self.out.push(Inst::Jump { to: body, arguments });
        } else {
            let (enter, skip) = (self.out.block(), self.out.block());
            self.compare_ints(l.start, l.end);
            self.out.push(Inst::Branch { name: Name::JumpIfGreaterOrEqual, then: skip, otherwise: enter });
            self.out.enter(skip);
            self.out.push(Inst::Jump { to: exit, arguments: arguments[1..].to_vec() });
            self.out.enter(enter);
            self.out.push(Inst::Jump { to: body, arguments });
        }

        let outer = std::mem::replace(&mut self.block, self.uses.block_of(l.index));
        self.enter(body);
        self.body(&l.body);
        for &v in &l.next {
            self.uses.consume(v);
        }
        self.load_deferred();
        let next = self.flat(&l.next);
        let step = Linear { base: Some(counter), index: None, offset: l.step };
        let stepped = self.add_up(step);
        let (latch, leave) = (self.out.block(), self.out.block());
        self.compare_with(stepped, l.end);
        self.out.push(Inst::Branch { name: Name::JumpIfLess, then: latch, otherwise: leave });
        self.out.enter(latch);
        let mut again = vec![stepped];
        again.extend(&next);
        self.out.push(Inst::Jump { to: body, arguments: again });
        self.out.enter(leave);
        let copied = |select: &mut Self, r: VReg| match r.class() {
            VECTOR => select.op1(Name::CopyVector, VECTOR, Operand::Use(r)),
            _ => r,
        };
        let left = next.into_iter().map(|r| copied(self, r)).collect();
        self.out.push(Inst::Jump { to: exit, arguments: left });
        self.block = outer;
        self.constants.leave_block();
        self.constants.forget_hoisted();
        self.enter(exit);
    }

    fn enter(&mut self, block: regalloc2::Block) {
        self.out.enter(block);
        self.pairs.clear();
        self.magnitudes.clear();
        self.nibbles.clear();
    }

    fn block_params(&mut self, block: regalloc2::Block, values: &[Value]) {
        for &v in values {
            let ty = self.function.ty(v);
            let first = self.out.param(block, self.class(ty));
            let second = if self.parts(ty) == 2 { self.out.param(block, self.class(ty)) } else { first };
            self.set(v, Form::Regs(Regs([first, second])));
        }
    }

    /// The registers of values, part by part.
    fn flat(&mut self, values: &[Value]) -> Vec<VReg> {
        let mut flat = Vec::new();
        for &v in values {
            let regs = self.regs(v);
            flat.extend(&regs.0[..self.parts(self.function.ty(v))]);
        }
        flat
    }

    /// Anything but a loop; `None` when it has no result.
    fn operation(&mut self, op: &Op, result: Option<Value>) -> Option<Form> {
        Some(match op {
            Op::Int(n) => Form::Int(*n),
            Op::F32(bits) => Form::Float(*bits),
            Op::Lanes(lanes) if lanes.iter().all(|l| *l == lanes[0]) => Form::Spread(lanes[0].cast_unsigned()),
            Op::Lanes(lanes) => Form::Lanes(*lanes),
            Op::Binary(op, a, b) => match self.function.ty(*a) {
                Type::Int => self.int_binary(*op, *a, *b, result?),
                Type::F32 => self.float_binary(*op, *a, *b),
                Type::Bool | Type::VecF32 | Type::VecI32 | Type::VecI8 | Type::Mask => {
                    Form::Regs(self.vector_binary(*op, *a, *b))
                }
            },
            Op::Shift(op, a, by) if self.function.ty(*a) == Type::Int => self.int_shift(*op, *a, *by, result?),
            Op::Shift(op, a, by) => Form::Regs(self.vector_shift(*op, *a, *by)),
            Op::Sqrt(a) => self.unary((Name::SqrtSs, Name::SqrtPs), *a, None),
            Op::Round(a) => self.unary((Name::RoundSs, Name::RoundPs), *a, Some(NEAREST_EVEN)),
            Op::Abs(a) => self.abs(*a),
            Op::Fma(a, b, c) => Form::Regs(self.fma(*a, *b, *c)),
            Op::Compare(op, a, b) => Form::Regs(self.compare(*op, *a, *b)),
            Op::Select(c, a, b) => Form::Regs(self.select(*c, *a, *b)),
            Op::Splat(a) => self.splat(*a),
            Op::IntToFloat(a) => Form::Regs(self.vector_unary(Name::IntToFloat, *a)),
            Op::FloatToInt(a) => Form::Regs(self.vector_unary(Name::FloatToInt, *a)),
            Op::Bitcast(to, a) => self.bitcast(*to, *a),
            Op::Reduce(op, a) => Form::Regs(self.reduce(*op, *a)),
            Op::DotU8S8(acc, w, a) => self.dot(*acc, *w, *a),
            Op::DotS8S8(acc, w, a) => self.dot_signed(*acc, *w, *a),
            Op::NibbleLow(a) => self.nibbles(*a, false),
            Op::NibbleHigh(a) => self.nibbles(*a, true),
            Op::Lookup(table, a) => Form::Regs(self.lookup(*table, *a)),
            Op::Load(format, at) => self.load(*format, *at, result?),
            Op::LoadBytes(at) => self.load_bytes(*at, result?),
            Op::LoadSplat(format, at) => self.load_splat(*format, *at, result?),
            Op::LoadSplatBytes(at) => self.load_spread(*at, result?),
            Op::LoadScalar(format, at) => self.load_scalar(*format, *at),
            Op::LoadInt(at) => self.load_int(Name::Load64, *at),
            Op::LoadU32(at) => self.load_int(Name::Load32, *at),
            Op::Store(..) | Op::StoreStrided(..) | Op::StoreScalar(..) | Op::Prefetch(_) => {
                self.store_op(op);
                return None;
            }
            Op::For(_) => unreachable!("{}: loops are run_loop's", self.function.name),
        })
    }

    // Values.

    fn set(&mut self, v: Value, form: Form) {
        if matches!(form, Form::Load(_) | Form::Pairs(_)) {
            self.deferred.push(v);
        }
        self.forms[index(v)] = form;
    }

    /// The parts that a value of this type has.
    fn parts(&self, ty: Type) -> usize {
        if ty.is_vector() && self.cpu.width == Width::Ymm { 2 } else { 1 }
    }

    fn class(&self, ty: Type) -> RegClass {
        match ty {
            Type::Int | Type::Bool => INT,
            Type::Mask if self.cpu.width == Width::Zmm => MASK,
            Type::F32 | Type::VecF32 | Type::VecI32 | Type::VecI8 | Type::Mask => VECTOR,
        }
    }

    /// The value in registers.
    fn regs(&mut self, v: Value) -> Regs {
        match self.forms[index(v)] {
            Form::Undefined => panic!("{}: {v} is used before it is defined", self.function.name),
            Form::Int(n) => Regs([self.int_constant(n); 2]),
            Form::Linear(l) => Regs([self.add_up(l); 2]),
            Form::Float(bits) => Regs([self.float_constant(bits); 2]),
            Form::Spread(bits) => Regs([self.spread_constant(bits); 2]),
            Form::Lanes(lanes) => self.lanes_constant(lanes),
            Form::Load(load) => {
                let regs = self.load_now(load);
                self.forms[index(v)] = Form::Regs(regs);
                regs
            }
            Form::Nibbles(bytes, high) => self.cut_nibbles(bytes, high),
            Form::Pairs(sum) => {
                let regs = self.add_pairs(sum);
                self.forms[index(v)] = Form::Regs(regs);
                regs
            }
            Form::Regs(r) => r,
        }
    }

    /// A scalar in its register.
    fn scalar(&mut self, v: Value) -> VReg {
        self.regs(v).0[0]
    }

    /// The value in registers or, when that serves, in memory. `spread`: the instruction can spread one element of it.
    fn source(&mut self, v: Value, spread: bool) -> Source {
        let zmm = self.cpu.width == Width::Zmm;
        match self.forms[index(v)] {
            Form::Load(Load::Whole(mem)) => Source::Mem(mem, self.part_bytes()),
            Form::Load(Load::Spread(mem)) if zmm && spread => Source::Mem(Mem { broadcast: true, ..mem }, 0),
            Form::Spread(bits) if zmm && spread && bits != 0 => {
                let constant = self.out.constant(&bits.to_le_bytes());
                Source::Mem(Mem { broadcast: true, ..Mem::constant(constant) }, 0)
            }
            Form::Lanes(lanes) => {
                let bytes: Vec<u8> = lanes.iter().flat_map(|l| l.to_le_bytes()).collect();
                Source::Mem(Mem::constant(self.out.constant(&bytes)), self.part_bytes())
            }
            _ => Source::Regs(self.regs(v)),
        }
    }

    /// Whether [`Select::source`] gives memory.
    fn is_memory(&self, v: Value, spread: bool) -> bool {
        let zmm = self.cpu.width == Width::Zmm;
        match self.forms[index(v)] {
            Form::Load(Load::Whole(_)) | Form::Lanes(_) => true,
            Form::Load(Load::Spread(_)) => zmm && spread,
            Form::Spread(bits) => zmm && spread && bits != 0,
            Form::Undefined | Form::Int(_) | Form::Linear(_) | Form::Float(_) => false,
            Form::Nibbles(..) | Form::Pairs(_) | Form::Regs(_) => false,
        }
    }

    /// Whether the current operation is the last to use `v`, which is in a register of this block's.
    fn dies(&self, v: Value) -> bool {
        self.uses.is_last(v, self.block) && matches!(self.forms[index(v)], Form::Regs(_))
    }

    /// Does the loads and additions that have been put off: memory is about to change, or the block ends.
    fn load_deferred(&mut self) {
        for v in std::mem::take(&mut self.deferred) {
            if matches!(self.forms[index(v)], Form::Load(_) | Form::Pairs(_)) && !self.uses.is_done(v) {
                self.regs(v);
            }
        }
    }

    // Instructions.

    fn emit(&mut self, name: Name, operands: &[Operand]) {
        self.out.push(Inst::Machine { name, operands: operands.to_vec(), mask: None });
    }

    /// `d = name(a)`.
    fn op1(&mut self, name: Name, class: RegClass, a: Operand) -> VReg {
        let d = self.out.vreg(class);
        self.emit(name, &[Operand::Def(d), a]);
        d
    }

    /// `d = name(a, b)`.
    fn op2(&mut self, name: Name, class: RegClass, a: Operand, b: Operand) -> VReg {
        let d = self.out.vreg(class);
        self.emit(name, &[Operand::Def(d), a, b]);
        d
    }

    /// `d = name(a, b, c)`.
    fn op3(&mut self, name: Name, class: RegClass, [a, b, c]: [Operand; 3]) -> VReg {
        let d = self.out.vreg(class);
        self.emit(name, &[Operand::Def(d), a, b, c]);
        d
    }

    /// `from = name(from, …)`: the result in the register of `from`.
    fn tied(&mut self, name: Name, from: VReg, rest: &[Operand]) -> VReg {
        let to = self.out.vreg(from.class());
        let mut operands = vec![Operand::Tied { from, to }];
        operands.extend(rest);
        self.emit(name, &operands);
        to
    }

    /// `f` of the numbers of a vector's parts.
    fn each_part(&mut self, mut f: impl FnMut(&mut Self, usize) -> VReg) -> Regs {
        let first = f(self, 0);
        let second = if self.cpu.width == Width::Ymm { f(self, 1) } else { first };
        Regs([first, second])
    }

    /// Bytes of a part.
    fn part_bytes(&self) -> i32 {
        match self.cpu.width {
            Width::Ymm => 32,
            Width::Zmm => 64,
        }
    }
}

/// Rounding to nearest even, without exceptions, as `vroundps` and `vrndscaleps` encode it.
const NEAREST_EVEN: i64 = 8;

fn index(v: Value) -> usize {
    v.0 as usize
}
