//! `POST /v1/completions`: continues texts.

use super::answers::{self, End, Question, Update};
use super::body::Object;
use super::error::{Answer, ApiError};
use super::generation::{self, Generation, MOST_LOGPROBS, count};
use super::logprobs::Lists;
use super::openapi;
use super::state::{Server, now};
use super::streaming::{self, Chunks};
use axum::extract::State;
use axum::response::IntoResponse;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// Most prompts in a request.
const MOST_PROMPTS: usize = 256;

/// A text, token ids, or a list of either.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "a string, a list of strings, a list of token ids, or a list of lists of token ids")]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Token ids, to which nothing is added.
    Ids(Vec<u32>),
    /// Lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

impl Prompt {
    /// The token ids of each prompt.
    pub fn ids(self, server: &Server, name: &str) -> Answer<Vec<Vec<u32>>> {
        let encode = |text: &String| server.encode(text, true);
        let lists = match self {
            Prompt::Text(text) => vec![encode(&text)?],
            Prompt::Texts(texts) => texts.iter().map(encode).collect::<Answer<_>>()?,
            Prompt::Ids(ids) => vec![ids],
            Prompt::IdLists(lists) => lists,
        };
        if lists.is_empty() || lists.iter().any(Vec::is_empty) {
            return Err(ApiError::param(name, "is empty; the model needs at least one token to start from"));
        }
        if lists.len() > MOST_PROMPTS {
            return Err(ApiError::param(name, format!("has {} entries; {MOST_PROMPTS} are the most", lists.len())));
        }
        Ok(lists)
    }
}

/// What is special about completions.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Own {
    /// What to continue.
    pub prompt: Prompt,
    /// Begin the answer with the prompt.
    pub echo: Option<bool>,
    /// Log-probabilities of the tokens, with so many alternatives each.
    #[schema(maximum = 20)]
    pub logprobs: Option<u64>,
}

/// The body of a request for completions: all parameters of both.
pub struct CompletionRequest;

impl PartialSchema for CompletionRequest {
    fn schema() -> RefOr<Schema> {
        openapi::merged(Generation::schema(), Own::schema())
    }
}

impl ToSchema for CompletionRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Generation::schemas(schemas);
        Own::schemas(schemas);
    }
}

/// Continues texts.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest, tag = "generation", responses(
    (status = 200, description = "The continuation, or server-sent events when `stream` is set"),
    (status = "4XX", description = "What is wrong with the request"),
    (status = "5XX", description = "What is wrong with the server")
))]
pub async fn complete(State(server): State<Arc<Server>>, mut object: Object) -> Answer {
    object.drop_what_asks_for_nothing()?;
    let generation: Generation = object.take(generation::NAMES).parse()?;
    let own: Own = object.parse()?;
    server.check_model(generation.model.as_deref())?;
    let checked = generation.check(server.model().descriptor().vocab)?;
    let logprobs = count("logprobs", own.logprobs, 0, MOST_LOGPROBS)?;
    let echo = own.echo.unwrap_or(false);
    if checked.max_tokens == Some(0) && !echo {
        return Err(ApiError::param("max_tokens", "is 0, which leaves nothing to answer unless `echo` is set"));
    }
    let max_tokens = checked.max_tokens;
    // The default of this endpoint, as OpenAI has it.
    let checked = generation::Checked { max_tokens: max_tokens.or(Some(16)), ..checked };
    let prompts = own.prompt.ids(&server, "prompt")?;
    let questions = prompts.iter().map(|prompt| Question {
        prompt: prompt.clone(),
        continues: true,
        logprobs,
        prompt_logprobs: logprobs.filter(|_| echo),
    });
    let mut updates = answers::ask(&server, questions.collect(), &checked).await?;
    let writer = Writer {
        id: server.new_id("cmpl"),
        created: now(),
        include_usage: checked.include_usage,
        choices: (0..prompts.len() * checked.n).map(|_| Choice::default()).collect(),
        n: checked.n,
        prompts,
        echo,
        logprobs: logprobs.is_some(),
        server,
    };
    if checked.stream {
        return Ok(streaming::respond(updates, writer));
    }
    let mut writer = writer;
    let mut texts = vec![String::new(); writer.choices.len()];
    let mut lists: Vec<Lists> = texts.iter().map(|_| Lists::default()).collect();
    for number in 0..texts.len() {
        texts[number] += &writer.begin(number, &mut lists[number])?;
    }
    while let Some((number, update)) = updates.recv().await {
        texts[number] += &writer.take(number, update, &mut lists[number])?;
    }
    Ok(writer.whole(texts, &lists).into_response())
}

