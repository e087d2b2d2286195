//! Labelled rewrites, applied whole or not at all.
//!
//! A pass looks at a graph and describes one rewrite as a [`Patch`]: new weights, new nodes, what reads them, and which nodes
//! are done for. All of it happens on a copy, which takes the graph's place only when it is sound.
//!
//! Deliberately absent: finding what to rewrite (the passes) and the rules of a stage ([`super::verify`]).

use super::op::Op;
use super::store::Graph;
use super::types::{NodeId, ValueId, WeightId};
use super::weight::Weight;

/// One rewrite of one graph.
#[derive(Clone, Debug)]
pub struct Patch {
    label: String,
    copy: Graph,
    before: NodeId,
    inserted: Vec<NodeId>,
    replaced: Vec<Replacement>,
    changed: Vec<(NodeId, Op)>,
    retired: Vec<NodeId>,
    retired_weights: Vec<WeightId>,
}

#[derive(Clone, Debug)]
struct Replacement {
    /// Who reads the new value; everyone when there is none.
    reader: Option<NodeId>,
    old: ValueId,
    new: ValueId,
}

/// Why a patch does not fit: a bug in the pass that made it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("bug in moec: the rewrite \"{label}\" does not fit the graph: {why}")]
pub struct PatchError {
    /// The patch's label.
    pub label: String,
    /// What is wrong.
    pub why: String,
}

impl Patch {
    /// A patch of `graph` whose new nodes come in front of `before`. The label says what it does and where, for people.
    pub fn new(graph: &Graph, before: NodeId, label: impl Into<String>) -> Patch {
        Patch {
            label: label.into(),
            copy: graph.clone(),
            before,
            inserted: Vec::new(),
            replaced: Vec::new(),
            changed: Vec::new(),
            retired: Vec::new(),
            retired_weights: Vec::new(),
        }
    }

    /// What it does and where.
    pub fn label(&self) -> &str {
        &self.label
    }

    fn error(&self, why: impl ToString) -> PatchError {
        PatchError { label: self.label.clone(), why: why.to_string() }
    }

    /// Adds a weight.
    pub fn weight(&mut self, weight: Weight) -> Result<WeightId, PatchError> {
        self.copy.add_weight(weight).map_err(|e| self.error(e))
    }

    /// Adds a node; its results get the types that follow from its operands.
    pub fn insert(&mut self, op: Op) -> Result<Vec<ValueId>, PatchError> {
        let results = self.copy.push(op).map_err(|e| self.error(e))?;
        self.inserted.extend(self.copy.nodes().next_back());
        Ok(results)
    }

    /// Adds a node with one result.
    pub fn insert_one(&mut self, op: Op) -> Result<ValueId, PatchError> {
        match self.insert(op)?.as_slice() {
            [one] => Ok(*one),
            results => Err(self.error(format!("expected one result, found {}", results.len()))),
        }
    }

    /// Lets every node that was there before read `new` where it read `old`.
    pub fn replace(&mut self, old: ValueId, new: ValueId) {
        self.replaced.push(Replacement { reader: None, old, new });
    }

    /// Lets one node read `new` where it read `old`.
    pub fn replace_in(&mut self, reader: NodeId, old: ValueId, new: ValueId) {
        self.replaced.push(Replacement { reader: Some(reader), old, new });
    }

    /// Puts another operation in a node, whose results keep their ids and types.
    pub fn change(&mut self, node: NodeId, op: Op) {
        self.changed.push((node, op));
    }

    /// Removes a node when, after the rewrite, nobody reads its results; otherwise it stays.
    pub fn retire(&mut self, node: NodeId) {
        self.retired.push(node);
    }

    /// Removes a weight, which must not be read after the rewrite.
    pub fn retire_weight(&mut self, weight: WeightId) {
        self.retired_weights.push(weight);
    }

    /// Puts the rewritten graph in the place of `graph`, which must be the one that the patch was made for.
    pub fn apply(mut self, graph: &mut Graph) -> Result<(), PatchError> {
        if graph.revision != self.copy.revision {
            return Err(self.error("the graph has changed since"));
        }
        if self.copy.get(self.before).is_none() {
            return Err(self.error(format!("there is no node {} to put it in front of", self.before)));
        }
        self.copy.move_last(self.inserted.len(), self.before);
        self.redirect()?;
        self.copy.reschedule().map_err(|e| self.error(e))?;
        // Last first, so that a node whose only reader is retired goes too.
        for node in self.copy.nodes().rev().collect::<Vec<_>>() {
            let unread = |graph: &Graph| !graph.results(node).iter().any(|&result| graph.is_used(result));
            if self.retired.contains(&node) && unread(&self.copy) {
                self.copy.remove(node);
            }
        }
        for &weight in &self.retired_weights {
            if self.copy.is_weight_read(weight) {
                return Err(self.error(format!("weight {weight} is still read")));
            }
            self.copy.remove_weight(weight);
        }
        self.copy.revision += 1;
        *graph = self.copy;
        Ok(())
    }

    fn redirect(&mut self) -> Result<(), PatchError> {
        for Replacement { reader, old, new } in std::mem::take(&mut self.replaced) {
            if self.copy.get_ty(old).is_none() || self.copy.get_ty(new).is_none() {
                return Err(self.error(format!("{old} or {new} does not exist")));
            }
            let readers = match reader {
                Some(reader) => vec![reader],
                None => self.copy.uses(old),
            };
            for node in readers.into_iter().filter(|node| !self.inserted.contains(node)) {
                if self.copy.get(node).is_none() {
                    return Err(self.error(format!("there is no node {node} to read {new}")));
                }
                self.copy.redirect(node, old, new);
                self.check_results(node)?;
            }
        }
        for (node, op) in std::mem::take(&mut self.changed) {
            if self.copy.get(node).is_none() {
                return Err(self.error(format!("there is no node {node} to change")));
            }
            self.copy.set_op(node, op).map_err(|e| self.error(e))?;
            self.check_results(node)?;
        }
        Ok(())
    }

