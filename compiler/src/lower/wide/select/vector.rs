//! Vectors: arithmetic, comparisons, conversions, reductions and dot products.

use moec_ir::tile::{Binary, Compare, Reduce, Shift, Type, Value};
use regalloc2::VReg;

use super::super::machine::{INT, Inst, MASK, Mem, Operand, VECTOR};
use super::super::table::{Name, Width};
use super::scalar::float_predicate;
use super::{Form, Pairs, Regs, Select, Source, index};

/// The largest sum of the largest bytes of vectors whose products with signed bytes, two and two, have room in 16 bits all together.
const MOST_IN_PAIRS: u8 = (i16::MAX / (2 * 128)) as u8;

/// All bits but the sign.
const MAGNITUDE: u32 = 0x7fff_ffff;

impl Select<'_> {
    pub(super) fn vector_binary(&mut self, op: Binary, a: Value, b: Value) -> Regs {
        let float = self.function.ty(a) == Type::VecF32;
        let name = match op {
            Binary::Add if float => Name::AddPs,
            Binary::Add => Name::AddD,
            Binary::Sub if float => Name::SubPs,
            Binary::Sub => Name::SubD,
            Binary::Mul if float => Name::MulPs,
            Binary::Mul => Name::MulD,
            Binary::Div => Name::DivPs,
            Binary::Min => Name::MinPs,
            Binary::Max => Name::MaxPs,
            Binary::And => Name::And,
            Binary::Or => Name::Or,
            Binary::Xor => Name::Xor,
        };
        let commutes = match op {
            Binary::Add | Binary::Mul | Binary::And | Binary::Or | Binary::Xor => true,
            Binary::Sub | Binary::Div | Binary::Min | Binary::Max => false,
        };
        let swap = commutes && self.is_memory(a, true) && !self.is_memory(b, true);
        let (a, b) = if swap { (b, a) } else { (a, b) };
        let a = self.regs(a);
        let b = self.source(b, true);
        self.each_part(|s, p| s.op2(name, VECTOR, Operand::Use(a.0[p]), b.part(p)))
    }

    pub(super) fn vector_unary(&mut self, name: Name, a: Value) -> Regs {
        let a = self.source(a, true);
        self.each_part(|s, p| s.op1(name, VECTOR, a.part(p)))
    }

    /// An operation of a float or a vector of floats, with a constant operand if any.
    pub(super) fn unary(&mut self, (scalar, vector): (Name, Name), a: Value, imm: Option<i64>) -> Form {
        let imm = imm.map(Operand::Imm);
        if self.function.ty(a) == Type::F32 {
            // The upper lanes come from the first source.
            let a = self.scalar(a);
            let d = self.out.vreg(VECTOR);
            let mut operands = vec![Operand::Def(d), Operand::Use(a), Operand::Use(a)];
            operands.extend(imm);
            self.emit(scalar, &operands);
            return Form::Regs(Regs([d; 2]));
        }
        let a = self.source(a, true);
        Form::Regs(self.each_part(|s, p| {
            let d = s.out.vreg(VECTOR);
            let mut operands = vec![Operand::Def(d), a.part(p)];
            operands.extend(imm);
            s.emit(vector, &operands);
            d
        }))
    }

    pub(super) fn abs(&mut self, a: Value) -> Form {
        if self.function.ty(a) == Type::F32 {
            let a = self.scalar(a);
            let mask = self.float_constant(MAGNITUDE);
            let d = self.op2(Name::AndXmm, VECTOR, Operand::Use(a), Operand::Use(mask));
            return Form::Regs(Regs([d; 2]));
        }
        let a = self.regs(a);
        let mask = Regs([self.spread_constant(MAGNITUDE); 2]);
        Form::Regs(self.each_part(|s, p| s.op2(Name::And, VECTOR, Operand::Use(a.0[p]), Operand::Use(mask.0[p]))))
    }

    pub(super) fn vector_shift(&mut self, op: Shift, a: Value, by: u8) -> Regs {
        let name = match op {
            Shift::Left => Name::ShiftLeftD,
            Shift::RightUnsigned => Name::ShiftRightD,
            Shift::RightSigned => Name::ShiftRightSignedD,
        };
        let a = self.regs(a);
        self.shift_parts(name, a, by)
    }

    fn shift_parts(&mut self, name: Name, a: Regs, by: u8) -> Regs {
        let shifted = |s: &mut Self, p: usize| s.op2(name, VECTOR, Operand::Use(a.0[p]), Operand::Imm(i64::from(by)));
        // What has the same in all lanes has one register for both parts.
        if a.0[0] == a.0[1] { Regs([shifted(self, 0); 2]) } else { self.each_part(shifted) }
    }

    /// `a × b + c`: the result takes the register of the operand that dies, `c` first.
    pub(super) fn fma(&mut self, a: Value, b: Value, c: Value) -> Regs {
        let scalar = self.function.ty(a) == Type::F32;
        let (on_sum, on_factor) =
            if scalar { (Name::Fma231Ss, Name::Fma213Ss) } else { (Name::Fma231Ps, Name::Fma213Ps) };
        let memory = |s: &Self, v| !scalar && s.is_memory(v, true);
        let part = |s: &mut Self, f: &mut dyn FnMut(&mut Self, usize) -> VReg| {
            if scalar { Regs([f(s, 0); 2]) } else { s.each_part(f) }
        };
        // Memory goes where an instruction has it: the last operand.
        let (a, b) = if memory(self, a) && !memory(self, b) { (b, a) } else { (a, b) };
        let factor_dies = [a, b].into_iter().find(|&v| self.dies(v));
        if let Some(dying) = factor_dies
            && !self.dies(c)
            && !self.is_fresh(c)
            && !memory(self, b)
        {
            let other = if dying == a { b } else { a };
            let (from, other) = (self.regs(dying), self.regs(other));
            let c = if scalar { Source::Regs(self.regs(c)) } else { self.source(c, true) };
            return part(self, &mut |s, p| s.tied(on_factor, from.0[p], &[Operand::Use(other.0[p]), c.part(p)]));
        }
        let (sum, a) = (self.regs(c), self.regs(a));
        let b = if scalar { Source::Regs(self.regs(b)) } else { self.source(b, true) };
        part(self, &mut |s, p| s.tied(on_sum, sum.0[p], &[Operand::Use(a.0[p]), b.part(p)]))
    }

    /// Whether a register made for `v` now is for this use alone.
    fn is_fresh(&self, v: Value) -> bool {
        matches!(self.forms[index(v)], Form::Spread(0))
    }

    pub(super) fn compare(&mut self, op: Compare, a: Value, b: Value) -> Regs {
        match (self.function.ty(a), self.cpu.width) {
            (Type::VecF32, width) => {
                let a = self.regs(a);
                let b = self.source(b, true);
                let imm = Operand::Imm(float_predicate(op));
                let (name, class) = match width {
                    Width::Zmm => (Name::ComparePsMask, MASK),
                    Width::Ymm => (Name::ComparePs, VECTOR),
                };
                self.each_part(|s, p| s.op3(name, class, [Operand::Use(a.0[p]), b.part(p), imm]))
            }
            (Type::VecI32, Width::Zmm) => {
                let a = self.regs(a);
                let b = self.source(b, true);
                let imm = Operand::Imm(int_predicate(op));
                self.each_part(|s, p| s.op3(Name::CompareDMask, MASK, [Operand::Use(a.0[p]), b.part(p), imm]))
            }
            (Type::VecI32, Width::Ymm) => self.compare_int_parts(op, a, b),
            _ => Regs([self.compare_scalars(op, a, b); 2]),
        }
    }

    /// AVX2 has equal and greater; the others are turned around.
    fn compare_int_parts(&mut self, op: Compare, a: Value, b: Value) -> Regs {
        let (a, b) = (self.regs(a), self.regs(b));
        let (name, [a, b], inverted) = match op {
            Compare::Equal => (Name::CompareEqualD, [a, b], false),
            Compare::Greater => (Name::CompareGreaterD, [a, b], false),
            Compare::Less => (Name::CompareGreaterD, [b, a], false),
            Compare::GreaterEqual => (Name::CompareGreaterD, [b, a], true),
            Compare::LessEqual => (Name::CompareGreaterD, [a, b], true),
        };
        let found = self.each_part(|s, p| s.op2(name, VECTOR, Operand::Use(a.0[p]), Operand::Use(b.0[p])));
        if !inverted {
            return found;
        }
        let ones = self.spread_constant(u32::MAX);
        self.each_part(|s, p| s.op2(Name::Xor, VECTOR, Operand::Use(found.0[p]), Operand::Use(ones)))
    }

    pub(super) fn select(&mut self, c: Value, a: Value, b: Value) -> Regs {
        if self.function.ty(c) == Type::Bool {
            return Regs([self.select_scalar(c, a, b); 2]);
        }
        let (c, b) = (self.regs(c), self.regs(b));
        match self.cpu.width {
            Width::Zmm => {
                let a = self.source(a, true);
                let d = self.out.vreg(VECTOR);
                let operands = vec![Operand::Def(d), Operand::Use(b.0[0]), a.part(0)];
                self.out.push(Inst::Machine { name: Name::BlendMask, operands, mask: Some(c.0[0]) });
                Regs([d; 2])
            }
            Width::Ymm => {
                let a = self.regs(a);
                self.each_part(|s, p| s.op3(Name::Blend, VECTOR, [b.0[p], a.0[p], c.0[p]].map(Operand::Use)))
            }
        }
    }

    pub(super) fn splat(&mut self, a: Value) -> Form {
        match self.forms[index(a)] {
            Form::Int(n) => Form::Spread(n as u32),
            Form::Float(bits) => Form::Spread(bits),
            _ if self.function.ty(a) == Type::F32 => {
                let a = self.scalar(a);
                Form::Regs(Regs([self.op1(Name::Broadcast, VECTOR, Operand::Use(a)); 2]))
            }
            _ => {
                let a = self.scalar(a);
                Form::Regs(Regs([self.spread_int(a); 2]))
            }
        }
    }

    pub(super) fn bitcast(&mut self, to: Type, a: Value) -> Form {
        match (to, self.forms[index(a)]) {
            (Type::Int, _) => {
                let a = self.scalar(a);
                Form::Regs(Regs([self.op1(Name::XmmToInt, INT, Operand::Use(a)); 2]))
            }
            (Type::F32, Form::Int(n)) => Form::Float(n as u32),
            (Type::F32, _) => {
                let a = self.scalar(a);
                Form::Regs(Regs([self.op1(Name::IntToXmm, VECTOR, Operand::Use(a)); 2]))
            }
            // The same registers under another name.
            (_, Form::Spread(bits)) => Form::Spread(bits),
            (_, Form::Lanes(lanes)) => Form::Lanes(lanes),
            _ => {
                let regs = self.regs(a);
                Form::Regs(regs)
            }
        }
    }

    /// Lanes `l` and `l + 8`, then `l + 4`, `l + 2`, `l + 1`.
    pub(super) fn reduce(&mut self, op: Reduce, a: Value) -> Regs {
        let int = self.function.ty(a) == Type::VecI32;
        let (eight, four, one) = match op {
            Reduce::Add if int => (Name::AddDYmm, Name::AddDXmm, Name::AddDXmm),
            Reduce::Add => (Name::AddPsYmm, Name::AddPsXmm, Name::AddSs),
            Reduce::Max => (Name::MaxPsYmm, Name::MaxPsXmm, Name::MaxSs),
        };
        let a = self.regs(a);
        let both = |s: &mut Self, name, low, high| s.op2(name, VECTOR, Operand::Use(low), Operand::Use(high));
        let high = match self.cpu.width {
            Width::Zmm => self.op2(Name::ExtractHalf, VECTOR, Operand::Use(a.0[0]), Operand::Imm(1)),
            Width::Ymm => a.0[1],
        };
        let lanes = both(self, eight, a.0[0], high);
        let high = self.op2(Name::Extract128Ymm, VECTOR, Operand::Use(lanes), Operand::Imm(1));
        let lanes = both(self, four, lanes, high);
        // Lanes 2, 3, 0, 1; then lane 1 everywhere.
        let high = self.op2(Name::ShuffleDXmm, VECTOR, Operand::Use(lanes), Operand::Imm(0b01_00_11_10));
        let lanes = both(self, four, lanes, high);
        let high = self.op2(Name::ShuffleDXmm, VECTOR, Operand::Use(lanes), Operand::Imm(0b01_01_01_01));
        let all = both(self, one, lanes, high);
        if !int {
            return Regs([all; 2]);
        }
        let bits = self.op1(Name::XmmToInt, INT, Operand::Use(all));
        Regs([self.op1(Name::Load32Signed, INT, Operand::Use(bits)); 2])
    }

    pub(super) fn dot(&mut self, acc: Value, w: Value, a: Value) -> Form {
        if self.cpu.dot {
            let (sum, w, a) = (self.regs(acc), self.regs(w), self.source(a, true));
            return Form::Regs(
                self.each_part(|s, p| s.tied(Name::DotBytes, sum.0[p], &[Operand::Use(w.0[p]), a.part(p)])),
            );
        }
        if self.sums_pairs(w) {
            return self.dot_small(acc, w, a);
        }
        let (sum, w, a) = (self.regs(acc), self.regs(w), self.regs(a));
        Form::Regs(self.each_part(|s, p| s.dot_pairs(sum.0[p], w.0[p], a.0[p], false)))
    }

    /// A dot product of signed bytes, of which `a` has none that is −128.
    pub(super) fn dot_signed(&mut self, acc: Value, w: Value, a: Value) -> Form {
        if self.sums_pairs(w) {
            return self.dot_small(acc, w, a);
        }
        if self.cpu.signs_bytes() {
            let (before, w, a) = (self.unless_zero(acc), self.regs(w), self.regs(a));
            let ones = Operand::Use(self.ones());
            return Form::Regs(self.each_part(|s, p| {
                let pairs = s.pairs_of_magnitudes(w.0[p], a.0[p]);
                s.fours(before.map(|before| before.0[p]), pairs, ones)
            }));
        }
        let (sum, w, a) = (self.regs(acc), self.regs(w), self.regs(a));
        Form::Regs(self.each_part(|s, p| s.dot_pairs(sum.0[p], w.0[p], a.0[p], true)))
    }

    /// The registers of a sum, unless it is 0.
    fn unless_zero(&mut self, sum: Value) -> Option<Regs> {
        (self.forms[index(sum)] != Form::Spread(0)).then(|| self.regs(sum))
    }

    /// Whether products of two bytes of `w` are summed up in 16 bits.
    pub(super) fn sums_pairs(&self, w: Value) -> bool {
        !self.cpu.dot && self.bytes.most(w) <= MOST_IN_PAIRS
    }

    /// The pairs of products of unsigned bytes `w` that are small enough, added to those that the sum so far has as pairs, as long as all fit.
    fn dot_small(&mut self, acc: Value, w: Value, a: Value) -> Form {
        let most = self.bytes.most(w);
        let (w, a) = (self.regs(w), self.source(a, false));
        let pairs = self.each_part(|s, p| s.op2(Name::MultiplyAddBytes, VECTOR, Operand::Use(w.0[p]), a.part(p)));
        let sum = match self.forms[index(acc)] {
            Form::Pairs(before) if self.uses.is_last(acc, self.block) && before.most + most <= MOST_IN_PAIRS => {
                let [a, b] = [before.pairs, pairs];
                let pairs =
                    self.each_part(|s, p| s.op2(Name::AddW, VECTOR, Operand::Use(a.0[p]), Operand::Use(b.0[p])));
                Pairs { pairs, most: before.most + most, ..before }
            }
            _ => Pairs { before: self.unless_zero(acc), pairs, most },
        };
        // Another like it would not fit.
        if sum.most + most > MOST_IN_PAIRS { Form::Regs(self.add_pairs(sum)) } else { Form::Pairs(sum) }
    }

    /// The sum as 32 bits.
    pub(super) fn add_pairs(&mut self, Pairs { before, pairs, .. }: Pairs) -> Regs {
        let ones = self.ones_operand();
        self.each_part(|s, p| s.fours(before.map(|before| before.0[p]), pairs.0[p], ones))
    }

    /// Sums of two products each, in 16 bits, added up by twos, in 32 bits, and to `before`.
    fn fours(&mut self, before: Option<VReg>, pairs: VReg, ones: Operand) -> VReg {
        let fours = self.op2(Name::MultiplyAddPairs, VECTOR, Operand::Use(pairs), ones);
        match before {
            Some(before) => self.op2(Name::AddD, VECTOR, Operand::Use(before), Operand::Use(fours)),
            None => fours,
        }
    }

    /// Magnitudes of `w` times `a` with the signs of `w`: two products of at most 128 × 127 fit 16 bits.
    fn pairs_of_magnitudes(&mut self, w: VReg, a: VReg) -> VReg {
        let magnitude = self.magnitude(w);
        let a = self.op2(Name::SignBytes, VECTOR, Operand::Use(a), Operand::Use(w));
        self.op2(Name::MultiplyAddBytes, VECTOR, Operand::Use(magnitude), Operand::Use(a))
    }

    /// Of each byte, as an unsigned one.
    fn magnitude(&mut self, bytes: VReg) -> VReg {
        if let Some(&made) = self.magnitudes.get(&bytes) {
            return made;
        }
        let made = self.op1(Name::AbsBytes, VECTOR, Operand::Use(bytes));
        self.magnitudes.insert(bytes, made);
        made
    }

    /// Without an instruction for it: even and odd bytes as 16 bits, each by `vpmaddwd`, whose sums are exact.
    fn dot_pairs(&mut self, sum: VReg, w: VReg, a: VReg, signed: bool) -> VReg {
        let ([w_even, w_odd], [a_even, a_odd]) = (self.pairs(w, signed), self.pairs(a, true));
        let multiply = |s: &mut Self, w, a| s.op2(Name::MultiplyAddPairs, VECTOR, Operand::Use(w), Operand::Use(a));
        let (even, odd) = (multiply(self, w_even, a_even), multiply(self, w_odd, a_odd));
        let both = self.op2(Name::AddD, VECTOR, Operand::Use(even), Operand::Use(odd));
        self.op2(Name::AddD, VECTOR, Operand::Use(sum), Operand::Use(both))
    }

    /// The even bytes and the odd bytes of `bytes` as 16 bits.
    fn pairs(&mut self, bytes: VReg, signed: bool) -> [VReg; 2] {
        if let Some(&made) = self.pairs.get(&(bytes, signed)) {
            return made;
        }
        let eight = Operand::Imm(8);
        let made = if signed {
            let even = self.op2(Name::ShiftLeftW, VECTOR, Operand::Use(bytes), eight);
            let even = self.op2(Name::ShiftRightSignedW, VECTOR, Operand::Use(even), eight);
            [even, self.op2(Name::ShiftRightSignedW, VECTOR, Operand::Use(bytes), eight)]
        } else {
            let mask = self.low_byte_mask();
            let even = self.op2(Name::And, VECTOR, Operand::Use(bytes), Operand::Use(mask));
            [even, self.op2(Name::ShiftRightW, VECTOR, Operand::Use(bytes), eight)]
        };
        self.pairs.insert((bytes, signed), made);
        made
    }

    pub(super) fn nibbles(&mut self, a: Value, high: bool) -> Form {
        let a = self.regs(a);
        if self.cpu.permute { Form::Nibbles(a, high) } else { Form::Regs(self.cut_nibbles(a, high)) }
    }

    /// The low or the high four bits of each byte.
    pub(super) fn cut_nibbles(&mut self, bytes: Regs, high: bool) -> Regs {
        if let Some(&cut) = self.nibbles.get(&(bytes.0[0], high)) {
            return cut;
        }
        let mask = self.nibble_mask();
        // What comes in from the neighbouring byte is masked away.
        let cut = if high { self.shift_parts(Name::ShiftRightW, bytes, 4) } else { bytes };
        let cut = self.each_part(|s, p| s.op2(Name::And, VECTOR, Operand::Use(cut.0[p]), mask));
        self.nibbles.insert((bytes.0[0], high), cut);
        cut
    }

    pub(super) fn lookup(&mut self, bytes: [u8; 16], a: Value) -> Regs {
        let table = self.table_constant(bytes);
        if let Form::Nibbles(mut bytes, high) = self.forms[index(a)] {
            // The table is there four times, so that the two bits above the nibble do not matter; those above them never do.
            if high {
                bytes = self.shift_parts(Name::ShiftRightW, bytes, 4);
            }
            return self
                .each_part(|s, p| s.op2(Name::PermuteBytes, VECTOR, Operand::Use(bytes.0[p]), Operand::Use(table)));
        }
        let a = self.source(a, false);
        self.each_part(|s, p| s.op2(Name::ShuffleBytes, VECTOR, Operand::Use(table), a.part(p)))
    }

    /// The 16 bytes of the pool that a shuffle of 128 bits takes.
    pub(super) fn shuffle_pattern(&mut self, pattern: [u8; 16]) -> Mem {
        Mem::constant(self.out.constant(&pattern))
    }
}

/// The predicate of `vpcmpd`.
const fn int_predicate(op: Compare) -> i64 {
    match op {
        Compare::Equal => 0,
        Compare::Less => 1,
        Compare::LessEqual => 2,
        Compare::GreaterEqual => 5,
        Compare::Greater => 6,
    }
}
