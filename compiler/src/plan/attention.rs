//! Positions: rotation, the KV store, attention, and the projection fused with them.
//!
//! Attention is divided by query head in `decode`, by KV head and a few tokens in `batch`. Deliberately absent: where pages lie, which is the caller's page tables.

use super::PlanError;
use super::buffers::{BufferId, Scope};
use super::planner::{Place, Planner, Share, Split, call};
use super::program::{Action, Expr, Field};
use super::stages::{Rows, Stages, WORD};
use crate::kernels::{Attention, ElementwiseOp, Epilogue, KvFormat, Rope, StoreKey, StoreValue, Together};
use moec_abi::{LANES, PAGE_TOKENS, padded_head_dim};
use moec_ir::graph::{NodeId, ValueId, WeightId};

impl Stages<'_> {
    fn position(t: Expr) -> Expr {
        (Expr::from(Field::Positions) + t * WORD).load_u32()
    }

    /// The address of the page table of token `t`'s sequence.
    fn page_table(t: Expr) -> Expr {
        (Expr::from(Field::PageTables) + t * 8usize).load_address()
    }

    /// The rows of the cosine and sine tables for a position.
    fn rotation(&self, head_dim: usize, position: &Expr) -> [Expr; 2] {
        let row = padded_head_dim(head_dim) / 2 * WORD;
        ["rope.cos", "rope.sin"].map(|name| Self::weight(self.named(name).0) + position.clone() * row)
    }

    pub(super) fn rope(
        &mut self,
        x: ValueId,
        heads: usize,
        head_dim: usize,
        scale: f32,
        y: ValueId,
        node: NodeId,
    ) -> Result<(), PlanError> {
        let from = self.place(x);
        let (_, split) = self.small(Rows::Tokens);
        let place = if self.is_last_use(x, node) && self.scope(from) == self.small(Rows::Tokens).0 {
            self.set(y, from)
        } else {
            self.elementwise(ElementwiseOp::Copy, &[x], y)?;
            self.place(y)
        };
        let kernel = Rope { head_dim, scale_bits: (scale != 1.0).then(|| scale.to_bits()) };
        self.planner.begin("rope", split, &[place.buffer], &[place.buffer]);
        let tables = self.rotation(head_dim, &Expr::Int(0));
        let row = padded_head_dim(head_dim) / 2 * WORD;
        self.each_row(Rows::Tokens, |planner, actions, t| {
            let position = planner.bind(actions, Self::position(t.clone()));
            let [cos, sin] = tables.map(|table| table + position.clone() * row);
            actions.push(call(kernel, [place.row(t), cos, sin, heads.into()]));
        });
        Ok(())
    }

    /// Bytes from a page's start to the keys of `layer` and `head`; the values follow them.
    fn page_offset(&self, layer: usize, head: Expr, kv_heads: usize, head_dim: usize) -> Expr {
        let keys = self.kv_format().key_bytes(head_dim);
        (head + layer * kv_heads) * (2 * keys)
    }

    fn kv_format(&self) -> KvFormat {
        match self.shape.kv {
            moec_abi::KvType::F16 => KvFormat::F16,
            moec_abi::KvType::F32 => KvFormat::F32,
        }
    }

    pub(super) fn kv_store(
        &mut self,
        k: ValueId,
        v: ValueId,
        layer: usize,
        kv_heads: usize,
        head_dim: usize,
        kv: ValueId,
    ) -> Result<(), PlanError> {
        let [keys, values] = [k, v].map(|x| self.place(x));
        let pages = self.allot(kv, Scope::Shared);
        self.planner.begin("kv_store", Split::Other, &[keys.buffer, values.buffer], &[pages.buffer]);
        let mut actions = Vec::new();
        let count = self.row_count(Rows::Tokens);
        let share = self.planner.share(&mut actions, count);
        let store = self.store(layer, kv_heads, head_dim, false);
        self.planner.each(&mut actions, share, 1, |planner, actions, t| {
            let slot = store.slot(planner, actions, &t);
            let heads = Share { from: Expr::Int(0), to: kv_heads.into() };
            planner.each(actions, heads, 1, |_, actions, head| {
                let at = head.clone() * store.head_bytes;
                actions.push(store.key(&slot, head.clone(), keys.row(t.clone()) + at.clone()));
                actions.push(store.value(&slot, head, values.row(t.clone()) + at));
            });
        });
        self.planner.push(actions);
        Ok(())
    }

    fn store(&self, layer: usize, kv_heads: usize, head_dim: usize, rotate: bool) -> Store {
        let [cos, sin] = self.rotation(head_dim, &Expr::Int(0));
        Store {
            head_dim,
            kv: self.kv_format(),
            rotate,
            head_bytes: padded_head_dim(head_dim) * WORD,
            page: self.page_offset(layer, Expr::Int(0), kv_heads, head_dim),
            cos,
            sin,
        }
    }

    pub(super) fn qkv_rope_store(
        &mut self,
        x: ValueId,
        w: WeightId,
        qkv: Qkv,
        q: ValueId,
        kv: ValueId,
    ) -> Result<(), PlanError> {
        let Qkv { layer, heads, kv_heads, head_dim, scale } = qkv;
        let product = self.product(x, w);
        let dim = padded_head_dim(head_dim);
        let stride = (heads + 2 * kv_heads) * dim * WORD;
        let bytes = self.row_limit(Rows::Tokens) * stride;
        let buffer = self.planner.buffers().add(format!("t{}.qkv", q.0), Scope::Shared, bytes);
        let place = self.set(q, Place { buffer, offset: 0, stride });
        let pages = self.allot(kv, Scope::Shared);
        self.planner.begin("qkv_rope_store", Split::Other, &[product.x.buffer], &[place.buffer, pages.buffer]);
        self.account(&product, Epilogue::Store, place.stride);

        let mut actions = Vec::new();
        let share = self.planner.share(&mut actions, heads + 2 * kv_heads);
        let tiles = dim / LANES;
        let units = Share { from: share.from.clone() * tiles, to: share.to.clone() * tiles };
        let count = self.row_count(Rows::Tokens);
        self.store_product(&mut actions, &product, place, units, count.clone());

        let first_key = share.from.clone().max(heads).min(heads + kv_heads);
        let last_key = share.to.clone().max(heads).min(heads + kv_heads);
        let first_value = share.from.clone().max(heads + kv_heads);
        let planner = &mut self.planner;
        let first_key = planner.bind(&mut actions, first_key);
        let last_key = planner.bind(&mut actions, last_key);
        let first_value = planner.bind(&mut actions, first_value);
        let query_count = planner.bind(&mut actions, share.to.clone().min(heads) - share.from.clone());
        let store = self.store(layer, kv_heads, head_dim, true);
        let rope = Rope { head_dim, scale_bits: (scale != 1.0).then(|| scale.to_bits()) };
        let tokens = Share { from: Expr::Int(0), to: count };
        self.planner.each(&mut actions, tokens, 1, |planner, actions, t| {
            let slot = store.slot(planner, actions, &t);
            let row = planner.bind(actions, place.row(t));
            let queries = row.clone() + share.from.clone() * store.head_bytes;
            actions.push(call(rope, [queries, slot.cos.clone(), slot.sin.clone(), query_count]));
            let keys = Share { from: first_key, to: last_key };
            planner.each(actions, keys, 1, |_, actions, head| {
                let x = row.clone() + head.clone() * store.head_bytes;
                actions.push(store.key(&slot, head - heads, x));
            });
            let values = Share { from: first_value, to: share.to.clone() };
            planner.each(actions, values, 1, |_, actions, head| {
                let x = row.clone() + head.clone() * store.head_bytes;
                actions.push(store.value(&slot, head - (heads + kv_heads), x));
            });
        });
        self.planner.push(actions);
        Ok(())
    }

    pub(super) fn attention(
        &mut self,
        q: ValueId,
        kv: ValueId,
        shape: AttentionShape,
        out: ValueId,
    ) -> Result<(), PlanError> {
        let AttentionShape { layer, heads, kv_heads, head_dim, window, cap } = shape;
        let group = heads / kv_heads;
        let (rows, vectors) = (self.tuning.attention_rows, self.tuning.attention_vectors);
        let (from, pages) = (self.place(q), self.place(kv));
        let to = self.allot(out, Scope::Shared);
        let cap_bits = cap.map(f32::to_bits);
        let single = Attention { head_dim, group, kv: self.kv_format(), cap_bits, rows, vectors, together: None };
        let tokens = if self.is_decode() { 1 } else { Attention::tokens_together(group, rows) };
        let together = Together { tokens, q_stride: from.stride, out_stride: to.stride };
        let several = Attention { together: (tokens > 1).then_some(together), ..single };
        let at_once = if self.is_decode() { kv_heads } else { 1 };
        let scratch = at_once * several.scratch_bytes();
        let scratch = self.planner.buffers().add(format!("t{}.scratch", out.0), Scope::Worker, scratch);
        self.planner.begin("attention", Split::Other, &[from.buffer, pages.buffer], &[to.buffer, scratch]);
        let attend = Attend {
            from,
            to,
            scratch,
            window,
            first: self.page_offset(layer, Expr::Int(0), kv_heads, head_dim),
            keys: single.kv.key_bytes(head_dim),
        };
        let mut actions = Vec::new();
        if self.is_decode() {
            self.attention_of_one(&mut actions, single, kv_heads, &attend);
        } else {
            self.attention_of_many(&mut actions, [single, several], kv_heads, &attend);
        }
        self.planner.push(actions);
        Ok(())
    }

    /// Each worker takes as many query heads as the others, whether or not these are all that share a KV head; the KV heads that are its own alone in one call.
    fn attention_of_one(&mut self, actions: &mut Vec<Action>, all: Attention, kv_heads: usize, attend: &Attend) {
        let group = all.group;
        // Heads are counted by so many, which leaves few kernels.
        let unit = (1..=group).find(|unit| group.is_multiple_of(*unit) && group / unit <= MOST_PARTS).unwrap_or(group);
        let parts = group / unit;
        let planner = &mut self.planner;
        let Share { from, to } = planner.share(actions, kv_heads * parts);
        let first_whole = (from.clone() + (parts - 1)) / parts;
        let first_whole = planner.bind(actions, first_whole);
        let past_whole = planner.bind(actions, (to.clone() / parts).max(first_whole.clone()));
        let before = to.clone().min(first_whole.clone() * parts);
        let after = to.clone().min(past_whole.clone() * parts);
        self.attention_of_part(actions, all, [from, before], [unit, parts], attend);
        let mut whole = Vec::new();
        let planner = &mut self.planner;
        let query = planner.bind(&mut whole, first_whole.clone() * group);
        let heads = past_whole - first_whole.clone();
        attend.call(planner, &mut whole, all, Expr::Int(0), [first_whole, heads.clone(), query]);
        actions.push(Action::Switch { on: heads.min(1usize), cases: vec![Vec::new(), whole] });
        self.attention_of_part(actions, all, [after, to], [unit, parts], attend);
    }

    /// Parts `from .. to` of query heads, `unit` each, that are some but not all of those of one KV head, which has `parts`.
    fn attention_of_part(
        &mut self,
        actions: &mut Vec<Action>,
        all: Attention,
        [from, to]: [Expr; 2],
        [unit, parts]: [usize; 2],
        attend: &Attend,
    ) {
        if parts == 1 {
            return;
        }
        let planner = &mut self.planner;
        let head = planner.bind(actions, from.clone() / parts);
        let query = planner.bind(actions, from.clone() * unit);
        let case = |planner: &mut Planner, count: usize| {
            let (mut inner, kernel) = (Vec::new(), Attention { group: count * unit, ..all });
            attend.call(planner, &mut inner, kernel, Expr::Int(0), [head.clone(), Expr::Int(1), query.clone()]);
            inner
        };
        let cases = (0..parts).map(|n| if n == 0 { Vec::new() } else { case(planner, n) }).collect();
        actions.push(Action::Switch { on: to - from, cases });
    }

    /// A few tokens and a KV head at a time are dealt out in turn, as later tokens see more keys. When all tokens that fit are of one sequence the kernel for `several`
    /// takes them, and otherwise each is taken alone.
    fn attention_of_many(
        &mut self,
        actions: &mut Vec<Action>,
        [single, several]: [Attention; 2],
        kv_heads: usize,
        attend: &Attend,
    ) {
        let (group, tokens) = (single.group, several.tokens());
        let count = self.row_count(Rows::Tokens);
        let planner = &mut self.planner;
        let (worker, workers) = (Expr::from(Field::Worker), Expr::from(Field::Workers));
        // Fewer at a time when there would not be enough for all workers.
        let size = (count.clone() * kv_heads / workers.clone()).min(tokens).max(1usize);
        let size = planner.bind(actions, size);
        let parts = planner.bind(actions, (count.clone() + size.clone() - 1usize) / size.clone());
        let turns = parts.clone() * kv_heads - worker.clone() + workers.clone() - 1usize;
        let turns = Share { from: Expr::Int(0), to: planner.bind(actions, turns / workers.clone()) };
        planner.each(actions, turns, 1, |planner, actions, turn| {
            let part = planner.bind(actions, turn * workers + worker);
            let head = planner.bind(actions, part.clone() / parts.clone());
            let query = planner.bind(actions, head.clone() * group);
            let t = planner.bind(actions, (part - head.clone() * parts) * size.clone());
            let end = planner.bind(actions, count.min(t.clone() + size));
            let mut alone = Vec::new();
            let all = Share { from: t.clone(), to: end.clone() };
            planner.each(&mut alone, all, 1, |planner, actions, t| {
                attend.call(planner, actions, single, t, [head.clone(), Expr::Int(1), query.clone()]);
            });
            if tokens == 1 {
                actions.extend(alone);
                return;
            }
            let mut together = Vec::new();
            attend.call(planner, &mut together, several, t.clone(), [head.clone(), Expr::Int(1), query.clone()]);
            let [first, last] = [t.clone(), end.clone() - 1usize].map(|t| planner.bind(actions, Self::page_table(t)));
            let differ = first.clone().max(last.clone()) - first.min(last);
            let unlike = differ + (t + tokens - end);
            actions.push(Action::Switch { on: unlike.min(1usize), cases: vec![together, alone] });
        });
    }
}

