//! The numerics contract in plain scalar Rust, one element at a time: what the kernels must give, bit for bit.
//!
//! Written from the contract, not from the kernels: matrices are `[row][k]` here, and packed only at the end.

use half::{bf16, f16};
use moec::kernels::KvFormat;
use moec::plan::layout::Format;
use moec_ir::math::exp;

use crate::harness::Random;

/// Rounds up to a multiple.
pub fn up(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// A matrix with `rows` (a multiple of 16) rows: what the numbers are, and how they lie in the payload.
pub struct Matrix {
    /// Float formats: the numbers `[row][k]`.
    pub floats: Vec<Vec<f32>>,
    /// Quantized formats: value + 128, `[row][k padded to 32]`.
    pub codes: Vec<Vec<u8>>,
    /// Quantized formats: `[row][k / 32]`.
    pub scales: Vec<Vec<f32>>,
    pub packed: Vec<u8>,
}

impl Matrix {
    /// Random numbers.
    pub fn random(r: &mut Random, format: Format, rows: usize, k: usize, book: &[u8; 16]) -> Matrix {
        let kp = up(k, 32);
        let mut m = Matrix { floats: vec![], codes: vec![], scales: vec![], packed: vec![] };
        let mut nibbles = vec![];
        for _ in 0..rows {
            match format {
                Format::F32 => m.floats.push(r.f32s(k)),
                Format::Bf16 => m.floats.push((0..k).map(|_| bf16::from_f32(r.f32()).to_f32()).collect()),
                Format::F16 => m.floats.push((0..k).map(|_| f16::from_f32(r.f32()).to_f32()).collect()),
                Format::Q8 => m.codes.push((0..kp).map(|_| 1 + r.below(255) as u8).collect()),
                Format::Q4 => {
                    let n: Vec<u8> = (0..kp).map(|_| r.below(16) as u8).collect();
                    m.codes.push(n.iter().map(|&n| book[n as usize]).collect());
                    nibbles.push(n);
                }
            }
            m.scales.push((0..kp / 32).map(|_| bf16::from_f32(r.f32() * 0.01).to_f32()).collect());
        }
        for tile in 0..rows / 16 {
            let start = m.packed.len();
            let row = |l: usize| tile * 16 + l;
            match format {
                Format::F32 | Format::Bf16 | Format::F16 => {
                    for k in 0..k {
                        for l in 0..16 {
                            let x = m.floats[row(l)][k];
                            match format {
                                Format::F32 => m.packed.extend(x.to_le_bytes()),
                                Format::Bf16 => m.packed.extend(bf16::from_f32(x).to_le_bytes()),
                                _ => m.packed.extend(f16::from_f32(x).to_le_bytes()),
                            }
                        }
                    }
                }
                Format::Q8 | Format::Q4 => {
                    for first in (0..kp / 32).step_by(4) {
                        let blocks = first..(first + 4).min(kp / 32);
                        for j in blocks.clone() {
                            for l in 0..16 {
                                m.packed.extend(bf16::from_f32(m.scales[row(l)][j]).to_le_bytes());
                            }
                        }
                        m.packed.resize(start + up(m.packed.len() - start, 64), 0);
                        for j in blocks {
                            for v in 0..if format == Format::Q8 { 8 } else { 4 } {
                                for l in 0..16 {
                                    for i in 0..4 {
                                        let k = 32 * j + 4 * v + i;
                                        m.packed.push(match format {
                                            Format::Q8 => m.codes[row(l)][k],
                                            _ => nibbles[row(l)][k] | nibbles[row(l)][k + 16] << 4,
                                        });
                                    }
                                }
                            }
                        }
                    }
                }
            }
            m.packed.resize(start + up(m.packed.len() - start, 64), 0x55);
        }
        m
    }

    /// Row `row` times an activation row.
    pub fn dot(&self, row: usize, x: &Activations) -> f32 {
        let mut acc = 0.0f32;
        match x {
            Activations::Float(x) => {
                for (w, x) in self.floats[row].iter().zip(x) {
                    acc = w.mul_add(*x, acc);
                }
            }
            Activations::Quantized(x) => {
                for (b, &xscale) in x.scales.iter().enumerate() {
                    let mut t = 0.0f32;
                    for j in 2 * b..(2 * b + 2).min(x.sums.len()) {
                        let mut i = x.sums[j];
                        for k in 32 * j..32 * j + 32 {
                            i += i32::from(self.codes[row][k]) * i32::from(x.q[k]);
                        }
                        t = (i as f32).mul_add(self.scales[row][j], t);
                    }
                    acc = t.mul_add(xscale, acc);
                }
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
    /// What a weight of `format` is multiplied by.
    pub fn of(format: Format, x: &[f32]) -> Activations {
        if format.is_quantized() { Activations::Quantized(quantize(x)) } else { Activations::Float(x.to_vec()) }
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
    pub q: Vec<i8>,
    pub scales: Vec<f32>,
    pub sums: Vec<i32>,
}

impl QRow {
    /// As it lies in memory, without what pads it to its stride.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.q.iter().map(|&q| q as u8).collect();
        bytes.extend(self.scales.iter().flat_map(|s| s.to_le_bytes()));
        bytes.extend(self.sums.iter().flat_map(|s| s.to_le_bytes()));
        bytes
    }
}

/// Quantizes an activation row.
pub fn quantize(x: &[f32]) -> QRow {
    let mut x = x.to_vec();
    x.resize(up(x.len(), 32), 0.0);
    let mut row = QRow { q: vec![], scales: vec![], sums: vec![] };
    for block in x.chunks(64) {
        let amax = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        row.scales.push(amax * (1.0f32 / 127.0));
        let inv = if (127.0 / amax).is_finite() { 127.0 / amax } else { 0.0 };
        row.q.extend(block.iter().map(|x| (x * inv).round_ties_even() as i8));
    }
    row.sums = row.q.chunks(32).map(|q| -128 * q.iter().map(|&q| i32::from(q)).sum::<i32>()).collect();
    row
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

/// Attention of one head (not padded) over keys `lo .. hi`: `k` and `v` are `[key][d]`.
pub fn attention(q: &[f32], k: &[Vec<f32>], v: &[Vec<f32>], lo: usize, hi: usize) -> Vec<f32> {
    let mut state: Option<(f32, f32, Vec<f32>)> = None;
    for page in lo / 64..=(hi - 1) / 64 {
        let visible = |key: usize| (lo..hi).contains(&key);
        let keys = page * 64..page * 64 + 64;
        let score = |key: usize| q.iter().zip(&k[key]).fold(0.0f32, |s, (q, k)| q.mul_add(*k, s));
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
