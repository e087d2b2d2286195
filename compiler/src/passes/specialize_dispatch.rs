//! Fits the way of tokens to their experts to the mode of the graph.
//!
//! In decode there is one token: the rows of its k experts become one range, which the workers share.
//!
//! ```text
//! %3, %4 = top_k %2 {k=2, selection=scan} : i32[T, 2], f32[T, 2]                  // selection=network
//! %5 = expert_gate_up %1, %3, @gate_up {dispatch=general} : f32[T, 2, 96]         // dispatch=decode
//! %6 = expert_down_add %5, %3, %4, @down, %0 {dispatch=general} : f32[T, 64]      // dispatch=decode
//! ```
//!
//! In a batch the (token, slot) pairs are sorted by expert, so that each expert's weights are read once for all its tokens:
//!
//! ```text
//! %3, %4 = top_k %2 {k=2, selection=network} : i32[T, 2], f32[T, 2]
//! %5 = sort_by_expert %3 {count=8} : i32[T, 2]
//! %6 = expert_gate_up %1, %3, @gate_up {dispatch=grouped, order=%5} : f32[T, 2, 96]
//! %7 = expert_down_add %6, %3, %4, @down, %0 {dispatch=grouped, order=%5} : f32[T, 64]
//! ```
//!
//! In both, the two best of at most 16 experts are found by a fixed network of comparisons; other k and more experts keep the scan.
//!
//! What it does not do: touch products that [`super::fuse_gate_up`] and [`super::fuse_residual`] have not fused; those take
//! one (token, slot) after another.

use moec_ir::graph::{Dispatch, Graph, Mode, NodeId, Op, Patch, PatchError, Selection, ValueId};

use super::Rewriter;

/// Experts up to which two of them are chosen by a network.
const NETWORK_LIMIT: usize = 16;

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(specialize)
}

/// The operation with another dispatch, if it has a general one.
fn dispatched(op: &Op, dispatch: Dispatch, order: Option<ValueId>) -> Option<Op> {
    if let &Op::ExpertGateUp { x, experts, w, activation, dispatch: Dispatch::General, order: None } = op {
        return Some(Op::ExpertGateUp { x, experts, w, activation, dispatch, order });
    }
    let &Op::ExpertDownAdd { h, experts, weights, w, residual, dispatch: Dispatch::General, order: None } = op else {
        return None;
    };
    Some(Op::ExpertDownAdd { h, experts, weights, w, residual, dispatch, order })
}

fn specialize(graph: &Graph, node: NodeId) -> Result<Option<Patch>, PatchError> {
    let &Op::TopK { logits, k, selection, scores } = graph.op(node) else { return Ok(None) };
    let experts = graph.results(node)[0];
    let count = graph.ty(logits).columns().unwrap_or(0);
    let network = selection == Selection::Scan && k == 2 && count <= NETWORK_LIMIT;
    let is_general = |&user: &NodeId| dispatched(graph.op(user), Dispatch::General, None).is_some();
    let general: Vec<NodeId> = graph.uses(experts).into_iter().filter(is_general).collect();
    if !network && general.is_empty() {
        return Ok(None);
    }
    let before = general.first().copied().unwrap_or(node);
    let mut patch = Patch::new(graph, before, format!("choice {experts} of {k} among {count} experts"));
    if network {
        patch.change(node, Op::TopK { logits, k, selection: Selection::Network, scores });
    }
    let (dispatch, order) = match graph.mode() {
        Mode::Decode => (Dispatch::Decode, None),
        Mode::Batch if general.is_empty() => (Dispatch::General, None),
        Mode::Batch => (Dispatch::Grouped, Some(patch.insert_one(Op::SortByExpert { experts, count })?)),
    };
    for user in general {
        if let Some(op) = dispatched(graph.op(user), dispatch, order) {
            patch.change(user, op);
        }
    }
    Ok(Some(patch))
}
