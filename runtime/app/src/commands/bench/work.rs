//! What steps of the model read and compute at least, and how fast the machine's limits let them be.
//!
//! A weight counts once for each step that needs it, an expert's when a token of the step chose it, keys and values once for
//! each text. Deliberately absent: activations, which stay in the caches, and waiting.

use moec_abi::PAGE_TOKENS;
use moec_runtime::Descriptor;
use moec_runtime::Routes;
use moec_runtime::kv::Sequence;
use moec_runtime::model::StageCost;
use std::ops::{AddAssign, Div};

/// What the machine can do, as measured in the same run.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes read per second.
    pub read: f64,
    /// Multiply-adds per second of the products with weights.
    pub products: f64,
    /// Multiply-adds per second in f32, which attention computes with.
    pub floats: f64,
}

/// The least time for some work, and what it is bound by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// Seconds.
    pub seconds: f64,
    /// `reading` or `arithmetic`.
    pub by: &'static str,
}

impl Limits {
    /// The time for `work` when reading and arithmetic overlap.
    pub fn bound(&self, work: Work) -> Bound {
        let reading = work.bytes() / self.read;
        let arithmetic = work.products / self.products + work.attention / self.floats;
        if reading > arithmetic {
            Bound { seconds: reading, by: "reading" }
        } else {
            Bound { seconds: arithmetic, by: "arithmetic" }
        }
    }
}

/// Amounts, summed over steps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes of weights.
    pub weights: f64,
    /// Bytes of keys and values.
    pub kv: f64,
    /// Multiply-adds with weights.
    pub products: f64,
    /// Multiply-adds with keys and values.
    pub attention: f64,
}

impl Work {
    /// All bytes.
    pub fn bytes(&self) -> f64 {
        self.weights + self.kv
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        self.weights += other.weights;
        self.kv += other.kv;
        self.products += other.products;
        self.attention += other.attention;
    }
}

impl Div<f64> for Work {
    type Output = Work;
    fn div(self, by: f64) -> Work {
        let Work { weights, kv, products, attention } = self;
        Work { weights: weights / by, kv: kv / by, products: products / by, attention: attention / by }
    }
}

/// How often each expert was needed: by layer and expert the number of steps in which some token chose it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chosen(Vec<Vec<u64>>);

impl Chosen {
    /// Of one step that left these routes, in a model with so many experts.
    pub fn of_step(routes: &Routes, experts: usize) -> Chosen {
        let of_layer = |chosen: &Vec<u32>| {
            let mut needed = vec![0; experts];
            chosen.iter().for_each(|&expert| needed[expert as usize] = 1);
            needed
        };
        Chosen(routes.experts.iter().map(of_layer).collect())
    }

    /// Adds other steps.
    pub fn add(&mut self, other: &Chosen) {
        if self.0.is_empty() {
            self.0.clone_from(&other.0);
        } else {
            self.0.iter_mut().flatten().zip(other.0.iter().flatten()).for_each(|(sum, steps)| *sum += steps);
        }
    }

    /// Experts of a layer that were needed, summed over steps: the mean over layers.
    pub fn experts(&self) -> f64 {
        self.0.iter().flatten().sum::<u64>() as f64 / self.0.len().max(1) as f64
    }
}

/// The work of a model's steps.
pub struct Account {
    descriptor: Descriptor,
    /// What every step goes through.
    stages: Vec<StageCost>,
}

impl Account {
    /// For a model.
    pub fn new(descriptor: Descriptor) -> Account {
        let [_, stages] = descriptor.stages();
        Account { descriptor, stages }
    }

    /// The step that was made last: the last `tokens` tokens of each of `sequences`, `rows` rows of logits, the experts that some token chose.
    pub fn step(&self, sequences: &[Sequence], tokens: usize, rows: usize, chosen: &Chosen) -> Work {
        let d = self.descriptor;
        let needed = self.stages.iter().filter(|stage| rows > 0 || !gives_logits(stage));
        let weights = needed.map(|stage| stage_bytes(stage, 1, chosen)).sum();
        let products = (sequences.len() * tokens) as f64 * d.multiply_adds_per_token as f64
            + rows as f64 * d.multiply_adds_per_logit_row as f64;
        let mut work = Work { weights, products, ..Work::default() };
        let per_key = (u64::from(d.layers) * u64::from(d.heads) * u64::from(d.head_dim) * 2) as f64;
        let window = d.window().unwrap_or(usize::MAX);
        for sequence in sequences {
            let (first, end) = (sequence.len() - tokens, sequence.len());
            let keys = end - (first + 1).saturating_sub(window);
            work.kv += keys as f64 * d.page_bytes as f64 / PAGE_TOKENS as f64;
            let met: usize = (first..end).map(|position| (position + 1).min(window)).sum();
            work.attention += met as f64 * per_key;
        }
        work
    }
}

/// Whether a stage has rows of logits, and not tokens, to go through.
pub fn gives_logits(stage: &StageCost) -> bool {
    stage.title.contains("logits")
}

/// Bytes of weights that a stage reads in so many steps in which these experts are needed.
pub fn stage_bytes(stage: &StageCost, steps: u64, chosen: &Chosen) -> f64 {
    let experts = chosen.0.get(stage.layer).into_iter().flatten().zip(stage.expert_bytes);
    (steps * stage.common_bytes + experts.map(|(times, bytes)| times * bytes).sum::<u64>()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { read: 10.0, products: 100.0, floats: 50.0 };

    #[test]
    fn the_slower_of_the_two_binds() {
        let work = Work { weights: 15.0, kv: 5.0, products: 100.0, attention: 25.0 };
        assert_eq!(LIMITS.bound(work), Bound { seconds: 2.0, by: "reading" });
        assert_eq!(LIMITS.bound(Work { weights: 0.0, ..work }), Bound { seconds: 1.5, by: "arithmetic" });
    }

    #[test]
    fn chosen_experts_are_read_once() {
        let stage = StageCost {
            title: "gate_up",
            weight_bytes: 50,
            common_bytes: 10,
            multiply_adds: 0,
            expert_bytes: &[20, 20, 30],
            layer: 1,
        };
        let step = |first: &[u32], second: &[u32]| {
            let experts = vec![first.to_vec(), second.to_vec()];
            Chosen::of_step(&Routes { layers: 2, per_token: 2, experts, weights: vec![Vec::new(); 2] }, 3)
        };
        let mut both = step(&[0, 1], &[0, 1]);
        assert_eq!(stage_bytes(&stage, 1, &both), 50.0);
        both.add(&step(&[0, 1, 1, 0], &[2, 0, 2, 1]));
        assert_eq!(stage_bytes(&stage, 2, &both), 10.0 + 40.0 + 10.0 + 70.0);
        assert_eq!(both.experts(), (2.0 + 2.0 + 2.0 + 3.0) / 2.0);
        let dense = StageCost { expert_bytes: &[], ..stage };
        assert_eq!(stage_bytes(&dense, 3, &Chosen::default()), 30.0);
    }
}
