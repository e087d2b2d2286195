//! Many texts at once: requests share the steps of one model.
//!
//! A [`Scheduler`] is a thread that owns the steps of its model. Before each step it takes in new requests, lets go of those
//! that nobody waits for any more, and puts together a batch: the next token of every running text, and beside them a chunk of
//! the prompts that have not been read yet. KV pages are taken one by one as texts grow. Pages that are full are kept by
//! their content ([`PrefixCache`](prefix::PrefixCache)), so that texts that begin alike are read once; the least recently used go when
//! room is needed. When even that is not enough, the request that came last gives its pages back and is computed again later.
//!
//! By the numerics contract none of this changes an answer: not the batch, the chunks, the cache or the preemption.
//!
//! Deliberately absent: text, stop strings, HTTP and time. Requests are token ids, and [`Event`]s go to a [`Sink`] of the
//! caller, which must not block.

pub mod prefix;
mod request;
mod run;
mod task;

pub use request::{Constraint, Done, Event, Finish, Generate, Pooling, Request, Sink, Work};

use crate::error::{Error, Result};
use crate::kv::Sequence;
use crate::memory::{self, Memory};
use crate::model::{Descriptor, Model, Options};
use moec_abi::PAGE_TOKENS;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How much a scheduler does at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Requests that run at the same time.
    pub parallel: usize,
    /// Requests that may wait for their turn.
    pub queue: usize,
    /// KV pages, those of the prefix cache included; `None` for as many as all running requests could need, within half of the
    /// free memory.
    pub pages: Option<usize>,
    /// Most tokens in a step; `None` for the model's limit.
    pub chunk: Option<usize>,
    /// Most tokens of prompts in a step beside running answers, which wait for it.
    pub chunk_beside: usize,
    /// Keep full pages for texts that begin alike.
    pub prefix_cache: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { parallel: 16, queue: 256, pages: None, chunk: None, chunk_beside: 128, prefix_cache: true }
    }
}

/// What happened in one step, for statistics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Requests that they belong to.
    pub requests: usize,
    /// Tokens of them that are prompts (or are computed again).
    pub prompt_tokens: usize,
    /// Tokens of answers that were drawn.
    pub generated: usize,
    /// Tokens that the prefix cache spared since the step before.
    pub cached_tokens: usize,
    /// Requests preempted since the step before.
    pub preempted: usize,
    /// Requests that ended since the step before: done, failed, or given up by their callers.
    pub ended: usize,
    /// Requests that run.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// KV pages held by running requests or the prefix cache.
    pub pages_in_use: usize,
    /// KV pages held by the prefix cache.
    pub pages_cached: usize,
    /// How long the step took, drawing the tokens included.
    pub time: Duration,
}

/// Called after each step, and once more when nothing is left to do. Must not block.
pub type Observer = Box<dyn FnMut(&StepReport) + Send>;

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Too many are waiting.
    #[error("{waiting} requests are waiting already; try again later")]
    QueueFull {
        /// Requests that were waiting or running.
        waiting: usize,
    },
    /// The scheduler takes no more requests.
    #[error("the server is shutting down")]
    Closed,
    /// The request itself is wrong.
    #[error(transparent)]
    Invalid(#[from] Error),
}

/// State that both sides of the queue look at.
struct Shared {
    /// Requests submitted and not finished.
    open: AtomicUsize,
    /// No new requests; the thread ends when all are finished.
    closing: AtomicBool,
    /// Open requests are to fail.
    aborting: AtomicBool,
}

struct Submitted {
    request: Request,
    sink: Box<dyn Sink>,
}

/// A running scheduler. Dropping it fails the open requests and ends the thread.
pub struct Scheduler {
    model: Arc<Model>,
    shared: Arc<Shared>,
    queue: mpsc::Sender<Option<Submitted>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Requests that may be open.
    most_open: usize,
    /// Tokens of the longest text that can be held.
    context: usize,
}

