//! Runs a graph, slowly, on one sequence: the definition of the bits that compiled code must give.
//!
//! The order of every sum is fixed and written out here and in the modules below; [`crate::math`] has `exp` and SiLU. Nothing
//! depends on how tokens are divided into steps, on the mode, or on fusion. Deliberately absent: padding, pages in memory,
//! workers, and speed beyond what tests of small models need.

mod attention;
mod linear;
mod routing;
mod tensor;

pub use attention::{KvCache, KvType};
pub use tensor::{QuantizedRows, Tensor, padded_head_dim};

use std::collections::BTreeMap;

use self::linear::{Matrix, add_rows, expert_rows, gated, multiply};
use self::tensor::{columns_of, rows_of};
use super::attribute::Activation;
use super::op::Op;
use super::store::Graph;
use super::types::{Dim, Mode, NodeId, ValueId, WeightId};
use super::weight::{Layout, Source, Weight};

/// The numbers of a stored weight, in the layout that was asked for.
#[derive(Clone, PartialEq, Debug)]
pub enum Numbers {
    /// Row after row, of all experts. Rounded to the layout's type, if that is not the stored one.
    Float(Vec<f32>),
    /// Quantized.
    Codes {
        /// Row after row, of all experts, each row padded to a multiple of 32: value + 128 (those of 4 bits as their code book gives them), or
        /// the code itself in a layout with offsets.
        codes: Vec<u8>,
        /// For each row and each [`Layout::scale_columns`] of its codes.
        scales: Vec<f32>,
        /// As many as scales in a layout with offsets; else nothing.
        offsets: Vec<f32>,
    },
}

/// Where an evaluator takes numbers from.
pub trait WeightSource {
    /// The numbers of a weight whose source is [`Source::Stored`], in `layout`, which is resolved. A quantized weight whose columns
    /// are divided into heads of `heads` elements has, for each head, [`padded_head_dim`] columns: its first half from the first on,
    /// its second from the middle on, the others zero.
    ///
    /// # Errors
    /// A sentence for people.
    fn numbers(&self, weight: &Weight, layout: Layout, heads: Option<usize>) -> Result<Numbers, String>;

    /// Cosines and sines of a position: one of each for every pair of elements of a head.
    fn rotation(&self, position: usize, cos: &mut [f32], sin: &mut [f32]);
}

/// What went wrong in an evaluation.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EvalError {
    /// The source has no such numbers.
    #[error("weight @{name}: {why}")]
    Weight {
        /// The weight.
        name: String,
        /// The source's words, or what is wrong with its answer.
        why: String,
    },
    /// The inputs of a step do not fit the graph.
    #[error("{0}")]
    Step(String),
}

/// The experts that one layer chose.
#[derive(Clone, PartialEq, Debug)]
pub struct Routes {
    /// For each token its experts, falling by weight.
    pub experts: Vec<Vec<usize>>,
    /// The weights of these experts.
    pub weights: Vec<Vec<f32>>,
}

/// What a step gives.
#[derive(Clone, PartialEq, Debug)]
pub struct Outputs {
    /// A row for each of the rows asked for.
    pub logits: Vec<Vec<f32>>,
    /// For each router, in order of the layers, the choices for every token of the step.
    pub routes: Vec<Routes>,
    /// The normed rows that the logits are computed from.
    pub hidden: Vec<Vec<f32>>,
}

/// A graph with its numbers and the cache of one sequence.
#[derive(Clone, Debug)]
pub struct Evaluator {
    graph: Graph,
    matrices: BTreeMap<(WeightId, Layout), Matrix>,
    rotations: Vec<(Vec<f32>, Vec<f32>)>,
    /// The size of the heads that the rows of some values are divided into.
    heads: BTreeMap<ValueId, usize>,
    /// Experts that the routers of the next step have to choose, in order of the layers.
    forced: Option<Vec<Routes>>,
    /// Keys and values of the sequence so far. May be moved to the evaluator of another graph of the same model.
    pub cache: KvCache,
}

/// The inputs of a step.
struct Inputs<'a> {
    tokens: &'a [u32],
    positions: &'a [usize],
    logit_rows: &'a [usize],
}

