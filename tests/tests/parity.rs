//! Compiled models against what transformers computed: logits, greedy continuation, chosen experts.
//!
//! The models are tiny and random; `golden.safetensors` beside each holds f32 outputs of transformers for its weights.

use moec::pipeline::Options;
use moec_ir::graph::Mode;
use moec_tests::{Golden, build, build_with, models};

/// Largest difference of a logit, relative to the largest logit.
const TOLERANCE: f64 = 2e-5;

#[test]
fn outputs_equal_those_of_transformers() {
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
        let ids = compiled.greedy(&golden.input_ids, golden.greedy_ids.len());
        assert_eq!(ids, golden.greedy_ids, "{}: greedy continuation", model.display());
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_chunks() {
    for model in models() {
        // Over two pages of keys and values: in chunks some tokens see whole pages together, others meet them alone.
        let ids: Vec<u32> = Golden::read(&model).full_ids.into_iter().cycle().take(140).collect();
        for (quant, kv) in [("none", "f32"), ("none", "f16"), ("q8", "f16"), ("q4", "f16")] {
            let compiled = build(&model, quant, kv);
            let whole = compiled.logits(&ids, &["--threads", "1"]);
            for threads in ["1", "2", "3"] {
                for chunk in ["1", "3", "7", "512"] {
                    let other = compiled.logits(&ids, &["--threads", threads, "--chunk", chunk]);
                    let same = whole.bits() == other.bits() && whole.experts == other.experts;
                    assert!(same, "{} {quant} {kv}: {threads} threads, chunks of {chunk}", model.display());
                }
            }
        }
    }
}

/// The graphs of both modes, as text.
fn graphs(model: &moec::import::Model, options: &Options) -> [String; 2] {
    [Mode::Decode, Mode::Batch].map(|mode| {
        let (graph, _) =
            moec::pipeline::rewrite(model, options, mode).unwrap_or_else(|e| panic!("{}: {e}", model.name));
        graph.to_string()
    })
}

#[test]
fn bits_do_not_depend_on_passes() {
    let mut compared = Vec::new();
    for path in models() {
        let golden = Golden::read(&path);
        let model = moec::import::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        // A text no longer than the window is the case of `fold_constants`.
        let window = model.config.sliding_window;
        for (quant, context) in [("none", None), ("q4", None)].into_iter().chain(window.map(|_| ("none", window))) {
            let whole = Options { quant: quant.parse().expect("a quantization"), context, ..Options::default() };
            let ids = &golden.full_ids[..golden.full_ids.len().min(context.unwrap_or(usize::MAX))];
            let (graphs_of_whole, mut logits_of_whole) = (graphs(&model, &whole), None);
            for pass in moec::passes::PASSES.iter().filter(|p| !p.required) {
                let without = Options { disabled: vec![pass.name.parse().expect("a pass")], ..whole.clone() };
                if graphs(&model, &without) == graphs_of_whole {
                    continue; // it has nothing to do in this model
                }
                compared.push(pass.name);
                let whole = logits_of_whole.get_or_insert_with(|| build_with(&path, &whole).logits(ids, &[]));
                let compiled = build_with(&path, &without);
                for chunk in ["1", "512"] {
                    let other = compiled.logits(ids, &["--chunk", chunk]);
                    let what = format!("{} {quant}: without {}, chunk {chunk}", path.display(), pass.name);
                    assert!(whole.bits() == other.bits(), "{what}");
                }
            }
        }
    }
    // The importer leaves nothing dead behind.
    let unseen = |name: &&str| !compared.contains(name) && *name != "drop_dead";
    let unseen: Vec<&str> =
        moec::passes::PASSES.iter().filter(|p| !p.required).map(|p| p.name).filter(unseen).collect();
    assert!(unseen.is_empty(), "passes with nothing to do in any model: {unseen:?}");
}

#[test]
fn bits_do_not_depend_on_the_cpu_level() {
    let host = moec::target::host();
    let triple = target_lexicon::Triple::host();
    let runs: Vec<&str> =
        moec::target::levels(&triple).iter().filter(|l| l.features & !host == 0).map(|l| l.name).collect();
    let levels = moec::target::find_levels(&runs.join(","), &triple).expect("known levels");
    for model in models() {
        let golden = Golden::read(&model);
        for quant in ["none", "q8", "q4"] {
            let options =
                Options { quant: quant.parse().expect("a quantization"), levels: levels.clone(), ..Options::default() };
            // All levels in one executable, over one copy of the weights.
            let compiled = build_with(&model, &options);
            let first = compiled.logits(&golden.full_ids, &["--level", levels[0].name]);
            for level in &levels {
                let other = compiled.logits(&golden.full_ids, &["--level", level.name, "--chunk", "5"]);
                assert!(first.bits() == other.bits(), "{} {quant}: {}", model.display(), level.name);
            }
        }
    }
}
