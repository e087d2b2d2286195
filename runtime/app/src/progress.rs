//! How far a long command is: one line on standard error that is written over and over, where a person reads it.
//!
//! Deliberately absent: bars and times left, which need to know more of a terminal than its presence.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// What is done at once says nothing.
const SILENCE: Duration = Duration::from_millis(500);
/// Between two lines.
const PAUSE: Duration = Duration::from_millis(100);

/// A line of progress; it is wiped away when dropped.
pub struct Progress {
    what: &'static str,
    all: usize,
    next: Instant,
    terminal: bool,
    shown: bool,
}

impl Progress {
    /// Of `all` things called `what`.
    pub fn new(what: &'static str, all: usize) -> Progress {
        Progress { what, all, next: Instant::now() + SILENCE, terminal: io::stderr().is_terminal(), shown: false }
    }

    /// So many are done.
    pub fn at(&mut self, done: usize) {
        let now = Instant::now();
        if self.terminal && now >= self.next {
            self.next = now + PAUSE;
            self.shown = true;
            write!(io::stderr(), "\r{done} of {} {}\x1b[K", self.all, self.what).ok();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            write!(io::stderr(), "\r\x1b[K").ok();
        }
    }
}
