//! Answers on their way from the scheduler to the client: tokens become text, stop strings end it.
//!
//! Each answer has a task of its own that follows its events and sends [`Update`]s; a client that reads slowly holds up only
//! its own. When the client is gone, the task ends, and with it the request, before the scheduler's next step.

use super::error::{Answer, ApiError};
use super::generation::Checked;
use super::state::Server;
use moec_runtime::logprobs::TokenLogprobs;
use moec_runtime::scheduler::{Constraint, Done, Event, Finish, Generate, Request, Sink, Work};
use moec_runtime::{Error, StopMatcher, Tokenizer};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long a client may leave an answer unread.
const STALLED: Duration = Duration::from_secs(120);

/// Why an answer ended, as OpenAI calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// By itself or at a stop string.
    Stop,
    /// As many tokens as were wanted, or as fit.
    Length,
}

impl Reason {
    pub fn name(self) -> &'static str {
        match self {
            Reason::Stop => "stop",
            Reason::Length => "length",
        }
    }
}

/// News of an answer.
#[derive(Debug)]
pub enum Update {
    /// Log-probabilities of the next tokens of the prompt.
    Prompt(Vec<TokenLogprobs>),
    /// More text, and the log-probabilities of its tokens when asked for.
    Text { text: String, logprobs: Vec<TokenLogprobs> },
    /// The end.
    End(End),
    /// It could not be finished.
    Failed(ApiError),
}

/// The end of an answer.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub reason: Reason,
    /// Tokens of the answer.
    pub generated: usize,
    /// Tokens of the prompt that had been read before.
    pub cached: usize,
}

/// Something to answer.
pub struct Question {
    pub prompt: Vec<u32>,
    /// The answer goes on in the middle of the prompt's text, rather than being a text of its own.
    pub continues: bool,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
}

/// Events of the scheduler for a task: never blocks; a request makes as many as its answer has tokens at most.
pub struct Wire(pub mpsc::UnboundedSender<Event>);

