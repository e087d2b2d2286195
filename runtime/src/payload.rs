//! The payload: where the weights lie, mapped as they are, and all that is checked before generated code may read them.
//!
//! Either the last part of the running executable, found through the [`Trailer`] at its end, or a file of its own, or wherever the
//! program around the model has put it.
//! Opening touches only the first and last bytes: the weights come from the file when they are first used.
//!
//! Deliberately absent: a checksum over the weights. Reading all of a large model before the first token would cost
//! more than it tells; the key, the sizes and the header are checked, and `selftest` computes with all of it.

use crate::error::{Error, Result, hex};
use memmap2::{Mmap, MmapOptions};
use moec_abi::metadata::{Golden, Metadata};
use moec_abi::{ABI_VERSION, PAYLOAD_ALIGN, PAYLOAD_MAGIC, PayloadHeader, Plain, TRAILER_MAGIC, Trailer};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where to find a payload.
#[derive(Clone, Debug)]
pub enum PayloadSource {
    /// At the end of the running executable.
    Executable,
    /// At the end of this executable.
    ExecutableAt(PathBuf),
    /// A file that is nothing but the payload.
    File(PathBuf),
    /// In a file that is open, from this offset on, a multiple of [`PAYLOAD_ALIGN`].
    Opened(Arc<File>, u64),
    /// In memory, aligned to [`PAYLOAD_ALIGN`].
    Memory(&'static [u8]),
}

/// The bytes of a payload.
enum Bytes {
    Mapped(Mmap),
    Given(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Given(bytes) => bytes,
        }
    }
}

/// What the generated code expects of its payload.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expected {
    /// [`moec_abi::ModelDescriptor::payload_key`].
    pub key: [u8; 32],
    /// [`moec_abi::ModelDescriptor::payload_bytes`].
    pub bytes: u64,
}

/// A mapped payload.
pub struct Payload {
    map: Bytes,
    path: PathBuf,
    header: PayloadHeader,
    golden: Vec<u8>,
}

