//! The numerics contract in plain scalar Rust, one element at a time: what the kernels must give, bit for bit.
//!
//! Written from the contract, not from the kernels: matrices are `[row][k]` here, and packed only at the end.

use half::{bf16, f16};
use moec::kernels::KvFormat;
use moec::plan::layout::Format;
use moec_ir::graph::{RowContent, RowSums};
use moec_ir::math::{exp, soft_cap};
use std::ops::Range;

use crate::harness::Random;

/// Rounds up to a multiple.
pub fn up(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// A matrix with `rows` (a multiple of 16) rows: what the numbers are, and how they lie in the payload.
pub struct Matrix {
    /// Float formats: the numbers `[row][k]`.
    pub floats: Vec<Vec<f32>>,
    /// Quantized formats: value + 128, or with offsets the value, `[row][k padded to 32]`.
    pub codes: Vec<Vec<u8>>,
    /// Quantized formats: `[row]`, one for each [`Format::scale_columns`].
    pub scales: Vec<Vec<f32>>,
    /// Formats with offsets: as many.
    pub offsets: Vec<Vec<f32>>,
    pub packed: Vec<u8>,
}

/// What is stored for 32 weights of a row: scale and offset, or their factors, and their steps.
#[derive(Clone, Copy)]
struct Stored {
    scale: u16,
    offset: u16,
    steps: [[u8; 2]; 2],
}

/// Whether a format has codes of four bits, whether it has offsets, and how many steps of factors a block has for each, if they are that.
fn kind(format: Format) -> (bool, bool, Option<usize>) {
    match format {
        Format::F32 | Format::Bf16 | Format::F16 => panic!("{format} has no codes"),
        Format::Q8 | Format::Q8_0 => (false, false, None),
        Format::Q6K => (false, false, Some(2)),
        Format::Q5_1 => (false, true, None),
        Format::Q5K => (false, true, Some(1)),
        Format::Q4 | Format::Q4_0 | Format::Iq4Nl | Format::Mxfp4 => (true, false, None),
        Format::Iq4Xs => (true, false, Some(1)),
        Format::Q3K => (true, false, Some(2)),
        Format::Q4_1 => (true, true, None),
        Format::Q4K => (true, true, Some(1)),
        Format::Q2K => (true, true, Some(2)),
    }
}

/// The values of the four-bit codes of a format without offsets, plus 128.
fn book_of(format: Format) -> [u8; 16] {
    let plus = |values: [i32; 16]| values.map(|value| (value + 128) as u8);
    match format {
        Format::Q4 => plus([-31, -24, -19, -15, -11, -8, -5, -2, 0, 3, 6, 9, 13, 17, 22, 31]),
        Format::Q4_0 => std::array::from_fn(|i| 120 + i as u8),
        Format::Q3K => std::array::from_fn(|i| 124 + i as u8),
        Format::Iq4Nl | Format::Iq4Xs => {
            plus([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
        }
        Format::Mxfp4 => plus([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]),
        _ => panic!("{format} has no code book"),
    }
}

impl Matrix {
    /// Random numbers.
    pub fn random(r: &mut Random, format: Format, rows: usize, k: usize) -> Matrix {
        let mut m = Matrix { floats: vec![], codes: vec![], scales: vec![], offsets: vec![], packed: vec![] };
        if format.is_quantized() {
            m.quantized(r, format, rows, up(k, 32));
            return m;
        }
        for _ in 0..rows {
            m.floats.push(match format {
                Format::F32 => r.f32s(k),
                Format::Bf16 => (0..k).map(|_| bf16::from_f32(r.f32()).to_f32()).collect(),
                _ => (0..k).map(|_| f16::from_f32(r.f32()).to_f32()).collect(),
            });
        }
        for tile in 0..rows / 16 {
            let start = m.packed.len();
            // Two columns of bf16 lie in a word.
            let at_once = if format == Format::Bf16 { 2 } else { 1 };
            for first in (0..k).step_by(at_once) {
                for l in 0..16 {
                    let row = &m.floats[tile * 16 + l];
                    for k in first..first + at_once {
                        let x = row.get(k).copied().unwrap_or(0.0);
                        match format {
                            Format::F32 => m.packed.extend(x.to_le_bytes()),
                            Format::Bf16 => m.packed.extend(bf16::from_f32(x).to_le_bytes()),
                            _ => m.packed.extend(f16::from_f32(x).to_le_bytes()),
                        }
                    }
                }
            }
            m.packed.resize(start + up(m.packed.len() - start, 64), 0x55);
        }
        m
    }

    fn quantized(&mut self, r: &mut Random, format: Format, rows: usize, kp: usize) {
        let (four, offsets, steps) = kind(format);
        let book = (four && !offsets).then(|| book_of(format));
        let of_bf16 = matches!(format, Format::Q8 | Format::Q4 | Format::Mxfp4);
        let narrow = |x: f32| if of_bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() };
        let (mut stored, mut raw) = (vec![], vec![]);
        for _ in 0..rows {
            let bits: Vec<u8> = (0..kp)
                .map(|_| match (four, offsets) {
                    (true, _) => r.below(16) as u8,
                    (false, true) => r.below(32) as u8,
                    (false, false) if format == Format::Q6K => 96 + r.below(64) as u8,
                    (false, false) => 1 + r.below(255) as u8,
                })
                .collect();
            self.codes.push(bits.iter().map(|&n| book.map_or(n, |book| book[n as usize])).collect());
            raw.push(bits);
            let mut row: Vec<Stored> = vec![];
            for j in 0..kp / 32 {
                let (mut scale, mut offset) = (narrow(r.f32() * 0.01), narrow(r.f32() * 0.01));
                if steps.is_some() && j % 4 > 0 {
                    (scale, offset) = (row[j - 1].scale, row[j - 1].offset);
                }
                // Signed where there are no offsets.
                let steps = [0; 2].map(|_| [0; 2].map(|_| r.below(if offsets { 64 } else { 256 }) as u8));
                row.push(Stored { scale, offset, steps });
            }
            let wide = |bits: u16| if of_bf16 { bf16::from_bits(bits).to_f32() } else { f16::from_bits(bits).to_f32() };
            let step = |step: u8| f32::from(step as i8);
            let of_block = |s: &Stored| -> Vec<(f32, f32)> {
                let (scale, offset) = (wide(s.scale), wide(s.offset));
                match steps {
                    Some(parts) => s.steps[..parts].iter().map(|s| (scale * step(s[0]), offset * step(s[1]))).collect(),
                    None => vec![(scale, offset)],
                }
            };
            let (scales, shifts) = row.iter().flat_map(of_block).unzip();
            self.scales.push(scales);
            if offsets {
                self.offsets.push(shifts);
            }
            stored.push(row);
        }
        for tile in 0..rows / 16 {
            let start = self.packed.len();
            let row = |l: usize| tile * 16 + l;
            for first in (0..kp / 32).step_by(4) {
                let blocks = first..(first + 4).min(kp / 32);
                let packed = &mut self.packed;
                let halves = |packed: &mut Vec<u8>, of: &dyn Fn(usize) -> u16| {
                    (0..16).for_each(|l| packed.extend(of(row(l)).to_le_bytes()));
                };
                if steps.is_some() {
                    halves(packed, &|row| stored[row][first].scale);
                    if offsets {
                        halves(packed, &|row| stored[row][first].offset);
                    }
                }
                for j in blocks.clone() {
                    if let Some(parts) = steps {
                        for part in 0..parts {
                            for of in 0..if offsets { 2 } else { 1 } {
                                packed.extend((0..16).map(|l| stored[row(l)][j].steps[part][of]));
                            }
                        }
                        continue;
                    }
                    halves(packed, &|row| stored[row][j].scale);
                    if offsets {
                        halves(packed, &|row| stored[row][j].offset);
                    }
                }
                packed.resize(start + up(packed.len() - start, 64), 0);
                for j in blocks {
                    for v in 0..if four { 4 } else { 8 } {
                        for l in 0..16 {
                            for k in 32 * j + 4 * v..32 * j + 4 * v + 4 {
                                let raw = &raw[row(l)];
                                packed.push(if four { raw[k] | raw[k + 16] << 4 } else { raw[k] });
                            }
                        }
                    }
                }
            }
            self.packed.resize(start + up(self.packed.len() - start, 64), 0x55);
        }
    }

    /// Element `k` of row `row` of a quantized matrix.
    pub fn weight(&self, row: usize, k: usize) -> f32 {
        let (code, j) = (f32::from(self.codes[row][k]), k * self.scales[row].len() / self.codes[row].len());
        match self.offsets.get(row) {
            Some(offsets) => code.mul_add(self.scales[row][j], offsets[j]),
            None => (code - 128.0) * self.scales[row][j],
        }
    }

    /// Row `row` times an activation row.
    pub fn dot(&self, row: usize, x: &Activations) -> f32 {
        let columns = if self.floats.is_empty() { self.codes[row].len() } else { self.floats[row].len() };
        self.dot_from(row, x, 0..columns, 0.0)
    }

    /// `acc`, and some columns of row `row` times those of an activation row.
    pub fn dot_from(&self, row: usize, x: &Activations, columns: Range<usize>, mut acc: f32) -> f32 {
        match x {
            Activations::Float(x) => {
                for (w, x) in self.floats[row][columns.clone()].iter().zip(&x[columns]) {
                    acc = w.mul_add(*x, acc);
                }
                acc
            }
            Activations::Quantized(x) => self.quantized_dot(row, x, columns, acc),
        }
    }

    fn quantized_dot(&self, row: usize, x: &QRow, all: Range<usize>, mut acc: f32) -> f32 {
        let columns = self.codes[row].len() / self.scales[row].len();
        let end = all.end.min(self.codes[row].len()).next_multiple_of(32).min(self.codes[row].len());
        let sum = |first: usize| x.q[first..first + columns].iter().map(|&q| i32::from(q)).sum::<i32>();
        let dot = |first: usize| {
            let products = (first..first + columns).map(|k| i32::from(self.codes[row][k]) * i32::from(x.q[k]));
            products.sum::<i32>() - if self.offsets.is_empty() { 128 * sum(first) } else { 0 }
        };
        for first in (all.start..end).step_by(x.span) {
            let xscale = x.scales[first / x.span];
            let runs = (first..end.min(first + x.span)).step_by(columns);
            let mut t = None;
            for k in runs.clone() {
                let (i, scale) = (dot(k) as f32, self.scales[row][k / columns]);
                t = Some(t.map_or(i * scale, |t| i.mul_add(scale, t)));
            }
            acc = t.expect("a span has columns").mul_add(xscale, acc);
            for k in runs.filter(|_| !self.offsets.is_empty()) {
                acc = self.offsets[row][k / columns].mul_add(sum(k) as f32 * xscale, acc);
            }
        }
        acc
    }
}

/// An activation row as a product reads it.
pub enum Activations {
    Float(Vec<f32>),
    Quantized(QRow),
}

impl Activations {
    /// What a weight of `format` is multiplied by, quantized with this content.
    pub fn of(format: Format, x: &[f32], row: RowContent) -> Activations {
        if format.is_quantized() { Activations::Quantized(quantize(x, row)) } else { Activations::Float(x.to_vec()) }
    }

    /// As it lies in memory.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Activations::Float(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Activations::Quantized(q) => q.bytes(),
        }
    }
}

