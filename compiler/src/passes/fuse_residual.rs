//! Adds the residual where the last projection of a block is computed.
//!
//! ```text
//! %7 = matmul %6, @layers.0.o : f32[T, 64]                // %7 = matmul_add %6, @layers.0.o, %0 : f32[T, 64]
//! %8 = add %0, %7 : f32[T, 64]
//!
//! %7 = expert_matmul %6, %3, @down : f32[T, 2, 64]        // %7 = expert_down_add %6, %3, %4, @down, %0
//! %8 = expert_combine %7, %4 : f32[T, 64]                 //     {dispatch=general} : f32[T, 64]
//! %9 = add %0, %8 : f32[T, 64]
//! ```
//!
//! What it does not do: fuse a product that something else reads too, or products for the router or the logits. Sums commute
//! to the bit, so the residual may be either operand.

use moec_ir::graph::{Dispatch, Graph, NodeId, Op, Patch, PatchError, Role, ValueId, WeightId};

use super::Rewriter;
use super::matching::only_reader;

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(|graph, node| {
        let &Op::Add { a, b } = graph.op(node) else { return Ok(None) };
        match fuse(graph, node, a, b)? {
            Some(patch) => Ok(Some(patch)),
            None => fuse(graph, node, b, a),
        }
    })
}

fn fuse(graph: &Graph, node: NodeId, residual: ValueId, y: ValueId) -> Result<Option<Patch>, PatchError> {
    if only_reader(graph, y).is_none() {
        return Ok(None);
    }
    let Some((op, w, inner)) = product(graph, residual, y) else { return Ok(None) };
    let weight = graph.weight(w);
    if !matches!(weight.role, Role::Attention | Role::Ffn | Role::Experts) {
        return Ok(None);
    }
    let mut patch = Patch::new(graph, node, format!("@{} and the residual {residual}", weight.name));
    let fused = patch.insert_one(op)?;
    patch.replace(graph.results(node)[0], fused);
    patch.retire(node);
    for value in [Some(y), inner].into_iter().flatten() {
        patch.retire(graph.producer(value));
    }
    Ok(Some(patch))
}

/// The fused operation for `residual + y`, its weight, and the value between the product and `y`, if there is one.
fn product(graph: &Graph, residual: ValueId, y: ValueId) -> Option<(Op, WeightId, Option<ValueId>)> {
    if let &Op::Matmul { x, w } = graph.definition(y) {
        return Some((Op::MatmulAdd { x, w, residual }, w, None));
    }
    let &Op::ExpertCombine { y: products, weights } = graph.definition(y) else { return None };
    let &Op::ExpertMatmul { x: h, experts, w } = graph.definition(products) else { return None };
    if only_reader(graph, products).is_none() || graph.ty(h).shape.len() != 3 {
        return None;
    }
    let (dispatch, order) = (Dispatch::General, None);
    Some((Op::ExpertDownAdd { h, experts, weights, w, residual, dispatch, order }, w, Some(products)))
}
