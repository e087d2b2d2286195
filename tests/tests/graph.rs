//! The graph IR: text and back, the verifier's rules, the evaluator against transformers.

use std::path::{Path, PathBuf};

use moec::import::build_graph;
use moec::passes::QuantConfig;
use moec_ir::graph::eval::{Evaluator, KvType, Outputs, Routes};
use moec_ir::graph::{Graph, Mode, parse, parse_with_lines, verify};
use moec_tests::reference::{GoldenStates, ModelWeights, open};
use moec_tests::{Golden, filetest, models};
use proptest::prelude::*;

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
        let largest = golden.full_logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let relative = worst(&found.logits, &golden.full_logits) / largest;
        println!("{name}: logits within {relative:.1e} of the largest");
        assert!(relative <= TOLERANCE, "{name}: logits differ by {relative:.1e} of the largest");
        let states = GoldenStates::read(&directory);
        let hidden = worst(&found.hidden, &states.hidden);
        assert!(hidden <= 1e-4, "{name}: final hidden states differ by {hidden:.1e}");
        assert_eq!(found.routes.len(), golden.experts.len(), "{name}");
        for (layer, routes) in found.routes.iter().enumerate() {
            let experts: Vec<u32> = routes.experts.iter().flatten().map(|&expert| expert as u32).collect();
            assert_eq!(experts, golden.experts[layer], "{name}: experts of layer {layer}");
            let difference = worst(&routes.weights, &states.expert_weights[layer]);
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

#[test]
fn quantized_models_stay_close() {
    for directory in models() {
        let (model, golden) = (open(&directory), Golden::read(&directory));
        if !golden.experts.is_empty() {
            continue; // One expert chosen otherwise moves logits by whole units.
        }
        let weights = ModelWeights::new(&model);
        for (quant, limit) in [("f32", TOLERANCE), ("bf16", 0.02), ("q8", 0.06), ("q4", 0.6)] {
            let mut graph = build_graph(&model.config, &model.tensors, Mode::Batch);
            quant.parse::<QuantConfig>().expect("a --quant option").assign(&mut graph);
            let found = run(&graph, &weights, &golden.full_ids, golden.full_ids.len()).logits.concat();
            let mean = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
            let difference = mean(&mut found.iter().zip(&golden.full_logits).map(|(a, b)| a - b));
            let relative = difference / mean(&mut golden.full_logits.iter().copied());
            println!("{} {quant}: RMS error {relative:.1e}", directory.display());
            assert!(relative <= limit, "{} {quant}: {relative:.1e}", directory.display());
        }
    }
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let directory = &models()[0];
    let model = open(directory);
    let graph = build_graph(&model.config, &model.tensors, Mode::Batch);
    let mut evaluator = Evaluator::new(&graph, &ModelWeights::new(&model), 4, KvType::F32).expect("it has its weights");
    let vocab = model.config.vocab as u32;
    for (tokens, positions, rows, why) in [
        (vec![], vec![], vec![], "at least one token"),
        (vec![1, 2], vec![0], vec![], "2 tokens, but 1 positions"),
        (vec![vocab], vec![0], vec![], "of a vocabulary of"),
        (vec![1], vec![1], vec![], "position 1 after 0 tokens"),
        (vec![1; 5], vec![0, 1, 2, 3, 4], vec![], "in a context of 4"),
        (vec![1], vec![0], vec![1], "logits of row 1 of 1 tokens"),
    ] {
        let error = evaluator.step(&tokens, &positions, &rows).expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    }
    assert!(evaluator.cache.is_empty());
    assert_eq!(evaluator.step(&[1], &[0], &[]).expect("no logits are fine").logits.len(), 0);
}

/// Parses and verifies whatever it is given; what is right must survive printing.
fn survive(text: &str) {
    if let Ok((graph, lines)) = parse_with_lines(text) {
        let printed = graph.to_string();
        assert_eq!(parse(&printed).expect("what was printed parses").to_string(), printed);
        match verify(&graph) {
            Ok(()) => assert!(verify(&graph.renumber()).is_ok()),
            Err(error) => assert!(error.line(&lines).is_none_or(|line| line <= text.lines().count())),
        }
    }
}

/// The inputs of all files of a directory.
fn texts(directory: &str) -> Vec<String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("filetests").join(directory);
    let mut paths: Vec<_> =
        std::fs::read_dir(&directory).expect("it is there").map(|e| e.expect("it is read").path()).collect();
    paths.sort();
    let text = |path: &PathBuf| path.is_file().then(|| std::fs::read_to_string(path).expect("it is text"));
    paths
        .iter()
        .filter_map(text)
        .flat_map(|text| text.split("}\n").map(|part| format!("{part}}}\n")).collect::<Vec<_>>())
        .collect()
}

