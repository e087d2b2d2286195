//! Qwen1.5-MoE and Qwen2-MoE: small experts, scores that do not sum up to 1, and a shared expert behind a gate.

use super::{AttentionBias, Block, Defaults, Description, ExpertKeys, Window, WindowedLayers};

pub(super) const DESCRIPTION: Description = Description {
    name: "Qwen2MoeForCausalLM",
    model_type: "qwen2_moe",
    gguf: "qwen2moe",
    interleaved_in_gguf: false,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 151_936,
        hidden: 2048,
        ffn: 5632,
        layers: 24,
        heads: 16,
        kv_heads: Some(16),
        head_dim: None,
        context: 32768,
        norm_eps: 1e-6,
        theta: 1e4,
        bos: None,
        eos: None,
        tied: false,
    },
    whole_heads: false,
    attention_bias: AttentionBias::Key { key: "qkv_bias", default: true, output: false },
    ffn_bias: None,
    head_norm: None,
    window: Window::Switched(WindowedLayers::EvenEarly),
    block: Block::PLAIN,
    experts: Some(ExpertKeys {
        count: &["num_experts"],
        default_count: 60,
        per_token: 4,
        ffn: Some(("moe_intermediate_size", 1408)),
        normalized: Some(("norm_topk_prob", false)),
        normalized_in_gguf: false,
        shared: Some(("shared_expert_intermediate_size", 5632)),
    }),
    moe_module: "mlp",
};
