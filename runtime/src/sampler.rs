//! Choosing the next token from logits.
//!
//! The order of the steps and their meaning are llama.cpp's (`common/sampling.cpp`, `src/llama-sampling.cpp`):
//! bias and penalties, top-k, top-p, min-p, temperature, and then a draw. Top-p and min-p thus look at the probabilities
//! before the temperature is applied. Temperature 0 is greedy: the largest logit after the penalties, the lowest id among
//! equals. Presence and frequency penalties are OpenAI's: they look at the answer only, not at the prompt.
//!
//! The same logits, settings and seed give the same tokens on every machine: the generator is xoshiro256++, and the only
//! function beyond IEEE arithmetic is our own [`exp`].

use crate::math::{argmax, exp};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore, SeedableRng};

/// Settings of a sampler.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Only the `k` most probable tokens; 0 for all.
    pub top_k: usize,
    /// Only the most probable tokens that together reach this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this many times as probable as the best; 0 for all.
    pub min_p: f32,
    /// Divides positive logits, and multiplies negative ones, of tokens that occurred lately; 1 for none.
    pub repeat_penalty: f32,
    /// How many of the last tokens count as "lately".
    pub repeat_last: usize,
    /// Subtracted from the logits of tokens that occur in the answer so far; 0 for none.
    pub presence_penalty: f32,
    /// Subtracted once for each time that a token occurs in the answer so far; 0 for none.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; an id occurs once. Ids beyond the vocabulary have no effect.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// What a token is drawn after.
#[derive(Clone, Copy, Debug, Default)]
pub struct Past<'a> {
    /// All tokens so far, prompt and answer.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub prompt: usize,
    /// The tokens that may be drawn, a bit each, 32 to a word from the lowest bit; `None` for all. At least one is set.
    pub allowed: Option<&'a [u32]>,
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
}

/// Draws tokens.
pub struct Sampler {
    settings: Sampling,
    random: Xoshiro256PlusPlus,
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler at the beginning of its random numbers.
    pub fn new(settings: Sampling) -> Sampler {
        let random = Xoshiro256PlusPlus::seed_from_u64(settings.seed);
        Sampler { settings, random, logits: Vec::new(), candidates: Vec::new(), weights: Vec::new() }
    }

    /// The settings.
    pub fn settings(&self) -> &Sampling {
        &self.settings
    }

