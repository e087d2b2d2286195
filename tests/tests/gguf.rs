//! Models as GGUF files: the same bits as the directories that they were converted from, and the same tokens.

use moec::import::{self, RopeScaling, build_graph};
use moec::passes::QuantConfig;
use moec::pipeline::{self, Options};
use moec_ir::graph::eval::{Evaluator, KvType, Routes, Tensor};
use moec_ir::graph::{Mode, Op, Role, ValueId};
use moec_tests::gguf::{Kind, convert, numbers, write};
use moec_tests::reference::ModelWeights;
use moec_tests::{Golden, build, models};
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::path::Path;

/// Whether a GGUF file can say all of what a model is: Llama's windows and those of some layers only it cannot.
fn can_be_said(model: &import::Model) -> bool {
    let windows = model.config.sliding_window.is_none() || model.config.architecture.name().starts_with("Phi3");
    windows && !matches!(model.config.rope.scaling, RopeScaling::Llama3 { .. })
}

#[test]
fn float_files_give_the_bits_of_their_directories() {
    let mut compared = 0;
    for directory in models() {
        let model = moec_tests::reference::open(&directory);
        if !can_be_said(&model) {
            continue;
        }
        compared += 1;
        let mut dtypes = model.tensors.names().map(|weight| model.tensors.info(weight).dtype);
        let first = dtypes.next().expect("a model has weights");
        // What is mixed becomes f32, which holds all of it.
        let kind = match first {
            import::Dtype::F16 if dtypes.all(|dtype| dtype == first) => Kind::F16,
            import::Dtype::Bf16 if dtypes.all(|dtype| dtype == first) => Kind::Bf16,
            _ => Kind::F32,
        };
        let golden = Golden::read(&directory);
        let place = tempfile::tempdir().expect("a temporary directory");
        let path = write(&convert(&model, kind), place.path());
        let expected = build(&directory, "none", "f32").logits(&golden.full_ids, &[]);
        let found = build(&path, "none", "f32").logits(&golden.full_ids, &[]);
        assert!(expected.bits() == found.bits(), "{}", model.name);
        assert_eq!(expected.experts, found.experts, "{}", model.name);
    }
    assert!(compared >= 8, "{compared} models");
}

/// These files do not say what the queries of Gemma 2 are scaled by: it follows from the size of a head.
#[test]
fn gemma2_files_give_the_bits_of_their_directories() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/models/gemma2-a");
    let place = tempfile::tempdir().expect("a temporary directory");
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(directory.join(file), place.path().join(file)).expect("the model has it");
    }
    let config = std::fs::read_to_string(directory.join("config.json")).expect("the model has one");
    let changed = config.replace("\"query_pre_attn_scalar\": 20", "\"query_pre_attn_scalar\": 24");
    assert_ne!(config, changed);
    std::fs::write(place.path().join("config.json"), changed).expect("writable");
    let (model, golden) = (moec_tests::reference::open(place.path()), Golden::read(&directory));
    let path = write(&convert(&model, Kind::Bf16), place.path());
    let read = moec_tests::reference::open(&path).config;
    assert_eq!((read.query_scale, read.score_cap, read.logit_cap), (model.config.query_scale, Some(2.0), Some(1.0)));
    assert_eq!((0..3).map(|layer| read.window(layer)).collect::<Vec<_>>(), [Some(6), None, Some(6)]);
    let expected = build(place.path(), "none", "f32").logits(&golden.full_ids, &[]);
    let found = build(&path, "none", "f32").logits(&golden.full_ids, &[]);
    assert!(expected.bits() == found.bits());
}

/// Writes the model with all weights as f32 under the names of the hub.
fn write_dequantized(model: &import::Model, like: &Path, directory: &Path) {
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for weight in model.tensors.names() {
        let (shape, values) = numbers(model, weight);
        let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let Some((layer, last)) = weight.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) else {
            let name = match weight {
                "embed" => "model.embed_tokens",
                "norm" => "model.norm",
                _ => "lm_head",
            };
            tensors.insert(format!("{name}.weight"), (shape, bytes(&values)));
            continue;
        };
        let path = format!("model.layers.{layer}");
        let name = match last {
            "attention_norm" => "input_layernorm".to_string(),
            "ffn_norm" => "post_attention_layernorm".to_string(),
            "router" => "block_sparse_moe.gate".to_string(),
            "q" | "k" | "v" | "o" => format!("self_attn.{last}_proj"),
            _ => {
                let number = match last {
                    "experts.gate" => "w1",
                    "experts.down" => "w2",
                    "experts.up" => "w3",
                    other => panic!("{other}"),
                };
                for (expert, values) in values.chunks(shape[1] * shape[2]).enumerate() {
                    let name = format!("{path}.block_sparse_moe.experts.{expert}.{number}.weight");
                    tensors.insert(name, (shape[1..].to_vec(), bytes(values)));
                }
                continue;
            }
        };
        tensors.insert(format!("{path}.{name}.weight"), (shape, bytes(&values)));
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).expect("as many bytes as the shape has"))
    });
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).expect("writable");
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(like.join(file), directory.join(file)).expect("the model has it");
    }
}

