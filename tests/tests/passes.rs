//! Passes: text in, text out; the same bits before and after each; bisection by number of rewrites.

use moec::import::{Activation, Architecture, Experts, Model, ModelConfig, Rope, RopeScaling, WeightInfo, build_graph};
use moec::passes::{self, HotExperts, Options, PASSES, PassError, PassId, QuantConfig};
use moec_ir::graph::eval::{Evaluator, KvType};
use moec_ir::graph::{DType, Graph, Layout, Mode, Stage, parse, verify};
use moec_tests::reference::{ModelWeights, open};
use moec_tests::{Golden, filetest, models};

/// The graphs of a file, each with the comment before it.
fn graphs(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    for line in text.lines() {
        let part = parts.last_mut().expect("there is always a last part");
        part.push_str(line);
        part.push('\n');
        if line.trim() == "}" {
            parts.push(String::new());
        }
    }
    parts.retain(|part| !part.trim().is_empty());
    parts
}

fn parse_verified(text: &str) -> Result<Graph, String> {
    let graph = parse(text).map_err(|e| e.to_string())?;
    verify(&graph).map_err(|e| e.to_string())?;
    Ok(graph)
}

/// A file bears the name of the pass that it is for.
#[test]
fn each_pass_rewrites_text() {
    for id in PassId::all() {
        let name = id.pass().name;
        filetest::check_file("passes", &format!("{name}.ir"), |text| {
            let mut out = String::new();
            for part in graphs(text) {
                let mut graph = parse_verified(&part)?;
                let rewrites = passes::run_pass(&mut graph, id, None).map_err(|e| e.to_string())?;
                verify(&graph).map_err(|e| e.to_string())?;
                for label in rewrites {
                    out.push_str(&format!("// {label}\n"));
                }
                out.push_str(&graph.renumber().to_string());
            }
            Ok(out)
        });
    }
}

#[test]
fn all_passes_rewrite_text() {
    filetest::check("passes/all", "ir", |text| {
        let quant = text.lines().find_map(|line| line.strip_prefix("// quant: ")).ok_or("which --quant?")?;
        let quant: QuantConfig = quant.parse().map_err(|e| format!("{e}"))?;
        let mut graph = parse_verified(text)?;
        let trace = passes::run(&mut graph, &Options { quant, ..Options::default() }).map_err(|e| e.to_string())?;
        assert_eq!(graph.stage(), Stage::Planned);
        Ok(format!("{trace}{}", graph.renumber()))
    });
}

/// The bits of every logit and final hidden state: a prompt through the batch graph, then some tokens through the decode graph.
fn bits(graphs: &[Graph; 2], weights: &ModelWeights, ids: &[u32], kv: KvType) -> Vec<u32> {
    let new = |graph| Evaluator::new(graph, weights, ids.len(), kv).expect("the model has its weights");
    let (mut batch, mut decode) = (new(&graphs[0]), new(&graphs[1]));
    let prompt = ids.len() - 4;
    let positions: Vec<usize> = (0..prompt).collect();
    let mut outputs = vec![batch.step(&ids[..prompt], &positions, &positions).expect("the step fits")];
    decode.cache = batch.cache;
    for (position, &id) in ids.iter().enumerate().skip(prompt) {
        outputs.push(decode.step(&[id], &[position], &[0]).expect("the step fits"));
    }
    let rows = outputs.iter().flat_map(|outputs| outputs.logits.iter().chain(&outputs.hidden));
    rows.flatten().map(|x| x.to_bits()).collect()
}

fn rewritten(model: &Model, options: &Options) -> [Graph; 2] {
    [Mode::Batch, Mode::Decode].map(|mode| {
        let mut graph = build_graph(&model.config, &model.tensors, mode);
        passes::run(&mut graph, options).unwrap_or_else(|e| panic!("{}: {e}", model.name));
        verify(&graph).unwrap_or_else(|e| panic!("{}: {e}", model.name));
        graph
    })
}

/// The imported graphs with the layouts of `quant`.
fn unchanged(model: &Model, quant: QuantConfig) -> [Graph; 2] {
    [Mode::Batch, Mode::Decode].map(|mode| {
        let mut graph = build_graph(&model.config, &model.tensors, mode);
        quant.assign(&mut graph);
        graph
    })
}

