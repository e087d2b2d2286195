//! The wide x86 back end: a kernel in tile IR → machine code with one `zmm` or two `ymm` for a logical vector.
//!
//! Cranelift's x86-64 back end has no vectors over 128 bits. This is a small back end of its own, one phase a file, in this order:
//!
//! 1. [`select`]: tile IR → machine instructions ([`machine`]) over virtual registers, out of the [`table`];
//! 2. [`allocate`]: virtual registers → registers and spill slots, by regalloc2;
//! 3. [`encode`]: → bytes, by iced; [`listing`] prints them.
//!
//! Lanes are outputs, so the bits are those of every other lowering. Code keeps the System V convention. Deliberately
//! absent: calls, traps, unwinding, and any optimization that the order of the tile IR does not already say.

pub mod allocate;
pub mod encode;
pub mod listing;
pub mod machine;
mod registers;
pub mod select;
pub mod table;

use moec_abi::features::{AVX_VNNI, AVX2, AVX512, AVX512_VBMI, AVX512_VNNI, F16C, FMA};
use moec_ir::tile;

use super::backend::CompiledKernel;
use allocate::Allocatable;
use encode::{ALIGNMENT, Encoded, encode};
use select::{Selected, select};
use std::fmt;
use table::Width;

/// What the back end needs to know of a CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cpu {
    /// What holds a logical vector.
    pub width: Width,
    /// Whether there is `vpdpbusd` of that width.
    pub dot: bool,
    /// Whether there is `vpermb`, which needs no more than the low bits of an index.
    pub permute: bool,
}

impl Cpu {
    /// The CPU with these [`moec_abi::features`]; `None` when it has no vectors wider than 128 bits.
    pub fn new(features: u64) -> Option<Cpu> {
        let has = |all: u64| features & all == all;
        if has(AVX512) {
            let (dot, permute) = (has(AVX512_VNNI), has(AVX512_VBMI));
            return Some(Cpu { width: Width::Zmm, dot, permute });
        }
        has(AVX2 | FMA | F16C).then_some(Cpu { width: Width::Ymm, dot: has(AVX_VNNI), permute: false })
    }

    /// Whether dot products of signed bytes are faster than those of unsigned ones that are not small: without `vpdpbusd`, which takes no others; AVX-512 has no `vpsignb`.
    pub fn signs_bytes(self) -> bool {
        self.width == Width::Ymm && !self.dot
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registers = match self.width {
            Width::Ymm => "AVX2",
            Width::Zmm => "AVX-512",
        };
        let vnni = if self.dot { " with VNNI" } else { "" };
        write!(f, "{registers}{vnni}{}", if self.permute { " and VBMI" } else { "" })
    }
}

/// A kernel after all phases.
pub struct Compiled {
    /// After selection.
    pub selected: Selected,
    /// What the allocator found.
    pub output: regalloc2::Output,
    /// The bytes.
    pub encoded: Encoded,
}

/// Compiles `function`.
///
/// # Errors
/// What a phase cannot do, which is a bug in moec.
pub fn compile(function: &tile::Function, cpu: Cpu) -> Result<Compiled, String> {
    let selected = select(function, cpu);
    let allocatable = Allocatable::new(&selected.function);
    let output = allocatable.allocate()?;
    if cfg!(debug_assertions) {
        allocatable.check(&output)?;
    }
    let encoded = encode(&allocatable, &output)?;
    Ok(Compiled { selected, output, encoded })
}

/// Compiles `function` to finished bytes.
///
/// # Errors
/// As [`compile`].
pub fn compile_kernel(function: &tile::Function, cpu: Cpu) -> Result<CompiledKernel, String> {
    let compiled = compile(function, cpu)?;
    Ok(CompiledKernel { code: compiled.encoded.bytes, alignment: ALIGNMENT })
}

/// Proves the allocation of `function` with regalloc2's checker.
///
/// # Errors
/// Where a register does not hold the value that it should.
pub fn check_allocation(function: &tile::Function, cpu: Cpu) -> Result<(), String> {
    let selected = select(function, cpu);
    let allocatable = Allocatable::new(&selected.function);
    allocatable.check(&allocatable.allocate()?)
}
