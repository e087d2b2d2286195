//! What tells one architecture from another: a page of data for each.
//!
//! All have one graph ([`super::build`]): norm, attention with rotary embedding, residual; norm, feed-forward block (dense, or experts behind a
//! router), residual. A [`Description`] says which parts a model of the architecture has and what absent keys of `config.json` mean. The numbers are those
//! of the configuration classes of transformers, the names those of their modules.
//!
//! To add one: a file with its description, a variant of [`Architecture`] and a row of [`TABLE`]; for tensors under other names than
//! those of the table in [`super::names`], a row there. `tests/data/architectures/make.py` makes a tiny model with golden outputs.
//! Deliberately absent: reading the keys ([`super::config`]).

mod gemma;
mod gemma2;
mod llama;
mod mistral;
mod mixtral;
mod olmoe;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;

pub use moec_ir::graph::Activation;

/// The model families that moec knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    /// `MixtralForCausalLM`: a router and experts in each layer.
    Mixtral,
    /// `MistralForCausalLM`: dense.
    Mistral,
    /// `LlamaForCausalLM`: dense.
    Llama,
    /// `Qwen2ForCausalLM`: dense, biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: dense, norms of the heads of q and k.
    Qwen3,
    /// `Qwen2MoeForCausalLM`: many experts and a shared one.
    Qwen2Moe,
    /// `Qwen3MoeForCausalLM`: many experts.
    Qwen3Moe,
    /// `OlmoeForCausalLM`: many experts, norms of q and k.
    Olmoe,
    /// `Phi3ForCausalLM`: dense, fused projections.
    Phi3,
    /// `GemmaForCausalLM`: dense, GELU.
    Gemma,
    /// `Gemma2ForCausalLM`: dense, GELU, norms behind the blocks, soft-capping.
    Gemma2,
}

/// Every architecture and its page.
const TABLE: [(Architecture, &Description); 11] = [
    (Architecture::Mixtral, &mixtral::DESCRIPTION),
    (Architecture::Mistral, &mistral::DESCRIPTION),
    (Architecture::Llama, &llama::DESCRIPTION),
    (Architecture::Qwen2, &qwen2::DESCRIPTION),
    (Architecture::Qwen3, &qwen3::DESCRIPTION),
    (Architecture::Qwen2Moe, &qwen2_moe::DESCRIPTION),
    (Architecture::Qwen3Moe, &qwen3_moe::DESCRIPTION),
    (Architecture::Olmoe, &olmoe::DESCRIPTION),
    (Architecture::Phi3, &phi3::DESCRIPTION),
    (Architecture::Gemma, &gemma::DESCRIPTION),
    (Architecture::Gemma2, &gemma2::DESCRIPTION),
];

impl Architecture {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Architecture> {
        TABLE.into_iter().map(|(architecture, _)| architecture)
    }

    /// What is particular to it.
    pub fn description(self) -> &'static Description {
        let found = TABLE.iter().find(|(architecture, _)| *architecture == self);
        found.expect("every architecture has a page").1
    }

    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        self.description().name
    }
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What is particular to an architecture.
#[derive(Debug)]
pub struct Description {
    /// Its name in `architectures` of `config.json`.
    pub name: &'static str,
    /// Its `model_type` there.
    pub model_type: &'static str,
    /// Its `general.architecture` in GGUF files. Several may share one.
    pub gguf: &'static str,
    /// Whether GGUF files have the rotary halves of q and k interleaved.
    pub interleaved_in_gguf: bool,
    /// Whether only a part of each head may be rotated, as `partial_rotary_factor` says.
    pub partial_rotary: bool,
    /// What absent keys mean.
    pub defaults: Defaults,
    /// Whether a `hidden_size` that the heads do not divide is an error when `head_dim` is absent; without, the quotient is rounded down.
    pub whole_heads: bool,
    /// Which projections of attention have biases.
    pub attention_bias: AttentionBias,
    /// The key that gives gate, up and down biases.
    pub ffn_bias: Option<&'static str>,
    /// What norms q and k before they are rotated.
    pub head_norm: Option<HeadNorm>,
    /// Which tokens see fewer keys than all.
    pub window: Window,
    /// What the parts of a layer do beside that.
    pub block: Block,
    /// The keys of the experts; `None` for dense architectures.
    pub experts: Option<ExpertKeys>,
    /// The module that the router and the experts are in.
    pub moe_module: &'static str,
}

