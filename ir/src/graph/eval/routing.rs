//! The choice of experts and the sum over the chosen.

use super::super::attribute::Scores;
use crate::math::exp;

/// The `k` largest of each row of `columns`, falling, ties to the lower index.
pub(super) fn largest(logits: &[f32], columns: usize, k: usize) -> Vec<Vec<usize>> {
    let largest = |row: &[f32]| {
        let mut chosen: Vec<usize> = Vec::with_capacity(k);
        for _ in 0..k {
            let mut best = None;
            for expert in (0..columns).filter(|expert| !chosen.contains(expert)) {
                if best.is_none_or(|best: usize| row[expert] > row[best]) {
                    best = Some(expert);
                }
            }
            chosen.extend(best);
        }
        chosen
    };
    logits.chunks(columns).map(largest).collect()
}

/// The chosen experts of each row of `columns` logits, and their softmax, over these (summed in their order) or over all (summed in order of the
/// experts).
pub(super) fn weigh(logits: &[f32], columns: usize, chosen: &[Vec<usize>], scores: Scores) -> (Vec<i32>, Vec<f32>) {
    let (mut experts, mut weights) = (Vec::new(), Vec::new());
    for (row, chosen) in logits.chunks(columns).zip(chosen) {
        let largest = chosen.first().map_or(0.0, |&expert| row[expert]);
        let exponentials: Vec<f32> = chosen.iter().map(|&expert| exp(row[expert] - largest)).collect();
        let sum = match scores {
            Scores::Chosen => exponentials.iter().copied().reduce(|sum, e| sum + e),
            Scores::All => row.iter().map(|logit| exp(logit - largest)).reduce(|sum, e| sum + e),
        };
        let sum = sum.unwrap_or(1.0);
        experts.extend(chosen.iter().map(|&expert| expert as i32));
        weights.extend(exponentials.iter().map(|e| e / sum));
    }
    (experts, weights)
}

/// `t × k + s` for all tokens and slots, sorted by expert, otherwise in order.
pub(super) fn sort_by_expert(experts: &[i32]) -> Vec<i32> {
    let mut order: Vec<i32> = (0..experts.len() as i32).collect();
    order.sort_by_key(|&slot| experts[slot as usize]);
    order
}

/// `Σ_s weights[t, s] × y[t, s]` over the `k` slots of each token: the first product rounded, the others fused.
pub(super) fn combine(y: &[f32], weights: &[f32], k: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(y.len() / k);
    for (rows, weights) in y.chunks(k * columns).zip(weights.chunks(k)) {
        let mut sum: Vec<f32> = rows[..columns].iter().map(|y| weights[0] * y).collect();
        for (row, &weight) in rows.chunks(columns).zip(weights).skip(1) {
            for (sum, y) in sum.iter_mut().zip(row) {
                *sum = weight.mul_add(*y, *sum);
            }
        }
        out.extend(sum);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn top_k(logits: &[f32], columns: usize, k: usize, scores: Scores) -> (Vec<i32>, Vec<f32>) {
        weigh(logits, columns, &largest(logits, columns, k), scores)
    }

    #[test]
    fn any_experts_can_be_weighed() {
        let (experts, weights) = weigh(&[0.0, 1.0, 9.0], 3, &[vec![0, 1]], Scores::Chosen);
        assert_eq!(experts, [0, 1]);
        assert!((f64::from(weights[1] / weights[0]) - 1f64.exp()).abs() < 1e-6, "{weights:?}");
    }

    #[test]
    fn the_largest_come_first_and_ties_go_to_the_lower_index() {
        let (experts, weights) = top_k(&[1.0, 3.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0], 4, 2, Scores::Chosen);
        assert_eq!(experts, [1, 2, 0, 1]);
        assert_eq!(weights, [0.5; 4]);
        let (experts, weights) = top_k(&[-1.0, 0.0, 2.0], 3, 3, Scores::Chosen);
        assert_eq!(experts, [2, 1, 0]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6 && weights[0] > weights[1]);
        assert_eq!(top_k(&[0.1, 0.7], 2, 1, Scores::Chosen), (vec![1], vec![1.0]));
        let (experts, weights) = top_k(&[0.0; 4], 4, 2, Scores::All);
        assert_eq!((experts, weights), (vec![0, 1], vec![0.25; 2]));
    }

    #[test]
    fn sorting_is_stable() {
        assert_eq!(sort_by_expert(&[2, 0, 1, 2, 0, 2]), [1, 4, 2, 0, 3, 5]);
    }

    #[test]
    fn slots_are_summed_by_weight() {
        let y = [1.0, 2.0, 10.0, 20.0, 3.0, 4.0, 30.0, 40.0];
        assert_eq!(combine(&y, &[0.5, 0.25, 1.0, 0.0], 2, 2), [3.0, 6.0, 3.0, 4.0]);
    }
}
