//! The tokenizer of a GGUF file as a `tokenizer.json`.
//!
//! Two kinds are known: `llama` (SentencePiece's BPE, whose order of merges follows from the scores of the pieces) and `gpt2` (byte-level BPE with a list of
//! merges and one of a few ways to split text first, [`super::pre_tokenizers`]). Deliberately absent: WordPiece and unigram models.

use super::super::error::{ImportError, clip};
use super::super::tokenizer::{self, TokenizerFiles};
use super::container::Value;
use super::metadata::Metadata;
use super::pre_tokenizers::{self, Splitting};
use serde_json::{Map, Value as Json, json};
use std::collections::HashMap;

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";

/// What SentencePiece writes for a space.
const SPACE: &str = "▁";

/// The kinds of tokens, as the file numbers them.
mod kind {
    pub(super) const UNKNOWN: f64 = 2.0;
    pub(super) const CONTROL: f64 = 3.0;
    pub(super) const USER_DEFINED: f64 = 4.0;
}

/// What text generation needs of the tokenizer's keys. `vocab` is the model's.
pub(super) fn read(metadata: &Metadata, vocab: usize) -> Result<TokenizerFiles, ImportError> {
    let tokens = match metadata.get(TOKENS) {
        Some(Value::Texts(tokens)) => tokens.as_slice(),
        Some(other) => return Err(metadata.wrong(TOKENS, "a list of texts", other.describe())),
        None => return Err(metadata.wrong(TOKENS, "the tokens of the vocabulary", "none: this file has no tokenizer")),
    };
    let vocabulary = Vocabulary { metadata, tokens, types: numbers(metadata, TYPES, tokens.len())? };
    let json = match metadata.text(MODEL)? {
        Some("llama") => vocabulary.sentence_piece()?,
        Some("gpt2") => vocabulary.byte_level()?,
        Some(other) => {
            let found = format!("\"{}\"", clip(other));
            return Err(metadata.unsupported(MODEL, found, "\"llama\" (SentencePiece BPE), \"gpt2\" (byte-level BPE)"));
        }
        None => return Err(metadata.wrong(MODEL, "the kind of tokenizer", "none")),
    };
    let json = json.to_string().into_bytes();
    tokenizer::check(&json, vocab, metadata.path)?;
    let text = |key: &str| -> Result<Option<String>, ImportError> {
        Ok(metadata.id(key)?.and_then(|id| tokens.get(id as usize)).cloned())
    };
    Ok(TokenizerFiles {
        json,
        chat_template: metadata.text("tokenizer.chat_template")?.map(Into::into),
        bos_token: text("tokenizer.ggml.bos_token_id")?,
        eos_token: text("tokenizer.ggml.eos_token_id")?,
    })
}

/// The ids that end an answer besides the eos token.
pub(super) fn further_eos(metadata: &Metadata) -> Result<Vec<u32>, ImportError> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ids.extend(metadata.id(key)?);
    }
    Ok(ids)
}

/// A list of one number for each token, if it is there.
fn numbers<'a>(metadata: &Metadata<'a>, key: &str, length: usize) -> Result<Option<&'a [f64]>, ImportError> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::Numbers(numbers)) if numbers.len() == length => Ok(Some(numbers)),
        Some(other) => Err(metadata.wrong(key, format!("a number for each of the {length} tokens"), other.describe())),
    }
}

struct Vocabulary<'a> {
    metadata: &'a Metadata<'a>,
    tokens: &'a [String],
    types: Option<&'a [f64]>,
}

