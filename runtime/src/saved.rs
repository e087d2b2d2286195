//! Sessions in files: the tokens, the logits of the last one, and the pages of keys and values as they lie in memory.
//!
//! ```text
//! [ Header | token ids, u32 | logits, f32 (none or a row) | pages | CRC-32 of all before ]
//! ```
//! Numbers are in little-endian order. A page's inside belongs to the generated code, so a file is good for the model that wrote it: the
//! payload's key, the cache's type and size and the window must be the same. A loaded session continues with the same bits
//! as the one that was saved. A file that was changed by accident is refused by its checksum; one that was changed on purpose can
//! give other logits, but nothing worse.
//!
//! Deliberately absent: samplers, whose random numbers go on where their owner keeps them.

use crate::error::{Error, Result};
use crate::kv::Sequence;
use crate::model::{Descriptor, Model};
use crate::session::Session;
use crate::step::LogitRows;
use moec_abi::{ABI_VERSION, PAGE_TOKENS, Plain};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const MAGIC: [u8; 8] = *b"moecses1";

/// The beginning of a session's file.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Header {
    magic: [u8; 8],
    abi_version: u32,
    header_bytes: u32,
    payload_key: [u8; 32],
    kv_type: u32,
    sliding_window: u32,
    page_bytes: u64,
    tokens: u64,
    /// Number of the first page that is kept; all from there to the last token follow.
    first_page: u64,
    /// Logits that follow: none or the size of the vocabulary.
    logits: u64,
}

// SAFETY: repr(C), fields in falling alignment after 8 bytes and two words, without padding, all integers.
unsafe impl Plain for Header {}

const _: () = assert!(size_of::<Header>() == 8 + 2 * 4 + 32 + 2 * 4 + 4 * 8);

/// A stream with the checksum of what went through it.
struct Summed<S> {
    stream: S,
    sum: crc32fast::Hasher,
}

impl<S> Summed<S> {
    fn new(stream: S) -> Summed<S> {
        Summed { stream, sum: crc32fast::Hasher::new() }
    }
}

impl<S: Write> Summed<S> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.stream.write_all(bytes)
    }
}

impl<S: Read> Summed<S> {
    fn get(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(bytes)?;
        self.sum.update(bytes);
        Ok(())
    }

    /// Numbers of four bytes, read piece by piece so that a wrong count ends at the file's end and not at the memory's.
    fn words(&mut self, count: usize) -> io::Result<Vec<[u8; 4]>> {
        const PIECE: usize = 1 << 14;
        let mut words = Vec::new();
        while words.len() < count {
            let start = words.len();
            words.resize(count.min(start + PIECE), [0; 4]);
            self.get(words[start..].as_flattened_mut())?;
        }
        Ok(words)
    }
}

