//! The metadata of a GGUF file as the keys of a `config.json`, so that one reader checks both.
//!
//! Deliberately absent: the tokenizer's keys ([`super::tokenizer`]), and the checks ([`super::super::config`]).

use super::super::architecture::{Architecture, AttentionBias, Window};
use super::super::config::{MAX_CONTEXT, ModelConfig};
use super::super::error::ImportError;
use super::super::json::Object;
use super::super::rope::{RopeScaling, long_amplitude, mscale};
use super::container::Value;
use serde_json::{Map, Number, Value as Json, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What a model's files say, keys of all parts taken together.
pub(super) struct Metadata<'a> {
    pub(super) path: &'a Path,
    pub(super) keys: &'a BTreeMap<String, Value>,
}

/// Which key of `config.json` says what a key of the architecture (`llama.block_count`) does.
const KEYS: &[(&str, &str, bool)] = &[
    ("num_hidden_layers", "block_count", true),
    ("max_position_embeddings", "context_length", true),
    ("hidden_size", "embedding_length", true),
    ("intermediate_size", "feed_forward_length", true),
    ("num_attention_heads", "attention.head_count", true),
    ("num_key_value_heads", "attention.head_count_kv", false),
    ("head_dim", "attention.key_length", false),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", true),
    ("rope_theta", "rope.freq_base", false),
    ("num_experts_per_tok", "expert_used_count", false),
    ("sliding_window", "attention.sliding_window", false),
    ("attn_logit_softcapping", "attn_logit_softcapping", false),
    ("final_logit_softcapping", "final_logit_softcapping", false),
];

