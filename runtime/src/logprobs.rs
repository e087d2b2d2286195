//! Log-probabilities of tokens, as the model gives them: before bias, penalties, filters and temperature.

use crate::math::log_sum_exp;

/// How probable a token was, and what else could have been there.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// The most probable tokens in its place with theirs, by falling probability, then by id.
    pub top: Vec<(u32, f64)>,
}

impl TokenLogprobs {
    /// Those of token `id` and of the `top` most probable ones.
    ///
    /// # Panics
    /// When `id` is not in the vocabulary.
    pub fn new(logits: &[f32], id: u32, top: usize) -> TokenLogprobs {
        let total = log_sum_exp(logits);
        let of = |id: u32| f64::from(logits[id as usize]) - total;
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let top = top.min(ids.len());
        if top > 0 && top < ids.len() {
            ids.select_nth_unstable_by(top - 1, order);
        }
        ids.truncate(top);
        ids.sort_unstable_by(order);
        TokenLogprobs { id, logprob: of(id), top: ids.into_iter().map(|id| (id, of(id))).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_the_best_come_first() {
        let logits = [0.0, 4f32.ln(), 2f32.ln(), 2f32.ln(), 1f32.ln()];
        let found = TokenLogprobs::new(&logits, 4, 3);
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 3]);
        assert!((found.logprob - 0.1f64.ln()).abs() < 1e-6, "{found:?}");
        let all = TokenLogprobs::new(&logits, 0, 99);
        assert_eq!(all.top.len(), 5);
        assert!((all.top.iter().map(|(_, p)| p.exp()).sum::<f64>() - 1.0).abs() < 1e-6);
        assert!(TokenLogprobs::new(&logits, 0, 0).top.is_empty());
    }
}
