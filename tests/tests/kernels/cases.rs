//! Cases for every kernel family: odd and even shapes, with what the reference says they must give.

mod attention;
mod parts;

use half::{bf16, f16};
use moec::kernels::{
    Combine, Dot, Elementwise, ElementwiseOp, Embed, EmbedTile, Epilogue, GateRow, Interleave, Kernel, Matmul,
    MatmulTuning, Norm, Outputs, Prefetch, Quantize, SoftCap, SortByExpert, TopK,
};
use moec::plan::layout::Format;
use moec_ir::graph::{Activation, RowContent};
use moec_ir::math::{gelu, sigmoid, silu, soft_cap};

use crate::harness::{Case, Random, f32s, padded, u32s};
use crate::reference::{Activations, Matrix, norm, norm_of, pad_head, quantize, top_k};

const HEAD_DIMS: [usize; 7] = [16, 20, 22, 24, 32, 64, 128];

/// The cases of the family of this name.
pub fn of(family: &str) -> Vec<Case> {
    match family {
        "Matmul" => matmuls().into_iter().chain(parts::parts()).collect(),
        "Interleave" => interleaves(),
        "Norm" => norms(),
        "Quantize" => quantizes(),
        "Rope" => attention::ropes(),
        "StoreKey" => attention::store_keys(),
        "StoreValue" => attention::store_values(),
        "Attention" => attention::attentions(),
        "Embed" => embeds(),
        "EmbedTile" => embed_tiles(),
        "TopK" => top_ks(),
        "SortByExpert" => sorts(),
        "Combine" => combines(),
        "Elementwise" => elementwises(),
        "GateRow" => gate_rows(),
        "SoftCap" => soft_caps(),
        other => panic!("no cases for kernels of the family {other}"),
    }
}

/// Rows of words beside each other.
fn interleaved(rows: &[Vec<u8>]) -> Vec<u8> {
    let words = rows[0].len() / 4;
    (0..words).flat_map(|w| rows.iter().flat_map(move |row| row[4 * w..4 * w + 4].to_vec())).collect()
}

/// One matrix product with random content.
pub fn matmul(r: &mut Random, kernel: Matmul, units: usize) -> Case {
    let Matmul { format, k, tokens, row, epilogue, .. } = kernel;
    let w = Matrix::random(r, format, 16 * units * epilogue.tiles(), k);
    let x: Vec<Activations> = (0..tokens).map(|_| Activations::of(format, &r.f32s(k), row)).collect();
    let xs = interleaved(&x.iter().map(Activations::bytes).collect::<Vec<_>>());
    let before = f32s(&r.f32s(((tokens - 1) * kernel.y_stride) / 4 + 16 * units));
    let mut after = before.clone();
    for (t, x) in x.iter().enumerate() {
        for i in 0..16 * units {
            let at = t * kernel.y_stride + 4 * i;
            let old = f32::from_le_bytes([before[at], before[at + 1], before[at + 2], before[at + 3]]);
            let dot = |row_of_w: usize| w.dot(row_of_w, x);
            let y = match epilogue {
                Epilogue::Store => dot(i),
                Epilogue::Add => old + dot(i),
                Epilogue::Gated(activation) => {
                    activation.apply(dot(i / 16 * 32 + i % 16)) * dot(i / 16 * 32 + 16 + i % 16)
                }
            };
            after[at..at + 4].copy_from_slice(&y.to_le_bytes());
        }
    }
    let later = kernel.fetch;
    let mut c = Case::new(kernel);
    let regions = [c.input("w", w.packed), c.input("x", xs), c.inout("y", before, after)];
    c.at(&regions);
    c.ints(&[units]);
    if later {
        c.ints(&[4096, 64 * tokens / 16]);
    }
    c
}

