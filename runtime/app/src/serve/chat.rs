//! `POST /v1/chat/completions`: answers conversations.

use super::answers::{self, End, Question, Reason, Update};
use super::body::Object;
use super::completions::usage;
use super::error::{Answer, ApiError};
use super::generation::{self, Checked, Generation, MOST_LOGPROBS, count};
use super::grammar::Rule;
use super::logprobs::for_chat;
use super::messages;
use super::openapi;
use super::state::{Server, now};
use super::streaming::{self, Chunks};
use super::tools::{self, Tool, Tools};
use axum::extract::State;
use axum::response::IntoResponse;
use moec_runtime::logprobs::TokenLogprobs;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// What is special about chats.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Own {
    /// The conversation: objects with `role` and `content`.
    #[schema(value_type = Vec<messages::Message>)]
    pub messages: Vec<Value>,
    /// Most tokens of the answer; the newer name of `max_tokens`.
    pub max_completion_tokens: Option<u64>,
    /// Tell the log-probabilities of the answer's tokens.
    pub logprobs: Option<bool>,
    /// With so many alternatives each.
    #[schema(maximum = 20)]
    pub top_logprobs: Option<u64>,
    /// Functions that the model may ask the client to call, when its template knows tools.
    pub tools: Option<Vec<Tool>>,
    /// `none`, `auto`, `required`, or one of the functions.
    #[schema(value_type = Object)]
    pub tool_choice: Option<Value>,
    /// The model decides how many calls it makes; `false` is not supported.
    pub parallel_tool_calls: Option<bool>,
}

/// The body of a request for an answer in a conversation: all parameters of both.
pub struct ChatRequest;

impl PartialSchema for ChatRequest {
    fn schema() -> RefOr<Schema> {
        openapi::merged(Generation::schema(), Own::schema())
    }
}

impl ToSchema for ChatRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Generation::schemas(schemas);
        Own::schemas(schemas);
    }
}

/// Answers conversations.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest, tag = "generation", responses(
    (status = 200, description = "The answer, or server-sent events when `stream` is set"),
    (status = "4XX", description = "What is wrong with the request"),
    (status = "5XX", description = "What is wrong with the server")
))]
pub async fn chat(State(server): State<Arc<Server>>, mut object: Object) -> Answer {
    object.drop_what_asks_for_nothing()?;
    let mut generation: Generation = object.take(generation::NAMES).parse()?;
    let own: Own = object.parse()?;
    server.check_model(generation.model.as_deref())?;
    if own.max_completion_tokens.is_some() {
        if generation.max_tokens.is_some() && generation.max_tokens != own.max_completion_tokens {
            return Err(ApiError::param(
                "max_completion_tokens",
                "and `max_tokens` are two names of the same; give one",
            ));
        }
        generation.max_tokens = own.max_completion_tokens;
    }
    let mut checked = generation.check(server.model().descriptor().vocab)?;
    if checked.max_tokens == Some(0) {
        return Err(ApiError::param("max_tokens", "must be at least 1, not 0"));
    }
    let logprobs = match (own.logprobs.unwrap_or(false), own.top_logprobs) {
        (false, Some(_)) => return Err(ApiError::param("top_logprobs", "needs `logprobs` to be true")),
        (false, None) => None,
        (true, top) => Some(count("top_logprobs", top, 0, MOST_LOGPROBS)?.unwrap_or(0)),
    };
    if own.parallel_tool_calls == Some(false) && own.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
        let unsupported =
            ApiError::param("parallel_tool_calls", "cannot be false: the model decides how many calls it makes");
        return Err(unsupported.with_code("unsupported_parameter"));
    }
    let tools = Tools::new(own.tools, own.tool_choice)?;
    require_call(&tools, &mut checked)?;
    let prompt = messages::encode(&server, &own.messages, &tools.offered)?;
    let prompt_tokens = prompt.len();
    let question = Question { prompt, continues: false, logprobs, prompt_logprobs: None };
    let mut updates = answers::ask(&server, vec![question], &checked).await?;
    let writer = Writer {
        id: server.new_id("chatcmpl"),
        created: now(),
        prompt_tokens,
        include_usage: checked.include_usage,
        logprobs: logprobs.is_some(),
        choices: (0..checked.n).map(|_| Choice::default()).collect(),
        tools,
        server,
    };
    if checked.stream {
        return Ok(streaming::respond(updates, writer));
    }
    let mut writer = writer;
    while let Some((number, update)) = updates.recv().await {
        writer.keep(number, update)?;
    }
    Ok(writer.whole()?.into_response())
}

