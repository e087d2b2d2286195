//! Matrix products: row tiles of a packed weight times a few activation rows.
//!
//! The kernel that the time goes into. Weights are read once, in the order in which they lie; the lanes are 16 output rows and
//! K is walked in order in one accumulator for each output (for `q8`/`q4`: exact integer sums of 32, scaled and added in
//! order), so the tuning never changes a bit. Deliberately absent: which rows a worker takes, and quantizing the activations.

use moec_abi::LANES;
use moec_ir::math::build_silu;
use moec_ir::tile::{Function, Memory, Value, build::Builder};

use super::common::{VECTOR, counted, load_f32, store_f32, zeros};
use crate::plan::layout::{BLOCK, Format, GROUP, QuantizedRow, SPAN, scale_bytes};

/// Most activation rows of one call.
pub const MAX_TOKENS: usize = 16;

/// What becomes of the sums of a unit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Epilogue {
    /// `y = sum`.
    Store,
    /// `y = y + sum`.
    Add,
    /// `y = silu(gate) × up`: a unit is a gate tile and the up tile after it.
    SiluMul,
}

impl Epilogue {
    /// Row tiles of one unit.
    pub const fn tiles(self) -> usize {
        match self {
            Epilogue::Store | Epilogue::Add => 1,
            Epilogue::SiluMul => 2,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Epilogue::Store => "store",
            Epilogue::Add => "add",
            Epilogue::SiluMul => "silu",
        }
    }
}

/// How a [`Matmul`] is written; never what it computes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MatmulTuning {
    /// Row tiles computed together, sharing each broadcast activation: a power of two. 1 makes `SiluMul` compute gate and up
    /// one after the other.
    pub tiles: usize,
    /// Steps of K written out in one iteration: columns for float formats, blocks of 128 for quantized ones.
    pub unroll: usize,
    /// Bytes ahead of the weights being read that are prefetched; `None` leaves it to the CPU.
    pub prefetch: Option<usize>,
}

impl MatmulTuning {
    /// One row tile at a time.
    pub const fn plain(format: Format) -> MatmulTuning {
        match format.is_quantized() {
            true => MatmulTuning { tiles: 1, unroll: 1, prefetch: None },
            false => MatmulTuning { tiles: 1, unroll: 8, prefetch: None },
        }
    }
}

/// `y[t][16u + l] (op)= Σ_k w[16u + l, k] × x[t, k]` for `units` consecutive units `u` and `tokens` tokens `t`.
///
/// Parameters: `w` — address of the first unit's first tile, 64-byte aligned, laid out as [`Format`] says; `x` — address of
/// token 0's activation row: f32 `[k]` for float formats, a [`QuantizedRow`] for quantized ones; `y` — address of 16 f32 for
/// unit 0 and token 0; `units` — a count ≥ 0; with `gather` also `rows` — address of u32 `[tokens]`. Token `t` reads its row
/// at `x + t × x_stride`, or at `x + rows[t] × x_stride`; it writes unit `u` at `y + t × y_stride + 64 u` bytes. `y` overlaps
/// neither `w` nor `x`. Rows of `x` need only f32 (quantized: 64-byte) alignment.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Matmul {
    /// The weight's format.
    pub format: Format,
    /// Columns of the weight.
    pub k: usize,
    /// Activation rows, 1 ..= [`MAX_TOKENS`].
    pub tokens: usize,
    /// What becomes of the sums.
    pub epilogue: Epilogue,
    /// Whether activation rows are chosen by index.
    pub gather: bool,
    /// Bytes between activation rows.
    pub x_stride: usize,
    /// Bytes between output rows.
    pub y_stride: usize,
    /// The values + 128 of `q4`'s codes; ignored by the other formats. One for the whole model: it is not part of the name.
    pub codebook: [u8; 16],
    /// How it is written.
    pub tuning: MatmulTuning,
}

