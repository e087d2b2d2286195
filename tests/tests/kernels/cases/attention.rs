//! Cases of heads: rotation, storing keys and values, attention.

use moec::kernels::{Attention, KvFormat, Rope, StoreKey, StoreValue, Together};

use super::HEAD_DIMS;
use crate::harness::{Arg, Case, Random, f32s, padded};
use crate::reference::{attention, head_place, kv_bytes, kv_round, pad_head, padded_head, rotate};

const KV: [KvFormat; 2] = [KvFormat::F16, KvFormat::F32];

/// A head, cosines and sines.
fn head_and_angles(r: &mut Random, d: usize) -> [Vec<f32>; 3] {
    let angles: Vec<f32> = r.f32s(d / 2);
    [r.f32s(d), angles.iter().map(|a| a.cos()).collect(), angles.iter().map(|a| a.sin()).collect()]
}

pub fn ropes() -> Vec<Case> {
    let mut r = Random::new(4);
    let mut cases = Vec::new();
    for d in HEAD_DIMS {
        for heads in [0, 1, 3] {
            let scale = (heads == 3).then(|| 1.0 / (d as f32).sqrt());
            let [_, cos, sin] = head_and_angles(&mut r, d);
            let (mut before, mut after) = (Vec::new(), Vec::new());
            for _ in 0..heads {
                let x = r.f32s(d);
                let y = rotate(&x, &cos, &sin);
                before.extend(pad_head(&x));
                after.extend(pad_head(&y.iter().map(|y| scale.map_or(*y, |s| y * s)).collect::<Vec<f32>>()));
            }
            let mut c = Case::new(Rope { head_dim: d, scale_bits: scale.map(f32::to_bits) });
            let x = c.inout("x", f32s(&before), f32s(&after));
            let (cos, sin) = (c.input("cos", f32s(&padded(&cos, 16))), c.input("sin", f32s(&padded(&sin, 16))));
            c.at(&[x, cos, sin]);
            c.ints(&[heads]);
            cases.push(c);
        }
    }
    cases
}

pub fn store_keys() -> Vec<Case> {
    let mut r = Random::new(5);
    let mut cases = Vec::new();
    for d in HEAD_DIMS {
        for kv in KV {
            for rotated in [false, true] {
                let [x, cos, sin] = head_and_angles(&mut r, d);
                let y = if rotated { rotate(&x, &cos, &sin) } else { x.clone() };
                let lane = r.below(16);
                let before = r.bytes(padded_head(d) * 16 * kv.bytes());
                let mut after = before.clone();
                for (i, y) in pad_head(&y).into_iter().enumerate() {
                    after[(i * 16 + lane) * kv.bytes()..][..kv.bytes()].copy_from_slice(&kv_bytes(kv, y));
                }
                let mut c = Case::new(StoreKey { head_dim: d, kv, rotate: rotated });
                let x = c.input("x", f32s(&pad_head(&x)));
                c.at(&[x]);
                if rotated {
                    let (cos, sin) = (c.input("cos", f32s(&padded(&cos, 16))), c.input("sin", f32s(&padded(&sin, 16))));
                    c.at(&[cos, sin]);
                } else {
                    c.ints(&[0, 0]);
                }
                let page = c.inout("keys", before, after);
                c.args.push(Arg::At(page, lane * kv.bytes()));
                cases.push(c);
            }
        }
    }
    cases
}

pub fn store_values() -> Vec<Case> {
    let mut r = Random::new(6);
    let mut cases = Vec::new();
    for d in HEAD_DIMS {
        for kv in KV {
            let x = pad_head(&r.f32s(d));
            let mut c = Case::new(StoreValue { head_dim: d, kv });
            let after = x.iter().flat_map(|&x| kv_bytes(kv, x)).collect();
            let regions = [c.input("x", f32s(&x)), c.output("values", after)];
            c.at(&regions);
            cases.push(c);
        }
    }
    cases
}

/// An attention kernel's shape, and what its tokens see.
struct Seen {
    d: usize,
    group: usize,
    kv: KvFormat,
    cap: Option<f32>,
    /// Query heads in registers together.
    rows: usize,
    heads: usize,
    tokens: usize,
    lo: i64,
    hi: usize,
}

