//! Memory that lies as a model's payload does.
//!
//! Where there is enough, it has all of the matrices in large pages, as an executable's have them where the file system can; elsewhere it takes far less: every
//! matrix is a view of one piece that is larger than the caches, in small pages. So a step reads as many bytes from memory as it would of real weights. What
//! they are makes tokens choose experts as unlike tokens do: projections of attention are zero, so tokens do not mix, norms are one, and all else is
//! arbitrary small numbers ([`super::arena`]): a router sees the token's embedding, and what experts made of it. Deliberately absent: a file on a disk.

use super::TuneError;
use super::arena::{fill, large_pages};
use super::workload::NoMemory;
use crate::plan::payload::{Arrangement, PayloadItem, PayloadMap};
use memmap2::MmapMut;
use moec_abi::PAYLOAD_ALIGN;
use moec_ir::graph::Role;
use rand::SeedableRng;
use rand_xoshiro::Xoshiro256PlusPlus;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd};

/// The payload of a model, as far as code can tell.
#[derive(Debug)]
pub struct Weights {
    map: MmapMut,
}

/// What matrices are views of.
struct Piece {
    file: File,
    /// Bytes of it that are arbitrary; as many zeros follow.
    bytes: usize,
}

/// What a matrix is a view of, and from where on the next one is.
struct View {
    from: usize,
    next: usize,
}

impl Weights {
    /// Memory for `payload`, out of `memory` bytes that there are: for all its matrices if they take no more than half of it, or else for at most `most` bytes,
    /// which are all of them, and as many zeros.
    ///
    /// # Errors
    /// When there is not so much.
    pub fn new(payload: &PayloadMap, memory: usize, most: usize) -> std::result::Result<Weights, TuneError> {
        let wanted: usize = payload.items.iter().filter(|item| is_matrix(item)).map(PayloadItem::bytes).sum();
        if wanted <= memory / 2 {
            return Ok(Weights::whole(payload).map_err(|source| NoMemory { bytes: wanted, source })?);
        }
        let bytes = wanted.min(most).next_multiple_of(PAYLOAD_ALIGN).max(PAYLOAD_ALIGN);
        let no_memory = |source| NoMemory { bytes: 2 * bytes, source };
        if 2 * bytes > memory {
            return Err(no_memory(ErrorKind::OutOfMemory.into()).into());
        }
        Ok(Weights::of_piece(payload, bytes).map_err(no_memory)?)
    }

    /// As [`new`](Weights::new), with pages of its own for everything.
    fn whole(payload: &PayloadMap) -> Result<Weights> {
        let mut weights = Weights { map: large_pages(payload.weights_end.max(1))? };
        let mut random = Xoshiro256PlusPlus::seed_from_u64(0);
        for item in payload.items.iter().filter(|item| is_matrix(item)) {
            let bytes = &mut weights.map[item.offset..][..item.bytes()];
            match item.role {
                // Written, so that they are read from memory as others are, and not from the one page of zeros.
                Some(Role::Attention) => bytes.fill(0),
                _ => fill(bytes, &mut random),
            }
        }
        weights.small_items(payload);
        Ok(weights)
    }

    /// As [`new`](Weights::new), with a piece of `bytes` bytes of numbers.
    fn of_piece(payload: &PayloadMap, bytes: usize) -> Result<Weights> {
        let piece = Piece { file: nameless_file()?, bytes };
        piece.file.set_len(2 * bytes as u64)?;
        // SAFETY: the file has no name, so nobody else can change it.
        let mut numbers = unsafe { memmap2::MmapOptions::new().len(bytes).map_mut(&piece.file)? };
        fill(&mut numbers, &mut Xoshiro256PlusPlus::seed_from_u64(0));
        let mut map = memmap2::MmapOptions::new().len(payload.weights_end.max(1)).no_reserve_swap().map_anon()?;
        let (mut numbers, mut zeros) = (View { from: 0, next: 0 }, View { from: bytes, next: 0 });
        for item in payload.items.iter().filter(|item| is_matrix(item)) {
            let view = if item.role == Some(Role::Attention) { &mut zeros } else { &mut numbers };
            piece.view(&mut map[item.offset..][..item.bytes()], view)?;
        }
        let mut weights = Weights { map };
        weights.small_items(payload);
        Ok(weights)
    }

    /// Writes all that is no matrix.
    fn small_items(&mut self, payload: &PayloadMap) {
        for item in &payload.items {
            match &item.arrangement {
                Arrangement::Vector if item.role == Some(Role::Norm) => self.words(item).fill(1f32.to_ne_bytes()),
                Arrangement::ExpertPlaces { places } => {
                    let all = self.words(item).iter_mut().zip(places.iter().flatten());
                    all.for_each(|(word, place)| *word = place.to_ne_bytes());
                }
                // Matrices; biases, and the tables of the rotary embedding, which turn zeros.
                _ => {}
            }
        }
    }

    /// Where it begins.
    pub fn address(&self) -> *const u8 {
        self.map.as_ptr()
    }

    /// Bytes that it has, as code sees it.
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// The words of an item that is no matrix.
    fn words(&mut self, item: &PayloadItem) -> &mut [[u8; 4]] {
        self.map[item.offset..][..item.bytes()].as_chunks_mut::<4>().0
    }
}

impl Piece {
    /// Makes a matrix a view of its numbers or zeros, again and again from their start.
    fn view(&self, matrix: &mut [u8], view: &mut View) -> Result<()> {
        let mut at = 0;
        while at < matrix.len() {
            let some = (matrix.len() - at).min(self.bytes - view.next);
            let (whole, from) = (&mut matrix[at..][..some], view.from + view.next);
            // SAFETY: the pages are the map's own, whole (items and their matrices begin at pages, as views do), and nobody refers to them; they stay mapped
            // until the map is dropped.
            let there = unsafe {
                libc::mmap(
                    whole.as_mut_ptr().cast(),
                    some,
                    libc::PROT_READ,
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE,
                    self.file.as_raw_fd(),
                    from as libc::off_t,
                )
            };
            if there == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            at += some;
            view.next = (view.next + some) % self.bytes;
        }
        Ok(())
    }
}

/// Whether an item is rows of numbers that a model has learned.
fn is_matrix(item: &PayloadItem) -> bool {
    matches!(item.arrangement, Arrangement::Table | Arrangement::Tiles { .. } | Arrangement::GateUp { .. })
}

/// A file in memory.
fn nameless_file() -> Result<File> {
    // SAFETY: the name is a C string.
    let file = unsafe { libc::memfd_create(c"weights".as_ptr(), libc::MFD_CLOEXEC) };
    if file < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: it was just opened, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(file) })
}
