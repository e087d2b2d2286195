//! How often the experts of a model are chosen, as its executable counted (`--expert-stats`): profiles, and the [`Heat`] that they add up to.
//!
//! A profile is of one model, whatever its quantization: it says its name, architecture and number of parameters, and what it says of another one is an error.
//! Deliberately absent: counting (the runtime's), and where matrices lie ([`crate::plan`]).

use crate::import::Model;
use moec_abi::metadata::ExpertStats;
use std::path::Path;

/// A profile and where it is from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExpertProfile {
    /// Its file, for messages.
    pub source: String,
    /// What was counted.
    pub stats: ExpertStats,
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The file cannot be read.
    #[error("cannot read the expert profile {path}: {source}")]
    Read {
        /// Which.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// It is not what `--expert-stats` writes.
    #[error("the expert profile {path} is not what `--expert-stats` writes: `{key}`: {reason}")]
    Content {
        /// Which.
        path: String,
        /// Where in it.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// It is of another version.
    #[error(
        "the expert profile {path} is of version {found}, and this moec reads version {}; count again",
        ExpertStats::VERSION
    )]
    Version {
        /// Which.
        path: String,
        /// What it says.
        found: u32,
    },
    /// It is of another model.
    #[error(
        "the expert profile {path} is of {found}, and the model is {wanted}; count with an executable of this model"
    )]
    OtherModel {
        /// Which.
        path: String,
        /// What it is of.
        found: String,
        /// What the model is.
        wanted: String,
    },
    /// The model has no experts.
    #[error("the expert profile {path} is of no use: {model} has no experts")]
    Dense {
        /// Which.
        path: String,
        /// The model.
        model: String,
    },
}

impl ExpertProfile {
    /// Reads a profile.
    ///
    /// # Errors
    /// When it is not there, or not understood.
    pub fn read(path: &Path) -> Result<ExpertProfile, ProfileError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ProfileError::Read { path: name.clone(), source })?;
        ExpertProfile::parse(&text, &name)
    }

    /// The profile that `text` from `path` says.
    ///
    /// # Errors
    /// When it is not understood.
    pub fn parse(text: &str, path: &str) -> Result<ExpertProfile, ProfileError> {
        let path = path.to_string();
        let mut json = serde_json::Deserializer::from_str(text);
        let stats: ExpertStats = serde_path_to_error::deserialize(&mut json).map_err(|e| ProfileError::Content {
            path: path.clone(),
            key: e.path().to_string(),
            reason: e.inner().to_string(),
        })?;
        if stats.version != ExpertStats::VERSION {
            return Err(ProfileError::Version { path, found: stats.version });
        }
        if let Some(layer) = stats.counts.iter().position(|layer| layer.len() != stats.experts as usize) {
            let (experts, found) = (stats.experts, stats.counts[layer].len());
            let reason = format!("{found} numbers, and `experts` is {experts}: there must be one for each");
            return Err(ProfileError::Content { path, key: format!("counts[{layer}]"), reason });
        }
        Ok(ExpertProfile { source: path, stats })
    }
}

/// How often the experts of a model are chosen, by all its profiles together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Heat {
    /// Where the profiles are from.
    pub sources: Vec<String>,
    /// Tokens that chose.
    pub tokens: u64,
    /// Experts that each of them chose.
    pub per_token: usize,
    /// For each layer how often each expert was chosen.
    pub counts: Vec<Vec<u64>>,
}

impl Heat {
    /// The experts of a layer by falling number of choices, those chosen alike in their own order.
    pub fn order(&self, layer: usize) -> Vec<usize> {
        by_falling(&self.counts[layer])
    }

    /// How often a token chooses this expert of a layer: from 0 to 1. All alike in a layer where none was ever chosen.
    pub fn chance(&self, layer: usize, expert: usize) -> f64 {
        let counts = &self.counts[layer];
        match counts.iter().sum::<u64>() {
            0 => self.per_token as f64 / counts.len() as f64,
            all => (self.per_token as f64 * counts[expert] as f64 / all as f64).min(1.0),
        }
    }
}

/// The experts of a layer by falling number of these choices, those chosen alike in their own order.
pub fn by_falling(counts: &[u64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|&expert| std::cmp::Reverse(counts[expert]));
    order
}

