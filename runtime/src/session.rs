//! One text on its way through a model: its tokens, its keys and values, the logits of the last feed.
//!
//! Deliberately absent: sampling and text. A session knows token ids only.

use crate::error::{Error, Result};
use crate::kv::Sequence;
use crate::model::Model;
use crate::step::{LogitRows, Logits, Part, Routes};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A session. Several sessions of one model may exist, and their steps take turns.
pub struct Session {
    model: Arc<Model>,
    sequence: Sequence,
    tokens: Vec<u32>,
    logits: LogitRows,
    chunk: usize,
    routes: Option<Routes>,
    interrupt: Option<Arc<AtomicBool>>,
}

impl Session {
    /// An empty session.
    pub fn new(model: &Arc<Model>) -> Session {
        let descriptor = model.descriptor();
        Session {
            model: model.clone(),
            sequence: Sequence::new(model.pages(), descriptor.window()),
            tokens: Vec::new(),
            logits: LogitRows::default(),
            chunk: descriptor.max_tokens as usize,
            routes: None,
            interrupt: None,
        }
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// All tokens fed so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that still fit into the context.
    pub fn room(&self) -> usize {
        self.model.descriptor().context as usize - self.tokens.len()
    }

    /// Sends at most `tokens` tokens through the model at once (at least 1, at most the model's own limit). Changes
    /// speed and nothing else.
    pub fn set_chunk(&mut self, tokens: usize) {
        self.chunk = tokens.clamp(1, self.model.descriptor().max_tokens as usize);
    }

    /// Feeding ends with [`Error::Interrupted`] soon after `flag` is set, between two chunks.
    pub fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.interrupt = Some(flag);
    }

    /// Keeps the routes of every feed, or stops doing so.
    ///
    /// # Errors
    /// When the model has no experts.
    pub fn record_routes(&mut self, on: bool) -> Result<()> {
        let d = self.model.descriptor();
        if on && d.experts == 0 {
            return Err(Error::NoRoutes);
        }
        self.routes = on.then(|| Routes::new(d.layers as usize, d.experts_per_token as usize));
        Ok(())
    }

    /// The experts that the tokens of the last feed were sent to, when they are recorded.
    pub fn routes(&self) -> Option<&Routes> {
        self.routes.as_ref()
    }

    /// Fails when `tokens` more tokens do not fit into the context or into memory. Nothing is changed.
    pub fn check_room(&self, tokens: usize) -> Result<()> {
        let context = self.model.descriptor().context as usize;
        let total = self.tokens.len() + tokens;
        if total > context {
            return Err(Error::ContextFull { tokens: total, context });
        }
        let pages = Sequence::pages_for(total, self.chunk, self.model.descriptor().window());
        self.model.pages().check(pages.saturating_sub(self.sequence.pages()))
    }

    /// Sends `tokens` through the model. Afterwards [`logits`](Session::logits) holds the rows asked for: with
    /// [`Logits::All`] those of the last chunk only ([`feed_each`](Session::feed_each) sees all of them).
    ///
    /// # Errors
    /// Before anything is computed: an id outside the vocabulary, a full context, too little memory. Later only when
    /// interrupted; the session then holds the chunks that were done.
    pub fn feed(&mut self, tokens: &[u32], logits: Logits) -> Result<()> {
        self.feed_chunks(tokens, logits, |_, _| {})
    }

    /// Sends `tokens` through the model and shows the logits of each: `row(i, logits)` for `tokens[i]`, in order.
    pub fn feed_each(&mut self, tokens: &[u32], mut row: impl FnMut(usize, &[f32])) -> Result<()> {
        self.feed_chunks(tokens, Logits::All, |first, rows| {
            (0..rows.len()).for_each(|i| row(first + i, rows.row(i)));
        })
    }

    fn feed_chunks(&mut self, tokens: &[u32], logits: Logits, mut done: impl FnMut(usize, &LogitRows)) -> Result<()> {
        let vocab = self.model.descriptor().vocab;
        if let Some(&id) = tokens.iter().find(|id| **id >= vocab) {
            return Err(Error::Token { id, vocab });
        }
        self.check_room(tokens.len())?;
        if let Some(routes) = &mut self.routes {
            *routes = Routes::new(routes.layers, routes.per_token);
        }
        let mut first = 0;
        for chunk in tokens.chunks(self.chunk) {
            if self.interrupt.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(Error::Interrupted);
            }
            let last = first + chunk.len() == tokens.len();
            let wanted = if last || logits == Logits::All { logits } else { Logits::None };
            let part = Part { sequence: &mut self.sequence, tokens: chunk, logits: wanted };
            self.model.step(&mut [part], &mut self.logits, self.routes.as_mut())?;
            self.tokens.extend_from_slice(chunk);
            done(first, &self.logits);
            first += chunk.len();
        }
        Ok(())
    }

    /// Rows of logits of the last feed.
    pub fn logits(&self) -> &LogitRows {
        &self.logits
    }

    /// Logits of the last token fed.
    ///
    /// # Panics
    /// When there are none: see [`try_last_logits`](Session::try_last_logits).
    pub fn last_logits(&self) -> &[f32] {
        self.try_last_logits().expect("the last feed asked for logits")
    }

    /// Logits of the last token; `None` when the last feed asked for none, and after [`rewind`](Session::rewind).
    pub fn try_last_logits(&self) -> Option<&[f32]> {
        Some(self.logits.row(self.logits.len().checked_sub(1)?))
    }

    /// The keys and values of the tokens.
    pub(crate) fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// A session that continues what was saved.
    pub(crate) fn restored(model: &Arc<Model>, sequence: Sequence, tokens: Vec<u32>, logits: LogitRows) -> Session {
        debug_assert_eq!(sequence.len(), tokens.len());
        Session { sequence, tokens, logits, ..Session::new(model) }
    }

    /// Goes back to the first `tokens` tokens. The logits are gone then, unless nothing was taken back: to sample another
    /// token in the same place, go back one token more and feed that again, or [`fork`](Session::fork) before.
    ///
    /// # Errors
    /// When there are fewer tokens, or the sliding window has moved on too far: see [`Error::Rewind`].
    pub fn rewind(&mut self, tokens: usize) -> Result<()> {
        if tokens > self.tokens.len() {
            return Err(Error::RewindForward { to: tokens, tokens: self.tokens.len() });
        }
        self.sequence.rewind(tokens)?;
        if tokens < self.tokens.len() {
            self.tokens.truncate(tokens);
            self.logits.clear();
        }
        Ok(())
    }

    /// Another session with the same tokens and logits, over shared keys and values: nothing is copied until one of the two
    /// writes to a page that both hold.
    pub fn fork(&self) -> Session {
        Session {
            model: self.model.clone(),
            sequence: self.sequence.fork(),
            tokens: self.tokens.clone(),
            logits: self.logits.clone(),
            chunk: self.chunk,
            routes: self.routes.as_ref().map(|routes| Routes::new(routes.layers, routes.per_token)),
            interrupt: self.interrupt.clone(),
        }
    }
}
