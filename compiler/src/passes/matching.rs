//! Small questions that passes ask about a graph.

use moec_ir::graph::{DType, Graph, NodeId, Source, ValueId, Weight, WeightId};

/// The one node that reads `value`, if no other does and it does so once.
pub fn only_reader(graph: &Graph, value: ValueId) -> Option<NodeId> {
    match graph.uses(value).as_slice() {
        &[reader] if graph.op(reader).values().iter().filter(|&&v| v == value).count() == 1 => Some(reader),
        _ => None,
    }
}

/// A weight composed of parts that will lie in the payload in one format; `None` when they differ, or when the name is taken.
pub fn compose(graph: &Graph, name: String, shape: Vec<usize>, parts: &[WeightId], source: Source) -> Option<Weight> {
    let all: Vec<&Weight> = parts.iter().map(|&part| graph.weight(part)).collect();
    let (first, rest) = all.split_first()?;
    if rest
        .iter()
        .any(|part| (part.format(), &part.exception, part.role) != (first.format(), &first.exception, first.role))
    {
        return None;
    }
    if graph.find_weight(&name).is_some() {
        return None;
    }
    let same = rest.iter().all(|part| part.stored == first.stored);
    let (stored, layout) = if same { (first.stored, first.layout) } else { (DType::F32, first.format()) };
    let exception = first.exception.clone();
    Some(Weight { name, role: first.role, stored, layout, exception, shape, source })
}

/// `name` with its last part replaced: `layers.0.q` and `qkv` give `layers.0.qkv`.
pub fn sibling(name: &str, last: &str) -> String {
    match name.rsplit_once('.') {
        Some((path, _)) => format!("{path}.{last}"),
        None => last.to_string(),
    }
}
