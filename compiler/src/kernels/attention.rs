//! Attention of one token: the query heads that share a KV head, against the keys and values in the pages.
//!
//! One pass over the pages, with the running maximum, sum and weighted values of the online softmax (Milakov and Gimelshein,
//! 2018). A page of 64 keys is reduced by itself, and the pages' results are combined in order; so the bits do not depend on
//! how many tokens a step has. Lanes are keys for the scores and dimensions for the values. While a page is worked on, the next one
//! is prefetched: pages lie apart, and what follows one is not what is read next. Deliberately absent: several tokens at once, and finding the pages (the caller passes the page table and the offsets of layer and head).

use moec_abi::{LANES, PAGE_TOKENS, padded_head_dim, round_up};
use moec_ir::math::{build_exp, build_soft_cap};
use moec_ir::tile::{Compare, Function, Memory, Reduce, Shift, Value, build::Builder};

use super::KvFormat;
use super::common::{VECTOR, counted, lane_numbers, load_f32, prefetch, store_f32, zeros};

/// What stands for −∞: below every score.
const LOWEST: f32 = -3.0e38;

/// Query heads whose scores or sums are held in registers together.
const HEADS_TOGETHER: usize = 4;

/// Vectors of a value that are summed together.
const VALUES_TOGETHER: usize = 2;

/// Tiles of keys whose scores are computed together, sharing each element of the queries.
const TILES_TOGETHER: usize = 2;

/// Dimensions of the scores' sum that are written out in one iteration.
const SCORES_UNROLL: usize = 8;

/// Log2 of the keys in a page, and of those in tiles that are taken together.
const PAGE_SHIFT: u8 = PAGE_TOKENS.trailing_zeros() as u8;
const TILES_SHIFT: u8 = (TILES_TOGETHER * LANES).trailing_zeros() as u8;

/// `out[g] = Σ_key softmax(q[g] · k[key]) × v[key]` over keys `lo ≤ key < hi`, for `group` query heads `g`. With a cap the products are soft-capped
/// before the softmax.
///
/// Parameters: `q` — f32 `[group][D]`, rotated and scaled padded heads; `pages` — address of the sequence's page table, an array
/// of page addresses, of which entries `lo / 64 ..= (hi − 1) / 64` are read; `k_offset`, `v_offset` — bytes from a page's
/// start to this layer's and KV head's keys `[4][D][16]` and values `[64][D]`; `lo`, `hi` — the visible positions, `lo < hi`; `out` — f32
/// `[group][D]`, written; `scratch` — [`Attention::scratch_bytes`], 64-byte aligned, for this call alone. Nothing written
/// overlaps anything.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Attention {
    /// Elements of a head.
    pub head_dim: usize,
    /// Query heads of the KV head.
    pub group: usize,
    /// Element type of the pages.
    pub kv: KvFormat,
    /// What scores are soft-capped with, as the bits of an f32.
    pub cap_bits: Option<u32>,
}

/// Where the arrays lie in scratch, in bytes.
struct Scratch {
    /// Scores, then their exponentials: f32 `[group][64]`.
    scores: i64,
    /// Each f32 `[group padded to 16]`: the page's maximum and sum, the running maximum and sum, and the two factors.
    page_max: i64,
    page_sum: i64,
    max: i64,
    sum: i64,
    old_factor: i64,
    new_factor: i64,
    bytes: usize,
}

impl Scratch {
    fn new(group: usize) -> Scratch {
        let array = 4 * round_up(group, LANES);
        let scores = 4 * PAGE_TOKENS * group;
        let at = |i: usize| (scores + i * array) as i64;
        Scratch {
            scores: 0,
            page_max: at(0),
            page_sum: at(1),
            max: at(2),
            sum: at(3),
            old_factor: at(4),
            new_factor: at(5),
            bytes: scores + 6 * array,
        }
    }
}

