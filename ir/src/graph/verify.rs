//! The rules of a well-formed graph, by stage. Run after import and, in debug builds, after every pass.
//!
//! Definitions come before uses by construction; the rest is here: types follow from operands, weights fit their roles and
//! parts, keys and values are stored before attention reads them, one output at the end. An error names the node or weight.

use std::collections::BTreeMap;

use super::kernel::Kernel;
use super::op::{Op, Origin};
use super::parse::{Lines, is_name_char};
use super::store::{Graph, Node};
use super::types::{Kind, NodeId, Stage, WeightId};
use super::weight::{DType, Exception, Layout, Role, Source, Weight};

/// What an error is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// A node.
    Node(NodeId),
    /// A weight's declaration.
    Weight(WeightId),
    /// The graph as a whole.
    Graph,
}

/// A broken rule.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{context}{what}")]
pub struct VerifyError {
    /// Where.
    pub place: Place,
    /// The text of the node or weight, for the message; ends in `: `.
    context: String,
    /// Which rule is broken, and how.
    pub what: String,
}

impl VerifyError {
    /// The line of the text in which the guilty part stands, from 1.
    pub fn line(&self, lines: &Lines) -> Option<usize> {
        match self.place {
            Place::Node(node) => lines.node(node),
            Place::Weight(weight) => lines.weight(weight),
            Place::Graph => None,
        }
    }
}

/// Checks a graph by the rules of its stage.
pub fn verify(graph: &Graph) -> Result<(), VerifyError> {
    for (id, weight) in graph.weights() {
        check_weight(graph, id, weight).map_err(|what| VerifyError {
            place: Place::Weight(id),
            context: format!("`{}`: ", graph.declaration_text(weight)),
            what,
        })?;
    }
    let mut stores = BTreeMap::new();
    let last = graph.nodes().next_back();
    for id in graph.nodes() {
        let node = graph.node(id);
        check_types(graph, node)
            .and_then(|()| check_role(graph, node))
            .and_then(|()| check_cache(graph, id, node, &mut stores))
            .and_then(|()| check_output(id, node, last))
            .and_then(|()| check_stage(graph, node))
            .map_err(|what| VerifyError {
                place: Place::Node(id),
                context: format!("`{}`: ", graph.node_text(id)),
                what,
            })?;
    }
    if last.is_none_or(|last| !matches!(graph.op(last), Op::Output { .. })) {
        let what = "the last node must be an output".into();
        return Err(VerifyError { place: Place::Graph, context: String::new(), what });
    }
    Ok(())
}

fn check_weight(graph: &Graph, id: WeightId, weight: &Weight) -> Result<(), String> {
    if weight.name.is_empty() || !weight.name.chars().all(is_name_char) {
        return Err("a weight's name has letters, digits and `_.-` only".into());
    }
    let axes = weight.shape.len();
    let allowed: &[usize] = match weight.role {
        Role::Norm | Role::Bias => &[1],
        Role::Experts => &[2, 3],
        Role::Embedding | Role::Attention | Role::Router | Role::Ffn | Role::Output => &[2],
    };
    if !allowed.contains(&axes) {
        return Err(format!("a weight for {} has {allowed:?} axes, found {axes}", weight.role));
    }
    if weight.shape.contains(&0) || weight.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).is_none() {
        return Err(format!("{:?} is no possible shape", weight.shape));
    }
    let quantized = match weight.role {
        Role::Norm | Role::Bias | Role::Router => weight.layout.is_quantized(),
        // Its rows can keep stored codes.
        Role::Embedding => weight.layout.is_quantized() && !weight.layout.is_exact(),
        Role::Attention | Role::Experts | Role::Ffn | Role::Output => false,
    };
    if quantized {
        return Err(format!("a weight for {} is never quantized, found {}", weight.role, weight.layout));
    }
    let exact = weight.layout.is_exact() && weight.source == Source::Stored;
    if exact && weight.stored != DType::Codes(weight.layout) {
        return Err(format!("{} holds what is stored so, and it is stored as {}", weight.layout, weight.stored));
    }
    if graph.stage() == Stage::Planned && weight.layout == Layout::Stored {
        return Err("in a planned graph every layout is resolved".into());
    }
    if let Some(exception) = &weight.exception {
        check_exception(weight, exception)?;
    }
    check_parts(graph, id, weight)
}

