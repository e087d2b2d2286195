//! Qwen3-MoE (30B-A3B, 235B-A22B): 128 small experts, the heads of q and k normed.

use super::{AttentionBias, Block, Defaults, Description, ExpertKeys, HeadNorm, Window, WindowedLayers};

pub(super) const DESCRIPTION: Description = Description {
    name: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    gguf: "qwen3moe",
    interleaved_in_gguf: false,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 151_936,
        hidden: 2048,
        ffn: 6144,
        layers: 24,
        heads: 32,
        kv_heads: Some(4),
        head_dim: None,
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
    window: Window::Switched(WindowedLayers::All),
    block: Block::PLAIN,
    experts: Some(ExpertKeys {
        count: &["num_experts", "num_local_experts"],
        default_count: 128,
        per_token: 8,
        ffn: Some(("moe_intermediate_size", 768)),
        normalized: Some(("norm_topk_prob", false)),
        normalized_in_gguf: true,
        shared: None,
    }),
    moe_module: "mlp",
};