impl Evaluator {
    /// Takes the numbers of every weight that the graph reads. Rotations are taken for positions below `context`.
    ///
    /// # Errors
    /// When the source does not have a weight, or has it in another size.
    pub fn new(graph: &Graph, weights: &dyn WeightSource, context: usize, kv: KvType) -> Result<Evaluator, EvalError> {
        let mut matrices = BTreeMap::new();
        let mut head_dim = 0;
        let heads = heads(graph);
        for node in graph.nodes() {
            if let Some(weight) = graph.op(node).weight() {
                let x = graph.op(node).values().first().and_then(|x| heads.get(x)).copied();
                for layout in graph.weight(weight).formats() {
                    load(graph, weights, weight, layout, x.filter(|_| layout.is_quantized()), &mut matrices)?;
                }
            }
            if let Op::Rope { head_dim: dim, .. } | Op::QkvRopeStore { head_dim: dim, .. } = graph.op(node) {
                head_dim = *dim;
            }
        }
        let rotation = |position| {
            let (mut cos, mut sin) = (vec![0.0; head_dim / 2], vec![0.0; head_dim / 2]);
            weights.rotation(position, &mut cos, &mut sin);
            (cos, sin)
        };
        let rotations = (0..context).map(rotation).collect();
        Ok(Evaluator { graph: graph.clone(), matrices, rotations, heads, forced: None, cache: KvCache::new(kv) })
    }

    /// The graph that is evaluated.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Lets the routers of the next step choose the experts of `routes` (in order of the layers, for each token of the step), whatever their logits
    /// say; these still weigh the experts. So models that differ by rounding are compared without the leaps of a choice between near equals.
    pub fn force(&mut self, routes: Vec<Routes>) {
        self.forced = Some(routes);
    }

    /// Runs the tokens at these positions, and gives the logits of `logit_rows` (indices of tokens).
    ///
    /// # Errors
    /// When tokens, positions and rows do not fit each other, the vocabulary or the context.
    pub fn step(&mut self, tokens: &[u32], positions: &[usize], logit_rows: &[usize]) -> Result<Outputs, EvalError> {
        self.step_with(tokens, positions, logit_rows, &mut |_, _| {})
    }

    /// Like [`Evaluator::step`]; `observe` sees every value as it is computed.
    ///
    /// # Errors
    /// As for [`Evaluator::step`].
    pub fn step_with(
        &mut self,
        tokens: &[u32],
        positions: &[usize],
        logit_rows: &[usize],
        observe: &mut dyn FnMut(ValueId, &Tensor),
    ) -> Result<Outputs, EvalError> {
        let inputs = Inputs { tokens, positions, logit_rows };
        self.check(&inputs)?;
        let graph = self.graph.clone();
        let last_use = last_uses(&graph);
        let mut values: BTreeMap<ValueId, Tensor> = BTreeMap::new();
        let mut outputs = Outputs { logits: Vec::new(), routes: Vec::new(), hidden: Vec::new() };
        self.check_forced(tokens.len())?;
        for node in graph.nodes() {
            let results = self.node(&graph, node, &values, &inputs, &mut outputs);
            for (&id, result) in graph.results(node).iter().zip(results) {
                observe(id, &result);
                values.insert(id, result);
            }
            values.retain(|id, _| last_use.get(id).is_some_and(|&last| last != node));
        }
        self.forced = None;
        Ok(outputs)
    }

    /// Whether the experts that are forced are as many as every router chooses, and exist.
    fn check_forced(&self, tokens: usize) -> Result<(), EvalError> {
        let Some(forced) = &self.forced else { return Ok(()) };
        let routers: Vec<(usize, usize)> = self
            .graph
            .nodes()
            .filter_map(|node| {
                let Op::TopK { logits, k, .. } = *self.graph.op(node) else { return None };
                Some((columns_of(self.graph.ty(logits)), k))
            })
            .collect();
        let fits = |(routes, (experts, k)): (&Routes, &(usize, usize))| {
            let row = |row: &Vec<usize>| row.len() == *k && row.iter().all(|expert| expert < experts);
            routes.experts.len() == tokens && routes.experts.iter().all(row)
        };
        if forced.len() != routers.len() || !forced.iter().zip(&routers).all(fits) {
            return Err(EvalError::Step(format!(
                "the experts that are forced are not those of {} routers",
                routers.len()
            )));
        }
        Ok(())
    }

