//! Token embedding: one row of the table becomes an activation row.
//!
//! Deliberately absent: finding the row — the caller adds `token × h × bytes` to the table's address.

use moec_abi::{LANES, ROW_ALIGN, round_up};
use moec_ir::tile::{Function, Memory, Value, build::Builder};

use super::common::{VECTOR, counted, keep_lanes, store_f32, zeros};
use crate::plan::layout::Format;

/// `y = row`, widened to f32, times a factor if there is one.
///
/// Parameters: `row` — address of `h` elements of `format` (a float format), of which 64 bytes beyond the end must be
/// readable; `y` — f32 row of `h` rounded up to 32, whose padding is set to zeros. They do not overlap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Embed {
    /// The table's format: f32, bf16 or f16.
    pub format: Format,
    /// Elements of a row.
    pub h: usize,
    /// What they are multiplied by, as the bits of an f32.
    pub scale_bits: Option<u32>,
}

/// What a factor adds to a kernel's name.
pub(super) fn scale_name(scale_bits: Option<u32>) -> String {
    scale_bits.map_or(String::new(), |bits| format!("_by{bits:08x}"))
}

/// A vector times the factor, if there is one.
pub(super) fn scaled(b: &mut Builder, v: Value, scale_bits: Option<u32>) -> Value {
    let Some(bits) = scale_bits else { return v };
    let scale = b.splat_f32(f32::from_bits(bits));
    b.mul(v, scale)
}

impl Embed {
    /// The kernel's name.
    pub fn name(&self) -> String {
        format!("embed_{}_h{}{}", self.format, self.h, scale_name(self.scale_bits))
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["row", "y"]
    }

    fn memory(&self) -> Memory {
        match self.format {
            Format::F32 => Memory::F32,
            Format::Bf16 => Memory::Bf16,
            Format::F16 => Memory::F16,
            _ => panic!("{}: embedding tables are f32, bf16 or f16", self.name()),
        }
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [row, y]) = Builder::new(self.name(), ["row", "y"]);
        let b = &mut builder;
        let memory = self.memory();
        let bytes = (LANES * memory.bytes()) as i64;
        let step = |b: &mut Builder, [row, y]: [Value; 2], count: usize| {
            for i in 0..count as i64 {
                let v = b.load(memory, row, i * bytes);
                let v = scaled(b, v, self.scale_bits);
                store_f32(b, v, y, i * VECTOR);
            }
        };
        let unroll = 4;
        let full = self.h / LANES;
        let after = counted(b, full / unroll, vec![row, y], |b, at| {
            step(b, [at[0], at[1]], unroll);
            vec![b.add_int(at[0], unroll as i64 * bytes), b.add_int(at[1], unroll as i64 * VECTOR)]
        });
        let (row, y) = (after[0], after[1]);
        let done = full % unroll;
        step(b, [row, y], done);
        let vectors = round_up(self.h, ROW_ALIGN) / LANES - full;
        for i in 0..vectors {
            let v = match self.h % LANES {
                rest if rest > 0 && i == 0 => {
                    let v = b.load(memory, row, done as i64 * bytes);
                    let v = scaled(b, v, self.scale_bits);
                    keep_lanes(b, v, rest)
                }
                _ => zeros(b),
            };
            store_f32(b, v, y, (done + i) as i64 * VECTOR);
        }
        builder.finish()
    }
}
