//! Dividing the payload into pieces, and threads that make them.
//!
//! Every piece has its place in the file, so threads share nothing but a counter of the next piece. What a piece lost
//! by rounding is added up in the order of the pieces, so the report does not depend on the threads either.

use super::error::{PackError, Place, unfit};
use super::exact::encode_exact;
use super::report::{PackReport, Packed};
use super::rows::{Run, TileRows, column_runs, tile_rows};
use super::tile::{Loss, encode_floats, encode_tile};
use super::{Packing, rotary};
use crate::emit::page_cache;
use crate::import::CodedRows;
use crate::plan::layout::{BLOCK, Format};
use crate::plan::payload::{Arrangement, PayloadItem};
use crate::plan::quant::{Lanes, real_columns};
use moec_abi::{LANES, ROW_ALIGN, round_up};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Bytes of payload that a piece should have. Each thread holds one, and the rows of one tile as they are read and as
/// they are laid out.
const PIECE: usize = 2 << 20;

/// A part of an item: some tiles of one expert, or some rows.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Piece {
    item: usize,
    expert: usize,
    range: Range<usize>,
}

/// Packs everything.
pub(super) fn run(packing: &Packing, file: &File, start: u64) -> Result<PackReport, PackError> {
    let pieces = pieces(packing.items);
    let total = pieces.iter().map(|piece| piece.bytes(&packing.items[piece.item]) as u64).sum();
    let shared = Shared {
        packing,
        file,
        start,
        total,
        rotations: rotary::rotations(&packing.rope, packing.head_dim, context(packing.items)),
        next: AtomicUsize::new(0),
        done: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        outcomes: Mutex::new(Vec::with_capacity(pieces.len())),
        pieces,
    };
    (packing.progress)(0, total);
    std::thread::scope(|scope| {
        for _ in 1..packing.threads.max(1) {
            scope.spawn(|| shared.work());
        }
        shared.work();
    });
    shared.report()
}

/// The positions that the rotary tables have.
fn context(items: &[PayloadItem]) -> usize {
    let tables = items.iter().filter(|item| matches!(item.arrangement, Arrangement::RopeTable { .. }));
    tables.map(|item| item.rows).max().unwrap_or(0)
}

struct Shared<'a> {
    packing: &'a Packing<'a>,
    file: &'a File,
    start: u64,
    total: u64,
    rotations: Vec<rotary::Rotation>,
    pieces: Vec<Piece>,
    next: AtomicUsize,
    done: AtomicU64,
    failed: AtomicBool,
    /// By piece, in the order in which they were finished.
    outcomes: Mutex<Vec<(usize, Result<Loss, PackError>)>>,
}

/// Cuts all items into pieces, by place.
fn pieces(items: &[PayloadItem]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let (count, bytes) = units(item);
        let step = (PIECE / bytes.max(1)).max(1);
        // In their own order, as they are read.
        let mut members = item.members();
        members.sort_unstable();
        for expert in members {
            for first in (0..count).step_by(step) {
                pieces.push(Piece { item: index, expert, range: first..count.min(first + step) });
            }
        }
    }
    pieces
}

/// What an item (one expert of it) can be cut into: how many, and the bytes of each.
fn units(item: &PayloadItem) -> (usize, usize) {
    match item.arrangement {
        Arrangement::Tiles { .. } | Arrangement::GateUp { .. } => (item.padded_rows() / LANES, item.tile_bytes()),
        Arrangement::Table | Arrangement::RopeTable { .. } | Arrangement::ExpertPlaces { .. } => {
            (item.rows, item.row_bytes())
        }
        Arrangement::Vector => (1, round_up(item.k(), ROW_ALIGN) * 4),
    }
}

impl Piece {
    fn bytes(&self, item: &PayloadItem) -> usize {
        self.range.len() * units(item).1
    }

    /// Its place in the payload.
    fn offset(&self, item: &PayloadItem) -> u64 {
        (item.offset + item.place_of(self.expert) * item.expert_bytes() + self.range.start * units(item).1) as u64
    }

    /// The stored rows that it reads.
    fn sources<'a>(&self, item: &'a PayloadItem) -> Vec<(&'a str, Range<usize>)> {
        match item.arrangement {
            Arrangement::RopeTable { .. } | Arrangement::ExpertPlaces { .. } => Vec::new(),
            Arrangement::Vector => vec![(item.name.as_str(), 0..1)],
            Arrangement::Table => vec![(item.name.as_str(), self.range.clone())],
            Arrangement::Tiles { .. } | Arrangement::GateUp { .. } => {
                let mut sources: Vec<(&str, Range<usize>)> = Vec::new();
                for TileRows { tensor, rows, .. } in self.range.clone().flat_map(|tile| tile_rows(item, tile)) {
                    match sources.iter_mut().find(|(name, known)| *name == tensor && known.end == rows.start) {
                        Some((_, known)) => known.end = rows.end,
                        None => sources.push((tensor, rows)),
                    }
                }
                sources
            }
        }
    }
}

