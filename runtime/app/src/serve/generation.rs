//! The parameters that chats and completions have in common, checked.

use super::error::{Answer, ApiError};
use super::grammar::Rule;
use moec_runtime::Sampling;
use moec_runtime::sampler::random_seed;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Most answers to one prompt.
const MOST_CHOICES: usize = 64;
/// Most stop strings.
const MOST_STOPS: usize = 16;
/// Most alternatives of a token whose log-probabilities are told.
pub const MOST_LOGPROBS: usize = 20;

/// One string, or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "a string or a list of strings")]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    pub fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// Options of a streamed answer.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Send a last chunk with the numbers of tokens.
    pub include_usage: Option<bool>,
}

/// What the answer must look like.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    /// Any text.
    Text {},
    /// A JSON object.
    JsonObject {},
    /// JSON that fits a schema.
    JsonSchema {
        /// The schema.
        json_schema: JsonSchema,
    },
}

/// A JSON schema with its name.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JsonSchema {
    /// A name, for people.
    #[allow(dead_code)]
    pub name: Option<String>,
    /// A description, for people.
    #[allow(dead_code)]
    pub description: Option<String>,
    /// The schema; without one any JSON fits.
    #[serde(alias = "schema_definition")]
    #[schema(value_type = Object)]
    pub schema: Option<Value>,
    /// Answers always fit the schema here, strict or not.
    #[allow(dead_code)]
    pub strict: Option<bool>,
}

/// Parameters of an answer, common to chats and completions.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// Name of the model; may be left out.
    pub model: Option<String>,
    /// Send the answer in pieces (server-sent events).
    pub stream: Option<bool>,
    /// Options of a streamed answer.
    pub stream_options: Option<StreamOptions>,
    /// 0 takes the most probable token, larger is more adventurous; 1 unless given.
    #[schema(minimum = 0)]
    pub temperature: Option<f32>,
    /// Draw only from the most probable tokens that together reach this probability.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Draw only from so many of the most probable tokens; 0 or -1 for all.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Draw only from tokens at least so many times as probable as the best.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Most tokens of the answer.
    #[schema(minimum = 0)]
    pub max_tokens: Option<u64>,
    /// End before these strings, at most 16.
    pub stop: Option<OneOrMany>,
    /// Seed of the random numbers: the same request with the same seed gets the same answer.
    #[serde(alias = "random_seed")]
    pub seed: Option<i64>,
    /// How many answers to each prompt.
    #[schema(minimum = 1, maximum = 64)]
    pub n: Option<u64>,
    /// Subtracted from the logits of tokens that the answer has.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// Subtracted for each time that the answer has a token.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Divides positive logits, and multiplies negative ones, of tokens of prompt and answer.
    #[schema(exclusive_minimum = 0)]
    pub repetition_penalty: Option<f32>,
    /// Added to the logits of tokens, by their ids; -100 to 100.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// What the answer must look like.
    pub response_format: Option<ResponseFormat>,
    /// A grammar in Lark's notation that the answer must follow.
    pub grammar: Option<String>,
    /// Go on when the model ends its answer. For measuring.
    pub ignore_eos: Option<bool>,
}

/// The names of the parameters of [`Generation`].
pub const NAMES: &[&str] = &[
    "model",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "stop",
    "seed",
    "random_seed",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "response_format",
    "grammar",
    "ignore_eos",
];

/// Checked parameters.
#[derive(Clone, Debug)]
pub struct Checked {
    pub sampling: Sampling,
    pub max_tokens: Option<usize>,
    pub stops: Vec<String>,
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub rule: Option<Rule>,
    pub ignore_eos: bool,
}

fn within(name: &str, value: Option<f32>, least: f32, most: f32) -> Answer<Option<f32>> {
    match value {
        Some(value) if !(least..=most).contains(&value) => {
            let range = if most == f32::MAX { format!("at least {least}") } else { format!("from {least} to {most}") };
            Err(ApiError::param(name, format!("must be {range}, not {value}")))
        }
        value => Ok(value),
    }
}

/// A number of things, at most `most`.
pub fn count(name: &str, value: Option<u64>, least: u64, most: usize) -> Answer<Option<usize>> {
    match value {
        Some(value) if value < least || value > most as u64 => {
            let range =
                if most == usize::MAX { format!("at least {least}") } else { format!("from {least} to {most}") };
            Err(ApiError::param(name, format!("must be {range}, not {value}")))
        }
        value => Ok(value.map(|value| value as usize)),
    }
}

