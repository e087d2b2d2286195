//! The graph itself: nodes in a schedule, values, the weight table.
//!
//! The only file that names petgraph: nodes lie in a `StableDiGraph`, so that ids stay valid while passes rewrite, with an edge
//! from producer to consumer for each value read. The *schedule* is an order of all nodes in which definitions come before
//! uses; all iteration follows it, so everything made from a graph is deterministic.
//!
//! Changes to a finished graph go through [`super::patch`]. Deliberately absent: text ([`super::print`], [`super::parse`]) and
//! rules ([`super::verify`]).

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use petgraph::Direction;
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::EdgeRef;

use super::infer::result_types;
use super::kernel::Kernel;
use super::op::Op;
use super::rows::RowContent;
use super::types::{Mode, NodeId, Stage, Type, ValueId, WeightId};
use super::weight::{Role, Weight};

/// An operation in a graph.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// What is done, with the values and weights it reads.
    pub op: Op,
    /// The values it defines.
    pub results: Vec<ValueId>,
    /// The family of kernels that does it: chosen by the last pass, for operations on weights.
    pub kernel: Option<Kernel>,
}

#[derive(Clone, Debug)]
struct Value {
    ty: Type,
    producer: NodeId,
}

/// What a model computes in one of its modes. Copies share what they do not change, so that a patch can work on a copy.
#[derive(Clone, Debug)]
pub struct Graph {
    mode: Mode,
    stage: Stage,
    context: Option<usize>,
    nodes: StableDiGraph<Arc<Node>, ValueId>,
    schedule: Vec<NodeId>,
    values: BTreeMap<ValueId, Arc<Value>>,
    weights: BTreeMap<WeightId, Arc<Weight>>,
    /// Counts the patches applied, so that a patch made for another state is refused.
    pub(super) revision: u64,
}

/// Why an operation or a weight cannot be added.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BuildError {
    /// An operand does not exist (yet).
    #[error("{0} is not defined before it is used")]
    NoValue(ValueId),
    /// A weight does not exist.
    #[error("there is no weight {0}")]
    NoWeight(WeightId),
    /// A value is defined twice.
    #[error("{0} is defined twice")]
    Redefined(ValueId),
    /// A weight's name is taken.
    #[error("weight @{0} is declared twice")]
    WeightRedeclared(String),
    /// The operands do not fit the operation.
    #[error("{op}: {why}")]
    Types {
        /// The operation's name.
        op: &'static str,
        /// What does not fit.
        why: String,
    },
    /// The changed graph would need a value before it is computed.
    #[error("the nodes depend on each other in a circle")]
    Circle,
}

fn index(id: NodeId) -> NodeIndex {
    NodeIndex::new(id.0 as usize)
}

fn id(index: NodeIndex) -> NodeId {
    NodeId(index.index() as u32)
}

impl Graph {
    /// A graph without nodes, at the stage of import.
    pub fn new(mode: Mode) -> Graph {
        Graph {
            mode,
            stage: Stage::Imported,
            context: None,
            nodes: StableDiGraph::new(),
            schedule: Vec::new(),
            values: BTreeMap::new(),
            weights: BTreeMap::new(),
            revision: 0,
        }
    }

    /// Which entry point it is for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What quantized activation rows hold: all that any product asks for ([`Layout::row`]), as rows are quantized once for all that they meet.
    pub fn row_content(&self) -> RowContent {
        let products = self.weights().filter(|(_, weight)| weight.role != Role::Embedding);
        products
            .flat_map(|(_, weight)| weight.formats())
            .fold(RowContent::NO_SUMS, |content, layout| content.and(layout.row()))
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Says how far it has come.
    pub fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
    }

    /// The tokens of the longest sequence, if it is known: positions are below.
    pub fn context(&self) -> Option<usize> {
        self.context
    }

    /// Says how long the longest sequence is.
    pub fn set_context(&mut self, context: usize) {
        self.context = Some(context);
    }