pub fn attentions() -> Vec<Case> {
    let mut r = Random::new(7);
    let mut cases = Vec::new();
    let mut add = |seen: Seen| {
        let Seen { d, group, kv, cap, rows, heads, tokens, lo, hi } = seen;
        let size = padded_head(d);
        let sees = |token: usize| ((lo + token as i64).max(0) as usize, hi + token);
        let (first, end) = (sees(0).0, sees(tokens - 1).1);
        let pages = end.div_ceil(64);
        let random_rows = |r: &mut Random| -> Vec<Vec<f32>> {
            (0..pages * 64).map(|_| (0..d).map(|_| kv_round(kv, r.f32())).collect()).collect()
        };
        let keys_and_values: Vec<_> = (0..heads).map(|_| [random_rows(&mut r), random_rows(&mut r)]).collect();
        let [q_gap, out_gap] = [0, 1].map(|_| if tokens > 1 { 16 * r.below(3) } else { 0 });
        let (mut q, mut out) = (Vec::new(), Vec::new());
        for token in 0..tokens {
            let (lo, hi) = sees(token);
            for [k, v] in &keys_and_values {
                for _ in 0..group {
                    let head = r.f32s(d);
                    out.extend(pad_head(&attention(&head, k, v, cap, lo, hi)));
                    q.extend(pad_head(&head));
                }
            }
            if token + 1 < tokens {
                q.resize(q.len() + q_gap, f32::NAN);
                // What lies between is not written: it stays the garbage that it is.
                out.resize(out.len() + out_gap, f32::from_le_bytes([0xa5; 4]));
            }
        }
        let stride = |gap: usize| 4 * (heads * group * size + gap);
        let (q_stride, out_stride) = (stride(q_gap), stride(out_gap));
        let together = (tokens > 1).then_some(Together { tokens, q_stride, out_stride });

        let (offset, half) = (64 * r.below(3), 64 * size * kv.bytes());
        let (cap_bits, vectors) = (cap.map(f32::to_bits), if rows == 4 { 1 } else { 2 });
        let kernel = Attention { head_dim: d, group, kv, cap_bits, rows, vectors, together };
        let scratch_bytes = heads * kernel.scratch_bytes();
        let mut c = Case::new(kernel);
        let (q, out) = (c.input("q", f32s(&q)), c.output("out", f32s(&out)));
        let (table, scratch) = (c.input("pages", vec![0; 8 * pages]), c.scratch("scratch", scratch_bytes));
        for p in first / 64..pages {
            // What no visible key explains is not a number, so that it shows when it is used.
            let mut page = vec![0xff; offset + heads * 2 * half];
            for (head, [k, v]) in keys_and_values.iter().enumerate() {
                let k_offset = offset + head * 2 * half;
                let v_offset = k_offset + half;
                for slot in 0..64 {
                    let key = 64 * p + slot;
                    let visible = (first..end).contains(&key);
                    let whole_tile =
                        (slot / 16 * 16..slot / 16 * 16 + 16).any(|s| (first..end).contains(&(64 * p + s)));
                    let mut put = |at: usize, x: f32| page[at..at + kv.bytes()].copy_from_slice(&kv_bytes(kv, x));
                    let k_at = |place: usize| k_offset + ((slot / 16 * size + place) * 16 + slot % 16) * kv.bytes();
                    let v_at = |place: usize| v_offset + (slot * size + place) * kv.bytes();
                    for place in 0..size {
                        if whole_tile {
                            put(k_at(place), 0.0);
                        }
                        if visible {
                            put(v_at(place), 0.0);
                        }
                    }
                    for i in 0..d {
                        let place = head_place(d, i);
                        if whole_tile {
                            put(k_at(place), k[key][i]);
                        }
                        if visible {
                            put(v_at(place), v[key][i]);
                        }
                    }
                }
            }
            let page = c.input("page", page);
            c.pointers.push([table, 8 * p, page, 0]);
        }
        c.at(&[q, table]);
        c.ints(&[offset, heads]);
        c.args.push(Arg::Int(lo));
        c.ints(&[hi]);
        c.at(&[out, scratch]);
        cases.push(c);
    };
    for d in HEAD_DIMS {
        for kv in KV {
            for (i, (lo, hi)) in
                [(0, 1), (0, 17), (0, 64), (0, 65), (0, 200), (63, 64), (70, 131), (5, 130)].into_iter().enumerate()
            {
                if d <= 32 || i % 3 == 1 {
                    let cap = (i % 3 == 1).then_some([0.7, 50.0][i % 2]);
                    let (group, rows) = (1 + (i + d / 4) % 6, [4, 8, 2][i % 3]);
                    add(Seen { d, group, kv, cap, rows, heads: 1 + i % 3, tokens: 1, lo, hi });
                }
            }
        }
    }
    let (f16, f32) = (KvFormat::F16, KvFormat::F32);
    for (d, group, kv, cap, rows, lo, hi) in [
        (16, 8, f16, None, 8, 0, 150),
        (256, 2, f16, Some(50.0), 4, 3, 70),
        (16, 19, f32, Some(3.0), 8, 30, 90),
        (128, 4, f16, None, 4, 100, 201),
        (16, 2, f16, None, 4, -7, 40),
    ] {
        add(Seen { d, group, kv, cap, rows, heads: 1 + group % 2, tokens: 1, lo, hi });
    }
    // Several tokens: all that they see before the first whole page, whole pages alone, borders of windows in one page and in two, pages that only some see.
    for (i, (lo, hi)) in [
        (-16, 1),
        (-16, 62),
        (-16, 64),
        (-16, 65),
        (-16, 190),
        (0, 128),
        (62, 131),
        (-1, 66),
        (66, 67),
        (10, 250),
        (57, 118),
    ]
    .into_iter()
    .enumerate()
    {
        for (group, rows) in [(1, 8), (2, 8), (3, 4), (4, 8), (4, 4), (5, 8), (8, 8)] {
            let kv = [f16, f32][(i + group) % 2];
            let cap = (i % 4 == 1).then_some(0.7);
            let tokens = Attention::tokens_together(group, rows);
            add(Seen { d: [16, 32, 22][i % 3], group, kv, cap, rows, heads: 1 + i % 2, tokens, lo, hi });
        }
    }
    add(Seen { d: 128, group: 4, kv: f16, cap: None, rows: 8, heads: 1, tokens: 4, lo: -4, hi: 130 });
    cases
}
