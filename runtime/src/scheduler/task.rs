//! One request on its way: its tokens, its keys and values, and what is still to come.

use super::request::{Done, Event, Finish, Pooling, Request, Sink, Work};
use crate::error::Error;
use crate::kv::Sequence;
use crate::logprobs::TokenLogprobs;
use crate::model::Model;
use crate::sampler::{Past, Sampler};
use crate::step::{LogitRows, Logits};

/// A request that waits or runs.
pub(super) struct Task {
    pub sink: Box<dyn Sink>,
    /// Prompt and answer. The last of them may not have been through the model.
    pub tokens: Vec<u32>,
    /// Keys and values of the first of them.
    pub sequence: Sequence,
    pub preemptions: usize,
    /// Prompt tokens that the prefix cache spared when the prompt was first read.
    pub cached: usize,
    /// Its part of the step that is being made.
    pub share: Share,
    prompt: usize,
    aim: Aim,
    /// How many positions have been used by what wants every position: log-probabilities of the prompt, or a mean.
    used: usize,
}

/// What a task contributes to a step.
#[derive(Clone, Copy)]
pub(super) struct Share {
    /// How many of its next tokens; 0 for none.
    pub tokens: usize,
    pub logits: Logits,
    /// Its first row of logits.
    pub row: usize,
    /// The token is the last one of an answer so far.
    pub decoding: bool,
}

impl Default for Share {
    fn default() -> Share {
        Share { tokens: 0, logits: Logits::None, row: 0, decoding: false }
    }
}

impl Share {
    /// Rows of logits that it brings.
    pub fn rows(&self) -> usize {
        match self.logits {
            Logits::None => 0,
            Logits::Last => self.tokens.min(1),
            Logits::All => self.tokens,
        }
    }
}

enum Aim {
    Generate(Box<Generation>),
    Embed { pooling: Pooling, sum: Vec<f32> },
}

struct Generation {
    request: super::Generate,
    sampler: Sampler,
    /// Most tokens of the answer.
    limit: usize,
}

/// What a step has brought, not told yet.
pub(super) enum Outcome {
    /// More to come.
    Going,
    /// The last event.
    Over(Event),
}

impl Task {
    pub fn new(model: &Model, context: usize, request: Request, sink: Box<dyn Sink>) -> Task {
        let prompt = request.prompt.len();
        let aim = match request.work {
            Work::Generate(generate) => {
                let limit = generate.max_tokens.unwrap_or(usize::MAX).min(context - prompt);
                let sampler = Sampler::new(generate.sampling.clone());
                Aim::Generate(Box::new(Generation { request: generate, sampler, limit }))
            }
            Work::Embed(pooling) => Aim::Embed { pooling, sum: Vec::new() },
        };
        Task {
            sink,
            tokens: request.prompt,
            sequence: Sequence::new(model.pages(), model.descriptor().window()),
            preemptions: 0,
            cached: 0,
            share: Share::default(),
            prompt,
            aim,
            used: 0,
        }
    }

