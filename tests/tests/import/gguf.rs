//! GGUF files: every type read to the bit as the gguf package reads it, split files, and hostile ones.

use moec::import::{self, Architecture, Dtype, RopeScaling};
use moec_tests::gguf::{Gguf, SMALL_HIDDEN as HIDDEN, SMALL_VOCAB as VOCAB, Tensor, Value, small};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn write(bytes: &[u8]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.gguf");
    std::fs::write(&path, bytes).unwrap();
    (directory, path)
}

fn open(file: &Gguf) -> import::Model {
    let (_directory, path) = write(&file.bytes());
    import::open(&path).unwrap_or_else(|e| panic!("{e}"))
}

/// What keeps a file from opening; it must say all of `words`.
#[track_caller]
fn refused(bytes: &[u8], words: &[&str]) {
    let (_directory, path) = write(bytes);
    let Err(error) = import::open(&path) else { panic!("opened, though it should say {words:?}") };
    let text = error.to_string();
    for word in words.iter().chain(&["small.gguf"]) {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    assert!(!text.contains('\n') && text.len() < 700, "an error is one sentence: {text}");
}

#[test]
fn every_type_reads_as_the_gguf_package_reads_it() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/gguf/blocks.safetensors");
    let golden = std::fs::read(golden).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    for (name, kind) in [
        ("F32", 0),
        ("F16", 1),
        ("Q4_0", 2),
        ("Q4_1", 3),
        ("Q5_0", 6),
        ("Q5_1", 7),
        ("Q8_0", 8),
        ("Q2_K", 10),
        ("Q3_K", 11),
        ("Q4_K", 12),
        ("Q5_K", 13),
        ("Q6_K", 14),
        ("IQ4_NL", 20),
        ("IQ4_XS", 23),
        ("BF16", 30),
        ("MXFP4", 39),
    ] {
        let mut file = small();
        let gate = file.tensor("blk.0.ffn_gate.weight");
        gate.kind = kind;
        gate.bytes = golden.tensor(&format!("{name}.blocks")).unwrap().data().to_vec();
        let model = open(&file);
        let expected = golden.tensor(&format!("{name}.values")).unwrap();
        let expected: Vec<u32> = expected.data().as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        let mut found = vec![0.0; 2 * HIDDEN];
        model.tensors.read_rows("layers.0.gate", 0, 0..2, &mut found);
        let bits: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
        let first = bits.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(first, None, "{name}: element {first:?} is {}", found[first.unwrap_or(0)]);
        model.tensors.read_rows("layers.0.gate", 0, 1..2, &mut found[..HIDDEN]);
        assert_eq!(found[..HIDDEN], found[HIDDEN..], "{name}: one row");
        assert_eq!(model.tensors.info("layers.0.gate").dtype.name().to_uppercase(), name);
    }
}

#[test]
fn a_model_is_what_its_metadata_says() {
    let model = open(&small());
    let config = &model.config;
    assert_eq!((config.architecture, config.layers, config.hidden, config.ffn), (Architecture::Llama, 1, HIDDEN, 2));
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.context), (1, 1, 2, 64));
    assert_eq!((config.vocab, config.tied, config.norm_eps), (VOCAB, true, 1e-5));
    assert_eq!((config.rope.theta, &config.rope.scaling), (1e4, &RopeScaling::None));
    assert_eq!((config.bos_token_id, &config.eos_token_ids), (Some(1), &vec![2]));
    assert_eq!((model.name.as_str(), model.tokenizer.bos_token.as_deref()), ("small", Some("<s>")));
    assert_eq!(model.tensors.info("output").dtype, Dtype::F32);

    let mut file = small();
    file.key("llama.rope.freq_base", Value::F32(5e5));
    file.key("tokenizer.ggml.eot_token_id", Value::U32(4));
    file.key("tokenizer.chat_template", Value::Text("T".into()));
    file.tensors.push(Tensor {
        name: "rope_freqs.weight".into(),
        kind: 0,
        shape: vec![1],
        bytes: 8f32.to_le_bytes().to_vec(),
    });
    let model = open(&file);
    assert_eq!(model.config.rope.scaling, RopeScaling::Divided { divisors: vec![8.0] });
    assert_eq!((model.config.rope.theta, model.config.eos_token_ids), (5e5, vec![2, 4]));
    assert_eq!(model.tokenizer.chat_template.as_deref(), Some("T"));
}

