//! Log-probabilities as OpenAI's two interfaces write them.

use moec_runtime::Tokenizer;
use moec_runtime::logprobs::TokenLogprobs;
use serde_json::{Map, Value, json};

/// The least that is written: JSON has no infinity.
const IMPOSSIBLE: f64 = -9999.0;

fn number(logprob: f64) -> Value {
    json!(if logprob.is_finite() { logprob } else { IMPOSSIBLE })
}

/// A token for people: its text, or its name when it has none.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id);
    match String::from_utf8(bytes) {
        Ok(text) if !text.is_empty() => text,
        Ok(_) => tokenizer.name(id).unwrap_or_default(),
        // Part of a character, as OpenAI writes it.
        Err(error) => error.into_bytes().iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

fn chat_token(tokenizer: &Tokenizer, id: u32, logprob: f64) -> Map<String, Value> {
    let bytes = tokenizer.token_bytes(id);
    let text = if bytes.is_empty() { token_text(tokenizer, id) } else { String::from_utf8_lossy(&bytes).into_owned() };
    let entry = json!({ "token": text, "logprob": number(logprob), "bytes": bytes });
    entry.as_object().cloned().unwrap_or_default()
}

/// As in chats: a list of objects.
pub fn for_chat(tokenizer: &Tokenizer, tokens: &[TokenLogprobs]) -> Value {
    let entries = tokens.iter().map(|token| {
        let mut entry = chat_token(tokenizer, token.id, token.logprob);
        let top: Vec<Value> = token.top.iter().map(|(id, p)| chat_token(tokenizer, *id, *p).into()).collect();
        entry.insert("top_logprobs".into(), top.into());
        Value::from(entry)
    });
    json!({ "content": entries.collect::<Vec<_>>(), "refusal": null })
}

/// As in completions: lists side by side.
#[derive(Default)]
pub struct Lists {
    tokens: Vec<String>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    /// Characters so far.
    length: usize,
}

impl Lists {
    /// Lists that go on where these end.
    pub fn rest(&self) -> Lists {
        Lists { length: self.length, ..Lists::default() }
    }

    /// A token without a probability: the first of a text.
    pub fn push_first(&mut self, tokenizer: &Tokenizer, id: u32) {
        self.push_entry(tokenizer, id, Value::Null, Value::Null);
    }

    pub fn push(&mut self, tokenizer: &Tokenizer, token: &TokenLogprobs) {
        let mut top = Map::new();
        // Different tokens may have the same text; the more probable one counts. The token itself is always there.
        for (id, p) in token.top.iter().chain([&(token.id, token.logprob)]) {
            top.entry(token_text(tokenizer, *id)).or_insert_with(|| number(*p));
        }
        self.push_entry(tokenizer, token.id, number(token.logprob), top.into());
    }

    fn push_entry(&mut self, tokenizer: &Tokenizer, id: u32, logprob: Value, top: Value) {
        let text = token_text(tokenizer, id);
        self.text_offset.push(self.length);
        self.length += String::from_utf8_lossy(&tokenizer.token_bytes(id)).chars().count();
        self.tokens.push(text);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }

    pub fn to_value(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}
