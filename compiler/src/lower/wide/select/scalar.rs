//! Scalars: integers, addresses and single floats.

use moec_ir::tile::{Binary, Compare, Shift, Type, Value};
use regalloc2::VReg;

use super::super::machine::{Base, INT, Inst, MASK, Mem, Operand, VECTOR};
use super::super::table::{Name, Width};
use super::{Form, Linear, Regs, Select, index};

impl Linear {
    /// The sum, when it has the form of an address.
    fn plus(self, other: Linear) -> Option<Linear> {
        let offset = self.offset.checked_add(other.offset)?;
        i32::try_from(offset).ok()?;
        let mut bases = [self.base, other.base].into_iter().flatten();
        let mut indices = [self.index, other.index].into_iter().flatten();
        let (base, second) = (bases.next(), bases.next());
        let (index, more) = (indices.next(), indices.next());
        match (second, index, more) {
            (_, _, Some(_)) | (Some(_), Some(_), None) => None,
            (Some(second), None, None) => Some(Linear { base, index: Some((second, 1)), offset }),
            (None, index, None) => Some(Linear { base, index, offset }),
        }
    }

    const fn constant(offset: i64) -> Linear {
        Linear { base: None, index: None, offset }
    }

    const fn register(base: VReg) -> Linear {
        Linear { base: Some(base), index: None, offset: 0 }
    }

    /// As a memory operand; the offset fits.
    fn mem(self) -> Option<Mem> {
        let base = self.base.map_or(Base::None, Base::Reg);
        Some(Mem { base, index: self.index, offset: i32::try_from(self.offset).ok()?, broadcast: false })
    }
}