#[test]
fn rotary_halves_are_no_longer_interleaved() {
    let mut file = small();
    file.set("llama.attention.key_length", Value::U32(6));
    for name in ["attn_q", "attn_k", "attn_v"] {
        let tensor = file.tensor(&format!("blk.0.{name}.weight"));
        tensor.shape = vec![6, HIDDEN];
        tensor.bytes = (0..6).flat_map(|row| (row as f32).to_le_bytes().repeat(HIDDEN)).collect();
    }
    let output = file.tensor("blk.0.attn_output.weight");
    (output.shape, output.bytes) = (vec![HIDDEN, 6], vec![0; 4 * 6 * HIDDEN]);
    let model = open(&file);
    for (weight, expected) in [("q", [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]), ("v", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])] {
        let name = format!("layers.0.{weight}");
        let mut rows = vec![0.0; 6 * HIDDEN];
        model.tensors.read_rows(&name, 0, 0..6, &mut rows);
        let firsts: Vec<f32> = rows.chunks(HIDDEN).map(|row| row[0]).collect();
        assert_eq!(firsts, expected, "{weight}");
        model.tensors.prefetch(&name, 0, 1..3);
        model.tensors.release(&name, 0, 1..3);
        model.tensors.read_rows(&name, 0, 1..3, &mut rows[..2 * HIDDEN]);
        assert_eq!((rows[0], rows[HIDDEN]), (expected[1], expected[2]));
    }
}

