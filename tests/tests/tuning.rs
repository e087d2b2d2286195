//! Tuning records change how a model is computed, and never a bit of what it computes.

use moec::import;
use moec::kernels::{Kernel, MatmulTuning, Prefetch};
use moec::pipeline::{self, Options};
use moec::plan::layout::{Format, GROUP};
use moec::synth::{self, Preset};
use moec::target::machine::Machine;
use moec::target::{self, ProductShape, ProductTuning, Tuning, find_level};
use moec::tune::limits::Limits;
use moec::tune::products::products;
use moec::tune::search::Found;
use moec::tune::steps::Steps;
use moec::tune::weights::Weights;
use moec::tune::{self, Progress, Record, Request, Tried, shipped};
use moec_tests::simulate::Simulation;
use moec_tests::{Golden, build_with, models};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use target_lexicon::Triple;

/// Numbers by a rule (SplitMix64), so that a failure is found again.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 16) as usize % n
    }
}

/// Any choices that a record may hold.
fn any(format: Format, random: &mut Random) -> ProductTuning {
    let kernel = |n: usize, random: &mut Random| {
        let tiles = 1 << random.below(4);
        MatmulTuning {
            tiles: if tiles * n > 64 { 1 } else { tiles },
            unroll: 1 + random.below(if format.is_quantized() { 4 } else { 16 }),
            prefetch: [
                Prefetch::None,
                Prefetch::Ahead(64 * (1 + random.below(64))),
                Prefetch::Next(1 + random.below(8)),
            ][random.below(3)],
        }
    };
    let tokens = 1 + random.below(9);
    ProductTuning {
        kernels: (1..=tokens).map(|n| kernel(n, random)).collect(),
        block: 1 + random.below(17),
        activation_bytes: 1 << (10 + random.below(12)),
        columns: [0, 128, 256][random.below(3)],
        ahead: random.below(2) == 0,
    }
}

/// A record of this machine with these choices.
fn record(choices: impl IntoIterator<Item = (ProductShape, ProductTuning)>) -> Record {
    let found = |(shape, tuning)| (shape, Found { tuning, measured: Vec::new() });
    let record = Record {
        source: "made up".to_string(),
        moec: env!("CARGO_PKG_VERSION").to_string(),
        machine: Machine::this(),
        features: target::host(),
        threads: 1,
        limits: Limits::usual(4e11, 1e11, 3e10, 2),
        team: None,
        steps: None,
        products: choices.into_iter().map(found).collect::<BTreeMap<_, _>>(),
    };
    // Through the file's form, so that what is tried is what a record can say.
    Record::parse(&record.to_toml(), "made up").unwrap_or_else(|e| panic!("{e}"))
}

fn model(name: &str) -> PathBuf {
    let all = models();
    all.iter().find(|path| path.ends_with(name)).unwrap_or_else(|| panic!("no model {name}")).clone()
}

fn tuned(path: &Path, options: &Options, random: &mut Random) -> Options {
    let opened = import::open(path).unwrap_or_else(|e| panic!("{e}"));
    let default = pipeline::compile(&opened, options).unwrap_or_else(|e| panic!("{e}"));
    let choices = products(&default.plan).into_iter().map(|product| (product.shape, any(product.shape.format, random)));
    let options = Options { tuning: vec![record(choices.collect::<Vec<_>>())], ..options.clone() };
    let compiled = pipeline::compile(&opened, &options).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(compiled.tuned.notes, Vec::<String>::new(), "the record is for this build");
    let matmuls = |plan: &moec::plan::Plan| {
        let kernels = plan.levels[0].kernels();
        kernels.iter().filter(|k| matches!(k, Kernel::Matmul(_))).map(Kernel::name).collect::<Vec<_>>()
    };
    assert_ne!(matmuls(&default.plan), matmuls(&compiled.plan), "the record is used");
    options
}

