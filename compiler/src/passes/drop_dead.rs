//! Removes nodes whose results nobody reads, and weights that no node and no composed weight reads.
//!
//! ```text
//! @scores : f32[8, 64] router                         // gone
//! %2 = matmul %1, @scores : f32[T, 8]                 // gone
//! %3, %4 = top_k %2 {k=2, selection=scan} : …         // gone
//! output %9
//! ```
//!
//! Passes remove what they replace, unless something else reads it too, so in graphs that import builds there is nothing left
//! to drop: this is for graphs written by hand, and for what a later pass may leave.
//!
//! What it does not do: narrow a node of which only some results are read.

use moec_ir::graph::{Op, Patch, PatchError};

use super::Rewriter;

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    // Backwards, so that what only dead nodes read is dead when its turn comes.
    for node in rewriter.graph.nodes().rev().collect::<Vec<_>>() {
        let graph = &*rewriter.graph;
        let is_read = graph.results(node).iter().any(|&result| graph.is_used(result));
        if is_read || matches!(graph.op(node), Op::Output { .. }) {
            continue;
        }
        let names: Vec<String> = graph.results(node).iter().map(|result| result.to_string()).collect();
        let mut patch = Patch::new(graph, node, format!("{} of {}", names.join(", "), graph.op(node).name()));
        patch.retire(node);
        rewriter.apply(patch)?;
    }
    // The parts of a composed weight come before it.
    for (weight, name) in
        rewriter.graph.weights().map(|(id, w)| (id, w.name.clone())).collect::<Vec<_>>().into_iter().rev()
    {
        let Some(first) = rewriter.graph.nodes().next() else { break };
        if !rewriter.graph.is_weight_read(weight) {
            let mut patch = Patch::new(rewriter.graph, first, format!("@{name}"));
            patch.retire_weight(weight);
            rewriter.apply(patch)?;
        }
    }
    Ok(())
}
