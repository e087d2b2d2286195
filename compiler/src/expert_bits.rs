//! Bits by heat (`--quant experts=auto`): which experts get 8 bits and which get 4, within a budget of bytes.
//!
//! Every expert of a model has as many weights as every other, so 8 bits instead of 4 cost the same bytes for each, and what they are worth is how often a
//! token meets it: the experts with the most choices in the profile, over all layers together, get 8 bits for as long as the payload stays within
//! the budget. Of experts that were chosen equally often the one of the earlier layer comes first, then the one of the lower number. That is the best
//! choice for the number of (token, expert) pairs that meet 8 bits, and it depends on nothing but the counts.
//!
//! There is no third format. The squared error of `q8` is less than a 200th of that of `q4`, so 4 bits more for an expert take away nearly all of what is lost, and 7.5 more
//! (bf16) the rest of it: by far the worse bargain for any heat that a router gives. What the budget leaves over when all experts have 8 bits is not
//! spent. Experts that all tokens share are dense products, of role `ffn`, and not chosen among.
//!
//! The budget is for the payload: weights, tables, description and tokenizer, but not code, which is made later and is some megabytes.
//! Sizes are those of the payload's map itself, made for each candidate, so that padding counts. Deliberately absent: how two formats of one weight
//! lie in memory and are dispatched to ([`crate::plan`]), and what choosing them costs in NLL ([`crate::score`]).

use crate::expert_profile::Heat;
use crate::import::Model;
use crate::passes::{HotExperts, QuantConfig};
use crate::pipeline::{BuildError, Options, payload_bytes};
use indicatif::HumanBytes;
use std::cmp::Reverse;

/// Why experts cannot have bits by heat.
#[derive(Debug, thiserror::Error)]
pub enum BitsError {
    /// The model has no experts.
    #[error("--quant experts=auto: {0} has no experts")]
    Dense(String),
    /// Nobody says which experts are chosen often.
    #[error(
        "--quant experts=auto needs --expert-profile FILE, which says how often each expert is chosen: an executable of the model writes it with --expert-stats"
    )]
    NoProfile,
    /// Nobody says how large the payload may be.
    #[error("--quant experts=auto needs --size-budget SIZE, e.g. 24GiB: the bytes that the packed weights may take")]
    NoBudget,
    /// A budget for a model that has its size by other options.
    #[error("--size-budget is for --quant experts=auto, which chooses the bits of experts within it")]
    Useless,
    /// Not even the least bits fit.
    #[error(
        "--size-budget {} ({budget} bytes): the smallest that this model can be is {} ({smallest} bytes), with all experts in {}; allow as much, or make other weights smaller (--quant)",
        HumanBytes(*budget),
        HumanBytes(*smallest),
        QuantConfig::COLD
    )]
    TooSmall {
        /// What was allowed.
        budget: u64,
        /// What it takes at least.
        smallest: u64,
    },
}

/// The choice.
#[derive(Clone, PartialEq, Debug)]
pub struct ByHeat {
    /// The experts that have more bits than the others.
    pub hot: HotExperts,
    /// Bytes that the payload may have.
    pub budget: u64,
    /// Of all choices that the profile counted the share that met such an expert.
    pub covered: f64,
    /// Bytes of the payload with all experts at the fewest bits, and at the most.
    pub range: [u64; 2],
}

/// Chooses; `None` unless `options` ask for bits by heat.
///
/// # Errors
/// A profile or a budget is missing, or the budget is too small for any choice.
pub fn choose(model: &Model, options: &Options, heat: Option<&Heat>) -> Result<Option<ByHeat>, BuildError> {
    if !options.quant.by_heat() {
        return if options.size_budget.is_none() { Ok(None) } else { Err(BitsError::Useless.into()) };
    }
    if model.config.experts.is_none() {
        return Err(BitsError::Dense(model.name.clone()).into());
    }
    let heat = heat.ok_or(BitsError::NoProfile)?;
    let budget = options.size_budget.ok_or(BitsError::NoBudget)?;

    let order = order(heat);
    let first = |count: usize| first(heat, &order[..count]);
    let bytes = |count: usize| payload_bytes(model, options, Some(heat), &first(count));
    let range = [bytes(0)?, bytes(order.len())?];
    if budget < range[0] {
        return Err(BitsError::TooSmall { budget, smallest: range[0] }.into());
    }
    // The size grows with every expert, evenly but for roundings and the description of weights: a guess is nearly right.
    let (mut fits, mut exceeds) = (0, order.len() + 1);
    if budget >= range[1] {
        fits = order.len();
    }
    let each = (range[1] - range[0]).div_ceil(order.len() as u64).max(1);
    let mut guess = ((budget - range[0]) / each) as usize;
    while fits < order.len() && exceeds - fits > 1 {
        guess = guess.clamp(fits + 1, exceeds - 1);
        if bytes(guess)? <= budget {
            (fits, guess) = (guess, guess + 1);
        } else {
            (exceeds, guess) = (guess, guess - 1);
        }
    }
    let hot = first(fits);
    let covered = covered(heat, &hot);
    Ok(Some(ByHeat { hot, budget, covered, range }))
}

/// The experts of all layers as (layer, expert), those that are chosen most first.
fn order(heat: &Heat) -> Vec<(usize, usize)> {
    let of_layer = |(layer, counts): (usize, &Vec<u64>)| (0..counts.len()).map(move |expert| (layer, expert));
    let mut order: Vec<(usize, usize)> = heat.counts.iter().enumerate().flat_map(of_layer).collect();
    order.sort_by_key(|&(layer, expert)| Reverse(heat.counts[layer][expert]));
    order
}

fn first(heat: &Heat, chosen: &[(usize, usize)]) -> HotExperts {
    let mut layers = vec![Vec::new(); heat.counts.len()];
    for &(layer, expert) in chosen {
        layers[layer].push(expert);
    }
    layers.iter_mut().for_each(|experts| experts.sort_unstable());
    HotExperts { layout: QuantConfig::HOT, layers }
}

/// The share of all choices that met one of these; none of none.
fn covered(heat: &Heat, hot: &HotExperts) -> f64 {
    let all: u64 = heat.counts.iter().flatten().sum();
    let met: u64 = heat.counts.iter().zip(&hot.layers).flat_map(|(c, experts)| experts.iter().map(|&e| c[e])).sum();
    if all == 0 { 0.0 } else { met as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_come_first_whatever_their_layer() {
        let counts = vec![vec![5, 0, 1], vec![1, 4, 1], vec![2, 2, 2]];
        let heat = Heat { sources: Vec::new(), tokens: 6, per_token: 1, counts };
        let order = order(&heat);
        assert_eq!(order, [(0, 0), (1, 1), (2, 0), (2, 1), (2, 2), (0, 2), (1, 0), (1, 2), (0, 1)]);
        let hot = first(&heat, &order[..4]);
        assert_eq!(hot.layers, [vec![0], vec![1], vec![0, 1]]);
        assert!((covered(&heat, &hot) - 13.0 / 18.0).abs() < 1e-12);
    }
}