fn matmuls() -> Vec<Case> {
    let mut r = Random::new(1);
    let mut cases = Vec::new();
    let mut add = |format: Format, k: usize, tokens: usize, epilogue: Epilogue, tuning: MatmulTuning, units: usize| {
        let y_stride = 64 * (units.max(1) + r.below(3));
        // Rows are as fine as the finest of their weights asks for, and have what others need.
        let row = match tokens {
            3 => RowContent::new(32, format.row_sums()),
            4 => RowContent::new(64, format.row_sums()),
            6 => format.row().and(Format::Q8.row()).and(Format::Q2K.row()),
            _ => format.row(),
        };
        let fetch = tokens == 6;
        let dot = match cases.len() % 3 {
            0 if format.small().is_some() => Dot::Small,
            1 => Dot::Signed,
            _ => Dot::Unsigned,
        };
        let kernel = Matmul { format, k, part: None, fetch, tokens, row, dot, epilogue, y_stride, tuning };
        cases.push(matmul(&mut r, kernel, units));
    };
    let epilogues = [Epilogue::Store, Epilogue::Add, Epilogue::Gated(Activation::Silu)];
    let mut choices = Random::new(6);
    for format in Format::ALL {
        let default = MatmulTuning::plain(format);
        // Formats of stored codes differ from moec's own in their codes and scales only, and have whole blocks.
        let exact = format.is_exact();
        let ks: &[usize] = if exact { &[32, 96, 160, 384] } else { &[20, 32, 96, 100, 128, 144, 160, 384, 656] };
        let counts: &[usize] = if exact { &[1, 3, 6] } else { &[1, 2, 3, 4, 6, 8, 12] };
        for (i, &k) in ks.iter().enumerate() {
            for &tokens in counts {
                add(format, k, tokens, epilogues[(i + tokens) % 3], default, 1 + tokens % 2);
            }
        }
        for tiles in if exact { vec![2] } else { vec![1, 2, 4] } {
            for unroll in if exact { vec![1, 2] } else { vec![1, 2, 3, 5] } {
                let tuning =
                    MatmulTuning { tiles, unroll, prefetch: [Prefetch::Next(4), Prefetch::Ahead(1024)][unroll % 2] };
                for epilogue in epilogues {
                    add(format, 96 + 192 * unroll, 1 + (tiles + unroll) % 4, epilogue, tuning, tiles + unroll % 3);
                }
            }
        }
        // Whatever a tuning record may say.
        for _ in 0..if exact { 1 } else { 4 } {
            let tiles = [1, 2, 4, 8][choices.below(4)];
            let tokens = 1 + choices.below((64 / tiles).min(16));
            let unroll = 1 + choices.below(if tiles * tokens > 16 { 2 } else { 4 });
            let prefetch = match choices.below(3) {
                0 => Prefetch::None,
                1 => Prefetch::Ahead(64 * (1 + choices.below(1024))),
                _ => Prefetch::Next(1 + choices.below(8)),
            };
            let epilogue = epilogues[choices.below(3)];
            add(format, 160, tokens, epilogue, MatmulTuning { tiles, unroll, prefetch }, 1 + choices.below(9));
        }
        if !exact {
            add(format, 160, 1, Epilogue::Store, default, 0);
            add(format, 4096, 1, Epilogue::Add, default, 1);
            add(format, 4096 + 32, 2, Epilogue::Gated(Activation::Silu), default, 1);
            add(format, 160, 3, Epilogue::Gated(Activation::Gelu), default, 2);
        }
    }
    cases
}

fn interleaves() -> Vec<Case> {
    let mut r = Random::new(13);
    let mut cases = Vec::new();
    for tokens in [1, 2, 3, 6, 12] {
        for (bytes, gap, gather) in [(64, 0, false), (192, 64, true), (4864, 0, true), (4864, 128, false)] {
            let stride = bytes + gap;
            let count = if gather { tokens + 3 } else { tokens };
            let x = r.bytes((count - 1) * stride + bytes);
            let chosen: Vec<usize> = (0..tokens).map(|t| if gather { r.below(count) } else { t }).collect();
            let rows: Vec<Vec<u8>> = chosen.iter().map(|row| x[row * stride..][..bytes].to_vec()).collect();
            let mut c = Case::new(Interleave { bytes, stride, tokens, gather });
            let x = c.input("x", x);
            let list = c.input("rows", u32s(&chosen.iter().map(|&row| row as u32).collect::<Vec<_>>()));
            let out = c.output("out", interleaved(&rows));
            c.at(&[x, list, out]);
            cases.push(c);
        }
    }
    cases
}

/// What rows hold that meet moec's own formats, one of stored codes, and all of them.
fn contents() -> [RowContent; 3] {
    let all = Format::ALL.into_iter().fold(RowContent::NO_SUMS, |row, format| row.and(format.row()));
    [Format::Q8.row(), Format::Q2K.row(), all]
}

