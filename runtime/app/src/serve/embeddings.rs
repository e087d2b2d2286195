//! `POST /v1/embeddings`: vectors of texts.

use super::answers::Wire;
use super::body::Object;
use super::completions::Prompt;
use super::error::{Answer, ApiError};
use super::state::Server;
use crate::embedding::normalize;
use axum::Json;
use axum::extract::State;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use moec_runtime::scheduler::{self, Event, Request, Work};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::mpsc;
use utoipa::ToSchema;

/// Which hidden states make the vector of a text.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// That of the last token, which has seen all others.
    Last,
    /// The mean over all tokens.
    #[default]
    Mean,
}

/// How a vector is written.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// A list of numbers.
    #[default]
    Float,
    /// The bytes of its values (f32, little-endian) in base64.
    Base64,
}

/// The body of a request for vectors.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingRequest {
    /// A text, token ids, or a list of either.
    pub input: Prompt,
    /// Name of the model; may be left out.
    pub model: Option<String>,
    /// How the vectors are written.
    pub encoding_format: Option<Encoding>,
    /// Which hidden states make the vector; the mean unless given.
    pub pooling: Option<Pooling>,
    /// Scale vectors to length 1; true unless given.
    pub normalize: Option<bool>,
    /// Elements of a vector: the model's own number, and no other.
    pub dimensions: Option<u64>,
}

/// Vectors of texts.
#[utoipa::path(post, path = "/v1/embeddings", request_body = EmbeddingRequest, tag = "embeddings", responses(
    (status = 200, description = "A vector for each text"),
    (status = "4XX", description = "What is wrong with the request"),
    (status = "5XX", description = "What is wrong with the server")
))]
pub async fn embed(State(server): State<Arc<Server>>, mut object: Object) -> Answer<Json<Value>> {
    object.drop_what_asks_for_nothing()?;
    let request: EmbeddingRequest = object.parse()?;
    server.check_model(request.model.as_deref())?;
    let hidden = server.model().descriptor().hidden;
    if request.dimensions.is_some_and(|dimensions| dimensions != u64::from(hidden)) {
        return Err(ApiError::param("dimensions", format!("must be {hidden}, this model's own, or left out")));
    }
    let pooling = match request.pooling.unwrap_or_default() {
        Pooling::Last => scheduler::Pooling::Last,
        Pooling::Mean => scheduler::Pooling::Mean,
    };
    let prompts = request.input.ids(&server, "input")?;
    for prompt in &prompts {
        server.check_length(prompt.len(), 0)?;
    }
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let mut events = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let (wire, received) = mpsc::unbounded_channel();
        server.submit(Request { prompt, work: Work::Embed(pooling) }, Wire(wire))?;
        events.push(received);
    }
    let mut data = Vec::with_capacity(events.len());
    for (index, mut events) in events.into_iter().enumerate() {
        let mut vector = vector(&mut events).await?;
        if request.normalize.unwrap_or(true) {
            normalize(&mut vector);
        }
        let written = match request.encoding_format.unwrap_or_default() {
            Encoding::Float => json!(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                json!(STANDARD.encode(bytes))
            }
        };
        data.push(json!({ "object": "embedding", "index": index, "embedding": written }));
    }
    Ok(Json(json!({
        "id": server.new_id("embd"),
        "object": "list",
        "model": server.model_name,
        "data": data,
        "usage": { "prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens },
    })))
}

async fn vector(events: &mut mpsc::UnboundedReceiver<Event>) -> Answer<Vec<f32>> {
    let mut vector = None;
    loop {
        match events.recv().await {
            Some(Event::Embedding(values)) => vector = Some(values),
            Some(Event::Done(_)) => return vector.ok_or_else(|| ApiError::internal("the scheduler made no vector")),
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(Event::Read { .. } | Event::Token { .. } | Event::Prompt(_)) => {}
            None => return Err(moec_runtime::Error::Interrupted.into()),
        }
    }
}
