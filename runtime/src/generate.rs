//! A session that writes on: an iterator of tokens.
//!
//! Deliberately absent: text, stop strings and limits, which iterator adapters and [`Tokenizer::stream`](crate::Tokenizer::stream) add.

use crate::error::{Error, Result};
use crate::sampler::{Sampler, Sampling};
use crate::session::Session;
use crate::step::Logits;

/// The tokens that a session goes on with: ends where the model ends its text, or the context is full.
///
/// A token is given out as soon as it is drawn, and goes through the model when the next one is asked for. So the last one that was given
/// out is not in the session yet; [`finish`](Generation::finish) puts it there.
pub struct Generation<'a> {
    session: &'a mut Session,
    sampler: Sampler,
    unfed: Option<u32>,
    over: bool,
}

impl Session {
    /// Feeds `prompt` and goes on by sampling. An empty prompt goes on after the tokens that are there.
    ///
    /// # Errors
    /// As [`feed`](Session::feed), and [`Error::NoLogits`] when there is nothing to go on from.
    ///
    /// ```no_run
    /// # fn f(mut session: moec_runtime::Session) -> moec_runtime::Result<()> {
    /// use moec_runtime::Sampling;
    /// let prompt = session.model().tokenizer()?.encode("Once upon a time", true)?;
    /// for token in session.generate(&prompt, Sampling::default())?.take(64) {
    ///     println!("{}", token?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn generate(&mut self, prompt: &[u32], sampling: Sampling) -> Result<Generation<'_>> {
        if !prompt.is_empty() {
            self.feed(prompt, Logits::Last)?;
        }
        if self.try_last_logits().is_none() {
            return Err(Error::NoLogits);
        }
        Ok(Generation { session: self, sampler: Sampler::new(sampling), unfed: None, over: false })
    }
}

impl Generation<'_> {
    /// Sends the last token given out through the model, so that the session has them all, and its logits are those after it.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn finish(mut self) -> Result<()> {
        self.feed()
    }

    fn feed(&mut self) -> Result<()> {
        match self.unfed.take() {
            Some(id) => self.session.feed(&[id], Logits::Last),
            None => Ok(()),
        }
    }

    fn draw(&mut self) -> Result<Option<u32>> {
        self.feed()?;
        if self.session.room() == 0 {
            return Ok(None);
        }
        let logits = self.session.try_last_logits().ok_or(Error::NoLogits)?;
        let id = self.sampler.sample(logits, self.session.tokens());
        if self.session.model().is_end(id) {
            return Ok(None);
        }
        self.unfed = Some(id);
        Ok(Some(id))
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<u32>;

    /// The next token; after an error or the end there are no more.
    fn next(&mut self) -> Option<Result<u32>> {
        if self.over {
            return None;
        }
        let drawn = self.draw().transpose();
        self.over = !matches!(drawn, Some(Ok(_)));
        drawn
    }
}

impl std::iter::FusedIterator for Generation<'_> {}