fn norms() -> Vec<Case> {
    let mut r = Random::new(2);
    let mut cases = Vec::new();
    let [plain, fine, full] = contents();
    let all = [
        (Outputs::F32, plain),
        (Outputs::Quantized, plain),
        (Outputs::Both, plain),
        (Outputs::Quantized, fine),
        (Outputs::Both, full),
    ];
    for (outputs, row) in all {
        for h in [16, 20, 32, 96, 100, 128, 144, 160, 300, 4096] {
            let (x, weight, eps) = (r.f32s(h), r.f32s(h), 1e-5f32);
            let y = norm(&x, &weight, eps);
            let mut c = Case::new(Norm { h, width: h, eps_bits: eps.to_bits(), outputs, row });
            let (x, weight) = (c.input("x", f32s(&padded(&x, 16))), c.input("weight", f32s(&padded(&weight, 16))));
            c.at(&[x, weight]);
            match outputs {
                Outputs::Quantized => c.ints(&[0]),
                Outputs::F32 | Outputs::Both => {
                    let y = c.output("y", f32s(&padded(&y, 32)));
                    c.at(&[y]);
                }
            }
            match outputs {
                Outputs::F32 => c.ints(&[0]),
                Outputs::Quantized | Outputs::Both => {
                    let q = c.output("q", quantize(&y, row).bytes());
                    c.at(&[q]);
                }
            }
            cases.push(c);
        }
    }
    // Padded heads: the mean is taken over what counts.
    for head_dim in HEAD_DIMS {
        let (x, weight, eps) = (pad_head(&r.f32s(head_dim)), pad_head(&r.f32s(head_dim)), 1e-6f32);
        let kernel = Norm {
            h: x.len(),
            width: head_dim,
            eps_bits: eps.to_bits(),
            outputs: Outputs::F32,
            row: RowContent::NO_SUMS,
        };
        let mut c = Case::new(kernel);
        let regions = [
            c.input("x", f32s(&x)),
            c.input("weight", f32s(&weight)),
            c.output("y", f32s(&norm_of(&x, head_dim, &weight, eps))),
        ];
        c.at(&regions);
        c.ints(&[0]);
        cases.push(c);
    }
    // In place.
    let (x, weight) = (r.f32s(96), r.f32s(96));
    let mut c = Case::new(Norm {
        h: 96,
        width: 96,
        eps_bits: 1e-6f32.to_bits(),
        outputs: Outputs::F32,
        row: RowContent::NO_SUMS,
    });
    let x_region = c.inout("x", f32s(&x), f32s(&norm(&x, &weight, 1e-6)));
    let weight = c.input("weight", f32s(&weight));
    c.at(&[x_region, weight, x_region]);
    c.ints(&[0]);
    cases.push(c);
    cases
}

fn quantizes() -> Vec<Case> {
    let mut r = Random::new(3);
    [16, 20, 32, 96, 100, 128, 144, 160, 300, 4096]
        .into_iter()
        .flat_map(|k| {
            let x = r.f32s(k);
            let mut one_zero_block = x.clone();
            one_zero_block.iter_mut().take(128).for_each(|x| *x = 0.0);
            // Magnitudes around the least that has a scale (127 / f32::MAX is 3.7e-37), down to denormals.
            let scale = |i: usize| [1e-37, 1e-36, 1e-40][(i / 64 + k) % 3];
            let tiny = x.iter().enumerate().map(|(i, x)| x * scale(i)).collect();
            [x, one_zero_block, tiny]
        })
        .flat_map(|x| contents().map(|row| (x.clone(), row)))
        .map(|(x, row)| {
            let mut c = Case::new(Quantize { k: x.len(), row });
            let regions = [c.input("x", f32s(&padded(&x, 16))), c.output("q", quantize(&x, row).bytes())];
            c.at(&regions);
            c
        })
        .collect()
}

fn embeds() -> Vec<Case> {
    let mut r = Random::new(8);
    let mut cases = Vec::new();
    for format in [Format::F32, Format::Bf16, Format::F16] {
        for (h, scale) in [16, 20, 32, 44, 64, 96, 100, 160, 4096].map(|h| (h, (h % 3 == 1).then_some(7.3f32))) {
            let x = r.f32s(h);
            let (mut row, mut y) = (Vec::new(), Vec::new());
            for x in x {
                match format {
                    Format::F32 => {
                        row.extend(x.to_le_bytes());
                        y.push(x);
                    }
                    Format::Bf16 => {
                        row.extend(bf16::from_f32(x).to_le_bytes());
                        y.push(bf16::from_f32(x).to_f32());
                    }
                    _ => {
                        row.extend(f16::from_f32(x).to_le_bytes());
                        y.push(f16::from_f32(x).to_f32());
                    }
                }
            }
            row.extend([0xff; 64]);
            y.iter_mut().for_each(|y| *y *= scale.unwrap_or(1.0));
            let mut c = Case::new(Embed { format, h, scale_bits: scale.map(f32::to_bits) });
            let regions = [c.input("row", row), c.output("y", f32s(&padded(&y, 32)))];
            c.at(&regions);
            cases.push(c);
        }
    }
    cases
}

