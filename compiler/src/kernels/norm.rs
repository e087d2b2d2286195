//! RMS norm of a row, and quantization of a row; fused when the consumer reads quantized rows.
//!
//! `y = x / √(mean(x²) + ε) × weight`. The sum is 16 strided partial sums, then the fixed tree. A quantized row is a signed
//! byte for each element, a scale for each span and the sums that products ask for (see [`QuantizedRow`]). Deliberately
//! absent: rows of more than one token — a call does one.

use moec_abi::{LANES, ROW_ALIGN, round_up};
use moec_ir::graph::{RowContent, RowSums};
use moec_ir::math::{build_quantize_scale, build_rms_scale};
use moec_ir::tile::{Function, Memory, Reduce, Value, build::Builder};

use super::common::{VECTOR, counted, load_f32, store_f32, zeros};
use crate::plan::layout::{BLOCK, QuantizedRow};

/// What a [`Norm`] writes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Outputs {
    /// The f32 row.
    F32,
    /// The quantized row.
    Quantized,
    /// Both.
    Both,
}

impl Outputs {
    const fn f32(self) -> bool {
        matches!(self, Outputs::F32 | Outputs::Both)
    }

    const fn quantized(self) -> bool {
        matches!(self, Outputs::Quantized | Outputs::Both)
    }

    const fn name(self) -> &'static str {
        match self {
            Outputs::F32 => "f32",
            Outputs::Quantized => "quantized",
            Outputs::Both => "both",
        }
    }
}

/// `y = (x × r) × weight` with `r = 1 / √(Σ x² / width + ε)`, for one row.
///
/// Parameters: `x` — f32 row, `weight` — f32 row, both `h` elements padded with zeros to a multiple of 16; `y` — f32 row of `h`
/// padded to a multiple of 32, written (padding: zeros) when asked for; `q` — [`QuantizedRow`] of `h`, written when asked for. `y` may
/// be `x`; `q` overlaps none. Addresses are 4-byte aligned. Elements must be finite.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Norm {
    /// Elements of the row as it lies: of padded heads, their padding (zeros) included.
    pub h: usize,
    /// Elements of the row without padding of heads: what the mean is taken over.
    pub width: usize,
    /// ε as the bits of an f32.
    pub eps_bits: u32,
    /// What is written.
    pub outputs: Outputs,
    /// What the quantized row holds; means nothing where there is none.
    pub row: RowContent,
}

impl Norm {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let Norm { h, width, eps_bits, outputs, row } = self;
        let padded = if width == h { String::new() } else { format!("_of{width}") };
        let row = if outputs.quantized() { format!("_{row}") } else { String::new() };
        format!("norm_{}_h{h}{padded}_eps{eps_bits:08x}{row}", outputs.name())
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["x", "weight", "y", "q"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [x, weight, y, q]) = Builder::new(self.name(), ["x", "weight", "y", "q"]);
        let b = &mut builder;
        let factor = self.factor(b, x);
        let element = |b: &mut Builder, [x, weight]: [Value; 2], at: i64| {
            let v = load_f32(b, x, at);
            let w = load_f32(b, weight, at);
            let v = b.mul(v, factor);
            b.mul(v, w)
        };
        if self.outputs.f32() {
            let vectors = self.h.div_ceil(LANES);
            let step = |b: &mut Builder, at: [Value; 3], count: usize| {
                for i in 0..count as i64 {
                    let v = element(b, [at[0], at[1]], i * VECTOR);
                    store_f32(b, v, at[2], i * VECTOR);
                }
            };
            let unroll = 4;
            let after = counted(b, vectors / unroll, vec![x, weight, y], |b, at| {
                step(b, [at[0], at[1], at[2]], unroll);
                at.iter().map(|&p| b.add_int(p, unroll as i64 * VECTOR)).collect()
            });
            step(b, [after[0], after[1], after[2]], vectors % unroll);
            for padding in vectors..round_up(self.h, ROW_ALIGN) / LANES {
                let zero = zeros(b);
                store_f32(b, zero, y, padding as i64 * VECTOR);
            }
        }
        match (self.outputs.quantized(), self.outputs.f32()) {
            (false, _) => {}
            // y has been written: it is what is quantized.
            (true, true) => quantize_row(b, (self.h, self.row), [y, y], q, |b, [y, _], at| load_f32(b, y, at)),
            (true, false) => quantize_row(b, (self.h, self.row), [x, weight], q, element),
        }
        builder.finish()
    }

    /// `1 / √(Σ x² / width + ε)` in all lanes.
    fn factor(&self, b: &mut Builder, x: Value) -> Value {
        let vectors = self.h.div_ceil(LANES);
        let unroll = 8;
        let step = |b: &mut Builder, x: Value, mut sum: Value, count: usize| {
            for i in 0..count as i64 {
                let v = load_f32(b, x, i * VECTOR);
                sum = b.fma(v, v, sum);
            }
            sum
        };
        let sum = zeros(b);
        let after = counted(b, vectors / unroll, vec![x, sum], |b, at| {
            let sum = step(b, at[0], at[1], unroll);
            vec![b.add_int(at[0], unroll as i64 * VECTOR), sum]
        });
        let sums = step(b, after[0], after[1], vectors % unroll);
        let factor = build_rms_scale(b, sums, self.width, f32::from_bits(self.eps_bits));
        b.splat(factor)
    }
}

