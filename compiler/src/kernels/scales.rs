//! How kernels read the codes and scales of quantized weights, as [`Format`] says that they lie.
//!
//! Deliberately absent: products with them ([`super::matmul`]), and addresses, which the callers' loads know.

use moec_abi::LANES;
use moec_ir::tile::{Memory, Value, build::Builder};

use crate::plan::layout::{Codes, Format, Scales};

/// The scale of the `number`-th run of columns of a group that share one, and `unit` (a power of two, perhaps negative) times their offset where
/// there is one. `load` loads halves or signed bytes from so many bytes after the group's start on.
pub(super) fn weight_scales(
    b: &mut Builder,
    format: Format,
    number: usize,
    unit: f32,
    load: &mut dyn FnMut(&mut Builder, Memory, i64) -> Value,
) -> (Value, Option<Value>) {
    const HALVES: i64 = 2 * LANES as i64;
    let number = number as i64;
    match format.scales().expect("a quantized format") {
        Scales::Bf16 => (load(b, Memory::Bf16, HALVES * number), None),
        Scales::F16 => (load(b, Memory::F16, HALVES * number), None),
        Scales::Pairs => {
            let at = 2 * HALVES * number;
            let (scale, offset) = (load(b, Memory::F16, at), load(b, Memory::F16, at + HALVES));
            let unit = b.splat_f32(unit);
            (scale, Some(b.mul(offset, unit)))
        }
        Scales::Steps { offsets, .. } => {
            let steps = if offsets { 2 } else { 1 };
            let at = Scales::factor_bytes(offsets) as i64 + steps * LANES as i64 * number;
            let mut product = |b: &mut Builder, factor: i64, step: i64| {
                let factor = load(b, Memory::F16, factor);
                let step = load(b, Memory::I8, step);
                let step = b.int_to_float(step);
                b.mul(step, factor)
            };
            let scale = product(b, 0, at);
            let offset = offsets.then(|| {
                let offset = product(b, HALVES, at + LANES as i64);
                let unit = b.splat_f32(-unit);
                b.mul(offset, unit)
            });
            (scale, offset)
        }
    }
}

/// The unsigned bytes that the codes `raw` stand for: of part `part`, which is 0, or 1 for the high halves of bytes. `book` has the values + 128
/// of the codes of [`Codes::Book`].
pub(super) fn weight_codes(b: &mut Builder, format: Format, book: &[u8; 16], raw: Value, part: usize) -> Value {
    let mut nibbles = || if part == 0 { b.nibble_low(raw) } else { b.nibble_high(raw) };
    match format.codes().expect("a quantized format") {
        Codes::Bytes | Codes::PlainBytes => raw,
        Codes::Nibbles => nibbles(),
        Codes::Book => {
            let places = nibbles();
            b.lookup(*book, places)
        }
        Codes::FixedBook(book) => {
            let places = nibbles();
            b.lookup(book, places)
        }
    }
}