fn embed_tiles() -> Vec<Case> {
    let mut r = Random::new(14);
    let mut cases = Vec::new();
    for format in Format::ALL.into_iter().filter(|format| format.is_exact()) {
        for k in [32, 96, 128, 160, 384] {
            let w = Matrix::random(&mut r, format, 16, k);
            for lane in [0, 1 + r.below(14), 15] {
                let scale = (lane == 15).then_some(7.3f32);
                let y: Vec<f32> = (0..k).map(|k| w.weight(lane, k) * scale.unwrap_or(1.0)).collect();
                let mut c = Case::new(EmbedTile { format, k, scale_bits: scale.map(f32::to_bits) });
                let tile = c.input("tile", w.packed.clone());
                c.at(&[tile]);
                c.ints(&[lane]);
                let y = c.output("y", f32s(&y));
                c.at(&[y]);
                cases.push(c);
            }
        }
    }
    cases
}

fn top_ks() -> Vec<Case> {
    let mut r = Random::new(9);
    let mut cases = Vec::new();
    for experts in (1..=16).chain([60, 128]) {
        for k in (1..=experts).filter(|&k| k <= 4 || k == experts || k == 8) {
            for network in [false, true] {
                if network && experts > 16 {
                    continue;
                }
                for kind in 0..4 {
                    let logits: Vec<f32> = match kind {
                        0 => vec![1.5; experts],
                        // Few values, so that many tie.
                        1 => (0..experts).map(|_| r.below(3) as f32 - 1.0).collect(),
                        2 => (0..experts).map(|i| i as f32 * -3.0).collect(),
                        _ => r.f32s(experts),
                    };
                    for over_all in [false, true] {
                        let (indices, weights) = top_k(&logits, k, over_all);
                        let mut c = Case::new(TopK { experts, k, network, over_all });
                        let regions = [
                            c.input("logits", f32s(&logits)),
                            c.output("indices", u32s(&indices)),
                            c.output("weights", f32s(&weights)),
                        ];
                        c.at(&regions);
                        cases.push(c);
                    }
                }
            }
        }
    }
    cases
}

fn sorts() -> Vec<Case> {
    let mut r = Random::new(10);
    let mut cases = Vec::new();
    for experts in [1, 3, 8, 16] {
        for k in [1, 2, 3].into_iter().filter(|&k| k <= experts) {
            for tokens in [0, 1, 2, 17] {
                let indices: Vec<usize> = (0..tokens * k).map(|_| r.below(experts)).collect();
                let mut slots: Vec<usize> = (0..tokens * k).collect();
                slots.sort_by_key(|&s| indices[s]);
                let offsets: Vec<u32> =
                    (0..=experts).map(|e| indices.iter().filter(|&&i| i < e).count() as u32).collect();
                let order: Vec<u32> = slots.iter().map(|&s| (s / k) as u32).collect();
                let mut positions = vec![0; tokens * k];
                for (p, &s) in slots.iter().enumerate() {
                    positions[s] = p as u32;
                }
                let mut c = Case::new(SortByExpert { experts, k });
                let indices = c.input("indices", u32s(&indices.iter().map(|&i| i as u32).collect::<Vec<u32>>()));
                c.at(&[indices]);
                c.ints(&[tokens]);
                let written = [
                    c.output("offsets", u32s(&offsets)),
                    c.output("order", u32s(&order)),
                    c.output("positions", u32s(&positions)),
                ];
                c.at(&written);
                cases.push(c);
            }
        }
    }
    cases
}