impl Session {
    /// Writes the session to the file `path`, which is replaced only when all has been written.
    ///
    /// # Errors
    /// [`Error::SessionFile`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let temporary = temporary_name(path);
        let written = self.write(&temporary).and_then(|()| fs::rename(&temporary, path));
        written.map_err(|source| {
            fs::remove_file(&temporary).ok();
            Error::SessionFile { doing: "write", path: path.to_owned(), source }
        })
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let file = File::create_new(path)?;
        let mut to = Summed::new(BufWriter::with_capacity(1 << 16, file));
        let logits = self.try_last_logits().unwrap_or_default();
        let first_page = self.sequence().contents().map(|(number, _)| number).next();
        let header = Header {
            tokens: self.tokens().len() as u64,
            first_page: first_page.unwrap_or(self.tokens().len().div_ceil(PAGE_TOKENS)) as u64,
            logits: logits.len() as u64,
            ..header_of(&self.model().descriptor())
        };
        to.put(header.as_bytes())?;
        self.tokens().iter().try_for_each(|id| to.put(&id.to_le_bytes()))?;
        logits.iter().try_for_each(|logit| to.put(&logit.to_le_bytes()))?;
        self.sequence().contents().try_for_each(|(_, page)| to.put(page))?;
        let sum = to.sum.finalize();
        to.stream.write_all(&sum.to_le_bytes())?;
        to.stream.into_inner()?.sync_data()
    }

    /// Reads a session that [`save`](Session::save) wrote with the same model.
    ///
    /// # Errors
    /// [`Error::SessionFile`], [`Error::SessionDamaged`], [`Error::SessionForeign`], or too little memory.
    pub fn load(model: &Arc<Model>, path: &Path) -> Result<Session> {
        let unreadable = |source: io::Error| {
            if source.kind() == io::ErrorKind::UnexpectedEof {
                return damaged(path, "it ends too early");
            }
            Error::SessionFile { doing: "read", path: path.to_owned(), source }
        };
        let file = File::open(path).map_err(unreadable)?;
        let mut from = Summed::new(BufReader::with_capacity(1 << 16, file));
        let mut bytes = [0; size_of::<Header>()];
        from.get(&mut bytes).map_err(unreadable)?;
        let header = Header::from_bytes(&bytes).expect("as many bytes as a header has");
        check(&header, &model.descriptor(), path)?;

        let descriptor = model.descriptor();
        let words = from.words(header.tokens as usize).map_err(unreadable)?;
        let tokens: Vec<u32> = words.into_iter().map(u32::from_le_bytes).collect();
        if let Some(id) = tokens.iter().find(|id| **id >= descriptor.vocab) {
            return Err(damaged(path, format!("token id {id} of a vocabulary of {}", descriptor.vocab)));
        }
        let words = from.words(header.logits as usize).map_err(unreadable)?;
        let logits: Vec<f32> = words.into_iter().map(f32::from_le_bytes).collect();
        let pages = tokens.len().div_ceil(PAGE_TOKENS) - header.first_page as usize;
        model.pages().check(pages)?;
        let sequence =
            Sequence::restore(model.pages(), descriptor.window(), tokens.len(), header.first_page as usize, |page| {
                from.get(page).map_err(unreadable)
            })?;

        let expected = from.sum.finalize().to_le_bytes();
        let mut found = [0; 4];
        from.stream.read_exact(&mut found).map_err(unreadable)?;
        if found != expected {
            return Err(damaged(path, "its checksum is wrong"));
        }
        if from.stream.read(&mut [0]).map_err(unreadable)? != 0 {
            return Err(damaged(path, "something follows its end"));
        }
        let logits = match logits.as_slice() {
            [] => LogitRows::default(),
            row => LogitRows::of_row(&descriptor, row)?,
        };
        Ok(Session::restored(model, sequence, tokens, logits))
    }
}

/// The header of an empty session of a model.
fn header_of(descriptor: &Descriptor) -> Header {
    Header {
        magic: MAGIC,
        abi_version: ABI_VERSION,
        header_bytes: size_of::<Header>() as u32,
        payload_key: descriptor.payload_key,
        kv_type: descriptor.kv_type,
        sliding_window: descriptor.sliding_window,
        page_bytes: descriptor.page_bytes,
        tokens: 0,
        first_page: 0,
        logits: 0,
    }
}

fn check(header: &Header, descriptor: &Descriptor, path: &Path) -> Result<()> {
    let own = header_of(descriptor);
    if header.magic != own.magic {
        return Err(damaged(path, "it does not begin as one does"));
    }
    let foreign = |what: String| Err(Error::SessionForeign { path: path.to_owned(), what });
    if (header.abi_version, header.header_bytes) != (own.abi_version, own.header_bytes) {
        return foreign(format!(
            "it has version {} of the interface, this is version {}",
            header.abi_version, own.abi_version
        ));
    }
    if header.payload_key != own.payload_key {
        return foreign("its weights have another key".into());
    }
    let cache = |h: &Header| (h.kv_type, h.sliding_window, h.page_bytes);
    if cache(header) != cache(&own) {
        return foreign("its cache of keys and values has another type, page size or window".into());
    }
    if header.tokens > u64::from(descriptor.context) {
        return Err(damaged(path, format!("{} tokens in a context of {}", header.tokens, descriptor.context)));
    }
    if header.logits != 0 && (header.logits != u64::from(descriptor.vocab) || header.tokens == 0) {
        return Err(damaged(path, format!("{} logits for a vocabulary of {}", header.logits, descriptor.vocab)));
    }
    // What the next token, or the last one again, attends to must be there.
    let visible = descriptor.window().map_or(0, |window| (header.tokens + 1).saturating_sub(window as u64));
    if header.first_page > visible / PAGE_TOKENS as u64 {
        return Err(damaged(path, format!("its first page is number {}", header.first_page)));
    }
    Ok(())
}

fn damaged(path: &Path, what: impl Into<String>) -> Error {
    Error::SessionDamaged { path: path.to_owned(), what: what.into() }
}

/// A name beside `path` that nobody else uses.
fn temporary_name(path: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}-{count}.unfinished", std::process::id()));
    path.with_file_name(name)
}
