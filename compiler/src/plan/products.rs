//! Matrix products: rows of a weight shared out to the workers, tokens taken a few at a time.
//!
//! In `decode` one call of a kernel streams all the rows of a worker's share. In `batch` each worker interleaves the tokens' activations for itself; the loop
//! over tiles of rows is outside and the loop over tokens inside, so that a tile of the weight is read from memory once and stays in the cache for all tokens. Products with experts take the same form for each expert, with the tokens that chose
//! it. Deliberately absent: everything that is not a product ([`super::stages`]).

use super::buffers::Scope;
use super::layout::Format;
use super::planner::{Place, Planner, Share, Split, call};
use super::program::{Action, Expr, Field, StageProduct};
use super::quant::CODEBOOK;
use super::routing::Sorted;
use super::stages::{Rows, Stages, WORD};
use super::{EXPERT_PLACES, PlanError};
use crate::kernels::{Combine, Epilogue, Interleave, Matmul, MatmulTuning};
use crate::target::{ProductShape, ProductTuning};
use moec_abi::LANES;
use moec_ir::graph::{Activation, Dispatch, Mode, NodeId, Role, ValueId, WeightId};

/// A weight with the activation rows that it meets.
#[derive(Clone, Debug)]
pub(super) struct Product {
    /// Index of the weight.
    index: usize,
    /// Its format.
    format: Format,
    /// Its columns as laid out.
    k: usize,
    /// Bytes from one tile to the next.
    tile_bytes: usize,
    /// Bytes from one expert to the next.
    expert_bytes: usize,
    /// Whether it has experts, of which each token meets some.
    routed: bool,
    /// Tiles of one matrix.
    tiles: usize,
    /// The activation rows.
    pub(super) x: Place,
}

/// What a product with an expert reads and writes.
#[derive(Clone, Debug)]
struct Operands {
    /// Address of the first unit of the worker's share.
    w: Expr,
    /// Where the first token's row of the share goes.
    y: Expr,
    /// Address of row 0 of the activations (with a list of rows), or of the first token's row.
    x: Expr,
    /// Address of the list of the tokens' rows, if they do not lie one after another.
    rows: Option<Expr>,
    /// How many tokens.
    tokens: Expr,
}

/// How a product's results lie, and what becomes of them.
#[derive(Clone, Copy, Debug)]
struct Results {
    epilogue: Epilogue,
    /// Bytes from a token's row to the next.
    stride: usize,
}

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

/// Where an expert's matrix lies, by the layer's table of places if there is one.
fn place_of(places: Option<&Expr>, expert: Expr) -> Expr {
    match places {
        None => expert,
        Some(table) => (table.clone() + expert * WORD).load_u32(),
    }
}

