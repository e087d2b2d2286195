//! The runs that are measured: a prompt, and tokens after it, of one text or of several together.
//!
//! Every run of a kind sends the same tokens, so what a first run counts holds for all. Deliberately absent: what the times mean.

use super::Plan;
use super::profile::{self, Steps};
use super::work::{Account, Chosen, Limits, Work};
use crate::args::RunArgs;
use crate::failure::Result;
use moec_runtime::kv::Sequence;
use moec_runtime::{Error, LogitRows, Logits, Model, Part, Routes};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The prompt of one text, after `--depth` tokens.
    Prefill,
    /// Tokens of every text, one of each in a step, after `--depth` tokens.
    Decode,
    /// The same at depth 0.
    Shallow,
}

/// The runs of a kind.
#[derive(Default)]
pub struct Measured {
    /// Their times.
    pub seconds: Vec<f64>,
    /// What one of them does.
    pub tally: Tally,
}

/// What a run does.
#[derive(Clone, Default)]
pub struct Tally {
    /// What it reads and computes at least.
    pub work: Work,
    /// Steps of one token and of several.
    single: Count,
    several: Count,
}

/// Steps that the same code makes.
#[derive(Clone, Default)]
struct Count {
    steps: u64,
    tokens: u64,
    logit_rows: u64,
    logit_steps: u64,
    /// The experts that they need.
    chosen: Chosen,
}

impl Tally {
    /// Experts of a layer that were chosen in a step: the mean.
    pub fn experts(&self) -> f64 {
        (self.single.chosen.experts() + self.several.chosen.experts()) / (self.single.steps + self.several.steps) as f64
    }
}

/// Runs of the model.
pub struct Runs<'a> {
    model: &'a Arc<Model>,
    interrupt: &'a AtomicBool,
    plan: Plan,
    /// Most tokens in a step.
    chunk: usize,
    account: Account,
    /// For every text: `--depth` tokens that have been through the model.
    bases: Vec<Sequence>,
    /// For every text: the tokens that are run.
    ids: Vec<Vec<u32>>,
    logits: LogitRows,
    /// By [`Kind`].
    measured: [Measured; 3],
}

