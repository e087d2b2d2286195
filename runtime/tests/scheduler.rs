//! The scheduler over a model written by hand, whose right answers are known: whatever it does with batches, chunks, pages,
//! the prefix cache and preemption, every request gets the answer that it would get alone.
#![allow(missing_docs)]

mod fake;

use fake::{Shape, expected_hidden, expected_logits};
use moec_runtime::logprobs::TokenLogprobs;
use moec_runtime::sampler::Past;
use moec_runtime::scheduler::{
    Constraint, Done, Event, Finish, Generate, Limits, Pooling, Refusal, Request, Scheduler, Sink, StepReport, Work,
};
use moec_runtime::{Descriptor, Error, Options, PayloadSource, PoolOptions, Sampler, Sampling};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

struct Served {
    scheduler: Scheduler,
    reports: Arc<Mutex<Vec<StepReport>>>,
    _payload: tempfile::TempDir,
}

fn shape() -> Shape {
    Shape { max_tokens: 40, eos: vec![2], ..Shape::default() }
}

fn serve(shape: &Shape, limits: &Limits, threads: usize) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let payload = PayloadSource::File(fake::write_payload(shape, dir.path()));
    let pool = PoolOptions { threads: Some(threads), ..PoolOptions::default() };
    // SAFETY: the descriptor is as a generated one.
    let descriptor = unsafe { Descriptor::new(fake::descriptor(shape)) }.unwrap();
    let reports = Arc::new(Mutex::new(Vec::new()));
    let kept = reports.clone();
    let observer = Box::new(move |report: &StepReport| kept.lock().unwrap().push(report.clone()));
    let options = Options { payload, pool, ..Options::default() };
    Served { scheduler: Scheduler::start(descriptor, &options, limits, observer).unwrap(), reports, _payload: dir }
}

struct Line {
    events: mpsc::Sender<Event>,
    hung_up: Arc<AtomicBool>,
    /// How many events were sent.
    sent: usize,
    /// The scheduler waits here when the answer is on its way, at the fourth event, so that what a test does meanwhile comes before the next step.
    gate: Option<mpsc::Receiver<()>>,
}

impl Sink for Line {
    fn send(&mut self, event: Event) {
        self.sent += 1;
        if self.sent == 4
            && let Some(gate) = self.gate.take()
        {
            gate.recv_timeout(PATIENCE).ok();
        }
        self.events.send(event).ok();
    }
    fn is_closed(&self) -> bool {
        self.hung_up.load(Ordering::Relaxed)
    }
}

struct Call {
    events: mpsc::Receiver<Event>,
    hung_up: Arc<AtomicBool>,
}

#[derive(Debug, Default, PartialEq)]
struct Answer {
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    prompt: Vec<TokenLogprobs>,
    read: Vec<usize>,
    embedding: Vec<f32>,
    done: Option<Done>,
    failed: Option<String>,
}

impl Call {
    fn answer(self) -> Answer {
        let mut answer = Answer::default();
        loop {
            match self.events.recv_timeout(PATIENCE).expect("a request gets an end") {
                Event::Prompt(more) => answer.prompt.extend(more),
                Event::Read { cached } => answer.read.push(cached),
                Event::Token { id, logprobs } => {
                    answer.ids.push(id);
                    answer.logprobs.extend(logprobs);
                }
                Event::Embedding(vector) => answer.embedding = vector,
                Event::Done(done) => answer.done = Some(done),
                Event::Failed(error) => answer.failed = Some(error.to_string()),
            }
            if answer.done.is_some() || answer.failed.is_some() {
                assert!(self.events.try_recv().is_err(), "nothing comes after the end");
                return answer;
            }
        }
    }
}

impl Served {
    fn submit(&self, request: Request, gate: Option<mpsc::Receiver<()>>) -> Result<Call, Refusal> {
        let (sender, events) = mpsc::channel();
        let hung_up = Arc::new(AtomicBool::new(false));
        let line = Line { events: sender, hung_up: hung_up.clone(), sent: 0, gate };
        self.scheduler.submit(request, Box::new(line))?;
        Ok(Call { events, hung_up })
    }