impl Vocabulary<'_> {
    fn kind(&self, id: usize) -> f64 {
        self.types.map_or(1.0, |types| types[id])
    }

    /// The id of each token; of tokens that are there twice, the first.
    fn ids(&self) -> HashMap<&str, usize> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            ids.entry(token.as_str()).or_insert(id);
        }
        ids
    }

    /// The vocabulary as an object, by rising id.
    fn object(&self, ids: &HashMap<&str, usize>) -> Json {
        let first = |(id, token): &(usize, &String)| ids[token.as_str()] == *id;
        let entries = self.tokens.iter().enumerate().filter(first).map(|(id, token)| (token.clone(), json!(id)));
        Json::Object(entries.collect::<Map<String, Json>>())
    }

    /// Tokens that are found in text before anything else is done with it.
    fn added_tokens(&self) -> Json {
        let added = |(id, token): (usize, &String)| {
            let special = self.kind(id) == kind::CONTROL || self.kind(id) == kind::UNKNOWN;
            (special || self.kind(id) == kind::USER_DEFINED).then(|| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special,
                })
            })
        };
        Json::Array(self.tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()).filter_map(added).collect())
    }

    /// What puts the bos and eos tokens around a text, if the file says so.
    fn post_processor(&self, bos_by_default: bool) -> Result<Json, ImportError> {
        let wanted = |name: &str, default: bool| -> Result<Option<(usize, &String)>, ImportError> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            if !self.metadata.boolean(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default) {
                return Ok(None);
            }
            let Some(id) = self.metadata.id(&key)? else { return Ok(None) };
            match self.tokens.get(id as usize) {
                Some(token) => Ok(Some((id as usize, token))),
                None => Err(self.metadata.wrong(&key, format!("an id below {}", self.tokens.len()), id.to_string())),
            }
        };
        let (bos, eos) = (wanted("bos", bos_by_default)?, wanted("eos", false)?);
        if bos.is_none() && eos.is_none() {
            return Ok(Json::Null);
        }
        let special = |token: &Option<(usize, &String)>, of: usize| {
            token.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": of}}))
        };
        let around = |sequence: &str, of: usize| -> Vec<Json> {
            let text = json!({"Sequence": {"id": sequence, "type_id": of}});
            [special(&bos, of), Some(text), special(&eos, of)].into_iter().flatten().collect()
        };
        let mut tokens = Map::new();
        for (id, token) in [bos, eos].into_iter().flatten() {
            tokens.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
        }
        let pair = [around("A", 0), around("B", 1)].concat();
        Ok(json!({
            "type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": tokens,
        }))
    }

    fn sentence_piece(&self) -> Result<Json, ImportError> {
        let Some(scores) = numbers(self.metadata, SCORES, self.tokens.len())? else {
            return Err(self.metadata.wrong(SCORES, "a score for each token", "none"));
        };
        let unknown = match self.metadata.id("tokenizer.ggml.unknown_token_id")? {
            Some(id) => self.tokens.get(id as usize),
            None => self.tokens.iter().find(|token| *token == "<unk>"),
        };
        let space_first = self.metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let prepend = json!({"type": "Prepend", "prepend": SPACE});
        let back = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let normalizers: Vec<Json> = if space_first { vec![prepend, replace] } else { vec![replace] };
        let mut decoders = vec![back, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        decoders.extend(space_first.then_some(strip));
        let ids = self.ids();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.post_processor(true)?,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
                "vocab": self.object(&ids), "merges": merges_by_score(self.tokens, scores, &ids),
            },
        }))
    }

    fn byte_level(&self) -> Result<Json, ImportError> {
        const PRE: &str = "tokenizer.ggml.pre";
        let name = self.metadata.text(PRE)?.unwrap_or("default");
        let Some(Splitting { normalizer, pre_tokenizer, ignore_merges, bos }) = pre_tokenizers::find(name) else {
            let found = format!("\"{}\"", clip(name));
            return Err(self.metadata.unsupported(PRE, found, pre_tokenizers::names().join(", ")));
        };
        let merges = match self.metadata.get(MERGES) {
            Some(Value::Texts(merges)) => merges,
            Some(other) => return Err(self.metadata.wrong(MERGES, "a list of texts", other.describe())),
            None => return Err(self.metadata.wrong(MERGES, "the merges of a byte-level BPE", "none")),
        };
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in merges {
            // A token may begin with a space only in vocabularies that are not byte-level.
            match merge.split_once(' ') {
                Some((left, right)) if !left.is_empty() && !right.is_empty() => pairs.push(json!([left, right])),
                _ => {
                    let found = format!("\"{}\"", clip(merge));
                    return Err(self.metadata.wrong(MERGES, "two tokens with a space between them", found));
                }
            }
        }
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(bos)?,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
                "vocab": self.object(&self.ids()), "merges": pairs,
            },
        }))
    }
}

/// The merges that SentencePiece does: any two pieces that make a piece, that of the highest score first.
///
/// Merges into one piece have one score; among them the order is that of the parts' ids, which no text can tell.
fn merges_by_score(tokens: &[String], scores: &[f64], ids: &HashMap<&str, usize>) -> Vec<Json> {
    let mut merges: Vec<(f64, usize, usize, usize)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        if ids[token.as_str()] != id {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                merges.push((scores[id], id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    merges.into_iter().map(|(_, _, left, right)| json!([tokens[left], tokens[right]])).collect()
}
