//! Qwen3: the heads of q and k are normed before they are rotated.

use super::{AttentionBias, Block, Defaults, Description, HeadNorm, Window, WindowedLayers};

pub(super) const DESCRIPTION: Description = Description {
    name: "Qwen3ForCausalLM",
    model_type: "qwen3",
    gguf: "qwen3",
    interleaved_in_gguf: false,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 151_936,
        hidden: 4096,
        ffn: 22016,
        layers: 32,
        heads: 32,
        kv_heads: Some(32),
        head_dim: Some(128),
        context: 32768,
        norm_eps: 1e-6,
        theta: 1e4,
        bos: None,
        eos: None,
        tied: false,
    },
    whole_heads: false,
    attention_bias: AttentionBias::Key { key: "attention_bias", default: false, output: true },
    ffn_bias: None,
    head_norm: Some(HeadNorm::Each),
    window: Window::Switched(WindowedLayers::Late),
    block: Block::PLAIN,
    experts: None,
    moe_module: "mlp",
};
