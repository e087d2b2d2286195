//! What a model is, taken from `config.json`: the numbers that shape every later step.
//!
//! Everything here was checked: sizes are within bounds and fit each other, so later steps compute with them freely.
//! Deliberately absent: dtypes (the headers of the weight files know them; the config's is often wrong) and training-only keys.
//! The rules for absent keys and nulls are those of the configuration classes of transformers.

use super::error::ImportError;
use super::json::{self, Field, Object, describe, quote};
use serde_json::Value;
use std::path::Path;

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

/// What an absent key means.
struct Defaults {
    ffn: usize,
    kv_heads: Option<usize>,
    context: usize,
    norm_eps: f64,
    theta: f64,
    sliding_window: Option<usize>,
}

impl Architecture {
    /// Every supported architecture, with its `model_type`.
    const ALL: [(Architecture, &'static str); 3] =
        [(Architecture::Mixtral, "mixtral"), (Architecture::Mistral, "mistral"), (Architecture::Llama, "llama")];

    const fn defaults(self) -> Defaults {
        match self {
            Architecture::Mixtral => Defaults {
                ffn: 14336,
                kv_heads: Some(8),
                context: 131072,
                norm_eps: 1e-5,
                theta: 1e6,
                sliding_window: None,
            },
            Architecture::Mistral => Defaults {
                ffn: 14336,
                kv_heads: Some(8),
                context: 131072,
                norm_eps: 1e-6,
                theta: 1e4,
                sliding_window: Some(4096),
            },
            Architecture::Llama => {
                Defaults { ffn: 11008, kv_heads: None, context: 2048, norm_eps: 1e-6, theta: 1e4, sliding_window: None }
            }
        }
    }
}

/// Largest sizes that are taken for honest. They keep every product of two of them far from overflow.
const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 10;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 13;
const MAX_EXPERTS: usize = 1 << 10;
const MAX_CONTEXT: usize = 1 << 28;

impl ModelConfig {
    /// Reads `config.json`. `path` is only for messages.
    ///
    /// # Errors
    /// Invalid JSON, a value of the wrong type or out of bounds, values that contradict each other, a feature that moec
    /// does not support.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<ModelConfig, ImportError> {
        let map = json::parse(bytes, path)?;
        let config = Object { path, prefix: "", map: &map };
        let architecture = architecture(config)?;
        refuse_unsupported(config)?;
        let defaults = architecture.defaults();

        let vocab = config.size("vocab_size", 32000, 1..=MAX_VOCAB)?;
        let hidden = config.size("hidden_size", 4096, 1..=MAX_WIDTH)?;
        let ffn = config.size("intermediate_size", defaults.ffn, 1..=MAX_WIDTH)?;
        let layers = config.size("num_hidden_layers", 32, 1..=MAX_LAYERS)?;
        let heads = config.size("num_attention_heads", 32, 1..=MAX_HEADS)?;
        let kv_heads = match config.integer("num_key_value_heads", 1..=MAX_HEADS)? {
            Field::Absent => defaults.kv_heads.unwrap_or(heads),
            Field::Null => heads,
            Field::Value(value) => value,
        };
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of `num_attention_heads` ({heads})");
            return Err(config.wrong("num_key_value_heads", expected, kv_heads.to_string()));
        }
        let context = match config.integer("max_position_embeddings", 1..=MAX_CONTEXT)? {
            Field::Absent | Field::Null => defaults.context,
            Field::Value(value) => value,
        };
        let sliding_window = match architecture {
            Architecture::Llama => None,
            Architecture::Mixtral | Architecture::Mistral => {
                match config.integer("sliding_window", 1..=usize::MAX >> 1)? {
                    Field::Absent => defaults.sliding_window,
                    Field::Null => None,
                    Field::Value(value) => Some(value),
                }
            }
        };
        Ok(ModelConfig {
            architecture,
            vocab,
            hidden,
            ffn,
            layers,
            heads,
            kv_heads,
            head_dim: head_dim(config, architecture, hidden, heads)?,
            experts: experts(config, architecture)?,
            norm_eps: config.positive("rms_norm_eps", 1.0)?.some().unwrap_or(defaults.norm_eps) as f32,
            context,
            sliding_window,
            rope: rope(config, defaults.theta, context)?,
            tied: config.boolean("tie_word_embeddings")?.some().unwrap_or(false),
            bos_token_id: bos_token_id(config, vocab)?.unwrap_or((vocab > 1).then_some(1)),
            eos_token_ids: eos_token_ids(config, vocab)?.unwrap_or(if vocab > 2 { vec![2] } else { Vec::new() }),
        })
    }
}

