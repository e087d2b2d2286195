//! The sums of products with codes.
//!
//! Columns that share a scale, a *run*, are multiplied and added as integers, exactly. For each span of the activations, in order,
//! `acc += (Σ dot × scale) × the span's scale`, and after it for each of its runs `acc += offset × the activations' scaled sum` where the format has offsets.
//! All is fused but the first product of a span.

use moec_ir::tile::{Memory, Value, build::Builder};
use std::ops::Range;

use super::super::scales::{Load, weight_codes, weight_offset, weight_scale};
use super::{Dot, Inputs, Matmul, Sums, Tiles, walk};
use crate::plan::layout::{BLOCK, GROUP};
use moec_abi::LANES;

/// Blocks of a whole group.
const BLOCKS: usize = GROUP / BLOCK;

/// Addresses of the activations' codes, scales and sums where a walk has come to.
#[derive(Clone, Copy)]
struct Row {
    codes: Value,
    scales: Value,
    sums: Value,
}

/// Some blocks of a group.
#[derive(Clone, Copy)]
struct Group {
    /// Groups before it since where the walk has come to.
    number: usize,
    /// Its blocks.
    blocks: usize,
}

impl Matmul {
    pub(super) fn quantized_sums(&self, b: &mut Builder, from: Inputs, w: Tiles, sums: Sums) -> Sums {
        let unroll = self.tuning.unroll;
        let blocks = self.k.div_ceil(BLOCK);
        let (groups, rest) = (blocks / BLOCKS, blocks % BLOCKS);
        let group = |b: &mut Builder, w: &Tiles, [codes, scales, sums]: [Value; 3], acc: Sums, number, blocks| {
            self.prefetch(
                b,
                from,
                w,
                (number * self.format.group_bytes(BLOCKS)) as i64,
                self.format.group_bytes(blocks),
            );
            self.group(b, w, Row { codes, scales, sums }, Group { number, blocks }, acc)
        };
        let steps = |b: &mut Builder, w: &Tiles, at: [Value; 3], acc: Sums, count: usize| {
            (0..count).fold(acc, |acc, number| group(b, w, at, acc, number, BLOCKS))
        };
        let bytes = self.format.group_bytes(BLOCKS) as i64;
        let words = [GROUP / 4, GROUP / self.row.span, BLOCKS * self.format.parts()]
            .map(|words| self.word(words, 0) * unroll as i64);
        let begin = (w, [from.x, from.scales, from.sums]);
        let (w, at, mut sums) =
            walk(b, groups / unroll, begin, (bytes * unroll as i64, words), sums, |b, w, at, sums| {
                steps(b, w, at, sums, unroll)
            });
        let left = groups % unroll;
        sums = steps(b, &w, at, sums, left);
        if rest == 0 { sums } else { group(b, &w, at, sums, left, rest) }
    }

    /// Adds the products of a group of columns, whose weights' scales lie together.
    fn group(&self, b: &mut Builder, w: &Tiles, x: Row, group: Group, mut acc: Sums) -> Sums {
        let (span, runs) = (self.row.span, group.blocks * self.format.parts());
        let (mut of_span, mut first): (Sums, usize) = (vec![], 0);
        for run in 0..runs {
            of_span = self.with_run(b, w, x, group, run, &of_span);
            let elements = (run + 1) * self.format.scale_columns();
            if !elements.is_multiple_of(span) && run + 1 < runs {
                continue;
            }
            let number = group.number * (GROUP / span) + (elements - 1) / span;
            for (i, sum) in std::mem::take(&mut of_span).into_iter().enumerate() {
                let scale = b.load_splat(Memory::F32, x.scales, self.word(number, i % self.tokens));
                acc[i] = b.fma(sum, scale, acc[i]);
            }
            if self.format.has_offsets() {
                self.add_offsets(b, w, x, group, first..run + 1, &mut acc);
            }
            first = run + 1;
        }
        acc
    }

    /// `before`, the sums of a span so far (none before its first run), and the products of run `run`.
    fn with_run(&self, b: &mut Builder, w: &Tiles, x: Row, group: Group, run: usize, before: &[Value]) -> Sums {
        let mut sums = self.dots(b, w, x, group, run);
        for (tile, sums) in sums.chunks_mut(self.tokens).enumerate() {
            let scale = self.scale(b, w, tile, group, |b, load| weight_scale(b, self.format, run, load));
            for (t, sum) in sums.iter_mut().enumerate() {
                let dot = b.int_to_float(*sum);
                *sum = match before.get(tile * self.tokens + t) {
                    Some(&before) => b.fma(dot, scale, before),
                    None => b.mul(dot, scale),
                };
            }
        }
        sums
    }

