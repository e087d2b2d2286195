//! Models in memory, and items that pack them.

use moec::emit::pack::{PackError, PackReport, Packing, RowSource, SourceError};
use moec::import::{Rope, RopeScaling};
use moec::plan::layout::Format;
use moec::plan::payload::{Arrangement, Part, PayloadItem};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

/// Numbers that look random and are the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn gaussian(&mut self) -> f64 {
        (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Student's t with 4 degrees of freedom.
    pub(crate) fn heavy(&mut self) -> f64 {
        let chi: f64 = (0..4).map(|_| self.gaussian().powi(2)).sum();
        self.gaussian() / (chi / 4.0).sqrt()
    }

    pub(crate) fn gaussians(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.gaussian() as f32 * 0.03).collect()
    }
}

/// `[experts][rows][columns]`.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) data: Vec<f32>,
}

impl Tensor {
    pub(crate) fn at(&self, expert: usize, row: usize, column: usize) -> f32 {
        self.data[(expert * self.rows + row) * self.columns + column]
    }
}

/// A model in memory.
#[derive(Clone, Default)]
pub(crate) struct Memory(pub(crate) BTreeMap<String, Tensor>);

impl Memory {
    pub(crate) fn add(&mut self, name: &str, experts: usize, rows: usize, columns: usize, random: &mut Random) {
        let data = random.gaussians(experts * rows * columns);
        self.0.insert(name.into(), Tensor { rows, columns, data });
    }
}

impl RowSource for Memory {
    fn read_rows(&self, weight: &str, expert: usize, rows: Range<usize>, out: &mut [f32]) -> Result<(), SourceError> {
        let tensor = self.0.get(weight).ok_or_else(|| format!("no weight {weight}"))?;
        let start = (expert * tensor.rows + rows.start) * tensor.columns;
        out.copy_from_slice(&tensor.data[start..][..rows.len() * tensor.columns]);
        Ok(())
    }
}

pub(crate) const ROPE: Rope = Rope { theta: 10000.0, rotated: None, scaling: RopeScaling::None };

/// An item without heads or experts, at the payload's first free page.
pub(crate) fn item(name: &str, format: Format, arrangement: Arrangement, rows: usize, columns: usize) -> PayloadItem {
    PayloadItem {
        name: name.into(),
        shared: None,
        role: None,
        format,
        arrangement,
        experts: 1,
        router: None,
        order: None,
        rows,
        columns,
        row_heads: None,
        column_heads: None,
        offset: 0,
    }
}

pub(crate) fn tiles(parts: &[(&str, usize)]) -> Arrangement {
    Arrangement::Tiles { parts: parts.iter().map(|&(name, rows)| Part { tensor: name.into(), rows }).collect() }
}

/// Gives each item a place.
pub(crate) fn place(items: &mut [PayloadItem]) {
    let mut offset = 4096;
    for item in items {
        item.offset = offset;
        offset += item.bytes();
    }
}

pub(crate) fn pack_to(
    file: &File,
    start: u64,
    items: &[PayloadItem],
    source: &dyn RowSource,
    threads: usize,
) -> Result<PackReport, PackError> {
    let cancel = AtomicBool::new(false);
    let packing = Packing { items, source, rope: ROPE, head_dim: 20, threads, progress: &|_, _| (), cancel: &cancel };
    packing.write(file, start)
}

/// Packs into a temporary file; gives the payload's bytes.
pub(crate) fn pack(
    items: &[PayloadItem],
    source: &dyn RowSource,
    threads: usize,
) -> Result<(Vec<u8>, PackReport), PackError> {
    const START: u64 = 8192;
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let report = pack_to(file.as_file(), START, items, source, threads)?;
    let mut bytes = std::fs::read(file.path()).expect("the file was written");
    let end = items.iter().map(|item| item.offset + item.bytes()).max().expect("there are items");
    bytes.resize(START as usize + end, 0);
    Ok((bytes.split_off(START as usize), report))
}
