//! Files that appear under their final names only when they are whole.
//!
//! Each is written under a temporary name beside its final one, and renamed at the end; what is dropped before is removed.

use super::EmitError;
use crate::disk;
use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file in the making.
#[derive(Debug)]
pub struct Unfinished {
    /// Under its temporary name.
    pub file: NamedTempFile,
    /// Its final name.
    pub output: PathBuf,
}

/// The directory of a file to be written.
pub fn directory_of(output: &Path) -> &Path {
    match output.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Fails when the disk of `output` has less room than `needed` bytes.
///
/// # Errors
/// [`EmitError::NoSpace`].
pub fn check_room(output: &Path, needed: u64) -> Result<(), EmitError> {
    let directory = directory_of(output);
    let free = disk::free_bytes(directory).map_err(EmitError::io("cannot measure the disk of", directory))?;
    if free < needed {
        return Err(EmitError::NoSpace { path: output.to_path_buf(), needed, free });
    }
    Ok(())
}

impl Unfinished {
    /// An empty file that will be `output`.
    ///
    /// # Errors
    /// When the directory cannot be written to.
    pub fn create(output: &Path) -> Result<Unfinished, EmitError> {
        let directory = directory_of(output);
        if !directory.is_dir() {
            return Err(EmitError::NoDirectory(directory.into()));
        }
        let file = tempfile::Builder::new()
            .prefix(".moec-")
            .suffix(".unfinished")
            .permissions(Permissions::from_mode(0o700))
            .tempfile_in(directory)
            .map_err(EmitError::io("cannot create a file in", directory))?;
        Ok(Unfinished { file, output: output.to_path_buf() })
    }

    /// A file with these bytes that will be `output`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn with_content(output: &Path, bytes: &[u8]) -> Result<Unfinished, EmitError> {
        let mut unfinished = Unfinished::create(output)?;
        unfinished.file.write_all(bytes).map_err(EmitError::io("cannot write", output))?;
        Ok(unfinished)
    }

    /// The file.
    pub fn file(&self) -> &File {
        self.file.as_file()
    }

    /// Gives the file its final name and `mode`, less what the process's file mode mask takes away; returns its size.
    ///
    /// # Errors
    /// When it cannot be flushed or renamed.
    pub fn finish(mut self, mode: u32) -> Result<u64, EmitError> {
        let error = || EmitError::io("cannot write", &self.output);
        self.file.as_file_mut().flush().map_err(error())?;
        // SAFETY: umask only reads and sets the process's file mode mask.
        let mask = unsafe {
            let mask = libc::umask(0);
            libc::umask(mask);
            mask
        };
        self.file.as_file().set_permissions(Permissions::from_mode(mode & !mask)).map_err(error())?;
        self.file.as_file().sync_data().map_err(error())?;
        let bytes = self.file.as_file().metadata().map_err(error())?.len();
        self.file.persist(&self.output).map_err(|e| EmitError::io("cannot rename to", &self.output)(e.error))?;
        Ok(bytes)
    }
}
