//! What a model is, taken from `config.json`: the numbers that shape every later step.
//!
//! Everything here was checked: sizes are within bounds and fit each other, so later steps compute with them freely.
//! Deliberately absent: dtypes (the headers of the weight files know them; the config's is often wrong) and training-only keys.

/// The model families that moec knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    /// `MixtralForCausalLM`: a router and experts in each layer.
    Mixtral,
    /// `MistralForCausalLM`: dense.
    Mistral,
    /// `LlamaForCausalLM`: dense.
    Llama,
}

impl Architecture {
    /// The name in `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Mixtral => "MixtralForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Llama => "LlamaForCausalLM",
        }
    }
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The experts of each layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Experts {
    /// How many each layer has.
    pub count: usize,
    /// How many each token uses, `1 ..= count`.
    pub per_token: usize,
}

/// Rotary position embedding.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are changed for long contexts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies are divided by `factor`, high ones kept, those between interpolated.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context (tokens) that the model was first trained with.
        original_context: usize,
    },
}

/// The shape of a model.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Tokens in the vocabulary: rows of the embedding and of the output.
    pub vocab: usize,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Elements inside one feed-forward block (of one expert).
    pub ffn: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head: even, and not necessarily `hidden / heads`.
    pub head_dim: usize,
    /// `None` for dense models.
    pub experts: Option<Experts>,
    /// Added to the mean square in RMS norm.
    pub norm_eps: f32,
    /// Tokens that the model was made for.
    pub context: usize,
    /// Keys that a token sees, its own included; `None` for all.
    pub sliding_window: Option<usize>,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the output projection is the embedding (after [`open`](super::open): and none is stored).
    pub tied: bool,
    /// Id that starts a text.
    pub bos_token_id: Option<u32>,
    /// Ids that end a generation.
    pub eos_token_ids: Vec<u32>,
}
