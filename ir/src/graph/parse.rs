//! Reads the text form of a graph. [`super::print`] is its inverse.
//!
//! One declaration or node a line; `//` starts a comment. The parser wants every name and value to be defined before it is
//! used and operations to have their operands and attributes; what shapes and attributes are sensible is the verifier's to say.

use std::collections::BTreeMap;

use super::attribute::Operand;
use super::kernel::Kernel;
use super::op::Op;
use super::store::Graph;
use super::types::{Dim, Kind, Mode, NodeId, Stage, Type, ValueId, WeightId};
use super::weight::{DType, Exception, Layout, Role, Source, Weight};

/// What is wrong with a text, and where.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong.
    pub what: String,
}

/// Where in the text the parts of a graph stood.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Lines {
    nodes: BTreeMap<NodeId, usize>,
    weights: BTreeMap<WeightId, usize>,
}

impl Lines {
    /// The line of a node, from 1.
    pub fn node(&self, id: NodeId) -> Option<usize> {
        self.nodes.get(&id).copied()
    }

    /// The line of a weight's declaration, from 1.
    pub fn weight(&self, id: WeightId) -> Option<usize> {
        self.weights.get(&id).copied()
    }
}

/// Reads a graph. It is not verified.
pub fn parse(text: &str) -> Result<Graph, ParseError> {
    parse_with_lines(text).map(|(graph, _)| graph)
}

/// Reads a graph and remembers where things stood. It is not verified.
pub fn parse_with_lines(text: &str) -> Result<(Graph, Lines), ParseError> {
    let mut reader = Reader { graph: None, closed: false, names: BTreeMap::new(), lines: Lines::default() };
    let mut last = 1;
    for (i, line) in text.lines().enumerate() {
        let line = line.split_once("//").map_or(line, |(code, _)| code).trim();
        if !line.is_empty() {
            last = i + 1;
            reader.line(line, i + 1).map_err(|what| ParseError { line: i + 1, what })?;
        }
    }
    match reader {
        Reader { graph: Some(graph), closed: true, lines, .. } => Ok((graph, lines)),
        Reader { graph: None, .. } => Err(ParseError { line: last, what: "expected `graph decode imported {`".into() }),
        Reader { closed: false, .. } => Err(ParseError { line: last, what: "expected `}` at the end".into() }),
    }
}

struct Reader {
    graph: Option<Graph>,
    closed: bool,
    names: BTreeMap<String, WeightId>,
    lines: Lines,
}

impl Reader {
    fn line(&mut self, line: &str, number: usize) -> Result<(), String> {
        let mut text = Cursor { rest: line };
        let Some(graph) = &mut self.graph else {
            self.graph = Some(header(&mut text)?);
            return text.end();
        };
        if self.closed {
            return Err(format!("expected nothing after the graph, found `{line}`"));
        }
        if text.eat("}") {
            self.closed = true;
            return text.end();
        }
        if line.starts_with('@') {
            let weight = declaration(&mut text, &self.names)?;
            text.end()?;
            let name = weight.name.clone();
            let id = graph.add_weight(weight).map_err(|e| e.to_string())?;
            self.lines.weights.insert(id, number);
            self.names.insert(name, id);
        } else {
            let (op, results, kernel) = node(&mut text, &self.names)?;
            text.end()?;
            let id = graph.push_typed(op, results, kernel).map_err(|e| e.to_string())?;
            self.lines.nodes.insert(id, number);
        }
        Ok(())
    }
}

fn header(text: &mut Cursor) -> Result<Graph, String> {
    if text.word() != "graph" {
        return Err("expected `graph decode imported {`".into());
    }
    let (mode, stage) = (text.word(), text.word());
    let mode = Mode::from_name(mode).ok_or_else(|| format!("expected decode or batch, found `{mode}`"))?;
    let mut graph = Graph::new(mode);
    let wanted = "imported, fused or planned";
    graph.set_stage(Stage::from_name(stage).ok_or_else(|| format!("expected {wanted}, found `{stage}`"))?);
    if text.eat_word("context") {
        text.expect("=")?;
        graph.set_context(text.number()?);
    }
    text.expect("{")?;
    Ok(graph)
}

fn declaration(text: &mut Cursor, names: &BTreeMap<String, WeightId>) -> Result<Weight, String> {
    text.expect("@")?;
    let name = text.name()?.to_string();
    text.expect(":")?;
    let word = text.word();
    let stored =
        DType::from_name(word).ok_or_else(|| format!("expected a type such as bf16 or packed, found `{word}`"))?;
    text.expect("[")?;
    let mut shape = vec![text.number()?];
    while text.eat(",") {
        shape.push(text.number()?);
    }
    text.expect("]")?;
    let word = text.word();
    let role = Role::from_name(word)
        .ok_or_else(|| format!("expected a role ({}), found `{word}`", Role::ALL.map(Role::name).join(", ")))?;
    let mut layout = Layout::Stored;
    if text.eat_word("as") {
        layout = text.layout()?;
    }
    let mut exception = None;
    if text.eat("(") {
        let layout = text.layout()?;
        text.expect(":")?;
        let mut experts = vec![text.number()?];
        while text.eat(",") {
            experts.push(text.number()?);
        }
        text.expect(")")?;
        exception = Some(Exception { layout, experts });
    }
    let mut source = Source::Stored;
    if text.eat("=") {
        let word = text.word().to_string();
        text.expect("(")?;
        let mut parts = vec![text.weight(names)?];
        while text.eat(",") {
            parts.push(text.weight(names)?);
        }
        text.expect(")")?;
        source = match (word.as_str(), parts.as_slice()) {
            ("rows", _) => Source::Rows(parts),
            ("gate_up", &[gate, up]) => Source::GateUp(gate, up),
            ("gate_up", _) => return Err(format!("gate_up takes 2 weights, found {}", parts.len())),
            _ => return Err(format!("expected rows(…) or gate_up(…), found `{word}`")),
        };
    }
    Ok(Weight { name, role, stored, layout, exception, shape, source })
}

