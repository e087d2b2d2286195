//! Quantized safetensors: FP8, GPTQ and AWQ, packed here from known codes, read back as what they stand for.

use crate::model::{HIDDEN, Model, Tensor};
use half::f16;
use moec::emit::pack::Packing;
use moec::import::{self, Dtype};
use moec::plan::layout::Format;
use moec::plan::payload::{Arrangement, Part, PayloadItem};
use moec_ir::graph::Layout;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

const FFN: usize = 24;
const GROUP: usize = 8;
const WIDE: usize = 256;

/// A Llama whose matrices have rows and columns in eights.
fn model(quantization: Value) -> Model {
    let mut model =
        Model::dense("LlamaForCausalLM", "llama").set("head_dim", json!(8)).set("intermediate_size", json!(FFN));
    for tensor in &mut model.tensors {
        let shape = match tensor.name.split('.').nth(4) {
            Some("q_proj") => [16, HIDDEN],
            Some("k_proj" | "v_proj") => [8, HIDDEN],
            Some("o_proj") => [HIDDEN, 16],
            Some("gate_proj" | "up_proj") => [FFN, HIDDEN],
            Some("down_proj") => [HIDDEN, FFN],
            _ => continue,
        };
        *tensor = Tensor::new(&tensor.name, &shape);
    }
    model.set("quantization_config", quantization)
}

/// A wider one, whose columns are two groups of 128.
fn wide_model(quantization: Value) -> Model {
    let mut model = model(quantization).set("hidden_size", json!(WIDE)).set("intermediate_size", json!(WIDE));
    for tensor in &mut model.tensors {
        let shape: Vec<usize> = tensor.shape.iter().map(|&n| if n == HIDDEN || n == FFN { WIDE } else { n }).collect();
        *tensor = Tensor::new(&tensor.name, &shape);
    }
    // As many rows of q as columns of the projection from the heads.
    model.set("num_attention_heads", json!(WIDE / 8))
}

fn is_matrix(tensor: &Tensor) -> bool {
    tensor.name.contains("_proj")
}

fn words(name: String, shape: [usize; 2], words: &[u32]) -> Tensor {
    let values = words.iter().map(|&word| f32::from_bits(word)).collect();
    Tensor { name, dtype: "I32", shape: shape.to_vec(), values }
}

fn halves(name: String, shape: &[usize], values: &[f32]) -> Tensor {
    Tensor { name, dtype: "F16", shape: shape.to_vec(), values: values.to_vec() }
}

/// Every matrix quantized by `quantize`, which gives its tensors and the values that they stand for.
fn quantized(model: &mut Model, quantize: impl Fn(&Tensor) -> (Vec<Tensor>, Vec<f32>)) -> BTreeMap<String, Vec<f32>> {
    let mut expected = BTreeMap::new();
    let mut tensors = Vec::new();
    for tensor in std::mem::take(&mut model.tensors) {
        if is_matrix(&tensor) {
            let (parts, values) = quantize(&tensor);
            expected.insert(tensor.name, values);
            tensors.extend(parts);
        } else {
            tensors.push(tensor);
        }
    }
    model.tensors = tensors;
    expected
}

#[track_caller]
fn check(model: &Model, expected: &BTreeMap<String, Vec<f32>>, dtype: Dtype) {
    let opened = import::open(model.write().path()).unwrap_or_else(|e| panic!("{e}"));
    for (stored, expected) in expected {
        let mut parts = stored.split('.');
        let (layer, last) = (parts.nth(2).unwrap(), parts.nth(1).unwrap());
        let name = format!("layers.{layer}.{}", last.trim_end_matches("_proj"));
        let info = opened.tensors.info(&name);
        assert_eq!(info.dtype, dtype, "{name}");
        let (rows, columns) = (info.shape[0], info.shape[1]);
        let mut found = vec![0.0; rows * columns];
        opened.tensors.read_rows(&name, 0, 0..rows, &mut found);
        assert_eq!(&found, expected, "{name}");
        opened.tensors.prefetch(&name, 0, 1..3);
        opened.tensors.read_rows(&name, 0, 1..3, &mut found[..2 * columns]);
        opened.tensors.release(&name, 0, 1..3);
        assert_eq!(found[..2 * columns], expected[columns..3 * columns], "{name}: two rows");
    }
}