    /// The nodes in schedule order.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = NodeId> + ExactSizeIterator + '_ {
        self.schedule.iter().copied()
    }

    /// The nodes in schedule order, each with the number of the last choice of experts before it, if there is one: experts belong to that.
    pub fn nodes_by_choice(&self) -> impl Iterator<Item = (NodeId, Option<usize>)> + '_ {
        self.nodes().scan(None, |choice, node| {
            if matches!(self.op(node), Op::TopK { .. }) {
                *choice = Some(choice.map_or(0, |choice: usize| choice + 1));
            }
            Some((node, *choice))
        })
    }

    /// A node.
    ///
    /// # Panics
    /// If it has been removed.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[index(id)]
    }

    /// A node, unless it has been removed.
    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.nodes.node_weight(index(id)).map(Arc::as_ref)
    }

    /// What a node does.
    ///
    /// # Panics
    /// If it has been removed.
    pub fn op(&self, id: NodeId) -> &Op {
        &self.node(id).op
    }

    /// The values that a node defines.
    ///
    /// # Panics
    /// If it has been removed.
    pub fn results(&self, id: NodeId) -> &[ValueId] {
        &self.node(id).results
    }

    /// The family of kernels that does a node's work.
    ///
    /// # Panics
    /// If it has been removed.
    pub fn kernel(&self, id: NodeId) -> Option<Kernel> {
        self.node(id).kernel
    }

    /// Attaches a family of kernels.
    pub fn set_kernel(&mut self, id: NodeId, kernel: Option<Kernel>) {
        Arc::make_mut(&mut self.nodes[index(id)]).kernel = kernel;
    }

    /// The type of a value.
    ///
    /// # Panics
    /// If there is no such value.
    pub fn ty(&self, value: ValueId) -> &Type {
        &self.values[&value].ty
    }

    /// The type of a value, if there is such a value.
    pub fn get_ty(&self, value: ValueId) -> Option<&Type> {
        self.values.get(&value).map(|v| &v.ty)
    }

    /// The node that defines a value.
    ///
    /// # Panics
    /// If there is no such value.
    pub fn producer(&self, value: ValueId) -> NodeId {
        self.values[&value].producer
    }

    /// The operation that defines a value.
    ///
    /// # Panics
    /// If there is no such value.
    pub fn definition(&self, value: ValueId) -> &Op {
        &self.node(self.producer(value)).op
    }

    /// The nodes that read a value, in schedule order, each once.
    pub fn uses(&self, value: ValueId) -> Vec<NodeId> {
        let from = index(self.producer(value));
        let mut users = BTreeSet::new();
        for edge in self.nodes.edges_directed(from, Direction::Outgoing) {
            if *edge.weight() == value {
                users.insert(id(edge.target()));
            }
        }
        if users.len() <= 1 {
            return users.into_iter().collect();
        }
        self.schedule.iter().copied().filter(|node| users.contains(node)).collect()
    }

    /// Whether any node reads a value.
    pub fn is_used(&self, value: ValueId) -> bool {
        let from = index(self.producer(value));
        self.nodes.edges_directed(from, Direction::Outgoing).any(|edge| *edge.weight() == value)
    }

    /// All values, by id.
    pub fn values(&self) -> impl Iterator<Item = (ValueId, &Type)> {
        self.values.iter().map(|(id, value)| (*id, &value.ty))
    }

    /// The weight table, by id: the parts of a composed weight come before it.
    pub fn weights(&self) -> impl Iterator<Item = (WeightId, &Weight)> {
        self.weights.iter().map(|(id, weight)| (*id, weight.as_ref()))
    }

    /// A weight.
    ///
    /// # Panics
    /// If it has been removed.
    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[&id]
    }

    /// A weight, if there is such a weight.
    pub fn get_weight(&self, id: WeightId) -> Option<&Weight> {
        self.weights.get(&id).map(Arc::as_ref)
    }

    /// A weight, to change its layout.
    ///
    /// # Panics
    /// If it has been removed.
    pub fn weight_mut(&mut self, id: WeightId) -> &mut Weight {
        Arc::make_mut(self.weights.get_mut(&id).expect("the weight is in the table"))
    }

    /// The weight of that name.
    pub fn find_weight(&self, name: &str) -> Option<WeightId> {
        self.weights.iter().find(|(_, weight)| weight.name == name).map(|(id, _)| *id)
    }

    /// Adds a weight at the end of the table.
    pub fn add_weight(&mut self, weight: Weight) -> Result<WeightId, BuildError> {
        if self.find_weight(&weight.name).is_some() {
            return Err(BuildError::WeightRedeclared(weight.name));
        }
        let id = self.next_weight();
        self.weights.insert(id, Arc::new(weight));
        Ok(id)
    }

    /// Adds an operation at the end of the schedule; its results get the types that follow from its operands.
    pub fn push(&mut self, op: Op) -> Result<Vec<ValueId>, BuildError> {
        let types = self.infer(&op)?;
        let first = self.next_value().0;
        let results: Vec<(ValueId, Type)> = (first..).map(ValueId).zip(types).collect();
        let ids = results.iter().map(|(id, _)| *id).collect();
        self.push_typed(op, results, None)?;
        Ok(ids)
    }

    /// Adds an operation at the end of the schedule whose results have these ids and types. The types are not checked here.
    pub fn push_typed(
        &mut self,
        op: Op,
        results: Vec<(ValueId, Type)>,
        kernel: Option<Kernel>,
    ) -> Result<NodeId, BuildError> {
        self.check_operands(&op)?;
        for (i, (result, _)) in results.iter().enumerate() {
            if self.values.contains_key(result) || results[..i].iter().any(|(other, _)| other == result) {
                return Err(BuildError::Redefined(*result));
            }
        }
        let read = op.values();
        let ids = results.iter().map(|(id, _)| *id).collect();
        let node = id(self.nodes.add_node(Arc::new(Node { op, results: ids, kernel })));
        for value in read {
            self.nodes.add_edge(index(self.values[&value].producer), index(node), value);
        }
        for (value, ty) in results {
            self.values.insert(value, Arc::new(Value { ty, producer: node }));
        }
        self.schedule.push(node);
        Ok(node)
    }

    /// Numbers values in schedule order from 0, and weights without gaps.
    pub fn renumber(&self) -> Graph {
        let mut graph =
            Graph { revision: self.revision, stage: self.stage, context: self.context, ..Graph::new(self.mode) };
        let mut weights = BTreeMap::new();
        for (old, weight) in &self.weights {
            let mut weight = Weight::clone(weight);
            weight.source.visit_parts(&mut |part| *part = weights[part]);
            let new = graph.next_weight();
            weights.insert(*old, new);
            graph.weights.insert(new, Arc::new(weight));
        }
        let mut values = BTreeMap::new();
        for node in self.nodes().map(|id| self.node(id)) {
            let mut op = node.op.clone();
            op.visit_values(&mut |value| *value = values[value]);
            op.visit_weights(&mut |weight| *weight = weights[weight]);
            let mut results = Vec::new();
            for result in &node.results {
                let new = ValueId(values.len() as u32);
                values.insert(*result, new);
                results.push((new, self.ty(*result).clone()));
            }
            graph.push_typed(op, results, node.kernel).expect("what was sound stays sound under other numbers");
        }
        graph
    }

    /// The types of the results of an operation.
    pub fn infer(&self, op: &Op) -> Result<Vec<Type>, BuildError> {
        self.check_operands(op)?;
        result_types(self, op).map_err(|why| BuildError::Types { op: op.name(), why })
    }

    fn check_operands(&self, op: &Op) -> Result<(), BuildError> {
        if let Some(value) = op.values().into_iter().find(|v| !self.values.contains_key(v)) {
            return Err(BuildError::NoValue(value));
        }
        match op.weight().filter(|w| !self.weights.contains_key(w)) {
            Some(weight) => Err(BuildError::NoWeight(weight)),
            None => Ok(()),
        }
    }

    /// The id that the next value will get.
    pub(super) fn next_value(&self) -> ValueId {
        ValueId(self.values.last_key_value().map_or(0, |(last, _)| last.0 + 1))
    }

    /// The id that the next weight will get.
    pub(super) fn next_weight(&self) -> WeightId {
        WeightId(self.weights.last_key_value().map_or(0, |(last, _)| last.0 + 1))
    }

    /// Makes `reader` read `new` where it read `old`. The schedule may be wrong afterwards; [`Graph::reschedule`] mends it.
    pub(super) fn redirect(&mut self, reader: NodeId, old: ValueId, new: ValueId) {
        let edges: Vec<_> = self.nodes.edges_directed(index(reader), Direction::Incoming).map(|e| e.id()).collect();
        for edge in edges {
            if self.nodes[edge] == old {
                self.nodes.remove_edge(edge);
                self.nodes.add_edge(index(self.values[&new].producer), index(reader), new);
            }
        }
        Arc::make_mut(&mut self.nodes[index(reader)]).op.visit_values(&mut |value| {
            if *value == old {
                *value = new;
            }
        });
    }

    /// Puts another operation in a node, with the same results. The schedule may be wrong afterwards.
    pub(super) fn set_op(&mut self, node: NodeId, op: Op) -> Result<(), BuildError> {
        self.check_operands(&op)?;
        let edges: Vec<_> = self.nodes.edges_directed(index(node), Direction::Incoming).map(|e| e.id()).collect();
        for edge in edges {
            self.nodes.remove_edge(edge);
        }
        for value in op.values() {
            self.nodes.add_edge(index(self.values[&value].producer), index(node), value);
        }
        Arc::make_mut(&mut self.nodes[index(node)]).op = op;
        Ok(())
    }

    /// Moves the last `count` nodes of the schedule in front of `before`.
    pub(super) fn move_last(&mut self, count: usize, before: NodeId) {
        let moved = self.schedule.split_off(self.schedule.len() - count);
        let at = self.schedule.iter().position(|&node| node == before).unwrap_or(self.schedule.len());
        self.schedule.splice(at..at, moved);
    }

    /// Removes a node that nobody reads.
    pub(super) fn remove(&mut self, node: NodeId) {
        if let Some(removed) = self.nodes.remove_node(index(node)) {
            for result in &removed.results {
                self.values.remove(result);
            }
            self.schedule.retain(|&other| other != node);
        }
    }

    /// Whether a node or a composed weight reads a weight.
    pub fn is_weight_read(&self, weight: WeightId) -> bool {
        self.nodes().any(|node| self.op(node).weight() == Some(weight))
            || self.weights().any(|(_, other)| other.source.parts().contains(&weight))
    }

    /// Removes a weight that nobody reads.
    pub(super) fn remove_weight(&mut self, weight: WeightId) {
        self.weights.remove(&weight);
    }

    /// Mends the schedule: of the nodes whose operands are there, always the one that came first before.
    pub(super) fn reschedule(&mut self) -> Result<(), BuildError> {
        let place: BTreeMap<NodeId, usize> = self.schedule.iter().enumerate().map(|(i, &node)| (node, i)).collect();
        let mut missing: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut ready = BinaryHeap::new();
        for &node in &self.schedule {
            let count = self.nodes.edges_directed(index(node), Direction::Incoming).count();
            missing.insert(node, count);
            if count == 0 {
                ready.push(std::cmp::Reverse(place[&node]));
            }
        }
        let mut schedule = Vec::with_capacity(self.schedule.len());
        while let Some(std::cmp::Reverse(first)) = ready.pop() {
            let node = self.schedule[first];
            schedule.push(node);
            for edge in self.nodes.edges_directed(index(node), Direction::Outgoing) {
                let user = id(edge.target());
                let count = missing.get_mut(&user).expect("every node is in the schedule");
                *count -= 1;
                if *count == 0 {
                    ready.push(std::cmp::Reverse(place[&user]));
                }
            }
        }
        if schedule.len() != self.schedule.len() {
            return Err(BuildError::Circle);
        }
        self.schedule = schedule;
        Ok(())
    }
}
