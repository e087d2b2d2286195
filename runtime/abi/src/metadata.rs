//! What a payload says about itself, as JSON: written by the compiler, read by the runtime.
//!
//! Everything a person may want to know (`info`) or the runtime needs beyond numbers (special tokens, chat template).
//! Deliberately absent: tensors' bytes and anything that generated code needs.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The payload's description.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    /// Name of the model (its directory's name).
    pub name: String,
    /// Architecture as in `config.json`, e.g. `MixtralForCausalLM`.
    pub architecture: String,
    /// Number of parameters.
    pub parameters: u64,
    /// Quantization per weight role, e.g. `experts` → `q4`, or `q8+q4` where weights of a role differ; of an output that is the embedding's weight, that
    /// one's.
    pub quantization: BTreeMap<String, String>,
    /// Id that starts a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Ids that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// Text of the bos token, for the chat template.
    pub bos_token: Option<String>,
    /// Text of the eos token, for the chat template.
    pub eos_token: Option<String>,
    /// Version of moec that packed the payload.
    pub packed_by: String,
    /// Every weight in the payload, in order of offset.
    pub weights: Vec<WeightEntry>,
}

/// One weight in the payload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightEntry {
    /// Name in the plan, e.g. `layers.0.experts.gate_up`.
    pub name: String,
    /// Role, as in `--quant ROLE=…`.
    pub role: String,
    /// The role that the same bytes have, too: `output` of an embedding that a tied output shares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub also: Option<String>,
    /// Layout, e.g. `q4`.
    pub layout: String,
    /// Output features (of all matrices together).
    pub rows: u64,
    /// Input features.
    pub cols: u64,
    /// Bytes from the payload's start.
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Quantization error: RMS of the difference over RMS of the weight; 0 when exact.
    pub relative_rms_error: f64,
}

/// How often each expert of a model was chosen: written by a compiled model, read by the compiler.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertStats {
    /// [`ExpertStats::VERSION`].
    pub version: u32,
    /// Version of moec that counted.
    pub moec: String,
    /// Name of the model, as in [`Metadata`].
    pub model: String,
    /// Architecture, as there.
    pub architecture: String,
    /// Number of parameters, as there: with the names, what tells one model from another however it is quantized.
    pub parameters: u64,
    /// Experts of a layer.
    pub experts: u32,
    /// Experts for each token.
    pub experts_per_token: u32,
    /// Tokens that chose.
    pub tokens: u64,
    /// For each layer how often each expert was chosen.
    pub counts: Vec<Vec<u64>>,
}

impl ExpertStats {
    /// The version of this form.
    pub const VERSION: u32 = 1;
}

/// Values recorded when the executable was built, recomputed by `selftest`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Golden {
    /// Token ids that were fed.
    pub tokens: Vec<u32>,
    /// FNV-1a (64 bit) over the bits of all logits of all those tokens, in order.
    pub logits_fnv1a: u64,
    /// The first eight logits of the last token, for people.
    pub first_logits: Vec<f32>,
}