/// A quantized activation row.
pub struct QRow {
    pub span: usize,
    pub q: Vec<i8>,
    pub scales: Vec<f32>,
    /// The words of its sums, one kind after the other.
    pub sums: Vec<[u8; 4]>,
}

impl QRow {
    /// As it lies in memory, without what pads it to its stride.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.q.iter().map(|&q| q as u8).collect();
        bytes.extend(self.scales.iter().flat_map(|s| s.to_le_bytes()));
        bytes.extend(self.sums.iter().flatten());
        bytes
    }
}

/// Quantizes an activation row, with this content.
pub fn quantize(x: &[f32], content: RowContent) -> QRow {
    let mut x = x.to_vec();
    x.resize(up(x.len(), 32), 0.0);
    let mut row = QRow { span: content.span, q: vec![], scales: vec![], sums: vec![] };
    for block in x.chunks(row.span) {
        let amax = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        row.scales.push(amax * (1.0f32 / 127.0));
        let inv = if (127.0 / amax).is_finite() { 127.0 / amax } else { 0.0 };
        row.q.extend(block.iter().map(|x| (x * inv).round_ties_even() as i8));
    }
    let sum = |first: usize, columns: usize| row.q[first..first + columns].iter().map(|&q| i32::from(q)).sum::<i32>();
    let scaled = |first, columns| sum(first, columns) as f32 * row.scales[first / row.span];
    let mut sums: Vec<[u8; 4]> = vec![];
    for (kind, columns, scale) in [
        (RowSums::Corrections32, 32, false),
        (RowSums::Corrections16, 16, false),
        (RowSums::Scaled32, 32, true),
        (RowSums::Scaled16, 16, true),
    ] {
        for first in (0..row.q.len()).step_by(columns).filter(|_| content.has(kind)) {
            sums.push(if scale {
                scaled(first, columns).to_le_bytes()
            } else {
                (-128 * sum(first, columns)).to_le_bytes()
            });
        }
    }
    QRow { sums, ..row }
}

