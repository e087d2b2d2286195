//! How fast packing is.

use crate::model::{Memory, Random, Tensor, item, pack_to, place, tiles};
use crate::reader::FORMATS;
use half::bf16;
use std::collections::BTreeMap;

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