impl Matmul {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let Matmul { format, k, tokens, x_stride, y_stride, tuning, .. } = self;
        let gather = if self.gather { "_gather" } else { "" };
        let mut name = format!("matmul_{format}_k{k}_t{tokens}_{}{gather}", self.epilogue.name());
        if *tokens > 1 || self.gather {
            name += &format!("_x{x_stride}_y{y_stride}");
        }
        if *tuning != MatmulTuning::plain(*format) {
            let prefetch = tuning.prefetch.map_or(String::new(), |n| format!("_p{n}"));
            name += &format!("_r{}_u{}{prefetch}", tuning.tiles, tuning.unroll);
        }
        name
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        if self.gather { &["w", "x", "y", "units", "rows"] } else { &["w", "x", "y", "units"] }
    }

    /// Bytes of one unit's weights.
    pub fn unit_bytes(&self) -> usize {
        self.epilogue.tiles() * self.format.tile_bytes(self.k)
    }

    /// The code.
    pub fn generate(&self) -> Function {
        assert!((1..=MAX_TOKENS).contains(&self.tokens), "{}: 1 to {MAX_TOKENS} tokens", self.name());
        assert!(self.tuning.tiles.is_power_of_two() && self.tuning.unroll > 0, "{}: tuning", self.name());
        let (mut builder, w, x, y, units, rows) = if self.gather {
            let (b, [w, x, y, units, rows]) = Builder::new(self.name(), ["w", "x", "y", "units", "rows"]);
            (b, w, x, y, units, Some(rows))
        } else {
            let (b, [w, x, y, units]) = Builder::new(self.name(), ["w", "x", "y", "units"]);
            (b, w, x, y, units, None)
        };
        let b = &mut builder;
        let rows = self.rows(b, x, rows);
        let together = (self.tuning.tiles / self.epilogue.tiles()).max(1);
        let start = b.int(0);
        let (main_end, w, y) = if together > 1 {
            let mask = b.int(-(together as i64));
            let main_end = b.binary(moec_ir::tile::Binary::And, units, mask);
            let [w, y] = self.unit_loop(b, &rows, [start, main_end, w, y], together);
            (main_end, w, y)
        } else {
            (start, w, y)
        };
        self.unit_loop(b, &rows, [main_end, units, w, y], 1);
        builder.finish()
    }

    /// The activation rows: a base address and a constant offset for each token.
    fn rows(&self, b: &mut Builder, x: Value, rows: Option<Value>) -> Vec<(Value, i64)> {
        (0..self.tokens)
            .map(|t| match rows {
                None => (x, (t * self.x_stride) as i64),
                Some(rows) => {
                    let row = b.load_u32(rows, 4 * t as i64);
                    let offset = b.mul_int(row, self.x_stride as i64);
                    (b.add(x, offset), 0)
                }
            })
            .collect()
    }

    /// Units `start .. end`, `together` at a time; returns where the weights and outputs after them lie.
    fn unit_loop(
        &self,
        b: &mut Builder,
        rows: &[(Value, i64)],
        [start, end, w, y]: [Value; 4],
        together: usize,
    ) -> [Value; 2] {
        let after = b.for_loop(start, end, together as i64, &[w, y], |b, _, carried| {
            let (w, y) = (carried[0], carried[1]);
            self.units(b, rows, w, y, together);
            vec![b.add_int(w, (together * self.unit_bytes()) as i64), b.add_int(y, together as i64 * VECTOR)]
        });
        [after[0], after[1]]
    }

    fn units(&self, b: &mut Builder, rows: &[(Value, i64)], w: Value, y: Value, together: usize) {
        let tiles = together * self.epilogue.tiles();
        let step = tiles.min(self.tuning.tiles);
        let mut sums = Vec::with_capacity(tiles);
        for first in (0..tiles).step_by(step) {
            let w = b.add_int(w, (first * self.format.tile_bytes(self.k)) as i64);
            sums.extend(self.tiles(b, rows, w, step));
        }
        for (unit, sums) in sums.chunks(self.epilogue.tiles()).enumerate() {
            for (t, &first) in sums[0].iter().enumerate() {
                let at = unit as i64 * VECTOR + (t * self.y_stride) as i64;
                let out = match self.epilogue {
                    Epilogue::Store => first,
                    Epilogue::Add => {
                        let old = load_f32(b, y, at);
                        b.add(old, first)
                    }
                    Epilogue::SiluMul => {
                        let gate = build_silu(b, first);
                        b.mul(gate, sums[1][t])
                    }
                };
                store_f32(b, out, y, at);
            }
        }
    }

    /// The sums of `tiles` consecutive row tiles at `w`: `[tile][token]`.
    fn tiles(&self, b: &mut Builder, rows: &[(Value, i64)], w: Value, tiles: usize) -> Vec<Vec<Value>> {
        let accumulators = (0..tiles * self.tokens).map(|_| zeros(b)).collect();
        let flat = match widening(self.format) {
            Some(memory) => self.float_sums(b, memory, rows, w, accumulators),
            None => self.quantized_sums(b, rows, w, accumulators),
        };
        flat.chunks(self.tokens).map(<[Value]>::to_vec).collect()
    }

    fn float_sums(
        &self,
        b: &mut Builder,
        memory: Memory,
        rows: &[(Value, i64)],
        w: Value,
        acc: Vec<Value>,
    ) -> Vec<Value> {
        let unroll = self.tuning.unroll;
        let column = (LANES * memory.bytes()) as i64;
        let mut cursor = Cursor::new(b, rows, [4]);
        let steps = |b: &mut Builder, cursor: &Cursor<1>, w: Value, mut acc: Vec<Value>, count: usize| {
            self.prefetch(b, w, 0, count * column as usize);
            let x: Vec<_> = (0..self.tokens).map(|t| cursor.address(b, rows, 0, t)).collect();
            for k in 0..count as i64 {
                let broadcast: Vec<_> =
                    x.iter().map(|&(base, offset)| b.load_splat(Memory::F32, base, offset + 4 * k)).collect();
                for (tile, acc) in acc.chunks_mut(self.tokens).enumerate() {
                    let at = (tile * self.format.tile_bytes(self.k)) as i64 + k * column;
                    let weights = b.load(memory, w, at);
                    for (acc, &x) in acc.iter_mut().zip(&broadcast) {
                        *acc = b.fma(weights, x, *acc);
                    }
                }
            }
            acc
        };
        let (full, rest) = (self.k / unroll, self.k % unroll);
        let (w, acc) = self.walk(b, &mut cursor, full, (unroll, unroll as i64 * column), w, acc, steps);
        if rest == 0 { acc } else { steps(b, &cursor, w, acc, rest) }
    }

    fn quantized_sums(&self, b: &mut Builder, rows: &[(Value, i64)], w: Value, acc: Vec<Value>) -> Vec<Value> {
        let unroll = self.tuning.unroll;
        let blocks = self.k.div_ceil(BLOCK);
        let per_group = GROUP / BLOCK;
        let (groups, rest) = (blocks / per_group, blocks % per_group);
        let mut cursor = Cursor::new(b, rows, [GROUP as i64, 4 * (GROUP / SPAN) as i64, 4 * per_group as i64]);
        let steps = |b: &mut Builder, cursor: &Cursor<3>, w: Value, mut acc: Vec<Value>, count: usize| {
            for group in 0..count {
                acc = self.group(b, cursor, rows, (w, group), acc, per_group);
            }
            acc
        };
        let bytes = self.format.group_bytes(per_group) as i64;
        let (w, mut acc) = self.walk(b, &mut cursor, groups / unroll, (unroll, unroll as i64 * bytes), w, acc, steps);
        let left = groups % unroll;
        acc = steps(b, &cursor, w, acc, left);
        if rest == 0 { acc } else { self.group(b, &cursor, rows, (w, left), acc, rest) }
    }

    /// A loop of `count` iterations of `per` steps and `bytes` of weights; moves the cursor and returns where the weights
    /// after them lie, and the accumulators.
    #[allow(clippy::too_many_arguments)]
    fn walk<const S: usize>(
        &self,
        b: &mut Builder,
        cursor: &mut Cursor<S>,
        count: usize,
        (per, bytes): (usize, i64),
        w: Value,
        acc: Vec<Value>,
        steps: impl Fn(&mut Builder, &Cursor<S>, Value, Vec<Value>, usize) -> Vec<Value>,
    ) -> (Value, Vec<Value>) {
        let mut carried = vec![w];
        carried.extend(cursor.streams);
        carried.extend(acc);
        let after = counted(b, count, carried, |b, carried| {
            let (w, acc) = (carried[0], carried[1 + S..].to_vec());
            let here = cursor.at(&carried[1..1 + S]);
            let acc = steps(b, &here, w, acc, per);
            let mut next = vec![b.add_int(w, bytes)];
            next.extend(here.advance(b, per as i64));
            next.extend(acc);
            next
        });
        *cursor = cursor.at(&after[1..1 + S]);
        (after[0], after[1 + S..].to_vec())
    }

    /// `blocks` weight blocks whose scales lie together, the `group`-th such group after `w` and the cursor.
    fn group(
        &self,
        b: &mut Builder,
        cursor: &Cursor<3>,
        rows: &[(Value, i64)],
        (w, group): (Value, usize),
        mut acc: Vec<Value>,
        blocks: usize,
    ) -> Vec<Value> {
        let row = QuantizedRow::new(self.k);
        let tile_bytes = self.format.tile_bytes(self.k) as i64;
        let first = (group * self.format.group_bytes(GROUP / BLOCK)) as i64;
        self.prefetch(b, w, first as usize, self.format.group_bytes(blocks));
        let streams = [0, row.scales(), row.sums()];
        let address = |b: &mut Builder, stream: usize, t: usize| {
            let (base, offset) = cursor.address(b, rows, stream, t);
            (base, offset + streams[stream] as i64 + cursor.steps[stream] * group as i64)
        };
        let codes: Vec<_> = (0..self.tokens).map(|t| address(b, 0, t)).collect();
        let scales: Vec<_> = (0..self.tokens).map(|t| address(b, 1, t)).collect();
        let sums: Vec<_> = (0..self.tokens).map(|t| address(b, 2, t)).collect();
        let mut partial: Vec<Value> = acc.iter().map(|_| zeros(b)).collect();
        for block in 0..blocks {
            let at = first + (scale_bytes(blocks) + block * self.format.block_bytes()) as i64;
            let mut dots: Vec<Value> = Vec::with_capacity(acc.len());
            for _ in 0..acc.len() / self.tokens {
                dots.extend(
                    sums.iter().map(|&(base, offset)| b.load_splat(Memory::I32, base, offset + 4 * block as i64)),
                );
            }
            let broadcast = |b: &mut Builder, k: usize| -> Vec<Value> {
                let k = (block * BLOCK + k) as i64;
                codes.iter().map(|&(base, offset)| b.load_splat_bytes(base, offset + k)).collect()
            };
            for v in 0..self.format.block_bytes() / 64 {
                let x: Vec<Vec<Value>> = match self.format {
                    Format::Q4 => vec![broadcast(b, 4 * v), broadcast(b, BLOCK / 2 + 4 * v)],
                    _ => vec![broadcast(b, 4 * v)],
                };
                for (tile, dots) in dots.chunks_mut(self.tokens).enumerate() {
                    let raw = b.load_bytes(w, at + tile as i64 * tile_bytes + 64 * v as i64);
                    for (part, x) in x.iter().enumerate() {
                        let weights = self.codes(b, raw, part);
                        for (dot, &x) in dots.iter_mut().zip(x) {
                            *dot = b.dot_u8s8(*dot, weights, x);
                        }
                    }
                }
            }
            for tile in 0..acc.len() / self.tokens {
                let at = first + tile as i64 * tile_bytes + (block * LANES * 2) as i64;
                let scale = b.load(Memory::Bf16, w, at);
                for i in tile * self.tokens..(tile + 1) * self.tokens {
                    let dot = b.int_to_float(dots[i]);
                    partial[i] = b.fma(dot, scale, partial[i]);
                }
            }
            let elements = (block + 1) * BLOCK;
            if elements.is_multiple_of(SPAN) || block + 1 == blocks {
                let span = (elements - 1) / SPAN;
                for (i, acc) in acc.iter_mut().enumerate() {
                    let (base, offset) = scales[i % self.tokens];
                    let scale = b.load_splat(Memory::F32, base, offset + 4 * span as i64);
                    *acc = b.fma(partial[i], scale, *acc);
                    partial[i] = zeros(b);
                }
            }
        }
        acc
    }

    /// The unsigned bytes of part `part` of a vector of codes.
    fn codes(&self, b: &mut Builder, raw: Value, part: usize) -> Value {
        if self.format != Format::Q4 {
            return raw;
        }
        let nibbles = if part == 0 { b.nibble_low(raw) } else { b.nibble_high(raw) };
        b.lookup(self.codebook, nibbles)
    }

    fn prefetch(&self, b: &mut Builder, w: Value, first: usize, bytes: usize) {
        if let Some(ahead) = self.tuning.prefetch {
            for line in (first..first + bytes).step_by(64) {
                b.prefetch(w, (ahead + line) as i64);
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
        Format::Q8 | Format::Q4 => None,
    }
}

/// Where the K loop stands in the activation rows: one position for each of `S` streams that advance at different speeds.
///
/// When all rows have the same base, a position is an address; otherwise an offset that is added to each row's base (and
/// that lowerings fold into the addressing mode).
struct Cursor<const S: usize> {
    streams: [Value; S],
    steps: [i64; S],
    shared: bool,
}

impl<const S: usize> Cursor<S> {
    /// The start of the rows; stream `s` advances by `steps[s]` bytes.
    fn new(b: &mut Builder, rows: &[(Value, i64)], steps: [i64; S]) -> Cursor<S> {
        let shared = rows.iter().all(|r| r.0 == rows[0].0);
        let streams = if shared { [rows[0].0; S] } else { [b.int(0); S] };
        Cursor { streams, steps, shared }
    }

    fn at(&self, streams: &[Value]) -> Cursor<S> {
        Cursor { streams: std::array::from_fn(|s| streams[s]), ..*self }
    }

    fn advance(&self, b: &mut Builder, count: i64) -> [Value; S] {
        std::array::from_fn(|s| b.add_int(self.streams[s], self.steps[s] * count))
    }

    fn address(&self, b: &mut Builder, rows: &[(Value, i64)], stream: usize, token: usize) -> (Value, i64) {
        let (base, offset) = rows[token];
        if self.shared { (self.streams[stream], offset) } else { (b.add(base, self.streams[stream]), offset) }
    }
}
