//! What a product prefetches of its weights, and when.
//!
//! A line beside each line of weights that is read, and never many at once: while a core waits for as many lines as it can, loads from its second cache wait
//! behind them. Deliberately absent: how far ahead and in how many streams is best, which is the tuning's.

use moec_ir::tile::{Value, build::Builder};
use std::fmt;
use std::ops::Range;

use super::{Inputs, Matmul, Tiles};

/// What a kernel prefetches by itself, of the rows that one call goes through.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Prefetch {
    /// Nothing: it is left to the CPU.
    None,
    /// What lies so many bytes ahead of what is read.
    Ahead(usize),
    /// The tiles after those that it computes, each as so many streams: one line of each of as many parts in turn. Memory is faster with several
    /// streams than with one. Where tiles lie apart, and are streams themselves, nothing.
    Next(usize),
}

impl fmt::Display for Prefetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Prefetch::None => f.write_str("nothing prefetched"),
            Prefetch::Ahead(bytes) => write!(f, "weights prefetched {bytes} bytes ahead"),
            Prefetch::Next(streams) => write!(f, "the next tiles prefetched in {streams} streams"),
        }
    }
}

/// The tiles after those that are computed, of which each step of K prefetches its share of each stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Next {
    /// Where the share of the next step begins in the first stream.
    pub(super) at: Value,
    pub(super) streams: usize,
    /// Bytes from a stream to the next.
    pub(super) apart: i64,
}

impl Next {
    /// What of each stream belongs to so many bytes of a tile.
    pub(super) fn share(self, bytes: i64) -> i64 {
        bytes / self.streams as i64
    }
}

/// What is prefetched in a step of K, line by line.
#[derive(Debug)]
pub(super) struct Lines<'a> {
    w: &'a Tiles,
    ahead: Option<i64>,
    next: Option<Next>,
    /// Where the step begins in each tile, in bytes from where the walk has come to.
    step: i64,
    /// Lines of `next` so far.
    count: usize,
    later: Option<Later>,
}

/// Weights that come later than the next ones: of each tile a line, and that so many bytes further.
#[derive(Debug)]
struct Later {
    at: Vec<Value>,
    stride: Value,
}

impl Matmul {
    /// The tiles after `count` that begin at `w`, if they are prefetched.
    pub(super) fn next_tiles(&self, b: &mut Builder, w: Value, count: usize) -> Option<Next> {
        let Prefetch::Next(streams) = self.tuning.prefetch else { return None };
        let at = b.add_int(w, (count * self.tile_bytes()) as i64);
        let lines = self.format.tile_bytes(self.k).div_ceil(64);
        Some(Next { at, streams, apart: 64 * lines.div_ceil(streams) as i64 })
    }

    /// What is prefetched in a step that begins `step` bytes into each tile.
    pub(super) fn lines<'a>(&self, b: &mut Builder, from: Inputs, w: &'a Tiles, step: i64) -> Lines<'a> {
        let ahead = match self.tuning.prefetch {
            Prefetch::Ahead(bytes) => Some(bytes as i64),
            Prefetch::None | Prefetch::Next(_) => None,
        };
        let later = from.later.map(|(ahead, stride)| {
            let at = w.at.iter().map(|&w| b.add(w, ahead)).collect();
            Later { at, stride }
        });
        Lines { w, ahead, next: w.next, step, count: 0, later }
    }
}

impl Lines<'_> {
    /// Prefetches beside the lines that begin so many bytes into each tile.
    pub(super) fn beside(&mut self, b: &mut Builder, lines: impl IntoIterator<Item = i64>) {
        let tiles = 0..self.w.count();
        for line in lines {
            if let Some(ahead) = self.ahead {
                tiles.clone().map(|tile| self.w.address(tile, ahead + line)).for_each(|(w, at)| b.prefetch(w, at));
            }
            self.next_line(b);
            if let Some(Later { at, stride }) = &mut self.later {
                for (i, offset) in &self.w.each {
                    b.prefetch(at[*i], offset + self.step);
                }
                at.iter_mut().for_each(|at| *at = b.add(*at, *stride));
            }
        }
    }

    /// Prefetches the lines that bring all streams as far as the first.
    pub(super) fn finish(mut self, b: &mut Builder) {
        while self.next.is_some_and(|next| !self.count.is_multiple_of(next.streams)) {
            self.next_line(b);
        }
    }

    fn next_line(&mut self, b: &mut Builder) {
        let Some(next) = self.next else { return };
        let line = next.apart * (self.count % next.streams) as i64 + 64 * (self.count / next.streams) as i64;
        self.w.each.iter().for_each(|(_, offset)| b.prefetch(next.at, offset + next.share(self.step) + line));
        self.count += 1;
    }
}

/// Where the cache lines begin that begin in these bytes.
pub(super) fn lines(bytes: Range<usize>) -> impl Iterator<Item = i64> {
    (bytes.start.next_multiple_of(64)..bytes.end).step_by(64).map(|at| at as i64)
}
