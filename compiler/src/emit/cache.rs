//! Payloads of earlier builds: a second build of the same weights copies them instead of packing again.
//!
//! Nothing is stored twice: for each payload key the cache remembers in which file it lies, as a small file in the user's cache directory. What
//! it says is checked against that file's trailer or header before it is believed. Deliberately absent: executables of `moec run`.

use super::executable::Placement;
use super::{EmitError, page_cache, payload};
use crate::plan::Plan;
use moec_abi::metadata::Metadata;
use moec_abi::{PAYLOAD_MAGIC, PayloadHeader, Plain, TRAILER_MAGIC, Trailer};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The user's cache directory for moec: `$MOEC_CACHE`, else `$XDG_CACHE_HOME/moec`, else `~/.cache/moec`.
pub fn directory() -> Option<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    named("MOEC_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|p| p.join("moec")))
        .or_else(|| named("HOME").map(|p| p.join(".cache/moec")))
}

fn entry(key: &[u8; 32]) -> Option<PathBuf> {
    let name: String = key.iter().map(|b| format!("{b:02x}")).collect();
    Some(directory()?.join("payloads").join(name))
}

/// A payload in an executable or a file of weights made earlier.
#[derive(Debug)]
pub struct Earlier {
    path: PathBuf,
    file: File,
    offset: u64,
    bytes: u64,
}

/// Finds a payload with the key of `wanted`.
pub fn find(wanted: &Placement) -> Option<Earlier> {
    let path = PathBuf::from(std::fs::read_to_string(entry(&wanted.key)?).ok()?);
    let file = File::open(&path).ok()?;
    let length = file.metadata().ok()?.len();
    let offset = offset_in_executable(&file, length, wanted).unwrap_or(0);
    if offset == 0 && length != wanted.bytes {
        return None;
    }
    let mut bytes = [0; size_of::<PayloadHeader>()];
    file.read_exact_at(&mut bytes, offset).ok()?;
    let header = PayloadHeader::from_bytes(&bytes)?;
    let fits = header.magic == PAYLOAD_MAGIC && header.key == wanted.key && header.payload_bytes == wanted.bytes;
    fits.then_some(Earlier { path, file, offset, bytes: wanted.bytes })
}

/// Where the payload lies in an executable; `None` in another file.
fn offset_in_executable(file: &File, length: u64, wanted: &Placement) -> Option<u64> {
    let mut bytes = [0; size_of::<Trailer>()];
    file.read_exact_at(&mut bytes, length.checked_sub(size_of::<Trailer>() as u64)?).ok()?;
    let trailer = Trailer::from_bytes(&bytes)?;
    let fits = trailer.magic == TRAILER_MAGIC
        && trailer.key == wanted.key
        && trailer.payload_bytes == wanted.bytes
        && trailer.file_bytes == length
        && trailer.payload_offset.checked_add(trailer.payload_bytes)? <= length;
    fits.then_some(trailer.payload_offset)
}

impl Earlier {
    /// What the payload says of itself; it is the one of `plan`, whose key it has.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn metadata(&self, plan: &Plan) -> Result<Metadata, EmitError> {
        payload::read_metadata(&self.file, self.offset, plan)
    }

    /// Copies the payload to `at` of another file, inside the kernel where the file system can. `progress` is told the bytes copied and those
    /// to copy; when it breaks, the rest is not copied.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn copy_to(
        &self,
        to: &File,
        at: u64,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<(), EmitError> {
        /// Bytes copied between two reports.
        const CHUNK: u64 = 64 << 20;
        let error = || EmitError::io("cannot copy the payload of", &self.path);
        let (mut from, mut to) = (&self.file, to);
        from.seek(SeekFrom::Start(self.offset)).map_err(error())?;
        to.seek(SeekFrom::Start(at)).map_err(error())?;
        let mut done = 0;
        while done < self.bytes && progress(done, self.bytes).is_continue() {
            let next = CHUNK.min(self.bytes - done);
            page_cache::make_large(to, at + done..at + done + next);
            let copied = std::io::copy(&mut from.take(next), &mut to).map_err(error())?;
            if copied == 0 {
                return Err(error()(ErrorKind::UnexpectedEof.into()));
            }
            done += copied;
        }
        Ok(())
    }
}

/// Remembers that the file at `output` has this payload. A cache that cannot be written is no error.
pub fn remember(payload: &Placement, output: &Path) {
    let (Some(entry), Ok(output)) = (entry(&payload.key), output.canonicalize()) else { return };
    let Some(output) = output.to_str() else { return };
    if let Some(parent) = entry.parent() {
        let written = std::fs::create_dir_all(parent).and_then(|()| {
            let file = tempfile::NamedTempFile::new_in(parent)?;
            std::fs::write(file.path(), output)?;
            file.persist(&entry).map_err(|e| e.error)
        });
        drop(written);
    }
}