    /// Adds the offsets of runs of columns times the sums of the activations.
    fn add_offsets(&self, b: &mut Builder, w: &Tiles, x: Row, group: Group, runs: Range<usize>, acc: &mut Sums) {
        for run in runs {
            for (tile, acc) in acc.chunks_mut(self.tokens).enumerate() {
                let offset = self.scale(b, w, tile, group, |b, load| weight_offset(b, self.format, run, load));
                for (t, acc) in acc.iter_mut().enumerate() {
                    let sum = b.load_splat(Memory::F32, x.sums, self.word(self.run(group, run), t));
                    *acc = b.fma(offset, sum, *acc);
                }
            }
        }
    }

    /// What `read` makes of the scales of a group in a tile.
    fn scale(
        &self,
        b: &mut Builder,
        w: &Tiles,
        tile: usize,
        group: Group,
        read: impl FnOnce(&mut Builder, Load) -> Value,
    ) -> Value {
        let (w, first) = w.address(tile, self.group_at(group));
        read(b, &mut |b, memory, at| b.load(memory, w, first + at))
    }

    /// Where a group's weights begin in each tile.
    fn group_at(&self, group: Group) -> i64 {
        (group.number * self.format.group_bytes(BLOCKS)) as i64
    }

    /// The number of a run of columns since where the walk has come to.
    fn run(&self, group: Group, run: usize) -> usize {
        group.number * BLOCKS * self.format.parts() + run
    }

    /// The integer products of a run of columns that share a scale: codes with a bias begin with the activations' correction, others with 0; an offset
    /// is added later.
    fn dots(&self, b: &mut Builder, w: &Tiles, x: Row, group: Group, run: usize) -> Sums {
        let start: Sums = match self.format.has_offsets() || self.dot == Dot::Signed {
            true => vec![b.splat_i32(0); self.tokens],
            false => {
                let at = |t| self.word(self.run(group, run), t);
                (0..self.tokens).map(|t| b.load_splat(Memory::I32, x.sums, at(t))).collect()
            }
        };
        let mut dots = start.repeat(w.count());
        let (block, part) = (run / self.format.parts(), run % self.format.parts());
        let codes = self.format.scale_bytes(group.blocks) + block * self.format.block_bytes();
        let codes = self.group_at(group) + codes as i64;
        let columns = self.format.scale_columns() * part..self.format.scale_columns() * (part + 1);
        let nibbles = self.format.block_bytes() < BLOCK * LANES;
        for v in 0..self.format.block_bytes() / 64 {
            // The columns of the low and of the high halves of a byte, or of a byte.
            let of_vector = if nibbles { vec![4 * v, BLOCK / 2 + 4 * v] } else { vec![4 * v] };
            let wanted: Vec<(usize, usize)> =
                of_vector.into_iter().enumerate().filter(|(_, column)| columns.contains(column)).collect();
            if wanted.is_empty() {
                continue;
            }
            let raw: Vec<Value> = (0..w.count())
                .map(|tile| {
                    let (w, at) = w.address(tile, codes + 64 * v as i64);
                    b.load_bytes(w, at)
                })
                .collect();
            for (half, column) in wanted {
                let weights: Vec<Value> = raw
                    .iter()
                    .map(|&raw| weight_codes(b, self.format, (&self.codebook, self.dot), raw, half))
                    .collect();
                let element = group.number * GROUP + block * BLOCK + column;
                // Each activation is in a register for as short as can be, which the sums need.
                for t in 0..self.tokens {
                    let x = b.load_splat_bytes(x.codes, self.word(element / 4, t));
                    for (tile, &weights) in weights.iter().enumerate() {
                        let dot = &mut dots[tile * self.tokens + t];
                        *dot = match self.dot {
                            Dot::Unsigned => b.dot_u8s8(*dot, weights, x),
                            Dot::Signed => b.dot_s8s8(*dot, weights, x),
                        };
                    }
                }
            }
        }
        dots
    }
}
