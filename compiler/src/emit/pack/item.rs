//! What lies where in the payload: the items that packing writes, and how each maps onto the model's stored weights.
//!
//! All geometry is here: sizes, strides, which stored rows a tile holds, where a stored column goes. Deliberately absent: the bytes of a
//! tile ([`super::tile`]) and who decides the formats and offsets (the plan).

use crate::plan::layout::{BLOCK, Format};
use moec_abi::{LANES, PAYLOAD_ALIGN, ROW_ALIGN, padded_head_dim, round_up};
use std::ops::Range;

/// One contiguous piece of the payload.
#[derive(Clone, PartialEq, Debug)]
pub struct PackItem {
    /// Name for reports.
    pub name: String,
    /// What the weight is for (for reports: their sums are by role).
    pub role: String,
    /// Where it starts, in bytes from the payload's start.
    pub offset: u64,
    /// What it holds.
    pub content: Content,
}

/// What an item holds.
#[derive(Clone, PartialEq, Debug)]
pub enum Content {
    /// A matrix, or one for each expert, in tiles of 16 rows.
    Tiles(Tiles),
    /// A matrix in row-major order, for looking up rows. Only float formats.
    Lookup {
        /// The stored weight.
        weight: String,
        /// Its rows.
        rows: usize,
        /// Its columns; also the distance of rows, in elements.
        columns: usize,
        /// How elements are stored.
        format: Format,
    },
    /// A vector in f32, padded with zeros to a multiple of [`ROW_ALIGN`].
    Vector {
        /// The stored weight, of one row.
        weight: String,
        /// Its elements.
        length: usize,
    },
    /// A table of rotary factors, computed: f32 `[context][half head, padded with zeros to 16]`.
    Rotary {
        /// Cosine or sine.
        table: Rotary,
        /// Number of positions.
        context: usize,
        /// Angle between one position and the next for each pair of a head, in radians ([`super::rotary::frequencies`]).
        frequencies: Vec<f64>,
    },
}

/// Which rotary table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rotary {
    /// Cosines.
    Cos,
    /// Sines.
    Sin,
}

/// A matrix, or one for each expert, in tiles of 16 rows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tiles {
    /// How elements are stored.
    pub format: Format,
    /// Where rows come from.
    pub rows: Rows,
    /// Where columns go.
    pub columns: Columns,
    /// Number of experts, each with a matrix of its own; `None` for a single matrix.
    pub experts: Option<usize>,
}

/// Which stored rows make a tiled matrix, in order of tiles.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rows {
    /// The rows of one weight; the last tile is padded with zero rows.
    Plain {
        /// The weight.
        weight: String,
        /// Its rows.
        rows: usize,
    },
    /// Heads, one after another, each padded with zero rows to [`padded_head_dim`]: its first half starts at row 0, its second
    /// half at the middle.
    Heads {
        /// The weights, and how many heads each has: queries, keys, values.
        weights: Vec<(String, usize)>,
        /// Stored rows of a head.
        head_dim: usize,
    },
    /// Two weights of the same shape by turns, 16 rows of each.
    GateUp {
        /// The weight of even tiles.
        gate: String,
        /// The weight of odd tiles.
        up: String,
        /// Rows of each.
        rows: usize,
    },
}

/// Where stored columns go along K.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Columns {
    /// As they are stored.
    Plain(usize),
    /// Heads, each padded with zero columns to [`padded_head_dim`] in the same way as [`Rows::Heads`].
    Heads {
        /// Number of heads.
        heads: usize,
        /// Stored columns of a head.
        head_dim: usize,
    },
}

/// The stored rows of one tile: they fill the tile from its first row on, the rest is zero.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TileRows<'a> {
    pub(crate) weight: &'a str,
    pub(crate) rows: Range<usize>,
}

impl Columns {
    /// Columns of the stored weight.
    pub const fn stored(self) -> usize {
        match self {
            Columns::Plain(columns) => columns,
            Columns::Heads { heads, head_dim } => heads * head_dim,
        }
    }

    /// Length of K: what the kernels reduce over, padded heads included.
    pub const fn length(self) -> usize {
        match self {
            Columns::Plain(columns) => columns,
            Columns::Heads { heads, head_dim } => heads * padded_head_dim(head_dim),
        }
    }

    /// Runs of stored columns and where each goes: `(first stored column, first place along K, length)`.
    pub(crate) fn runs(self) -> Vec<(usize, usize, usize)> {
        match self {
            Columns::Plain(columns) => vec![(0, 0, columns)],
            Columns::Heads { heads, head_dim } => {
                let (padded, half) = (padded_head_dim(head_dim), head_dim.div_ceil(2));
                (0..heads)
                    .flat_map(|head| {
                        let (from, to) = (head * head_dim, head * padded);
                        [(from, to, half), (from + half, to + padded / 2, head_dim - half)]
                    })
                    .collect()
            }
        }
    }
}

