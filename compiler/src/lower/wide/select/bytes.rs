//! The largest byte that vectors of bytes have, as far as the operations that make them tell.
//!
//! Products of small bytes may be summed up in 16 bits. Deliberately absent: what is in memory, which may be anything.

use moec_ir::tile::{Binary, Function, Inst, Op, Value};

/// For each value of a function, of a vector of bytes that are not negative, the largest that there can be.
pub struct Bytes {
    most: Vec<u8>,
}

impl Bytes {
    /// Looks at all operations.
    pub fn new(function: &Function) -> Bytes {
        let mut bytes = Bytes { most: vec![u8::MAX; function.types.len()] };
        bytes.visit(&function.body);
        bytes
    }

    fn visit(&mut self, insts: &[Inst]) {
        for inst in insts {
            let most = match &inst.op {
                Op::For(l) => {
                    self.visit(&l.body);
                    continue;
                }
                Op::NibbleLow(_) | Op::NibbleHigh(_) => 15,
                Op::Lookup(table, _) => table.iter().copied().max().unwrap_or(u8::MAX),
                Op::Lanes(lanes) => lanes.iter().flat_map(|lane| lane.to_ne_bytes()).max().unwrap_or(u8::MAX),
                Op::Bitcast(_, a) => self.most(*a),
                Op::Binary(Binary::And, a, b) => self.most(*a).min(self.most(*b)),
                _ => continue,
            };
            for result in &inst.results {
                self.most[result.0 as usize] = most;
            }
        }
    }

    /// The largest byte of `v`: 255 where nothing is known.
    pub fn most(&self, v: Value) -> u8 {
        self.most[v.0 as usize]
    }
}
