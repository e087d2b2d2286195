//! Compiled models against what transformers computed: logits, greedy continuation, chosen experts.
//!
//! The models are tiny and random; `golden.safetensors` beside each holds f32 outputs of transformers for its weights.

use moec::pipeline::{self, Options};
use moec_abi::KvType;
use moec_ir::graph::Mode;
use moec_ir::graph::eval::{self, Evaluator};
use moec_tests::reference::{self, ModelWeights};
use moec_tests::{Golden, build, build_with, models};

/// Largest difference of a logit, relative to the largest logit.
const TOLERANCE: f64 = 2e-5;

#[test]
fn logits_equal_those_of_transformers() {
    for model in models() {
        let golden = Golden::read(&model);
        let compiled = build(&model, "none", "f32");
        let found = compiled.logits(&golden.full_ids, &[]);
        let largest = golden.full_logits.iter().fold(0f64, |m, &x| m.max(f64::from(x).abs()));
        let worst =
            golden.full_logits.iter().zip(&found.logits).fold(0f64, |m, (&a, &b)| m.max(f64::from(a - b).abs()));
        assert_eq!(golden.full_logits.len(), found.logits.len(), "{}", model.display());
        let relative = worst / largest;
        assert!(relative <= TOLERANCE, "{}: logits differ by {relative:.2e} of the largest", model.display());
        println!("{}: {relative:.2e}", model.display());
        assert_eq!(found.experts, golden.experts, "{}: chosen experts", model.display());
    }
}

/// The graph's evaluator is the meaning of a model: compiled code gives its bits, whatever the quantization.
#[test]
fn logits_have_the_bits_of_the_evaluator() {
    for path in models() {
        let golden = Golden::read(&path);
        let model = reference::open(&path);
        let weights = ModelWeights::new(&model);
        let ids = &golden.full_ids;
        let positions: Vec<usize> = (0..ids.len()).collect();
        for (quant, kv) in [("none", KvType::F32), ("none", KvType::F16), ("q8", KvType::F16), ("q4", KvType::F32)] {
            let options = Options { quant: quant.parse().expect("a quantization"), kv, ..Options::default() };
            let cache = match kv {
                KvType::F16 => eval::KvType::F16,
                KvType::F32 => eval::KvType::F32,
            };
            let (graph, _) = pipeline::rewrite(&model, &options, Mode::Batch).expect("the passes run");
            let mut evaluator = Evaluator::new(&graph, &weights, ids.len(), cache).expect("the model has its weights");
            let expected = evaluator.step(ids, &positions, &positions).expect("the step fits").logits;
            let expected: Vec<u32> = expected.iter().flatten().map(|x| x.to_bits()).collect();
            let found = build_with(&path, &options).logits(ids, &[]);
            assert!(expected == found.bits(), "{} {quant} {kv:?}", path.display());
        }
    }
}

#[test]
fn greedy_continuations_equal_those_of_transformers() {
    for model in models() {
        let golden = Golden::read(&model);
        let compiled = build(&model, "none", "f32");
        let ids = compiled.greedy(&golden.input_ids, golden.greedy_ids.len());
        assert_eq!(ids, golden.greedy_ids, "{}", model.display());
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_chunks() {
    for model in models() {
        let golden = Golden::read(&model);
        for (quant, kv) in [("none", "f32"), ("none", "f16"), ("q8", "f16"), ("q4", "f16")] {
            let compiled = build(&model, quant, kv);
            let whole = compiled.logits(&golden.full_ids, &["--threads", "1"]);
            for threads in ["1", "2", "3"] {
                for chunk in ["1", "3", "7", "512"] {
                    let other = compiled.logits(&golden.full_ids, &["--threads", threads, "--chunk", chunk]);
                    let same = whole.bits() == other.bits() && whole.experts == other.experts;
                    assert!(same, "{} {quant} {kv}: {threads} threads, chunks of {chunk}", model.display());
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_passes() {
    for model in models() {
        let golden = Golden::read(&model);
        for quant in ["none", "q4"] {
            let whole = build(&model, quant, "f16").logits(&golden.full_ids, &[]);
            for pass in moec::passes::PASSES.iter().filter(|p| !p.required) {
                let compiled = moec_tests::build_without(&model, quant, "f16", &[pass.name]);
                for chunk in ["1", "512"] {
                    let other = compiled.logits(&golden.full_ids, &["--chunk", chunk]);
                    let what = format!("{} {quant}: without {}, chunk {chunk}", model.display(), pass.name);
                    assert!(whole.bits() == other.bits(), "{what}");
                }
            }
        }
    }
}