#[test]
fn split_files_are_one_model_from_any_part() {
    let whole = small();
    let directory = tempfile::tempdir().unwrap();
    let path = |part: usize| directory.path().join(format!("m-{part:05}-of-00003.gguf"));
    let split = |part: u32| {
        let mut file = Gguf::default();
        if part == 0 {
            file.keys = whole.keys.clone();
        }
        file.key("split.no", Value::U32(part));
        file.key("split.count", Value::U32(3));
        file.tensors = whole.tensors.iter().skip(part as usize).step_by(3).cloned().collect();
        file
    };
    for part in 0..3 {
        std::fs::write(path(part + 1), split(part as u32).bytes()).unwrap();
    }
    let expected = open(&whole);
    for part in 1..=3 {
        let model = import::open(&path(part)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(model.tensors.parameters(), expected.tensors.parameters());
        assert_eq!(model.tensors.identities().count(), 3);
    }
    let error = |path: &Path| import::open(path).unwrap_err().to_string();
    std::fs::copy(path(1), directory.path().join("other.gguf")).unwrap();
    assert!(error(&directory.path().join("other.gguf")).contains("-00001-of-00003.gguf"));
    std::fs::write(path(3), split(1).bytes()).unwrap();
    assert!(error(&path(1)).contains("split.no"), "{}", error(&path(1)));
    std::fs::remove_file(path(2)).unwrap();
    assert!(error(&path(1)).contains("00002-of-00003.gguf") && error(&path(1)).contains("missing"));
}

#[test]
fn headers_that_lie() {
    let sound = small();
    let bytes = sound.bytes();
    refused(b"", &["does not begin with"]);
    refused(b"GGUF", &["truncated"]);
    refused(&[b"GGUF\x01\0\0\0", &bytes[8..]].concat(), &["version 1"]);
    refused(&[b"GGUF\0\0\0\x03", &bytes[8..]].concat(), &["big-endian"]);
    refused(&[b"GGUF\x09\0\0\0", &bytes[8..]].concat(), &["version 9"]);
    refused(&bytes[..bytes.len() - 1], &["truncated", "blk.0.ffn_down.weight"]);
    refused(&bytes[..sound.header().len() / 2], &["truncated"]);

    let tensor = |change: &dyn Fn(&mut Tensor)| {
        let mut file = small();
        change(file.tensor("blk.0.ffn_gate.weight"));
        file.bytes()
    };
    refused(&tensor(&|t| t.shape = vec![1 << 40, 1 << 40]), &["blk.0.ffn_gate.weight", "not a number"]);
    refused(&tensor(&|t| t.shape = vec![1 << 30, 256]), &["blk.0.ffn_gate.weight", "inside the file"]);
    refused(&tensor(&|t| t.shape = vec![0, 256]), &["blk.0.ffn_gate.weight", "found 0"]);
    refused(&tensor(&|t| t.shape = vec![1; 5]), &["blk.0.ffn_gate.weight", "1 to 4 axes", "5"]);
    refused(&tensor(&|t| t.shape = vec![4, 128]), &["blk.0.ffn_gate.weight", "[2, 256]", "[4, 128]"]);
    refused(&tensor(&|t| t.kind = 16), &["blk.0.ffn_gate.weight", "IQ2_XXS", "Q4_K"]);
    refused(&tensor(&|t| t.kind = 4000), &["blk.0.ffn_gate.weight", "type 4000"]);
    refused(&tensor(&|t| (t.kind, t.shape) = (12, vec![512, 1])), &["blk.0.ffn_gate.weight", "whole blocks of 256"]);
    refused(&tensor(&|t| t.name = "blk.0.ffn_up.weight".into()), &["blk.0.ffn_up.weight", "twice"]);
    refused(&tensor(&|t| t.name = "blk.0.other.weight".into()), &["blk.0.ffn_gate.weight", "missing"]);

    let key = |key: &str, value: Value| {
        let mut file = small();
        file.set(key, value);
        file.bytes()
    };
    refused(
        &key("general.architecture", Value::Text("gemma3".into())),
        &["general.architecture", "gemma3", "gemma2", "qwen2moe"],
    );
    refused(&key("general.architecture", Value::U32(1)), &["general.architecture", "a text"]);
    refused(&key("general.alignment", Value::U32(7)), &["general.alignment", "power of two"]);
    refused(&key("general.type", Value::Text("adapter".into())), &["general.type", "adapter"]);
    refused(&key("llama.block_count", Value::U32(0)), &["llama.block_count", "found 0"]);
    refused(&key("llama.block_count", Value::Text("1".into())), &["llama.block_count", "a number"]);
    refused(&key("llama.attention.head_count_kv", Value::U32(3)), &["llama.attention.head_count_kv", "divisor"]);
    refused(&key("llama.rope.scaling.type", Value::Text("ntk".into())), &["llama.rope.scaling.type", "ntk"]);
    refused(
        &key("llama.rope.scaling.type", Value::Text("longrope".into())),
        &["llama.rope.scaling.original_context_length", "LongRoPE"],
    );
    let mut long = small();
    long.key("llama.rope.scaling.type", Value::Text("longrope".into()));
    long.key("llama.rope.scaling.original_context_length", Value::U32(8));
    refused(&long.bytes(), &["rope_factors_short.weight", "LongRoPE"]);
    refused(&key("llama.rope.dimension_count", Value::U32(1)), &["llama.rope.dimension_count", "0.5"]);
    refused(&key("tokenizer.ggml.model", Value::Text("bert".into())), &["tokenizer.ggml.model", "bert"]);
    refused(&key("tokenizer.ggml.scores", Value::F32s(vec![0.0])), &["tokenizer.ggml.scores", "262"]);
    refused(&key("tokenizer.ggml.tokens", Value::U32(3)), &["tokenizer.ggml.tokens", "a list of texts"]);
    refused(&key("tokenizer.ggml.bos_token_id", Value::U32(999)), &["tokenizer.ggml.bos_token_id", "999"]);
    let mut gpt2 = small();
    gpt2.set("tokenizer.ggml.model", Value::Text("gpt2".into()));
    refused(&gpt2.bytes(), &["tokenizer.ggml.pre", "default", "llama-bpe"]);
    gpt2.key("tokenizer.ggml.pre", Value::Text("qwen2".into()));
    refused(&gpt2.bytes(), &["tokenizer.ggml.merges", "none"]);
    gpt2.key("tokenizer.ggml.merges", Value::Texts(vec!["t".into()]));
    refused(&gpt2.bytes(), &["tokenizer.ggml.merges", "two tokens"]);
    let mut twice = small();
    twice.key("llama.block_count", Value::U32(1));
    refused(&twice.bytes(), &["llama.block_count", "twice"]);
    let mut none = small();
    none.keys.retain(|(key, _)| !key.starts_with("tokenizer."));
    refused(&none.bytes(), &["tokenizer.ggml.tokens", "no tokenizer"]);
    let mut none = small();
    none.keys.retain(|(key, _)| key != "llama.context_length");
    refused(&none.bytes(), &["llama.context_length", "none"]);
}

#[test]
fn windows_are_taken_or_missed() {
    let mut file = small();
    file.key("general.name", Value::Text("Mistral-7B-Instruct-v0.1".into()));
    let without = open(&file);
    assert_eq!((without.config.architecture, without.config.sliding_window), (Architecture::Llama, None));
    let [warning] = without.warnings.as_slice() else { panic!("{:?}", without.warnings) };
    assert!(warning.contains("llama.attention.sliding_window") && warning.contains("--context 4096"), "{warning}");

    file.key("llama.attention.sliding_window", Value::U32(16));
    let with = open(&file);
    assert_eq!((with.config.architecture, with.config.sliding_window), (Architecture::Mistral, Some(16)));
    assert_eq!(with.warnings, [""; 0]);

    file.set("general.name", Value::Text("Llama".into()));
    file.set("llama.attention.sliding_window", Value::U32(0));
    let none = open(&file);
    assert_eq!((none.config.architecture, none.config.sliding_window), (Architecture::Llama, None));
    assert_eq!(none.warnings, [""; 0]);
}

/// A small file that claims to hold more than there is in the world is refused at once.
#[test]
fn huge_claims_cost_nothing() {
    let claim = |tensors: u64, keys: u64, rest: &[u8]| {
        let mut bytes = [b"GGUF\x03\0\0\0", &tensors.to_le_bytes()[..], &keys.to_le_bytes(), rest].concat();
        bytes.resize(1024, 0);
        bytes
    };
    let text = |length: u64| [&length.to_le_bytes()[..], b"k"].concat();
    let list =
        |kind: u32, count: u64| [&text(1)[..], &9u32.to_le_bytes(), &kind.to_le_bytes(), &count.to_le_bytes()].concat();
    for (bytes, words) in [
        (claim(1 << 60, 0, &[]), &["tensors", "1152921504606846976"][..]),
        (claim(u64::MAX, u64::MAX, &[]), &["tensors"]),
        (claim(0, 1 << 60, &[]), &["metadata keys"]),
        (claim(0, 1, &text(u64::MAX)), &["truncated"]),
        (claim(0, 1, &list(8, 1 << 60)), &["`k`", "1152921504606846976"]),
        (claim(0, 1, &list(8, 1 << 20)), &["`k`", "too few"]),
        (claim(0, 1, &list(12, 1 << 23)), &["`k`", "too few"]),
        (claim(0, 1, &list(9, 1)), &["`k`", "list of type 9"]),
        (claim(0, 1, &list(77, 1)), &["`k`", "list of type 77"]),
    ] {
        let (_directory, path) = write(&bytes);
        let start = Instant::now();
        let error = import::open(&path).expect_err("it lies").to_string();
        let took = start.elapsed();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
        assert!(took < Duration::from_millis(20), "{took:?}: {error}");
    }
}

/// What the fuzzer starts from must be models, or it starts from nothing.
#[test]
fn seeds_of_the_fuzzer_are_models() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    let open = |path: &Path| import::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut architectures = Vec::new();
    for file in std::fs::read_dir(seeds.join("gguf")).expect("seeds") {
        architectures.push(open(&file.expect("a seed").path()).config.architecture.name());
    }
    for name in ["gptq", "awq", "phi3", "gemma2"] {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for (seed, file) in [
            (format!("{name}-config"), "config.json"),
            (format!("{name}-weights"), "model.safetensors"),
            ("tokenizer.json".into(), "tokenizer.json"),
        ] {
            // The first byte says which file it is.
            let bytes = std::fs::read(seeds.join("import").join(seed)).expect("a seed");
            std::fs::write(directory.path().join(file), &bytes[1..]).expect("writable");
        }
        architectures.push(open(directory.path()).config.architecture.name());
    }
    architectures.sort_unstable();
    architectures.dedup();
    assert_eq!(architectures, ["Gemma2ForCausalLM", "LlamaForCausalLM", "Phi3ForCausalLM"]);
}
