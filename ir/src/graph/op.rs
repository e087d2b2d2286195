//! The operations of the graph IR, in one table: name, operands, attributes, and what they compute.
//!
//! Shapes are written as in types: `T` tokens, `H` hidden size. Matrices are `[rows, columns]` and multiply rows of `x` by
//! their transpose: `y[t, r] = Σ_c w[r, c] × x[t, c]`. A matrix whose layout is q8 or q4 multiplies quantized rows; where it meets
//! f32 rows it quantizes them itself, with the same result as an explicit [`Op::Quantize`].
//!
//! Token ids, positions, page tables and the list of rows that need logits are inputs of every graph and not values.
//! Deliberately absent: how results are computed ([`super::eval`] defines the bits) and the types of results ([`super::infer`]).

use super::attribute::{Activation, Attribute, Dispatch, Operand, OperandKind, Scores, Selection};
use super::types::{ValueId, WeightId};

/// Whether the importer makes an operation or only passes do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// The importer.
    Imported,
    /// Passes.
    Fused,
}

macro_rules! operations {
    ($(
        $(#[$doc:meta])*
        $name:literal $origin:ident $op:ident ( $($operand:ident: $kind:ty),* ) { $($attribute:ident: $type:ty),* }
    )*) => {
        /// An operation with its operands and attributes.
        #[derive(Clone, PartialEq, Debug)]
        #[allow(missing_docs)] // The fields are explained by their operation.
        pub enum Op {
            $( $(#[$doc])* $op { $($operand: $kind,)* $($attribute: $type,)* }, )*
        }

        impl Op {
            /// The names of all operations.
            pub const NAMES: &[&str] = &[$($name),*];

            /// The name in text form.
            pub fn name(&self) -> &'static str {
                match self {
                    $( Op::$op { .. } => $name, )*
                }
            }

            /// Who makes it.
            pub fn origin(&self) -> Origin {
                match self {
                    $( Op::$op { .. } => Origin::$origin, )*
                }
            }

            /// Values and weights in the order of the text form, optional operands excluded.
            pub fn operands(&self) -> Vec<Operand> {
                match self {
                    $( Op::$op { $($operand,)* .. } => vec![$($operand.operand()),*], )*
                }
            }

            /// Calls `visit` on each value that is read, optional ones last, to change which it is.
            pub fn visit_values(&mut self, visit: &mut dyn FnMut(&mut ValueId)) {
                match self {
                    $(
                        Op::$op { $($operand,)* $($attribute,)* } => {
                            $( if let Some(value) = <$kind as OperandKind>::value($operand) { visit(value); } )*
                            $( if let Some(value) = Attribute::value($attribute) { visit(value); } )*
                            let _ = &visit;
                        }
                    )*
                }
            }

            /// Calls `visit` on each weight that is read, to change which it is.
            pub(super) fn visit_weights(&mut self, visit: &mut dyn FnMut(&mut WeightId)) {
                match self {
                    $(
                        Op::$op { $($operand,)* .. } => {
                            $( if let Some(weight) = <$kind as OperandKind>::weight($operand) { visit(weight); } )*
                            let _ = &visit;
                        }
                    )*
                }
            }

            /// Attributes that are not left out, as name and text.
            pub(super) fn attributes(&self) -> Vec<(&'static str, String)> {
                match self {
                    $(
                        Op::$op { $($attribute,)* .. } => {
                            let all: Vec<(&'static str, Option<String>)> =
                                vec![$((stringify!($attribute), Attribute::print($attribute))),*];
                            all.into_iter().filter_map(|(name, text)| Some((name, text?))).collect()
                        }
                    )*
                }
            }

            /// The operation named `name`. The error is a sentence without a place.
            pub(super) fn from_parts(
                name: &str,
                operands: &[Operand],
                attributes: &[(String, String)],
            ) -> Result<Op, String> {
                match name {
                    $(
                        $name => {
                            let mut operands = Operands { name: $name, rest: operands, taken: 0 };
                            $( let $operand = operands.take::<$kind>()?; )*
                            operands.end()?;
                            let known: &[&str] = &[$(stringify!($attribute)),*];
                            check_names($name, attributes, known)?;
                            $( let $attribute = attribute::<$type>($name, attributes, stringify!($attribute))?; )*
                            Ok(Op::$op { $($operand,)* $($attribute,)* })
                        }
                    )*
                    _ => Err(format!("there is no operation `{name}`; there are {}", Op::NAMES.join(", "))),
                }
            }
        }
    };
}

operations! {
    /// Rows of the embedding for the step's token ids, multiplied by `scale` if there is one: `w [vocab, H]` → `f32[T, H]`.
    "embed" Imported Embed(w: WeightId) { scale: Option<f32> }

    /// `(x × r) × w` with `r = 1 / sqrt(mean(x²) + eps)`, by row: `x f32[R, H]`, `w [H]` → `f32[R, H]`.
    "rms_norm" Imported RmsNorm(x: ValueId, w: WeightId) { eps: f32 }

    /// Matrix product: `x f32[.., C]` or `q8[.., C]`, `w [R, C]` → `f32[.., R]`.
    "matmul" Imported Matmul(x: ValueId, w: WeightId) {}

    /// `x + w` for each row: `x f32[.., C]`, `w [C]` → the same.
    "add_bias" Imported AddBias(x: ValueId, w: WeightId) {}

    /// [`Op::RmsNorm`] of each head by itself, with one weight for all: `x f32[T, heads × head_dim]`, `w [head_dim]` → the same. With
    /// `across`, one norm of all heads together: `w [heads × head_dim]`. Squares are summed in the order of heads padded as in memory.
    "head_norm" Imported HeadNorm(x: ValueId, w: WeightId) { heads: usize, head_dim: usize, eps: f32, across: bool }

    /// Rotary embedding of `heads` heads by the tokens' positions, halves rotated against each other, then multiplied by
    /// `scale` unless that is 1: `x f32[T, heads × head_dim]` → the same.
    "rope" Imported Rope(x: ValueId) { heads: usize, head_dim: usize, scale: f32 }

    /// Writes keys and values of the step's tokens to the cache of `layer`: `k`, `v` `f32[T, kv_heads × head_dim]` → `kv`.
    "kv_store" Imported KvStore(k: ValueId, v: ValueId) { layer: usize, kv_heads: usize, head_dim: usize }

    /// Softmax attention of `q` (rotated and scaled) over the cached keys up to and including the token's own; with `window` only the last
    /// `window` of them. With `cap` scores go through `cap × tanh(score / cap)` before. `q f32[T, heads × head_dim]`, `kv` of the same layer →
    /// `f32[T, heads × head_dim]`.
    "attention" Imported Attention(q: ValueId, kv: ValueId) {
        layer: usize, heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>, cap: Option<f32>
    }

    /// Elementwise sum of two f32 values of one shape.
    "add" Imported Add(a: ValueId, b: ValueId) {}

    /// Elementwise product of two f32 values of one shape.
    "mul" Imported Mul(a: ValueId, b: ValueId) {}

    /// Elementwise `x / (1 + exp(-x))`.
    "silu" Imported Silu(x: ValueId) {}

    /// Elementwise `x/2 × (1 + tanh(√(2/π) × (x + 0.044715 x³)))`.
    "gelu" Imported Gelu(x: ValueId) {}

    /// Elementwise `cap × tanh(x / cap)`: `f32[R, C]` → the same.
    "soft_cap" Imported SoftCap(x: ValueId) { cap: f32 }

    /// `x × sigmoid(gate)`, one gate for each row: `x f32[T, C]`, `gate f32[T, 1]` → `f32[T, C]`.
    "gate_rows" Imported GateRows(x: ValueId, gate: ValueId) {}

    /// The `k` largest of each row, falling, ties to the lower index, and their softmax, over these or over all as `scores` says:
    /// `f32[T, E]` → experts `i32[T, k]`, weights `f32[T, k]`.
    "top_k" Imported TopK(logits: ValueId) { k: usize, selection: Selection, scores: Scores }

    /// Products with the matrices of each token's experts: `x f32|q8[T, C]` or `[T, k, C]`, `experts i32[T, k]`, `w [E, R, C]` →
    /// `f32[T, k, R]`.
    "expert_matmul" Imported ExpertMatmul(x: ValueId, experts: ValueId, w: WeightId) {}

    /// `Σ_s weights[t, s] × y[t, s]`, in order of s: `y f32[T, k, H]`, `weights f32[T, k]` → `f32[T, H]`.
    "expert_combine" Imported ExpertCombine(y: ValueId, weights: ValueId) {}

    /// The rows that need logits: `f32[T, H]` → `f32[L, H]`.
    "select_rows" Imported SelectRows(x: ValueId) {}

    /// The step's logits: `f32[L, vocab]`; no result. The last node of a graph.
    "output" Imported Output(x: ValueId) {}

    /// Columns `start .. start + len`: `f32[R, C]` → `f32[R, len]`.
    "slice" Fused Slice(x: ValueId) { start: usize, len: usize }

    /// [`Op::Matmul`] with the rows of q, k and v, [`Op::Rope`] of q (with `scale`) and of k (without), and [`Op::KvStore`]:
    /// `x f32|q8[T, C]`, `w [(heads + 2 × kv_heads) × head_dim, C]` → q `f32[T, heads × head_dim]`, `kv`.
    "qkv_rope_store" Fused QkvRopeStore(x: ValueId, w: WeightId) {
        layer: usize, heads: usize, kv_heads: usize, head_dim: usize, scale: f32
    }

    /// `activation(g) × u` for the products `g`, `u` with the two halves of a [`Source::GateUp`](super::Source::GateUp):
    /// `x f32|q8[T, C]`, `w [2 × F, C]` → `f32[T, F]`.
    "gate_up" Fused GateUp(x: ValueId, w: WeightId) { activation: Activation }

    /// [`Op::GateUp`] with the matrices of each token's experts: `x f32|q8[T, C]`, `experts i32[T, k]`, `w [E, 2 × F, C]` →
    /// `f32[T, k, F]`. `order` is there when `dispatch` is grouped.
    "expert_gate_up" Fused ExpertGateUp(x: ValueId, experts: ValueId, w: WeightId) {
        activation: Activation, dispatch: Dispatch, order: Option<ValueId>
    }

    /// `residual + x·wᵀ`.
    "matmul_add" Fused MatmulAdd(x: ValueId, w: WeightId, residual: ValueId) {}

    /// `residual + Σ_s weights[t, s] × (h[t, s] · w[experts[t, s]]ᵀ)`: `h f32|q8[T, k, F]`, `w [E, H, F]` → `f32[T, H]`. `order`
    /// is there when `dispatch` is grouped.
    "expert_down_add" Fused ExpertDownAdd(h: ValueId, experts: ValueId, weights: ValueId, w: WeightId, residual: ValueId) {
        dispatch: Dispatch, order: Option<ValueId>
    }

    /// Rows quantized to signed bytes, with scales and sums as [`Graph::row_content`](super::Graph::row_content) says: `f32[.., C]` → `q8[.., C]`.
    "quantize" Fused Quantize(x: ValueId) {}

    /// [`Op::RmsNorm`] → the result quantized, and as f32: `f32[R, H]` → `q8[R, H]`, `f32[R, H]`.
    "norm_quantize" Fused NormQuantize(x: ValueId, w: WeightId) { eps: f32 }

    /// The (token, slot) pairs `t × k + s`, stably sorted by their expert, which is below `count`: `i32[T, k]` → `i32[T, k]`.
    "sort_by_expert" Fused SortByExpert(experts: ValueId) { count: usize }
}

impl Op {
    /// The values that are read, in the order of the text form, optional ones last.
    pub fn values(&self) -> Vec<ValueId> {
        let mut values = Vec::new();
        self.clone().visit_values(&mut |v| values.push(*v));
        values
    }

    /// The weight that is read; no operation reads two.
    pub fn weight(&self) -> Option<WeightId> {
        self.operands().into_iter().find_map(|operand| match operand {
            Operand::Weight(w) => Some(w),
            Operand::Value(_) => None,
        })
    }
}

/// Operands being taken one by one.
struct Operands<'a> {
    name: &'static str,
    rest: &'a [Operand],
    taken: usize,
}

impl Operands<'_> {
    fn take<K: OperandKind>(&mut self) -> Result<K, String> {
        let place = self.taken + 1;
        let Some((first, rest)) = self.rest.split_first() else {
            return Err(format!("operand {place} of `{}` is missing: expected {}", self.name, K::EXPECTED));
        };
        self.rest = rest;
        self.taken = place;
        K::from_operand(*first).ok_or_else(|| format!("operand {place} of `{}` must be {}", self.name, K::EXPECTED))
    }

    fn end(&self) -> Result<(), String> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(format!("`{}` takes {} operands, found {}", self.name, self.taken, self.taken + self.rest.len()))
    }
}

fn check_names(op: &str, attributes: &[(String, String)], known: &[&str]) -> Result<(), String> {
    for (i, (name, _)) in attributes.iter().enumerate() {
        if !known.contains(&name.as_str()) {
            return Err(format!("`{op}` has no attribute `{name}`; it has {}", known.join(", ")));
        }
        if attributes[..i].iter().any(|(other, _)| other == name) {
            return Err(format!("attribute `{name}` is given twice"));
        }
    }
    Ok(())
}

fn attribute<A: Attribute>(op: &str, attributes: &[(String, String)], name: &str) -> Result<A, String> {
    let text = attributes.iter().find(|(n, _)| n == name).map(|(_, text)| text.as_str());
    A::parse(text).map_err(|expected| match text {
        Some(text) => format!("attribute `{name}` of `{op}` must be {expected}, found `{text}`"),
        None => format!("`{op}` needs the attribute `{name}`: {expected}"),
    })
}
