//! Gemma 2: Gemma with norms behind the blocks, too, soft-capped scores and logits, and a window in every other layer.

use super::{Activation, AttentionBias, Block, Caps, Defaults, Description, Window};

pub(super) const DESCRIPTION: Description = Description {
    name: "Gemma2ForCausalLM",
    model_type: "gemma2",
    gguf: "gemma2",
    interleaved_in_gguf: false,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 256_000,
        hidden: 2304,
        ffn: 9216,
        layers: 26,
        heads: 8,
        kv_heads: Some(4),
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
    window: Window::EveryOther(4096),
    block: Block {
        activation: Activation::Gelu,
        scaled_embedding: true,
        norms_less_one: true,
        post_norms: true,
        query_scalar: Some(256.0),
        caps: Some(Caps { scores: 50.0, logits: 30.0 }),
    },
    experts: None,
    moe_module: "mlp",
};
