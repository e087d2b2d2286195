//! Lines of the user: with editing and history in a terminal, plain otherwise.

use crate::failure::{Failure, Result};
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

/// What the user gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A message or a command, of one or several lines.
    Text(String),
    /// Nothing more.
    End,
}

const PROMPT: &str = "> ";
const MORE: &str = ". ";
const FENCE: &str = "\"\"\"";

/// Where lines come from.
pub struct Input {
    editor: Option<DefaultEditor>,
    history: Option<PathBuf>,
}

impl Input {
    /// The terminal, or what standard input is otherwise.
    pub fn new() -> Input {
        let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        // The prompt belongs to the conversation, not to its answers.
        let config =
            Config::builder().auto_add_history(false).behavior(rustyline::config::Behavior::PreferTerm).build();
        let mut editor = terminal.then(|| DefaultEditor::with_config(config).ok()).flatten();
        let history = editor.as_ref().and_then(|_| history_file());
        if let (Some(editor), Some(path)) = (&mut editor, &history) {
            // The first time there is none.
            editor.load_history(path).ok();
        }
        Input { editor, history }
    }

    /// Whether a person types.
    pub fn is_terminal(&self) -> bool {
        self.editor.is_some()
    }

    /// The next message or command.
    pub fn read(&mut self) -> Result<Line> {
        let read = gather(|prompt| self.line(prompt))?;
        if let (Line::Text(text), Some(editor)) = (&read, &mut self.editor) {
            editor.add_history_entry(text).ok();
            if let Some(path) = &self.history {
                // A history that cannot be kept is no reason to stop talking.
                editor.save_history(path).ok();
            }
        }
        Ok(read)
    }

    fn line(&mut self, prompt: &str) -> Result<Option<String>> {
        let Some(editor) = &mut self.editor else {
            let mut line = String::new();
            let read = std::io::stdin().lock().read_line(&mut line);
            let read = read.map_err(|source| Failure::Read { path: "standard input".into(), source })?;
            return Ok((read > 0).then(|| line.trim_end_matches(['\n', '\r']).to_owned()));
        };
        loop {
            match editor.readline(prompt) {
                Ok(line) => return Ok(Some(line)),
                Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D leaves)"),
                Err(ReadlineError::Eof) => return Ok(None),
                Err(error) => return Err(Failure::Refused(format!("cannot read from the terminal: {error}"))),
            }
        }
    }
}

/// Puts lines together: after a backslash, or between fences.
fn gather(mut line: impl FnMut(&str) -> Result<Option<String>>) -> Result<Line> {
    let Some(first) = line(PROMPT)? else { return Ok(Line::End) };
    if first.trim() == FENCE {
        let mut lines = Vec::new();
        while let Some(next) = line(MORE)?.filter(|next| next.trim() != FENCE) {
            lines.push(next);
        }
        return Ok(Line::Text(lines.join("\n")));
    }
    let mut text = first;
    while let Some(start) = text.strip_suffix('\\') {
        let start = start.to_owned();
        match line(MORE)? {
            Some(next) => text = start + "\n" + &next,
            None => return Ok(Line::Text(start)),
        }
    }
    Ok(Line::Text(text))
}

/// `$XDG_STATE_HOME/moec/chat_history`, made when needed.
fn history_file() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = variable("XDG_STATE_HOME").or_else(|| Some(variable("HOME")?.join(".local/state")))?;
    let directory = state.join("moec");
    std::fs::create_dir_all(&directory).ok()?;
    Some(directory.join("chat_history"))
}

/// Puts the terminal back as it is now: for a program that ends while a line is being edited.
pub fn terminal_restorer() -> impl Fn() + Send + 'static {
    let mut saved = std::mem::MaybeUninit::<libc::termios>::uninit();
    // SAFETY: tcgetattr writes the struct, and says whether it did.
    let known = unsafe { libc::tcgetattr(libc::STDIN_FILENO, saved.as_mut_ptr()) } == 0;
    // SAFETY: it was written.
    let saved = known.then(|| unsafe { saved.assume_init() });
    move || {
        if let Some(saved) = &saved {
            // SAFETY: the struct is one that the system gave for this file.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(lines: &[&str]) -> Vec<String> {
        let mut lines = lines.iter();
        let mut found = Vec::new();
        while let Line::Text(text) = gather(|_| Ok(lines.next().map(|line| (*line).to_owned()))).unwrap() {
            found.push(text);
        }
        found
    }

    #[test]
    fn lines_are_put_together() {
        assert_eq!(all(&["a", "b\\", "c\\", "d", "e"]), ["a", "b\nc\nd", "e"]);
        assert_eq!(all(&["\"\"\"", "a\\", "", "/b", "\"\"\"", "c"]), ["a\\\n\n/b", "c"]);
        assert_eq!(all(&["a\\"]), ["a"]);
        assert_eq!(all(&["\"\"\"", "a"]), ["a"]);
    }
}
