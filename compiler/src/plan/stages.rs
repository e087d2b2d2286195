//! Graph → program: which kernel computes each node, on which rows, by which worker.
//!
//! [`Stages`] goes through the nodes in order and knows where each value lies. What an operation becomes is in the file of its kind:
//! [`super::rows`], [`super::products`], [`super::experts`], [`super::attention`], [`super::routing`]. In `decode` (one token) everything small is done by every worker for itself, in
//! its own memory, which saves barriers; matrices are divided by rows. In `batch` small things are divided by token. Attention is
//! divided by query head in `decode`, by KV head and a few tokens in `batch`. Experts are divided by rows of *every* expert, so that the shares are
//! equal however the tokens are routed.
//!
//! Deliberately absent: where barriers and buffers go ([`super::planner`]), and the payload's map ([`super::payload`]).

use super::attention::{AttentionShape, Qkv};
use super::buffers::{BufferId, Scope};
use super::heads::HeadLayout;
use super::layout::QuantizedRow;
use super::payload::{PayloadItem, PayloadMap};
use super::planner::{Place, Planner};
use super::program::{Expr, Field, PlacedWeight, Program};
use super::{ModelShape, PlanError};
use crate::kernels::{ElementwiseOp, TopK};
use crate::target::Tuning;
use moec_abi::{ROW_ALIGN, padded_head_dim, round_up};
use moec_ir::graph::{Dim, Graph, Kind, Mode, NodeId, Op, Scores, Selection, Type, ValueId, WeightId};
use std::collections::HashMap;

/// Bytes of an f32 or u32.
pub(super) const WORD: usize = 4;

/// Offsets in shared scratch of what a step leaves behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    /// Chosen experts, u32 `[layers][max_tokens][k]`.
    pub routes: usize,
    /// Their weights, f32, same shape.
    pub route_weights: usize,
    /// The normalized rows that logits are computed from, f32 `[max_tokens][hidden padded]`.
    pub final_hidden: usize,
}

/// A planned program and its memory.
#[derive(Debug)]
pub struct Planned {
    /// The program.
    pub program: Program,
    /// Bytes of shared scratch.
    pub shared: usize,
    /// Bytes of each worker's scratch.
    pub worker: usize,
    /// Where the step's by-products lie.
    pub kept: Kept,
}

/// Plans one graph, whose weights are all in `payload`.
///
/// # Errors
/// When the graph uses a combination of operations that no kernel computes.
pub fn plan_stages(
    graph: &Graph,
    shape: &ModelShape,
    payload: &PayloadMap,
    heads: &HeadLayout,
    tuning: &Tuning,
) -> Result<Planned, PlanError> {
    let weights = payload.items.iter().map(|i| PlacedWeight { name: i.name.clone(), offset: i.offset }).collect();
    let mut planner = Planner::new(weights);
    // Created first and pinned, so that they lie at the same offsets in both programs.
    let k = shape.experts_per_token;
    let routes = planner.buffers().add("routes", Scope::Shared, shape.layers * shape.max_tokens * k * WORD);
    let route_weights =
        planner.buffers().add("route_weights", Scope::Shared, shape.layers * shape.max_tokens * k * WORD);
    let hidden = round_up(shape.hidden, ROW_ALIGN) * WORD;
    let final_hidden = planner.buffers().add("final_hidden", Scope::Shared, shape.max_tokens * hidden);
    let kept = [routes, route_weights, final_hidden];
    for id in kept {
        planner.buffers().pin(id);
    }
    let mut stages = Stages {
        graph,
        shape,
        payload,
        heads,
        tuning,
        planner,
        places: HashMap::new(),
        by_expert: HashMap::new(),
        routed: 0,
        kept,
    };
    for node in graph.nodes() {
        stages.node(node)?;
    }
    let (program, shared, worker) = stages.planner.finish();
    let [routes, route_weights, final_hidden] = kept.map(|id| program.buffers.all[id.0].offset);
    Ok(Planned { program, shared, worker, kept: Kept { routes, route_weights, final_hidden } })
}

/// The rows of a value, outermost extents multiplied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rows {
    /// One for each token.
    Tokens,
    /// One for each row of logits.
    Logits,
    /// So many for each token.
    Slots(usize),
}