fn combines() -> Vec<Case> {
    let mut r = Random::new(11);
    let mut cases = Vec::new();
    for k in [1, 2, 3, 8] {
        for (gather, residual) in [(false, false), (false, true), (true, false), (true, true)] {
            for columns in [0, 16, 112] {
                let stride_d = 4 * (columns + 16 * r.below(3));
                let rows = if gather { k + 4 } else { k };
                let d = r.f32s((rows - 1) * stride_d / 4 + columns);
                let positions: Vec<usize> = (0..k).map(|s| if gather { r.below(rows) } else { s }).collect();
                let (weights, x) = (r.f32s(k), r.f32s(columns));
                let after: Vec<f32> = (0..columns)
                    .map(|c| {
                        let d = |s: usize| d[positions[s] * stride_d / 4 + c];
                        let t = (1..k).fold(weights[0] * d(0), |t, s| weights[s].mul_add(d(s), t));
                        if residual { x[c] + t } else { t }
                    })
                    .collect();
                let mut c = Case::new(Combine { k, stride_d, gather, residual });
                let d = c.input("d", f32s(&d));
                c.at(&[d]);
                if gather {
                    let positions = positions.iter().map(|&p| p as u32).collect::<Vec<u32>>();
                    let positions = c.input("positions", u32s(&positions));
                    c.at(&[positions]);
                } else {
                    c.ints(&[0]);
                }
                let regions = [c.input("weights", f32s(&weights)), c.inout("x", f32s(&x), f32s(&after))];
                c.at(&regions);
                c.ints(&[columns]);
                cases.push(c);
            }
        }
    }
    cases
}

fn elementwises() -> Vec<Case> {
    let mut r = Random::new(12);
    let mut cases = Vec::new();
    for op in ElementwiseOp::ALL {
        for n in [0, 16, 80] {
            for in_place in [false, true] {
                let (a, second) = (r.f32s(n), r.f32s(n));
                let a: Vec<f32> = a.iter().map(|a| a * 30.0).collect();
                let y = |(a, s): (&f32, &f32)| match op {
                    ElementwiseOp::Add => a + s,
                    ElementwiseOp::Mul => a * s,
                    ElementwiseOp::SiluMul => silu(*a) * s,
                    ElementwiseOp::Silu => silu(*a),
                    ElementwiseOp::Gelu => gelu(*a),
                    ElementwiseOp::Copy => *a,
                };
                let y = f32s(&a.iter().zip(&second).map(y).collect::<Vec<f32>>());
                let mut c = Case::new(Elementwise { op });
                let (a, y) = if in_place {
                    let a = c.inout("a", f32s(&a), y);
                    (a, a)
                } else {
                    (c.input("a", f32s(&a)), c.output("y", y))
                };
                c.at(&[a]);
                if op.is_binary() {
                    let second = c.input("b", f32s(&second));
                    c.at(&[second]);
                }
                c.at(&[y]);
                c.ints(&[n]);
                cases.push(c);
            }
        }
    }
    cases
}

/// All cases of all families.
pub fn all() -> Vec<Case> {
    Kernel::FAMILIES.iter().flat_map(|family| of(family)).collect()
}

fn gate_rows() -> Vec<Case> {
    let mut r = Random::new(13);
    let mut cases = Vec::new();
    for n in [0, 16, 32, 96, 4096] {
        for in_place in [false, true] {
            let (x, gate) = (r.f32s(n), r.f32s(1));
            let y: Vec<f32> = x.iter().map(|x| x * sigmoid(gate[0])).collect();
            let mut c = Case::new(GateRow);
            let gate = c.input("gate", f32s(&gate));
            if in_place {
                let x = c.inout("x", f32s(&x), f32s(&y));
                c.at(&[x, gate, x]);
            } else {
                let (x, y) = (c.input("x", f32s(&x)), c.output("y", f32s(&y)));
                c.at(&[x, gate, y]);
            }
            c.ints(&[n]);
            cases.push(c);
        }
    }
    cases
}

fn soft_caps() -> Vec<Case> {
    let mut r = Random::new(15);
    let mut cases = Vec::new();
    for (n, cap) in [(0, 30.0), (16, 30.0), (96, 0.5), (4096, 50.0)] {
        for in_place in [false, true] {
            let mut x: Vec<f32> = r.f32s(n).iter().map(|x| x * 200.0).collect();
            // Both sides of where tanh changes its formula, and beyond what exp can.
            for (x, special) in x.iter_mut().zip([0.0, -0.0, 0.5 * cap, -0.5 * cap, 1e-30, 1e9, -1e9, f32::INFINITY]) {
                *x = special;
            }
            let y: Vec<f32> = x.iter().map(|&x| soft_cap(x, cap)).collect();
            let mut c = Case::new(SoftCap { cap_bits: cap.to_bits() });
            if in_place {
                let x = c.inout("x", f32s(&x), f32s(&y));
                c.at(&[x, x]);
            } else {
                let (x, y) = (c.input("x", f32s(&x)), c.output("y", f32s(&y)));
                c.at(&[x, y]);
            }
            c.ints(&[n]);
            cases.push(c);
        }
    }
    cases
}
