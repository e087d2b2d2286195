//! The graph of a model: one function from its configuration to the imported graph IR.
//!
//! Mixtral, Mistral and Llama differ in two places: the feed-forward block (experts behind a router, or one dense block) and the
//! sliding window. The graph is spelled out in small operations; making it fast is the passes' work. Deliberately absent:
//! positions and rotary frequencies, which are inputs of a step and tables of the payload.

use super::config::{Experts, ModelConfig};
use super::tensors::{Dtype, TensorTable};
use moec_ir::graph::{DType, Graph, Layout, Mode, Op, Role, Selection, Source, ValueId, Weight, WeightId};

/// What a graph needs to know of the stored weights.
pub trait WeightInfo {
    /// Type and shape of the weight of this name, or `None` if there is none.
    fn weight_info(&self, name: &str) -> Option<(DType, Vec<usize>)>;
}

impl WeightInfo for TensorTable {
    fn weight_info(&self, name: &str) -> Option<(DType, Vec<usize>)> {
        let info = self.info(name);
        let stored = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::Bf16,
            Dtype::F16 => DType::F16,
        };
        Some((stored, info.shape.clone()))
    }
}

/// The graph of a model in one mode, as imported.
///
/// # Panics
/// When a weight is missing or does not have the shape that the configuration calls for: import has checked both.
pub fn build_graph(config: &ModelConfig, weights: &dyn WeightInfo, mode: Mode) -> Graph {
    let mut build = Build { config, weights, graph: Graph::new(mode) };
    build.graph.set_context(config.context);
    build.model();
    build.graph
}

struct Build<'a> {
    config: &'a ModelConfig,
    weights: &'a dyn WeightInfo,
    graph: Graph,
}

impl Build<'_> {
    fn model(&mut self) {
        let config = self.config;
        let embed = self.weight("embed".into(), Role::Embedding);
        let mut x = self.one(Op::Embed { w: embed });
        for layer in 0..config.layers {
            x = self.attention(layer, x);
            x = match config.experts {
                Some(experts) => self.experts(layer, x, experts),
                None => self.dense(layer, x),
            };
        }
        let rows = self.one(Op::SelectRows { x });
        let normed = self.norm("norm".into(), rows);
        let output = self.weight("output".into(), Role::Output);
        let logits = self.one(Op::Matmul { x: normed, w: output });
        self.push(Op::Output { x: logits });
    }

    fn attention(&mut self, layer: usize, residual: ValueId) -> ValueId {
        let &ModelConfig { heads, kv_heads, head_dim, sliding_window: window, .. } = self.config;
        let x = self.norm(format!("layers.{layer}.attention_norm"), residual);
        let q = self.project(x, format!("layers.{layer}.q"), Role::Attention);
        let k = self.project(x, format!("layers.{layer}.k"), Role::Attention);
        let v = self.project(x, format!("layers.{layer}.v"), Role::Attention);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let q = self.one(Op::Rope { x: q, heads, head_dim, scale });
        let k = self.one(Op::Rope { x: k, heads: kv_heads, head_dim, scale: 1.0 });
        let kv = self.one(Op::KvStore { k, v, layer, kv_heads, head_dim });
        let y = self.one(Op::Attention { q, kv, layer, heads, kv_heads, head_dim, window });
        let o = self.project(y, format!("layers.{layer}.o"), Role::Attention);
        self.one(Op::Add { a: residual, b: o })
    }

    fn dense(&mut self, layer: usize, residual: ValueId) -> ValueId {
        let x = self.norm(format!("layers.{layer}.ffn_norm"), residual);
        let gate = self.project(x, format!("layers.{layer}.gate"), Role::Ffn);
        let up = self.project(x, format!("layers.{layer}.up"), Role::Ffn);
        let h = self.gated(gate, up);
        let down = self.project(h, format!("layers.{layer}.down"), Role::Ffn);
        self.one(Op::Add { a: residual, b: down })
    }

    fn experts(&mut self, layer: usize, residual: ValueId, experts: Experts) -> ValueId {
        let x = self.norm(format!("layers.{layer}.ffn_norm"), residual);
        let logits = self.project(x, format!("layers.{layer}.router"), Role::Router);
        let chosen = self.push(Op::TopK { logits, k: experts.per_token, selection: Selection::Scan });
        let (experts, weights) = (chosen[0], chosen[1]);
        let matrix =
            |build: &mut Self, name: &str| build.weight(format!("layers.{layer}.experts.{name}"), Role::Experts);
        let w = matrix(self, "gate");
        let gate = self.one(Op::ExpertMatmul { x, experts, w });
        let w = matrix(self, "up");
        let up = self.one(Op::ExpertMatmul { x, experts, w });
        let h = self.gated(gate, up);
        let w = matrix(self, "down");
        let down = self.one(Op::ExpertMatmul { x: h, experts, w });
        let y = self.one(Op::ExpertCombine { y: down, weights });
        self.one(Op::Add { a: residual, b: y })
    }

    fn gated(&mut self, gate: ValueId, up: ValueId) -> ValueId {
        let gate = self.one(Op::Silu { x: gate });
        self.one(Op::Mul { a: gate, b: up })
    }

    fn norm(&mut self, name: String, x: ValueId) -> ValueId {
        let w = self.weight(name, Role::Norm);
        self.one(Op::RmsNorm { x, w, eps: self.config.norm_eps })
    }

    fn project(&mut self, x: ValueId, name: String, role: Role) -> ValueId {
        let w = self.weight(name, role);
        self.one(Op::Matmul { x, w })
    }

    fn weight(&mut self, name: String, role: Role) -> WeightId {
        let Some((stored, shape)) = self.weights.weight_info(&name) else {
            panic!("bug in moec: import let a model without the weight {name} pass");
        };
        let weight = Weight { name, role, stored, layout: Layout::Stored, shape, source: Source::Stored };
        self.graph.add_weight(weight).unwrap_or_else(|e| panic!("bug in moec: {e}"))
    }

    fn push(&mut self, op: Op) -> Vec<ValueId> {
        self.graph.push(op).unwrap_or_else(|e| panic!("bug in moec: import let a model pass that has no graph: {e}"))
    }

    fn one(&mut self, op: Op) -> ValueId {
        self.push(op)[0]
    }
}
