//! Loads and stores.
//!
//! No access traps (addresses are the caller's promise), and none is assumed to be aligned beyond a byte.

use cranelift_codegen::ir::{InstBuilder, MemFlagsData, Type as ClifType, Value as ClifValue, types};
use moec_ir::tile::{Address, Memory, Value};

use super::{Lowering, Parts};

const FLAGS: MemFlagsData = MemFlagsData::new().with_notrap();

impl Lowering<'_> {
    /// The base and offset of the byte `more` after `at`.
    fn at(&mut self, at: Address, more: i32) -> (ClifValue, i32) {
        let base = self.scalar(at.base);
        match at.offset.checked_add(more) {
            Some(offset) => (base, offset),
            None => (self.b.ins().iadd_imm_s(base, i64::from(at.offset)), more),
        }
    }

    pub(super) fn load_one(&mut self, ty: ClifType, at: Address) -> ClifValue {
        let (base, offset) = self.at(at, 0);
        self.b.ins().load(ty, FLAGS, base, offset)
    }

    /// Four consecutive parts.
    pub(super) fn load_parts(&mut self, ty: ClifType, at: Address) -> [ClifValue; 4] {
        std::array::from_fn(|i| {
            let (base, offset) = self.at(at, 16 * i as i32);
            self.b.ins().load(ty, FLAGS, base, offset)
        })
    }

    /// Two consecutive 128-bit values.
    fn load_pair(&mut self, ty: ClifType, at: Address) -> [ClifValue; 2] {
        std::array::from_fn(|i| {
            let (base, offset) = self.at(at, 16 * i as i32);
            self.b.ins().load(ty, FLAGS, base, offset)
        })
    }

    pub(super) fn load(&mut self, format: Memory, at: Address) -> [ClifValue; 4] {
        match format {
            Memory::F32 => self.load_parts(types::F32X4, at),
            Memory::I32 => self.load_parts(types::I32X4, at),
            Memory::Bf16 => {
                // Interleaved with zeros below, each is a float's upper half.
                let zeros = self.constant(types::I8X16, [0; 16]);
                let [low, high] = self.load_pair(types::I8X16, at);
                [(low, 0), (low, 8), (high, 0), (high, 8)].map(|(bytes, first)| {
                    let lanes: [u8; 16] = std::array::from_fn(|i| {
                        let element = first + 2 * (i as u8 / 4);
                        if i % 4 < 2 { element + i as u8 % 2 } else { 16 + element + i as u8 % 2 }
                    });
                    let mask = self.b.func.dfg.immediates.push(lanes.as_slice().into());
                    let bits = self.b.ins().shuffle(zeros, bytes, mask);
                    self.cast(types::F32X4, bits)
                })
            }
            Memory::F16 => std::array::from_fn(|i| {
                let (base, offset) = self.at(at, 8 * i as i32);
                let halves = self.b.ins().sload16x4(FLAGS, base, offset);
                self.widen_f16(halves)
            }),
            Memory::I8 => {
                let bytes = self.load_one(types::I8X16, at);
                let halves = [self.b.ins().swiden_low(bytes), self.b.ins().swiden_high(bytes)];
                let [[a, b], [c, d]] = halves.map(|h| [self.b.ins().swiden_low(h), self.b.ins().swiden_high(h)]);
                [a, b, c, d]
            }
        }
    }

    /// One part; the others are the same. Integers go the way of floats, which is a move shorter.
    pub(super) fn load_splat(&mut self, format: Memory, at: Address) -> ClifValue {
        match format {
            Memory::F32 => {
                let x = self.load_one(types::F32, at);
                self.b.ins().splat(types::F32X4, x)
            }
            Memory::I32 => {
                let splat = self.load_splat(Memory::F32, at);
                self.cast(types::I32X4, splat)
            }
            Memory::I8 => {
                let (base, offset) = self.at(at, 0);
                let n = self.b.ins().sload8(types::I32, FLAGS, base, offset);
                self.b.ins().splat(types::I32X4, n)
            }
            Memory::Bf16 => {
                let bits = self.load_bf16_bits(at);
                let splat = self.b.ins().splat(types::I32X4, bits);
                self.cast(types::F32X4, splat)
            }
            Memory::F16 => {
                let (base, offset) = self.at(at, 0);
                let h = self.b.ins().sload16(types::I32, FLAGS, base, offset);
                let splat = self.b.ins().splat(types::I32X4, h);
                self.widen_f16(splat)
            }
        }
    }

    pub(super) fn load_scalar(&mut self, format: Memory, at: Address) -> ClifValue {
        let (base, offset) = self.at(at, 0);
        match format {
            Memory::F32 => self.b.ins().load(types::F32, FLAGS, base, offset),
            Memory::I32 => self.b.ins().sload32(FLAGS, base, offset),
            Memory::I8 => self.b.ins().sload8(types::I64, FLAGS, base, offset),
            Memory::Bf16 => {
                let bits = self.load_bf16_bits(at);
                self.cast(types::F32, bits)
            }
            Memory::F16 => {
                let four = self.load_splat(format, at);
                self.b.ins().extractlane(four, 0)
            }
        }
    }

    pub(super) fn load_u32(&mut self, at: Address) -> ClifValue {
        let (base, offset) = self.at(at, 0);
        self.b.ins().uload32(FLAGS, base, offset)
    }

    fn load_bf16_bits(&mut self, at: Address) -> ClifValue {
        let (base, offset) = self.at(at, 0);
        let h = self.b.ins().uload16(types::I32, FLAGS, base, offset);
        self.b.ins().ishl_imm_u(h, 16)
    }

    pub(super) fn store(&mut self, format: Memory, v: Value, at: Address) -> Parts {
        let parts = self.vector(v);
        let whole: Vec<ClifValue> = match format {
            Memory::F32 | Memory::I32 => parts.to_vec(),
            Memory::F16 => {
                let [a, b, c, d] = parts.map(|x| self.narrow_f16(x));
                vec![self.b.ins().unarrow(a, b), self.b.ins().unarrow(c, d)]
            }
            Memory::I8 => {
                let mask = self.constant32(types::I32X4, 0xff);
                let [a, b, c, d] = parts.map(|n| self.b.ins().band(n, mask));
                let (low, high) = (self.b.ins().unarrow(a, b), self.b.ins().unarrow(c, d));
                vec![self.b.ins().unarrow(low, high)]
            }
            Memory::Bf16 => unreachable!("{}: no stores of bf16", self.function.name),
        };
        for (i, part) in whole.into_iter().enumerate() {
            let (base, offset) = self.at(at, 16 * i as i32);
            self.b.ins().store(FLAGS, part, base, offset);
        }
        Parts::None
    }

    pub(super) fn store_strided(&mut self, format: Memory, v: Value, at: Address, stride: i32) -> Parts {
        for (i, part) in self.vector(v).into_iter().enumerate() {
            let part = if format == Memory::F16 { self.narrow_f16(part) } else { part };
            for lane in 0..4u8 {
                let x = self.b.ins().extractlane(part, lane);
                let distance = (4 * i as i64 + i64::from(lane)) * i64::from(stride);
                let (base, offset) = match i32::try_from(distance) {
                    Ok(distance) => self.at(at, distance),
                    Err(_) => {
                        let base = self.scalar(at.base);
                        (self.b.ins().iadd_imm_s(base, distance), at.offset)
                    }
                };
                if format == Memory::F16 {
                    self.b.ins().istore16(FLAGS, x, base, offset);
                } else {
                    self.b.ins().store(FLAGS, x, base, offset);
                }
            }
        }
        Parts::None
    }

    pub(super) fn store_scalar(&mut self, format: Memory, v: Value, at: Address) -> Parts {
        let (base, offset) = self.at(at, 0);
        let v = self.scalar(v);
        match format {
            Memory::F32 => self.b.ins().store(FLAGS, v, base, offset),
            Memory::I32 => self.b.ins().istore32(FLAGS, v, base, offset),
            Memory::I8 => self.b.ins().istore8(FLAGS, v, base, offset),
            Memory::F16 => {
                let four = self.b.ins().splat(types::F32X4, v);
                let four = self.narrow_f16(four);
                let h = self.b.ins().extractlane(four, 0);
                self.b.ins().istore16(FLAGS, h, base, offset)
            }
            Memory::Bf16 => unreachable!("{}: no stores of bf16", self.function.name),
        };
        Parts::None
    }
}
