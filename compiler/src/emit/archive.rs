//! Static libraries: archives of objects with an index of their symbols.
//!
//! Deliberately absent: dates and owners. The same objects give the same archive.

use super::EmitError;
use ar_archive_writer::{ArchiveKind, DEFAULT_OBJECT_READER, NewArchiveMember, write_archive_to_stream};
use std::io::Cursor;
use target_lexicon::{BinaryFormat, Triple};

/// An archive of `objects`, each with its name, in the form that linkers for `target` read.
///
/// # Errors
/// When an object cannot be read, which is a bug in moec.
pub fn write(objects: &[(String, &[u8])], target: &Triple) -> Result<Vec<u8>, EmitError> {
    let members: Vec<NewArchiveMember> = objects
        .iter()
        .map(|(name, bytes)| NewArchiveMember::new(*bytes, &DEFAULT_OBJECT_READER, name.clone()))
        .collect();
    let kind = match target.binary_format {
        BinaryFormat::Macho => ArchiveKind::Darwin,
        BinaryFormat::Coff => ArchiveKind::Coff,
        _ => ArchiveKind::Gnu,
    };
    let mut archive = Cursor::new(Vec::new());
    write_archive_to_stream(&mut archive, &members, kind, false, None).map_err(|e| EmitError::Object(e.to_string()))?;
    Ok(archive.into_inner())
}
