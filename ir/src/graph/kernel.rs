//! Families of kernels: what `select_kernels` attaches to the operations on weights.
//!
//! A family says which generator makes the code; shapes come from the operation. Deliberately absent: tile sizes and other
//! tuning, which belong to the plan.

use std::fmt;

use super::op::Op;
use super::store::Graph;
use super::types::Mode;
use super::weight::Layout;

/// How many rows a matrix meets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Rows {
    /// One: the weights are read once and that is all the time it takes.
    One,
    /// Many: tiles of rows, weights are used again from cache.
    Many,
    /// Many, in the order of their experts.
    Grouped,
}

impl Rows {
    const fn family(self) -> &'static str {
        match self {
            Rows::One => "gemv",
            Rows::Many => "gemm",
            Rows::Grouped => "grouped_gemm",
        }
    }
}

/// The layouts that weights have once they are resolved.
fn resolved() -> impl Iterator<Item = Layout> {
    Layout::ALL.into_iter().filter(|&layout| layout != Layout::Stored)
}

/// A family of kernels. Its layout is that of the weight, never [`Layout::Stored`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kernel {
    /// Copies rows of the embedding, widened.
    EmbedRows(Layout),
    /// RMS norm of rows.
    NormRows,
    /// Adds a vector to rows.
    AddBias,
    /// Matrix times rows.
    Matmul(Rows, Layout),
    /// Matrices of experts times rows, some of the experts in the second layout.
    MatmulByExpert(Rows, Layout, Layout),
}

impl Kernel {
    /// All of them.
    pub fn all() -> Vec<Kernel> {
        let mut all: Vec<Kernel> = resolved().map(Kernel::EmbedRows).collect();
        all.extend([Kernel::NormRows, Kernel::AddBias]);
        for rows in [Rows::One, Rows::Many, Rows::Grouped] {
            all.extend(resolved().map(|layout| Kernel::Matmul(rows, layout)));
            let pairs = resolved().flat_map(|a| resolved().map(move |b| (a, b))).filter(|(a, b)| a != b);
            all.extend(pairs.map(|(a, b)| Kernel::MatmulByExpert(rows, a, b)));
        }
        all
    }

    /// The family for an operation whose weight's layout is resolved: `None` for operations without weights.
    pub fn of(graph: &Graph, op: &Op) -> Option<Kernel> {
        let weight = graph.weight(op.weight()?);
        let format = weight.format();
        let matmul = |rows| match &weight.exception {
            None => Kernel::Matmul(rows, format),
            Some(exception) => Kernel::MatmulByExpert(rows, format, exception.layout),
        };
        let rows = match graph.mode() {
            Mode::Decode => Rows::One,
            Mode::Batch => Rows::Many,
        };
        Some(match op {
            Op::Embed { .. } => Kernel::EmbedRows(format),
            Op::RmsNorm { .. } | Op::NormQuantize { .. } | Op::HeadNorm { .. } => Kernel::NormRows,
            Op::AddBias { .. } => Kernel::AddBias,
            Op::Matmul { .. } | Op::MatmulAdd { .. } | Op::GateUp { .. } | Op::QkvRopeStore { .. } => matmul(rows),
            Op::ExpertGateUp { order: Some(_), .. } | Op::ExpertDownAdd { order: Some(_), .. } => matmul(Rows::Grouped),
            Op::ExpertMatmul { .. } | Op::ExpertGateUp { .. } | Op::ExpertDownAdd { .. } => matmul(Rows::One),
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
            | Op::SortByExpert { .. } => return None,
        })
    }

    /// The kernel named `name` in text form.
    pub fn from_name(name: &str) -> Option<Kernel> {
        Kernel::all().into_iter().find(|kernel| kernel.to_string() == name)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kernel::EmbedRows(layout) => write!(f, "embed_rows_{}", layout.name()),
            Kernel::NormRows => f.write_str("norm_rows"),
            Kernel::AddBias => f.write_str("add_bias_rows"),
            Kernel::Matmul(rows, layout) => write!(f, "{}_{}", rows.family(), layout.name()),
            Kernel::MatmulByExpert(rows, layout, other) => {
                write!(f, "{}_{}_or_{}", rows.family(), layout.name(), other.name())
            }
        }
    }
}