/// A thread's memory.
#[derive(Default)]
struct Scratch {
    /// Stored rows, `[row][stored column]`.
    rows: Vec<f32>,
    /// A tile, `[K][lane]`.
    columns: Vec<Lanes<f32>>,
    /// A tile of codes that are kept.
    codes: CodedRows,
    /// The piece.
    out: Vec<u8>,
}

impl Shared<'_> {
    fn work(&self) {
        let mut scratch = Scratch::default();
        while !self.failed.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = self.pieces.get(index) else { break };
            let outcome = if self.packing.cancel.load(Ordering::Relaxed) {
                Err(PackError::Cancelled)
            } else {
                self.make(index, piece, &mut scratch)
            };
            if outcome.is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
            self.outcomes.lock().expect("no thread panics while it holds the lock").push((index, outcome));
        }
    }

    /// Reads, encodes and writes one piece.
    fn make(&self, index: usize, piece: &Piece, scratch: &mut Scratch) -> Result<Loss, PackError> {
        // Reading ahead: the piece that the next free thread but one takes.
        if let Some(later) = self.pieces.get(index + self.packing.threads) {
            for (tensor, rows) in later.sources(&self.packing.items[later.item]) {
                self.packing.source.prefetch(tensor, later.expert, rows);
            }
        }
        let item = &self.packing.items[piece.item];
        let bytes = piece.bytes(item);
        scratch.out.resize(bytes, 0);
        let loss = self.encode(item, piece, scratch)?;
        for (tensor, rows) in piece.sources(item) {
            self.packing.source.release(tensor, piece.expert, rows);
        }
        let offset = self.start + piece.offset(item);
        page_cache::make_large(self.file, offset..offset + bytes as u64);
        self.file.write_all_at(&scratch.out, offset).map_err(|source| PackError::Write {
            done: self.done.load(Ordering::Relaxed),
            total: self.total,
            source,
        })?;
        let done = self.done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        (self.packing.progress)(done, self.total);
        Ok(loss)
    }

    fn encode(&self, item: &PayloadItem, piece: &Piece, scratch: &mut Scratch) -> Result<Loss, PackError> {
        match &item.arrangement {
            Arrangement::Tiles { .. } | Arrangement::GateUp { .. } if item.format.is_exact() => {
                self.keep_tiles(item, piece, scratch)
            }
            Arrangement::Tiles { .. } | Arrangement::GateUp { .. } => self.encode_tiles(item, piece, scratch),
            Arrangement::Table => self.encode_rows(item, piece, scratch, item.format),
            Arrangement::Vector => self.encode_vector(item, piece, scratch),
            Arrangement::RopeTable { sine } => {
                rotary::encode(*sine, &self.rotations, item.columns, piece.range.clone(), &mut scratch.out);
                Ok(Loss::default())
            }
            Arrangement::ExpertPlaces { places } => {
                let rows = places[piece.range.clone()].iter().flatten();
                for (bytes, place) in scratch.out.chunks_exact_mut(4).zip(rows) {
                    bytes.copy_from_slice(&place.to_le_bytes());
                }
                Ok(Loss::default())
            }
        }
    }

    /// Rows as they are, the last one padded with zeros to the end of the piece.
    fn encode_rows(
        &self,
        item: &PayloadItem,
        piece: &Piece,
        scratch: &mut Scratch,
        format: Format,
    ) -> Result<Loss, PackError> {
        let Scratch { rows, out, .. } = scratch;
        rows.resize(piece.range.len() * item.columns, 0.0);
        self.read(&item.name, piece.expert, piece.range.clone(), rows)?;
        let used = rows.len() * format.element_bytes().expect("rows hold floats");
        out[used..].fill(0);
        encode_floats(format, rows, &mut out[..used]).map_err(|_| {
            let name = |row, column| self.place(item, piece, &item.name, piece.range.start + row, column);
            unfit(format, item.columns, rows, name).expect("encoding found a weight that does not fit")
        })
    }

    /// A vector as f32, its heads padded.
    fn encode_vector(&self, item: &PayloadItem, piece: &Piece, scratch: &mut Scratch) -> Result<Loss, PackError> {
        let loss = self.encode_rows(item, piece, scratch, Format::F32)?;
        if item.column_heads.is_some() {
            let Scratch { rows, out, .. } = scratch;
            out.fill(0);
            for run in column_runs(item.columns, item.column_heads) {
                let to = &mut out[4 * run.to..][..4 * run.length];
                for (bytes, value) in to.chunks_exact_mut(4).zip(&rows[run.from..]) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
            }
        }
        Ok(loss)
    }

    fn encode_tiles(&self, item: &PayloadItem, piece: &Piece, scratch: &mut Scratch) -> Result<Loss, PackError> {
        let Scratch { rows, columns, out, .. } = scratch;
        let runs = column_runs(item.columns, item.column_heads);
        let length = if item.format.is_quantized() { round_up(item.k(), BLOCK) } else { item.k() };
        let real = real_columns(length, runs.iter().map(|run| (run.to, run.length)));
        columns.clear();
        columns.resize(length, [0.0; LANES]);
        rows.resize(LANES * item.columns, 0.0);
        let mut loss = Loss::default();
        for (tile, out) in piece.range.clone().zip(out.chunks_exact_mut(item.tile_bytes())) {
            let sources = tile_rows(item, tile);
            if sources.iter().map(|source| source.rows.len()).sum::<usize>() < LANES {
                columns.fill([0.0; LANES]);
            }
            for TileRows { tensor, rows: wanted, lane } in &sources {
                let rows = &mut rows[..wanted.len() * item.columns];
                self.read(tensor, piece.expert, wanted.clone(), rows)?;
                transpose(rows, item.columns, &runs, *lane, columns);
            }
            loss.add(
                encode_tile(item.format, columns, &real, out).map_err(|_| self.find(item, piece, &sources, rows))?,
            );
        }
        Ok(loss)
    }

    /// Tiles whose codes and scales are kept as they are stored: nothing is lost.
    fn keep_tiles(&self, item: &PayloadItem, piece: &Piece, scratch: &mut Scratch) -> Result<Loss, PackError> {
        assert_eq!(item.k(), item.columns, "{}: columns that are kept are not padded", item.name);
        let Scratch { rows, codes, out, .. } = scratch;
        for (tile, out) in piece.range.clone().zip(out.chunks_exact_mut(item.tile_bytes())) {
            codes.reset(LANES, item.columns);
            let sources = tile_rows(item, tile);
            for TileRows { tensor, rows: wanted, lane } in &sources {
                self.packing
                    .source
                    .read_codes(tensor, piece.expert, wanted.clone(), codes, *lane)
                    .map_err(|source| PackError::Source { tensor: tensor.to_string(), source })?;
            }
            encode_exact(item.format, codes, out).map_err(|_| {
                rows.resize(LANES * item.columns, 0.0);
                self.find(item, piece, &sources, rows)
            })?;
        }
        Ok(Loss::default())
    }

    fn read(&self, tensor: &str, expert: usize, rows: Range<usize>, out: &mut [f32]) -> Result<(), PackError> {
        self.packing
            .source
            .read_rows(tensor, expert, rows, out)
            .map_err(|source| PackError::Source { tensor: tensor.to_string(), source })
    }

    /// Finds the weight for which a tile could not be encoded.
    fn find(&self, item: &PayloadItem, piece: &Piece, sources: &[TileRows], buffer: &mut [f32]) -> PackError {
        for TileRows { tensor, rows, .. } in sources {
            let buffer = &mut buffer[..rows.len() * item.columns];
            if let Err(error) = self.read(tensor, piece.expert, rows.clone(), buffer) {
                return error;
            }
            let name = |row, column| self.place(item, piece, tensor, rows.start + row, column);
            if let Some(error) = unfit(item.format, item.columns, buffer, name) {
                return error;
            }
        }
        unreachable!("encoding found a weight in {} that does not fit", item.name)
    }

    fn place(&self, item: &PayloadItem, piece: &Piece, tensor: &str, row: usize, column: usize) -> Place {
        let expert = item.router.map(|_| piece.expert);
        Place { tensor: tensor.to_string(), expert, row, column }
    }

    /// The first error by place, or what was lost.
    fn report(self) -> Result<PackReport, PackError> {
        let mut outcomes = self.outcomes.into_inner().expect("no thread panics while it holds the lock");
        outcomes.sort_by_key(|(index, _)| *index);
        let mut items: Vec<Packed> = self.packing.items.iter().map(describe).collect();
        for (index, outcome) in outcomes {
            let loss = outcome?;
            let item = &mut items[self.pieces[index].item];
            item.error += loss.error;
            item.energy += loss.energy;
        }
        Ok(PackReport { items })
    }
}

