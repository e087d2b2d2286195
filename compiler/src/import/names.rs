//! Which stored tensor holds which weight: the naming schemes of model files, against moec's names.
//!
//! [`weights`] lists what a configuration calls for, [`HUGGING_FACE`] and [`GGUF`] say where it may be stored. Several weights may be rows of one
//! tensor: gate and up, q, k and v, all experts. A tensor may have several names over the years; the first that is stored counts.
//! Deliberately absent: files and bytes.

use super::architecture::HeadNorm;
use super::config::ModelConfig;

/// A weight under moec's name, and where its pieces are.
#[derive(Debug)]
pub(crate) struct Slot {
    /// moec's name, e.g. `layers.0.experts.down`.
    pub(crate) weight: String,
    /// `[n]`, `[rows, cols]`, or `[experts, rows, cols]`.
    pub(crate) shape: Vec<usize>,
    /// One for each expert, in order; one for weights that are no experts.
    pub(crate) parts: Vec<Part>,
}

/// A piece of a weight: a run of rows inside one stored tensor.
#[derive(Debug)]
pub(crate) struct Part {
    /// The tensor's name in the file.
    pub(crate) stored: String,
    /// The whole tensor's shape.
    pub(crate) stored_shape: Vec<usize>,
    /// Rows of the tensor before this piece, those of earlier experts included.
    pub(crate) skip: usize,
    /// In which order the rows of a head lie, if it is not that of moec.
    pub(crate) order: Option<HeadOrder>,
    /// Whether 1 is to be added to what is stored.
    pub(crate) less_one: bool,
}

/// An order of the rows of heads of q and k that is not moec's, in which the two halves of what is rotated, each with as many rows that are not, follow one
/// another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HeadOrder {
    /// The two halves lie interleaved: first of the first half, first of the second, …
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
    /// What is rotated comes first, then what is not.
    Partial {
        /// Rows of a head.
        head_dim: usize,
        /// Rows of it that are rotated.
        rotated: usize,
    },
}

impl HeadOrder {
    /// Rows of a head.
    pub(crate) fn head_dim(self) -> usize {
        match self {
            HeadOrder::Interleaved { head_dim } | HeadOrder::Partial { head_dim, .. } => head_dim,
        }
    }

    /// Where row `i` of all heads lies.
    pub(crate) fn place(self, i: usize) -> usize {
        let (head, within) = (i / self.head_dim(), i % self.head_dim());
        let half = self.head_dim() / 2;
        let (second, place) = (within / half, within % half);
        let within = match self {
            HeadOrder::Interleaved { .. } => 2 * place + second,
            HeadOrder::Partial { rotated, .. } if place < rotated / 2 => second * (rotated / 2) + place,
            HeadOrder::Partial { rotated, .. } => rotated + second * (half - rotated / 2) + place - rotated / 2,
        };
        head * self.head_dim() + within
    }
}

/// Who named the tensors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Naming {
    /// The modules of transformers.
    HuggingFace,
    /// llama.cpp.
    Gguf,
}

