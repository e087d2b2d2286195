//! The sums of products with codes.
//!
//! Columns that share a scale, a *run*, are multiplied and added as integers, exactly. For each span of the activations, in order,
//! `acc += (Σ dot × scale) × the span's scale`, and after it for each of its runs `acc += offset × the activations' scaled sum` where the format has offsets.
//! All is fused but the first product of a span.

use moec_ir::tile::{Memory, Shift, Value, build::Builder};
use std::ops::Range;

use super::super::scales::{Load, weight_codes, weight_offset, weight_scale};
use super::prefetch::{Lines, lines};
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

/// Four columns, of which one dot product multiplies 16 rows.
#[derive(Clone, Copy)]
struct Four {
    /// Where the vector that has their codes begins in each tile.
    at: i64,
    /// Whether they are the low (0) or the high (1) halves of its bytes, if not whole ones.
    half: usize,
    /// The first of them since where the walk has come to.
    column: usize,
}

impl Matmul {
    pub(super) fn quantized_sums(&self, b: &mut Builder, from: Inputs, w: Tiles, sums: Sums) -> Sums {
        let unroll = self.tuning.unroll;
        let blocks = self.k.div_ceil(BLOCK);
        let (groups, rest) = (blocks / BLOCKS, blocks % BLOCKS);
        let group = |b: &mut Builder, w: &Tiles, [codes, scales, sums]: [Value; 3], acc: Sums, number, blocks| {
            self.group(b, from, w, Row { codes, scales, sums }, Group { number, blocks }, acc)
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
    fn group(&self, b: &mut Builder, from: Inputs, w: &Tiles, x: Row, group: Group, mut acc: Sums) -> Sums {
        let (span, runs) = (self.row.span, group.blocks * self.format.parts());
        let (mut of_span, mut first): (Sums, usize) = (vec![], 0);
        let mut ahead = self.lines(b, from, w, self.group_at(group));
        for run in 0..runs {
            let dots = self.dots(b, w, x, &mut ahead, group, run);
            of_span = self.scaled(b, w, group, run, dots, &of_span);
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
        ahead.finish(b);
        acc
    }

    /// `before`, the sums of a span so far (none before its first run), and the products of run `run`, with their scales.
    fn scaled(&self, b: &mut Builder, w: &Tiles, group: Group, run: usize, mut sums: Sums, before: &[Value]) -> Sums {
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

    /// A share of a group's bytes for each run of its columns.
    fn run_bytes(&self, group: Group, run: usize) -> Range<usize> {
        let (bytes, runs) = (self.format.group_bytes(group.blocks), group.blocks * self.format.parts());
        let at = |run: usize| group.number * self.format.group_bytes(BLOCKS) + bytes * run / runs;
        at(run)..at(run + 1)
    }

    /// The number of a run of columns since where the walk has come to.
    fn run(&self, group: Group, run: usize) -> usize {
        group.number * BLOCKS * self.format.parts() + run
    }

    /// The integer products of a run of columns that share a scale. With a bias of 128 they begin with the activations' correction, else with 0; those of
    /// small values are corrected at the end; an offset is added later.
    fn dots(&self, b: &mut Builder, w: &Tiles, x: Row, ahead: &mut Lines, group: Group, run: usize) -> Sums {
        let correction = |b: &mut Builder, t| b.load_splat(Memory::I32, x.sums, self.word(self.run(group, run), t));
        let start: Sums = match self.dot {
            Dot::Unsigned if !self.format.has_offsets() => (0..self.tokens).map(|t| correction(b, t)).collect(),
            _ => vec![b.splat_i32(0); self.tokens],
        };
        let mut dots = start.repeat(w.count());
        // The vector of each tile that was loaded last, and where it begins.
        let (mut raw, mut raw_at) = (vec![], None);
        // Small values are met by fours of columns and the next four, whose products are added up before they become 32 bits.
        let fours = self.fours(group, run);
        let steps = fours.chunks(if self.dot == Dot::Small { 2 } else { 1 });
        let lines: Vec<i64> = lines(self.run_bytes(group, run)).collect();
        let (count, mut fetched) = (steps.len(), 0);
        for (step, fours) in steps.enumerate() {
            let fetch = (lines.len() * (step + 1)).div_ceil(count);
            ahead.beside(b, lines[fetched..fetch].iter().copied());
            fetched = fetch;
            let mut weights: Vec<Vec<Value>> = vec![];
            for &Four { at, half, .. } in fours {
                if raw_at != Some(at) {
                    raw = (0..w.count()).map(|tile| w.address(tile, at)).map(|(w, at)| b.load_bytes(w, at)).collect();
                    raw_at = Some(at);
                }
                weights.push(raw.iter().map(|&raw| weight_codes(b, self.format, self.dot, raw, half)).collect());
            }
            // Each activation is in a register for as short as can be, which the sums need.
            for t in 0..self.tokens {
                for (four, weights) in fours.iter().zip(&weights) {
                    let x = b.load_splat_bytes(x.codes, self.word(four.column / 4, t));
                    for (tile, &weights) in weights.iter().enumerate() {
                        let dot = &mut dots[tile * self.tokens + t];
                        *dot = match self.dot {
                            Dot::Unsigned | Dot::Small => b.dot_u8s8(*dot, weights, x),
                            Dot::Signed => b.dot_s8s8(*dot, weights, x),
                        };
                    }
                }
            }
        }
        if self.dot == Dot::Small && !self.format.has_offsets() {
            let bias = self.format.small().expect("a format of small values").bias;
            for t in 0..self.tokens {
                let correction = correction(b, t);
                // That of a bias of 128, which is a multiple of it.
                let correction = b.shift(Shift::RightSigned, correction, (128 / bias).trailing_zeros() as u8);
                for dot in dots.iter_mut().skip(t).step_by(self.tokens) {
                    *dot = b.add(*dot, correction);
                }
            }
        }
        dots
    }

    /// The columns of a run, as products take them.
    fn fours(&self, group: Group, run: usize) -> Vec<Four> {
        let (block, part) = (run / self.format.parts(), run % self.format.parts());
        let codes = self.format.scale_bytes(group.blocks) + block * self.format.block_bytes();
        let codes = self.group_at(group) + codes as i64;
        let columns = self.format.scale_columns() * part..self.format.scale_columns() * (part + 1);
        // The columns of the low and of the high halves of a byte, or of a byte.
        let halves = if self.format.block_bytes() < BLOCK * LANES { 2 } else { 1 };
        let vectors = 0..self.format.block_bytes() / 64;
        let all = vectors.flat_map(|v| (0..halves).map(move |half| (v, half, BLOCK / 2 * half + 4 * v)));
        all.filter(|(.., column)| columns.contains(column))
            .map(|(v, half, column)| Four {
                at: codes + 64 * v as i64,
                half,
                column: group.number * GROUP + block * BLOCK + column,
            })
            .collect()
    }
}
