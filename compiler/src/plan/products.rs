//! Matrix products: rows of a weight shared out to the workers, tokens taken a few at a time.
//!
//! In `decode` one call of a kernel streams all the rows of a worker's share. In `batch` each worker interleaves the tokens' activations for itself; the loop
//! over tiles of rows is outside and the loop over tokens inside, so that a tile of the weight is read from memory once and stays in the cache for all tokens. Deliberately absent: products with experts, which take
//! the same form for each expert ([`super::experts`]), and everything that is not a product ([`super::stages`]).

use super::PlanError;
use super::buffers::Scope;
use super::layout::Format;
use super::planner::{Place, Share, Split, call};
use super::program::{Action, Expr, Field, StageProduct};
use super::stages::{Rows, Stages, WORD};
use crate::kernels::{Epilogue, Interleave, Matmul, MatmulTuning};
use crate::target::{ProductShape, ProductTuning};
use moec_abi::LANES;
use moec_ir::graph::{Activation, Mode, NodeId, Role, ValueId, WeightId};

/// A weight with the activation rows that it meets.
#[derive(Clone, Debug)]
pub(super) struct Product {
    /// Index of the weight.
    pub(super) index: usize,
    /// Its format.
    pub(super) format: Format,
    /// Its columns as laid out.
    pub(super) k: usize,
    /// Bytes from one tile to the next.
    pub(super) tile_bytes: usize,
    /// Bytes from one expert to the next.
    expert_bytes: usize,
    /// Matrices: those of experts, of which each token meets some, or one.
    pub(super) experts: usize,
    /// Tiles of one matrix.
    pub(super) tiles: usize,
    /// The activation rows.
    pub(super) x: Place,
}

impl Product {
    /// The address of the matrix at a place among those that are here.
    pub(super) fn matrix(&self, place: Expr) -> Expr {
        Expr::Weight(self.index) + place * self.expert_bytes
    }
}

/// What a product reads and writes.
#[derive(Clone, Debug)]
pub(super) struct Operands {
    /// Address of the first unit of the worker's share.
    pub(super) w: Expr,
    /// Where the first token's row of the share goes.
    pub(super) y: Expr,
    /// Address of row 0 of the activations (with a list of rows), or of the first token's row.
    pub(super) x: Expr,
    /// Address of the list of the tokens' rows, if they do not lie one after another.
    pub(super) rows: Option<Expr>,
    /// How many tokens.
    pub(super) tokens: Expr,
}

/// How a product's results lie, and what becomes of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Results {
    pub(super) epilogue: Epilogue,
    /// Bytes from a token's row to the next.
    pub(super) stride: usize,
}

