//! What all handlers share.

use super::answers::Wire;
use super::error::{Answer, ApiError};
use super::grammar::Grammars;
use super::metrics::Metrics;
use super::pace::Pace;
use moec_runtime::scheduler::{Refusal, Request, Scheduler};
use moec_runtime::{Model, Tokenizer};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The server's state.
pub struct Server {
    pub scheduler: Scheduler,
    pub metrics: Arc<Metrics>,
    pace: Arc<Pace>,
    /// Name of the model in requests and answers.
    pub model_name: String,
    /// Bearer token that requests must carry.
    pub api_key: Option<String>,
    /// Tokens of the longest request.
    pub context: usize,
    /// When the server started, seconds since 1970.
    pub started: u64,
    grammars: OnceLock<Result<Grammars, String>>,
    random: RandomState,
    requests: AtomicU64,
}

impl Server {
    pub fn new(
        scheduler: Scheduler,
        metrics: Arc<Metrics>,
        pace: Arc<Pace>,
        model_name: String,
        api_key: Option<String>,
        context: usize,
    ) -> Server {
        Server {
            scheduler,
            metrics,
            pace,
            model_name,
            api_key,
            context,
            started: now(),
            grammars: OnceLock::new(),
            random: RandomState::new(),
            requests: AtomicU64::new(0),
        }
    }

    pub fn model(&self) -> &Arc<Model> {
        self.scheduler.model()
    }

    pub fn tokenizer(&self) -> Answer<&Tokenizer> {
        Ok(self.model().tokenizer()?)
    }

    /// Hands a request to the scheduler; its events go to `wire`.
    ///
    /// # Errors
    /// Those of [`Scheduler::submit`]. Who is refused because the queue is full is told when to come back.
    pub fn submit(&self, request: Request, wire: Wire) -> Answer<()> {
        self.scheduler.submit(request, Box::new(wire)).map_err(|refusal| {
            let full = matches!(refusal, Refusal::QueueFull { .. });
            let retry_after = full.then(|| self.pace.seconds(Instant::now()));
            ApiError { retry_after, ..refusal.into() }
        })
    }

    /// The token ids of a text; see [`Tokenizer::encode`].
    pub fn encode(&self, text: &str, special: bool) -> Answer<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        Ok(unhurried(text.len(), || tokenizer.encode(text, special))?)
    }

    /// The compiler of grammars for this model's vocabulary; made when first needed, which takes a moment.
    pub fn grammars(&self) -> Answer<&Grammars> {
        let made = self.grammars.get_or_init(|| {
            let tokenizer = self.model().tokenizer().map_err(|error| error.to_string())?;
            Grammars::new(tokenizer, self.model())
        });
        made.as_ref().map_err(|what| ApiError::bad(what.clone()))
    }

    /// An identifier that no other answer has.
    pub fn new_id(&self, prefix: &str) -> String {
        let mut hasher = self.random.build_hasher();
        hasher.write_u64(self.requests.fetch_add(1, Ordering::Relaxed));
        format!("{prefix}-{:016x}{:04x}", hasher.finish(), self.requests.load(Ordering::Relaxed) & 0xffff)
    }

    /// Refuses a request for another model.
    pub fn check_model(&self, asked: Option<&str>) -> Answer<()> {
        match asked {
            Some(name) if name != self.model_name => {
                let message = format!("the model `{name}` does not exist here; this server has `{}`", self.model_name);
                let status = axum::http::StatusCode::NOT_FOUND;
                let error = ApiError { param: Some("model".into()), ..ApiError::new(status, message) };
                Err(error.with_code("model_not_found"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a text that is longer than `--context` allows.
    pub fn check_length(&self, prompt: usize, answer: usize) -> Answer<()> {
        let tokens = prompt.saturating_add(answer);
        if tokens > self.context {
            return Err(moec_runtime::Error::ContextFull { tokens, context: self.context }.into());
        }
        if prompt == 0 {
            return Err(ApiError::bad("the prompt has no tokens; the model needs at least one to start from"));
        }
        Ok(())
    }
}

/// Does work on `bytes` bytes of text, beside the other connections when there are many.
pub fn unhurried<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    const MANY: usize = 16 << 10;
    if bytes < MANY { work() } else { tokio::task::block_in_place(work) }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