impl Sink for Wire {
    fn send(&mut self, event: Event) {
        // Who is gone hears nothing.
        self.0.send(event).ok();
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// Hands in all questions, each for `n` answers; answer `i` of question `q` has number `q * n + i`. All are taken or none.
///
/// # Errors
/// What is wrong with a question, or that there is no room now.
pub async fn ask(
    server: &Arc<Server>,
    questions: Vec<Question>,
    checked: &Checked,
) -> Answer<mpsc::Receiver<(usize, Update)>> {
    for question in &questions {
        server.check_length(question.prompt.len(), checked.max_tokens.unwrap_or(1))?;
    }
    let count = questions.len() * checked.n;
    let mut rules = compile(server, checked, count).await?.into_iter();
    let (updates, received) = mpsc::channel(64);
    let mut tasks = Vec::with_capacity(count);
    for question in questions {
        for choice in 0..checked.n {
            let seed = checked.sampling.seed.wrapping_add(choice as u64);
            let generate = Generate {
                max_tokens: Some(checked.max_tokens.unwrap_or(server.context - question.prompt.len())),
                sampling: moec_runtime::Sampling { seed, ..checked.sampling.clone() },
                ends: if checked.ignore_eos { Vec::new() } else { server.model().metadata().eos_token_ids.clone() },
                logprobs: question.logprobs,
                prompt_logprobs: question.prompt_logprobs,
                constraint: rules.next().flatten(),
            };
            let (wire, events) = mpsc::unbounded_channel();
            let request = Request { prompt: question.prompt.clone(), work: Work::Generate(generate) };
            server.submit(request, Wire(wire))?;
            tasks.push(Follow {
                server: server.clone(),
                number: tasks.len(),
                before: if question.continues { question.prompt.clone() } else { Vec::new() },
                stops: checked.stops.clone(),
                events,
                updates: updates.clone(),
            });
        }
    }
    for task in tasks {
        tokio::spawn(task.run());
    }
    Ok(received)
}

type Rules = Vec<Option<Box<dyn Constraint>>>;

/// A rule for each of `count` answers.
async fn compile(server: &Arc<Server>, checked: &Checked, count: usize) -> Answer<Rules> {
    let Some(rule) = checked.rule.clone() else { return Ok((0..count).map(|_| None).collect()) };
    if checked.ignore_eos {
        return Err(ApiError::param("ignore_eos", "cannot be used together with a form for the answer"));
    }
    let server = server.clone();
    let compiled = tokio::task::spawn_blocking(move || -> Answer<Rules> {
        let grammars = server.grammars()?;
        let name = if matches!(rule, super::grammar::Rule::Lark(_)) { "grammar" } else { "response_format" };
        let compiled = |_| {
            grammars.compile(&rule).map(Some).map_err(|what| ApiError::param(name, format!("cannot be used: {what}")))
        };
        (0..count).map(compiled).collect()
    });
    compiled
        .await
        .map_err(|_| ApiError::internal("the compiler of grammars made a mistake; it is on standard error"))?
}

/// Follows one answer.
struct Follow {
    server: Arc<Server>,
    number: usize,
    /// Tokens before the answer's text.
    before: Vec<u32>,
    stops: Vec<String>,
    events: mpsc::UnboundedReceiver<Event>,
    updates: mpsc::Sender<(usize, Update)>,
}

impl Follow {
    async fn run(mut self) {
        let server = self.server.clone();
        let followed = match server.model().tokenizer() {
            Ok(tokenizer) => self.follow(tokenizer).await,
            Err(error) => Err(Stopped::Failed(error)),
        };
        match followed {
            Ok(()) | Err(Stopped::Gone) => {}
            Err(Stopped::Failed(error)) => {
                self.tell(Update::Failed(error.into())).await.ok();
            }
        }
    }

    /// Sends an update. A client that has not read for a long time counts as gone: its answer is not kept for ever.
    async fn tell(&self, update: Update) -> Result<(), Stopped> {
        match tokio::time::timeout(STALLED, self.updates.send((self.number, update))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Stopped::Gone),
        }
    }

    /// The next event; ends when the client is gone.
    async fn next(&mut self) -> Result<Event, Stopped> {
        tokio::select! {
            event = self.events.recv() => event.ok_or(Stopped::Failed(Error::Interrupted)),
            () = self.updates.closed() => Err(Stopped::Gone),
        }
    }

    async fn follow(&mut self, tokenizer: &Tokenizer) -> Result<(), Stopped> {
        let started = Instant::now();
        let mut last = None;
        let mut stream = tokenizer.stream_after(&self.before)?;
        let mut stops = StopMatcher::new(&self.stops);
        let mut pending: Vec<Pending> = Vec::new();
        let (mut given, mut decoded, mut generated, mut spared) = (0, 0, 0, 0);
        loop {
            match self.next().await? {
                Event::Prompt(logprobs) => self.tell(Update::Prompt(logprobs)).await?,
                Event::Read { cached } => spared = cached,
                Event::Token { id, logprobs } => {
                    let metrics = &self.server.metrics;
                    match last.replace(Instant::now()) {
                        None => metrics.time_to_first_token.observe(started.elapsed().as_secs_f64()),
                        Some(before) => metrics.time_per_token.observe(before.elapsed().as_secs_f64()),
                    }
                    generated += 1;
                    pending.extend(logprobs.map(|logprobs| Pending { logprobs, at: decoded }));
                    let text = stream.push(id)?;
                    decoded += text.len();
                    let matched = stops.push(&text);
                    given += matched.text.len();
                    if matched.stopped {
                        self.give(matched.text, &mut pending, given).await?;
                        let end = End { reason: Reason::Stop, generated, cached: spared };
                        return self.tell(Update::End(end)).await;
                    }
                    if !matched.text.is_empty() {
                        self.give(matched.text, &mut pending, usize::MAX).await?;
                    }
                }
                Event::Embedding(_) => {}
                Event::Done(Done { finish, generated, cached, .. }) => {
                    let matched = stops.push(&stream.finish()?);
                    let (rest, stopped) = match matched.stopped {
                        true => (matched.text, true),
                        false => (matched.text + &stops.finish(), false),
                    };
                    given += rest.len();
                    let up_to = if stopped { given } else { usize::MAX };
                    if !rest.is_empty() || !pending.is_empty() {
                        self.give(rest, &mut pending, up_to).await?;
                    }
                    let reason = if stopped || finish == Finish::End { Reason::Stop } else { Reason::Length };
                    return self.tell(Update::End(End { reason, generated, cached })).await;
                }
                Event::Failed(error) => return Err(Stopped::Failed(error)),
            }
        }
    }

    /// Sends text with the log-probabilities of the pending tokens that begin before byte `up_to` of the answer.
    async fn give(&self, text: String, pending: &mut Vec<Pending>, up_to: usize) -> Result<(), Stopped> {
        let logprobs = pending.drain(..).filter(|token| token.at < up_to).map(|token| token.logprobs).collect();
        self.tell(Update::Text { text, logprobs }).await
    }
}

/// A token whose text has not been given out.
struct Pending {
    logprobs: TokenLogprobs,
    /// Bytes of the answer that were certain when it came.
    at: usize,
}

/// Why an answer is followed no longer.
enum Stopped {
    /// The client is gone.
    Gone,
    Failed(Error),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Stopped {
        Stopped::Failed(error)
    }
}
