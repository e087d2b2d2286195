//! Reports: what they say of a build, what they predict, how they look, and what they say of files that do not belong to them.

use moec::import;
use moec::lower::backend::KernelBackend;
use moec::passes::HotExperts;
use moec::pipeline::{self, Options};
use moec::predict::{Predictor, Step, Target};
use moec::report::{self, Form, Inputs, Machine, Predicted, Report, measured};
use moec::target;
use moec::tune::limits::Limits;
use moec_ir::graph::Role;
use moec_tests::gguf::{Kind, convert, write};
use moec_tests::{filetest, models, profile};
use std::path::{Path, PathBuf};
use target_lexicon::Triple;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("filetests/report").join(name)
}

/// A small report as it was read, with a benchmark if one is named.
fn read(names: &str) -> Result<Report, String> {
    let mut names = names.trim().split(" and ");
    let name = names.next().unwrap_or_default();
    let mut report = report::read(&fixture(name)).map_err(|e| e.to_string())?;
    if let Some(bench) = names.next() {
        let found = measured::read(&fixture(bench)).map_err(|e| e.to_string())?;
        report.measured = Some(measured::compare(&report, name, &found, bench).map_err(|e| e.to_string())?);
    }
    Ok(report)
}

#[test]
fn reports_look_as_they_did() {
    for name in
        ["mixtral.txt", "measured.txt", "heat.txt", "mixtral.md", "measured.md", "heat.md", "mixtral.html", "heat.html"]
    {
        let form = Form::of(Path::new(name)).unwrap_or(Form::Text);
        filetest::check_file("report", name, |names| Ok(report::render(&read(names)?, form)));
    }
}

#[test]
fn a_page_is_whole_by_itself() {
    let mut report = read("mixtral.json and bench.json").expect("the fixtures belong together");
    (report.experts, report.scores) = read("heat.json").map(|heat| (heat.experts, heat.scores)).expect("the fixture");
    report.model.name = "<script>alert(\"&\")</script>".to_string();
    let page = report::render(&report, Form::Html);
    for word in ["http://", "https://", "<script", "<link", "@import", "url("] {
        assert!(!page.contains(word), "{word} loads or runs something");
    }
    assert!(page.contains("&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;"), "names are escaped");
    assert!(page.contains("prefers-color-scheme: dark"));
    // Every element that is opened is closed, in order.
    let mut open: Vec<&str> = Vec::new();
    for tag in page.split('<').skip(1).filter(|tag| !tag.starts_with('!')) {
        let inside = tag.split('>').next().expect("split gives at least one part");
        let name = inside.trim_start_matches('/').split([' ', '/']).next().expect("as above");
        if inside.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "</{name}> closes what is open");
        } else if !matches!(name, "meta") {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
}

#[test]
fn json_is_the_data() {
    let report = read("mixtral.json and bench.json").expect("the fixtures belong together");
    let text = report::render(&report, Form::Json);
    let back = serde_json::from_str::<Report>(&text).expect("it reads back");
    // The parser may miss the last bit of a number with all its digits, of which only a comparison is full.
    let without = |report: &Report| Report { measured: None, ..report.clone() };
    assert_eq!(without(&back), without(&report));
    let (found, wanted) = (back.measured.expect("it was there"), report.measured.expect("it was compared"));
    assert_eq!((&found.source, found.level), (&wanted.source, wanted.level));
    for (found, wanted) in [(found.decode, wanted.decode), (found.prefill, wanted.prefill)] {
        assert_eq!(found.kinds.len(), wanted.kinds.len());
        assert!((found.ratio() - wanted.ratio()).abs() < 1e-12);
    }
}

