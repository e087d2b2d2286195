//! `serve`: the model behind OpenAI's interface, over HTTP, with a web page.
//!
//! On the way of a request: a [connection], the [routes] below, the [body] as checked [parameters](generation), the
//! [scheduler](moec_runtime::scheduler) on its own thread, and [answers] that are sent [whole](chat) or in
//! [pieces](streaming). Handlers run on tokio's threads; the scheduler's thread and the model's workers never wait for them.
//!
//! Deliberately absent: TLS and several models; a proxy in front does both. Nothing here computes anything.

mod answers;
mod body;
mod chat;
mod completions;
mod connection;
mod embeddings;
mod error;
mod generation;
mod grammar;
mod info;
mod logprobs;
mod messages;
mod metrics;
mod openapi;
mod pace;
mod state;
mod streaming;
mod texts;
mod tools;

use crate::args::service::Serve;
use crate::expert_stats::StatsFile;
use crate::failure::{Failure, Result};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{StatusCode, header::AUTHORIZATION};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, http::Method};
use error::ApiError;
use metrics::Metrics;
use moec_runtime::scheduler::{Limits, Scheduler, StepReport};
use moec_runtime::{Descriptor, Options};
use pace::Pace;
use state::Server;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tower_http::catch_panic::CatchPanicLayer;

/// Threads for connections: they only carry text.
const CONNECTION_THREADS: usize = 2;

/// Serves until a signal ends it.
pub(crate) fn run(descriptor: Descriptor, options: &Options, args: &Serve) -> Result<()> {
    let address = (args.host.as_str(), args.port);
    let listener = TcpListener::bind(address).map_err(|source| {
        let (host, port) = address;
        let remedy = match source.kind() {
            std::io::ErrorKind::AddrInUse => "; another program listens there: choose another `--port`",
            _ => "",
        };
        Failure::Refused(format!("cannot listen on {host}:{port}: {source}{remedy}"))
    })?;
    let stats = args.run.expert_stats.as_deref().map(StatsFile::check).transpose()?;
    let (metrics, pace) = (Metrics::new(), Arc::new(Pace::default()));
    let page_bytes = descriptor.page_bytes;
    let limits = Limits {
        parallel: args.parallel.map_or(Limits::default().parallel, usize::from),
        queue: args.queue as usize,
        pages: args.kv_memory.map(|bytes| usize::try_from(bytes / page_bytes).unwrap_or(usize::MAX)),
        chunk: args.run.chunk.map(|chunk| chunk as usize),
        prefix_cache: !args.no_prefix_cache,
        ..Limits::default()
    };
    let observer = {
        let (metrics, pace) = (metrics.clone(), pace.clone());
        Box::new(move |report: &StepReport| {
            metrics.observe(report);
            pace.observe(report.ended, report.running + report.waiting > 0, Instant::now());
        })
    };
    let scheduler = Scheduler::start(descriptor, options, &limits, observer)?;
    let stats = stats.map(|file| file.start(scheduler.model())).transpose()?;
    let context = args.context.map_or(scheduler.context(), |context| (context as usize).min(scheduler.context()));
    let name = args.model_name.clone().unwrap_or_else(|| scheduler.model().metadata().name.clone());
    let server = Arc::new(Server::new(scheduler, metrics, pace, name, args.api_key.clone(), context));
    let shown =
        listener.local_addr().map_or_else(|_| format!("{}:{}", args.host, args.port), |address| address.to_string());
    if context < descriptor.context as usize && args.context.is_none() {
        eprintln!("note: memory allows texts of {context} tokens; the model's context is {}", descriptor.context);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONNECTION_THREADS)
        .thread_name("moec-http")
        .enable_all()
        .build()
        .map_err(|error| Failure::Refused(format!("cannot start the threads of the server: {error}")))?;
    let app = routes(&server, args.max_body as usize);
    let limits = connection::Limits {
        header_time: Duration::from_secs(args.header_timeout),
        drain_time: Duration::from_secs(args.drain_timeout),
        connections: args.max_connections as usize,
    };
    let ready = move || eprintln!("serving `{}` on http://{shown}", server.model_name);
    let scheduler = app.1;
    runtime.block_on(connection::serve(listener, app.0, scheduler, limits, ready))?;
    // Whatever is left belongs to clients that did not read; nothing waits for them.
    runtime.shutdown_background();
    stats.map_or(Ok(()), StatsFile::write)
}

/// All routes, and the state behind them.
fn routes(server: &Arc<Server>, max_body: usize) -> (Router, Arc<Server>) {
    let open = Router::new()
        .route("/", get(info::page))
        .route("/health", get(info::health))
        .route("/openapi.json", get(openapi::openapi));
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/embeddings", post(embeddings::embed))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{id}", get(info::one_model))
        .route("/tokenize", post(texts::tokenize))
        .route("/detokenize", post(texts::detokenize))
        .route("/tokenizer_info", get(texts::tokenizer_info))
        .route("/apply-template", post(texts::apply_template))
        .route("/metrics", get(info::metrics))
        .route_layer(middleware::from_fn_with_state(server.clone(), authorize));
    let app = open
        .merge(guarded)
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(max_body))
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(middleware::from_fn_with_state(server.clone(), count))
        .with_state(server.clone());
    (app, server.clone())
}

/// Lets through requests that carry the key, when there is one.
async fn authorize(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    if let Some(key) = &server.api_key {
        let given = request.headers().get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        if !given.is_some_and(|given| same(given, key.as_bytes())) {
            let message = "this server needs its API key, as the header `Authorization: Bearer KEY`";
            return ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key").into_response();
        }
    }
    next.run(request).await
}

/// Whether two texts are the same, in a time that does not tell where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// Counts answers by endpoint and status.
async fn count(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    server.metrics.requests.with_label_values(&[path.as_str(), response.status().as_str()]).inc();
    response
}

async fn not_found(request: Request) -> ApiError {
    let message = format!("there is nothing at {}; /openapi.json tells what there is", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, message)
}

async fn not_allowed(method: Method, request: Request) -> ApiError {
    let message = format!("{} does not take {method}; /openapi.json tells what it takes", request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use tower::ServiceExt;

    /// A handler that panics costs its client an error, and nobody else anything.
    #[test]
    fn a_panic_is_a_500() {
        let app = Router::new()
            .route("/panic", get(|| async { panic!("a handler gives up") as () }))
            .route("/fine", get(|| async { "fine" }))
            .layer(CatchPanicLayer::custom(error::panicked));
        let ask = async |path: &str| {
            let request = Request::builder().uri(path).body(Body::empty()).expect("a request");
            let response = app.clone().oneshot(request).await.expect("an answer");
            let status = response.status();
            let body = to_bytes(response.into_body(), 1 << 20).await.expect("a body");
            (status.as_u16(), String::from_utf8_lossy(&body).into_owned())
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let (status, body) = ask("/panic").await;
            assert!(status == 500 && body.contains("\"type\":\"server_error\""), "{body}");
            assert_eq!(ask("/fine").await, (200, "fine".into()));
        });
    }

    #[test]
    fn keys_are_compared_whole() {
        assert!(
            same(b"secret", b"secret") && !same(b"secret", b"secreT") && !same(b"secret", b"secret1") && same(b"", b"")
        );
    }
}