impl Rows {
    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        match self {
            Rows::Plain { rows, .. } => rows.div_ceil(LANES),
            Rows::Heads { weights, head_dim } => {
                weights.iter().map(|(_, heads)| heads).sum::<usize>() * padded_head_dim(*head_dim) / LANES
            }
            Rows::GateUp { rows, .. } => 2 * rows.div_ceil(LANES),
        }
    }

    /// What tile `tile` holds.
    pub(crate) fn tile(&self, tile: usize) -> TileRows<'_> {
        match self {
            Rows::Plain { weight, rows } => TileRows { weight, rows: sixteen(tile, *rows) },
            Rows::GateUp { gate, up, rows } => {
                let weight = if tile.is_multiple_of(2) { gate } else { up };
                TileRows { weight, rows: sixteen(tile / 2, *rows) }
            }
            Rows::Heads { weights, head_dim } => {
                let (padded, half) = (padded_head_dim(*head_dim), head_dim.div_ceil(2));
                let in_half = padded / 2 / LANES;
                let (mut head, tile) = (tile / (2 * in_half), tile % (2 * in_half));
                let mut weights = weights.iter();
                let weight = loop {
                    let (weight, heads) = weights.next().expect("the tile is one of this item's");
                    if head < *heads {
                        break weight;
                    }
                    head -= heads;
                };
                let rows = if tile < in_half {
                    sixteen(tile, half)
                } else {
                    let rows = sixteen(tile - in_half, head_dim - half);
                    rows.start + half..rows.end + half
                };
                TileRows { weight, rows: head * head_dim + rows.start..head * head_dim + rows.end }
            }
        }
    }
}

/// The `index`-th 16 of `rows` rows, as far as they exist.
fn sixteen(index: usize, rows: usize) -> Range<usize> {
    rows.min(index * LANES)..rows.min((index + 1) * LANES)
}

impl Tiles {
    /// Bytes from one tile to the next.
    pub fn tile_bytes(&self) -> usize {
        self.format.tile_bytes(self.columns.length())
    }

    /// Bytes of one expert's matrix, or of the only one.
    pub fn matrix_bytes(&self) -> usize {
        self.rows.tiles() * self.tile_bytes()
    }

    /// Bytes from one expert to the next.
    pub fn expert_stride(&self) -> usize {
        round_up(self.matrix_bytes(), PAYLOAD_ALIGN)
    }

    /// Bytes of all.
    pub fn bytes(&self) -> usize {
        match self.experts {
            None => self.matrix_bytes(),
            Some(experts) => experts * self.expert_stride(),
        }
    }

    /// Length of K in memory: the quantized formats pad it to whole blocks.
    pub(crate) fn padded_length(&self) -> usize {
        let length = self.columns.length();
        if self.format.is_quantized() { round_up(length, BLOCK) } else { length }
    }
}

impl Content {
    /// Bytes that it takes in the payload.
    pub fn bytes(&self) -> usize {
        match self {
            Content::Tiles(tiles) => tiles.bytes(),
            Content::Lookup { rows, columns, format, .. } => {
                rows * columns * format.element_bytes().expect("rows to look up are stored as floats")
            }
            Content::Vector { length, .. } => 4 * round_up(*length, ROW_ALIGN),
            Content::Rotary { context, frequencies, .. } => 4 * context * round_up(frequencies.len(), LANES),
        }
    }

    /// How its elements are stored.
    pub fn format(&self) -> Format {
        match self {
            Content::Tiles(tiles) => tiles.format,
            Content::Lookup { format, .. } => *format,
            Content::Vector { .. } | Content::Rotary { .. } => Format::F32,
        }
    }

    /// Number of stored weights in it, padding not counted; 0 for what is computed.
    pub fn weights(&self) -> usize {
        match self {
            Content::Tiles(tiles) => {
                let rows = match &tiles.rows {
                    Rows::Plain { rows, .. } => *rows,
                    Rows::Heads { weights, head_dim } => {
                        weights.iter().map(|(_, heads)| heads).sum::<usize>() * head_dim
                    }
                    Rows::GateUp { rows, .. } => 2 * rows,
                };
                tiles.experts.unwrap_or(1) * rows * tiles.columns.stored()
            }
            Content::Lookup { rows, columns, .. } => rows * columns,
            Content::Vector { length, .. } => *length,
            Content::Rotary { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where each stored row of a weight goes, from the definition.
    fn place(head_dim: usize, row: usize) -> usize {
        let (head, i) = (row / head_dim, row % head_dim);
        let (padded, half) = (padded_head_dim(head_dim), head_dim / 2);
        head * padded + if i < half { i } else { padded / 2 + i - half }
    }

    #[test]
    fn heads_are_split_in_halves() {
        for head_dim in [2, 16, 20, 22, 24, 32, 34, 64, 80, 128] {
            let rows = Rows::Heads { weights: vec![("q".into(), 3), ("k".into(), 2), ("v".into(), 2)], head_dim };
            let padded = padded_head_dim(head_dim);
            let mut seen = 0;
            for tile in 0..rows.tiles() {
                let found = rows.tile(tile);
                let before = match found.weight {
                    "q" => 0,
                    "k" => 3 * padded,
                    _ => 5 * padded,
                };
                for (lane, row) in found.rows.enumerate() {
                    assert_eq!(before + place(head_dim, row), tile * LANES + lane, "head_dim {head_dim}");
                    seen += 1;
                }
            }
            assert_eq!(seen, 7 * head_dim);
            for (from, to, length) in (Columns::Heads { heads: 5, head_dim }).runs() {
                for i in 0..length {
                    assert_eq!(place(head_dim, from + i), to + i, "head_dim {head_dim}");
                }
            }
        }
    }

    #[test]
    fn experts_are_page_aligned() {
        let rows = Rows::GateUp { gate: "gate".into(), up: "up".into(), rows: 40 };
        let tiles = Tiles { format: Format::Q4, rows, columns: Columns::Plain(100), experts: Some(3) };
        assert_eq!(tiles.rows.tiles(), 6);
        assert_eq!(tiles.matrix_bytes(), 6 * Format::Q4.tile_bytes(100));
        assert_eq!(tiles.expert_stride() % PAYLOAD_ALIGN, 0);
        assert_eq!(tiles.bytes(), 3 * tiles.expert_stride());
        assert_eq!(Content::Tiles(tiles).weights(), 3 * 80 * 100);
    }
}
