//! `/openapi.json`: the description of this interface, made from the types and comments of the handlers.

use super::{chat, completions, embeddings, info, texts};
use axum::Json;
use utoipa::OpenApi;
use utoipa::openapi::{RefOr, Schema};

/// The description of this interface.
pub async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}

#[derive(OpenApi)]
#[openapi(
    info(title = "A compiled language model", description = "OpenAI-compatible interface of a model compiled by moec", license(name = "Apache-2.0")),
    paths(
        chat::chat, completions::complete, embeddings::embed, texts::tokenize, texts::detokenize, texts::tokenizer_info,
        texts::apply_template, info::models, info::one_model, info::health, info::metrics,
    ),
    tags(
        (name = "generation", description = "Answers and continuations"), (name = "embeddings", description = "Vectors"),
        (name = "texts", description = "Texts and token ids"), (name = "server", description = "The server itself"),
    )
)]
struct Description;

/// The schema of an object that has the properties of both `a` and `b`, and no others.
pub fn merged(a: RefOr<Schema>, b: RefOr<Schema>) -> RefOr<Schema> {
    match (a, b) {
        (RefOr::T(Schema::Object(mut a)), RefOr::T(Schema::Object(b))) => {
            a.properties.extend(b.properties);
            a.required.extend(b.required);
            RefOr::T(Schema::Object(a))
        }
        _ => unreachable!("structs have the schemas of objects"),
    }
}
