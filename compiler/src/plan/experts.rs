//! Products with experts: those of each token with its own, or those of each expert with the tokens that chose it.
//!
//! Experts are divided by rows of *every* expert, so that the workers' shares are equal however the tokens are routed. Where the experts lie in two formats, there is a
//! product for each, and [`by_format`] chooses between them. Deliberately absent: products with one matrix ([`super::products`]), and where an expert's matrix
//! lies ([`super::places`]).

use super::buffers::Scope;
use super::places::{Matrix, by_format, matrices_of_a_token, matrix, of_stage};
use super::planner::{Place, Planner, Share, Split, call};
use super::products::{Operands, Product, Results};
use super::program::{Action, Expr, StageProduct};
use super::routing::Sorted;
use super::stages::{Rows, Stages, WORD};
use super::{EXPERT_PLACES, PlanError};
use crate::kernels::{Combine, Epilogue, Matmul};
use crate::target::ProductShape;
use moec_abi::LANES;
use moec_ir::graph::{Activation, Dispatch, NodeId, ValueId, WeightId};

/// Which activation row a (token, slot) reads.
#[derive(Clone, Debug)]
enum SlotRows {
    /// The token's.
    Token,
    /// Its own, in the order of tokens.
    Slot,
    /// Its own, where the list at this address says.
    Position(Expr),
}

/// The units that a worker has of the products of a token's slots.
#[derive(Clone, Debug)]
enum SlotUnits {
    /// A part of those of all slots, which are one range, so many for each.
    Together(Share, usize),
    /// The same of every slot.
    Each(Share),
}

/// The operands of the experts' second product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Down {
    pub h: ValueId,
    pub experts: ValueId,
    pub weights: ValueId,
    pub w: WeightId,
    pub residual: ValueId,
    pub dispatch: Dispatch,
    pub order: Option<ValueId>,
}