impl<'a> Metadata<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.keys.get(key)
    }

    /// A text, if the key is there.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, "a text", other.describe())),
        }
    }

    /// Yes or no, if the key is there.
    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(yes)) => Ok(Some(*yes)),
            Some(other) => Err(self.wrong(key, "true or false", other.describe())),
        }
    }

    /// An id, if the key is there. Some writers store −1 for none.
    pub(super) fn id(&self, key: &str) -> Result<Option<u32>, ImportError> {
        match self.get(key) {
            None | Some(Value::Signed(-1)) => Ok(None),
            Some(&Value::Unsigned(id)) if id == u64::from(u32::MAX) => Ok(None),
            Some(value) => match whole(value).and_then(|id| u32::try_from(id).ok()) {
                Some(id) => Ok(Some(id)),
                None => Err(self.wrong(key, "the id of a token", value.describe())),
            },
        }
    }

    pub(super) fn wrong(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> ImportError {
        ImportError::Key { path: self.path.into(), key: key.into(), expected: expected.into(), found: found.into() }
    }

    pub(super) fn unsupported(&self, key: &str, found: impl Into<String>, supported: impl Into<String>) -> ImportError {
        ImportError::Unsupported {
            path: self.path.into(),
            key: key.into(),
            found: found.into(),
            supported: supported.into(),
        }
    }

    /// The sliding window, if the key is there.
    fn window(&self, architecture: &str) -> Option<u64> {
        self.get(&format!("{architecture}.attention.sliding_window")).and_then(whole)
    }

    /// What users should know of a model although it can be compiled.
    pub(super) fn warnings(&self) -> Vec<String> {
        let text = |key: &str| self.text(key).ok().flatten().unwrap_or_default().to_lowercase();
        let name = [text("general.name"), text("general.version"), text("general.basename")].join(" ");
        let lost = name.contains("mistral") && name.contains("v0.1") && self.window("llama").is_none();
        let dense = self.get("llama.expert_count").and_then(whole).is_none_or(|count| count == 0);
        if !(lost && dense && text("general.architecture") == "llama") {
            return Vec::new();
        }
        vec![format!(
            "{}: llama.attention.sliding_window is absent, and Mistral v0.1 was made with a window of 4096 tokens: beyond as many this model \
             computes something else. Build from the Hugging Face directory, or with --context 4096",
            self.path.display()
        )]
    }

    /// The model's architecture.
    fn architecture(&self) -> Result<Architecture, ImportError> {
        const KEY: &str = "general.architecture";
        let Some(name) = self.text(KEY)? else {
            return Err(self.wrong(KEY, "the name of an architecture", "none"));
        };
        let has_experts = self.get(&format!("{name}.expert_count")).and_then(whole).is_some_and(|count| count > 0);
        let fits =
            |one: &Architecture| one.description().gguf == name && one.description().experts.is_some() == has_experts;
        // Mistral and Llama are one architecture in these files; that with a window is Mistral.
        let windowed = self.window(name).is_some_and(|window| window > 0);
        let found = Architecture::all().filter(fits).find(|one| match one {
            Architecture::Mistral => windowed,
            Architecture::Llama => !windowed,
            _ => true,
        });
        found.ok_or_else(|| {
            let mut names: Vec<&str> = Architecture::all().map(|one| one.description().gguf).collect();
            names.sort_unstable();
            names.dedup();
            let experts = if has_experts { " with experts" } else { "" };
            self.unsupported(KEY, format!("\"{name}\"{experts}"), names.join(", "))
        })
    }

    /// The model's configuration. `shape_of` gives the shape of a tensor, if there is one of that name.
    pub(super) fn config(&self, shape_of: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<ModelConfig, ImportError> {
        let architecture = self.architecture()?;
        let description = architecture.description();
        let prefix = description.gguf;
        let mut map = Map::new();
        // The name in this file of each key that is made, for messages.
        let mut names: Vec<(String, String)> = Vec::new();
        map.insert("architectures".into(), json!([description.name]));
        map.insert("model_type".into(), json!(description.model_type));
        let mut put = |map: &mut Map<String, Json>, ours: &str, theirs: &str| -> Result<bool, ImportError> {
            let key = format!("{prefix}.{theirs}");
            names.push((ours.into(), key.clone()));
            let Some(value) = self.get(&key) else { return Ok(false) };
            map.insert(ours.into(), self.number(&key, value)?);
            Ok(true)
        };
        for &(ours, theirs, needed) in KEYS {
            if !put(&mut map, ours, theirs)? && needed {
                return Err(self.wrong(&format!("{prefix}.{theirs}"), "a number", "none"));
            }
        }
        if let Some(keys) = description.experts {
            put(&mut map, keys.count[0], "expert_count")?;
            if let Some((key, _)) = keys.ffn {
                put(&mut map, key, "expert_feed_forward_length")?;
            }
            if let Some((key, _)) = keys.shared {
                put(&mut map, key, "expert_shared_feed_forward_length")?;
            }
            if let Some((key, _)) = keys.normalized {
                let given = self.boolean(&format!("{prefix}.expert_weights_norm"))?;
                map.insert(key.into(), json!(given.unwrap_or(keys.normalized_in_gguf)));
            }
        }
        // What an absent key means here is not what it means in config.json.
        for (key, value) in [("head_dim", Json::Null), ("rope_theta", json!(1e4))] {
            map.entry(key).or_insert(value);
        }
        // Where some layers have one in any case, it is that of the architecture.
        if !matches!(description.window, Window::EveryOther(_)) {
            map.entry("sliding_window").or_insert(Json::Null);
        }
        if description.block.query_scalar.is_some() {
            map.insert("query_pre_attn_scalar".into(), query_scalar(&map));
        }
        map.entry("num_key_value_heads").or_insert(Json::Null);
        let Some(&[vocab, _]) = shape_of("token_embd.weight").as_deref() else {
            return Err(ImportError::tensor(self.path, "token_embd.weight", "a matrix", "none"));
        };
        map.insert("vocab_size".into(), json!(vocab));
        map.insert("tie_word_embeddings".into(), json!(shape_of("output.weight").is_none()));
        if let AttentionBias::Key { key, .. } = description.attention_bias {
            map.insert(key.into(), json!(shape_of("blk.0.attn_q.bias").is_some()));
        }
        if let Some(key) = description.ffn_bias {
            map.insert(key.into(), json!(shape_of("blk.0.ffn_gate.bias").is_some()));
        }
        for (ours, theirs) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
            let key = format!("tokenizer.ggml.{theirs}_token_id");
            map.insert(ours.into(), self.id(&key)?.map_or(Json::Null, |id| json!(id)));
            names.push((ours.into(), key));
        }
        self.rope(prefix, &mut map)?;
        names.push(("rope_scaling.rope_type".into(), format!("{prefix}.rope.scaling.type")));
        names.push(("rope_scaling.factor".into(), format!("{prefix}.rope.scaling.factor")));
        names.push(("partial_rotary_factor".into(), format!("{prefix}.rope.dimension_count")));

        let object = Object { path: self.path, prefix: "", map: &map };
        ModelConfig::from_object(object).map_err(|error| {
            error.rename(|key| names.iter().find(|(ours, _)| ours == key).map(|(_, theirs)| theirs.clone()))
        })
    }

    /// A number as JSON. A list of one for each layer must have the same for all.
    fn number(&self, key: &str, value: &Value) -> Result<Json, ImportError> {
        match value {
            Value::Unsigned(number) => Ok(json!(number)),
            Value::Signed(number) => Ok(json!(number)),
            Value::Float(number) => Ok(Number::from_f64(shortest(*number)).map_or(Json::Null, Json::Number)),
            Value::Numbers(numbers) => match numbers.as_slice() {
                [first, rest @ ..] if rest.iter().all(|number| number == first) && first.fract() == 0.0 => {
                    Ok(json!(*first as i64))
                }
                _ => Err(self.unsupported(key, "a list of different numbers", "one number for all layers")),
            },
            Value::Bool(_) | Value::Text(_) | Value::Texts(_) => Err(self.wrong(key, "a number", value.describe())),
        }
    }

    /// Of a model with LongRoPE the context that it was first trained with, and what cosines and sines are multiplied by.
    pub(super) fn long_rope(&self, config: &ModelConfig) -> Result<Option<(usize, f64)>, ImportError> {
        let prefix = config.architecture.description().gguf;
        let key = |name: &str| format!("{prefix}.rope.scaling.{name}");
        let named = self.text(&key("type"))? == Some("longrope");
        let factor = match self.get(&key("attn_factor")) {
            Some(&Value::Float(number)) if number > 0.0 && number.is_finite() => Some(shortest(number)),
            Some(other) => return Err(self.wrong(&key("attn_factor"), "a number above 0", other.describe())),
            None => None,
        };
        let original = key("original_context_length");
        match self.get(&original) {
            // YaRN has this key, too.
            _ if !named && !matches!(config.rope.scaling, RopeScaling::None) => Ok(None),
            None if named => Err(self.no_original_context(config)),
            None => Ok(None),
            Some(value) => {
                match whole(value).and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=MAX_CONTEXT).contains(n)) {
                    Some(original) => {
                        let longer = config.context as f64 / original as f64;
                        Ok(Some((original, factor.unwrap_or_else(|| long_amplitude(longer, original)))))
                    }
                    None => Err(self.wrong(&original, "a number of tokens", value.describe())),
                }
            }
        }
    }

    /// The error about LongRoPE that does not say when a sequence is long.
    pub(super) fn no_original_context(&self, config: &ModelConfig) -> ImportError {
        let key = format!("{}.rope.scaling.original_context_length", config.architecture.description().gguf);
        self.wrong(&key, "a number of tokens, as the model has LongRoPE", "none")
    }

    /// Rotary embedding as the keys of `config.json`.
    fn rope(&self, prefix: &str, map: &mut Map<String, Json>) -> Result<(), ImportError> {
        let float = |key: &str| -> Result<Option<f64>, ImportError> {
            let key = format!("{prefix}.rope.{key}");
            match self.get(&key) {
                None => Ok(None),
                Some(&Value::Float(number)) => Ok(Some(shortest(number))),
                Some(other) => match whole(other) {
                    Some(number) => Ok(Some(number as f64)),
                    None => Err(self.wrong(&key, "a number", other.describe())),
                },
            }
        };
        if let (Some(rotated), Some(hidden), Some(heads)) =
            (float("dimension_count")?, as_f64(map.get("hidden_size")), as_f64(map.get("num_attention_heads")))
        {
            let head_dim = as_f64(map.get("head_dim")).unwrap_or(hidden / heads);
            if rotated != head_dim && rotated > 0.0 {
                map.insert("partial_rotary_factor".into(), json!(rotated / head_dim));
            }
        }
        let kind = self.text(&format!("{prefix}.rope.scaling.type"))?;
        let factor = match float("scaling.factor")? {
            None => float("scale_linear")?,
            factor => factor,
        };
        let scaling = match (kind, factor) {
            (None | Some("none"), None) | (Some("none"), Some(_)) => return Ok(()),
            // Written by some converters although nothing is scaled.
            (None | Some("linear"), Some(factor)) if factor == 1.0 || factor == 0.0 => return Ok(()),
            // The divisors are tensors: see `long_rope`.
            (Some("longrope"), _) => return Ok(()),
            (None | Some("linear"), factor) => json!({"rope_type": "linear", "factor": factor}),
            (Some("yarn"), factor) => {
                let mut scaling = json!({"rope_type": "yarn", "factor": factor});
                for (ours, theirs) in [
                    ("original_max_position_embeddings", "scaling.original_context_length"),
                    ("beta_fast", "scaling.yarn_beta_fast"),
                    ("beta_slow", "scaling.yarn_beta_slow"),
                ] {
                    if let Some(number) = float(theirs)? {
                        scaling[ours] = if number.fract() == 0.0 { json!(number as i64) } else { json!(number) };
                    }
                }
                if let Some(more) = float("scaling.attn_factor")? {
                    scaling["attention_factor"] = json!(more * mscale(factor.unwrap_or(1.0), 1.0));
                }
                scaling
            }
            (Some(other), _) => json!({"rope_type": other}),
        };
        map.insert("rope_scaling".into(), scaling);
        Ok(())
    }
}

