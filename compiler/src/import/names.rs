//! Which stored tensor holds which weight: the naming schemes of model files, against moec's names.
//!
//! Experts come in two layouts. On the hub each expert has three matrices (`block_sparse_moe.experts.E.w1`, `w2`, `w3`);
//! transformers 5 keeps one `mlp.experts.gate_up_proj` `[E, 2 × ffn, hidden]` (gate rows first) and one `down_proj` `[E, hidden, ffn]`.
//! Deliberately absent: files and bytes.

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

/// A piece of a weight: a run of elements inside one stored tensor.
#[derive(Debug)]
pub(crate) struct Part {
    /// The tensor's name in the file.
    pub(crate) stored: String,
    /// The whole tensor's shape.
    pub(crate) stored_shape: Vec<usize>,
    /// Elements of the tensor before this piece.
    pub(crate) skip: usize,
}

/// Whether a stored tensor belongs to no weight on purpose: rotary frequencies, which follow from the configuration.
pub(crate) fn is_ignored(stored: &str) -> bool {
    stored.ends_with("rotary_emb.inv_freq")
}

/// Calls `slot` for every weight that the configuration needs, in the order in which a step reads them, until it fails.
///
/// `is_stored` tells whether the files have a tensor of a name: it decides between the expert layouts, and whether a tied output
/// is stored after all (it is then the one to use).
pub(crate) fn for_each_slot<E>(
    config: &ModelConfig,
    is_stored: impl Fn(&str) -> bool,
    mut slot: impl FnMut(Slot) -> Result<(), E>,
) -> Result<(), E> {
    let ModelConfig { vocab, hidden, ffn, heads, kv_heads, head_dim, .. } = *config;
    const EMBED: &str = "model.embed_tokens.weight";
    const OUTPUT: &str = "lm_head.weight";
    slot(whole("embed".into(), EMBED.into(), vec![vocab, hidden]))?;
    for layer in 0..config.layers {
        let name = |weight: &str| format!("layers.{layer}.{weight}");
        let stored = |tensor: &str| format!("model.layers.{layer}.{tensor}");
        let mut matrix =
            |weight: &str, tensor: &str, shape: Vec<usize>| slot(whole(name(weight), stored(tensor), shape));
        matrix("attention_norm", "input_layernorm.weight", vec![hidden])?;
        matrix("q", "self_attn.q_proj.weight", vec![heads * head_dim, hidden])?;
        matrix("k", "self_attn.k_proj.weight", vec![kv_heads * head_dim, hidden])?;
        matrix("v", "self_attn.v_proj.weight", vec![kv_heads * head_dim, hidden])?;
        matrix("o", "self_attn.o_proj.weight", vec![hidden, heads * head_dim])?;
        matrix("ffn_norm", "post_attention_layernorm.weight", vec![hidden])?;
        let Some(experts) = config.experts else {
            matrix("gate", "mlp.gate_proj.weight", vec![ffn, hidden])?;
            matrix("up", "mlp.up_proj.weight", vec![ffn, hidden])?;
            matrix("down", "mlp.down_proj.weight", vec![hidden, ffn])?;
            continue;
        };
        let fused = is_stored(&stored("mlp.experts.gate_up_proj")) || is_stored(&stored("mlp.gate.weight"));
        let router = if fused { "mlp.gate.weight" } else { "block_sparse_moe.gate.weight" };
        matrix("router", router, vec![experts.count, hidden])?;
        for (weight, unfused, tensor, rows, cols, step, skip) in [
            ("gate", "w1", "gate_up_proj", ffn, hidden, 2 * ffn * hidden, 0),
            ("up", "w3", "gate_up_proj", ffn, hidden, 2 * ffn * hidden, ffn * hidden),
            ("down", "w2", "down_proj", hidden, ffn, hidden * ffn, 0),
        ] {
            let part = |expert: usize| {
                if fused {
                    let stored_shape = vec![experts.count, step / cols, cols];
                    Part { stored: stored(&format!("mlp.experts.{tensor}")), stored_shape, skip: expert * step + skip }
                } else {
                    let tensor = format!("block_sparse_moe.experts.{expert}.{unfused}.weight");
                    Part { stored: stored(&tensor), stored_shape: vec![rows, cols], skip: 0 }
                }
            };
            slot(Slot {
                weight: name(&format!("experts.{weight}")),
                shape: vec![experts.count, rows, cols],
                parts: (0..experts.count).map(part).collect(),
            })?;
        }
    }
    slot(whole("norm".into(), "model.norm.weight".into(), vec![hidden]))?;
    let output = if config.tied && !is_stored(OUTPUT) { EMBED } else { OUTPUT };
    slot(whole("output".into(), output.into(), vec![vocab, hidden]))
}

fn whole(weight: String, stored: String, shape: Vec<usize>) -> Slot {
    Slot { weight, shape: shape.clone(), parts: vec![Part { stored, stored_shape: shape, skip: 0 }] }
}
