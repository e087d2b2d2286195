//! Mistral 7B: v0.1 with its window of 4096 keys, v0.2 and v0.3 without.

use super::{AttentionBias, Block, Defaults, Description, Window};

pub(super) const DESCRIPTION: Description = Description {
    name: "MistralForCausalLM",
    model_type: "mistral",
    gguf: "llama",
    interleaved_in_gguf: true,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 32000,
        hidden: 4096,
        ffn: 14336,
        layers: 32,
        heads: 32,
        kv_heads: Some(8),
        head_dim: None,
        context: 131_072,
        norm_eps: 1e-6,
        theta: 1e4,
        bos: Some(1),
        eos: Some(2),
        tied: false,
    },
    whole_heads: false,
    attention_bias: AttentionBias::Never,
    ffn_bias: None,
    head_norm: None,
    window: Window::Everywhere(Some(4096)),
    block: Block::PLAIN,
    experts: None,
    moe_module: "mlp",
};
