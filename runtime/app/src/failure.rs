//! How a command fails, and what the shell gets to see of it.

use crate::output;
use std::ffi::c_int;
use std::path::PathBuf;

/// Result of a command.
pub type Result<T> = std::result::Result<T, Failure>;

/// Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
pub const INTERRUPTED: c_int = 130;

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The runtime's own errors say it all.
    #[error(transparent)]
    Runtime(#[from] moec_runtime::Error),
    /// Standard output is closed: whoever read it has enough.
    #[error("standard output is closed")]
    Closed,
    /// Writing to standard output failed.
    #[error("cannot write to standard output: {0}")]
    Output(std::io::Error),
    /// Reading a file failed.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Writing a file failed.
    #[error("cannot write {}: {what}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// The request cannot be served; a full sentence.
    #[error("{0}")]
    Refused(String),
}

impl Failure {
    /// Tells the user, on stderr and in one line; returns the exit status.
    pub fn report(&self) -> c_int {
        match self {
            Failure::Closed => 0,
            Failure::Runtime(moec_runtime::Error::Interrupted) => INTERRUPTED,
            Failure::Runtime(_)
            | Failure::Output(_)
            | Failure::Read { .. }
            | Failure::Write { .. }
            | Failure::Refused(_) => {
                output::say(format_args!("error: {self}"));
                1
            }
        }
    }
}

impl From<std::io::Error> for Failure {
    /// Errors of standard output; files have their own.
    fn from(error: std::io::Error) -> Failure {
        if error.kind() == std::io::ErrorKind::BrokenPipe { Failure::Closed } else { Failure::Output(error) }
    }
}