const QUANTS: [&str; 4] = ["none", "q8", "experts=q4,attention=bf16,output=q8,ffn=q4", "f16"];

#[test]
fn bits_are_the_same_after_each_pass() {
    for directory in models() {
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let weights = ModelWeights::new(&model);
        for (i, quant) in QUANTS.iter().enumerate() {
            let kv = if i % 2 == 0 { KvType::F32 } else { KvType::F16 };
            let quant: QuantConfig = quant.parse().expect("a --quant option");
            let ids = &golden.full_ids[..12];
            let before = bits(&unchanged(&model, quant), &weights, ids, kv);
            for id in PassId::all() {
                let graphs = rewritten(&model, &Options { quant, stop_after: Some(id), ..Options::default() });
                assert!(before == bits(&graphs, &weights, ids, kv), "{} {quant}: after {id}", model.name);
            }
        }
    }
}

#[test]
fn bits_are_the_same_without_any_one_pass() {
    for directory in models() {
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let weights = ModelWeights::new(&model);
        let quant = QuantConfig::default();
        let ids = &golden.full_ids[..12];
        let before = bits(&unchanged(&model, quant), &weights, ids, KvType::F16);
        for id in PassId::all().filter(|id| !id.pass().required) {
            let graphs = rewritten(&model, &Options { quant, disabled: vec![id], ..Options::default() });
            assert_eq!(graphs[0].stage(), Stage::Planned);
            assert!(before == bits(&graphs, &weights, ids, KvType::F16), "{}: without {id}", model.name);
        }
    }
}

#[test]
fn experts_in_two_layouts_keep_their_bits() {
    for name in ["mixtral-a", "qwen2-moe-a"] {
        let directory = models().into_iter().find(|path| path.ends_with(name)).expect("the model");
        let (model, golden) = (open(&directory), Golden::read(&directory));
        let weights = ModelWeights::new(&model);
        let ids = &golden.full_ids[..12];
        let quant: QuantConfig = "q4,experts=auto".parse().expect("a --quant option");
        let hot = HotExperts { layout: Layout::Q8, layers: vec![vec![1, 2, 5], vec![0]] };
        let before = [Mode::Batch, Mode::Decode].map(|mode| {
            let mut graph = build_graph(&model.config, &model.tensors, mode);
            quant.assign_with(&mut graph, Some(&hot));
            graph
        });
        let before = bits(&before, &weights, ids, KvType::F16);
        assert!(before != bits(&unchanged(&model, quant), &weights, ids, KvType::F16), "some experts have more bits");
        for id in PassId::all() {
            let options = Options { quant, hot: Some(hot.clone()), ..Options::default() };
            let graphs = rewritten(&model, &Options { stop_after: Some(id), ..options.clone() });
            assert!(before == bits(&graphs, &weights, ids, KvType::F16), "{name}: after {id}");
            if !id.pass().required {
                let graphs = rewritten(&model, &Options { disabled: vec![id], ..options });
                assert!(before == bits(&graphs, &weights, ids, KvType::F16), "{name}: without {id}");
            }
        }
    }
}

#[test]
fn any_number_of_rewrites_leaves_a_sound_graph() {
    let model = open(&models()[0]);
    let golden = Golden::read(&models()[0]);
    let weights = ModelWeights::new(&model);
    let quant = QuantConfig::default();
    let before = bits(&unchanged(&model, quant), &weights, &golden.full_ids[..8], KvType::F32);
    let mut all = build_graph(&model.config, &model.tensors, Mode::Batch);
    let trace = passes::run(&mut all, &Options::default()).expect("passes fit");
    let optional = trace.steps.iter().filter(|step| !step.pass.pass().required);
    let count: usize = optional.map(|step| step.rewrites.len()).sum();
    assert!(count > 10, "{trace}");
    for limit in 0..=count {
        let options = Options { quant, stop_after_rewrites: Some(limit), ..Options::default() };
        let graphs = rewritten(&model, &options);
        assert_eq!(graphs[0].stage(), Stage::Planned, "the plan goes on from any number of rewrites");
        assert!(before == bits(&graphs, &weights, &golden.full_ids[..8], KvType::F32), "after {limit} rewrites");
        let mut graph = build_graph(&model.config, &model.tensors, Mode::Batch);
        let part = passes::run(&mut graph, &options).expect("passes fit");
        let optional = part.steps.iter().filter(|step| !step.pass.pass().required);
        assert_eq!(optional.flat_map(|step| &step.rewrites).count(), limit);
        assert_eq!(graph.to_string() == all.to_string(), limit == count, "after {limit} rewrites");
    }
}

