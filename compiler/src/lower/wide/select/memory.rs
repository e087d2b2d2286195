//! Loads and stores.
//!
//! No access is assumed to be aligned. A load whose value is used once is put off until then, unless memory changes before.

use moec_ir::tile::{Address, Memory, Op, Value};
use regalloc2::VReg;

use super::super::machine::{INT, Mem, Operand, VECTOR};
use super::super::table::{Name, Width};
use super::{Form, Load, Regs, Select};

/// Rounding of `vcvtps2ph`: to nearest even.
const NEAREST_EVEN: Operand = Operand::Imm(0);

/// The lowest byte of each 32-bit lane, gathered.
const LOW_BYTES: [u8; 16] = [0, 4, 8, 12, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128];

impl Select<'_> {
    /// A load done now, or later when there is one use.
    fn put_off(&mut self, load: Load, result: Value) -> Form {
        if self.uses.is_single(result) { Form::Load(load) } else { Form::Regs(self.load_now(load)) }
    }

    pub(super) fn load_now(&mut self, load: Load) -> Regs {
        match load {
            Load::Whole(mem) => {
                let step = self.part_bytes();
                self.each_part(|s, p| s.op1(Name::LoadVector, VECTOR, Operand::Mem(mem.plus(step * p as i32))))
            }
            Load::Spread(mem) => Regs([self.op1(Name::Broadcast, VECTOR, Operand::Mem(mem)); 2]),
        }
    }

    pub(super) fn load(&mut self, format: Memory, at: Address, result: Value) -> Form {
        let mem = self.address(at, 0);
        let lanes = self.part_bytes() / 4;
        let part = |p: usize, bytes: i32| Operand::Mem(mem.plus(p as i32 * lanes * bytes));
        Form::Regs(match format {
            Memory::F32 | Memory::I32 => return self.put_off(Load::Whole(mem), result),
            Memory::Bf16 => self.each_part(|s, p| {
                let wide = s.op1(Name::WidenWords, VECTOR, part(p, 2));
                s.op2(Name::ShiftLeftD, VECTOR, Operand::Use(wide), Operand::Imm(16))
            }),
            Memory::F16 => self.each_part(|s, p| s.op1(Name::WidenHalf, VECTOR, part(p, 2))),
            Memory::I8 => self.each_part(|s, p| s.op1(Name::WidenBytesSigned, VECTOR, part(p, 1))),
        })
    }

    pub(super) fn load_bytes(&mut self, at: Address, result: Value) -> Form {
        let mem = self.address(at, 0);
        self.put_off(Load::Whole(mem), result)
    }

    /// Four bytes in each lane.
    pub(super) fn load_spread(&mut self, at: Address, result: Value) -> Form {
        let mem = self.address(at, 0);
        self.put_off(Load::Spread(mem), result)
    }

    pub(super) fn load_splat(&mut self, format: Memory, at: Address, result: Value) -> Form {
        Form::Regs(Regs(match format {
            Memory::F32 | Memory::I32 => return self.load_spread(at, result),
            Memory::Bf16 => {
                let bits = self.bf16_bits(at);
                [self.spread_int(bits); 2]
            }
            Memory::F16 => {
                let x = self.load_half(at);
                [self.op1(Name::Broadcast, VECTOR, Operand::Use(x)); 2]
            }
            Memory::I8 => {
                let n = self.load_signed_byte(at);
                [self.spread_int(n); 2]
            }
        }))
    }

    pub(super) fn load_scalar(&mut self, format: Memory, at: Address) -> Form {
        let reg = match format {
            Memory::F32 => {
                let mem = self.address(at, 0);
                self.op1(Name::LoadFloat, VECTOR, Operand::Mem(mem))
            }
            Memory::Bf16 => {
                let bits = self.bf16_bits(at);
                self.op1(Name::IntToXmm, VECTOR, Operand::Use(bits))
            }
            Memory::F16 => self.load_half(at),
            Memory::I32 => {
                let mem = self.address(at, 0);
                self.op1(Name::Load32Signed, INT, Operand::Mem(mem))
            }
            Memory::I8 => self.load_signed_byte(at),
        };
        Form::Regs(Regs([reg; 2]))
    }

    pub(super) fn load_int(&mut self, name: Name, at: Address) -> Form {
        let mem = self.address(at, 0);
        Form::Regs(Regs([self.op1(name, INT, Operand::Mem(mem)); 2]))
    }

    fn load_word(&mut self, at: Address) -> VReg {
        let mem = self.address(at, 0);
        self.op1(Name::Load16, INT, Operand::Mem(mem))
    }

    fn load_signed_byte(&mut self, at: Address) -> VReg {
        let mem = self.address(at, 0);
        self.op1(Name::Load8Signed, INT, Operand::Mem(mem))
    }

    fn bf16_bits(&mut self, at: Address) -> VReg {
        let word = self.load_word(at);
        self.tied(Name::ShiftLeftInt, word, &[Operand::Imm(16)])
    }

    /// One f16 as an f32.
    fn load_half(&mut self, at: Address) -> VReg {
        let word = self.load_word(at);
        let x = self.op1(Name::IntToXmm, VECTOR, Operand::Use(word));
        self.op1(Name::WidenHalfXmm, VECTOR, Operand::Use(x))
    }

    /// A store or a prefetch.
    pub(super) fn store_op(&mut self, op: &Op) {
        if let Op::Prefetch(at) = op {
            let mem = self.address(*at, 0);
            self.emit(Name::Prefetch, &[Operand::Mem(mem)]);
            return;
        }
        self.load_deferred();
        match op {
            Op::Store(format, v, at) => self.store(*format, *v, *at),
            Op::StoreStrided(format, v, at, stride) => self.store_strided(*format, *v, *at, *stride),
            Op::StoreScalar(format, v, at) => self.store_scalar(*format, *v, *at),
            _ => unreachable!("{}: {op:?} stores nothing", self.function.name),
        }
    }

    fn store(&mut self, format: Memory, v: Value, at: Address) {
        let mem = self.address(at, 0);
        let v = self.regs(v);
        let parts = match self.cpu.width {
            Width::Ymm => 2,
            Width::Zmm => 1,
        };
        let lanes = self.part_bytes() / 4;
        for (p, &reg) in v.0[..parts].iter().enumerate() {
            let to = |bytes: i32| mem.plus(p as i32 * lanes * bytes);
            match (format, self.cpu.width) {
                (Memory::F32 | Memory::I32, _) => {
                    self.emit(Name::StoreVector, &[Operand::Mem(to(4)), Operand::Use(reg)]);
                }
                (Memory::F16, _) => {
                    self.emit(Name::NarrowHalf, &[Operand::Mem(to(2)), Operand::Use(reg), NEAREST_EVEN]);
                }
                (Memory::I8, Width::Zmm) => {
                    self.emit(Name::NarrowToBytes, &[Operand::Mem(to(1)), Operand::Use(reg)]);
                }
                (Memory::I8, Width::Ymm) => self.store_low_bytes(reg, to(1)),
                (Memory::Bf16, _) => unreachable!("{}: there are no stores of bf16", self.function.name),
            }
        }
    }

    /// The low bytes of eight lanes.
    fn store_low_bytes(&mut self, reg: VReg, to: Mem) {
        let pattern = self.shuffle_pattern(LOW_BYTES);
        let high = self.op2(Name::Extract128, VECTOR, Operand::Use(reg), Operand::Imm(1));
        for (half, reg) in [reg, high].into_iter().enumerate() {
            let four = self.op2(Name::ShuffleBytesXmm, VECTOR, Operand::Use(reg), Operand::Mem(pattern));
            self.emit(Name::StoreFloat, &[Operand::Mem(to.plus(4 * half as i32)), Operand::Use(four)]);
        }
    }

    fn store_strided(&mut self, format: Memory, v: Value, at: Address, stride: i32) {
        let regs = self.regs(v);
        // Pieces of 128 bits with the lanes that they hold.
        let (mut pieces, lanes_each) = (Vec::new(), if format == Memory::F16 { 8 } else { 4 });
        match (format, self.cpu.width) {
            (Memory::F16, Width::Zmm) => {
                let halves = self.op2(Name::NarrowHalf, VECTOR, Operand::Use(regs.0[0]), NEAREST_EVEN);
                let high = self.op2(Name::Extract128Ymm, VECTOR, Operand::Use(halves), Operand::Imm(1));
                pieces.extend([halves, high]);
            }
            (Memory::F16, Width::Ymm) => {
                for reg in regs.0 {
                    pieces.push(self.op2(Name::NarrowHalf, VECTOR, Operand::Use(reg), NEAREST_EVEN));
                }
            }
            (_, width) => {
                let (parts, each) = match width {
                    Width::Zmm => (1, 4),
                    Width::Ymm => (2, 2),
                };
                for &reg in &regs.0[..parts] {
                    pieces.push(reg);
                    for piece in 1..each {
                        pieces.push(self.op2(Name::Extract128, VECTOR, Operand::Use(reg), Operand::Imm(piece)));
                    }
                }
            }
        }
        let name = if format == Memory::F16 { Name::ExtractWord } else { Name::ExtractLane };
        for (i, piece) in pieces.into_iter().enumerate() {
            for lane in 0..lanes_each {
                let to = self.address(at, (i as i64 * lanes_each + lane) * i64::from(stride));
                self.emit(name, &[Operand::Mem(to), Operand::Use(piece), Operand::Imm(lane)]);
            }
        }
    }

    fn store_scalar(&mut self, format: Memory, v: Value, at: Address) {
        let mem = Operand::Mem(self.address(at, 0));
        let v = self.scalar(v);
        match format {
            Memory::F32 => self.emit(Name::StoreFloat, &[mem, Operand::Use(v)]),
            Memory::F16 => {
                let half = self.op2(Name::NarrowHalfXmm, VECTOR, Operand::Use(v), NEAREST_EVEN);
                self.emit(Name::ExtractWord, &[mem, Operand::Use(half), Operand::Imm(0)]);
            }
            Memory::I32 => self.emit(Name::Store32, &[mem, Operand::Use(v)]),
            Memory::I8 => self.emit(Name::Store8, &[mem, Operand::Use(v)]),
            Memory::Bf16 => unreachable!("{}: there are no stores of bf16", self.function.name),
        }
    }
}
