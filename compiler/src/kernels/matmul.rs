//! Matrix products: row tiles of a packed weight times a few activation rows.
//!
//! The kernel that the time goes into. Weights are read once, in the order in which they lie; the lanes are 16 output rows and
//! K is walked in order in one accumulator for each output, so the tuning never changes a bit. What a product with codes is, [`codes`] says.
//! Deliberately absent: which rows a worker takes, and quantizing the activations.

mod codes;
mod prefetch;

use moec_abi::LANES;
use moec_ir::graph::{Activation, RowContent};
use moec_ir::tile::{Binary, Function, Memory, Shift, Type, Value, build::Builder};

pub use prefetch::Prefetch;
use prefetch::{Next, lines};

use super::common::{VECTOR, build_activation, counted, load_f32, store_f32, zeros};
use crate::plan::layout::{BLOCK, Format, GROUP, QuantizedRow};
use std::ops::Range;

/// Most activation rows of one call.
pub const MAX_TOKENS: usize = 16;

/// Tokens so few that their kernels wait for weights, not for arithmetic.
pub const FEW_TOKENS: usize = 3;

/// What becomes of the sums of a unit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Epilogue {
    /// `y = sum`.
    Store,
    /// `y = y + sum`.
    Add,
    /// `y = activation(gate) × up`: a unit is a gate tile and the up tile after it.
    Gated(Activation),
}

impl Epilogue {
    /// Row tiles of one unit.
    pub const fn tiles(self) -> usize {
        match self {
            Epilogue::Store | Epilogue::Add => 1,
            Epilogue::Gated(_) => 2,
        }
    }

    /// The name in kernels' names and tuning records.
    pub const fn name(self) -> &'static str {
        match self {
            Epilogue::Store => "store",
            Epilogue::Add => "add",
            Epilogue::Gated(activation) => activation.name(),
        }
    }
}

/// The operation that products of codes are made of, and of which bytes; never what they are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Dot {
    /// `dot_u8s8`, of values plus 128, for which the sums begin with what corrects it.
    Unsigned,
    /// `dot_s8s8`, of values.
    Signed,
    /// `dot_u8s8`, of values made [`Small`](crate::plan::layout::Small), which is corrected at the end: where a product goes through sums of 16 bits, these
    /// have room for several.
    Small,
}

/// How a [`Matmul`] is written; never what it computes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MatmulTuning {
    /// Row tiles computed together, sharing each broadcast activation: a power of two, at most 16. 1 makes `Gated` compute gate and up
    /// one after the other. With up to [`FEW_TOKENS`] tokens the tiles lie far apart: each is the next of a stream of its own, which goes through its
    /// part of the weights from front to back, as a CPU's prefetching likes it.
    pub tiles: usize,
    /// Steps of K written out in one iteration: columns for float formats, blocks of 128 for quantized ones.
    pub unroll: usize,
    /// What of the weights is prefetched.
    pub prefetch: Prefetch,
}

impl MatmulTuning {
    /// One row tile at a time.
    pub const fn plain(format: Format) -> MatmulTuning {
        match format.is_quantized() {
            true => MatmulTuning { tiles: 1, unroll: 1, prefetch: Prefetch::None },
            false => MatmulTuning { tiles: 1, unroll: 8, prefetch: Prefetch::None },
        }
    }
}

/// Some of the columns, whose products are added to the sums of those before them: the same additions in the same order as in one go. All rows
/// meet the columns of one part before the next, so that the activations of many tokens stay in the cache.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Part {
    /// Columns of the whole weight.
    pub of: usize,
    /// Whether it is the first: sums begin with 0, and not where the part before left them.
    pub first: bool,
    /// Whether it is the last: sums go through the epilogue, and not back to memory.
    pub last: bool,
}

