//! Gemma (the first): GELU instead of SiLU, embeddings made larger, norms whose weights are stored less 1.

use super::{Activation, AttentionBias, Block, Defaults, Description, Window};

pub(super) const DESCRIPTION: Description = Description {
    name: "GemmaForCausalLM",
    model_type: "gemma",
    gguf: "gemma",
    interleaved_in_gguf: false,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 256_000,
        hidden: 3072,
        ffn: 24576,
        layers: 28,
        heads: 16,
        kv_heads: Some(16),
        head_dim: Some(256),
        context: 8192,
        norm_eps: 1e-6,
        theta: 1e4,
        bos: Some(2),
        eos: Some(1),
        tied: true,
    },
    whole_heads: false,
    attention_bias: AttentionBias::Key { key: "attention_bias", default: false, output: true },
    ffn_bias: None,
    head_norm: None,
    window: Window::Never,
    block: Block { activation: Activation::Gelu, scaled_embedding: true, norms_less_one: true, ..Block::PLAIN },
    experts: None,
    moe_module: "mlp",
};
