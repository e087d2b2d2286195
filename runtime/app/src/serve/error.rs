//! What goes wrong on the way of a request, in the form that OpenAI's clients understand.

use axum::http::{HeaderValue, StatusCode, header::RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use moec_runtime::Error;
use moec_runtime::scheduler::Refusal;
use serde_json::{Value, json};

/// Result of a handler.
pub type Answer<T = Response> = Result<T, ApiError>;

/// An error of the interface.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The parameter that is wrong.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// The client's fault.
    pub fn bad(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// The value of `param` is wrong.
    pub fn param(param: impl Into<String>, what: impl std::fmt::Display) -> ApiError {
        let param = param.into();
        let message = format!("`{param}` {what}");
        ApiError { param: Some(param), code: Some("invalid_value"), ..ApiError::bad(message) }
    }

    /// The server's fault.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    pub fn with_code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    /// The object that goes to the client.
    pub fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        let message = error.to_string();
        match error {
            Error::ContextFull { tokens, context } => ApiError::bad(format!(
                "this model's context holds {context} tokens, but prompt and answer would have {tokens}; shorten the prompt or \
                 lower `max_tokens`"
            ))
            .with_code("context_length_exceeded"),
            Error::Token { .. }
            | Error::StepSize { .. }
            | Error::NoTokenizer
            | Error::NoChatTemplate
            | Error::ChatRefused { .. }
            | Error::Constraint { .. } => ApiError::bad(message),
            Error::Interrupted => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down").with_code("shutting_down")
            }
            Error::Memory { .. } => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message),
            _ => ApiError::internal(message),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        let message = refusal.to_string();
        match refusal {
            Refusal::QueueFull { .. } => {
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("rate_limit_exceeded")
            }
            Refusal::Closed => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("shutting_down"),
            Refusal::Invalid(error) => error.into(),
        }
    }
}

/// What a client is told whose request made a handler panic; the panic itself is on standard error.
pub fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    ApiError::internal("the server made a mistake; it is on its standard error").into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_openais_shape() {
        let error = ApiError::param("temperature", "must not be negative");
        assert_eq!(
            error.body(),
            json!({ "error": {
                "message": "`temperature` must not be negative", "type": "invalid_request_error",
                "param": "temperature", "code": "invalid_value",
            } })
        );
        let full: ApiError = Refusal::QueueFull { waiting: 3 }.into();
        assert_eq!((full.status.as_u16(), full.body()["error"]["type"].as_str()), (429, Some("rate_limit_error")));
        assert_eq!(full.retry_after, None, "this one does not know the pace");
        let told = ApiError { retry_after: Some(7), ..full };
        assert_eq!(told.into_response().headers()["retry-after"], "7");
        let long: ApiError = Error::ContextFull { tokens: 9, context: 5 }.into();
        assert_eq!((long.status.as_u16(), long.code), (400, Some("context_length_exceeded")));
    }
}
