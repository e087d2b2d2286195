//! A tiny Mixtral whose matrices are random blocks of one GGUF type.
//!
//! The bytes are random, the factors of scales are such that the weights are of an ordinary size, and that scores of attention are: offsets of random size make sums of 32
//! elements large, and with scores of some 30 (what 4 times these factors of Q4_K give) rounding an activation decides between keys that are nearly equal.
//! Deliberately absent: quantizing given weights.

use crate::gguf::{Gguf, SMALL_HIDDEN as HIDDEN, Value, small};

/// The number of a GGUF type, elements and bytes of its blocks, and its f16 factors: where they are, and what they are.
struct Blocks {
    kind: u32,
    elements: usize,
    bytes: usize,
    factors: &'static [(usize, f32)],
}

/// By name.
const TYPES: [(&str, Blocks); 13] = [
    ("Q8_0", Blocks { kind: 8, elements: 32, bytes: 34, factors: &[(0, 0.0008)] }),
    ("Q5_0", Blocks { kind: 6, elements: 32, bytes: 22, factors: &[(0, 0.006)] }),
    ("Q5_1", Blocks { kind: 7, elements: 32, bytes: 24, factors: &[(0, 0.006), (2, -0.09)] }),
    ("Q5_K", Blocks { kind: 13, elements: 256, bytes: 176, factors: &[(0, 0.00005), (2, 0.00075)] }),
    ("Q4_0", Blocks { kind: 2, elements: 32, bytes: 18, factors: &[(0, 0.012)] }),
    ("Q4_1", Blocks { kind: 3, elements: 32, bytes: 20, factors: &[(0, 0.012), (2, -0.09)] }),
    ("Q4_K", Blocks { kind: 12, elements: 256, bytes: 144, factors: &[(0, 0.0001), (2, 0.00075)] }),
    ("IQ4_NL", Blocks { kind: 20, elements: 32, bytes: 18, factors: &[(0, 0.0012)] }),
    ("MXFP4", Blocks { kind: 39, elements: 32, bytes: 17, factors: &[] }),
    ("Q6_K", Blocks { kind: 14, elements: 256, bytes: 210, factors: &[(208, 0.00004)] }),
    ("Q3_K", Blocks { kind: 11, elements: 256, bytes: 110, factors: &[(108, 0.001)] }),
    ("Q2_K", Blocks { kind: 10, elements: 256, bytes: 84, factors: &[(80, 0.004), (82, 0.006)] }),
    ("IQ4_XS", Blocks { kind: 23, elements: 256, bytes: 136, factors: &[(0, 0.00006)] }),
];

/// Names of the types that [`mixtral`] makes.
pub fn types() -> impl Iterator<Item = &'static str> {
    TYPES.iter().map(|(name, _)| *name)
}

struct Random(u64);

impl Random {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 56) as u8
    }

    fn blocks(&mut self, blocks: &Blocks, elements: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..elements / blocks.elements {
            let start = bytes.len();
            bytes.extend((0..blocks.bytes).map(|_| self.byte()));
            for &(at, factor) in blocks.factors {
                let factor = half::f16::from_f32(factor * (0.75 + f32::from(self.byte()) / 512.0));
                bytes[start + at..][..2].copy_from_slice(&factor.to_le_bytes());
            }
            if blocks.kind == 39 {
                bytes[start] = 119 + bytes[start] % 3;
            }
        }
        bytes
    }
}

/// A Mixtral of two layers with four experts, all of whose matrices but the routers are of the type of this name.
///
/// # Panics
/// When there is no such type.
pub fn mixtral(name: &str) -> Gguf {
    let blocks = TYPES.iter().find(|(other, _)| *other == name).map(|(_, blocks)| blocks);
    let blocks = blocks.unwrap_or_else(|| panic!("no type {name}"));
    let mut random = Random(blocks.kind.into());
    let mut file = small();
    for (key, value) in [
        ("block_count", 2),
        ("feed_forward_length", 512),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 64),
        ("attention.value_length", 64),
        ("expert_count", 4),
        ("expert_used_count", 2),
    ] {
        file.set(&format!("llama.{key}"), Value::U32(value));
    }
    file.tensors.retain(|tensor| !tensor.name.starts_with("blk."));
    let vocab = file.tensor("token_embd.weight").shape[0];
    file.tensor("token_embd.weight").bytes = random.blocks(blocks, vocab * HIDDEN);
    file.tensor("token_embd.weight").kind = blocks.kind;
    file.tensor("output_norm.weight").bytes = ones();
    let mut add = |name: String, shape: &[usize]| {
        let count: usize = shape.iter().product();
        let (kind, bytes) = match shape {
            [_] => (0, ones()),
            [4, HIDDEN] => {
                let floats = (0..count).map(|_| f32::from(random.byte()) / 1024.0 - 0.125);
                (0, floats.flat_map(f32::to_le_bytes).collect())
            }
            _ => (blocks.kind, random.blocks(blocks, count)),
        };
        file.tensors.push(crate::gguf::Tensor { name, kind, shape: shape.to_vec(), bytes });
    };
    add("output.weight".into(), &[vocab, HIDDEN]);
    for layer in 0..2 {
        for (name, shape) in [
            ("attn_norm", &[HIDDEN][..]),
            ("attn_q", &[256, HIDDEN]),
            ("attn_k", &[128, HIDDEN]),
            ("attn_v", &[128, HIDDEN]),
            ("attn_output", &[HIDDEN, 256]),
            ("ffn_norm", &[HIDDEN]),
            ("ffn_gate_inp", &[4, HIDDEN]),
            ("ffn_gate_exps", &[4, 512, HIDDEN]),
            ("ffn_up_exps", &[4, 512, HIDDEN]),
            ("ffn_down_exps", &[4, HIDDEN, 512]),
        ] {
            add(format!("blk.{layer}.{name}.weight"), shape);
        }
    }
    file
}

/// The bytes of a norm that changes nothing.
fn ones() -> Vec<u8> {
    std::iter::repeat_n(1f32.to_le_bytes(), HIDDEN).flatten().collect()
}
