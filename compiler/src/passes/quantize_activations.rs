//! Quantizes rows once for all the quantized weights that they meet.
//!
//! ```text
//! %1 = rms_norm %0, @norm {eps=1e-5} : f32[T, 64]       // %1 = rms_norm %0, @norm {eps=1e-5} : f32[T, 64]
//! %2 = matmul %1, @q : f32[T, 64]      // @q is q8      // %2 = quantize %1 : q8[T, 64]
//! %3 = matmul %1, @k : f32[T, 32]      // @k is q8      // %3 = matmul %2, @q : f32[T, 64]
//!                                                       // %4 = matmul %2, @k : f32[T, 32]
//! ```
//!
//! What it does not do: touch readers that take the f32 rows as they are, such as a router or the residual. Without this pass
//! [`super::select_kernels`] quantizes for each weight anew.

use moec_ir::graph::{Graph, Kind, NodeId, Op, Patch, PatchError, ValueId};

use super::Rewriter;

pub(super) fn run(rewriter: &mut Rewriter<'_>) -> Result<(), PatchError> {
    rewriter.each_node(|graph, node| {
        for &value in graph.results(node) {
            let readers: Vec<NodeId> = graph
                .uses(value)
                .into_iter()
                .filter(|&reader| rows_to_quantize(graph, reader) == Some(value))
                .collect();
            if let Some(&first) = readers.first() {
                return quantize(graph, first, value, &readers).map(Some);
            }
        }
        Ok(None)
    })
}

/// The f32 rows that an operation multiplies with a quantized weight.
pub(super) fn rows_to_quantize(graph: &Graph, node: NodeId) -> Option<ValueId> {
    let (x, w) = match *graph.op(node) {
        Op::Matmul { x, w }
        | Op::MatmulAdd { x, w, .. }
        | Op::GateUp { x, w, .. }
        | Op::QkvRopeStore { x, w, .. }
        | Op::ExpertMatmul { x, w, .. }
        | Op::ExpertGateUp { x, w, .. }
        | Op::ExpertDownAdd { h: x, w, .. } => (x, w),
        Op::Embed { .. }
        | Op::RmsNorm { .. }
        | Op::AddBias { .. }
        | Op::HeadNorm { .. }
        | Op::GateRows { .. }
        | Op::Rope { .. }
        | Op::KvStore { .. }
        | Op::Attention { .. }
        | Op::Add { .. }
        | Op::Mul { .. }
        | Op::Silu { .. }
        | Op::Gelu { .. }
        | Op::SoftCap { .. }
        | Op::TopK { .. }
        | Op::ExpertCombine { .. }
        | Op::SelectRows { .. }
        | Op::Output { .. }
        | Op::Slice { .. }
        | Op::Quantize { .. }
        | Op::NormQuantize { .. }
        | Op::SortByExpert { .. } => return None,
    };
    (graph.weight(w).format().is_quantized() && graph.ty(x).kind == Kind::F32).then_some(x)
}

/// Quantizes `value` in front of `first` and lets `readers` read that instead.
pub(super) fn quantize(graph: &Graph, first: NodeId, value: ValueId, readers: &[NodeId]) -> Result<Patch, PatchError> {
    let mut patch = Patch::new(
        graph,
        first,
        match readers.len() {
            1 => format!("{value} for its reader"),
            count => format!("{value} for {count} readers"),
        },
    );
    let quantized = patch.insert_one(Op::Quantize { x: value })?;
    for &reader in readers {
        let mut op = graph.op(reader).clone();
        let mut place = 0;
        op.visit_values(&mut |operand| {
            // The multiplied rows come first; the same value may be read again as the residual.
            if place == 0 {
                *operand = quantized;
            }
            place += 1;
        });
        patch.change(reader, op);
    }
    Ok(patch)
}
