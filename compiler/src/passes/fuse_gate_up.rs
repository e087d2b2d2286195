//! Multiplies with gate and up at once, with the activation and the product in the epilogue.
//!
//! ```text
//! %2 = matmul %1, @layers.0.gate : f32[T, 96]    // @layers.0.gate_up … = gate_up(@layers.0.gate, @layers.0.up)
//! %3 = matmul %1, @layers.0.up : f32[T, 96]      // %2 = gate_up %1, @layers.0.gate_up : f32[T, 96]
//! %4 = silu %2 : f32[T, 96]
//! %5 = mul %4, %3 : f32[T, 96]
//! ```
//!
//! Likewise with `gelu`, which the result then names as its `activation`, and `expert_matmul`s with the same experts become an `expert_gate_up {dispatch=general}`.
//!
//! What it does not do: fuse weights that will lie in different formats, or products that something else reads too.

use moec_ir::graph::{Activation, Dispatch, Graph, NodeId, Op, Patch, PatchError, Source, ValueId, WeightId};

use super::Rewriter;
use super::matching::{compose, only_reader, sibling};

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(|graph, node| {
        let &Op::Mul { a, b } = graph.op(node) else { return Ok(None) };
        match fuse(graph, node, a, b)? {
            Some(patch) => Ok(Some(patch)),
            None => fuse(graph, node, b, a),
        }
    })
}

fn fuse(graph: &Graph, node: NodeId, activated: ValueId, up: ValueId) -> Result<Option<Patch>, PatchError> {
    let (gate, activation) = match *graph.definition(activated) {
        Op::Silu { x } => (x, Activation::Silu),
        Op::Gelu { x } => (x, Activation::Gelu),
        _ => return Ok(None),
    };
    if [activated, gate, up].iter().any(|&value| only_reader(graph, value).is_none()) {
        return Ok(None);
    }
    let Some((x, experts, parts)) = products(graph, gate, up) else { return Ok(None) };
    let [first, second] = parts.map(|part| graph.weight(part));
    if first.shape != second.shape {
        return Ok(None);
    }
    let mut shape = first.shape.clone();
    let rows = shape.len() - 2;
    shape[rows] *= 2;
    let name = sibling(&first.name, "gate_up");
    let source = Source::GateUp(parts[0], parts[1]);
    let Some(weight) = compose(graph, name, shape, &parts, source) else { return Ok(None) };
    let mut patch = Patch::new(graph, node, format!("@{} and @{}", first.name, second.name));
    let w = patch.weight(weight)?;
    let fused = patch.insert_one(match experts {
        None => Op::GateUp { x, w, activation },
        Some(experts) => Op::ExpertGateUp { x, experts, w, activation, dispatch: Dispatch::General, order: None },
    })?;
    patch.replace(graph.results(node)[0], fused);
    patch.retire(node);
    for value in [activated, gate, up] {
        patch.retire(graph.producer(value));
    }
    Ok(Some(patch))
}

/// The rows, the experts if any, and the weights of two products that differ in their weights only.
fn products(graph: &Graph, gate: ValueId, up: ValueId) -> Option<(ValueId, Option<ValueId>, [WeightId; 2])> {
    let (gate, up) = (graph.definition(gate), graph.definition(up));
    if let (&Op::Matmul { x, w: gate }, &Op::Matmul { x: other, w: up }) = (gate, up) {
        return (x == other).then_some((x, None, [gate, up]));
    }
    let &Op::ExpertMatmul { x, experts, w: gate } = gate else { return None };
    let &Op::ExpertMatmul { x: other, experts: others, w: up } = up else { return None };
    (x == other && experts == others).then_some((x, Some(experts), [gate, up]))
}
