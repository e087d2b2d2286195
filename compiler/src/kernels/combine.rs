//! Adding the experts' outputs of one token to the residual stream.
//!
//! Deliberately absent: the product that made the outputs, and its rows' order (the sort gives their positions).

use moec_abi::LANES;
use moec_ir::tile::{Function, Memory, Value, build::Builder};

use super::common::{VECTOR, load_f32, store_f32};

/// `x[c] += t` (or `x[c] = t`) with `t = w₀ d₀[c]`, then `t = fma(w_s, d_s[c], t)` for slots `s` = 1 .. k.
///
/// Parameters: `d` — address of the first column to add, in row 0, f32; `positions` — with `gather`, address of u32 `[k]`:
/// slot `s` reads the row at `d + positions[s] × stride_d`, otherwise ignored: it reads `d + s × stride_d`; `weights` — f32 `[k]`;
/// `x` — address of the first column of the residual row, f32; `columns` — a count, a multiple of 16. `x` overlaps nothing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Combine {
    /// Slots: experts for each token.
    pub k: usize,
    /// Bytes between rows of `d`.
    pub stride_d: usize,
    /// Whether rows are found by position.
    pub gather: bool,
    /// Whether the sum is added to what `x` holds.
    pub residual: bool,
}

impl Combine {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let gather = if self.gather { "_gather" } else { "" };
        let add = if self.residual { "_add" } else { "" };
        format!("combine_k{}{gather}{add}_d{}", self.k, self.stride_d)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["d", "positions", "weights", "x", "columns"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        assert!(self.k > 0, "{}: at least one slot", self.name());
        let (mut builder, [d, positions, weights, x, columns]) =
            Builder::new(self.name(), ["d", "positions", "weights", "x", "columns"]);
        let b = &mut builder;
        let rows: Vec<(Value, i64)> = (0..self.k)
            .map(|s| {
                if self.gather {
                    let position = b.load_u32(positions, 4 * s as i64);
                    let offset = b.mul_int(position, self.stride_d as i64);
                    (b.add(d, offset), 0)
                } else {
                    (d, (s * self.stride_d) as i64)
                }
            })
            .collect();
        let start = b.int(0);
        let end = b.mul_int(columns, 4);
        b.for_loop(start, end, 4 * LANES as i64, &[], |b, at, _| {
            let mut sum = None;
            for (s, &(row, offset)) in rows.iter().enumerate() {
                let from = b.add(row, at);
                let v = b.load(Memory::F32, from, offset);
                let w = b.load_splat(Memory::F32, weights, 4 * s as i64);
                sum = Some(match sum {
                    None => b.mul(w, v),
                    Some(t) => b.fma(w, v, t),
                });
            }
            let to = b.add(x, at);
            let mut sum = sum.expect("at least one slot");
            if self.residual {
                let old = load_f32(b, to, 0);
                sum = b.add(old, sum);
            }
            store_f32(b, sum, to, 0);
            debug_assert_eq!(VECTOR, 4 * LANES as i64);
            Vec::new()
        });
        builder.finish()
    }
}
