//! Every element is where it belongs, and everything else is zero.

use crate::model::{Memory, ROPE, Random, Tensor, item, pack, place, tiles};
use crate::reader::{Element, FORMATS, check, read, spread};
use half::{bf16, f16};
use moec::emit::pack::rotations;
use moec::plan::layout::Format;
use moec::plan::payload::{Arrangement, PayloadItem};
use std::collections::BTreeMap;

#[test]
fn plain_matrices_of_any_shape() {
    let mut random = Random(1);
    let mut source = Memory::default();
    let mut items = Vec::new();
    for (rows, columns) in [(1, 1), (16, 32), (20, 96), (33, 100), (48, 128), (7, 160), (17, 257), (64, 300), (5, 31)] {
        let name = format!("w{rows}x{columns}");
        source.add(&name, 1, rows, columns, &mut random);
        items.extend(FORMATS.map(|format| item(&name, format, tiles(&[(&name, rows)]), rows, columns)));
    }
    place(&mut items);
    let (payload, _) = pack(&items, &source, 2).expect("sound weights");
    for item in &items {
        check(&payload, item, &source, &[(&item.name, item.rows)], |_, row| row);
    }
}

#[test]
fn heads_are_padded_in_rows_and_columns() {
    let mut random = Random(2);
    for head_dim in [16, 20, 22, 32, 64] {
        let (heads, kv_heads, hidden) = (3, 2, 72);
        let mut source = Memory::default();
        for (name, heads) in [("q", heads), ("k", kv_heads), ("v", kv_heads)] {
            source.add(name, 1, heads * head_dim, hidden, &mut random);
        }
        source.add("o", 1, hidden, heads * head_dim, &mut random);
        let parts = [("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)];
        let mut items = Vec::new();
        for format in FORMATS {
            let qkv = item("qkv", format, tiles(&parts), (heads + 2 * kv_heads) * head_dim, hidden);
            items.push(PayloadItem { row_heads: Some(head_dim), ..qkv });
            let o = item("o", format, tiles(&[("o", hidden)]), hidden, heads * head_dim);
            items.push(PayloadItem { column_heads: Some(head_dim), ..o });
        }
        place(&mut items);
        let (payload, _) = pack(&items, &source, 2).expect("sound weights");
        for item in &items {
            if item.name == "o" {
                check(&payload, item, &source, &[("o", hidden)], |_, row| row);
            } else {
                let before = [0, heads * head_dim, (heads + kv_heads) * head_dim];
                check(&payload, item, &source, &parts, |part, row| spread(before[part] + row, Some(head_dim)));
            }
        }
    }
}

#[test]
fn gate_and_up_alternate_in_each_expert() {
    let mut random = Random(3);
    for (experts, ffn, hidden) in [(1, 40, 64), (3, 32, 100), (5, 50, 33)] {
        let mut source = Memory::default();
        for (name, rows, columns) in [("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)] {
            source.add(name, experts, rows, columns, &mut random);
        }
        let mut items = Vec::new();
        for format in FORMATS {
            let gate_up = Arrangement::GateUp { gate: "gate".into(), up: "up".into() };
            items.push(PayloadItem { experts, ..item("gate_up", format, gate_up, 2 * ffn, hidden) });
            items.push(PayloadItem { experts, ..item("down", format, tiles(&[("down", hidden)]), hidden, ffn) });
        }
        place(&mut items);
        let (payload, _) = pack(&items, &source, 3).expect("sound weights");
        for item in &items {
            if item.name == "down" {
                check(&payload, item, &source, &[("down", hidden)], |_, row| row);
            } else {
                let parts = [("gate", ffn), ("up", ffn)];
                check(&payload, item, &source, &parts, |part, row| (row / 16 * 2 + part) * 16 + row % 16);
            }
        }
    }
}

#[test]
fn lookup_rows_and_vectors_are_row_major() {
    let mut random = Random(4);
    let mut source = Memory::default();
    source.add("embed", 1, 131, 100, &mut random);
    source.add("norm", 1, 1, 100, &mut random);
    let formats = [Format::F32, Format::Bf16, Format::F16];
    let mut items: Vec<PayloadItem> =
        formats.iter().map(|&format| item("embed", format, Arrangement::Table, 131, 100)).collect();
    items.push(item("norm", Format::F32, Arrangement::Vector, 1, 100));
    place(&mut items);
    let (payload, _) = pack(&items, &source, 2).expect("sound weights");
    for (item, format) in items.iter().zip(formats) {
        for (i, &weight) in source.0["embed"].data.iter().enumerate() {
            let bytes = &payload[item.offset..];
            let half = |i: usize| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]);
            match format {
                Format::F32 => assert_eq!(bytes[4 * i..4 * i + 4], weight.to_le_bytes()),
                Format::Bf16 => assert_eq!(half(i), bf16::from_f32(weight).to_bits()),
                _ => assert_eq!(half(i), f16::from_f32(weight).to_bits()),
            }
        }
    }
    let bytes: Vec<u8> = source.0["norm"].data.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    let norm = &payload[items[3].offset..];
    assert_eq!(norm[..400], bytes);
    assert_eq!(norm[400..512], [0; 112], "padded to 128 elements");
}

#[test]
fn rotary_tables_turn_with_the_position() {
    let table = |sine| item(if sine { "sin" } else { "cos" }, Format::F32, Arrangement::RopeTable { sine }, 300, 16);
    let mut items = [table(false), table(true)];
    place(&mut items);
    let (payload, _) = pack(&items, &Memory::default(), 2).expect("nothing can fail");
    let frequencies: Vec<f64> = rotations(&ROPE, 20, 300).into_iter().map(|rotation| rotation.frequency).collect();
    for (item, function) in items.iter().zip([f64::cos, f64::sin]) {
        for position in 0..300 {
            let angles = frequencies.iter().map(|frequency| position as f64 * frequency);
            let factors = angles.map(|angle| function(angle) as f32).chain([0.0; 6]);
            for (pair, expected) in factors.enumerate() {
                let at = item.offset + (position * 16 + pair) * 4;
                let found = f32::from_le_bytes(payload[at..at + 4].try_into().expect("four bytes"));
                assert_eq!(found.to_bits(), expected.to_bits(), "{} position {position} pair {pair}", item.name);
            }
        }
    }
}

#[test]
fn the_same_float_type_keeps_every_bit() {
    let halves = |finite: fn(u16) -> f32| (0..=u16::MAX).map(finite).filter(|value| value.is_finite()).collect();
    let mut random = Random(5);
    let singles = (0..40_000)
        .map(|_| f32::from_bits((random.uniform() * 4294967296.0) as u32))
        .filter(|value| value.is_finite())
        .collect();
    let cases: [(Format, Vec<f32>); 3] = [
        (Format::Bf16, halves(|bits| bf16::from_bits(bits).to_f32())),
        (Format::F16, halves(|bits| f16::from_bits(bits).to_f32())),
        (Format::F32, singles),
    ];
    for (format, mut data) in cases {
        data.truncate(data.len() / 32 * 32);
        let (rows, columns) = (32, data.len() / 32);
        let source = Memory(BTreeMap::from([("w".into(), Tensor { rows, columns, data })]));
        let mut items = [item("w", format, tiles(&[("w", rows)]), rows, columns)];
        place(&mut items);
        let (payload, report) = pack(&items, &source, 2).expect("finite weights");
        for row in 0..rows {
            for column in 0..columns {
                let Element::Float(found) = read(&payload[items[0].offset..], format, columns, row, column) else {
                    panic!("{format} is a float format");
                };
                assert_eq!(found.to_bits(), source.0["w"].at(0, row, column).to_bits(), "{format}");
            }
        }
        assert_eq!(report.items[0].error, 0.0, "{format}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let mut random = Random(6);
    let mut source = Memory::default();
    source.add("gate", 4, 272, 544, &mut random);
    source.add("up", 4, 272, 544, &mut random);
    source.add("embed", 1, 3000, 544, &mut random);
    let gate_up = Arrangement::GateUp { gate: "gate".into(), up: "up".into() };
    let mut items = vec![item("embed", Format::F32, Arrangement::Table, 3000, 544)];
    items.extend(FORMATS.map(|format| PayloadItem { experts: 4, ..item("w", format, gate_up.clone(), 544, 544) }));
    items.push(item("tiles", Format::Q8, tiles(&[("embed", 3000)]), 3000, 544));
    place(&mut items);
    let one = pack(&items, &source, 1).expect("sound weights");
    for threads in [2, 3, 7] {
        assert!(pack(&items, &source, threads).expect("sound weights") == one, "{threads} threads");
    }
}
