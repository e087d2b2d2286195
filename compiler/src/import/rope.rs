//! Rotary position embedding in `config.json`: which keys hold it, in their old and their new form.
//!
//! The rules are those of transformers (`modeling_rope_utils.py`): a non-empty `rope_scaling` (the old key) replaces `rope_parameters` (the new
//! one); either may hold theta. Deliberately absent: the frequencies ([`crate::emit::pack`] computes them).

use super::architecture::Description;
use super::config::MAX_CONTEXT;
use super::error::ImportError;
use super::json::{Field, Object, describe, quote};
use serde_json::Value;

/// Rotary position embedding.
#[derive(Clone, PartialEq, Debug)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements of a head that are rotated, the first of its halves and of the whole head: an even number. All without.
    pub rotated: Option<usize>,
    /// How the frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are changed for long contexts.
#[derive(Clone, PartialEq, Debug)]
pub enum RopeScaling {
    /// Not at all. Also what `dynamic` means within the context that the model was made for, to which moec keeps.
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
    /// YaRN (<https://arxiv.org/abs/2309.00071>): as Llama 3, with a ramp over the pairs of a head instead of over wavelengths; and
    /// rotated vectors are longer.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Pairs that turn more often within `original_context` keep their frequency.
        beta_fast: f64,
        /// Pairs that turn less often have theirs divided.
        beta_slow: f64,
        /// The context (tokens) that the model was first trained with.
        original_context: usize,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// Whether the ends of the ramp are rounded to whole pairs.
        truncate: bool,
    },
    /// LongRoPE (<https://arxiv.org/abs/2402.13753>): the frequency of each pair has a divisor of its own, one for sequences up to
    /// `original_context` and another for longer ones; and rotated vectors are longer. transformers changes from one to the other in the middle of a
    /// sequence, when keys of the one are in the cache; moec, as llama.cpp, takes those of the longest sequence that it compiles for.
    Long {
        /// For each rotated pair of a head, for sequences up to `original_context`.
        short: Vec<f32>,
        /// For longer ones.
        long: Vec<f32>,
        /// The context (tokens) that the model was first trained with.
        original_context: usize,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
    },
    /// The frequency of each pair has a divisor of its own (GGUF files of Llama 3.1 and later have them in a tensor).
    Divided {
        /// For each pair of a head.
        divisors: Vec<f32>,
    },
}

impl Rope {
    /// What cosines and sines are multiplied by.
    pub fn amplitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Long { attention_factor, .. } => attention_factor,
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Divided { .. } => 1.0,
        }
    }

    /// The longest context for which the scaling was made, if it says so and it is longer than `context`, the model's.
    pub(crate) fn context(&self, context: usize) -> usize {
        match self.scaling {
            RopeScaling::Yarn { factor, original_context, .. } => {
                context.max((original_context as f64 * factor) as usize).min(MAX_CONTEXT)
            }
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Long { .. }
            | RopeScaling::Divided { .. } => context,
        }
    }
}

/// Largest number that is taken for honest.
const MAX: f64 = 1e18;

/// Reads rotary embedding for a model of `context` tokens, and heads of `head_dim` elements.
pub(crate) fn parse(
    config: Object,
    description: &Description,
    context: usize,
    head_dim: usize,
) -> Result<Rope, ImportError> {
    let default_theta = description.defaults.theta;
    let old = config.object("rope_scaling")?.some().filter(|map| !map.is_empty());
    let new = config.object("rope_parameters")?.some();
    let (key, parameters) = match (old, new) {
        (Some(map), _) => ("rope_scaling", Some(map)),
        (None, Some(map)) => ("rope_parameters", Some(map)),
        (None, None) => ("", None),
    };
    let outer_theta = config.positive("rope_theta", MAX)?.some();
    let outer_rotated = partial_rotary(config, description, head_dim)?;
    let Some(map) = parameters else {
        let theta = outer_theta.unwrap_or(default_theta);
        return Ok(Rope { theta, rotated: outer_rotated, scaling: RopeScaling::None });
    };
    let prefix = format!("{key}.");
    let parameters = Object { path: config.path, prefix: &prefix, map };
    if let Some((kind, _)) = map.iter().find(|(_, value)| value.is_object()) {
        return Err(parameters.unsupported(kind, "an object", "one rotary embedding for all layers"));
    }
    let rotated = partial_rotary(parameters, description, head_dim)?.or(outer_rotated);
    let theta = parameters.positive("rope_theta", MAX)?.some().or(outer_theta).unwrap_or(default_theta);
    let outer_original = config.integer("original_max_position_embeddings", 1..=MAX_CONTEXT)?.some();
    let inner_original = parameters.integer("original_max_position_embeddings", 1..=MAX_CONTEXT)?.some();
    let original = outer_original.or(inner_original).unwrap_or(context);
    let key = if map.contains_key("rope_type") { "rope_type" } else { "type" };
    let scaling = match parameters.string(key)?.some().unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: needed(parameters, "factor")? },
        "dynamic" => {
            needed(parameters, "factor")?;
            RopeScaling::None
        }
        "llama3" => {
            let (low, high) = (needed(parameters, "low_freq_factor")?, needed(parameters, "high_freq_factor")?);
            if low >= high {
                let expected = format!("less than `high_freq_factor` ({high})");
                return Err(parameters.wrong("low_freq_factor", expected, low.to_string()));
            }
            RopeScaling::Llama3 {
                factor: needed(parameters, "factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original,
            }
        }
        "yarn" => yarn(parameters, theta, context, original)?,
        "longrope" | "su" => {
            if outer_original.or(inner_original).is_none() {
                return Err(config.wrong(
                    "original_max_position_embeddings",
                    "a number, as `rope_scaling` is LongRoPE",
                    "none",
                ));
            }
            long(parameters, rotated.unwrap_or(head_dim) / 2, context, original)?
        }
        other => {
            let supported = "\"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\", \"longrope\"";
            return Err(parameters.unsupported(key, quote(other), supported));
        }
    };
    Ok(Rope { theta, rotated, scaling })
}

