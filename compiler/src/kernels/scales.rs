//! How kernels read the codes and scales of quantized weights, as [`Format`] says that they lie.
//!
//! Deliberately absent: products with them ([`super::matmul`]), and addresses, which the callers' loads know.

use moec_abi::LANES;
use moec_ir::tile::{Binary, Memory, Type, Value, build::Builder};

use super::matmul::Dot;
use crate::plan::layout::{Codes, Format, Scales, Small};

/// Loads halves or signed bytes of 16 rows from so many bytes after a group's start on.
pub(super) type Load<'a> = &'a mut dyn FnMut(&mut Builder, Memory, i64) -> Value;

/// Bytes of the halves of 16 rows.
const HALVES: i64 = 2 * LANES as i64;

/// The scale of the `run`-th columns of a group that share one.
pub(super) fn weight_scale(b: &mut Builder, format: Format, run: usize, load: Load) -> Value {
    let at = HALVES * run as i64;
    match format.scales().expect("a quantized format") {
        Scales::Bf16 => load(b, Memory::Bf16, at),
        Scales::F16 => load(b, Memory::F16, at),
        Scales::Pairs => load(b, Memory::F16, 2 * at),
        Scales::Steps { offsets, .. } => step_times_factor(b, offsets, (0, run), load),
    }
}

/// Their offset, in a format that has offsets.
pub(super) fn weight_offset(b: &mut Builder, format: Format, run: usize, load: Load) -> Value {
    match format.scales().expect("a quantized format") {
        Scales::Pairs => load(b, Memory::F16, HALVES * (2 * run as i64 + 1)),
        Scales::Steps { offsets: true, .. } => step_times_factor(b, true, (1, run), load),
        Scales::Bf16 | Scales::F16 | Scales::Steps { offsets: false, .. } => unreachable!("{format} has no offsets"),
    }
}

/// The scale (`which` is 0) or the offset (1) of columns that have steps.
fn step_times_factor(b: &mut Builder, offsets: bool, (which, run): (usize, usize), load: Load) -> Value {
    let steps = if offsets { 2 } else { 1 };
    let step = Scales::factor_bytes(offsets) + (steps * run + which) * LANES;
    let (factor, step) = (load(b, Memory::F16, HALVES * which as i64), load(b, Memory::I8, step as i64));
    let step = b.int_to_float(step);
    b.mul(step, factor)
}

/// The bytes that the codes `raw` stand for, as `dot` has them: of part `part`, which is 0, or 1 for the high halves of bytes.
pub(super) fn weight_codes(b: &mut Builder, format: Format, dot: Dot, raw: Value, part: usize) -> Value {
    let codes = format.codes().expect("a quantized format");
    match (dot, codes) {
        (_, Codes::Nibbles) => nibbles(b, raw, part),
        (Dot::Unsigned, Codes::Bytes | Codes::PlainBytes) | (Dot::Signed, Codes::PlainBytes) => raw,
        (Dot::Unsigned, Codes::Book(book)) => looked_up(b, book, raw, part),
        (Dot::Signed, Codes::Bytes) => with_all(b, Binary::Xor, raw, 128),
        (Dot::Signed, Codes::Book(book)) => looked_up(b, book.map(|code| code ^ 128), raw, part),
        (Dot::Small, Codes::PlainBytes) => with_all(b, Binary::And, raw, small(format).largest),
        (Dot::Small, Codes::Bytes) => {
            // Values plus 128, of which only the low bits matter, where adding the bias turns a bit over.
            let Small { bias, .. } = small(format);
            let turned = with_all(b, Binary::Xor, raw, bias);
            with_all(b, Binary::And, turned, 2 * bias - 1)
        }
        (Dot::Small, Codes::Book(book)) => {
            let Small { bias, .. } = small(format);
            looked_up(b, book.map(|code| code - (128 - bias)), raw, part)
        }
    }
}

fn small(format: Format) -> Small {
    format.small().unwrap_or_else(|| panic!("{format} has values that are not small"))
}

/// Each byte with this one.
fn with_all(b: &mut Builder, op: Binary, bytes: Value, byte: u8) -> Value {
    let all = b.lanes([i32::from_ne_bytes([byte; 4]); LANES]);
    let all = b.bitcast(Type::VecI8, all);
    b.binary(op, bytes, all)
}

fn nibbles(b: &mut Builder, raw: Value, part: usize) -> Value {
    if part == 0 { b.nibble_low(raw) } else { b.nibble_high(raw) }
}

fn looked_up(b: &mut Builder, book: [u8; 16], raw: Value, part: usize) -> Value {
    let places = nibbles(b, raw, part);
    b.lookup(book, places)
}
