//! Multiplies with the rows of q, k and v at once.
//!
//! ```text
//! %2 = matmul %1, @layers.0.q : f32[T, 64]       // @layers.0.qkv … = rows(@layers.0.q, @layers.0.k, @layers.0.v)
//! %3 = matmul %1, @layers.0.k : f32[T, 32]       // %2 = matmul %1, @layers.0.qkv : f32[T, 128]
//! %4 = matmul %1, @layers.0.v : f32[T, 32]       // %3 = slice %2 {start=0, len=64} : f32[T, 64]
//!                                                // %4 = slice %2 {start=64, len=32} : f32[T, 32]
//!                                                // %5 = slice %2 {start=96, len=32} : f32[T, 32]
//! ```
//!
//! Biases and norms of heads may stand between the products and the rotation; they stay where they are.
//!
//! What it does not do: fuse weights that will lie in different formats, projections that something else reads too, or
//! projections that do not end in one attention (they are found from there).

use moec_ir::graph::{Graph, NodeId, Op, Patch, PatchError, Source, ValueId, WeightId};

use super::Rewriter;
use super::matching::{compose, only_reader, sibling};

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(fuse)
}

struct Projection {
    node: NodeId,
    y: ValueId,
    x: ValueId,
    w: WeightId,
}

/// The product behind `value`, with a bias, a norm or a rotation between them or without.
fn projection(graph: &Graph, value: ValueId) -> Option<Projection> {
    let mut y = value;
    while let &Op::Rope { x, .. } | &Op::HeadNorm { x, .. } | &Op::AddBias { x, .. } = graph.definition(y) {
        y = x;
    }
    let node = graph.producer(y);
    let &Op::Matmul { x, w } = graph.op(node) else { return None };
    only_reader(graph, y)?;
    Some(Projection { node, y, x, w })
}

fn fuse(graph: &Graph, node: NodeId) -> Result<Option<Patch>, PatchError> {
    let &Op::Attention { q, kv, layer, .. } = graph.op(node) else { return Ok(None) };
    let &Op::KvStore { k, v, .. } = graph.definition(kv) else { return Ok(None) };
    let (Some(q), Some(k), Some(v)) = (projection(graph, q), projection(graph, k), projection(graph, v)) else {
        return Ok(None);
    };
    if q.x != k.x || q.x != v.x {
        return Ok(None);
    }
    let parts = [q.w, k.w, v.w];
    let rows = parts.map(|part| graph.weight(part).rows());
    let shape = vec![rows.iter().sum(), graph.weight(q.w).columns()];
    let name = sibling(&graph.weight(q.w).name, "qkv");
    let Some(weight) = compose(graph, name, shape, &parts, Source::Rows(parts.to_vec())) else { return Ok(None) };

    let first = graph.nodes().find(|node| [q.node, k.node, v.node].contains(node)).unwrap_or(q.node);
    let mut patch = Patch::new(graph, first, format!("q, k and v of layer {layer}"));
    let w = patch.weight(weight)?;
    let all = patch.insert_one(Op::Matmul { x: q.x, w })?;
    let mut start = 0;
    for (projection, len) in [q, k, v].into_iter().zip(rows) {
        let part = patch.insert_one(Op::Slice { x: all, start, len })?;
        patch.replace(projection.y, part);
        patch.retire(projection.node);
        start += len;
    }
    Ok(Some(patch))
}
