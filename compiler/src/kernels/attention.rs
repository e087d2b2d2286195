//! Attention: the query heads of a few KV heads, of one token or of several of a sequence, against the keys and values in the pages.
//!
//! One pass over the pages, with the running maximum, sum and weighted values of the online softmax (Milakov and Gimelshein, 2018). A page of 64 keys
//! is reduced by itself, and the pages' results are combined in order; so the bits do not depend on how many tokens a step has. Lanes are keys for
//! the scores and dimensions for the values. Tokens that are taken together share each load of a key or value in the pages that all of them see
//! whole, and go through the pages at the borders one by one. KV heads, which lie beside each other in a page, take turns in each page: so memory is
//! read in long runs. While one is worked on, what comes next is prefetched: the next head of the page, or the first one of the next page, which lies
//! elsewhere. Deliberately absent: tokens of different sequences, and finding the pages (the caller passes the page table and the offset of layer and
//! head).

mod softmax;

use moec_abi::{LANES, PAGE_TOKENS, padded_head_dim};
use moec_ir::math::build_soft_cap;
use moec_ir::tile::{Compare, Function, Memory, Shift, Value, build::Builder};

use super::KvFormat;
use super::common::{VECTOR, counted, lane_numbers, load_f32, prefetch, store_f32, zeros};
use softmax::{LOWEST, Scratch};

/// Rows of queries that go through a page together, if a token has fewer query heads: so often is a page used once it is in the cache.
const ROWS_TOGETHER: usize = 16;

/// Tiles of keys in a page.
const PAGE_TILES: usize = PAGE_TOKENS / LANES;

/// Dimensions of the scores' sum that are written out in one iteration.
const SCORES_UNROLL: usize = 8;

/// Bytes of a row of scores, of which each query head has one.
const SCORES: i64 = 4 * PAGE_TOKENS as i64;

/// Log2 of the keys in a page.
const PAGE_SHIFT: u8 = PAGE_TOKENS.trailing_zeros() as u8;

/// `out[i][h][g] = Σ_key softmax(q[i][h][g] · k[h][key]) × v[h][key]` over keys `max(lo + i, 0) ≤ key < hi + i`, for `group` query heads `g` of each of `heads`
/// KV heads `h`, of tokens `i` at successive positions. With a cap the products are soft-capped before the softmax.
///
/// Parameters: `q` — f32 `[tokens][heads][group][D]`, rotated and scaled padded heads, `q_stride` bytes from token to token; `pages` — address of the
/// sequence's page table, an array of page addresses, of which entries `max(lo, 0) / 64 ..= (hi + tokens − 2) / 64` are read; `offset` — bytes from a page's
/// start to this layer's first KV head of these, of which each has keys `[4][D][16]` and then values `[64][D]`; `heads` — how many, at least 1; `lo`, `hi` —
/// the visible positions, `max(lo + i, 0) < hi + i`; `out` — f32 `[tokens][heads][group][D]`, `out_stride` bytes from token to token, written; `scratch` —
/// `heads` × [`Attention::scratch_bytes`], 64-byte aligned, for this call alone. Nothing written overlaps anything.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Attention {
    /// Elements of a head.
    pub head_dim: usize,
    /// Query heads of each KV head.
    pub group: usize,
    /// Element type of the pages.
    pub kv: KvFormat,
    /// What scores are soft-capped with, as the bits of an f32.
    pub cap_bits: Option<u32>,
    /// Query heads, of one or several tokens, whose scores or sums are held in registers together, at most.
    pub rows: usize,
    /// Vectors of keys or of values for which each of so many rows has scores or sums in registers; fewer rows have more.
    pub vectors: usize,
    /// The tokens of one call, if there are several.
    pub together: Option<Together>,
}

/// Several tokens in one call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Together {
    /// How many: [`Attention::tokens_together`].
    pub tokens: usize,
    /// Bytes from the query heads of one token to those of the next.
    pub q_stride: usize,
    /// Bytes from the results of one token to those of the next.
    pub out_stride: usize,
}

