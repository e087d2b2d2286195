//! Synthetic models: whole or not there at all, and the same for the same seed.

use moec::import;
use moec::synth::{self, Preset, SynthError};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

fn write(directory: &Path, layers: Option<usize>, seed: u64) -> Result<(), SynthError> {
    synth::write(Preset::Tiny, layers, seed, false, directory, &|_, _| ControlFlow::Continue(()))
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_model_opens_and_has_sane_weights() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("tiny");
    let (last, total) = (AtomicU64::new(0), AtomicU64::new(0));
    synth::write(Preset::Tiny, None, 1, false, &directory, &|done, all| {
        last.fetch_max(done, Ordering::Relaxed);
        total.store(all, Ordering::Relaxed);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(names(place.path()), ["tiny"]);
    let weights = std::fs::metadata(directory.join("model.safetensors")).unwrap().len();
    assert_eq!((last.into_inner(), total.into_inner()), (weights, weights));
    let model = import::open(&directory).unwrap();
    assert_eq!(model.config.layers, 2);
    for (name, expert, rows, cols, mean, deviation) in [
        ("embed", 0, 512, 128, 0.0, 1.0),
        ("layers.1.experts.down", 7, 128, 256, 0.0, 1.0 / 16.0),
        ("layers.0.q", 0, 128, 128, 0.0, 128f64.sqrt().recip()),
        ("norm", 0, 1, 128, 1.0, 0.1),
    ] {
        let mut values = vec![0.0; rows * cols];
        model.tensors.read_rows(name, expert, 0..rows, &mut values);
        let count = values.len() as f64;
        let found = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
        let square = values.iter().map(|&value| (f64::from(value) - found).powi(2)).sum::<f64>() / count;
        assert!((found - mean).abs() < 4.0 * deviation / count.sqrt(), "{name}: mean {found}");
        assert!((square.sqrt() / deviation - 1.0).abs() < 3.0 / count.sqrt(), "{name}: deviation {}", square.sqrt());
    }
}

#[test]
fn the_seed_decides_and_layers_are_independent() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    write(&at("a"), None, 5).unwrap();
    write(&at("b"), None, 5).unwrap();
    write(&at("c"), None, 6).unwrap();
    write(&at("d"), Some(1), 5).unwrap();
    let weights = |name: &str| std::fs::read(at(name).join("model.safetensors")).unwrap();
    assert!(weights("a") == weights("b"));
    assert!(weights("a") != weights("c"));
    let (two, one) = (import::open(&at("a")).unwrap(), import::open(&at("d")).unwrap());
    for name in one.tensors.names() {
        assert!(one.tensors.raw(name, 0, 0..1).bytes == two.tensors.raw(name, 0, 0..1).bytes, "{name}");
    }
}

#[test]
fn taken_names_and_wrong_numbers_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let taken = place.path().join("taken");
    std::fs::create_dir(&taken).unwrap();
    write(&taken, None, 1).unwrap();
    let error = write(&taken, None, 1).unwrap_err().to_string();
    assert!(error.contains("taken") && error.contains("already there"), "{error}");
    let file = place.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(write(&file, None, 1), Err(SynthError::Exists(_))));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    for layers in [0, 1025] {
        let error = write(&place.path().join("x"), Some(layers), 1).unwrap_err().to_string();
        assert!(error.contains(&layers.to_string()), "{error}");
    }
    let error = synth::write(Preset::Mixtral8x7b, Some(1024), 1, false, &place.path().join("x"), &|_, _| {
        panic!("three terabytes are there")
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("2972.7 GB") && error.contains("free"), "{error}");
    assert_eq!(names(place.path()), ["file", "taken"]);
}

#[test]
fn an_interrupted_one_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let stop = |_, _| ControlFlow::Break(());
    let result = synth::write(Preset::Tiny, None, 1, false, &place.path().join("m"), &stop);
    assert!(matches!(result, Err(SynthError::Interrupted)));
    assert_eq!(names(place.path()), Vec::<String>::new());
    let stuck = place.path().join("file");
    std::fs::write(&stuck, "").unwrap();
    let error = write(&stuck.join("m"), None, 1).unwrap_err().to_string();
    assert!(error.contains("file"), "{error}");
}

#[test]
fn a_sparse_one_takes_no_room() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("whole");
    synth::write(Preset::Mixtral8x7b, None, 0, true, &directory, &|_, _| panic!("nothing is written")).unwrap();
    let model = import::open(&directory).unwrap();
    assert_eq!((model.config.layers, model.tensors.parameters()), (32, 46_702_792_704));
    let mut rows = vec![1.0; 2 * 4096];
    model.tensors.read_rows("layers.31.experts.gate", 7, 14334..14336, &mut rows);
    assert_eq!(rows, vec![0.0; 2 * 4096]);
    let files = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    let blocks: u64 = files.map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata)).sum();
    assert!(blocks * 512 < 32 << 20, "{} bytes on the disk", blocks * 512);
}
