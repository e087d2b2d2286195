//! Biases, norms of heads and gates: what some architectures do to rows beside the common operations.
//!
//! Deliberately absent: the operations that every model has ([`super::stages`]).

use super::PlanError;
use super::buffers::Scope;
use super::planner::{Share, Split, call};
use super::program::Expr;
use super::stages::{Rows, Stages, WORD};
use crate::kernels::{Elementwise, ElementwiseOp, GateRow, Norm, Outputs};
use moec_ir::graph::{ValueId, WeightId};

impl Stages<'_> {
    pub(super) fn add_bias(&mut self, x: ValueId, w: WeightId, y: ValueId) -> Result<(), PlanError> {
        let rows = self.rows(y);
        let (scope, split) = self.small(rows);
        let from = self.place(x);
        let to = self.allot(y, scope);
        let (index, columns) = (self.item(w).0, self.padded_columns(y));
        self.planner.begin("add_bias", split, &[from.buffer], &[to.buffer]);
        self.each_row(rows, |_, actions, t| {
            let args = [from.row(t.clone()), Self::weight(index), to.row(t), columns.into()];
            actions.push(call(Elementwise { op: ElementwiseOp::Add }, args));
        });
        Ok(())
    }

    /// Norms `runs` runs of heads, `width` elements in all, one by one.
    pub(super) fn head_norm(
        &mut self,
        x: ValueId,
        w: WeightId,
        runs: usize,
        width: usize,
        eps: f32,
        y: ValueId,
    ) -> Result<(), PlanError> {
        let (scope, split) = self.small(Rows::Tokens);
        let from = self.place(x);
        let to = self.allot(y, scope);
        let (index, h) = (self.item(w).0, self.columns(x) / runs);
        let kernel = Norm { h, width: width / runs, eps_bits: eps.to_bits(), outputs: Outputs::F32 };
        self.planner.begin("head_norm", split, &[from.buffer], &[to.buffer]);
        self.each_row(Rows::Tokens, |planner, actions, t| {
            let (from, to) = (planner.bind(actions, from.row(t.clone())), planner.bind(actions, to.row(t)));
            let all = Share { from: Expr::Int(0), to: runs.into() };
            planner.each(actions, all, 1, |_, actions, run| {
                let at = run * (h * WORD);
                let args = [from + at.clone(), Self::weight(index), to + at, Expr::Int(0)];
                actions.push(call(kernel, args));
            });
        });
        Ok(())
    }

    pub(super) fn gate_rows(&mut self, x: ValueId, gate: ValueId, y: ValueId) -> Result<(), PlanError> {
        // The result is a residual of the experts' last product, which changes it in place: it is always shared.
        let (from, gates) = (self.place(x), self.place(gate));
        let to = self.allot(y, Scope::Shared);
        let columns = self.padded_columns(y);
        self.planner.begin("gate_rows", Split::Tokens, &[from.buffer, gates.buffer], &[to.buffer]);
        let mut actions = Vec::new();
        let count = self.row_count(Rows::Tokens);
        let share = self.planner.share(&mut actions, count);
        self.planner.each(&mut actions, share, 1, |_, actions, t| {
            actions.push(call(GateRow, [from.row(t.clone()), gates.row(t.clone()), to.row(t), columns.into()]));
        });
        self.planner.push(actions);
        Ok(())
    }
}
