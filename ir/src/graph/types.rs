//! What every part of the graph IR names things by: ids, dimensions, value types, the mode and the stage of a graph.
//!
//! The `Display` of each is its text form; `from_name` is its inverse where the form is a word. Deliberately absent: weights
//! ([`super::weight`]) and operations ([`super::op`]).

use std::fmt;

/// A node of one graph. Stays valid until that node is removed; never decided upon, only for lookup and for people.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u32);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

/// A result of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ValueId(pub u32);

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// An entry of a graph's weight table. In text a weight goes by its name, `@layers.0.q`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WeightId(pub u32);

impl fmt::Display for WeightId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.0)
    }
}

/// One extent of a value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Dim {
    /// `T`: the tokens of this step; 1 in a [`Mode::Decode`] graph.
    Tokens,
    /// `L`: the rows of this step that need logits, 0 ..= T.
    LogitRows,
    /// A number known when compiling.
    Fixed(usize),
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Tokens => f.write_str("T"),
            Dim::LogitRows => f.write_str("L"),
            Dim::Fixed(n) => write!(f, "{n}"),
        }
    }
}

/// What the elements of a value are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// IEEE single.
    F32,
    /// Indices: experts, and orders of tokens.
    I32,
    /// Rows quantized to signed bytes, with an f32 scale for each 32 or 64 ([`Graph::row_content`](super::Graph::row_content)).
    Q8,
    /// No data: the promise that keys and values of this step are in the cache of one layer.
    Kv,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::F32, Kind::I32, Kind::Q8, Kind::Kv];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::F32 => "f32",
            Kind::I32 => "i32",
            Kind::Q8 => "q8",
            Kind::Kv => "kv",
        }
    }

    /// The kind named `name` in text form.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|k| k.name() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The type of a value: `f32[T, 4096]`, `q8[T, 2, 14336]`, `kv`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Type {
    /// What the elements are.
    pub kind: Kind,
    /// Extents, outermost first; empty for [`Kind::Kv`].
    pub shape: Vec<Dim>,
}

impl Type {
    /// A type from its parts.
    pub fn new(kind: Kind, shape: impl Into<Vec<Dim>>) -> Type {
        Type { kind, shape: shape.into() }
    }

    /// `f32[rows, columns]`.
    pub fn rows(rows: Dim, columns: usize) -> Type {
        Type::new(Kind::F32, [rows, Dim::Fixed(columns)])
    }

    /// The type of an effect token.
    pub fn kv() -> Type {
        Type::new(Kind::Kv, [])
    }

    /// The last extent, when it is a number: the elements of a row.
    pub fn columns(&self) -> Option<usize> {
        match self.shape.last() {
            Some(Dim::Fixed(n)) => Some(*n),
            Some(Dim::Tokens | Dim::LogitRows) | None => None,
        }
    }

    /// The same shape with elements of another kind.
    pub fn with_kind(&self, kind: Kind) -> Type {
        Type { kind, shape: self.shape.clone() }
    }

    /// The same kind and rows, with rows of another length.
    pub fn with_columns(&self, columns: usize) -> Type {
        let mut shape = self.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = Dim::Fixed(columns);
        }
        Type { kind: self.kind, shape }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        for (i, dim) in self.shape.iter().enumerate() {
            write!(f, "{}{dim}", if i == 0 { "[" } else { ", " })?;
        }
        if !self.shape.is_empty() {
            f.write_str("]")?;
        }
        Ok(())
    }
}

/// Which of a model's two entry points a graph is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Mode {
    /// One token: `T` is 1.
    Decode,
    /// 1 ..= the step's maximum, of any number of sequences.
    Batch,
}

impl Mode {
    /// Both of them.
    pub const ALL: [Mode; 2] = [Mode::Decode, Mode::Batch];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Mode::Decode => "decode",
            Mode::Batch => "batch",
        }
    }

    /// The mode named `name` in text form.
    pub fn from_name(name: &str) -> Option<Mode> {
        Mode::ALL.into_iter().find(|m| m.name() == name)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a graph has come. The verifier asks more of a later stage.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Stage {
    /// As the importer builds it: only imported operations.
    Imported,
    /// Passes have been at it: any operation.
    Fused,
    /// Ready for the plan: layouts are resolved, operations on weights have kernels, quantized weights meet quantized rows.
    Planned,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Stage; 3] = [Stage::Imported, Stage::Fused, Stage::Planned];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Imported => "imported",
            Stage::Fused => "fused",
            Stage::Planned => "planned",
        }
    }

    /// The stage named `name` in text form.
    pub fn from_name(name: &str) -> Option<Stage> {
        Stage::ALL.into_iter().find(|s| s.name() == name)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
