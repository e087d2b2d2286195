//! Constants in registers.
//!
//! A constant is made where it is used and kept to the end of the block; those that the body of an innermost loop needs in registers are made before the
//! loop. Many are never made at all, but read from the pool by the instruction that uses them. Deliberately absent: the pool ([`super::super::machine`]).

use moec_ir::tile::Op;
use regalloc2::VReg;
use std::collections::HashMap;

use super::super::machine::{INT, Mem, Operand, VECTOR};
use super::super::table::{Name, Width};
use super::{Regs, Select};

/// A constant in a vector register.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Key {
    /// The same 32 bits in all lanes.
    Spread(u32),
    /// The same 16 bytes in each 128-bit lane.
    Table([u8; 16]),
}

/// The constants that are in registers.
#[derive(Default)]
pub struct Constants {
    block: HashMap<Key, VReg>,
    hoisted: HashMap<Key, VReg>,
}

impl Constants {
    /// What the block has made is not used beyond it.
    pub fn leave_block(&mut self) {
        self.block.clear();
    }

    /// What was made before a loop is not used after it.
    pub fn forget_hoisted(&mut self) {
        self.hoisted.clear();
    }

    fn get(&self, key: Key) -> Option<VReg> {
        self.hoisted.get(&key).or_else(|| self.block.get(&key)).copied()
    }
}

/// The low four bits of each byte.
const NIBBLES: u32 = 0x0f0f_0f0f;
/// The low byte of each 16 bits.
const LOW_BYTES: u32 = 0x00ff_00ff;
/// 1 in each 16 bits.
const ONES: u32 = 0x0001_0001;

impl Select<'_> {
    /// Makes, before a loop, what `op` in its body needs in registers.
    pub(super) fn hoist_constants(&mut self, op: &Op) {
        let key = match op {
            Op::NibbleLow(_) | Op::NibbleHigh(_) if !self.cpu.permute && self.has_room() => Key::Spread(NIBBLES),
            Op::Lookup(table, _) => Key::Table(*table),
            Op::DotU8S8(_, w, _) | Op::DotS8S8(_, w, _) if self.sums_pairs(*w) => {
                if !self.has_room() {
                    return;
                }
                Key::Spread(ONES)
            }
            Op::DotU8S8(..) if !self.cpu.dot => Key::Spread(LOW_BYTES),
            Op::DotS8S8(..) if self.cpu.signs_bytes() => Key::Spread(ONES),
            _ => return,
        };
        if self.constants.get(key).is_none() {
            let made = self.make_constant(key);
            self.constants.hoisted.insert(key, made);
        }
    }

    fn constant(&mut self, key: Key) -> VReg {
        if let Some(made) = self.constants.get(key) {
            return made;
        }
        let made = self.make_constant(key);
        self.constants.block.insert(key, made);
        made
    }

    fn make_constant(&mut self, key: Key) -> VReg {
        match key {
            Key::Spread(0) => {
                let d = self.out.vreg(VECTOR);
                self.emit(Name::Xor, &[Operand::Def(d), Operand::First, Operand::First]);
                d
            }
            Key::Spread(bits) => {
                let constant = self.out.constant(&bits.to_le_bytes());
                self.op1(Name::Broadcast, VECTOR, Operand::Mem(Mem::constant(constant)))
            }
            Key::Table(bytes) => {
                let constant = self.out.constant(&bytes);
                self.op1(Name::Broadcast16Bytes, VECTOR, Operand::Mem(Mem::constant(constant)))
            }
        }
    }

    /// The low four bits of each byte, as a mask.
    pub(super) fn nibble_mask(&mut self) -> Operand {
        self.spread_operand(NIBBLES)
    }

    /// The low byte of each 16 bits, as a mask.
    pub(super) fn low_byte_mask(&mut self) -> VReg {
        self.constant(Key::Spread(LOW_BYTES))
    }

    /// 1 in each 16 bits.
    pub(super) fn ones(&mut self) -> VReg {
        self.constant(Key::Spread(ONES))
    }

    /// The same, for products of small values, whose sums and weights leave no register.
    pub(super) fn ones_operand(&mut self) -> Operand {
        self.spread_operand(ONES)
    }

    /// 32 bits in all lanes, in a register where there is room.
    fn spread_operand(&mut self, bits: u32) -> Operand {
        if self.has_room() {
            return Operand::Use(self.constant(Key::Spread(bits)));
        }
        Operand::Mem(Mem::constant(self.out.constant(&bits.to_le_bytes().repeat(8))))
    }

    /// Whether there are registers for constants that instructions can as well read from the pool: there are 32 of 512 bits, but 16 of 256.
    fn has_room(&self) -> bool {
        self.cpu.width == Width::Zmm
    }

    /// 16 bytes in each 128-bit lane.
    pub(super) fn table_constant(&mut self, table: [u8; 16]) -> VReg {
        self.constant(Key::Table(table))
    }

    /// 32 bits in all lanes. Zero is made anew each time, which costs nothing and lets it be overwritten.
    pub(super) fn spread_constant(&mut self, bits: u32) -> VReg {
        if bits == 0 { self.make_constant(Key::Spread(0)) } else { self.constant(Key::Spread(bits)) }
    }

    pub(super) fn lanes_constant(&mut self, lanes: [i32; 16]) -> Regs {
        let bytes: Vec<u8> = lanes.iter().flat_map(|l| l.to_le_bytes()).collect();
        let mem = Mem::constant(self.out.constant(&bytes));
        let step = self.part_bytes();
        self.each_part(|s, p| s.op1(Name::LoadVector, VECTOR, Operand::Mem(mem.plus(step * p as i32))))
    }

    /// An F32 in the low lane.
    pub(super) fn float_constant(&mut self, bits: u32) -> VReg {
        let constant = self.out.constant(&bits.to_le_bytes());
        self.op1(Name::LoadFloat, VECTOR, Operand::Mem(Mem::constant(constant)))
    }

    pub(super) fn int_constant(&mut self, n: i64) -> VReg {
        let name = match (u32::try_from(n), i32::try_from(n)) {
            (Ok(_), _) => Name::MoveImm32,
            (_, Ok(_)) => Name::MoveImm,
            _ => Name::MoveImm64,
        };
        self.op1(name, INT, Operand::Imm(n))
    }

    /// An Int in all lanes.
    pub(super) fn spread_int(&mut self, n: VReg) -> VReg {
        match self.cpu.width {
            Width::Zmm => self.op1(Name::BroadcastInt, VECTOR, Operand::Use(n)),
            Width::Ymm => {
                let x = self.op1(Name::IntToXmm, VECTOR, Operand::Use(n));
                self.op1(Name::Broadcast, VECTOR, Operand::Use(x))
            }
        }
    }
}
