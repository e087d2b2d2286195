//! Standard output and standard error of `moec`. A reader that is gone ends a command quietly; with `println!` it would be a panic.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

/// Standard output is closed: whoever read it has enough.
#[derive(Debug, thiserror::Error)]
#[error("standard output is closed")]
pub struct Closed;

/// Prints what was asked for, and a newline, to standard output.
///
/// # Errors
/// [`Closed`], or what the system says.
pub fn print_line(text: impl Display) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Closed.into()),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to standard output")),
    }
}

/// Tells the user something on standard error. Nobody listening is no reason to stop.
pub fn say(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