/// The shapes of a model that is not there.
struct Shapes(ModelConfig);

impl WeightInfo for Shapes {
    fn weight_info(&self, name: &str) -> Option<(DType, Vec<usize>)> {
        let ModelConfig { vocab, hidden, ffn, heads, kv_heads, head_dim, .. } = self.0;
        let experts = self.0.experts.map_or(0, |experts| experts.count);
        let last = name.rsplit('.').next()?;
        let shape = match last {
            "embed" | "output" => vec![vocab, hidden],
            "norm" | "attention_norm" | "ffn_norm" => vec![hidden],
            "q" => vec![heads * head_dim, hidden],
            "k" | "v" => vec![kv_heads * head_dim, hidden],
            "o" => vec![hidden, heads * head_dim],
            "router" => vec![experts, hidden],
            "gate" | "up" => vec![experts, ffn, hidden],
            "down" => vec![experts, hidden, ffn],
            _ => return None,
        };
        Some((DType::Bf16, shape))
    }
}

#[test]
fn mixtral_8x7b_shrinks_to_half() {
    let config = ModelConfig {
        architecture: Architecture::Mixtral,
        vocab: 32000,
        hidden: 4096,
        ffn: 14336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        experts: Some(Experts { count: 8, per_token: 2, normalized: true, shared: None }),
        norm_eps: 1e-5,
        context: 32768,
        sliding_window: None,
        full_layers: Vec::new(),
        qkv_bias: false,
        output_bias: false,
        ffn_bias: false,
        head_norm: None,
        activation: Activation::Silu,
        embedding_scale: None,
        post_norms: false,
        query_scale: 1.0 / 128f32.sqrt(),
        score_cap: None,
        logit_cap: None,
        rope: Rope { theta: 1e6, rotated: None, scaling: RopeScaling::None },
        packing: None,
        tied: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    };
    let shapes = Shapes(config);
    // Norm, product with storing, attention, projection; norm, router, choice, two products. A batch is sorted, too; attention and
    // the experts' first product are quantized.
    for (mode, quant, nodes) in [(Mode::Decode, "none", 9), (Mode::Batch, "none", 10), (Mode::Decode, "q4", 11)] {
        let mut graph = build_graph(&shapes.0, &shapes, mode);
        let before = graph.nodes().len();
        let quant = quant.parse().expect("a --quant option");
        let start = std::time::Instant::now();
        passes::run(&mut graph, &Options { quant, ..Options::default() }).expect("passes fit");
        println!("{mode} {quant}: {before} nodes to {} in {:?}", graph.nodes().len(), start.elapsed());
        // Around the layers: the embedding, the rows that need logits, their norm, logits, output.
        assert_eq!(graph.nodes().len(), 32 * nodes + 5, "{mode}\n{graph}");
    }
}

#[test]
fn options_are_checked() {
    let unknown = "fuse_everything".parse::<PassId>().expect_err("there is no such pass").to_string();
    assert!(unknown.contains("there is no pass `fuse_everything`; there are fold_constants, fuse_qkv"), "{unknown}");
    let required = PassId::all().find(|id| id.pass().required).expect("there is a required pass");
    let model = open(&models()[0]);
    let mut graph = build_graph(&model.config, &model.tensors, Mode::Decode);
    let error = passes::run(&mut graph, &Options { disabled: vec![required], ..Options::default() });
    assert_eq!(error, Err(PassError::Required(required)));
    assert_eq!(PASSES.len(), PassId::all().count());
}
