//! Packing: every arrangement and format is read back by a reader that shares no code with the writer.

use half::{bf16, f16};
use moec::emit::pack::{
    PackError, PackReport, Packing, RowSource, SourceError, Stored, float_rows, frequencies, quantized_rows,
};
use moec::import::{Rope, RopeScaling};
use moec::plan::layout::Format;
use moec::plan::payload::{Arrangement, Part, PayloadItem};
use moec::plan::quant::{CODEBOOK, QuantizedMatrix, quantize_matrix};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Numbers that look random and are the same everywhere.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn gaussian(&mut self) -> f64 {
        (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Student's t with 4 degrees of freedom.
    fn heavy(&mut self) -> f64 {
        let chi: f64 = (0..4).map(|_| self.gaussian().powi(2)).sum();
        self.gaussian() / (chi / 4.0).sqrt()
    }

    fn gaussians(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.gaussian() as f32 * 0.03).collect()
    }
}

/// `[experts][rows][columns]`.
#[derive(Clone)]
struct Tensor {
    rows: usize,
    columns: usize,
    data: Vec<f32>,
}

impl Tensor {
    fn at(&self, expert: usize, row: usize, column: usize) -> f32 {
        self.data[(expert * self.rows + row) * self.columns + column]
    }
}

/// A model in memory.
#[derive(Clone, Default)]
struct Memory(BTreeMap<String, Tensor>);

impl Memory {
    fn add(&mut self, name: &str, experts: usize, rows: usize, columns: usize, random: &mut Random) {
        let data = random.gaussians(experts * rows * columns);
        self.0.insert(name.into(), Tensor { rows, columns, data });
    }
}

impl RowSource for Memory {
    fn read_rows(&self, weight: &str, expert: usize, rows: Range<usize>, out: &mut [f32]) -> Result<(), SourceError> {
        let tensor = self.0.get(weight).ok_or_else(|| format!("no weight {weight}"))?;
        let start = (expert * tensor.rows + rows.start) * tensor.columns;
        out.copy_from_slice(&tensor.data[start..][..rows.len() * tensor.columns]);
        Ok(())
    }
}

const ROPE: Rope = Rope { theta: 10000.0, scaling: RopeScaling::None };

/// An item without heads or experts, at the payload's first free page.
fn item(name: &str, format: Format, arrangement: Arrangement, rows: usize, columns: usize) -> PayloadItem {
    PayloadItem {
        name: name.into(),
        role: None,
        format,
        arrangement,
        experts: 1,
        rows,
        columns,
        row_heads: None,
        column_heads: None,
        offset: 0,
    }
}

fn tiles(parts: &[(&str, usize)]) -> Arrangement {
    Arrangement::Tiles { parts: parts.iter().map(|&(name, rows)| Part { tensor: name.into(), rows }).collect() }
}

/// Gives each item a place.
fn place(items: &mut [PayloadItem]) {
    let mut offset = 4096;
    for item in items {
        item.offset = offset;
        offset += item.bytes();
    }
}

fn pack_to(
    file: &File,
    start: u64,
    items: &[PayloadItem],
    source: &dyn RowSource,
    threads: usize,
) -> Result<PackReport, PackError> {
    let cancel = AtomicBool::new(false);
    let packing = Packing { items, source, rope: ROPE, head_dim: 20, threads, progress: &|_, _| (), cancel: &cancel };
    packing.write(file, start)
}

/// Packs into a temporary file; gives the payload's bytes.
fn pack(items: &[PayloadItem], source: &dyn RowSource, threads: usize) -> Result<(Vec<u8>, PackReport), PackError> {
    const START: u64 = 8192;
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let report = pack_to(file.as_file(), START, items, source, threads)?;
    let mut bytes = std::fs::read(file.path()).expect("the file was written");
    let end = items.iter().map(|item| item.offset + item.bytes()).max().expect("there are items");
    bytes.resize(START as usize + end, 0);
    Ok((bytes.split_off(START as usize), report))
}

/// One element of a tile as it lies in memory.
#[derive(PartialEq, Debug)]
enum Element {
    Float(f32),
    /// The code as the kernels see it, and the scale.
    Code(u8, f32),
}

