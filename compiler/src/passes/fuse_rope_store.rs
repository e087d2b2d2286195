//! Rotates queries and keys, and stores keys and values, where they are computed.
//!
//! ```text
//! %2 = matmul %1, @layers.0.qkv : f32[T, 128]         // %2, %3 = qkv_rope_store %1, @layers.0.qkv {layer=0, heads=4,
//! %3 = slice %2 {start=0, len=64} : f32[T, 64]        //     kv_heads=2, head_dim=16, scale=0.25} : f32[T, 64], kv
//! %4 = slice %2 {start=64, len=32} : f32[T, 32]
//! %5 = slice %2 {start=96, len=32} : f32[T, 32]
//! %6 = rope %3 {heads=4, head_dim=16, scale=0.25} : f32[T, 64]
//! %7 = rope %4 {heads=2, head_dim=16, scale=1.0} : f32[T, 32]
//! %8 = kv_store %7, %5 {layer=0, kv_heads=2, head_dim=16} : kv
//! %9 = attention %6, %8 …
//! ```
//!
//! What it does not do: anything without [`super::fuse_qkv`] before it, with keys that are scaled, with biases or norms of heads, or with parts that something
//! else reads too.

use moec_ir::graph::{Graph, NodeId, Op, Patch, PatchError, ValueId};

use super::Rewriter;
use super::matching::only_reader;

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(fuse)
}

/// A slice that one node reads: the whole, where it starts and how long it is.
fn slice(graph: &Graph, value: ValueId) -> Option<(ValueId, usize, usize)> {
    let &Op::Slice { x, start, len } = graph.definition(value) else { return None };
    only_reader(graph, value)?;
    Some((x, start, len))
}

fn fuse(graph: &Graph, node: NodeId) -> Result<Option<Patch>, PatchError> {
    let &Op::Attention { q, kv, layer, heads, kv_heads, head_dim, .. } = graph.op(node) else { return Ok(None) };
    let &Op::KvStore { k, v, .. } = graph.definition(kv) else { return Ok(None) };
    let &Op::Rope { x: q_slice, scale, .. } = graph.definition(q) else { return Ok(None) };
    let &Op::Rope { x: k_slice, scale: 1.0, .. } = graph.definition(k) else { return Ok(None) };
    let (Some(q_part), Some(k_part), Some(v_part)) = (slice(graph, q_slice), slice(graph, k_slice), slice(graph, v))
    else {
        return Ok(None);
    };
    let all = q_part.0;
    let (q_len, kv_len) = (heads * head_dim, kv_heads * head_dim);
    let expected = [(all, 0, q_len), (all, q_len, kv_len), (all, q_len + kv_len, kv_len)];
    let &Op::Matmul { x, w } = graph.definition(all) else { return Ok(None) };
    let rotated_elsewhere = only_reader(graph, k).is_none();
    if [q_part, k_part, v_part] != expected || graph.weight(w).rows() != q_len + 2 * kv_len || rotated_elsewhere {
        return Ok(None);
    }
    let store = graph.producer(kv);
    let mut patch = Patch::new(graph, store, format!("rotation and store of layer {layer}"));
    let fused = patch.insert(Op::QkvRopeStore { x, w, layer, heads, kv_heads, head_dim, scale })?;
    patch.replace(q, fused[0]);
    patch.replace(kv, fused[1]);
    for value in [kv, k, q, k_slice, q_slice, v, all] {
        patch.retire(graph.producer(value));
    }
    Ok(Some(patch))
}
