//! Graph → program: which kernel computes each node, on which rows, by which worker.
//!
//! One function for each operation of the graph. In `decode` (one token) everything small is done by every worker for itself, in
//! its own memory, which saves barriers; matrices are divided by rows. In `batch` small things are divided by token. Attention is
//! divided by KV head in `decode` and by token in `batch`. Experts are divided by rows of *every* expert, so that the shares are
//! equal however the tokens are routed.
//!
//! Deliberately absent: where barriers and buffers go ([`super::planner`]), the payload's map ([`super::payload`]), and matrix
//! products as such ([`super::products`]).

use super::buffers::{BufferId, Scope};
use super::heads::HeadLayout;
use super::layout::QuantizedRow;
use super::payload::{PayloadItem, PayloadMap};
use super::planner::{Place, Planner, Share, Split, call};
use super::program::{Action, Expr, Field, PlacedWeight, Program};
use super::{ModelShape, PlanError};
use crate::kernels::{
    Attention, Combine, Elementwise, ElementwiseOp, Embed, KvFormat, Norm, Outputs, Quantize, Rope, SortByExpert,
    StoreKey, StoreValue, TopK,
};
use crate::target::Tuning;
use moec_abi::{LANES, PAGE_TOKENS, ROW_ALIGN, padded_head_dim, round_up};
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
        tuning: *tuning,
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
    pub(super) tuning: Tuning,
    pub(super) planner: Planner,
    pub(super) places: HashMap<ValueId, Place>,
    /// Values whose rows, one for each (token, slot), lie by expert and not by token, with the order that they lie in.
    pub(super) by_expert: HashMap<ValueId, ValueId>,
    /// Routers planned so far: the layer of the next.
    routed: usize,
    kept: [BufferId; 3],
}