#[test]
fn no_record_changes_a_bit() {
    let mut random = Random(6);
    for (name, quants) in [
        ("mixtral-a", &["none", "q8", "q4"][..]),
        ("odd-fused-mixed", &["q4"]),
        ("qwen2-moe-a", &["experts=q4,attention=q8"]),
        ("llama-c", &["none", "q8"]),
    ] {
        let path = model(name);
        let golden = Golden::read(&path);
        let limit = import::open(&path).unwrap_or_else(|e| panic!("{e}")).config.context;
        // Enough for chunks, blocks and what is left of them.
        let ids: Vec<u32> = golden.full_ids.iter().copied().cycle().take(70.min(limit)).collect();
        for quant in quants {
            let options = Options { quant: quant.parse().expect("a --quant option"), ..Options::default() };
            let default = build_with(&path, &options);
            let tuned = tuned(&path, &options, &mut random);
            let choices = || tuned.tuning[0].to_toml();
            let built = build_with(&path, &tuned);
            for more in [&[][..], &["--threads", "3"]] {
                let (expected, found) = (default.logits(&ids, &[]), built.logits(&ids, more));
                assert!(expected.bits() == found.bits(), "{name} {quant}: other logits with\n{}", choices());
                assert_eq!(expected.experts, found.experts, "{name} {quant}: other experts");
            }
            let prompt = &golden.input_ids;
            let more = golden.greedy_ids.len();
            assert_eq!(default.greedy(prompt, more), built.greedy(prompt, more), "{name} {quant}: {}", choices());
        }
    }
}

/// On the evaluator, which checks the bounds of every access: the sums that wait for the next columns, and the rows of activations that these begin in the middle of.
#[test]
fn columns_in_parts_keep_to_their_memory() {
    for (name, quant) in [("mixtral-b", "q4"), ("llama-c", "q8"), ("mixtral-a", "none")] {
        let path = model(name);
        let opened = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
        let options = Options { quant: quant.parse().expect("a --quant option"), ..Options::default() };
        let default = pipeline::compile(&opened, &options).unwrap_or_else(|e| panic!("{e}"));
        let in_parts = |shape: ProductShape| {
            let kernels = (1..=3).map(|_| MatmulTuning::plain(shape.format)).collect();
            (shape, ProductTuning { kernels, block: 2, activation_bytes: 4096, columns: GROUP, ahead: true })
        };
        let shapes = products(&default.plan).into_iter().map(|product| product.shape);
        let tuned = Options { tuning: vec![record(shapes.map(in_parts))], ..options.clone() };
        let compiled = pipeline::compile(&opened, &tuned).unwrap_or_else(|e| panic!("{e}"));
        assert!(compiled.plan.to_string().contains("_first"), "{name} has columns for two parts");
        let ids = Golden::read(&path).full_ids;
        let bits = Simulation::new(&opened, &compiled, ids.len()).step(&ids, false);
        assert!(bits == build_with(&path, &options).logits(&ids, &[]).bits(), "{name} {quant}");
        // Workers that are at different experts have sums of their own.
        let built = build_with(&path, &tuned);
        for threads in ["2", "3", "3", "3"] {
            let found = built.logits(&ids, &["--threads", threads]);
            assert!(bits == found.bits(), "{name} {quant} on {threads} threads");
        }
    }
}

/// Its shapes are those of models too large for a test: their choices are taken for products of the same formats and epilogues.
#[test]
fn no_record_that_moec_carries_changes_a_bit() {
    let path = model("mixtral-a");
    let ids = Golden::read(&path).full_ids;
    for (name, record) in shipped::records() {
        let of_record = find_level(name, &Triple::host()).unwrap_or_else(|e| panic!("{e}"));
        // Where this machine cannot run that level, its own is written by the record's choices.
        let level = if of_record.features & !target::host() == 0 { of_record } else { target::native() };
        for quant in ["q8", "q4"] {
            let plain = Options {
                quant: quant.parse().expect("a --quant option"),
                levels: vec![level],
                carried_tuning: false,
                ..Options::default()
            };
            let opened = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
            let shapes = products(&pipeline::compile(&opened, &plain).unwrap_or_else(|e| panic!("{e}")).plan);
            let choices = |shape: ProductShape| {
                let alike = move |of: &ProductShape| (of.format, of.epilogue) == (shape.format, shape.epilogue);
                record.products.iter().filter(move |(of, _)| alike(of)).map(|(_, found)| found.tuning.clone())
            };
            let most = shapes.iter().map(|product| choices(product.shape).count()).max().unwrap_or(0);
            assert!(most > 0, "{name} knows products of {quant}");
            let expected = build_with(&path, &plain).logits(&ids, &[]);
            for way in 0..most {
                let some = shapes.iter().filter_map(|p| Some((p.shape, choices(p.shape).cycle().nth(way)?)));
                let some = Record { features: level.features, ..self::record(some) };
                let built = build_with(&path, &Options { tuning: vec![some], ..plain.clone() });
                for more in [&[][..], &["--threads", "3"]] {
                    assert!(expected.bits() == built.logits(&ids, more).bits(), "{name} {quant}: other logits, {way}");
                }
            }
        }
    }
}

