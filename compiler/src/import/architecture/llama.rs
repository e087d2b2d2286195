//! Llama 2, 3, 3.1, 3.2, and what else has that graph under this name (SmolLM, TinyLlama, …).

use super::{AttentionBias, Block, Defaults, Description, Window};

pub(super) const DESCRIPTION: Description = Description {
    name: "LlamaForCausalLM",
    model_type: "llama",
    gguf: "llama",
    interleaved_in_gguf: true,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 32000,
        hidden: 4096,
        ffn: 11008,
        layers: 32,
        heads: 32,
        kv_heads: None,
        head_dim: None,
        context: 2048,
        norm_eps: 1e-6,
        theta: 1e4,
        bos: Some(1),
        eos: Some(2),
        tied: false,
    },
    whole_heads: true,
    attention_bias: AttentionBias::Key { key: "attention_bias", default: false, output: true },
    ffn_bias: Some("mlp_bias"),
    head_norm: None,
    window: Window::Never,
    block: Block::PLAIN,
    experts: None,
    moe_module: "mlp",
};
