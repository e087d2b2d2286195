//! Stored codes are kept: the weights that kernels compute with are, to the bit, what the gguf package makes of the blocks.
//!
//! A file of one type is imported and packed; the kernel then multiplies it with rows that have a single 1, so that what it gives is a weight.

use crate::harness::{Arg, Case};
use crate::machine::{self, Guarded};
use moec::emit::pack::{Packing, RowSource};
use moec::import::{self, Dtype, Rope, RopeScaling};
use moec::kernels::{Dot, Epilogue, Kernel, Matmul, MatmulTuning};
use moec::plan::layout::Format;
use moec::plan::payload::{Arrangement, Part, PayloadItem};
use moec::tune::code::Code;
use moec_ir::graph::Layout;
use moec_tests::gguf::{SMALL_HIDDEN, small};
use safetensors::SafeTensors;
use std::path::Path;
use std::sync::atomic::AtomicBool;

const ROWS: usize = 2;

/// The bytes of a matrix of two rows in tiles of `format`.
fn pack(source: &dyn RowSource, format: Format) -> Vec<u8> {
    let item = PayloadItem {
        name: "gate".into(),
        shared: None,
        role: None,
        format,
        arrangement: Arrangement::Tiles { parts: vec![Part { tensor: "layers.0.gate".into(), rows: ROWS }] },
        experts: 1,
        router: None,
        order: None,
        rows: ROWS,
        columns: SMALL_HIDDEN,
        row_heads: None,
        column_heads: None,
        offset: 0,
    };
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let packing = Packing {
        items: std::slice::from_ref(&item),
        source,
        rope: Rope { theta: 1e4, rotated: None, scaling: RopeScaling::None },
        head_dim: 2,
        threads: 1,
        progress: &|_, _| (),
        cancel: &AtomicBool::new(false),
    };
    let report = packing.write(file.as_file(), 0).expect("finite weights");
    assert_eq!(report.items[0].error, 0.0, "{format}: nothing is lost");
    let mut bytes = std::fs::read(file.path()).expect("it was written");
    bytes.resize(item.expert_bytes(), 0);
    bytes
}

/// A quantized row for `format` that is 1 at `k` and 0 elsewhere, its scales 1.
fn one(format: Format, k: usize) -> Vec<u8> {
    let sums = format.row_sums();
    let sum = if sums.is_scaled() { 1f32.to_le_bytes() } else { (-128i32).to_le_bytes() };
    let codes = (0..SMALL_HIDDEN).map(|i| u8::from(i == k));
    let scales = std::iter::repeat_n(1f32.to_le_bytes(), SMALL_HIDDEN / 32).flatten();
    let sums = (0..SMALL_HIDDEN / sums.columns()).flat_map(|run| if run == k / sums.columns() { sum } else { [0; 4] });
    codes.chain(scales).chain(sums).collect()
}

/// Calls the kernel with a row for each column: the weights `[row][column]`.
fn weights(code: &Code, format: Format, matrix: &Guarded) -> Vec<f32> {
    let mut found = vec![0.0; ROWS * SMALL_HIDDEN];
    for k in 0..SMALL_HIDDEN {
        let (x, mut y) = (Guarded::new(&one(format, k)), Guarded::new(&[0; 64]));
        // SAFETY: one unit of the kernel's matrix, a row of its length, and room for the 16 sums.
        unsafe { code.call(&[matrix.address(), x.address(), y.address(), 1]) };
        for row in 0..ROWS {
            found[row * SMALL_HIDDEN + k] =
                f32::from_le_bytes(*y.content()[4 * row..].first_chunk().expect("four bytes"));
        }
    }
    found
}