/// What the queries of a Gemma 2 are divided by the root of. These files do not say; as llama.cpp does it is taken from the number of layers, by which it
/// tells the model of 27 B parameters from the others.
fn query_scalar(map: &Map<String, Json>) -> Json {
    const LAYERS_OF_27B: f64 = 46.0;
    let number = |key: &str| as_f64(map.get(key));
    let quotient =
        number("hidden_size").zip(number("num_attention_heads")).map(|(hidden, heads)| (hidden / heads).floor());
    let chosen = match number("num_hidden_layers") {
        Some(LAYERS_OF_27B) => quotient,
        _ => number("head_dim").or(quotient),
    };
    chosen.map_or(Json::Null, |scalar| json!(scalar))
}

fn as_f64(value: Option<&Json>) -> Option<f64> {
    value.and_then(Json::as_f64)
}

/// A whole number from 0.
fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::Unsigned(number) => Some(*number),
        Value::Signed(number) => u64::try_from(*number).ok(),
        Value::Float(_) | Value::Bool(_) | Value::Text(_) | Value::Texts(_) | Value::Numbers(_) => None,
    }
}

/// The number that was meant where an f32 was stored: 1e-5, and not what that is as f64.
fn shortest(number: f64) -> f64 {
    if f64::from(number as f32) == number { (number as f32).to_string().parse().unwrap_or(number) } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_of_gemma_2_by_its_sizes() {
        let scalar = |layers: usize, hidden: usize, heads: usize, head_dim: usize| {
            let keys = json!({
                "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": head_dim,
            });
            query_scalar(keys.as_object().expect("an object"))
        };
        assert_eq!(scalar(26, 2304, 8, 256), json!(256.0));
        assert_eq!(scalar(42, 3584, 16, 256), json!(256.0));
        assert_eq!(scalar(46, 4608, 32, 128), json!(144.0));
    }
}