impl Stages<'_> {
    /// The address of the places of the experts of the last choice that was planned, if they do not lie in their own order.
    fn expert_places(&self) -> Option<Expr> {
        self.shape.expert_order.as_ref()?;
        let (index, item) = self.named(EXPERT_PLACES);
        Some(Self::weight(index) + (self.routed - 1) * item.row_bytes())
    }

    /// The weight `w` with rows of `x`, quantized when the weight is.
    pub(super) fn product(&mut self, x: ValueId, w: WeightId) -> Product {
        let x = if self.item(w).1.format.is_quantized() { self.quantized(x) } else { self.place(x) };
        let (index, item) = self.item(w);
        Product {
            index,
            format: item.format,
            k: item.k(),
            tile_bytes: item.tile_bytes(),
            expert_bytes: item.expert_bytes(),
            routed: item.experts > 1,
            tiles: item.padded_rows() / LANES,
            x,
        }
    }

    /// Notes products with `matrices` matrices for one token, whose rows of results lie `stride` bytes apart, and what they cost.
    pub(super) fn account(&mut self, product: &Product, matrices: usize, epilogue: Epilogue, stride: usize) {
        let shape = ProductShape { format: product.format, k: product.k, epilogue };
        self.planner.product(StageProduct { weight: product.index, shape, matrices, stride });
        let (bytes, multiply_adds) = (product.tiles * product.tile_bytes, product.tiles * LANES * product.k);
        self.planner.cost(matrices, product.routed, bytes, multiply_adds);
    }

    fn tuning(&self, product: &Product, epilogue: Epilogue) -> ProductTuning {
        self.tuning.product(ProductShape { format: product.format, k: product.k, epilogue })
    }

    /// The kernel for one token, which goes through all rows by itself.
    fn single(&self, product: &Product, results: Results) -> Matmul {
        self.kernel(product, 1, results, self.tuning(product, results.epilogue).kernel(1))
    }

    fn kernel(&self, product: &Product, tokens: usize, results: Results, tuning: MatmulTuning) -> Matmul {
        Matmul {
            format: product.format,
            k: product.k,
            tokens,
            span: self.graph.span(),
            epilogue: results.epilogue,
            // An immediate only where there is more than one row.
            y_stride: if tokens > 1 { results.stride } else { 0 },
            codebook: CODEBOOK,
            tuning,
        }
    }

    /// The products with `units` of one matrix at `w`, written at `y + 64 × unit`.
    ///
    /// For one token, one call goes through all of them. For more, as many tokens as fit the cache are interleaved, and all of them are gone
    /// through for a few units at a time, so that both stay there.
    fn units(&mut self, actions: &mut Vec<Action>, product: &Product, results: Results, units: Share, all: &Operands) {
        let unit_bytes = results.epilogue.tiles() * product.tile_bytes;
        if all.tokens == Expr::Int(1) {
            let w = all.w.clone() + units.from.clone() * unit_bytes;
            let y = all.y.clone() + units.from.clone() * (LANES * WORD);
            let kernel = self.single(product, results);
            actions.push(call(kernel, [w, all.x.clone(), y, units.to - units.from]));
            return;
        }
        let tuning = self.tuning(product, results.epilogue);
        let tile = tuning.tokens();
        let chunk = tuning.walk_tokens(product.x.stride);
        let bytes = chunk.min(self.row_limit(Rows::Slots(self.shape.experts_per_token.max(1)))) * product.x.stride;
        let interleaved = self.planner.scratch("interleaved", bytes);
        let var = self.planner.var();
        let mut inner = Vec::new();
        let first = Expr::from(var);
        let tokens = self.planner.bind(&mut inner, (all.tokens.clone() - first.clone()).min(chunk));
        let y = self.planner.bind(&mut inner, all.y.clone() + first.clone() * results.stride);
        let (x, rows) = match &all.rows {
            Some(rows) => (all.x.clone(), Some(self.planner.bind(&mut inner, rows.clone() + first * WORD))),
            None => (self.planner.bind(&mut inner, all.x.clone() + first * product.x.stride), None),
        };
        let some = Operands { tokens, y, x, rows, ..all.clone() };
        self.interleave(&mut inner, product, tile, interleaved.into(), &some);
        self.unit_loop(&mut inner, product, results, units, &Operands { x: interleaved.into(), ..some });
        actions.push(Action::Loop { var, from: Expr::Int(0), to: all.tokens.clone(), step: chunk as i64, body: inner });
    }

    /// Interleaves the tokens' rows at `to`, as many at a time as the kernels take.
    fn interleave(&mut self, actions: &mut Vec<Action>, product: &Product, tile: usize, to: Expr, from: &Operands) {
        let stride = product.x.stride;
        let gather = from.rows.is_some();
        let one = |tokens: usize, t: Expr| {
            let (x, rows) = match &from.rows {
                Some(rows) => (from.x.clone(), rows.clone() + t.clone() * WORD),
                None => (from.x.clone() + t.clone() * stride, Expr::Int(0)),
            };
            call(Interleave { bytes: stride, stride, tokens, gather }, [x, rows, to.clone() + t * stride])
        };
        self.token_tiles(actions, tile, &from.tokens, one);
    }

    /// Calls `one` for the tokens, a tile at a time, then for the rest: how many and from which on.
    fn token_tiles(
        &mut self,
        actions: &mut Vec<Action>,
        tile: usize,
        tokens: &Expr,
        one: impl Fn(usize, Expr) -> Action,
    ) {
        let whole = self.planner.bind(actions, tokens.clone() / tile * tile);
        let share = Share { from: Expr::Int(0), to: whole.clone() };
        self.planner.each(actions, share, tile as i64, |_, actions, t| actions.push(one(tile, t)));
        let cases = (0..tile).map(|rest| if rest == 0 { Vec::new() } else { vec![one(rest, whole.clone())] }).collect();
        actions.push(Action::Switch { on: tokens.clone() - whole, cases });
    }

    /// Goes through the units, a few together, with all the interleaved tokens for each.
    fn unit_loop(
        &mut self,
        actions: &mut Vec<Action>,
        product: &Product,
        results: Results,
        units: Share,
        all: &Operands,
    ) {
        let unit_bytes = results.epilogue.tiles() * product.tile_bytes;
        let tuning = self.tuning(product, results.epilogue);
        let (tile, together) = (tuning.tokens(), tuning.block_units(results.epilogue));
        let mut inner = Vec::new();
        let var = self.planner.var();
        let unit = Expr::from(var);
        let w = self.planner.bind(&mut inner, all.w.clone() + unit.clone() * unit_bytes);
        let y = self.planner.bind(&mut inner, all.y.clone() + unit.clone() * (LANES * WORD));
        let count = match together {
            1 => Expr::Int(1),
            _ => self.planner.bind(&mut inner, (units.to.clone() - unit).min(together)),
        };
        let kernels: Vec<Matmul> = (1..=tile)
            .map(|n| self.kernel(product, n, results, tuning.kernel_in_walk(n, together * unit_bytes)))
            .collect();
        self.token_tiles(&mut inner, tile, &all.tokens, |tokens, t| {
            let x = all.x.clone() + t.clone() * product.x.stride;
            call(kernels[tokens - 1].clone(), [w.clone(), x, y.clone() + t * results.stride, count.clone()])
        });
        actions.push(Action::Loop { var, from: units.from, to: units.to, step: together as i64, body: inner });
    }

    /// `y = x·wᵀ` for the given tiles; rows of `y` begin at its place.
    pub(super) fn store_product(
        &mut self,
        actions: &mut Vec<Action>,
        product: &Product,
        y: Place,
        tiles: Share,
        tokens: Expr,
    ) {
        let all = Operands {
            w: Self::weight(product.index),
            y: y.row(Expr::Int(0)),
            x: product.x.row(Expr::Int(0)),
            rows: None,
            tokens,
        };
        self.units(actions, product, Results { epilogue: Epilogue::Store, stride: y.stride }, tiles, &all);
    }

    pub(super) fn matmul(&mut self, x: ValueId, w: WeightId, y: ValueId) -> Result<(), PlanError> {
        let product = self.product(x, w);
        let rows = self.rows(y);
        let count = self.row_count(rows);
        if self.graph.weight(w).role == Role::Router {
            // Few rows: done by token, by whoever has the token.
            let (scope, split) = self.small(rows);
            let to = self.allot(y, scope);
            self.planner.begin("router", split, &[product.x.buffer], &[to.buffer]);
            self.account(&product, 1, Epilogue::Store, 0);
            let kernel = self.single(&product, Results { epilogue: Epilogue::Store, stride: 0 });
            let tiles = product.tiles;
            self.each_row(rows, |_, actions, t| {
                let args = [Self::weight(product.index), product.x.row(t.clone()), to.row(t), tiles.into()];
                actions.push(call(kernel, args));
            });
            return Ok(());
        }
        if self.is_output(y) {
            return self.logits(&product, count);
        }
        let to = self.allot(y, Scope::Shared);
        self.planner.begin("matmul", Split::Other, &[product.x.buffer], &[to.buffer]);
        self.account(&product, 1, Epilogue::Store, to.stride);
        let mut actions = Vec::new();
        let tiles = self.planner.share(&mut actions, product.tiles);
        self.store_product(&mut actions, &product, to, tiles, count);
        self.planner.push(actions);
        Ok(())
    }

    fn logits(&mut self, product: &Product, count: Expr) -> Result<(), PlanError> {
        self.planner.begin("logits", Split::Other, &[product.x.buffer], &[]);
        self.account(product, 1, Epilogue::Store, product.tiles * LANES * WORD);
        let mut actions = Vec::new();
        let tiles = self.planner.share(&mut actions, product.tiles);
        let all = Operands {
            w: Self::weight(product.index),
            y: Field::Logits.into(),
            x: product.x.row(Expr::Int(0)),
            rows: None,
            tokens: count.clone(),
        };
        let results = Results { epilogue: Epilogue::Store, stride: product.tiles * LANES * WORD };
        if self.graph.mode() == Mode::Decode {
            // One row or none.
            let mut inner = Vec::new();
            let one = Operands { tokens: Expr::Int(1), ..all };
            self.units(&mut inner, product, results, tiles, &one);
            actions.push(Action::Switch { on: count, cases: vec![Vec::new(), inner] });
        } else {
            self.units(&mut actions, product, results, tiles, &all);
        }
        self.planner.push(actions);
        Ok(())
    }

    pub(super) fn matmul_add(
        &mut self,
        x: ValueId,
        w: WeightId,
        residual: ValueId,
        y: ValueId,
        node: NodeId,
    ) -> Result<(), PlanError> {
        let product = self.product(x, w);
        let to = self.in_place(residual, y, node);
        self.planner.begin("matmul_add", Split::Other, &[product.x.buffer], &[to.buffer]);
        self.account(&product, 1, Epilogue::Add, to.stride);
        let mut actions = Vec::new();
        let tiles = self.planner.share(&mut actions, product.tiles);
        let all = Operands {
            w: Self::weight(product.index),
            y: to.row(Expr::Int(0)),
            x: product.x.row(Expr::Int(0)),
            rows: None,
            tokens: self.row_count(self.rows(y)),
        };
        let results = Results { epilogue: Epilogue::Add, stride: to.stride };
        self.units(&mut actions, &product, results, tiles, &all);
        self.planner.push(actions);
        Ok(())
    }

    pub(super) fn gate_up(
        &mut self,
        x: ValueId,
        w: WeightId,
        activation: Activation,
        y: ValueId,
    ) -> Result<(), PlanError> {
        let epilogue = Epilogue::Gated(activation);
        let product = self.product(x, w);
        let to = self.allot(y, Scope::Shared);
        self.planner.begin("gate_up", Split::Other, &[product.x.buffer], &[to.buffer]);
        self.account(&product, 1, epilogue, to.stride);
        let mut actions = Vec::new();
        let units = self.planner.share(&mut actions, product.tiles / 2);
        let all = Operands {
            w: Self::weight(product.index),
            y: to.row(Expr::Int(0)),
            x: product.x.row(Expr::Int(0)),
            rows: None,
            tokens: self.row_count(self.rows(y)),
        };
        let results = Results { epilogue, stride: to.stride };
        self.units(&mut actions, &product, results, units, &all);
        self.planner.push(actions);
        Ok(())
    }

    /// Products with each token's own experts, one (token, slot) at a time. The rows of all slots are one range, shared out as a whole.
    #[allow(clippy::too_many_arguments)]
    fn by_slot(
        &mut self,
        actions: &mut Vec<Action>,
        product: &Product,
        epilogue: Epilogue,
        experts: Place,
        slots: usize,
        rows: &SlotRows,
        y: Place,
    ) {
        let units = product.tiles / epilogue.tiles();
        let share = self.planner.share(actions, slots * units);
        let count = self.row_count(Rows::Tokens);
        let kernel = self.single(product, Results { epilogue, stride: 0 });
        let unit_bytes = epilogue.tiles() * product.tile_bytes;
        let places = self.expert_places();
        self.planner.each(actions, Share { from: Expr::Int(0), to: count }, 1, |planner, actions, t| {
            for slot in 0..slots {
                let first = slot * units;
                let from = planner.bind(actions, share.from.clone().max(first).min(first + units) - first);
                let to = share.to.clone().max(first).min(first + units) - first;
                let expert = (experts.row(t.clone()) + slot * WORD).load_u32();
                let place = place_of(places.as_ref(), expert);
                let w = Self::weight(product.index) + place * product.expert_bytes + from.clone() * unit_bytes;
                let row = t.clone() * slots + slot;
                let x = product.x.row(match rows {
                    SlotRows::Token => t.clone(),
                    SlotRows::Slot => row.clone(),
                    SlotRows::Position(at) => (at.clone() + row.clone() * WORD).load_u32(),
                });
                let y = y.row(row) + from.clone() * (LANES * WORD);
                actions.push(call(kernel.clone(), [w, x, y, to - from]));
            }
        });
    }

    /// Products of each expert with the tokens that chose it. The worker has `units` of every expert.
    #[allow(clippy::too_many_arguments)]
    fn experts_in_turn(
        &mut self,
        actions: &mut Vec<Action>,
        product: &Product,
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
        let place = place_of(self.expert_places().as_ref(), expert);
        let w = self.planner.bind(&mut inner, Self::weight(product.index) + place * product.expert_bytes);
        let y_first = self.planner.bind(&mut inner, y.row(first.clone()));
        let (x, rows) = if gather {
            let rows = sorted.row(Expr::Int(0)) + layout.order + first * WORD;
            (product.x.row(Expr::Int(0)), Some(self.planner.bind(&mut inner, rows)))
        } else {
            (product.x.row(first), None)
        };
        let operands = Operands { w, y: y_first, x, rows, tokens: count };
        self.units(&mut inner, product, Results { epilogue, stride: y.stride }, units.clone(), &operands);
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
        let product = self.product(x, w);
        let chosen = self.place(experts);
        let to = self.allot(y, Scope::Shared);
        let mut reads = vec![product.x.buffer, chosen.buffer];
        reads.extend(order.map(|o| self.place(o).buffer));
        self.planner.begin("expert_matmul", Split::Other, &reads, &[to.buffer]);
        self.account(&product, slots, Epilogue::Store, to.stride);
        let mut actions = Vec::new();
        self.by_slot(&mut actions, &product, Epilogue::Store, chosen, slots, &rows, to);
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
        let product = self.product(x, w);
        let chosen = self.place(experts);
        let to = self.allot(y, Scope::Shared);
        let mut reads = vec![product.x.buffer, chosen.buffer];
        reads.extend(order.map(|o| self.place(o).buffer));
        self.planner.begin("expert_gate_up", Split::Other, &reads, &[to.buffer]);
        self.account(&product, slots, epilogue, to.stride);
        let mut actions = Vec::new();
        match (dispatch, order) {
            (Dispatch::Grouped, Some(order)) => {
                let count = self.graph.weight(w).experts();
                let (place, layout) = self.sorted(order, count, slots);
                let units = self.planner.share(&mut actions, product.tiles / 2);
                self.experts_in_turn(&mut actions, &product, epilogue, place, layout, count, true, to, &units);
                self.by_expert.insert(y, order);
            }
            (Dispatch::Decode | Dispatch::General | Dispatch::Grouped, _) => {
                self.by_slot(&mut actions, &product, epilogue, chosen, slots, &SlotRows::Token, to);
            }
        }
        self.planner.push(actions);
        Ok(())
    }

    pub(super) fn expert_down_add(&mut self, down: &Down, y: ValueId, node: NodeId) -> Result<(), PlanError> {
        let slots = self.slots(down.h)?;
        let product = self.product(down.h, down.w);
        let (chosen, scores) = (self.place(down.experts), self.place(down.weights));
        let to = self.in_place(down.residual, y, node);
        let stride = product.tiles * LANES * WORD;
        let bytes = self.row_limit(Rows::Slots(slots)) * stride;
        let buffer = self.planner.buffers().add(format!("t{}.slots", y.0), Scope::Shared, bytes);
        let parts = Place { buffer, offset: 0, stride };
        let mut reads = vec![product.x.buffer, chosen.buffer, scores.buffer];
        reads.extend(down.order.map(|o| self.place(o).buffer));
        self.planner.begin("expert_down_add", Split::Other, &reads, &[to.buffer, buffer]);
        self.account(&product, slots, Epilogue::Store, stride);

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
                self.experts_in_turn(&mut actions, &product, epilogue, place, layout, experts, false, parts, &tiles);
                Some(place.row(Expr::Int(0)) + layout.position)
            }
            (Dispatch::Decode | Dispatch::General | Dispatch::Grouped, _) => {
                let kernel = self.single(&product, Results { epilogue: Epilogue::Store, stride: 0 });
                let tiles = tiles.clone();
                let places = self.expert_places();
                self.planner.each(&mut actions, Share { from: Expr::Int(0), to: count.clone() }, 1, |_, actions, t| {
                    for slot in 0..slots {
                        let expert = (chosen.row(t.clone()) + slot * WORD).load_u32();
                        let w = Self::weight(product.index)
                            + place_of(places.as_ref(), expert) * product.expert_bytes
                            + tiles.from.clone() * product.tile_bytes;
                        let row = t.clone() * slots + slot;
                        let y = parts.row(row.clone()) + tiles.from.clone() * (LANES * WORD);
                        let units = tiles.to.clone() - tiles.from.clone();
                        actions.push(call(kernel.clone(), [w, product.x.row(row), y, units]));
                    }
                });
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