const SNIPPETS: &[&str] = &[
    "%",
    "@",
    "{",
    "}",
    "[",
    "]",
    ",",
    "=",
    ":",
    " by ",
    " as q8",
    "18446744073709551615",
    "4294967295",
    "-1",
    "0",
    "1e-5",
    "NaN",
    "T",
    "L",
    "kv",
    "q8",
    "f32",
    "graph",
    "//",
    "rows(",
    "gate_up(",
    ")",
    "order=%3",
    "dispatch=grouped",
    "layer=0",
    "é",
    "\n",
    "output %0",
    "matmul",
    "attention",
    "expert_down_add",
];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC*") {
        survive(&text);
        survive(&format!("graph batch fused {{\n{text}\n}}"));
    }

    #[test]
    fn no_change_of_a_graph_makes_the_parser_or_verifier_panic(
        pick in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..4, 0..SNIPPETS.len(), any::<prop::sample::Index>()), 1..6),
    ) {
        let all = texts("graph").into_iter().chain(texts("passes")).collect::<Vec<_>>();
        let mut text: Vec<char> = pick.get(&all).chars().collect();
        for (place, kind, snippet, other) in edits {
            let at = place.index(text.len() + 1);
            let end = (at + other.index(12)).min(text.len());
            match kind {
                0 => drop(text.splice(at..at, SNIPPETS[snippet].chars())),
                1 => drop(text.drain(at..end)),
                2 => drop(text.splice(at..end, SNIPPETS[snippet].chars())),
                _ => {
                    let copied: Vec<char> = text[at..end].to_vec();
                    let to = other.index(text.len() + 1);
                    text.splice(to..to, copied);
                }
            }
        }
        survive(&text.into_iter().collect::<String>());
    }
}

fn bits(outputs: &Outputs) -> Vec<u32> {
    outputs.logits.iter().flatten().map(|x| x.to_bits()).collect()
}

/// Experts that are forced are those that are computed with; the choice of the routers itself changes nothing, and what no router can choose is refused.
#[test]
fn experts_can_be_forced() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/models/mixtral-a");
    let model = open(&directory);
    let graph = build_graph(&model.config, &model.tensors, Mode::Batch);
    let weights = ModelWeights::new(&model);
    let run = |forced: Option<Vec<Routes>>| {
        let mut evaluator = Evaluator::new(&graph, &weights, 3, KvType::F32).expect("the model has its weights");
        if let Some(routes) = forced {
            evaluator.force(routes);
        }
        evaluator.step(&[5, 6, 7], &[0, 1, 2], &[2])
    };
    let free = run(None).expect("the step fits");
    assert_eq!(run(Some(free.routes.clone())), Ok(free.clone()));
    let mut other = free.routes.clone();
    let spare = (0..8).find(|expert| !other[0].experts[2].contains(expert)).expect("experts that were not chosen");
    other[0].experts[2][1] = spare;
    let forced = run(Some(other.clone())).expect("the step fits");
    assert_eq!(forced.routes[0].experts, other[0].experts);
    assert_ne!(forced.logits, free.logits);
    other[0].experts[2][1] = 8;
    assert!(run(Some(other.clone())).is_err(), "there are 8 experts");
    other.pop();
    assert!(run(Some(other)).is_err(), "a router without experts");
}
