//! Small operations: one row at a time, shared out by token.
//!
//! In `decode` every worker does them for itself, in its own memory. Deliberately absent: products, attention and routing.

use super::PlanError;
use super::buffers::{BufferId, Scope};
use super::layout::QuantizedRow;
use super::payload::Arrangement;
use super::planner::{Place, Planner, Share, Split, call};
use super::program::{Action, Expr, Field};
use super::stages::{Rows, Stages, WORD};
use crate::kernels::{Elementwise, ElementwiseOp, Embed, EmbedTile, GateRow, Norm, Outputs, Quantize, SoftCap};
use moec_abi::{LANES, padded_head_dim, round_up};
use moec_ir::graph::{Kind, NodeId, ValueId, WeightId};

impl Stages<'_> {
    /// Where the result of a small operation goes: each worker's own memory for the one token of `decode`, shared memory otherwise.
    pub(super) fn small(&self, rows: Rows) -> (Scope, Split) {
        match (self.is_decode(), rows) {
            (true, Rows::Tokens | Rows::Slots(_)) => (Scope::Worker, Split::Everyone),
            (false, Rows::Tokens) | (_, Rows::Logits) => (Scope::Shared, Split::Tokens),
            (false, Rows::Slots(_)) => (Scope::Shared, Split::Other),
        }
    }

    /// Appends `body` for each row that this worker does; the operation must have begun.
    pub(super) fn each_row(&mut self, rows: Rows, body: impl FnOnce(&mut Planner, &mut Vec<Action>, Expr)) {
        let mut actions = Vec::new();
        let count = self.row_count(rows);
        let share = match self.small(rows).1 {
            Split::Everyone => Share { from: Expr::Int(0), to: count },
            Split::Tokens | Split::Other => self.planner.share(&mut actions, count),
        };
        self.planner.each(&mut actions, share, 1, body);
        self.planner.push(actions);
    }

    pub(super) fn embed(&mut self, w: WeightId, scale: Option<f32>, y: ValueId) -> Result<(), PlanError> {
        // The residual stream is written by rows of matrices later on: it is always shared.
        let place = self.allot(y, Scope::Shared);
        let (index, item) = self.item(w);
        let scale_bits = scale.map(f32::to_bits);
        let kernel: Box<dyn Fn(Expr, Expr) -> Action> = match item.arrangement {
            Arrangement::Tiles { .. } => {
                let kernel = EmbedTile { format: item.format, k: item.columns, scale_bits };
                let tile_bytes = item.tile_bytes();
                Box::new(move |token, y| {
                    let tile = token.clone() / LANES;
                    let lane = token - tile.clone() * LANES;
                    call(kernel.clone(), [Self::weight(index) + tile * tile_bytes, lane, y])
                })
            }
            _ => {
                let kernel = Embed { format: item.format, h: item.columns, scale_bits };
                let row_bytes = item.row_bytes();
                Box::new(move |token, y| call(kernel.clone(), [Self::weight(index) + token * row_bytes, y]))
            }
        };
        self.planner.begin("embed", Split::Tokens, &[], &[place.buffer]);
        let mut actions = Vec::new();
        let count = self.row_count(Rows::Tokens);
        let share = self.planner.share(&mut actions, count);
        self.planner.each(&mut actions, share, 1, |planner, actions, t| {
            let token = (Expr::from(Field::TokenIds) + t.clone() * WORD).load_u32();
            let token = planner.bind(actions, token);
            actions.push(kernel(token, place.row(t)));
        });
        self.planner.push(actions);
        Ok(())
    }

    pub(super) fn norm(
        &mut self,
        x: ValueId,
        w: WeightId,
        eps: f32,
        quantized: Option<ValueId>,
        y: ValueId,
    ) -> Result<(), PlanError> {
        let rows = self.rows(x);
        let (scope, split) = self.small(rows);
        let keep = rows == Rows::Logits;
        let wanted = keep || quantized.is_none() || self.graph.is_used(y);
        let from = self.place(x);
        let (index, _) = self.item(w);
        let h = self.columns(x);
        let y = match (keep, wanted) {
            (true, _) => {
                let stride = self.row_bytes(y);
                Some(self.set(y, Place { buffer: self.kept[2], offset: 0, stride }))
            }
            (false, true) => Some(self.allot(y, scope)),
            (false, false) => None,
        };
        let q = quantized.map(|q| self.allot(q, scope));
        let outputs = match (y, q) {
            (Some(_), Some(_)) => Outputs::Both,
            (None, Some(_)) => Outputs::Quantized,
            (_, None) => Outputs::F32,
        };
        let kernel = Norm { h, width: h, eps_bits: eps.to_bits(), outputs, row: self.graph.row_content() };
        let writes: Vec<BufferId> = [y, q].into_iter().flatten().map(|p| p.buffer).collect();
        self.planner.begin("norm", split, &[from.buffer], &writes);
        self.each_row(rows, |_, actions, t| {
            let row = |p: Option<Place>| p.map_or(Expr::Int(0), |p| p.row(t.clone()));
            actions.push(call(kernel, [from.row(t.clone()), Self::weight(index), row(y), row(q)]));
        });
        Ok(())
    }

    pub(super) fn quantize(&mut self, x: ValueId, q: ValueId) -> Result<(), PlanError> {
        let (scope, _) = self.small(self.rows(x));
        let to = self.allot(q, scope);
        self.quantize_into(x, to);
        if let Some(&order) = self.by_expert.get(&x) {
            self.by_expert.insert(q, order);
        }
        Ok(())
    }

    /// Quantizes the rows of `x` to `to`.
    pub(super) fn quantize_into(&mut self, x: ValueId, to: Place) {
        let rows = self.rows(x);
        let (_, split) = self.small(rows);
        let from = self.place(x);
        let kernel = Quantize { k: self.columns(x), row: self.graph.row_content() };
        self.planner.begin("quantize", split, &[from.buffer], &[to.buffer]);
        self.each_row(rows, |_, actions, t| actions.push(call(kernel, [from.row(t.clone()), to.row(t)])));
    }

    /// The rows of `x` quantized: `x` itself when it is.
    pub(super) fn quantized(&mut self, x: ValueId) -> Place {
        if self.ty(x).kind == Kind::Q8 {
            return self.place(x);
        }
        let rows = self.rows(x);
        let (scope, _) = self.small(rows);
        let stride = QuantizedRow::new(self.columns(x), self.graph.row_content()).stride();
        let bytes = self.row_limit(rows) * stride;
        let buffer = self.planner.buffers().add(format!("t{}.q8", x.0), scope, bytes);
        let to = Place { buffer, offset: 0, stride };
        self.quantize_into(x, to);
        to
    }

    pub(super) fn elementwise(&mut self, op: ElementwiseOp, from: &[ValueId], to: ValueId) -> Result<(), PlanError> {
        let rows = self.rows(to);
        let (scope, split) = self.small(rows);
        let sources: Vec<Place> = from.iter().map(|&v| self.place(v)).collect();
        let to_place = self.allot(to, scope);
        let columns = self.padded_columns(to);
        let reads: Vec<BufferId> = sources.iter().map(|p| p.buffer).collect();
        self.planner.begin(op.name(), split, &reads, &[to_place.buffer]);
        self.each_row(rows, |_, actions, t| {
            let mut args: Vec<Expr> = sources.iter().map(|p| p.row(t.clone())).collect();
            args.extend([to_place.row(t), columns.into()]);
            actions.push(call(Elementwise { op }, args));
        });
        Ok(())
    }

    /// Soft-capped rows. Where they are what the step returns, each worker caps the columns that it computed itself, in place: the shares are those of
    /// the product, so nothing has to be waited for.
    pub(super) fn soft_cap(&mut self, x: ValueId, cap: f32, y: ValueId) -> Result<(), PlanError> {
        let rows = self.rows(y);
        let kernel = SoftCap { cap_bits: cap.to_bits() };
        let columns = round_up(self.columns(y), LANES);
        if !self.is_output(y) {
            let (scope, split) = self.small(rows);
            let (from, to) = (self.place(x), self.allot(y, scope));
            self.planner.begin("soft_cap", split, &[from.buffer], &[to.buffer]);
            self.each_row(rows, |_, actions, t| {
                actions.push(call(kernel, [from.row(t.clone()), to.row(t), columns.into()]));
            });
            return Ok(());
        }
        let from = self.places.get(&x).copied();
        let reads: Vec<BufferId> = from.iter().map(|place| place.buffer).collect();
        self.planner.begin("soft_cap", Split::Other, &reads, &[]);
        let mut actions = Vec::new();
        let tiles = self.planner.share(&mut actions, columns / LANES);
        let first = self.planner.bind(&mut actions, tiles.from.clone() * (LANES * WORD));
        let count = self.planner.bind(&mut actions, (tiles.to - tiles.from) * LANES);
        let all = Share { from: Expr::Int(0), to: self.row_count(rows) };
        self.planner.each(&mut actions, all, 1, |_, actions, row| {
            let logits = Expr::from(Field::Logits) + row.clone() * (columns * WORD);
            let from = from.map_or(logits.clone(), |place| place.row(row));
            actions.push(call(kernel, [from + first.clone(), logits + first, count]));
        });
        self.planner.push(actions);
        Ok(())
    }

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
        let kernel = Norm {
            h,
            width: width / runs,
            eps_bits: eps.to_bits(),
            outputs: Outputs::F32,
            row: self.graph.row_content(),
        };
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

    /// A copy of `x` in shared memory, to be changed in place.
    pub(super) fn copy_shared(&mut self, x: ValueId, to: ValueId) -> Place {
        let from = self.place(x);
        let place = self.allot(to, Scope::Shared);
        let columns = self.padded_columns(to);
        self.planner.begin("copy", Split::Tokens, &[from.buffer], &[place.buffer]);
        let mut actions = Vec::new();
        let count = self.row_count(self.rows(to));
        let share = self.planner.share(&mut actions, count);
        let kernel = Elementwise { op: ElementwiseOp::Copy };
        self.planner.each(&mut actions, share, 1, |_, actions, t| {
            actions.push(call(kernel, [from.row(t.clone()), place.row(t), columns.into()]));
        });
        self.planner.push(actions);
        place
    }

    /// The place of `residual`, to be changed in place into `y`: its own when nothing else reads it, else a copy.
    pub(super) fn in_place(&mut self, residual: ValueId, y: ValueId, node: NodeId) -> Place {
        let place = self.place(residual);
        if self.is_last_use(residual, node) && self.scope(place) == Scope::Shared {
            return self.set(y, place);
        }
        self.copy_shared(residual, y)
    }

    pub(super) fn slice(&mut self, x: ValueId, start: usize, y: ValueId) -> Result<(), PlanError> {
        let from = self.place(x);
        let start = match self.heads.of(x) {
            Some(dim) => start / dim * padded_head_dim(dim),
            None => start,
        };
        if start % LANES != 0 {
            return Err(PlanError::Unsupported(format!("a slice that starts at column {start}")));
        }
        self.set(y, Place { offset: from.offset + start * WORD, ..from });
        Ok(())
    }

    pub(super) fn select_rows(&mut self, x: ValueId, y: ValueId) -> Result<(), PlanError> {
        let from = self.place(x);
        let to = self.allot(y, Scope::Shared);
        let columns = self.padded_columns(y);
        self.planner.begin("select_rows", Split::Other, &[from.buffer], &[to.buffer]);
        self.each_row(Rows::Logits, |_, actions, i| {
            let row = (Expr::from(Field::LogitRows) + i.clone() * WORD).load_u32();
            let kernel = Elementwise { op: ElementwiseOp::Copy };
            actions.push(call(kernel, [from.row(row), to.row(i), columns.into()]));
        });
        Ok(())
    }
}