/// What the parts of a layer do that most architectures leave out.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// What gates go through.
    pub activation: Activation,
    /// Whether embeddings are multiplied by √`hidden_size`. transformers rounds that to the type it computes in, which is f32 here.
    pub scaled_embedding: bool,
    /// Whether the weights of norms are stored less 1 by transformers. GGUF files have them as they are multiplied.
    pub norms_less_one: bool,
    /// Whether what attention and the feed-forward block give is normed before it is added to the residual.
    pub post_norms: bool,
    /// The default of `query_pre_attn_scalar`, by whose root queries are divided; without there is no such key, and it is `head_dim`.
    pub query_scalar: Option<f64>,
    /// The defaults of the keys of soft-capping; without there are no such keys.
    pub caps: Option<Caps>,
}

impl Block {
    /// Nothing but what all have.
    pub const PLAIN: Block = Block {
        activation: Activation::Silu,
        scaled_embedding: false,
        norms_less_one: false,
        post_norms: false,
        query_scalar: None,
        caps: None,
    };
}

/// What scores and logits are soft-capped with when the keys are absent.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// `attn_logit_softcapping`
    pub scores: f64,
    /// `final_logit_softcapping`
    pub logits: f64,
}

/// What an absent key means.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// `vocab_size`
    pub vocab: usize,
    /// `hidden_size`
    pub hidden: usize,
    /// `intermediate_size`
    pub ffn: usize,
    /// `num_hidden_layers`
    pub layers: usize,
    /// `num_attention_heads`
    pub heads: usize,
    /// `num_key_value_heads`; as many as heads without.
    pub kv_heads: Option<usize>,
    /// `head_dim`; `hidden_size` / `num_attention_heads` without.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`
    pub context: usize,
    /// `rms_norm_eps`
    pub norm_eps: f64,
    /// `rope_theta`
    pub theta: f64,
    /// `bos_token_id`
    pub bos: Option<u32>,
    /// `eos_token_id`
    pub eos: Option<u32>,
    /// `tie_word_embeddings`
    pub tied: bool,
}

/// Which projections of attention have biases.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttentionBias {
    /// None.
    Never,
    /// q, k and v.
    Always,
    /// q, k and v, and with `output` o, if this key says so.
    Key {
        /// The key.
        key: &'static str,
        /// What its absence means.
        default: bool,
        /// Whether o has one too.
        output: bool,
    },
}

/// What norms q and k.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeadNorm {
    /// One norm for each head, all with one weight.
    Each,
    /// One norm for all heads together.
    Across,
}

/// Which layers' tokens see the last `sliding_window` keys only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Window {
    /// None, whatever the key says.
    Never,
    /// All, if there is such a number; this when the key is absent.
    Everywhere(Option<usize>),
    /// Those that `layer_types` names; without it every other one, the first included. This when the key is absent.
    EveryOther(usize),
    /// Those that this says, if `use_sliding_window` is true; 4096 when the key is absent.
    Switched(WindowedLayers),
}

/// Which layers have a window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WindowedLayers {
    /// All.
    All,
    /// Those that `layer_types` names; without it those from `max_window_layers` (28 when absent) on.
    Late,
    /// Those that `layer_types` names; without it every other one before `max_window_layers` (28 when absent), the first included.
    EvenEarly,
}

/// Where `config.json` has the numbers of the experts, and what absent keys mean.
#[derive(Clone, Copy, Debug)]
pub struct ExpertKeys {
    /// Keys of the number of experts; the first that is there counts.
    pub count: &'static [&'static str],
    /// Experts.
    pub default_count: usize,
    /// Default of `num_experts_per_tok`.
    pub per_token: usize,
    /// The key of an expert's width, and its default; that of the dense block without.
    pub ffn: Option<(&'static str, usize)>,
    /// The key that says whether the scores of the chosen experts sum up to 1, and its default; without, they do.
    pub normalized: Option<(&'static str, bool)>,
    /// Whether they do in GGUF files that do not say.
    pub normalized_in_gguf: bool,
    /// The key of the width of the expert that every token uses behind a gate, and its default.
    pub shared: Option<(&'static str, usize)>,
}