/// Codes of rows, zero points and scales of groups: `code(row, column)`, `zero(group, row)`, `scale(group, row)`.
fn code(row: usize, column: usize) -> u32 {
    ((row * 7 + column * 3 + row * column) % 16) as u32
}

fn zero(group: usize, row: usize) -> u32 {
    ((group * 5 + row * 3) % 14 + 1) as u32
}

fn scale(group: usize, row: usize) -> f32 {
    (1 + group * 3 + row % 11) as f32 / 32.0
}

fn stands_for(rows: usize, columns: usize, group_of: &dyn Fn(usize) -> usize) -> Vec<f32> {
    let value = |row: usize, column: usize| {
        let group = group_of(column);
        (code(row, column) as f32 - zero(group, row) as f32) * scale(group, row)
    };
    (0..rows * columns).map(|i| value(i / columns, i % columns)).collect()
}

/// Eight codes in a word, the first in the lowest bits.
fn pack(codes: impl Iterator<Item = u32>) -> Vec<u32> {
    let codes: Vec<u32> = codes.collect();
    codes.chunks(8).map(|eight| eight.iter().rev().fold(0, |word, code| word << 4 | code)).collect()
}

fn scales(rows: usize, groups: usize) -> Vec<f32> {
    (0..groups * rows).map(|i| scale(i / rows, i % rows)).collect()
}

fn gptq(tensor: &Tensor, groups: Option<&dyn Fn(usize) -> usize>, stored_zero: u32) -> (Vec<Tensor>, Vec<f32>) {
    gptq_of(tensor, GROUP, groups, stored_zero)
}

fn gptq_of(
    tensor: &Tensor,
    group: usize,
    groups: Option<&dyn Fn(usize) -> usize>,
    stored_zero: u32,
) -> (Vec<Tensor>, Vec<f32>) {
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let base = tensor.name.trim_end_matches(".weight");
    let count = columns / group;
    let mut codes = Vec::new();
    for k in 0..columns / 8 {
        for row in 0..rows {
            codes.extend((0..8).map(|i| code(row, 8 * k + i)));
        }
    }
    let zeros = (0..count).flat_map(|group| (0..rows).map(move |row| zero(group, row) - stored_zero));
    let in_order = |column: usize| column / group;
    let mut parts = vec![
        words(format!("{base}.qweight"), [columns / 8, rows], &pack(codes.into_iter())),
        words(format!("{base}.qzeros"), [count, rows / 8], &pack(zeros)),
        halves(format!("{base}.scales"), &[count, rows], &scales(rows, count)),
    ];
    if let Some(groups) = groups {
        let indices: Vec<u32> = (0..columns).map(|column| groups(column) as u32).collect();
        let mut tensor = words(format!("{base}.g_idx"), [1, columns], &indices);
        tensor.shape = vec![columns];
        parts.push(tensor);
    }
    (parts, stands_for(rows, columns, groups.unwrap_or(&in_order)))
}

