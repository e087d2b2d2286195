//! What packing did, for reports.

use crate::plan::layout::Format;
use moec_ir::graph::Role;

/// One item, or several taken together.
#[derive(Clone, PartialEq, Debug)]
pub struct Packed {
    /// The item's name; of several, their role's.
    pub name: String,
    /// What it is for; `None` for tables that moec computes.
    pub role: Option<Role>,
    /// How it is stored.
    pub format: Format,
    /// Number of weights, padding not counted.
    pub weights: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Sum of the squared differences between weights and what was stored.
    pub error: f64,
    /// Sum of the squared weights.
    pub energy: f64,
}

impl Packed {
    /// The error of storing, relative: √(Σ (weight − stored)² / Σ weight²). 0 when all weights are 0.
    pub fn relative_rms(&self) -> f64 {
        if self.energy > 0.0 { (self.error / self.energy).sqrt() } else { 0.0 }
    }
}

/// What packing did.
#[derive(Clone, PartialEq, Debug)]
pub struct PackReport {
    /// The items, in their order.
    pub items: Vec<Packed>,
}

impl PackReport {
    /// Weights stored.
    pub fn weights(&self) -> u64 {
        self.items.iter().map(|item| item.weights).sum()
    }

    /// Bytes written.
    pub fn bytes(&self) -> u64 {
        self.items.iter().map(|item| item.bytes).sum()
    }

    /// The items of each role and format taken together, in order of their first.
    pub fn by_role(&self) -> Vec<Packed> {
        let mut sums: Vec<Packed> = Vec::new();
        for item in &self.items {
            match sums.iter_mut().find(|sum| (sum.role, sum.format) == (item.role, item.format)) {
                Some(sum) => {
                    sum.weights += item.weights;
                    sum.bytes += item.bytes;
                    sum.error += item.error;
                    sum.energy += item.energy;
                }
                None => {
                    let name = item.role.map_or("tables", Role::name).to_string();
                    sums.push(Packed { name, ..item.clone() });
                }
            }
        }
        sums
    }
}
