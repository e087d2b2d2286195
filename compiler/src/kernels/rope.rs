//! Rotary position embedding, and storing keys and values in a KV page.
//!
//! Heads are padded: `D = padded_head_dim(head_dim)`, the first half of the elements at `[0, head_dim / 2)` and the second at
//! `[D / 2, D / 2 + head_dim / 2)`, zeros elsewhere; so the two elements of a rotated pair are the same lane of two vectors.
//! Deliberately absent: the angles — tables of cosines and sines are computed at build time.

use moec_abi::{LANES, padded_head_dim};
use moec_ir::tile::{Function, Memory, Value, build::Builder};

use super::KvFormat;
use super::common::{VECTOR, load_f32, store_f32};

/// Vectors of half a padded head.
const fn half_vectors(head_dim: usize) -> usize {
    padded_head_dim(head_dim) / 2 / LANES
}

/// The rotated `i`-th vectors of both halves: `(lo × cos − hi × sin, hi × cos + lo × sin)`.
fn rotate(b: &mut Builder, head_dim: usize, [x, cos, sin]: [Value; 3], i: usize) -> [Value; 2] {
    let at = i as i64 * VECTOR;
    let half = half_vectors(head_dim) as i64 * VECTOR;
    let (lo, hi) = (load_f32(b, x, at), load_f32(b, x, half + at));
    let (c, s) = (load_f32(b, cos, at), load_f32(b, sin, at));
    let (lo_c, hi_s) = (b.mul(lo, c), b.mul(hi, s));
    let (hi_c, lo_s) = (b.mul(hi, c), b.mul(lo, s));
    [b.sub(lo_c, hi_s), b.add(hi_c, lo_s)]
}

/// Rotates `heads` consecutive heads in place, then multiplies them by a scale if there is one.
///
/// Parameters: `x` — f32 `[heads][D]`, padded heads; `cos`, `sin` — f32 rows of the tables for this position,
/// `[D / 2]`, zero beyond `head_dim / 2`; `heads` — a count ≥ 0. `x` overlaps neither table. 4-byte alignment.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Rope {
    /// Elements of a head, even.
    pub head_dim: usize,
    /// Bits of the f32 by which the result is multiplied; `None`: no multiplication.
    pub scale_bits: Option<u32>,
}

impl Rope {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let scale = self.scale_bits.map_or(String::new(), |s| format!("_scale{s:08x}"));
        format!("rope_d{}{scale}", self.head_dim)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["x", "cos", "sin", "heads"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [x, cos, sin, heads]) = Builder::new(self.name(), ["x", "cos", "sin", "heads"]);
        let b = &mut builder;
        let head = padded_head_dim(self.head_dim) as i64 * 4;
        let start = b.int(0);
        b.for_loop(start, heads, 1, &[x], |b, _, at| {
            let x = at[0];
            for i in 0..half_vectors(self.head_dim) {
                let rotated = rotate(b, self.head_dim, [x, cos, sin], i);
                for (half, mut v) in rotated.into_iter().enumerate() {
                    if let Some(bits) = self.scale_bits {
                        let scale = b.splat_f32(f32::from_bits(bits));
                        v = b.mul(v, scale);
                    }
                    store_f32(b, v, x, half as i64 * head / 2 + i as i64 * VECTOR);
                }
            }
            vec![b.add_int(x, head)]
        });
        builder.finish()
    }
}

/// Stores one key head in its column of a KV page's key tile `[D][16]`, rotated first if asked.
///
/// Parameters: `x` — f32 `[D]`, a padded head; `cos`, `sin` — as for [`Rope`], ignored without `rotate`; `dst` — address of
/// dimension 0 of the key: the page's keys of this KV head + the tile of `position % 64 / 16` + lane `position % 16`.
/// Dimension `d` is written at `dst + 16 d` elements. `x` is not changed and does not overlap the page.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreKey {
    /// Elements of a head, even when rotated.
    pub head_dim: usize,
    /// Element type of the page.
    pub kv: KvFormat,
    /// Whether the head is rotated.
    pub rotate: bool,
}

impl StoreKey {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let rotate = if self.rotate { "_rotate" } else { "" };
        format!("store_key_d{}_{}{rotate}", self.head_dim, self.kv)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["x", "cos", "sin", "dst"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [x, cos, sin, dst]) = Builder::new(self.name(), ["x", "cos", "sin", "dst"]);
        let b = &mut builder;
        let half = half_vectors(self.head_dim);
        let stride = (LANES * self.kv.bytes()) as i32;
        for i in 0..half {
            let at = i as i64 * VECTOR;
            let halves = match self.rotate {
                true => rotate(b, self.head_dim, [x, cos, sin], i),
                false => [load_f32(b, x, at), load_f32(b, x, half as i64 * VECTOR + at)],
            };
            for (h, v) in halves.into_iter().enumerate() {
                let first = ((h * half + i) * LANES) as i64 * i64::from(stride);
                b.store_strided(self.kv.memory(), v, dst, first, stride);
            }
        }
        builder.finish()
    }
}

/// Stores one value head in a KV page.
///
/// Parameters: `x` — f32 `[D]`, a padded head; `dst` — address of the `D` consecutive elements of this key in the page's
/// values `[64][D]`. They do not overlap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreValue {
    /// Elements of a head.
    pub head_dim: usize,
    /// Element type of the page.
    pub kv: KvFormat,
}

impl StoreValue {
    /// The kernel's name.
    pub fn name(&self) -> String {
        format!("store_value_d{}_{}", self.head_dim, self.kv)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["x", "dst"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [x, dst]) = Builder::new(self.name(), ["x", "dst"]);
        let b = &mut builder;
        let memory: Memory = self.kv.memory();
        for i in 0..padded_head_dim(self.head_dim) / LANES {
            let v = load_f32(b, x, i as i64 * VECTOR);
            b.store(memory, v, dst, (i * LANES * memory.bytes()) as i64);
        }
        builder.finish()
    }
}