#[test]
fn gptq_in_order_and_with_an_index() {
    let config = json!({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": false});
    let mut plain = model(config.clone());
    let expected = quantized(&mut plain, |tensor| gptq(tensor, None, 1));
    check(&plain, &expected, Dtype::Gptq);
    let mut indexed = model(config);
    let expected =
        quantized(&mut indexed, |tensor| gptq(tensor, Some(&|column| column % (tensor.shape[1] / GROUP)), 1));
    check(&indexed, &expected, Dtype::Gptq);
    let two = json!({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"});
    let mut two = model(two);
    let expected = quantized(&mut two, |tensor| gptq(tensor, None, 0));
    check(&two, &expected, Dtype::Gptq);
}

fn awq_of(tensor: &Tensor, group: usize) -> (Vec<Tensor>, Vec<f32>) {
    // Which of eight rows is in which nibble of a word, from the lowest.
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let base = tensor.name.trim_end_matches(".weight");
    let count = columns / group;
    let ordered = |outer: usize, value: &dyn Fn(usize, usize) -> u32| {
        pack((0..outer * rows).map(|i| value(i / rows, i % rows / 8 * 8 + ORDER[i % 8])))
    };
    let parts = vec![
        words(format!("{base}.qweight"), [columns, rows / 8], &ordered(columns, &|column, row| code(row, column))),
        words(format!("{base}.qzeros"), [count, rows / 8], &ordered(count, &zero)),
        halves(format!("{base}.scales"), &[count, rows], &scales(rows, count)),
    ];
    (parts, stands_for(rows, columns, &|column| column / group))
}

#[test]
fn awq() {
    let mut model =
        model(json!({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": true, "version": "gemm"}));
    let expected = quantized(&mut model, |tensor| awq_of(tensor, GROUP));
    check(&model, &expected, Dtype::Awq);
}

/// A packed matrix of `rows` rows in tiles of codes with steps, from the description of the layout.
fn unpack(bytes: &[u8], rows: usize) -> Vec<f32> {
    let tile_bytes = WIDE / 128 * (192 + 4 * 256);
    let weight = |row: usize, k: usize| {
        let group = &bytes[row / 16 * tile_bytes + k / 128 * (192 + 4 * 256)..];
        let (lane, block, i) = (row % 16, k % 128 / 32, k % 32);
        let half = |at: usize| f16::from_le_bytes([group[at + 2 * lane], group[at + 2 * lane + 1]]).to_f32();
        let step = |at: usize| f32::from(group[64 + 32 * block + at + lane] as i8);
        let byte = group[192 + 256 * block + i % 16 / 4 * 64 + 4 * lane + i % 4];
        let code = f32::from(if i < 16 { byte & 15 } else { byte >> 4 });
        half(0) * step(0) * code + half(32) * step(16)
    };
    (0..rows * WIDE).map(|i| weight(i / WIDE, i % WIDE)).collect()
}

/// GPTQ and AWQ with groups of 128 keep codes, scales and zero points: the payload holds the very weights.
#[test]
fn codes_in_groups_of_128_are_packed_as_they_are() {
    let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false});
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm"});
    for (config, awq) in [(gptq, false), (awq, true)] {
        let mut model = wide_model(config);
        let expected = quantized(&mut model, |tensor| match awq {
            true => awq_of(tensor, 128),
            false => gptq_of(tensor, 128, None, 1),
        });
        let opened = import::open(model.write().path()).unwrap_or_else(|e| panic!("{e}"));
        for (name, stored, rows) in
            [("q", "self_attn.q_proj", WIDE), ("k", "self_attn.k_proj", 8), ("down", "mlp.down_proj", WIDE)]
        {
            let tensor = format!("layers.0.{name}");
            assert_eq!(opened.tensors.info(&tensor).exact, Some(Layout::Q4K), "{name}");
            let item = PayloadItem {
                name: name.into(),
                shared: None,
                role: None,
                format: Format::Q4K,
                arrangement: Arrangement::Tiles { parts: vec![Part { tensor, rows }] },
                experts: 1,
                router: None,
                order: None,
                rows,
                columns: WIDE,
                row_heads: None,
                column_heads: None,
                offset: 0,
            };
            let packing = Packing {
                items: std::slice::from_ref(&item),
                source: &opened.tensors,
                rope: opened.config.rope.clone(),
                head_dim: 8,
                threads: 2,
                progress: &|_, _| (),
                cancel: &AtomicBool::new(false),
            };
            let file = tempfile::NamedTempFile::new().expect("a temporary file");
            let report = packing.write(file.as_file(), 0).expect("finite weights");
            assert_eq!(report.items[0].error, 0.0, "{name}: nothing is lost");
            let bytes = std::fs::read(file.path()).expect("it was written");
            let expected = &expected[&format!("model.layers.0.{stored}.weight")];
            assert_eq!(&unpack(&bytes, rows), expected, "{name}, awq: {awq}");
        }
    }
}

/// The value of an E4M3 code without NaN, by its definition.
fn e4m3(code: u8) -> f32 {
    let (sign, exponent, mantissa) = (code >> 7, i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude =
        if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if sign == 1 { -magnitude } else { magnitude }
}

#[test]
fn fp8_with_scales_of_every_shape() {
    let block = json!({"quant_method": "fp8", "weight_block_size": [8, 16]});
    let plain = json!({"quant_method": "fp8", "activation_scheme": "static"});
    let rows_of = json!({"quant_method": "compressed-tensors", "format": "float-quantized"});
    for (config, suffix, block) in [
        (plain.clone(), "weight_scale", None),
        (rows_of, "weight_scale", Some((1, usize::MAX))),
        (block, "weight_scale_inv", Some((8, 16))),
    ] {
        let mut model = model(config);
        let expected = quantized(&mut model, |tensor| {
            let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
            let (tall, wide) = block.map_or((rows, columns), |(tall, wide)| (tall, wide.min(columns)));
            let codes: Vec<u8> =
                (0..rows * columns).map(|i| (i * 37 % 254) as u8).map(|c| if c & 127 == 127 { 0 } else { c }).collect();
            let shape = match block {
                None => vec![],
                Some((1, _)) => vec![rows, 1],
                Some(_) => vec![rows.div_ceil(tall), columns.div_ceil(wide)],
            };
            let count: usize = shape.iter().product();
            let scales: Vec<f32> = (0..count).map(|i| (i + 1) as f32 / 16.0).collect();
            let scale = |row: usize, column: usize| scales[row / tall * columns.div_ceil(wide) + column / wide];
            let values =
                codes.iter().enumerate().map(|(i, &code)| e4m3(code) * scale(i / columns, i % columns)).collect();
            let base = tensor.name.trim_end_matches(".weight");
            let stored = codes.iter().map(|&code| f32::from(code)).collect();
            let parts = vec![
                Tensor { name: tensor.name.clone(), dtype: "F8_E4M3", shape: vec![rows, columns], values: stored },
                Tensor { name: format!("{base}.{suffix}"), dtype: "F32", shape, values: scales.clone() },
                Tensor::new(&format!("{base}.input_scale"), &[1]),
            ];
            (parts, values)
        });
        check(&model, &expected, Dtype::Fp8);
    }
    let mut missing = model(plain);
    quantized(&mut missing, |tensor| {
        let stored = Tensor { dtype: "F8_E4M3", values: vec![8.0; tensor.values.len()], ..tensor.clone() };
        (vec![stored], Vec::new())
    });
    let error = import::open(missing.write().path()).unwrap_err().to_string();
    assert!(error.contains("self_attn.q_proj.weight_scale` is missing"), "{error}");
}

#[test]
fn damaged_ones_are_refused() {
    let config = json!({"quant_method": "gptq", "bits": 4, "group_size": GROUP});
    let sound = || {
        let mut model = model(config.clone());
        quantized(&mut model, |tensor| gptq(tensor, Some(&|column| column / GROUP), 1));
        model
    };
    const Q: &str = "model.layers.0.self_attn.q_proj";
    let refused = |change: &dyn Fn(&mut Model), words: &[&str]| {
        let mut model = sound();
        change(&mut model);
        let error = import::open(model.write().path()).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
    };
    refused(&|m| m.tensor(&format!("{Q}.g_idx")).values[3] = f32::from_bits(2), &["g_idx", "below 2", "found 2"]);
    refused(&|m| m.tensor(&format!("{Q}.g_idx")).values[3] = f32::from_bits(u32::MAX), &["g_idx", "found -1"]);
    refused(&|m| m.drop_tensor(&format!("{Q}.qzeros")), &["q_proj.qzeros", "missing", "[2, 2]"]);
    refused(&|m| m.tensor(&format!("{Q}.scales")).shape = vec![16, 2], &["q_proj.scales", "[2, 16]", "[16, 2]"]);
    refused(&|m| m.tensor(&format!("{Q}.scales")).dtype = "I32", &["q_proj.scales", "F16"]);
    // The words say the shape; what disagrees with them is named.
    refused(&|m| m.tensor(&format!("{Q}.qweight")).shape = vec![4, 8], &["q_proj.qzeros", "[4, 1]", "[2, 2]"]);
    let plain = Model::dense("LlamaForCausalLM", "llama").set("quantization_config", config.clone());
    import::open(plain.write().path()).expect("what is not quantized stays what it is");
}
