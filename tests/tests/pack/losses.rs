//! How much quantization loses.

use crate::model::{Memory, Random, item, pack, place, tiles};
use crate::reader::FORMATS;
use half::bf16;
use moec::emit::pack::{Stored, float_rows};
use moec::plan::layout::{CODEBOOK, Format};
use moec::plan::quant::{QuantizedMatrix, quantize_matrix};

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
    assert!(found[0] < 0.0050 && found[1] < 0.0743 && found[2] < 0.0072 && found[3] < 0.0905, "{found:?}");
}

/// The least squared error that any scale gives, tried finely: what the fast search is up against.
fn exhaustive(block: &[f32]) -> f64 {
    let largest = block.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
    let mut best = f64::INFINITY;
    for step in 0..240 {
        let place = 20.0 + step as f32 * 0.075;
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