/// What is the same for every page: the parameters.
#[derive(Clone, Copy)]
struct Inputs {
    pages: Value,
    offset: Value,
    heads: Value,
    lo: Value,
    hi: Value,
    /// Past the last page that any token sees.
    end: Value,
}

/// Tokens that meet a page together: where their heads begin, and those of their results and of their scratch.
#[derive(Clone, Copy)]
struct Rows {
    q: Value,
    out: Value,
    scratch: Value,
    /// How many.
    tokens: usize,
}

/// What is held in registers together: so many query heads of so many tokens.
#[derive(Clone, Copy)]
struct Heads {
    tokens: usize,
    heads: usize,
}

impl Heads {
    /// What is best, with `group` query heads for each token and `rows` together: heads of one token first.
    fn of(group: usize, rows: usize) -> Heads {
        let heads = group.min(rows);
        Heads { tokens: rows / heads, heads }
    }

    /// How many rows of scores or sums that is.
    const fn rows(self) -> usize {
        self.tokens * self.heads
    }

    /// Where the rows begin, in order, when tokens and heads lie so many bytes apart.
    fn offsets(self, token: i64, head: i64) -> impl Iterator<Item = i64> {
        (0..self.tokens as i64).flat_map(move |t| (0..self.heads as i64).map(move |h| t * token + h * head))
    }
}

/// What a page has of one KV head.
#[derive(Clone, Copy)]
struct Page {
    keys: Value,
    values: Value,
    /// Bytes from here to what is read next: the next head's, or the first one's in the next page.
    next: Value,
    /// The keys that are visible; all without.
    visible: Option<[Value; 2]>,
}