    /// The next token after `history`, all of which counts as the answer, given its logits.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        self.sample_after(logits, Past { tokens: history, prompt: 0, allowed: None })
    }

    /// The next token after `past`, given its logits.
    pub fn sample_after(&mut self, logits: &[f32], past: Past<'_>) -> u32 {
        assert!(!logits.is_empty(), "a vocabulary has tokens");
        self.logits.clear();
        self.logits.extend(logits.iter().map(|logit| if logit.is_nan() { f32::NEG_INFINITY } else { *logit }));
        for &(id, bias) in &self.settings.logit_bias {
            if let Some(logit) = self.logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        self.penalize(past);
        if let Some(allowed) = past.allowed {
            self.mask(allowed);
        }
        if self.settings.temperature <= 0.0 {
            return argmax(&self.logits).unwrap_or(0) as u32;
        }
        self.select();
        self.draw()
    }

    fn penalize(&mut self, past: Past<'_>) {
        let Sampling { repeat_penalty, repeat_last, presence_penalty, frequency_penalty, .. } = self.settings;
        if repeat_penalty != 1.0 {
            for (id, _) in counts(&past.tokens[past.tokens.len().saturating_sub(repeat_last)..]) {
                if let Some(logit) = self.logits.get_mut(id as usize) {
                    *logit = if *logit > 0.0 { *logit / repeat_penalty } else { *logit * repeat_penalty };
                }
            }
        }
        if presence_penalty != 0.0 || frequency_penalty != 0.0 {
            for (id, count) in counts(&past.tokens[past.prompt..]) {
                if let Some(logit) = self.logits.get_mut(id as usize) {
                    *logit -= presence_penalty + count as f32 * frequency_penalty;
                }
            }
        }
    }

    /// Makes all tokens impossible that are not `allowed`, and those that are, possible.
    fn mask(&mut self, allowed: &[u32]) {
        for (id, logit) in self.logits.iter_mut().enumerate() {
            let bit = allowed.get(id / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
            *logit = if bit { logit.max(f32::MIN) } else { f32::NEG_INFINITY };
        }
    }

    /// Fills `candidates`: top-k, top-p, min-p. At least one token stays, and the order is by falling logit, then by id.
    fn select(&mut self) {
        let Sampling { top_k, top_p, min_p, .. } = self.settings;
        let all = self.logits.iter().enumerate().map(|(id, &logit)| Candidate { id: id as u32, logit });
        let best = self.logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.candidates.clear();
        // What is impossible stays out, unless nothing is possible.
        self.candidates.extend(all.filter(|c| c.logit > f32::NEG_INFINITY || best == f32::NEG_INFINITY));
        let k = if top_k == 0 { self.candidates.len() } else { top_k.min(self.candidates.len()) };
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_falling_logit);
            self.candidates.truncate(k);
        }
        let weight = |candidate: &Candidate| {
            if best.is_finite() { exp(f64::from(candidate.logit) - f64::from(best)) } else { 1.0 }
        };
        if top_p < 1.0 {
            // Falls by id within equals, so that the sum does not depend on how the selection left them.
            self.candidates.sort_unstable_by(by_falling_logit);
            let total: f64 = self.candidates.iter().map(weight).sum();
            let wanted = f64::from(top_p) * total;
            let mut sum = 0.0;
            let reached = self.candidates.iter().position(|candidate| {
                sum += weight(candidate);
                sum >= wanted
            });
            self.candidates.truncate(reached.map_or(self.candidates.len(), |at| at + 1));
        }
        if min_p > 0.0 {
            let kept = |candidate: &Candidate| weight(candidate) >= f64::from(min_p) || candidate.logit == best;
            self.candidates.retain(kept);
        }
        self.candidates.sort_unstable_by(by_falling_logit);
    }

    fn draw(&mut self) -> u32 {
        let best = f64::from(self.candidates[0].logit);
        let temperature = f64::from(self.settings.temperature);
        let weight = |candidate: &Candidate| {
            if best.is_finite() { exp((f64::from(candidate.logit) - best) / temperature) } else { 1.0 }
        };
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(weight));
        let total: f64 = self.weights.iter().sum();
        // 53 random bits: uniform in [0, 1).
        let uniform = (self.random.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        let mut left = uniform * total;
        for (candidate, weight) in self.candidates.iter().zip(&self.weights) {
            left -= weight;
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Only rounding leads here.
        self.candidates[0].id
    }
}

/// Each different token and how often it occurs, by rising id.
fn counts(tokens: &[u32]) -> Vec<(u32, usize)> {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    sorted.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
}

