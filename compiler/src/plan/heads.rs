//! Which values are made of attention heads, and so are laid out with each head padded.
//!
//! Heads are padded to [`padded_head_dim`](moec_abi::padded_head_dim) in queries, keys, values and the output of attention. The layout spreads from
//! the operations that know heads (attention, rotation, the KV store) to the values that flow into them and out of them, and from there to the rows and
//! columns of the matrices that make or read such values. Deliberately absent: addresses.

use moec_ir::graph::{Graph, Op, ValueId, WeightId};
use std::collections::HashMap;

/// The head size of each value and weight axis that is divided into heads.
#[derive(Clone, Debug, Default)]
pub struct HeadLayout {
    values: HashMap<ValueId, usize>,
    rows: HashMap<WeightId, usize>,
    columns: HashMap<WeightId, usize>,
}

impl HeadLayout {
    /// Finds the heads of a graph.
    pub fn new(graph: &Graph) -> HeadLayout {
        let mut layout = HeadLayout::default();
        // Backwards: what flows into operations that know heads.
        for node in graph.nodes().rev() {
            let results = graph.results(node);
            match graph.op(node) {
                Op::Rope { x, head_dim, .. } => {
                    layout.values.insert(*x, *head_dim);
                    layout.values.insert(results[0], *head_dim);
                }
                Op::HeadNorm { x, w, head_dim, .. } => {
                    layout.values.extend([(*x, *head_dim), (results[0], *head_dim)]);
                    layout.columns.insert(*w, *head_dim);
                }
                Op::AddBias { x, w } => {
                    if let Some(&dim) = layout.values.get(&results[0]) {
                        layout.values.insert(*x, dim);
                        layout.columns.insert(*w, dim);
                    }
                }
                Op::KvStore { k, v, head_dim, .. } => {
                    layout.values.extend([(*k, *head_dim), (*v, *head_dim)]);
                }
                Op::Attention { q, head_dim, .. } => {
                    layout.values.extend([(*q, *head_dim), (results[0], *head_dim)]);
                }
                Op::QkvRopeStore { w, head_dim, .. } => {
                    layout.values.insert(results[0], *head_dim);
                    layout.rows.insert(*w, *head_dim);
                }
                Op::Slice { x, .. } => {
                    if let Some(&dim) = layout.values.get(&results[0]) {
                        layout.values.insert(*x, dim);
                    }
                }
                Op::Matmul { w, .. } => {
                    if let Some(&dim) = layout.values.get(&results[0]) {
                        layout.rows.insert(*w, dim);
                    }
                }
                _ => {}
            }
        }
        // Forwards: what reads values made of heads.
        for node in graph.nodes() {
            let results = graph.results(node);
            match graph.op(node) {
                Op::Quantize { x } => {
                    if let Some(&dim) = layout.values.get(x) {
                        layout.values.insert(results[0], dim);
                    }
                }
                Op::Matmul { x, w } | Op::MatmulAdd { x, w, .. } => {
                    if let Some(&dim) = layout.values.get(x) {
                        layout.columns.insert(*w, dim);
                    }
                }
                _ => {}
            }
        }
        layout
    }

    /// The head size of a value's rows, if they are made of heads.
    pub fn of(&self, v: ValueId) -> Option<usize> {
        self.values.get(&v).copied()
    }

    /// The head size of a weight's rows.
    pub fn of_rows(&self, w: WeightId) -> Option<usize> {
        self.rows.get(&w).copied()
    }

    /// The head size of a weight's columns.
    pub fn of_columns(&self, w: WeightId) -> Option<usize> {
        self.columns.get(&w).copied()
    }
}