impl Stages<'_> {
    fn node(&mut self, node: NodeId) -> Result<(), PlanError> {
        let results = self.graph.results(node).to_vec();
        let result = |i: usize| results[i];
        match self.graph.op(node).clone() {
            Op::Embed { w } => self.embed(w, result(0)),
            Op::RmsNorm { x, w, eps } => self.norm(x, w, eps, None, result(0)),
            Op::NormQuantize { x, w, eps } => self.norm(x, w, eps, Some(result(0)), result(1)),
            Op::Quantize { x } => self.quantize(x, result(0)),
            Op::Matmul { x, w } => self.matmul(x, w, result(0)),
            Op::MatmulAdd { x, w, residual } => self.matmul_add(x, w, residual, result(0), node),
            Op::GateUp { x, w } => self.gate_up(x, w, result(0)),
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
            Op::Attention { q, kv, layer, heads, kv_heads, head_dim, window } => {
                self.attention(q, kv, AttentionShape { layer, heads, kv_heads, head_dim, window }, result(0))
            }
            Op::Add { a, b } => self.elementwise(ElementwiseOp::Add, &[a, b], result(0)),
            Op::Mul { a, b } => self.elementwise(ElementwiseOp::Mul, &[a, b], result(0)),
            Op::Silu { x } => self.elementwise(ElementwiseOp::Silu, &[x], result(0)),
            Op::TopK { logits, k, selection, scores } => {
                let count = self.ty(logits).columns().expect("router logits have a known length");
                let network = matches!(selection, Selection::Network);
                let kernel = TopK { experts: count, k, network, over_all: matches!(scores, Scores::All) };
                self.top_k(logits, kernel, result(0), result(1))
            }
            Op::SortByExpert { experts, count } => self.sort_by_expert(experts, count, result(0)),
            Op::ExpertMatmul { x, experts, w } => self.expert_matmul(x, experts, w, result(0)),
            Op::ExpertGateUp { x, experts, w, dispatch, order } => {
                self.expert_gate_up(x, experts, w, dispatch, order, result(0))
            }
            Op::ExpertCombine { y, weights } => self.expert_combine(y, weights, result(0)),
            Op::ExpertDownAdd { h, experts, weights, w, residual, dispatch, order } => {
                let down = super::products::Down { h, experts, weights, w, residual, dispatch, order };
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

    fn row_bytes(&self, v: ValueId) -> usize {
        match self.ty(v).kind {
            Kind::F32 | Kind::I32 => self.padded_columns(v) * WORD,
            Kind::Q8 => QuantizedRow::new(self.columns(v)).stride(),
            Kind::Kv => 0,
        }
    }

    fn is_decode(&self) -> bool {
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

    fn scope(&mut self, place: Place) -> Scope {
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

    fn named(&self, name: &str) -> (usize, &PayloadItem) {
        let found = self.payload.items.iter().enumerate().find(|(_, i)| i.name == name);
        found.unwrap_or_else(|| panic!("weight {name} is not in the payload"))
    }

    /// The address of the weight at `index` of the payload.
    pub(super) fn weight(index: usize) -> Expr {
        Expr::Weight(index)
    }

    // Small operations, row by row.

    /// Where the result of a small operation goes: each worker's own memory for the one token of `decode`, shared memory otherwise.
    pub(super) fn small(&self, rows: Rows) -> (Scope, Split) {
        match (self.is_decode(), rows) {
            (true, Rows::Tokens | Rows::Slots(_)) => (Scope::Worker, Split::Everyone),
            (false, Rows::Tokens) | (_, Rows::Logits) => (Scope::Shared, Split::Tokens),
            (false, Rows::Slots(_)) => (Scope::Shared, Split::Other),
        }
    }

    /// Appends `body` for each row that this worker does; the operation must have begun.
    pub(super) fn each_row(&mut self, rows: Rows, body: impl FnOnce(&mut Planner, &mut Vec<Action>, Expr)) {
        let mut actions = Vec::new();
        let count = self.row_count(rows);
        let share = match self.small(rows).1 {
            Split::Everyone => Share { from: Expr::Int(0), to: count },
            Split::Tokens | Split::Other => self.planner.share(&mut actions, count),
        };
        self.planner.each(&mut actions, share, 1, body);
        self.planner.push(actions);
    }

    fn embed(&mut self, w: WeightId, y: ValueId) -> Result<(), PlanError> {
        // The residual stream is written by rows of matrices later on: it is always shared.
        let place = self.allot(y, Scope::Shared);
        let (index, item) = self.item(w);
        let kernel = Embed { format: item.format, h: item.columns };
        let row_bytes = item.row_bytes();
        self.planner.begin("embed", Split::Tokens, &[], &[place.buffer]);
        let mut actions = Vec::new();
        let count = self.row_count(Rows::Tokens);
        let share = self.planner.share(&mut actions, count);
        self.planner.each(&mut actions, share, 1, |_, actions, t| {
            let token = (Expr::from(Field::TokenIds) + t.clone() * WORD).load_u32();
            actions.push(call(kernel, [Self::weight(index) + token * row_bytes, place.row(t)]));
        });
        self.planner.push(actions);
        Ok(())
    }

    fn norm(
        &mut self,
        x: ValueId,
        w: WeightId,
        eps: f32,
        quantized: Option<ValueId>,
        y: ValueId,
    ) -> Result<(), PlanError> {
        let rows = self.rows(x);
        let (scope, split) = self.small(rows);
        let keep = rows == Rows::Logits;
        let wanted = keep || quantized.is_none() || self.graph.is_used(y);
        let from = self.place(x);
        let (index, _) = self.item(w);
        let h = self.columns(x);
        let y = match (keep, wanted) {
            (true, _) => {
                let stride = self.row_bytes(y);
                Some(self.set(y, Place { buffer: self.kept[2], offset: 0, stride }))
            }
            (false, true) => Some(self.allot(y, scope)),
            (false, false) => None,
        };
        let q = quantized.map(|q| self.allot(q, scope));
        let outputs = match (y, q) {
            (Some(_), Some(_)) => Outputs::Both,
            (None, Some(_)) => Outputs::Quantized,
            (_, None) => Outputs::F32,
        };
        let kernel = Norm { h, width: h, eps_bits: eps.to_bits(), outputs };
        let writes: Vec<BufferId> = [y, q].into_iter().flatten().map(|p| p.buffer).collect();
        self.planner.begin("norm", split, &[from.buffer], &writes);
        self.each_row(rows, |_, actions, t| {
            let row = |p: Option<Place>| p.map_or(Expr::Int(0), |p| p.row(t.clone()));
            actions.push(call(kernel, [from.row(t.clone()), Self::weight(index), row(y), row(q)]));
        });
        Ok(())
    }

    pub(super) fn quantize(&mut self, x: ValueId, q: ValueId) -> Result<(), PlanError> {
        let (scope, _) = self.small(self.rows(x));
        let to = self.allot(q, scope);
        self.quantize_into(x, to);
        if let Some(&order) = self.by_expert.get(&x) {
            self.by_expert.insert(q, order);
        }
        Ok(())
    }

    /// Quantizes the rows of `x` to `to`.
    pub(super) fn quantize_into(&mut self, x: ValueId, to: Place) {
        let rows = self.rows(x);
        let (_, split) = self.small(rows);
        let from = self.place(x);
        let kernel = Quantize { k: self.columns(x) };
        self.planner.begin("quantize", split, &[from.buffer], &[to.buffer]);
        self.each_row(rows, |_, actions, t| actions.push(call(kernel, [from.row(t.clone()), to.row(t)])));
    }

    /// The rows of `x` quantized: `x` itself when it is.
    pub(super) fn quantized(&mut self, x: ValueId) -> Place {
        if self.ty(x).kind == Kind::Q8 {
            return self.place(x);
        }
        let rows = self.rows(x);
        let (scope, _) = self.small(rows);
        let stride = QuantizedRow::new(self.columns(x)).stride();
        let bytes = self.row_limit(rows) * stride;
        let buffer = self.planner.buffers().add(format!("t{}.q8", x.0), scope, bytes);
        let to = Place { buffer, offset: 0, stride };
        self.quantize_into(x, to);
        to
    }

    pub(super) fn elementwise(&mut self, op: ElementwiseOp, from: &[ValueId], to: ValueId) -> Result<(), PlanError> {
        let rows = self.rows(to);
        let (scope, split) = self.small(rows);
        let sources: Vec<Place> = from.iter().map(|&v| self.place(v)).collect();
        let to_place = self.allot(to, scope);
        let columns = self.padded_columns(to);
        let reads: Vec<BufferId> = sources.iter().map(|p| p.buffer).collect();
        self.planner.begin(op.name(), split, &reads, &[to_place.buffer]);
        self.each_row(rows, |_, actions, t| {
            let mut args: Vec<Expr> = sources.iter().map(|p| p.row(t.clone())).collect();
            args.extend([to_place.row(t), columns.into()]);
            actions.push(call(Elementwise { op }, args));
        });
        Ok(())
    }

    /// A copy of `x` in shared memory, to be changed in place.
    pub(super) fn copy_shared(&mut self, x: ValueId, to: ValueId) -> Place {
        let from = self.place(x);
        let place = self.allot(to, Scope::Shared);
        let columns = self.padded_columns(to);
        self.planner.begin("copy", Split::Tokens, &[from.buffer], &[place.buffer]);
        let mut actions = Vec::new();
        let count = self.row_count(self.rows(to));
        let share = self.planner.share(&mut actions, count);
        let kernel = Elementwise { op: ElementwiseOp::Copy };
        self.planner.each(&mut actions, share, 1, |_, actions, t| {
            actions.push(call(kernel, [from.row(t.clone()), place.row(t), columns.into()]));
        });
        self.planner.push(actions);
        place
    }

    /// The place of `residual`, to be changed in place into `y`: its own when nothing else reads it, else a copy.
    pub(super) fn in_place(&mut self, residual: ValueId, y: ValueId, node: NodeId) -> Place {
        let place = self.place(residual);
        if self.is_last_use(residual, node) && self.scope(place) == Scope::Shared {
            return self.set(y, place);
        }
        self.copy_shared(residual, y)
    }

    fn slice(&mut self, x: ValueId, start: usize, y: ValueId) -> Result<(), PlanError> {
        let from = self.place(x);
        let start = match self.heads.of(x) {
            Some(dim) => start / dim * padded_head_dim(dim),
            None => start,
        };
        if start % LANES != 0 {
            return Err(PlanError::Unsupported(format!("a slice that starts at column {start}")));
        }
        self.set(y, Place { offset: from.offset + start * WORD, ..from });
        Ok(())
    }

    fn select_rows(&mut self, x: ValueId, y: ValueId) -> Result<(), PlanError> {
        let from = self.place(x);
        let to = self.allot(y, Scope::Shared);
        let columns = self.padded_columns(y);
        self.planner.begin("select_rows", Split::Other, &[from.buffer], &[to.buffer]);
        self.each_row(Rows::Logits, |_, actions, i| {
            let row = (Expr::from(Field::LogitRows) + i.clone() * WORD).load_u32();
            let kernel = Elementwise { op: ElementwiseOp::Copy };
            actions.push(call(kernel, [from.row(row), to.row(i), columns.into()]));
        });
        Ok(())
    }

    fn output(&mut self, x: ValueId) -> Result<(), PlanError> {
        // The last product writes to the step's logits itself, so there is nothing left to do.
        debug_assert!(!self.places.contains_key(&x), "logits have no place in scratch memory");
        Ok(())
    }

    /// Whether a value is what the step returns.
    pub(super) fn is_output(&self, v: ValueId) -> bool {
        self.graph.nodes().any(|n| matches!(self.graph.op(n), Op::Output { x } if *x == v))
    }

    // Positions, rotation, keys and values.

    fn position(t: Expr) -> Expr {
        (Expr::from(Field::Positions) + t * WORD).load_u32()
    }

    /// The rows of the cosine and sine tables for a position.
    fn rotation(&self, head_dim: usize, position: &Expr) -> [Expr; 2] {
        let row = padded_head_dim(head_dim) / 2 * WORD;
        ["rope.cos", "rope.sin"].map(|name| Self::weight(self.named(name).0) + position.clone() * row)
    }

    fn rope(
        &mut self,
        x: ValueId,
        heads: usize,
        head_dim: usize,
        scale: f32,
        y: ValueId,
        node: NodeId,
    ) -> Result<(), PlanError> {
        let from = self.place(x);
        let (_, split) = self.small(Rows::Tokens);
        let place = if self.is_last_use(x, node) && self.scope(from) == self.small(Rows::Tokens).0 {
            self.set(y, from)
        } else {
            self.elementwise(ElementwiseOp::Copy, &[x], y)?;
            self.place(y)
        };
        let kernel = Rope { head_dim, scale_bits: (scale != 1.0).then(|| scale.to_bits()) };
        self.planner.begin("rope", split, &[place.buffer], &[place.buffer]);
        let tables = self.rotation(head_dim, &Expr::Int(0));
        let row = padded_head_dim(head_dim) / 2 * WORD;
        self.each_row(Rows::Tokens, |planner, actions, t| {
            let position = planner.bind(actions, Self::position(t.clone()));
            let [cos, sin] = tables.map(|table| table + position.clone() * row);
            actions.push(call(kernel, [place.row(t), cos, sin, heads.into()]));
        });
        Ok(())
    }

    /// Bytes from a page's start to the keys of `layer` and `head`; the values follow them.
    fn page_offset(&self, layer: usize, head: Expr, kv_heads: usize, head_dim: usize) -> Expr {
        let keys = PAGE_TOKENS * padded_head_dim(head_dim) * self.shape.kv.bytes();
        (head + layer * kv_heads) * (2 * keys)
    }

    fn kv_format(&self) -> KvFormat {
        match self.shape.kv {
            moec_abi::KvType::F16 => KvFormat::F16,
            moec_abi::KvType::F32 => KvFormat::F32,
        }
    }

    fn kv_store(
        &mut self,
        k: ValueId,
        v: ValueId,
        layer: usize,
        kv_heads: usize,
        head_dim: usize,
        kv: ValueId,
    ) -> Result<(), PlanError> {
        let [keys, values] = [k, v].map(|x| self.place(x));
        let pages = self.allot(kv, Scope::Shared);
        self.planner.begin("kv_store", Split::Other, &[keys.buffer, values.buffer], &[pages.buffer]);
        let mut actions = Vec::new();
        let count = self.row_count(Rows::Tokens);
        let share = self.planner.share(&mut actions, count);
        let store = self.store(layer, kv_heads, head_dim, false);
        self.planner.each(&mut actions, share, 1, |planner, actions, t| {
            let slot = store.slot(planner, actions, &t);
            let heads = Share { from: Expr::Int(0), to: kv_heads.into() };
            planner.each(actions, heads, 1, |_, actions, head| {
                let at = head.clone() * store.head_bytes;
                actions.push(store.key(&slot, head.clone(), keys.row(t.clone()) + at.clone()));
                actions.push(store.value(&slot, head, values.row(t.clone()) + at));
            });
        });
        self.planner.push(actions);
        Ok(())
    }

    fn store(&self, layer: usize, kv_heads: usize, head_dim: usize, rotate: bool) -> Store {
        let [cos, sin] = self.rotation(head_dim, &Expr::Int(0));
        Store {
            head_dim,
            kv: self.kv_format(),
            rotate,
            head_bytes: padded_head_dim(head_dim) * WORD,
            page: self.page_offset(layer, Expr::Int(0), kv_heads, head_dim),
            cos,
            sin,
        }
    }

    fn qkv_rope_store(&mut self, x: ValueId, w: WeightId, qkv: Qkv, q: ValueId, kv: ValueId) -> Result<(), PlanError> {
        let Qkv { layer, heads, kv_heads, head_dim, scale } = qkv;
        let product = self.product(x, w);
        let dim = padded_head_dim(head_dim);
        let stride = (heads + 2 * kv_heads) * dim * WORD;
        let bytes = self.row_limit(Rows::Tokens) * stride;
        let buffer = self.planner.buffers().add(format!("t{}.qkv", q.0), Scope::Shared, bytes);
        let place = self.set(q, Place { buffer, offset: 0, stride });
        let pages = self.allot(kv, Scope::Shared);
        self.planner.begin("qkv_rope_store", Split::Other, &[product.x.buffer], &[place.buffer, pages.buffer]);
        self.account(&product, 1);

        let mut actions = Vec::new();
        let share = self.planner.share(&mut actions, heads + 2 * kv_heads);
        let tiles = dim / LANES;
        let units = Share { from: share.from.clone() * tiles, to: share.to.clone() * tiles };
        let count = self.row_count(Rows::Tokens);
        self.store_product(&mut actions, &product, place, units, count.clone());

        let first_key = share.from.clone().max(heads).min(heads + kv_heads);
        let last_key = share.to.clone().max(heads).min(heads + kv_heads);
        let first_value = share.from.clone().max(heads + kv_heads);
        let planner = &mut self.planner;
        let first_key = planner.bind(&mut actions, first_key);
        let last_key = planner.bind(&mut actions, last_key);
        let first_value = planner.bind(&mut actions, first_value);
        let query_count = planner.bind(&mut actions, share.to.clone().min(heads) - share.from.clone());
        let store = self.store(layer, kv_heads, head_dim, true);
        let rope = Rope { head_dim, scale_bits: (scale != 1.0).then(|| scale.to_bits()) };
        let tokens = Share { from: Expr::Int(0), to: count };
        self.planner.each(&mut actions, tokens, 1, |planner, actions, t| {
            let slot = store.slot(planner, actions, &t);
            let row = planner.bind(actions, place.row(t));
            let queries = row.clone() + share.from.clone() * store.head_bytes;
            actions.push(call(rope, [queries, slot.cos.clone(), slot.sin.clone(), query_count]));
            let keys = Share { from: first_key, to: last_key };
            planner.each(actions, keys, 1, |_, actions, head| {
                let x = row.clone() + head.clone() * store.head_bytes;
                actions.push(store.key(&slot, head - heads, x));
            });
            let values = Share { from: first_value, to: share.to.clone() };
            planner.each(actions, values, 1, |_, actions, head| {
                let x = row.clone() + head.clone() * store.head_bytes;
                actions.push(store.value(&slot, head - (heads + kv_heads), x));
            });
        });
        self.planner.push(actions);
        Ok(())
    }

    fn attention(&mut self, q: ValueId, kv: ValueId, shape: AttentionShape, out: ValueId) -> Result<(), PlanError> {
        let AttentionShape { layer, heads, kv_heads, head_dim, window } = shape;
        let group = heads / kv_heads;
        let kernel = Attention { head_dim, group, kv: self.kv_format() };
        let from = self.place(q);
        let pages = self.place(kv);
        let to = self.allot(out, Scope::Shared);
        let scratch = self.planner.buffers().add(format!("t{}.scratch", out.0), Scope::Worker, kernel.scratch_bytes());
        self.planner.begin("attention", Split::Other, &[from.buffer, pages.buffer], &[to.buffer, scratch]);
        let head_bytes = group * padded_head_dim(head_dim) * WORD;
        let keys = PAGE_TOKENS * padded_head_dim(head_dim) * self.shape.kv.bytes();
        let first = self.page_offset(layer, Expr::Int(0), kv_heads, head_dim);
        let one = move |planner: &mut Planner, actions: &mut Vec<Action>, t: Expr, head: Expr| {
            let table = (Expr::from(Field::PageTables) + t.clone() * 8usize).load_address();
            let position = planner.bind(actions, Self::position(t.clone()));
            let end = planner.bind(actions, position + 1usize);
            let start = window.map_or(Expr::Int(0), |w| (end.clone() - w).max(0usize));
            let k = planner.bind(actions, first + head.clone() * (2 * keys));
            let at = head * head_bytes;
            let args = [
                from.row(t.clone()) + at.clone(),
                table,
                k.clone(),
                k + keys,
                start,
                end,
                to.row(t) + at,
                scratch.into(),
            ];
            actions.push(call(kernel, args));
        };
        let mut actions = Vec::new();
        if self.is_decode() {
            let share = self.planner.share(&mut actions, kv_heads);
            self.planner
                .each(&mut actions, share, 1, |planner, actions, head| one(planner, actions, Expr::Int(0), head));
        } else {
            // Later tokens see more keys, so tokens are dealt out one by one.
            let (worker, workers) = (Expr::from(Field::Worker), Expr::from(Field::Workers));
            let turns = self.row_count(Rows::Tokens) - worker.clone() + workers.clone() - 1usize;
            let turns = self.planner.bind(&mut actions, turns / workers.clone());
            let heads = Share { from: Expr::Int(0), to: kv_heads.into() };
            self.planner.each(&mut actions, heads, 1, |planner, actions, head| {
                let turns = Share { from: Expr::Int(0), to: turns };
                planner.each(actions, turns, 1, |planner, actions, turn| {
                    let t = planner.bind(actions, turn * workers + worker);
                    one(planner, actions, t, head);
                });
            });
        }
        self.planner.push(actions);
        Ok(())
    }

    // Routing.

    fn top_k(&mut self, logits: ValueId, kernel: TopK, experts: ValueId, weights: ValueId) -> Result<(), PlanError> {
        let (from, k) = (self.place(logits), kernel.k);
        let layer = self.routed;
        self.routed += 1;
        let first = layer * self.shape.max_tokens * k * WORD;
        let [routes, route_weights, _] = self.kept;
        let kept = [routes, route_weights].map(|buffer| Place { buffer, offset: first, stride: k * WORD });
        let (scope, split) = self.small(Rows::Tokens);
        let run =
            |t: Expr, to: [Place; 2]| call(kernel.clone(), [from.row(t.clone()), to[0].row(t.clone()), to[1].row(t)]);
        if scope == Scope::Worker {
            // Every worker finds out for itself; one also leaves the result for the caller.
            let own = [experts, weights].map(|v| self.allot(v, Scope::Worker));
            self.planner.begin("top_k", split, &[from.buffer], &own.map(|p| p.buffer));
            self.planner.push([run(Expr::Int(0), own)]);
            let index = Expr::from(Field::Worker);
            self.planner.touch_kept(&kept.map(|p| p.buffer));
            self.planner.push([Action::Switch { on: index, cases: vec![vec![run(Expr::Int(0), kept)]] }]);
        } else {
            self.set(experts, kept[0]);
            self.set(weights, kept[1]);
            self.planner.begin("top_k", split, &[from.buffer], &kept.map(|p| p.buffer));
            self.each_row(Rows::Tokens, |_, actions, t| actions.push(run(t, kept)));
        }
        Ok(())
    }

    fn sort_by_expert(&mut self, experts: ValueId, count: usize, order: ValueId) -> Result<(), PlanError> {
        // Every worker sorts for itself: it is little work and saves a barrier.
        let Rows::Tokens = self.rows(experts) else {
            return Err(PlanError::Unsupported("experts that are not chosen by token".to_string()));
        };
        let from = self.place(experts);
        let k = self.ty(experts).columns().expect("a known number of experts for each token");
        let pairs = self.row_limit(Rows::Slots(k)) * WORD;
        let at = super::products::Sorted::new(count, pairs);
        let buffer = self.planner.buffers().add(format!("t{}.sorted", order.0), Scope::Worker, at.bytes);
        let place = self.set(order, Place { buffer, offset: 0, stride: 0 });
        self.planner.begin("sort_by_expert", Split::Everyone, &[from.buffer], &[buffer]);
        let kernel = SortByExpert { experts: count, k };
        let tokens = self.row_count(Rows::Tokens);
        let base = place.row(Expr::Int(0));
        let args = [from.row(Expr::Int(0)), tokens, base.clone(), base.clone() + at.order, base + at.position];
        self.planner.push([call(kernel, args)]);
        Ok(())
    }

    fn expert_combine(&mut self, y: ValueId, weights: ValueId, out: ValueId) -> Result<(), PlanError> {
        let Rows::Slots(k) = self.rows(y) else {
            return Err(PlanError::Unsupported("a combination of rows without slots".to_string()));
        };
        let (scope, split) = self.small(Rows::Tokens);
        let (from, scores) = (self.place(y), self.place(weights));
        let to = self.allot(out, scope);
        let columns = self.padded_columns(out);
        let kernel = Combine { k, stride_d: from.stride, gather: false, residual: false };
        // Rows of slots are not rows of tokens: whoever wrote them divided the work otherwise.
        let split = if split == Split::Everyone { split } else { Split::Other };
        self.planner.begin("expert_combine", split, &[from.buffer, scores.buffer], &[to.buffer]);
        self.each_row(Rows::Tokens, |_, actions, t| {
            let args = [from.row(t.clone() * k), Expr::Int(0), scores.row(t.clone()), to.row(t), columns.into()];
            actions.push(call(kernel, args));
        });
        Ok(())
    }
}

/// Attributes of the fused projection.
#[derive(Clone, Copy, Debug)]
struct Qkv {
    layer: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
}

/// Attributes of attention.
#[derive(Clone, Copy, Debug)]
struct AttentionShape {
    layer: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

/// How keys and values of one layer are stored.
#[derive(Debug)]
struct Store {
    head_dim: usize,
    kv: KvFormat,
    rotate: bool,
    /// Bytes of a padded f32 head.
    head_bytes: usize,
    /// Bytes from a page's start to the layer's first keys.
    page: Expr,
    cos: Expr,
    sin: Expr,
}

/// Where one token's keys and values go.
#[derive(Debug)]
struct Slot {
    /// The page, at the layer's first keys.
    page: Expr,
    /// The token's number in its page.
    slot: Expr,
    cos: Expr,
    sin: Expr,
}

impl Store {
    fn slot(&self, planner: &mut Planner, actions: &mut Vec<Action>, t: &Expr) -> Slot {
        let position = planner.bind(actions, Stages::position(t.clone()));
        let table = (Expr::from(Field::PageTables) + t.clone() * 8usize).load_address();
        let number = planner.bind(actions, position.clone() / PAGE_TOKENS);
        let page = planner.bind(actions, (table + number.clone() * 8usize).load_address() + self.page.clone());
        let slot = planner.bind(actions, position.clone() - number * PAGE_TOKENS);
        let row = padded_head_dim(self.head_dim) / 2 * WORD;
        let [cos, sin] = [&self.cos, &self.sin].map(|table| table.clone() + position.clone() * row);
        let cos = planner.bind(actions, cos);
        let sin = planner.bind(actions, sin);
        Slot { page, slot, cos, sin }
    }

    /// Bytes of one head's keys in a page; its values take as many.
    fn keys(&self) -> usize {
        PAGE_TOKENS * padded_head_dim(self.head_dim) * self.kv.bytes()
    }

    fn key(&self, slot: &Slot, head: Expr, x: Expr) -> Action {
        let element = self.kv.bytes();
        let tile = slot.slot.clone() / LANES;
        let lane = slot.slot.clone() - tile.clone() * LANES;
        let tile = tile * (padded_head_dim(self.head_dim) * LANES * element);
        let to = slot.page.clone() + head * (2 * self.keys()) + tile + lane * element;
        let kernel = StoreKey { head_dim: self.head_dim, kv: self.kv, rotate: self.rotate };
        call(kernel, [x, slot.cos.clone(), slot.sin.clone(), to])
    }

    fn value(&self, slot: &Slot, head: Expr, x: Expr) -> Action {
        let row = padded_head_dim(self.head_dim) * self.kv.bytes();
        let to = slot.page.clone() + head * (2 * self.keys()) + self.keys() + slot.slot.clone() * row;
        call(StoreValue { head_dim: self.head_dim, kv: self.kv }, [x, to])
    }
}
