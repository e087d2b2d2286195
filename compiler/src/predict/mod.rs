//! What a step is expected to take on a machine, stage by stage: from the plan and the machine's [`Limits`], without running it.
//!
//! A stage computes for as long as [`program`] says, reads its weights and keys from memory at the rate of reading, and ends at a barrier. Computing and reading overlap, though not wholly.
//! A model whose step reads less than half of the last cache finds it there, so that reading costs nothing. Deliberately absent: threads that wait for a CPU, and what the runtime does between steps.

mod kernel;
mod program;

pub use program::Step;

use crate::lower::backend::KernelBackend;
use crate::plan::Plan;
use crate::plan::program::{Program, Stage, StageExperts};
use crate::tune::limits::Limits;
use kernel::{Rates, slot_seconds};
use moec_abi::padded_head_dim;
use program::{Walker, Work};
use serde::{Deserialize, Serialize};

/// How well computing and reading overlap: with `c` and `r` seconds a stage takes `(cᵖ + rᵖ)^(1/p)`; 1 is not at all, and infinity is wholly. From decoding on Zen 4:
/// code for AVX-512 overlaps better (94 % of the rate of reading when it computes for two fifths of the time), code for AVX2 worse (77 % when for half).
const OVERLAP: f64 = 1.5;

/// The machine that is asked about.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// What it can do.
    pub limits: Limits,
    /// With how many threads.
    pub threads: usize,
    /// Bytes of its largest cache.
    pub cache: usize,
}

/// What a stage is expected to take.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// Bytes read from memory: weights, keys and values.
    pub bytes: f64,
    /// Multiply-adds with weights.
    pub multiply_adds: f64,
    /// Seconds that reading alone takes.
    pub reading: f64,
    /// Seconds that computing alone takes.
    pub computing: f64,
    /// Seconds at barriers.
    pub meeting: f64,
}

impl Expected {
    /// Seconds of all together.
    pub fn seconds(&self) -> f64 {
        (self.reading.powf(OVERLAP) + self.computing.powf(OVERLAP)).powf(1.0 / OVERLAP) + self.meeting
    }

    /// Of both one after the other. Meant for stages of one kind, whose shares of reading and computing are alike: the time of the sum is then the sum of the times.
    pub fn plus(&self, other: &Expected) -> Expected {
        Expected {
            bytes: self.bytes + other.bytes,
            multiply_adds: self.multiply_adds + other.multiply_adds,
            reading: self.reading + other.reading,
            computing: self.computing + other.computing,
            meeting: self.meeting + other.meeting,
        }
    }

    /// What most of the time goes into.
    pub fn bound(&self) -> &'static str {
        if self.meeting > self.reading.max(self.computing) {
            "barriers"
        } else if self.reading > self.computing {
            "reading"
        } else {
            "computing"
        }
    }

    /// On a machine that reads `read` times as fast and computes `compute` times as fast.
    pub fn scaled(&self, read: f64, compute: f64) -> Expected {
        Expected { reading: self.reading / read, computing: self.computing / compute, ..*self }
    }
}

/// Predicts steps on one machine.
pub struct Predictor {
    target: Target,
    walker: Walker,
}

impl Predictor {
    /// For a machine, with kernels by `backend`.
    pub fn new(target: Target, backend: KernelBackend) -> Predictor {
        let walker = Walker::new(Rates::of(&target.limits, target.threads), backend);
        Predictor { target, walker }
    }

    /// What each stage of `program`, one of `plan`'s, is expected to take in a step; `None` for one that depends on what is not known.
    pub fn stages(&mut self, plan: &Plan, program: &Program, step: Step) -> Vec<Option<Expected>> {
        let work = self.walker.stages(&plan.payload, program, step);
        let read = |(stage, work): (&Stage, &Option<Work>)| bytes_read(plan, stage, step, work.unwrap_or_default());
        let reads: Vec<f64> = program.stages.iter().zip(&work).map(read).collect();
        let cached = 2.0 * reads.iter().sum::<f64>() < self.target.cache as f64;
        let Target { limits, threads, .. } = &self.target;
        let slot = slot_seconds(limits, *threads);
        let one = |(index, work): (usize, Option<Work>)| {
            let stage = &program.stages[index];
            Some(Expected {
                bytes: reads[index],
                multiply_adds: (stage.multiply_adds * rows(plan, stage, step)) as f64,
                reading: if cached { 0.0 } else { reads[index] / limits.read },
                computing: work?.slots * slot,
                // A step ends as a stage does, by waiting for the others.
                meeting: limits.barrier,
            })
        };
        work.into_iter().enumerate().map(one).collect()
    }
}

/// Rows that meet the weights of a stage: those of logits are fewer than tokens.
fn rows(plan: &Plan, stage: &Stage, step: Step) -> usize {
    let logits = stage.products.iter().any(|product| plan.payload.items[product.weight].gives_logits());
    if logits { step.logits } else { step.tokens }
}

/// Bytes that a stage reads from memory, each once.
fn bytes_read(plan: &Plan, stage: &Stage, step: Step, work: Work) -> f64 {
    let model = &plan.model;
    let rows = rows(plan, stage, step);
    let experts = stage.experts.as_ref().map_or(0.0, |experts| expert_bytes(experts, rows));
    let weights = if rows > 0 { stage.common_bytes as f64 + experts } else { 0.0 };
    let key = 2 * model.kv_heads * padded_head_dim(model.head_dim) * model.kv.bytes();
    weights + (work.keys.1 - work.keys.0) as f64 * key as f64
}

/// Bytes of the experts that `rows` rows choose, each of them by itself.
fn expert_bytes(experts: &StageExperts, rows: usize) -> f64 {
    let chosen = |chance: f64| 1.0 - (1.0 - chance).powi(rows as i32);
    experts.bytes.iter().zip(&experts.chances).map(|(&bytes, &chance)| bytes as f64 * chosen(chance)).sum()
}