/// Runs the evaluator on one column.
fn evaluate(kernel: &Matmul, matrix: &[u8], expected: &[f32], k: usize) {
    let mut case = Case::new(kernel.clone());
    let mut sums = vec![0; 64];
    for row in 0..ROWS {
        sums[4 * row..][..4].copy_from_slice(&(expected[row * SMALL_HIDDEN + k] + 0.0).to_le_bytes());
    }
    let regions = [case.input("w", matrix.to_vec()), case.input("x", one(kernel.format, k)), case.output("y", sums)];
    case.at(&regions);
    case.args.push(Arg::Int(1));
    case.evaluate();
}

#[test]
fn kept_codes_are_the_weights_of_the_gguf_package() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/gguf/blocks.safetensors");
    let golden = std::fs::read(golden).expect("golden blocks");
    let golden = SafeTensors::deserialize(&golden).expect("a safetensors file");
    for (name, kind, dtype, layout) in [
        ("Q8_0", 8, Dtype::Q8_0, Layout::Q8_0),
        ("Q5_0", 6, Dtype::Q5_0, Layout::Q8_0),
        ("Q5_1", 7, Dtype::Q5_1, Layout::Q5_1),
        ("Q5_K", 13, Dtype::Q5K, Layout::Q5K),
        ("Q4_0", 2, Dtype::Q4_0, Layout::Q4_0),
        ("Q4_1", 3, Dtype::Q4_1, Layout::Q4_1),
        ("Q4_K", 12, Dtype::Q4K, Layout::Q4K),
        ("IQ4_NL", 20, Dtype::Iq4Nl, Layout::Iq4Nl),
        ("MXFP4", 39, Dtype::Mxfp4, Layout::Mxfp4),
        ("Q6_K", 14, Dtype::Q6K, Layout::Q6K),
        ("Q3_K", 11, Dtype::Q3K, Layout::Q3K),
        ("Q2_K", 10, Dtype::Q2K, Layout::Q2K),
        ("IQ4_XS", 23, Dtype::Iq4Xs, Layout::Iq4Xs),
    ] {
        let mut file = small();
        let gate = file.tensor("blk.0.ffn_gate.weight");
        gate.kind = kind;
        gate.bytes = golden.tensor(&format!("{name}.blocks")).expect("blocks").data().to_vec();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = moec_tests::gguf::write(&file, directory.path());
        let model = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
        let info = model.tensors.info("layers.0.gate");
        assert_eq!((info.dtype, info.exact), (dtype, Some(layout)), "{name}");

        let values = golden.tensor(&format!("{name}.values")).expect("values");
        // A sum begins at +0, so a weight of −0 is read as 0; it is the same number.
        let expected: Vec<f32> =
            values.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes) + 0.0).collect();
        let format = Format::of(layout).expect("a resolved layout");
        let bytes = pack(&model.tensors, format);
        let matrix = Guarded::new(&bytes);
        for dot in [Dot::Unsigned, Dot::Signed, Dot::Small] {
            if dot == Dot::Small && format.small().is_none() {
                continue;
            }
            let kernel = Matmul {
                format,
                k: SMALL_HIDDEN,
                part: None,
                fetch: false,
                tokens: 1,
                row: format.row(),
                dot,
                epilogue: Epilogue::Store,
                y_stride: 0,
                tuning: MatmulTuning::plain(format),
            };
            for k in (0..SMALL_HIDDEN).step_by(29) {
                evaluate(&kernel, &bytes, &expected, k);
            }
            let kernel = Kernel::from(kernel);
            for cpu in crate::CPUS.into_iter().filter(|cpu| machine::can_run(cpu)) {
                for (how, code) in
                    [("wide", machine::by_choice(&kernel, cpu)), ("Cranelift", machine::by_cranelift(&kernel, cpu))]
                {
                    let found = weights(&code, format, &matrix);
                    let wrong = found.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits());
                    assert_eq!(
                        wrong,
                        None,
                        "{name} by {how} for {cpu}, {dot:?}: {:?}",
                        wrong.map(|i| (found[i], expected[i]))
                    );
                }
            }
        }
    }
}