/// Rows are quantized once for all experts that they meet, so all are quantized or none is.
fn check_exception(weight: &Weight, Exception { layout, experts }: &Exception) -> Result<(), String> {
    if weight.role != Role::Experts || weight.shape.len() != 3 {
        return Err("only experts can have layouts of their own".into());
    }
    if [weight.layout, *layout].iter().any(|layout| *layout == Layout::Stored || layout.is_exact())
        || *layout == weight.layout
        || layout.is_quantized() != weight.layout.is_quantized()
    {
        return Err(format!("experts of one weight cannot be {} and {layout}", weight.layout));
    }
    let rising = experts.windows(2).all(|pair| pair[0] < pair[1]);
    if !rising || experts.last().is_none_or(|&last| last >= weight.experts()) || experts.len() == weight.experts() {
        return Err(format!("{experts:?} must be some of {} experts, rising, and not all", weight.experts()));
    }
    Ok(())
}

fn check_parts(graph: &Graph, id: WeightId, weight: &Weight) -> Result<(), String> {
    let mut parts = Vec::new();
    for part in weight.source.parts() {
        match graph.get_weight(part) {
            Some(found) if part < id => parts.push(found),
            Some(_) | None => return Err(format!("its part {part} must come before it")),
        }
    }
    match &weight.source {
        Source::Stored => return Ok(()),
        Source::Rows(_) => {
            if parts.is_empty() || parts.iter().any(|p| p.shape.len() < 2 || p.columns() != weight.columns()) {
                return Err(format!("its parts must be matrices of {} columns", weight.columns()));
            }
            let rows = parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.experts() * part.rows()));
            if rows != Some(weight.experts() * weight.rows()) {
                let found = rows.map_or("too many".to_string(), |rows| rows.to_string());
                return Err(format!("its parts have {found} rows, not {}", weight.experts() * weight.rows()));
            }
        }
        Source::GateUp(..) => {
            let mut half = weight.shape.clone();
            let rows = half.len().saturating_sub(2);
            half[rows] /= 2;
            if !weight.rows().is_multiple_of(2) || weight.shape.len() < 2 || parts.iter().any(|part| part.shape != half)
            {
                return Err(format!("gate and up must each have the shape {half:?}"));
            }
        }
    }
    if parts.iter().any(|part| part.exception != weight.exception) {
        return Err("the experts of its parts must lie as its own do".into());
    }
    let stored = common_type(&parts);
    if weight.stored != stored {
        return Err(format!("its parts are stored as {stored}"));
    }
    Ok(())
}

/// The type that a weight composed of these parts is declared with: the common one, or f32, which holds all exactly.
fn common_type(parts: &[&Weight]) -> DType {
    match parts {
        [first, rest @ ..] if rest.iter().all(|part| part.stored == first.stored) => first.stored,
        _ => DType::F32,
    }
}

fn check_types(graph: &Graph, node: &Node) -> Result<(), String> {
    let types = graph.infer(&node.op).map_err(|e| e.to_string())?;
    if types.len() != node.results.len() {
        return Err(format!("{} has {} results, found {}", node.op.name(), types.len(), node.results.len()));
    }
    for (ty, &result) in types.iter().zip(&node.results) {
        if ty != graph.ty(result) {
            return Err(format!("{result} is {ty}, declared as {}", graph.ty(result)));
        }
    }
    Ok(())
}

