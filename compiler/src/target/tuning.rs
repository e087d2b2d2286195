//! How kernels are best written for a CPU: the choices that change speed and never a bit.
//!
//! A matrix product keeps `rows × tokens` sums in registers. More tokens share each weight that is loaded and expanded; more row tiles share each
//! activation that is broadcast. What fits and what is short differs from CPU to CPU, and from shape to shape. A [`Tuning`] has choices for whole
//! kinds of products, and for shapes that were measured choices of their own. Deliberately absent: measuring, and what the
//! numbers of a model are.

use crate::kernels::{Dot, Epilogue, FEW_TOKENS, Matmul, MatmulTuning, Prefetch};
use crate::lower::wide::{Cpu, table::Width};
use crate::plan::layout::{Format, GROUP};
use moec_abi::features::{AVX_VNNI, AVX512_BF16, AVX512_VBMI};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

/// Columns of a row so long that the second cache does not hold the activations of a few hundred tokens.
const LONG_ROW: usize = 8192;

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
    /// Columns, in whole groups, of which no more than so many are gone through at a time in a walk over tokens; 0 for all. All rows meet those before
    /// the next ones.
    pub columns: usize,
    /// Whether a walk over tokens prefetches the next block's weights, some of them with each tile of tokens.
    pub ahead: bool,
}

impl ProductTuning {
    /// Tokens taken at a time.
    pub fn tokens(&self) -> usize {
        self.kernels.len()
    }

    /// Units of a block, in a walk over tokens: at least one.
    pub fn block_units(&self, epilogue: Epilogue) -> usize {
        (self.block / epilogue.tiles()).max(1)
    }

    /// The parts of `k` columns that are gone through one after the other: of one size, but for the last.
    pub fn parts(&self, k: usize) -> Vec<Range<usize>> {
        let count = if self.columns == 0 { 1 } else { k.div_ceil(self.columns) };
        let size = k.div_ceil(count).next_multiple_of(GROUP);
        (0..k).step_by(size).map(|from| from..(from + size).min(k)).collect()
    }

    /// Tokens of one walk, whose activation rows of `k` columns have `stride` bytes: whole tiles, at least one.
    pub fn walk_tokens(&self, stride: usize, k: usize) -> usize {
        let bytes = (stride * self.parts(k)[0].len()).div_ceil(k);
        (self.activation_bytes / bytes / self.tokens()).max(1) * self.tokens()
    }

    /// A kernel as it is in a walk over tokens, which prefetches as a whole if it does.
    pub fn in_walk(&self, kernel: Matmul) -> Matmul {
        let prefetch = if self.ahead { Prefetch::None } else { kernel.tuning.prefetch };
        Matmul { fetch: self.ahead, tuning: MatmulTuning { prefetch, ..kernel.tuning }, ..kernel }
    }

    /// What the kernel for most tokens prefetches, as [`Tuning::many`] says.
    pub fn many(&self) -> Prefetch {
        self.kernels.last().map_or(Prefetch::None, |kernel| kernel.prefetch)
    }

    /// Changes what the kernel for most tokens prefetches, and with it those others for more than [`FEW_TOKENS`] tokens that prefetch the same.
    pub fn set_many(&mut self, prefetch: Prefetch) {
        let was = self.many();
        self.kernels
            .iter_mut()
            .skip(FEW_TOKENS)
            .filter(|kernel| kernel.prefetch == was)
            .for_each(|kernel| kernel.prefetch = prefetch);
    }

    /// How the kernel for `tokens` tokens at once is written where it goes through all rows by itself.
    pub fn kernel(&self, tokens: usize) -> MatmulTuning {
        self.kernels[tokens - 1]
    }
}

