//! How kernels are best written for a CPU: the choices that change speed and never a bit.
//!
//! A matrix product keeps `rows × tokens` sums in registers. More tokens share each weight that is loaded and expanded; more row tiles share each
//! activation that is broadcast. What fits and what is short differs from CPU to CPU, and from shape to shape. A [`Tuning`] has choices for whole
//! kinds of products, and for shapes that were measured choices of their own. Deliberately absent: measuring, and what the
//! numbers of a model are.

use crate::kernels::{Epilogue, MatmulTuning};
use crate::lower::wide::{Cpu, table::Width};
use crate::plan::layout::Format;
use std::collections::BTreeMap;
use std::fmt;

/// The shape of the sums that one call of a matrix product computes together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tile {
    /// Tiles of 16 rows.
    pub rows: usize,
    /// Tokens.
    pub tokens: usize,
}

/// What products are tuned by: all with the same three have the same kernels, but for strides.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ProductShape {
    /// The weight's format.
    pub format: Format,
    /// Its columns as laid out.
    pub k: usize,
    /// What becomes of the sums.
    pub epilogue: Epilogue,
}

impl fmt::Display for ProductShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ProductShape { format, k, epilogue } = self;
        write!(f, "{format} k={k} {}", epilogue.name())
    }
}

/// Choices for products of one shape.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProductTuning {
    /// How the kernels for 1, 2, … tokens at once are written; as many as there are, tokens are taken at a time.
    pub kernels: Vec<MatmulTuning>,
    /// Tiles of rows that are gone through for one walk over the tokens.
    pub block: usize,
    /// Bytes of activations that are gone through for one block of rows, so that they stay in the cache.
    pub activation_bytes: usize,
}

impl ProductTuning {
    /// Tokens taken at a time.
    pub fn tokens(&self) -> usize {
        self.kernels.len()
    }

    /// How the kernel for `tokens` tokens at once is written.
    pub fn kernel(&self, tokens: usize) -> MatmulTuning {
        self.kernels[tokens - 1]
    }
}

/// Choices for one CPU level.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// For products of quantized weights.
    pub quantized: Tile,
    /// For products of float weights.
    pub float: Tile,
    /// Row tiles computed together for a single token.
    pub single_rows: usize,
    /// Bytes of activations that are gone through for one tile of rows, so that they stay in the cache.
    pub activation_bytes: usize,
    /// For shapes that were measured, instead of all of the above.
    pub products: BTreeMap<ProductShape, ProductTuning>,
}

impl Tuning {
    /// For kernels in 128-bit registers, by Cranelift.
    pub const NARROW: Tuning = Tuning {
        quantized: Tile { rows: 1, tokens: 2 },
        float: Tile { rows: 1, tokens: 2 },
        single_rows: 1,
        activation_bytes: 2 << 20,
        products: BTreeMap::new(),
    };

    /// For kernels of the wide x86 back end.
    pub fn wide(cpu: Cpu) -> Tuning {
        let (tile, single_rows) = match cpu.width {
            Width::Ymm => (Tile { rows: 1, tokens: 6 }, 1),
            // Two row tiles share each broadcast, for which there are as many ports as for multiply-adds.
            Width::Zmm => (Tile { rows: 2, tokens: 6 }, 2),
        };
        Tuning { quantized: tile, float: tile, single_rows, ..Tuning::NARROW }
    }

    /// The choices for products of a shape: those that were measured, or else those of its kind.
    pub fn product(&self, shape: ProductShape) -> ProductTuning {
        if let Some(measured) = self.products.get(&shape) {
            return measured.clone();
        }
        let tile = if shape.format.is_quantized() { self.quantized } else { self.float };
        let rows = |tokens: usize| if tokens == 1 { self.single_rows } else { tile.rows };
        let kernel = |tokens| MatmulTuning { tiles: rows(tokens), ..MatmulTuning::plain(shape.format) };
        ProductTuning {
            kernels: (1..=tile.tokens).map(kernel).collect(),
            block: tile.rows,
            activation_bytes: self.activation_bytes,
        }
    }
}