/// The fixed tree over 16 partial sums.
pub fn tree(p: [f32; 16]) -> f32 {
    let p: Vec<f32> = (0..8).map(|l| p[l] + p[l + 8]).collect();
    let p: Vec<f32> = (0..4).map(|l| p[l] + p[l + 4]).collect();
    (p[0] + p[2]) + (p[1] + p[3])
}

/// RMS norm of a row.
pub fn norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    norm_of(x, x.len(), weight, eps)
}

/// RMS norm of a row of which `width` elements count.
pub fn norm_of(x: &[f32], width: usize, weight: &[f32], eps: f32) -> Vec<f32> {
    let mut p = [0.0f32; 16];
    for (i, x) in x.iter().enumerate() {
        p[i % 16] = x.mul_add(*x, p[i % 16]);
    }
    let r = 1.0 / (tree(p) / width as f32 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| (x * r) * w).collect()
}

/// Elements of a padded head.
pub fn padded_head(d: usize) -> usize {
    2 * up(d.div_ceil(2), 16)
}

/// Where element `i` of a head lies in the padded head.
pub fn head_place(d: usize, i: usize) -> usize {
    if i < d.div_ceil(2) { i } else { padded_head(d) / 2 + i - d.div_ceil(2) }
}

/// A head in padded places.
pub fn pad_head(x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; padded_head(x.len())];
    for (i, &value) in x.iter().enumerate() {
        out[head_place(x.len(), i)] = value;
    }
    out
}