/// Choices for one CPU level.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// What products of codes are made of, but for those of small values if these have their own.
    pub dot: Dot,
    /// Whether products of small values are [`Dot::Small`].
    pub small: bool,
    /// For products of quantized weights.
    pub quantized: Tile,
    /// For products of float weights.
    pub float: Tile,
    /// Row tiles computed together for a single token.
    pub single_rows: usize,
    /// The same of products that are [`Dot::Small`], whose weights take more registers.
    pub small_single_rows: usize,
    /// Row tiles computed together for two tokens and up to [`few_tokens`](Tuning::few_tokens), at least; also gone through for one walk over the tokens.
    pub few_rows: usize,
    /// Most tokens of one call that has so many.
    pub few_tokens: usize,
    /// How many bytes ahead, in all of its row tiles together, a kernel for up to so many tokens prefetches. 0 leaves it to the CPU.
    pub few_ahead: usize,
    /// Query heads whose scores or sums attention holds in registers together.
    pub attention_rows: usize,
    /// Vectors of keys or of values for which each of so many has them.
    pub attention_vectors: usize,
    /// Bytes of activations that are gone through for one tile of rows, so that they stay in the cache.
    pub activation_bytes: usize,
    /// Columns, of more than [`LONG_ROW`], of which no more than so many are gone through at a time for all rows, by quantized weights; 0 for all.
    pub columns: usize,
    /// The same by float weights, whose activations are four times as large, of more columns than …
    pub float_columns: usize,
    /// … so many.
    pub float_long_row: usize,
    /// Tiles of rows, at least, for one walk over the tokens where columns are gone through in parts, which makes tiles short.
    pub part_block: usize,
    /// Whether a walk over tokens prefetches the next block's weights.
    pub ahead: bool,
    /// What a kernel for more than [`few_tokens`](Tuning::few_tokens) tokens prefetches in a call for all rows, and in a walk without
    /// [`ahead`](Tuning::ahead): it computes too long with each line for a CPU to fetch far enough ahead by itself.
    pub many: Prefetch,
    /// For shapes that were measured, instead of all of the above.
    pub products: BTreeMap<ProductShape, ProductTuning>,
}

impl Tuning {
    /// For kernels in 128-bit registers, by Cranelift.
    pub const NARROW: Tuning = Tuning {
        dot: Dot::Unsigned,
        small: false,
        quantized: Tile { rows: 1, tokens: 2 },
        float: Tile { rows: 1, tokens: 2 },
        single_rows: 1,
        small_single_rows: 1,
        few_rows: 1,
        few_tokens: FEW_TOKENS,
        few_ahead: 0,
        attention_rows: 2,
        attention_vectors: 2,
        activation_bytes: 2 << 20,
        columns: 0,
        float_columns: 0,
        float_long_row: LONG_ROW,
        part_block: 1,
        ahead: false,
        many: Prefetch::None,
        products: BTreeMap::new(),
    };

    /// For kernels of the wide x86 back end on a CPU with such a core.
    pub fn wide(cpu: Cpu, core: Core) -> Tuning {
        let dot = if cpu.signs_bytes() { Dot::Signed } else { Dot::Unsigned };
        let small = !cpu.dot;
        match cpu.width {
            Width::Ymm => Tuning {
                dot,
                small,
                // Four instructions for a dot product keep more in registers than one.
                quantized: Tile { rows: 1, tokens: if cpu.dot { 6 } else { 4 } },
                float: Tile { rows: 1, tokens: 6 },
                // Four streams of memory, but for weights that take the registers of two.
                single_rows: if cpu.dot { 1 } else { 4 },
                small_single_rows: 2,
                // Zen 3 gains 8 to 20 % by these two in prompts of up to 16 tokens, and nothing in long ones.
                few_ahead: if cpu.dot { 0 } else { 2048 },
                many: Prefetch::Ahead(if cpu.dot { 8192 } else { 2048 }),
                // Each load of keys or values makes two vectors, which four query heads share.
                attention_rows: 4,
                attention_vectors: 1,
                // So many columns of six tokens' activations fit the first cache.
                float_columns: 1024,
                float_long_row: 1024,
                part_block: 4,
                ..Tuning::NARROW
            },
            Width::Zmm => Tuning {
                dot,
                small,
                quantized: match core {
                    // Sums that need no spilling are worth more than what sharing saves.
                    Core::TwoPasses => Tile { rows: 1, tokens: 8 },
                    // Expanding weights takes the same two ports as multiply-adds: many tokens share it.
                    Core::TwoPorts => Tile { rows: 1, tokens: 14 },
                    // Two row tiles share each broadcast, for which there are as many ports as for multiply-adds.
                    Core::Wide => Tile { rows: 2, tokens: 6 },
                },
                // A core that computes twice as fast waits for what its second cache does not hold; so do Intel's, of f32, and of bytes if pages are small.
                columns: match core {
                    Core::TwoPasses => 0,
                    Core::TwoPorts => 7168,
                    Core::Wide => 1024,
                },
                float_columns: match core {
                    Core::TwoPasses => 0,
                    Core::TwoPorts => 2048,
                    Core::Wide => 1024,
                },
                part_block: if core == Core::Wide { 8 } else { 1 },
                float: match core {
                    // Widening weights takes the same two ports as well.
                    Core::TwoPorts => Tile { rows: 1, tokens: 14 },
                    Core::TwoPasses | Core::Wide => Tile { rows: 2, tokens: 6 },
                },
                // Of memory that is fast for a core, two streams are read faster than four.
                single_rows: if core == Core::Wide { 2 } else { 4 },
                small_single_rows: if core == Core::Wide { 2 } else { 4 },
                few_rows: 2,
                // Intel's cores fetch too little by themselves while they compute. Two tiles of some tokens are two streams, and share activations.
                few_tokens: if core == Core::TwoPorts { 7 } else { FEW_TOKENS },
                few_ahead: if core == Core::TwoPorts { 4096 } else { 0 },
                attention_rows: 8,
                // Zen 4 gains nothing by what walks prefetch, but 3 to 8 % in prompts of 8 to 40 tokens by kernels that prefetch farther ahead. Intel's cores
                // gain more by the next tiles in several streams, 10 to 20 % in prompts of 64 tokens in `q8`, than by the next block in one.
                ahead: core == Core::Wide,
                many: match core {
                    Core::TwoPasses => Prefetch::Ahead(8192),
                    Core::TwoPorts => Prefetch::Next(4),
                    Core::Wide => Prefetch::Ahead(2048),
                },
                ..Tuning::NARROW
            },
        }
    }

