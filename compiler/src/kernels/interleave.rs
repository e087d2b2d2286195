//! Activation rows word by word beside each other, as a matrix product of several tokens reads them.
//!
//! One sequential stream instead of as many as there are tokens, wherever the rows came from. Deliberately absent: what the words mean.

use moec_ir::tile::{Function, Memory, Value, build::Builder};

use super::common::VECTOR;

/// `out[word][t] = x[row of t][word]` for `tokens` rows of `bytes`.
///
/// Parameters: `x` — address of row 0; `rows` — with `gather` the address of u32 `[tokens]`, the row of each token, else ignored (token `t` has row
/// `t`); `out` — address of `tokens × bytes`. Rows begin `stride` bytes from each other. `out` overlaps neither.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Interleave {
    /// Bytes of a row: a multiple of 64.
    pub bytes: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
    /// How many rows.
    pub tokens: usize,
    /// Whether rows are chosen by index.
    pub gather: bool,
}

impl Interleave {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let Interleave { bytes, stride, tokens, gather } = self;
        format!("interleave_b{bytes}_s{stride}_t{tokens}{}", if *gather { "_gather" } else { "" })
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["x", "rows", "out"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [x, rows, out]) = Builder::new(self.name(), ["x", "rows", "out"]);
        let b = &mut builder;
        for t in 0..self.tokens {
            let row = self.row(b, x, rows, t);
            let (start, end) = (b.int(0), b.int(self.bytes as i64));
            b.for_loop(start, end, VECTOR, &[out], |b, at, carried| {
                let from = b.add(row, at);
                let words = b.load(Memory::F32, from, 0);
                let step = 4 * self.tokens as i32;
                if self.tokens == 1 {
                    b.store(Memory::F32, words, carried[0], 0);
                } else {
                    b.store_strided(Memory::F32, words, carried[0], 4 * t as i64, step);
                }
                vec![b.add_int(carried[0], VECTOR * self.tokens as i64)]
            });
        }
        builder.finish()
    }

    fn row(&self, b: &mut Builder, x: Value, rows: Value, t: usize) -> Value {
        if !self.gather {
            return b.add_int(x, (t * self.stride) as i64);
        }
        let row = b.load_u32(rows, 4 * t as i64);
        let offset = b.mul_int(row, self.stride as i64);
        b.add(x, offset)
    }
}
