//! Collects a report from a compiled model, what packing wrote, and predictions.
//!
//! Deliberately absent: how it looks.

use super::units::plural;
use super::{ByHeat, Experts, Scores};
use super::{Kind, Level, Loss, Machine, Memory, Model, Output, Pass, Product, Program, Report, Step, Token, VERSION};
use super::{Variant, Weights};
use crate::import;
use crate::kernels::{Kernel, Prefetch};
use crate::lower::backend::KernelBackend;
use crate::passes::{PassId, QuantConfig, Trace};
use crate::pipeline::{Compiled, Options};
use crate::plan::program::{self, Stage, StageProduct};
use crate::plan::{MAX_STEP_TOKENS, Plan};
use crate::predict::{self, Expected, Predictor};
use crate::target::{Tuning, feature_names};
use moec_abi::PAGE_TOKENS;
use moec_abi::metadata::Metadata;

/// What a report is made from.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The model.
    pub model: &'a import::Model,
    /// How it was to be built.
    pub options: &'a Options,
    /// What was made of it.
    pub compiled: &'a Compiled,
    /// What its payload says of itself, if there is one.
    pub metadata: Option<&'a Metadata>,
    /// What was written.
    pub output: Option<&'a Output>,
    /// What becomes of weights that are stored as codes.
    pub repacked: &'a [String],
    /// How well it predicts a text.
    pub scores: Option<&'a Scores>,
    /// For each level the machine to predict for, if any.
    pub machines: &'a [Option<Machine>],
    /// The steps to predict.
    pub predicted: Predicted,
}

/// Which steps are predicted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Predicted {
    /// Tokens of a prompt, read in steps of as many as there may be.
    pub prompt: usize,
    /// Tokens before it.
    pub depth: usize,
    /// Tokens that are then decoded; the middle one is predicted.
    pub new: usize,
}

impl Default for Predicted {
    /// As `bench` measures without options.
    fn default() -> Predicted {
        Predicted { prompt: 512, depth: 0, new: 64 }
    }
}

/// The report.
pub fn gather(inputs: &Inputs<'_>) -> Report {
    let Inputs { model, options, compiled, metadata, output, repacked, scores, machines, predicted } = *inputs;
    let plan = &compiled.plan;
    let shape = &plan.model;
    let levels = plan.levels.iter().enumerate().map(|(i, programs)| {
        let machine = machines.get(i).cloned().flatten();
        let tuning = &compiled.tuned.tunings[i];
        let backend = KernelBackend::choose(options.levels[i].features, &options.target);
        let mut predictor = machine.as_ref().map(|machine| Predictor::new(machine.target.clone(), backend));
        let mut steps = |program, decode| {
            let workers = machine.as_ref().map_or(1, |machine| machine.target.threads);
            program_of(plan, program, tuning, predictor.as_mut(), &steps_of(plan, predicted, decode, workers))
        };
        Level {
            name: options.levels[i].name.to_string(),
            features: feature_names(options.levels[i].features).into_iter().map(str::to_string).collect(),
            tuning: compiled.tuned.records[i].as_ref().map(ToString::to_string),
            decode: steps(&programs.decode, true),
            batch: steps(&programs.batch, false),
            machine,
        }
    });
    Report {
        version: VERSION,
        moec: env!("CARGO_PKG_VERSION").to_string(),
        model: Model {
            name: shape.name.clone(),
            architecture: model.config.architecture.name().to_string(),
            parameters: model.tensors.parameters(),
            layers: shape.layers,
            hidden: shape.hidden,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            ffn: shape.ffn,
            experts: shape.experts,
            experts_per_token: shape.experts_per_token,
            vocab: shape.vocab,
            context: shape.context,
            sliding_window: shape.sliding_window,
        },
        output: output.cloned(),
        weights: weights(plan, metadata),
        repacked: repacked.to_vec(),
        memory: memory(plan),
        experts: experts(compiled),
        scores: scores.cloned(),
        token: Token {
            weight_bytes: plan.costs.decode_weight_bytes as u64,
            multiply_adds: plan.costs.multiply_adds_per_token as u64,
            multiply_adds_per_logit_row: plan.costs.multiply_adds_per_logit_row as u64,
            integer: plan.costs.integer_dot_products,
        },
        passes: passes(options, &compiled.traces),
        levels: levels.collect(),
        measured: None,
    }
}

fn experts(compiled: &Compiled) -> Option<Experts> {
    let heat = compiled.heat.as_ref()?;
    let by_heat = compiled.by_heat.as_ref().map(|choice| ByHeat {
        hot: choice.hot.layout.to_string(),
        cold: QuantConfig::COLD.to_string(),
        experts: choice.hot.layers.clone(),
        covered: choice.covered,
        budget: choice.budget,
        all_cold: choice.range[0],
        all_hot: choice.range[1],
    });
    Some(Experts { profiles: heat.sources.clone(), tokens: heat.tokens, counts: heat.counts.clone(), by_heat })
}

