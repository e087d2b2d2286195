//! From lowered code to files: object, C header, payload, executable, libraries.

pub mod archive;
pub mod bindings;
pub mod cache;
pub mod executable;
pub mod files;
pub mod header;
pub mod level;
pub mod library;
mod linker;
mod loader_path;
pub mod object;
pub mod pack;
mod page_cache;
pub mod payload;

use crate::disk;
use std::path::PathBuf;

/// Why nothing could be written.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// Cranelift's module refused something.
    #[error("bug in moec: the code cannot be put together: {0}")]
    Module(String),
    /// The object writer refused something.
    #[error("bug in moec: the object cannot be written: {0}")]
    Object(String),
    /// A function did not compile.
    #[error("bug in moec: function {function} does not compile: {error}")]
    Compile {
        /// Its name.
        function: String,
        /// What Cranelift said.
        error: String,
    },
    /// A number of the model does not fit its field.
    #[error("limit of moec: the model's {0} does not fit the descriptor")]
    TooLarge(&'static str),
    /// A file operation failed.
    #[error("{doing} {}: {error}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The output's directory is not there.
    #[error("{}: no such directory; make it first, or write elsewhere", .0.display())]
    NoDirectory(PathBuf),
    /// The disk is too full.
    #[error("{}: the output takes {}, but only {} are free there; free some, choose fewer bits (--quant) or another disk",
        path.display(), indicatif::HumanBytes(*needed), indicatif::HumanBytes(*free))]
    NoSpace {
        /// Where it was to be.
        path: PathBuf,
        /// Its size in bytes.
        needed: u64,
        /// Bytes that the disk has left.
        free: u64,
    },
    /// The C compiler is missing or failed.
    #[error("{0}")]
    Link(String),
}

impl EmitError {
    pub(crate) fn module(error: cranelift_module::ModuleError) -> EmitError {
        EmitError::Module(error.to_string())
    }

    fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> EmitError {
        let path = path.into();
        move |error| EmitError::Io { doing, path, error: disk::plain(error) }
    }
}
