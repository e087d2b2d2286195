//! Kernel generators: Rust functions from a shape and a tuning choice to tile IR.
//!
//! The plan decides which kernels a model needs and collects them as a set of [`Kernel`]; each is generated once, lowered for
//! every CPU level, and called from the step with addresses and counts. Every shape and stride is an immediate of the code.
//! One family a file; the table below names them all, and dispatch, tests and benchmarks follow from its rows. Sums are
//! taken in the order that the numerics contract fixes, so that tuning never changes a bit.
//!
//! Deliberately absent: who calls a kernel with what, and how work is divided between workers (the plan); CPU-specific code
//! (the lowerings).

mod attention;
mod combine;
mod common;
mod elementwise;
mod embed;
mod embed_tile;
mod gate;
mod interleave;
mod matmul;
mod norm;
mod rope;
mod router;
mod scales;
mod soft_cap;

pub use attention::{Attention, Together};
pub use combine::Combine;
pub use elementwise::{Elementwise, ElementwiseOp};
pub use embed::Embed;
pub use embed_tile::EmbedTile;
pub use gate::GateRow;
pub use interleave::Interleave;
pub use matmul::{Dot, Epilogue, FEW_TOKENS, MAX_TOKENS, Matmul, MatmulTuning, Part, Prefetch};
pub use norm::{Norm, Outputs, Quantize};
pub use rope::{Rope, StoreKey, StoreValue};
pub use router::{SortByExpert, TopK};
pub use soft_cap::SoftCap;

use std::fmt;

use moec_abi::{PAGE_TOKENS, padded_head_dim};
use moec_ir::tile::{Function, Memory};

/// The element type of the KV cache.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum KvFormat {
    /// IEEE half, rounded to nearest even when stored.
    F16,
    /// IEEE single.
    F32,
}

impl KvFormat {
    /// How the tile IR loads and stores it.
    pub const fn memory(self) -> Memory {
        match self {
            KvFormat::F16 => Memory::F16,
            KvFormat::F32 => Memory::F32,
        }
    }

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        self.memory().bytes()
    }

    /// Bytes of one head's keys in a page; its values, which follow them, take as many.
    pub const fn key_bytes(self, head_dim: usize) -> usize {
        PAGE_TOKENS * padded_head_dim(head_dim) * self.bytes()
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.memory().name())
    }
}

/// Defines [`Kernel`] from one row for each family.
macro_rules! kernel_table {
    ($($(#[$doc:meta])* $family:ident,)*) => {
        /// A kernel that a model may need.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Kernel {
            $($(#[$doc])* $family($family),)*
        }

        impl Kernel {
            /// The families' names, in the table's order.
            pub const FAMILIES: &[&str] = &[$(stringify!($family)),*];

            /// The family's name.
            pub fn family(&self) -> &'static str {
                match self {
                    $(Kernel::$family(_) => stringify!($family),)*
                }
            }

            /// An identifier, unique among the kernels of one model.
            pub fn name(&self) -> String {
                match self {
                    $(Kernel::$family(k) => k.name(),)*
                }
            }

            /// The parameters' names, in order; each is an Int.
            pub fn params(&self) -> &'static [&'static str] {
                match self {
                    $(Kernel::$family(k) => k.params(),)*
                }
            }

            /// The code.
            pub fn generate(&self) -> Function {
                match self {
                    $(Kernel::$family(k) => k.generate(),)*
                }
            }
        }

        $(impl From<$family> for Kernel {
            fn from(k: $family) -> Kernel {
                Kernel::$family(k)
            }
        })*
    };
}

kernel_table! {
    /// Row tiles of a weight times a few activation rows, with an epilogue.
    Matmul,
    /// Activation rows word by word beside each other.
    Interleave,
    /// RMS norm of one row, optionally quantized.
    Norm,
    /// Quantizes one activation row.
    Quantize,
    /// Rotates heads by position, in place.
    Rope,
    /// Rotates one key head and stores it in a KV page.
    StoreKey,
    /// Stores one value head in a KV page.
    StoreValue,
    /// The query heads of one KV head, of one token or a few, against the cached keys and values.
    Attention,
    /// Widens one row of the embedding table.
    Embed,
    /// One row of a quantized embedding table as f32.
    EmbedTile,
    /// The chosen experts of one token, and their weights.
    TopK,
    /// Stable counting sort of (token, slot) by expert.
    SortByExpert,
    /// Adds the weighted outputs of the chosen experts to the residual stream.
    Combine,
    /// One elementary operation on rows.
    Elementwise,
    /// Multiplies a row by the sigmoid of its gate.
    GateRow,
    /// Soft-caps a row.
    SoftCap,
}
