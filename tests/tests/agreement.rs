//! The evaluator of the graph IR, the evaluator of the tile IR and compiled code agree to the bit, in every quantization, on every
//! tiny model.

use moec::import::build_graph;
use moec::passes::QuantConfig;
use moec::pipeline::{self, Options};
use moec_ir::graph::Mode;
use moec_ir::graph::eval::{Evaluator, KvType};
use moec_tests::reference::{ModelWeights, open};
use moec_tests::simulate::Simulation;
use moec_tests::{Golden, build, models};

#[test]
fn compiled_models_give_the_evaluators_bits() {
    let mut failures = Vec::new();
    for directory in models() {
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let weights = ModelWeights::new(&model);
        // Long enough for a second page of keys.
        let ids: Vec<u32> = golden.full_ids.iter().copied().cycle().take(80.min(model.config.context)).collect();
        for (quant, kv) in [("none", "f32"), ("none", "f16"), ("q8", "f16"), ("experts=q4,ffn=q4,output=f16", "f32")] {
            let mut graph = build_graph(&model.config, &model.tensors, Mode::Batch);
            quant.parse::<QuantConfig>().expect("a --quant option").assign(&mut graph);
            let kv_type = if kv == "f32" { KvType::F32 } else { KvType::F16 };
            let mut evaluator =
                Evaluator::new(&graph, &weights, ids.len(), kv_type).expect("the model has its weights");
            let positions: Vec<usize> = (0..ids.len()).collect();
            let expected = evaluator.step(&ids, &positions, &positions).expect("the step fits");
            let found = build(&directory, quant, kv).logits(&ids, &[]);

            let expected_bits: Vec<u32> = expected.logits.iter().flatten().map(|x| x.to_bits()).collect();
            let vocab = model.config.vocab;
            let first = expected_bits.iter().zip(found.bits()).position(|(a, b)| *a != b);
            if let Some(at) = first {
                let (a, b) = (expected.logits[at / vocab][at % vocab], found.logits[at]);
                failures.push(format!(
                    "{} {quant} {kv}: token {}, logit {}: {a} and {b}",
                    model.name,
                    at / vocab,
                    at % vocab
                ));
            }
            assert_eq!(expected_bits.len(), found.logits.len(), "{} {quant} {kv}", model.name);
            let experts = |layer: &Vec<Vec<usize>>| layer.iter().flatten().map(|&e| e as u32).collect::<Vec<u32>>();
            let routes: Vec<Vec<u32>> = expected.routes.iter().map(|routes| experts(&routes.experts)).collect();
            if routes != found.experts {
                failures.push(format!("{} {quant} {kv}: other experts", model.name));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn simulated_plans_give_the_bits_of_compiled_models() {
    for directory in models() {
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let ids = &golden.full_ids;
        let (prompt, rest) = ids.split_at(ids.len() - 3);
        for quant in ["none", "q8", "q4"] {
            let options = Options { quant: quant.parse().expect("a --quant option"), ..Options::default() };
            let compiled = pipeline::compile(&model, &options).expect("the model compiles");
            let mut simulation = Simulation::new(&model, &compiled, ids.len());
            let mut bits = Vec::new();
            for chunk in prompt.chunks(compiled.plan.model.max_tokens) {
                bits.extend(simulation.step(chunk, false));
            }
            for &id in rest {
                bits.extend(simulation.step(&[id], true));
            }
            let found = build(&directory, quant, "f16").logits(ids, &[]);
            assert!(bits == found.bits(), "{} {quant}", model.name);
        }
    }
}