impl Stages<'_> {
    /// The weight `w` with rows of `x`, quantized when the weight is.
    pub(super) fn product(&mut self, x: ValueId, w: WeightId) -> Product {
        let x = if self.item(w).1.format.is_quantized() { self.quantized(x) } else { self.place(x) };
        self.product_at(x, self.item(w).0)
    }

    /// The weight at `index` of the payload with rows at `x`.
    pub(super) fn product_at(&self, x: Place, index: usize) -> Product {
        let item = &self.payload.items[index];
        Product {
            index,
            format: item.format,
            k: item.k(),
            tile_bytes: item.tile_bytes(),
            expert_bytes: item.expert_bytes(),
            experts: item.experts,
            tiles: item.padded_rows() / LANES,
            x,
        }
    }

    /// Notes a product whose rows of results lie `stride` bytes apart, and what it costs.
    pub(super) fn account(&mut self, product: &Product, epilogue: Epilogue, stride: usize) {
        let shape = ProductShape { format: product.format, k: product.k, epilogue };
        self.planner.product(StageProduct { weight: product.index, shape, matrices: 1.0, stride });
        self.planner.cost(product.tiles * product.tile_bytes, product.tiles * LANES * product.k);
    }

    fn tuning(&self, product: &Product, epilogue: Epilogue) -> ProductTuning {
        self.tuning.product(ProductShape { format: product.format, k: product.k, epilogue })
    }

    /// The kernel for one token, which goes through all rows by itself.
    pub(super) fn single(&self, product: &Product, results: Results) -> Matmul {
        self.kernel(product, 1, results, self.tuning(product, results.epilogue).kernel(1))
    }

    fn kernel(&self, product: &Product, tokens: usize, results: Results, tuning: MatmulTuning) -> Matmul {
        Matmul {
            format: product.format,
            k: product.k,
            part: None,
            fetch: false,
            tokens,
            row: self.graph.row_content(),
            dot: self.tuning.dot(product.format),
            epilogue: results.epilogue,
            // An immediate only where there is more than one row.
            y_stride: if tokens > 1 { results.stride } else { 0 },
            tuning,
        }
    }

    /// The products with `units` of one matrix at `w`, written at `y + 64 × unit`.
    ///
    /// For one token, one call goes through all of them. Of more, as many tokens as fit the cache are interleaved. So few that one call takes them all
    /// have one again; more are all gone through for a few units at a time, so that both stay in the cache.
    pub(super) fn units(
        &mut self,
        actions: &mut Vec<Action>,
        product: &Product,
        results: Results,
        units: Share,
        all: &Operands,
    ) {
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
        let chunk = tuning.walk_tokens(product.x.stride, product.k);
        let most = chunk.min(self.row_limit(Rows::Slots(self.shape.experts_per_token.max(1))));
        let interleaved = self.planner.scratch("interleaved", Scope::Worker, most * product.x.stride);
        // A row of sums for each tile of the weight, so that workers that are at different experts keep apart.
        let stride = most * LANES * WORD;
        let kept = (tuning.parts(product.k).len() > 1).then(|| {
            let buffer = self.planner.scratch("sums", Scope::Shared, product.tiles * stride);
            Place { buffer, offset: 0, stride }
        });
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
        self.unit_loop(&mut inner, product, results, units, &Operands { x: interleaved.into(), ..some }, kept);
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

    /// Goes through the units with all the interleaved tokens: those of one call of a kernel in that call, more of them a few units at a time, and the
    /// columns in parts where there is memory for their sums.
    fn unit_loop(
        &mut self,
        actions: &mut Vec<Action>,
        product: &Product,
        results: Results,
        units: Share,
        all: &Operands,
        kept: Option<Place>,
    ) {
        let unit_bytes = results.epilogue.tiles() * product.tile_bytes;
        let tuning = self.tuning(product, results.epilogue);
        let (tile, together) = (tuning.tokens(), tuning.block_units(results.epilogue));
        let kernels: Vec<Matmul> = (1..=tile).map(|n| self.kernel(product, n, results, tuning.kernel(n))).collect();
        let at = |unit: Expr| [all.w.clone() + unit.clone() * unit_bytes, all.y.clone() + unit * (LANES * WORD)];
        let [w, y] = at(units.from.clone());
        let count = units.to.clone() - units.from.clone();
        let one_call =
            |kernel: &Matmul| vec![call(kernel.clone(), [w.clone(), all.x.clone(), y.clone(), count.clone()])];
        let mut cases = vec![Vec::new()];
        cases.extend(kernels.iter().map(one_call));

        let mut walks = Vec::new();
        for columns in tuning.parts(product.k) {
            let mut inner = Vec::new();
            let var = self.planner.var();
            let unit = Expr::from(var);
            let [w, y] = at(unit.clone()).map(|address| self.planner.bind(&mut inner, address));
            let count = match together {
                1 => Expr::Int(1),
                _ => self.planner.bind(&mut inner, (units.to.clone() - unit.clone()).min(together)),
            };
            self.token_tiles(&mut inner, tile, &all.tokens, |tokens, t| {
                let kernel = tuning.in_walk(kernels[tokens - 1].clone());
                let x = all.x.clone() + t.clone() * product.x.stride;
                let y = y.clone() + t.clone() * results.stride;
                // Of each step of the next block as much as of the tokens, so that memory is as busy with each of them.
                let later = tuning.ahead.then(|| {
                    let share = |of: usize, tokens: Expr| tokens * of / all.tokens.clone();
                    [share(kernel.step_bytes(), t.clone()) + together * unit_bytes, share(64, tokens.into()) + 1usize]
                });
                let later = later.into_iter().flatten();
                let Some(kept) = kept else {
                    return call(kernel, [w.clone(), x, y, count.clone()].into_iter().chain(later));
                };
                let before = t.clone() * count.clone() * (results.epilogue.tiles() * LANES * WORD);
                let sums = kept.row(unit.clone() * results.epilogue.tiles()) + before;
                let w = w.clone() + product.format.bytes_before(columns.start);
                let args = [w, x, (columns.start * tokens).into(), y, count.clone(), sums];
                call(kernel.in_part(&columns), args.into_iter().chain(later))
            });
            let Share { from, to } = units.clone();
            walks.push(Action::Loop { var, from, to, step: together as i64, body: inner });
        }
        cases.push(walks);
        actions.push(Action::Switch { on: all.tokens.clone().min(tile + 1), cases });
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
            self.account(&product, Epilogue::Store, 0);
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
        self.account(&product, Epilogue::Store, to.stride);
        let mut actions = Vec::new();
        let tiles = self.planner.share(&mut actions, product.tiles);
        self.store_product(&mut actions, &product, to, tiles, count);
        self.planner.push(actions);
        Ok(())
    }

    fn logits(&mut self, product: &Product, count: Expr) -> Result<(), PlanError> {
        self.planner.begin("logits", Split::Other, &[product.x.buffer], &[]);
        self.account(product, Epilogue::Store, product.tiles * LANES * WORD);
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
        self.account(&product, Epilogue::Add, to.stride);
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
        self.account(&product, epilogue, to.stride);
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
}