/// A quantized file is, in every layout that can be asked for, what the directory of its dequantized weights is.
#[test]
fn quantized_files_are_repacked_from_their_exact_values() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/models/mixtral-a");
    let (model, golden) = (moec_tests::reference::open(&directory), Golden::read(&directory));
    let place = tempfile::tempdir().expect("a temporary directory");
    let path = write(&convert(&model, Kind::Q8), place.path());
    write_dequantized(&import::open(&path).expect("a model"), &directory, place.path());
    for quant in ["f32", "q8", "q4"] {
        let expected = build(place.path(), quant, "f16").logits(&golden.full_ids, &[]);
        let found = build(&path, quant, "f16").logits(&golden.full_ids, &[]);
        let named = format!("{quant},embedding=f32");
        let found_all = build(&path, &named, "f16").logits(&golden.full_ids, &[]);
        assert!(expected.bits() == found_all.bits(), "{quant}");
        assert_eq!(found.logits.len(), expected.logits.len());
    }
}

/// What the graph's evaluator gives.
struct Evaluated {
    /// Row after row.
    logits: Vec<f32>,
    /// In order of the layers.
    routes: Vec<Routes>,
    /// Of each router, row after row.
    scores: Vec<Vec<f32>>,
}

/// Runs the graph's evaluator, its experts chosen by the routers or as `forced` says.
fn evaluate(model: &import::Model, quant: &str, ids: &[u32], forced: Option<&[Routes]>) -> Evaluated {
    let mut graph = build_graph(&model.config, &model.tensors, Mode::Batch);
    quant.parse::<QuantConfig>().expect("a --quant option").assign(&mut graph);
    let weights = ModelWeights::new(model);
    let mut evaluator = Evaluator::new(&graph, &weights, ids.len(), KvType::F16).expect("the model has its weights");
    if let Some(routes) = forced {
        evaluator.force(routes.to_vec());
    }
    let routers: Vec<ValueId> = graph
        .nodes()
        .filter_map(|node| match *graph.op(node) {
            Op::TopK { logits, .. } => Some(logits),
            _ => None,
        })
        .collect();
    let mut scores = Vec::new();
    let mut observe = |value: ValueId, tensor: &Tensor| {
        if let (true, Tensor::F32(row)) = (routers.contains(&value), tensor) {
            scores.push(row.clone());
        }
    };
    let positions: Vec<usize> = (0..ids.len()).collect();
    let outputs = evaluator.step_with(ids, &positions, &positions, &mut observe).expect("the step fits");
    Evaluated { logits: outputs.logits.concat(), routes: outputs.routes, scores }
}

/// How far the second rows are from the first, relative to these.
fn distances(expected: &[f32], found: &[f32], columns: usize) -> Vec<f64> {
    let distance = |(a, b): (&[f32], &[f32])| {
        let error: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        (error / a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>()).sqrt()
    };
    expected.chunks(columns).zip(found.chunks(columns)).map(distance).collect()
}

/// By how much the experts that were chosen fall short of those that these scores would choose: 0 where they are the same.
fn margin(scores: &[f32], chosen: &[usize]) -> f32 {
    let worst = chosen.iter().map(|&expert| scores[expert]).fold(f32::INFINITY, f32::min);
    let others = (0..scores.len()).filter(|expert| !chosen.contains(expert));
    others.map(|expert| scores[expert] - worst).fold(0.0, f32::max)
}