    fn check(&self, inputs: &Inputs) -> Result<(), EvalError> {
        let fail = |text: String| Err(EvalError::Step(text));
        let &Inputs { tokens, positions, logit_rows } = inputs;
        if tokens.len() != positions.len() {
            return fail(format!("{} tokens, but {} positions", tokens.len(), positions.len()));
        }
        if tokens.is_empty() {
            return fail("a step takes at least one token".into());
        }
        if self.graph.mode() == Mode::Decode && tokens.len() != 1 {
            return fail(format!("a decode graph takes one token, found {}", tokens.len()));
        }
        let mut expected = self.cache.len();
        for &position in positions {
            if position > expected || position >= self.rotations.len() {
                let context = self.rotations.len();
                return fail(format!("position {position} after {expected} tokens, in a context of {context}"));
            }
            expected = expected.max(position + 1);
        }
        if let Some(row) = logit_rows.iter().find(|&&row| row >= tokens.len()) {
            return fail(format!("logits of row {row} of {} tokens", tokens.len()));
        }
        for node in self.graph.nodes() {
            if let &Op::Embed { w, .. } = self.graph.op(node) {
                let vocab = self.graph.weight(w).rows();
                if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
                    return fail(format!("token {token} of a vocabulary of {vocab}"));
                }
            }
        }
        Ok(())
    }

    /// The matrices that a weight's rows come from, in order.
    fn parts(&self, w: WeightId) -> Vec<&Matrix> {
        leaves(&self.graph, w).into_iter().map(|leaf| &self.matrices[&(leaf, self.graph.weight(w).format())]).collect()
    }

    /// For each matrix that a weight's rows come from, the one of each expert, in its layout.
    fn expert_parts(&self, w: WeightId) -> Vec<Vec<&Matrix>> {
        let weight = self.graph.weight(w);
        let of_leaf = |leaf| (0..weight.experts()).map(|e| &self.matrices[&(leaf, weight.format_of(e))]).collect();
        leaves(&self.graph, w).into_iter().map(of_leaf).collect()
    }

    /// Gate and up.
    fn gate_up(&self, w: WeightId) -> (&Matrix, &Matrix) {
        match self.parts(w).as_slice() {
            [gate, up] => (gate, up),
            parts => panic!("a gate_up has two parts, found {}", parts.len()),
        }
    }

    fn node(
        &mut self,
        graph: &Graph,
        node: NodeId,
        values: &BTreeMap<ValueId, Tensor>,
        inputs: &Inputs,
        outputs: &mut Outputs,
    ) -> Vec<Tensor> {
        let f32s = |v: &ValueId| values[v].f32s();
        let i32s = |v: &ValueId| values[v].i32s();
        let rows = |v: &ValueId| rows_of(graph.ty(*v), &values[v], self.heads.get(v).copied());
        match graph.op(node) {
            Op::Embed { w, scale } => {
                let mut rows = self.parts(*w)[0].rows(inputs.tokens.iter().map(|&t| t as usize));
                if let Some(scale) = scale {
                    rows.iter_mut().for_each(|x| *x *= scale);
                }
                vec![Tensor::F32(rows)]
            }
            Op::RmsNorm { x, w, eps } => {
                let normed = linear::rms_norm(f32s(x), self.parts(*w)[0].f32s(), *eps);
                outputs.hidden = hidden(graph, *x, &normed).unwrap_or(std::mem::take(&mut outputs.hidden));
                vec![Tensor::F32(normed)]
            }
            Op::NormQuantize { x, w, eps } => {
                let normed = linear::rms_norm(f32s(x), self.parts(*w)[0].f32s(), *eps);
                outputs.hidden = hidden(graph, *x, &normed).unwrap_or(std::mem::take(&mut outputs.hidden));
                vec![
                    Tensor::Q8(QuantizedRows::new(&normed, columns_of(graph.ty(*x)), None, graph.row_content().span)),
                    Tensor::F32(normed),
                ]
            }
            Op::Quantize { x } => {
                vec![Tensor::Q8(QuantizedRows::new(
                    f32s(x),
                    columns_of(graph.ty(*x)),
                    self.heads.get(x).copied(),
                    graph.row_content().span,
                ))]
            }
            Op::Matmul { x, w } => vec![Tensor::F32(multiply(&rows(x), &self.parts(*w)))],
            Op::MatmulAdd { x, w, residual } => {
                vec![Tensor::F32(add_rows(f32s(residual), &multiply(&rows(x), &self.parts(*w))))]
            }
            Op::GateUp { x, w, activation } => {
                let (gate, up) = self.gate_up(*w);
                let rows = rows(x);
                vec![Tensor::F32(gated(*activation, &multiply(&rows, &[gate]), &multiply(&rows, &[up])))]
            }
            Op::AddBias { x, w } => vec![Tensor::F32(linear::add_bias(f32s(x), self.parts(*w)[0].f32s()))],
            Op::HeadNorm { x, w, heads, head_dim, eps, across } => {
                let normed = if *across { *heads } else { 1 };
                vec![Tensor::F32(linear::head_norm(f32s(x), self.parts(*w)[0].f32s(), normed, *head_dim, *eps))]
            }
            Op::GateRows { x, gate } => {
                vec![Tensor::F32(linear::gate_rows(f32s(x), f32s(gate), columns_of(graph.ty(*x))))]
            }
            Op::Rope { x, heads: _, head_dim, scale } => {
                vec![Tensor::F32(self.rotate(f32s(x), inputs.positions, *head_dim, *scale))]
            }
            Op::KvStore { k, v, layer, .. } => {
                self.cache.store(*layer, inputs.positions, f32s(k), f32s(v));
                vec![Tensor::Kv]
            }
            Op::QkvRopeStore { x, w, layer, heads, kv_heads, head_dim, scale } => {
                let all = multiply(&rows(x), &self.parts(*w));
                let columns = (heads + 2 * kv_heads) * head_dim;
                let part =
                    |start: usize, heads: usize| linear::slice(&all, columns, start * head_dim, heads * head_dim);
                let (q, k, v) = (part(0, *heads), part(*heads, *kv_heads), part(heads + kv_heads, *kv_heads));
                let k = self.rotate(&k, inputs.positions, *head_dim, 1.0);
                self.cache.store(*layer, inputs.positions, &k, &v);
                vec![Tensor::F32(self.rotate(&q, inputs.positions, *head_dim, *scale)), Tensor::Kv]
            }
            Op::Attention { q, kv: _, layer, heads, kv_heads, head_dim, window, cap } => {
                let (heads, kv_heads, head_dim) = (*heads, *kv_heads, *head_dim);
                let shape = attention::Shape { heads, kv_heads, head_dim, window: *window, cap: *cap };
                vec![Tensor::F32(self.cache.attend(*layer, shape, inputs.positions, f32s(q)))]
            }
            Op::Add { a, b } => vec![Tensor::F32(add_rows(f32s(a), f32s(b)))],
            Op::Mul { a, b } => vec![Tensor::F32(f32s(a).iter().zip(f32s(b)).map(|(a, b)| a * b).collect())],
            Op::Silu { x } => vec![Tensor::F32(f32s(x).iter().map(|&x| Activation::Silu.apply(x)).collect())],
            Op::Gelu { x } => vec![Tensor::F32(f32s(x).iter().map(|&x| Activation::Gelu.apply(x)).collect())],
            Op::SoftCap { x, cap } => {
                vec![Tensor::F32(f32s(x).iter().map(|&x| crate::math::soft_cap(x, *cap)).collect())]
            }
            Op::Slice { x, start, len } => {
                vec![Tensor::F32(linear::slice(f32s(x), columns_of(graph.ty(*x)), *start, *len))]
            }
            Op::TopK { logits, k, selection: _, scores } => {
                let columns = columns_of(graph.ty(*logits));
                let chosen = match &self.forced {
                    Some(forced) => forced[outputs.routes.len()].experts.clone(),
                    None => routing::largest(f32s(logits), columns, *k),
                };
                let (experts, weights) = routing::weigh(f32s(logits), columns, &chosen, *scores);
                outputs.routes.push(Routes {
                    experts: experts.chunks(*k).map(|row| row.iter().map(|&e| e as usize).collect()).collect(),
                    weights: weights.chunks(*k).map(<[f32]>::to_vec).collect(),
                });
                vec![Tensor::I32(experts), Tensor::F32(weights)]
            }
            Op::SortByExpert { experts, count: _ } => vec![Tensor::I32(routing::sort_by_expert(i32s(experts)))],
            Op::ExpertMatmul { x, experts, w } => {
                vec![Tensor::F32(expert_rows(&rows(x), i32s(experts), &self.expert_parts(*w)[0]))]
            }
            Op::ExpertGateUp { x, experts, w, activation, dispatch: _, order: _ } => {
                let (rows, experts, parts) = (rows(x), i32s(experts), self.expert_parts(*w));
                let product = |part: &Vec<&Matrix>| expert_rows(&rows, experts, part);
                vec![Tensor::F32(gated(*activation, &product(&parts[0]), &product(&parts[1])))]
            }
            Op::ExpertCombine { y, weights } => {
                vec![Tensor::F32(routing::combine(
                    f32s(y),
                    f32s(weights),
                    columns_of(graph.ty(*weights)),
                    columns_of(graph.ty(*y)),
                ))]
            }
            Op::ExpertDownAdd { h, experts, weights, w, residual, dispatch: _, order: _ } => {
                let down = expert_rows(&rows(h), i32s(experts), &self.expert_parts(*w)[0]);
                let k = columns_of(graph.ty(*weights));
                let y = routing::combine(&down, f32s(weights), k, columns_of(graph.ty(*residual)));
                vec![Tensor::F32(add_rows(f32s(residual), &y))]
            }
            Op::SelectRows { x } => {
                let (all, columns) = (f32s(x), columns_of(graph.ty(*x)));
                let row = |&row: &usize| &all[row * columns..(row + 1) * columns];
                vec![Tensor::F32(inputs.logit_rows.iter().flat_map(row).copied().collect())]
            }
            Op::Output { x } => {
                outputs.logits = f32s(x).chunks(columns_of(graph.ty(*x))).map(<[f32]>::to_vec).collect();
                vec![]
            }
        }
    }

    fn rotate(&self, x: &[f32], positions: &[usize], head_dim: usize, scale: f32) -> Vec<f32> {
        attention::rotate(x, positions, head_dim, scale, &self.rotations)
    }
}