fn architecture(config: Object) -> Result<Architecture, ImportError> {
    let supported = || {
        let names: Vec<&str> = Architecture::ALL.iter().map(|(architecture, _)| architecture.name()).collect();
        names.join(", ")
    };
    let named = match config.list("architectures")?.some().map(Vec::as_slice) {
        None | Some([]) => None,
        Some([Value::String(name), ..]) => match Architecture::ALL.iter().find(|(known, _)| known.name() == name) {
            Some(&found) => Some(found),
            None => return Err(config.unsupported("architectures", quote(name), supported())),
        },
        Some([other, ..]) => return Err(config.wrong("architectures", "a list of strings", describe(other))),
    };
    let typed = config.string("model_type")?.some();
    match (named, typed) {
        (Some((architecture, expected)), Some(found)) if expected != found => {
            let expected = format!("\"{expected}\", as `architectures` says {architecture}");
            Err(config.wrong("model_type", expected, quote(found)))
        }
        (Some((architecture, _)), _) => Ok(architecture),
        (None, Some(name)) => match Architecture::ALL.iter().find(|(_, known)| *known == name) {
            Some(&(architecture, _)) => Ok(architecture),
            None => Err(config.unsupported("model_type", quote(name), "mixtral, mistral, llama")),
        },
        (None, None) => {
            Err(config.wrong("architectures", format!("the name of an architecture ({})", supported()), "none"))
        }
    }
}

/// Features that change the computation and that moec does not have.
fn refuse_unsupported(config: Object) -> Result<(), ImportError> {
    for key in ["attention_bias", "mlp_bias"] {
        if config.boolean(key)?.some() == Some(true) {
            return Err(config.unsupported(key, "true", "false"));
        }
    }
    if let Some(name) = config.string("hidden_act")?.some()
        && !matches!(name, "silu" | "swish")
    {
        return Err(config.unsupported("hidden_act", quote(name), "\"silu\""));
    }
    for key in ["quantization_config", "compression_config"] {
        if let Field::Value(value) = config.field(key) {
            let method = value.get("quant_method").and_then(Value::as_str);
            let found = method.map_or_else(|| describe(value), quote);
            return Err(config.unsupported(key, found, "weights that are not quantized (bf16, f16 or f32)"));
        }
    }
    if let Some(types) = config.list("layer_types")?.some()
        && types.iter().any(|kind| *kind != types[0])
    {
        return Err(config.unsupported("layer_types", "a mix of kinds", "the same kind of attention in every layer"));
    }
    Ok(())
}

/// Without a value it is `hidden / heads`; where that leaves a remainder, Mixtral and Mistral round down and Llama refuses.
fn head_dim(config: Object, architecture: Architecture, hidden: usize, heads: usize) -> Result<usize, ImportError> {
    let rounds = match architecture {
        Architecture::Mixtral | Architecture::Mistral => true,
        Architecture::Llama => false,
    };
    let head_dim = match config.integer("head_dim", 1..=MAX_HEAD_DIM)?.some() {
        Some(value) => value,
        None if (rounds || hidden.is_multiple_of(heads)) && (1..=MAX_HEAD_DIM).contains(&(hidden / heads)) => {
            hidden / heads
        }
        None => {
            let expected = format!("a value, as `hidden_size` / `num_attention_heads` is {hidden} / {heads}");
            return Err(config.wrong("head_dim", expected, "none"));
        }
    };
    if !head_dim.is_multiple_of(2) {
        let expected = "an even number, as rotary embedding pairs the elements of a head";
        return Err(config.wrong("head_dim", expected, head_dim.to_string()));
    }
    Ok(head_dim)
}

fn experts(config: Object, architecture: Architecture) -> Result<Option<Experts>, ImportError> {
    match architecture {
        Architecture::Mistral | Architecture::Llama => Ok(None),
        Architecture::Mixtral => {
            let key = if config.map.contains_key("num_local_experts") { "num_local_experts" } else { "num_experts" };
            let count = config.size(key, 8, 1..=MAX_EXPERTS)?;
            let per_token = config.size("num_experts_per_tok", 2, 1..=MAX_EXPERTS)?;
            if per_token > count {
                let expected = format!("at most the number of experts ({count})");
                return Err(config.wrong("num_experts_per_tok", expected, per_token.to_string()));
            }
            Ok(Some(Experts { count, per_token }))
        }
    }
}

