//! Products, sums and norms of rows.

use super::super::attribute::Activation;
use super::super::weight::{Layout, Weight};
use super::Numbers;
use super::tensor::{BLOCK, QuantizedRows, Rows, pad_heads, padded_head_dim};
use crate::math::{padded_rms_scale, sigmoid};

/// Lanes of a partial sum.
const LANES: usize = 16;
/// Rows of a float matrix whose products are computed side by side.
const SIDE_BY_SIDE: usize = 8;

/// The numbers of a stored weight with its shape.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    /// Rows of one expert.
    rows: usize,
    experts: usize,
    /// Numbers of a row, padding included.
    columns: usize,
    /// Columns that share a scale.
    scale_columns: usize,
    /// Columns of the rows that it meets that share a scale.
    span: usize,
    numbers: Numbers,
}

impl Matrix {
    /// Checks that the numbers have the weight's size and are what the layout says.
    pub(super) fn new(
        weight: &Weight,
        layout: Layout,
        heads: Option<usize>,
        span: usize,
        numbers: Numbers,
    ) -> Result<Matrix, String> {
        let (rows, experts) = (weight.rows(), weight.experts());
        let mut columns = heads.map_or(weight.columns(), |dim| weight.columns() / dim * padded_head_dim(dim));
        if layout.is_quantized() {
            columns = columns.next_multiple_of(BLOCK);
        }
        let all = rows * experts;
        let (found, expected) = match &numbers {
            Numbers::Float(floats) if !layout.is_quantized() => (vec![floats.len()], vec![all * columns]),
            Numbers::Codes { codes, scales, offsets } if layout.is_quantized() => {
                let blocks = all * columns / layout.scale_columns();
                let expected = vec![all * columns, blocks, if layout.has_offsets() { blocks } else { 0 }];
                (vec![codes.len(), scales.len(), offsets.len()], expected)
            }
            Numbers::Float(_) | Numbers::Codes { .. } => {
                return Err(format!("the source gave no numbers for {layout}"));
            }
        };
        if found != expected {
            return Err(format!("expected {expected:?} numbers, found {found:?}"));
        }
        Ok(Matrix { rows, experts, columns, scale_columns: layout.scale_columns(), span, numbers })
    }

    /// The numbers of a float weight.
    pub(super) fn f32s(&self) -> &[f32] {
        match &self.numbers {
            Numbers::Float(numbers) => numbers,
            Numbers::Codes { .. } => panic!("a quantized weight has no floats"),
        }
    }

    /// Some rows, as f32.
    pub(super) fn rows(&self, rows: impl Iterator<Item = usize>) -> Vec<f32> {
        let number = |at: usize| match &self.numbers {
            Numbers::Float(numbers) => numbers[at],
            Numbers::Codes { codes, scales, offsets } => {
                let (code, scale) = (f32::from(codes[at]), scales[at / self.scale_columns]);
                match offsets.get(at / self.scale_columns) {
                    Some(&offset) => code.mul_add(scale, offset),
                    None => (code - 128.0) * scale,
                }
            }
        };
        rows.flat_map(|row| (row * self.columns..(row + 1) * self.columns).map(number)).collect()
    }

    /// Products of one row of `x` with `count` rows of the matrix from `first`.
    fn products(&self, x: &Rows, row: usize, first: usize, count: usize, out: &mut Vec<f32>) {
        match (&self.numbers, x) {
            (Numbers::Float(w), Rows::F32(x, columns, _)) => {
                let x = &x[row * columns..(row + 1) * columns];
                float_products(&w[first * columns..(first + count) * columns], x, out);
            }
            (Numbers::Codes { codes, scales, offsets }, Rows::Q8(x)) => {
                let blocks = self.columns / self.scale_columns;
                for r in first..first + count {
                    let codes = &codes[r * self.columns..(r + 1) * self.columns];
                    let of_row = r * blocks..(r + 1) * blocks;
                    let offsets = if offsets.is_empty() { &[] } else { &offsets[of_row.clone()] };
                    out.push(quantized_product(codes, &scales[of_row], offsets, x.row(row), x.span));
                }
            }
            (Numbers::Codes { .. }, Rows::F32(..)) | (Numbers::Float(_), Rows::Q8(_)) => {
                panic!("rows and weights must both be quantized or both not")
            }
        }
    }

