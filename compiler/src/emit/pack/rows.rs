//! Which stored rows and columns make which part of an item of the payload.
//!
//! The sizes are the plan's ([`crate::plan::payload`]). Deliberately absent: reading rows ([`super::source`]) and the
//! bytes of a tile ([`super::tile`]).

use crate::plan::payload::{Arrangement, PayloadItem};
use moec_abi::{LANES, padded_head_dim};
use std::ops::Range;

/// Stored rows that are neighbours in a tile.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TileRows<'a> {
    /// The tensor.
    pub(crate) tensor: &'a str,
    /// Its rows.
    pub(crate) rows: Range<usize>,
    /// The row of the tile that takes the first of them.
    pub(crate) lane: usize,
}

/// What tile `tile` of one matrix of `item` holds. Rows of the tile that are not named are zero.
pub(crate) fn tile_rows(item: &PayloadItem, tile: usize) -> Vec<TileRows<'_>> {
    let sixteen = |tensor, tile: usize, rows: usize| TileRows {
        tensor,
        rows: rows.min(tile * LANES)..rows.min((tile + 1) * LANES),
        lane: 0,
    };
    let mut found = match (&item.arrangement, item.row_heads) {
        (Arrangement::GateUp { gate, up }, _) => {
            let tensor = if tile.is_multiple_of(2) { gate } else { up };
            vec![sixteen(tensor.as_str(), tile / 2, item.rows / 2)]
        }
        (Arrangement::Tiles { parts }, Some(head_dim)) => {
            // Half a padded head is a whole number of tiles, so a tile never holds two halves.
            let (padded, half) = (padded_head_dim(head_dim), head_dim.div_ceil(2));
            let (mut head, first) = (tile * LANES / padded, tile * LANES % padded);
            let mut parts = parts.iter();
            let part = loop {
                let part = parts.next().expect("the tile is one of this item's");
                let heads = part.rows / head_dim;
                if head < heads {
                    break part;
                }
                head -= heads;
            };
            let (from, to, first) =
                if first < padded / 2 { (0, half, first) } else { (half, head_dim, first - padded / 2) };
            let rows = to.min(from + first)..to.min(from + first + LANES);
            let rows = head * head_dim + rows.start..head * head_dim + rows.end;
            vec![TileRows { tensor: part.tensor.as_str(), rows, lane: 0 }]
        }
        (Arrangement::Tiles { parts }, None) => {
            // Parts follow each other without padding.
            let wanted = tile * LANES..(tile + 1) * LANES;
            let mut before = 0;
            let mut found = Vec::new();
            for part in parts {
                let start = wanted.start.max(before);
                let end = wanted.end.min(before + part.rows);
                if start < end {
                    let rows = start - before..end - before;
                    found.push(TileRows { tensor: part.tensor.as_str(), rows, lane: start - wanted.start });
                }
                before += part.rows;
            }
            found
        }
        (
            Arrangement::Table | Arrangement::Vector | Arrangement::RopeTable { .. } | Arrangement::ExpertPlaces { .. },
            _,
        ) => {
            unreachable!("{} is not made of tiles", item.name)
        }
    };
    found.retain(|rows| !rows.rows.is_empty());
    found
}

/// Stored columns that are neighbours along K.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run {
    /// The first stored column.
    pub(crate) from: usize,
    /// Its place along K.
    pub(crate) to: usize,
    /// How many.
    pub(crate) length: usize,
}

/// Where `columns` stored columns go along K, in heads of `heads` or as they are. Places that are not named are zero.
pub(crate) fn column_runs(columns: usize, heads: Option<usize>) -> Vec<Run> {
    let Some(head_dim) = heads else {
        return vec![Run { from: 0, to: 0, length: columns }];
    };
    let (padded, half) = (padded_head_dim(head_dim), head_dim.div_ceil(2));
    (0..columns / head_dim)
        .flat_map(|head| {
            let (from, to) = (head * head_dim, head * padded);
            [Run { from, to, length: half }, Run { from: from + half, to: to + padded / 2, length: head_dim - half }]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::layout::Format;
    use crate::plan::payload::Part;

    fn item(arrangement: Arrangement, rows: usize, row_heads: Option<usize>) -> PayloadItem {
        PayloadItem {
            name: "test".into(),
            shared: None,
            role: None,
            format: Format::F32,
            arrangement,
            experts: 1,
            router: None,
            order: None,
            rows,
            columns: 8,
            row_heads,
            column_heads: None,
            offset: 0,
        }
    }

    fn parts(rows: &[(&str, usize)]) -> Arrangement {
        Arrangement::Tiles { parts: rows.iter().map(|&(name, rows)| Part { tensor: name.into(), rows }).collect() }
    }

    /// Every stored row's place in the tiles, as `(tensor, row, place)`, by place.
    fn places(item: &PayloadItem) -> Vec<(&str, usize, usize)> {
        let tiles = 0..item.padded_rows() / LANES;
        tiles
            .flat_map(|tile| tile_rows(item, tile).into_iter().map(move |rows| (tile, rows)))
            .flat_map(|(tile, TileRows { tensor, rows, lane })| {
                rows.enumerate().map(move |(i, row)| (tensor, row, tile * LANES + lane + i))
            })
            .collect()
    }

    #[test]
    fn heads_are_split_in_halves() {
        for head_dim in [2, 16, 20, 22, 24, 32, 34, 64, 80, 128] {
            let (padded, half) = (padded_head_dim(head_dim), head_dim / 2);
            let place = |row: usize| {
                let i = row % head_dim;
                row / head_dim * padded + if i < half { i } else { padded / 2 + i - half }
            };
            let heads = [("q", 3), ("k", 2), ("v", 2)].map(|(name, heads)| (name, heads * head_dim));
            let item = item(parts(&heads), 7 * head_dim, Some(head_dim));
            let mut expected = Vec::new();
            for ((name, rows), before) in heads.into_iter().zip([0, 3, 5]) {
                expected.extend((0..rows).map(|row| (name, row, before * padded + place(row))));
            }
            assert_eq!(places(&item), expected, "head_dim {head_dim}");
            for run in column_runs(5 * head_dim, Some(head_dim)) {
                for i in 0..run.length {
                    assert_eq!(place(run.from + i), run.to + i, "head_dim {head_dim}");
                }
            }
        }
    }

    #[test]
    fn gate_and_up_alternate() {
        let item = item(Arrangement::GateUp { gate: "gate".into(), up: "up".into() }, 2 * 20, None);
        let mut expected = Vec::new();
        expected.extend((0..16).map(|row| ("gate", row, row)));
        expected.extend((0..16).map(|row| ("up", row, 16 + row)));
        expected.extend((16..20).map(|row| ("gate", row, 16 + row)));
        expected.extend((16..20).map(|row| ("up", row, 32 + row)));
        assert_eq!(places(&item), expected);
    }

    #[test]
    fn parts_without_heads_share_tiles() {
        let item = item(parts(&[("a", 20), ("b", 3), ("c", 30)]), 53, None);
        let mut expected = Vec::new();
        expected.extend((0..20).map(|row| ("a", row, row)));
        expected.extend((0..3).map(|row| ("b", row, 20 + row)));
        expected.extend((0..30).map(|row| ("c", row, 23 + row)));
        assert_eq!(places(&item), expected);
    }
}