#[test]
fn a_record_that_moec_carries_is_used_unless_forbidden() {
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let path = directory.path().join("mixtral");
    let go_on = |_, _| ControlFlow::Continue(());
    synth::write(Preset::Mixtral8x7b, Some(1), 0, true, &path, &go_on).unwrap_or_else(|e| panic!("{e}"));
    let opened = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let (name, record) = &shipped::records()[0];
    let level = find_level(name, &Triple::host()).unwrap_or_else(|e| panic!("{e}"));
    let quant = "q8".parse().expect("a --quant option");
    let options = Options { levels: vec![level], quant, ..Options::default() };
    let compile = |options: &Options| pipeline::compile(&opened, options).unwrap_or_else(|e| panic!("{e}"));
    let with = compile(&options);
    let used = with.tuned.records[0].as_ref().expect("it is for these shapes");
    assert!(used.shipped && used.record == *record && used.known == used.shapes, "{used}");
    assert_eq!(with.tuned.notes, Vec::<String>::new(), "that is no reason to warn");
    let without = compile(&Options { carried_tuning: false, ..options });
    assert_eq!(without.tuned.records, [None]);
    assert!(with.plan.to_string() != without.plan.to_string(), "kernels are those of the record");
}

/// Steps in process compute: finite logits, the same with any choices, and tokens choose all experts.
#[test]
fn whole_steps_in_process_are_steps_of_a_model() {
    let mut random = Random(8);
    for (name, quant) in [
        ("mixtral-a", "q8"),
        ("mixtral-a", "none"),
        ("odd-fused-mixed", "q4"),
        ("qwen2-moe-a", "experts=q4,attention=q8"),
        ("llama-c", "q8"),
    ] {
        let opened = import::open(&model(name)).unwrap_or_else(|e| panic!("{e}"));
        let options = Options { quant: quant.parse().expect("a --quant option"), ..Options::default() };
        let compiled = pipeline::compile(&opened, &options).unwrap_or_else(|e| panic!("{e}"));
        let default = compiled.tuned.tunings[0].clone();
        let mut tuned = default.clone();
        let shapes = products(&compiled.plan).into_iter().map(|product| product.shape);
        tuned.products.extend(shapes.map(|shape| (shape, any(shape.format, &mut random))));
        for layers in [1, opened.config.layers] {
            let plan =
                pipeline::plan_first_layers(&opened, &options, &compiled, layers, &[default.clone(), tuned.clone()]);
            let plan = plan.unwrap_or_else(|e| panic!("{e}"));
            let (experts, most) = (plan.model.experts, plan.model.max_tokens);
            // So little memory that matrices are views of one piece, and enough for all of them.
            let (memory, piece) = if layers == 1 { (1 << 17, 1 << 16) } else { (1 << 30, 0) };
            let weights = Rc::new(Weights::new(&plan.payload, memory, piece).unwrap_or_else(|e| panic!("{e}")));
            let mut steps = Steps::new(plan, options.levels[0], 2, weights).unwrap_or_else(|e| panic!("{e}"));
            for tokens in [1, 3, 16, 64].into_iter().filter(|&tokens| tokens <= most) {
                let mut both = Vec::new();
                for way in [0, 1] {
                    assert!(steps.run(way, tokens) > Duration::ZERO);
                    assert!(steps.logits().iter().all(|logit| logit.is_finite()), "{name} {quant}");
                    let bits: Vec<u32> = steps.logits().iter().map(|logit| logit.to_bits()).collect();
                    assert!(bits.iter().any(|logit| *logit != bits[0]), "{name} {quant}: logits of something");
                    let routes: Vec<Vec<u32>> =
                        (0..layers.min(experts * layers)).map(|l| steps.routes(l, tokens)).collect();
                    both.push((bits, routes));
                }
                assert!(both[0] == both[1], "{name} {quant}: {tokens} tokens, other results with other choices");
                for routes in &both[0].1 {
                    let chosen = |expert: usize| routes.iter().filter(|&&route| route as usize == expert).count();
                    let counts: Vec<usize> = (0..experts).map(chosen).collect();
                    assert_eq!(counts.iter().sum::<usize>(), routes.len(), "{name} {quant}");
                    let mean = routes.len() / experts;
                    let spread = counts.iter().all(|count| (mean / 3..=3 * mean).contains(count));
                    assert!(tokens < 64 || spread, "{name} {quant}: experts are chosen {counts:?} times");
                }
            }
        }
    }
}