    /// Rows as this matrix takes them.
    fn meet<'a>(&self, x: &'a Rows<'a>, quantized: &'a mut Option<QuantizedRows>) -> Rows<'a> {
        match (&self.numbers, x) {
            (Numbers::Codes { .. }, Rows::F32(numbers, columns, heads)) => {
                Rows::Q8(quantized.get_or_insert_with(|| QuantizedRows::new(numbers, *columns, *heads, self.span)))
            }
            (_, Rows::F32(numbers, columns, heads)) => Rows::F32(numbers, *columns, *heads),
            (_, Rows::Q8(rows)) => Rows::Q8(rows),
        }
    }
}

/// `y[t, r] = Σ_k w[r, k] × x[t, k]` for the rows of all parts (experts one after another).
pub(super) fn multiply(x: &Rows, parts: &[&Matrix]) -> Vec<f32> {
    let mut quantized: Vec<Option<QuantizedRows>> = vec![None; parts.len()];
    let met: Vec<Rows> = parts.iter().zip(&mut quantized).map(|(part, slot)| part.meet(x, slot)).collect();
    let mut y = Vec::new();
    for row in 0..x.count() {
        for (part, x) in parts.iter().zip(&met) {
            part.products(x, row, 0, part.experts * part.rows, &mut y);
        }
    }
    y
}

/// The products of each token's row, or of each of its slots' rows, with the matrix of the slot's expert, which is among those of
/// `by_expert`.
pub(super) fn expert_rows(x: &Rows, experts: &[i32], by_expert: &[&Matrix]) -> Vec<f32> {
    let mut quantized = None;
    // All are quantized or none is, and rows are quantized alike for all.
    let x = by_expert[0].meet(x, &mut quantized);
    let mut y = Vec::new();
    for (slot, &expert) in experts.iter().enumerate() {
        // As many rows as slots, or one for all the slots of a token.
        let row = slot * x.count() / experts.len();
        let w = by_expert[expert as usize];
        w.products(&x, row, expert as usize * w.rows, w.rows, &mut y);
    }
    y
}

fn float_products(w: &[f32], x: &[f32], out: &mut Vec<f32>) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the CPU has FMA, the only feature that the function needs beyond those of the target.
        return unsafe { float_products_fma(w, x, out) };
    }
    float_products_body(w, x, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "fma")]
fn float_products_fma(w: &[f32], x: &[f32], out: &mut Vec<f32>) {
    float_products_body(w, x, out);
}

/// For each row of `w`: one accumulator from +0.0, k in order, fused.
#[inline(always)]
fn float_products_body(w: &[f32], x: &[f32], out: &mut Vec<f32>) {
    let mut blocks = w.chunks_exact(x.len() * SIDE_BY_SIDE);
    for block in &mut blocks {
        let mut sums = [0.0f32; SIDE_BY_SIDE];
        for (k, &x_k) in x.iter().enumerate() {
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = block[r * x.len() + k].mul_add(x_k, *sum);
            }
        }
        out.extend(sums);
    }
    for row in blocks.remainder().chunks(x.len()) {
        out.push(row.iter().zip(x).fold(0.0, |sum, (w, x)| w.mul_add(*x, sum)));
    }
}

/// One row of codes, scales and, if there are any, offsets with one quantized row.
///
/// Columns that share a scale are multiplied and added as integers, exactly. These sums are scaled and added for each span of the quantized row, what comes
/// of it is scaled and added to the total, and after it the offsets of the span's columns, each times the row's scaled sum. All is fused but the first
/// term of a span.
fn quantized_product(
    codes: &[u8],
    scales: &[f32],
    offsets: &[f32],
    (q, x_scales): (&[i8], &[f32]),
    span: usize,
) -> f32 {
    let columns = codes.len() / scales.len();
    let sum = |q: &[i8]| q.iter().map(|&q| i32::from(q)).sum::<i32>();
    let dot = |run: usize| {
        let of_run = run * columns..(run + 1) * columns;
        let q = &q[of_run.clone()];
        let products = codes[of_run].iter().zip(q).map(|(&code, &q)| i32::from(code) * i32::from(q));
        products.sum::<i32>() - if offsets.is_empty() { 128 * sum(q) } else { 0 }
    };
    let per_span = span / columns;
    let mut total = 0.0f32;
    for (first, x_scale) in (0..scales.len()).step_by(per_span).zip(x_scales) {
        let runs = first..scales.len().min(first + per_span);
        let start = dot(first) as f32 * scales[first];
        let of_span = (first + 1..runs.end).fold(start, |sum, run| (dot(run) as f32).mul_add(scales[run], sum));
        total = of_span.mul_add(*x_scale, total);
        for (offset, q) in offsets.iter().zip(q.chunks(columns)).take(runs.end).skip(first) {
            total = offset.mul_add(sum(q) as f32 * x_scale, total);
        }
    }
    total
}