/// Models of every type of codes: compiled code gives the bits of the evaluator, and nearly what the weights as f32 give, from which only the
/// rounding of activations separates it. A router leaps where its scores are nearly equal; so the weights as f32 are made to choose the same
/// experts, and where they would have chosen others, their scores must be nearly equal.
#[test]
fn codes_that_are_kept_compute_what_they_stand_for() {
    let ids: Vec<u32> = (0..40).map(|i| i * 89 % 255 + 6).collect();
    let mut flips = 0;
    for name in moec_tests::blocks::types() {
        let place = tempfile::tempdir().expect("a temporary directory");
        let path = write(&moec_tests::blocks::mixtral(name), place.path());
        let model = import::open(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let gate = pipeline::layouts(&model, &Options { quant: "none".parse().expect("none"), ..Options::default() });
        let kept = gate.iter().filter(|(role, _, layout)| *role == Role::Experts && layout.is_exact()).count();
        assert_eq!(kept, 6, "{name}: of 6 weights of experts");

        let found = build(&path, "none", "f16").logits(&ids, &[]);
        let expected = evaluate(&model, "none", &ids, None);
        let first = expected.logits.iter().zip(&found.logits).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(first, None, "{name}: {:?}", first.map(|i| (expected.logits[i], found.logits[i])));

        let floats = evaluate(&model, "f32", &ids, Some(&expected.routes));
        let mut errors = distances(&floats.logits, &expected.logits, model.config.vocab);
        let worst = errors.iter().copied().fold(0.0, f64::max);
        assert!(worst < 0.05, "{name}: with the same experts, relative errors of tokens {errors:?}");
        errors.sort_by(f64::total_cmp);
        assert!(errors[errors.len() / 2] < 0.03, "{name}: with the same experts, relative errors of tokens {errors:?}");
        for (scores, routes) in floats.scores.iter().zip(&expected.routes) {
            let experts = scores.len() / ids.len();
            let short: Vec<f32> = scores.chunks(experts).zip(&routes.experts).map(|(s, e)| margin(s, e)).collect();
            // Scores differ by some units from expert to expert.
            assert!(short.iter().all(|&short| short < 0.02), "{name}: experts chosen that fall short by {short:?}");
            flips += short.iter().filter(|&&short| short > 0.0).count();
        }
    }
    assert!(flips > 0, "no choice between near equals was met: the test no longer shows what it is for");
}

/// A quantized table of embeddings that is the output's matrix, too, is stored once, and gives the bits of the evaluator in both uses.
#[test]
fn a_tied_output_shares_the_quantized_embedding() {
    for name in ["mixtral-d", "qwen2-a", "gemma2-a"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/models").join(name);
        let (model, golden) = (moec_tests::reference::open(&directory), Golden::read(&directory));
        assert!(model.tensors.is_tied(), "{name}");
        let place = tempfile::tempdir().expect("a temporary directory");
        let path = write(&convert(&model, Kind::Q8), place.path());
        let model = moec_tests::reference::open(&path);
        for (quant, shared) in [("none", true), ("none,output=q8", false), ("none,embedding=f32", false)] {
            let options = Options { quant: quant.parse().expect("a quantization"), ..Options::default() };
            let payload = pipeline::compile(&model, &options).expect("the model compiles").plan.payload;
            assert_eq!(payload.find("embed") == payload.find("output"), shared, "{name} {quant}");
            let purpose = payload.items[payload.find("embed").expect("an embedding")].purpose();
            assert_eq!(purpose, if shared { "embedding and output" } else { "embedding" }, "{name} {quant}");
            let compiled = build(&path, quant, "f16");
            let info: serde_json::Value = serde_json::from_str(&compiled.run(&["info", "--json"])).expect("JSON");
            let other = info["shared_weights"]["output"].as_str();
            assert_eq!(other, shared.then_some("embedding"), "{name} {quant}");
            assert!(info["quantization"]["output"].is_string(), "{name} {quant}: {info}");
            let found = compiled.logits(&golden.full_ids, &[]);
            let expected = evaluate(&model, quant, &golden.full_ids, None).logits;
            let first = expected.iter().zip(&found.logits).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(first, None, "{name} {quant}");
        }
    }
}

#[test]
fn tokenizers_give_the_ids_of_their_directories() {
    const TEXTS: [&str; 8] = [
        "The License terms of this program",
        " two  spaces   and more ",
        "",
        "naïve café 日本語 🦀",
        "</s> and <s> inside",
        "copying\nand\tdistribution",
        "aaaaaaaaaaaa therethere ▁x",
        "permission is not that",
    ];
    for name in ["llama-c", "mixtral-a", "mixtral-b"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/models").join(name);
        let model = moec_tests::reference::open(&directory);
        let place = tempfile::tempdir().expect("a temporary directory");
        let converted = import::open(&write(&convert(&model, Kind::F32), place.path())).expect("a model");
        let tokenizer = |json: &[u8]| tokenizers::Tokenizer::from_bytes(json).expect("a tokenizer");
        let (expected, found) = (tokenizer(&model.tokenizer.json), tokenizer(&converted.tokenizer.json));
        for text in TEXTS {
            let ids = |tokenizer: &tokenizers::Tokenizer| {
                tokenizer.encode(text, true).expect("it takes all text").get_ids().to_vec()
            };
            assert_eq!(ids(&found), ids(&expected), "{name}: {text:?}");
            let text = |tokenizer: &tokenizers::Tokenizer| tokenizer.decode(&ids(&expected), true).expect("text");
            assert_eq!(text(&found), text(&expected), "{name}");
        }
    }
}
