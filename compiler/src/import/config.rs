//! What a model is, taken from `config.json`: the numbers that shape every later step.
//!
//! Everything here was checked: sizes are within bounds and fit each other, so later steps compute with them freely.
//! Deliberately absent: dtypes (the headers of the weight files know them; the config's is often wrong) and training-only keys.
//! The rules for absent keys and nulls are those of the configuration classes of transformers.

use super::architecture::{Activation, Architecture, AttentionBias, Description, HeadNorm, Window, WindowedLayers};
use super::error::ImportError;
use super::json::{self, Field, Object, describe, quote};
use super::packed::{self, Packing};
use super::rope::{self, Rope};
use serde_json::Value;
use std::path::Path;

/// The experts of each layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Experts {
    /// How many each layer has.
    pub count: usize,
    /// How many each token uses, `1 ..= count`.
    pub per_token: usize,
    /// Whether the scores of the chosen ones sum up to 1; otherwise the softmax is over all.
    pub normalized: bool,
    /// Elements inside the expert that every token uses behind a gate of its own; `None` if there is none.
    pub shared: Option<usize>,
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
    /// Layers in which a token sees all keys in spite of `sliding_window`, rising.
    pub full_layers: Vec<usize>,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the projection from the heads has one.
    pub output_bias: bool,
    /// Whether gate, up and down have biases.
    pub ffn_bias: bool,
    /// What norms q and k.
    pub head_norm: Option<HeadNorm>,
    /// What gates go through.
    pub activation: Activation,
    /// What embeddings are multiplied by, if by anything.
    pub embedding_scale: Option<f32>,
    /// Whether what attention and the feed-forward block give is normed, too.
    pub post_norms: bool,
    /// What queries are multiplied by.
    pub query_scale: f32,
    /// What scores of attention are soft-capped with.
    pub score_cap: Option<f32>,
    /// What logits are soft-capped with.
    pub logit_cap: Option<f32>,
    /// Rotary position embedding.
    pub rope: Rope,
    /// How matrices are stored, when the directory says that they are quantized.
    pub packing: Option<Packing>,
    /// Whether the output projection is the embedding (after [`open`](super::open): and none is stored).
    pub tied: bool,
    /// Id that starts a text.
    pub bos_token_id: Option<u32>,
    /// Ids that end a generation.
    pub eos_token_ids: Vec<u32>,
}

/// Largest sizes that are taken for honest. They keep every product of two of them far from overflow.
const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 10;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 13;
const MAX_EXPERTS: usize = 1 << 10;
pub(crate) const MAX_CONTEXT: usize = 1 << 28;
const MAX_SCALAR: f64 = 1e6;

