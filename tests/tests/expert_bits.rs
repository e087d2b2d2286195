//! Bits by heat: experts of one weight in two formats give the evaluator's bits on every way through the model, and what is chosen keeps to its budget.

use moec::import::{Model, build_graph};
use moec::passes::HotExperts;
use moec::pipeline::{self, Options};
use moec_ir::graph::eval::{Evaluator, KvType};
use moec_ir::graph::{Layout, Mode};
use moec_tests::reference::{ModelWeights, open};
use moec_tests::simulate::Simulation;
use moec_tests::{Golden, build, build_with, models, profile};
use std::path::PathBuf;

/// How often experts are chosen: in the order of heat 0, 2 and 5 of the first layer, all of the second, the rest of the first.
fn counts(experts: usize) -> Vec<Vec<u64>> {
    vec![[9, 1, 8, 1, 1, 7, 1, 1][..experts].to_vec(), vec![5; experts]]
}

fn model(name: &str) -> PathBuf {
    models().into_iter().find(|path| path.ends_with(name)).unwrap_or_else(|| panic!("no {name}"))
}

/// Bits by heat, without a budget.
fn options(model: &Model, quant: &str) -> Options {
    let experts = model.config.experts.expect("a mixture").count;
    Options {
        quant: quant.parse().expect("a --quant option"),
        expert_profiles: vec![profile(model, &counts(experts))],
        ..Options::default()
    }
}

/// The first `count` experts by heat.
fn hottest(model: &Model, count: usize) -> HotExperts {
    let experts = model.config.experts.expect("a mixture").count;
    let rest = (0..experts).filter(|e| ![0, 2, 5].contains(e)).map(|e| (0, e));
    let order = [(0, 0), (0, 2), (0, 5)].into_iter().chain((0..experts).map(|e| (1, e))).chain(rest);
    let mut layers = vec![Vec::new(); 2];
    order.take(count).for_each(|(layer, expert): (usize, usize)| layers[layer].push(expert));
    layers.iter_mut().for_each(|experts| experts.sort_unstable());
    HotExperts { layout: Layout::Q8, layers }
}

/// Options whose budget is just enough for the first `count` experts by heat.
fn with_budget(model: &Model, quant: &str, count: usize) -> Options {
    budgeted(model, options(model, quant), count)
}

/// These options with such a budget.
fn budgeted(model: &Model, options: Options, count: usize) -> Options {
    let heat = moec::expert_profile::heat(&options.expert_profiles, model).unwrap_or_else(|e| panic!("{e}"));
    let bytes = pipeline::payload_bytes(model, &options, heat.as_ref(), &hottest(model, count));
    Options { size_budget: Some(bytes.unwrap_or_else(|e| panic!("{e}"))), ..options }
}

#[test]
fn the_budget_is_spent_on_the_hottest_and_never_exceeded() {
    let model = open(&model("mixtral-a"));
    let heat = counts(8);
    for count in 0..=16 {
        let exact = with_budget(&model, "experts=auto", count);
        let budget = exact.size_budget.expect("a budget");
        let chosen = |options: &Options| {
            let compiled = pipeline::compile(&model, options).unwrap_or_else(|e| panic!("{count}: {e}"));
            let by_heat = compiled.by_heat.expect("bits by heat");
            assert!(compiled.plan.payload.bytes as u64 <= options.size_budget.expect("a budget"), "{count}");
            by_heat
        };
        // A page that is only begun leaves room for nothing more.
        let found = chosen(&exact);
        assert_eq!(found.hot, hottest(&model, count));
        let covered: u64 =
            (0..2).flat_map(|l| found.hot.layers[l].iter().map(|&e| heat[l][e]).collect::<Vec<_>>()).sum();
        assert!((found.covered - covered as f64 / 69.0).abs() < 1e-12, "{count}: {}", found.covered);
        let less = Options { size_budget: Some(budget - 1), ..exact };
        if count > 0 {
            assert_eq!(chosen(&less).hot, hottest(&model, count - 1), "a byte less");
        } else {
            let error = pipeline::compile(&model, &less).expect_err("too small").to_string();
            assert!(error.contains(&format!("({budget} bytes), with all experts in q4")), "{error}");
        }
    }
}

