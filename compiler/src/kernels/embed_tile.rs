//! Token embedding from a table of quantized weights, which lies in tiles as every other matrix: so a tied output shares it.
//!
//! Deliberately absent: finding the tile — the caller divides the token by 16.

use moec_abi::LANES;
use moec_ir::tile::{Binary, Compare, Function, Memory, Shift, Type, Value, build::Builder};

use super::common::{VECTOR, counted, lane_numbers, store_f32};
use super::embed::{scale_name, scaled};
use super::matmul::Dot;
use super::scales::{Load, weight_codes, weight_offset, weight_scale};
use crate::plan::layout::{BLOCK, Format, GROUP};

/// `y[k] = w[lane, k]`: one of the 16 rows of a tile as f32, each weight `scale × value`, or `scale × code + offset` with one rounding; then times
/// a factor if there is one.
///
/// Parameters: `tile` — address of the tile, 64-byte aligned, laid out as [`Format`] says; `lane` — which of its rows; `y` — f32 row of `k`. They do
/// not overlap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EmbedTile {
    /// The table's format, one that keeps stored codes.
    pub format: Format,
    /// Elements of a row, a multiple of [`BLOCK`].
    pub k: usize,
    /// What they are multiplied by, as the bits of an f32.
    pub scale_bits: Option<u32>,
}

/// Addresses of the first code, the first half and the first byte of a row in the group that is read, and of its elements in `y`.
#[derive(Clone, Copy)]
struct Row {
    codes: Value,
    halves: Value,
    bytes: Value,
    y: Value,
}

impl EmbedTile {
    /// The kernel's name.
    pub fn name(&self) -> String {
        format!("embed_tile_{}_k{}{}", self.format, self.k, scale_name(self.scale_bits))
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["tile", "lane", "y"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        assert!(
            self.format.is_exact() && self.k.is_multiple_of(BLOCK),
            "{}: whole blocks of stored codes",
            self.name()
        );
        let (mut builder, [tile, lane, y]) = Builder::new(self.name(), ["tile", "lane", "y"]);
        let b = &mut builder;
        let two = b.binary(Binary::Add, lane, lane);
        let four = b.binary(Binary::Add, two, two);
        let [codes, halves, bytes] = [four, two, lane].map(|offset| b.binary(Binary::Add, tile, offset));
        let per_group = GROUP / BLOCK;
        let (groups, rest) = (self.k / GROUP, self.k % GROUP / BLOCK);
        let row = |at: &[Value]| Row { codes: at[0], halves: at[1], bytes: at[2], y: at[3] };
        let after = counted(b, groups, vec![codes, halves, bytes, y], |b, at| {
            self.group(b, row(at), per_group);
            let bytes = self.format.group_bytes(per_group) as i64;
            let steps = [bytes, bytes, bytes, (4 * GROUP) as i64];
            at.iter().zip(steps).map(|(&at, step)| b.add_int(at, step)).collect()
        });
        self.group(b, row(&after), rest);
        builder.finish()
    }

    /// The weights of a group of `blocks` blocks.
    fn group(&self, b: &mut Builder, row: Row, blocks: usize) {
        let first = self.format.scale_bytes(blocks);
        let parts = self.format.parts();
        for block in 0..blocks {
            for half in 0..BLOCK / LANES {
                let number = block * parts + half * parts / (BLOCK / LANES);
                let load: Load = &mut |b, memory, at| match memory {
                    Memory::I8 => b.load_splat(memory, row.bytes, at),
                    _ => b.load_splat(memory, row.halves, at),
                };
                let scale = weight_scale(b, self.format, number, load);
                let offset = self.format.has_offsets().then(|| weight_offset(b, self.format, number, load));
                let code = self.sixteen(b, row.codes, (first + block * self.format.block_bytes()) as i64, half);
                let value = match offset {
                    Some(offset) => {
                        let code = b.int_to_float(code);
                        b.fma(code, scale, offset)
                    }
                    None => {
                        let zero = b.splat_i32(128);
                        let value = b.sub(code, zero);
                        let value = b.int_to_float(value);
                        b.mul(value, scale)
                    }
                };
                let value = scaled(b, value, self.scale_bits);
                let at = block * BLOCK / LANES + half;
                store_f32(b, value, row.y, at as i64 * VECTOR);
            }
        }
    }

    /// The codes of 16 columns of a block, looked up, one in each lane: the first or the second 16.
    fn sixteen(&self, b: &mut Builder, row: Value, block: i64, half: usize) -> Value {
        let nibbles = self.format.block_bytes() < BLOCK * LANES;
        let (first, part) = if nibbles { (0, half) } else { (4 * half as i64, 0) };
        let lane = lane_numbers(b, 0);
        // Four columns in the four bytes of each lane: words 0 to 3 in lanes 0 to 3, 4 to 7, …
        let mut words = b.load_splat(Memory::I32, row, block + 64 * first);
        for word in 1..4 {
            let next = b.load_splat(Memory::I32, row, block + 64 * (first + word));
            let from = b.splat_i32(4 * word as i32);
            let mask = b.compare(Compare::GreaterEqual, lane, from);
            words = b.select(mask, next, words);
        }
        let bytes = b.bitcast(Type::VecI8, words);
        let bytes = weight_codes(b, self.format, Dot::Unsigned, bytes, part);
        let words = b.bitcast(Type::VecI32, bytes);
        // Of these the byte whose number is that of the lane among its four.
        let three = b.splat_i32(3);
        let place = b.binary(Binary::And, lane, three);
        let mut code = words;
        for byte in 1..4 {
            let moved = b.shift(Shift::RightUnsigned, words, 8 * byte);
            let number = b.splat_i32(i32::from(byte));
            let mask = b.compare(Compare::Equal, place, number);
            code = b.select(mask, moved, code);
        }
        let all = b.splat_i32(255);
        b.binary(Binary::And, code, all)
    }
}
