//! Routing: the choice of experts, the order of tokens by expert, and the combination of what experts give.
//!
//! Deliberately absent: the products with experts ([`super::products`]).

use super::PlanError;
use super::buffers::Scope;
use super::planner::{Place, Split, call};
use super::program::{Action, Expr, Field};
use super::stages::{Rows, Stages, WORD};
use crate::kernels::{Combine, SortByExpert, TopK};
use moec_abi::round_up;
use moec_ir::graph::ValueId;

/// Layout of what `sort_by_expert` leaves: where each expert's tokens begin, the tokens by expert, and where each (token, slot) went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sorted {
    /// Offset of the tokens by expert.
    pub order: usize,
    /// Offset of the place of each (token, slot).
    pub position: usize,
    /// Size of all.
    pub bytes: usize,
}

impl Sorted {
    /// For `experts` experts and lists of `pairs` bytes.
    pub fn new(experts: usize, pairs: usize) -> Sorted {
        let order = round_up((experts + 1) * WORD, 64);
        let position = order + round_up(pairs, 64);
        Sorted { order, position, bytes: position + round_up(pairs, 64) }
    }
}

impl Stages<'_> {
    pub(super) fn top_k(
        &mut self,
        logits: ValueId,
        kernel: TopK,
        experts: ValueId,
        weights: ValueId,
    ) -> Result<(), PlanError> {
        let (from, k) = (self.place(logits), kernel.k);
        let layer = self.routed;
        self.routed += 1;
        let first = layer * self.shape.max_tokens * k * WORD;
        let [routes, route_weights, _] = self.kept;
        let kept = [routes, route_weights].map(|buffer| Place { buffer, offset: first, stride: k * WORD });
        let (scope, split) = self.small(Rows::Tokens);
        let run =
            |t: Expr, to: [Place; 2]| call(kernel.clone(), [from.row(t.clone()), to[0].row(t.clone()), to[1].row(t)]);
        if scope == Scope::Worker {
            // Every worker finds out for itself; one also leaves the result for the caller.
            let own = [experts, weights].map(|v| self.allot(v, Scope::Worker));
            self.planner.begin("top_k", split, &[from.buffer], &own.map(|p| p.buffer));
            self.planner.push([run(Expr::Int(0), own)]);
            let index = Expr::from(Field::Worker);
            self.planner.touch_kept(&kept.map(|p| p.buffer));
            self.planner.push([Action::Switch { on: index, cases: vec![vec![run(Expr::Int(0), kept)]] }]);
        } else {
            self.set(experts, kept[0]);
            self.set(weights, kept[1]);
            self.planner.begin("top_k", split, &[from.buffer], &kept.map(|p| p.buffer));
            self.each_row(Rows::Tokens, |_, actions, t| actions.push(run(t, kept)));
        }
        Ok(())
    }

    pub(super) fn sort_by_expert(&mut self, experts: ValueId, count: usize, order: ValueId) -> Result<(), PlanError> {
        // Every worker sorts for itself: it is little work and saves a barrier.
        let Rows::Tokens = self.rows(experts) else {
            return Err(PlanError::Unsupported("experts that are not chosen by token".to_string()));
        };
        let from = self.place(experts);
        let k = self.ty(experts).columns().expect("a known number of experts for each token");
        let pairs = self.row_limit(Rows::Slots(k)) * WORD;
        let at = Sorted::new(count, pairs);
        let buffer = self.planner.buffers().add(format!("t{}.sorted", order.0), Scope::Worker, at.bytes);
        let place = self.set(order, Place { buffer, offset: 0, stride: 0 });
        self.planner.begin("sort_by_expert", Split::Everyone, &[from.buffer], &[buffer]);
        let kernel = SortByExpert { experts: count, k };
        let tokens = self.row_count(Rows::Tokens);
        let base = place.row(Expr::Int(0));
        let args = [from.row(Expr::Int(0)), tokens, base.clone(), base.clone() + at.order, base + at.position];
        self.planner.push([call(kernel, args)]);
        Ok(())
    }

    pub(super) fn expert_combine(&mut self, y: ValueId, weights: ValueId, out: ValueId) -> Result<(), PlanError> {
        let Rows::Slots(k) = self.rows(y) else {
            return Err(PlanError::Unsupported("a combination of rows without slots".to_string()));
        };
        let (scope, split) = self.small(Rows::Tokens);
        let (from, scores) = (self.place(y), self.place(weights));
        let to = self.allot(out, scope);
        let columns = self.padded_columns(out);
        let kernel = Combine { k, stride_d: from.stride, gather: false, residual: false };
        // Rows of slots are not rows of tokens: whoever wrote them divided the work otherwise.
        let split = if split == Split::Everyone { split } else { Split::Other };
        self.planner.begin("expert_combine", split, &[from.buffer, scores.buffer], &[to.buffer]);
        self.each_row(Rows::Tokens, |_, actions, t| {
            let args = [from.row(t.clone() * k), Expr::Int(0), scores.row(t.clone()), to.row(t), columns.into()];
            actions.push(call(kernel, args));
        });
        Ok(())
    }
}
