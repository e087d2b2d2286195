//! The types of an operation's results, from its operands: the shape rules of every operation.
//!
//! Deliberately absent: rules about more than one operation ([`super::verify`]).

use super::attribute::Dispatch;
use super::op::Op;
use super::store::Graph;
use super::types::{Dim, Kind, Mode, Type, ValueId, WeightId};
use super::weight::Weight;

/// The types of the results of `op`, whose operands exist; or what does not fit.
pub(super) fn result_types(graph: &Graph, op: &Op) -> Result<Vec<Type>, String> {
    let rules = Rules { graph };
    match op {
        Op::Embed { w, scale } => {
            let weight = rules.matrix(*w)?;
            scale.map_or(Ok(()), |scale| finite("scale", scale))?;
            Ok(vec![Type::rows(Dim::Tokens, weight.columns())])
        }
        Op::RmsNorm { x, w, eps } => Ok(vec![rules.norm(*x, *w, *eps)?]),
        Op::NormQuantize { x, w, eps } => {
            let ty = rules.norm(*x, *w, *eps)?;
            Ok(vec![ty.with_kind(Kind::Q8), ty])
        }
        Op::Matmul { x, w } => {
            let weight = rules.matrix(*w)?;
            let x = rules.multiplied(*x, *w)?;
            Ok(vec![x.with_kind(Kind::F32).with_columns(weight.rows())])
        }
        Op::MatmulAdd { x, w, residual } => {
            let weight = rules.matrix(*w)?;
            let ty = rules.multiplied(*x, *w)?.with_kind(Kind::F32).with_columns(weight.rows());
            rules.is(*residual, &ty)?;
            Ok(vec![ty])
        }
        Op::GateUp { x, w, activation: _ } => {
            let weight = rules.matrix(*w)?;
            let half = halves(weight)?;
            Ok(vec![rules.multiplied(*x, *w)?.with_kind(Kind::F32).with_columns(half)])
        }
        Op::AddBias { x, w } => {
            let (ty, weight) = (rules.kind(*x, Kind::F32)?, rules.vector(*w)?);
            if ty.columns() != Some(weight.columns()) {
                let columns = weight.columns();
                return Err(format!("{x} must have rows of {columns} as @{} has, found {ty}", weight.name));
            }
            Ok(vec![ty.clone()])
        }
        Op::HeadNorm { x, w, heads, head_dim, eps, across } => {
            rules.heads(*heads, *head_dim)?;
            finite("eps", *eps)?;
            let ty = Type::rows(Dim::Tokens, product(*heads, *head_dim)?);
            rules.is(*x, &ty)?;
            let (weight, normed) = (rules.vector(*w)?, if *across { *heads * *head_dim } else { *head_dim });
            if weight.columns() != normed {
                return Err(format!("@{} must have {normed} elements, found {}", weight.name, weight.columns()));
            }
            Ok(vec![ty])
        }
        Op::Rope { x, heads, head_dim, scale } => {
            rules.heads(*heads, *head_dim)?;
            finite("scale", *scale)?;
            let ty = Type::rows(Dim::Tokens, product(*heads, *head_dim)?);
            rules.is(*x, &ty)?;
            Ok(vec![ty])
        }
        Op::KvStore { k, v, layer: _, kv_heads, head_dim } => {
            rules.heads(*kv_heads, *head_dim)?;
            let ty = Type::rows(Dim::Tokens, product(*kv_heads, *head_dim)?);
            rules.is(*k, &ty)?;
            rules.is(*v, &ty)?;
            Ok(vec![Type::kv()])
        }
        Op::Attention { q, kv, layer: _, heads, kv_heads, head_dim, window, cap } => {
            rules.heads(*heads, *head_dim)?;
            rules.groups(*heads, *kv_heads)?;
            if *window == Some(0) {
                return Err("a window of 0 keys sees nothing".into());
            }
            cap.map_or(Ok(()), is_cap)?;
            let ty = Type::rows(Dim::Tokens, product(*heads, *head_dim)?);
            rules.is(*q, &ty)?;
            rules.is(*kv, &Type::kv())?;
            Ok(vec![ty])
        }
        Op::QkvRopeStore { x, w, layer: _, heads, kv_heads, head_dim, scale } => {
            rules.heads(*heads, *head_dim)?;
            rules.groups(*heads, *kv_heads)?;
            finite("scale", *scale)?;
            let weight = rules.matrix(*w)?;
            rules.multiplied(*x, *w)?;
            rules.is_rows(*x, Dim::Tokens)?;
            let all = kv_heads.checked_mul(2).and_then(|n| n.checked_add(*heads)).ok_or("too many heads")?;
            let rows = product(all, *head_dim)?;
            if weight.rows() != rows {
                return Err(format!(
                    "@{} has {} rows, but {heads} + 2 × {kv_heads} heads of {head_dim} are {rows}",
                    weight.name,
                    weight.rows()
                ));
            }
            Ok(vec![Type::rows(Dim::Tokens, product(*heads, *head_dim)?), Type::kv()])
        }
        Op::Add { a, b } | Op::Mul { a, b } => {
            let ty = rules.kind(*a, Kind::F32)?;
            rules.is(*b, ty)?;
            Ok(vec![ty.clone()])
        }
        Op::Silu { x } | Op::Gelu { x } => Ok(vec![rules.kind(*x, Kind::F32)?.clone()]),
        Op::SoftCap { x, cap } => {
            is_cap(*cap)?;
            Ok(vec![rules.kind(*x, Kind::F32)?.clone()])
        }
        Op::GateRows { x, gate } => {
            let ty = rules.kind(*x, Kind::F32)?;
            rules.is_rows(*x, Dim::Tokens)?;
            rules.is(*gate, &Type::rows(Dim::Tokens, 1))?;
            Ok(vec![ty.clone()])
        }
        Op::TopK { logits, k, selection: _, scores: _ } => {
            let ty = rules.kind(*logits, Kind::F32)?;
            let experts = rules.is_rows(*logits, Dim::Tokens)?;
            if *k == 0 || *k > experts {
                return Err(format!("k is {k}, but {logits} has {experts} to choose from"));
            }
            let chosen = ty.with_columns(*k);
            Ok(vec![chosen.with_kind(Kind::I32), chosen])
        }
        Op::ExpertMatmul { x, experts, w } => {
            let (weight, k) = (rules.expert_matrices(*w)?, rules.experts(*experts)?);
            rules.expert_rows(*x, *w, k)?;
            Ok(vec![slots(k, weight.rows())])
        }
        Op::ExpertGateUp { x, experts, w, activation: _, dispatch, order } => {
            let (weight, k) = (rules.expert_matrices(*w)?, rules.experts(*experts)?);
            rules.expert_rows(*x, *w, k)?;
            rules.dispatch(*dispatch, *order, k)?;
            Ok(vec![slots(k, halves(weight)?)])
        }
        Op::ExpertCombine { y, weights } => {
            let ty = rules.kind(*y, Kind::F32)?;
            let &[Dim::Tokens, Dim::Fixed(k), Dim::Fixed(columns)] = ty.shape.as_slice() else {
                return Err(format!("{y} must be f32[T, k, columns], found {ty}"));
            };
            rules.is(*weights, &Type::rows(Dim::Tokens, k))?;
            Ok(vec![Type::rows(Dim::Tokens, columns)])
        }
        Op::ExpertDownAdd { h, experts, weights, w, residual, dispatch, order } => {
            let (weight, k) = (rules.expert_matrices(*w)?, rules.experts(*experts)?);
            rules.expert_rows(*h, *w, k)?;
            if rules.graph.ty(*h).shape.len() != 3 {
                return Err(format!("{h} must have a row for each slot, found {}", rules.graph.ty(*h)));
            }
            rules.is(*weights, &Type::rows(Dim::Tokens, k))?;
            let ty = Type::rows(Dim::Tokens, weight.rows());
            rules.is(*residual, &ty)?;
            rules.dispatch(*dispatch, *order, k)?;
            Ok(vec![ty])
        }
        Op::SortByExpert { experts, count } => {
            rules.experts(*experts)?;
            if *count == 0 {
                return Err("there must be experts to sort by".into());
            }
            Ok(vec![graph.ty(*experts).clone()])
        }
        Op::SelectRows { x } => {
            rules.kind(*x, Kind::F32)?;
            let columns = rules.is_rows(*x, Dim::Tokens)?;
            Ok(vec![Type::rows(Dim::LogitRows, columns)])
        }
        Op::Output { x } => {
            rules.kind(*x, Kind::F32)?;
            rules.is_rows(*x, Dim::LogitRows)?;
            Ok(vec![])
        }
        Op::Slice { x, start, len } => {
            let ty = rules.kind(*x, Kind::F32)?;
            let columns = ty.columns().ok_or_else(|| format!("{x} must have columns, found {ty}"))?;
            if *len == 0 || start.checked_add(*len).is_none_or(|end| end > columns) {
                return Err(format!("columns {start} .. {start} + {len} are not within the {columns} of {x}"));
            }
            Ok(vec![ty.with_columns(*len)])
        }
        Op::Quantize { x } => {
            let ty = rules.kind(*x, Kind::F32)?;
            if ty.columns().is_none() {
                return Err(format!("{x} must have columns, found {ty}"));
            }
            Ok(vec![ty.with_kind(Kind::Q8)])
        }
    }
}