impl Payload {
    /// Finds, checks and maps the payload.
    pub fn open(source: &PayloadSource, expected: Expected) -> Result<Payload> {
        match source {
            PayloadSource::Executable => {
                // The link leads to the file that runs, even when it has been renamed or replaced; the name is for
                // messages.
                let name = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("this executable"));
                let link = Path::new("/proc/self/exe");
                Payload::from_executable(if link.exists() { link } else { &name }, name.clone(), expected)
            }
            PayloadSource::ExecutableAt(path) => Payload::from_executable(path, path.clone(), expected),
            PayloadSource::File(path) => Payload::from_file(path, expected),
            PayloadSource::Opened(file, offset) => Payload::from_opened(file, *offset, expected),
            PayloadSource::Memory(bytes) => Payload::from_memory(bytes, expected),
        }
    }

    fn from_executable(open: &Path, path: PathBuf, expected: Expected) -> Result<Payload> {
        let unreadable = |source| Error::PayloadFile { path: path.clone(), source };
        let mut file = File::open(open).map_err(unreadable)?;
        let file_bytes = file.metadata().map_err(unreadable)?.len();
        let lost = |what: String| Error::PayloadLost { path: path.clone(), what };

        let trailer = read_trailer(&mut file, file_bytes).map_err(unreadable)?;
        let trailer = trailer.map_err(|found| lost(found.describe(file_bytes, expected.bytes)))?;
        if trailer.file_bytes != file_bytes {
            return Err(lost(format!("the file has {file_bytes} bytes, it was written with {}", trailer.file_bytes)));
        }
        if trailer.key != expected.key {
            return Err(foreign(path, &expected.key, &trailer.key));
        }
        let damaged = |what: String| Error::PayloadDamaged { path: path.clone(), what };
        if trailer.payload_bytes != expected.bytes {
            return Err(damaged(format!(
                "they have {} bytes, the code expects {}",
                trailer.payload_bytes, expected.bytes
            )));
        }
        let payload = within(trailer.payload_offset, trailer.payload_bytes, file_bytes);
        let golden = within(trailer.golden_offset, trailer.golden_bytes, file_bytes);
        let (Some(payload), Some(golden)) = (payload, golden) else {
            return Err(damaged("the trailer points outside the file".into()));
        };
        if payload.start % PAYLOAD_ALIGN as u64 != 0 {
            return Err(damaged(format!("they begin at byte {}, which is not page-aligned", payload.start)));
        }
        let mut golden_bytes = vec![0; (golden.end - golden.start) as usize];
        file.seek(SeekFrom::Start(golden.start)).map_err(unreadable)?;
        file.read_exact(&mut golden_bytes).map_err(unreadable)?;
        Payload::map(&file, path, payload.start, expected, golden_bytes)
    }

    fn from_file(path: &Path, expected: Expected) -> Result<Payload> {
        let unreadable = |source| Error::PayloadFile { path: path.to_owned(), source };
        let file = File::open(path).map_err(unreadable)?;
        let file_bytes = file.metadata().map_err(unreadable)?.len();
        // The key is looked at first: a foreign file usually has another size too, but that is not what is wrong.
        let mut first = Vec::new();
        (&file).take(size_of::<PayloadHeader>() as u64).read_to_end(&mut first).map_err(unreadable)?;
        check_header(path, &first, expected)?;
        if file_bytes != expected.bytes {
            return Err(Error::PayloadDamaged {
                path: path.to_owned(),
                what: format!("the file has {file_bytes} bytes, {} were expected", expected.bytes),
            });
        }
        Payload::map(&file, path.to_owned(), 0, expected, Vec::new())
    }

    fn from_opened(file: &File, offset: u64, expected: Expected) -> Result<Payload> {
        let path = PathBuf::from("the open file");
        let file_bytes = file.metadata().map_err(|source| Error::PayloadFile { path: path.clone(), source })?.len();
        let damaged = |what: String| Err(Error::PayloadDamaged { path: path.clone(), what });
        if !offset.is_multiple_of(PAYLOAD_ALIGN as u64) {
            return damaged(format!("they begin at byte {offset}, which is not a multiple of {PAYLOAD_ALIGN}"));
        }
        if within(offset, expected.bytes, file_bytes).is_none() {
            let expected = expected.bytes;
            return damaged(format!("the file has {file_bytes} bytes, {expected} were expected from byte {offset} on"));
        }
        Payload::map(file, path, offset, expected, Vec::new())
    }

    fn from_memory(bytes: &'static [u8], expected: Expected) -> Result<Payload> {
        let path = PathBuf::from("memory");
        let damaged = |what: String| Err(Error::PayloadDamaged { path: path.clone(), what });
        if !bytes.as_ptr().addr().is_multiple_of(PAYLOAD_ALIGN) {
            return damaged(format!("they are not aligned to {PAYLOAD_ALIGN} bytes"));
        }
        if bytes.len() as u64 != expected.bytes {
            return damaged(format!("there are {} bytes, {} were expected", bytes.len(), expected.bytes));
        }
        Payload::checked(Bytes::Given(bytes), path, expected, Vec::new())
    }

    fn map(file: &File, path: PathBuf, offset: u64, expected: Expected, golden: Vec<u8>) -> Result<Payload> {
        // SAFETY: the mapping is private and read-only. Whoever changes the file under a running model breaks it, as
        // with every mapped executable; Linux refuses writes to one that runs.
        let map = unsafe { MmapOptions::new().offset(offset).len(expected.bytes as usize).map(file) };
        let map = map.map_err(|source| Error::PayloadFile { path: path.clone(), source })?;
        // Fewer misses of the address translation, where the file system has large pages; elsewhere it changes nothing.
        #[cfg(target_os = "linux")]
        map.advise(memmap2::Advice::HugePage).ok();
        Payload::checked(Bytes::Mapped(map), path, expected, golden)
    }

    fn checked(map: Bytes, path: PathBuf, expected: Expected, golden: Vec<u8>) -> Result<Payload> {
        let header = check_header(&path, &map, expected)?;
        let inside = |offset, bytes| within(offset, bytes, expected.bytes).is_some();
        if !inside(header.metadata_offset, header.metadata_bytes)
            || !inside(header.tokenizer_offset, header.tokenizer_bytes)
        {
            return Err(Error::PayloadDamaged { path, what: "the header points outside the payload".into() });
        }
        Ok(Payload { map, path, header, golden })
    }

    /// All bytes, aligned to [`PAYLOAD_ALIGN`].
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The file it lies in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the payload says about itself.
    pub fn metadata(&self) -> Result<Metadata> {
        let bytes = self.section(self.header.metadata_offset, self.header.metadata_bytes);
        serde_json::from_slice(bytes).map_err(|error| Error::PayloadDamaged {
            path: self.path.clone(),
            what: format!("the metadata is not as expected: {error}"),
        })
    }

    /// The text of `tokenizer.json`; `None` when the model has none.
    pub fn tokenizer(&self) -> Option<&[u8]> {
        let bytes = self.section(self.header.tokenizer_offset, self.header.tokenizer_bytes);
        (!bytes.is_empty()).then_some(bytes)
    }

    /// The values recorded for `selftest`; `None` when there are none.
    pub fn golden(&self) -> Result<Option<Golden>> {
        if self.golden.is_empty() {
            return Ok(None);
        }
        let golden = serde_json::from_slice(&self.golden).map_err(|error| Error::PayloadDamaged {
            path: self.path.clone(),
            what: format!("the recorded values are not as expected: {error}"),
        })?;
        Ok(Some(golden))
    }

    /// Whether the byte range `range` is in memory already, as a share of its pages. For decisions and `info`, never
    /// for correctness.
    pub fn resident(&self, range: Range<usize>) -> f64 {
        residency(&self.map, range)
    }

    /// Asks the kernel for all that is not in memory yet, front to back, until `stop` is set. Faults alone fetch little
    /// at a time; so the first steps of a model that comes from the disk run at the disk's speed. Does nothing where
    /// all is there, and where the memory is somebody else's.
    pub fn read_ahead(&self, stop: &AtomicBool) {
        const CHUNK: usize = 8 << 20;
        const SAMPLES: usize = 64;
        let Bytes::Mapped(map) = &self.map else { return };
        let sample = |i: usize| {
            let at = map.len() / SAMPLES * i;
            self.resident(at..at + 1) == 1.0
        };
        if (0..SAMPLES).all(sample) {
            return;
        }
        for start in (0..map.len()).step_by(CHUNK) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let end = (start + CHUNK).min(map.len());
            if self.resident(start..end) < 1.0 {
                bring_in(map, start..end);
            }
        }
    }

    fn section(&self, offset: u64, bytes: u64) -> &[u8] {
        // `map` has checked that sections lie inside.
        &self.map[offset as usize..(offset + bytes) as usize]
    }
}

