//! `score`: how well the model predicts a text.

use super::{Context, id_argument, not_empty, session};
use crate::args::Score;
use crate::failure::{Failure, Result};
use crate::progress::Progress;
use crate::{interrupt, output};
use moec_runtime::math::log_sum_exp;
use serde_json::json;

pub(super) fn run(context: &Context, args: &Score) -> Result<()> {
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let mut tokens = match (&args.tokens, &args.file) {
        (Some(ids), _) => id_argument(ids, "the text")?,
        (None, file) => {
            let path = file.clone().unwrap_or_default();
            let text = std::fs::read_to_string(&path).map_err(|source| Failure::Read { path, source })?;
            model.tokenizer()?.encode(&text, !args.no_bos)?
        }
    };
    tokens.truncate(args.limit.unwrap_or(usize::MAX));
    let tokens = not_empty(tokens, "the text")?;
    if tokens.len() < 2 {
        return Err(Failure::Refused("one token alone predicts nothing: give a text of at least two tokens".into()));
    }
    let limit = context.descriptor.context as usize;
    let window = args.context.map_or(limit, |window| (window as usize).min(limit));
    if window < 2 {
        return Err(Failure::Refused(format!("a context of {limit} is too short to score with")));
    }

    let mut nll = Vec::with_capacity(tokens.len() - 1);
    let mut windows = 0;
    let mut progress = Progress::new("tokens", tokens.len());
    for range in windows_of(tokens.len(), window) {
        let text = &tokens[range];
        let mut session = session(&model, &args.run, &interrupt);
        session.feed_each(text, |i, logits| {
            if let Some(&next) = text.get(i + 1) {
                nll.push(log_sum_exp(logits) - f64::from(logits[next as usize]));
                progress.at(nll.len());
            }
        })?;
        windows += 1;
    }
    drop(progress);
    let mean = nll.iter().sum::<f64>() / nll.len() as f64;
    let mut report = json!({
        "tokens": nll.len(),
        "mean_nll": mean,
        "perplexity": mean.exp(),
        "windows": windows,
        "window_tokens": window.min(tokens.len()),
    });
    if args.per_token {
        report["token_nll"] = json!(nll);
    }
    output::print_line(&report.to_string())
}

/// Windows of at most `window` tokens, each beginning with the last token of the one before.
fn windows_of(tokens: usize, window: usize) -> Vec<std::ops::Range<usize>> {
    (0..tokens - 1).step_by(window - 1).map(|start| start..(start + window).min(tokens)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for tokens in 2..40 {
            for window in 2..12 {
                let windows = windows_of(tokens, window);
                let predicted: Vec<usize> = windows.iter().flat_map(|range| range.start + 1..range.end).collect();
                assert_eq!(predicted, (1..tokens).collect::<Vec<_>>(), "{tokens} {window}");
                assert!(windows.iter().all(|range| range.len() >= 2 && range.len() <= window));
            }
        }
    }
}
