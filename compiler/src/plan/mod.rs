//! From the graph to what the machine does: the payload's map, stages, buffers, and what a step costs.
//!
//! [`plan`] is the way in. It gives each weight of the two graphs a place in the payload, then turns each graph into a [`program::Program`] of
//! stages. [`Plan`] prints as text (`moec inspect --plan`). Deliberately absent: weights' bytes and machine code.

mod attention;
pub mod buffers;
mod experts;
pub mod heads;
pub mod layout;
pub mod payload;
mod places;
mod planner;
mod products;
pub mod program;
pub mod quant;
mod routing;
mod rows;
mod stages;

use crate::expert_profile::Heat;
use crate::import::ModelConfig;
use crate::kernels::Kernel;
use crate::target::Tuning;
use heads::HeadLayout;
use layout::Format;
use moec_abi::{KvType, PAGE_TOKENS, padded_head_dim};
use moec_ir::graph::{Graph, Op, Role, Source, Weight, WeightId};
use payload::{Arrangement, Part, PayloadItem, PayloadMap};
use program::Program;
use stages::{Kept, Planned, plan_stages};
use std::fmt;

/// Most tokens of one step, when the context is longer.
pub const MAX_STEP_TOKENS: usize = 512;

/// Why a graph cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A combination of operations that nothing computes.
    #[error("limit of moec: there is no kernel for {0}")]
    Unsupported(String),
    /// The two graphs want a weight in two ways.
    #[error("limit of moec: weight {0} would need two layouts; enable or disable the passes for both graphs alike")]
    TwoLayouts(String),
}

/// The numbers of a model that a plan depends on.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelShape {
    /// For people.
    pub name: String,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Width of an expert or of the dense FFN.
    pub ffn: usize,
    /// Experts; 0 for a dense model.
    pub experts: usize,
    /// Experts for each token; 0 for a dense model.
    pub experts_per_token: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Whether the output's matrix is the embedding's.
    pub tied: bool,
    /// Longest sequence.
    pub context: usize,
    /// Keys that a token sees.
    pub sliding_window: Option<usize>,
    /// Element type of the KV cache.
    pub kv: KvType,
    /// Most tokens of a step.
    pub max_tokens: usize,
    /// How often experts are chosen, if somebody knows: by it they are ordered in the payload, and costs are counted.
    pub heat: Option<Heat>,
}

impl ModelShape {
    /// The shape of a model compiled with a cache of type `kv` and the given longest sequence.
    pub fn new(name: &str, config: &ModelConfig, kv: KvType, context: usize) -> ModelShape {
        ModelShape {
            name: name.to_string(),
            hidden: config.hidden,
            layers: config.layers,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            ffn: config.ffn,
            experts: config.experts.map_or(0, |e| e.count),
            experts_per_token: config.experts.map_or(0, |e| e.per_token),
            vocab: config.vocab,
            tied: config.tied,
            context,
            // One that no sequence outgrows is none; pages may fall off only where all layers have it.
            sliding_window: config.sliding_window.filter(|&w| w < context && config.full_layers.is_empty()),
            kv,
            max_tokens: context.min(MAX_STEP_TOKENS),
            heat: None,
        }
    }

    /// How often a token chooses this expert of a layer, from 0 to 1: as a profile says, or all equally often.
    pub fn chance(&self, layer: usize, expert: usize) -> f64 {
        match &self.heat {
            Some(heat) => heat.chance(layer, expert),
            None => self.experts_per_token as f64 / self.experts.max(1) as f64,
        }
    }
}

/// What one token costs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Costs {
    /// Payload bytes that one decoded token reads: on average, where experts are not of one size.
    pub decode_weight_bytes: usize,
    /// Multiply-adds with weights for one token, without the output projection.
    pub multiply_adds_per_token: usize,
    /// Multiply-adds of the output projection for one row.
    pub multiply_adds_per_logit_row: usize,
    /// Whether most multiply-adds are 8-bit dot products.
    pub integer_dot_products: bool,
}

/// What the workers do on CPUs of one level.
#[derive(Debug)]
pub struct Programs {
    /// For one token.
    pub decode: Program,
    /// For many.
    pub batch: Program,
}

impl Programs {
    /// Every kernel of both programs, each once.
    pub fn kernels(&self) -> Vec<Kernel> {
        let mut kernels = self.decode.kernels();
        for kernel in self.batch.kernels() {
            if !kernels.contains(&kernel) {
                kernels.push(kernel);
            }
        }
        kernels
    }
}

