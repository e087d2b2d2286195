//! A report's sections on experts: how often each is chosen, which have more bits for it, and what that does to the prediction of a text.
//!
//! Deliberately absent: marks of any language.

use super::page::{Align, Field, Map, Section, Table};
use super::units::{bytes, percent, plural};
use super::{ByHeat, Experts, Score, Scores};
use crate::expert_profile::by_falling;

/// Experts of a layer that its row names.
const NAMED: usize = 8;

/// How often experts are chosen.
pub fn experts(found: &Experts, per_token: usize) -> Section {
    let mut words = vec![format!(
        "Counted over {} in {}. In the payload the experts of a layer come by falling number of choices.",
        plural(found.tokens as usize, "token"),
        found.profiles.join(", ")
    )];
    words.extend(found.by_heat.as_ref().map(|choice| by_heat(choice, &found.counts)));
    let hot = |layer: usize, expert| {
        found.by_heat.as_ref().is_some_and(|choice| choice.experts.get(layer).is_some_and(|hot| hot.contains(&expert)))
    };
    let share = |layer: &[u64], count: u64| count as f64 / layer.iter().sum::<u64>().max(1) as f64;
    let most = found.counts.iter().flat_map(|layer| layer.iter().map(|&c| share(layer, c))).fold(0.0, f64::max);
    let fields = |(l, layer): (usize, &Vec<u64>)| {
        let field = |(e, &count): (usize, &u64)| {
            let layout = match &found.by_heat {
                Some(choice) => format!(", {}", if hot(l, e) { &choice.hot } else { &choice.cold }),
                None => String::new(),
            };
            Field {
                share: if most > 0.0 { share(layer, count) / most } else { 0.0 },
                framed: hot(l, e),
                words: format!("layer {l}, expert {e}: {count} times, {}{layout}", percent(share(layer, count))),
            }
        };
        (l.to_string(), layer.iter().enumerate().map(field).collect())
    };
    let count = found.counts.first().map_or(0, Vec::len);
    let caption = format!(
        "Layers from top to bottom, their {count} experts from left to right: the darker, the more often chosen; the darkest {} of the choices of its layer{}",
        percent(most),
        if found.by_heat.is_some() { ", with a frame what has more bits" } else { "" }
    );
    let row = |(l, layer): (usize, &Vec<u64>)| {
        let named = by_falling(layer).into_iter().take(NAMED);
        let named = named.map(|e| format!("{e} ({})", percent(share(layer, layer[e]))));
        let never = layer.iter().filter(|&&count| count == 0).count();
        let mut row = vec![l.to_string(), named.collect::<Vec<_>>().join(", "), never.to_string()];
        if let Some(choice) = &found.by_heat {
            let hot = &choice.experts[l];
            let met: u64 = hot.iter().map(|&e| layer[e]).sum();
            row.extend([hot.len().to_string(), percent(share(layer, met))]);
        }
        row
    };
    let mut columns =
        vec![("layer", Align::Right), ("chosen most, with their shares", Align::Left), ("never", Align::Right)];
    if found.by_heat.is_some() {
        columns.extend([("with more bits", Align::Right), ("choices of these", Align::Right)]);
    }
    Section {
        title: "Experts by heat".to_string(),
        words,
        maps: vec![Map { caption, rows: found.counts.iter().enumerate().map(fields).collect() }],
        tables: vec![Table {
            caption: format!("Choices, {per_token} of {count} for each token"),
            columns,
            rows: found.counts.iter().enumerate().map(row).collect(),
            sum: false,
        }],
        ..Section::default()
    }
}

/// The choice of bits, in sentences.
pub fn by_heat(choice: &ByHeat, counts: &[Vec<u64>]) -> String {
    let all: usize = counts.iter().map(Vec::len).sum();
    let hot: usize = choice.experts.iter().map(Vec::len).sum();
    format!(
        "{hot} of {all} experts are {}, the others {}: {} of the choices meet {}. The budget is {}; all experts as {} would make {} of weights, all as {} {}.",
        choice.hot,
        choice.cold,
        percent(choice.covered),
        choice.hot,
        bytes(choice.budget as f64),
        choice.cold,
        bytes(choice.all_cold as f64),
        choice.hot,
        bytes(choice.all_hot as f64)
    )
}

/// How well a text is predicted.
pub fn scores(scores: &Scores) -> Section {
    Section {
        title: "A text's likelihood".to_string(),
        words: vec![
            "By the executable's own `score`; variants were built for it and removed. Differences are of the same tokens, with the standard error of their mean.".to_string(),
        ],
        tables: vec![scores_table(scores)],
        ..Section::default()
    }
}

/// The scores as a table.
pub fn scores_table(scores: &Scores) -> Table {
    let row = |score: &Score| {
        let more = score.more.map_or(String::new(), |more| format!("{:+.5} ± {:.5}", more.mean, more.standard_error));
        let nll = format!("{:.5}", score.mean_nll);
        vec![score.what.clone(), bytes(score.weights as f64), nll, format!("{:.4}", score.mean_nll.exp()), more]
    };
    Table {
        caption: format!("{}: {}", scores.text, plural(scores.tokens as usize, "token")),
        columns: vec![
            ("model", Align::Left),
            ("weights", Align::Right),
            ("mean NLL", Align::Right),
            ("perplexity", Align::Right),
            ("NLL more than as built", Align::Right),
        ],
        rows: scores.of.iter().map(row).collect(),
        sum: false,
    }
}
