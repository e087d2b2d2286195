//! The tokenizer's files: kept as they are for the runtime, checked here so that a model that cannot speak is not built.
//!
//! Deliberately absent: tokenizing. The runtime does it with the same library.

use super::config::{self, ModelConfig};
use super::error::{ImportError, clip};
use super::json::{self, Field, Object, describe, quote};
use serde_json::Value;
use std::path::Path;
use tokenizers::Tokenizer;

/// What the runtime needs to turn text into ids and back.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    /// `tokenizer.json`, byte for byte.
    pub json: Vec<u8>,
    /// Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// Text of the bos token, for the chat template.
    pub bos_token: Option<String>,
    /// Text of the eos token, for the chat template.
    pub eos_token: Option<String>,
}

/// Reads the tokenizer's files of a directory, and `generation_config.json`, whose bos and eos ids replace those of `config`.
pub(crate) fn open(directory: &Path, config: &mut ModelConfig) -> Result<TokenizerFiles, ImportError> {
    let path = directory.join("tokenizer.json");
    let Some(json) = json::read(&path)? else {
        let what = if directory.join("tokenizer.model").exists() {
            "missing; `tokenizer.model` alone is not enough: transformers' AutoTokenizer with `save_pretrained` converts it"
        } else {
            "missing; every model directory on the hub has one beside its weights"
        };
        return Err(ImportError::path(&path, what));
    };
    let tokenizer = check(&json, config.vocab, &path)?;
    generation(directory, config)?;
    let mut files = TokenizerFiles { json, chat_template: None, bos_token: None, eos_token: None };
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
        let path = directory.join(name);
        if let Some(bytes) = json::read(&path)? {
            let map = json::parse(&bytes, &path)?;
            let object = Object { path: &path, prefix: "", map: &map };
            files.bos_token = token(object, "bos_token")?.or(files.bos_token);
            files.eos_token = token(object, "eos_token")?.or(files.eos_token);
            files.chat_template = chat_template(object)?.or(files.chat_template);
        }
    }
    let path = directory.join("chat_template.jinja");
    if let Some(bytes) = json::read(&path)? {
        let text = String::from_utf8(bytes).map_err(|_| ImportError::tokenizer(&path, "not UTF-8 text"))?;
        files.chat_template = Some(text);
    }
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
    files.bos_token = files.bos_token.or_else(|| text(config.bos_token_id));
    files.eos_token = files.eos_token.or_else(|| text(config.eos_token_ids.first().copied()));
    Ok(files)
}

/// Whether the tokenizers library takes the file, and all its ids are within the model's vocabulary.
pub(crate) fn check(json: &[u8], vocab: usize, path: &Path) -> Result<Tokenizer, ImportError> {
    // The library panics on JSON that breaks off inside some parts, and on some unsound values.
    json::parse(json, path)?;
    let tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(json))
        .unwrap_or_else(|_| Err("it has values that the tokenizers library does not expect".into()))
        .map_err(|error| ImportError::tokenizer(path, format!("not a tokenizer: {}", clip(&error.to_string()))))?;
    let beyond =
        tokenizer.get_vocab(true).into_iter().filter(|(_, id)| *id as usize >= vocab).min_by_key(|(_, id)| *id);
    match beyond {
        Some((token, id)) => Err(ImportError::tokenizer(
            path,
            format!(
                "token {} has id {id}, but `vocab_size` in config.json is {vocab}: not this model's tokenizer",
                quote(&token)
            ),
        )),
        None => Ok(tokenizer),
    }
}

fn generation(directory: &Path, config: &mut ModelConfig) -> Result<(), ImportError> {
    let path = directory.join("generation_config.json");
    let Some(bytes) = json::read(&path)? else { return Ok(()) };
    let map = json::parse(&bytes, &path)?;
    let object = Object { path: &path, prefix: "", map: &map };
    if let Some(id) = config::bos_token_id(object, config.vocab)?.flatten() {
        config.bos_token_id = Some(id);
    }
    if let Some(ids) = config::eos_token_ids(object, config.vocab)?.filter(|ids| !ids.is_empty()) {
        config.eos_token_ids = ids;
    }
    Ok(())
}

/// A special token: its text, or an object that holds it as `content`.
fn token(object: Object, key: &str) -> Result<Option<String>, ImportError> {
    match object.field(key) {
        Field::Absent | Field::Null => Ok(None),
        Field::Value(Value::String(text)) => Ok(Some(text.clone())),
        Field::Value(value) => match value.get("content") {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            _ => Err(object.wrong(key, "a string or an object with `content`", describe(value))),
        },
    }
}

/// One template, or a list of named ones of which `default` (or the only one) is meant.
fn chat_template(object: Object) -> Result<Option<String>, ImportError> {
    const KEY: &str = "chat_template";
    let Field::Value(value) = object.field(KEY) else { return Ok(None) };
    let named = match value {
        Value::String(text) => return Ok(Some(text.clone())),
        Value::Array(named) => named,
        other => return Err(object.wrong(KEY, "a string or a list of named templates", describe(other))),
    };
    let mut templates = Vec::with_capacity(named.len());
    for one in named {
        match (one.get("name"), one.get("template")) {
            (Some(Value::String(name)), Some(Value::String(text))) => templates.push((name, text)),
            _ => return Err(object.wrong(KEY, "objects with strings `name` and `template`", describe(one))),
        }
    }
    let default = templates.iter().find(|(name, _)| *name == "default");
    let only = if let [only] = templates.as_slice() { Some(only) } else { None };
    Ok(default.or(only).map(|(_, text)| (*text).clone()))
}
