//! The text form of tile IR: `Display` of a [`Function`] and of its parts. [`super::parse`] reads it back exactly.
//!
//! ```text
//! kernel scale(v0 x, v1 y) {
//!   v2: f32x16 = load_splat.f32 v1 + 4
//!   v3: int = int 0
//!   v4: int = int 64
//!   for v5: int = v3 to v4 step 16 {
//!     v6: int = add v0, v5
//!     v7: f32x16 = load.f32 v6
//!     v8: f32x16 = mul v7, v2
//!     store.f32 v8, v6
//!   }
//! }
//! ```
//!
//! One instruction a line; each result with its type; a loop's body is indented and ends with the values that it carries on
//! (`next`), when there are any. Comments, which the parser skips, go from `;` to the end of the line. Deliberately absent:
//! abbreviations that would have to be inferred.

use std::fmt::{self, Write as _};

use super::{Address, Function, Inst, Loop, Op, Value};

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", header(self))?;
        write_block(f, self, &self.body, 1)?;
        writeln!(f, "}}")
    }
}

/// The first line of a function.
pub fn header(function: &Function) -> String {
    let params: Vec<String> = function.params.iter().map(|(v, name)| format!("{v} {name}")).collect();
    format!("kernel {}({}) {{", function.name, params.join(", "))
}

/// The line of an instruction, without indentation; the first line of a loop.
pub fn line(function: &Function, inst: &Inst) -> String {
    let mut s = String::new();
    if !inst.results.is_empty() {
        let results: Vec<String> = inst.results.iter().map(|&v| typed(function, v)).collect();
        s = format!("{} = ", results.join(", "));
    }
    write!(s, "{}", OpText { function, op: &inst.op }).expect("a String takes all text");
    s
}

/// [`line`] of every instruction, in the order of the text.
pub fn instruction_lines(function: &Function) -> Vec<String> {
    fn collect(function: &Function, block: &[Inst], lines: &mut Vec<String>) {
        for inst in block {
            lines.push(line(function, inst));
            if let Op::For(l) = &inst.op {
                collect(function, &l.body, lines);
            }
        }
    }
    let mut lines = Vec::new();
    collect(function, &function.body, &mut lines);
    lines
}

/// The last but one line of a loop that carries values.
pub fn next_line(l: &Loop) -> String {
    format!("next {}", list(&l.next))
}

fn write_block(f: &mut fmt::Formatter<'_>, function: &Function, block: &[Inst], depth: usize) -> fmt::Result {
    for inst in block {
        writeln!(f, "{:depth$}{}", "", line(function, inst), depth = depth * 2)?;
        if let Op::For(l) = &inst.op {
            write_block(f, function, &l.body, depth + 1)?;
            if !l.next.is_empty() {
                writeln!(f, "{:depth$}{}", "", next_line(l), depth = (depth + 1) * 2)?;
            }
            writeln!(f, "{:depth$}}}", "", depth = depth * 2)?;
        }
    }
    Ok(())
}

fn typed(function: &Function, v: Value) -> String {
    match function.types.get(v.0 as usize) {
        Some(ty) => format!("{v}: {ty}"),
        None => format!("{v}: ?"),
    }
}

fn list(values: &[Value]) -> String {
    let values: Vec<String> = values.iter().map(ToString::to_string).collect();
    values.join(", ")
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            0 => write!(f, "{}", self.base),
            n if n < 0 => write!(f, "{} - {}", self.base, n.unsigned_abs()),
            n => write!(f, "{} + {n}", self.base),
        }
    }
}

/// An F32 constant: decimal when that gives the same bits, else the bits.
fn f32_text(bits: u32) -> String {
    let x = f32::from_bits(bits);
    if x.is_nan() { format!("{bits:#010x}") } else { format!("{x:?}") }
}

struct OpText<'a> {
    function: &'a Function,
    op: &'a Op,
}

impl fmt::Display for OpText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.op {
            Op::Int(n) => write!(f, "int {n}"),
            Op::F32(bits) => write!(f, "f32 {}", f32_text(*bits)),
            Op::Lanes(n) if n.iter().all(|x| *x == n[0]) => write!(f, "lanes {}", n[0]),
            Op::Lanes(n) => write!(f, "lanes {}", numbers(n)),
            Op::Binary(op, a, b) => write!(f, "{} {a}, {b}", op.name()),
            Op::Shift(op, a, by) => write!(f, "{} {a}, {by}", op.name()),
            Op::Sqrt(a) => write!(f, "sqrt {a}"),
            Op::Abs(a) => write!(f, "abs {a}"),
            Op::Round(a) => write!(f, "round {a}"),
            Op::Fma(a, b, c) => write!(f, "fma {a}, {b}, {c}"),
            Op::Compare(op, a, b) => write!(f, "{} {a}, {b}", op.name()),
            Op::Select(c, a, b) => write!(f, "select {c}, {a}, {b}"),
            Op::Splat(a) => write!(f, "splat {a}"),
            Op::IntToFloat(a) => write!(f, "int_to_float {a}"),
            Op::FloatToInt(a) => write!(f, "float_to_int {a}"),
            Op::Bitcast(ty, a) => write!(f, "bitcast.{ty} {a}"),
            Op::Reduce(op, a) => write!(f, "{} {a}", op.name()),
            Op::DotU8S8(acc, w, a) => write!(f, "dot_u8s8 {acc}, {w}, {a}"),
            Op::DotS8S8(acc, w, a) => write!(f, "dot_s8s8 {acc}, {w}, {a}"),
            Op::NibbleLow(a) => write!(f, "nibble_low {a}"),
            Op::NibbleHigh(a) => write!(f, "nibble_high {a}"),
            Op::Lookup(table, a) => write!(f, "lookup {a}, {}", numbers(table)),
            Op::Load(m, at) => write!(f, "load.{} {at}", m.name()),
            Op::LoadBytes(at) => write!(f, "load_bytes {at}"),
            Op::LoadSplat(m, at) => write!(f, "load_splat.{} {at}", m.name()),
            Op::LoadSplatBytes(at) => write!(f, "load_splat_bytes {at}"),
            Op::LoadScalar(m, at) => write!(f, "load_scalar.{} {at}", m.name()),
            Op::LoadInt(at) => write!(f, "load_int {at}"),
            Op::LoadU32(at) => write!(f, "load_u32 {at}"),
            Op::Store(m, v, at) => write!(f, "store.{} {v}, {at}", m.name()),
            Op::StoreStrided(m, v, at, stride) => write!(f, "store_strided.{} {v}, {at}, {stride}", m.name()),
            Op::StoreScalar(m, v, at) => write!(f, "store_scalar.{} {v}, {at}", m.name()),
            Op::Prefetch(at) => write!(f, "prefetch {at}"),
            Op::For(l) => {
                write!(f, "for {} = {} to {} step {}", typed(self.function, l.index), l.start, l.end, l.step)?;
                for (i, (&c, init)) in l.carried.iter().zip(&l.initial).enumerate() {
                    let word = if i == 0 { " with " } else { ", " };
                    write!(f, "{word}{} = {init}", typed(self.function, c))?;
                }
                write!(f, " {{")
            }
        }
    }
}

fn numbers<T: fmt::Display>(n: &[T]) -> String {
    let n: Vec<String> = n.iter().map(ToString::to_string).collect();
    n.join(", ")
}