impl ModelConfig {
    /// Reads `config.json`. `path` is only for messages.
    ///
    /// # Errors
    /// Invalid JSON, a value of the wrong type or out of bounds, values that contradict each other, a feature that moec
    /// does not support.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<ModelConfig, ImportError> {
        let map = json::parse(bytes, path)?;
        ModelConfig::from_object(Object { path, prefix: "", map: &map })
    }

    /// Reads the keys of a `config.json`.
    pub(crate) fn from_object(config: Object) -> Result<ModelConfig, ImportError> {
        let architecture = architecture(config)?;
        let description = architecture.description();
        refuse_unsupported(config, description)?;
        let defaults = description.defaults;

        let vocab = config.size("vocab_size", defaults.vocab, 1..=MAX_VOCAB)?;
        let hidden = config.size("hidden_size", defaults.hidden, 1..=MAX_WIDTH)?;
        let ffn = match description.experts.and_then(|experts| experts.ffn) {
            Some((key, default)) => config.size(key, default, 1..=MAX_WIDTH)?,
            None => config.size("intermediate_size", defaults.ffn, 1..=MAX_WIDTH)?,
        };
        let layers = config.size("num_hidden_layers", defaults.layers, 1..=MAX_LAYERS)?;
        let heads = config.size("num_attention_heads", defaults.heads, 1..=MAX_HEADS)?;
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
        let (sliding_window, full_layers) = window(config, description, layers)?;
        let (qkv_bias, output_bias) = match description.attention_bias {
            AttentionBias::Never => (false, false),
            AttentionBias::Always => (true, false),
            AttentionBias::Key { key, default, output } => {
                let bias = config.boolean(key)?.some().unwrap_or(default);
                (bias, bias && output)
            }
        };
        let ffn_bias = match description.ffn_bias {
            Some(key) => config.boolean(key)?.some().unwrap_or(false),
            None => false,
        };
        let head_dim = head_dim(config, description, hidden, heads)?;
        let rope = rope::parse(config, description, context, head_dim)?;
        let context = rope.context(context);
        let query_scalar = match description.block.query_scalar {
            Some(default) => config.positive("query_pre_attn_scalar", MAX_SCALAR)?.some().unwrap_or(default) as f32,
            None => head_dim as f32,
        };
        // Null is none.
        let cap = |key: &str, default: Option<f64>| -> Result<Option<f32>, ImportError> {
            let Some(default) = default else { return Ok(None) };
            Ok(match config.positive(key, MAX_SCALAR)? {
                Field::Absent => Some(default as f32),
                Field::Null => None,
                Field::Value(value) if value < 1.0 / MAX_SCALAR => {
                    return Err(config.wrong(key, format!("at least {}", 1.0 / MAX_SCALAR), value.to_string()));
                }
                Field::Value(value) => Some(value as f32),
            })
        };
        let packing = packed::parse(config)?;
        if let (Some(rotated), Some(_)) = (rope.rotated, &packing) {
            let found = format!("{rotated} of {head_dim} elements of a head");
            return Err(config.unsupported("partial_rotary_factor", found, "1.0 for weights that are quantized"));
        }
        Ok(ModelConfig {
            architecture,
            vocab,
            hidden,
            ffn,
            layers,
            heads,
            kv_heads,
            head_dim,
            experts: experts(config, description)?,
            norm_eps: config.positive("rms_norm_eps", 1.0)?.some().unwrap_or(defaults.norm_eps) as f32,
            context,
            sliding_window,
            full_layers,
            qkv_bias,
            output_bias,
            ffn_bias,
            head_norm: description.head_norm,
            activation: description.block.activation,
            embedding_scale: description.block.scaled_embedding.then(|| (hidden as f64).sqrt() as f32),
            post_norms: description.block.post_norms,
            query_scale: 1.0 / query_scalar.sqrt(),
            score_cap: cap("attn_logit_softcapping", description.block.caps.map(|caps| caps.scores))?,
            logit_cap: cap("final_logit_softcapping", description.block.caps.map(|caps| caps.logits))?,
            rope,
            packing,
            tied: config.boolean("tie_word_embeddings")?.some().unwrap_or(defaults.tied),
            bos_token_id: bos_token_id(config, vocab)?.unwrap_or(defaults.bos.filter(|&id| (id as usize) < vocab)),
            eos_token_ids: eos_token_ids(config, vocab)?
                .unwrap_or_else(|| defaults.eos.into_iter().filter(|&id| (id as usize) < vocab).collect()),
        })
    }

    /// Keys that a token sees in `layer`; `None` for all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| self.full_layers.binary_search(&layer).is_err())
    }
}

