//! Opening a model directory of which one file is hostile: an error or a model, never a panic. What opens is read and planned, quantized and
//! as it is stored.
//!
//! The first byte of the input chooses the file, the rest is its content; `seeds/import` has a sound one of each. The other files of the
//! directory are the seeds of the same model, for those that it does not have of its own the seeds of the first. The directory is kept in memory where the system has
//! one (`/dev/shm`).

#![no_main]

use libfuzzer_sys::fuzz_target;
use moec_fuzz::{directory, plan, read_all};
use std::sync::LazyLock;
use tempfile::TempDir;

/// The model, each file's name in the directory, and its seed; the seed's first byte is the file's place in this list.
const FILES: [(Model, &str, &[u8]); 13] = [
    (Model::Mixtral, CONFIG, include_bytes!("../seeds/import/config.json")),
    (Model::Mixtral, "tokenizer.json", include_bytes!("../seeds/import/tokenizer.json")),
    (Model::Mixtral, WEIGHTS, include_bytes!("../seeds/import/weights")),
    (Model::Mixtral, "tokenizer_config.json", include_bytes!("../seeds/import/tokenizer_config.json")),
    (Model::Mixtral, INDEX, include_bytes!("../seeds/import/index.json")),
    (Model::Gptq, CONFIG, include_bytes!("../seeds/import/gptq-config")),
    (Model::Gptq, WEIGHTS, include_bytes!("../seeds/import/gptq-weights")),
    (Model::Awq, CONFIG, include_bytes!("../seeds/import/awq-config")),
    (Model::Awq, WEIGHTS, include_bytes!("../seeds/import/awq-weights")),
    (Model::Phi3, CONFIG, include_bytes!("../seeds/import/phi3-config")),
    (Model::Phi3, WEIGHTS, include_bytes!("../seeds/import/phi3-weights")),
    (Model::Gemma2, CONFIG, include_bytes!("../seeds/import/gemma2-config")),
    (Model::Gemma2, WEIGHTS, include_bytes!("../seeds/import/gemma2-weights")),
];

/// Of what a file is a part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Model {
    Mixtral,
    Gptq,
    Awq,
    Phi3,
    Gemma2,
}

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";

/// Where the index of the seeds says the weights are, when there is an index.
const SHARD: &str = "shard.safetensors";

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(directory);

fuzz_target!(|input: &[u8]| {
    let Some((first, content)) = input.split_first() else { return };
    let (model, chosen, _) = FILES[usize::from(first.wrapping_sub(b'0')) % FILES.len()];
    let directory = DIRECTORY.path();
    let indexed = chosen == INDEX;
    for name in [CONFIG, "tokenizer.json", WEIGHTS, "tokenizer_config.json", INDEX] {
        // There is an index only where it is what is tried.
        if name == INDEX && !indexed {
            continue;
        }
        let seed = |of: Model| FILES.iter().find(|file| (file.0, file.1) == (of, name)).map(|file| file.2);
        let seed = seed(model).or(seed(Model::Mixtral)).expect("the first model has all files");
        let bytes = if name == chosen { content } else { &seed[1..] };
        let path = directory.join(if indexed && name == WEIGHTS { SHARD } else { name });
        if std::fs::read(&path).ok().as_deref() != Some(bytes) {
            std::fs::write(&path, bytes).expect("the directory can be written");
        }
    }
    // Without an index the single file is the model; with one there must be none.
    for other in if indexed { &[WEIGHTS][..] } else { &[SHARD, INDEX] } {
        let other = directory.join(other);
        if other.exists() {
            std::fs::remove_file(other).expect("the directory can be written");
        }
    }
    let Ok(model) = moec::import::open(directory) else { return };
    read_all(&model);
    plan(&model, &["none", "q8"]);
});
