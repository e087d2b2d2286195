//! Rotation, the cache of keys and values, and attention over it.

use std::collections::BTreeMap;

use half::f16;

use super::linear::sum_lanes;
use crate::math::{exp, soft_cap};

/// Keys that are reduced at a time, by absolute position.
const PAGE: usize = 64;
/// Lanes of a partial sum.
const LANES: usize = 16;
/// Less than any score.
const NO_SCORE: f32 = -3.0e38;

/// In what keys and values are kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KvType {
    /// IEEE half, rounded to nearest even when stored.
    F16,
    /// IEEE single.
    F32,
}

/// Keys and values of one sequence, of all layers.
#[derive(Clone, PartialEq, Debug)]
pub struct KvCache {
    kv: KvType,
    layers: BTreeMap<usize, Layer>,
}

/// By position.
#[derive(Clone, Default, PartialEq, Debug)]
struct Layer {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

/// The heads of an attention.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) window: Option<usize>,
    /// What scores are soft-capped with.
    pub(super) cap: Option<f32>,
}

impl KvCache {
    /// An empty one.
    pub fn new(kv: KvType) -> KvCache {
        KvCache { kv, layers: BTreeMap::new() }
    }

    /// Tokens of which keys and values are there.
    pub fn len(&self) -> usize {
        self.layers.values().map(|layer| layer.keys.len()).min().unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all tokens from position `len` on.
    pub fn truncate(&mut self, len: usize) {
        for layer in self.layers.values_mut() {
            layer.keys.truncate(len);
            layer.values.truncate(len);
        }
    }

    pub(super) fn store(&mut self, layer: usize, positions: &[usize], k: &[f32], v: &[f32]) {
        let kv = self.kv;
        let kept = |row: &[f32]| -> Vec<f32> {
            match kv {
                KvType::F32 => row.to_vec(),
                KvType::F16 => row.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
            }
        };
        let layer = self.layers.entry(layer).or_default();
        let columns = k.len() / positions.len().max(1);
        for ((&position, k), v) in positions.iter().zip(k.chunks(columns)).zip(v.chunks(columns)) {
            layer.keys.truncate(position);
            layer.values.truncate(position);
            layer.keys.push(kept(k));
            layer.values.push(kept(v));
        }
    }

    pub(super) fn attend(&self, layer: usize, shape: Shape, positions: &[usize], q: &[f32]) -> Vec<f32> {
        let Shape { heads, kv_heads, head_dim, window, cap } = shape;
        let layer = &self.layers[&layer];
        let mut out = Vec::with_capacity(q.len());
        for (&position, row) in positions.iter().zip(q.chunks(heads * head_dim)) {
            let end = position + 1;
            let visible = window.map_or(0, |window| end.saturating_sub(window))..end;
            for (head, q) in row.chunks(head_dim).enumerate() {
                let start = head / (heads / kv_heads) * head_dim;
                let part = |rows: &[Vec<f32>], key: usize| rows[key][start..start + head_dim].to_vec();
                let mut state: Option<(f32, f32, Vec<f32>)> = None;
                for page in visible.start / PAGE..=(visible.end - 1) / PAGE {
                    let keys = page * PAGE..(page + 1) * PAGE;
                    let of_page = reduce_page(q, cap, keys, visible.clone(), &|key| part(&layer.keys, key), &|key| {
                        part(&layer.values, key)
                    });
                    state = Some(match state {
                        None => of_page,
                        Some(before) => combine(before, of_page),
                    });
                }
                let (_, l, a) = state.expect("a token sees itself");
                let inverse = 1.0 / l;
                out.extend(a.iter().map(|a| a * inverse));
            }
        }
        out
    }
}

/// The greatest score of a page, and relative to it the sum of exponentials and the weighted sum of values.
fn reduce_page(
    q: &[f32],
    cap: Option<f32>,
    keys: std::ops::Range<usize>,
    visible: std::ops::Range<usize>,
    k: &dyn Fn(usize) -> Vec<f32>,
    v: &dyn Fn(usize) -> Vec<f32>,
) -> (f32, f32, Vec<f32>) {
    let mut scores = [NO_SCORE; PAGE];
    for (score, key) in scores.iter_mut().zip(keys.clone()).filter(|(_, key)| visible.contains(key)) {
        let s = q.iter().zip(k(key)).fold(0.0, |s, (q, k)| q.mul_add(k, s));
        *score = cap.map_or(s, |cap| soft_cap(s, cap));
    }
    let m = scores.iter().fold(NO_SCORE, |m, &s| if s > m { s } else { m });
    let mut lanes = [0.0f32; LANES];
    let mut a = vec![0.0f32; q.len()];
    for (i, key) in keys.enumerate().filter(|(_, key)| visible.contains(key)) {
        let e = exp(scores[i] - m);
        lanes[i % LANES] += e;
        for (a, v) in a.iter_mut().zip(v(key)) {
            *a = e.mul_add(v, *a);
        }
    }
    (m, sum_lanes(lanes), a)
}

/// Two pages' results, the earlier first.
fn combine(before: (f32, f32, Vec<f32>), page: (f32, f32, Vec<f32>)) -> (f32, f32, Vec<f32>) {
    let ((m0, l0, a0), (m1, l1, a1)) = (before, page);
    let m = if m0 > m1 { m0 } else { m1 };
    let (x, y) = (exp(m0 - m), exp(m1 - m));
    let a = a0.iter().zip(&a1).map(|(a0, a1)| a1.mul_add(y, a0 * x)).collect();
    (m, l1.mul_add(y, l0 * x), a)
}

/// Rotates the halves of each head against each other, then scales unless `scale` is 1.
pub(super) fn rotate(
    x: &[f32],
    positions: &[usize],
    head_dim: usize,
    scale: f32,
    rotations: &[(Vec<f32>, Vec<f32>)],
) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    let columns = x.len() / positions.len().max(1);
    for (&position, row) in positions.iter().zip(x.chunks(columns.max(1))) {
        let (cos, sin) = &rotations[position];
        for head in row.chunks(head_dim) {
            let (low, high) = head.split_at(head_dim / 2);
            let turn = low.iter().zip(high).zip(cos.iter().zip(sin));
            y.extend(turn.clone().map(|((low, high), (cos, sin))| low * cos - high * sin));
            y.extend(turn.map(|((low, high), (cos, sin))| high * cos + low * sin));
        }
    }
    if scale != 1.0 {
        y.iter_mut().for_each(|y| *y *= scale);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between -1 and 1 that look random.
    fn numbers(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn attention_over_many_pages_is_a_softmax() {
        let shape = Shape { heads: 4, kv_heads: 2, head_dim: 6, window: None, cap: None };
        let tokens = 200;
        let (k, v) = (numbers(1, tokens * 12), numbers(2, tokens * 12));
        let positions: Vec<usize> = (0..tokens).collect();
        let mut cache = KvCache::new(KvType::F32);
        cache.store(3, &positions, &k, &v);
        assert_eq!(cache.len(), tokens);
        let q: Vec<f32> = numbers(3, 24).iter().map(|q| q * 4.0).collect();
        for (position, window, cap) in [
            (0, None, None),
            (63, None, None),
            (64, None, Some(2.0)),
            (199, None, None),
            (199, Some(1), None),
            (199, Some(72), Some(0.5)),
            (130, Some(128), None),
        ] {
            let found = cache.attend(3, Shape { window, cap, ..shape }, &[position], &q);
            let first = window.map_or(0, |window: usize| (position + 1).saturating_sub(window));
            for head in 0..4 {
                let at = |rows: &[f32], key: usize, d: usize| f64::from(rows[key * 12 + head / 2 * 6 + d]);
                let score = |key| {
                    let score = (0..6).map(|d| f64::from(q[head * 6 + d]) * at(&k, key, d)).sum::<f64>();
                    cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()).exp()
                };
                let total: f64 = (first..=position).map(score).sum();
                for d in 0..6 {
                    let expected = (first..=position).map(|key| score(key) * at(&v, key, d)).sum::<f64>() / total;
                    let difference = (f64::from(found[head * 6 + d]) - expected).abs();
                    assert!(difference < 1e-6, "position {position}, {window:?}, head {head}: off by {difference:e}");
                }
            }
        }
    }

    #[test]
    fn a_rotation_turns_pairs_and_keeps_lengths() {
        let turned =
            rotate(&[3.0, 5.0, 4.0, -2.0], &[1], 4, 1.0, &[(vec![], vec![]), (vec![0.0, 1.0], vec![1.0, 0.0])]);
        assert_eq!(turned, [-4.0, 5.0, 3.0, -2.0]);
        let scaled = rotate(&[3.0, 5.0, 4.0, -2.0], &[0], 4, 0.5, &[(vec![1.0, 1.0], vec![0.0, 0.0])]);
        assert_eq!(scaled, [1.5, 2.5, 2.0, -1.0]);
    }

    #[test]
    fn halves_are_kept_as_halves() {
        let mut cache = KvCache::new(KvType::F16);
        cache.store(0, &[0], &[0.1, 70000.0], &[1.0, 2.0]);
        assert_eq!(cache.layers[&0].keys[0], [0.099975586, f32::INFINITY]);
        cache.store(0, &[0], &[0.25, 0.5], &[1.0, 2.0]);
        assert_eq!((cache.len(), &cache.layers[&0].keys[0]), (1, &vec![0.25, 0.5]), "a position is stored anew");
    }
}
