//! The commands, one file each.

mod answers;
mod bench;
mod chat;
mod choices;
mod embed;
mod generate;
mod info;
mod logits;
mod score;
mod selftest;
mod tokenize;

use crate::args::{Cli, Command, Ids, RunArgs};
use crate::expert_stats::StatsFile;
use crate::failure::{Failure, Result};
use moec_abi::ModelDescriptor;
use moec_runtime::{Descriptor, Model, Options, PayloadSource, PoolOptions, Session};
use std::cell::RefCell;
use std::ffi::c_int;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What a command works on.
pub(crate) struct Context {
    /// The checked descriptor.
    pub descriptor: Descriptor,
    /// Where the weights are.
    pub payload: PayloadSource,
    /// Where the counts of experts go when the command is done.
    stats: RefCell<Option<StatsFile>>,
}

/// Runs the command; returns the exit status.
///
/// # Safety
/// `model` as for [`Descriptor::new`].
pub(crate) unsafe fn dispatch(cli: &Cli, model: *const ModelDescriptor, payload: PayloadSource) -> Result<c_int> {
    // SAFETY: the caller vouches for the descriptor.
    let descriptor = unsafe { Descriptor::new(model) }?;
    let context = Context { descriptor, payload, stats: RefCell::new(None) };
    let done = run(&context, cli);
    // What was counted before a command failed or was interrupted was counted all the same; the first failure is the one to tell.
    let written = context.stats.take().map_or(Ok(()), StatsFile::write);
    done.and_then(|status| written.map(|()| status))
}

fn run(context: &Context, cli: &Cli) -> Result<c_int> {
    let descriptor = context.descriptor;
    match &cli.command {
        Command::Generate(args) => generate::run(context, args),
        Command::Chat(args) => chat::run(context, args).map(|()| 0),
        Command::Serve(args) => {
            // The scheduler's thread does the work here; it confines itself to a core.
            crate::serve::run(descriptor, &context.options(&args.run), args).map(|()| 0)
        }
        Command::Embed(args) => embed::run(context, args).map(|()| 0),
        Command::Logits(args) => logits::run(context, args).map(|()| 0),
        Command::Score(args) => match (&args.answers, &args.choices) {
            (Some(file), _) => answers::run(context, args, file).map(|()| 0),
            (None, Some(file)) => choices::run(context, args, file).map(|()| 0),
            (None, None) => score::run(context, args).map(|()| 0),
        },
        Command::Tokenize(args) => tokenize::run(context, args).map(|()| 0),
        Command::Bench(args) => bench::run(context, args).map(|()| 0),
        Command::Info(args) => info::run(context, args).map(|()| 0),
        Command::Selftest(args) => selftest::run(context, args).map(|()| 0),
    }
}

impl Context {
    /// Opens the model for a process whose main thread does the work.
    fn open(&self, args: &RunArgs) -> Result<Arc<Model>> {
        let stats = args.expert_stats.as_deref().map(StatsFile::check).transpose()?;
        let model = Model::open(self.descriptor, &self.options(args))?;
        if let Some(stats) = stats {
            self.stats.replace(Some(stats.start(&model)?));
        }
        Ok(model)
    }

    /// How to open the model on a thread that does the work.
    fn options(&self, args: &RunArgs) -> Options {
        Options {
            payload: self.payload.clone(),
            pool: PoolOptions { threads: args.threads.map(usize::from), pin_caller: true },
            level: args.level.clone(),
            low_memory: args.low_memory,
        }
    }
}

/// A session as the arguments want it.
fn session(model: &Arc<Model>, args: &RunArgs, interrupt: &Arc<AtomicBool>) -> Session {
    let mut session = Session::new(model);
    if let Some(chunk) = args.chunk {
        session.set_chunk(chunk as usize);
    }
    session.set_interrupt(interrupt.clone());
    session
}

/// The text of an argument: `-` stands for standard input.
fn text_argument(text: &str) -> Result<String> {
    if text == "-" { standard_input() } else { Ok(text.to_owned()) }
}

fn standard_input() -> Result<String> {
    let mut text = String::new();
    let read = std::io::stdin().lock().read_to_string(&mut text);
    read.map_err(|source| Failure::Read { path: "standard input".into(), source })?;
    Ok(text)
}

/// The ids of an argument; `what` they are must have at least one.
fn id_argument(ids: &Ids, what: &str) -> Result<Vec<u32>> {
    let ids = match ids {
        Ids::List(ids) => ids.clone(),
        Ids::Stdin => Ids::parse_list(&standard_input()?)
            .map_err(|error| Failure::Refused(format!("standard input is no list of token ids like 1,2,3: {error}")))?,
    };
    not_empty(ids, what)
}

/// Refuses an empty list of ids.
fn not_empty(ids: Vec<u32>, what: &str) -> Result<Vec<u32>> {
    if ids.is_empty() {
        return Err(Failure::Refused(format!("{what} has no tokens; the model needs at least one to start from")));
    }
    Ok(ids)
}