#[test]
fn measurements_scale_predictions_by_the_limits_of_their_run() {
    let report = read("mixtral.json").expect("the fixture");
    let bench = measured::read(&fixture("bench.json")).expect("the fixture");
    let compare = |bench: &measured::Bench| measured::compare(&report, "r.json", bench, "b.json");
    let usual = compare(&bench).expect("they belong together");
    assert_eq!(usual.prefill.kinds.len(), 3);
    assert!((usual.decode.measured - bench.decode.seconds / 64.0).abs() < 1e-12, "one token of 64");
    let mut fast = bench.clone();
    fast.machine.read_bytes_per_s *= 2.0;
    let fast = compare(&fast).expect("they belong together");
    let quicker = usual.decode.predicted / fast.decode.predicted;
    assert!((1.5..2.0).contains(&quicker), "decoding reads: {quicker}");
    assert!(usual.prefill.predicted / fast.prefill.predicted < 1.1, "a prompt computes");
    let mut busy = bench.clone();
    busy.machine.peak_multiply_adds_per_s /= 2.0;
    let busy = compare(&busy).expect("they belong together");
    let slower = busy.prefill.predicted / usual.prefill.predicted;
    assert!((1.8..2.0).contains(&slower), "a prompt computes: {slower}");

    for (change, words) in [
        (
            Box::new(|b: &mut measured::Bench| b.model = "other".into()) as Box<dyn Fn(&mut measured::Bench)>,
            "of the model other, and the report of mixtral",
        ),
        (Box::new(|b| b.level = "znver5".into()), "the code of znver5 ran, and the report has native"),
        (Box::new(|b| b.machine.threads = 7), "measured 7 threads, and the report is for 2"),
        (Box::new(|b| b.prefill.tokens = 100), "measured 100 tokens of a prompt, and the report is for 512"),
        (Box::new(|b| b.sequences = 4), "decoded 4 texts together"),
        (Box::new(|b| b.depth = 4096), "measured 4096 tokens before it, and the report is for 0"),
        (Box::new(|b| b.decode.seconds = f64::NAN), "`decode.seconds` is NaN"),
    ] {
        let mut wrong = bench.clone();
        change(&mut wrong);
        let error = compare(&wrong).expect_err(words).to_string();
        assert!(error.starts_with("b.json does not belong to r.json") && error.contains(words), "{error}");
    }
}

#[test]
fn files_that_are_something_else_are_refused() {
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let path = directory.path().join("r.json");
    let good = std::fs::read_to_string(fixture("mixtral.json")).expect("the fixture");
    for (text, words) in [
        ("{".to_string(), "at `line 1`"),
        ("{}".to_string(), "a report of version none"),
        (good.replacen("\"version\": 1", "\"version\": 2", 1), "a report of version 2"),
        (good.replacen("\"stages\": 24", "\"stages\": \"many\"", 1), "`levels[0].decode.stages`"),
        (good.replacen("\"hidden\"", "\"hiden\"", 1), "unknown field `hiden`"),
    ] {
        std::fs::write(&path, text).expect("writable");
        let error = report::read(&path).expect_err(words).to_string();
        assert!(error.contains(words) && error.contains("r.json"), "{error}");
    }
    let error = measured::read(&fixture("mixtral.json")).expect_err("a report is no benchmark").to_string();
    assert!(error.contains("bench --profile --json"), "{error}");
    assert!(Form::of(Path::new("report.pdf")).expect_err("no form").to_string().contains(".html, .md or .json"));
}

fn limits() -> Limits {
    Limits::usual(460e9, 115e9, 30e9, 2)
}

fn options(quant: &str, cpu: &str, triple: &str) -> Options {
    let target: Triple = triple.parse().expect("a triple");
    let levels = target::find_levels(cpu, &target).expect("a level");
    Options { quant: quant.parse().expect("a --quant option"), target, levels, ..Options::default() }
}