/// `y[t][16u + l] (op)= Σ_k w[16u + l, k] × x[t, k]` for `units` consecutive units `u` and `tokens` tokens `t`.
///
/// Parameters: `w` — address of the first unit's first tile, 64-byte aligned, laid out as [`Format`] says; `x` — address of the
/// tokens' activation rows, f32 `[k]` for float formats and a [`QuantizedRow`](crate::plan::layout::QuantizedRow) for quantized ones, word by word interleaved
/// ([`super::Interleave`]; a single row is as it is); `y` — address of 16 f32 for unit 0 and token 0; `units` — a count ≥ 0.
/// Unit `u` of token `t` is written at `y + t × y_stride + 64 u` bytes. `y` overlaps neither `w` nor `x`. `x` needs only f32 (quantized: 64-byte)
/// alignment.
///
/// Of a [`Part`], `w` is where its columns begin in the first tile, `x` is still the address of whole rows, `start` the number of columns before the
/// part, times tokens, and `sums` is the address of 16 f32 for each unit, tile of it and token, in this order: read unless it is the first, written
/// unless it is the last, 64-byte aligned, overlapping nothing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Matmul {
    /// The weight's format.
    pub format: Format,
    /// Columns of the weight, or of the part of it.
    pub k: usize,
    /// Which part, if not all.
    pub part: Option<Part>,
    /// Whether it prefetches weights that come later, beside those it reads: as many lines for each tile and step of K, of [`Matmul::step_bytes`], as the
    /// step has, but not one after the other: the first lies `ahead` bytes, a parameter, from the weights of the step on, each next one `stride` bytes,
    /// another, from the one before.
    pub fetch: bool,
    /// Activation rows, 1 ..= [`MAX_TOKENS`].
    pub tokens: usize,
    /// What the activation rows hold, of quantized formats at least [`Format::row`]; means nothing for float formats.
    pub row: RowContent,
    /// By which operation codes are multiplied: [`Dot::Small`] needs a format that can be; means nothing for float formats.
    pub dot: Dot,
    /// What becomes of the sums.
    pub epilogue: Epilogue,
    /// Bytes between output rows.
    pub y_stride: usize,
    /// How it is written.
    pub tuning: MatmulTuning,
}

/// Sums of some row tiles, a vector for each: `[tile][token]`.
type Sums = Vec<Value>;

/// Where codes (or f32), scales and sums of the activations begin; and how far ahead of weights, and at what distance from each other, lines that come later
/// are prefetched if they are.
#[derive(Clone, Copy, Debug)]
struct Inputs {
    x: Value,
    scales: Value,
    sums: Value,
    later: Option<(Value, Value)>,
}

/// Where the row tiles lie that are computed together.
#[derive(Clone, Debug)]
struct Tiles {
    /// Addresses, which advance along K.
    at: Vec<Value>,
    /// For each tile an index into `at`, and the bytes from there.
    each: Vec<(usize, i64)>,
    /// Those after them, if they are prefetched.
    next: Option<Next>,
}

impl Tiles {
    /// `count` tiles of `bytes` bytes, one after the other.
    fn together(at: Value, count: usize, bytes: usize, next: Option<Next>) -> Tiles {
        Tiles { at: vec![at], each: (0..count).map(|tile| (0, (tile * bytes) as i64)).collect(), next }
    }

    /// One at each address.
    fn apart(at: Vec<Value>) -> Tiles {
        Tiles { each: (0..at.len()).map(|tile| (tile, 0)).collect(), at, next: None }
    }

    fn count(&self) -> usize {
        self.each.len()
    }

    /// All addresses that advance along K.
    fn addresses(&self) -> Vec<Value> {
        self.at.iter().copied().chain(self.next.map(|next| next.at)).collect()
    }

    /// The same tiles with all addresses there.
    fn with(&self, addresses: &[Value]) -> Tiles {
        let (at, next) = addresses.split_at(self.at.len());
        let next = self.next.zip(next.first()).map(|(tiles, &at)| Next { at, ..tiles });
        Tiles { at: at.to_vec(), each: self.each.clone(), next }
    }

    /// All addresses so many bytes of each tile further.
    fn advanced(&self, b: &mut Builder, bytes: i64) -> Vec<Value> {
        let mut all = advanced(b, &self.at, bytes);
        all.extend(self.next.map(|next| b.add_int(next.at, next.share(bytes))));
        all
    }

