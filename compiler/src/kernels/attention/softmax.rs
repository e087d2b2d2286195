//! The online softmax of attention: maxima, sums and factors of each query head, in scratch memory.
//!
//! A page's scores become exponentials relative to the page's own maximum; then the running maximum and sum take the page's, which gives the factors for the values
//! that were there and for the page's. Deliberately absent: the products with keys and values ([`super`]).

use moec_abi::{LANES, round_up};
use moec_ir::math::build_exp;
use moec_ir::tile::{Memory, Reduce, Value, build::Builder};

use super::super::common::{VECTOR, counted, load_f32, store_f32, zeros};
use super::{Attention, PAGE_TILES, Rows, SCORES};

/// What stands for −∞: below every score.
pub(super) const LOWEST: f32 = -3.0e38;

/// Where the arrays of one token lie in its part of scratch, in bytes.
pub(super) struct Scratch {
    /// Scores, then their exponentials: f32 `[group][64]`.
    pub(super) scores: i64,
    /// Each f32 `[group padded to 16]`: the page's maximum and sum, the running maximum and sum, and the two factors.
    pub(super) page_max: i64,
    pub(super) page_sum: i64,
    pub(super) max: i64,
    pub(super) sum: i64,
    pub(super) old_factor: i64,
    pub(super) new_factor: i64,
    pub(super) bytes: usize,
}

impl Scratch {
    pub(super) fn new(group: usize) -> Scratch {
        let array = 4 * round_up(group, LANES);
        let scores = SCORES as usize * group;
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

impl Attention {
    /// Vectors of an array with an element for each head.
    const fn head_vectors(&self) -> i64 {
        self.group.div_ceil(LANES) as i64
    }

    /// No keys yet: the running maximum, sum and values are such that combining a page with them gives the page's.
    pub(super) fn start(&self, b: &mut Builder, rows: Rows) {
        let at = self.scratch();
        let (lowest, zero) = (b.splat_f32(LOWEST), zeros(b));
        for i in 0..self.head_vectors() {
            store_f32(b, lowest, rows.scratch, at.max + i * VECTOR);
            for array in [at.sum, at.page_max, at.page_sum] {
                store_f32(b, zero, rows.scratch, array + i * VECTOR);
            }
        }
        counted(b, self.group * self.padded() / LANES, vec![rows.out], |b, carried| {
            // −0 × 0 + a is a, whatever a's sign.
            let none = b.splat_f32(-0.0);
            store_f32(b, none, carried[0], 0);
            vec![b.add_int(carried[0], VECTOR)]
        });
    }

    /// Each head's maximum over the page, the scores' exponentials relative to it (0 for invisible keys), and their sum.
    pub(super) fn exponentials(&self, b: &mut Builder, rows: Rows) {
        let at = self.scratch();
        let tiles = PAGE_TILES as i64;
        counted(b, self.group, vec![rows.scratch, rows.scratch], |b, carried| {
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
            vec![b.add_int(scores, SCORES), b.add_int(arrays, 4)]
        });
    }

    /// The running maximum and sum with the page's, and the factors for the values; heads are the lanes.
    pub(super) fn combine(&self, b: &mut Builder, rows: Rows) {
        let at = self.scratch();
        for i in 0..self.head_vectors() {
            let i = i * VECTOR;
            let scratch = rows.scratch;
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

    /// The running values divided by the sum: multiplied by its reciprocal.
    pub(super) fn finish(&self, b: &mut Builder, rows: Rows) {
        let at = self.scratch();
        for i in 0..self.head_vectors() {
            let sum = load_f32(b, rows.scratch, at.sum + i * VECTOR);
            let one = b.splat_f32(1.0);
            let reciprocal = b.div(one, sum);
            store_f32(b, reciprocal, rows.scratch, at.new_factor + i * VECTOR);
        }
        counted(b, self.group, vec![rows.out, rows.scratch], |b, carried| {
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
