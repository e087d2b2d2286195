//! Text and token ids: the model's own `tokenizer.json`, and decoding that can be printed while it grows.
//!
//! Deliberately absent: chat templates, and any rule about text that tokenizer.json does not state.

use crate::error::{Error, Result};
use serde_json::Value;

/// A tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    spelling: Spelling,
}

/// How the vocabulary writes the bytes of its tokens.
#[derive(Clone, Debug, PartialEq)]
enum Spelling {
    /// As text, with another character for the space, and `<0xE2>` for single bytes.
    Text {
        /// The character for the space.
        space: String,
    },
    /// Each byte as a character (GPT-2's table).
    Bytes,
}

impl Spelling {
    /// What the decoder undoes.
    fn of(tokenizer: &tokenizers::Tokenizer) -> Spelling {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        let list = decoder["decoders"].as_array().cloned().unwrap_or_else(|| vec![decoder]);
        let is = |decoder: &Value, kind: &str| decoder["type"] == kind;
        if list.iter().any(|decoder| is(decoder, "ByteLevel")) {
            return Spelling::Bytes;
        }
        let space = list.iter().find_map(|decoder| match () {
            () if is(decoder, "Metaspace") => decoder["replacement"].as_str(),
            () if is(decoder, "Replace") && decoder["content"] == " " => decoder["pattern"]["String"].as_str(),
            () => None,
        });
        Spelling::Text { space: space.unwrap_or(" ").to_owned() }
    }
}

/// The byte that GPT-2's table writes as `character`: printable ones as they are, the others from U+0100 on, in order.
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u8::try_from(u32::from(character)) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => (0..=255).filter(|byte| !printable(*byte)).nth((u32::from(character) - 256) as usize),
    }
}

impl Tokenizer {
    /// From the bytes of a `tokenizer.json`.
    pub fn new(json: &[u8]) -> Result<Tokenizer> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(failed)?;
        // Some files on the hub carry the settings of their training.
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        let spelling = Spelling::of(&inner);
        Ok(Tokenizer { inner, spelling })
    }

    /// The ids of `text`. With `special`, also those that the tokenizer puts around a text (a bos token, usually).
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        Ok(self.inner.encode_fast(text, special).map_err(failed)?.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(failed)
    }

    /// Decodes token by token.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, ids: Vec::new(), emitted: String::new(), in_bytes: false }
    }

    /// Decodes what follows `before` token by token: a space at its beginning stays, as in the middle of a text.
    pub fn stream_after(&self, before: &[u32]) -> Result<TextStream<'_>> {
        /// More than a character or the first word of a text can be spread over.
        const ENOUGH: usize = 8;
        let ids = before[before.len().saturating_sub(ENOUGH)..].to_vec();
        let text = self.decode(&ids)?;
        let emitted = text.trim_end_matches(char::REPLACEMENT_CHARACTER).to_owned();
        Ok(TextStream { tokenizer: self, ids, emitted, in_bytes: false })
    }

    /// The token's name in the vocabulary, e.g. `▁the` or `</s>`; `None` for an id that stands for nothing.
    pub fn name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of the token with this name in the vocabulary.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// The bytes that a token adds in the middle of a text: none for a special token or an id that stands for nothing.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(name) = self.inner.id_to_token(id) else { return Vec::new() };
        let added = self.inner.get_added_vocabulary();
        if added.is_special_token(&name) {
            return Vec::new();
        }
        if added.get_added_tokens_decoder().contains_key(&id) {
            return name.into_bytes();
        }
        match &self.spelling {
            Spelling::Text { .. } if self.is_byte(id) => u8::from_str_radix(&name[3..5], 16).into_iter().collect(),
            Spelling::Text { space } => name.replace(space.as_str(), " ").into_bytes(),
            Spelling::Bytes => name.chars().filter_map(byte_of).collect(),
        }
    }

    /// Whether `id` is invisible in decoded text.
    fn is_skipped(&self, id: u32) -> bool {
        self.inner.id_to_token(id).is_none_or(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// Whether `id` stands for one byte, as `<0xE2>` does.
    fn is_byte(&self, id: u32) -> bool {
        let Some(token) = self.inner.id_to_token(id) else { return false };
        let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer { what: error.to_string() }
}

/// Text that grows token by token. The pieces that [`push`](TextStream::push) and [`finish`](TextStream::finish) return
/// are together exactly what [`Tokenizer::decode`] gives for all ids at once.
///
/// Decoders look at neighbours: a character can be spread over tokens, the first space of a text is stripped, and a run
/// of byte tokens is text only if all of it is UTF-8. So a piece is given out only once no later token can change it,
/// and it is found as the difference of two decodings of the same last few tokens.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last tokens, from one on whose text is visible.
    ids: Vec<u32>,
    /// What has been given out of the text of `ids`.
    emitted: String,
    /// The last visible token is a byte.
    in_bytes: bool,
}

impl TextStream<'_> {
    /// Adds a token; returns the text that is now certain, often empty.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        if !self.tokenizer.is_skipped(id) {
            self.in_bytes = self.tokenizer.is_byte(id);
        }
        if self.in_bytes {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.ids)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let Some(new) = text.strip_prefix(self.emitted.as_str()) else {
            // A decoder that changes what it has said: wait for more.
            return Ok(String::new());
        };
        let new = new.to_owned();
        self.emitted = text;
        self.forget();
        Ok(new)
    }

    /// What is left when no more tokens come.
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        // Where a decoder has changed what it had said, what follows the common part is all that can still be said.
        let common = text.char_indices().zip(self.emitted.chars()).find(|((_, a), b)| a != b);
        let at = common.map_or(self.emitted.len().min(text.len()), |((at, _), _)| at);
        Ok(text[at..].to_owned())
    }

    /// Drops the tokens that later text does not depend on: keeps the last one, if its text can neither be stripped nor
    /// be part of a character.
    fn forget(&mut self) {
        let Some(&last) = self.ids.last() else { return };
        if self.ids.len() < 2 {
            return;
        }
        let Ok(alone) = self.tokenizer.decode(&[last]) else { return };
        let whole = !alone.trim().is_empty() && !alone.contains(char::REPLACEMENT_CHARACTER);
        if whole && self.emitted.ends_with(alone.as_str()) {
            self.ids = vec![last];
            self.emitted = alone;
        }
    }
}

/// Finds strings at which a text ends, in a text that grows.
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

/// What came of more text.
#[derive(Clone, Debug, PartialEq)]
pub struct Matched {
    /// Text that certainly comes before any stop string.
    pub text: String,
    /// A stop string was found; it and all after it are not part of the text.
    pub stopped: bool,
}

impl StopMatcher {
    /// Stops at the one of `stops` that is complete first; empty strings are ignored.
    pub fn new(stops: &[String]) -> StopMatcher {
        StopMatcher { stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Matched {
        self.held.push_str(text);
        // The match that is complete first, so that the pieces in which text comes do not matter; of several, the longest.
        let ends = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = ends.min() {
            self.held.truncate(at);
            return Matched { text: std::mem::take(&mut self.held), stopped: true };
        }
        let safe = self.held.char_indices().map(|(at, _)| at).find(|at| {
            let rest = &self.held[*at..];
            self.stops.iter().any(|stop| stop.starts_with(rest))
        });
        let rest = self.held.split_off(safe.unwrap_or(self.held.len()));
        Matched { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// What was held back, when no more text comes.
    pub fn finish(self) -> String {
        self.held
    }
}