#[test]
fn every_stage_of_every_model_is_predicted() {
    const X86: &str = "x86_64-unknown-linux-gnu";
    for path in models() {
        let model = import::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for (quant, cpu, triple) in
            [("q4", "znver4", X86), ("none", "x86-64-v3", X86), ("q8", "generic", "aarch64-unknown-linux-gnu")]
        {
            let cpu = if cpu == "generic" { target::levels(&triple.parse().expect("a triple"))[0].name } else { cpu };
            let options = options(quant, cpu, triple);
            let compiled = pipeline::compile(&model, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let plan = &compiled.plan;
            let backend = KernelBackend::choose(options.levels[0].features, &options.target);
            let mut predictor = Predictor::new(Target { limits: limits(), threads: 2, cache: 0 }, backend);
            let mut predict = |program, step: Step| {
                let all = predictor.stages(plan, program, step);
                all.into_iter()
                    .map(|e| e.unwrap_or_else(|| panic!("{} {quant}: unknown", path.display())))
                    .collect::<Vec<_>>()
            };
            let name = || format!("{} {quant} {cpu}", path.display());
            let decode = predict(&plan.levels[0].decode, Step { tokens: 1, depth: 5, logits: 1, workers: 2 });
            let adds: f64 = decode.iter().map(|e| e.multiply_adds).sum();
            let planned: usize = plan.levels[0].decode.stages.iter().map(|stage| stage.multiply_adds).sum();
            assert_eq!(adds, planned as f64, "{}", name());
            // All that a token reads are weights, a row of the embedding, norms, and keys.
            let bytes: f64 = decode.iter().map(|e| e.bytes).sum();
            let vectors: usize = plan
                .payload
                .items
                .iter()
                .filter(|i| matches!(i.role, Some(Role::Embedding | Role::Norm | Role::Bias)))
                .map(|i| i.columns * 4)
                .sum();
            let keys = 6.0 * plan.page_bytes() as f64 / 64.0;
            let least = plan.costs.decode_weight_bytes as f64 - vectors as f64;
            assert!(bytes >= least && bytes <= least + vectors as f64 + keys, "{}: {bytes} and {least}", name());
            let tokens = plan.model.max_tokens.min(40);
            let batch = |workers| Step { tokens, depth: 3, logits: 1, workers };
            let two: f64 = predict(&plan.levels[0].batch, batch(2)).iter().map(|e| e.computing).sum();
            let one: f64 = predict(&plan.levels[0].batch, batch(1)).iter().map(|e| e.computing).sum();
            assert!(two < one && two > 0.45 * one, "{}: two workers {two}, one {one}", name());
        }
    }
}

#[test]
fn experts_in_two_formats_are_predicted_by_how_often_they_are_chosen() {
    let path = models().into_iter().find(|path| path.ends_with("mixtral-a")).expect("the model");
    let model = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let compile = |hot: u64| {
        // Of the second layer half of the experts have 8 bits whatever the heat of the first one is.
        let counts = [vec![hot, hot, 1, 1, 1, 1, 1, 1], vec![9, 9, 9, 9, 1, 1, 1, 1]];
        let mut options = options("experts=auto", "znver4", "x86_64-unknown-linux-gnu");
        options.expert_profiles = vec![profile(&model, &counts)];
        options.size_budget = Some(u64::MAX);
        let found = pipeline::heat(&model, &options).unwrap_or_else(|e| panic!("{e}"));
        let (heat, all) = (found.0.expect("a profile"), found.1.expect("bits by heat"));
        let hot = HotExperts { layers: vec![vec![0, 1], vec![0, 1, 2, 3]], ..all.hot };
        options.size_budget = pipeline::payload_bytes(&model, &options, Some(&heat), &hot).ok();
        let compiled = pipeline::compile(&model, &options).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(compiled.by_heat.as_ref().expect("bits by heat").hot, hot);
        (options, compiled)
    };
    let decoded = |hot| {
        let (options, compiled) = compile(hot);
        let backend = KernelBackend::choose(options.levels[0].features, &options.target);
        let mut predictor = Predictor::new(Target { limits: limits(), threads: 2, cache: 0 }, backend);
        let programs = &compiled.plan.levels[0];
        let mut bytes = |program, tokens| {
            let step = Step { tokens, depth: 0, logits: 1, workers: 2 };
            let all = predictor.stages(&compiled.plan, program, step).into_iter();
            all.map(|stage| stage.expect("every stage is predicted").bytes).sum::<f64>()
        };
        (bytes(&programs.decode, 1), bytes(&programs.batch, 200), compiled)
    };
    let (cold_token, cold_prompt, compiled) = decoded(2);
    let (hot_token, hot_prompt, _) = decoded(100);
    assert!(hot_token > 1.05 * cold_token, "a token meets more of the wide experts: {hot_token} and {cold_token}");
    assert!((hot_prompt / cold_prompt - 1.0).abs() < 0.05, "a prompt meets all of them: {hot_prompt}, {cold_prompt}");
    let programs = &compiled.plan.levels[0];
    let stage = programs.decode.stages.iter().find(|stage| stage.title.contains("expert_gate_up")).expect("a stage");
    let experts = stage.experts.as_ref().expect("it has experts");
    assert!(experts.bytes[0] > experts.bytes[2] && experts.bytes[0] == experts.bytes[1]);
    let routed = stage.products.iter().filter(|p| compiled.plan.payload.items[p.weight].router.is_some());
    let met: f64 = routed.map(|product| product.matrices).sum();
    assert!((met - 2.0).abs() < 1e-12, "a token meets two: {met}");
    let first = experts.first_share.expect("two formats");
    assert!((first - 4.0 / 10.0).abs() < 1e-12, "4 of 10 choices meet the first two: {first}");
}

/// Of an output that shares the embedding's matrix, too, only the rows that are asked for meet it.
#[test]
fn logits_of_a_tied_output_are_predicted_for_the_rows_asked_for() {
    let directory = models().into_iter().find(|path| path.ends_with("qwen2-a")).expect("the model");
    let place = tempfile::tempdir().expect("a temporary directory");
    let path = write(&convert(&moec_tests::reference::open(&directory), Kind::Q8), place.path());
    let model = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let options = options("none", "znver4", "x86_64-unknown-linux-gnu");
    let plan = pipeline::compile(&model, &options).unwrap_or_else(|e| panic!("{e}")).plan;
    assert_eq!(plan.payload.find("embed"), plan.payload.find("output"), "they are one matrix");
    let backend = KernelBackend::choose(options.levels[0].features, &options.target);
    let mut predictor = Predictor::new(Target { limits: limits(), threads: 1, cache: 0 }, backend);
    let batch = &plan.levels[0].batch;
    let predicted = predictor.stages(&plan, batch, Step { tokens: 4, depth: 0, logits: 1, workers: 1 });
    let mut stages = batch.stages.iter().zip(predicted);
    let (stage, expected) = stages.find(|(stage, _)| stage.title.contains("logits")).expect("a stage of logits");
    assert_eq!(expected.expect("it is known").multiply_adds, stage.multiply_adds as f64, "one row of four tokens");
}

#[test]
fn a_report_of_a_model_says_what_the_plan_says() {
    let path = models().into_iter().find(|path| path.ends_with("mixtral-a")).expect("the model");
    let model = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let options = options("q4", "znver4", "x86_64-unknown-linux-gnu");
    let compiled = pipeline::compile(&model, &options).unwrap_or_else(|e| panic!("{e}"));
    let machine = Machine {
        cpu: "a machine".to_string(),
        source: "made up".to_string(),
        target: Target { limits: limits(), threads: 2, cache: 0 },
        full: true,
    };
    let report = report::gather(&Inputs {
        model: &model,
        options: &options,
        compiled: &compiled,
        metadata: None,
        output: None,
        repacked: &[],
        scores: None,
        machines: &[Some(machine)],
        predicted: Predicted::default(),
    });
    let level = &report.levels[0];
    for (program, planned) in
        [(&level.decode, &compiled.plan.levels[0].decode), (&level.batch, &compiled.plan.levels[0].batch)]
    {
        assert_eq!(program.stages, planned.stages.len());
        assert_eq!(program.kinds.iter().map(|kind| kind.stages).sum::<usize>(), planned.stages.len());
        let bytes: u64 = program.kinds.iter().map(|kind| kind.weight_bytes).sum();
        assert_eq!(bytes, planned.stages.iter().map(|stage| stage.weight_bytes as u64).sum::<u64>());
        let step = program.step.expect("there is a machine");
        let kinds: f64 = program.kinds.iter().filter_map(|kind| Some(kind.expected?.seconds())).sum();
        assert!((kinds - step.seconds).abs() < 1e-9 * step.seconds, "kinds are all there is");
        // All layers are alike; but what is quantized is now as wide as the model, now as an expert.
        for kind in &program.kinds {
            let sorts: Vec<&[usize]> = kind.variants.iter().map(|variant| &variant.stages[..]).collect();
            assert!(kind.products.is_empty() || sorts.is_empty(), "{}: {sorts:?}", kind.operations);
            if kind.operations == "quantize" {
                assert_eq!(sorts, [&[0, 2][..], &[1, 3]], "of attention and of experts");
            }
        }
    }
    assert_eq!(report.weights.iter().map(|w| w.count).sum::<u64>(), {
        let count = |i: &moec::plan::payload::PayloadItem| (i.experts * i.rows * i.columns) as u64;
        compiled.plan.payload.items.iter().map(count).sum::<u64>()
    });
    assert!(report.weights.iter().all(|w| w.error.is_none()), "nobody has packed it");
    let names: Vec<&str> = level.decode.kinds.iter().flat_map(|k| &k.products).map(|p| p.kernel.as_str()).collect();
    assert!(names.iter().all(|name| name.starts_with("matmul_")) && names.len() >= 6, "{names:?}");
}

#[test]
fn experts_of_an_expert_profile_lie_by_heat_in_the_plan() {
    let path = models().into_iter().find(|path| path.ends_with("mixtral-a")).expect("the model");
    let model = import::open(&path).unwrap_or_else(|e| panic!("{e}"));
    let (layers, experts) = (model.config.layers, model.config.experts.expect("a mixture").count);
    let count = |layer: usize, expert: usize| ((expert + layer) % experts) as u64;
    let counts: Vec<Vec<u64>> = (0..layers).map(|l| (0..experts).map(|e| count(l, e)).collect()).collect();
    let options = Options {
        expert_profiles: vec![profile(&model, &counts)],
        ..options("q4", "znver4", "x86_64-unknown-linux-gnu")
    };
    let plan = pipeline::compile(&model, &options).unwrap_or_else(|e| panic!("{e}")).plan;
    let first: Vec<usize> = (0..experts).rev().collect();
    let of_layer = |layer: usize| {
        let items = plan.payload.items.iter().filter(move |i| i.name.starts_with(&format!("layers.{layer}.experts")));
        items.map(|i| i.order.clone().expect("an order")).collect::<Vec<_>>()
    };
    assert_eq!(of_layer(0), vec![first.clone(); 2]);
    let rotated: Vec<usize> = (0..experts).map(|i| (2 * experts - 2 - i) % experts).collect();
    assert_eq!(of_layer(1), vec![rotated; 2]);
}
