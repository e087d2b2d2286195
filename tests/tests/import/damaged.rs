//! Random damage to every file of a model: an error or a model that can be read, never a panic.

use crate::model::Model;
use moec::import;
use proptest::prelude::*;
use std::path::Path;

/// Opens a directory and, if that goes well, reads all of it.
fn open_and_read(directory: &Path) {
    if let Ok(model) = import::open(directory) {
        for name in model.tensors.names() {
            let shape = &model.tensors.info(name).shape;
            let (cols, rows) = shape.split_last().unwrap();
            let experts = if let [experts, _] = rows { *experts } else { 1 };
            let rows = rows.last().copied().unwrap_or(1);
            let mut values = vec![0.0; rows * cols];
            for expert in 0..experts {
                model.tensors.read_rows(name, expert, 0..rows, &mut values);
            }
        }
    }
}

/// Bytes that mean something to the formats, so that damage gets past the first check.
const BYTES: &[u8] = b"0129-+.eE\"{}[],:\\ \n\x00\xff";

fn damage() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    let byte = prop_oneof![any::<u8>(), prop::sample::select(BYTES)];
    prop::collection::vec((any::<prop::sample::Index>(), byte), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn headers(damage in damage(), padding in 0usize..8) {
        let mut model = Model::mixtral();
        model.padding = padding;
        let mut bytes = model.weights();
        let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        for (place, byte) in damage {
            bytes[place.index(header)] = byte;
        }
        open_and_read(model.file("model.safetensors", bytes).write().path());
    }

    #[test]
    fn flipped_bits_of_weights(place in any::<prop::sample::Index>(), bit in 0u8..8) {
        let model = Model::mixtral();
        let mut bytes = model.weights();
        let place = place.index(bytes.len());
        bytes[place] ^= 1 << bit;
        open_and_read(model.file("model.safetensors", bytes).write().path());
    }

    #[test]
    fn truncated_weights(length in any::<prop::sample::Index>()) {
        let model = Model::mixtral();
        let bytes = model.weights();
        let length = length.index(bytes.len());
        let directory = model.file("model.safetensors", &bytes[..length]).write();
        prop_assert!(import::open(directory.path()).is_err());
    }

    #[test]
    fn gguf_files(damage in damage(), length in any::<prop::sample::Index>(), cut in any::<bool>()) {
        let file = moec_tests::gguf::small();
        let (mut bytes, header) = (file.bytes(), file.header().len());
        for (place, byte) in damage {
            bytes[place.index(header)] = byte;
        }
        if cut {
            bytes.truncate(length.index(bytes.len()));
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        std::fs::write(&path, bytes).unwrap();
        open_and_read(&path);
    }

    #[test]
    fn json_files(which in 0usize..3, damage in damage()) {
        let mut model = Model::mixtral();
        model.shards = 2;
        let name = ["config.json", "tokenizer.json", "model.safetensors.index.json"][which];
        let directory = model.write();
        let mut bytes = std::fs::read(directory.join(name)).unwrap();
        for (place, byte) in damage {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        std::fs::write(directory.join(name), bytes).unwrap();
        open_and_read(directory.path());
    }
}
