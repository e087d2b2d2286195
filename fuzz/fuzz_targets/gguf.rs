//! Opening a hostile GGUF file and reading all of it, numbers and codes, and planning it as it is stored: an error or a model, never a panic, and no more memory than
//! the file is long.
//!
//! `seeds/gguf` has sound ones: types of codes, tokenizers, architectures. The file is kept in memory where the system has such a place (`/dev/shm`).

#![no_main]

use libfuzzer_sys::fuzz_target;
use moec_fuzz::{directory, plan, read_all};
use std::sync::LazyLock;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(directory);

fuzz_target!(|input: &[u8]| {
    let path = DIRECTORY.path().join("model.gguf");
    std::fs::write(&path, input).expect("the directory can be written");
    let Ok(model) = moec::import::open(&path) else { return };
    read_all(&model);
    plan(&model, &["none"]);
});