impl Stages<'_> {
    /// The address of the places of the experts of the last choice that was planned, if they do not lie in their own order.
    fn expert_places(&self) -> Option<Expr> {
        let index = self.payload.find(EXPERT_PLACES)?;
        Some(Self::weight(index) + (self.routed - 1) * self.payload.items[index].row_bytes())
    }

    /// The products with the experts of `w`: one for each format that these lie in, by place.
    fn products(&mut self, x: ValueId, w: WeightId) -> Vec<Product> {
        let last = self.product(x, w);
        let Some(exception) = &self.graph.weight(w).exception else { return vec![last] };
        let name = format!("{}.{}", self.graph.weight(w).name, exception.layout);
        vec![self.product_at(last.x, self.named(&name).0), last]
    }

    /// Notes products with the experts of a weight, of which a token meets `slots`, and what they cost.
    fn account_experts(&mut self, products: &[Product], slots: usize, epilogue: Epilogue, stride: usize) {
        let items: Vec<_> = products.iter().map(|product| &self.payload.items[product.index]).collect();
        let multiply_adds = products[0].tiles * LANES * products[0].k;
        if items[0].router.is_none() {
            // The one expert that there is.
            self.account(&products[0], epilogue, stride);
            return;
        }
        for (product, item) in products.iter().zip(&items) {
            let shape = ProductShape { format: product.format, k: product.k, epilogue };
            let matrices = matrices_of_a_token(item, self.shape);
            self.planner.product(StageProduct { weight: product.index, shape, matrices, stride });
        }
        self.planner.cost_of_experts(of_stage(&items, self.shape), slots * multiply_adds);
    }

    /// Products with each token's own experts, one (token, slot) at a time. The rows of all slots are one range, shared out as a whole; where experts lie
    /// in two formats, one slot may be twice the work of another, and the rows of each are shared out.
    #[allow(clippy::too_many_arguments)]
    fn by_slot(
        &mut self,
        actions: &mut Vec<Action>,
        products: &[Product],
        epilogue: Epilogue,
        experts: Place,
        slots: usize,
        rows: &SlotRows,
        y: Place,
    ) {
        let units = products[0].tiles / epilogue.tiles();
        let together = products.len() == 1;
        let share = self.planner.share(actions, if together { slots * units } else { units });
        let units = if together { SlotUnits::Together(share, units) } else { SlotUnits::Each(share) };
        self.slots_in_turn(actions, products, epilogue, experts, slots, rows, y, &units);
    }

    /// The worker's units of products with each token's own experts, one (token, slot) at a time.
    #[allow(clippy::too_many_arguments)]
    fn slots_in_turn(
        &mut self,
        actions: &mut Vec<Action>,
        products: &[Product],
        epilogue: Epilogue,
        experts: Place,
        slots: usize,
        rows: &SlotRows,
        y: Place,
        units: &SlotUnits,
    ) {
        let count = self.row_count(Rows::Tokens);
        let kernels: Vec<Matmul> =
            products.iter().map(|product| self.single(product, Results { epilogue, stride: 0 })).collect();
        let places = self.expert_places();
        self.planner.each(actions, Share { from: Expr::Int(0), to: count }, 1, |planner, actions, t| {
            for slot in 0..slots {
                let (from, to) = match units {
                    SlotUnits::Together(share, units) => {
                        let first = slot * units;
                        let from = planner.bind(actions, share.from.clone().max(first).min(first + units) - first);
                        (from, share.to.clone().max(first).min(first + units) - first)
                    }
                    SlotUnits::Each(share) => (share.from.clone(), share.to.clone()),
                };
                let expert = (experts.row(t.clone()) + slot * WORD).load_u32();
                let Matrix { product, address } = matrix(planner, actions, products, places.as_ref(), expert);
                let row = t.clone() * slots + slot;
                let x = products[0].x.row(match rows {
                    SlotRows::Token => t.clone(),
                    SlotRows::Slot => row.clone(),
                    SlotRows::Position(at) => (at.clone() + row.clone() * WORD).load_u32(),
                });
                let y = y.row(row) + from.clone() * (LANES * WORD);
                let case = |((kernel, address), product): ((&Matmul, Expr), &Product)| {
                    let w = address + from.clone() * (epilogue.tiles() * product.tile_bytes);
                    vec![call(kernel.clone(), [w, x.clone(), y.clone(), to.clone() - from.clone()])]
                };
                by_format(actions, product, kernels.iter().zip(address).zip(products).map(case).collect());
            }
        });
    }

    /// Products of each expert with the tokens that chose it. The worker has `units` of every expert.
    #[allow(clippy::too_many_arguments)]
    fn experts_in_turn(
        &mut self,
        actions: &mut Vec<Action>,
        products: &[Product],
        epilogue: Epilogue,
        sorted: Place,
        layout: Sorted,
        experts: usize,
        gather: bool,
        y: Place,
        units: &Share,
    ) {
        let all = Share { from: Expr::Int(0), to: experts.into() };
        let var = self.planner.var();
        let mut inner = Vec::new();
        let expert = Expr::from(var);
        let offsets = sorted.row(Expr::Int(0)) + expert.clone() * WORD;
        let first = self.planner.bind(&mut inner, offsets.clone().load_u32());
        let count = self.planner.bind(&mut inner, (offsets + WORD).load_u32() - first.clone());
        let places = self.expert_places();
        let Matrix { product, address } = matrix(&mut self.planner, &mut inner, products, places.as_ref(), expert);
        let mut cases = Vec::new();
        for (product, address) in products.iter().zip(address) {
            let mut case = Vec::new();
            let w = self.planner.bind(&mut case, address);
            let y_first = self.planner.bind(&mut case, y.row(first.clone()));
            let (x, rows) = if gather {
                let rows = sorted.row(Expr::Int(0)) + layout.order + first.clone() * WORD;
                (product.x.row(Expr::Int(0)), Some(self.planner.bind(&mut case, rows)))
            } else {
                (product.x.row(first.clone()), None)
            };
            let operands = Operands { w, y: y_first, x, rows, tokens: count.clone() };
            self.units(&mut case, product, Results { epilogue, stride: y.stride }, units.clone(), &operands);
            cases.push(case);
        }
        by_format(&mut inner, product, cases);
        actions.push(Action::Loop { var, from: all.from, to: all.to, step: 1, body: inner });
    }

    fn sorted(&self, order: ValueId, experts: usize, slots: usize) -> (Place, Sorted) {
        let pairs = self.row_limit(Rows::Slots(slots)) * WORD;
        (self.place(order), Sorted::new(experts, pairs))
    }

    fn slots(&self, v: ValueId) -> Result<usize, PlanError> {
        match self.rows(v) {
            Rows::Slots(k) => Ok(k),
            Rows::Tokens | Rows::Logits => {
                Err(PlanError::Unsupported("a product with experts whose result has no slots".to_string()))
            }
        }
    }

    pub(super) fn expert_matmul(
        &mut self,
        x: ValueId,
        experts: ValueId,
        w: WeightId,
        y: ValueId,
    ) -> Result<(), PlanError> {
        let slots = self.slots(y)?;
        let order = self.by_expert.get(&x).copied();
        let rows = match (self.rows(x), order) {
            (Rows::Slots(_), Some(order)) => {
                let (place, layout) = self.sorted(order, self.graph.weight(w).experts(), slots);
                SlotRows::Position(place.row(Expr::Int(0)) + layout.position)
            }
            (Rows::Slots(_), None) => SlotRows::Slot,
            (Rows::Tokens | Rows::Logits, _) => SlotRows::Token,
        };
        let products = self.products(x, w);
        let chosen = self.place(experts);
        let to = self.allot(y, Scope::Shared);
        let mut reads = vec![products[0].x.buffer, chosen.buffer];
        reads.extend(order.map(|o| self.place(o).buffer));
        self.planner.begin("expert_matmul", Split::Other, &reads, &[to.buffer]);
        self.account_experts(&products, slots, Epilogue::Store, to.stride);
        let mut actions = Vec::new();
        self.by_slot(&mut actions, &products, Epilogue::Store, chosen, slots, &rows, to);
        self.planner.push(actions);
        Ok(())
    }

    pub(super) fn expert_gate_up(
        &mut self,
        x: ValueId,
        experts: ValueId,
        w: WeightId,
        activation: Activation,
        (dispatch, order): (Dispatch, Option<ValueId>),
        y: ValueId,
    ) -> Result<(), PlanError> {
        let epilogue = Epilogue::Gated(activation);
        let slots = self.slots(y)?;
        let products = self.products(x, w);
        let chosen = self.place(experts);
        let to = self.allot(y, Scope::Shared);
        let mut reads = vec![products[0].x.buffer, chosen.buffer];
        reads.extend(order.map(|o| self.place(o).buffer));
        self.planner.begin("expert_gate_up", Split::Other, &reads, &[to.buffer]);
        self.account_experts(&products, slots, epilogue, to.stride);
        let mut actions = Vec::new();
        match (dispatch, order) {
            (Dispatch::Grouped, Some(order)) => {
                let count = self.graph.weight(w).experts();
                let (place, layout) = self.sorted(order, count, slots);
                let units = self.planner.share(&mut actions, products[0].tiles / 2);
                self.experts_in_turn(&mut actions, &products, epilogue, place, layout, count, true, to, &units);
                self.by_expert.insert(y, order);
            }
            (Dispatch::Decode | Dispatch::General | Dispatch::Grouped, _) => {
                self.by_slot(&mut actions, &products, epilogue, chosen, slots, &SlotRows::Token, to);
            }
        }
        self.planner.push(actions);
        Ok(())
    }

    pub(super) fn expert_down_add(&mut self, down: &Down, y: ValueId, node: NodeId) -> Result<(), PlanError> {
        let slots = self.slots(down.h)?;
        let products = self.products(down.h, down.w);
        let product = products[0].clone();
        let (chosen, scores) = (self.place(down.experts), self.place(down.weights));
        let to = self.in_place(down.residual, y, node);
        let stride = product.tiles * LANES * WORD;
        let bytes = self.row_limit(Rows::Slots(slots)) * stride;
        let buffer = self.planner.buffers().add(format!("t{}.slots", y.0), Scope::Shared, bytes);
        let parts = Place { buffer, offset: 0, stride };
        let mut reads = vec![product.x.buffer, chosen.buffer, scores.buffer];
        reads.extend(down.order.map(|o| self.place(o).buffer));
        self.planner.begin("expert_down_add", Split::Other, &reads, &[to.buffer, buffer]);
        self.account_experts(&products, slots, Epilogue::Store, stride);

        // A worker makes its own columns of every slot's result and adds them up itself, so no barrier is needed between.
        let mut actions = Vec::new();
        let tiles = self.planner.share(&mut actions, product.tiles);
        let count = self.row_count(Rows::Tokens);
        let order = down.order.filter(|_| self.by_expert.contains_key(&down.h));
        let positions = match (down.dispatch, order) {
            (Dispatch::Grouped, Some(order)) => {
                let experts = self.graph.weight(down.w).experts();
                let (place, layout) = self.sorted(order, experts, slots);
                let epilogue = Epilogue::Store;
                self.experts_in_turn(&mut actions, &products, epilogue, place, layout, experts, false, parts, &tiles);
                Some(place.row(Expr::Int(0)) + layout.position)
            }
            (Dispatch::Decode | Dispatch::General | Dispatch::Grouped, _) => {
                let (epilogue, units) = (Epilogue::Store, SlotUnits::Each(tiles.clone()));
                self.slots_in_turn(&mut actions, &products, epilogue, chosen, slots, &SlotRows::Slot, parts, &units);
                None
            }
        };
        let kernel = Combine { k: slots, stride_d: stride, gather: positions.is_some(), residual: true };
        let columns = self.planner.bind(&mut actions, (tiles.to - tiles.from.clone()) * LANES);
        let first = self.planner.bind(&mut actions, tiles.from * (LANES * WORD));
        self.planner.each(&mut actions, Share { from: Expr::Int(0), to: count }, 1, |_: &mut Planner, actions, t| {
            let (d, position) = match &positions {
                Some(at) => (parts.row(Expr::Int(0)), at.clone() + t.clone() * (slots * WORD)),
                None => (parts.row(t.clone() * slots), Expr::Int(0)),
            };
            let args = [d + first.clone(), position, scores.row(t.clone()), to.row(t) + first.clone(), columns];
            actions.push(call(kernel, args));
        });
        self.planner.push(actions);
        Ok(())
    }
}