    /// What products of weights in `format` are made of.
    pub fn dot(&self, format: Format) -> Dot {
        if self.small && format.small().is_some() { Dot::Small } else { self.dot }
    }

    /// The choices for products of a shape: those that were measured, or else those of its kind.
    pub fn product(&self, shape: ProductShape) -> ProductTuning {
        if let Some(measured) = self.products.get(&shape) {
            return measured.clone();
        }
        let (tile, columns, long_row) = match shape.format.is_quantized() {
            true => (self.quantized, self.columns, LONG_ROW),
            false => (self.float, self.float_columns, self.float_long_row),
        };
        let rows = |tokens: usize| match tokens {
            1 if self.dot(shape.format) == Dot::Small => self.small_single_rows,
            1 => self.single_rows,
            _ if tokens <= self.few_tokens => tile.rows.max(self.few_rows),
            _ => tile.rows,
        };
        let prefetch = |tokens: usize| match self.few_ahead / rows(tokens) {
            _ if tokens > self.few_tokens => self.many,
            0 => Prefetch::None,
            bytes => Prefetch::Ahead(bytes),
        };
        let kernel = |tokens| MatmulTuning {
            tiles: rows(tokens),
            prefetch: prefetch(tokens),
            ..MatmulTuning::plain(shape.format)
        };
        let columns = if shape.k > long_row { columns } else { 0 };
        let block = tile.rows.max(self.few_rows);
        ProductTuning {
            kernels: (1..=tile.tokens).map(kernel).collect(),
            block: if columns > 0 { block.max(self.part_block) } else { block },
            activation_bytes: self.activation_bytes,
            columns,
            ahead: self.ahead,
        }
    }
}

/// What a core does with 512-bit arithmetic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Core {
    /// Takes two passes through pipes of 256 bits, as Zen 4 does.
    TwoPasses,
    /// Has two ports for all of it, as Intel's server cores do.
    TwoPorts,
    /// Has more ports than multiply-adds need, as Zen 5 does; also what is not known.
    Wide,
}

impl Core {
    /// The core of the CPU named `cpu`, if it is known, with these [`moec_abi::features`].
    pub fn of(cpu: Option<&str>, features: u64) -> Core {
        const TWO_PORTS: [&str; 6] =
            ["skylake-avx512", "cascadelake", "cooperlake", "icelake-server", "sapphirerapids", "graniterapids"];
        let like_zen4 = AVX512_BF16 | AVX512_VBMI;
        if cpu.is_some_and(|cpu| TWO_PORTS.contains(&cpu)) {
            Core::TwoPorts
        } else if features & (like_zen4 | AVX_VNNI) == like_zen4 {
            Core::TwoPasses
        } else {
            Core::Wide
        }
    }
}