/// Everything that is decided before code is made.
#[derive(Debug)]
pub struct Plan {
    /// The model's numbers.
    pub model: ModelShape,
    /// Where each weight lies.
    pub payload: PayloadMap,
    /// What workers do, for each CPU level.
    pub levels: Vec<Programs>,
    /// Bytes of shared scratch.
    pub scratch_bytes: usize,
    /// Bytes of each worker's scratch.
    pub worker_scratch_bytes: usize,
    /// Where a step leaves its by-products in shared scratch.
    pub outputs: Kept,
    /// What a token costs.
    pub costs: Costs,
}

impl Plan {
    /// Bytes of one KV page.
    pub fn page_bytes(&self) -> usize {
        let m = &self.model;
        m.layers * m.kv_heads * 2 * PAGE_TOKENS * padded_head_dim(m.head_dim) * m.kv.bytes()
    }
}

/// Plans a model from its two graphs, after all passes, with programs for each of `tunings`. All share one payload, and memory that is enough for
/// each.
///
/// # Errors
/// When the graphs use what no kernel computes, or disagree about a weight.
pub fn plan(decode: &Graph, batch: &Graph, shape: ModelShape, tunings: &[Tuning]) -> Result<Plan, PlanError> {
    let heads = [decode, batch].map(HeadLayout::new);
    let payload = place(decode, batch, &heads, &shape)?;
    let costs = costs(&payload, &shape);
    let mut levels = Vec::new();
    let (mut scratch_bytes, mut worker_scratch_bytes, mut outputs) = (0, 0, None);
    for tuning in tunings {
        let mut planned = |graph, heads| {
            let Planned { program, shared, worker, kept } = plan_stages(graph, &shape, &payload, heads, tuning)?;
            scratch_bytes = scratch_bytes.max(shared);
            worker_scratch_bytes = worker_scratch_bytes.max(worker);
            assert_eq!(*outputs.get_or_insert(kept), kept, "all programs leave their by-products in the same places");
            Ok::<Program, PlanError>(program)
        };
        levels.push(Programs { decode: planned(decode, &heads[0])?, batch: planned(batch, &heads[1])? });
    }
    Ok(Plan {
        scratch_bytes,
        worker_scratch_bytes,
        outputs: outputs.unwrap_or_default(),
        levels,
        model: shape,
        payload,
        costs,
    })
}

/// The payload's map of a model whose two graphs these are: what [`plan`] begins with, and all that its size depends on.
///
/// # Errors
/// When the graphs disagree about a weight.
pub fn payload_map(decode: &Graph, batch: &Graph, shape: &ModelShape) -> Result<PayloadMap, PlanError> {
    place(decode, batch, &[decode, batch].map(HeadLayout::new), shape)
}

fn place(decode: &Graph, batch: &Graph, heads: &[HeadLayout; 2], shape: &ModelShape) -> Result<PayloadMap, PlanError> {
    let mut payload = PayloadMap::default();
    for (graph, heads) in [decode, batch].into_iter().zip(heads) {
        let order = places::order(graph, shape)?;
        place_weights(graph, heads, shape, order.as_deref(), &mut payload)?;
        if let Some(order) = &order {
            payload.place(expert_places(order))?;
        }
    }
    for (name, sine) in [("rope.cos", false), ("rope.sin", true)] {
        payload.place(PayloadItem {
            name: name.to_string(),
            shared: None,
            role: None,
            format: Format::F32,
            arrangement: Arrangement::RopeTable { sine },
            experts: 1,
            router: None,
            order: None,
            rows: shape.context,
            columns: padded_head_dim(shape.head_dim) / 2,
            row_heads: None,
            column_heads: None,
            offset: 0,
        })?;
    }
    Ok(payload)
}

/// The name of the table that says where experts lie.
pub(crate) const EXPERT_PLACES: &str = "experts.places";

/// The table that says where experts lie that have this order.
fn expert_places(order: &[Vec<usize>]) -> PayloadItem {
    let places = |order: &Vec<usize>| {
        let mut places = vec![0; order.len()];
        for (place, &expert) in order.iter().enumerate() {
            places[expert] = place as u32;
        }
        places
    };
    PayloadItem {
        name: EXPERT_PLACES.to_string(),
        role: None,
        format: Format::F32,
        shared: None,
        arrangement: Arrangement::ExpertPlaces { places: order.iter().map(places).collect() },
        experts: 1,
        router: None,
        order: None,
        rows: order.len(),
        columns: order.first().map_or(0, Vec::len),
        row_heads: None,
        column_heads: None,
        offset: 0,
    }
}

