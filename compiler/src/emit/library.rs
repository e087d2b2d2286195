//! What other programs link a model from: an object with its header and weights, alone or with the runtime.
//!
//! ```text
//! object     NAME.o       NAME.h           NAME.weights
//! staticlib  libNAME.a    NAME.h moec.h    NAME.weights  NAME.pc
//! cdylib     libNAME.so   NAME.h moec.h    NAME.weights
//! ```
//! The files get their final names when all of them are whole. Deliberately absent: packing, which the caller does into the file of the weights.

use super::executable::Placement;
use super::{EmitError, files};
use std::path::{Path, PathBuf};

/// The files of a library in the making.
#[derive(Debug)]
pub struct Unfinished {
    weights: files::Unfinished,
    others: Vec<files::Unfinished>,
    /// Where the payload goes.
    pub payload: Placement,
}

/// One file of a library.
#[derive(Debug)]
pub struct Part {
    /// Its name in the directory.
    pub name: String,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// Begins a library in `directory`, which is made if it does not exist, from its `parts` and the place for its weights.
///
/// # Errors
/// When a file cannot be written, or the disk has no room for the weights.
pub fn begin(
    directory: &Path,
    prefix: &str,
    parts: &[Part],
    payload_bytes: u64,
    key: [u8; 32],
) -> Result<Unfinished, EmitError> {
    std::fs::create_dir_all(directory).map_err(EmitError::io("cannot make the directory", directory))?;
    let others = parts.iter().map(|part| files::Unfinished::with_content(&directory.join(&part.name), &part.bytes));
    let others = others.collect::<Result<Vec<_>, _>>()?;
    let weights = files::Unfinished::create(&directory.join(format!("{prefix}.weights")))?;
    files::check_room(&weights.output, payload_bytes)?;
    Ok(Unfinished { weights, others, payload: Placement { offset: 0, bytes: payload_bytes, key } })
}

impl Unfinished {
    /// The file of the weights, to write the payload into at its beginning.
    pub fn file(&self) -> &std::fs::File {
        self.weights.file()
    }

    /// Gives all files their final names; returns the path of the weights and the size of everything.
    ///
    /// # Errors
    /// When one cannot be flushed or renamed.
    pub fn finish(self) -> Result<(PathBuf, u64), EmitError> {
        let path = self.weights.output.clone();
        let mut bytes = self.weights.finish(0o666)?;
        for other in self.others {
            bytes += other.finish(0o666)?;
        }
        Ok((path, bytes))
    }
}