fn architecture(config: Object) -> Result<Architecture, ImportError> {
    let names = || Architecture::all().map(Architecture::name).collect::<Vec<_>>().join(", ");
    let types = || Architecture::all().map(|one| one.description().model_type).collect::<Vec<_>>().join(", ");
    let named = match config.list("architectures")?.some().map(Vec::as_slice) {
        None | Some([]) => None,
        Some([Value::String(name), ..]) => match Architecture::all().find(|known| known.name() == name) {
            Some(found) => Some(found),
            None => return Err(config.unsupported("architectures", quote(name), names())),
        },
        Some([other, ..]) => return Err(config.wrong("architectures", "a list of strings", describe(other))),
    };
    let typed = config.string("model_type")?.some();
    match (named, typed) {
        (Some(architecture), Some(found)) if architecture.description().model_type != found => {
            let expected = architecture.description().model_type;
            let expected = format!("\"{expected}\", as `architectures` says {architecture}");
            Err(config.wrong("model_type", expected, quote(found)))
        }
        (Some(architecture), _) => Ok(architecture),
        (None, Some(name)) => match Architecture::all().find(|known| known.description().model_type == name) {
            Some(architecture) => Ok(architecture),
            None => Err(config.unsupported("model_type", quote(name), types())),
        },
        (None, None) => {
            Err(config.wrong("architectures", format!("the name of an architecture ({})", names()), "none"))
        }
    }
}

/// Features that change the computation and that moec does not have.
fn refuse_unsupported(config: Object, description: &Description) -> Result<(), ImportError> {
    let biases = match description.attention_bias {
        AttentionBias::Key { key, .. } => [Some(key), description.ffn_bias],
        AttentionBias::Never | AttentionBias::Always => [None, description.ffn_bias],
    };
    for key in ["attention_bias", "mlp_bias"] {
        if !biases.contains(&Some(key)) && config.boolean(key)?.some() == Some(true) {
            return Err(config.unsupported(key, "true", format!("false for {}", description.name)));
        }
    }
    // Gemma's first files say "gelu" and mean its approximation.
    let activations: [(&str, &[&str]); 2] = match description.block.activation {
        Activation::Silu => [("hidden_act", &["silu", "swish"]), ("hidden_activation", &[])],
        Activation::Gelu => {
            [("hidden_act", &["gelu_pytorch_tanh", "gelu"]), ("hidden_activation", &["gelu_pytorch_tanh"])]
        }
    };
    for (key, known) in activations.into_iter().filter(|(_, known)| !known.is_empty()) {
        if let Some(name) = config.string(key)?.some().filter(|name| !known.contains(name)) {
            return Err(config.unsupported(key, quote(name), quote(known[0])));
        }
    }
    if config.boolean("use_bidirectional_attention")?.some() == Some(true) {
        return Err(config.unsupported(
            "use_bidirectional_attention",
            "true",
            "false: every token sees those before it",
        ));
    }
    if let Field::Value(value) = config.field("clip_qkv") {
        return Err(config.unsupported("clip_qkv", describe(value), "null"));
    }
    if description.experts.is_some() {
        if !matches!(config.integer("decoder_sparse_step", 0..=MAX_LAYERS)?.some(), None | Some(1)) {
            let found = config.map.get("decoder_sparse_step").map(describe).unwrap_or_default();
            return Err(config.unsupported("decoder_sparse_step", found, "1: experts in every layer"));
        }
        if let Some(dense) = config.list("mlp_only_layers")?.some().filter(|layers| !layers.is_empty()) {
            let found = format!("a list of {}", dense.len());
            return Err(config.unsupported("mlp_only_layers", found, "an empty list: experts in every layer"));
        }
    }
    Ok(())
}