    /// The results of a node that was rewritten must be what they were.
    fn check_results(&self, node: NodeId) -> Result<(), PatchError> {
        let found = self.copy.infer(self.copy.op(node)).map_err(|e| self.error(e))?;
        let before: Vec<_> = self.copy.results(node).iter().map(|&result| self.copy.ty(result).clone()).collect();
        if found == before { Ok(()) } else { Err(self.error(format!("it changes the types of the results of {node}"))) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    fn graph() -> Graph {
        let text = "graph batch imported {
            @embed : f32[40, 64] embedding
            @norm : f32[64] norm
            @output : f32[40, 64] output
            %0 = embed @embed : f32[T, 64]
            %1 = silu %0 : f32[T, 64]
            %2 = mul %1, %0 : f32[T, 64]
            %3 = select_rows %2 : f32[L, 64]
            %4 = matmul %3, @output : f32[L, 40]
            output %4
        }";
        parse(text).expect("the text is right")
    }

    fn value(n: u32) -> ValueId {
        ValueId(n)
    }

    /// Applies a patch that does not fit: the graph must stay as it is. Gives the reason.
    fn refused(make: impl FnOnce(&Graph) -> Patch) -> String {
        let mut graph = graph();
        let before = graph.to_string();
        let error = make(&graph).apply(&mut graph).expect_err("the patch does not fit");
        assert_eq!(graph.to_string(), before);
        error.why
    }

    #[test]
    fn a_rewrite_inserts_replaces_and_retires() {
        let mut graph = graph();
        let mut patch = Patch::new(&graph, graph.producer(value(1)), "doubles instead");
        let sum = patch.insert_one(Op::Add { a: value(0), b: value(0) }).expect("the operands fit");
        patch.replace(value(2), sum);
        patch.retire(graph.producer(value(1)));
        patch.retire(graph.producer(value(2)));
        patch.retire_weight(graph.find_weight("norm").expect("it is declared"));
        patch.apply(&mut graph).expect("the patch fits");
        let names: Vec<&str> = graph.nodes().map(|node| graph.op(node).name()).collect();
        assert_eq!(names, ["embed", "add", "select_rows", "matmul", "output"]);
        assert_eq!(graph.uses(sum), [graph.producer(value(3))]);
        assert_eq!(graph.find_weight("norm"), None);
    }

    #[test]
    fn what_is_still_read_is_not_removed() {
        let mut graph = graph();
        let mut patch = Patch::new(&graph, graph.producer(value(2)), "another silu");
        let silu = patch.insert_one(Op::Silu { x: value(0) }).expect("the operand fits");
        patch.replace_in(graph.producer(value(3)), value(2), silu);
        patch.retire(graph.producer(value(0)));
        patch.apply(&mut graph).expect("the patch fits");
        assert!(graph.get_ty(value(0)).is_some());
        assert!(graph.get_ty(value(2)).is_some(), "nobody reads it, but it was not retired");
    }

    #[test]
    fn inserted_nodes_are_scheduled_after_their_operands() {
        let mut graph = graph();
        // In front of the embedding, which they need.
        let mut patch = Patch::new(&graph, graph.producer(value(0)), "too early");
        let silu = patch.insert_one(Op::Silu { x: value(2) }).expect("the operand fits");
        patch.replace(value(2), silu);
        patch.apply(&mut graph).expect("the patch fits");
        let names: Vec<&str> = graph.nodes().map(|node| graph.op(node).name()).collect();
        assert_eq!(names, ["embed", "silu", "mul", "silu", "select_rows", "matmul", "output"]);
        assert_eq!(parse(&graph.to_string()).expect("it prints what parses").to_string(), graph.to_string());
    }

    #[test]
    fn patches_that_do_not_fit_change_nothing() {
        let why = refused(|graph| {
            let mut patch = Patch::new(graph, graph.producer(value(3)), "narrower");
            let slice = patch.insert_one(Op::Slice { x: value(2), start: 0, len: 8 }).expect("the operand fits");
            patch.replace(value(2), slice);
            patch
        });
        assert!(why.contains("changes the types"), "{why}");
        let why = refused(|graph| {
            let mut patch = Patch::new(graph, graph.producer(value(1)), "circle");
            patch.change(graph.producer(value(1)), Op::Silu { x: value(2) });
            patch
        });
        assert_eq!(why, "the nodes depend on each other in a circle");
        let why = refused(|graph| {
            let mut patch = Patch::new(graph, graph.producer(value(1)), "weight in use");
            patch.retire_weight(graph.find_weight("output").expect("it is declared"));
            patch
        });
        assert!(why.contains("still read"), "{why}");
        let why = refused(|graph| {
            let mut patch = Patch::new(graph, NodeId(99), "nowhere");
            patch.replace(value(1), value(0));
            patch
        });
        assert!(why.contains("no node n99"), "{why}");
    }

    #[test]
    fn a_patch_is_for_one_state_of_the_graph() {
        let mut graph = graph();
        let patch = |graph: &Graph| {
            let mut patch = Patch::new(graph, graph.producer(value(2)), "reads the embedding");
            patch.replace(value(1), value(0));
            patch
        };
        let (first, second) = (patch(&graph), patch(&graph));
        first.apply(&mut graph).expect("the patch fits");
        let error = second.apply(&mut graph).expect_err("the graph has changed");
        assert_eq!(
            error.to_string(),
            "bug in moec: the rewrite \"reads the embedding\" does not fit the graph: the graph has changed since"
        );
    }
}
