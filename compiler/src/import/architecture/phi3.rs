//! Phi-3, also with LongRoPE, and Phi-4 mini, which rotates a part of each head: q, k and v are one tensor, gate and up another.

use super::{AttentionBias, Block, Defaults, Description, Window};

pub(super) const DESCRIPTION: Description = Description {
    name: "Phi3ForCausalLM",
    model_type: "phi3",
    gguf: "phi3",
    interleaved_in_gguf: false,
    partial_rotary: true,
    defaults: Defaults {
        vocab: 32064,
        hidden: 3072,
        ffn: 8192,
        layers: 32,
        heads: 32,
        kv_heads: None,
        head_dim: None,
        context: 4096,
        norm_eps: 1e-5,
        theta: 1e4,
        bos: Some(1),
        eos: Some(32000),
        tied: false,
    },
    whole_heads: false,
    attention_bias: AttentionBias::Never,
    ffn_bias: None,
    head_norm: None,
    window: Window::Everywhere(None),
    block: Block::PLAIN,
    experts: None,
    moe_module: "mlp",
};
