//! OLMoE: 64 small experts; q and k are normed as wholes.

use super::{AttentionBias, Block, Defaults, Description, ExpertKeys, HeadNorm, Window};

pub(super) const DESCRIPTION: Description = Description {
    name: "OlmoeForCausalLM",
    model_type: "olmoe",
    gguf: "olmoe",
    interleaved_in_gguf: false,
    partial_rotary: false,
    defaults: Defaults {
        vocab: 50304,
        hidden: 2048,
        ffn: 2048,
        layers: 16,
        heads: 16,
        kv_heads: None,
        head_dim: None,
        context: 4096,
        norm_eps: 1e-5,
        theta: 1e4,
        bos: None,
        eos: Some(50279),
        tied: false,
    },
    whole_heads: false,
    attention_bias: AttentionBias::Key { key: "attention_bias", default: false, output: true },
    ffn_bias: None,
    head_norm: Some(HeadNorm::Across),
    window: Window::Never,
    block: Block::PLAIN,
    experts: Some(ExpertKeys {
        count: &["num_experts", "num_local_experts"],
        default_count: 64,
        per_token: 8,
        ffn: None,
        normalized: Some(("norm_topk_prob", false)),
        normalized_in_gguf: false,
        shared: None,
    }),
    moe_module: "mlp",
};