/// `a + b`.
pub(super) fn add_rows(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// `activation(gate) × up`.
pub(super) fn gated(activation: Activation, gate: &[f32], up: &[f32]) -> Vec<f32> {
    gate.iter().zip(up).map(|(&gate, up)| activation.apply(gate) * up).collect()
}

/// Columns of rows.
pub(super) fn slice(x: &[f32], columns: usize, start: usize, len: usize) -> Vec<f32> {
    x.chunks(columns).flat_map(|row| &row[start..start + len]).copied().collect()
}

/// `x + w`, row by row.
pub(super) fn add_bias(x: &[f32], w: &[f32]) -> Vec<f32> {
    x.chunks(w.len()).flat_map(|row| row.iter().zip(w).map(|(x, w)| x + w)).collect()
}

/// `x × sigmoid(gate)` for rows of `columns`, each with its gate.
pub(super) fn gate_rows(x: &[f32], gates: &[f32], columns: usize) -> Vec<f32> {
    let gated = |(row, &gate): (&[f32], &f32)| {
        let open = sigmoid(gate);
        row.iter().map(move |x| x * open).collect::<Vec<f32>>()
    };
    x.chunks(columns).zip(gates).flat_map(gated).collect()
}

/// RMS norm of each run of `heads` heads, whose squares are summed in the order of padded heads.
pub(super) fn head_norm(x: &[f32], w: &[f32], heads: usize, head_dim: usize, eps: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for run in x.chunks(heads * head_dim) {
        let r = padded_rms_scale(&pad_heads(run, head_dim), run.len(), eps);
        y.extend(run.iter().zip(w).map(|(x, w)| (x * r) * w));
    }
    y
}

/// 16 partial sums to one: lanes 8 apart, then 4, 2 and 1.
pub(super) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `(x × r) × w` with `r = 1 / sqrt(mean(x²) + eps)`, row by row.
pub(super) fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks(w.len()) {
        let mut lanes = [0.0f32; LANES];
        for vector in row.chunks(LANES) {
            for (lane, x) in lanes.iter_mut().zip(vector) {
                *lane = x.mul_add(*x, *lane);
            }
        }
        let r = 1.0 / (sum_lanes(lanes) / w.len() as f32 + eps).sqrt();
        y.extend(row.iter().zip(w).map(|(x, w)| (x * r) * w));
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_with_codes_are_products_with_what_they_stand_for() {
        let columns = 200;
        let x: Vec<f32> = (0..columns).map(|k| ((k * 37 % 101) as f32 - 50.0) / 17.0).collect();
        let rows = QuantizedRows::new(&x, columns, None, 64);
        let padded = columns.next_multiple_of(BLOCK);
        let codes: Vec<u8> = (0..padded).map(|k| (k * 91 % 255 + 1) as u8).collect();
        let scales: Vec<f32> = (0..padded / BLOCK).map(|j| 0.5f32.powi(j as i32 - 3)).collect();
        let found = quantized_product(&codes, &scales, &[], rows.row(0), 64);
        let weight = |k: usize| f64::from(scales[k / BLOCK]) * (f64::from(codes[k]) - 128.0);
        let rounded = |k: usize| f64::from(rows.codes[k]) * f64::from(rows.scales[k / 64]);
        let expected: f64 = (0..columns).map(|k| weight(k) * rounded(k)).sum();
        assert!((f64::from(found) - expected).abs() < 1e-4 * expected.abs(), "{found} {expected}");
        let exact: f64 = (0..columns).map(|k| weight(k) * f64::from(x[k])).sum();
        assert!((expected - exact).abs() < 0.05 * exact.abs(), "{expected} {exact}");
    }

    #[test]
    fn offsets_add_to_every_weight() {
        let columns = 100;
        let x: Vec<f32> = (0..columns).map(|k| ((k * 53 % 89) as f32 - 40.0) / 11.0).collect();
        let rows = QuantizedRows::new(&x, columns, None, 32);
        let padded = columns.next_multiple_of(BLOCK);
        let codes: Vec<u8> = (0..padded).map(|k| (k * 7 % 16) as u8).collect();
        let scales: Vec<f32> = (0..padded / BLOCK).map(|j| 0.75f32.powi(j as i32)).collect();
        let offsets: Vec<f32> = (0..padded / BLOCK).map(|j| 0.5 - j as f32).collect();
        let found = quantized_product(&codes, &scales, &offsets, rows.row(0), 32);
        let weight = |k: usize| f64::from(scales[k / BLOCK]) * f64::from(codes[k]) + f64::from(offsets[k / BLOCK]);
        let rounded = |k: usize| f64::from(rows.codes[k]) * f64::from(rows.scales[k / 32]);
        let expected: f64 = (0..columns).map(|k| weight(k) * rounded(k)).sum();
        assert!((f64::from(found) - expected).abs() < 1e-4 * expected.abs(), "{found} {expected}");
    }

    #[test]
    fn quantized_rows_have_a_scale_for_each_span() {
        let mut x = vec![0.0f32; 130];
        (x[0], x[1], x[129]) = (-12.7, 0.25, 3.0);
        let rows = QuantizedRows::new(&x, 130, None, 64);
        assert_eq!((rows.codes.len(), rows.scales.len()), (160, 3));
        assert_eq!((rows.codes[0], rows.codes[1], rows.codes[129]), (-127, 2, 127), "2.5 is rounded to even");
        assert_eq!(QuantizedRows::new(&x, 130, None, 32).scales.len(), 5);
        assert_eq!(QuantizedRows::new(&[0.0; 4], 4, None, 64).scales, [0.0], "zeros stay zeros");
        let tiny = QuantizedRows::new(&[1e-38, -1e-38, 1e-44, 0.0], 4, None, 64);
        assert_eq!(tiny.codes[..4], [0; 4], "127 / 1e-38 is not finite");
        assert_eq!(QuantizedRows::new(&[1e-36, -1e-36], 2, None, 64).codes[..2], [127, -127]);
    }

    #[test]
    fn heads_are_padded_before_rows_are_quantized() {
        let rows = QuantizedRows::new(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8, Some(4), 64);
        assert_eq!((rows.columns, rows.len()), (64, 1));
        let places: Vec<usize> = (0..64).filter(|&k| rows.codes[k] != 0).collect();
        assert_eq!(places, [0, 1, 16, 17, 32, 33, 48, 49]);
    }

    #[test]
    fn heads_are_normed_each_or_together() {
        let x = [3.0, 4.0, 6.0, 8.0];
        let each = head_norm(&x, &[1.0, 2.0], 1, 2, 0.0);
        let r = 1.0 / 12.5f32.sqrt();
        assert_eq!(each[..2], [3.0 * r, 4.0 * r * 2.0]);
        let together = head_norm(&x, &[1.0, 1.0, 1.0, 0.5], 2, 2, 0.0);
        let r = 1.0 / 31.25f32.sqrt();
        assert_eq!(together, [3.0 * r, 4.0 * r, 6.0 * r, 8.0 * r * 0.5]);
    }

    #[test]
    fn rows_are_gated_and_shifted() {
        assert_eq!(gate_rows(&[2.0, 4.0, 6.0, 8.0], &[0.0, 100.0], 2), [1.0, 2.0, 6.0, 8.0]);
        assert_eq!(add_bias(&[1.0, 2.0, 3.0, 4.0], &[0.5, -1.0]), [1.5, 1.0, 3.5, 3.0]);
    }

    #[test]
    fn lanes_are_summed_as_a_tree() {
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[8], lanes[4]) = (1.0e8, -1.0e8, 1.0);
        assert_eq!(sum_lanes(lanes), 1.0, "lanes 8 apart come first");
        (lanes[0], lanes[8], lanes[1]) = (1.0e8, 1.0, -1.0e8);
        assert_eq!(sum_lanes(lanes), 1.0 - 1.0, "1e8 + 1 is 1e8");
    }
}