/// Asks the kernel for a part of a file: as if it were touched, which brings large pages where there are any. Kernels before 5.14 do not know that, and read
/// small ones ahead.
fn bring_in(map: &Mmap, range: Range<usize>) {
    #[cfg(target_os = "linux")]
    if map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len()).is_ok() {
        return;
    }
    #[cfg(unix)]
    map.advise_range(memmap2::Advice::WillNeed, range.start, range.len()).ok();
}

/// Why there is no trailer.
enum NoTrailer {
    TooShort,
    Nothing,
    /// A trailer ends this many bytes before the file does.
    Behind(u64),
}

impl NoTrailer {
    fn describe(&self, file_bytes: u64, payload_bytes: u64) -> String {
        match self {
            NoTrailer::Behind(bytes) => format!("{bytes} bytes follow that do not belong to it"),
            NoTrailer::TooShort | NoTrailer::Nothing if file_bytes < payload_bytes => {
                format!("the file has {file_bytes} bytes, the weights alone have {payload_bytes}")
            }
            NoTrailer::TooShort | NoTrailer::Nothing => "nothing at its end says where they are".into(),
        }
    }
}

fn read_trailer(file: &mut File, file_bytes: u64) -> std::io::Result<std::result::Result<Trailer, NoTrailer>> {
    const SIZE: u64 = size_of::<Trailer>() as u64;
    /// How far before the end a displaced trailer is looked for.
    const REACH: u64 = 64 << 10;
    if file_bytes < SIZE {
        return Ok(Err(NoTrailer::TooShort));
    }
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(file_bytes - SIZE))?;
    file.take(SIZE).read_to_end(&mut bytes)?;
    if let Some(trailer) = Trailer::from_bytes(&bytes).filter(|trailer| trailer.magic == TRAILER_MAGIC) {
        return Ok(Ok(trailer));
    }
    bytes.clear();
    file.seek(SeekFrom::Start(file_bytes.saturating_sub(REACH)))?;
    file.take(REACH).read_to_end(&mut bytes)?;
    let found = bytes.windows(TRAILER_MAGIC.len()).rposition(|window| window == TRAILER_MAGIC);
    Ok(Err(found.map_or(NoTrailer::Nothing, |at| NoTrailer::Behind((bytes.len() - at - TRAILER_MAGIC.len()) as u64))))
}

