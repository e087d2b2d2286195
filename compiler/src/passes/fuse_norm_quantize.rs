//! Quantizes normed rows while they are at hand.
//!
//! ```text
//! %1 = rms_norm %0, @norm {eps=1e-5} : f32[T, 64]      // %1, %2 = norm_quantize %0, @norm {eps=1e-5} : q8[T, 64], f32[T, 64]
//! %2 = quantize %1 : q8[T, 64]
//! ```
//!
//! Whoever reads the norm as f32 (a router) reads the second result; when nobody does, it is not written to memory.
//!
//! What it does not do: move the norm into the projection itself, which would norm the same rows once for each worker.

use moec_ir::graph::{Graph, NodeId, Op, Patch, PatchError};

use super::Rewriter;

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(fuse)
}

fn fuse(graph: &Graph, node: NodeId) -> Result<Option<Patch>, PatchError> {
    let &Op::Quantize { x: normed } = graph.op(node) else { return Ok(None) };
    let &Op::RmsNorm { x, w, eps } = graph.definition(normed) else { return Ok(None) };
    let norm = graph.producer(normed);
    let mut patch = Patch::new(graph, norm, format!("@{}", graph.weight(w).name));
    let fused = patch.insert(Op::NormQuantize { x, w, eps })?;
    patch.replace(graph.results(node)[0], fused[0]);
    patch.replace(normed, fused[1]);
    patch.retire(norm);
    patch.retire(node);
    Ok(Some(patch))
}
