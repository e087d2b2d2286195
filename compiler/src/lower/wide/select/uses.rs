//! What selection needs to know of a value before it meets the uses: how many there are, and whether one of them wants a register.
//!
//! Deliberately absent: liveness across blocks, which is the register allocator's.

use moec_ir::tile::{Binary, Function, Inst, Op, Shift, Value};

/// Facts about each value of a function.
pub struct Uses {
    /// Uses not yet met.
    left: Vec<u32>,
    /// The block that defines it: 0 for the outermost, a number of its own for each loop's body.
    block: Vec<usize>,
    /// Whether it is used as more than an address or a term of one.
    register: Vec<bool>,
}

impl Uses {
    /// Counts.
    pub fn new(function: &Function) -> Uses {
        let n = function.types.len();
        let mut uses = Uses { left: vec![0; n], block: vec![0; n], register: vec![false; n] };
        uses.visit(&function.body, 0, &mut 0);
        uses
    }

    fn visit(&mut self, insts: &[Inst], block: usize, blocks: &mut usize) {
        for inst in insts {
            inst.op.for_each_operand(|v| self.left[v.0 as usize] += 1);
            for r in &inst.results {
                self.block[r.0 as usize] = block;
            }
            match &inst.op {
                // Sums whose result may itself be a term, and addresses.
                Op::Binary(Binary::Add | Binary::Sub | Binary::Mul, ..) | Op::Shift(Shift::Left, ..) => {}
                Op::Load(..)
                | Op::LoadBytes(_)
                | Op::LoadSplat(..)
                | Op::LoadSplatBytes(_)
                | Op::LoadScalar(..)
                | Op::LoadInt(_)
                | Op::LoadU32(_)
                | Op::Prefetch(_) => {}
                Op::Store(_, v, _) | Op::StoreStrided(_, v, _, _) | Op::StoreScalar(_, v, _) => {
                    self.register[v.0 as usize] = true;
                }
                op => op.for_each_operand(|v| self.register[v.0 as usize] = true),
            }
            if let Op::For(l) = &inst.op {
                *blocks += 1;
                let inner = *blocks;
                for v in l.carried.iter().chain([&l.index]) {
                    self.block[v.0 as usize] = inner;
                }
                self.visit(&l.body, inner, blocks);
                for v in &l.next {
                    self.left[v.0 as usize] += 1;
                    self.register[v.0 as usize] = true;
                }
            }
        }
    }

    /// Notes that a use has been met.
    pub fn consume(&mut self, v: Value) {
        self.left[v.0 as usize] -= 1;
    }

    /// Whether all uses have been met.
    pub fn is_done(&self, v: Value) -> bool {
        self.left[v.0 as usize] == 0
    }

    /// Whether all uses have been met, and `v` was defined in `block`.
    pub fn is_last(&self, v: Value, block: usize) -> bool {
        self.is_done(v) && self.block[v.0 as usize] == block
    }

    /// Whether exactly one use is left.
    pub fn is_single(&self, v: Value) -> bool {
        self.left[v.0 as usize] == 1
    }

    /// Whether some use wants it in a register.
    pub fn wants_register(&self, v: Value) -> bool {
        self.register[v.0 as usize]
    }

    /// The block that defines `v`.
    pub fn block_of(&self, v: Value) -> usize {
        self.block[v.0 as usize]
    }
}