impl<'a> Runs<'a> {
    /// Makes the texts' first `--depth` tokens.
    pub fn new(model: &'a Arc<Model>, args: &RunArgs, plan: Plan, interrupt: &'a AtomicBool) -> Result<Runs<'a>> {
        let d = model.descriptor();
        let most = plan.depth + plan.prompt.max(plan.new);
        let mut random = random_numbers().map(|random| (random % u64::from(d.vocab)) as u32);
        let mut runs = Runs {
            model,
            interrupt,
            plan,
            chunk: args.chunk.map_or(usize::MAX, |chunk| chunk as usize).min(d.max_tokens as usize),
            account: Account::new(d),
            bases: Vec::new(),
            ids: (0..plan.sequences).map(|_| random.by_ref().take(most).collect()).collect(),
            logits: LogitRows::default(),
            measured: Default::default(),
        };
        for text in 0..plan.sequences {
            let mut base = [runs.empty()];
            let ids: Vec<u32> = runs.ids[text].drain(..plan.depth).collect();
            for chunk in ids.chunks(runs.chunk) {
                runs.step(&mut base, &[chunk], Logits::None, None)?;
            }
            runs.bases.extend(base);
        }
        Ok(runs)
    }

    /// One run that is not timed, to count what such a run does.
    pub fn count(&mut self, kind: Kind) -> Result<()> {
        let mut tally = Tally::default();
        self.run(kind, Some(&mut tally))?;
        self.measured[kind as usize].tally = tally;
        Ok(())
    }

    /// One run that is timed.
    pub fn measure(&mut self, kind: Kind) -> Result<()> {
        let seconds = self.run(kind, None)?;
        self.measured[kind as usize].seconds.push(seconds);
        Ok(())
    }

    /// The runs so far.
    pub fn measured(&self, kind: Kind) -> &Measured {
        &self.measured[kind as usize]
    }

    /// One more run, timed stage by stage: the stages of the code that most of its tokens went through.
    pub fn profile(&mut self, kind: Kind, limits: Limits) -> Result<Vec<Value>> {
        self.model.start_profile();
        let run = self.run(kind, None);
        let times = self.model.end_profile();
        run?;
        let Tally { single, several, .. } = &self.measured(kind).tally;
        let [decode, batch] = self.model.descriptor().stages();
        let (times, stages, count) = match several.tokens >= single.tokens {
            true => (times.batch, batch, several),
            false => (times.decode, decode, single),
        };
        let done = Steps {
            tokens: count.tokens,
            logit_rows: count.logit_rows,
            logit_steps: count.logit_steps,
            chosen: &count.chosen,
        };
        Ok(profile::rows(&times, &stages, &done, limits))
    }

    /// Runs once; returns the seconds.
    fn run(&mut self, kind: Kind, mut tally: Option<&mut Tally>) -> Result<f64> {
        let ids = std::mem::take(&mut self.ids);
        let mut texts: Vec<Sequence> = match kind {
            Kind::Prefill => vec![self.bases[0].fork()],
            Kind::Decode => self.bases.iter().map(Sequence::fork).collect(),
            Kind::Shallow => self.bases.iter().map(|_| self.empty()).collect(),
        };
        let started = Instant::now();
        let done = if kind == Kind::Prefill {
            let prompt = &ids[0][..self.plan.prompt];
            let last = prompt.len().div_ceil(self.chunk) - 1;
            prompt.chunks(self.chunk).enumerate().try_for_each(|(i, chunk)| {
                let logits = if i == last { Logits::Last } else { Logits::None };
                self.step(&mut texts, &[chunk], logits, tally.as_deref_mut())
            })
        } else {
            (0..self.plan.new).try_for_each(|i| {
                let tokens: Vec<&[u32]> = ids.iter().map(|ids| &ids[i..=i]).collect();
                self.step(&mut texts, &tokens, Logits::Last, tally.as_deref_mut())
            })
        };
        let seconds = started.elapsed().as_secs_f64();
        self.ids = ids;
        done.map(|()| seconds)
    }

    /// Sends the next tokens of each text through the model.
    fn step(
        &mut self,
        texts: &mut [Sequence],
        ids: &[&[u32]],
        logits: Logits,
        tally: Option<&mut Tally>,
    ) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted.into());
        }
        let d = self.model.descriptor();
        let mut routes =
            (tally.is_some() && d.experts > 0).then(|| Routes::new(d.layers as usize, d.experts_per_token as usize));
        let rows = if logits == Logits::None { 0 } else { texts.len() };
        let each = ids[0].len();
        let mut parts: Vec<Part<'_>> =
            texts.iter_mut().zip(ids).map(|(sequence, tokens)| Part { sequence, tokens, logits }).collect();
        self.model.step(&mut parts, &mut self.logits, routes.as_mut())?;
        if let Some(tally) = tally {
            let chosen = routes.map_or_else(Chosen::default, |routes| Chosen::of_step(&routes, d.experts as usize));
            tally.work += self.account.step(texts, each, rows, &chosen);
            let tokens = texts.len() * each;
            let count = if tokens == 1 { &mut tally.single } else { &mut tally.several };
            count.steps += 1;
            count.tokens += tokens as u64;
            count.logit_rows += rows as u64;
            count.logit_steps += u64::from(rows > 0);
            count.chosen.add(&chosen);
        }
        Ok(())
    }

    fn empty(&self) -> Sequence {
        Sequence::new(self.model.pages(), self.model.descriptor().window())
    }
}

/// Numbers without a pattern that a router could like, the same in every run (splitmix64, Steele et al. 2014).
fn random_numbers() -> impl Iterator<Item = u64> {
    (1u64..).map(|i| {
        let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 16
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_are_spread() {
        let ids: Vec<u64> = random_numbers().map(|random| random % 8).take(800).collect();
        assert!((0..8).all(|id| (70..130).contains(&ids.iter().filter(|i| **i == id).count())));
    }
}