pub(super) struct Stages<'a> {
    pub(super) graph: &'a Graph,
    pub(super) shape: &'a ModelShape,
    pub(super) payload: &'a PayloadMap,
    pub(super) heads: &'a HeadLayout,
    pub(super) tuning: &'a Tuning,
    pub(super) planner: Planner,
    pub(super) places: HashMap<ValueId, Place>,
    /// Values whose rows, one for each (token, slot), lie by expert and not by token, with the order that they lie in.
    pub(super) by_expert: HashMap<ValueId, ValueId>,
    /// Routers planned so far: the layer of the next.
    pub(super) routed: usize,
    pub(super) kept: [BufferId; 3],
}

impl Stages<'_> {
    fn node(&mut self, node: NodeId) -> Result<(), PlanError> {
        let results = self.graph.results(node).to_vec();
        let result = |i: usize| results[i];
        match self.graph.op(node).clone() {
            Op::Embed { w, scale } => self.embed(w, scale, result(0)),
            Op::RmsNorm { x, w, eps } => self.norm(x, w, eps, None, result(0)),
            Op::NormQuantize { x, w, eps } => self.norm(x, w, eps, Some(result(0)), result(1)),
            Op::Quantize { x } => self.quantize(x, result(0)),
            Op::Matmul { x, w } => self.matmul(x, w, result(0)),
            Op::MatmulAdd { x, w, residual } => self.matmul_add(x, w, residual, result(0), node),
            Op::GateUp { x, w, activation } => self.gate_up(x, w, activation, result(0)),
            Op::QkvRopeStore { x, w, layer, heads, kv_heads, head_dim, scale } => {
                let qkv = Qkv { layer, heads, kv_heads, head_dim, scale };
                self.qkv_rope_store(x, w, qkv, result(0), result(1))
            }
            Op::Slice { x, start, .. } => self.slice(x, start, result(0)),
            Op::AddBias { x, w } => self.add_bias(x, w, result(0)),
            Op::HeadNorm { x, w, heads, head_dim, eps, across } => {
                self.head_norm(x, w, if across { 1 } else { heads }, heads * head_dim, eps, result(0))
            }
            Op::GateRows { x, gate } => self.gate_rows(x, gate, result(0)),
            Op::Rope { x, heads, head_dim, scale } => self.rope(x, heads, head_dim, scale, result(0), node),
            Op::KvStore { k, v, layer, kv_heads, head_dim } => {
                self.kv_store(k, v, layer, kv_heads, head_dim, result(0))
            }
            Op::Attention { q, kv, layer, heads, kv_heads, head_dim, window, cap } => {
                self.attention(q, kv, AttentionShape { layer, heads, kv_heads, head_dim, window, cap }, result(0))
            }
            Op::Add { a, b } => self.elementwise(ElementwiseOp::Add, &[a, b], result(0)),
            Op::Mul { a, b } => self.elementwise(ElementwiseOp::Mul, &[a, b], result(0)),
            Op::Silu { x } => self.elementwise(ElementwiseOp::Silu, &[x], result(0)),
            Op::Gelu { x } => self.elementwise(ElementwiseOp::Gelu, &[x], result(0)),
            Op::SoftCap { x, cap } => self.soft_cap(x, cap, result(0)),
            Op::TopK { logits, k, selection, scores } => {
                let count = self.ty(logits).columns().expect("router logits have a known length");
                let network = matches!(selection, Selection::Network);
                let kernel = TopK { experts: count, k, network, over_all: matches!(scores, Scores::All) };
                self.top_k(logits, kernel, result(0), result(1))
            }
            Op::SortByExpert { experts, count } => self.sort_by_expert(experts, count, result(0)),
            Op::ExpertMatmul { x, experts, w } => self.expert_matmul(x, experts, w, result(0)),
            Op::ExpertGateUp { x, experts, w, activation, dispatch, order } => {
                self.expert_gate_up(x, experts, w, activation, (dispatch, order), result(0))
            }
            Op::ExpertCombine { y, weights } => self.expert_combine(y, weights, result(0)),
            Op::ExpertDownAdd { h, experts, weights, w, residual, dispatch, order } => {
                let down = super::experts::Down { h, experts, weights, w, residual, dispatch, order };
                self.expert_down_add(&down, result(0), node)
            }
            Op::SelectRows { x } => self.select_rows(x, result(0)),
            Op::Output { x } => self.output(x),
        }
    }

    // Values and places.

    pub(super) fn ty(&self, v: ValueId) -> &Type {
        self.graph.ty(v)
    }

    pub(super) fn rows(&self, v: ValueId) -> Rows {
        let shape = &self.ty(v).shape;
        match (shape.first(), shape.get(1)) {
            (Some(Dim::LogitRows), _) => Rows::Logits,
            (_, Some(Dim::Fixed(k))) if shape.len() == 3 => Rows::Slots(*k),
            _ => Rows::Tokens,
        }
    }

    /// Elements of a row as laid out.
    pub(super) fn columns(&self, v: ValueId) -> usize {
        let columns = self.ty(v).columns().expect("planned values have rows of a known length");
        match self.heads.of(v) {
            Some(dim) => columns / dim * padded_head_dim(dim),
            None => columns,
        }
    }

    /// Elements of a row with its padding.
    pub(super) fn padded_columns(&self, v: ValueId) -> usize {
        round_up(self.columns(v), ROW_ALIGN)
    }

    pub(super) fn row_bytes(&self, v: ValueId) -> usize {
        match self.ty(v).kind {
            Kind::F32 | Kind::I32 => self.padded_columns(v) * WORD,
            Kind::Q8 => QuantizedRow::new(self.columns(v), self.graph.row_content()).stride(),
            Kind::Kv => 0,
        }
    }

    pub(super) fn is_decode(&self) -> bool {
        self.graph.mode() == Mode::Decode
    }

    /// Most rows that a value can have.
    pub(super) fn row_limit(&self, rows: Rows) -> usize {
        let tokens = if self.is_decode() { 1 } else { self.shape.max_tokens };
        match rows {
            Rows::Tokens | Rows::Logits => tokens,
            Rows::Slots(k) => tokens * k,
        }
    }

    /// How many rows a value has in a step.
    pub(super) fn row_count(&self, rows: Rows) -> Expr {
        let tokens = if self.is_decode() { Expr::Int(1) } else { Field::Tokens.into() };
        match rows {
            Rows::Tokens => tokens,
            Rows::Logits => Field::LogitCount.into(),
            Rows::Slots(k) => tokens * k,
        }
    }

    /// A place for a new value in `scope`.
    pub(super) fn allot(&mut self, v: ValueId, scope: Scope) -> Place {
        let stride = self.row_bytes(v);
        let bytes = self.row_limit(self.rows(v)) * stride;
        let buffer = self.planner.buffers().add(format!("t{}", v.0), scope, bytes);
        self.set(v, Place { buffer, offset: 0, stride })
    }

    pub(super) fn set(&mut self, v: ValueId, place: Place) -> Place {
        self.places.insert(v, place);
        place
    }

    pub(super) fn place(&self, v: ValueId) -> Place {
        self.places[&v]
    }

    pub(super) fn scope(&mut self, place: Place) -> Scope {
        self.planner.buffers().all[place.buffer.0].scope
    }

    /// Whether `node` is the last to read `v`.
    pub(super) fn is_last_use(&self, v: ValueId, node: NodeId) -> bool {
        self.graph.nodes().rev().find(|&n| self.graph.op(n).values().contains(&v)) == Some(node)
    }

    pub(super) fn item(&self, w: WeightId) -> (usize, &PayloadItem) {
        let name = &self.graph.weight(w).name;
        self.named(name)
    }

    pub(super) fn named(&self, name: &str) -> (usize, &PayloadItem) {
        let index = self.payload.find(name).unwrap_or_else(|| panic!("weight {name} is not in the payload"));
        (index, &self.payload.items[index])
    }

    /// The address of the weight at `index` of the payload.
    pub(super) fn weight(index: usize) -> Expr {
        Expr::Weight(index)
    }

    fn output(&mut self, x: ValueId) -> Result<(), PlanError> {
        // The last product writes to the step's logits itself, so there is nothing left to do.
        debug_assert!(!self.places.contains_key(&x), "logits have no place in scratch memory");
        Ok(())
    }

    /// Whether a value is what the step returns, or becomes it in its place: then it lies in the step's logits.
    pub(super) fn is_output(&self, v: ValueId) -> bool {
        match self.graph.uses(v).as_slice() {
            &[reader] => match self.graph.op(reader) {
                Op::Output { .. } => true,
                Op::SoftCap { .. } => self.is_output(self.graph.results(reader)[0]),
                _ => false,
            },
            readers => readers.iter().any(|&reader| matches!(self.graph.op(reader), Op::Output { .. })),
        }
    }
}