/// Quantizes one activation row of `k` elements.
///
/// Parameters: `x` — f32 row, padded with zeros to a multiple of 16; `q` — [`QuantizedRow`] of `k`, written. They do not
/// overlap. Addresses are 4-byte aligned. Elements must be finite.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Quantize {
    /// Elements of the row.
    pub k: usize,
    /// What the quantized row holds.
    pub row: RowContent,
}

impl Quantize {
    /// The kernel's name.
    pub fn name(&self) -> String {
        format!("quantize_k{}_{}", self.k, self.row)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["x", "q"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [x, q]) = Builder::new(self.name(), ["x", "q"]);
        quantize_row(&mut builder, (self.k, self.row), [x, x], q, |b, [x, _], at| load_f32(b, x, at));
        builder.finish()
    }
}

/// Quantizes the row of `k` elements that `element` gives (16 f32 at a byte offset from two addresses that advance together) into `q`.
fn quantize_row(
    b: &mut Builder,
    (k, content): (usize, RowContent),
    from: [Value; 2],
    q: Value,
    element: impl Fn(&mut Builder, [Value; 2], i64) -> Value,
) {
    let (row, span) = (QuantizedRow::new(k, content), content.span);
    // The half block after the last element, if there is one, is zeros and is not read.
    let padding = round_up(k, LANES) < row.k;
    let kinds: Vec<RowSums> = content.sums().collect();
    // `to` is where codes, scales and each kind of sums go.
    let block = |b: &mut Builder, from: [Value; 2], to: &[Value], elements: usize, last: bool| {
        let element = |b: &mut Builder, from: [Value; 2], at: i64| match last && padding {
            true if at == (elements as i64 * 4 - VECTOR) => zeros(b),
            _ => element(b, from, at),
        };
        let vectors = (elements / LANES) as i64;
        let mut largest = zeros(b);
        for i in 0..vectors {
            let v = element(b, from, i * VECTOR);
            let v = b.abs(v);
            largest = b.max(largest, v);
        }
        let largest = b.reduce(Reduce::Max, largest);
        let (scale, inverse) = build_quantize_scale(b, largest);
        b.store_scalar(Memory::F32, scale, to[1], row.scales() as i64);
        let inverse = b.splat(inverse);
        for part in 0..elements / BLOCK {
            let codes: Vec<Value> = (0..BLOCK / LANES)
                .map(|i| {
                    let at = part * BLOCK / LANES + i;
                    let v = element(b, from, at as i64 * VECTOR);
                    let v = b.mul(v, inverse);
                    let code = b.float_to_int(v);
                    b.store(Memory::I8, code, to[0], (at * LANES) as i64);
                    code
                })
                .collect();
            for (&kind, &to) in kinds.iter().zip(&to[2..]) {
                let runs = BLOCK / kind.columns();
                for (run, codes) in codes.chunks(kind.columns() / LANES).enumerate() {
                    let at = (row.sums(kind) + 4 * (part * runs + run)) as i64;
                    store_sum(b, kind, codes, scale, to, at);
                }
            }
        }
    };
    let whole = (row.k - 1) / span;
    let mut carried = vec![from[0], from[1]];
    carried.resize(4 + kinds.len(), q);
    let bytes = 4 * span as i64;
    let mut steps = vec![bytes, bytes, span as i64, 4];
    steps.extend(kinds.iter().map(|kind| 4 * (span / kind.columns()) as i64));
    let after = counted(b, whole, carried, |b, at| {
        block(b, [at[0], at[1]], &at[2..], span, false);
        at.iter().zip(&steps).map(|(&p, &step)| b.add_int(p, step)).collect()
    });
    block(b, [after[0], after[1]], &after[2..], row.k - whole * span, true);
}

/// Writes a sum of `codes`, whose scale is `scale`, at `to + at`.
fn store_sum(b: &mut Builder, kind: RowSums, codes: &[Value], scale: Value, to: Value, at: i64) {
    let sum = codes.iter().copied().reduce(|a, c| b.add(a, c)).expect("a run has vectors");
    if kind.is_scaled() {
        // Small integers: their sum is exact in any order.
        let sum = b.int_to_float(sum);
        let sum = b.reduce(Reduce::Add, sum);
        let sum = b.mul(sum, scale);
        b.store_scalar(Memory::F32, sum, to, at);
    } else {
        let sum = b.reduce(Reduce::Add, sum);
        let sum = b.mul_int(sum, -128);
        b.store_scalar(Memory::I32, sum, to, at);
    }
}