#[test]
fn experts_in_two_formats_give_the_evaluators_bits() {
    let host = moec::target::host();
    let triple = target_lexicon::Triple::host();
    let runs = moec::target::levels(&triple).iter().filter(|level| level.features & !host == 0).copied();
    let levels: Vec<_> = runs.collect();
    for (name, quant, count, disabled) in [
        // Both layers in two formats; one in two and one in the wider, beside an expert that all tokens share.
        ("mixtral-a", "experts=auto", 7, &[][..]),
        ("qwen2-moe-a", "q4,experts=auto", 9, &[]),
        // Without the specialized dispatch every token goes to its experts by itself; one layer in two formats and one in the narrower.
        ("mixtral-a", "experts=auto,attention=none", 3, &["fuse_gate_up", "fuse_residual", "specialize_dispatch"]),
    ] {
        let (directory, what) = (model(name), format!("{name} {quant} {count} {disabled:?}"));
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let ids = &golden.full_ids;
        let options = Options {
            disabled: disabled.iter().map(|pass| pass.parse().expect("a pass")).collect(),
            levels: levels.clone(),
            ..options(&model, quant)
        };
        let options = budgeted(&model, options, count);

        let mut graph = build_graph(&model.config, &model.tensors, Mode::Batch);
        options.quant.assign_with(&mut graph, Some(&hottest(&model, count)));
        let weights = ModelWeights::new(&model);
        let mut evaluator =
            Evaluator::new(&graph, &weights, ids.len(), KvType::F16).expect("the model has its weights");
        let positions: Vec<usize> = (0..ids.len()).collect();
        let expected = evaluator.step(ids, &positions, &positions).expect("the step fits");
        let expected: Vec<u32> = expected.logits.iter().flatten().map(|x| x.to_bits()).collect();

        let built = build_with(&directory, &options);
        let info: serde_json::Value = serde_json::from_str(&built.run(&["info", "--json"])).expect("JSON");
        assert_eq!(info["quantization"]["experts"], "q8+q4", "both are told");
        for threads in ["1", "2", "3"] {
            for chunk in ["1", "7", "512"] {
                let found = built.logits(ids, &["--threads", threads, "--chunk", chunk]);
                assert!(expected == found.bits(), "{what}: {threads} threads, chunks of {chunk}");
            }
        }
        for level in &levels {
            let found = built.logits(ids, &["--level", level.name, "--chunk", "5"]);
            assert!(expected == found.bits(), "{what}: {}", level.name);
        }

        // Without machine code, every access checked.
        let compiled = pipeline::compile(&model, &options).expect("it was built");
        let mut simulation = Simulation::new(&model, &compiled, ids.len());
        let (prompt, rest) = ids.split_at(ids.len() - 3);
        let mut bits = simulation.step(prompt, false);
        rest.iter().for_each(|&id| bits.extend(simulation.step(&[id], true)));
        assert!(expected == bits, "{what}: simulated");
    }
}

#[test]
fn budgets_for_none_and_for_all_are_the_plain_layouts() {
    let directory = model("mixtral-a");
    let (model, golden) = (open(&directory), Golden::read(&directory));
    for (count, quant) in [(0, "experts=q4"), (16, "experts=q8")] {
        let by_heat = build_with(&directory, &with_budget(&model, "experts=auto", count));
        let plain = build(&directory, quant, "f16");
        assert!(by_heat.logits(&golden.full_ids, &[]).bits() == plain.logits(&golden.full_ids, &[]).bits(), "{quant}");
        let info: serde_json::Value = serde_json::from_str(&by_heat.run(&["info", "--json"])).expect("JSON");
        assert_eq!(info["quantization"]["experts"], quant["experts=".len()..]);
    }
}

#[test]
fn what_cannot_be_chosen_is_told() {
    let mixture = open(&model("mixtral-a"));
    let good = with_budget(&mixture, "experts=auto", 3);
    let refused = |model: &Model, options: &Options, words: &str| {
        let error = pipeline::compile(model, options).expect_err(words).to_string();
        assert!(error.contains(words), "`{words}` is not in: {error}");
    };
    refused(&mixture, &Options { expert_profiles: Vec::new(), ..good.clone() }, "needs --expert-profile FILE");
    refused(&mixture, &Options { size_budget: None, ..good.clone() }, "needs --size-budget SIZE");
    let plain = Options { quant: "q4".parse().expect("a --quant option"), ..good.clone() };
    refused(&mixture, &plain, "--size-budget is for --quant experts=auto");
    let other = open(&model("qwen2-moe-a"));
    refused(&other, &good, "p.json is of mixtral-a");
    let dense = open(&model("llama-c"));
    refused(&dense, &Options { expert_profiles: Vec::new(), ..good }, "has no experts");
}

#[test]
fn a_build_script_gives_bits_by_heat() {
    let path = model("mixtral-a");
    let model = open(&path);
    let place = tempfile::TempDir::new().expect("a temporary directory");
    let file = place.path().join("heat.json");
    let stats = profile(&model, &counts(8)).stats;
    std::fs::write(&file, serde_json::to_string(&stats).expect("plain data")).expect("writable");
    let budget = with_budget(&model, "experts=auto", 3).size_budget.expect("a budget");
    let script = |quant: &str| moec::build(&path).quant(quant).target_cpu("native").out_dir(place.path().join("out"));
    let script = |quant: &str| script(quant).target(&target_lexicon::Triple::host().to_string()).expert_profile(&file);
    let built = script("experts=auto").size_budget(budget).try_compile().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(std::fs::metadata(&built.weights).expect("the weights").len(), budget);
    let error = script("experts=auto").try_compile().expect_err("no budget").to_string();
    assert!(error.contains("--size-budget"), "{error}");
    let plain = script("experts=q4").try_compile().unwrap_or_else(|e| panic!("{e}"));
    assert!(std::fs::metadata(&plain.weights).expect("the weights").len() < budget, "a profile alone takes no bits");
}
