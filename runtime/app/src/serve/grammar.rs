//! Answers of a given form: JSON schemas and grammars, by llguidance.
//!
//! Before each token the rule says which tokens of the vocabulary can come next. The compiler of rules is made once for a
//! vocabulary; each answer has a rule of its own.

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use moec_runtime::scheduler::Constraint;
use moec_runtime::{Model, Tokenizer};
use serde_json::{Value, json};
use std::sync::Arc;
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// What an answer must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// A JSON object.
    JsonObject,
    /// JSON that fits a schema.
    Schema(Value),
    /// A grammar in Lark's notation.
    Lark(String),
}

/// The compiler of rules for a vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    /// Words of a mask.
    words: usize,
    /// The tokens that end a text, and the one that stands for them in the rules.
    ends: Vec<u32>,
    end: u32,
}

impl Grammars {
    /// For the vocabulary of `tokenizer`.
    ///
    /// # Errors
    /// When the model has no token that ends a text; a sentence.
    pub fn new(tokenizer: &Tokenizer, model: &Model) -> Result<Grammars, String> {
        let vocab = model.descriptor().vocab;
        let ends = model.metadata().eos_token_ids.clone();
        let end =
            *ends.first().ok_or("this model has no token that ends a text, so an answer cannot have a given form")?;
        let mut info = TokRxInfo::new(vocab, end);
        info.tok_bos = model.metadata().bos_token_id;
        let words: Vec<Vec<u8>> = (0..vocab)
            .map(|id| match (tokenizer.token_bytes(id), tokenizer.name(id)) {
                (bytes, Some(name)) if bytes.is_empty() => {
                    // A special token: known by name, never part of a text.
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat()
                }
                (bytes, _) => bytes,
            })
            .collect();
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
        factory.quiet();
        Ok(Grammars { factory, words: (vocab as usize).div_ceil(32), ends, end })
    }

    /// Compiles a rule.
    ///
    /// # Errors
    /// What is wrong with it; a sentence.
    pub fn compile(&self, rule: &Rule) -> Result<Box<dyn Constraint>, String> {
        let grammar = match rule {
            Rule::JsonObject => TopLevelGrammar::from_json_schema(compact(&json!({ "type": "object" }))),
            Rule::Schema(schema) => TopLevelGrammar::from_json_schema(compact(schema)),
            Rule::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let parser = self.factory.create_parser(grammar).map_err(|error| format!("{error:#}"))?;
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(error);
        }
        let warnings = matcher.grammar_warnings();
        // A schema that is only partly understood would give answers that do not fit it.
        if let Some(warning) = warnings.first() {
            return Err(warning.clone());
        }
        Ok(Box::new(Follow { matcher, words: self.words, ends: self.ends.clone(), end: self.end }))
    }
}

/// The schema for JSON without spaces between its parts: a model that is free to write some may write nothing else.
fn compact(schema: &Value) -> Value {
    match schema {
        Value::Object(map) => {
            let mut map = map.clone();
            map.entry("x-guidance").or_insert_with(|| json!({ "whitespace_flexible": false }));
            map.into()
        }
        // Anything goes.
        Value::Bool(true) => json!({ "x-guidance": { "whitespace_flexible": false } }),
        other => other.clone(),
    }
}

/// A rule on its way through an answer.
struct Follow {
    matcher: Matcher,
    words: usize,
    ends: Vec<u32>,
    end: u32,
}

impl Constraint for Follow {
    fn allowed(&mut self) -> Result<Option<Vec<u32>>, String> {
        if self.matcher.is_stopped() {
            return match self.matcher.get_error() {
                Some(error) => Err(error),
                None => Ok(None),
            };
        }
        let mask = self.matcher.compute_mask().map_err(|error| format!("{error:#}"))?;
        let mut words = mask.as_slice().to_vec();
        words.resize(self.words, 0);
        let set = |words: &mut [u32], id: u32, on: bool| {
            let bit = 1 << (id % 32);
            let word = &mut words[id as usize / 32];
            *word = if on { *word | bit } else { *word & !bit };
        };
        let may_end = mask.is_allowed(self.end);
        self.ends.iter().for_each(|end| set(&mut words, *end, may_end));
        if words.iter().all(|word| *word == 0) {
            return Err("no token of the vocabulary can come next".into());
        }
        Ok(Some(words))
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        self.matcher.consume_token(id).map_err(|error| format!("{error:#}"))
    }
}