/// Rotates a head (not padded) by angles given by cosines and sines.
pub fn rotate(x: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
    let half = x.len() / 2;
    let mut out = x.to_vec();
    for i in 0..half {
        let (lo, hi) = (x[i], x[half + i]);
        out[i] = lo * cos[i] - hi * sin[i];
        out[half + i] = hi * cos[i] + lo * sin[i];
    }
    out
}

/// What reading gives after storing in the KV cache.
pub fn kv_round(kv: KvFormat, x: f32) -> f32 {
    match kv {
        KvFormat::F32 => x,
        KvFormat::F16 => f16::from_f32(x).to_f32(),
    }
}

/// The bytes of one KV element.
pub fn kv_bytes(kv: KvFormat, x: f32) -> Vec<u8> {
    match kv {
        KvFormat::F32 => x.to_le_bytes().to_vec(),
        KvFormat::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
    }
}

/// Attention of one head (not padded) over keys `lo .. hi`, its scores soft-capped with `cap`: `k` and `v` are `[key][d]`.
pub fn attention(q: &[f32], k: &[Vec<f32>], v: &[Vec<f32>], cap: Option<f32>, lo: usize, hi: usize) -> Vec<f32> {
    let mut state: Option<(f32, f32, Vec<f32>)> = None;
    for page in lo / 64..=(hi - 1) / 64 {
        let visible = |key: usize| (lo..hi).contains(&key);
        let keys = page * 64..page * 64 + 64;
        let score = |key: usize| {
            let s = q.iter().zip(&k[key]).fold(0.0f32, |s, (q, k)| q.mul_add(*k, s));
            cap.map_or(s, |cap| soft_cap(s, cap))
        };
        let s: Vec<f32> = keys.clone().map(|key| if visible(key) { score(key) } else { -3.0e38 }).collect();
        let m = s.iter().fold(-3.0e38f32, |m, &s| m.max(s));
        let e: Vec<f32> = keys.clone().zip(&s).map(|(key, s)| if visible(key) { exp(s - m) } else { 0.0 }).collect();
        let mut p = [0.0f32; 16];
        for (i, e) in e.iter().enumerate() {
            p[i % 16] += e;
        }
        let l = tree(p);
        let a: Vec<f32> = (0..q.len())
            .map(|d| {
                keys.clone()
                    .zip(&e)
                    .filter(|(key, _)| visible(*key))
                    .fold(0.0f32, |a, (key, e)| e.mul_add(v[key][d], a))
            })
            .collect();
        state = Some(match state {
            None => (m, l, a),
            Some((old_m, old_l, old_a)) => {
                let new = if old_m > m { old_m } else { m };
                let (x, y) = (exp(old_m - new), exp(m - new));
                let a = a.iter().zip(&old_a).map(|(a, old)| a.mul_add(y, old * x)).collect();
                (new, l.mul_add(y, old_l * x), a)
            }
        });
    }
    let (_, l, a) = state.expect("at least one page");
    a.iter().map(|a| a * (1.0 / l)).collect()
}

/// The `k` largest, ties to the lower index, and their softmax over them or over all.
pub fn top_k(logits: &[f32], k: usize, over_all: bool) -> (Vec<u32>, Vec<f32>) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).expect("numbers").then(a.cmp(&b)));
    order.truncate(k);
    let e: Vec<f32> = order.iter().map(|&i| exp(logits[i] - logits[order[0]])).collect();
    let all = logits.iter().map(|logit| exp(logit - logits[order[0]]));
    let sum = if over_all { all.reduce(|s, e| s + e) } else { e.iter().copied().reduce(|s, e| s + e) };
    let sum = sum.expect("k > 0");
    (order.iter().map(|&i| i as u32).collect(), e.iter().map(|e| e / sum).collect())
}