    /// The address of `bytes` bytes into tile number `tile`, in two parts.
    fn address(&self, tile: usize, bytes: i64) -> (Value, i64) {
        let (at, offset) = self.each[tile];
        (self.at[at], offset + bytes)
    }
}

impl Matmul {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let Matmul { format, k, tokens, y_stride, tuning, .. } = self;
        let mut name = format!("matmul_{format}_k{k}_t{tokens}_{}", self.epilogue.name());
        if *tokens > 1 {
            name += &format!("_y{y_stride}");
        }
        if format.is_quantized() && self.row != format.row() {
            name += &format!("_{}", self.row);
        }
        if format.is_quantized() {
            name += match self.dot {
                Dot::Unsigned => "",
                Dot::Signed => "_signed",
                Dot::Small => "_small",
            };
        }
        if let Some(Part { of, first, last }) = self.part {
            name += &format!("_of{of}{}{}", if first { "_first" } else { "" }, if last { "_last" } else { "" });
        }
        if self.fetch {
            name += "_ahead";
        }
        if *tuning != MatmulTuning::plain(*format) {
            let prefetch = match tuning.prefetch {
                Prefetch::None => String::new(),
                Prefetch::Ahead(bytes) => format!("_p{bytes}"),
                Prefetch::Next(streams) => format!("_next{streams}"),
            };
            name += &format!("_r{}_u{}{prefetch}", tuning.tiles, tuning.unroll);
        }
        name
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        match (self.part.is_some(), self.fetch) {
            (false, false) => &["w", "x", "y", "units"],
            (false, true) => &["w", "x", "y", "units", "ahead", "stride"],
            (true, false) => &["w", "x", "start", "y", "units", "sums"],
            (true, true) => &["w", "x", "start", "y", "units", "sums", "ahead", "stride"],
        }
    }

    /// Bytes from one tile to the next.
    fn tile_bytes(&self) -> usize {
        self.format.tile_bytes(self.part.map_or(self.k, |part| part.of))
    }

    /// Bytes of one unit's weights.
    pub fn unit_bytes(&self) -> usize {
        self.epilogue.tiles() * self.tile_bytes()
    }

    /// The kernel for some of its columns.
    ///
    /// # Panics
    /// When they do not begin with a group.
    pub fn in_part(&self, columns: &Range<usize>) -> Matmul {
        assert!(columns.start.is_multiple_of(GROUP), "columns are divided between groups");
        let part = Part { of: self.k, first: columns.start == 0, last: columns.end == self.k };
        Matmul { k: columns.len(), part: Some(part), ..self.clone() }
    }

    /// Bytes that each tile has in a step of K: a group of columns, or as many as are written out.
    pub fn step_bytes(&self) -> usize {
        match self.format.element_bytes() {
            Some(bytes) => self.unroll() * LANES * bytes,
            None => self.format.group_bytes(GROUP / BLOCK),
        }
    }

    /// Steps of K in one iteration: as the tuning says, but whole pairs of columns.
    pub fn unroll(&self) -> usize {
        self.tuning.unroll.next_multiple_of(if self.format.in_pairs() { 2 } else { 1 })
    }

    /// The code.
    pub fn generate(&self) -> Function {
        assert!((1..=MAX_TOKENS).contains(&self.tokens), "{}: 1 to {MAX_TOKENS} tokens", self.name());
        assert!(self.tuning.tiles.is_power_of_two() && self.tuning.unroll > 0, "{}: tuning", self.name());
        let (mut builder, params) = Builder::with_params(self.name(), self.params());
        let b = &mut builder;
        let param = |name: &str| self.params().iter().position(|&param| param == name).map(|i| params[i]);
        let [w, x, y, units] = ["w", "x", "y", "units"].map(|name| param(name).expect("all kernels have it"));
        let [x, scales, sums] = self.activations(b, x, param("start"));
        let from = Inputs { x, scales, sums, later: param("ahead").zip(param("stride")) };
        let start = b.int(0);
        let together = (self.tuning.tiles / self.epilogue.tiles()).max(1);
        let (main_end, at) = if self.part.is_none() && self.tuning.tiles > 1 && self.tokens <= FEW_TOKENS {
            let (main_end, w, y) = self.stream_loop(b, from, [start, units, w, y]);
            (main_end, vec![w, y])
        } else {
            let at = [w, y].into_iter().chain(param("sums")).collect();
            if together > 1 {
                let main_end = whole(b, units, together);
                (main_end, self.unit_loop(b, from, [start, main_end], at, together))
            } else {
                (start, at)
            }
        };
        self.unit_loop(b, from, [main_end, units], at, 1);
        builder.finish()
    }

    /// Where codes (or f32), scales and sums of the activations begin, after those of so many columns times tokens.
    fn activations(&self, b: &mut Builder, x: Value, before: Option<Value>) -> [Value; 3] {
        let Some(before) = before else {
            if !self.format.is_quantized() {
                return [x; 3];
            }
            let row = QuantizedRow::new(self.k, self.row);
            let [scales, sums] =
                [row.scales(), row.sums(self.format.row_sums())].map(|at| b.add_int(x, (at * self.tokens) as i64));
            return [x, scales, sums];
        };
        if !self.format.is_quantized() {
            let before = b.mul_int(before, 4);
            return [b.add(x, before); 3];
        }
        let row = QuantizedRow::new(self.part.map_or(self.k, |part| part.of), self.row);
        let sums = self.format.row_sums();
        // So many columns have a word of each kind.
        [(0, 4), (row.scales(), self.row.span), (row.sums(sums), sums.columns())].map(|(first, columns)| {
            let words = b.shift(Shift::RightUnsigned, before, columns.trailing_zeros() as u8);
            let bytes = b.mul_int(words, 4);
            let at = b.add(x, bytes);
            b.add_int(at, (first * self.tokens) as i64)
        })
    }

    /// The first of the units, as many as can be shared out evenly to as many streams as there are tiles together; returns how many these are, and
    /// where the weights and outputs after them lie.
    fn stream_loop(&self, b: &mut Builder, x: Inputs, [start, units, w, y]: [Value; 4]) -> (Value, Value, Value) {
        let streams = self.tuning.tiles;
        let end = whole(b, units, streams);
        // A stream has `end / streams` units; tiles are multiples of 64 bytes, so that this comes out even.
        let (unit_bytes, out_bytes) = (self.unit_bytes() as i64, VECTOR);
        assert!(unit_bytes % streams as i64 == 0 && out_bytes % streams as i64 == 0, "{}: tiles", self.name());
        let starts = |b: &mut Builder, first: Value, bytes: i64| {
            let apart = b.mul_int(end, bytes / streams as i64);
            let mut all = vec![first];
            for stream in 1..streams {
                all.push(b.add(all[stream - 1], apart));
            }
            all
        };
        let mut carried = starts(b, w, unit_bytes);
        carried.extend(starts(b, y, out_bytes));
        let after = b.for_loop(start, end, streams as i64, &carried, |b, _, carried| {
            let (w, y) = carried.split_at(streams);
            let tile_bytes = self.tile_bytes() as i64;
            let parts: Vec<Sums> = (0..self.epilogue.tiles() as i64)
                .map(|part| {
                    let at = Tiles::apart(advanced(b, w, part * tile_bytes));
                    let zeros = vec![zeros(b); streams * self.tokens];
                    self.tiles(b, x, at, zeros)
                })
                .collect();
            for (stream, &y) in y.iter().enumerate() {
                let tokens = stream * self.tokens..(stream + 1) * self.tokens;
                let sums: Vec<&[Value]> = parts.iter().map(|sums| &sums[tokens.clone()]).collect();
                self.finish(b, &sums, y, 0);
            }
            let mut next = advanced(b, w, unit_bytes);
            next.extend(advanced(b, y, out_bytes));
            next
        });
        // The last stream ends where all end.
        (end, after[streams - 1], after[2 * streams - 1])
    }

    /// Units `start .. end`, `together` at a time; returns where the weights, outputs and (of a part) sums after them lie, as `at` says of those before.
    fn unit_loop(
        &self,
        b: &mut Builder,
        x: Inputs,
        [start, end]: [Value; 2],
        at: Vec<Value>,
        together: usize,
    ) -> Vec<Value> {
        let sum_bytes = (self.epilogue.tiles() * self.tokens) as i64 * VECTOR;
        let bytes = [self.unit_bytes() as i64, VECTOR, sum_bytes].map(|bytes| together as i64 * bytes);
        b.for_loop(start, end, together as i64, &at, |b, _, at| {
            self.units(b, x, at, together);
            at.iter().zip(bytes).map(|(&at, bytes)| b.add_int(at, bytes)).collect()
        })
    }

    fn units(&self, b: &mut Builder, x: Inputs, at: &[Value], together: usize) {
        let (tiles, tile_bytes) = (together * self.epilogue.tiles(), self.tile_bytes());
        let (step, kept) = (tiles.min(self.tuning.tiles), |i: usize| i as i64 * VECTOR);
        let mut sums = Vec::with_capacity(tiles * self.tokens);
        for first in (0..tiles).step_by(step) {
            let w = b.add_int(at[0], (first * tile_bytes) as i64);
            let before = (first * self.tokens..(first + step) * self.tokens)
                .map(|i| match self.part {
                    Some(part) if !part.first => load_f32(b, at[2], kept(i)),
                    _ => zeros(b),
                })
                .collect();
            let next = self.next_tiles(b, w, step);
            sums.extend(self.tiles(b, x, Tiles::together(w, step, tile_bytes, next), before));
        }
        if self.part.is_some_and(|part| !part.last) {
            sums.iter().enumerate().for_each(|(i, &sum)| store_f32(b, sum, at[2], kept(i)));
            return;
        }
        let sums: Vec<&[Value]> = sums.chunks(self.tokens).collect();
        for (unit, sums) in sums.chunks(self.epilogue.tiles()).enumerate() {
            self.finish(b, sums, at[1], unit as i64 * VECTOR);
        }
    }

    /// Writes the results of a unit at `y + at`, out of the sums of its tiles for each token.
    fn finish(&self, b: &mut Builder, sums: &[&[Value]], y: Value, at: i64) {
        for (t, &first) in sums[0].iter().enumerate() {
            let at = at + (t * self.y_stride) as i64;
            let out = match self.epilogue {
                Epilogue::Store => first,
                Epilogue::Add => {
                    let old = load_f32(b, y, at);
                    b.add(old, first)
                }
                Epilogue::Gated(activation) => {
                    let gate = build_activation(b, activation, first);
                    b.mul(gate, sums[1][t])
                }
            };
            store_f32(b, out, y, at);
        }
    }

    /// `sums` of row tiles, and the products with their columns.
    fn tiles(&self, b: &mut Builder, x: Inputs, w: Tiles, sums: Sums) -> Sums {
        match widening(self.format) {
            Some(memory) => self.float_sums(b, memory, x, w, sums),
            None => self.quantized_sums(b, x, w, sums),
        }
    }

    /// Offset of word `word` of token `t` in interleaved rows.
    const fn word(&self, word: usize, t: usize) -> i64 {
        4 * (word * self.tokens + t) as i64
    }

    fn float_sums(&self, b: &mut Builder, memory: Memory, from: Inputs, w: Tiles, sums: Sums) -> Sums {
        let unroll = self.unroll();
        let column = LANES * memory.bytes();
        let columns = Columns::new(b, memory, self.format.in_pairs());
        let steps = |b: &mut Builder, w: &Tiles, [x]: [Value; 1], mut sums: Sums, count: usize| {
            let mut ahead = self.lines(b, from, w, 0);
            for k in 0..count {
                ahead.beside(b, lines(k * column..(k + 1) * column));
                let broadcast: Vec<_> =
                    (0..self.tokens).map(|t| b.load_splat(Memory::F32, x, self.word(k, t))).collect();
                for (tile, sums) in sums.chunks_mut(self.tokens).enumerate() {
                    let (at, offset) = w.address(tile, 0);
                    let weights = columns.load(b, at, offset, k);
                    for (sum, &x) in sums.iter_mut().zip(&broadcast) {
                        *sum = b.fma(weights, x, *sum);
                    }
                }
            }
            ahead.finish(b);
            sums
        };
        let (full, rest) = (self.k / unroll, self.k % unroll);
        let advance = ((unroll * column) as i64, [self.word(unroll, 0)]);
        let (w, at, sums) = walk(b, full, (w, [from.x]), advance, sums, |b, w, at, sums| steps(b, w, at, sums, unroll));
        if rest == 0 { sums } else { steps(b, &w, at, sums, rest) }
    }
}

