//! What a kernel is expected to cost, from its machine code: the model that proposes what is measured.
//!
//! A matrix product spends its time in one loop. Its instructions and the allocator's moves — spills above all — for each multiply-add say how well a tile
//! amortizes loads, expansion of codes and scales. Deliberately absent: latencies and ports, which measuring knows better.

use super::code::Compiler;
use crate::kernels::Matmul;
use crate::lower::backend::KernelBackend;
use crate::lower::wide::{self, Cpu};
use moec_abi::LANES;
use moec_ir::tile::Function;

/// The cost of a kernel's loop.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cost {
    /// Instructions and moves of the allocator for 1024 multiply-adds.
    pub instructions: f64,
    /// Moves that the allocator put into the loop.
    pub moves: usize,
}

/// Instructions of the longest run of code without a branch in a function, which is the loop that its time goes into, and the moves that the allocator put there;
/// `None` when it does not compile.
pub fn hot_loop(function: &Function, cpu: Cpu) -> Option<(usize, usize)> {
    let compiled = wide::compile(function, cpu).ok()?;
    let blocks = &compiled.selected.function.blocks;
    let hot = blocks.iter().max_by_key(|block| block.insts.len())?.insts.clone();
    let moves = compiled.output.edits.iter().filter(|(at, _)| hot.contains(&at.inst().index())).count();
    Some((hot.len(), moves))
}

/// The cost of `kernel`; `None` when it does not compile for this level, which more registers than there are can cause.
pub fn cost(compiler: &Compiler, kernel: &Matmul) -> Option<Cost> {
    let function = kernel.generate();
    let columns = if kernel.format.is_quantized() { crate::plan::layout::GROUP } else { 1 };
    let tiles = kernel.tuning.tiles.max(kernel.epilogue.tiles());
    // With one tile at a time the loop is there for each tile.
    let at_once = kernel.tuning.tiles.min(tiles);
    let multiply_adds = (at_once * LANES * columns * kernel.unroll() * kernel.tokens) as f64;
    match compiler.backend() {
        KernelBackend::Wide(cpu) => {
            let (instructions, moves) = hot_loop(&function, cpu)?;
            Some(Cost { instructions: 1024.0 * (instructions + moves) as f64 / multiply_adds, moves })
        }
        KernelBackend::Cranelift => {
            // Its code does not say what a spill is; its size does, and instructions of these machines have four to eight bytes.
            let bytes = compiler.kernel_bytes(&function)?;
            Some(Cost { instructions: 1024.0 * bytes as f64 / 4.0 / multiply_adds, moves: 0 })
        }
    }
}
