//! Choosing experts: the k largest logits of a token and their softmax, and the sort of a batch's choices by expert.
//!
//! Ties go to the lower index, so the choice is a function of the logits' bits. Deliberately absent: the router's product.

use moec_ir::math::build_exp;
use moec_ir::tile::{Binary, Compare, Function, Memory, Value, build::Builder};

/// The `k` largest of `experts` logits in falling order, ties to the lower index, and their softmax, over them or over all.
///
/// Parameters: `logits` — f32 `[experts]`; `indices` — u32 `[k]`, written; `weights` — f32 `[k]`, written:
/// `e_i = exp(l_i − l_0)`, `w_i = e_i / ((e_0 + e_1) + …)` with the sum over the chosen in their order, or over all in theirs. Nothing overlaps. Indices are below `experts` whatever the logits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TopK {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts chosen, 1 ..= `experts`.
    pub k: usize,
    /// Whether the chosen are kept sorted in registers while each logit is looked at once, in straight-line code; otherwise the logits are
    /// scanned `k` times. The same bits.
    pub network: bool,
    /// Whether the softmax is over all logits, and not over the chosen ones alone.
    pub over_all: bool,
}

/// A logit and its index.
#[derive(Clone, Copy)]
struct Entry {
    logit: Value,
    index: Value,
}

impl Entry {
    fn select(b: &mut Builder, c: Value, yes: Entry, no: Entry) -> Entry {
        Entry { logit: b.select(c, yes.logit, no.logit), index: b.select(c, yes.index, no.index) }
    }
}

impl TopK {
    /// The kernel's name.
    pub fn name(&self) -> String {
        let how = if self.network { "network" } else { "scan" };
        let over = if self.over_all { "_over_all" } else { "" };
        format!("top_{}_of_{}_{how}{over}", self.k, self.experts)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["logits", "indices", "weights"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        assert!((1..=self.experts).contains(&self.k), "{}: 1 to {} experts", self.name(), self.experts);
        let (mut builder, [logits, indices, weights]) = Builder::new(self.name(), ["logits", "indices", "weights"]);
        let b = &mut builder;
        let chosen = if self.network { self.network(b, logits) } else { self.scan(b, logits) };
        let mut sum = None;
        let mut exponentials = Vec::with_capacity(self.k);
        for (i, entry) in chosen.iter().enumerate() {
            b.store_scalar(Memory::I32, entry.index, indices, 4 * i as i64);
            let below = b.sub(entry.logit, chosen[0].logit);
            let e = build_exp(b, below);
            exponentials.push(e);
            sum = Some(match sum {
                None => e,
                Some(sum) => b.add(sum, e),
            });
        }
        let mut sum = sum.expect("at least one expert is chosen");
        if self.over_all {
            sum = self.sum_of_all(b, logits, chosen[0].logit);
        }
        for (i, e) in exponentials.into_iter().enumerate() {
            let weight = b.div(e, sum);
            b.store_scalar(Memory::F32, weight, weights, 4 * i as i64);
        }
        builder.finish()
    }

    /// `exp(l_0 − largest) + exp(l_1 − largest) + …` over all logits, one after another.
    fn sum_of_all(&self, b: &mut Builder, logits: Value, largest: Value) -> Value {
        let term = |b: &mut Builder, at: Value| {
            let logit = b.load_scalar(Memory::F32, at, 0);
            let below = b.sub(logit, largest);
            build_exp(b, below)
        };
        let first = term(b, logits);
        let rest = b.add_int(logits, 4);
        let (start, end) = (b.int(1), b.int(self.experts as i64));
        let after = b.for_loop(start, end, 1, &[rest, first], |b, _, carried| {
            let e = term(b, carried[0]);
            vec![b.add_int(carried[0], 4), b.add(carried[1], e)]
        });
        after[1]
    }

    /// Insertion of each logit into a sorted list of at most `k`: comparisons and selects, no loop.
    fn network(&self, b: &mut Builder, logits: Value) -> Vec<Entry> {
        let mut sorted: Vec<Entry> = Vec::with_capacity(self.k);
        for i in 0..self.experts {
            let new = Entry { logit: b.load_scalar(Memory::F32, logits, 4 * i as i64), index: b.int(i as i64) };
            // Whether the new entry goes before the old j-th: it has the higher index, so it loses ties.
            let before: Vec<Value> =
                sorted.iter().map(|old| b.compare(Compare::Greater, new.logit, old.logit)).collect();
            let length = (sorted.len() + 1).min(self.k);
            sorted = (0..length)
                .map(|j| {
                    let moved = match j.checked_sub(1) {
                        None => new,
                        Some(p) => Entry::select(b, before[p], sorted[p], new),
                    };
                    match before.get(j) {
                        None => moved,
                        Some(&before) => Entry::select(b, before, moved, sorted[j]),
                    }
                })
                .collect();
        }
        sorted
    }

    /// `k` scans, each for the largest of the logits that come after the last one chosen.
    fn scan(&self, b: &mut Builder, logits: Value) -> Vec<Entry> {
        let mut chosen: Vec<Entry> = Vec::with_capacity(self.k);
        let (zero, one, end) = (b.int(0), b.int(1), b.int(self.experts as i64));
        for _ in 0..self.k {
            let (start, best, found) = match chosen.last() {
                None => (one, b.load_scalar(Memory::F32, logits, 0), one),
                Some(_) => (zero, b.f32(0.0), zero),
            };
            let at = if chosen.is_empty() { b.add_int(logits, 4) } else { logits };
            let last = chosen.last().copied();
            let after = b.for_loop(start, end, 1, &[at, best, zero, found], |b, i, carried| {
                let &[at, best, index, found] = carried else { unreachable!("four values are carried") };
                let new = Entry { logit: b.load_scalar(Memory::F32, at, 0), index: i };
                let greater = b.compare(Compare::Greater, new.logit, best);
                let missing = b.sub(one, found);
                let mut take = b.select(greater, one, missing);
                if let Some(last) = last {
                    let below = b.compare(Compare::Less, new.logit, last.logit);
                    let equal = b.compare(Compare::Equal, new.logit, last.logit);
                    let later = b.compare(Compare::Greater, i, last.index);
                    let tie = b.select(later, one, zero);
                    let tie = b.select(equal, tie, zero);
                    let comes_after = b.select(below, one, tie);
                    take = b.binary(Binary::And, take, comes_after);
                }
                let found = b.binary(Binary::Or, found, take);
                let take = b.compare(Compare::Greater, take, zero);
                let next = Entry::select(b, take, new, Entry { logit: best, index });
                vec![b.add_int(at, 4), next.logit, next.index, found]
            });
            chosen.push(Entry { logit: after[1], index: after[2] });
        }
        chosen
    }
}

/// Stable counting sort of the slots of a batch by expert.
///
/// Parameters: `indices` — u32 `[tokens][k]`, each below `experts`; `tokens` — a count ≥ 0; `offsets` — u32 `[experts + 1]`, written: where
/// each expert's run begins, the last the number of slots; `order` — u32 `[tokens × k]`, written: the token at each sorted position;
/// `positions` — u32 `[tokens × k]`, written: the sorted position of each (token, slot). Nothing overlaps.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SortByExpert {
    /// Experts.
    pub experts: usize,
    /// Slots of a token.
    pub k: usize,
}

