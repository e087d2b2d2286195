//! The text form of a graph. [`super::parse`] is its inverse.
//!
//! Weights come first, in the order of the table, then nodes in schedule order. Values keep their numbers, so the text of a
//! graph that passes rewrote has gaps in them; [`Graph::renumber`] closes them.

use std::fmt;

use super::attribute::Operand;
use super::store::{Graph, Node};
use super::types::NodeId;
use super::weight::{Exception, Layout, Source, Weight};

/// Writes `items` with commas between them.
fn list(f: &mut fmt::Formatter<'_>, items: impl IntoIterator<Item = impl fmt::Display>) -> fmt::Result {
    for (i, item) in items.into_iter().enumerate() {
        write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
    }
    Ok(())
}

/// A weight's declaration as text.
struct Declaration<'a>(&'a Graph, &'a Weight);

impl fmt::Display for Declaration<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Declaration(graph, weight) = self;
        write!(f, "@{} : {}[", weight.name, weight.stored)?;
        list(f, &weight.shape)?;
        write!(f, "] {}", weight.role)?;
        if weight.layout != Layout::Stored {
            write!(f, " as {}", weight.layout)?;
        }
        if let Some(Exception { layout, experts }) = &weight.exception {
            write!(f, " ({layout}: ")?;
            list(f, experts)?;
            f.write_str(")")?;
        }
        let name = match weight.source {
            Source::Stored => return Ok(()),
            Source::Rows(_) => "rows",
            Source::GateUp(..) => "gate_up",
        };
        write!(f, " = {name}(")?;
        list(f, weight.source.parts().into_iter().map(|part| graph.weight_text(part)))?;
        f.write_str(")")
    }
}

/// A node as text.
struct Line<'a>(&'a Graph, &'a Node);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Line(graph, node) = self;
        list(f, &node.results)?;
        if !node.results.is_empty() {
            f.write_str(" = ")?;
        }
        write!(f, "{} ", node.op.name())?;
        list(
            f,
            node.op.operands().into_iter().map(|operand| match operand {
                Operand::Value(value) => value.to_string(),
                Operand::Weight(weight) => graph.weight_text(weight),
            }),
        )?;
        let attributes = node.op.attributes();
        if !attributes.is_empty() {
            f.write_str(" {")?;
            list(f, attributes.into_iter().map(|(name, text)| format!("{name}={text}")))?;
            f.write_str("}")?;
        }
        if !node.results.is_empty() {
            f.write_str(" : ")?;
            list(f, node.results.iter().map(|&result| graph.ty(result)))?;
        }
        match node.kernel {
            Some(kernel) => write!(f, " by {kernel}"),
            None => Ok(()),
        }
    }
}

impl Graph {
    fn weight_text(&self, id: super::types::WeightId) -> String {
        match self.get_weight(id) {
            Some(weight) => format!("@{}", weight.name),
            None => format!("@?{id}"),
        }
    }

    /// A node's line of the text form, for messages and comments in later dumps.
    pub fn node_text(&self, id: NodeId) -> String {
        Line(self, self.node(id)).to_string()
    }

    /// A weight's line of the text form.
    pub fn declaration_text(&self, weight: &Weight) -> String {
        Declaration(self, weight).to_string()
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "graph {} {} ", self.mode(), self.stage())?;
        if let Some(context) = self.context() {
            write!(f, "context={context} ")?;
        }
        writeln!(f, "{{")?;
        let mut blank = false;
        for (_, weight) in self.weights() {
            writeln!(f, "  {}", Declaration(self, weight))?;
            blank = true;
        }
        if blank {
            writeln!(f)?;
        }
        for node in self.nodes() {
            writeln!(f, "  {}", Line(self, self.node(node)))?;
        }
        writeln!(f, "}}")
    }
}
