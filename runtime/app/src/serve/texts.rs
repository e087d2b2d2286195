//! `/tokenize`, `/detokenize`, `/tokenizer_info`, `/apply-template`: what a text is to the model.

use super::body::Object;
use super::error::Answer;
use super::messages;
use super::state::{Server, unhurried};
use super::tools::{Tool, Tools};
use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use utoipa::ToSchema;

/// A text to tokenize.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// The text.
    #[serde(alias = "prompt", alias = "text")]
    pub content: String,
    /// Put around it what the tokenizer does (the bos token); true unless given.
    pub add_special_tokens: Option<bool>,
}

/// The token ids of a text.
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest, tag = "texts", responses(
    (status = 200, description = "The ids, and how many"), (status = "4XX", description = "What is wrong with the request")
))]
pub async fn tokenize(State(server): State<Arc<Server>>, object: Object) -> Answer<Json<Value>> {
    let request: TokenizeRequest = object.parse()?;
    let ids = server.encode(&request.content, request.add_special_tokens.unwrap_or(true))?;
    Ok(Json(json!({ "tokens": ids, "count": ids.len(), "max_model_len": server.context })))
}

/// Token ids to turn into text.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetokenizeRequest {
    /// The ids.
    pub tokens: Vec<u32>,
}

/// The text of token ids.
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest, tag = "texts", responses(
    (status = 200, description = "The text"), (status = "4XX", description = "What is wrong with the request")
))]
pub async fn detokenize(State(server): State<Arc<Server>>, object: Object) -> Answer<Json<Value>> {
    let request: DetokenizeRequest = object.parse()?;
    let vocab = server.model().descriptor().vocab;
    if let Some(&id) = request.tokens.iter().find(|id| **id >= vocab) {
        return Err(moec_runtime::Error::Token { id, vocab }.into());
    }
    let tokenizer = server.tokenizer()?;
    let text = unhurried(request.tokens.len(), || tokenizer.decode(&request.tokens))?;
    Ok(Json(json!({ "content": text, "prompt": text })))
}

/// What programs ask that write texts for the model themselves: its special tokens and its chat template, by the names that
/// they have in `tokenizer_config.json`.
#[utoipa::path(get, path = "/tokenizer_info", tag = "texts", responses((status = 200, description = "Tokens and template")))]
pub async fn tokenizer_info(State(server): State<Arc<Server>>) -> Answer<Json<Value>> {
    let (metadata, tokenizer) = (server.model().metadata(), server.tokenizer()?);
    let name = |said: &Option<String>, id: Option<u32>| said.clone().or_else(|| tokenizer.name(id?));
    Ok(Json(json!({
        "bos_token": name(&metadata.bos_token, metadata.bos_token_id),
        "eos_token": name(&metadata.eos_token, metadata.eos_token_ids.first().copied()),
        "chat_template": metadata.chat_template,
        "vocab_size": server.model().descriptor().vocab,
        "model_max_length": server.context,
    })))
}

/// A conversation to write as the model reads it.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateRequest {
    /// The conversation: objects with `role` and `content`.
    #[schema(value_type = Vec<messages::Message>)]
    pub messages: Vec<Value>,
    /// Functions that the model may ask for.
    pub tools: Option<Vec<Tool>>,
    /// End where the model's answer begins; true unless given.
    pub add_generation_prompt: Option<bool>,
}

/// A conversation as the model reads it: text and token ids.
#[utoipa::path(post, path = "/apply-template", request_body = TemplateRequest, tag = "texts", responses(
    (status = 200, description = "The text and its ids"), (status = "4XX", description = "What is wrong with the request")
))]
pub async fn apply_template(State(server): State<Arc<Server>>, object: Object) -> Answer<Json<Value>> {
    let request: TemplateRequest = object.parse()?;
    let tools = Tools::new(request.tools, None)?;
    let answer_next = request.add_generation_prompt.unwrap_or(true);
    let text = messages::render(&server, &request.messages, &tools.offered, answer_next)?;
    let ids = server.encode(&text, false)?;
    Ok(Json(json!({ "prompt": text, "tokens": ids })))
}