struct Silent;

impl Progress for Silent {
    fn at(&self, share: f64, _: &str, _: &str) {
        assert!((0.0..=1.0).contains(&share), "{share}");
    }
}

#[test]
fn what_is_tuned_is_a_record_that_goes_on_and_is_used() {
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let output = directory.path().join("r.toml");
    let opened = import::open(&model("mixtral-a")).unwrap_or_else(|e| panic!("{e}"));
    let options = Options { quant: "q4".parse().expect("a --quant option"), ..Options::default() };
    let compiled = pipeline::compile(&opened, &options).unwrap_or_else(|e| panic!("{e}"));
    let first_layers =
        |layers: usize, tunings: &[Tuning]| pipeline::plan_first_layers(&opened, &options, &compiled, layers, tunings);
    let request = |seconds| Request {
        plan: &compiled.plan,
        first_layers: &first_layers,
        level: options.levels[0],
        default: &compiled.tuned.tunings[0],
        threads: 2,
        budget: Duration::from_secs(seconds),
        output: &output,
        confirm: false,
    };

    let none = tune::tune(&request(0), &Silent).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((none.left(), none.record.products.len()), (none.products.len(), 0), "no time, no result");
    let all = tune::tune(&request(600), &Silent).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((all.left(), all.earlier), (0, 0));
    let written = Record::read(&output).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(written.products.len(), all.products.len());
    let team = written.team.as_ref().expect("measured after all shapes");
    assert_eq!(team.measured.iter().map(|sized| sized.threads).collect::<Vec<_>>(), [2, 1]);
    let steps = written.steps.as_ref().expect("compared after all shapes");
    let most = compiled.plan.model.max_tokens;
    assert_eq!(steps.layers, opened.config.layers, "a step of all layers takes no time");
    let lengths: Vec<usize> = [1, 16, 64, 512].into_iter().filter(|&tokens| tokens <= most).collect();
    assert_eq!(steps.measured.iter().map(|step| step.tokens).collect::<Vec<_>>(), lengths);
    let Tried::Done { choices, given_up } = all.trial else { panic!("{:?}", all.trial) };
    assert!(given_up <= choices && choices <= 2 * products(&compiled.plan).len(), "{given_up} of {choices}");
    let again = tune::tune(&request(0), &Silent).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(again.trial, Tried::Nothing, "nothing new is on trial");
    assert_eq!((again.left(), again.earlier), (0, all.products.len()), "nothing is measured twice");

    let confirmed = tune::tune(&Request { confirm: true, ..request(600) }, &Silent).unwrap_or_else(|e| panic!("{e}"));
    for (shape, found) in &confirmed.record.products {
        let (before, default) = (&written.products[shape].tuning, compiled.tuned.tunings[0].product(*shape));
        let parts = |tuning: &ProductTuning| (tuning.kernels[0], tuning.kernels[1..].to_vec());
        let (now, before, default) = (parts(&found.tuning), parts(before), parts(&default));
        assert!(now.0 == before.0 || now.0 == default.0, "{shape}: confirming finds nothing new");
        assert!(now.1 == before.1 || now.1 == default.1, "{shape}: confirming finds nothing new");
    }

    // Without its steps a record is on trial again, as one is that was out of time.
    let untried = Record { steps: None, ..written.clone() };
    std::fs::write(&output, untried.to_toml()).expect("writable");
    let none = tune::tune(&request(0), &Silent).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((none.trial, none.left()), (Tried::NoTime, 0));
    let tried = tune::tune(&request(600), &Silent).unwrap_or_else(|e| panic!("{e}"));
    assert!(matches!(tried.trial, Tried::Done { .. }) && tried.record.steps.is_some(), "{:?}", tried.trial);

    let used = pipeline::compile(&opened, &Options { tuning: vec![written], ..options.clone() });
    assert_eq!(used.unwrap_or_else(|e| panic!("{e}")).tuned.notes, Vec::<String>::new());

    // A record of another machine is not overwritten.
    let foreign = std::fs::read_to_string(&output).expect("readable").replacen("threads = 2\n", "threads = 77\n", 1);
    std::fs::write(&output, &foreign).expect("writable");
    let error = tune::tune(&request(0), &Silent).expect_err("another key").to_string();
    assert!(error.contains("delete it, or write elsewhere"), "{error}");
    assert_eq!(std::fs::read_to_string(&output).expect("readable"), foreign);
}