fn check_header(path: &Path, bytes: &[u8], expected: Expected) -> Result<PayloadHeader> {
    let damaged = |what: String| Error::PayloadDamaged { path: path.to_owned(), what };
    let header = PayloadHeader::from_bytes(bytes)
        .filter(|header| header.magic == PAYLOAD_MAGIC)
        .ok_or_else(|| damaged("they do not begin as weights of moec do".into()))?;
    if header.abi_version != ABI_VERSION {
        return Err(Error::AbiVersion { expected: ABI_VERSION, found: header.abi_version });
    }
    if header.header_bytes as usize != size_of::<PayloadHeader>() {
        return Err(damaged(format!("their header has {} bytes", header.header_bytes)));
    }
    if header.key != expected.key {
        return Err(foreign(path.to_owned(), &expected.key, &header.key));
    }
    if header.payload_bytes != expected.bytes {
        return Err(damaged(format!(
            "they say they have {} bytes, {} were expected",
            header.payload_bytes, expected.bytes
        )));
    }
    Ok(header)
}

fn foreign(path: PathBuf, expected: &[u8; 32], found: &[u8; 32]) -> Error {
    Error::PayloadForeign { path, expected: hex(&expected[..6]), found: hex(&found[..6]) }
}

/// `offset..offset + bytes` when that lies within `0..limit`.
fn within(offset: u64, bytes: u64, limit: u64) -> Option<Range<u64>> {
    let end = offset.checked_add(bytes)?;
    (end <= limit).then_some(offset..end)
}

#[cfg(target_os = "linux")]
fn residency(map: &[u8], range: Range<usize>) -> f64 {
    const PAGE: usize = 4096;
    let start = range.start / PAGE * PAGE;
    let bytes = range.end.min(map.len()).saturating_sub(start);
    if bytes == 0 {
        return 1.0;
    }
    let mut pages = vec![0u8; bytes.div_ceil(PAGE)];
    // SAFETY: the range lies in the mapping and starts at a page; there is one byte for each page of 4 KiB, and larger
    // pages need fewer.
    let rc = unsafe { libc::mincore(map.as_ptr().add(start) as *mut _, bytes, pages.as_mut_ptr()) };
    if rc != 0 {
        return 0.0;
    }
    pages.iter().filter(|page| **page & 1 == 1).count() as f64 / pages.len() as f64
}

#[cfg(not(target_os = "linux"))]
fn residency(_map: &[u8], _range: Range<usize>) -> f64 {
    0.0
}
