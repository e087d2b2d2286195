//! Drops windows and slices that leave everything as it is, and joins slices of slices.
//!
//! A window that the longest sequence does not outgrow hides no key (the context is in the graph's first line):
//!
//! ```text
//! graph decode fused context=4096 {
//!   …
//!   %3 = attention %1, %2 {layer=0, …, window=4096} : f32[T, 64]     // the same without window
//! ```
//!
//! ```text
//! %1 = slice %0 {start=0, len=64} : f32[T, 64]        // all of f32[T, 64]: gone, %0 is read
//!
//! %1 = slice %0 {start=16, len=32} : f32[T, 32]
//! %2 = slice %1 {start=8, len=8} : f32[T, 8]          // slice %0 {start=24, len=8} : f32[T, 8]
//! ```
//!
//! What it does not do: arithmetic on weights' numbers, which a graph does not know; and nothing that would round differently.

use moec_ir::graph::{Graph, NodeId, Op, Patch, PatchError};

use super::Rewriter;

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(|graph, node| match window(graph, node) {
        Some(patch) => Ok(Some(patch)),
        None => slice(graph, node),
    })
}

fn window(graph: &Graph, node: NodeId) -> Option<Patch> {
    let mut op = graph.op(node).clone();
    let Op::Attention { layer, window, .. } = &mut op else { return None };
    let keys = window.take()?;
    let context = graph.context().filter(|&context| context <= keys)?;
    let label = format!("the window of {keys} of layer {layer} in a context of {context}");
    let mut patch = Patch::new(graph, node, label);
    patch.change(node, op);
    Some(patch)
}

fn slice(graph: &Graph, node: NodeId) -> Result<Option<Patch>, PatchError> {
    let &Op::Slice { x, start, len } = graph.op(node) else { return Ok(None) };
    let result = graph.results(node)[0];
    if graph.ty(result) == graph.ty(x) {
        let mut patch = Patch::new(graph, node, format!("{result} is all of {x}"));
        patch.replace(result, x);
        patch.retire(node);
        return Ok(Some(patch));
    }
    let &Op::Slice { x: whole, start: outer, .. } = graph.definition(x) else { return Ok(None) };
    let mut patch = Patch::new(graph, node, format!("{result} is a slice of {whole}"));
    let folded = patch.insert_one(Op::Slice { x: whole, start: outer + start, len })?;
    patch.replace(result, folded);
    patch.retire(node);
    patch.retire(graph.producer(x));
    Ok(Some(patch))
}