#[test]
fn a_build_script_uses_a_record() {
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let path = model("mixtral-a");
    let opened = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let options = Options { quant: "q4".parse().expect("a --quant option"), ..Options::default() };
    let mut random = Random(7);
    let tuned = tuned(&path, &options, &mut random);
    let file = directory.path().join("r.toml");
    std::fs::write(&file, tuned.tuning[0].to_toml()).expect("writable");
    let compile = |name: &str, record: Option<&Path>| {
        let builder = moec::build(&path).name("mixtral").quant("q4").target_cpu("native");
        let builder = builder.target(&Triple::host().to_string()).out_dir(directory.path().join(name));
        let builder = record.into_iter().fold(builder, moec::build_script::Builder::tuning);
        builder.try_compile().map(|compiled| compiled.directory.join("libmixtral.a"))
    };
    let symbols = |archive: PathBuf| {
        let bytes = std::fs::read(&archive).unwrap_or_else(|e| panic!("{}: {e}", archive.display()));
        let wanted = pipeline::compile(&opened, &tuned).unwrap_or_else(|e| panic!("{e}"));
        let kernels = wanted.plan.levels[0].kernels();
        let names =
            kernels.iter().filter(|k| matches!(k, Kernel::Matmul(_))).map(|k| format!("mixtral_l0_{}\0", k.name()));
        names.filter(|name| bytes.windows(name.len()).any(|w| w == name.as_bytes())).count() as f64
            / kernels.len() as f64
    };
    let (plain, with) = (compile("plain", None), compile("with", Some(&file)));
    let (plain, with) =
        (symbols(plain.unwrap_or_else(|e| panic!("{e}"))), symbols(with.unwrap_or_else(|e| panic!("{e}"))));
    assert!(with > plain, "kernels are those of the record: {plain} without, {with} with");

    std::fs::write(&file, "version = 1\n").expect("writable");
    let error = compile("wrong", Some(&file)).expect_err("no record").to_string();
    assert!(error.contains("r.toml") && error.contains("moec"), "{error}");
}

#[test]
fn a_level_that_this_machine_lacks_is_refused() {
    let triple = Triple::host();
    let Some(level) = target::levels(&triple).iter().find(|level| level.features & !target::host() != 0) else {
        return; // This machine runs all that moec knows.
    };
    let error = tune::code::Compiler::new(*level).err().expect("it lacks something").to_string();
    assert!(error.contains(level.name) && error.contains("lacks"), "{error}");
}