fn by_falling_logit(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// A seed that differs from run to run.
pub fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library keys its hash maps from the operating system's entropy. 32 bits are easy to type again.
    std::hash::RandomState::new().build_hasher().finish() >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(temperature: f32, seed: u64) -> Sampling {
        Sampling { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed, ..Sampling::default() }
    }

    fn counts(settings: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(settings);
        let mut counts = vec![0; logits.len()];
        (0..draws).for_each(|_| counts[sampler.sample(logits, &[]) as usize] += 1);
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut sampler = Sampler::new(Sampling::default());
        assert_eq!(sampler.sample(&[0.0, 2.0, 2.0, f32::NAN], &[]), 1);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 3], &[]), 0);
    }

    #[test]
    fn draws_follow_the_softmax() {
        // Probabilities 1/7, 2/7, 4/7; at temperature 1/2 they are 1/21, 4/21, 16/21.
        let logits = [0.0, 2f32.ln(), 4f32.ln()];
        for (temperature, parts) in [(1.0, [1.0, 2.0, 4.0]), (0.5, [1.0, 4.0, 16.0])] {
            let n = 20_000;
            let counts = counts(plain(temperature, 7), &logits, n);
            let total: f64 = parts.iter().sum();
            let chi2: f64 = counts
                .iter()
                .zip(parts)
                .map(|(count, part)| {
                    let expected = n as f64 * part / total;
                    (*count as f64 - expected).powi(2) / expected
                })
                .sum();
            // Two degrees of freedom: 13.8 has a probability of 0.001, and the seed is fixed.
            assert!(chi2 < 13.8, "{counts:?} {chi2}");
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        // Probabilities 0.4, 0.3, 0.2, 0.1.
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let kept = |change: fn(&mut Sampling)| {
            let mut settings = plain(1.0, 1);
            change(&mut settings);
            counts(settings, &logits, 2000).iter().map(|c| *c > 0).collect::<Vec<_>>()
        };
        assert_eq!(kept(|_| ()), [true, true, true, true]);
        assert_eq!(kept(|s| s.top_k = 2), [true, true, false, false]);
        assert_eq!(kept(|s| s.top_p = 0.5), [true, true, false, false]);
        assert_eq!(kept(|s| s.top_p = 0.0), [true, false, false, false]);
        assert_eq!(kept(|s| s.min_p = 0.4), [true, true, true, false]);
        assert_eq!(kept(|s| s.min_p = 2.0), [true, false, false, false]);
        // Temperature comes last: it does not change what top-p keeps.
        assert_eq!(kept(|s| (s.top_p, s.temperature) = (0.5, 50.0)), [true, true, false, false]);
    }

    #[test]
    fn repetition_is_punished() {
        let mut settings = Sampling { repeat_penalty: 2.0, repeat_last: 2, ..Sampling::default() };
        let logits = [4.0, 3.0, -1.0, -1.5];
        assert_eq!(Sampler::new(settings.clone()).sample(&logits, &[0]), 1);
        // Only the last two count, and a token counts once.
        assert_eq!(Sampler::new(settings.clone()).sample(&logits, &[0, 2, 2]), 0);
        settings.repeat_last = 10;
        assert_eq!(Sampler::new(settings.clone()).sample(&[-1.0, -1.5], &[0]), 1);
        assert_eq!(Sampler::new(settings).sample(&logits, &[9_999_999, 0]), 1);
    }

    #[test]
    fn presence_and_frequency_count_in_the_answer_only() {
        let logits = [4.0, 3.0, 2.5];
        let greedy = |presence_penalty, frequency_penalty, tokens: &[u32], prompt| {
            let settings = Sampling { presence_penalty, frequency_penalty, ..Sampling::default() };
            Sampler::new(settings).sample_after(&logits, Past { tokens, prompt, allowed: None })
        };
        assert_eq!(greedy(1.2, 0.0, &[0, 0, 0], 3), 0);
        assert_eq!(greedy(1.2, 0.0, &[0, 0, 0], 2), 1);
        // 4 - 3 * 0.4 is less than 3, 4 - 2 * 0.4 is not.
        assert_eq!(greedy(0.0, 0.4, &[0, 0, 0], 0), 1);
        assert_eq!(greedy(0.0, 0.4, &[0, 0, 0], 1), 0);
        assert_eq!(greedy(-1.5, 0.0, &[2], 0), 0);
        assert_eq!(greedy(-1.6, 0.0, &[2, 99], 0), 2);
    }

    #[test]
    fn bias_moves_single_tokens() {
        let settings = Sampling { logit_bias: vec![(1, 2.0), (0, -100.0), (77, 1.0)], ..Sampling::default() };
        assert_eq!(Sampler::new(settings).sample(&[4.0, 3.0, 4.5], &[]), 1);
    }

    #[test]
    fn only_what_is_allowed_is_drawn() {
        let logits = vec![0.0; 70];
        let allowed = [1 << 3, 0, 1 << 4];
        let past = Past { tokens: &[], prompt: 0, allowed: Some(&allowed) };
        for temperature in [0.0, 1.0, 100.0] {
            let mut sampler = Sampler::new(plain(temperature, 3));
            let mut drawn: Vec<u32> = (0..200).map(|_| sampler.sample_after(&logits, past)).collect();
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn, if temperature == 0.0 { vec![3] } else { vec![3, 68] });
            // Even where the model thinks that it is impossible.
            assert!([3, 68].contains(&sampler.sample_after(&[f32::NEG_INFINITY; 70], past)));
        }
    }

    #[test]
    fn a_seed_repeats_its_tokens() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 * 0.004).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { temperature: 0.8, seed, ..Sampling::default() });
            (0..20).map(|_| sampler.sample(&logits, &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_ne!(random_seed(), random_seed());
    }

    proptest! {
        #[test]
        fn any_logits_and_settings_give_a_token(
            logits in prop::collection::vec(prop_oneof![
                -1e4f32..1e4, Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(0.0),
            ], 1..50),
            temperature in 0.0f32..3.0, top_k in 0usize..60, top_p in -0.5f32..1.5, min_p in -0.5f32..1.5,
            repeat_penalty in 0.5f32..2.0, seed: u64,
        ) {
            let settings =
                Sampling { temperature, top_k, top_p, min_p, repeat_penalty, repeat_last: 8, seed, ..Sampling::default() };
            let id = Sampler::new(settings).sample(&logits, &[0, 1, 2]);
            prop_assert!((id as usize) < logits.len());
        }
    }
}