fn memory(plan: &Plan) -> Memory {
    let page = plan.page_bytes();
    let seen = plan.model.sliding_window.map_or(plan.model.context, |window| window.min(plan.model.context));
    // A window that does not end with a page reaches into one more.
    let pages = seen.div_ceil(PAGE_TOKENS) + usize::from(seen < plan.model.context);
    Memory {
        weights: plan.payload.bytes as u64,
        kv_per_token: (page / PAGE_TOKENS) as u64,
        page_tokens: PAGE_TOKENS as u64,
        page: page as u64,
        kv_at_context: (page * pages) as u64,
        scratch: plan.scratch_bytes as u64,
        thread_scratch: plan.worker_scratch_bytes as u64,
    }
}

fn weights(plan: &Plan, metadata: Option<&Metadata>) -> Vec<Weights> {
    let mut all: Vec<(Weights, f64)> = Vec::new();
    for (i, item) in plan.payload.items.iter().enumerate() {
        let (role, layout) = (item.purpose(), item.format.name());
        let count = (item.experts * item.rows * item.columns) as u64;
        let at = all.iter().position(|(w, _)| (w.role.as_str(), w.layout.as_str()) == (role.as_str(), layout));
        let at = at.unwrap_or_else(|| {
            all.push((Weights { role, layout: layout.to_string(), count: 0, bytes: 0, error: None }, 0.0));
            all.len() - 1
        });
        let (weights, squares) = &mut all[at];
        weights.count += count;
        weights.bytes += item.bytes() as u64;
        let Some(entry) = metadata.and_then(|metadata| metadata.weights.get(i)) else { continue };
        let own = entry.relative_rms_error;
        *squares += own * own * count as f64;
        let loss = weights.error.get_or_insert_with(|| Loss {
            relative_rms: 0.0,
            worst: entry.name.clone(),
            worst_relative_rms: own,
        });
        if own > loss.worst_relative_rms {
            (loss.worst, loss.worst_relative_rms) = (entry.name.clone(), own);
        }
        loss.relative_rms = (*squares / weights.count as f64).sqrt();
    }
    all.into_iter().map(|(weights, _)| weights).collect()
}

fn passes(options: &Options, traces: &[Trace; 2]) -> Vec<Pass> {
    let of = |id: PassId| {
        let done = |trace: &Trace| {
            let step = trace.steps.iter().find(|step| step.pass == id);
            step.map_or((0, None), |step| (step.rewrites.len(), step.rewrites.first().cloned()))
        };
        let [(decode, first), (batch, other)] = [done(&traces[0]), done(&traces[1])];
        Pass {
            name: id.pass().name.to_string(),
            doc: id.pass().doc.to_string(),
            disabled: options.disabled.contains(&id),
            decode,
            batch,
            first: first.or(other),
        }
    };
    PassId::all().map(of).collect()
}

/// The steps that are predicted together: a prompt may take several.
fn steps_of(plan: &Plan, predicted: Predicted, decode: bool, workers: usize) -> Vec<predict::Step> {
    let room = plan.model.context.saturating_sub(predicted.depth).max(1);
    if decode {
        let depth = predicted.depth.min(plan.model.context - 1) + predicted.new.min(room) / 2;
        return vec![predict::Step { tokens: 1, depth, logits: 1, workers }];
    }
    let (prompt, chunk) = (predicted.prompt.min(room), plan.model.max_tokens.min(MAX_STEP_TOKENS));
    let firsts = (0..prompt).step_by(chunk);
    let step = |first: usize| predict::Step {
        tokens: chunk.min(prompt - first),
        depth: predicted.depth + first,
        logits: usize::from(first + chunk >= prompt),
        workers,
    };
    firsts.map(step).collect()
}

fn program_of(
    plan: &Plan,
    program: &program::Program,
    tuning: &Tuning,
    predictor: Option<&mut Predictor>,
    steps: &[predict::Step],
) -> Program {
    let expected = predictor.map(|predictor| {
        let mut sums: Vec<Option<Expected>> = vec![Some(Expected::default()); program.stages.len()];
        for &step in steps {
            for (sum, one) in sums.iter_mut().zip(predictor.stages(plan, program, step)) {
                *sum = sum.zip(one).map(|(sum, one)| sum.plus(&one));
            }
        }
        sums
    });
    let mut kinds: Vec<(Kind, Vec<Sort>)> = Vec::new();
    for (i, stage) in program.stages.iter().enumerate() {
        let at = kinds.iter().position(|(kind, _)| kind.operations == stage.title);
        let at = at.unwrap_or_else(|| {
            kinds.push((kind_of(plan, stage, tuning), Vec::new()));
            kinds.len() - 1
        });
        let own = expected.as_ref().map(|all| all[i]);
        kinds[at].1.push(Sort { products: sorts(plan, stage), expected: own.flatten(), stage });
    }
    let kinds: Vec<Kind> = kinds.into_iter().map(|(kind, stages)| finish(kind, &stages)).collect();
    let known: Option<f64> = kinds.iter().map(|kind| kind.expected.map(|e| e.seconds())).sum();
    let step = known.zip(steps.first()).map(|(seconds, first)| Step {
        tokens: steps.iter().map(|step| step.tokens).sum(),
        depth: first.depth,
        seconds,
    });
    Program {
        stages: program.stages.len(),
        barriers: program.stages.iter().filter(|stage| stage.barrier).count(),
        kernels: program.kernels().len(),
        kinds,
        step,
    }
}