impl Scheduler {
    /// Opens a model on a thread of its own, which runs its steps from then on.
    ///
    /// # Errors
    /// Those of [`Model::open`], and when there is no memory for the KV pages of a single token.
    pub fn start(descriptor: Descriptor, options: &Options, limits: &Limits, observer: Observer) -> Result<Scheduler> {
        let shared = Arc::new(Shared {
            open: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            aborting: AtomicBool::new(false),
        });
        let (queue, submitted) = mpsc::channel();
        let (opened, opening) = mpsc::sync_channel(1);
        let body = {
            let (shared, options, limits) = (shared.clone(), options.clone(), limits.clone());
            // The model is opened here so that the pool can confine this thread to a core, and no other.
            move || {
                let model = Model::open(descriptor, &options);
                let prepared = model.and_then(|model| Ok((plan(&model, &limits)?, model)));
                match prepared {
                    Ok((plan, model)) => {
                        let told = opened.send(Ok((model.clone(), plan)));
                        if told.is_ok() {
                            run::Loop::new(model, plan, shared, submitted, observer).run();
                        }
                    }
                    Err(error) => drop(opened.send(Err(error))),
                }
            }
        };
        let thread = thread::Builder::new().name("moec-steps".into()).spawn(body);
        let thread = thread.map_err(|source| Error::Threads { threads: 1, source })?;
        let (model, plan) = opening.recv().unwrap_or(Err(Error::Interrupted))?;
        Ok(Scheduler {
            model,
            shared,
            queue,
            thread: Mutex::new(Some(thread)),
            most_open: plan.parallel + limits.queue,
            context: plan.context,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Tokens of the longest text: the model's context, or less when there is no memory for its keys and values.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Whether requests are taken: not after [`close`](Scheduler::close), nor when the thread that runs the steps has panicked.
    pub fn is_running(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        !self.shared.closing.load(Ordering::SeqCst) && thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Requests submitted and not finished.
    pub fn open_requests(&self) -> usize {
        self.shared.open.load(Ordering::Relaxed)
    }

    /// Hands in a request; its events go to `sink`.
    ///
    /// # Errors
    /// When it can never be done, when too many are waiting, and after [`close`](Scheduler::close).
    pub fn submit(&self, request: Request, sink: Box<dyn Sink>) -> std::result::Result<(), Refusal> {
        request.check(self.model.descriptor().vocab, self.context)?;
        if self.shared.closing.load(Ordering::SeqCst) {
            return Err(Refusal::Closed);
        }
        let room = |open: usize| (open < self.most_open).then_some(open + 1);
        let taken = self.shared.open.fetch_update(Ordering::SeqCst, Ordering::SeqCst, room);
        taken.map_err(|waiting| Refusal::QueueFull { waiting })?;
        self.queue.send(Some(Submitted { request, sink })).map_err(|_| Refusal::Closed)
    }

    /// Takes no more requests; those that are open are finished.
    pub fn close(&self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        // Wakes the thread; when it is gone already there is nobody to wake.
        self.queue.send(None).ok();
    }

    /// Takes no more requests, and fails those that are open.
    pub fn abort(&self) {
        self.shared.aborting.store(true, Ordering::SeqCst);
        self.close();
    }

    /// Waits until all requests are finished, after [`close`](Scheduler::close) or [`abort`](Scheduler::abort).
    pub fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            thread.join().ok();
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.abort();
        self.join();
    }
}

/// Limits in numbers.
#[derive(Clone, Copy, Debug)]
struct Plan {
    parallel: usize,
    pages: usize,
    chunk: usize,
    chunk_beside: usize,
    prefix_cache: bool,
    /// Tokens of the longest text.
    context: usize,
}

fn plan(model: &Model, limits: &Limits) -> Result<Plan> {
    let d = model.descriptor();
    let max = d.max_tokens as usize;
    let chunk = limits.chunk.unwrap_or(max).clamp(1, max);
    let parallel = limits.parallel.clamp(1, max);
    let context = d.context as usize;
    let one = Sequence::pages_for(context, chunk, d.window());
    let affordable = (Memory::now().available / 2 / d.page_bytes).min(usize::MAX as u64) as usize;
    let pages = limits.pages.unwrap_or_else(|| one.saturating_mul(parallel).min(affordable));
    // With a window the pages of a whole context may be fewer than those that its tokens fill.
    let context = if pages >= one { context } else { context.min(pages * PAGE_TOKENS) };
    if pages == 0 {
        let remedy = "free memory, or allow at least one page";
        return Err(memory::too_little("the keys and values of a text", d.page_bytes, Memory::now().available, remedy));
    }
    Ok(Plan {
        parallel,
        pages,
        chunk,
        chunk_beside: limits.chunk_beside.max(1),
        prefix_cache: limits.prefix_cache,
        context,
    })
}
