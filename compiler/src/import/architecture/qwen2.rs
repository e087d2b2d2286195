//! Qwen2 and Qwen2.5: Llama with biases on q, k and v.

use super::{AttentionBias, Block, Defaults, Description, Window, WindowedLayers};

pub(super) const DESCRIPTION: Description = Description {
    name: "Qwen2ForCausalLM",
    model_type: "qwen2",
    gguf: "qwen2",
    interleaved_in_gguf: false,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 151_936,
        hidden: 4096,
        ffn: 22016,
        layers: 32,
        heads: 32,
        kv_heads: Some(32),
        head_dim: None,
        context: 32768,
        norm_eps: 1e-6,
        theta: 1e4,
        bos: None,
        eos: None,
        tied: false,
    },
    whole_heads: false,
    attention_bias: AttentionBias::Always,
    ffn_bias: None,
    head_norm: None,
    window: Window::Switched(WindowedLayers::Late),
    block: Block::PLAIN,
    experts: None,
    moe_module: "mlp",
};