/// What is the same for every page: the parameters.
#[derive(Clone, Copy)]
struct Inputs {
    q: Value,
    lo: Value,
    hi: Value,
    out: Value,
    scratch: Value,
}

/// One page and the keys in it that are visible.
#[derive(Clone, Copy)]
struct Page {
    keys: Value,
    values: Value,
    from: Value,
    to: Value,
    /// Bytes from this page to the next one; 0 in the last one.
    next: Value,
}

impl Attention {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let cap = self.cap_bits.map_or(String::new(), |bits| format!("_cap{bits:08x}"));
        format!("attention_d{}_g{}_{}{cap}", self.head_dim, self.group, self.kv)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["q", "pages", "k_offset", "v_offset", "lo", "hi", "out", "scratch"]
    }

    /// Bytes of scratch memory that one call needs.
    pub fn scratch_bytes(&self) -> usize {
        Scratch::new(self.group).bytes
    }

    /// Padded elements of a head.
    const fn padded(&self) -> usize {
        padded_head_dim(self.head_dim)
    }

    /// Bytes of one padded head in f32.
    const fn head_bytes(&self) -> i64 {
        4 * self.padded() as i64
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [q, pages, k_offset, v_offset, lo, hi, out, scratch]) =
            Builder::new(self.name(), ["q", "pages", "k_offset", "v_offset", "lo", "hi", "out", "scratch"]);
        let b = &mut builder;
        let inputs = Inputs { q, lo, hi, out, scratch };
        self.start(b, inputs);
        let first = b.shift(Shift::RightUnsigned, lo, PAGE_SHIFT);
        let end = b.add_int(hi, PAGE_TOKENS as i64 - 1);
        let end = b.shift(Shift::RightUnsigned, end, PAGE_SHIFT);
        let skipped = b.mul_int(first, 8);
        let entry = b.add(pages, skipped);
        b.for_loop(first, end, 1, &[entry], |b, p, carried| {
            let page = b.load_int(carried[0], 0);
            let next = self.next_page(b, carried[0], p, end);
            let next = b.sub(next, page);
            let base = b.shift(Shift::Left, p, PAGE_SHIFT);
            let (zero, all) = (b.int(0), b.int(PAGE_TOKENS as i64));
            let from = b.sub(inputs.lo, base);
            let from = b.max(from, zero);
            let to = b.sub(inputs.hi, base);
            let to = b.min(to, all);
            let page = Page { keys: b.add(page, k_offset), values: b.add(page, v_offset), from, to, next };
            self.scores(b, inputs, page);
            self.exponentials(b, inputs);
            self.combine(b, inputs);
            self.values(b, inputs, page);
            vec![b.add_int(carried[0], 8)]
        });
        self.finish(b, inputs);
        builder.finish()
    }

    /// The address of the page after page `p` of `.. end`, whose entry in the table is at `entry`; that of the last one is its own.
    fn next_page(&self, b: &mut Builder, entry: Value, p: Value, end: Value) -> Value {
        let (one, left) = (b.int(1), b.sub(end, p));
        let left = b.sub(left, one);
        let step = b.min(left, one);
        let step = b.mul_int(step, 8);
        let entry = b.add(entry, step);
        b.load_int(entry, 0)
    }

    fn scratch(&self) -> Scratch {
        Scratch::new(self.group)
    }

    /// Vectors of an array with an element for each head.
    const fn head_vectors(&self) -> i64 {
        self.group.div_ceil(LANES) as i64
    }

    /// Calls `body` for the heads, [`HEADS_TOGETHER`] at a time, with pointers that advance by `steps` bytes for each head.
    fn each_heads<const P: usize>(
        &self,
        b: &mut Builder,
        pointers: [Value; P],
        steps: [i64; P],
        body: impl Fn(&mut Builder, [Value; P], usize),
    ) {
        let after = counted(b, self.group / HEADS_TOGETHER, pointers.to_vec(), |b, at| {
            body(b, std::array::from_fn(|i| at[i]), HEADS_TOGETHER);
            at.iter().zip(steps).map(|(&p, step)| b.add_int(p, step * HEADS_TOGETHER as i64)).collect()
        });
        let rest = self.group % HEADS_TOGETHER;
        if rest > 0 {
            body(b, std::array::from_fn(|i| after[i]), rest);
        }
    }

    /// No keys yet: the running maximum, sum and values are such that combining a page with them gives the page's.
    fn start(&self, b: &mut Builder, inputs: Inputs) {
        let at = self.scratch();
        let (lowest, zero) = (b.splat_f32(LOWEST), zeros(b));
        for i in 0..self.head_vectors() {
            store_f32(b, lowest, inputs.scratch, at.max + i * VECTOR);
            for array in [at.sum, at.page_max, at.page_sum] {
                store_f32(b, zero, inputs.scratch, array + i * VECTOR);
            }
        }
        counted(b, self.group * self.padded() / LANES, vec![inputs.out], |b, carried| {
            // −0 × 0 + a is a, whatever a's sign.
            let none = b.splat_f32(-0.0);
            store_f32(b, none, carried[0], 0);
            vec![b.add_int(carried[0], VECTOR)]
        });
    }

    /// The scores of the page's keys; invisible ones get [`LOWEST`].
    fn scores(&self, b: &mut Builder, inputs: Inputs, page: Page) {
        let row = 4 * PAGE_TOKENS as i64;
        let dim = (LANES * self.kv.bytes()) as i64;
        counted(b, self.group, vec![inputs.scratch], |b, carried| {
            let lowest = b.splat_f32(LOWEST);
            for tile in 0..row / VECTOR {
                store_f32(b, lowest, carried[0], self.scratch().scores + tile * VECTOR);
            }
            vec![b.add_int(carried[0], row)]
        });
        let tile_bytes = self.padded() as i64 * dim;
        let first = b.shift(Shift::RightUnsigned, page.from, TILES_SHIFT);
        let end = b.add_int(page.to, (TILES_TOGETHER * LANES) as i64 - 1);
        let end = b.shift(Shift::RightUnsigned, end, TILES_SHIFT);
        self.each_heads(b, [inputs.q, inputs.scratch], [self.head_bytes(), row], |b, [q, scores], heads| {
            let skipped = b.mul_int(first, TILES_TOGETHER as i64 * tile_bytes);
            let keys = b.add(page.keys, skipped);
            let skipped = b.mul_int(first, TILES_TOGETHER as i64 * VECTOR);
            let scores = b.add(scores, skipped);
            b.for_loop(first, end, 1, &[keys, scores], |b, tiles, carried| {
                let ahead = b.add(carried[0], page.next);
                let mut carried_in = vec![carried[0], ahead, q];
                carried_in.extend((0..TILES_TOGETHER * heads).map(|_| zeros(b)));
                let after = counted(b, self.padded() / SCORES_UNROLL, carried_in, |b, carried| {
                    let (keys, ahead, q, mut sums) = (carried[0], carried[1], carried[2], carried[3..].to_vec());
                    let step = SCORES_UNROLL as i64 * dim;
                    for tile in 0..TILES_TOGETHER as i64 {
                        prefetch(b, ahead, tile * tile_bytes, step);
                    }
                    for d in 0..SCORES_UNROLL as i64 {
                        let k: Vec<Value> = (0..TILES_TOGETHER as i64)
                            .map(|tile| b.load(self.kv.memory(), keys, tile * tile_bytes + d * dim))
                            .collect();
                        for (head, sums) in sums.chunks_mut(TILES_TOGETHER).enumerate() {
                            let q = b.load_splat(Memory::F32, q, head as i64 * self.head_bytes() + 4 * d);
                            for (sum, &k) in sums.iter_mut().zip(&k) {
                                *sum = b.fma(q, k, *sum);
                            }
                        }
                    }
                    let mut next =
                        vec![b.add_int(keys, step), b.add_int(ahead, step), b.add_int(q, 4 * SCORES_UNROLL as i64)];
                    next.extend(sums);
                    next
                });
                let key = b.shift(Shift::Left, tiles, TILES_SHIFT);
                let from = b.sub(page.from, key);
                let from = b.splat(from);
                let to = b.sub(page.to, key);
                let to = b.splat(to);
                let lowest = b.splat_f32(LOWEST);
                for tile in 0..TILES_TOGETHER {
                    let lane = lane_numbers(b, (tile * LANES) as i32);
                    let started = b.compare(Compare::GreaterEqual, lane, from);
                    let ended = b.compare(Compare::GreaterEqual, lane, to);
                    for (head, sums) in after[3..].chunks(TILES_TOGETHER).enumerate() {
                        let s = match self.cap_bits {
                            Some(bits) => build_soft_cap(b, sums[tile], f32::from_bits(bits)),
                            None => sums[tile],
                        };
                        let s = b.select(started, s, lowest);
                        let s = b.select(ended, lowest, s);
                        let at = self.scratch().scores + head as i64 * row + tile as i64 * VECTOR;
                        store_f32(b, s, carried[1], at);
                    }
                }
                let together = TILES_TOGETHER as i64;
                vec![b.add_int(carried[0], together * tile_bytes), b.add_int(carried[1], together * VECTOR)]
            });
        });
    }

    /// Each head's maximum over the page, the scores' exponentials relative to it (0 for invisible keys), and their sum.
    fn exponentials(&self, b: &mut Builder, inputs: Inputs) {
        let at = self.scratch();
        let tiles = (PAGE_TOKENS / LANES) as i64;
        counted(b, self.group, vec![inputs.scratch, inputs.scratch], |b, carried| {
            let (scores, arrays) = (carried[0], carried[1]);
            let s: Vec<Value> = (0..tiles).map(|t| load_f32(b, scores, at.scores + t * VECTOR)).collect();
            let largest = s.iter().copied().reduce(|m, s| b.max(m, s)).expect("a page has keys");
            let largest = b.reduce(Reduce::Max, largest);
            b.store_scalar(Memory::F32, largest, arrays, at.page_max);
            let largest = b.splat(largest);
            let mut sum = None;
            for (t, s) in s.into_iter().enumerate() {
                let below = b.sub(s, largest);
                let e = build_exp(b, below);
                store_f32(b, e, scores, at.scores + t as i64 * VECTOR);
                sum = Some(match sum {
                    None => e,
                    Some(sum) => b.add(sum, e),
                });
            }
            let sum = b.reduce(Reduce::Add, sum.expect("a page has keys"));
            b.store_scalar(Memory::F32, sum, arrays, at.page_sum);
            vec![b.add_int(scores, tiles * VECTOR), b.add_int(arrays, 4)]
        });
    }

    /// The running maximum and sum with the page's, and the factors for the values; heads are the lanes.
    fn combine(&self, b: &mut Builder, inputs: Inputs) {
        let at = self.scratch();
        for i in 0..self.head_vectors() {
            let i = i * VECTOR;
            let scratch = inputs.scratch;
            let (old_max, page_max) = (load_f32(b, scratch, at.max + i), load_f32(b, scratch, at.page_max + i));
            let max = b.max(old_max, page_max);
            store_f32(b, max, scratch, at.max + i);
            let old = b.sub(old_max, max);
            let old = build_exp(b, old);
            store_f32(b, old, scratch, at.old_factor + i);
            let new = b.sub(page_max, max);
            let new = build_exp(b, new);
            store_f32(b, new, scratch, at.new_factor + i);
            let (old_sum, page_sum) = (load_f32(b, scratch, at.sum + i), load_f32(b, scratch, at.page_sum + i));
            let kept = b.mul(old_sum, old);
            let sum = b.fma(page_sum, new, kept);
            store_f32(b, sum, scratch, at.sum + i);
        }
    }

    /// Adds the page's weighted values to the running ones.
    fn values(&self, b: &mut Builder, inputs: Inputs, page: Page) {
        let at = self.scratch();
        let row = 4 * PAGE_TOKENS as i64;
        let key_bytes = (self.padded() * self.kv.bytes()) as i64;
        let vector = (LANES * self.kv.bytes()) as i64;
        let skipped = b.mul_int(page.from, key_bytes);
        let values = b.add(page.values, skipped);
        let skipped = b.mul_int(page.from, 4);
        let weights = b.add(inputs.scratch, skipped);
        let pointers = [weights, inputs.out, inputs.scratch];
        self.each_heads(b, pointers, [row, self.head_bytes(), 4], |b, [weights, out, arrays], heads| {
            let vectors = self.padded() / LANES;
            counted(b, vectors / VALUES_TOGETHER, vec![values, out], |b, carried| {
                let (values, out) = (carried[0], carried[1]);
                let ahead = b.add(values, page.next);
                let mut initial = vec![values, ahead, weights];
                initial.extend((0..heads * VALUES_TOGETHER).map(|_| zeros(b)));
                let after = b.for_loop(page.from, page.to, 1, &initial, |b, _, carried| {
                    let (value, ahead, weight, mut sums) = (carried[0], carried[1], carried[2], carried[3..].to_vec());
                    prefetch(b, ahead, 0, VALUES_TOGETHER as i64 * vector);
                    let v: Vec<Value> =
                        (0..VALUES_TOGETHER as i64).map(|i| b.load(self.kv.memory(), value, i * vector)).collect();
                    for (head, sums) in sums.chunks_mut(VALUES_TOGETHER).enumerate() {
                        let e = b.load_splat(Memory::F32, weight, at.scores + head as i64 * row);
                        for (sum, &v) in sums.iter_mut().zip(&v) {
                            *sum = b.fma(e, v, *sum);
                        }
                    }
                    let mut next = vec![b.add_int(value, key_bytes), b.add_int(ahead, key_bytes), b.add_int(weight, 4)];
                    next.extend(sums);
                    next
                });
                for (head, sums) in after[3..].chunks(VALUES_TOGETHER).enumerate() {
                    let old = b.load_splat(Memory::F32, arrays, at.old_factor + 4 * head as i64);
                    let new = b.load_splat(Memory::F32, arrays, at.new_factor + 4 * head as i64);
                    for (i, &sum) in sums.iter().enumerate() {
                        let to = head as i64 * self.head_bytes() + i as i64 * VECTOR;
                        let kept = load_f32(b, out, to);
                        let kept = b.mul(kept, old);
                        let sum = b.fma(sum, new, kept);
                        store_f32(b, sum, out, to);
                    }
                }
                let together = VALUES_TOGETHER as i64;
                vec![b.add_int(values, together * vector), b.add_int(out, together * VECTOR)]
            });
        });
    }

    /// The running values divided by the sum: multiplied by its reciprocal.
    fn finish(&self, b: &mut Builder, inputs: Inputs) {
        let at = self.scratch();
        for i in 0..self.head_vectors() {
            let sum = load_f32(b, inputs.scratch, at.sum + i * VECTOR);
            let one = b.splat_f32(1.0);
            let reciprocal = b.div(one, sum);
            store_f32(b, reciprocal, inputs.scratch, at.new_factor + i * VECTOR);
        }
        counted(b, self.group, vec![inputs.out, inputs.scratch], |b, carried| {
            for i in 0..(self.padded() / LANES) as i64 {
                let factor = b.load_splat(Memory::F32, carried[1], at.new_factor);
                let v = load_f32(b, carried[0], i * VECTOR);
                let v = b.mul(v, factor);
                store_f32(b, v, carried[0], i * VECTOR);
            }
            vec![b.add_int(carried[0], self.head_bytes()), b.add_int(carried[1], 4)]
        });
    }
}
