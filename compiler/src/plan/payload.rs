//! The payload's map: every weight's format, arrangement and place.
//!
//! ```text
//! [ header, one page | weights, each 4096-aligned | rope tables | metadata (JSON) | tokenizer.json ]
//! ```
//! Weights come in the order in which a step reads them. Deliberately absent: their bytes ([`crate::emit::pack`]).

use super::PlanError;
use super::layout::Format;
use moec_abi::{LANES, PAYLOAD_ALIGN, PayloadHeader, ROW_ALIGN, padded_head_dim, round_up};
use moec_ir::graph::Role;
use std::fmt;

/// How the elements of a weight are arranged.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Arrangement {
    /// Row-major, `[rows][columns]` without padding; 64 readable bytes follow.
    Table,
    /// One f32 vector, its heads padded if it has any, and the whole padded with zeros to a multiple of [`ROW_ALIGN`].
    Vector,
    /// Tiles of 16 rows.
    Tiles {
        /// The tensors of the model whose rows come one below the other, with their rows.
        parts: Vec<Part>,
    },
    /// Tiles of 16 rows: of the first tensor, of the second, of the first, … for each expert.
    GateUp {
        /// The gate's tensor.
        gate: String,
        /// The up projection's.
        up: String,
    },
    /// The cosines or sines of the rotary embedding: f32 `[context][half a padded head]`.
    RopeTable {
        /// Whether the sines.
        sine: bool,
    },
    /// Where each expert's matrices lie among those of its layer: u32 `[layers][experts]`.
    ExpertPlaces {
        /// For each layer, by expert.
        places: Vec<Vec<u32>>,
    },
}

/// A tensor that gives some of a tiled weight's rows.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Part {
    /// Its name in the model.
    pub tensor: String,
    /// Its rows.
    pub rows: usize,
}

/// One weight of the payload.
#[derive(Clone, PartialEq, Debug)]
pub struct PayloadItem {
    /// Unique; the graph's name of the weight.
    pub name: String,
    /// The graph's name of another weight that is the same numbers: the output that is tied to an embedding of the same format.
    pub shared: Option<String>,
    /// What it is for; `None` for tables that moec computes.
    pub role: Option<Role>,
    /// How its elements are stored.
    pub format: Format,
    /// Where each goes.
    pub arrangement: Arrangement,
    /// Matrices of this shape: 1 unless the weight has experts.
    pub experts: usize,
    /// Of a weight with experts: which choice of experts, by number of the layer, is among its matrices.
    pub router: Option<usize>,
    /// The experts whose matrices they are, in the order in which these lie, when they are not all in their own.
    pub order: Option<Vec<usize>>,
    /// Rows of one matrix in the model.
    pub rows: usize,
    /// Columns in the model.
    pub columns: usize,
    /// The size of the heads that its rows are divided into, each padded as [`padded_head_dim`] says.
    pub row_heads: Option<usize>,
    /// The size of the heads that its columns are divided into, padded alike.
    pub column_heads: Option<usize>,
    /// Bytes from the payload's start.
    pub offset: usize,
}

fn padded(n: usize, heads: Option<usize>) -> usize {
    heads.map_or(n, |dim| n / dim * padded_head_dim(dim))
}

impl PayloadItem {
    /// Columns as laid out: the K of the kernels.
    pub fn k(&self) -> usize {
        padded(self.columns, self.column_heads)
    }

    /// Rows of one matrix as laid out; a multiple of 16 for tiles.
    pub fn padded_rows(&self) -> usize {
        match self.arrangement {
            Arrangement::Tiles { .. } => round_up(padded(self.rows, self.row_heads), LANES),
            Arrangement::GateUp { .. } => 2 * round_up(self.rows / 2, LANES),
            Arrangement::Table
            | Arrangement::Vector
            | Arrangement::RopeTable { .. }
            | Arrangement::ExpertPlaces { .. } => self.rows,
        }
    }

    /// Bytes from one tile to the next.
    pub fn tile_bytes(&self) -> usize {
        self.format.tile_bytes(self.k())
    }

    /// Bytes from one row of a table to the next.
    pub fn row_bytes(&self) -> usize {
        self.columns * self.format.element_bytes().expect("tables hold floats")
    }

    /// Bytes from one expert's matrix to the next.
    pub fn expert_bytes(&self) -> usize {
        let one = match self.arrangement {
            Arrangement::Table | Arrangement::RopeTable { .. } | Arrangement::ExpertPlaces { .. } => {
                self.rows * self.row_bytes() + 64
            }
            Arrangement::Vector => round_up(self.k(), ROW_ALIGN) * 4,
            Arrangement::Tiles { .. } | Arrangement::GateUp { .. } => self.padded_rows() / LANES * self.tile_bytes(),
        };
        round_up(one, PAYLOAD_ALIGN)
    }

    /// What it is for, in words: all its roles.
    pub fn purpose(&self) -> String {
        let role = self.role.map_or("tables", Role::name);
        match &self.shared {
            Some(_) => format!("{role} and {}", Role::Output),
            None => role.to_string(),
        }
    }