/// A positive number that must be there.
fn needed(parameters: Object, key: &str) -> Result<f64, ImportError> {
    match parameters.positive(key, MAX)? {
        Field::Value(value) => Ok(value),
        Field::Absent | Field::Null => Err(parameters.wrong(key, "a number above 0", "none")),
    }
}

fn yarn(parameters: Object, theta: f64, context: usize, original: usize) -> Result<RopeScaling, ImportError> {
    if theta <= 1.0 {
        return Err(parameters.wrong("rope_theta", "a number above 1, as rope_type is \"yarn\"", theta.to_string()));
    }
    // Zero is as good as absent.
    let optional = |key: &str| Ok::<_, ImportError>(parameters.not_negative(key, MAX)?.some().filter(|&x| x > 0.0));
    let factor = match parameters.field("factor") {
        Field::Null => context as f64 / original as f64,
        Field::Absent | Field::Value(_) => needed(parameters, "factor")?,
    };
    let attention_factor = match optional("attention_factor")? {
        Some(factor) => factor,
        None => match (optional("mscale")?, optional("mscale_all_dim")?) {
            (Some(one), Some(all)) => mscale(factor, one) / mscale(factor, all),
            _ => mscale(factor, 1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: optional("beta_fast")?.unwrap_or(32.0),
        beta_slow: optional("beta_slow")?.unwrap_or(1.0),
        original_context: original,
        attention_factor,
        truncate: parameters.boolean("truncate")?.some().unwrap_or(true),
    })
}

/// By how much YaRN lengthens rotated vectors when it divides frequencies by `factor`.
pub(crate) fn mscale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

fn long(parameters: Object, pairs: usize, context: usize, original: usize) -> Result<RopeScaling, ImportError> {
    let divisors = |key: &str| {
        let expected = || format!("{pairs} numbers above 0, one for each rotated pair of a head");
        let list = match parameters.list(key)?.some() {
            Some(list) if list.len() == pairs => list,
            Some(list) => return Err(parameters.wrong(key, expected(), format!("a list of {}", list.len()))),
            None => return Err(parameters.wrong(key, expected(), "none")),
        };
        let number = |value: &Value| match value.as_f64().map(|number| number as f32) {
            Some(number) if number > 0.0 && number.is_finite() => Ok(number),
            _ => Err(parameters.wrong(key, expected(), describe(value))),
        };
        list.iter().map(number).collect::<Result<Vec<f32>, _>>()
    };
    let factor = match parameters.positive("factor", MAX)?.some() {
        Some(factor) => factor,
        None => context as f64 / original as f64,
    };
    let attention_factor = parameters.positive("attention_factor", MAX)?.some();
    Ok(RopeScaling::Long {
        short: divisors("short_factor")?,
        long: divisors("long_factor")?,
        original_context: original,
        attention_factor: attention_factor.unwrap_or_else(|| long_amplitude(factor, original)),
    })
}

/// By how much LongRoPE lengthens rotated vectors of a model whose context of `original` tokens is made `factor` times as long.
pub(crate) fn long_amplitude(factor: f64, original: usize) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original.max(2) as f64).ln()).sqrt() }
}

/// The elements of a head that are rotated; `None` for all.
fn partial_rotary(object: Object, description: &Description, head_dim: usize) -> Result<Option<usize>, ImportError> {
    const KEY: &str = "partial_rotary_factor";
    let factor = match object.positive(KEY, 1.0)?.some() {
        Some(factor) if factor != 1.0 => factor,
        _ => return Ok(None),
    };
    if !description.partial_rotary {
        return Err(object.unsupported(KEY, factor.to_string(), format!("1.0 for {}", description.name)));
    }
    // Rounded down, but for what the quotient of two whole numbers lacks of a whole one.
    let rotated = (head_dim as f64 * factor + 1e-6) as usize;
    if rotated < 2 || !rotated.is_multiple_of(2) {
        let expected = format!("an even number of the {head_dim} elements of a head");
        return Err(object.wrong(KEY, expected, format!("{factor}, which is {rotated}")));
    }
    Ok((rotated != head_dim).then_some(rotated))
}
