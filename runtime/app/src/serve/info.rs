//! What the server tells about itself: models, health, figures, and the web page.

use super::error::Answer;
use super::state::Server;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::IntoResponse;
use serde_json::{Value, json};
use std::sync::Arc;

/// The web page, whole.
const PAGE: &str = include_str!("page.html");

/// What the page may load: itself, and answers of this server.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The model as OpenAI's and Mistral's clients expect one; the latter ask for `type` and `capabilities`.
fn model(server: &Server) -> Value {
    let chats = server.model().metadata().chat_template.is_some();
    json!({
        "id": server.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "moec",
        "type": "base",
        "capabilities": { "completion_chat": chats },
        "max_context_length": server.context,
        "max_model_len": server.context,
        "has_chat_template": chats,
    })
}

/// The models: one.
#[utoipa::path(get, path = "/v1/models", tag = "server", responses((status = 200, description = "The list of models")))]
pub async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [model(&server)] }))
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "server", params(("id" = String, Path, description = "Its name")), responses(
    (status = 200, description = "The model"), (status = 404, description = "There is no such model")
))]
pub async fn one_model(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Answer<Json<Value>> {
    server.check_model(Some(&id))?;
    Ok(Json(model(&server)))
}

/// Whether the server can take requests.
#[utoipa::path(get, path = "/health", tag = "server", responses(
    (status = 200, description = "It can"), (status = 503, description = "It cannot: it is stopping, or the model's thread has died")
))]
pub async fn health(State(server): State<Arc<Server>>) -> (StatusCode, Json<Value>) {
    let (code, status) = match server.scheduler.is_running() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "stopped"),
    };
    (code, Json(json!({ "status": status, "model": server.model_name, "requests": server.scheduler.open_requests() })))
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "server", responses((status = 200, description = "Prometheus' text format")))]
pub async fn metrics(State(server): State<Arc<Server>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], server.metrics.text())
}

/// The web page.
pub async fn page() -> impl IntoResponse {
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, PAGE)
}
