//! Standard output: flushed where a person waits for it, and quiet when nobody reads any more. Standard error: what nobody asked for.

use crate::failure::Result;
use std::io::{self, Write};

/// Writes to a closed pipe become errors (and a quiet end) rather than a signal that kills the process.
pub fn ignore_broken_pipes() {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Prints `text` and flushes.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Prints `text` and a newline.
pub fn print_line(text: &str) -> Result<()> {
    print(&format!("{text}\n"))
}

/// Tells the user something on standard error. Nobody listening is no reason to fail.
pub fn say(text: impl std::fmt::Display) {
    writeln!(io::stderr(), "{text}").ok();
}