/// A stage among those of its kind, and what it may differ in.
struct Sort<'a> {
    stage: &'a Stage,
    products: Vec<(String, usize)>,
    expected: Option<Expected>,
}

/// Shape and rows of a stage's products.
fn sorts(plan: &Plan, stage: &Stage) -> Vec<(String, usize)> {
    stage.products.iter().map(|p| (p.shape.to_string(), plan.payload.items[p.weight].rows)).collect()
}

fn kind_of(plan: &Plan, stage: &Stage, tuning: &Tuning) -> Kind {
    let kernels = stage.kernels();
    let products = stage.products.iter().map(|product| product_of(plan, product, &kernels, tuning)).collect();
    let mut families: Vec<String> = Vec::new();
    for kernel in kernels.iter().filter(|kernel| !matches!(kernel, Kernel::Matmul(_))) {
        if !families.iter().any(|family| family == kernel.family()) {
            families.push(kernel.family().to_string());
        }
    }
    Kind {
        operations: stage.title.clone(),
        stages: 0,
        weight_bytes: 0,
        multiply_adds: 0,
        products,
        kernels: families,
        expected: None,
        variants: Vec::new(),
    }
}

/// Adds up the stages of a kind, and tells them apart where they differ.
fn finish(kind: Kind, stages: &[Sort<'_>]) -> Kind {
    // What is predicted differs by roundings only where nothing else does.
    let alike = |a: &Sort<'_>, b: &Sort<'_>| {
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * a.abs().max(b.abs());
        let times = match (a.expected, b.expected) {
            (Some(a), Some(b)) => near(a.seconds(), b.seconds()),
            (a, b) => a == b,
        };
        (&a.products, a.stage.weight_bytes, a.stage.multiply_adds)
            == (&b.products, b.stage.weight_bytes, b.stage.multiply_adds)
            && times
    };
    let mut variants: Vec<(usize, Vec<usize>)> = Vec::new();
    for (i, stage) in stages.iter().enumerate() {
        match variants.iter_mut().find(|(first, _)| alike(&stages[*first], stage)) {
            Some((_, all)) => all.push(i),
            None => variants.push((i, vec![i])),
        }
    }
    let variant = |(first, all): (usize, Vec<usize>)| {
        let Sort { stage, expected, .. } = &stages[first];
        Variant {
            stages: all,
            weight_bytes: stage.weight_bytes as u64,
            multiply_adds: stage.multiply_adds as u64,
            expected: *expected,
        }
    };
    let expected =
        stages.iter().map(|stage| stage.expected).try_fold(Expected::default(), |sum, e| Some(sum.plus(&e?)));
    Kind {
        stages: stages.len(),
        weight_bytes: stages.iter().map(|s| s.stage.weight_bytes as u64).sum(),
        multiply_adds: stages.iter().map(|s| s.stage.multiply_adds as u64).sum(),
        expected,
        variants: if variants.len() > 1 { variants.into_iter().map(variant).collect() } else { Vec::new() },
        ..kind
    }
}

fn product_of(plan: &Plan, product: &StageProduct, kernels: &[Kernel], tuning: &Tuning) -> Product {
    let item = &plan.payload.items[product.weight];
    let matmuls = kernels.iter().filter_map(|kernel| match kernel {
        Kernel::Matmul(m)
            if (m.format, m.part.map_or(m.k, |part| part.of), m.epilogue)
                == (product.shape.format, product.shape.k, product.shape.epilogue) =>
        {
            Some(m)
        }
        _ => None,
    });
    let largest = matmuls.max_by_key(|m| m.tokens).expect("a product has a kernel");
    let written = largest.tuning;
    let mut choice =
        format!("{} rows × {}, unroll {}", 16 * written.tiles, plural(largest.tokens, "token"), written.unroll);
    if written.prefetch != Prefetch::None {
        choice += &format!(", {}", written.prefetch);
    }
    if largest.tokens > 1 {
        let all = tuning.product(product.shape);
        let block = 16 * all.block_units(product.shape.epilogue) * product.shape.epilogue.tiles();
        choice += &format!("; {block} rows for a walk over {} KiB of activations", all.activation_bytes >> 10);
        if all.parts(product.shape.k).len() > 1 {
            choice += &format!(", {} columns at a time", all.parts(product.shape.k)[0].len());
        }
    }
    Product {
        shape: product.shape.to_string(),
        rows: item.rows,
        experts: item.experts.max(1),
        matrices: product.matrices,
        kernel: largest.name(),
        choice,
    }
}