/// Reads row `row`, column `k` of a matrix in tiles, from the description of the layouts.
fn read(matrix: &[u8], format: Format, length: usize, row: usize, k: usize) -> Element {
    let (tile, lane) = (row / 16, row % 16);
    let half = |at: usize| u16::from_le_bytes([matrix[at], matrix[at + 1]]);
    let aligned = |bytes: usize| bytes.div_ceil(64) * 64;
    match format {
        Format::F32 => {
            let at = tile * aligned(length * 64) + (k * 16 + lane) * 4;
            Element::Float(f32::from_le_bytes(matrix[at..at + 4].try_into().expect("four bytes")))
        }
        Format::Bf16 => {
            Element::Float(bf16::from_bits(half(tile * aligned(length * 32) + (k * 16 + lane) * 2)).to_f32())
        }
        Format::F16 => Element::Float(f16::from_bits(half(tile * aligned(length * 32) + (k * 16 + lane) * 2)).to_f32()),
        Format::Q8 | Format::Q4 => {
            let block_bytes = if format == Format::Q8 { 512 } else { 256 };
            let blocks = length.div_ceil(32);
            let group_bytes = |blocks: usize| aligned(blocks * 32) + blocks * block_bytes;
            let tail = if blocks % 4 == 0 { 0 } else { group_bytes(blocks % 4) };
            let tile_bytes = blocks / 4 * group_bytes(4) + tail;
            let group = tile * tile_bytes + k / 128 * group_bytes(4);
            let in_group = (blocks - k / 128 * 4).min(4);
            let (block, i) = (k % 128 / 32, k % 32);
            let scale = bf16::from_bits(half(group + (block * 16 + lane) * 2)).to_f32();
            let codes = &matrix[group + aligned(in_group * 32) + block * block_bytes..];
            let code = if format == Format::Q8 {
                codes[i / 4 * 64 + lane * 4 + i % 4]
            } else {
                let byte = codes[i % 16 / 4 * 64 + lane * 4 + i % 4];
                CODEBOOK[usize::from(if i < 16 { byte & 15 } else { byte >> 4 })]
            };
            Element::Code(code, scale)
        }
    }
}

const FORMATS: [Format; 5] = [Format::F32, Format::Bf16, Format::F16, Format::Q8, Format::Q4];

/// Where element `i` of an axis that is divided into heads goes.
fn spread(i: usize, head_dim: Option<usize>) -> usize {
    let Some(dim) = head_dim else { return i };
    let half = dim / 2;
    let padded_half = half.div_ceil(16) * 16;
    let (head, i) = (i / dim, i % dim);
    head * 2 * padded_half + if i < half { i } else { padded_half + i - half }
}

