//! `moec build --score-text`: the built executable and its variants score a text.
//!
//! A variant is built beside the output, under a name of its own, scored and removed before the next, so the disk holds one at a time. Deliberately
//! absent: what scores mean ([`moec::score`]).

use super::build::Bar;
use super::output::say;
use anyhow::Context as _;
use indicatif::ProgressBar;
use moec::import::Model;
use moec::pipeline::{self, BuildError, Options, Progress};
use moec::report::{More, Score, Scores};
use moec::score;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Scores the text by `built`, whose weights have so many bytes, and by what it is to be compared with. A variant that cannot be had is told, and left
/// out.
///
/// # Errors
/// When the built executable cannot score the text, or the user stops it.
pub fn scores(
    model: &Model,
    options: &Options,
    built: &Path,
    weights: u64,
    text: &Path,
    bar: &Bar,
) -> anyhow::Result<Scores> {
    let own = token_nll("as built", built, text, bar)
        .with_context(|| format!("{} is built, but was not scored", built.display()))?;
    let first = Score { what: "as built".to_string(), weights, mean_nll: score::mean(&own), more: None };
    let mut all = vec![first];
    for (name, options) in score::variants(options) {
        let scored = variant(model, &name, &options, built, text, bar);
        let (weights, nll) = match scored {
            Ok(scored) => scored,
            Err(error) if matches!(error.downcast_ref(), Some(BuildError::Cancelled)) => return Err(error),
            Err(error) => {
                say(format_args!("moec: warning: {name} was not scored: {error:#}"));
                continue;
            }
        };
        let (mean, standard_error) = score::difference(&nll, &own);
        let more = Some(More { mean, standard_error });
        all.push(Score { what: name, weights, mean_nll: score::mean(&nll), more });
    }
    Ok(Scores { text: text.display().to_string(), tokens: own.len() as u64, of: all })
}

/// Builds a variant and scores the text by it: the bytes of its weights, and the scores.
fn variant(
    model: &Model,
    name: &str,
    options: &Options,
    beside: &Path,
    text: &Path,
    bar: &Bar,
) -> anyhow::Result<(u64, Vec<f64>)> {
    let parent = beside.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = tempfile::TempDir::with_prefix_in(".moec-", parent)
        .with_context(|| format!("cannot create a directory in {}", parent.display()))?;
    let path = directory.path().join("variant");
    say(format_args!("to compare: {name}"));
    let bar = bar.another();
    let made = pipeline::build_to_try(model, options, &path, &bar);
    bar.finish();
    let made = made?;
    Ok((made.compiled.plan.payload.bytes as u64, token_nll(name, &path, text, &bar)?))
}

fn token_nll(name: &str, executable: &Path, text: &Path, bar: &Bar) -> anyhow::Result<Vec<f64>> {
    let spinner = ProgressBar::new_spinner().with_message(format!("scoring {}: {name}", text.display()));
    spinner.enable_steady_tick(Duration::from_millis(100));
    let scored = score::token_nll(executable, text);
    spinner.finish_and_clear();
    // Ctrl-C ends the executable as well.
    if bar.cancelled().load(Ordering::Relaxed) {
        return Err(BuildError::Cancelled.into());
    }
    Ok(scored?)
}