/// How the columns of a tile of floats are loaded.
#[derive(Clone, Copy)]
enum Columns {
    /// Each by itself.
    Single(Memory),
    /// Halves of words, of which one operation makes f32: the low halves by a shift, the high ones with this mask.
    Pairs(Value),
}

impl Columns {
    fn new(b: &mut Builder, memory: Memory, pairs: bool) -> Columns {
        if pairs { Columns::Pairs(b.splat_i32(!0xffff)) } else { Columns::Single(memory) }
    }

    /// Column `k` of those that begin at `base + offset`.
    fn load(self, b: &mut Builder, base: Value, offset: i64, k: usize) -> Value {
        match self {
            Columns::Single(memory) => b.load(memory, base, offset + (k * LANES * memory.bytes()) as i64),
            Columns::Pairs(mask) => {
                // The halves of a pair are loaded each by itself: a second load costs less than a register.
                let words = b.load(Memory::I32, base, offset + (k / 2) as i64 * VECTOR);
                let bits = match k % 2 {
                    0 => b.shift(Shift::Left, words, 16),
                    _ => b.binary(Binary::And, words, mask),
                };
                b.bitcast(Type::VecF32, bits)
            }
        }
    }
}

/// How the elements of a float format are widened; `None` for the quantized ones.
const fn widening(format: Format) -> Option<Memory> {
    match format {
        Format::F32 => Some(Memory::F32),
        Format::Bf16 => Some(Memory::Bf16),
        Format::F16 => Some(Memory::F16),
        _ => None,
    }
}

