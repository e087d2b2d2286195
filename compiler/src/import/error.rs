//! What can be wrong with a model directory, in words that name the file, the key or tensor, and the remedy.
//!
//! Deliberately absent: errors of moec itself. A broken invariant of ours panics.

use std::path::{Path, PathBuf};

/// Why a model cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The path is not a model directory. The user's to mend.
    #[error("{}: {what}", path.display())]
    Path {
        /// The path as given, or the file that is not there.
        path: PathBuf,
        /// What is wrong and what to give instead.
        what: String,
    },
    /// The system refused to read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not parse. The model file's fault.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A key has a value that it cannot have. The model file's fault.
    #[error("{}: `{key}`: expected {expected}, found {found}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key; inner keys are joined by dots.
        key: String,
        /// What would do.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The model is sound, but moec does not know how to compile it. A limit of moec.
    #[error("{}: `{key}` is {found}, which moec does not support; supported: {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key; inner keys are joined by dots.
        key: String,
        /// Its value.
        found: String,
        /// The values that would do.
        supported: String,
    },
    /// The file is no safetensors file, or a damaged one.
    #[error("{}: {what}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// One tensor is not what the configuration calls for, or its entry in the header is unsound.
    #[error("{}: tensor `{tensor}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file that holds it.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// What would do.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor that the configuration calls for is in none of the files.
    #[error("{}: tensor `{tensor}` is missing: expected {expected}{}", path.display(), and_more(*others, "missing"))]
    Missing {
        /// The model directory or its only weight file.
        path: PathBuf,
        /// Its name as it would be in a file.
        tensor: String,
        /// The shape that it should have and why it is needed.
        expected: String,
        /// How many more are missing.
        others: usize,
    },
    /// A tensor that the configuration has no place for.
    #[error(
        "{}: tensor `{tensor}` is not part of {expected}{}; a model with changed code, or weights of another model",
        path.display(),
        and_more(*others, "foreign")
    )]
    Extra {
        /// The file that holds it.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// What the configuration describes.
        expected: String,
        /// How many more are there.
        others: usize,
    },
    /// The tokenizer's file is not one, or not this model's.
    #[error("{}: {what}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

fn and_more(others: usize, what: &str) -> String {
    if others == 0 { String::new() } else { format!(" (and {others} more {what})") }
}

/// A text out of a model's file, fit for one line of a message.
pub(crate) fn clip(text: &str) -> String {
    const LENGTH: usize = 120;
    let mut clipped: String = text.chars().take(LENGTH).flat_map(char::escape_debug).collect();
    if text.chars().nth(LENGTH).is_some() {
        clipped.push('…');
    }
    clipped
}

impl ImportError {
    /// The same with another name for its key, if `name` knows one.
    pub(crate) fn rename(mut self, name: impl Fn(&str) -> Option<String>) -> ImportError {
        if let ImportError::Key { key, .. } | ImportError::Unsupported { key, .. } = &mut self
            && let Some(other) = name(key)
        {
            *key = other;
        }
        self
    }

    pub(crate) fn path(path: &Path, what: impl Into<String>) -> ImportError {
        ImportError::Path { path: path.into(), what: what.into() }
    }

    pub(crate) fn read(path: &Path, source: std::io::Error) -> ImportError {
        ImportError::Read { path: path.into(), source }
    }

    pub(crate) fn header(path: &Path, what: impl Into<String>) -> ImportError {
        ImportError::Header { path: path.into(), what: what.into() }
    }

    pub(crate) fn tensor(
        path: &Path,
        tensor: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> ImportError {
        ImportError::Tensor { path: path.into(), tensor: clip(tensor), expected: expected.into(), found: found.into() }
    }

    pub(crate) fn tokenizer(path: &Path, what: impl Into<String>) -> ImportError {
        ImportError::Tokenizer { path: path.into(), what: what.into() }
    }
}
