//! Opening a hostile GGUF file and reading all of it, numbers and codes: an error or a model, never a panic, and no more memory than the file is long.
//!
//! `seeds/gguf` has a sound one. The file is kept in memory where the system has such a place (`/dev/shm`).

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use std::sync::LazyLock;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    directory.expect("a temporary directory")
});

fuzz_target!(|input: &[u8]| {
    let path = DIRECTORY.path().join("model.gguf");
    std::fs::write(&path, input).expect("the directory can be written");
    let Ok(model) = moec::import::open(&path) else { return };
    for name in model.tensors.names() {
        let shape = &model.tensors.info(name).shape;
        let (cols, rows) = shape.split_last().expect("a weight has a dimension");
        let experts = if let [experts, _] = rows { *experts } else { 1 };
        let rows = rows.last().copied().unwrap_or(1);
        let mut values = vec![0.0; rows * cols];
        let mut codes = moec::import::CodedRows::default();
        for expert in 0..experts {
            model.tensors.read_rows(name, expert, 0..rows, &mut values);
            if model.tensors.info(name).exact.is_some() {
                codes.reset(rows, *cols);
                model.tensors.read_codes(name, expert, 0..rows, &mut codes, 0);
            }
        }
    }
});
