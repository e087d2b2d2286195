//! A conversation and the session that holds what the model has read of it.

use crate::failure::{Failure, Result};
use moec_runtime::chat_template::Message;
use moec_runtime::sampler::Past;
use moec_runtime::{Error, Logits, Sampler, Sampling, Session};
use std::time::{Duration, Instant};

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By the model.
    Whole,
    /// By the user.
    Stopped,
    /// By the number of tokens asked for.
    Limit,
    /// By the context.
    Full,
}

/// Figures of an answer.
#[derive(Clone, Copy, Debug, Default)]
struct Stats {
    /// Tokens of the conversation that the session had already.
    kept: usize,
    /// Tokens that were read.
    read: usize,
    /// How long that took, to the first token of the answer.
    reading: Duration,
    /// Tokens of the answer.
    answer: usize,
    /// From the first one on.
    answering: Duration,
}

/// A conversation.
pub struct Conversation {
    session: Session,
    sampler: Sampler,
    max_tokens: Option<usize>,
    /// A system message, when there is one, and turns.
    messages: Vec<Message>,
    stats: Option<Stats>,
}

impl Conversation {
    /// An empty conversation.
    ///
    /// # Errors
    /// When the model's template takes no system message.
    pub fn new(
        session: Session,
        sampling: Sampling,
        max_tokens: Option<usize>,
        system: Option<String>,
    ) -> Result<Conversation> {
        let sampler = Sampler::new(sampling);
        let mut conversation = Conversation { session, sampler, max_tokens, messages: Vec::new(), stats: None };
        if let Some(system) = system {
            conversation.set_system(&system)?;
        }
        Ok(conversation)
    }

    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    pub fn system(&self) -> Option<&str> {
        self.messages.first().filter(|message| message.role == "system").map(|message| message.content.as_str())
    }

    /// Sets the system message; the conversation goes on under it.
    ///
    /// # Errors
    /// When the model's template takes none; nothing has changed then.
    pub fn set_system(&mut self, text: &str) -> Result<()> {
        let mut messages = self.messages.clone();
        messages.retain(|message| message.role != "system");
        messages.insert(0, Message::new("system", text));
        // Most templates look at the messages that follow, so there is one.
        let mut probe = messages.clone();
        if probe.len() == 1 {
            probe.push(Message::new("user", "Hello"));
        }
        self.session.model().chat_template()?.render(&probe, true)?;
        self.messages = messages;
        Ok(())
    }

    /// Forgets all but the system message.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == "system");
        self.stats = None;
    }

    /// Goes on with other messages.
    ///
    /// # Errors
    /// When the model's template does not take them; nothing has changed then.
    pub fn load(&mut self, messages: Vec<Message>) -> Result<()> {
        if messages.iter().any(|message| message.role != "system") {
            self.session.model().chat_template()?.render(&messages, false)?;
        }
        self.messages = messages;
        self.stats = None;
        Ok(())
    }

    /// The user says something.
    pub fn say(&mut self, text: &str) {
        self.messages.push(Message::new("user", text));
    }

    /// Takes the last answer back; `false` when there is none.
    pub fn take_back_answer(&mut self) -> bool {
        let is_answer = self.messages.last().is_some_and(|message| message.role == "assistant");
        if is_answer {
            self.messages.pop();
        }
        is_answer
    }

    /// Answers the last message, giving the text to `print` as it grows.
    ///
    /// # Errors
    /// When the conversation does not fit into the context, or the template refuses it; what was said last is taken back then.
    pub fn answer(&mut self, print: impl FnMut(&str) -> Result<()>) -> Result<Ended> {
        let messages = self.messages.len();
        let answered = self.try_answer(print);
        if answered.is_err() && self.messages.len() == messages {
            self.messages.pop();
        }
        answered
    }

    fn try_answer(&mut self, mut print: impl FnMut(&str) -> Result<()>) -> Result<Ended> {
        let model = self.session.model().clone();
        let tokenizer = model.tokenizer()?;
        let text = model.chat_template()?.render(&self.messages, true)?;
        let ids = tokenizer.encode(&text, false)?;
        let context = model.descriptor().context as usize;
        if ids.len() >= context {
            return Err(Failure::Refused(format!(
                "the conversation has {} tokens and the model's context holds {context}: say less, or /reset",
                ids.len()
            )));
        }
        let mut stats = Stats { kept: self.keep(&ids)?, ..Stats::default() };
        stats.read = ids.len() - stats.kept;
        let started = Instant::now();
        let mut text = String::new();
        let fed = self.session.feed(&ids[stats.kept..], Logits::Last);
        stats.reading = started.elapsed();
        let started = Instant::now();
        let ended = match fed {
            Ok(()) => {
                let mut stream = tokenizer.stream();
                let mut emit = |piece: String| {
                    text += &piece;
                    if piece.is_empty() { Ok(()) } else { print(&piece) }
                };
                let ended = loop {
                    if self.max_tokens == Some(stats.answer) {
                        break Ended::Limit;
                    }
                    let past = Past { tokens: self.session.tokens(), prompt: ids.len(), allowed: None };
                    let id = self.sampler.sample_after(self.session.last_logits(), past);
                    stats.answer += 1;
                    if model.is_end(id) {
                        break Ended::Whole;
                    }
                    emit(stream.push(id)?)?;
                    if self.session.room() == 0 {
                        break Ended::Full;
                    }
                    match self.session.feed(&[id], Logits::Last) {
                        Ok(()) => {}
                        Err(Error::Interrupted) => break Ended::Stopped,
                        Err(error) => return Err(error.into()),
                    }
                };
                emit(stream.finish()?)?;
                ended
            }
            Err(Error::Interrupted) => Ended::Stopped,
            Err(error) => return Err(error.into()),
        };
        stats.answering = started.elapsed();
        print("\n")?;
        self.messages.push(Message::new("assistant", text));
        self.stats = Some(stats);
        Ok(ended)
    }

    /// Goes back to what the session has read of `ids`; returns how many tokens those are, fewer than all.
    fn keep(&mut self, ids: &[u32]) -> Result<usize> {
        let common = self.session.tokens().iter().zip(ids).take_while(|(a, b)| a == b).count();
        let common = common.min(ids.len() - 1);
        match self.session.rewind(common) {
            Ok(()) => Ok(common),
            // The sliding window has moved on: everything is read again.
            Err(Error::Rewind { .. }) => {
                self.session.rewind(0)?;
                Ok(0)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The last answer's figures, for people.
    pub fn stats(&self) -> String {
        let Some(stats) = self.stats else { return "there is no answer yet".into() };
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        format!(
            "read {} tokens in {:.2} s ({} were known); answered {} tokens in {:.2} s ({:.1} per second); {} of {} tokens of \
             context in use",
            stats.read,
            stats.reading.as_secs_f64(),
            stats.kept,
            stats.answer,
            stats.answering.as_secs_f64(),
            rate(stats.answer, stats.answering),
            self.session.tokens().len(),
            self.session.model().descriptor().context,
        )
    }
}
