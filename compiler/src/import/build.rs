//! The graph of a model: one function from its configuration to the imported graph IR.
//!
//! Architectures differ in parts: the feed-forward block (experts behind a router, or one dense block), biases, norms of q and k, windows. Which
//! a model has, the configuration says. The graph is spelled out in small operations; making it fast is the passes' work. Deliberately absent:
//! positions and rotary frequencies, which are inputs of a step and tables of the payload.

use super::architecture::{Activation, HeadNorm};
use super::config::{Experts, ModelConfig};
use super::dtype::Dtype;
use super::tensors::TensorTable;
use moec_ir::graph::{DType, Graph, Layout, Mode, Op, Role, Scores, Selection, Source, ValueId, Weight, WeightId};

/// What a graph needs to know of the stored weights.
pub trait WeightInfo {
    /// Type and shape of the weight of this name, or `None` if there is none.
    fn weight_info(&self, name: &str) -> Option<(DType, Vec<usize>)>;
}

impl WeightInfo for TensorTable {
    fn weight_info(&self, name: &str) -> Option<(DType, Vec<usize>)> {
        let info = self.info(name);
        let stored = match (info.exact, info.dtype) {
            (Some(exact), _) => DType::Codes(exact),
            (None, Dtype::F32) => DType::F32,
            (None, Dtype::Bf16) => DType::Bf16,
            (None, Dtype::F16) => DType::F16,
            (None, _) => DType::Packed,
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
        let mut x = self.one(Op::Embed { w: embed, scale: self.config.embedding_scale });
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
        let mut logits = self.one(Op::Matmul { x: normed, w: output });
        if let Some(cap) = config.logit_cap {
            logits = self.one(Op::SoftCap { x: logits, cap });
        }
        self.push(Op::Output { x: logits });
    }

    fn attention(&mut self, layer: usize, residual: ValueId) -> ValueId {
        let &ModelConfig { heads, kv_heads, head_dim, qkv_bias, output_bias, .. } = self.config;
        let (scale, cap) = (self.config.query_scale, self.config.score_cap);
        let x = self.norm(format!("layers.{layer}.attention_norm"), residual);
        let mut project = |name: &str| {
            let name = format!("layers.{layer}.{name}");
            let y = self.project(x, name.clone(), Role::Attention);
            self.biased(y, name, qkv_bias)
        };
        let (q, k, v) = (project("q"), project("k"), project("v"));
        let q = self.head_norm(q, format!("layers.{layer}.q_norm"), heads);
        let k = self.head_norm(k, format!("layers.{layer}.k_norm"), kv_heads);
        let q = self.one(Op::Rope { x: q, heads, head_dim, scale });
        let k = self.one(Op::Rope { x: k, heads: kv_heads, head_dim, scale: 1.0 });
        let kv = self.one(Op::KvStore { k, v, layer, kv_heads, head_dim });
        let window = self.config.window(layer);
        let y = self.one(Op::Attention { q, kv, layer, heads, kv_heads, head_dim, window, cap });
        let name = format!("layers.{layer}.o");
        let o = self.project(y, name.clone(), Role::Attention);
        let o = self.biased(o, name, output_bias);
        let o = self.post_norm(o, format!("layers.{layer}.attention_post_norm"));
        self.one(Op::Add { a: residual, b: o })
    }

    fn dense(&mut self, layer: usize, residual: ValueId) -> ValueId {
        let norm = if self.config.post_norms { "ffn_pre_norm" } else { "ffn_norm" };
        let x = self.norm(format!("layers.{layer}.{norm}"), residual);
        let y = self.block(x, format!("layers.{layer}"), self.config.ffn_bias);
        let y = self.post_norm(y, format!("layers.{layer}.ffn_post_norm"));
        self.one(Op::Add { a: residual, b: y })
    }

    /// Gate, up and down, the weights under `path`.
    fn block(&mut self, x: ValueId, path: String, bias: bool) -> ValueId {
        let mut project = |x: ValueId, name: &str| {
            let name = format!("{path}.{name}");
            let y = self.project(x, name.clone(), Role::Ffn);
            self.biased(y, name, bias)
        };
        let (gate, up) = (project(x, "gate"), project(x, "up"));
        let h = self.gated(gate, up);
        let name = format!("{path}.down");
        let y = self.project(h, name.clone(), Role::Ffn);
        self.biased(y, name, bias)
    }

    fn experts(&mut self, layer: usize, residual: ValueId, experts: Experts) -> ValueId {
        let x = self.norm(format!("layers.{layer}.ffn_norm"), residual);
        let logits = self.project(x, format!("layers.{layer}.router"), Role::Router);
        let scores = if experts.normalized { Scores::Chosen } else { Scores::All };
        let shared = experts.shared;
        let chosen = self.push(Op::TopK { logits, k: experts.per_token, selection: Selection::Scan, scores });
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
        let mut y = self.one(Op::ExpertCombine { y: down, weights });
        if shared.is_some() {
            let gate = self.project(x, format!("layers.{layer}.shared_gate"), Role::Router);
            let common = self.block(x, format!("layers.{layer}.shared"), false);
            let common = self.one(Op::GateRows { x: common, gate });
            y = self.one(Op::Add { a: y, b: common });
        }
        self.one(Op::Add { a: residual, b: y })
    }

    fn gated(&mut self, gate: ValueId, up: ValueId) -> ValueId {
        let gate = self.one(match self.config.activation {
            Activation::Silu => Op::Silu { x: gate },
            Activation::Gelu => Op::Gelu { x: gate },
        });
        self.one(Op::Mul { a: gate, b: up })
    }

    fn norm(&mut self, name: String, x: ValueId) -> ValueId {
        let w = self.weight(name, Role::Norm);
        self.one(Op::RmsNorm { x, w, eps: self.config.norm_eps })
    }

    /// What a block gives, normed if the model does that.
    fn post_norm(&mut self, y: ValueId, name: String) -> ValueId {
        if self.config.post_norms { self.norm(name, y) } else { y }
    }

    fn project(&mut self, x: ValueId, name: String, role: Role) -> ValueId {
        let w = self.weight(name, role);
        self.one(Op::Matmul { x, w })
    }

    /// `y` with the bias of the weight `name`, if it has one.
    fn biased(&mut self, y: ValueId, name: String, has: bool) -> ValueId {
        if !has {
            return y;
        }
        let w = self.weight(format!("{name}_bias"), Role::Bias);
        self.one(Op::AddBias { x: y, w })
    }

    /// `x` with its heads normed, if the model does.
    fn head_norm(&mut self, x: ValueId, name: String, heads: usize) -> ValueId {
        let Some(norm) = self.config.head_norm else { return x };
        let w = self.weight(name, Role::Norm);
        let (head_dim, eps) = (self.config.head_dim, self.config.norm_eps);
        self.one(Op::HeadNorm { x, w, heads, head_dim, eps, across: norm == HeadNorm::Across })
    }

    fn weight(&mut self, name: String, role: Role) -> WeightId {
        let Some((stored, shape)) = self.weights.weight_info(&name) else {
            panic!("bug in moec: import let a model without the weight {name} pass");
        };
        let weight =
            Weight { name, role, stored, layout: Layout::Stored, exception: None, shape, source: Source::Stored };
        self.graph.add_weight(weight).unwrap_or_else(|e| panic!("bug in moec: {e}"))
    }

    fn push(&mut self, op: Op) -> Vec<ValueId> {
        self.graph.push(op).unwrap_or_else(|e| panic!("bug in moec: import let a model pass that has no graph: {e}"))
    }

    fn one(&mut self, op: Op) -> ValueId {
        self.push(op)[0]
    }
}