type NodeParts = (Op, Vec<(ValueId, Type)>, Option<Kernel>);

fn node(text: &mut Cursor, names: &BTreeMap<String, WeightId>) -> Result<NodeParts, String> {
    let mut results = Vec::new();
    if text.peek('%') {
        results.push(text.value()?);
        while text.eat(",") {
            results.push(text.value()?);
        }
        text.expect("=")?;
    }
    let name = text.word();
    let mut operands = Vec::new();
    while text.peek('%') || text.peek('@') {
        operands.push(match text.peek('%') {
            true => Operand::Value(text.value()?),
            false => Operand::Weight(text.weight(names)?),
        });
        if !text.eat(",") {
            break;
        }
    }
    let mut attributes = Vec::new();
    if text.eat("{") {
        loop {
            let name = text.word().to_string();
            text.expect("=")?;
            attributes.push((name, text.token()?.to_string()));
            if !text.eat(",") {
                break;
            }
        }
        text.expect("}")?;
    }
    let op = Op::from_parts(name, &operands, &attributes)?;
    let mut types = Vec::new();
    if text.eat(":") {
        types.push(text.ty()?);
        while text.eat(",") {
            types.push(text.ty()?);
        }
    }
    if types.len() != results.len() {
        return Err(format!("{} results, but {} types", results.len(), types.len()));
    }
    let mut kernel = None;
    if text.eat_word("by") {
        let word = text.word();
        kernel = Some(Kernel::from_name(word).ok_or_else(|| format!("there is no kernel family `{word}`"))?);
    }
    Ok((op, results.into_iter().zip(types).collect(), kernel))
}

/// The rest of a line; blanks between tokens do not matter.
struct Cursor<'a> {
    rest: &'a str,
}

impl<'a> Cursor<'a> {
    fn skip(&mut self) -> &'a str {
        self.rest = self.rest.trim_start();
        self.rest
    }

    fn take(&mut self, belongs: impl Fn(char) -> bool) -> &'a str {
        let rest = self.skip();
        let (taken, rest) = rest.split_at(rest.find(|c| !belongs(c)).unwrap_or(rest.len()));
        self.rest = rest;
        taken
    }

    fn peek(&mut self, c: char) -> bool {
        self.skip().starts_with(c)
    }

    fn eat(&mut self, token: &str) -> bool {
        match self.skip().strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn eat_word(&mut self, word: &str) -> bool {
        let before = self.rest;
        if self.word() == word {
            return true;
        }
        self.rest = before;
        false
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.eat(token) { Ok(()) } else { Err(format!("expected `{token}`, found {}", self.found())) }
    }

    fn found(&mut self) -> String {
        let rest = self.skip();
        if rest.is_empty() { "the end of the line".into() } else { format!("`{rest}`") }
    }

    fn end(&mut self) -> Result<(), String> {
        if self.skip().is_empty() {
            Ok(())
        } else {
            Err(format!("expected the end of the line, found `{}`", self.rest))
        }
    }

    /// Letters, digits and underscores; may be empty.
    fn word(&mut self) -> &'a str {
        self.take(|c| c.is_ascii_alphanumeric() || c == '_')
    }

    /// What a weight may be called.
    fn name(&mut self) -> Result<&'a str, String> {
        let name = self.take(is_name_char);
        if name.is_empty() { Err(format!("expected a name, found {}", self.found())) } else { Ok(name) }
    }

    /// An attribute's value.
    fn token(&mut self) -> Result<&'a str, String> {
        let token = self.take(|c| !c.is_whitespace() && !matches!(c, ',' | '}' | '{' | '='));
        if token.is_empty() { Err(format!("expected a value, found {}", self.found())) } else { Ok(token) }
    }

    fn layout(&mut self) -> Result<Layout, String> {
        let word = self.word();
        Layout::from_name(word).ok_or_else(|| format!("expected a layout such as q8, found `{word}`"))
    }

    fn number(&mut self) -> Result<usize, String> {
        let word = self.word();
        word.parse().map_err(|_| format!("expected a number, found `{word}`"))
    }

    fn value(&mut self) -> Result<ValueId, String> {
        self.expect("%")?;
        let word = self.word();
        let id: u32 = word.parse().map_err(|_| format!("expected a number after `%`, found `{word}`"))?;
        // Leaves room for the values that passes add.
        if id > u32::MAX / 2 { Err(format!("%{id} is too large a number")) } else { Ok(ValueId(id)) }
    }

    fn weight(&mut self, names: &BTreeMap<String, WeightId>) -> Result<WeightId, String> {
        self.expect("@")?;
        let name = self.name()?;
        names.get(name).copied().ok_or_else(|| format!("weight @{name} is not declared"))
    }

    fn ty(&mut self) -> Result<Type, String> {
        let word = self.word();
        let kind = Kind::from_name(word).ok_or_else(|| format!("expected f32, i32, q8 or kv, found `{word}`"))?;
        let mut shape = Vec::new();
        if self.eat("[") {
            loop {
                shape.push(match self.word() {
                    "T" => Dim::Tokens,
                    "L" => Dim::LogitRows,
                    word => Dim::Fixed(word.parse().map_err(|_| format!("expected T, L or a number, found `{word}`"))?),
                });
                if !self.eat(",") {
                    break;
                }
            }
            self.expect("]")?;
        }
        Ok(Type { kind, shape })
    }
}

/// Characters of a weight's name in text.
pub(super) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')
}