    /// Whether its products are the logits: the output's, or the embedding's that the output shares.
    pub fn gives_logits(&self) -> bool {
        self.role == Some(Role::Output) || self.shared.is_some()
    }

    /// The experts whose matrices they are, in the order in which these lie.
    pub fn members(&self) -> Vec<usize> {
        self.order.clone().unwrap_or_else(|| (0..self.experts).collect())
    }

    /// Where the matrix of an expert lies among those that are here.
    pub fn place_of(&self, expert: usize) -> usize {
        match &self.order {
            None => expert,
            Some(order) => order.iter().position(|&e| e == expert).expect("the expert is one of these"),
        }
    }

    /// All its bytes.
    pub fn bytes(&self) -> usize {
        self.experts * self.expert_bytes()
    }
}

impl fmt::Display for PayloadItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PayloadItem { name, format, experts, rows, columns, offset, .. } = self;
        write!(f, "@{name}: {format} [")?;
        if self.router.is_some() {
            write!(f, "{experts}, ")?;
        }
        write!(f, "{rows}, {columns}] at {offset}, {} bytes, ", self.bytes())?;
        if let Some(other) = &self.shared {
            write!(f, "also @{other}, ")?;
        }
        match &self.arrangement {
            Arrangement::Table => write!(f, "rows"),
            Arrangement::Vector => write!(f, "vector"),
            Arrangement::Tiles { parts } if parts.len() == 1 => write!(f, "tiles"),
            Arrangement::Tiles { parts } => {
                let names: Vec<&str> = parts.iter().map(|p| p.tensor.as_str()).collect();
                write!(f, "tiles of {}", names.join(" + "))
            }
            Arrangement::GateUp { gate, up } => write!(f, "tiles of {gate} and {up} in turn"),
            Arrangement::RopeTable { sine } => write!(f, "{}", if *sine { "sines" } else { "cosines" }),
            Arrangement::ExpertPlaces { places } => write!(f, "places of experts {places:?}"),
        }?;
        if let Some(order) = &self.order {
            write!(f, ", experts {order:?} in this order")?;
        }
        if let Some(dim) = self.row_heads {
            write!(f, ", rows in heads of {dim}")?;
        }
        if let Some(dim) = self.column_heads {
            write!(f, ", columns in heads of {dim}")?;
        }
        Ok(())
    }
}

/// The payload's map.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct PayloadMap {
    /// The weights, by offset.
    pub items: Vec<PayloadItem>,
    /// Where the weights end and the metadata begins.
    pub weights_end: usize,
    /// Size of the whole payload, metadata and tokenizer included, a multiple of [`PAYLOAD_ALIGN`]; known once they are placed.
    pub bytes: usize,
    /// Where the metadata begins, and its length.
    pub metadata: (usize, usize),
    /// Where the tokenizer begins, and its length.
    pub tokenizer: (usize, usize),
}

impl PayloadMap {
    /// Appends an item at the next free place, or checks that the item of that name is the same; returns its index.
    ///
    /// # Errors
    /// When another item of that name differs.
    pub fn place(&mut self, mut item: PayloadItem) -> Result<usize, PlanError> {
        if let Some(index) = self.items.iter().position(|i| i.name == item.name) {
            item.offset = self.items[index].offset;
            item.shared.clone_from(&self.items[index].shared);
            return if self.items[index] == item { Ok(index) } else { Err(PlanError::TwoLayouts(item.name)) };
        }
        item.offset = self.weights_end.max(round_up(size_of::<PayloadHeader>(), PAYLOAD_ALIGN));
        self.weights_end = item.offset + item.bytes();
        self.items.push(item);
        Ok(self.items.len() - 1)
    }

    /// Lets `item`, the output of a model that is tied to its embedding, have the place of that, when that is tiles of the same format; whether it
    /// has.
    pub fn share(&mut self, item: &PayloadItem) -> bool {
        let same = |other: &&mut PayloadItem| {
            other.role == Some(Role::Embedding)
                && matches!(other.arrangement, Arrangement::Tiles { .. })
                && (other.format, other.rows, other.columns) == (item.format, item.rows, item.columns)
        };
        let other = self.items.iter_mut().find(same);
        other.map(|other| other.shared = Some(item.name.clone())).is_some()
    }

    /// The index of the weight that the graph knows by this name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.items.iter().position(|item| item.name == name || item.shared.as_deref() == Some(name))
    }

    /// Places what follows the weights; `metadata` and `tokenizer` are lengths in bytes. The metadata gets room to grow to the next page.
    pub fn seal(&mut self, metadata: usize, tokenizer: usize) {
        self.metadata = (self.weights_end, metadata);
        self.tokenizer = (round_up(self.weights_end + metadata, PAYLOAD_ALIGN), tokenizer);
        self.bytes = round_up(self.tokenizer.0 + tokenizer, PAYLOAD_ALIGN);
    }
}

impl fmt::Display for PayloadMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for item in &self.items {
            writeln!(f, "{item}")?;
        }
        writeln!(f, "weights end at {}", self.weights_end)
    }
}
