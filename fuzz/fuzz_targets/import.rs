//! Opening a model directory of which one file is hostile: an error or a model, never a panic. What opens is read and planned.
//!
//! The first byte of the input chooses the file, the rest is its content; `seeds/import` has a sound one of each, which are also
//! the other files of the directory. The directory is kept in memory where the system has one (`/dev/shm`).

#![no_main]

use libfuzzer_sys::fuzz_target;
use moec_fuzz::{directory, read_all};
use std::sync::LazyLock;
use tempfile::TempDir;

/// Each file's name in the directory and its seed; the seed's first byte is the file's place in this list.
const FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../seeds/import/config.json")),
    ("tokenizer.json", include_bytes!("../seeds/import/tokenizer.json")),
    (WEIGHTS, include_bytes!("../seeds/import/weights")),
    ("tokenizer_config.json", include_bytes!("../seeds/import/tokenizer_config.json")),
    ("model.safetensors.index.json", include_bytes!("../seeds/import/index.json")),
];

const WEIGHTS: &str = "model.safetensors";

/// Where the index of the seeds says the weights are, when there is an index.
const SHARD: &str = "shard.safetensors";

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(directory);

fuzz_target!(|input: &[u8]| {
    let Some((first, content)) = input.split_first() else { return };
    let chosen = usize::from(first.wrapping_sub(b'0')) % FILES.len();
    let directory = DIRECTORY.path();
    let indexed = FILES[chosen].0.ends_with("index.json");
    for (number, (name, seed)) in FILES.iter().enumerate() {
        let bytes = if number == chosen { content } else { &seed[1..] };
        let path = directory.join(if indexed && *name == WEIGHTS { SHARD } else { name });
        if std::fs::read(&path).ok().as_deref() != Some(bytes) {
            std::fs::write(&path, bytes).expect("the directory can be written");
        }
    }
    // Without an index the single file is the model; with one there must be none.
    let other = directory.join(if indexed { WEIGHTS } else { SHARD });
    if other.exists() {
        std::fs::remove_file(other).expect("the directory can be written");
    }
    let Ok(model) = moec::import::open(directory) else { return };
    read_all(&model);
    let _plan = moec::pipeline::compile(&model, &moec::pipeline::Options::default());
});
