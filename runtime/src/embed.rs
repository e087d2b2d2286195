//! The vector of a text: final hidden states, after the last norm.
//!
//! Deliberately absent: normalization to length one, which is a matter of who compares the vectors.

use crate::error::{Error, Result};
use crate::kv::Sequence;
use crate::model::Model;
use crate::scheduler::Pooling;
use crate::step::{LogitRows, Logits, Part};

impl Model {
    /// The vector of `tokens`, `[hidden]`. The tokens go through the model in a sequence of their own, which is given up afterwards. The bits
    /// depend on the tokens and the pooling only.
    ///
    /// # Errors
    /// No tokens, an id outside the vocabulary, a text longer than the context, or too little memory.
    pub fn embed(&self, tokens: &[u32], pooling: Pooling) -> Result<Vec<f32>> {
        let descriptor = self.descriptor();
        if tokens.is_empty() {
            return Err(Error::NoTokens);
        }
        if tokens.len() > descriptor.context as usize {
            return Err(Error::ContextFull { tokens: tokens.len(), context: descriptor.context as usize });
        }
        let chunk = descriptor.max_tokens as usize;
        self.pages().check(Sequence::pages_for(tokens.len(), chunk, descriptor.window()))?;
        let mut sequence = Sequence::new(self.pages(), descriptor.window());
        let mut rows = LogitRows::with_hidden();
        let mut sum = vec![0.0; descriptor.hidden as usize];
        let last = (tokens.len() - 1) / chunk;
        for (number, tokens) in tokens.chunks(chunk).enumerate() {
            let logits = match pooling {
                Pooling::Mean => Logits::All,
                Pooling::Last if number == last => Logits::Last,
                Pooling::Last => Logits::None,
            };
            self.step(&mut [Part { sequence: &mut sequence, tokens, logits }], &mut rows, None)?;
            for row in 0..rows.len() {
                sum.iter_mut().zip(rows.hidden(row)).for_each(|(sum, value)| *sum += value);
            }
        }
        if pooling == Pooling::Mean {
            let scale = 1.0 / tokens.len() as f32;
            sum.iter_mut().for_each(|value| *value *= scale);
        }
        Ok(sum)
    }
}
