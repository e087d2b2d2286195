//! How a command fails: the exit status, and one sentence for the user.

use super::output::{Closed, say};
use std::fmt::Display;
use std::process::ExitCode;

/// A command line that cannot be meant, found after it was parsed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

impl Usage {
    /// For this reason.
    pub fn new(reason: impl Display) -> Usage {
        Usage(reason.to_string())
    }
}

/// Tells the user; the exit status is 2 for wrong usage, 0 when nobody reads what was asked for any more, else 1.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<Closed>() {
        return ExitCode::SUCCESS;
    }
    say(format_args!("moec: {}", sentence(error)));
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}

/// The error and its causes, without those that the text before them tells already.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn causes_are_told_once() {
        let io = || std::io::Error::from_raw_os_error(libc::ENOENT);
        let told = moec::import::ImportError::Read { path: "f".into(), source: io() };
        assert_eq!(sentence(&told.into()), "cannot read f: No such file or directory (os error 2)");
        let context = Err::<(), _>(io()).context("cannot run x").unwrap_err();
        assert_eq!(sentence(&context), "cannot run x: No such file or directory (os error 2)");
    }
}