/// What the weight of an operation may be for.
fn roles(op: &Op) -> &'static [Role] {
    match op {
        Op::Embed { .. } => &[Role::Embedding],
        Op::RmsNorm { .. } | Op::NormQuantize { .. } | Op::HeadNorm { .. } => &[Role::Norm],
        Op::AddBias { .. } => &[Role::Bias],
        Op::Matmul { .. } => &[Role::Attention, Role::Router, Role::Ffn, Role::Experts, Role::Output],
        Op::MatmulAdd { .. } => &[Role::Attention, Role::Ffn, Role::Experts],
        Op::GateUp { .. } => &[Role::Ffn, Role::Experts],
        Op::QkvRopeStore { .. } => &[Role::Attention],
        Op::ExpertMatmul { .. } | Op::ExpertGateUp { .. } | Op::ExpertDownAdd { .. } => &[Role::Experts],
        Op::Rope { .. }
        | Op::KvStore { .. }
        | Op::Attention { .. }
        | Op::Add { .. }
        | Op::Mul { .. }
        | Op::Silu { .. }
        | Op::Gelu { .. }
        | Op::SoftCap { .. }
        | Op::GateRows { .. }
        | Op::TopK { .. }
        | Op::ExpertCombine { .. }
        | Op::SelectRows { .. }
        | Op::Output { .. }
        | Op::Slice { .. }
        | Op::Quantize { .. }
        | Op::SortByExpert { .. } => &[],
    }
}

fn check_role(graph: &Graph, node: &Node) -> Result<(), String> {
    let Some(weight) = node.op.weight().map(|id| graph.weight(id)) else { return Ok(()) };
    let allowed = roles(&node.op);
    if !allowed.contains(&weight.role) {
        return Err(format!("@{} is for {}, which {} has no use for", weight.name, weight.role, node.op.name()));
    }
    if matches!(node.op, Op::GateUp { .. } | Op::ExpertGateUp { .. }) && !matches!(weight.source, Source::GateUp(..)) {
        return Err(format!("@{} must be a gate_up(…)", weight.name));
    }
    Ok(())
}

/// Every layer's cache is written once, and attention reads it with the shape in which it was written.
fn check_cache(graph: &Graph, id: NodeId, node: &Node, stores: &mut BTreeMap<usize, NodeId>) -> Result<(), String> {
    if let Op::KvStore { layer, .. } | Op::QkvRopeStore { layer, .. } = &node.op
        && stores.insert(*layer, id).is_some()
    {
        return Err(format!("keys and values of layer {layer} are stored twice"));
    }
    let Op::Attention { kv, layer, kv_heads, head_dim, .. } = &node.op else { return Ok(()) };
    let (Op::KvStore { layer: stored, kv_heads: heads, head_dim: dim, .. }
    | Op::QkvRopeStore { layer: stored, kv_heads: heads, head_dim: dim, .. }) = graph.definition(*kv)
    else {
        return Err(format!("{kv} must come from storing keys and values"));
    };
    if (stored, heads, dim) != (layer, kv_heads, head_dim) {
        return Err(format!("{kv} is of layer {stored} with {heads} heads of {dim}"));
    }
    Ok(())
}

fn check_output(id: NodeId, node: &Node, last: Option<NodeId>) -> Result<(), String> {
    if matches!(node.op, Op::Output { .. }) && last != Some(id) {
        return Err("an output must be the last node".into());
    }
    Ok(())
}

fn check_stage(graph: &Graph, node: &Node) -> Result<(), String> {
    match graph.stage() {
        Stage::Imported if node.op.origin() == Origin::Fused => {
            return Err(format!("{} is made by passes, not by the importer", node.op.name()));
        }
        Stage::Imported | Stage::Fused => {}
        Stage::Planned => return check_planned(graph, node),
    }
    match node.kernel {
        Some(kernel) => Err(format!("kernels are chosen by the last pass, found {kernel}")),
        None => Ok(()),
    }
}

fn check_planned(graph: &Graph, node: &Node) -> Result<(), String> {
    let wanted = Kernel::of(graph, &node.op);
    if node.kernel != wanted {
        let text = |kernel: Option<Kernel>| kernel.map_or("none".to_string(), |kernel| kernel.to_string());
        return Err(format!("its kernel is {}, found {}", text(wanted), text(node.kernel)));
    }
    let Some(weight) = node.op.weight().map(|id| graph.weight(id)) else { return Ok(()) };
    let multiplies = matches!(wanted, Some(Kernel::Matmul(..) | Kernel::MatmulByExpert(..)));
    let row = node.op.values().first().map(|&x| graph.ty(x).kind);
    if multiplies && weight.format().is_quantized() && row != Some(Kind::Q8) {
        return Err(format!("@{} is {}, so it must meet quantized rows", weight.name, weight.format()));
    }
    Ok(())
}