/// The report of an item before anything was lost.
fn describe(item: &PayloadItem) -> Packed {
    let (count, bytes) = units(item);
    let weights = match item.arrangement {
        Arrangement::RopeTable { .. } | Arrangement::ExpertPlaces { .. } => 0,
        Arrangement::Vector => item.columns,
        Arrangement::Table | Arrangement::Tiles { .. } | Arrangement::GateUp { .. } => {
            item.experts * item.rows * item.columns
        }
    };
    Packed {
        name: item.name.clone(),
        role: item.role,
        format: item.format,
        weights: weights as u64,
        bytes: (item.experts * count * bytes) as u64,
        error: 0.0,
        energy: 0.0,
    }
}

/// Puts row-major `rows` of `stored` columns into the lanes from `lane` on. Works on squares of 16, so that both sides
/// stay in the nearest cache.
fn transpose(rows: &[f32], stored: usize, runs: &[Run], lane: usize, columns: &mut [Lanes<f32>]) {
    for run in runs {
        for first in (0..run.length).step_by(LANES) {
            let length = LANES.min(run.length - first);
            let columns = &mut columns[run.to + first..][..length];
            for (lane, row) in (lane..).zip(rows.chunks_exact(stored)) {
                for (column, &weight) in columns.iter_mut().zip(&row[run.from + first..][..length]) {
                    column[lane] = weight;
                }
            }
        }
    }
}
