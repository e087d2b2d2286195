//! Tools: functions that the model may ask the client to call.
//!
//! How a model writes a call is up to its training: Mistral's a list after `[TOOL_CALLS]`, others objects between `<tool_call>`
//! tags, Llama's a bare object. All are JSON with a name and arguments, so an answer that consists of such JSON, markers
//! aside, and names only tools that were offered, is calls; everything else is text. An answer that must be a call is held to
//! that form from the beginning.

use super::error::{Answer, ApiError};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

/// A tool that the client offers.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// `function`.
    pub r#type: String,
    /// The function.
    pub function: Function,
}

/// A function that the client can call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// What it does, for the model.
    pub description: Option<String>,
    /// Schema of its arguments.
    #[schema(value_type = Object)]
    pub parameters: Option<Value>,
    /// Arguments fit the schema whenever a call is required, strict or not.
    #[allow(dead_code)]
    pub strict: Option<bool>,
}

/// Tools in a request, checked.
#[derive(Clone, Debug, Default)]
pub struct Tools {
    /// As the template wants them; empty when none are to be called.
    pub offered: Vec<Value>,
    names: Vec<String>,
    /// The form of an answer that must be a call.
    pub required: Option<Value>,
}

/// Markers around calls.
const MARKERS: &[&str] = &["[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<|python_tag|>"];

impl Tools {
    /// Checks `tools` and `tool_choice`.
    pub fn new(tools: Option<Vec<Tool>>, choice: Option<Value>) -> Answer<Tools> {
        let tools = tools.unwrap_or_default();
        if let Some(i) = tools.iter().position(|tool| tool.r#type != "function") {
            return Err(ApiError::param(format!("tools[{i}].type"), "must be `function`"));
        }
        let any = |tool: &Tool| {
            let arguments = tool.function.parameters.clone().unwrap_or_else(|| json!({ "type": "object" }));
            json!({
                "type": "object",
                "properties": { "name": { "const": tool.function.name }, "arguments": arguments },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        };
        let form = |tools: &[&Tool]| json!({ "anyOf": tools.iter().map(|tool| any(tool)).collect::<Vec<_>>() });
        let all: Vec<&Tool> = tools.iter().collect();
        let choice = choice.unwrap_or(Value::Null);
        let required = match (choice.as_str(), choice["function"]["name"].as_str()) {
            (Some("none"), _) => return Ok(Tools::default()),
            (Some("auto"), _) => None,
            (Some("required" | "any"), _) if !tools.is_empty() => Some(form(&all)),
            (_, Some(name)) => match all.iter().find(|tool| tool.function.name == name) {
                Some(tool) => Some(form(&[*tool])),
                None => {
                    return Err(ApiError::param("tool_choice", format!("names `{name}`, which is not among `tools`")));
                }
            },
            _ if choice.is_null() => None,
            _ => {
                let what = "must be `none`, `auto`, `required` or a function of `tools`, which must not be empty then";
                return Err(ApiError::param("tool_choice", what));
            }
        };
        let offered = tools.iter().map(|tool| {
            let mut function = json!({ "name": tool.function.name });
            if let Some(description) = &tool.function.description {
                function["description"] = json!(description);
            }
            function["parameters"] = tool.function.parameters.clone().unwrap_or_else(|| json!({}));
            json!({ "type": "function", "function": function })
        });
        let names = tools.iter().map(|tool| tool.function.name.clone()).collect();
        Ok(Tools { offered: offered.collect(), names, required })
    }

    /// Whether `text`, the beginning of an answer, may become calls.
    pub fn may_be_calls(&self, text: &str) -> bool {
        let text = text.trim_start();
        !self.names.is_empty()
            && (text.starts_with(['{', '[']) || MARKERS.iter().any(|m| m.starts_with(text) || text.starts_with(m)))
    }

    /// The calls of a whole answer: name and arguments; `None` when it is text.
    pub fn calls(&self, text: &str) -> Option<Vec<(String, Value)>> {
        if !self.may_be_calls(text) || text.trim().is_empty() {
            return None;
        }
        let bare = MARKERS.iter().fold(text.to_owned(), |text, marker| text.replace(marker, " "));
        let mut calls = Vec::new();
        for value in serde_json::Deserializer::from_str(&bare).into_iter::<Value>() {
            match value.ok()? {
                Value::Array(list) => calls.extend(list),
                value => calls.push(value),
            }
        }
        let call = |value: Value| {
            let name = value["name"].as_str().filter(|name| self.names.iter().any(|known| known == name))?;
            let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
            Some((name.to_owned(), arguments.clone()))
        };
        let calls: Vec<_> = calls.into_iter().map(call).collect::<Option<_>>()?;
        (!calls.is_empty()).then_some(calls)
    }
}

/// Calls as OpenAI writes them, with identifiers made by `id`.
pub fn to_value(calls: &[(String, Value)], mut id: impl FnMut() -> String) -> Value {
    let call = |(i, (name, arguments)): (usize, &(String, Value))| {
        json!({
            "index": i,
            "id": id(),
            "type": "function",
            "function": { "name": name, "arguments": arguments.to_string() },
        })
    };
    calls.iter().enumerate().map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(choice: Value) -> Answer<Tools> {
        let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } });
        Tools::new(Some(serde_json::from_value(json!([tool("add"), tool("now")])).unwrap()), Some(choice))
    }

    #[test]
    fn calls_are_found_in_all_spellings() {
        let tools = tools(json!("auto")).unwrap();
        let one = vec![("add".to_owned(), json!({ "a": 1 }))];
        let two = vec![one[0].clone(), ("now".to_owned(), json!({}))];
        for (text, calls) in [
            (r#"[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]"#, Some(one.clone())),
            (r#"[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]"#, Some(two.clone())),
            (r#" {"name": "add", "parameters": {"a": 1}}"#, Some(one)),
            (
                "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \
                 \"arguments\": {}}\n</tool_call>",
                Some(two),
            ),
            (r#"{"name": "fly", "arguments": {}}"#, None),
            (r#"{"name": "add"}"#, None),
            ("The sum is 3.", None),
            ("", None),
            ("[1, 2]", None),
            (r#"{"name": "add", "arguments": {"#, None),
        ] {
            assert_eq!(tools.calls(text), calls, "{text}");
        }
        assert!(tools.may_be_calls("[TOOL") && tools.may_be_calls(" <tool_call>{") && tools.may_be_calls(""));
        assert!(!tools.may_be_calls("The"));
        assert!(!Tools::default().may_be_calls("{"));
    }

    #[test]
    fn choices_are_checked() {
        assert!(tools(json!("none")).unwrap().offered.is_empty());
        assert_eq!(tools(json!("required")).unwrap().required.unwrap()["anyOf"].as_array().unwrap().len(), 2);
        let named = tools(json!({ "type": "function", "function": { "name": "now" } })).unwrap().required.unwrap();
        assert_eq!(named["anyOf"][0]["properties"]["name"]["const"], "now");
        assert!(tools(json!({ "type": "function", "function": { "name": "fly" } })).is_err());
        assert!(tools(json!("maybe")).is_err());
        assert!(Tools::new(None, Some(json!("required"))).is_err());
        assert!(Tools::new(None, None).unwrap().offered.is_empty());
    }
}
