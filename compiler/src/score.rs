//! What a choice of bits costs: the negative log likelihood of a text, by the executable that was built and by variants of it.
//!
//! The executable's own `score` says the NLL of each token of the text; nothing here computes a model. Where experts have bits by heat, the [`variants`] are the same
//! model with all experts in the fewest bits and in the most, built like it in every other respect. All score the same tokens, so they are compared token
//! by token: the mean difference has a standard error far below that of either mean. Deliberately absent: building the variants, which takes a place on
//! the disk and somebody who watches (the command line's).

use crate::emit::executable::output_when_closed;
use crate::passes::QuantConfig;
use crate::pipeline::Options;
use moec_ir::graph::{Layout, Role};
use serde::Deserialize;
use std::path::Path;
use std::process::{Command, Stdio};

/// Why a text was not scored.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// The executable does not run.
    #[error("cannot run {executable}: {source}")]
    Run {
        /// Which.
        executable: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The executable failed; it has told why.
    #[error("{executable} cannot score {text} ({status}): {said}")]
    Failed {
        /// Which.
        executable: String,
        /// What was to be scored.
        text: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        said: String,
    },
    /// What it printed is not understood.
    #[error("bug in moec: {executable} printed no scores: {source}")]
    Content {
        /// Which.
        executable: String,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// What `score --per-token` prints.
#[derive(Deserialize)]
struct Printed {
    token_nll: Vec<f64>,
}

/// The negative log likelihood of each token of a text file but the first, by a compiled model.
///
/// # Errors
/// When the executable does not run, or cannot score it.
pub fn token_nll(executable: &Path, text: &Path) -> Result<Vec<f64>, ScoreError> {
    let name = || executable.display().to_string();
    let mut command = Command::new(executable);
    // Whoever has built a model need not have the memory to keep it.
    command.args(["score", "--per-token", "--low-memory", "--file"]).arg(text).stdin(Stdio::null());
    let done = output_when_closed(&mut command).map_err(|source| ScoreError::Run { executable: name(), source })?;
    if !done.status.success() {
        return Err(ScoreError::Failed {
            executable: name(),
            text: text.display().to_string(),
            status: done.status,
            said: String::from_utf8_lossy(&done.stderr).trim().to_string(),
        });
    }
    let printed: Printed =
        serde_json::from_slice(&done.stdout).map_err(|source| ScoreError::Content { executable: name(), source })?;
    Ok(printed.token_nll)
}

/// What a build with these options is compared with, by name: all experts in the fewest bits, and in the most, if it chooses for each.
pub fn variants(options: &Options) -> Vec<(String, Options)> {
    let variant = |layout: Layout| {
        let mut quant = options.quant;
        quant.set(Role::Experts, layout).expect("experts can have any layout");
        (format!("experts={layout}"), Options { quant, size_budget: None, ..options.clone() })
    };
    let layouts = [QuantConfig::COLD, QuantConfig::HOT].into_iter().filter(|_| options.quant.by_heat());
    layouts.map(variant).collect()
}

/// The mean of some numbers.
pub fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}

/// The mean difference of `other` from `one`, token by token, and its standard error.
///
/// # Panics
/// When they are not of the same tokens.
pub fn difference(other: &[f64], one: &[f64]) -> (f64, f64) {
    assert_eq!(other.len(), one.len(), "scores of the same tokens");
    let differences: Vec<f64> = other.iter().zip(one).map(|(a, b)| a - b).collect();
    let (mean, n) = (mean(&differences), differences.len() as f64);
    let squares: f64 = differences.iter().map(|d| (d - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0).max(1.0) / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_of_pairs() {
        let (mean, error) = difference(&[2.0, 5.0, 3.0], &[1.0, 4.5, 1.5]);
        assert!((mean - 1.0).abs() < 1e-12 && (error - (0.25f64 / 3.0).sqrt()).abs() < 1e-12, "{mean} {error}");
        assert_eq!(difference(&[2.0], &[1.0]), (1.0, 0.0));
    }

    #[test]
    fn variants_are_of_bits_by_heat_only() {
        let of = |quant: &str| {
            let options = Options { quant: quant.parse().unwrap(), size_budget: Some(1), ..Options::default() };
            variants(&options)
                .into_iter()
                .map(|(name, o)| (name, o.quant.to_string(), o.size_budget))
                .collect::<Vec<_>>()
        };
        assert!(of("q4").is_empty());
        let all = of("q4,experts=auto");
        assert_eq!(all.len(), 2);
        let plain = |quant: &str| quant.parse::<QuantConfig>().unwrap().to_string();
        assert_eq!(all[0], ("experts=q4".to_string(), plain("q4"), None));
        assert_eq!(all[1], ("experts=q8".to_string(), plain("q4,experts=q8"), None));
    }
}
