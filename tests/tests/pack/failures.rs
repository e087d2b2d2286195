//! What cannot be packed is refused in words; progress and cancellation.

use crate::model::{Memory, ROPE, Random, item, pack, pack_to, place, tiles};
use crate::reader::FORMATS;
use moec::emit::pack::{PackError, Packing};
use moec::plan::layout::Format;
use moec::plan::payload::PayloadItem;
use moec::plan::quant::quantize_matrix;
use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The message of packing a matrix of 40 × 50 in two experts, of which one weight is `value`.
fn refusal(format: Format, value: f32) -> String {
    let mut source = Memory::default();
    source.add("layers.3.experts.down", 2, 40, 50, &mut Random(11));
    source.0.get_mut("layers.3.experts.down").expect("just added").data[(40 + 37) * 50 + 49] = value;
    let down = item("down", format, tiles(&[("layers.3.experts.down", 40)]), 40, 50);
    let mut items = [PayloadItem { experts: 2, router: Some(0), ..down }];
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
    let mut items = [PayloadItem { experts: 8, router: Some(0), ..w }];
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
