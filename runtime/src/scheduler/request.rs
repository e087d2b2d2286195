//! What a scheduler is asked for, and what it answers.

use crate::error::{Error, Result};
use crate::logprobs::TokenLogprobs;
use crate::sampler::Sampling;

/// A request: token ids in, events out.
pub struct Request {
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// What to do with it.
    pub work: Work,
}

/// What to do with a prompt.
pub enum Work {
    /// Continue it.
    Generate(Generate),
    /// Give its final hidden state, `[hidden]`.
    Embed(Pooling),
}

/// Which hidden states make the vector of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// That of the last token, which has seen all others.
    #[default]
    Last,
    /// The mean over all tokens.
    Mean,
}

/// How to continue a prompt.
pub struct Generate {
    /// Most tokens of the answer; `None` for as many as fit. 0 only reads the prompt.
    pub max_tokens: Option<usize>,
    /// How to draw them.
    pub sampling: Sampling,
    /// Tokens that end an answer.
    pub ends: Vec<u32>,
    /// Log-probabilities of the answer's tokens, with this many alternatives each.
    pub logprobs: Option<usize>,
    /// Log-probabilities of the prompt's tokens from the second on, with this many alternatives each.
    pub prompt_logprobs: Option<usize>,
    /// What the answer must look like.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// A rule that says, token by token, how a text may go on.
pub trait Constraint: Send {
    /// The tokens that may come next, a bit each, 32 to a word from the lowest bit; `None` when the text must end here.
    ///
    /// # Errors
    /// When the rule cannot be evaluated; a sentence.
    fn allowed(&mut self) -> std::result::Result<Option<Vec<u32>>, String>;

    /// Goes on by `id`, one of those allowed.
    ///
    /// # Errors
    /// As [`allowed`](Constraint::allowed).
    fn accept(&mut self, id: u32) -> std::result::Result<(), String>;
}

/// What became of a request, step by step. The last one is [`Event::Done`] or [`Event::Failed`].
#[derive(Debug)]
pub enum Event {
    /// Log-probabilities of the next tokens of the prompt.
    Prompt(Vec<TokenLogprobs>),
    /// The prompt has been read, and `cached` tokens of it were spared by the prefix cache. Comes once, before the first token.
    Read {
        /// Tokens spared.
        cached: usize,
    },
    /// The next token of the answer; one that ends it is not shown.
    Token {
        /// The token.
        id: u32,
        /// Its log-probability, when asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The vector of the text, `[hidden]`, not normalized.
    Embedding(Vec<f32>),
    /// The end.
    Done(Done),
    /// The request could not be finished.
    Failed(Error),
}

/// How an answer ended and what it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the answer, one that ended it included.
    pub generated: usize,
    /// Tokens of the prompt that the prefix cache spared.
    pub cached: usize,
    /// How often it was preempted and computed again.
    pub preemptions: usize,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token of [`Generate::ends`], or its constraint leaves nothing more to say.
    End,
    /// As many tokens as were wanted, or as fit.
    Length,
}

/// Where events go. Called by the scheduler's thread between steps: everything here must be quick and must not block.
pub trait Sink: Send {
    /// Takes an event.
    fn send(&mut self, event: Event);
    /// Whether nobody waits for more; the request is then given up before the next step.
    fn is_closed(&self) -> bool;
}

impl Request {
    /// Whether the request can be done at all by a model with `vocab` tokens and a `context`.
    pub(super) fn check(&self, vocab: u32, context: usize) -> Result<()> {
        if let Some(&id) = self.prompt.iter().find(|id| **id >= vocab) {
            return Err(Error::Token { id, vocab });
        }
        let wanted = match &self.work {
            Work::Generate(generate) => generate.max_tokens.unwrap_or(1),
            Work::Embed(_) => 0,
        };
        let tokens = self.prompt.len().saturating_add(wanted);
        if tokens > context {
            return Err(Error::ContextFull { tokens, context });
        }
        if self.prompt.is_empty() {
            return Err(Error::StepSize { tokens: 0, max: context });
        }
        Ok(())
    }
}