/// The window, and the layers without it.
fn window(
    config: Object,
    description: &Description,
    layers: usize,
) -> Result<(Option<usize>, Vec<usize>), ImportError> {
    let size = |default: Option<usize>| {
        Ok::<_, ImportError>(match config.integer("sliding_window", 1..=usize::MAX >> 1)? {
            Field::Absent => default,
            Field::Null => None,
            Field::Value(value) => Some(value),
        })
    };
    let listed = || -> Result<Option<Vec<bool>>, ImportError> {
        let Some(types) = config.list("layer_types")?.some() else { return Ok(None) };
        let kind = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(config.unsupported("layer_types", describe(kind), "full_attention, sliding_attention")),
        };
        let windowed = types.iter().map(kind).collect::<Result<Vec<bool>, _>>()?;
        if windowed.len() != layers {
            let expected = format!("one for each of the {layers} layers");
            return Err(config.wrong("layer_types", expected, windowed.len().to_string()));
        }
        Ok(Some(windowed))
    };
    let of_some = |window: usize, windowed: Vec<bool>| {
        let full: Vec<usize> = (0..layers).filter(|&layer| !windowed[layer]).collect();
        if full.len() == layers { (None, Vec::new()) } else { (Some(window), full) }
    };
    let switched = match description.window {
        Window::EveryOther(default) => {
            let windowed = listed()?;
            let Some(window) = size(Some(default))? else {
                if windowed.is_none_or(|windowed| windowed.contains(&true)) {
                    let expected = "a number of keys, as some layers have a window";
                    return Err(config.wrong("sliding_window", expected, "null"));
                }
                return Ok((None, Vec::new()));
            };
            let alternate = || (0..layers).map(|layer| layer.is_multiple_of(2)).collect();
            return Ok(of_some(window, windowed.unwrap_or_else(alternate)));
        }
        Window::Never | Window::Everywhere(_) => {
            if let Some(types) = config.list("layer_types")?.some()
                && types.iter().any(|kind| *kind != types[0])
            {
                let supported = "the same kind of attention in every layer";
                return Err(config.unsupported("layer_types", "a mix of kinds", supported));
            }
            let window = if let Window::Everywhere(default) = description.window { size(default)? } else { None };
            return Ok((window, Vec::new()));
        }
        Window::Switched(layers) => layers,
    };
    if config.boolean("use_sliding_window")?.some() != Some(true) {
        return Ok((None, Vec::new()));
    }
    let Some(window) = size(Some(4096))? else { return Ok((None, Vec::new())) };
    let listed = if switched == WindowedLayers::All { None } else { listed()? };
    let windowed: Vec<bool> = if let Some(windowed) = listed {
        windowed
    } else {
        let limit = config.size("max_window_layers", 28, 0..=MAX_LAYERS)?;
        let is_windowed = |layer: usize| match switched {
            WindowedLayers::All => true,
            WindowedLayers::Late => layer >= limit,
            WindowedLayers::EvenEarly => layer.is_multiple_of(2) && layer < limit,
        };
        (0..layers).map(is_windowed).collect()
    };
    Ok(of_some(window, windowed))
}

/// Without a value it is `hidden / heads`.
fn head_dim(config: Object, description: &Description, hidden: usize, heads: usize) -> Result<usize, ImportError> {
    let given = match config.integer("head_dim", 1..=MAX_HEAD_DIM)? {
        Field::Absent => description.defaults.head_dim,
        Field::Null => None,
        Field::Value(value) => Some(value),
    };
    let rounds = !description.whole_heads;
    let head_dim = match given {
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

fn experts(config: Object, description: &Description) -> Result<Option<Experts>, ImportError> {
    let Some(keys) = description.experts else { return Ok(None) };
    let first = keys.count.iter().find(|key| config.map.contains_key(**key)).unwrap_or(&keys.count[0]);
    let count = config.size(first, keys.default_count, 1..=MAX_EXPERTS)?;
    let per_token = config.size("num_experts_per_tok", keys.per_token, 1..=MAX_EXPERTS)?;
    if per_token > count {
        let expected = format!("at most the number of experts ({count})");
        return Err(config.wrong("num_experts_per_tok", expected, per_token.to_string()));
    }
    let normalized = match keys.normalized {
        Some((key, default)) => config.boolean(key)?.some().unwrap_or(default),
        None => true,
    };
    let shared = match keys.shared {
        Some((key, default)) => Some(config.size(key, default, 1..=MAX_WIDTH)?),
        None => None,
    };
    Ok(Some(Experts { count, per_token, normalized, shared }))
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