/// What the profiles of a model add up to; `None` without profiles.
///
/// # Errors
/// When a profile is of another model.
pub fn heat(profiles: &[ExpertProfile], model: &Model) -> Result<Option<Heat>, ProfileError> {
    let Some(first) = profiles.first() else { return Ok(None) };
    let Some(experts) = &model.config.experts else {
        return Err(ProfileError::Dense { path: first.source.clone(), model: model.name.clone() });
    };
    let told = |name: &str, architecture: &str, parameters: u64, layers: usize, experts: usize, k: usize| {
        format!("{name} ({architecture}, {parameters} parameters, {layers} layers, {k} of {experts} experts)")
    };
    let (architecture, parameters) = (model.config.architecture.name(), model.tensors.parameters());
    let wanted = told(&model.name, architecture, parameters, model.config.layers, experts.count, experts.per_token);
    let mut heat = Heat {
        sources: profiles.iter().map(|profile| profile.source.clone()).collect(),
        tokens: 0,
        per_token: experts.per_token,
        counts: vec![vec![0; experts.count]; model.config.layers],
    };
    for ExpertProfile { source, stats } in profiles {
        let ExpertStats { model, architecture, parameters, experts, experts_per_token, tokens, counts, .. } = stats;
        let (experts, k) = (*experts as usize, *experts_per_token as usize);
        let found = told(model, architecture, *parameters, counts.len(), experts, k);
        if found != wanted {
            return Err(ProfileError::OtherModel { path: source.clone(), found, wanted });
        }
        heat.tokens = heat.tokens.saturating_add(*tokens);
        for (sum, count) in heat.counts.iter_mut().flatten().zip(counts.iter().flatten()) {
            *sum = sum.saturating_add(*count);
        }
    }
    Ok(Some(heat))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import;

    const GOOD: &str = r#"{"version":1,"moec":"0.1.0","model":"numerals","architecture":"MixtralForCausalLM","parameters":PARAMETERS,
        "experts":8,"experts_per_token":2,"tokens":3,"counts":[[0,1,2,0,0,3,0,0],[1,1,1,1,1,1,0,0],[0,0,0,0,0,0,0,6],[0,0,0,0,0,0,0,0]]}"#;

    fn numerals() -> Model {
        import::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/numerals")).unwrap()
    }

    fn good(model: &Model) -> String {
        GOOD.replace("PARAMETERS", &model.tensors.parameters().to_string())
    }

    #[test]
    fn hot_experts_come_first_and_others_keep_their_order() {
        let model = numerals();
        let profile = ExpertProfile::parse(&good(&model), "p.json").unwrap();
        let one = heat(std::slice::from_ref(&profile), &model).unwrap().unwrap();
        assert_eq!(one.order(0), [5, 2, 1, 0, 3, 4, 6, 7]);
        assert_eq!(one.order(1), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(one.order(2), [7, 0, 1, 2, 3, 4, 5, 6]);
        assert_eq!([one.chance(0, 5), one.chance(0, 2), one.chance(0, 0)], [1.0, 2.0 / 3.0, 0.0]);
        assert_eq!(one.chance(3, 6), 0.25, "nobody knows");
        let other = ExpertProfile::parse(&good(&model).replace("[0,1,2,0,0,3,0,0]", "[9,0,0,0,0,0,0,0]"), "q.json");
        let both = heat(&[profile, other.unwrap()], &model).unwrap().unwrap();
        assert_eq!(both.order(0), [0, 5, 2, 1, 3, 4, 6, 7]);
        assert_eq!((both.tokens, &*both.sources), (6, &["p.json".to_string(), "q.json".to_string()][..]));
        assert_eq!(heat(&[], &model).unwrap(), None);
    }

    #[test]
    fn a_wrong_profile_is_told_with_what_was_expected() {
        let model = numerals();
        for (from, to, words) in [
            (
                "\"model\":\"numerals\"",
                "\"model\":\"figures\"",
                ["p.json is of figures (Mixtral", "the model is numerals (Mixtral"],
            ),
            ("\"experts_per_token\":2", "\"experts_per_token\":3", ["3 of 8 experts", "2 of 8 experts"]),
            ("\"experts\":8", "\"experts\":7", ["`counts[0]`", "8 numbers, and `experts` is 7"]),
            ("\"version\":1", "\"version\":2", ["of version 2", "reads version 1"]),
            ("\"tokens\":3", "\"tokens\":\"3\"", ["`tokens`", "invalid type"]),
            ("\"tokens\":3", "\"tokens\":3,\"more\":1", ["`more`", "unknown field"]),
        ] {
            let text = good(&model);
            assert!(text.contains(from), "{from}");
            let parsed = ExpertProfile::parse(&text.replacen(from, to, 1), "p.json");
            let error = parsed.and_then(|profile| heat(&[profile], &model)).expect_err(to).to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{words:?} are not in: {error}");
        }
    }
}