/// `f32[T, k, columns]`.
fn slots(k: usize, columns: usize) -> Type {
    Type::new(Kind::F32, [Dim::Tokens, Dim::Fixed(k), Dim::Fixed(columns)])
}

/// Half the rows of a gate-and-up matrix.
fn halves(weight: &Weight) -> Result<usize, String> {
    let rows = weight.rows();
    if rows == 0 || !rows.is_multiple_of(2) {
        return Err(format!("@{} must have as many rows for the gate as for up, found {rows} in all", weight.name));
    }
    Ok(rows / 2)
}

fn product(a: usize, b: usize) -> Result<usize, String> {
    a.checked_mul(b).ok_or_else(|| format!("{a} × {b} is too large"))
}

fn finite(name: &str, value: f32) -> Result<(), String> {
    if value.is_finite() { Ok(()) } else { Err(format!("{name} must be finite, found {value}")) }
}

/// A number that bounds others.
fn is_cap(cap: f32) -> Result<(), String> {
    if cap > 0.0 && cap.is_finite() && (1.0 / cap).is_finite() {
        return Ok(());
    }
    Err(format!("cap must be a number above 0 that has a reciprocal, found {cap}"))
}

struct Rules<'a> {
    graph: &'a Graph,
}

impl<'a> Rules<'a> {
    fn kind(&self, value: ValueId, kind: Kind) -> Result<&'a Type, String> {
        let ty = self.graph.ty(value);
        if ty.kind == kind { Ok(ty) } else { Err(format!("{value} must be {kind}, found {ty}")) }
    }

    fn is(&self, value: ValueId, expected: &Type) -> Result<(), String> {
        let ty = self.graph.ty(value);
        if ty == expected { Ok(()) } else { Err(format!("{value} must be {expected}, found {ty}")) }
    }

    /// `[rows, n]` → n.
    fn is_rows(&self, value: ValueId, rows: Dim) -> Result<usize, String> {
        let ty = self.graph.ty(value);
        match ty.shape.as_slice() {
            &[first, Dim::Fixed(columns)] if first == rows => Ok(columns),
            _ => Err(format!("{value} must have the shape [{rows}, columns], found {ty}")),
        }
    }

    fn matrix(&self, id: WeightId) -> Result<&'a Weight, String> {
        let weight = self.graph.weight(id);
        if weight.shape.len() == 2 {
            return Ok(weight);
        }
        Err(format!("@{} must be a matrix, found {:?}", weight.name, weight.shape))
    }

    fn vector(&self, id: WeightId) -> Result<&'a Weight, String> {
        let weight = self.graph.weight(id);
        if weight.shape.len() == 1 {
            return Ok(weight);
        }
        Err(format!("@{} must be a vector, found {:?}", weight.name, weight.shape))
    }

    fn expert_matrices(&self, id: WeightId) -> Result<&'a Weight, String> {
        let weight = self.graph.weight(id);
        if weight.shape.len() == 3 {
            return Ok(weight);
        }
        Err(format!("@{} must have a matrix for each expert, found {:?}", weight.name, weight.shape))
    }

    /// Rows that a matrix multiplies: f32, or q8 when the matrix is quantized.
    fn multiplied(&self, x: ValueId, w: WeightId) -> Result<&'a Type, String> {
        let (ty, weight) = (self.graph.ty(x), self.graph.weight(w));
        match ty.kind {
            Kind::F32 => {}
            Kind::Q8 if weight.format().is_quantized() => {}
            Kind::Q8 => return Err(format!("{x} is quantized, but @{} is {}", weight.name, weight.format())),
            Kind::I32 | Kind::Kv => return Err(format!("{x} must be f32 or q8, found {ty}")),
        }
        if ty.columns() != Some(weight.columns()) {
            return Err(format!("{x} must have the {} columns of @{}, found {ty}", weight.columns(), weight.name));
        }
        Ok(ty)
    }

    /// `[T, C]` or `[T, k, C]`.
    fn expert_rows(&self, x: ValueId, w: WeightId, k: usize) -> Result<(), String> {
        let ty = self.multiplied(x, w)?;
        match ty.shape.as_slice() {
            [Dim::Tokens, _] => Ok(()),
            &[Dim::Tokens, Dim::Fixed(slots), _] if slots == k => Ok(()),
            _ => Err(format!("{x} must have a row for each token, or {k} for each, found {ty}")),
        }
    }

    /// `i32[T, k]` → k.
    fn experts(&self, experts: ValueId) -> Result<usize, String> {
        self.kind(experts, Kind::I32)?;
        self.is_rows(experts, Dim::Tokens)
    }

    fn norm(&self, x: ValueId, w: WeightId, eps: f32) -> Result<Type, String> {
        let (ty, weight) = (self.kind(x, Kind::F32)?, self.vector(w)?);
        if ty.shape.len() != 2 || ty.columns() != Some(weight.columns()) {
            return Err(format!("{x} must have rows of {} as @{} has, found {ty}", weight.columns(), weight.name));
        }
        finite("eps", eps)?;
        Ok(ty.clone())
    }

    fn heads(&self, heads: usize, head_dim: usize) -> Result<(), String> {
        if heads == 0 || head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(format!("heads must be there and of even size, found {heads} of {head_dim}"));
        }
        Ok(())
    }

    fn groups(&self, heads: usize, kv_heads: usize) -> Result<(), String> {
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(format!("{heads} heads cannot share {kv_heads} heads of keys and values evenly"));
        }
        Ok(())
    }

    /// An order is there exactly when the dispatch is grouped, and grouped is for batches, decode for one token.
    fn dispatch(&self, dispatch: Dispatch, order: Option<ValueId>, k: usize) -> Result<(), String> {
        match (dispatch, self.graph.mode()) {
            (Dispatch::General, _) | (Dispatch::Decode, Mode::Decode) | (Dispatch::Grouped, Mode::Batch) => {}
            (Dispatch::Decode, Mode::Batch) | (Dispatch::Grouped, Mode::Decode) => {
                return Err(format!("dispatch {dispatch} is not for a {} graph", self.graph.mode()));
            }
        }
        match (dispatch, order) {
            (Dispatch::Grouped, Some(order)) => self.is(order, &Type::new(Kind::I32, [Dim::Tokens, Dim::Fixed(k)])),
            (Dispatch::Grouped, None) => Err("dispatch grouped needs an order".into()),
            (Dispatch::General | Dispatch::Decode, Some(_)) => Err(format!("dispatch {dispatch} needs no order")),
            (Dispatch::General | Dispatch::Decode, None) => Ok(()),
        }
    }
}
