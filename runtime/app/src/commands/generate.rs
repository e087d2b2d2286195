//! `generate`: continues a text, printing it as it grows.

use super::{Context, id_argument, not_empty, session, text_argument};
use crate::args::Generate;
use crate::failure::{INTERRUPTED, Result};
use crate::{interrupt, output};
use moec_runtime::sampler::random_seed;
use moec_runtime::{Error, Logits, Sampler, Sampling, Session, StopMatcher, TextStream, Tokenizer};
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub(super) fn run(context: &Context, args: &Generate) -> Result<c_int> {
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let prompt = match (&args.tokens, &args.prompt) {
        (Some(ids), _) => id_argument(ids, "the prompt")?,
        (None, prompt) => {
            let text = text_argument(prompt.as_deref().unwrap_or_default())?;
            not_empty(model.tokenizer()?.encode(&text, true)?, "the prompt")?
        }
    };
    let mut session = session(&model, &args.run, &interrupt);
    // What is known to be needed is checked before anything is computed; without a limit pages are taken as needed.
    session.check_room(prompt.len())?;
    let room = session.room() - prompt.len();
    session.check_room(prompt.len() + args.max_tokens.unwrap_or(0).min(room))?;

    let seed = args.seed.unwrap_or_else(random_seed);
    let sampler = Sampler::new(Sampling {
        temperature: args.temperature,
        top_k: args.cutoffs.top_k,
        top_p: args.cutoffs.top_p,
        min_p: args.cutoffs.min_p,
        repeat_penalty: args.repeat_penalty,
        repeat_last: args.repeat_last,
        seed,
        ..Sampling::default()
    });
    // Ids without stop strings need no text at all.
    let needs_text = !args.print_tokens || !args.stop.is_empty();
    let tokenizer = if needs_text { Some(model.tokenizer()?) } else { None };
    let mut printer = Printer::new(tokenizer, &args.stop, !args.print_tokens);

    let mut generation = Generation {
        session: &mut session,
        sampler,
        limit: args.max_tokens.unwrap_or(usize::MAX).min(room),
        ids: Vec::new(),
    };
    let started = Instant::now();
    let mut first = Duration::ZERO;
    let end = match generation.session.feed(&prompt, Logits::Last) {
        Ok(()) => {
            first = started.elapsed();
            generation.run(&mut printer, &interrupt)?
        }
        Err(Error::Interrupted) => End::Interrupted,
        Err(error) => return Err(error.into()),
    };
    let ids = generation.ids;
    printer.finish(end != End::StopString)?;
    if args.print_tokens {
        output::print_line(&serde_json::json!(ids).to_string())?;
    }
    if end == End::Limit && args.max_tokens.is_none_or(|max| ids.len() < max) {
        output::say(format_args!("note: the context of {} tokens is full", context.descriptor.context));
    }
    if args.stats {
        print_stats(prompt.len(), ids.len(), first, started.elapsed() - first, seed, end);
    }
    Ok(if end == End::Interrupted { INTERRUPTED } else { 0 })
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// The model ended it.
    Token,
    /// A stop string.
    StopString,
    /// As many tokens as were wanted, or as fit.
    Limit,
    /// Ctrl-C.
    Interrupted,
}

/// A generation after its prompt.
struct Generation<'a> {
    session: &'a mut Session,
    sampler: Sampler,
    limit: usize,
    ids: Vec<u32>,
}

impl Generation<'_> {
    fn run(&mut self, printer: &mut Printer<'_>, interrupt: &AtomicBool) -> Result<End> {
        loop {
            if self.ids.len() == self.limit {
                return Ok(End::Limit);
            }
            if interrupt.load(Ordering::Relaxed) {
                return Ok(End::Interrupted);
            }
            let id = self.sampler.sample(self.session.last_logits(), self.session.tokens());
            self.ids.push(id);
            if self.session.model().is_end(id) {
                return Ok(End::Token);
            }
            if printer.push(id)? {
                return Ok(End::StopString);
            }
            // The last token's successors are not wanted.
            if self.ids.len() < self.limit {
                match self.session.feed(&[id], Logits::Last) {
                    Ok(()) => {}
                    Err(Error::Interrupted) => return Ok(End::Interrupted),
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
}

/// Turns ids into text on standard output.
struct Printer<'a> {
    stream: Option<TextStream<'a>>,
    stops: StopMatcher,
    visible: bool,
    ends_with_newline: bool,
}

impl<'a> Printer<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>, stops: &[String], visible: bool) -> Printer<'a> {
        let stream = tokenizer.map(Tokenizer::stream);
        Printer { stream, stops: StopMatcher::new(stops), visible, ends_with_newline: false }
    }

    /// Adds a token; `true` when a stop string was found.
    fn push(&mut self, id: u32) -> Result<bool> {
        let Some(stream) = &mut self.stream else { return Ok(false) };
        let matched = self.stops.push(&stream.push(id)?);
        self.print(&matched.text)?;
        Ok(matched.stopped)
    }

    /// Prints what was held back, when it is `wanted`, and ends the line.
    fn finish(mut self, wanted: bool) -> Result<()> {
        if let Some(stream) = self.stream.take().filter(|_| wanted) {
            let matched = self.stops.push(&stream.finish()?);
            self.print(&matched.text)?;
            if !matched.stopped {
                let held = std::mem::replace(&mut self.stops, StopMatcher::new(&[])).finish();
                self.print(&held)?;
            }
        }
        if self.visible && !self.ends_with_newline {
            output::print("\n")?;
        }
        Ok(())
    }

    fn print(&mut self, text: &str) -> Result<()> {
        if self.visible && !text.is_empty() {
            output::print(text)?;
            self.ends_with_newline = text.ends_with('\n');
        }
        Ok(())
    }
}

fn print_stats(prompt: usize, new: usize, first: Duration, rest: Duration, seed: u64, end: End) {
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let end = match end {
        End::Token => "the model ended the text",
        End::StopString => "a stop string",
        End::Limit => "the limit of tokens",
        End::Interrupted => "interrupted",
    };
    output::say(format_args!(
        "prompt:    {prompt} tokens in {:.3} s, {:.1} tokens/s",
        first.as_secs_f64(),
        rate(prompt, first)
    ));
    // The first new token came out of the prompt's step.
    let steps = new.saturating_sub(1);
    output::say(format_args!(
        "generated: {new} tokens in {:.3} s, {:.1} tokens/s",
        rest.as_secs_f64(),
        rate(steps, rest)
    ));
    output::say(format_args!("ended by:  {end}; seed {seed}"));
}