/// A non-empty `rope_scaling` (the old key) replaces `rope_parameters` (the new one); either may hold theta.
fn rope(config: Object, default_theta: f64, context: usize) -> Result<Rope, ImportError> {
    const MAX: f64 = 1e18;
    let old = config.object("rope_scaling")?.some().filter(|map| !map.is_empty());
    let new = config.object("rope_parameters")?.some();
    let (key, parameters) = match (old, new) {
        (Some(map), _) => ("rope_scaling", Some(map)),
        (None, Some(map)) => ("rope_parameters", Some(map)),
        (None, None) => ("", None),
    };
    let outer_theta = config.positive("rope_theta", MAX)?.some();
    partial_rotary(config)?;
    let Some(map) = parameters else {
        return Ok(Rope { theta: outer_theta.unwrap_or(default_theta), scaling: RopeScaling::None });
    };
    let prefix = format!("{key}.");
    let parameters = Object { path: config.path, prefix: &prefix, map };
    if let Some((kind, _)) = map.iter().find(|(_, value)| value.is_object()) {
        return Err(parameters.unsupported(kind, "an object", "one rotary embedding for all layers"));
    }
    partial_rotary(parameters)?;
    let theta = parameters.positive("rope_theta", MAX)?.some().or(outer_theta).unwrap_or(default_theta);
    let factor = |key: &str| match parameters.positive(key, MAX)? {
        Field::Value(value) => Ok(value),
        Field::Absent | Field::Null => Err(parameters.wrong(key, "a number above 0", "none")),
    };
    let key = if map.contains_key("rope_type") { "rope_type" } else { "type" };
    let scaling = match parameters.string(key)?.some().unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor("factor")? },
        "llama3" => {
            let (low, high) = (factor("low_freq_factor")?, factor("high_freq_factor")?);
            if low >= high {
                let expected = format!("less than `high_freq_factor` ({high})");
                return Err(parameters.wrong("low_freq_factor", expected, low.to_string()));
            }
            let original = parameters.integer("original_max_position_embeddings", 1..=MAX_CONTEXT)?;
            RopeScaling::Llama3 {
                factor: factor("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original.some().unwrap_or(context),
            }
        }
        other => {
            return Err(parameters.unsupported(key, quote(other), "\"default\", \"linear\", \"llama3\""));
        }
    };
    Ok(Rope { theta, scaling })
}

fn partial_rotary(object: Object) -> Result<(), ImportError> {
    match object.positive("partial_rotary_factor", 1.0)?.some() {
        Some(factor) if factor != 1.0 => Err(object.unsupported("partial_rotary_factor", factor.to_string(), "1.0")),
        _ => Ok(()),
    }
}

/// `bos_token_id`: `None` when absent, `Some(None)` when null.
pub(crate) fn bos_token_id(config: Object, vocab: usize) -> Result<Option<Option<u32>>, ImportError> {
    Ok(match config.integer("bos_token_id", 0..=vocab - 1)? {
        Field::Absent => None,
        Field::Null => Some(None),
        Field::Value(id) => Some(Some(id as u32)),
    })
}

/// `eos_token_id`, one or a list: `None` when absent, empty when null.
pub(crate) fn eos_token_ids(config: Object, vocab: usize) -> Result<Option<Vec<u32>>, ImportError> {
    let expected = || format!("an id or a list of ids below {vocab} (the vocabulary)");
    let id = |value: &Value| match value.as_u64() {
        Some(id) if id < vocab as u64 => Ok(id as u32),
        _ => Err(config.wrong("eos_token_id", expected(), describe(value))),
    };
    match config.field("eos_token_id") {
        Field::Absent => Ok(None),
        Field::Null => Ok(Some(Vec::new())),
        Field::Value(Value::Array(values)) => {
            let mut ids = values.iter().map(id).collect::<Result<Vec<u32>, _>>()?;
            ids.sort_unstable();
            ids.dedup();
            Ok(Some(ids))
        }
        Field::Value(value) => Ok(Some(vec![id(value)?])),
    }
}