/// The largest multiple of `of`, a power of two, that is not above a count.
fn whole(b: &mut Builder, count: Value, of: usize) -> Value {
    let mask = b.int(-(of as i64));
    b.binary(Binary::And, count, mask)
}

/// Addresses so many bytes further.
fn advanced(b: &mut Builder, at: &[Value], bytes: i64) -> Vec<Value> {
    at.iter().map(|&at| b.add_int(at, bytes)).collect()
}

/// A loop of `count` iterations that carries sums, the tiles' addresses and `S` others, which advance by so many bytes each time; what they are after it.
fn walk<const S: usize>(
    b: &mut Builder,
    count: usize,
    (w, at): (Tiles, [Value; S]),
    (w_bytes, bytes): (i64, [i64; S]),
    sums: Sums,
    steps: impl Fn(&mut Builder, &Tiles, [Value; S], Sums) -> Sums,
) -> (Tiles, [Value; S], Sums) {
    let carried = w.addresses();
    let tiles = carried.len();
    let unpack = |carried: &[Value]| {
        let (w, others) = (w.with(&carried[..tiles]), &carried[tiles..]);
        (w, std::array::from_fn(|s| others[s]), others[S..].to_vec())
    };
    let carried: Vec<Value> = carried.into_iter().chain(at).chain(sums).collect();
    let after = counted(b, count, carried, |b, carried| {
        let (w, at, sums) = unpack(carried);
        let sums = steps(b, &w, at, sums);
        let mut next = w.advanced(b, w_bytes);
        next.extend(at.iter().zip(bytes).map(|(&at, bytes)| b.add_int(at, bytes)));
        next.extend(sums);
        next
    });
    unpack(&after)
}