/// Parts into which the query heads of a KV head are divided for one token, at most.
const MOST_PARTS: usize = 8;

/// What calls of attention have in common.
#[derive(Debug)]
struct Attend {
    from: Place,
    to: Place,
    scratch: BufferId,
    window: Option<usize>,
    /// Bytes from a page's start to the layer's first keys.
    first: Expr,
    /// Bytes of one head's keys in a page; its values take as many.
    keys: usize,
}

impl Attend {
    /// Calls `kernel` for token `t`, and those after it that it takes, with KV heads `head .. head + heads` and the query heads that share them from `query` on.
    fn call(
        &self,
        planner: &mut Planner,
        actions: &mut Vec<Action>,
        kernel: Attention,
        t: Expr,
        [head, heads, query]: [Expr; 3],
    ) {
        let position = planner.bind(actions, Stages::position(t.clone()));
        let end = planner.bind(actions, position + 1usize);
        // Without a window no token begins to see later than the first key.
        let start = self.window.map_or(Expr::Int(-(kernel.tokens() as i64)), |w| end.clone() - w);
        let offset = planner.bind(actions, self.first.clone() + head * (2 * self.keys));
        let at = planner.bind(actions, query * (padded_head_dim(kernel.head_dim) * WORD));
        let args = [
            self.from.row(t.clone()) + at.clone(),
            Stages::page_table(t.clone()),
            offset,
            heads,
            start,
            end,
            self.to.row(t) + at,
            self.scratch.into(),
        ];
        actions.push(call(kernel, args));
    }
}