/// One answer on its way.
#[derive(Default)]
struct Choice {
    end: Option<End>,
    lists: Lists,
}

/// Makes responses of updates.
struct Writer {
    server: Arc<Server>,
    id: String,
    created: u64,
    prompts: Vec<Vec<u32>>,
    n: usize,
    echo: bool,
    logprobs: bool,
    include_usage: bool,
    choices: Vec<Choice>,
}

impl Writer {
    fn prompt(&self, number: usize) -> &[u32] {
        &self.prompts[number / self.n]
    }

    /// The text of answer `number` before anything is generated.
    fn begin(&self, number: usize, lists: &mut Lists) -> Answer<String> {
        if !self.echo {
            return Ok(String::new());
        }
        let tokenizer = self.server.tokenizer()?;
        if self.logprobs {
            lists.push_first(tokenizer, self.prompt(number)[0]);
        }
        Ok(tokenizer.decode(self.prompt(number))?)
    }

    /// Takes an update; returns new text.
    fn take(&mut self, number: usize, update: Update, lists: &mut Lists) -> Answer<String> {
        let tokenizer = self.server.tokenizer()?;
        match update {
            Update::Prompt(logprobs) => {
                logprobs.iter().for_each(|token| lists.push(tokenizer, token));
                Ok(String::new())
            }
            Update::Text { text, logprobs } => {
                logprobs.iter().for_each(|token| lists.push(tokenizer, token));
                Ok(text)
            }
            Update::End(end) => {
                self.choices[number].end = Some(end);
                Ok(String::new())
            }
            Update::Failed(error) => Err(error),
        }
    }

    fn object(&self) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.server.model_name,
        })
    }

    fn choice(&self, number: usize, text: &str, lists: &Lists) -> Value {
        json!({
            "index": number,
            "text": text,
            "logprobs": if self.logprobs { lists.to_value() } else { Value::Null },
            "finish_reason": self.choices[number].end.map(|end| end.reason.name()),
        })
    }

    fn usage(&self) -> Value {
        let ends: Vec<End> = self.choices.iter().filter_map(|choice| choice.end).collect();
        usage(self.prompts.iter().map(Vec::len).sum(), &ends)
    }

    fn whole(&self, texts: Vec<String>, lists: &[Lists]) -> axum::Json<Value> {
        let mut object = self.object();
        let choices = texts.iter().zip(lists).enumerate();
        object["choices"] = choices.map(|(number, (text, lists))| self.choice(number, text, lists)).collect();
        object["usage"] = self.usage();
        axum::Json(object)
    }
}

/// The numbers of tokens, as OpenAI tells them.
pub fn usage(prompt: usize, ends: &[End]) -> Value {
    let generated: usize = ends.iter().map(|end| end.generated).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": { "cached_tokens": ends.iter().map(|end| end.cached).sum::<usize>() },
    })
}

impl Chunks for Writer {
    fn first(&mut self) -> Vec<Value> {
        let mut chunks = Vec::new();
        for number in 0..self.choices.len() {
            let mut lists = Lists::default();
            // A prompt that was encoded is decoded too.
            let text = self.begin(number, &mut lists).unwrap_or_default();
            if self.echo {
                let mut chunk = self.object();
                chunk["choices"] = json!([self.choice(number, &text, &lists)]);
                chunks.push(chunk);
            }
            self.choices[number].lists = lists.rest();
        }
        chunks
    }

    fn update(&mut self, number: usize, update: Update) -> Result<Vec<Value>, ApiError> {
        let mut lists = std::mem::take(&mut self.choices[number].lists);
        let taken = self.take(number, update, &mut lists);
        let rest = lists.rest();
        let text = taken?;
        let mut chunk = self.object();
        chunk["choices"] = json!([self.choice(number, &text, &lists)]);
        self.choices[number].lists = rest;
        Ok(vec![chunk])
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut chunk = self.object();
        chunk["choices"] = json!([]);
        chunk["usage"] = self.usage();
        vec![chunk]
    }
}
