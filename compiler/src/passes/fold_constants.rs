//! Drops slices and choices that can have only one outcome.
//!
//! ```text
//! %1 = slice %0 {start=0, len=64} : f32[T, 64]        // all of f32[T, 64]: gone, %0 is read
//!
//! %1 = slice %0 {start=16, len=32} : f32[T, 32]
//! %2 = slice %1 {start=8, len=8} : f32[T, 8]          // becomes: slice %0 {start=24, len=8}
//! ```
//!
//! The router of a model with one expert always chooses that one, with the weight exp(0) / exp(0) = 1:
//!
//! ```text
//! %2 = matmul %1, @router : f32[T, 1]                 // these two are left to drop_dead
//! %3, %4 = top_k %2 {k=1, selection=scan} : i32[T, 1], f32[T, 1]
//! %5 = expert_matmul %1, %3, @gate : f32[T, 1, 96]    // %5 = matmul %1, @gate.only : f32[T, 96]
//! %6 = expert_matmul %1, %3, @up : f32[T, 1, 96]      // …
//! %7 = silu %5 : f32[T, 1, 96]
//! %8 = mul %7, %6 : f32[T, 1, 96]
//! %9 = expert_matmul %8, %3, @down : f32[T, 1, 64]
//! %10 = expert_combine %9, %4 : f32[T, 64]            // %9 = matmul %8, @down.only : f32[T, 64]
//! ```
//!
//! What it does not do: arithmetic on weights' numbers, which a graph does not know; and nothing that would round differently.

use moec_ir::graph::{Graph, NodeId, Op, Patch, PatchError, Source, ValueId, Weight, WeightId};

use super::Rewriter;

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(|graph, node| match *graph.op(node) {
        Op::Slice { x, start, len } => slice(graph, node, x, start, len),
        Op::ExpertCombine { y, weights } => only_expert(graph, node, y, weights),
        _ => Ok(None),
    })
}

fn slice(graph: &Graph, node: NodeId, x: ValueId, start: usize, len: usize) -> Result<Option<Patch>, PatchError> {
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

/// A product with the matrix of an expert that `choice` made.
struct Product {
    node: NodeId,
    x: ValueId,
    w: WeightId,
}

fn product(graph: &Graph, value: ValueId, choice: NodeId) -> Option<Product> {
    let node = graph.producer(value);
    let &Op::ExpertMatmul { x, experts, w } = graph.op(node) else { return None };
    (graph.producer(experts) == choice).then_some(Product { node, x, w })
}

fn only_expert(graph: &Graph, node: NodeId, y: ValueId, weights: ValueId) -> Result<Option<Patch>, PatchError> {
    let choice = graph.producer(weights);
    let &Op::TopK { logits, k: 1, .. } = graph.op(choice) else { return Ok(None) };
    if graph.ty(logits).columns() != Some(1) {
        return Ok(None);
    }
    let Some(down) = product(graph, y, choice) else { return Ok(None) };
    let product_node = graph.producer(down.x);
    let &Op::Mul { a, b } = graph.op(product_node) else { return Ok(None) };
    let &Op::Silu { x: gate } = graph.definition(a) else { return Ok(None) };
    let (Some(gate), Some(up)) = (product(graph, gate, choice), product(graph, b, choice)) else { return Ok(None) };
    if [gate.x, up.x].iter().any(|&x| graph.ty(x).shape.len() != 2) {
        return Ok(None);
    }
    let mut patch = Patch::new(graph, node, format!("{y} is of the only expert"));
    let w = patch.weight(only_matrix(graph, gate.w))?;
    let g = patch.insert_one(Op::Matmul { x: gate.x, w })?;
    let w = patch.weight(only_matrix(graph, up.w))?;
    let u = patch.insert_one(Op::Matmul { x: up.x, w })?;
    let s = patch.insert_one(Op::Silu { x: g })?;
    let h = patch.insert_one(Op::Mul { a: s, b: u })?;
    let w = patch.weight(only_matrix(graph, down.w))?;
    let d = patch.insert_one(Op::Matmul { x: h, w })?;
    patch.replace(graph.results(node)[0], d);
    for retired in [node, down.node, product_node, graph.producer(a), gate.node, up.node] {
        patch.retire(retired);
    }
    Ok(Some(patch))
}

/// The only matrix of `[1, rows, columns]` as `[rows, columns]`.
fn only_matrix(graph: &Graph, experts: WeightId) -> Weight {
    let all = graph.weight(experts);
    let shape = vec![all.rows(), all.columns()];
    Weight { name: format!("{}.only", all.name), shape, source: Source::Rows(vec![experts]), ..all.clone() }
}