impl SortByExpert {
    /// The kernel's name.
    pub fn name(&self) -> String {
        format!("sort_by_expert_{}_of_{}", self.k, self.experts)
    }

    /// The parameters' names.
    pub fn params(&self) -> &'static [&'static str] {
        &["indices", "tokens", "offsets", "order", "positions"]
    }

    /// The code.
    pub fn generate(&self) -> Function {
        let (mut builder, [indices, tokens, offsets, order, positions]) =
            Builder::new(self.name(), ["indices", "tokens", "offsets", "order", "positions"]);
        let b = &mut builder;
        let (zero, one) = (b.int(0), b.int(1));
        let experts = b.int(self.experts as i64);
        let entry = |b: &mut Builder, index: Value| {
            let bytes = b.mul_int(index, 4);
            b.add(offsets, bytes)
        };

        // offsets[e + 1] = slots of e.
        let ends = b.int(self.experts as i64 + 1);
        b.for_loop(zero, ends, 1, &[offsets], |b, _, at| {
            b.store_scalar(Memory::I32, zero, at[0], 0);
            vec![b.add_int(at[0], 4)]
        });
        let slots = b.mul_int(tokens, self.k as i64);
        b.for_loop(zero, slots, 1, &[indices], |b, _, at| {
            let expert = b.load_u32(at[0], 0);
            let count = entry(b, expert);
            let n = b.load_u32(count, 4);
            let n = b.add(n, one);
            b.store_scalar(Memory::I32, n, count, 4);
            vec![b.add_int(at[0], 4)]
        });
        // offsets[e] = where e begins.
        b.for_loop(zero, experts, 1, &[offsets, zero], |b, _, carried| {
            let n = b.load_u32(carried[0], 4);
            let sum = b.add(carried[1], n);
            b.store_scalar(Memory::I32, sum, carried[0], 4);
            vec![b.add_int(carried[0], 4), sum]
        });
        // Each slot goes to where its expert's run continues; then offsets[e] = where e ends.
        b.for_loop(zero, tokens, 1, &[indices, positions], |b, token, carried| {
            for slot in 0..self.k as i64 {
                let expert = b.load_u32(carried[0], 4 * slot);
                let cursor = entry(b, expert);
                let position = b.load_u32(cursor, 0);
                let next = b.add(position, one);
                b.store_scalar(Memory::I32, next, cursor, 0);
                b.store_scalar(Memory::I32, position, carried[1], 4 * slot);
                let bytes = b.mul_int(position, 4);
                let place = b.add(order, bytes);
                b.store_scalar(Memory::I32, token, place, 0);
            }
            vec![b.add_int(carried[0], 4 * self.k as i64), b.add_int(carried[1], 4 * self.k as i64)]
        });
        // Where e ends is where e + 1 begins.
        let last = b.add_int(offsets, 4 * self.experts as i64);
        b.for_loop(zero, experts, 1, &[last], |b, _, at| {
            let begin = b.load_u32(at[0], -4);
            b.store_scalar(Memory::I32, begin, at[0], 0);
            vec![b.add_int(at[0], -4)]
        });
        b.store_scalar(Memory::I32, zero, offsets, 0);
        builder.finish()
    }
}
