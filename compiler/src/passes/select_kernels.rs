//! Resolves layouts, and chooses a family of kernels for each operation on weights.
//!
//! ```text
//! @layers.0.o : bf16[64, 64] attention                // @layers.0.o : bf16[64, 64] attention as bf16
//! @layers.0.q : bf16[64, 64] attention as q8
//! %2 = matmul %1, @layers.0.o : f32[T, 64]            // %2 = matmul %1, @layers.0.o : f32[T, 64] by gemm_bf16
//! %3 = matmul %2, @layers.0.q : f32[T, 64]            // %3 = quantize %2 : q8[T, 64]
//!                                                     // %4 = matmul %3, @layers.0.q : f32[T, 64] by gemm_q8
//! ```
//!
//! Afterwards the graph is planned: every stage rule of the verifier holds. Quantized weights that still meet f32 rows (when
//! [`super::quantize_activations`] did not run) get a `quantize` of their own.
//!
//! What it does not do: choose tile sizes or CPU features; the plan knows machines, a graph does not.

use moec_ir::graph::{Kernel, PatchError, Stage};

use super::Rewriter;
use super::quantize_activations::{quantize, rows_to_quantize};

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    for id in rewriter.graph.weights().map(|(id, _)| id).collect::<Vec<_>>() {
        let weight = rewriter.graph.weight_mut(id);
        weight.layout = weight.format();
    }
    rewriter.each_node(|graph, node| match rows_to_quantize(graph, node) {
        Some(rows) => quantize(graph, node, rows, &[node]).map(Some),
        None => Ok(None),
    })?;
    for node in rewriter.graph.nodes().collect::<Vec<_>>() {
        let kernel = Kernel::of(rewriter.graph, rewriter.graph.op(node));
        rewriter.graph.set_kernel(node, kernel);
    }
    rewriter.graph.set_stage(Stage::Planned);
    Ok(())
}