/// Where a weight may be.
#[derive(Clone, Copy)]
enum Place {
    /// A tensor of its own. Of experts: one for each when the name has `{expert}`, else one with an axis of experts.
    Own(&'static str),
    /// Rows of a tensor (for each expert) that has those of these weights one below the other.
    Rows(&'static str, &'static [&'static str]),
}
use Place::{Own, Rows};

impl Place {
    const fn template(self) -> &'static str {
        match self {
            Own(template) | Rows(template, _) => template,
        }
    }
}

/// A weight's name without its layer, and where it may be.
type Row = (&'static str, &'static [Place]);

/// The names of transformers. Those of experts on the hub, then those that transformers 5 writes.
const HUGGING_FACE: &[Row] = &[
    ("embed", &[Own("model.embed_tokens.weight")]),
    ("norm", &[Own("model.norm.weight")]),
    ("output", &[Own("lm_head.weight")]),
    ("attention_norm", &[Own("model.layers.{layer}.input_layernorm.weight")]),
    ("q", &[Own("model.layers.{layer}.self_attn.q_proj.weight"), Rows(HF_QKV, QKV)]),
    ("k", &[Own("model.layers.{layer}.self_attn.k_proj.weight"), Rows(HF_QKV, QKV)]),
    ("v", &[Own("model.layers.{layer}.self_attn.v_proj.weight"), Rows(HF_QKV, QKV)]),
    ("q_bias", &[Own("model.layers.{layer}.self_attn.q_proj.bias")]),
    ("k_bias", &[Own("model.layers.{layer}.self_attn.k_proj.bias")]),
    ("v_bias", &[Own("model.layers.{layer}.self_attn.v_proj.bias")]),
    ("q_norm", &[Own("model.layers.{layer}.self_attn.q_norm.weight")]),
    ("k_norm", &[Own("model.layers.{layer}.self_attn.k_norm.weight")]),
    ("o", &[Own("model.layers.{layer}.self_attn.o_proj.weight")]),
    ("o_bias", &[Own("model.layers.{layer}.self_attn.o_proj.bias")]),
    ("ffn_norm", &[Own("model.layers.{layer}.post_attention_layernorm.weight")]),
    ("attention_post_norm", &[Own("model.layers.{layer}.post_attention_layernorm.weight")]),
    ("ffn_pre_norm", &[Own("model.layers.{layer}.pre_feedforward_layernorm.weight")]),
    ("ffn_post_norm", &[Own("model.layers.{layer}.post_feedforward_layernorm.weight")]),
    ("gate", &[Own("model.layers.{layer}.mlp.gate_proj.weight"), Rows(HF_GATE_UP, GATE_UP)]),
    ("gate_bias", &[Own("model.layers.{layer}.mlp.gate_proj.bias")]),
    ("up", &[Own("model.layers.{layer}.mlp.up_proj.weight"), Rows(HF_GATE_UP, GATE_UP)]),
    ("up_bias", &[Own("model.layers.{layer}.mlp.up_proj.bias")]),
    ("down", &[Own("model.layers.{layer}.mlp.down_proj.weight")]),
    ("down_bias", &[Own("model.layers.{layer}.mlp.down_proj.bias")]),
    (
        "router",
        &[Own("model.layers.{layer}.block_sparse_moe.gate.weight"), Own("model.layers.{layer}.mlp.gate.weight")],
    ),
    (
        "experts.gate",
        &[
            Own("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"),
            Own("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"),
            Rows("model.layers.{layer}.mlp.experts.gate_up_proj", EXPERTS_GATE_UP),
        ],
    ),
    (
        "experts.up",
        &[
            Own("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"),
            Own("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
            Rows("model.layers.{layer}.mlp.experts.gate_up_proj", EXPERTS_GATE_UP),
        ],
    ),
    (
        "experts.down",
        &[
            Own("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
            Own("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
            Own("model.layers.{layer}.mlp.experts.down_proj"),
        ],
    ),
    ("shared_gate", &[Own("model.layers.{layer}.mlp.shared_expert_gate.weight")]),
    ("shared.gate", &[Own("model.layers.{layer}.mlp.shared_expert.gate_proj.weight")]),
    ("shared.up", &[Own("model.layers.{layer}.mlp.shared_expert.up_proj.weight")]),
    ("shared.down", &[Own("model.layers.{layer}.mlp.shared_expert.down_proj.weight")]),
];

const QKV: &[&str] = &["q", "k", "v"];
const QKV_BIASES: &[&str] = &["q_bias", "k_bias", "v_bias"];
const GATE_UP: &[&str] = &["gate", "up"];
const EXPERTS_GATE_UP: &[&str] = &["experts.gate", "experts.up"];
const HF_QKV: &str = "model.layers.{layer}.self_attn.qkv_proj.weight";
const HF_GATE_UP: &str = "model.layers.{layer}.mlp.gate_up_proj.weight";

/// The names of llama.cpp (`gguf-py/gguf/constants.py`).
const GGUF: &[Row] = &[
    ("embed", &[Own("token_embd.weight")]),
    ("norm", &[Own("output_norm.weight")]),
    ("output", &[Own("output.weight")]),
    ("attention_norm", &[Own("blk.{layer}.attn_norm.weight")]),
    ("q", &[Own("blk.{layer}.attn_q.weight"), Rows("blk.{layer}.attn_qkv.weight", QKV)]),
    ("k", &[Own("blk.{layer}.attn_k.weight"), Rows("blk.{layer}.attn_qkv.weight", QKV)]),
    ("v", &[Own("blk.{layer}.attn_v.weight"), Rows("blk.{layer}.attn_qkv.weight", QKV)]),
    ("q_bias", &[Own("blk.{layer}.attn_q.bias"), Rows("blk.{layer}.attn_qkv.bias", QKV_BIASES)]),
    ("k_bias", &[Own("blk.{layer}.attn_k.bias"), Rows("blk.{layer}.attn_qkv.bias", QKV_BIASES)]),
    ("v_bias", &[Own("blk.{layer}.attn_v.bias"), Rows("blk.{layer}.attn_qkv.bias", QKV_BIASES)]),
    ("q_norm", &[Own("blk.{layer}.attn_q_norm.weight")]),
    ("k_norm", &[Own("blk.{layer}.attn_k_norm.weight")]),
    ("o", &[Own("blk.{layer}.attn_output.weight")]),
    ("o_bias", &[Own("blk.{layer}.attn_output.bias")]),
    ("ffn_norm", &[Own("blk.{layer}.ffn_norm.weight")]),
    ("attention_post_norm", &[Own("blk.{layer}.post_attention_norm.weight")]),
    ("ffn_pre_norm", &[Own("blk.{layer}.ffn_norm.weight")]),
    ("ffn_post_norm", &[Own("blk.{layer}.post_ffw_norm.weight")]),
    ("gate", &[Own("blk.{layer}.ffn_gate.weight"), Rows("blk.{layer}.ffn_up.weight", GATE_UP)]),
    ("gate_bias", &[Own("blk.{layer}.ffn_gate.bias")]),
    ("up", &[Own("blk.{layer}.ffn_up.weight"), Rows("blk.{layer}.ffn_up.weight", GATE_UP)]),
    ("up_bias", &[Own("blk.{layer}.ffn_up.bias")]),
    ("down", &[Own("blk.{layer}.ffn_down.weight")]),
    ("down_bias", &[Own("blk.{layer}.ffn_down.bias")]),
    ("router", &[Own("blk.{layer}.ffn_gate_inp.weight")]),
    ("experts.gate", &[Own("blk.{layer}.ffn_gate_exps.weight"), Own("blk.{layer}.ffn_gate.{expert}.weight")]),
    ("experts.up", &[Own("blk.{layer}.ffn_up_exps.weight"), Own("blk.{layer}.ffn_up.{expert}.weight")]),
    ("experts.down", &[Own("blk.{layer}.ffn_down_exps.weight"), Own("blk.{layer}.ffn_down.{expert}.weight")]),
    ("shared_gate", &[Own("blk.{layer}.ffn_gate_inp_shexp.weight")]),
    ("shared.gate", &[Own("blk.{layer}.ffn_gate_shexp.weight")]),
    ("shared.up", &[Own("blk.{layer}.ffn_up_shexp.weight")]),
    ("shared.down", &[Own("blk.{layer}.ffn_down_shexp.weight")]),
];

/// The divisors of rotary frequencies in a GGUF file.
pub(crate) const GGUF_ROPE_DIVISORS: &str = "rope_freqs.weight";

/// The tensors with those of LongRoPE: for short sequences and for long ones.
pub(crate) const GGUF_LONG_DIVISORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

/// Whether a stored tensor belongs to no weight on purpose: rotary frequencies, which follow from the configuration, and in `packed` models
/// the scales of activations, which moec finds anew for each row.
pub(crate) fn is_ignored(stored: &str, packed: bool) -> bool {
    let scale = || ["input_scale", "k_scale", "v_scale", "output_scale"].iter().any(|name| stored.ends_with(name));
    let rotary = stored == GGUF_ROPE_DIVISORS || GGUF_LONG_DIVISORS.contains(&stored);
    stored.ends_with("rotary_emb.inv_freq") || rotary || (packed && scale())
}

/// Every weight that a layer needs, without the layer's name, and its shape, in the order in which a step reads them.
fn layer_weights(config: &ModelConfig) -> Vec<(&'static str, Vec<usize>)> {
    let &ModelConfig { hidden, ffn, heads, kv_heads, head_dim, .. } = config;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let mut all: Vec<(&'static str, Vec<usize>)> = vec![("attention_norm", vec![hidden])];
    all.extend([("q", vec![q, hidden]), ("k", vec![kv, hidden]), ("v", vec![kv, hidden])]);
    if config.qkv_bias {
        all.extend([("q_bias", vec![q]), ("k_bias", vec![kv]), ("v_bias", vec![kv])]);
    }
    match config.head_norm {
        Some(HeadNorm::Each) => all.extend([("q_norm", vec![head_dim]), ("k_norm", vec![head_dim])]),
        Some(HeadNorm::Across) => all.extend([("q_norm", vec![q]), ("k_norm", vec![kv])]),
        None => {}
    }
    all.push(("o", vec![hidden, q]));
    if config.output_bias {
        all.push(("o_bias", vec![hidden]));
    }
    match config.post_norms {
        true => all.extend(["attention_post_norm", "ffn_pre_norm", "ffn_post_norm"].map(|norm| (norm, vec![hidden]))),
        false => all.push(("ffn_norm", vec![hidden])),
    }
    let Some(experts) = config.experts else {
        for (weight, bias, rows, cols) in
            [("gate", "gate_bias", ffn, hidden), ("up", "up_bias", ffn, hidden), ("down", "down_bias", hidden, ffn)]
        {
            all.push((weight, vec![rows, cols]));
            if config.ffn_bias {
                all.push((bias, vec![rows]));
            }
        }
        return all;
    };
    all.push(("router", vec![experts.count, hidden]));
    all.extend([
        ("experts.gate", vec![experts.count, ffn, hidden]),
        ("experts.up", vec![experts.count, ffn, hidden]),
        ("experts.down", vec![experts.count, hidden, ffn]),
    ]);
    if let Some(width) = experts.shared {
        all.extend([
            ("shared_gate", vec![1, hidden]),
            ("shared.gate", vec![width, hidden]),
            ("shared.up", vec![width, hidden]),
            ("shared.down", vec![hidden, width]),
        ]);
    }
    all
}

/// Calls `slot` for every weight that the configuration needs, in the order in which a step reads them, until it fails.
///
/// `stored` gives the shape of the tensor of a name, if the files have one: it decides between the places of a weight, and whether a
/// tied output is stored after all (it is then the one to use).
pub(crate) fn for_each_slot<E>(
    config: &ModelConfig,
    naming: Naming,
    stored: &dyn Fn(&str) -> Option<Vec<usize>>,
    mut slot: impl FnMut(Slot) -> Result<(), E>,
) -> Result<(), E> {
    let ModelConfig { vocab, hidden, .. } = *config;
    let description = config.architecture.description();
    let weights = layer_weights(config);
    let mut scheme = Scheme {
        table: if naming == Naming::Gguf { GGUF } else { HUGGING_FACE },
        weights: &weights,
        module: description.moe_module,
        order: head_order(config, naming),
        norms_less_one: description.block.norms_less_one && naming == Naming::HuggingFace,
        stored,
    };
    slot(scheme.slot("embed", None, vec![vocab, hidden]))?;
    for layer in 0..config.layers {
        for (weight, shape) in &weights {
            slot(scheme.slot(weight, Some(layer), shape.clone()))?;
        }
    }
    slot(scheme.slot("norm", None, vec![hidden]))?;
    let mut output = scheme.slot("output", None, vec![vocab, hidden]);
    if config.tied && stored(&output.parts[0].stored).is_none() {
        output.parts = scheme.slot("embed", None, vec![vocab, hidden]).parts;
    }
    slot(output)
}

/// The order in which a model's files have the rows of q and k.
fn head_order(config: &ModelConfig, naming: Naming) -> Option<HeadOrder> {
    let head_dim = config.head_dim;
    let interleaved = naming == Naming::Gguf && config.architecture.description().interleaved_in_gguf;
    match config.rope.rotated {
        None => interleaved.then_some(HeadOrder::Interleaved { head_dim }),
        // No architecture has both.
        Some(rotated) => Some(HeadOrder::Partial { head_dim, rotated }),
    }
}

struct Scheme<'a> {
    table: &'static [Row],
    /// Shapes of a layer's weights.
    weights: &'a [(&'static str, Vec<usize>)],
    /// The module in which the experts are expected.
    module: &'static str,
    order: Option<HeadOrder>,
    /// Whether the weights of norms are stored less 1.
    norms_less_one: bool,
    stored: &'a dyn Fn(&str) -> Option<Vec<usize>>,
}

impl Scheme<'_> {
    fn slot(&mut self, weight: &str, layer: Option<usize>, shape: Vec<usize>) -> Slot {
        let (_, places) = self.table.iter().find(|(name, _)| *name == weight).expect("every weight has a place");
        let parts = |place: &Place| self.parts(*place, weight, layer, &shape);
        let found: Vec<_> = places.iter().map(|place| (place, (self.stored)(&parts(place)[0].stored))).collect();
        let right = found.iter().find(|(place, stored)| {
            stored.as_ref().is_some_and(|stored| same_shape(stored, &parts(place)[0].stored_shape))
        });
        // A tensor of another shape is meant, unless it is another weight's own.
        let others = |place: &Place| {
            let own = |other: &Place| matches!(other, Own(template) if *template == place.template());
            matches!(place, Rows(..)) && self.table.iter().any(|(_, places)| places.iter().any(own))
        };
        let there = || found.iter().find(|(place, stored)| stored.is_some() && !others(place));
        let module = format!(".{}.", self.module);
        let likely = || found.iter().find(|(place, _)| place.template().contains(&module));
        let (place, stored) = right.or_else(there).or_else(likely).unwrap_or(&found[0]);
        let parts = parts(place);
        if weight == "router" && stored.is_some() && place.template().contains(".mlp.") {
            self.module = "mlp";
        }
        let weight = layer.map_or_else(|| weight.to_string(), |layer| format!("layers.{layer}.{weight}"));
        Slot { weight, shape, parts }
    }

    fn parts(&self, place: Place, weight: &str, layer: Option<usize>, shape: &[usize]) -> Vec<Part> {
        let template = match layer {
            Some(layer) => place.template().replace("{layer}", &layer.to_string()),
            None => place.template().to_string(),
        };
        let experts = if let [experts, _, _] = shape { *experts } else { 1 };
        // A vector is one row, or as many as it has elements where it is a part of another.
        let rows = |shape: &[usize]| if let [.., rows, _] = shape { *rows } else { shape[0] };
        let (before, all) = match place {
            Own(_) => (0, rows(shape)),
            Rows(_, weights) => {
                let rows_of = |name: &&str| {
                    let (_, shape) = self.weights.iter().find(|(other, _)| other == name)?;
                    Some(rows(shape))
                };
                let before = weights.iter().take_while(|name| **name != weight).filter_map(rows_of).sum();
                (before, weights.iter().filter_map(rows_of).sum())
            }
        };
        let order = self.order.filter(|_| matches!(weight, "q" | "k" | "q_bias" | "k_bias"));
        let mut stored_shape = shape.to_vec();
        let axis = stored_shape.len().saturating_sub(2);
        stored_shape[axis] = all;
        let each = template.contains("{expert}");
        if each {
            stored_shape.remove(0);
        }
        let part = |expert: usize| Part {
            stored: template.replace("{expert}", &expert.to_string()),
            stored_shape: stored_shape.clone(),
            skip: before + if each { 0 } else { expert * all },
            order,
            less_one: self.norms_less_one && weight.ends_with("norm"),
        };
        (0..experts).map(part).collect()
    }
}

/// Whether two shapes differ in leading ones only: GGUF files leave them out.
pub(crate) fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let significant = |shape: &[usize]| -> Vec<usize> { shape.iter().copied().skip_while(|&n| n == 1).collect() };
    significant(a) == significant(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_heads_are_found_in_other_orders() {
        let places = |order: HeadOrder| (0..16).map(|i| order.place(i)).collect::<Vec<_>>();
        let interleaved = HeadOrder::Interleaved { head_dim: 8 };
        assert_eq!(places(interleaved), [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
        // Four rotated ones, of which two make a half; then four that are not.
        let partial = HeadOrder::Partial { head_dim: 8, rotated: 4 };
        assert_eq!(places(partial), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
    }
}