    fn try_call(&self, request: Request) -> Result<Call, Refusal> {
        self.submit(request, None)
    }

    /// A call in the middle of whose answer the scheduler waits until the sender is used or dropped.
    fn held_call(&self, request: Request) -> (Call, mpsc::Sender<()>) {
        let (open, gate) = mpsc::channel();
        (self.submit(request, Some(gate)).unwrap(), open)
    }

    fn call(&self, request: Request) -> Call {
        self.try_call(request).unwrap()
    }

    fn most(&self, of: impl Fn(&StepReport) -> usize) -> usize {
        self.reports.lock().unwrap().iter().map(of).max().unwrap_or(0)
    }

    fn sum(&self, of: impl Fn(&StepReport) -> usize) -> usize {
        self.reports.lock().unwrap().iter().map(of).sum()
    }

    fn idle(&self) -> StepReport {
        let started = Instant::now();
        loop {
            if let Some(report) = self.reports.lock().unwrap().last()
                && report.running + report.waiting == 0
                && self.scheduler.open_requests() == 0
            {
                return report.clone();
            }
            assert!(started.elapsed() < PATIENCE, "the scheduler does not come to rest");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn generate(prompt: &[u32], max_tokens: usize, sampling: &Sampling) -> Request {
    let generate = Generate {
        max_tokens: Some(max_tokens),
        sampling: sampling.clone(),
        ends: vec![2],
        logprobs: Some(2),
        prompt_logprobs: None,
        constraint: None,
    };
    Request { prompt: prompt.to_vec(), work: Work::Generate(generate) }
}

/// The answer that a request must get: ids, log-probabilities, and why it ends.
fn expected(shape: &Shape, prompt: &[u32], max_tokens: usize, sampling: &Sampling) -> (Vec<TokenLogprobs>, Finish) {
    let mut sampler = Sampler::new(sampling.clone());
    let mut tokens = prompt.to_vec();
    let mut found = Vec::new();
    while found.len() < max_tokens {
        let logits = expected_logits(shape, &tokens);
        let id = sampler.sample_after(&logits, Past { tokens: &tokens, prompt: prompt.len(), allowed: None });
        if id == 2 {
            return (found, Finish::End);
        }
        found.push(TokenLogprobs::new(&logits, id, 2));
        tokens.push(id);
    }
    (found, Finish::Length)
}

fn check(shape: &Shape, answer: &Answer, prompt: &[u32], max_tokens: usize, sampling: &Sampling) {
    let (tokens, finish) = expected(shape, prompt, max_tokens, sampling);
    assert_eq!(answer.failed, None);
    assert_eq!(answer.ids, tokens.iter().map(|token| token.id).collect::<Vec<_>>());
    assert_eq!(answer.logprobs, tokens);
    let done = answer.done.unwrap();
    assert_eq!(answer.read, [done.cached]);
    assert_eq!((done.finish, done.generated), (finish, tokens.len() + usize::from(finish == Finish::End)));
}

/// Prompts of all lengths around pages and chunks, many with a common beginning, with settings of all kinds.
fn mixed(count: usize) -> Vec<(Vec<u32>, usize, Sampling)> {
    (0..count)
        .map(|i| {
            let length = [1, 3, 63, 64, 65, 130, 200, 39, 40, 41, 100, 128, 150, 20, 90, 257][i % 16];
            let common = if i % 3 == 0 { 0 } else { 120 };
            let prompt =
                (0..length).map(|k| ((k * 7 + if k < common { 5 } else { i * 31 }) % 380 + 3) as u32).collect();
            let sampling = match i % 4 {
                0 => Sampling::default(),
                1 => Sampling { temperature: 1.0, top_k: 0, seed: i as u64, ..Sampling::default() },
                2 => Sampling { temperature: 0.7, frequency_penalty: 0.5, repeat_penalty: 1.2, ..Sampling::default() },
                _ => Sampling { presence_penalty: 1.0, logit_bias: vec![(7, 2.0)], ..Sampling::default() },
            };
            (prompt, 10 + i * 13 % 70, sampling)
        })
        .collect()
}

#[test]
fn answers_do_not_depend_on_company_cache_or_preemption() {
    for window in [0, 70] {
        let shape = Shape { window, ..shape() };
        let requests = mixed(48);
        // A context needs 16 pages; 18 are too few for sixteen requests at once.
        let tight = Limits { pages: Some(if window == 0 { 18 } else { 6 }), ..Limits::default() };
        let odd = Limits { chunk: Some(17), chunk_beside: 5, parallel: 7, prefix_cache: false, ..Limits::default() };
        for (limits, threads) in [(Limits::default(), 1), (tight.clone(), 2), (odd, 3)] {
            let served = serve(&shape, &limits, threads);
            // Alone and cold, then all at once, then all at once over a warm cache.
            for (prompt, max_tokens, sampling) in &requests[..6] {
                let answer = served.call(generate(prompt, *max_tokens, sampling)).answer();
                check(&shape, &answer, prompt, *max_tokens, sampling);
            }
            for round in 0..2 {
                let calls: Vec<Call> = requests
                    .iter()
                    .map(|(prompt, max, sampling)| served.call(generate(prompt, *max, sampling)))
                    .collect();
                let answers: Vec<Answer> = calls.into_iter().map(Call::answer).collect();
                for ((prompt, max_tokens, sampling), answer) in requests.iter().zip(&answers) {
                    check(&shape, answer, prompt, *max_tokens, sampling);
                }
                let cached = answers.iter().filter(|answer| answer.done.unwrap().cached > 0).count();
                assert_eq!(cached > 10, limits.prefix_cache, "{cached} requests of round {round} found a prefix");
            }
            let idle = served.idle();
            assert!(served.most(|report| report.requests) >= limits.parallel.min(4));
            assert!(served.most(|report| report.tokens) <= limits.chunk.unwrap_or(40));
            if limits == tight {
                assert!(served.sum(|report| report.preempted) > 0, "window {window}: nothing was preempted");
                assert!(served.most(|report| report.pages_in_use) <= limits.pages.unwrap());
            }
            // All that is held is the cache.
            assert_eq!(idle.pages_in_use, idle.pages_cached);
            assert_eq!(idle.pages_cached > 0, limits.prefix_cache);
        }
    }
}

#[test]
fn prompts_are_read_beside_running_answers() {
    let shape = shape();
    let served = serve(&shape, &Limits { chunk_beside: 8, ..Limits::default() }, 1);
    let sampling = Sampling::default();
    let (first, open) = served.held_call(generate(&[5, 6, 7], 600, &sampling));
    for _ in 0..3 {
        assert!(matches!(first.events.recv_timeout(PATIENCE).unwrap(), Event::Read { .. } | Event::Token { .. }));
    }
    let long: Vec<u32> = (0..300).map(|i| i % 300 + 3).collect();
    let second = served.call(generate(&long, 5, &sampling));
    drop(open);
    let second = second.answer();
    check(&shape, &second, &long, 5, &sampling);
    let mixed = served.reports.lock().unwrap().iter().filter(|r| r.requests == 2 && r.prompt_tokens == 8).count();
    assert!(mixed >= 300 / 8 - 1, "{mixed} steps read the prompt in pieces of 8 beside the answer");
}

#[test]
fn who_hangs_up_makes_room() {
    let shape = shape();
    let served = serve(&shape, &Limits { parallel: 1, queue: 2, ..Limits::default() }, 1);
    let sampling = Sampling { logit_bias: vec![(2, -1e9)], ..Sampling::default() };
    let first = served.call(generate(&[5, 6, 7], 900, &sampling));
    assert!(matches!(first.events.recv_timeout(PATIENCE).unwrap(), Event::Read { .. } | Event::Token { .. }));
    let second = served.call(generate(&[8], 900, &sampling));
    let third = served.call(generate(&[9], 4, &sampling));
    let refused = served.try_call(generate(&[9], 4, &sampling));
    assert!(matches!(refused, Err(Refusal::QueueFull { waiting: 3 })), "the queue is full");
    // One while it waits, the other while it runs.
    second.hung_up.store(true, Ordering::Relaxed);
    first.hung_up.store(true, Ordering::Relaxed);
    check(&shape, &third.answer(), &[9], 4, &sampling);
    served.idle();
    assert!(served.sum(|report| report.generated) < 900, "the first answer was given up");
    served.call(generate(&[5], 3, &sampling)).answer();
}

#[test]
fn closing_finishes_and_aborting_fails() {
    let shape = shape();
    let sampling = Sampling::default();
    let served = serve(&shape, &Limits { parallel: 2, ..Limits::default() }, 1);
    let calls: Vec<Call> = (0..6).map(|i| served.call(generate(&[5 + i, 6], 30, &sampling))).collect();
    assert!(served.scheduler.is_running());
    served.scheduler.close();
    assert!(!served.scheduler.is_running());
    assert!(matches!(served.try_call(generate(&[5], 3, &sampling)), Err(Refusal::Closed)));
    for (i, call) in calls.into_iter().enumerate() {
        check(&shape, &call.answer(), &[5 + i as u32, 6], 30, &sampling);
    }
    served.scheduler.join();

    let served = serve(&shape, &Limits { parallel: 1, ..Limits::default() }, 1);
    let (first, open) = served.held_call(generate(&[5, 6], 900, &sampling));
    let mut calls: Vec<Call> = (0..2).map(|_| served.call(generate(&[5, 6], 900, &sampling))).collect();
    calls.push(first);
    served.scheduler.abort();
    drop(open);
    served.scheduler.join();
    let failed = |answer: Answer| answer.failed.is_some_and(|what| what == Error::Interrupted.to_string());
    assert!(calls.into_iter().all(|call| failed(call.answer())));
}

#[test]
fn wrong_requests_are_refused() {
    let served = serve(&Shape { context: 100, ..shape() }, &Limits::default(), 1);
    let sampling = Sampling::default();
    let error = |request: Request| match served.try_call(request) {
        Err(Refusal::Invalid(error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was taken"),
    };
    assert!(matches!(error(generate(&[1, 384], 5, &sampling)), Error::Token { id: 384, vocab: 384 }));
    assert!(matches!(error(generate(&[], 5, &sampling)), Error::StepSize { tokens: 0, .. }));
    assert!(matches!(error(generate(&[1; 98], 3, &sampling)), Error::ContextFull { tokens: 101, context: 100 }));
    assert!(matches!(error(generate(&[1; 2], usize::MAX, &sampling)), Error::ContextFull { .. }));
    assert_eq!(served.call(generate(&[3; 98], 2, &sampling)).answer().ids.len(), 2);
    // Fewer pages than the context needs: texts are shorter.
    let small = serve(&shape(), &Limits { pages: Some(2), ..Limits::default() }, 1);
    assert_eq!(small.scheduler.context(), 128);
    assert!(matches!(small.try_call(generate(&[1; 128], 1, &sampling)), Err(Refusal::Invalid(_))));
    let none = Limits { pages: Some(0), ..Limits::default() };
    let dir = tempfile::tempdir().unwrap();
    let options =
        Options { payload: PayloadSource::File(fake::write_payload(&shape(), dir.path())), ..Options::default() };
    // SAFETY: the descriptor is as a generated one.
    let descriptor = unsafe { Descriptor::new(fake::descriptor(&shape())) }.unwrap();
    assert!(matches!(Scheduler::start(descriptor, &options, &none, Box::new(|_| ())), Err(Error::Memory { .. })));
}

#[test]
fn embeddings_and_prompt_probabilities_are_those_of_the_model() {
    let shape = shape();
    let prompts: Vec<Vec<u32>> =
        (0..12).map(|i| (0..i * 17 + 2).map(|k| (k * 5 + i / 2) % 300 + 3).collect()).collect();
    // Ten pages are too few for all: some are preempted in the middle of their prompts.
    let tight = Limits { pages: Some(10), chunk: Some(33), ..Limits::default() };
    for limits in [Limits::default(), tight] {
        let served = serve(&shape, &limits, 2);
        for _ in 0..2 {
            let embed = |prompt: &Vec<u32>, pooling| {
                served.call(Request { prompt: prompt.clone(), work: Work::Embed(pooling) })
            };
            let last: Vec<Call> = prompts.iter().map(|prompt| embed(prompt, Pooling::Last)).collect();
            let mean: Vec<Call> = prompts.iter().map(|prompt| embed(prompt, Pooling::Mean)).collect();
            let scored: Vec<Call> = prompts
                .iter()
                .map(|prompt| {
                    let mut request = generate(prompt, 0, &Sampling::default());
                    let Work::Generate(generate) = &mut request.work else { panic!() };
                    generate.prompt_logprobs = Some(3);
                    served.call(request)
                })
                .collect();
            for (((prompt, last), mean), scored) in prompts.iter().zip(last).zip(mean).zip(scored) {
                let states: Vec<Vec<f32>> = (1..=prompt.len()).map(|n| expected_hidden(&shape, &prompt[..n])).collect();
                assert_eq!(last.answer().embedding, states[prompt.len() - 1]);
                let sum = states.iter().fold(vec![0f32; states[0].len()], |sum, state| {
                    sum.iter().zip(state).map(|(a, b)| a + b).collect()
                });
                let scale = 1.0 / prompt.len() as f32;
                assert_eq!(mean.answer().embedding, sum.iter().map(|s| s * scale).collect::<Vec<_>>());
                let scored = scored.answer();
                let wanted: Vec<TokenLogprobs> = (1..prompt.len())
                    .map(|n| TokenLogprobs::new(&expected_logits(&shape, &prompt[..n]), prompt[n], 3))
                    .collect();
                assert_eq!(scored.prompt, wanted);
                assert_eq!((scored.ids.len(), scored.done.unwrap().finish), (0, Finish::Length));
            }
        }
    }
}

/// Allows one token after the other, and then nothing.
struct Recite(Vec<u32>);

impl Constraint for Recite {
    fn allowed(&mut self) -> Result<Option<Vec<u32>>, String> {
        let Some(next) = self.0.first() else { return Ok(None) };
        if *next == 99 {
            return Err("the text is lost".into());
        }
        let mut words = vec![0; 12];
        words[*next as usize / 32] |= 1 << (next % 32);
        Ok(Some(words))
    }
    fn accept(&mut self, id: u32) -> Result<(), String> {
        assert_eq!(self.0.remove(0), id);
        Ok(())
    }
}

#[test]
fn constraints_are_obeyed() {
    let served = serve(&shape(), &Limits::default(), 2);
    let recite = |ids: &[u32], max_tokens| {
        let mut request = generate(&[5, 6], max_tokens, &Sampling { temperature: 1.0, ..Sampling::default() });
        let Work::Generate(generate) = &mut request.work else { panic!() };
        generate.constraint = Some(Box::new(Recite(ids.to_vec())));
        served.call(request).answer()
    };
    let finish = |answer: &Answer| answer.done.unwrap().finish;
    let whole = recite(&[300, 17, 8], 10);
    assert_eq!((whole.ids.as_slice(), finish(&whole)), (&[300, 17, 8][..], Finish::End));
    // Complete with the last token that was wanted, and cut off before.
    let exact = recite(&[300, 17, 8], 3);
    assert_eq!((exact.ids.as_slice(), finish(&exact)), (&[300, 17, 8][..], Finish::End));
    let cut = recite(&[300, 17, 8], 2);
    assert_eq!((cut.ids.as_slice(), finish(&cut)), (&[300, 17][..], Finish::Length));
    let ended = recite(&[300, 2, 8], 10);
    assert_eq!((ended.ids.as_slice(), finish(&ended)), (&[300][..], Finish::End));
    assert!(recite(&[300, 99], 10).failed.unwrap().contains("the text is lost"));
}
