//! Products that go through their columns in parts.

use moec::kernels::{Dot, Epilogue, Matmul, MatmulTuning, Prefetch};
use moec::plan::layout::{Format, GROUP};
use moec_ir::graph::Activation;
use std::ops::Range;

use super::interleaved;
use crate::harness::{Arg, Case, Random, f32s};
use crate::reference::{Activations, Matrix};

/// One part of the product that `whole` is, which begins with random sums where it is not the first.
fn part(r: &mut Random, whole: &Matmul, columns: &Range<usize>, units: usize) -> Case {
    let Matmul { format, k, tokens, row, epilogue, y_stride, .. } = *whole;
    let (tiles, n) = (epilogue.tiles(), units * epilogue.tiles());
    let w = Matrix::random(r, format, 16 * n, k);
    let x: Vec<Activations> = (0..tokens).map(|_| Activations::of(format, &r.f32s(k), row)).collect();
    let xs = interleaved(&x.iter().map(Activations::bytes).collect::<Vec<_>>());
    let kernel = whole.in_part(columns);
    let (first, last) = (columns.start == 0, columns.end == k);

    // Sums lie by unit, tile, token and row of the tile.
    let before = r.f32s(n * tokens * 16);
    let place = |tile: usize, t: usize, lane: usize| (tile * tokens + t) * 16 + lane;
    let mut after = before.clone();
    for tile in 0..n {
        for (t, x) in x.iter().enumerate() {
            for lane in 0..16 {
                let sum = &mut after[place(tile, t, lane)];
                *sum = w.dot_from(16 * tile + lane, x, columns.clone(), if first { 0.0 } else { *sum });
            }
        }
    }
    let old = r.f32s(((tokens - 1) * y_stride) / 4 + 16 * units);
    let mut new = old.clone();
    for i in (0..tokens * 16 * units).filter(|_| last) {
        let (t, unit, lane) = (i / (16 * units), i / 16 % units, i % 16);
        let [one, two] = [0, tiles - 1].map(|tile| after[place(unit * tiles + tile, t, lane)]);
        let y = &mut new[t * y_stride / 4 + 16 * unit + lane];
        *y = match epilogue {
            Epilogue::Store => one,
            Epilogue::Add => *y + one,
            Epilogue::Gated(activation) => activation.apply(one) * two,
        };
    }

    let mut c = Case::new(kernel);
    let [w, x] = [c.input("w", w.packed), c.input("x", xs)];
    let y = c.inout("y", f32s(&old), f32s(&new));
    let sums = match (first, last) {
        (true, false) => c.output("sums", f32s(&after)),
        (false, false) => c.inout("sums", f32s(&before), f32s(&after)),
        (_, true) => c.input("sums", f32s(&before)),
    };
    c.args.push(Arg::At(w, format.bytes_before(columns.start)));
    c.args.extend([Arg::At(x, 0), Arg::Int((columns.start * tokens) as i64), Arg::At(y, 0)]);
    c.args.extend([Arg::Int(units as i64), Arg::At(sums, 0)]);
    if whole.fetch {
        c.ints(&[4096, 21 * units]);
    }
    c
}

pub fn parts() -> Vec<Case> {
    let mut r = Random::new(21);
    let mut cases = Vec::new();
    let epilogues = [Epilogue::Store, Epilogue::Add, Epilogue::Gated(Activation::Silu)];
    for (i, format) in Format::ALL.into_iter().enumerate() {
        let k = if format.is_exact() { 3 * GROUP + 32 } else { 2 * GROUP + 100 };
        for (j, columns) in [0..GROUP, GROUP..2 * GROUP, 2 * GROUP..k].into_iter().enumerate() {
            let (tiles, tokens) = [(1, 3), (2, 6), (4, 2), (2, 1)][(i + j) % 4];
            let tuning =
                MatmulTuning { tiles, unroll: 1 + i % 2, prefetch: [Prefetch::None, Prefetch::Next(3)][i % 2] };
            let (epilogue, units) = (epilogues[(i / 2 + j) % 3], 1 + (i + j) % 4);
            let whole = Matmul {
                format,
                k,
                part: None,
                fetch: (i + j) % 3 > 0,
                tokens,
                row: format.row(),
                dot: match (i + j) % 3 {
                    0 if format.small().is_some() => Dot::Small,
                    1 => Dot::Signed,
                    _ => Dot::Unsigned,
                },
                epilogue,
                y_stride: 64 * (units + 1),
                tuning,
            };
            cases.push(part(&mut r, &whole, &columns, units));
        }
    }
    cases
}