/// Attributes of the fused projection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Qkv {
    pub layer: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
}

/// Attributes of attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttentionShape {
    pub layer: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
    pub cap: Option<f32>,
}

/// How keys and values of one layer are stored.
#[derive(Debug)]
struct Store {
    head_dim: usize,
    kv: KvFormat,
    rotate: bool,
    /// Bytes of a padded f32 head.
    head_bytes: usize,
    /// Bytes from a page's start to the layer's first keys.
    page: Expr,
    cos: Expr,
    sin: Expr,
}

/// Where one token's keys and values go.
#[derive(Debug)]
struct Slot {
    /// The page, at the layer's first keys.
    page: Expr,
    /// The token's number in its page.
    slot: Expr,
    cos: Expr,
    sin: Expr,
}

impl Store {
    fn slot(&self, planner: &mut Planner, actions: &mut Vec<Action>, t: &Expr) -> Slot {
        let position = planner.bind(actions, Stages::position(t.clone()));
        let table = Stages::page_table(t.clone());
        let number = planner.bind(actions, position.clone() / PAGE_TOKENS);
        let page = planner.bind(actions, (table + number.clone() * 8usize).load_address() + self.page.clone());
        let slot = planner.bind(actions, position.clone() - number * PAGE_TOKENS);
        let row = padded_head_dim(self.head_dim) / 2 * WORD;
        let [cos, sin] = [&self.cos, &self.sin].map(|table| table.clone() + position.clone() * row);
        let cos = planner.bind(actions, cos);
        let sin = planner.bind(actions, sin);
        Slot { page, slot, cos, sin }
    }

    /// Bytes of one head's keys in a page.
    fn keys(&self) -> usize {
        self.kv.key_bytes(self.head_dim)
    }

    fn key(&self, slot: &Slot, head: Expr, x: Expr) -> Action {
        let element = self.kv.bytes();
        let tile = slot.slot.clone() / LANES;
        let lane = slot.slot.clone() - tile.clone() * LANES;
        let tile = tile * (padded_head_dim(self.head_dim) * LANES * element);
        let to = slot.page.clone() + head * (2 * self.keys()) + tile + lane * element;
        let kernel = StoreKey { head_dim: self.head_dim, kv: self.kv, rotate: self.rotate };
        call(kernel, [x, slot.cos.clone(), slot.sin.clone(), to])
    }

    fn value(&self, slot: &Slot, head: Expr, x: Expr) -> Action {
        let row = padded_head_dim(self.head_dim) * self.kv.bytes();
        let to = slot.page.clone() + head * (2 * self.keys()) + self.keys() + slot.slot.clone() * row;
        call(StoreValue { head_dim: self.head_dim, kv: self.kv }, [x, to])
    }
}
