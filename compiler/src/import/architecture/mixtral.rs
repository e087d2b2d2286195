//! Mixtral 8x7B and 8x22B, base and instruct.

use super::{AttentionBias, Block, Defaults, Description, ExpertKeys, Window};

pub(super) const DESCRIPTION: Description = Description {
    name: "MixtralForCausalLM",
    model_type: "mixtral",
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
        norm_eps: 1e-5,
        theta: 1e6,
        bos: Some(1),
        eos: Some(2),
        tied: false,
    },
    whole_heads: false,
    attention_bias: AttentionBias::Never,
    ffn_bias: None,
    head_norm: None,
    window: Window::Everywhere(None),
    block: Block::PLAIN,
    experts: Some(ExpertKeys {
        count: &["num_local_experts", "num_experts"],
        default_count: 8,
        per_token: 2,
        ffn: None,
        normalized: None,
        normalized_in_gguf: true,
        shared: None,
    }),
    moe_module: "block_sparse_moe",
};