impl Attention {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let cap = self.cap_bits.map_or(String::new(), |bits| format!("_cap{bits:08x}"));
        let together = self.together.map_or(String::new(), |Together { tokens, q_stride, out_stride }| {
            format!("_t{tokens}_q{q_stride}_y{out_stride}")
        });
        let Attention { head_dim, group, kv, rows, vectors, .. } = self;
        format!("attention_d{head_dim}_g{group}_{kv}_r{rows}_v{vectors}{cap}{together}")
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["q", "pages", "offset", "heads", "lo", "hi", "out", "scratch"]
    }

    /// Tokens that are worth one call, with `group` query heads each of which `rows` are held in registers together; 1 when there is nothing to share.
    pub fn tokens_together(group: usize, rows: usize) -> usize {
        let tile = Heads::of(group, rows).tokens;
        tile * (ROWS_TOGETHER / (tile * group)).max(1)
    }

    /// Tokens of one call.
    pub fn tokens(&self) -> usize {
        self.together.map_or(1, |together| together.tokens)
    }

    /// Bytes of scratch memory that one call needs for each KV head.
    pub fn scratch_bytes(&self) -> usize {
        self.tokens() * self.scratch().bytes
    }

    /// Padded elements of a head.
    const fn padded(&self) -> usize {
        padded_head_dim(self.head_dim)
    }

    /// Bytes of one padded head in f32.
    const fn head_bytes(&self) -> i64 {
        4 * self.padded() as i64
    }

    /// Bytes from one token to the next of the queries, the results and the scratch.
    fn token_steps(&self) -> [i64; 3] {
        let [q, out] = self.together.map_or([0, 0], |together| [together.q_stride, together.out_stride]);
        [q as i64, out as i64, self.scratch().bytes as i64]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [q, pages, offset, heads, lo, hi, out, scratch]) =
            Builder::new(self.name(), ["q", "pages", "offset", "heads", "lo", "hi", "out", "scratch"]);
        let b = &mut builder;
        let tokens = self.tokens();
        let rows = Rows { q, out, scratch, tokens };
        self.each_kv_head(b, heads, rows, |b, rows, _| {
            self.each_token(b, rows, |b, rows, _| self.start(b, rows));
        });
        let zero = b.int(0);
        let first = b.max(lo, zero);
        let first = b.shift(Shift::RightUnsigned, first, PAGE_SHIFT);
        let end = b.add_int(hi, (tokens + PAGE_TOKENS) as i64 - 2);
        let end = b.shift(Shift::RightUnsigned, end, PAGE_SHIFT);
        let inputs = Inputs { pages, offset, heads, lo, hi, end };
        if tokens == 1 {
            self.pages(b, inputs, rows, [first, end], |b, rows, page, base| {
                self.visible_part(b, inputs, rows, page, base);
            });
        } else {
            // The last token begins to see at `lo + tokens − 1`, and the first one sees up to `hi`.
            let whole = b.add_int(lo, tokens as i64 - 1);
            let whole = b.max(whole, zero);
            let whole = b.add_int(whole, PAGE_TOKENS as i64 - 1);
            let whole = b.shift(Shift::RightUnsigned, whole, PAGE_SHIFT);
            let part = b.shift(Shift::RightUnsigned, hi, PAGE_SHIFT);
            let part = b.max(part, whole);
            let one_by_one = |b: &mut Builder, rows: Rows, page: Page, base: Value| {
                self.each_token(b, rows, |b, rows, token| {
                    let base = b.sub(base, token);
                    self.visible_part(b, inputs, rows, page, base);
                });
            };
            self.pages(b, inputs, rows, [first, whole], one_by_one);
            self.pages(b, inputs, rows, [whole, part], |b, rows, page, _| self.page(b, rows, page));
            self.pages(b, inputs, rows, [part, end], one_by_one);
        }
        self.each_kv_head(b, heads, rows, |b, rows, _| {
            self.each_token(b, rows, |b, rows, _| self.finish(b, rows));
        });
        builder.finish()
    }

    /// Calls `body` for each KV head, with the rows that are its own and its number.
    fn each_kv_head(&self, b: &mut Builder, heads: Value, rows: Rows, body: impl FnOnce(&mut Builder, Rows, Value)) {
        let group = self.group as i64 * self.head_bytes();
        let steps = [group, group, self.scratch_bytes() as i64];
        let first = b.int(0);
        b.for_loop(first, heads, 1, &[rows.q, rows.out, rows.scratch], |b, head, at| {
            body(b, Rows { q: at[0], out: at[1], scratch: at[2], ..rows }, head);
            at.iter().zip(steps).map(|(&p, step)| b.add_int(p, step)).collect()
        });
    }

    /// Calls `body` for each of the tokens by itself, with its number.
    fn each_token(&self, b: &mut Builder, rows: Rows, body: impl FnOnce(&mut Builder, Rows, Value)) {
        if rows.tokens == 1 {
            let first = b.int(0);
            return body(b, rows, first);
        }
        let steps = self.token_steps();
        let (first, end) = (b.int(0), b.int(rows.tokens as i64));
        b.for_loop(first, end, 1, &[rows.q, rows.out, rows.scratch], |b, token, at| {
            body(b, Rows { q: at[0], out: at[1], scratch: at[2], tokens: 1 }, token);
            at.iter().zip(steps).map(|(&p, step)| b.add_int(p, step)).collect()
        });
    }

    /// Calls `body` for the pages `from .. to` and in each of them for each KV head, with the head's rows and the position of the page's first key.
    fn pages(
        &self,
        b: &mut Builder,
        inputs: Inputs,
        rows: Rows,
        [from, to]: [Value; 2],
        body: impl FnOnce(&mut Builder, Rows, Page, Value),
    ) {
        let keys = self.kv.key_bytes(self.head_dim) as i64;
        let one = b.int(1);
        let last = b.sub(inputs.heads, one);
        let back = b.mul_int(last, 2 * keys);
        let skipped = b.mul_int(from, 8);
        let entry = b.add(inputs.pages, skipped);
        b.for_loop(from, to, 1, &[entry], |b, p, carried| {
            let page = b.load_int(carried[0], 0);
            let next = self.next_page(b, carried[0], p, inputs.end);
            let next = b.sub(next, page);
            let after_last = b.sub(next, back);
            let base = b.shift(Shift::Left, p, PAGE_SHIFT);
            let first = b.add(page, inputs.offset);
            self.each_kv_head(b, inputs.heads, rows, |b, rows, head| {
                let at = b.mul_int(head, 2 * keys);
                let at = b.add(first, at);
                let beside = b.int(2 * keys);
                let others_follow = b.compare(Compare::Less, head, last);
                let next = b.select(others_follow, beside, after_last);
                let page = Page { keys: at, values: b.add_int(at, keys), next, visible: None };
                body(b, rows, page, base);
            });
            vec![b.add_int(carried[0], 8)]
        });
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

    /// One token and the keys that it sees of a page, if any; `base` is the position of the page's first key, less the token's number.
    fn visible_part(&self, b: &mut Builder, inputs: Inputs, rows: Rows, page: Page, base: Value) {
        let (zero, all) = (b.int(0), b.int(PAGE_TOKENS as i64));
        let from = b.sub(inputs.lo, base);
        let from = b.max(from, zero);
        let to = b.sub(inputs.hi, base);
        let to = b.min(to, all);
        let page = Page { visible: Some([from, to]), ..page };
        if self.together.is_none() {
            return self.page(b, rows, page);
        }
        // A page that others see is none of this token's when nothing is left between.
        b.for_loop(from, to, PAGE_TOKENS as i64, &[], |b, _, _| {
            self.page(b, rows, page);
            Vec::new()
        });
    }

    /// The tokens' running results with those of a page.
    fn page(&self, b: &mut Builder, rows: Rows, page: Page) {
        self.scores(b, rows, page);
        self.each_token(b, rows, |b, rows, _| {
            self.exponentials(b, rows);
            self.combine(b, rows);
        });
        self.values(b, rows, page);
    }

    fn scratch(&self) -> Scratch {
        Scratch::new(self.group)
    }

    /// How many of `all` vectors of keys or of values are taken together, sharing each element of the queries or weights of `heads`: as many as fit registers.
    fn vectors_together(&self, heads: Heads, all: usize) -> usize {
        let most = (self.vectors * self.rows / heads.rows()).max(1);
        [8, 4, 2].into_iter().find(|&n| n <= most && all.is_multiple_of(n)).unwrap_or(1)
    }

    /// Calls `body` for the heads of all tokens, as many at a time as are held in registers together, with pointers that advance by `head_steps` bytes for each head and by
    /// `token_steps` for each token.
    fn each_heads<const P: usize>(
        &self,
        b: &mut Builder,
        rows: Rows,
        pointers: [Value; P],
        [token_steps, head_steps]: [[i64; P]; 2],
        body: impl Fn(&mut Builder, [Value; P], Heads),
    ) {
        let advanced = |b: &mut Builder, at: &[Value], steps: [i64; P], by: usize| -> Vec<Value> {
            at.iter().zip(steps).map(|(&p, step)| b.add_int(p, step * by as i64)).collect()
        };
        let Heads { tokens, heads } = Heads::of(self.group, self.rows);
        let tokens = tokens.min(rows.tokens);
        counted(b, rows.tokens / tokens, pointers.to_vec(), |b, token| {
            let after = counted(b, self.group / heads, token.to_vec(), |b, at| {
                body(b, std::array::from_fn(|i| at[i]), Heads { tokens, heads });
                advanced(b, at, head_steps, heads)
            });
            let rest = self.group % heads;
            if rest > 0 {
                body(b, std::array::from_fn(|i| after[i]), Heads { tokens, heads: rest });
            }
            advanced(b, token, token_steps, tokens)
        });
    }

    /// The scores of the page's keys; invisible ones get [`LOWEST`].
    fn scores(&self, b: &mut Builder, rows: Rows, page: Page) {
        let dim = (LANES * self.kv.bytes()) as i64;
        let [q_step, _, scratch_step] = self.token_steps();
        if page.visible.is_some() {
            self.each_token(b, rows, |b, rows, _| self.hide(b, rows));
        }
        let tile_bytes = self.padded() as i64 * dim;
        let steps = [[q_step, scratch_step], [self.head_bytes(), SCORES]];
        self.each_heads(b, rows, [rows.q, rows.scratch], steps, |b, [q, scores], heads| {
            let together = self.vectors_together(heads, PAGE_TILES);
            let shift = (together * LANES).trailing_zeros() as u8;
            let [first, end] = match page.visible {
                None => [0, PAGE_TILES / together].map(|n| b.int(n as i64)),
                Some([from, to]) => {
                    let end = b.add_int(to, (together * LANES) as i64 - 1);
                    [from, end].map(|key| b.shift(Shift::RightUnsigned, key, shift))
                }
            };
            let skipped = b.mul_int(first, together as i64 * tile_bytes);
            let keys = b.add(page.keys, skipped);
            let skipped = b.mul_int(first, together as i64 * VECTOR);
            let scores = b.add(scores, skipped);
            b.for_loop(first, end, 1, &[keys, scores], |b, tiles, carried| {
                let ahead = b.add(carried[0], page.next);
                let mut carried_in = vec![carried[0], ahead, q];
                carried_in.extend((0..together * heads.rows()).map(|_| zeros(b)));
                let after = counted(b, self.padded() / SCORES_UNROLL, carried_in, |b, carried| {
                    let (keys, ahead, q, mut sums) = (carried[0], carried[1], carried[2], carried[3..].to_vec());
                    let step = SCORES_UNROLL as i64 * dim;
                    for d in 0..SCORES_UNROLL as i64 {
                        // Lines that begin with this dimension: many prefetches at once would hold up other loads.
                        if d * dim % 64 == 0 {
                            (0..together as i64).for_each(|tile| b.prefetch(ahead, tile * tile_bytes + d * dim));
                        }
                        let k: Vec<Value> = (0..together as i64)
                            .map(|tile| b.load(self.kv.memory(), keys, tile * tile_bytes + d * dim))
                            .collect();
                        let offsets = heads.offsets(q_step, self.head_bytes());
                        for (sums, at) in sums.chunks_mut(together).zip(offsets) {
                            let q = b.load_splat(Memory::F32, q, at + 4 * d);
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
                let key = b.shift(Shift::Left, tiles, shift);
                for tile in 0..together {
                    let hidden = page.visible.map(|visible| self.hidden_lanes(b, visible, key, tile));
                    let offsets = heads.offsets(scratch_step, SCORES);
                    for (sums, at) in after[3..].chunks(together).zip(offsets) {
                        let mut s = match self.cap_bits {
                            Some(bits) => build_soft_cap(b, sums[tile], f32::from_bits(bits)),
                            None => sums[tile],
                        };
                        if let Some([started, ended, lowest]) = hidden {
                            s = b.select(started, s, lowest);
                            s = b.select(ended, lowest, s);
                        }
                        store_f32(b, s, carried[1], self.scratch().scores + at + tile as i64 * VECTOR);
                    }
                }
                let together = together as i64;
                vec![b.add_int(carried[0], together * tile_bytes), b.add_int(carried[1], together * VECTOR)]
            });
        });
    }

    /// No key of the page is visible yet.
    fn hide(&self, b: &mut Builder, rows: Rows) {
        counted(b, self.group, vec![rows.scratch], |b, carried| {
            let lowest = b.splat_f32(LOWEST);
            for tile in 0..PAGE_TILES as i64 {
                store_f32(b, lowest, carried[0], self.scratch().scores + tile * VECTOR);
            }
            vec![b.add_int(carried[0], SCORES)]
        });
    }

    /// Where the `tile`-th tile of keys after key `key` of a page is not before the first visible one, and where past the last; and what stands there.
    fn hidden_lanes(&self, b: &mut Builder, [from, to]: [Value; 2], key: Value, tile: usize) -> [Value; 3] {
        let lane = lane_numbers(b, (tile * LANES) as i32);
        let [started, ended] = [from, to].map(|bound| {
            let bound = b.sub(bound, key);
            let bound = b.splat(bound);
            b.compare(Compare::GreaterEqual, lane, bound)
        });
        [started, ended, b.splat_f32(LOWEST)]
    }

    /// Adds the page's weighted values to the running ones.
    fn values(&self, b: &mut Builder, rows: Rows, page: Page) {
        let at = self.scratch();
        let key_bytes = (self.padded() * self.kv.bytes()) as i64;
        let vector = (LANES * self.kv.bytes()) as i64;
        let [_, out_step, scratch_step] = self.token_steps();
        let [from, to] = page.visible.unwrap_or_else(|| [0, PAGE_TOKENS as i64].map(|n| b.int(n)));
        let skipped = b.mul_int(from, key_bytes);
        let values = b.add(page.values, skipped);
        let skipped = b.mul_int(from, 4);
        let weights = b.add(rows.scratch, skipped);
        let pointers = [weights, rows.out, rows.scratch];
        let steps = [[scratch_step, out_step, scratch_step], [SCORES, self.head_bytes(), 4]];
        self.each_heads(b, rows, pointers, steps, |b, [weights, out, arrays], heads| {
            let vectors = self.padded() / LANES;
            let together = self.vectors_together(heads, vectors);
            // In their order, whatever the order in which these are read.
            let ahead = b.add(values, page.next);
            counted(b, vectors / together, vec![values, out, ahead], |b, carried| {
                let (values, out, ahead) = (carried[0], carried[1], carried[2]);
                let mut initial = vec![values, ahead, weights];
                initial.extend((0..heads.rows() * together).map(|_| zeros(b)));
                let after = b.for_loop(from, to, 1, &initial, |b, _, carried| {
                    let (value, ahead, weight, mut sums) = (carried[0], carried[1], carried[2], carried[3..].to_vec());
                    prefetch(b, ahead, 0, together as i64 * vector);
                    let v: Vec<Value> =
                        (0..together as i64).map(|i| b.load(self.kv.memory(), value, i * vector)).collect();
                    for (sums, offset) in sums.chunks_mut(together).zip(heads.offsets(scratch_step, SCORES)) {
                        let e = b.load_splat(Memory::F32, weight, at.scores + offset);
                        for (sum, &v) in sums.iter_mut().zip(&v) {
                            *sum = b.fma(e, v, *sum);
                        }
                    }
                    let mut next = vec![
                        b.add_int(value, key_bytes),
                        b.add_int(ahead, together as i64 * vector),
                        b.add_int(weight, 4),
                    ];
                    next.extend(sums);
                    next
                });
                let places = heads.offsets(scratch_step, 4).zip(heads.offsets(out_step, self.head_bytes()));
                for (sums, (factors, place)) in after[3..].chunks(together).zip(places) {
                    let old = b.load_splat(Memory::F32, arrays, at.old_factor + factors);
                    let new = b.load_splat(Memory::F32, arrays, at.new_factor + factors);
                    for (i, &sum) in sums.iter().enumerate() {
                        let to = place + i as i64 * VECTOR;
                        let kept = load_f32(b, out, to);
                        let kept = b.mul(kept, old);
                        let sum = b.fma(sum, new, kept);
                        store_f32(b, sum, out, to);
                    }
                }
                let together = together as i64;
                vec![b.add_int(values, together * vector), b.add_int(out, together * VECTOR), after[1]]
            });
        });
    }
}