impl Select<'_> {
    // Integers.

    fn linear(&mut self, v: Value) -> Linear {
        match self.forms[index(v)] {
            Form::Int(n) => Linear::constant(n),
            Form::Linear(l) => l,
            _ => Linear::register(self.scalar(v)),
        }
    }

    /// A sum in a register.
    pub(super) fn add_up(&mut self, l: Linear) -> VReg {
        match l {
            Linear { base: Some(base), index: None, offset: 0 } => base,
            Linear { base: None, index: None, offset } => self.int_constant(offset),
            _ => {
                let mem = l.mem().expect("sums have offsets of 32 bits");
                self.op1(Name::Lea, INT, Operand::Mem(mem))
            }
        }
    }

    /// The sum as a form of `result`: in a register if something wants it there.
    fn sum(&mut self, a: Linear, b: Linear, result: Value) -> Form {
        let l = a.plus(b).unwrap_or_else(|| {
            // The terms by themselves, those with the most parts first.
            let a = Linear::register(self.add_up_any(a));
            a.plus(b).unwrap_or_else(|| {
                let b = Linear::register(self.add_up_any(b));
                a.plus(b).expect("two registers make an address")
            })
        });
        if self.uses.wants_register(result) { Form::Regs(Regs([self.add_up(l); 2])) } else { Form::Linear(l) }
    }

    /// A sum in a register, whatever its offset.
    fn add_up_any(&mut self, l: Linear) -> VReg {
        if l.mem().is_some() {
            return self.add_up(l);
        }
        let offset = self.int_constant(l.offset);
        match (l.base, l.index) {
            (None, None) => offset,
            _ => {
                let rest = self.add_up(Linear { offset: 0, ..l });
                self.tied(Name::Add, rest, &[Operand::Use(offset)])
            }
        }
    }

    /// The address of a memory access, `more` bytes after `at`.
    pub(super) fn address(&mut self, at: moec_ir::tile::Address, more: i64) -> Mem {
        let l = self.linear(at.base);
        // Room for the parts of a vector, whose offsets are added later.
        const ROOM: i64 = 64;
        let offset = Linear::constant(i64::from(at.offset) + more);
        let sum = l.plus(offset).filter(|l| l.offset < i64::from(i32::MAX) - ROOM);
        let sum = sum.unwrap_or_else(|| {
            let base = self.add_up_any(l);
            Linear::register(match offset.mem() {
                Some(_) => self.add_up(Linear { base: Some(base), ..offset }),
                None => {
                    let offset = self.int_constant(offset.offset);
                    self.tied(Name::Add, base, &[Operand::Use(offset)])
                }
            })
        });
        sum.mem().expect("an offset of 32 bits")
    }

    pub(super) fn int_binary(&mut self, op: Binary, a: Value, b: Value, result: Value) -> Form {
        let constant = match self.forms[index(b)] {
            Form::Int(n) => Some(n),
            _ => None,
        };
        let small = constant.filter(|&n| i32::try_from(n).is_ok());
        let reg = match op {
            Binary::Add => {
                let (a, b) = (self.linear(a), self.linear(b));
                return self.sum(a, b, result);
            }
            Binary::Sub if small.is_some_and(|n| n != i64::from(i32::MIN)) => {
                let a = self.linear(a);
                return self.sum(a, Linear::constant(-small.unwrap_or_default()), result);
            }
            Binary::Mul if matches!(constant, Some(1 | 2 | 4 | 8)) => {
                return self.scaled(a, constant.unwrap_or_default() as u8, result);
            }
            Binary::Mul => match (constant, small) {
                (Some(n), _) if n > 0 && n.count_ones() == 1 => {
                    let a = self.scalar(a);
                    self.tied(Name::ShiftLeftInt, a, &[Operand::Imm(i64::from(n.trailing_zeros()))])
                }
                (_, Some(n)) => {
                    let a = self.scalar(a);
                    self.op2(Name::MulImm, INT, Operand::Use(a), Operand::Imm(n))
                }
                _ => self.int_op(Name::Mul, a, b),
            },
            Binary::Sub => self.int_op(Name::Sub, a, b),
            Binary::And => self.int_op_imm(Name::AndInt, Name::AndImm, a, b, small),
            Binary::Or => self.int_op_imm(Name::OrInt, Name::OrImm, a, b, small),
            Binary::Xor => self.int_op_imm(Name::XorInt, Name::XorImm, a, b, small),
            Binary::Min | Binary::Max => {
                let (a, b) = (self.scalar(a), self.scalar(b));
                self.emit(Name::CompareInt, &[Operand::Use(a), Operand::Use(b)]);
                let name = if op == Binary::Min { Name::MoveIfLess } else { Name::MoveIfGreater };
                self.tied(name, b, &[Operand::Use(a)])
            }
            Binary::Div => unreachable!("{}: integers are not divided", self.function.name),
        };
        Form::Regs(Regs([reg; 2]))
    }

    fn int_op(&mut self, name: Name, a: Value, b: Value) -> VReg {
        let (a, b) = (self.scalar(a), self.scalar(b));
        self.tied(name, a, &[Operand::Use(b)])
    }

    fn int_op_imm(&mut self, name: Name, imm: Name, a: Value, b: Value, constant: Option<i64>) -> VReg {
        match constant {
            Some(n) => {
                let a = self.scalar(a);
                self.tied(imm, a, &[Operand::Imm(n)])
            }
            None => self.int_op(name, a, b),
        }
    }

    /// `a × scale`, as an index where that is enough.
    fn scaled(&mut self, a: Value, scale: u8, result: Value) -> Form {
        let a = self.scalar(a);
        let l = match scale {
            1 => Linear::register(a),
            _ => Linear { base: None, index: Some((a, scale)), offset: 0 },
        };
        self.sum(l, Linear::constant(0), result)
    }

    pub(super) fn int_shift(&mut self, op: Shift, a: Value, by: u8, result: Value) -> Form {
        let name = match op {
            Shift::Left if by <= 3 => return self.scaled(a, 1 << by, result),
            Shift::Left => Name::ShiftLeftInt,
            Shift::RightUnsigned => Name::ShiftRightInt,
            Shift::RightSigned => Name::ShiftRightSignedInt,
        };
        let a = self.scalar(a);
        Form::Regs(Regs([self.tied(name, a, &[Operand::Imm(i64::from(by))]); 2]))
    }

    /// Sets the flags by `a` and `b`.
    pub(super) fn compare_ints(&mut self, a: Value, b: Value) {
        let a = self.scalar(a);
        self.compare_with(a, b);
    }

    /// Sets the flags by a register and `b`.
    pub(super) fn compare_with(&mut self, a: VReg, b: Value) {
        match self.forms[index(b)] {
            Form::Int(n) if i32::try_from(n).is_ok() => {
                self.emit(Name::CompareImm, &[Operand::Use(a), Operand::Imm(n)]);
            }
            _ => {
                let b = self.scalar(b);
                self.emit(Name::CompareInt, &[Operand::Use(a), Operand::Use(b)]);
            }
        }
    }

    pub(super) fn compare_scalars(&mut self, op: Compare, a: Value, b: Value) -> VReg {
        if self.function.ty(a) == Type::F32 {
            return self.compare_floats(op, a, b);
        }
        self.compare_ints(a, b);
        let name = match op {
            Compare::Equal => Name::SetIfEqual,
            Compare::Less => Name::SetIfLess,
            Compare::LessEqual => Name::SetIfLessOrEqual,
            Compare::Greater => Name::SetIfGreater,
            Compare::GreaterEqual => Name::SetIfGreaterOrEqual,
        };
        let byte = self.out.vreg(INT);
        self.emit(name, &[Operand::Def(byte)]);
        self.op1(Name::WidenByteInt, INT, Operand::Use(byte))
    }

    // Floats.

    pub(super) fn float_binary(&mut self, op: Binary, a: Value, b: Value) -> Form {
        let name = match op {
            Binary::Add => Name::AddSs,
            Binary::Sub => Name::SubSs,
            Binary::Mul => Name::MulSs,
            Binary::Div => Name::DivSs,
            Binary::Min => Name::MinSs,
            Binary::Max => Name::MaxSs,
            Binary::And | Binary::Or | Binary::Xor => unreachable!("{}: bits of a float", self.function.name),
        };
        let (a, b) = (self.scalar(a), self.scalar(b));
        Form::Regs(Regs([self.op2(name, VECTOR, Operand::Use(a), Operand::Use(b)); 2]))
    }

    fn compare_floats(&mut self, op: Compare, a: Value, b: Value) -> VReg {
        let (a, b) = (self.scalar(a), self.scalar(b));
        let operands = [Operand::Use(a), Operand::Use(b), Operand::Imm(float_predicate(op))];
        match self.cpu.width {
            Width::Zmm => {
                let k = self.op3(Name::CompareSsMask, MASK, operands);
                self.op1(Name::MaskToInt, INT, Operand::Use(k))
            }
            Width::Ymm => {
                let x = self.op3(Name::CompareSs, VECTOR, operands);
                let bits = self.op1(Name::XmmToInt, INT, Operand::Use(x));
                self.tied(Name::AndImm32, bits, &[Operand::Imm(1)])
            }
        }
    }

    /// `if c { a } else { b }` of scalars.
    pub(super) fn select_scalar(&mut self, c: Value, a: Value, b: Value) -> VReg {
        let (a_reg, b_reg, c) = (self.scalar(a), self.scalar(b), self.scalar(c));
        if self.function.ty(a) == Type::Int {
            self.emit(Name::TestInt, &[Operand::Use(c), Operand::Use(c)]);
            return self.tied(Name::MoveIfNotZero, b_reg, &[Operand::Use(a_reg)]);
        }
        match self.cpu.width {
            Width::Zmm => {
                let k = self.op1(Name::IntToMask, MASK, Operand::Use(c));
                let d = self.out.vreg(VECTOR);
                let operands = vec![Operand::Def(d), Operand::Use(b_reg), Operand::Use(a_reg)];
                self.out.push(Inst::Machine { name: Name::BlendMaskXmm, operands, mask: Some(k) });
                d
            }
            Width::Ymm => {
                let sign = self.tied(Name::Negate, c, &[]);
                let mask = self.op1(Name::IntToXmm, VECTOR, Operand::Use(sign));
                self.op3(Name::BlendXmm, VECTOR, [b_reg, a_reg, mask].map(Operand::Use))
            }
        }
    }
}

/// The predicate of `vcmpps`: ordered, quiet.
pub(super) const fn float_predicate(op: Compare) -> i64 {
    match op {
        Compare::Equal => 0x00,
        Compare::Less => 0x11,
        Compare::LessEqual => 0x12,
        Compare::GreaterEqual => 0x1d,
        Compare::Greater => 0x1e,
    }
}
