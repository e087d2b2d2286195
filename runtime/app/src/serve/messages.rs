//! Conversations: from a request's messages to the token ids that the model's own chat template makes of them.

use super::error::{Answer, ApiError};
use super::state::Server;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

/// A message as the description of the interface shows it; templates may know more roles.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct Message {
    /// Who speaks.
    role: Role,
    /// What is said.
    content: String,
}

/// Who speaks.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[allow(dead_code)]
enum Role {
    /// Whoever tells the model how to behave.
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
}

/// What a message may have, and what clients send along that asks for nothing.
const KNOWN: &[&str] = &["role", "content", "name", "tool_calls", "tool_call_id"];
const NOTHING: &[&str] = &["refusal", "annotations", "audio", "function_call", "prefix", "reasoning_content"];

/// Messages in the form that templates want: contents are strings.
pub fn normalize(messages: &[Value]) -> Answer<Vec<Value>> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "is empty; a conversation has at least one message"));
    }
    messages.iter().enumerate().map(|(i, message)| one(i, message)).collect()
}

fn one(i: usize, message: &Value) -> Answer<Value> {
    let at = |key: &str| format!("messages[{i}].{key}");
    let Some(map) = message.as_object() else {
        return Err(ApiError::param(format!("messages[{i}]"), "must be an object with `role` and `content`"));
    };
    if !map.get("role").is_some_and(Value::is_string) {
        return Err(ApiError::param(at("role"), "must be a string: `system`, `user` or `assistant`"));
    }
    let mut normal = Map::new();
    for (key, value) in map {
        let nothing = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        match key.as_str() {
            "content" => drop(normal.insert(key.clone(), content(&at(key), value)?)),
            "tool_calls" if nothing => {}
            "tool_calls" => drop(normal.insert(key.clone(), tool_calls(&at(key), value)?)),
            known if KNOWN.contains(&known) => {
                if !value.is_null() {
                    normal.insert(key.clone(), value.clone());
                }
            }
            other if NOTHING.contains(&other) && nothing => {}
            _ => {
                let unknown = ApiError::param(at(key), "is not supported by this server; leave it out");
                return Err(unknown.with_code("unknown_parameter"));
            }
        }
    }
    if normal.get("content").is_none_or(Value::is_null) {
        if !normal.contains_key("tool_calls") {
            return Err(ApiError::param(at("content"), "is missing"));
        }
        normal.insert("content".into(), json!(""));
    }
    Ok(normal.into())
}

/// A string, or a list of parts of which all are text.
fn content(at: &str, value: &Value) -> Answer<Value> {
    let Some(parts) = value.as_array() else {
        return match value {
            Value::String(_) | Value::Null => Ok(value.clone()),
            _ => Err(ApiError::param(at, "must be a string or a list of parts")),
        };
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => texts.push(text),
            (Some("text"), None) => return Err(ApiError::param(format!("{at}[{i}].text"), "must be a string")),
            (Some(kind), _) => {
                let what = format!("is a part of type `{kind}`; this model reads only `text`");
                return Err(ApiError::param(format!("{at}[{i}]"), what));
            }
            (None, _) => return Err(ApiError::param(format!("{at}[{i}].type"), "is missing")),
        }
    }
    Ok(json!(texts.join("\n")))
}

/// Calls as templates want them: arguments are objects, not JSON in a string.
fn tool_calls(at: &str, value: &Value) -> Answer<Value> {
    let calls = value.as_array().ok_or_else(|| ApiError::param(at, "must be a list"))?;
    let mut normal = calls.clone();
    for (i, call) in normal.iter_mut().enumerate() {
        let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
            return Err(ApiError::param(format!("{at}[{i}].function"), "is missing"));
        };
        if let Some(Value::String(text)) = function.get("arguments")
            && let Ok(arguments) = serde_json::from_str::<Value>(text)
        {
            function.insert("arguments".into(), arguments);
        }
    }
    Ok(normal.into())
}

/// The text of a conversation as the model was trained on it.
pub fn render(server: &Server, messages: &[Value], tools: &[Value], answer_next: bool) -> Answer<String> {
    let messages = normalize(messages)?;
    let template = server.model().chat_template()?;
    let mut more = Map::new();
    if !tools.is_empty() {
        let source = server.model().metadata().chat_template.as_deref().unwrap_or_default();
        if !source.contains("tools") {
            let unsupported = ApiError::param("tools", "is not supported: this model's chat template knows no tools");
            return Err(unsupported.with_code("unsupported_parameter"));
        }
        more.insert("tools".into(), tools.into());
    }
    // Templates are programs: one may take its time.
    let rendered = tokio::task::block_in_place(|| template.render_with(&messages, answer_next, &more));
    rendered.map_err(|error| match error {
        refused @ moec_runtime::Error::ChatRefused { .. } => {
            ApiError::param("messages", format!("was refused: {refused}"))
        }
        other => other.into(),
    })
}

/// The token ids of a conversation that the model is to answer.
pub fn encode(server: &Server, messages: &[Value], tools: &[Value]) -> Answer<Vec<u32>> {
    let text = render(server, messages, tools, true)?;
    // The template has written the special tokens itself.
    server.encode(&text, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_become_strings() {
        let messages = [
            json!({ "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }),
            json!({ "role": "assistant", "content": null, "refusal": null, "annotations": [], "tool_calls": [
                { "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } }] }),
            json!({ "role": "tool", "content": "3", "tool_call_id": "1" }),
        ];
        let normal = normalize(&messages).unwrap();
        assert_eq!(normal[0]["content"], "a\nb");
        assert_eq!(
            (&normal[1]["content"], &normal[1]["tool_calls"][0]["function"]["arguments"]["x"]),
            (&json!(""), &json!(1))
        );
        assert_eq!(normal[2], messages[2]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (messages, param) in [
            (json!([]), "messages"),
            (json!(["x"]), "messages[0]"),
            (json!([{ "content": "x" }]), "messages[0].role"),
            (json!([{ "role": "user" }]), "messages[0].content"),
            (json!([{ "role": "user", "content": 3 }]), "messages[0].content"),
            (json!([{ "role": "user", "content": [{ "type": "image_url" }] }]), "messages[0].content[0]"),
            (json!([{ "role": "user", "content": [{}] }]), "messages[0].content[0].type"),
            (json!([{ "role": "user", "content": "x", "mood": "good" }]), "messages[0].mood"),
            (json!([{ "role": "user", "content": "x", "audio": {"id": 1} }]), "messages[0].audio"),
        ] {
            assert_eq!(
                normalize(messages.as_array().unwrap()).unwrap_err().param.as_deref(),
                Some(param),
                "{messages}"
            );
        }
    }
}
