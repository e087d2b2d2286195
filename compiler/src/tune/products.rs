//! The products of a model by shape: what is there to be tuned, and what it is worth.
//!
//! Deliberately absent: products with routers, which take no time.

use crate::plan::Plan;
use crate::plan::program::{Program, Stage};
use crate::target::ProductShape;
use moec_abi::LANES;
use moec_ir::graph::Role;

/// The middles of the eight equally likely parts of the normal distribution, in standard deviations.
const EIGHTHS: [f64; 8] = [-1.534, -0.887, -0.489, -0.157, 0.157, 0.489, 0.887, 1.534];

/// Most matrices of a [load](Product::load).
pub const MOST_MATRICES: usize = EIGHTHS.len();

/// The products of one shape in a model.
#[derive(Clone, PartialEq, Debug)]
pub struct Product {
    /// What they have in common.
    pub shape: ProductShape,
    /// Tiles of 16 rows of the largest of the matrices.
    pub tiles: usize,
    /// Bytes from a token's row of its results to the next.
    pub stride: usize,
    /// Of so many matrices …
    pub experts: usize,
    /// … each token meets so many, on average.
    pub matrices: f64,
    /// Bytes of weights that one decoded token reads.
    pub decode_bytes: usize,
    /// Multiply-adds for each token of a prompt; 0 when they are for logits only.
    pub multiply_adds: usize,
}

impl Product {
    /// The tokens that meet one matrix in a step of `step` tokens, on average.
    pub fn tokens(&self, step: usize) -> usize {
        ((step as f64 * self.matrices / self.experts as f64 - 1e-9).ceil() as usize).max(1)
    }

    /// The tokens that meet some of its matrices in a step of `step` tokens. Where tokens choose experts, some experts get more than others: eight cases that are
    /// equally likely when all experts are, without those that get nothing.
    pub fn load(&self, step: usize) -> Vec<usize> {
        let chance = self.matrices / self.experts as f64;
        if step == 1 || chance >= 1.0 {
            return vec![step];
        }
        let mean = step as f64 * chance;
        let deviation = (mean * (1.0 - chance)).sqrt();
        let case = |&quantile: &f64| (mean + quantile * deviation).round().max(0.0) as usize;
        let load: Vec<usize> = EIGHTHS.iter().map(case).filter(|&tokens| tokens > 0).collect();
        if load.is_empty() { vec![1] } else { load }
    }

    /// Row tiles times tokens of one decoded token, over all matrices.
    pub fn decode_row_tokens(&self) -> f64 {
        self.decode_bytes as f64 / self.tile_bytes() as f64
    }

    /// Row tiles times tokens of a prompt of `step` tokens, over all matrices.
    pub fn row_tokens(&self, step: usize) -> f64 {
        (self.multiply_adds * step) as f64 / (LANES * self.shape.k) as f64
    }

    /// Bytes of one tile of its weights.
    pub fn tile_bytes(&self) -> usize {
        self.shape.format.tile_bytes(self.shape.k)
    }
}

/// The products that `plan` has on its first level, those that read most first.
pub fn products(plan: &Plan) -> Vec<Product> {
    let programs = &plan.levels[0];
    let mut found: Vec<Product> = Vec::new();
    collect(plan, &programs.decode, &mut found, |_, product, bytes, _| product.decode_bytes += bytes);
    collect(plan, &programs.batch, &mut found, |stage, product, _, adds| {
        if !stage.title.contains("logits") {
            product.multiply_adds += adds;
        }
    });
    found.sort_by_key(|product| (std::cmp::Reverse(product.decode_bytes), product.shape));
    found
}

/// Goes through the products of a program with the bytes and multiply-adds of each for one token.
fn collect(
    plan: &Plan,
    program: &Program,
    found: &mut Vec<Product>,
    mut add: impl FnMut(&Stage, &mut Product, usize, usize),
) {
    for stage in &program.stages {
        for used in &stage.products {
            let item = &plan.payload.items[used.weight];
            if item.role == Some(Role::Router) {
                continue;
            }
            let tiles = item.padded_rows() / LANES;
            let new = Product {
                shape: used.shape,
                tiles,
                stride: used.stride,
                experts: item.experts.max(1),
                matrices: used.matrices,
                decode_bytes: 0,
                multiply_adds: 0,
            };
            let at = found.iter().position(|product| product.shape == used.shape).unwrap_or_else(|| {
                found.push(new.clone());
                found.len() - 1
            });
            let product = &mut found[at];
            // Logits are few rows far apart; what prompts go through says how results lie.
            if !stage.title.contains("logits") && (product.multiply_adds == 0 || tiles > product.tiles) {
                *product = Product { decode_bytes: product.decode_bytes, multiply_adds: product.multiply_adds, ..new };
            }
            let times = |n: usize| (used.matrices * n as f64).round() as usize;
            add(stage, product, times(tiles * item.tile_bytes()), times(tiles * LANES * item.k()));
        }
    }
}