/// Gives every weight that a graph reads a place, in the order in which it reads them.
fn place_weights(
    graph: &Graph,
    heads: &HeadLayout,
    shape: &ModelShape,
    order: Option<&[Vec<usize>]>,
    payload: &mut PayloadMap,
) -> Result<(), PlanError> {
    for (node, choice) in graph.nodes_by_choice() {
        let op = graph.op(node);
        let Some(id) = op.weight() else { continue };
        let weight = graph.weight(id);
        let router = choice.filter(|_| weight.experts() > 1);
        let arrangement = match (op, &weight.source) {
            (Op::Embed { .. }, _) if !weight.format().is_quantized() => Arrangement::Table,
            _ if weight.shape.len() == 1 => Arrangement::Vector,
            (_, Source::Stored) => Arrangement::Tiles { parts: vec![part(weight)] },
            (_, Source::Rows(parts)) => {
                Arrangement::Tiles { parts: parts.iter().map(|&p| part(graph.weight(p))).collect() }
            }
            (_, Source::GateUp(gate, up)) => {
                let name = |id: WeightId| graph.weight(id).name.clone();
                Arrangement::GateUp { gate: name(*gate), up: name(*up) }
            }
        };
        let item = PayloadItem {
            name: weight.name.clone(),
            shared: None,
            role: Some(weight.role),
            format: format(weight, &arrangement),
            arrangement,
            experts: weight.experts(),
            router,
            order: order.zip(router).map(|(all, layer)| all[layer].clone()),
            rows: weight.rows(),
            columns: weight.columns(),
            row_heads: heads.of_rows(id),
            column_heads: heads.of_columns(id),
            offset: 0,
        };
        if !(shape.tied && weight.role == Role::Output && payload.share(&item)) {
            for item in places::divide(item, weight) {
                payload.place(item)?;
            }
        }
    }
    Ok(())
}

fn part(weight: &Weight) -> Part {
    Part { tensor: weight.name.clone(), rows: weight.rows() }
}

fn format(weight: &Weight, arrangement: &Arrangement) -> Format {
    if *arrangement == Arrangement::Vector {
        return Format::F32;
    }
    Format::of(weight.format()).expect("Weight::format resolves it")
}

/// What one decoded token reads and computes.
fn costs(payload: &PayloadMap, shape: &ModelShape) -> Costs {
    let (mut bytes, mut logits, mut multiply_adds, mut integer) = (0.0, 0.0, 0.0, 0.0);
    for item in &payload.items {
        let Some(role) = item.role else { continue };
        match item.arrangement {
            Arrangement::Table => bytes += item.row_bytes() as f64,
            Arrangement::Vector => bytes += (item.columns * 4) as f64,
            Arrangement::RopeTable { .. } | Arrangement::ExpertPlaces { .. } => {}
            Arrangement::Tiles { .. } if role == Role::Embedding && item.shared.is_none() => {
                bytes += item.tile_bytes() as f64;
            }
            Arrangement::Tiles { .. } | Arrangement::GateUp { .. } => {
                let matrices = places::matrices_of_a_token(item, shape);
                let adds = matrices * (item.rows * item.columns) as f64;
                bytes += matrices * (item.padded_rows() / moec_abi::LANES * item.tile_bytes()) as f64;
                if item.gives_logits() {
                    logits += adds;
                } else {
                    multiply_adds += adds;
                    integer += if item.format.is_quantized() { adds } else { 0.0 };
                }
            }
        }
    }
    Costs {
        decode_weight_bytes: bytes.round() as usize,
        multiply_adds_per_token: multiply_adds.round() as usize,
        multiply_adds_per_logit_row: logits.round() as usize,
        integer_dot_products: 2.0 * integer > multiply_adds,
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { scratch_bytes, worker_scratch_bytes, costs, .. } = self;
        writeln!(f, "payload {{\n{}}}", self.payload)?;
        writeln!(f, "\nscratch: {scratch_bytes} bytes shared, {worker_scratch_bytes} for each worker")?;
        writeln!(f, "kv page: {} bytes for {PAGE_TOKENS} tokens", self.page_bytes())?;
        writeln!(
            f,
            "a token: reads {} bytes of weights, {} multiply-adds and {} for its logits",
            costs.decode_weight_bytes, costs.multiply_adds_per_token, costs.multiply_adds_per_logit_row
        )?;
        for (i, level) in self.levels.iter().enumerate() {
            if self.levels.len() > 1 {
                writeln!(f, "\nlevel {i}")?;
            }
            writeln!(f, "\ndecode {{\n{}}}", level.decode)?;
            writeln!(f, "\nbatch {{\n{}}}", level.batch)?;
        }
        Ok(())
    }
}