/// The rows of a norm, when they are those that logits are computed from.
fn hidden(graph: &Graph, x: ValueId, normed: &[f32]) -> Option<Vec<Vec<f32>>> {
    let ty = graph.ty(x);
    (ty.shape.first() == Some(&Dim::LogitRows)).then(|| normed.chunks(columns_of(ty)).map(<[f32]>::to_vec).collect())
}

/// Values that are made of heads and multiplied: what attention gives, and the same quantized. Heads are padded in memory, so blocks
/// of 32 and 64 are counted in padded rows.
fn heads(graph: &Graph) -> BTreeMap<ValueId, usize> {
    let mut heads = BTreeMap::new();
    for node in graph.nodes() {
        let result = graph.results(node).first().copied();
        let dim = if let Op::Attention { head_dim, .. } = graph.op(node) {
            Some(*head_dim)
        } else if let Op::Quantize { x } = graph.op(node) {
            heads.get(x).copied()
        } else {
            None
        };
        heads.extend(result.zip(dim));
    }
    heads
}

/// The last reader of each value.
fn last_uses(graph: &Graph) -> BTreeMap<ValueId, NodeId> {
    let mut last = BTreeMap::new();
    for node in graph.nodes() {
        for value in graph.op(node).values() {
            last.insert(value, node);
        }
    }
    last
}

/// The stored weights behind a weight, in order.
fn leaves(graph: &Graph, w: WeightId) -> Vec<WeightId> {
    match &graph.weight(w).source {
        Source::Stored => vec![w],
        Source::Rows(parts) => parts.iter().flat_map(|&part| leaves(graph, part)).collect(),
        Source::GateUp(gate, up) => [gate, up].into_iter().flat_map(|&part| leaves(graph, part)).collect(),
    }
}

fn load(
    graph: &Graph,
    weights: &dyn WeightSource,
    w: WeightId,
    layout: Layout,
    heads: Option<usize>,
    matrices: &mut BTreeMap<(WeightId, Layout), Matrix>,
) -> Result<(), EvalError> {
    for leaf in leaves(graph, w) {
        if matrices.contains_key(&(leaf, layout)) {
            continue;
        }
        let weight = graph.weight(leaf);
        let error = |why: String| EvalError::Weight { name: weight.name.clone(), why };
        let numbers = weights.numbers(weight, layout, heads).map_err(error)?;
        let matrix = Matrix::new(weight, layout, heads, graph.row_content().span, numbers).map_err(error)?;
        matrices.insert((leaf, layout), matrix);
    }
    Ok(())
}
