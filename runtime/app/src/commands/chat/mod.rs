//! `chat`: a conversation in the terminal.
//!
//! Each turn writes the whole conversation by the model's own template and feeds what the session does not have yet: usually
//! the last message only. Answers go to standard output as they grow, everything else to standard error.

mod conversation;
mod input;

use super::Context;
use crate::args::service::Chat;
use crate::failure::{Failure, Result};
use crate::{interrupt, output};
use conversation::{Conversation, Ended};
use input::{Input, Line};
use moec_runtime::chat_template::Message;
use moec_runtime::sampler::random_seed;
use moec_runtime::{Error, Sampling};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const HELP: &str = "\
/system TEXT   what the model is told before the conversation; without TEXT shows it
/reset         begin a new conversation; the system message stays
/retry         another answer to the last question
/save FILE     keep the conversation
/load FILE     go on with a conversation that was kept
/stats         figures of the last answer
/help          this
/quit          leave; so does Ctrl-D
A line that ends with \\ goes on in the next; a line of \"\"\" begins a text of several lines, another one ends it.
A message that begins with / is written with two.";

pub(super) fn run(context: &Context, args: &Chat) -> Result<()> {
    // Said before anything else is loaded.
    let answering = Arc::new(AtomicBool::new(false));
    let stop = interrupt::listen_while(&answering, input::terminal_restorer());
    let model = context.open(&args.run)?;
    if let Err(Error::NoChatTemplate) = model.chat_template() {
        return Err(Failure::Refused(
            "this model has no chat template, so it was not made for conversations: use `generate`, which continues a text"
                .into(),
        ));
    }
    model.chat_template()?;
    let mut session = super::session(&model, &args.run, &stop);
    session.set_interrupt(stop.clone());
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.cutoffs.top_k,
        top_p: args.cutoffs.top_p,
        min_p: args.cutoffs.min_p,
        seed: args.seed.unwrap_or_else(random_seed),
        ..Sampling::default()
    };
    let conversation = Conversation::new(session, sampling, args.max_tokens, args.system.clone())?;
    let mut chat = Terminal { conversation, answering, stop };
    if let Some(path) = &args.load {
        chat.load(path)?;
    }
    let mut input = Input::new();
    if input.is_terminal() {
        eprintln!("{}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", model.metadata().name);
    }
    while let Line::Text(text) = input.read()? {
        match chat.take(&text) {
            Ok(true) => {}
            Ok(false) => break,
            // A conversation goes on after a mistake; without standard output it does not.
            Err(Failure::Closed) => return Err(Failure::Closed),
            Err(failure @ Failure::Output(_)) => return Err(failure),
            Err(failure) => eprintln!("error: {failure}"),
        }
    }
    Ok(())
}

struct Terminal {
    conversation: Conversation,
    /// Whether Ctrl-C means the answer and not the program.
    answering: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

/// A conversation in a file.
#[derive(Serialize, Deserialize)]
struct Saved {
    messages: Vec<Message>,
}

impl Terminal {
    /// Does what a line says; `false` to leave.
    fn take(&mut self, text: &str) -> Result<bool> {
        if text.trim().is_empty() {
            return Ok(true);
        }
        let Some(command) = text.strip_prefix('/').filter(|rest| !rest.starts_with('/')) else {
            let message = text.strip_prefix('/').unwrap_or(text);
            self.conversation.say(message);
            self.answer()?;
            return Ok(true);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let file = || match rest {
            "" => Err(Failure::Refused(format!("write the name of a file: /{name} FILE"))),
            path => Ok(Path::new(path)),
        };
        match name {
            "system" if rest.is_empty() => eprintln!("{}", self.conversation.system().unwrap_or("no system message")),
            "system" => self.conversation.set_system(rest)?,
            "reset" => self.conversation.reset(),
            "retry" if self.conversation.take_back_answer() => self.answer()?,
            "retry" => eprintln!("there is no answer yet"),
            "save" => self.save(file()?)?,
            "load" => self.load(file()?)?,
            "stats" => eprintln!("{}", self.conversation.stats()),
            "help" => eprintln!("{HELP}"),
            "quit" | "exit" => return Ok(false),
            _ => eprintln!("there is no command /{name}; /help lists those there are, // begins a message with /"),
        }
        Ok(true)
    }

    fn answer(&mut self) -> Result<()> {
        self.stop.store(false, Ordering::SeqCst);
        self.answering.store(true, Ordering::SeqCst);
        let ended = self.conversation.answer(output::print);
        self.answering.store(false, Ordering::SeqCst);
        match ended? {
            Ended::Whole => {}
            Ended::Stopped => eprintln!("(stopped)"),
            Ended::Limit => eprintln!("(cut off after --max-tokens)"),
            Ended::Full => eprintln!("(the context is full: /reset begins a new conversation)"),
        }
        Ok(())
    }

    fn save(&self, path: &Path) -> Result<()> {
        let saved = Saved { messages: self.conversation.messages().to_vec() };
        let text = serde_json::to_string_pretty(&saved).expect("messages are JSON");
        let written = std::fs::write(path, text + "\n");
        written.map_err(|error| Failure::Write { path: path.to_path_buf(), what: error.to_string() })?;
        eprintln!("kept {} messages in {}", saved.messages.len(), path.display());
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| Failure::Read { path: path.to_path_buf(), source })?;
        let saved: Saved = serde_json::from_str(&text).map_err(|error| {
            Failure::Refused(format!("{} is no conversation that /save has kept: {error}", path.display()))
        })?;
        eprintln!("{} messages", saved.messages.len());
        self.conversation.load(saved.messages)
    }
}
