//! Answers in pieces: server-sent events.

use super::answers::Update;
use super::error::ApiError;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream;
use serde_json::Value;
use std::convert::Infallible;
use tokio::sync::mpsc;

/// Makes chunks of updates.
pub trait Chunks: Send + 'static {
    /// What goes before everything.
    fn first(&mut self) -> Vec<Value>;
    /// The chunks of an update of answer `number`.
    fn update(&mut self, number: usize, update: Update) -> Result<Vec<Value>, ApiError>;
    /// What goes after everything.
    fn last(&mut self) -> Vec<Value>;
}

/// The response that sends the chunks as they come, and `[DONE]`. An error on the way is sent as OpenAI does, in the place of a
/// chunk, and ends the stream.
pub fn respond(updates: mpsc::Receiver<(usize, Update)>, chunks: impl Chunks) -> Response {
    enum State<C> {
        Beginning(mpsc::Receiver<(usize, Update)>, C),
        Going(mpsc::Receiver<(usize, Update)>, C),
        Over,
    }
    let data =
        |values: Vec<Value>| values.iter().map(|value| Event::default().data(value.to_string())).collect::<Vec<_>>();
    let pieces = stream::unfold(State::Beginning(updates, chunks), move |state| async move {
        match state {
            State::Over => None,
            State::Beginning(updates, mut chunks) => {
                let first = data(chunks.first());
                Some((first, State::Going(updates, chunks)))
            }
            State::Going(mut updates, mut chunks) => match updates.recv().await {
                Some((number, update)) => match chunks.update(number, update) {
                    Ok(values) => Some((data(values), State::Going(updates, chunks))),
                    Err(error) => Some((data(vec![error.body()]), State::Over)),
                },
                None => {
                    let mut last = data(chunks.last());
                    last.push(Event::default().data("[DONE]"));
                    Some((last, State::Over))
                }
            },
        }
    });
    let events = pieces.flat_map(|events| stream::iter(events.into_iter().map(Ok::<_, Infallible>)));
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}