impl Generation {
    /// The parameters as the runtime wants them, for a model with `vocab` tokens.
    pub fn check(self, vocab: u32) -> Answer<Checked> {
        let temperature = within("temperature", self.temperature, 0.0, f32::MAX)?.unwrap_or(1.0);
        let repeat_penalty = within("repetition_penalty", self.repetition_penalty, 0.0, f32::MAX)?.unwrap_or(1.0);
        if repeat_penalty == 0.0 {
            return Err(ApiError::param("repetition_penalty", "must be greater than 0"));
        }
        let top_k = match self.top_k.unwrap_or(0) {
            -1 | 0 => 0,
            k if k > 0 => k as usize,
            k => return Err(ApiError::param("top_k", format!("must be -1, 0 or more, not {k}"))),
        };
        let sampling = Sampling {
            temperature,
            top_k,
            top_p: within("top_p", self.top_p, 0.0, 1.0)?.unwrap_or(1.0),
            min_p: within("min_p", self.min_p, 0.0, 1.0)?.unwrap_or(0.0),
            repeat_penalty,
            repeat_last: usize::MAX,
            presence_penalty: within("presence_penalty", self.presence_penalty, -2.0, 2.0)?.unwrap_or(0.0),
            frequency_penalty: within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?.unwrap_or(0.0),
            logit_bias: logit_bias(self.logit_bias.unwrap_or_default(), vocab)?,
            seed: self.seed.map_or_else(random_seed, |seed| seed as u64),
        };
        let stops = self.stop.map(OneOrMany::into_vec).unwrap_or_default();
        if stops.len() > MOST_STOPS {
            return Err(ApiError::param("stop", format!("has {} strings; {MOST_STOPS} are the most", stops.len())));
        }
        if stops.iter().any(String::is_empty) {
            return Err(ApiError::param("stop", "has an empty string, which would end every answer"));
        }
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::param("stream_options", "is for streamed answers only: set `stream`"));
        }
        let format = match self.response_format {
            None | Some(ResponseFormat::Text {}) => None,
            Some(ResponseFormat::JsonObject {}) => Some(Rule::JsonObject),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                Some(Rule::Schema(json_schema.schema.unwrap_or(Value::Bool(true))))
            }
        };
        let rule = match (format, self.grammar) {
            (Some(_), Some(_)) => {
                return Err(ApiError::param(
                    "grammar",
                    "and `response_format` cannot both say what the answer looks like",
                ));
            }
            (format, grammar) => format.or(grammar.map(Rule::Lark)),
        };
        Ok(Checked {
            sampling,
            max_tokens: count("max_tokens", self.max_tokens, 0, usize::MAX)?,
            stops,
            n: count("n", self.n, 1, MOST_CHOICES)?.unwrap_or(1),
            stream,
            include_usage: self.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
            rule,
            ignore_eos: self.ignore_eos.unwrap_or(false),
        })
    }
}

fn logit_bias(map: BTreeMap<String, f32>, vocab: u32) -> Answer<Vec<(u32, f32)>> {
    let mut biases = Vec::with_capacity(map.len());
    for (name, bias) in map {
        let id = name.parse::<u32>().ok().filter(|id| *id < vocab);
        let Some(id) = id else {
            let what = format!("has the key `{name}`; keys are token ids, 0 to {}", vocab - 1);
            return Err(ApiError::param("logit_bias", what));
        };
        within(&format!("logit_bias.{id}"), Some(bias), -100.0, 100.0)?;
        biases.push((id, bias));
    }
    biases.sort_unstable_by_key(|(id, _)| *id);
    if let Some(twice) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(ApiError::param("logit_bias", format!("has token {} twice", twice[0].0)));
    }
    Ok(biases)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use utoipa::PartialSchema;

    fn check(value: Value) -> Answer<Checked> {
        serde_json::from_value::<Generation>(value).unwrap().check(100)
    }

    #[test]
    fn names_are_the_schema() {
        let schema = serde_json::to_value(Generation::schema()).unwrap();
        let properties = schema["properties"].as_object().unwrap();
        let known: Vec<&str> = NAMES.iter().copied().filter(|name| *name != "random_seed").collect();
        assert_eq!(properties.keys().map(String::as_str).collect::<Vec<_>>(), known);
    }

    #[test]
    fn defaults_are_openais() {
        let checked = check(json!({})).unwrap();
        let Sampling { temperature, top_k, top_p, min_p, repeat_penalty, .. } = checked.sampling;
        assert_eq!((temperature, top_k, top_p, min_p, repeat_penalty), (1.0, 0, 1.0, 0.0, 1.0));
        assert_eq!((checked.max_tokens, checked.n, checked.stream, checked.stops.len()), (None, 1, false, 0));
    }

    #[test]
    fn wrong_values_are_named() {
        for (value, name) in [
            (json!({ "temperature": -0.1 }), "temperature"),
            (json!({ "top_p": 1.5 }), "top_p"),
            (json!({ "top_k": -2 }), "top_k"),
            (json!({ "min_p": 2 }), "min_p"),
            (json!({ "n": 0 }), "n"),
            (json!({ "n": 65 }), "n"),
            (json!({ "presence_penalty": 3 }), "presence_penalty"),
            (json!({ "frequency_penalty": -3 }), "frequency_penalty"),
            (json!({ "repetition_penalty": 0 }), "repetition_penalty"),
            (json!({ "logit_bias": { "100": 1 } }), "logit_bias"),
            (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
            (json!({ "logit_bias": { "7": 101 } }), "logit_bias.7"),
            (json!({ "logit_bias": { "7": 1, "07": 1 } }), "logit_bias"),
            (json!({ "stop": "" }), "stop"),
            (json!({ "stop": vec!["x"; 17] }), "stop"),
            (json!({ "stream_options": {} }), "stream_options"),
            (json!({ "grammar": "start: \"a\"", "response_format": { "type": "json_object" } }), "grammar"),
        ] {
            assert_eq!(check(value.clone()).unwrap_err().param.as_deref(), Some(name), "{value}");
        }
    }

    #[test]
    fn values_arrive() {
        let checked = check(json!({
            "temperature": 0.5, "top_k": -1, "seed": 7, "stop": "x", "n": 2, "stream": true,
            "stream_options": { "include_usage": true }, "logit_bias": { "9": 5, "3": -5 }, "max_tokens": 0,
            "response_format": { "type": "json_schema", "json_schema": { "name": "a", "schema": { "type": "null" } } },
        }))
        .unwrap();
        assert_eq!((checked.sampling.seed, checked.sampling.logit_bias), (7, vec![(3, -5.0), (9, 5.0)]));
        assert_eq!(
            (checked.stops, checked.n, checked.stream, checked.include_usage),
            (vec!["x".into()], 2, true, true)
        );
        assert_eq!((checked.max_tokens, checked.rule), (Some(0), Some(Rule::Schema(json!({ "type": "null" })))));
    }
}
