//! The graph IR: text and back, the verifier's rules, the evaluator against transformers.

use moec::import::build_graph;
use moec_ir::graph::eval::{Evaluator, KvType, Outputs};
use moec_ir::graph::{Graph, Mode, parse, parse_with_lines, verify};
use moec_tests::filetest;
use moec_tests::reference::{Golden, ModelWeights, models, open};

/// Largest difference of a logit, relative to the largest logit.
const TOLERANCE: f32 = 2e-5;

/// What a file of `filetests/graph` expects: the text once more, or the error with the guilty line.
fn round_trip(text: &str) -> Result<String, String> {
    let (graph, lines) = parse_with_lines(text).map_err(|e| e.to_string())?;
    verify(&graph).map_err(|e| match e.line(&lines) {
        Some(line) => format!("line {line}: {e}"),
        None => e.to_string(),
    })?;
    let printed = graph.to_string();
    let again = parse(&printed).expect("what was printed parses").to_string();
    assert_eq!(printed, again);
    Ok(printed)
}

#[test]
fn graphs_print_parse_and_verify() {
    filetest::check("graph", "ir", round_trip);
}

#[test]
fn imported_graphs_verify_and_round_trip() {
    for directory in models() {
        let model = open(&directory);
        for mode in Mode::ALL {
            let graph = build_graph(&model.config, &model.tensors, mode);
            verify(&graph).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
            let text = graph.to_string();
            assert_eq!(parse(&text).expect("what was printed parses").to_string(), text);
            assert_eq!(graph.renumber().to_string(), text, "import numbers without gaps");
        }
    }
}

/// The whole of `ids` in chunks through the batch graph, or token by token through the decode graph.
fn run(graph: &Graph, weights: &ModelWeights, ids: &[u32], chunk: usize) -> Outputs {
    let mut evaluator = Evaluator::new(graph, weights, ids.len(), KvType::F32).expect("the model has its weights");
    let mut all = Outputs { logits: Vec::new(), routes: Vec::new(), hidden: Vec::new() };
    for start in (0..ids.len()).step_by(chunk) {
        let end = ids.len().min(start + chunk);
        let positions: Vec<usize> = (start..end).collect();
        let rows: Vec<usize> = (0..end - start).collect();
        let outputs = evaluator.step(&ids[start..end], &positions, &rows).expect("the step fits");
        all.logits.extend(outputs.logits);
        all.hidden.extend(outputs.hidden);
        for (i, routes) in outputs.routes.into_iter().enumerate() {
            match all.routes.get_mut(i) {
                None => all.routes.push(routes),
                Some(before) => {
                    before.experts.extend(routes.experts);
                    before.weights.extend(routes.weights);
                }
            }
        }
    }
    all
}

#[test]
fn the_evaluator_equals_transformers() {
    for directory in models() {
        let name = directory.display();
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let weights = ModelWeights::new(&model);
        let graph = build_graph(&model.config, &model.tensors, Mode::Batch);
        let found = run(&graph, &weights, &golden.full_ids, golden.full_ids.len());

        let worst = |found: &[Vec<f32>], golden: &[f32]| {
            let found: Vec<f32> = found.concat();
            assert_eq!(found.len(), golden.len(), "{name}");
            found.iter().zip(golden).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()))
        };
        let relative = worst(&found.logits, &golden.full_logits) / golden.largest_logit();
        println!("{name}: logits within {relative:.1e} of the largest");
        assert!(relative <= TOLERANCE, "{name}: logits differ by {relative:.1e} of the largest");
        let hidden = worst(&found.hidden, &golden.hidden);
        assert!(hidden <= 1e-4, "{name}: final hidden states differ by {hidden:.1e}");
        assert_eq!(found.routes.len(), golden.experts.len(), "{name}");
        for (layer, routes) in found.routes.iter().enumerate() {
            assert_eq!(routes.experts, golden.experts[layer], "{name}: experts of layer {layer}");
            let difference = worst(&routes.weights, &golden.expert_weights[layer].concat());
            assert!(difference <= 1e-5, "{name}: weights of layer {layer} differ by {difference:.1e}");
        }
    }
}

#[test]
fn greedy_continuations_equal_those_of_transformers() {
    for directory in models() {
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let weights = ModelWeights::new(&model);
        let new = |mode| {
            let graph = build_graph(&model.config, &model.tensors, mode);
            Evaluator::new(&graph, &weights, golden.full_ids.len(), KvType::F32).expect("the model has its weights")
        };
        let (mut batch, mut decode) = (new(Mode::Batch), new(Mode::Decode));
        let prompt = &golden.input_ids;
        let positions: Vec<usize> = (0..prompt.len()).collect();
        let mut outputs = batch.step(prompt, &positions, &[prompt.len() - 1]).expect("the step fits");
        decode.cache = batch.cache;
        let mut ids = Vec::new();
        while ids.len() < golden.greedy_ids.len() {
            let logits = &outputs.logits[0];
            let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            ids.push(best as u32);
            let position = prompt.len() + ids.len() - 1;
            outputs = decode.step(&[best as u32], &[position], &[0]).expect("the step fits");
        }
        assert_eq!(ids, golden.greedy_ids, "{}", directory.display());
    }
}

#[test]
fn chunks_and_modes_give_the_same_bits() {
    for directory in models() {
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let weights = ModelWeights::new(&model);
        let graph = |mode| build_graph(&model.config, &model.tensors, mode);
        let whole = run(&graph(Mode::Batch), &weights, &golden.full_ids, golden.full_ids.len());
        for chunk in [1, 3, 16] {
            let chunked = run(&graph(Mode::Batch), &weights, &golden.full_ids, chunk);
            assert_eq!(bits(&whole), bits(&chunked), "{}: chunks of {chunk}", directory.display());
        }
        let tokens = run(&graph(Mode::Decode), &weights, &golden.full_ids, 1);
        assert_eq!(bits(&whole), bits(&tokens), "{}: token by token", directory.display());
    }
}

fn bits(outputs: &Outputs) -> Vec<u32> {
    outputs.logits.iter().flatten().map(|x| x.to_bits()).collect()
}