    /// Tokens that have not been through the model.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.sequence.len()
    }

    /// Whether the next step brings the next token of an answer and has nothing else to read.
    pub fn is_decoding(&self) -> bool {
        self.remaining() == 1 && self.tokens.len() > self.prompt
    }

    /// Whether the prompt has been read for the first time.
    pub fn is_first_reading(&self) -> bool {
        self.preemptions == 0 && self.tokens.len() == self.prompt
    }

    /// Tokens that need not go through the model when their keys and values are there: all but the last one, whose logits
    /// are wanted, and no positions that are still to be used.
    pub fn skippable(&self) -> usize {
        let last = self.tokens.len() - 1;
        if self.wants_all() { last.min(self.used) } else { last }
    }

    /// Whether every position of the prompt is of interest.
    fn wants_all(&self) -> bool {
        self.used < self.prompt
            && match &self.aim {
                Aim::Generate(generation) => generation.request.prompt_logprobs.is_some(),
                Aim::Embed { pooling, .. } => *pooling == Pooling::Mean,
            }
    }

    /// Which logits a step of the next `tokens` tokens must bring.
    pub fn wanted(&self, tokens: usize) -> Logits {
        match () {
            () if self.wants_all() => Logits::All,
            () if tokens == self.remaining() => Logits::Last,
            () => Logits::None,
        }
    }

    /// Forgets keys and values, to be computed again.
    pub fn preempt(&mut self, model: &Model) {
        self.sequence = Sequence::new(model.pages(), model.descriptor().window());
        self.preemptions += 1;
    }

    /// Uses the rows of logits of its share, after the step. Draws the next token when all have been read.
    pub fn use_rows(&mut self, rows: &LogitRows) -> Outcome {
        let Share { logits, row, .. } = self.share;
        let (end, count) = (self.sequence.len(), self.share.rows());
        if count == 0 {
            return Outcome::Going;
        }
        if logits == Logits::All {
            self.use_positions(rows, row, end - count..end);
        }
        if end < self.tokens.len() {
            return Outcome::Going;
        }
        let last = row + count - 1;
        match &mut self.aim {
            Aim::Embed { pooling: Pooling::Last, .. } => self.over_with(rows.hidden(last).to_vec()),
            Aim::Embed { pooling: Pooling::Mean, sum } => {
                let scale = 1.0 / self.prompt as f32;
                let mean = sum.iter().map(|value| value * scale).collect();
                self.over_with(mean)
            }
            Aim::Generate(_) => self.draw(rows.row(last)),
        }
    }

    fn use_positions(&mut self, rows: &LogitRows, first: usize, positions: std::ops::Range<usize>) {
        let mut logprobs = Vec::new();
        for (i, position) in positions.enumerate() {
            // After a preemption some come again; behind the prompt nothing is asked for.
            if position < self.used || position >= self.prompt {
                continue;
            }
            self.used = position + 1;
            match &mut self.aim {
                Aim::Generate(generation) => {
                    let top = generation.request.prompt_logprobs.unwrap_or(0);
                    if position + 1 < self.prompt {
                        logprobs.push(TokenLogprobs::new(rows.row(first + i), self.tokens[position + 1], top));
                    }
                }
                Aim::Embed { sum, .. } => {
                    let row = rows.hidden(first + i);
                    sum.resize(row.len(), 0.0);
                    sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
                }
            }
        }
        if !logprobs.is_empty() {
            self.sink.send(Event::Prompt(logprobs));
        }
    }

    fn over_with(&mut self, vector: Vec<f32>) -> Outcome {
        self.sink.send(Event::Embedding(vector));
        Outcome::Over(Event::Done(self.done(Finish::End, 0)))
    }

    /// Draws the next token of the answer.
    fn draw(&mut self, logits: &[f32]) -> Outcome {
        let Aim::Generate(generation) = &mut self.aim else { return Outcome::Going };
        let generated = self.tokens.len() - self.prompt;
        if generated == 0 {
            self.sink.send(Event::Read { cached: self.cached });
        }
        if generated == generation.limit {
            return Outcome::Over(Event::Done(self.done(Finish::Length, 0)));
        }
        let rule = |what: String| Outcome::Over(Event::Failed(Error::Constraint { what }));
        let allowed = match generation.request.constraint.as_mut().map(|constraint| constraint.allowed()) {
            None => None,
            Some(Ok(Some(allowed))) => Some(allowed),
            Some(Ok(None)) => return Outcome::Over(Event::Done(self.done(Finish::End, 0))),
            Some(Err(what)) => return rule(what),
        };
        let past = Past { tokens: &self.tokens, prompt: self.prompt, allowed: allowed.as_deref() };
        let id = generation.sampler.sample_after(logits, past);
        if generation.request.ends.contains(&id) {
            return Outcome::Over(Event::Done(self.done(Finish::End, 1)));
        }
        if let Some(constraint) = &mut generation.request.constraint
            && let Err(what) = constraint.accept(id)
        {
            return rule(what);
        }
        let logprobs = generation.request.logprobs.map(|top| TokenLogprobs::new(logits, id, top));
        let limit = generation.limit;
        self.tokens.push(id);
        self.sink.send(Event::Token { id, logprobs });
        if generated + 1 < limit {
            return Outcome::Going;
        }
        // The last token's successors are not wanted; but the text may be complete.
        let complete = generation.request.constraint.as_mut().is_some_and(|rule| rule.allowed() == Ok(None));
        let finish = if complete { Finish::End } else { Finish::Length };
        Outcome::Over(Event::Done(self.done(finish, 0)))
    }

    /// The end of an answer; `hidden` tokens of it are not in `tokens`.
    fn done(&self, finish: Finish, hidden: usize) -> Done {
        let generated = self.tokens.len() - self.prompt + hidden;
        Done { finish, generated, cached: self.cached, preemptions: self.preemptions }
    }
}