/// Checks all of a packed matrix: what must be there is there, and everything else is zero.
fn check(
    payload: &[u8],
    item: &PayloadItem,
    source: &Memory,
    rows: &[(&str, usize)],
    place: impl Fn(usize, usize) -> usize,
) {
    let context = format!("{item}");
    for expert in 0..item.experts {
        let matrix = &payload[item.offset + expert * item.expert_bytes()..];
        let mut seen = vec![false; item.padded_rows() * item.k()];
        for (part, &(name, count)) in rows.iter().enumerate() {
            let tensor = &source.0[name];
            let expert_of = (item.experts > 1).then_some(expert);
            let stored = Stored { tensor: name, expert: expert_of, rows: 0..count, columns: item.columns };
            let quantized = item
                .format
                .is_quantized()
                .then(|| quantized_rows(source, &stored, item.column_heads, item.format).expect("sound weights"));
            let floats = quantized.is_none().then(|| float_rows(source, &stored, item.format).expect("sound weights"));
            for row in 0..count {
                let to = place(part, row);
                for column in 0..item.columns {
                    let k = spread(column, item.column_heads);
                    seen[to * item.k() + k] = true;
                    let found = read(matrix, item.format, item.k(), to, k);
                    let weight = tensor.at(expert, row, column);
                    match (&quantized, &floats) {
                        (Some(matrix), _) => {
                            let code = matrix.codes[row * matrix.columns + k];
                            let scale = matrix.scales[(row * matrix.columns + k) / 32];
                            assert_eq!(found, Element::Code(code, scale), "{context} row {row} column {column}");
                            let value = scale * (f32::from(code) - 128.0);
                            assert!((value - weight).abs() <= 20.0 * scale.abs(), "{context}: {value} for {weight}");
                        }
                        (None, floats) => {
                            let expected = match item.format {
                                Format::Bf16 => bf16::from_f32(weight).to_f32(),
                                Format::F16 => f16::from_f32(weight).to_f32(),
                                _ => weight,
                            };
                            assert_eq!(found, Element::Float(expected), "{context} row {row} column {column}");
                            let floats = floats.as_ref().expect("floats are not quantized");
                            assert_eq!(floats[row * item.columns + column], expected, "{context}");
                        }
                    }
                }
            }
        }
        let used: Vec<bool> = seen.chunks(item.k()).map(|row| row.iter().any(|&seen| seen)).collect();
        for (at, _) in seen.iter().enumerate().filter(|(_, seen)| !**seen) {
            let (row, k) = (at / item.k(), at % item.k());
            match read(matrix, item.format, item.k(), row, k) {
                Element::Float(value) => assert_eq!(value.to_bits(), 0, "{context} row {row} k {k}"),
                // In a row of weights, padding along K meets activations that are zero: any code does.
                Element::Code(_, scale) => assert!(used[row] || scale == 0.0, "{context} row {row} k {k}"),
            }
        }
    }
}

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
    let frequencies = frequencies(&ROPE, 20);
    for (item, function) in items.iter().zip([f64::cos, f64::sin]) {
        for position in 0..300 {
            for pair in 0..16 {
                let at = item.offset + (position * 16 + pair) * 4;
                let found = f32::from_le_bytes(payload[at..at + 4].try_into().expect("four bytes"));
                let expected = match pair < 10 {
                    true => function(position as f64 * frequencies[pair]) as f32,
                    false => 0.0,
                };
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

/// √(Σ (weight − stored)² / Σ weight²).
fn relative_rms(data: &[f32], columns: usize, matrix: &QuantizedMatrix) -> f64 {
    let mut sums = (0.0, 0.0);
    for (i, &weight) in data.iter().enumerate() {
        let stored = matrix.weight(i / columns, i % columns);
        sums = (sums.0 + f64::from(weight - stored).powi(2), sums.1 + f64::from(weight).powi(2));
    }
    (sums.0 / sums.1).sqrt()
}

#[test]
fn quantization_loses_little() {
    let mut random = Random(7);
    let gaussian = random.gaussians(256 * 512);
    let heavy: Vec<f32> = (0..256 * 512).map(|_| random.heavy() as f32).collect();
    let loss = |format, data: &[f32]| relative_rms(data, 512, &quantize_matrix(format, 512, data).expect("finite"));
    let found =
        [loss(Format::Q8, &gaussian), loss(Format::Q4, &gaussian), loss(Format::Q8, &heavy), loss(Format::Q4, &heavy)];
    println!(
        "relative RMS: Gaussian q8 {:.5} q4 {:.5}, Student t(4) q8 {:.5} q4 {:.5}",
        found[0], found[1], found[2], found[3]
    );
    // The scale from the largest weight gives 0.0054 (q8) and, on the even grid -8..7, 0.086 (q4) on Gaussian weights.
    assert!(found[0] < 0.0050 && found[1] < 0.0732 && found[2] < 0.0072 && found[3] < 0.0905, "{found:?}");
}

/// The least squared error that any scale gives, tried finely: what the fast search is up against.
fn exhaustive(block: &[f32]) -> f64 {
    let largest = block.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
    let mut best = f64::INFINITY;
    for step in 0..240 {
        let place = 80.0 + step as f32 * 0.3;
        for place in [place, -place] {
            let scale = bf16::from_f32(largest / place).to_f32();
            let error = block
                .iter()
                .map(|&weight| {
                    let distance = |code: &u8| f64::from(weight - scale * (f32::from(*code) - 128.0)).powi(2);
                    CODEBOOK.iter().map(distance).fold(f64::INFINITY, f64::min)
                })
                .sum();
            best = f64::min(best, error);
        }
    }
    best
}

#[test]
fn the_q4_search_is_close_to_exhaustive() {
    let mut random = Random(8);
    let data = random.gaussians(64 * 64);
    let matrix = quantize_matrix(Format::Q4, 64, &data).expect("finite");
    let energy: f64 = data.iter().map(|&weight| f64::from(weight).powi(2)).sum();
    let best = (data.chunks(32).map(exhaustive).sum::<f64>() / energy).sqrt();
    let found = relative_rms(&data, 64, &matrix);
    assert!(found < best * 1.01, "found {found}, exhaustive {best}");
}

#[test]
fn q8_is_never_worse_than_the_scale_of_the_largest() {
    let mut random = Random(9);
    for block in 0..500 {
        let data: Vec<f32> = (0..32).map(|_| random.heavy() as f32).collect();
        let matrix = quantize_matrix(Format::Q8, 32, &data).expect("finite");
        let largest = data.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
        let scale = bf16::from_f32(largest / 127.0).to_f32();
        let plain = data.iter().map(|&w| w - scale * (w / scale).round_ties_even().clamp(-127.0, 127.0));
        let plain: f64 = plain.map(|rest| f64::from(rest).powi(2)).sum();
        let found: f64 = data.iter().enumerate().map(|(i, &w)| f64::from(w - matrix.weight(0, i)).powi(2)).sum();
        assert!(found <= plain * 1.0001, "block {block}: {found} {plain}");
    }
}

#[test]
fn blocks_of_any_magnitude() {
    let mut random = Random(10);
    let block = random.gaussians(32);
    for format in [Format::Q8, Format::Q4] {
        let usual = relative_rms(&block, 32, &quantize_matrix(format, 32, &block).expect("finite"));
        for magnitude in [1e-28, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30, 1e39] {
            let scaled: Vec<f32> = block.iter().map(|&weight| (f64::from(weight) * magnitude) as f32).collect();
            let loss = relative_rms(&scaled, 32, &quantize_matrix(format, 32, &scaled).expect("finite"));
            assert!(loss < usual * 1.1, "{format} at {magnitude:e}: {loss}, usually {usual}");
        }
        // Zeros, and what is as good as zero.
        for magnitude in [0.0, 1e-44, 1e-38, -1e-35] {
            let matrix = quantize_matrix(format, 32, &[magnitude; 32]).expect("finite");
            assert_eq!(matrix.scales, [0.0], "{format} at {magnitude:e}");
        }
        // One block of zeros between others.
        let mut three = [&block[..], &[0.0; 32], &block[..]].concat();
        three[40] = -0.0;
        let matrix = quantize_matrix(format, 96, &three).expect("finite");
        assert!(matrix.scales[0] == matrix.scales[2] && matrix.scales[1] == 0.0, "{format} {:?}", matrix.scales);
        assert_eq!(matrix.codes[..32], matrix.codes[64..]);
    }
}

/// The message of packing a matrix of 40 × 50 in two experts, of which one weight is `value`.
fn refusal(format: Format, value: f32) -> String {
    let mut source = Memory::default();
    source.add("layers.3.experts.down", 2, 40, 50, &mut Random(11));
    source.0.get_mut("layers.3.experts.down").expect("just added").data[(40 + 37) * 50 + 49] = value;
    let down = item("down", format, tiles(&[("layers.3.experts.down", 40)]), 40, 50);
    let mut items = [PayloadItem { experts: 2, ..down }];
    place(&mut items);
    pack(&items, &source, 2).map(|_| ()).expect_err("the weight cannot be stored").to_string()
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    for format in FORMATS {
        for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let message = refusal(format, value);
            let place = format!("weight `layers.3.experts.down`, expert 1, row 37, column 49 is {value}");
            assert!(message.contains(&place) && message.contains("damaged"), "{format}: {message}");
        }
    }
    let message = refusal(Format::F16, 65520.0);
    assert!(message.contains("row 37, column 49 is 6.552e4, too large for f16"), "{message}");
    let message = refusal(Format::Bf16, f32::MAX);
    assert!(message.contains("too large for bf16"), "{message}");
    let data = [1.0, f32::NAN];
    assert!(quantize_matrix(Format::Q4, 2, &data).is_err() && quantize_matrix(Format::Q8, 2, &data).is_err());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_reported() {
    let mut source = Memory::default();
    source.add("w", 1, 64, 64, &mut Random(12));
    let mut items = [item("w", Format::Q4, tiles(&[("w", 64)]), 64, 64)];
    place(&mut items);
    let full = File::options().write(true).open("/dev/full").expect("Linux has it");
    let error = pack_to(&full, 0, &items, &source, 2).expect_err("the device is full");
    let message = error.to_string();
    assert!(matches!(error, PackError::Write { done: 0, total: 2304, .. }), "{error:?}");
    assert!(message.contains("make room"), "{message}");
}

#[test]
fn failing_sources_are_reported() {
    let mut items = [item("w", Format::Q4, tiles(&[("absent", 64)]), 64, 64)];
    place(&mut items);
    let error = pack(&items, &Memory::default(), 2).expect_err("there is no such weight");
    assert_eq!(error.to_string(), "cannot read weight `absent`: no weight absent");
}

#[test]
fn progress_is_complete_and_can_be_cancelled() {
    let mut source = Memory::default();
    source.add("w", 8, 256, 2048, &mut Random(13));
    let w = item("w", Format::F32, tiles(&[("w", 256)]), 256, 2048);
    let mut items = [PayloadItem { experts: 8, ..w }];
    place(&mut items);
    let file = tempfile::tempfile().expect("a temporary file");
    let (cancel, most, calls) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
    let progress = |done, total| {
        most.fetch_max(done, Ordering::Relaxed);
        calls.lock().expect("not poisoned").push(total);
    };
    let packing = Packing {
        items: &items,
        source: &source,
        rope: ROPE,
        head_dim: 20,
        threads: 2,
        progress: &progress,
        cancel: &cancel,
    };
    let report = packing.write(&file, 0).expect("sound weights");
    let total = 8 * 256 * 2048 * 4;
    assert_eq!((report.bytes(), report.weights()), (total, total / 4));
    assert_eq!(most.load(Ordering::Relaxed), total);
    let calls = calls.lock().expect("not poisoned").clone();
    assert!(calls.len() > 4 && calls.iter().all(|&each| each == total), "{calls:?}");

    let progress = |done, _| cancel.store(done > 0, Ordering::Relaxed);
    let error = Packing { progress: &progress, ..packing }.write(&file, 0).expect_err("cancelled");
    assert!(matches!(error, PackError::Cancelled), "{error}");
}

#[test]
fn the_report_tells_the_loss() {
    let mut source = Memory::default();
    source.add("w", 1, 50, 100, &mut Random(14));
    let mut items = FORMATS.map(|format| item("w", format, tiles(&[("w", 50)]), 50, 100));
    place(&mut items);
    let (_, report) = pack(&items, &source, 2).expect("sound weights");
    let data = &source.0["w"].data;
    for (item, packed) in items.iter().zip(&report.items) {
        let stored = Stored { tensor: "w", expert: None, rows: 0..50, columns: 100 };
        let expected = if item.format.is_quantized() {
            relative_rms(data, 100, &quantize_matrix(item.format, 100, data).expect("finite"))
        } else {
            let stored = float_rows(&source, &stored, item.format).expect("finite");
            let error: f64 = data.iter().zip(stored).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            (error / data.iter().map(|&weight| f64::from(weight).powi(2)).sum::<f64>()).sqrt()
        };
        assert!((packed.relative_rms() - expected).abs() <= 1e-5 * expected, "{}: {expected}", item.format);
        assert_eq!(packed.weights, 5000);
    }
    assert_eq!(report.by_role().len(), 5);
}

/// `cargo test --release -p moec-tests --test pack -- --ignored --nocapture`
#[test]
#[ignore = "measures speed: run it alone, in release"]
fn speed() {
    let mut random = Random(15);
    let (rows, columns) = (2048, 4096);
    let some = random.gaussians(1 << 16);
    let data = (0..rows * columns).map(|i| bf16::from_f32(some[i % some.len()]).to_f32()).collect();
    let source = Memory(BTreeMap::from([("w".into(), Tensor { rows, columns, data })]));
    for format in FORMATS {
        let mut items: Vec<_> = (0..8).map(|_| item("w", format, tiles(&[("w", rows)]), rows, columns)).collect();
        place(&mut items);
        let file = tempfile::tempfile().expect("a temporary file");
        for threads in [1, 2] {
            let start = std::time::Instant::now();
            let report = pack_to(&file, 0, &items, &source, threads).expect("sound weights");
            let speed = report.weights() as f64 / start.elapsed().as_secs_f64() / 1e6;
            println!("{format}, {threads} threads: {speed:.0} M weights/s");
            assert!(speed > 20.0, "{format} is packed at {speed} M weights/s");
        }
    }
}