/// Holds an answer that must be a call to the form of one.
fn require_call(tools: &Tools, checked: &mut Checked) -> Answer<()> {
    let Some(form) = &tools.required else { return Ok(()) };
    if checked.rule.is_some() {
        return Err(ApiError::param("tool_choice", "requires a call, so the answer cannot have another form too"));
    }
    checked.rule = Some(Rule::Schema(form.clone()));
    Ok(())
}

/// One answer on its way.
#[derive(Default)]
struct Choice {
    /// Text that was not sent yet.
    text: String,
    logprobs: Vec<TokenLogprobs>,
    end: Option<End>,
    /// Text was sent, so this is no call.
    is_text: bool,
}

/// Makes responses of updates.
struct Writer {
    server: Arc<Server>,
    id: String,
    created: u64,
    prompt_tokens: usize,
    include_usage: bool,
    logprobs: bool,
    choices: Vec<Choice>,
    tools: Tools,
}

impl Writer {
    fn keep(&mut self, number: usize, update: Update) -> Answer<()> {
        let choice = &mut self.choices[number];
        match update {
            Update::Prompt(_) => {}
            Update::Text { text, logprobs } => {
                choice.text += &text;
                choice.logprobs.extend(logprobs);
            }
            Update::End(end) => choice.end = Some(end),
            Update::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn object(&self, kind: &str) -> Value {
        json!({ "id": self.id, "object": kind, "created": self.created, "model": self.server.model_name })
    }

    fn usage(&self) -> Value {
        let ends: Vec<End> = self.choices.iter().filter_map(|choice| choice.end).collect();
        usage(self.prompt_tokens, &ends)
    }

    fn logprobs(&self, tokens: &[TokenLogprobs]) -> Answer<Value> {
        Ok(if self.logprobs { for_chat(self.server.tokenizer()?, tokens) } else { Value::Null })
    }

    /// The calls of an answer that is one, complete.
    fn calls(&self, choice: &Choice) -> Option<Value> {
        let complete = choice.end.is_some_and(|end| end.reason == Reason::Stop) && !choice.is_text;
        let calls = complete.then(|| self.tools.calls(&choice.text)).flatten()?;
        Some(tools::to_value(&calls, || self.server.new_id("call")))
    }

    fn whole(&self) -> Answer<axum::Json<Value>> {
        let mut choices = Vec::with_capacity(self.choices.len());
        for (number, choice) in self.choices.iter().enumerate() {
            let mut message = json!({ "role": "assistant", "content": choice.text });
            let mut reason = choice.end.map(|end| end.reason.name());
            if let Some(calls) = self.calls(choice) {
                message = json!({ "role": "assistant", "content": null, "tool_calls": calls });
                reason = Some("tool_calls");
            }
            choices.push(json!({
                "index": number,
                "message": message,
                "logprobs": self.logprobs(&choice.logprobs)?,
                "finish_reason": reason,
            }));
        }
        let mut object = self.object("chat.completion");
        object["choices"] = choices.into();
        object["usage"] = self.usage();
        Ok(axum::Json(object))
    }

    fn chunk(&self, number: usize, delta: Value, logprobs: Value, reason: Option<&str>) -> Value {
        let mut object = self.object("chat.completion.chunk");
        let choice = json!({ "index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason });
        object["choices"] = json!([choice]);
        object
    }
}

impl Chunks for Writer {
    fn first(&mut self) -> Vec<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        (0..self.choices.len()).map(|number| self.chunk(number, delta.clone(), Value::Null, None)).collect()
    }

    fn update(&mut self, number: usize, update: Update) -> Result<Vec<Value>, ApiError> {
        self.keep(number, update)?;
        let choice = &self.choices[number];
        let calls = self.calls(choice);
        // What may be a call is kept until it is complete.
        if calls.is_none() && choice.end.is_none() && !choice.is_text && self.tools.may_be_calls(&choice.text) {
            return Ok(Vec::new());
        }
        let logprobs = self.logprobs(&choice.logprobs)?;
        let mut chunks = Vec::new();
        let mut reason = choice.end.map(|end| end.reason.name());
        if let Some(calls) = calls {
            chunks.push(self.chunk(number, json!({ "tool_calls": calls }), logprobs, None));
            reason = Some("tool_calls");
        } else if !choice.text.is_empty() || !choice.logprobs.is_empty() {
            chunks.push(self.chunk(number, json!({ "content": choice.text }), logprobs, None));
        }
        if let Some(reason) = reason {
            chunks.push(self.chunk(number, json!({}), Value::Null, Some(reason)));
        }
        let choice = &mut self.choices[number];
        choice.is_text = true;
        choice.text.clear();
        choice.logprobs.clear();
        Ok(chunks)
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut object = self.object("chat.completion.chunk");
        object["choices"] = json!([]);
        object["usage"] = self.usage();
        vec![object]
    }
}
