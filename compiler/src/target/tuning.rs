//! How kernels are best written for a CPU: the choices that change speed and never a bit.
//!
//! A matrix product keeps `rows × tokens` sums in registers. More tokens share each weight that is loaded and expanded; more row tiles share each
//! activation that is broadcast. What fits and what is short differs from CPU to CPU. Deliberately absent: measuring, and what the
//! numbers of a model are.

use crate::lower::wide::{Cpu, table::Width};
use crate::plan::layout::Format;
use moec_abi::features::{AVX_VNNI, AVX512_BF16, AVX512_VBMI};

/// The shape of the sums that one call of a matrix product computes together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tile {
    /// Tiles of 16 rows.
    pub rows: usize,
    /// Tokens.
    pub tokens: usize,
}

/// Choices for one CPU level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// For products of quantized weights.
    pub quantized: Tile,
    /// For products of float weights.
    pub float: Tile,
    /// Row tiles computed together for a single token.
    pub single_rows: usize,
    /// Bytes of activations that are gone through for one tile of rows, so that they stay in the cache.
    pub activation_bytes: usize,
    /// Whether a product of several tokens prefetches the weights of the next tiles while it computes.
    pub prefetch: bool,
}

impl Tuning {
    /// For kernels in 128-bit registers, by Cranelift.
    pub const NARROW: Tuning = Tuning {
        quantized: Tile { rows: 1, tokens: 2 },
        float: Tile { rows: 1, tokens: 2 },
        single_rows: 1,
        activation_bytes: 2 << 20,
        prefetch: false,
    };

    /// For kernels of the wide x86 back end on a CPU with these [`moec_abi::features`].
    pub const fn wide(cpu: Cpu, features: u64) -> Tuning {
        match cpu.width {
            Width::Ymm => {
                Tuning { quantized: Tile { rows: 1, tokens: 6 }, float: Tile { rows: 1, tokens: 6 }, ..Tuning::NARROW }
            }
            Width::Zmm => Tuning {
                // Two row tiles share each broadcast, for which there are as many ports as for multiply-adds. Where those take two passes, ports are
                // not short, and sums that need no spilling are worth more.
                quantized: if is_zen4(features) { Tile { rows: 1, tokens: 8 } } else { Tile { rows: 2, tokens: 6 } },
                float: Tile { rows: 2, tokens: 6 },
                single_rows: 2,
                prefetch: true,
                ..Tuning::NARROW
            },
        }
    }

    /// The tile for weights of a format.
    pub const fn tile(&self, format: Format) -> Tile {
        if format.is_quantized() { self.quantized } else { self.float }
    }
}

/// Whether the features are those of Zen 4, the one CPU with AVX-512 whose 512-bit arithmetic takes two passes through 256-bit pipes.
const fn is_zen4(features: u64) -> bool {
    let all = AVX512_BF16 | AVX512_VBMI;
    features & all == all && features & AVX_VNNI == 0
}
