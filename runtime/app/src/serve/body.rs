//! The body of a request: JSON of a known form, with errors that name the parameter.

use super::error::{Answer, ApiError};
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header::CONTENT_TYPE};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The body as a JSON object.
pub struct Object(pub Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for Object {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Object, ApiError> {
        let kind = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        // Browsers ask before they send this type to another site, so no page of another site can use this server.
        if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
            let message = format!("send JSON with the header `Content-Type: application/json`, not `{kind}`");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            let status = rejection.status();
            let message = match status {
                StatusCode::PAYLOAD_TOO_LARGE => "the body is larger than this server takes (`--max-body`)".to_owned(),
                _ => rejection.body_text(),
            };
            ApiError::new(status, message)
        })?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Object(map)),
            Ok(_) => Err(ApiError::bad("the body must be a JSON object")),
            Err(error) => Err(ApiError::bad(format!("the body is not JSON: {error}"))),
        }
    }
}

/// Parameters of OpenAI's and Mistral's interfaces that mean nothing here, each with the values that ask for nothing (`null`
/// always does).
const WITHOUT_EFFECT: &[(&str, &[&str])] = &[
    ("audio", &[]),
    ("best_of", &["1"]),
    ("function_call", &[]),
    ("functions", &["[]"]),
    ("metadata", &["{}"]),
    ("modalities", &["[\"text\"]"]),
    ("prediction", &[]),
    ("prompt_mode", &[]),
    ("reasoning_effort", &[]),
    ("safe_prompt", &["false"]),
    ("service_tier", &["\"auto\"", "\"default\""]),
    ("store", &["false"]),
    ("suffix", &["\"\""]),
    ("user", &[]),
    ("verbosity", &[]),
    ("web_search_options", &[]),
];

impl Object {
    /// Takes out what asks for nothing, and refuses what asks for something that is not there.
    pub fn drop_what_asks_for_nothing(&mut self) -> Answer<()> {
        for (name, nothing) in WITHOUT_EFFECT {
            if let Some(value) = self.0.shift_remove(*name)
                && !value.is_null()
                && !nothing.contains(&value.to_string().as_str())
            {
                let unsupported = ApiError::param(*name, "is not supported by this server; leave it out");
                return Err(unsupported.with_code("unsupported_parameter"));
            }
        }
        Ok(())
    }

    /// Takes out the parameters called `names`.
    pub fn take(&mut self, names: &[&str]) -> Object {
        Object(names.iter().filter_map(|name| self.0.shift_remove_entry(*name)).collect())
    }

    /// The parameters as a struct; all must be known to it.
    pub fn parse<T: DeserializeOwned>(self) -> Answer<T> {
        serde_path_to_error::deserialize(Value::Object(self.0)).map_err(|error| {
            let path = error.path().to_string();
            let what = error.inner().to_string();
            if let Some(name) = what.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next()) {
                let prefix = path.strip_suffix(name).unwrap_or_default();
                let unknown =
                    ApiError::param(format!("{prefix}{name}"), "is no parameter of this endpoint; leave it out");
                return unknown.with_code("unknown_parameter");
            }
            if let Some(name) = what.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
                let dot = if path == "." { String::new() } else { format!("{path}.") };
                return ApiError::param(format!("{dot}{name}"), "is missing").with_code("missing_required_parameter");
            }
            match path.as_str() {
                "." => ApiError::bad(what),
                path => ApiError::param(path, format!("has a wrong value: {what}")),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        deep: u32,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Outer {
        n: Option<u32>,
        inner: Option<Inner>,
        list: Option<Vec<f32>>,
    }

    fn refused(value: Value) -> (String, String) {
        let Value::Object(map) = value else { panic!() };
        let mut object = Object(map);
        let error = object.drop_what_asks_for_nothing().and_then(|()| object.parse::<Outer>()).unwrap_err();
        (error.param.unwrap_or_default(), error.message)
    }

    #[test]
    fn errors_name_the_parameter() {
        assert_eq!(refused(json!({ "n": "x" })).0, "n");
        assert_eq!(refused(json!({ "n": -1 })).0, "n");
        assert_eq!(refused(json!({ "inner": { "deep": 1.5 } })).0, "inner.deep");
        assert_eq!(refused(json!({ "inner": {} })), ("inner.deep".into(), "`inner.deep` is missing".into()));
        assert_eq!(refused(json!({ "list": [1, null] })).0, "list[1]");
        let unknown = "`frobnicate` is no parameter of this endpoint; leave it out";
        assert_eq!(refused(json!({ "frobnicate": 1 })), ("frobnicate".into(), unknown.into()));
        assert_eq!(refused(json!({ "inner": { "deep": 1, "x": 1 } })).0, "inner.x");
        let unsupported = "`store` is not supported by this server; leave it out";
        assert_eq!(refused(json!({ "store": true })), ("store".into(), unsupported.into()));
        let mut object = Object(json!({ "store": false, "user": null, "n": 3 }).as_object().cloned().unwrap());
        object.drop_what_asks_for_nothing().unwrap();
        assert_eq!(object.parse::<Outer>().unwrap().n, Some(3));
    }
}
